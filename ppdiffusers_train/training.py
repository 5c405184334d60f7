"""The one loop. It trains any `DiffusionTrainingModule` and knows no diffusion."""

from ppdiffusers_train import __version__

import contextlib
import json
import math
import platform
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from ppdiffusers.optimization import get_scheduler
from safetensors.numpy import load_file, save_file

from ppdiffusers_train.data.loader import PreprocessedSamples, iterate_batches
from ppdiffusers_train.data.order import SampleOrder, micro_batches
from ppdiffusers_train.draws import Draws, generator
from ppdiffusers_train.errors import RunError, UserError
from ppdiffusers_train.reporting.hub import check_hub_login, push_to_hub
from ppdiffusers_train.reporting.images import captioned_grid
from ppdiffusers_train.reporting.progress import Progress
from ppdiffusers_train.reporting.quiet import quiet_libraries
from ppdiffusers_train.reporting.trackers import open_trackers, tracker_names
from ppdiffusers_train.runtime.checkpoint import (
    find_checkpoint,
    replace_children,
    require_writable,
    write_checkpoint,
)
from ppdiffusers_train.runtime.distributed import start_ranks
from ppdiffusers_train.runtime.ema import EMA
from ppdiffusers_train.runtime.optimizer_state import load_optimizer_tensors, optimizer_tensors
from ppdiffusers_train.runtime.precision import Precision, set_tf32
from ppdiffusers_train.runtime.signals import StopRequest

SECRETS = ("hub_token",)
OPTIMIZER_FILE, EMA_FILE = "optimizer.safetensors", "ema.safetensors"


def check_run(args) -> None:
    """Raise a `UserError` for what can be seen to be wrong before data and models are loaded."""
    quiet_libraries()
    output_dir = Path(args.output_dir)
    require_writable(output_dir, "--output_dir")
    tracker_names(args.report_to)
    if args.push_to_hub:
        check_hub_login(args.hub_token)
    if args.resume_from_checkpoint:
        find_checkpoint(args.resume_from_checkpoint, output_dir, say=lambda message: None)


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
    ranks = start_ranks()
    output_dir = Path(args.output_dir)
    say = print if ranks.is_main else lambda message: None
    checkpoint, saved = None, {}
    if args.resume_from_checkpoint:
        checkpoint, saved = find_checkpoint(args.resume_from_checkpoint, output_dir, say)
        saved = saved or {}
    identity = run_identity(module, dataset, args, saved, ranks)

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
        f"{type(module).__name__}: {learning / 1e6:.2f} M parameters learn from {len(dataset)} samples; {total_steps} "
        f"steps of {samples_per_step} samples, {steps_per_epoch} per epoch; seed {identity['seed']}"
    )

    arguments = {name: value for name, value in vars(args).items() if name not in SECRETS}
    info = {**identity, "arguments": arguments, "versions": versions()}
    trackers = []
    if ranks.is_main:
        (output_dir / "training_args.json").write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
        trackers = open_trackers(args.report_to, output_dir / args.logging_dir, args.tracker_project_name, arguments)
    progress = Progress(state.step, total_steps, visible=ranks.is_main)

    def save():
        if ranks.is_main:
            write_checkpoint(output_dir, state.step, state.save, state.record(info), args.checkpoints_total_limit)
        ranks.wait()

    def validate():
        if ranks.is_main:
            with state.ema_weights(), evaluation(module):
                picture = draw_validation(module, args.validation_prompts, args.num_validation_images, order.seed)
            file = output_dir / "validation" / f"step-{state.step}.png"
            file.parent.mkdir(exist_ok=True)
            picture.save(file)
            for tracker in trackers:
                tracker.image("validation", picture, state.step)
        ranks.wait()

    first_step, first_position = state.step, state.position

    def plan():
        """For each step to come its window, and this rank's batches of it."""
        for _, window in zip(range(first_step, total_steps), order.windows(first_position, samples_per_step)):
            yield window, micro_batches(window, ranks.rank, ranks.world_size, args.train_batch_size)

    set_training_mode(module)
    batches = iterate_batches(
        PreprocessedSamples(dataset, module.preprocess, order),
        (positions for _, share in plan() for positions in share),
        args.dataloader_num_workers,
    )
    validated = None
    with StopRequest() as stop, contextlib.closing(progress):
        for window, share in plan():
            seed_layers(order.seed, state.step, ranks.rank)
            parts = []
            for positions in share:
                batch = next(batches)
                draws = Draws(order.seed, positions)
                with state.precision.autocast():
                    with paddle.no_grad():
                        encoded = module.encode(batch)
                    # Of the window's mean: right for a short last batch, and a short last window.
                    part = module(encoded, draws) * (len(positions) / len(window))
                state.precision.scaler.scale(part).backward()
                parts.append((part.detach(), positions, draws))
            ranks.sum_gradients(state.parameters.values())
            loss = float(ranks.sum(sum((part for part, _, _ in parts), paddle.zeros([]))))
            if not math.isfinite(loss):
                raise RunError(f"step {state.step + 1}, rank {ranks.rank}: {describe_failure(parts, order, dataset)}")
            learning_rate = state.optimizer.get_lr()
            state.take_step(window)

            rate = progress.advance(loss, learning_rate, len(window))
            for tracker in trackers:
                tracker.scalars(
                    {"train/loss": loss, "train/learning_rate": learning_rate, "train/samples_per_second": rate},
                    state.step,
                )
            if state.step % args.checkpointing_steps == 0 or stop.received:
                save()
            if stop.received:
                progress.close()
                say(
                    f"{stop.received.name}: wrote {output_dir / f'checkpoint-{state.step}'} after step {state.step} of "
                    f"{total_steps}; go on with --resume_from_checkpoint latest"
                )
                raise SystemExit(128 + stop.received)
            if args.validation_prompts and validation_is_due(args, state.step, window.stop, len(dataset)):
                validate()
                validated = state.step
    if args.validation_prompts and validated != state.step:
        validate()
    if ranks.is_main:
        with state.ema_weights():
            replace_children(output_dir, module.save_pretrained)
        for tracker in trackers:
            tracker.close()
        say(f"wrote the result to {output_dir}")
        if args.push_to_hub:
            url = push_to_hub(
                output_dir, args.hub_model_id, args.hub_token, module.card_data(), args.validation_prompts
            )
            say(f"uploaded to {url}")
    ranks.wait()


