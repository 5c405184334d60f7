"""What a run writes: checkpoints while it lasts and when it is stopped, and its result."""

import shutil
from pathlib import Path

from ppdiffusers_train.errors import RunError
from ppdiffusers_train.launcher.last_word import print_after_launcher
from ppdiffusers_train.launcher.signals import StopRequest
from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.state import OPTIMIZER, TrainingState
from ppdiffusers_train.reporting.hub import push_to_hub
from ppdiffusers_train.runtime.checkpoint import replace_children, write_checkpoint
from ppdiffusers_train.runtime.distributed import Ranks
from ppdiffusers_train.tensor_files import cast_files

SHARDS = ".shards-"  # how the name of the folder begins in which ranks collect their shares of a checkpoint


def remove_stale_shards(output_dir: Path) -> None:
    """Remove what a run that was killed while it wrote a checkpoint has left."""
    for folder in output_dir.glob(f"{SHARDS}*"):
        shutil.rmtree(folder, ignore_errors=True)


def save_checkpoint(plan: Plan, state: TrainingState) -> bool:
    """Write `checkpoint-<step>`: rank 0 all of it, but a sharded optimizer's share each rank that holds one.

    Returns:
        Whether rank 0, if this is it, has written it.
    Raises:
        RunError: it cannot be written, and `--on_save_error` is not `continue`.
    """
    ranks, output_dir, args = plan.run.ranks, plan.run.output_dir, plan.run.args
    shards = output_dir / f"{SHARDS}{ranks.name}"
    failures = [""]
    if ranks.sharding_degree > 1:
        # And now all of them are there.
        failure = write_shard(state, ranks, shards)
        failures = ranks.gather_objects(failure, "the others to write their shares of a checkpoint")

    def write(folder):
        state.save(folder)
        if ranks.sharding_degree == 1:
            state.save_optimizer(folder, OPTIMIZER)
        else:
            for file in shards.iterdir():
                file.rename(folder / file.name)

    with state.float32_weights(only_main=True), ranks.only_main("a checkpoint to be written") as is_turn:
        if is_turn:
            try:
                if any(failures):
                    raise OSError(next(filter(None, failures)))
                record = {**plan.info, **state.record()}
                write_checkpoint(output_dir, state.step, write, record, args.checkpoints_total_limit)
            except OSError as error:
                message = f"checkpoint-{state.step} cannot be written to {str(output_dir)!r}: {error}"
                if args.on_save_error == "stop":
                    raise RunError(f"{message}; earlier checkpoints are untouched") from error
                plan.run.log(f"{message}; continuing")
                return False
            finally:
                shutil.rmtree(shards, ignore_errors=True)
    return ranks.is_main


def write_shard(state: TrainingState, ranks: Ranks, folder: Path) -> str:
    """Write this rank's share of the optimizer's state, where it has to; returns what kept it from that, or nothing."""
    if not ranks.holds_a_shard:
        return ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state.save_optimizer(folder, f"{OPTIMIZER}-{ranks.rank + 1:05d}-of-{ranks.sharding_degree:05d}")
    except OSError as error:
        return f"rank {ranks.rank}: {error}"
    return ""


def write_result(plan: Plan) -> None:
    """Write what the run was for into its folder, and upload it where that is asked for."""
    module, output_dir, args = plan.module, plan.run.output_dir, plan.run.args

    def save(folder):
        module.save_pretrained(folder)
        if args.save_dtype:
            cast_files(folder, args.save_dtype)

    try:
        replace_children(output_dir, save)
    except OSError as error:
        raise RunError(
            f"the result cannot be written to {str(output_dir)!r}: {error}; the same command with "
            "--resume_from_checkpoint latest goes on from the last checkpoint"
        ) from error
    plan.run.log(f"wrote the result to {output_dir}")
    if args.push_to_hub:
        url = push_to_hub(output_dir, args.hub_model_id, args.hub_token, module.card_data(), args.validation_prompts)
        plan.run.log(f"uploaded to {url}")


def end_stopped(stop: StopRequest, plan: Plan, state: TrainingState, is_written: bool) -> None:
    """End a run that a signal has stopped, on every rank with one line and the status 128 + the number of the signal.

    Args:
        is_written: whether rank 0 has written the checkpoint; of other ranks nobody asks.
    """
    checkpoint = plan.run.output_dir / f"checkpoint-{state.step}"
    where = f"after step {state.step} of {plan.total_steps}"
    # Not every rank has to have got it. And one that ends takes the others down: first, all have to be here.
    told = plan.run.ranks.gather_objects((stop.received, is_written))
    received = next(number for number, _ in told if number)
    written = f"wrote {checkpoint} {where}; resume with --resume_from_checkpoint latest"
    message = f"{received.name}: {written if told[0][1] else f'ended {where}, without a checkpoint'}"
    print(message, flush=True)
    print_after_launcher(message)
    raise SystemExit(128 + received)
