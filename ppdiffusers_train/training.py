"""The one loop. It trains any `DiffusionTrainingModule` and knows no diffusion."""

import ppdiffusers_train  # noqa: F401  (before paddle)

import contextlib
import json
from collections import deque
from functools import partial
from pathlib import Path

import paddle

from ppdiffusers_train.cpu.kernel_repairs import repair_kernels
from ppdiffusers_train.cpu.patches import COMPILE_FROM_ROWS, CompiledEncode, can_compile, pulled_levers
from ppdiffusers_train.data.buckets import assign_buckets, describe_buckets
from ppdiffusers_train.data.encoded_cache import encode_dataset
from ppdiffusers_train.data.identity import agree_on_data
from ppdiffusers_train.data.loader import PreprocessedSamples, iterate_batches, to_device
from ppdiffusers_train.data.order import SampleOrder, micro_batches
from ppdiffusers_train.draws import iterate_draws
from ppdiffusers_train.errors import RunError, UserError
from ppdiffusers_train.launcher.signals import StopRequest
from ppdiffusers_train.launcher.stand_in import ask_for_time
from ppdiffusers_train.loop.dry_run import describe_run
from ppdiffusers_train.loop.identity import (
    choose_checkpoint,
    compared_code,
    compared_flags,
    job_code,
    notices,
    public_arguments,
    public_command,
    run_identity,
    set_arithmetic,
    settle_cache_folder,
    settle_folders,
    settle_seed,
    versions,
)
from ppdiffusers_train.loop.memory_estimate import compute_on_cpu
from ppdiffusers_train.loop.saving import end_stopped, remove_stale_shards, save_checkpoint, write_result
from ppdiffusers_train.loop.state import (
    StepFigures,
    TrainingState,
    build_training_state,
    check_optimizer,
    check_schedule,
)
from ppdiffusers_train.loop.step import backward, describe_failure, losses_by_file, seed_layers, set_training_mode
from ppdiffusers_train.loop.validation import draw_validation
from ppdiffusers_train.module import choose_trainable, encode_each
from ppdiffusers_train.reporting.hub import check_hub_login
from ppdiffusers_train.reporting.progress import Progress
from ppdiffusers_train.reporting.quiet import quiet_libraries
from ppdiffusers_train.reporting.trackers import open_trackers, tracker_names
from ppdiffusers_train.runtime.agreement import agree, model_digests
from ppdiffusers_train.runtime.checkpoint import require_writable
from ppdiffusers_train.runtime.distributed import Ranks, start_ranks
from ppdiffusers_train.runtime.flops import FlopCounter, peak_tflops
from ppdiffusers_train.runtime.folder_lock import folder_held, wait_for_folder
from ppdiffusers_train.runtime.tracing import compile_models


def check_run(args) -> None:
    """Settle what comes before data and models: the cache's folder, and the seed, on which LoRA's first values depend.

    Raises:
        UserError: for all that can be seen to be wrong by then.
    """
    quiet_libraries()
    if args.dry_run:
        compute_on_cpu()
    # First of all, as flags say which groups and collectives there are. And before models are loaded: who has loaded
    # them waits for those that still give signs of life.
    ranks = start_ranks(timeout=args.collective_timeout)
    if ranks.world_size > 1:
        agree(ranks, {**compared_flags(args), **compared_code()})
    set_arithmetic(args)
    check_optimizer(args)
    output_dir, images = Path(args.output_dir), getattr(args, "train_data_dir", None)
    if images and output_dir.resolve().is_relative_to(Path(images).resolve()):
        raise UserError(
            f"--output_dir: {str(output_dir)!r} lies in --train_data_dir, whose images the run's own would join; "
            "expected another folder"
        )
    require_writable(output_dir, "--output_dir")
    tracker_names(args.report_to)
    if args.push_to_hub and ranks.is_main:
        check_hub_login(args.hub_token)
    if args.save_dtype == "bfloat16" and args.save_format == "ppdiffusers":
        raise UserError(
            "--save_dtype bfloat16: ppdiffusers cannot read such files; expected float32 or float16, or --save_format "
            "diffusers"
        )
    settle_cache_folder(args)
    if not args.dry_run:
        wait_for_folder(output_dir)
    checkpoint, saved = choose_checkpoint(args, ranks, say=lambda message: None)
    settle_seed(args, saved, ranks)
    if not args.dry_run:
        settle_folders(args, ranks, is_resumed=checkpoint is not None)


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
    remarks = set_arithmetic(args)
    ranks = start_ranks(args.sharding_degree, args.collective_timeout)
    with folder_held(Path(args.output_dir)) if ranks.is_main and not args.dry_run else contextlib.nullcontext():
        train(module, dataset, args, ranks, remarks)


