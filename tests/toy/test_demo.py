"""The demo of each job: `ppdiffusers-train demo`, which `make demo` runs."""

import ppdiffusers_train  # noqa: F401
from ppdiffusers_train import cli

import re

import numpy as np
import pytest
from PIL import Image

from ppdiffusers_train.tools.example_files import EXAMPLES
from ppdiffusers_train.toy.demo import jobs
from ppdiffusers_train.toy.demo.demo import PROMPTS
from ppdiffusers_train.toy.world.judge import parse_caption
from ppdiffusers_train.toy.world.shapes import is_held_out
from tests.conftest import load_script


@pytest.mark.once
@pytest.mark.parametrize("name", ["decoder-lora", "prior-lora", "sd3-lora", "lcm-lora"])
def test_the_demo_draws_one_picture_and_says_what_comes_next(name, tmp_path, capsys):
    cli.main(["demo", f"--job={name}", f"--output_dir={tmp_path}", "--max_train_steps=2", "--pictures=30"])
    said = capsys.readouterr().out
    assert f"{tmp_path / name}.png" in said
    width, height = Image.open(tmp_path / f"{name}.png").size
    assert width == 1400 and height == 500
    assert len(np.unique(np.asarray(Image.open(tmp_path / f"{name}.png")).reshape(-1, 4), axis=0)) > 500
    for other, job in jobs.JOBS.items():
        assert f"ppdiffusers-train demo --job {other}\n" in said and f"examples/{job.script} --train_data_dir" in said
    shares = re.findall(r"(before|after): (\d+)% show what the prompt says, (\d+)% (?:outlined|striped|plain)", said)
    assert [when for when, *_ in shares] == ["before", "after"]
    if name in ("decoder-lora", "prior-lora"):
        assert int(shares[0][1]) >= 90 and int(shares[0][2]) == 0, "the pretrained pipeline draws what it is asked for"
    assert len(list((tmp_path / f"{jobs.JOBS[name].look}_30").glob("*.png"))) == 30


@pytest.mark.parametrize("name", jobs.JOBS)
def test_every_jobs_flags_are_those_of_its_script(name):
    job = jobs.JOBS[name]
    parser = load_script(EXAMPLES / job.script).build_parser()
    base = dict.fromkeys(job.model_flags, "models")
    args = parser.parse_args(job.command(base, "data", "result", "--max_train_steps=3"))
    assert [getattr(args, flag) for flag in job.model_flags] == ["models"] * len(base)
    assert (args.train_data_dir, args.output_dir, args.max_train_steps, args.resolution) == ("data", "result", 3, 32)


def test_the_prompts_are_combinations_that_training_never_has():
    assert all(is_held_out(parse_caption(prompt)) for prompt in PROMPTS)
    assert len({parse_caption(prompt).shape for prompt in PROMPTS}) == 4


@pytest.mark.once
def test_a_job_that_does_not_exist_gets_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["demo", "--job=lora"])
    assert end.value.code == 2 and "prior-lora" in capsys.readouterr().err
