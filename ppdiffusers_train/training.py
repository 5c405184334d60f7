"""The one loop. It trains any `DiffusionTrainingModule` and knows no diffusion."""

import ppdiffusers_train  # noqa: F401  (before paddle)

import contextlib
import json
import math
from functools import partial
from pathlib import Path
from signal import Signals

import paddle
from safetensors import SafetensorError

from ppdiffusers_train.data.buckets import assign_buckets, describe_buckets
from ppdiffusers_train.data.encoded_cache import encode_dataset
from ppdiffusers_train.data.loader import PreprocessedSamples, iterate_batches
from ppdiffusers_train.data.order import SampleOrder, micro_batches
from ppdiffusers_train.dry_run import describe_run
from ppdiffusers_train.errors import RunError, UserError
from ppdiffusers_train.module import encode_each
from ppdiffusers_train.reporting.hub import check_hub_login, push_to_hub
from ppdiffusers_train.reporting.progress import Progress
from ppdiffusers_train.reporting.quiet import quiet_libraries
from ppdiffusers_train.reporting.trackers import open_trackers, tracker_names
from ppdiffusers_train.reporting.validation import draw_validation
from ppdiffusers_train.run import (
    notices,
    public_arguments,
    public_command,
    run_identity,
    settle_cache_folder,
    settle_seed,
    versions,
)
from ppdiffusers_train.runtime.checkpoint import find_checkpoint, replace_children, require_writable, write_checkpoint
from ppdiffusers_train.runtime.cpu_levers import COMPILE_FROM_ROWS, CompiledEncode, can_compile, pulled_levers
from ppdiffusers_train.runtime.distributed import Ranks, start_ranks
from ppdiffusers_train.runtime.flops import FlopCounter, peak_tflops
from ppdiffusers_train.runtime.kernel_repairs import repair_kernels
from ppdiffusers_train.runtime.signals import StopRequest
from ppdiffusers_train.runtime.tracing import compile_models
from ppdiffusers_train.state import TrainingState, build_training_state, check_schedule
from ppdiffusers_train.step import backward, describe_failure, losses_by_file, seed_layers, set_training_mode
from ppdiffusers_train.tensor_files import cast_files
from ppdiffusers_train.trainable import choose_trainable


def check_run(args) -> None:
    """Settle what comes before data and models: the cache's folder, and the seed, on which LoRA's first values depend.

    Raises:
        UserError: for all that can be seen to be wrong by then.
    """
    quiet_libraries()
    output_dir, images = Path(args.output_dir), getattr(args, "train_data_dir", None)
    if images and output_dir.resolve().is_relative_to(Path(images).resolve()):
        raise UserError(
            f"--output_dir: {str(output_dir)!r} lies in --train_data_dir, whose images the run's own would join; "
            "expected another folder"
        )
    require_writable(output_dir, "--output_dir")
    tracker_names(args.report_to)
    if args.push_to_hub:
        check_hub_login(args.hub_token)
    if args.save_dtype == "bfloat16" and args.save_format == "ppdiffusers":
        raise UserError(
            "--save_dtype bfloat16: ppdiffusers cannot read such files; expected float32 or float16, or --save_format "
            "diffusers"
        )
    settle_cache_folder(args)
    saved = None
    if args.resume_from_checkpoint:
        saved = find_checkpoint(args.resume_from_checkpoint, output_dir, say=lambda message: None)[1]
    settle_seed(args, saved)


