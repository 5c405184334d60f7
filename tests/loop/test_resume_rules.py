"""What a changed flag does at a resume: a test for each flag of each script, made from the table and the parsers."""

import ppdiffusers_train  # noqa: F401

import contextlib
import io
import json
import random

import pytest

from ppdiffusers_train.arguments.parser import Flag
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.loop.identity import public_arguments
from ppdiffusers_train.loop.resume_rules import APPLIED, FREE, REFUSED, describe_changes, refuse_mixture
from ppdiffusers_train.loop.run import resolve_run
from ppdiffusers_train.runtime.checkpoint import write_checkpoint
from tests.conftest import load_script
from tests.test_architecture import SCRIPTS

pytestmark = pytest.mark.once

ENDS_PROCESS = {"help"}
VALUES = ["2", "3", "0.25", "64", "other", "black", "a=2"]  # of which each flag takes one


def actions_of(script):
    return [action for action in load_script(script).build_parser()._actions if action.dest not in ENDS_PROCESS]


def test_each_flag_of_each_script_has_one_rule_and_each_rule_is_of_a_flag():
    flags = {action.dest for script in SCRIPTS for action in actions_of(script)}
    assert flags == REFUSED | APPLIED | FREE
    assert len(flags) == len(REFUSED) + len(APPLIED) + len(FREE)


def changed(parser, flags: list, action, folder):
    """The arguments with another value of one flag."""
    before, name = getattr(parser.parse_args(flags), action.dest), action.option_strings[0]
    if isinstance(action, Flag):
        candidates = [[name], [name.replace("--", "--no_", 1)]]
    else:
        many = action.nargs if isinstance(action.nargs, int) else 1
        values = action.choices or ([str(folder / "other")] if action.dest.endswith("_dir") else VALUES)
        candidates = [[name, *[str(value)] * many] for value in values]
    for more in candidates:
        with contextlib.suppress(SystemExit, UserError), contextlib.redirect_stderr(io.StringIO()):
            args = parser.parse_args([*flags, *more])
            if getattr(args, action.dest) != before:
                return args
    raise AssertionError(f"no other value of {name}")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_change_of_each_flag_does_what_the_table_says(script, tmp_path):
    """By the functions that a resume calls, with the checkpoint's flags from its file."""
    parser = load_script(script).build_parser()
    required = [f"{a.option_strings[0]}=base" for a in parser._actions if a.required and a.option_strings]
    flags = [*required, f"--output_dir={tmp_path}", "--seed=0"]
    saved = {"arguments": json.loads(json.dumps(public_arguments(parser.parse_args(flags)), default=str))}
    seen = set()
    for action in actions_of(script):
        if action.dest == "config":
            continue  # its keys are the other flags
        now = public_arguments(changed(parser, flags, action, tmp_path))
        rule = next(rule for rule in (REFUSED, APPLIED, FREE) if action.dest in rule)
        name = f"--{action.dest}"
        if rule is REFUSED:
            with pytest.raises(UserError, match=rf"^{name}: .*, which would mix two runs; expected (no )?{name}[ ,]"):
                refuse_mixture("checkpoint-1", saved, now, {})
            refuse_mixture("checkpoint-1", {**saved, "arguments": now}, now, {})
        else:
            refuse_mixture("checkpoint-1", saved, now, {})
            line = describe_changes(tmp_path / "checkpoint-1", saved, now)
            assert (f"{name} " in line) == (rule is APPLIED), (name, line)
        seen.add(action.dest)
    assert len(seen) > 80


def test_a_value_that_a_flag_has_anyway_is_no_change():
    saved = {"arguments": {"lora_rank": 4, "lora_alpha": None, "prediction_type": None, "snr_gamma": None}}
    base = {"weights": {}, "settings": {"scheduler": "a"}}
    refuse_mixture("checkpoint-1", {**saved, **base}, {"lora_rank": 4, "lora_alpha": 4, "prediction_type": "x"}, base)
    with pytest.raises(UserError, match="--lora_alpha: .* expected no --lora_alpha, or a new run"):
        refuse_mixture("checkpoint-1", saved, {"lora_rank": 4, "lora_alpha": 8}, base)
    other = {**base, "settings": {"scheduler": "b"}}
    with pytest.raises(UserError, match="--prediction_type: .* expected no --prediction_type, or a new run"):
        refuse_mixture("checkpoint-1", {**saved, **base}, {"prediction_type": "x"}, other)
    with pytest.raises(UserError, match="was trained from other settings of scheduler; expected the same"):
        refuse_mixture("checkpoint-1", {**saved, **base}, {}, other)


def test_a_change_of_a_flag_gets_as_far_as_the_rules_or_is_refused_by_its_name(tmp_path):
    """`resolve_run` with the checkpoint of a run, for each flag of a script."""
    script = next(path for path in SCRIPTS if path.stem == "train_text_to_image_lora_sdxl")
    parser, out = load_script(script).build_parser(), tmp_path / "out"
    flags = ["--pretrained_model_name_or_path=base", f"--output_dir={out}", "--resume_from_checkpoint=latest"]
    record = {"arguments": public_arguments(parser.parse_args(flags)), "seed": 7, "run": "a", "position": 2}
    write_checkpoint(out, 1, lambda folder: None, json.loads(json.dumps(record, default=str)))
    (out / "training_args.json").write_text(json.dumps({"run": "a"}))
    actions = actions_of(script)
    random.Random(0).shuffle(actions)
    refused = []
    for action in actions:
        if action.dest in ("config", "dry_run", "resume_from_checkpoint", "output_dir"):
            continue
        args = changed(parser, flags, action, tmp_path)
        try:
            run = resolve_run(args)
        except UserError as error:
            assert f"--{action.dest}" in str(error), (action.dest, error)
            refused.append(action.dest)
            continue
        with run.lock:
            assert run.id == "a" and run.checkpoint.name == "checkpoint-1" and run.saved["position"] == 2
            assert run.args.seed == (args.seed if action.dest == "seed" else 7)
    # Those that contradict each other, or that need something which is not here.
    expected = {"sharding_degree", "sharding_stage", "overwrite_output_dir", "push_to_hub", "report_to", "hub_model_id"}
    expected |= {"class_data_dir", "class_prompt", "with_prior_preservation", "optimizer_args", "fused_backward"}
    expected |= {"max_grad_norm_per_parameter", "text_encoder_lr", "validation_prompts_file"}
    assert set(refused) <= expected, refused
