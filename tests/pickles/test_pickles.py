"""Pickled weights: good ones are read to the bit, and no file runs code."""

import ast
import contextlib
import pickle
import resource
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.pickles.files import open_pickle
from ppdiffusers_train.tensor_files import read_tensors
from tests.conftest import ROOT
from tests.pickles.hostile import bombs, older, payloads, text, torch_tensor, zipped

pytestmark = pytest.mark.once  # no Paddle in it

BY_TORCH = Path(__file__).parent / "written_by_torch"
HOSTILE = payloads("MARKER")
SOURCES = [*(ROOT / "ppdiffusers_train").rglob("*.py"), *(ROOT / "examples").glob("*/*.py")]
WRAPPINGS = {
    "x.pdparams": lambda pickled: pickled,
    "x.bin": zipped,
    "older.bin": older,
    "x.ckpt": lambda pickled: zipped(pickled, folder="another name"),
}


def numbers():
    """What `write_files.py` has torch write."""
    base = np.arange(24, dtype="float32").reshape(4, 6)
    types = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")
    return {
        **{name: base.astype(name) for name in types},
        "bfloat16": base.astype(ml_dtypes.bfloat16),
        "bool": base > 7,
        "transposed": base.T,
        "a column": base[:, 2],
        "every second": base[::2, 1::2],
        "a number": np.float32(2.5),
        "nothing": np.zeros((0, 3), "float32"),
        "parameter": base + 1,
        "twice": np.arange(3).reshape(1, 3),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and list(found[name].shape) == list(array.shape), name
        assert np.array_equal(found[name], array), name


@pytest.mark.parametrize("name", ["tensors.bin", "older.bin", "lightning.ckpt"])
def test_files_of_torch_are_read_to_the_bit(name):
    found, metadata = read_tensors(BY_TORCH / name)
    assert_same(found, numbers())
    assert metadata == {"format": "pt"}


def test_attributes_of_a_state_dict_do_no_harm():
    assert {name: list(t.shape) for name, t in open_pickle(BY_TORCH / "state_dict.bin").items()} == {
        "weight": [3, 2],
        "bias": [3],
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("size", [3, 5000])  # short contents are kept in memory, longer ones stay in the file
def test_arrays_of_numpy_are_read_to_the_bit(tmp_path, protocol, size):
    base = np.random.default_rng(0).integers(0, 256, size * 8, dtype="uint8")
    expected = {name: base.view(name) for name in ("float64", "float32", "float16", "int64", "int8", "uint8")}
    expected |= {"bool": base > 100, "columns": np.asfortranarray(base.view("int32").reshape(2, -1)).T}
    expected |= {"plane": np.asfortranarray(base.view("int16").reshape(4, -1)), "none": np.zeros((0, 4), "float32")}
    names = {"StructuredToParameterName@@": {name: f"linear_0.{name}" for name in expected}}
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps({**expected, **names, "half": np.float32(0.5)}, protocol))
    found, metadata = read_tensors(tmp_path / "x.pdparams")
    assert all(found[name].tobytes() == np.ascontiguousarray(array).tobytes() for name, array in expected.items())
    assert_same({name: array.view("uint8") for name, array in found.items() if array.ndim == 1}, {
        name: np.asarray(array).view("uint8") for name, array in expected.items() if array.ndim == 1
    })  # fmt: skip
    assert found["half"] == 0.5 and metadata == {"format": "pd"}


def test_paddle_s_bfloat16_and_its_cut_arrays_are_read(tmp_path):
    whole = np.arange(12, dtype="float32")
    content = {
        "half": np.array([1.5, -2], ml_dtypes.bfloat16).view("uint16"),
        "large@@.0": whole[:5],
        "large@@.1": whole[5:],
        "UnpackBigParamInfor@@": {"large": {"OriginShape": (3, 4), "slices": ["large@@.0", "large@@.1"]}},
        "pair": ("linear_0.w_0", whole),
        "step": 7,
        "note": "text",
    }
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps(content, 2))
    expected = {"half": np.array([1.5, -2], ml_dtypes.bfloat16), "large": whole.reshape(3, 4), "pair": whole}
    assert_same(read_tensors(tmp_path / "x.pdparams")[0], {**expected, "step": np.asarray(7)})