@pulled_levers()
def launch_training_task(module, dataset, args) -> None:
    """Train `module` on `dataset` as `args` say, and write the result to `args.output_dir`.

    Args:
        module: a `DiffusionTrainingModule`; whatever in it is not frozen learns.
        dataset: `len(dataset)`, `dataset[i]` -> row, `dataset.name(i)` -> what to call it in a message.
        args: the flags of `arguments.add_training_arguments` and its siblings.
    Raises:
        UserError: a flag, a sample or the checkpoint to resume from is wrong.
        RunError: the run cannot go on: a loss is not a number, a file cannot be written.
    """
    repair_kernels()
    ranks = start_ranks(args.sharding_degree, args.collective_timeout)
    output_dir = Path(args.output_dir)
    say = print if ranks.is_main else lambda message: None
    checkpoint, saved = None, {}
    if args.resume_from_checkpoint:
        checkpoint, saved = find_checkpoint(args.resume_from_checkpoint, output_dir, say)
    settle_seed(args, saved)
    for part, size in choose_trainable(module, args.trainable_modules).items():
        say(f"--trainable_modules: {part}, {size:,} parameters, learns in full")
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * ranks.world_size
    identity = run_identity(module, dataset, args, saved, samples_per_step)
    order = order_samples(module, dataset, identity["seed"], samples_per_step, say)
    steps_per_epoch = order.steps_per_epoch(samples_per_step)
    total_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    check_schedule(args, total_steps)
    if args.dry_run:
        if ranks.is_main:
            describe_run(module, dataset, args, total_steps, samples_per_step, steps_per_epoch)
        return
    state = build_training_state(module, args, total_steps, samples_per_step, ranks)
    if checkpoint:
        state.load(checkpoint, saved)
        say(f"resumed from {checkpoint} at step {state.step}")
    ranks.broadcast(state.parameters.values())
    state.precision.lower(module, state.optimizer)
    for line in notices(args, state.precision, total_steps):
        say(line)
    learning = sum(parameter.size for parameter in state.parameters.values())
    say(
        f"{type(module).__name__}: {learning:,} parameters learn from {len(dataset)} samples; {total_steps} "
        f"steps of {samples_per_step} samples, {steps_per_epoch} per epoch; seed {identity['seed']}"
    )
    info = {**identity, "arguments": public_arguments(args), "command": public_command(args), "versions": versions()}
    if ranks.is_main:
        (output_dir / "training_args.json").write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
    steps = [
        (window, micro_batches(window, ranks.rank, ranks.world_size, args.train_batch_size, order.bucket))
        for _, window in zip(range(state.step, total_steps), order.windows(state.position, samples_per_step))
    ]
    samples, encode = PreprocessedSamples(dataset, module.preprocess, order), partial(encode_each, module)
    if args.encoded_cache_dir:
        samples = encode_dataset(module, dataset, order, args, ranks, state.precision, state.bad_samples, say)
        encode = None
    elif can_compile(module) and len(dataset) >= COMPILE_FROM_ROWS:
        module.encode = CompiledEncode(module)
    batches = iterate_batches(
        samples, [positions for _, share in steps for positions in share], args.dataloader_num_workers
    )

    set_training_mode(module)
    if args.to_static:
        compile_models(module)
    with contextlib.ExitStack() as on_exit:
        trackers = on_exit.enter_context(
            open_trackers(
                args.report_to if ranks.is_main else "none",
                output_dir / args.logging_dir,
                args.tracker_project_name,
                info["arguments"],
            )
        )
        # What recomputes would be counted twice.
        peak = None if args.gradient_checkpointing else args.peak_tflops or peak_tflops(state.precision.enabled)
        progress = on_exit.enter_context(
            Progress(state.step, total_steps, visible=ranks.is_main, peak_tflops=peak and peak * ranks.world_size)
        )
        stop = on_exit.enter_context(StopRequest())
        for window, share in steps:
            ranks.step = state.step
            seed_layers(order.seed, state.step, ranks.rank)
            with FlopCounter(enabled=progress.counts_next) as counter:
                parts = [backward(module, encode, next(batches), p, window, state, ranks) for p in share]
            progress.counted(counter.total, sum(len(part.positions) for part in parts))
            ranks.average_gradients(state.parameters.values())
            # All that the ranks have to agree on, in one sum; and one look at the device per step.
            bad, signal = sum(len(part.errors) for part in parts), float(bool(stop.received))
            loss = sum((part.loss for part in parts), paddle.zeros([]))
            sums = ranks.sum(paddle.stack([loss, paddle.to_tensor(float(bad)), paddle.to_tensor(signal)]))
            loss, bad, signal, norm = paddle.concat([sums, state.gradient_norm().reshape([1])]).tolist()
            if bad:
                found = ranks.gather({order.row(p): message for part in parts for p, message in part.errors.items()})
                state.bad_samples.add({row: message for part in found for row, message in part.items()}, say)
            # The loss was divided by the window's size; fewer samples came.
            factor = len(window) / max(len(window) - bad, 1)
            learning_rate = state.optimizer.get_lr()
            if not math.isfinite(loss) or not (math.isfinite(norm) or state.precision.scaler.is_enable()):
                state.skipped_steps += 1
                failed = next(filter(None, ranks.gather(describe_failure(parts, norm, ranks, order, dataset))), "")
                if state.skipped_steps > args.skip_nonfinite:
                    raise RunError(f"step {state.step + 1}, {failed}; the last checkpoint is untouched")
                say(f"skipped step {state.step + 1}, {state.skipped_steps} of at most {args.skip_nonfinite}: {failed}")
                state.advance(window)
            elif bad == len(window):
                state.advance(window)
            else:
                state.take_step(window, norm, factor)

            rate = progress.advance(factor * loss, learning_rate, len(window))
            figures = {
                "loss": factor * loss,
                "learning_rate": learning_rate,
                "gradient_norm": factor * norm,
                "samples_per_second": rate,
            }
            trackers.scalars({f"train/{name}": value for name, value in figures.items()}, state.step)
            if args.debug_loss:
                losses = ranks.gather(losses_by_file(parts, len(window), order, dataset))
                trackers.scalars(
                    {f"loss_for/{name}": loss for part in losses for name, loss in part.items()}, state.step
                )
            if state.step % args.checkpointing_steps == 0 or signal:
                save_checkpoint(state, ranks, output_dir, info, args, say)
            if signal:
                progress.close()
                stopped_by = stop.received or Signals.SIGTERM  # another rank may have got it
                say(
                    f"{stopped_by.name}: wrote {output_dir / f'checkpoint-{state.step}'} after step {state.step} of "
                    f"{total_steps}; go on with --resume_from_checkpoint latest"
                )
                ranks.gather(None)  # a rank that ends takes the others down: first, all have to be here
                raise SystemExit(128 + stopped_by)
            if args.validation_prompts and validation_is_due(args, state.step, window.stop, len(dataset), total_steps):
                with ranks.main_first() as is_turn:
                    if is_turn:
                        with state.ema_weights(), state.precision.autocast():
                            picture = draw_validation(
                                module, args.validation_prompts, args.num_validation_images, order.seed
                            )
                        file = output_dir / "validation" / f"step-{state.step}.png"
                        file.parent.mkdir(exist_ok=True)
                        picture.save(file)
                        trackers.image("validation", picture, state.step)
    with ranks.main_first() as is_turn:
        if is_turn:
            write_result(module, state, output_dir, args, say)
    ranks.gather(None)  # rank 0 answers the others' questions whether it is done: it must not end before they know


