from ppdiffusers_train import arguments

import inspect
import re

import pytest

from ppdiffusers_train.arguments import (
    ArgumentParser,
    Flag,
    add_data_arguments,
    add_output_arguments,
    add_training_arguments,
    add_validation_arguments,
)

pytestmark = pytest.mark.once  # no Paddle in it


@pytest.fixture
def parser():
    parser = ArgumentParser(prog="job.py")
    add_data_arguments(parser)
    add_training_arguments(parser)
    add_output_arguments(parser, "out")
    add_validation_arguments(parser)
    return parser


@pytest.fixture
def config(tmp_path):
    def write(text):
        (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return f"--config={tmp_path / 'c.yaml'}"

    return write


def refusal(parser, capsys, *flags):
    """The one line that the parser prints before it exits with status 2."""
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(list(flags))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--learning_rat=1"], "--learning_rat is not a flag of this script; did you mean --learning_rate?"),
        (["--train_data_dir="], "--train_data_dir/--instance_data_dir: '' is empty; expected a value, or no such flag"),
        (["--dataset_name", ""], "argument --dataset_name: '' is empty; expected a value, or no such flag"),
        (["--offload_ema"], "not a flag of this script; expected no such flag: averages stay on the GPU"),
        (
            ["--prodigy_beta3=1"],
            "--prodigy_beta3 is not a flag of this script; expected --optimizer prodigy, and its options in",
        ),
        (["--zzz"], "--zzz is not a flag of this script; --help lists them"),
        (["photos"], "unexpected argument 'photos'; flags begin with --"),
        (["--train_batch_size=0"], "argument --train_batch_size: '0' is not a whole number above 0"),
        (["--learning_rate=fast"], "argument --learning_rate: 'fast' is not a number from 0 on"),
        (["--background_color=wite"], "'wite' is not a colour; expected a name such as white, or #rrggbb"),
        (["--background_color=#ffffff80"], "'#ffffff80' is not a colour"),
        (["--learning_rate=nan"], "'nan' is not a number from 0 on"),
        (["--adam_beta1=1"], "'1' is not a number from 0 to below 1"),
        (["--seed=-1"], "'-1' is not a whole number from 0 to 2**63 - 1"),
        (["--lr_scheduler=step"], "invalid choice: 'step'"),
        (["--config"], "--config: expected one argument"),
        (["--config=/nowhere/c.yaml"], "--config: cannot read '/nowhere/c.yaml': No such file or directory"),
    ],
)
def test_a_mistake_gets_one_line_that_names_flag_and_value(parser, capsys, flags, expected):
    line = refusal(parser, capsys, *flags)
    assert line.startswith("job.py: error: ") and expected in line


def test_abbreviated_flags_are_refused(parser, capsys):
    assert "did you mean --max_train_steps?" in refusal(parser, capsys, "--max_train_step=3")


def test_both_spellings_of_the_prompts_are_the_same_flag(parser):
    assert parser.parse_args(["--validation_prompt", "a cat"]).validation_prompts == ["a cat"]
    assert parser.parse_args(["--validation_prompts", "a", "b"]).validation_prompts == ["a", "b"]


@pytest.mark.parametrize("text", ["tomato", "Tomato", "#ff6347", "#FF6347"])
def test_a_colour_has_one_value_however_it_is_written(parser, config, text):
    assert parser.parse_args([f"--background_color={text}"]).background_color == "#ff6347"
    assert parser.parse_args([config(f"background_color: '{text}'")]).background_color == "#ff6347"
    assert parser.parse_args([]).background_color == "#ffffff"


def test_config_sets_flags_and_the_command_line_wins(parser, config):
    flag = config("learning_rate: 1e-5\nuse_ema: true\nseed: 0\nvalidation_prompts: [a cat, 一只猫]\ncache_dir: null\n")
    args = parser.parse_args([flag, "--learning_rate=2e-5"])
    assert (args.learning_rate, args.use_ema, args.seed, args.cache_dir) == (2e-5, True, 0, None)
    assert args.validation_prompts == ["a cat", "一只猫"]
    assert parser.parse_args(["--learning_rate=2e-5", flag, "--no_use_ema"]).learning_rate == 2e-5
    assert parser.parse_args([flag, "--no_use_ema"]).use_ema is False


