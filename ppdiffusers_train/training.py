"""The one loop. It trains any `DiffusionTrainingModule` and knows no diffusion."""

from ppdiffusers_train import __version__

import contextlib
import json
import math
import platform
import secrets
from functools import partial
from pathlib import Path

import paddle

from ppdiffusers_train.data.encoded_cache import encode_dataset
from ppdiffusers_train.data.loader import PreprocessedSamples, iterate_batches
from ppdiffusers_train.data.order import SampleOrder, micro_batches
from ppdiffusers_train.draws import Draws, generator
from ppdiffusers_train.errors import RunError, UserError
from ppdiffusers_train.module import encode_each
from ppdiffusers_train.reporting.hub import check_hub_login, push_to_hub
from ppdiffusers_train.reporting.progress import Progress
from ppdiffusers_train.reporting.quiet import quiet_libraries
from ppdiffusers_train.reporting.trackers import open_trackers, tracker_names
from ppdiffusers_train.reporting.validation import draw_validation
from ppdiffusers_train.runtime.checkpoint import find_checkpoint, replace_children, require_writable, write_checkpoint
from ppdiffusers_train.runtime.distributed import start_ranks
from ppdiffusers_train.runtime.precision import Precision, set_tf32
from ppdiffusers_train.runtime.signals import StopRequest
from ppdiffusers_train.runtime.silu import repair_silu
from ppdiffusers_train.state import TrainingState, build_training_state

SECRETS = ("hub_token",)


def check_run(args) -> None:
    """Settle the seed, and raise a `UserError` for what can be seen to be wrong before data and models are loaded."""
    quiet_libraries()
    output_dir = Path(args.output_dir)
    require_writable(output_dir, "--output_dir")
    tracker_names(args.report_to)
    if args.push_to_hub:
        check_hub_login(args.hub_token)
    saved = None
    if args.resume_from_checkpoint:
        saved = find_checkpoint(args.resume_from_checkpoint, output_dir, say=lambda message: None)[1]
    settle_seed(args, saved)  # before models and data: LoRA's initial values and the choice of samples depend on it


def settle_seed(args, saved) -> None:
    """Without `--seed`, set it to that of the checkpoint to resume from, or to one drawn for all ranks."""
    if args.seed is None:
        args.seed = saved["seed"] if saved else start_ranks().share(secrets.randbelow(2**31))


def launch_training_task(module, dataset, args) -> None:
    """Train `module` on `dataset` as `args` say, and write the result to `args.output_dir`.

    Args:
        module: a `DiffusionTrainingModule`; whatever in it is not frozen learns.
        dataset: `len(dataset)`, `dataset[i]` -> row, `dataset.name(i)` -> what to call it in a message.
        args: the flags of `arguments.add_training_arguments` and its siblings.
    Raises:
        UserError: a flag, a sample or the checkpoint to resume from is wrong.
        RunError: the loss is not a number any more.
    """
    repair_silu()
    ranks = start_ranks()
    output_dir = Path(args.output_dir)
    say = print if ranks.is_main else lambda message: None
    checkpoint, saved = None, {}
    if args.resume_from_checkpoint:
        checkpoint, saved = find_checkpoint(args.resume_from_checkpoint, output_dir, say)
    settle_seed(args, saved)
    identity = run_identity(module, dataset, args, saved)

    order = SampleOrder(identity["seed"], len(dataset))
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * ranks.world_size
    steps_per_epoch = order.steps_per_epoch(samples_per_step)
    total_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    state = build_training_state(module, args, total_steps)
    if checkpoint:
        state.load(checkpoint, saved)
        say(f"resumed from {checkpoint} at step {state.step}")
    for line in notices(args, state.precision, total_steps):
        say(line)
    learning = sum(parameter.size for parameter in state.parameters.values())
    say(
        f"{type(module).__name__}: {learning:,} parameters learn from {len(dataset)} samples; {total_steps} "
        f"steps of {samples_per_step} samples, {steps_per_epoch} per epoch; seed {identity['seed']}"
    )
    info = {**identity, "arguments": public_arguments(args), "versions": versions()}
    if ranks.is_main:
        (output_dir / "training_args.json").write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
    steps = [
        (window, micro_batches(window, ranks.rank, ranks.world_size, args.train_batch_size))
        for _, window in zip(range(state.step, total_steps), order.windows(state.position, samples_per_step))
    ]
    samples, encode = PreprocessedSamples(dataset, module.preprocess, order), partial(encode_each, module)
    if args.encoded_cache_dir:
        samples, encode = encode_dataset(module, dataset, order, args, ranks, state.precision, say), None
    batches = iterate_batches(
        samples, [positions for _, share in steps for positions in share], args.dataloader_num_workers
    )

    set_training_mode(module)
    with contextlib.ExitStack() as on_exit:
        trackers = on_exit.enter_context(
            open_trackers(
                args.report_to if ranks.is_main else "none",
                output_dir / args.logging_dir,
                args.tracker_project_name,
                info["arguments"],
            )
        )
        progress = on_exit.enter_context(Progress(state.step, total_steps, visible=ranks.is_main))
        stop = on_exit.enter_context(StopRequest())
        for window, share in steps:
            seed_layers(order.seed, state.step, ranks.rank)
            losses = [backward(module, encode, next(batches), positions, window, order, state) for positions in share]
            ranks.sum_gradients(state.parameters.values())
            loss = float(ranks.sum(sum((loss for loss, _ in losses), paddle.zeros([]))))
            if not math.isfinite(loss):
                failed = describe_failure(losses, share, order, dataset)
                raise RunError(f"step {state.step + 1}, rank {ranks.rank}: {failed}; the last checkpoint is untouched")
            learning_rate = state.optimizer.get_lr()
            state.take_step(window)

            rate = progress.advance(loss, learning_rate, len(window))
            figures = {"loss": loss, "learning_rate": learning_rate, "samples_per_second": rate}
            trackers.scalars({f"train/{name}": value for name, value in figures.items()}, state.step)
            if state.step % args.checkpointing_steps == 0 or stop.received:
                if ranks.is_main:
                    write_checkpoint(
                        output_dir, state.step, state.save, {**info, **state.record()}, args.checkpoints_total_limit
                    )
                ranks.wait()
            if stop.received:
                progress.close()
                say(
                    f"{stop.received.name}: wrote {output_dir / f'checkpoint-{state.step}'} after step {state.step} of "
                    f"{total_steps}; go on with --resume_from_checkpoint latest"
                )
                raise SystemExit(128 + stop.received)
            if args.validation_prompts and validation_is_due(args, state.step, window.stop, len(dataset), total_steps):
                if ranks.is_main:
                    with state.ema_weights():
                        picture = draw_validation(
                            module, args.validation_prompts, args.num_validation_images, order.seed
                        )
                    file = output_dir / "validation" / f"step-{state.step}.png"
                    file.parent.mkdir(exist_ok=True)
                    picture.save(file)
                    trackers.image("validation", picture, state.step)
                ranks.wait()
    if ranks.is_main:
        with state.ema_weights():
            replace_children(output_dir, module.save_pretrained)
        say(f"wrote the result to {output_dir}")
        if args.push_to_hub:
            url = push_to_hub(
                output_dir, args.hub_model_id, args.hub_token, module.card_data(), args.validation_prompts
            )
            say(f"uploaded to {url}")
    ranks.wait()