@dataclass
class TrainingState:
    """All that changes while a run trains: what a checkpoint holds."""

    module: object
    parameters: dict  # {structured name: parameter}, those that learn
    optimizer: object
    lr_scheduler: object
    precision: Precision
    ema: object  # an EMA, or None
    step: int = 0  # optimizer steps taken
    position: int = 0  # samples seen

    def take_step(self, window: range) -> None:
        """Update the weights from the gradients of `window`, and everything that follows them."""
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        self.optimizer.clear_grad()
        self.lr_scheduler.step()
        self.step, self.position = self.step + 1, window.stop
        self.module.after_step()
        if self.ema:
            self.ema.update()

    def ema_weights(self):
        """A context in which the module holds the averaged weights, where there are any."""
        return self.ema.applied() if self.ema else contextlib.nullcontext()

    def save(self, folder: Path) -> None:
        """Write weights and tensors into a checkpoint's folder."""
        self.module.save_weights(str(folder))
        tensors = optimizer_tensors(self.optimizer, self.parameters)
        save_file({name: tensor.numpy() for name, tensor in tensors.items()}, folder / OPTIMIZER_FILE)
        if self.ema:
            save_file({name: tensor.numpy() for name, tensor in self.ema.averages.items()}, folder / EMA_FILE)
            with self.ema.applied():
                self.module.save_weights(str(folder / "ema"))

    def record(self, info: dict) -> dict:
        """What else belongs to a checkpoint, as JSON."""
        return {
            **info,
            "position": self.position,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": {name: np.asarray(value).tolist() for name, value in self.precision.scaler.state_dict().items()},
            "ema_updates": self.ema.updates if self.ema else None,
        }

    def load(self, folder: Path, saved: dict) -> None:
        """Take over what `save` and `record` wrote."""
        flag = f"--resume_from_checkpoint: {folder}"
        if bool(self.ema) != (saved["ema_updates"] is not None):
            raise UserError(f"{flag} was written {'without' if self.ema else 'with'} --use_ema; expected the same now")
        tensors = load_file(folder / OPTIMIZER_FILE)
        names = {name.split("//")[0] for name in tensors}
        if names != set(self.parameters):
            raise UserError(
                f"{flag} holds an optimizer of other weights ({len(names)} instead of {len(self.parameters)})"
            )
        self.module.load_weights(str(folder))
        load_optimizer_tensors(self.optimizer, self.parameters, tensors)
        self.lr_scheduler.set_state_dict(saved["lr_scheduler"])
        if saved["scaler"]:
            self.precision.scaler.load_state_dict(
                {name: np.asarray(value, dtype="float32") for name, value in saved["scaler"].items()}
            )
        if self.ema:
            self.ema.updates = saved["ema_updates"]
            for name, array in load_file(folder / EMA_FILE).items():
                self.ema.averages[name].set_value(array)
        self.step, self.position = saved["step"], saved["position"]


