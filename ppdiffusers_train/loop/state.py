"""What changes during training, and therefore belongs to a checkpoint."""

import contextlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import paddle

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.loop.bad_samples import BadSamples
from ppdiffusers_train.loop.optimizers import build_optimizer, optimizer_name
from ppdiffusers_train.loop.schedule import build_schedule
from ppdiffusers_train.module import DiffusionTrainingModule, trained_models
from ppdiffusers_train.runtime.bf16_weights import narrow_models
from ppdiffusers_train.runtime.distributed import Ranks
from ppdiffusers_train.runtime.ema import EMA, replace
from ppdiffusers_train.runtime.fused_backward import FusedBackward
from ppdiffusers_train.runtime.gradient_sums import GradientSums
from ppdiffusers_train.runtime.gradients import clip_and_scale
from ppdiffusers_train.runtime.optimizer_state import SEPARATOR, in_form_of, load_optimizer_tensors, optimizer_tensors
from ppdiffusers_train.runtime.precision import Precision, holding, updated_parameters
from ppdiffusers_train.tensor_files import open_parts, write_parts

OPTIMIZER, AVERAGES = "optimizer", "ema"  # prefixes of their file names


@dataclass
class StepFigures:
    """The figures of one step."""

    step: int  # from 1
    window: range
    learning_rate: float
    factor: float  # global batch / number of samples that could be used
    loss: float  # mean over the window, with 0 for samples that could not be used
    norm: float  # of the gradients
    own_squares: list  # see `GradientSums.take_own_squares`
    overflowed: bool  # gradients overflowed float16, and the weights are not updated

    @property
    def failed(self) -> bool:
        """Whether loss or norm is NaN or inf, and a smaller loss scale would not help."""
        return not (math.isfinite(self.loss) and (math.isfinite(self.norm) or self.overflowed))