def backward(module, encode, batch, positions, window: range, order: SampleOrder, state: TrainingState) -> tuple:
    """Add the gradients of one batch, the samples at `positions`, to those of its step's `window`.

    Args:
        encode: turns the batch into encoded samples; None where it holds them already.
    Returns:
        The batch's part of the window's mean loss, and its draws.
    """
    draws = Draws(order.seed, positions)
    with state.precision.autocast():
        encoded = encode(batch) if encode else batch
        # By its share of the samples: right for a short last batch, and for a short last window.
        loss = module(encoded, draws) * (len(positions) / len(window))
    state.precision.scaler.scale(loss).backward()
    return loss.detach(), draws


def public_arguments(args) -> dict:
    """The flags without their secrets, as they may be written and sent."""
    return {name: value for name, value in vars(args).items() if name not in SECRETS}


def run_identity(module, dataset, args, saved) -> dict:
    """What makes this run this run; a checkpoint to resume from must agree, or it would go on with other samples."""
    identity = {"job": type(module).__name__, "seed": args.seed, "rows": len(dataset)}
    words = {"job": "job", "seed": "--seed", "rows": "number of samples"}
    for name, value in identity.items():
        if saved and saved[name] != value:
            raise UserError(
                f"--resume_from_checkpoint: {args.resume_from_checkpoint!r} is of another run: its {words[name]} is "
                f"{saved[name]}, here it is {value}"
            )
    return identity


def notices(args, precision: Precision, total_steps: int):
    """One line for each flag that does not do here what its name says."""
    if precision.notice:
        yield precision.notice
    if args.use_8bit_adam:
        yield "--use_8bit_adam: Paddle has no 8-bit Adam; AdamW keeps its moments in float32"
    if args.allow_tf32 and not set_tf32(True):
        yield "--allow_tf32: no effect, this device has no TF32"
    if args.local_rank != -1:
        yield f"--local_rank {args.local_rank}: no effect, paddle.distributed.launch sets the rank"
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= total_steps:
        yield f"--lr_warmup_steps {args.lr_warmup_steps}: all of the run's {total_steps} steps are warm-up"


def versions() -> dict:
    """The versions that a result depends on."""
    import ppdiffusers

    return {
        "python": platform.python_version(),
        "paddle": paddle.__version__,
        "ppdiffusers": ppdiffusers.__version__,
        "ppdiffusers_train": __version__,
    }


def seed_layers(seed: int, step: int, rank: int) -> None:
    """Seed Paddle's own generator, from which dropout draws, as a function of (seed, step, rank) alone."""
    paddle.seed(int(generator(seed, step, f"layers of rank {rank}").integers(2**31)))


def set_training_mode(module) -> None:
    """Put every model in which something learns into training mode; the frozen ones stay in evaluation mode."""
    for model in module.children():
        if any(not parameter.stop_gradient for parameter in model.parameters()):
            model.train()
        else:
            model.eval()


def validation_is_due(args, step: int, position: int, rows: int, total_steps: int) -> bool:
    """Whether to draw after `step`, which ended at `position` of the run."""
    if step == total_steps:
        return True
    if args.validation_steps:
        return step % args.validation_steps == 0
    return position % (rows * args.validation_epochs) == 0


def describe_failure(losses: list, share: list, order, dataset) -> str:
    """Which samples and draws made a step's loss something that is not a number."""
    for (loss, draws), positions in zip(losses, share):
        if not math.isfinite(float(loss)):
            samples = ", ".join(dataset.name(order.row(position)) for position in positions)
            drawn = "; ".join(f"{name} {values.tolist()}" for name, values in draws.drawn_integers.items())
            return f"the loss is {float(loss)} on {samples} ({drawn or 'nothing drawn'})"
    return "the loss of another rank is not a number"