def build_training_state(module, args, total_steps: int) -> TrainingState:
    """Optimizer, learning rate, precision and average for what learns in `module`."""
    learning = {id(parameter) for parameter in module.trainable_parameters()}
    parameters = {name: parameter for name, parameter in module.named_parameters() if id(parameter) in learning}
    if args.lr_scheduler == "polynomial" and args.lr_warmup_steps >= total_steps:
        raise UserError(
            f"--lr_warmup_steps {args.lr_warmup_steps}: the run has {total_steps} steps; expected fewer with polynomial"
        )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        learning_rate=args.learning_rate,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=total_steps,
    )
    optimizer = paddle.optimizer.AdamW(
        learning_rate=lr_scheduler,
        parameters=list(parameters.values()),
        beta1=args.adam_beta1,
        beta2=args.adam_beta2,
        epsilon=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(args.max_grad_norm),
    )
    ema = EMA(parameters) if args.use_ema else None
    return TrainingState(module, parameters, optimizer, lr_scheduler, Precision(args.mixed_precision), ema)


def run_identity(module, dataset, args, saved: dict, ranks) -> dict:
    """What makes this run this run; a checkpoint to resume from must agree, or it would go on with other samples."""
    seed = args.seed if args.seed is not None else saved.get("seed")
    if seed is None:
        seed = ranks.share(secrets.randbelow(2**31))
    identity = {"job": type(module).__name__, "seed": seed, "rows": len(dataset)}
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
    """Put every part that learns into training mode; the frozen ones stay in evaluation mode."""
    for layer in module.sublayers(include_self=True):
        layer.training = any(not parameter.stop_gradient for parameter in layer.parameters())


@contextlib.contextmanager
def evaluation(module):
    """Within, all of `module` is in evaluation mode and nothing records gradients."""
    modes = [(layer, layer.training) for layer in module.sublayers(include_self=True)]
    module.eval()
    try:
        with paddle.no_grad():
            yield
    finally:
        for layer, training in modes:
            layer.training = training


def validation_is_due(args, step: int, position: int, rows: int) -> bool:
    """Whether to draw after `step`, which ended at `position` of the run."""
    if args.validation_steps:
        return step % args.validation_steps == 0
    return position % (rows * args.validation_epochs) == 0


def draw_validation(module, prompts: list, count: int, seed: int):
    """A grid with one row of `count` pictures per prompt, on the same seeds every time."""
    seeds = [seed + index for index in range(count)]
    images = module.generate([prompt for prompt in prompts for _ in seeds], seeds * len(prompts))
    return captioned_grid([images[start : start + count] for start in range(0, len(images), count)], prompts)


def describe_failure(parts: list, order, dataset) -> str:
    """Which samples and timesteps made a step's loss something that is not a number."""
    for part, positions, draws in parts:
        if not math.isfinite(float(part)):
            samples = ", ".join(dataset.name(order.row(position)) for position in positions)
            drawn = "; ".join(f"{name} {values.tolist()}" for name, values in draws.drawn_integers.items())
            return f"the loss is {float(part)} on {samples} ({drawn}); the last checkpoint is untouched"
    return "the loss of another rank is not a number; the last checkpoint is untouched"
