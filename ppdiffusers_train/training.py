"""The training loop. It trains any `DiffusionTrainingModule` and contains nothing of diffusion."""

import ppdiffusers_train  # noqa: F401  (before paddle)

import contextlib
import json
from dataclasses import replace
from functools import partial

import paddle

from ppdiffusers_train.cpu.kernel_repairs import repair_kernels
from ppdiffusers_train.cpu.patches import COMPILE_FROM_ROWS, CompiledEncode, can_compile, patched_paddle
from ppdiffusers_train.data.dataset import index_folder
from ppdiffusers_train.data.encoders_key import stored_digests
from ppdiffusers_train.data.identity import agree_on_data
from ppdiffusers_train.data.image_index import index_images
from ppdiffusers_train.data.loader import OnlineSamples
from ppdiffusers_train.data.order import order_samples
from ppdiffusers_train.data.rows import Rows
from ppdiffusers_train.errors import MissingImagesError
from ppdiffusers_train.launcher.signals import StopRequest, signal_name
from ppdiffusers_train.launcher.supervisor import ignore_signals_from_now_on, request_time_to_finish
from ppdiffusers_train.loop.bad_samples import BadSamples
from ppdiffusers_train.loop.class_images import add_class_images, wants_class_images
from ppdiffusers_train.loop.disk_space import check_disk, run_needs
from ppdiffusers_train.loop.dry_run import describe_run
from ppdiffusers_train.loop.filling import encode_dataset
from ppdiffusers_train.loop.held_out import HeldOutLoss, held_out_rows, held_out_samples
from ppdiffusers_train.loop.identity import (
    describe_changed_data,
    initial_weights,
    job_code,
    public_arguments,
    public_command,
    run_identity,
    versions,
    without_rows_of_other_data,
)
from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.prompts import wants_images
from ppdiffusers_train.loop.reports import open_reports
from ppdiffusers_train.loop.resume_rules import base_identity, describe_changes, refuse_mixture
from ppdiffusers_train.loop.run import Run, notices, refuse_shorter_run, resolve_run
from ppdiffusers_train.loop.saving import (
    checkpoint_before_end,
    claim_folder,
    end_stopped,
    save_checkpoint,
    upload_result,
    write_result,
)
from ppdiffusers_train.loop.schedule import check_schedule
from ppdiffusers_train.loop.state import TrainingState, build_training_state
from ppdiffusers_train.loop.step import (
    add_gradients,
    complete_gradients,
    count_bad_samples,
    load_steps,
    seed_layers,
    set_training_mode,
)
from ppdiffusers_train.loop.validation import ValidationImages, check_images
from ppdiffusers_train.module import choose_trainable
from ppdiffusers_train.reporting.status_line import counted, print_line
from ppdiffusers_train.runtime.agreement import agree, model_digests
from ppdiffusers_train.runtime.flops import FlopCounter
from ppdiffusers_train.runtime.quantized import quantize_models
from ppdiffusers_train.runtime.tracing import compile_models


def check_run(args) -> None:
    """Check the flags and resolve what they leave open, for a script that builds its module from them by itself.

    Raises:
        UserError: for every mistake that can be found before data and models are loaded.
    """
    run = resolve_run(args)
    with run.lock:  # until the module is built
        vars(args).update(vars(run.args))


def launch_training_task(module, dataset, args) -> None:
    """Train `module` on `dataset` as the flags say, and write the result to `args.output_dir`.

    Args:
        module: a `DiffusionTrainingModule`; all its parameters that are not frozen are trained.
        dataset: `len(dataset)`, `dataset[i]` -> row, `dataset.name(i)` -> its name in messages.
        args: the flags of `arguments.add_training_arguments` and its siblings.
    Raises:
        UserError: a flag, a sample or the checkpoint to resume from is wrong.
        RunError: the run cannot continue: a loss is NaN or inf, a file cannot be written.
    """
    run = resolve_run(args)
    with run.lock:
        train_job(module, dataset, run)


@patched_paddle()
def train_job(module, dataset, run: Run) -> None:
    """`launch_training_task` with resolved flags, within the run's lock."""
    repair_kernels()
    index_dataset(dataset, run)
    dataset = add_class_images(module, dataset, run)
    index_dataset(dataset, run)
    plan = make_plan(module, dataset, run)
    if run.args.dry_run:
        if run.ranks.is_main:
            describe_run(plan)
        return
    state = build_state(plan)
    log_start(plan, state)
    check_images(plan)
    needs = run_needs(plan, state)
    if run.args.encoded_cache_dir:
        samples, held_out = encode_dataset(plan, state, partial(begin, plan, state, needs), state.tensors())
    else:
        begin(plan, state, needs)
        samples, held_out = online_samples(plan)
    if run.checkpoint:  # now, because it is large, and a cache has freed the encoders
        state.load_optimizer(run.checkpoint, plan.run.saved, run.log)
    set_training_mode(module)
    if run.args.to_static:
        compile_models(module)
    train(plan, state, samples, HeldOutLoss(plan, held_out))


