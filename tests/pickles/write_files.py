"""Writes the files of `written_by_torch/`, which the tests read without torch. To be run where torch is."""

from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "written_by_torch"


def tensors() -> dict:
    """Tensors of all types and kinds of views; `numbers` in test_pickles.py has the same by NumPy."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    plain = {str(dtype).removeprefix("torch."): base.to(dtype) for dtype in (*types, torch.int8, torch.uint8)}
    return {
        **plain,
        "bool": base > 7,
        "transposed": base.T,
        "a column": base[:, 2],
        "every second": base[::2, 1::2],
        "a number": torch.tensor(2.5),
        "nothing": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base + 1),
        "twice": torch.arange(3, dtype=torch.int64).expand(1, -1),
    }


def write() -> None:
    """Write all files."""
    FOLDER.mkdir(exist_ok=True)
    torch.save(tensors(), FOLDER / "tensors.bin")
    torch.save(tensors(), FOLDER / "older.bin", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "state_dict": tensors(), "hyper": {"lr": 0.1}}, FOLDER / "lightning.ckpt")
    torch.save(torch.nn.Linear(2, 3).state_dict(), FOLDER / "state_dict.bin")  # with torch's attribute `_metadata`
    torch.save(torch.nn.Linear(2, 3), FOLDER / "module.bin")  # a model as an object: its class would be imported


if __name__ == "__main__":
    write()
