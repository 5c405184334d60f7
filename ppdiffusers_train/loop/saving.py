"""What a run writes: checkpoints during training and when it is stopped, and the result."""

import contextlib
import json
import shutil
from pathlib import Path

from ppdiffusers_train.errors import BadSampleError, NotFiniteError, WriteError, writing
from ppdiffusers_train.launcher.final_message import print_after_launcher
from ppdiffusers_train.launcher.signals import StopRequest, signal_name
from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.prompts import validation_prompts
from ppdiffusers_train.loop.state import OPTIMIZER, TrainingState
from ppdiffusers_train.reporting.hub import push_to_hub
from ppdiffusers_train.reporting.status_line import print_line
from ppdiffusers_train.runtime.checkpoint import write_checkpoint, write_text
from ppdiffusers_train.runtime.distributed import Ranks
from ppdiffusers_train.runtime.run_folder import (
    ARGUMENTS_FILE,
    remove_earlier_checkpoints,
    replace_result,
    set_aside_other_branches,
    set_aside_unlisted_result,
)
from ppdiffusers_train.tensor_files import cast_files

UNTOUCHED = "the last checkpoint is untouched"
SHARDS = ".shards-"  # prefix of the folder in which ranks collect their shards of a checkpoint


def remove_stale_shards(output_dir: Path) -> None:
    """Remove the leftovers of a run that was killed while it wrote a checkpoint."""
    for folder in output_dir.glob(f"{SHARDS}*"):
        shutil.rmtree(folder, ignore_errors=True)


def save_checkpoint(plan: Plan, state: TrainingState) -> bool:
    """Write `checkpoint-<step>`. Rank 0 writes it, except shards of the optimizer's state, which their ranks write.

    Returns:
        True on rank 0 if the checkpoint was written; False on other ranks.
    Raises:
        WriteError: it cannot be written, and `--on_save_error` is not `continue`.
    """
    ranks, output_dir, args = plan.run.ranks, plan.run.output_dir, plan.run.args
    shards = output_dir / f"{SHARDS}{ranks.name}"
    consequence = "continuing" if args.on_save_error == "continue" else "earlier checkpoints are untouched"
    failures = [()]
    if ranks.sharding_degree > 1:
        failure = write_shard(state, ranks, shards)
        failures = ranks.gather_objects(failure, "the others to write their shards of a checkpoint")

    def save(folder):
        state.save(folder)
        if ranks.sharding_degree == 1:
            state.save_optimizer(folder, OPTIMIZER)
        else:
            for file in shards.iterdir():
                file.rename(folder / file.name)

    with state.float32_weights(only_main=True), ranks.only_main("a checkpoint to be written") as is_main:
        if is_main:
            try:
                with writing(f"checkpoint-{state.step}", output_dir, consequence):
                    if any(failures):
                        raise OSError(*next(filter(None, failures)))
                    record = {**plan.info, **state.record()}
                    write_checkpoint(output_dir, state.step, save, record, args.checkpoints_total_limit)
                plan.run.log(f"step {state.step}: wrote checkpoint-{state.step}")
            except WriteError as error:
                if args.on_save_error == "stop":
                    raise
                plan.run.log(str(error))
                return False
            finally:
                shutil.rmtree(shards, ignore_errors=True)
    return ranks.is_main


@contextlib.contextmanager
def checkpoint_before_end(plan: Plan, state: TrainingState):
    """A context in which a sample, or a step that is NaN or inf, that ends the run leaves a checkpoint: nothing has
    changed since the last step, unless some of its gradients have been used in the backward pass."""
    try:
        yield
    except BadSampleError as error:
        raise BadSampleError(f"{error}{save_before_end(plan, state)}") from error
    except NotFiniteError as error:
        if state.gradients.is_torn:
            raise
        raise NotFiniteError(f"{error.reason}{save_before_end(plan, state)}") from error


def save_before_end(plan: Plan, state: TrainingState) -> str:
    """Write a checkpoint, unless there is nothing to lose; returns what to add to the message about the end."""
    if not state.step or not plan.run.args.final_checkpoint or plan.checkpoint_is_due(state):
        return ""
    try:
        is_written = save_checkpoint(plan, state) or not plan.run.ranks.is_main
    except WriteError as error:
        return f"; {error}"
    return f"; wrote checkpoint-{state.step} before it" if is_written else ""


def write_shard(state: TrainingState, ranks: Ranks, folder: Path) -> tuple:
    """Write this rank's shard of the optimizer's state, if it holds one.

    Returns:
        (errno, reason) if it cannot be written, else an empty tuple.
    """
    if not ranks.holds_a_shard:
        return ()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state.save_optimizer(folder, f"{OPTIMIZER}-{ranks.rank + 1:05d}-of-{ranks.sharding_degree:05d}")
    except OSError as error:
        return error.errno, f"rank {ranks.rank}: {error.strerror or error}"
    return ()


def claim_folder(plan: Plan, step: int) -> None:
    """Make the run's folder its own before the first step: what other runs, or this one, left there is put aside."""
    run = plan.run
    text = json.dumps(plan.info, indent=1, ensure_ascii=False)
    with writing(f"--output_dir: {ARGUMENTS_FILE}", run.output_dir, UNTOUCHED):
        remove_stale_shards(run.output_dir)
        set_aside_other_branches(run.output_dir, run.id, run.checkpoint, step, run.log)
        if run.args.overwrite_output_dir:
            remove_earlier_checkpoints(run.output_dir, run.id)
        set_aside_unlisted_result(run.output_dir, run.log)
        write_text(run.output_dir / ARGUMENTS_FILE, text)


def write_result(plan: Plan, step: int) -> None:
    """Write the result into the run's folder."""
    module, output_dir, args = plan.module, plan.run.output_dir, plan.run.args

    def save(folder):
        module.save_pretrained(folder)
        if dtype := args.save_dtype or ("float32" if args.param_dtype == "bf16" else None):
            cast_files(folder, dtype)

    consequence = "the same command with --resume_from_checkpoint latest resumes from the last checkpoint"
    with writing("the result", output_dir, consequence):
        replace_result(output_dir, plan.run.id, step, save)
    plan.run.log(f"wrote the result to {output_dir}")


def upload_result(plan: Plan) -> None:
    """Upload the result, with a model card that shows the last validation images."""
    args = plan.run.args
    card = plan.info["card"]
    prompts = [prompt.text for prompt in validation_prompts(args)]
    url = push_to_hub(plan.run.output_dir, args.hub_model_id, args.hub_token, card, prompts)
    plan.run.log(f"uploaded to {url}")


def end_stopped(stop: StopRequest, plan: Plan, state: TrainingState, is_written: bool) -> None:
    """End a run that a signal has stopped: on every rank, one line and the exit status 128 + the signal's number.

    Args:
        is_written: whether rank 0 has written the checkpoint; ignored on other ranks.
    """
    checkpoint = plan.run.output_dir / f"checkpoint-{state.step}"
    where = f"after step {state.step} of {plan.total_steps}"
    # Perhaps not every rank has received the signal. All ranks meet here first: one that ends would end the others.
    found = plan.run.ranks.gather_objects((stop.received, is_written))
    received = next(number for number, _ in found if number)
    written = f"wrote {checkpoint} {where}; resume with --resume_from_checkpoint latest"
    message = f"{signal_name(received)}: {written if found[0][1] else f'ended {where}, without a checkpoint'}"
    print_after_launcher(message)
    print_line(message)
    raise SystemExit(128 + received)