def order_samples(module, dataset, seed: int, samples_per_step: int, say) -> SampleOrder:
    """Which sample of a run comes when; of buckets, where the module has them, it is said how many images each has."""
    buckets = None
    if module.buckets:
        buckets = assign_buckets(module.buckets, dataset)
        say(describe_buckets(module.buckets, buckets))
    return SampleOrder(seed, len(dataset), buckets, samples_per_step, getattr(dataset, "sequential", False))


def save_checkpoint(state: TrainingState, ranks: Ranks, output_dir: Path, info: dict, args, say) -> None:
    """Write `checkpoint-<step>`: rank 0 all of it, but a sharded optimizer's share each rank that holds one.

    Raises:
        RunError: it cannot be written, and `--on_save_error` is not `continue`.
    """
    shards = [f"optimizer-{i + 1:05d}-of-{ranks.sharding_degree:05d}.safetensors" for i in range(ranks.sharding_degree)]
    if ranks.sharding_degree == 1:
        shards = ["optimizer.safetensors"]
    elif ranks.holds_a_shard:
        state.save_optimizer(output_dir / f".{shards[ranks.rank]}")
    ranks.gather(None)  # now all shares are there

    def write(folder):
        state.save(folder)
        if ranks.sharding_degree == 1:
            state.save_optimizer(folder / shards[0])
        else:
            for name in shards:
                (output_dir / f".{name}").rename(folder / name)

    with ranks.main_first() as is_turn:
        if is_turn:
            try:
                record = {**info, **state.record()}
                write_checkpoint(output_dir, state.step, write, record, args.checkpoints_total_limit)
            except (OSError, SafetensorError) as error:
                message = f"checkpoint-{state.step} cannot be written to {str(output_dir)!r}: {error}"
                if args.on_save_error == "stop":
                    raise RunError(f"{message}; earlier checkpoints are untouched") from error
                say(f"{message}; going on")


def write_result(module, state: TrainingState, output_dir: Path, args, say) -> None:
    """Write what the run was for into `output_dir`, and upload it where that is asked for."""

    def save(folder):
        module.save_pretrained(folder)
        if args.save_dtype:
            cast_files(folder, args.save_dtype)

    try:
        with state.ema_weights():
            replace_children(output_dir, save)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the result cannot be written to {str(output_dir)!r}: {error}; the same command with "
            "--resume_from_checkpoint latest goes on from the last checkpoint"
        ) from error
    say(f"wrote the result to {output_dir}")
    if args.push_to_hub:
        url = push_to_hub(output_dir, args.hub_model_id, args.hub_token, module.card_data(), args.validation_prompts)
        say(f"uploaded to {url}")


def validation_is_due(args, step: int, position: int, rows: int, total_steps: int) -> bool:
    """Whether to draw after `step`, which ended at `position` of the run."""
    if step == total_steps:
        return True
    if args.validation_steps:
        return step % args.validation_steps == 0
    return position % (rows * args.validation_epochs) == 0
