"""The loop waits for the device once per step, for its figures, before they change anything.

What is counted are calls of tensors' methods that return values, in the process of one rank: by our code, by models and
by optimizers. A copy that Paddle makes within one of its own kernels is not seen.
"""

import ppdiffusers_train  # noqa: F401

from collections import Counter

import paddle
import pytest

FETCHES = ("numpy", "item", "tolist", "__float__", "__int__", "__bool__", "__index__", "__array__")


class Fetches:
    """Counts calls that bring numbers from the device to Python, one inside another as one."""

    def __init__(self, monkeypatch):
        self.by_name, self.depth = Counter(), 0
        for name in FETCHES:
            monkeypatch.setattr(paddle.Tensor, name, self.counted(name, getattr(paddle.Tensor, name)))

    def counted(self, name, original):
        def fetch(tensor, *arguments, **options):
            self.by_name[name] += not self.depth
            self.depth += 1
            try:
                return original(tensor, *arguments, **options)
            finally:
                self.depth -= 1

        return fetch


@pytest.mark.parametrize(
    "batches, flags", [(1, []), (3, ["--gradient_accumulation_steps=3"]), (1, ["--use_ema", "--snr_gamma=5"])], ids=str
)
@pytest.mark.parametrize("job, shapes", [("decoder", 1), ("prior", 0)])
def test_a_step_fetches_once(job, shapes, batches, flags, kandinsky_jobs, decoder_flags, tmp_path, monkeypatch):
    from ppdiffusers_train.data.dataset import build_dataset
    from ppdiffusers_train.training import check_run, launch_training_task
    from tests.conftest import module_class

    words = [
        *decoder_flags,
        *flags,
        "--max_train_samples=6",
        "--max_train_steps=5",
        f"--encoded_cache_dir={tmp_path / 'cache'}",
    ]
    args = kandinsky_jobs[job].build_parser().parse_args(words)
    check_run(args)
    module, totals = module_class(kandinsky_jobs[job])(args), []
    fetches = Fetches(monkeypatch)
    module.after_step = lambda: totals.append(Counter(fetches.by_name))
    launch_training_task(module, build_dataset(args), args)
    steps = [dict(later - earlier) for earlier, later in zip(totals, totals[1:])]
    # ppdiffusers' projection of image embeddings reads a shape, its batch's size, by way of a tensor.
    forward = {"item": shapes * batches} if shapes else {}
    assert steps == [{**forward, "tolist": 1}] * 4