def index_dataset(dataset, run: Run) -> None:
    """Look at images that the index does not know, and print what is used; not in a dry run, nor of a stream.

    Raises:
        BadSampleError: more samples are known to be bad than may be skipped.
    """
    if isinstance(dataset, Rows) and not dataset.facts and not run.args.dry_run:
        index_images(dataset, run.ranks, index_folder(run.args), run.log)
        if summary := dataset.summary():
            run.log(summary)
        known = without_rows_of_other_data(run.saved, dataset, run.args).get("bad_rows", ())
        BadSamples(run.args.max_bad_samples, known).refuse_known(dataset, not wants_class_images(run.args))
    held_out = held_out_rows(dataset)
    if held_out is not None and not held_out.facts and not run.args.dry_run:
        index_images(held_out, run.ranks, index_folder(run.args), run.log)


def make_plan(module, dataset, run: Run) -> Plan:
    """Choose what is trained and the order of samples; check that all ranks and the checkpoint agree on it."""
    args = run.args
    if args.dry_run or not args.encoded_cache_dir:
        module.load_rest()
    for pattern, size in choose_trainable(module, args.trainable_modules).items():
        run.log(f"--trainable_modules: {pattern}, {size:,} parameters, trained in full")
    for line in quantize_models(module, has_values=not args.dry_run):
        run.log(line)
    digests = {} if args.dry_run else {**model_digests(module), **stored_digests(module, index_folder(args))}
    digests |= initial_weights(module, run)
    if run.ranks.world_size > 1 and not args.dry_run:
        agree(run.ranks, job_code(module))
        agree_on_data(dataset, run.ranks)
        if held_out_rows(dataset) is not None:
            agree_on_data(dataset.held_out, run.ranks)
        agree(run.ranks, digests)
    identity = run_identity(module, dataset, args, run.saved, run.samples_per_step)
    run = replace(run, saved=without_rows_of_other_data(run.saved, dataset, args))
    refuse_mixture(run.checkpoint, run.saved, public_arguments(args), base_identity(digests))
    order = order_samples(module, dataset, identity["seed"], run.samples_per_step, run.log)
    steps_per_epoch = order.steps_per_epoch(run.samples_per_step)
    # Epochs are counted in samples: after a resume, a step may have another number of them.
    position, step = run.saved.get("position", 0), run.saved.get("step", 0)
    if line := describe_changed_data(identity, run.saved, position, order.size):
        run.log(line)
    left = order.steps_until(args.num_train_epochs, position, run.samples_per_step)
    total_steps = args.max_train_steps or step + left
    check_schedule(args, total_steps, min(run.samples_per_step, order.size))
    refuse_shorter_run(run, total_steps, order.size)
    info = {
        "run": run.id,
        **identity,
        "arguments": public_arguments(args),
        "command": public_command(args),
        "versions": versions(),
        **{kind: {**run.saved.get(kind, {}), **found} for kind, found in base_identity(digests).items()},
        "card": json.loads(json.dumps(module.card_data(), default=str)),
    }
    held_out = held_out_samples(dataset, run)
    info["held_out"] = held_out and held_out.digest()
    return Plan(run, module, dataset, order, total_steps, steps_per_epoch, info, held_out)


def build_state(plan: Plan) -> TrainingState:
    """Build optimizer, averages and precision. When resuming, also load all of the checkpoint but the optimizer's state
    and the averages."""
    run, module = plan.run, plan.module
    samples = min(run.samples_per_step, plan.order.size)  # a step has no more than the data
    state = build_training_state(module, run.args, plan.total_steps, samples, run.ranks)
    if run.checkpoint:
        state.load_weights(run.checkpoint, run.saved)
    run.ranks.broadcast(state.parameters.values())
    state.lower_weights()
    if run.checkpoint:
        state.load_record(run.saved)
    if isinstance(plan.dataset, Rows):
        state.bad_samples.add_known(plan.dataset, run.log)
    return state