def test_a_tensor_stays_in_the_file_until_it_is_fetched(tmp_path):
    arrays = {str(number): np.full(2**18, number, "float32") for number in range(16)}
    for protocol in (2, 4):
        (tmp_path / "x.pdparams").write_bytes(pickle.dumps(arrays, protocol))
        tracemalloc.start()
        for name, tensor in open_pickle(tmp_path / "x.pdparams").items():
            assert np.array_equal(tensor.numpy(), arrays[name])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * 2**20, peak


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("attempt", HOSTILE)
def test_no_pickle_runs_code(tmp_path, monkeypatch, attempt, wrapping):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    file = tmp_path / wrapping
    file.write_bytes(WRAPPINGS[wrapping](HOSTILE[attempt]))
    with pytest.raises(UserError) as refused:
        read_tensors(file)
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)
    assert set(tmp_path.iterdir()) - before == {file}


def test_python_s_own_reader_would_run_them(tmp_path, monkeypatch):
    """The corpus is what it claims to be."""
    monkeypatch.chdir(tmp_path)
    ran = set()
    for attempt, pickled in HOSTILE.items():
        with contextlib.suppress(Exception):
            pickle.loads(pickled)
        if Path("MARKER").exists():
            ran.add(attempt)
            Path("MARKER").unlink()
    assert len(ran) > 25, sorted(HOSTILE.keys() - ran)


@pytest.mark.parametrize("bomb", bombs())
def test_what_a_pickle_only_declares_takes_no_memory(tmp_path, bomb):
    pickled, limits = bombs()[bomb], resource.getrlimit(resource.RLIMIT_AS)
    for name in ("x.pdparams", "x.bin"):
        (tmp_path / name).write_bytes(WRAPPINGS[name](pickled))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
        try:
            with pytest.raises(UserError, match="cannot be read as pickled weights"):
                read_tensors(tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)


FOUR = np.arange(4, dtype="float32").tobytes()
LAYOUTS = {
    "of more numbers than there are": zipped(torch_tensor(4, shape=(5,)), s0=FOUR),
    "that starts too late": zipped(torch_tensor(4, first=1), s0=FOUR),
    "that starts before the numbers": zipped(torch_tensor(4, first=-1), s0=FOUR),
    "with steps beyond the numbers": zipped(torch_tensor(4, strides=(2,)), s0=FOUR),
    "with steps backwards": zipped(torch_tensor(4, strides=(-1,)), s0=FOUR),
    "that shows a number a million times": zipped(torch_tensor(4, shape=(10**6,), strides=(0,)), s0=FOUR),
    "with fewer steps than sizes": zipped(torch_tensor(4, shape=(2, 2)), s0=FOUR),
    "whose storage is short": zipped(torch_tensor(5), s0=FOUR),
    "whose storage is missing": zipped(torch_tensor(4)),
    "of a type that is none": zipped(torch_tensor(4, kind="nn.Module"), s0=FOUR),
    "of complex numbers": zipped(torch_tensor(4, kind="ComplexFloatStorage"), s0=FOUR),
    "that is compressed": zipped(torch_tensor(4), compression=zipfile.ZIP_DEFLATED, s0=FOUR),
    "under another name": zipped(torch_tensor(4), name="other.pkl", s0=FOUR),
    "too deep": zipped(torch_tensor(4), folder="a/b", s0=FOUR),
    "in the older layout without numbers": older(torch_tensor(4), ["0"]),
    "in the older layout of another size": older(torch_tensor(4), ["0"], (3).to_bytes(8, "little") + FOUR),
    "in the older layout of other storages": older(torch_tensor(4), ["1"], (4).to_bytes(8, "little") + FOUR),
}


@pytest.mark.parametrize("damage", LAYOUTS)
def test_a_tensor_that_is_not_in_the_file_is_refused(tmp_path, damage):
    (tmp_path / "x.bin").write_bytes(LAYOUTS[damage])
    with pytest.raises(UserError, match="cannot be read as pickled weights"):
        read_tensors(tmp_path / "x.bin")