def train(module, dataset, args, ranks: Ranks, remarks: list) -> None:
    """What `launch_training_task` says, in a folder of its own.

    Args:
        remarks: lines to be printed.
    """
    output_dir = Path(args.output_dir)
    say = print if ranks.is_main else lambda message: None
    checkpoint, saved = choose_checkpoint(args, ranks, say)
    settle_seed(args, saved, ranks)
    if ranks.world_size > 1 and not args.dry_run:
        agree(ranks, job_code(module))
        agree_on_data(dataset, ranks)
        agree(ranks, model_digests(module))
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
        state.load_weights(checkpoint, saved)
    ranks.broadcast(state.parameters.values())
    state.precision.cast_models(module, state.optimizer)
    if checkpoint:
        state.load_record(saved)
        say(f"resumed from {checkpoint} at step {state.step}")
    for line in [*remarks, *notices(args, state.precision, total_steps)]:
        say(line)
    learning = sum(parameter.size for parameter in state.parameters.values())
    say(
        f"{type(module).__name__}: {learning:,} parameters learn from {len(dataset)} samples; {total_steps} "
        f"steps of {samples_per_step} samples, {steps_per_epoch} per epoch; seed {identity['seed']}"
    )
    info = {**identity, "arguments": public_arguments(args), "command": public_command(args), "versions": versions()}
    if ranks.is_main:
        remove_stale_shards(output_dir)
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
    if checkpoint:
        state.load_optimizer(checkpoint)
    positions = [positions for _, share in steps for positions in share]
    batches = iterate_batches(samples, positions, args.dataloader_num_workers)
    draws = iterate_draws(order.seed, positions, to_device)

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
        ask_for_time()
        stop = on_exit.enter_context(StopRequest(args.stop_signal))
        ranks.wait_for_all("the others to begin")  # rank 0 has trackers to open, and disks are slow or fast
        waiting = deque()  # (figures, parts) of steps whose numbers are still to be fetched
        for window, share in steps:
            ranks.step = state.step
            seed_layers(order.seed, state.step, ranks.rank)
            with FlopCounter(enabled=progress.counts_next) as counter:
                parts = [
                    backward(module, encode, next(batches), next(draws), p, window, state, ranks, p is share[-1])
                    for p in share
                ]
            progress.counted(counter.total, sum(len(part.positions) for part in parts))
            has_changed = state.gradients.send_rest()
            # All that the ranks have to agree on before the step, known to their hosts.
            bad, stopping, changed = ranks.total(
                bad=sum(len(part.errors) for part in parts), stopping=bool(stop.received), changed=has_changed
            )
            state.gradients.finish(bool(changed))
            if bad:
                found = ranks.gather({order.row(p): message for part in parts for p, message in part.errors.items()})
                state.bad_samples.add({row: message for part in found for row, message in part.items()}, say)
            loss = ranks.sum(sum((part.loss for part in parts), paddle.zeros([])))
            figures = state.take_step(window, loss, bad)
            waiting.append((figures, parts))
            checkpoint_due = stopping or state.step % args.checkpointing_steps == 0
            validation_due = args.validation_prompts and validation_is_due(
                args, state.step, window.stop, len(dataset), total_steps
            )
            # A step's numbers are fetched while the device works on the next one. Before anything is written, or the
            # run ends, they have to be good.
            is_flushed = checkpoint_due or validation_due or state.step == total_steps or state.judges_before
            while len(waiting) > (0 if is_flushed else 1):
                figures, parts = waiting.popleft()
                figures.fetch(ranks)
                if figures.failed:
                    told = ranks.gather(describe_failure(parts, figures, ranks, order, dataset))
                    together = f"the ranks' sums come to a loss of {figures.loss} and a norm of {figures.norm}"
                    told = next(filter(None, told), together)
                    if not state.judges_before or state.failed_steps > args.skip_nonfinite:
                        raise RunError(f"step {figures.step}, {told}; the last checkpoint is untouched")
                    say(f"skipped step {figures.step}, {state.failed_steps} of at most {args.skip_nonfinite}: {told}")
                report_step(figures, state, progress, trackers)
                if args.debug_loss:
                    losses = ranks.gather(losses_by_file(parts, len(figures.window), order, dataset))
                    trackers.scalars(
                        {f"loss_for/{name}": loss for part in losses for name, loss in part.items()}, figures.step
                    )
            if checkpoint_due:
                is_written = save_checkpoint(state, ranks, output_dir, info, args, say)
            if stopping:
                progress.close()
                checkpoint = output_dir / f"checkpoint-{state.step}"
                end_stopped(stop, ranks, checkpoint, is_written, f"after step {state.step} of {total_steps}")
            if validation_due:
                with state.result_weights(), ranks.main_first("pictures to be drawn") as is_turn:
                    if is_turn:
                        with state.precision.autocast():
                            picture = draw_validation(
                                module, args.validation_prompts, args.num_validation_images, order.seed
                            )
                        file = output_dir / "validation" / f"step-{state.step}.png"
                        file.parent.mkdir(exist_ok=True)
                        picture.save(file)
                        trackers.image("validation", picture, state.step)
        progress.close()
        with state.result_weights(), ranks.main_first("the result to be written") as is_turn:
            if is_turn:
                write_result(module, output_dir, args, say)
        if stop.received:
            print(f"{stop.received.name}: came after the last step; the run has ended, its result is written")
        ranks.gather(None)  # rank 0 answers the others' questions whether it is done: it must not end before they know


def order_samples(module, dataset, seed: int, samples_per_step: int, say) -> SampleOrder:
    """Which sample of a run comes when; of buckets, where the module has them, it is said how many images each has."""
    buckets = None
    if module.buckets:
        buckets = assign_buckets(module.buckets, dataset)
        say(describe_buckets(module.buckets, buckets))
    return SampleOrder(seed, len(dataset), buckets, samples_per_step, getattr(dataset, "sequential", False))


def report_step(figures: StepFigures, state: TrainingState, progress: Progress, trackers) -> None:
    """Show a step's figures on the progress line and in the trackers."""
    loss = figures.factor * figures.loss
    rate = progress.advance(loss, figures.learning_rate, len(figures.window), state.skipped_steps)
    scalars = {
        "loss": loss,
        "learning_rate": figures.learning_rate,
        "gradient_norm": figures.factor * figures.norm,
        "samples_per_second": rate,
        "skipped_steps": state.skipped_steps,
    }
    trackers.scalars({f"train/{name}": value for name, value in scalars.items()}, figures.step)


def validation_is_due(args, step: int, position: int, rows: int, total_steps: int) -> bool:
    """Whether to draw after `step`, which ended at `position` of the run."""
    if step == total_steps:
        return True
    if args.validation_steps:
        return step % args.validation_steps == 0
    return position % (rows * args.validation_epochs) == 0
