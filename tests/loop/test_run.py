import ppdiffusers_train  # noqa: F401

from ppdiffusers_train.loop.run import resolve_run
from tests.conftest import KANDINSKY, load_script


def test_arithmetic_is_set_with_the_flags_before_any_model_computes(tmp_path):
    """Models may compute while they are loaded, such as the embedding of an empty prompt."""
    parser = load_script(KANDINSKY / "train_text_to_image_prior.py").build_parser()
    flags = ["--train_data_dir=photos", f"--output_dir={tmp_path}", "--seed=0"]
    assert not resolve_run(parser.parse_args(flags)).remarks
    (line,) = resolve_run(parser.parse_args([*flags, "--deterministic"])).remarks
    assert line.startswith("--deterministic: no effect"), "a CPU was asked for it, and nothing was loaded yet"