def test_many_views_of_the_same_numbers_are_refused(tmp_path):
    """A small file whose tensors would fill the memory one after the other."""
    one = torch_tensor(4)[3:-2].replace(text("w"), b"")  # the tensor's opcodes
    views = b"".join(text(f"w{number}") + one + b"s" for number in range(900))
    (tmp_path / "x.bin").write_bytes(zipped(b"\x80\x02}" + views + b".", s0=FOUR))
    assert len(read_tensors(tmp_path / "x.bin")[0]) == 900  # their names alone are longer
    large = bytes(4 * 10**6)
    views = views.replace((4).to_bytes(8, "little"), (10**6).to_bytes(8, "little"))
    (tmp_path / "x.bin").write_bytes(zipped(b"\x80\x02}" + views + b".", s0=large))
    with pytest.raises(UserError, match="its tensors have 3600000000 bytes, but the file has only"):
        read_tensors(tmp_path / "x.bin")


def test_hand_made_files_are_read_where_nothing_is_wrong(tmp_path):
    for content in (
        zipped(torch_tensor(4), s0=FOUR),
        zipped(torch_tensor(4), folder="x", s0=FOUR),
        older(torch_tensor(4), ["0"], (4).to_bytes(8, "little") + FOUR),
    ):
        (tmp_path / "x.bin").write_bytes(content)
        assert_same(read_tensors(tmp_path / "x.bin")[0], {"w": np.arange(4, dtype="float32")})


UNPICKLING = {f"{module}.{name}" for module in ("paddle", "torch", "np", "pickle") for name in ("load", "loads")}
# What they load: configurations, tokenizers, and what the project itself has written.
LOADING = {"pipeline_folder.py", "unloaded.py", "text.py", "tokenizer.py", "t5.py", "running.py", "train_pipelines.py"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_of_the_package_unpickles(path):
    """Neither by itself, nor by asking a library for a model in a user's folder."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not calls & {*UNPICKLING, "eval", "exec"} and not imported & {"pickle", "dill", "joblib", "shelve"}
    assert path.name in LOADING or not any(call.endswith(".from_pretrained") for call in calls)


def test_two_members_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("a/data.pkl", torch_tensor(4))
        archive.writestr("a/data/0", FOUR)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/data/0", FOUR)
    with pytest.raises(UserError, match="two members called 'a/data/0'"):
        read_tensors(tmp_path / "x.bin")


@pytest.mark.parametrize("name", ["tensors.bin", "older.bin"])
def test_a_file_that_is_cut_short_anywhere_is_one_line(tmp_path, name):
    content = (BY_TORCH / name).read_bytes()
    for length in range(0, len(content) - 1, 61):
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(UserError, match="cannot be read as pickled weights: .*; expected arrays of numbers only"):
            read_tensors(tmp_path / name)


@pytest.mark.parametrize("name", ["tensors.bin", "older.bin", "paddle.pdparams"])
def test_a_damaged_byte_is_one_line_or_other_numbers(tmp_path, name):
    """Never an exception of another kind, and never a call."""
    if name.startswith("paddle"):
        content = pickle.dumps({name: np.ascontiguousarray(array) for name, array in numbers().items()
                                if array.dtype != ml_dtypes.bfloat16}, 4)  # fmt: skip
    else:
        content = (BY_TORCH / name).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            damaged[place] = rng.integers(0, 256)
        (tmp_path / name).write_bytes(damaged)
        with contextlib.suppress(UserError):
            read_tensors(tmp_path / name)


def test_what_a_refused_file_holds_is_named(tmp_path):
    with pytest.raises(UserError, match=r"module\.bin: .* holds torch\.nn\.modules\.linear\.Linear, which is"):
        read_tensors(shutil.copy(BY_TORCH / "module.bin", tmp_path / "module.bin"))
    (tmp_path / "x.bin").write_text("no weights")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "list.bin").write_bytes(pickle.dumps([1, 2], 2))
    (tmp_path / "text.bin").write_bytes(pickle.dumps({"a": "b"}, 2))
    reasons = {
        "x.bin": "it is damaged|it is no pickle|has the opcode", "empty.bin": "ends too early",
        "list.bin": "no dictionary of weights", "text.bin": "no arrays under names", "missing.bin": "No such file",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=f"{name}: cannot be read as pickled weights: .*({reason})"):
            read_tensors(tmp_path / name)