@pytest.mark.parametrize(
    "text, expected",
    [
        ("offload_ema: true", "'offload_ema', which is not a flag; expected no such flag: averages stay on the GPU"),
        ("learning_rat: 1", "sets 'learning_rat', which is not a flag; did you mean --learning_rate?"),
        (
            "offset_noise: true",
            "sets 'offset_noise', which is not a flag; expected --noise_offset 0.1, in",
        ),
        ("train_batch_size: many", "argument --train_batch_size: 'many' is not a whole number above 0"),
        ("use_ema: 3", "sets 'use_ema' to 3; expected true or false"),
        ("background_color: #ffffff", "sets 'background_color' to nothing; a text that begins with # needs quotes"),
        ("train-batch-size: 1", "sets 'train-batch-size', which is not a flag; did you mean --train_batch_size?"),
        ("train_batch_size: ''", "argument --train_batch_size: '' is not a whole number above 0"),
        ("lr_scheduler: --", "argument --lr_scheduler: invalid choice: '--'"),
        ("seed: [1, 2]", "sets 'seed' to a list of 2; expected one value"),
        ("seed: {a: 1}", "sets 'seed' to a group of names; expected one value"),
        ("validation_prompts: [a, [b]]", "sets 'validation_prompts' to a list of lists; expected one value"),
        ("validation_prompts: []", "sets 'validation_prompts' to a list of 0; expected at least one value"),
        ("validation_prompts: [a, --seed=3]", "to '--seed=3'; expected values that do not begin with -"),
        ("- seed", "holds a list; expected lines of the form 'name: value'"),
        ("seed 3", "holds a text; expected lines of the form 'name: value'"),
        ("? [a, b]\n: 3", "has a sequence as a name; expected the name of a flag"),
        ("a: b: c", "is not valid YAML: mapping values are not allowed here"),
        ("seed: 1\n\tuse_ema: true", "is not valid YAML: found character '\\t' that cannot start any token"),
        ("seed: 1\x00", "is not valid YAML: it has the character '\\x00'"),
        ("seed: *x", "is not valid YAML: found undefined alias 'x'"),
        ("seed: 1 \n---\nseed: 2", "is not valid YAML: but found another document"),
        ("<<: {seed: 1}", "sets '<<' to a group of names; expected one value"),
        ("config: other.yaml", "sets 'config', which is not a flag"),
        ("seed: 1\n\nseed: 2", "line 3: sets 'seed', which line 1 has set already; expected it once"),
        ("validation_prompt: a\nvalidation_prompts: b", "sets 'validation_prompts', which line 1 has set already"),
        ("use_ema: true\nno_use_ema: true", "sets 'no_use_ema', which line 1 has set already"),
        ("train_shards_path_or_url: ['pipe:touch it']", "to a command; pipe: is taken from the command line only"),
        (
            "seed: !!python/object/apply:os.system ['touch it']",
            "to a value with the tag 'tag:yaml.org,2002:python/object",
        ),
        ("seed: !other 3", "sets 'seed' to a value with the tag '!other'; expected a plain value"),
        (b"seed: 1\ntrain_data_dir: \xe9t\xe9", "line 2: is not UTF-8: "),
    ],
)
def test_a_mistake_in_the_config_gets_one_line_with_its_place(parser, capsys, config, text, expected):
    line = refusal(parser, capsys, config(text))
    assert expected in line and re.search(r"--config: '.*c.yaml', line \d: ", line), line


def test_a_config_of_lists_without_end_gets_one_line(parser, capsys, config):
    assert "c.yaml': holds lists within lists; expected" in refusal(parser, capsys, config("seed: " + "[" * 10000))


def test_a_value_of_the_config_is_the_text_that_is_written(parser, config):
    """YAML 1.1 reads `no` as false, `1e-4` as a text, `12:30` as 750, `010` as 8, and changes the spelling of dates."""
    text = "\ufeffvalidation_prompts: [no, 12:30, 2020-01-01, &x yes, *x, 1_0]\r\nlearning_rate: 1e-4\r\nseed: 010\r\n"
    args = parser.parse_args([config(text)])
    assert args.validation_prompts == ["no", "12:30", "2020-01-01", "yes", "yes", "1_0"]
    assert (args.learning_rate, args.seed) == (1e-4, 10)
    assert parser.parse_args([config("no_use_ema: false")]).use_ema


NEEDS = {"output_dir": "out", "targets": "to_q"}  # arguments without a default
GROUPS = [function for name, function in vars(arguments).items() if re.fullmatch("add_.*_arguments", name)]


@pytest.mark.parametrize("add_group", GROUPS, ids=lambda function: function.__name__)
def test_help_is_a_sentence_for_each_flag_and_ends_with_its_default(add_group):
    parser = ArgumentParser(prog="job.py")
    add_group(
        parser, **{name: value for name, value in NEEDS.items() if name in inspect.signature(add_group).parameters}
    )
    for action in parser._actions[1:]:
        shown = parser._get_formatter()._expand_help(action)
        assert re.fullmatch(r"[A-Z].*\.", shown) and "None" not in shown, shown
        assert f" {action.dest.upper()}" not in parser.format_help(), "a value named like its flag says nothing"
        if isinstance(action, Flag):
            assert shown.endswith(("(default: on).", "(default: off).")), shown
            continue
        assert (f"(default: {action.default})" in shown) == (action.default is not None)
