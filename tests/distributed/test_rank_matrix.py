"""Every script, handed from one process to two and back, sharded and not: in the end the weights of a run that one
process did without a pause. `make torture` runs all, `make test` the one that has most kinds of parameters."""

import ppdiffusers_train  # noqa: F401

import pytest

from tests.conftest import load_script
from tests.device.jobs import FULL, LORA, Jobs
from tests.distributed.launching import ONE, TWO, assert_close, launch, learned, script

pytestmark = pytest.mark.once

# Who takes a run's first step, its second, ...: to any degree from any other, and both stages of sharding.
STAGE_ONE, STAGE_TWO = ["--sharding_degree=2"], ["--sharding_degree=2", "--sharding_stage=2"]
LEGS = [(1, []), (2, STAGE_ONE), (2, []), (2, STAGE_TWO), (1, [])]
# Text encoders of which some layers never have a gradient, averages, and a learning rate that changes at each step.
RICH = [
    "--train_text_encoder",
    "--use_ema",
    "--lr_scheduler=constant_with_warmup",
    "--lr_warmup_steps=3",
    "--lora_dropout=0.2",
]
MORE = {"lora_sdxl": RICH, "decoder": ["--use_ema"], "prior_lora": ["--trainable_modules=prior.proj_in"]}


@pytest.mark.parametrize(
    "names",
    [pytest.param(["lora_sdxl"], id="lora_sdxl"), pytest.param([*FULL, *LORA], id="all", marks=pytest.mark.slow)],
)
def test_a_run_goes_from_any_number_of_ranks_and_degree_to_any_other(names, kandinsky, sdxl, sd3, sd, photos, tmp_path):
    models = {"kandinsky": kandinsky, "sdxl": sdxl, "sd3": sd3, "sd": sd}

    def flags(out, name, ranks, step, *more):
        jobs = Jobs(models, photos, tmp_path / out)
        run = [f"--encoded_cache_dir={tmp_path / 'cache'}", "--adam_epsilon=1e-4", *(ONE if ranks == 1 else TWO)]
        jobs.add(name, name, *run, f"--max_train_steps={step}", "--checkpointing_steps=1", *MORE.get(name, []), *more)
        return jobs.list[0]["flags"]

    for step, (ranks, sharding) in enumerate(LEGS, start=1):
        more = [*sharding, "--resume_from_checkpoint=latest"]
        runs = [(name, flags("parts", name, ranks, step, *more)) for name in names]
        if ranks == 2:
            launch(tmp_path / f"launch-{step}", runs)
        else:
            for name, flags_of_run in runs:
                load_script(script(name)).main(flags_of_run)
    for name in names:
        load_script(script(name)).main(flags("whole", name, 1, len(LEGS)))
        assert_close(learned(name, tmp_path / "whole" / name), learned(name, tmp_path / "parts" / name), tolerance=1e-5)
