import ppdiffusers_train  # noqa: F401

import pytest

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.loop.run import resolve_run
from ppdiffusers_train.loop.schedule import check_schedule
from tests.conftest import KANDINSKY, load_script


def test_arithmetic_is_set_with_the_flags_before_any_model_computes(tmp_path):
    """Models may compute while they are loaded, such as the embedding of an empty prompt."""
    parser = load_script(KANDINSKY / "train_text_to_image_prior.py").build_parser()
    flags = ["--train_data_dir=photos", f"--output_dir={tmp_path}", "--seed=0"]
    for more in ([], ["--deterministic"]):
        with (run := resolve_run(parser.parse_args([*flags, *more]))).lock:
            assert len(run.remarks) == len(more)
    (line,) = run.remarks
    assert line.startswith("--deterministic: no effect"), "a CPU was asked for it, and nothing was loaded yet"


def test_a_polynomial_that_ends_above_its_learning_rate_is_refused(tmp_path):
    parser = load_script(KANDINSKY / "train_text_to_image_prior.py").build_parser()
    flags = ["--lr_scheduler=polynomial", "--lr_warmup_steps=0", "--learning_rate=1e-8"]
    with pytest.raises(UserError, match="--lr_end 1e-07: expected less than the learning rate, which is 1e-08"):
        check_schedule(parser.parse_args(flags), 10, 1)
    check_schedule(parser.parse_args([*flags, "--scale_lr"]), 10, 100)