@dataclass
class TrainingState:
    """All that changes during training: the contents of a checkpoint."""

    module: object
    parameters: dict  # {structured name: parameter} of all trainable ones
    optimizer: object
    lr_scheduler: object
    precision: Precision
    ema: object  # an EMA, or None
    ranks: Ranks
    seed: int
    args: object  # the flags of the optimizer
    bad_samples: BadSamples
    sharding_stage: int  # 2: gradients are kept only by the rank that updates their parameters
    step: int = 0  # optimizer steps taken
    position: int = 0  # samples seen
    failed_steps: int = 0  # those of them that were NaN or inf
    overflowed_steps: int = 0  # those of them whose gradients overflowed float16

    @property
    def skipped_steps(self) -> int:
        """Steps that did not update the weights, because they were NaN or inf or overflowed."""
        return self.failed_steps + self.overflowed_steps

    @cached_property
    def gradients(self):
        """`GradientSums` or `FusedBackward`, created at first use: by then parameters have the dtypes that they are
        trained in."""
        if self.args.fused_backward:
            return FusedBackward(self.parameters, self.optimizer, self.args.max_grad_norm_per_parameter)
        return GradientSums(self.parameters, self.ranks, self.owners() if self.sharding_stage == 2 else None)

    def gradient_norm(self):
        """Global norm of the gradients, without the loss scale: a scalar on the device."""
        return self.gradients.squared_norm().sqrt() / self.precision.loss_scale.value

    def owners(self) -> dict:
        """{structured name: the rank that holds the parameter's state, among those the state is sharded over}; empty
        without sharding."""
        owners = getattr(self.optimizer, "_param2rank", {})
        return {name: owners[parameter.name] for name, parameter in self.parameters.items() if owners}

    def take_step(self, window: range, loss, missing: int = 0, check=lambda figures: None) -> StepFigures:
        """Update the weights from the gradients of `window`, then the learning rate and the averages.

        A step without a sample, or with a NaN or inf loss or norm, leaves weights, averages and learning rate as they
        are.

        Args:
            window: the positions of the global batch.
            loss: its loss, a scalar on the device.
            missing: the number of its samples that could not be used.
            check: called with the step's figures before anything has changed; what it raises ends the step.
        """
        scale, norm = self.precision.loss_scale, self.gradient_norm()
        figures = self._fetch_figures(window, loss, norm, missing)
        check(figures)
        scale.update(overflowed=not math.isfinite(figures.norm))
        self.overflowed_steps += figures.overflowed and not figures.failed
        self.failed_steps += figures.failed
        if missing < (1 if self.args.fused_backward else len(window)) and not (figures.overflowed or figures.failed):
            if not self.args.fused_backward:
                self._update(norm, figures.factor)
            self.lr_scheduler.step()
            self._follow()
        self.optimizer.clear_grad(set_to_zero=False)
        self.step, self.position = self.step + 1, window.stop
        return figures

    def _update(self, norm, factor: float) -> None:
        """Update the weights by the gradients times `factor`, without the loss scale, clipped."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        limits = self.args.max_grad_norm, self.args.max_grad_norm_per_parameter
        clip_and_scale(gradients, norm, factor, self.precision.loss_scale.value, *limits)
        is_sharded = self.ranks.sharding_degree > 1
        with self.ranks.waits_for("the others' new weights") if is_sharded else contextlib.nullcontext():
            self.optimizer.step()

    def _fetch_figures(self, window: range, loss, norm, missing: int) -> StepFigures:
        """The figures of a step, fetched from the device, which the host waits for."""
        with self.ranks.watch("the figures of a step"):
            values = paddle.stack([loss, norm]).tolist()
        factor = len(window) / max(len(window) - missing, 1)
        overflowed = self.precision.loss_scale.can_shrink and not math.isfinite(values[1])
        own_squares, rate = self.gradients.take_own_squares(), self.optimizer.get_lr()
        return StepFigures(self.step + 1, window, rate, factor, *values, own_squares, overflowed)

    def _follow(self) -> None:
        """Call the module's `after_step` and update the averages."""
        if getattr(self.module.after_step, "__func__", None) is not DiffusionTrainingModule.after_step:
            with self.float32_weights():
                self.module.after_step()
        if self.ema:
            self.ema.update((name, value) for name, _, value in self.float32_values())

    def float32_values(self, is_kept=True):
        """Yield (structured name, parameter, its float32 value) of the trainable parameters; the value of a parameter
        of lower precision is its master weight.

        The masters of a sharded optimizer are broadcast by the ranks that hold them: all ranks have to iterate.

        Args:
            is_kept: whether this rank needs the values; otherwise they are None.
        """
        masters, owners = self.optimizer._master_weights, self.owners()
        for name, parameter in self.parameters.items():
            value = masters.get(parameter.name, parameter)
            if parameter.dtype != paddle.float32 and owners:
                value = self.ranks.broadcast_in_shard(masters.get(parameter.name), parameter, owners[name])
            yield name, parameter, value if is_kept else None

    def float32_weights(self, only_main: bool = False):
        """A context in which the trainable parameters are float32, as in files. All ranks have to enter it.

        Args:
            only_main: only rank 0 needs the values.
        """
        values = self.float32_values(self.ranks.is_main or not only_main)
        return holding([(p, value) for _, p, value in values if value is not None and value is not p])

    def result_weights(self):
        """A context in which the module on rank 0 holds the weights of the result, averages if there are any. All ranks
        have to enter it."""
        if self.ema:
            return self.ema.applied()
        averages = getattr(self.optimizer, "averages", False)
        return self.evaluation_weights() if averages else self.float32_weights(only_main=True)

    def evaluation_weights(self):
        """A context in which the parameters have the optimizer's weights for evaluation, if it has other ones."""
        parameters = self.parameters.values() if getattr(self.optimizer, "averages", False) else ()
        return holding([(parameter, self.optimizer.evaluation_value(parameter)) for parameter in parameters])

    def lower_weights(self) -> None:
        """Cast weights to their dtypes in training."""
        self.precision.cast_models(self.module, self.optimizer)
        if self.args.param_dtype == "bf16":
            narrow_models(trained_models(self.module), widens=not self.precision.enabled)

    def tensors(self) -> list:
        """All tensors that training needs before its first step, and encoding does not: weights and buffers of models
        that are not encoders, masters and averages."""
        models = [model for name, model in self.module.named_children() if name not in self.module.encoders]
        weights = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        averages = self.ema.averages.values() if self.ema else ()
        return [*weights, *self.optimizer._master_weights.values(), *averages]

    def save_optimizer(self, folder: Path, stem: str) -> None:
        """Write the optimizer's tensors; with sharding, this rank's shard."""
        write_parts(folder, stem, optimizer_tensors(self.optimizer, self.parameters).items())

    def save(self, folder: Path) -> None:
        """Write weights and averages into a checkpoint's folder; to be called within `float32_weights`."""
        self.module.save_weights(str(folder))
        if self.ema:
            write_parts(folder, AVERAGES, self.ema.averages.items())
            with self.ema.applied():
                self.module.save_weights(str(folder / "ema"))

    def record(self) -> dict:
        """The rest of a checkpoint, as JSON."""
        return {
            "position": self.position,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.precision.loss_scale.state_dict(),
            "optimizer": getattr(self.optimizer, "shared", {}),
            "ema_updates": self.ema.updates if self.ema else None,
            "skipped_steps": self.failed_steps,
            "overflowed_steps": self.overflowed_steps,
            "bad_rows": sorted(self.bad_samples.rows),
        }

    def load_weights(self, folder: Path, saved: dict) -> None:
        """Load a checkpoint's float32 weights; `load_optimizer` loads optimizer state and averages later."""
        # Fewer parameters are right, too: one that no step has used has no state.
        unknown = {name.split(SEPARATOR)[0] for name in open_parts(folder, OPTIMIZER)} - set(self.parameters)
        if unknown:
            raise UserError(
                f"--resume_from_checkpoint: {folder} holds the optimizer state of other weights, such as "
                f"{min(unknown)}, which are not trained here"
            )
        self.module.load_weights(str(folder))

    def load_record(self, saved: dict) -> None:
        """Load what `record` returned."""
        self.lr_scheduler.set_state_dict(saved["lr_scheduler"])
        self.lr_scheduler.step(self.lr_scheduler.last_epoch)  # the rate by the flags of now, which may have changed
        self.precision.loss_scale.load_state_dict(saved["scaler"])
        if saved.get("optimizer"):
            self.optimizer.shared = dict(saved["optimizer"])
        if self.ema:
            self.ema.updates = saved["ema_updates"] or 0
        self.step, self.position = saved["step"], saved["position"]
        self.failed_steps, self.overflowed_steps = saved["skipped_steps"], saved.get("overflowed_steps", 0)
        self.bad_samples.rows = set(saved["bad_rows"])

    def load_optimizer(self, folder: Path, saved: dict, log) -> None:
        """Load a checkpoint's optimizer state and averages, once the weights have the dtypes that they are trained in.
        State of the other kind of optimizer is converted; without averages in the checkpoint, they begin as the
        weights are now.

        They are large: encoders that training does not need should be freed by then.

        Args:
            log: called with a line for each of these changes.
        """
        own = {parameter.name for parameter in updated_parameters(self.optimizer)}
        updated = {name: parameter for name, parameter in self.parameters.items() if parameter.name in own}
        tensors, arguments = open_parts(folder, OPTIMIZER), saved.get("arguments", {})
        had_averages = saved["ema_updates"] is not None
        now = optimizer_name(vars(self.args))
        if tensors and optimizer_name(arguments) != now:
            log(f"--use_8bit_adam: the moments of {folder.name} become {'8 bits' if now == 'adamw8bit' else 'float32'}")
            tensors = in_form_of(self.optimizer, updated, tensors, arguments.get("adam_beta2", 0.999))
        load_optimizer_tensors(self.optimizer, updated, tensors)
        if had_averages and not self.ema:
            log(f"--no_use_ema: the averages of {folder.name} are dropped; the result will have the weights themselves")
        if self.ema and not had_averages:
            log(f"--use_ema: {folder.name} has no averages; they begin with the weights of now")
            for name, _, value in self.float32_values():
                replace(self.ema.averages[name], value.astype("float32"))
        elif self.ema:
            for name, tensor in open_parts(folder, AVERAGES).items():
                self.ema.averages[name].set_value(tensor.numpy())


def build_training_state(module, args, total_steps: int, samples_per_step: int, ranks: Ranks) -> TrainingState:
    """Build optimizer, learning rate schedule, precision and average of the trainable parameters of `module`."""
    trained = {id(parameter) for parameter in module.trainable_parameters()}
    parameters = {name: parameter for name, parameter in module.named_parameters() if id(parameter) in trained}
    lr_scheduler = build_schedule(args, total_steps, samples_per_step)
    optimizer = build_optimizer(module, args, parameters, lr_scheduler)
    precision = Precision(args.mixed_precision, args.amp_level)
    return TrainingState(
        module,
        parameters,
        ranks.shard(optimizer),
        lr_scheduler,
        precision,
        EMA(parameters) if args.use_ema else None,
        ranks,
        args.seed,
        args,
        BadSamples(args.max_bad_samples),
        sharding_stage=args.sharding_stage,
    )