def log_start(plan: Plan, state: TrainingState) -> None:
    """Log where a resumed run continues, which flags have no effect, and how large the run is."""
    run = plan.run
    if run.checkpoint:
        run.log(f"resumed from {run.checkpoint} at step {state.step}")
        if line := describe_changes(run.checkpoint, run.saved, public_arguments(run.args)):
            run.log(line)
    for line in [*run.remarks, *notices(run.args, state.precision, plan.total_steps)]:
        run.log(line)
    trained = sum(parameter.size for parameter in state.parameters.values())
    run.log(
        f"{plan.module.title}: {trained:,} trainable parameters, {counted(plan.order.size, 'sample')}; "
        f"{counted(plan.total_steps, 'step')} of {counted(run.samples_per_step, 'sample')}, "
        f"{plan.steps_per_epoch} per epoch; seed {plan.info['seed']}"
    )


def begin(plan: Plan, state: TrainingState, needs: tuple, cache=None) -> None:
    """Look for the disk that the run will need, then make its folder its own. `needs` are its `run_needs`."""
    check_disk(plan, state, needs, cache)
    if plan.run.ranks.is_main:
        claim_folder(plan, state.step)


def online_samples(plan: Plan) -> tuple:
    """The samples of a run without a cache, which are encoded during training: those to train on, and those that are
    held out, or None."""
    if can_compile(plan.module) and len(plan.dataset) >= COMPILE_FROM_ROWS:
        plan.module.encode = CompiledEncode(plan.module)
    held_out = plan.held_out and OnlineSamples(plan.held_out.dataset, plan.module, plan.held_out)
    return OnlineSamples(plan.dataset, plan.module, plan.order), held_out


def train(plan: Plan, state: TrainingState, samples, held_out: HeldOutLoss) -> None:
    """Take every step from the state's to the last, with validation losses, checkpoints, validation images and the
    result."""
    ranks, args = plan.run.ranks, plan.run.args
    with open_reports(plan, state) as reports, StopRequest(args.stop_signal) as stop:
        images = ValidationImages(plan, reports.trackers)
        plan.run.lock.stop = stop
        request_time_to_finish()
        ranks.wait_for_all("the others to begin")  # rank 0 opens trackers, and some disks are slow
        if plan.loss_is_due(state):  # also in a resumed run, which may have been stopped before it was reported
            held_out.report(state, reports.trackers)
        for window, batches in load_steps(plan, state, samples):
            ranks.step = state.step
            seed_layers(plan.order.seed, state.step, ranks.rank)
            with FlopCounter(enabled=reports.progress.counts_next) as counter:
                parts = [add_gradients(plan.module, samples, batch, window, state) for batch in batches]
            reports.progress.counted(counter.total, sum(len(part.positions) for part in parts))
            missing, stopping = complete_gradients(state, parts, bool(stop.received))
            plan.run.lock.is_ending = stopping
            loss = ranks.sum(sum((part.loss for part in parts), paddle.zeros([])))
            with checkpoint_before_end(plan, state):
                if missing:
                    count_bad_samples(plan, state, parts)
                figures = state.take_step(window, loss, missing, partial(reports.check, micro_batches=parts))
            reports.add(figures, parts)
            saves, validates = stopping or plan.checkpoint_is_due(state), plan.validation_is_due(state)
            measures = plan.loss_is_due(state) and not stopping
            with reports.progress.paused() if saves or validates or measures else contextlib.nullcontext():
                is_written = saves and save_checkpoint(plan, state)
                if measures:
                    with checkpoint_before_end(plan, state):
                        held_out.report(state, reports.trackers)
                if stopping:
                    reports.progress.close()
                    end_stopped(stop, plan, state, is_written)
                if validates:
                    images.generate(state)
        reports.progress.close()
        finish(plan, state, stop, images)
    ignore_signals_from_now_on()
    if images.failures:
        raise MissingImagesError(f"the result is complete, but validation images are missing: {images.failures[0]}")


def finish(plan: Plan, state: TrainingState, stop: StopRequest, images: ValidationImages) -> None:
    """Write the result; then generate the last validation images, which may fail; then upload the result."""
    run = plan.run
    with state.result_weights(), run.ranks.only_main("the result to be written") as is_main:
        if is_main:
            write_result(plan, state.step)
    if wants_images(run.args):
        images.generate(state)
    if run.args.push_to_hub:
        with run.ranks.only_main("the result to be uploaded") as is_main:
            if is_main:
                upload_result(plan)
    if stop.received:
        name = signal_name(stop.received)
        print_line(f"{name}: received after the last step; the run has ended and its result is written")
    run.ranks.gather_objects(None)  # the store is in rank 0's process, which must not end before the others are done
