"""What changes while a run trains, and so what a checkpoint holds."""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from ppdiffusers.optimization import get_scheduler
from safetensors.numpy import load_file, save_file

from ppdiffusers_train.data.bad_samples import BadSamples
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.runtime.adamw_8bit import AdamW8bit
from ppdiffusers_train.runtime.distributed import Ranks
from ppdiffusers_train.runtime.ema import EMA
from ppdiffusers_train.runtime.gradients import clipping_factor, global_norm, scale_gradients
from ppdiffusers_train.runtime.optimizer_state import SEPARATOR, load_optimizer_tensors, optimizer_tensors
from ppdiffusers_train.runtime.precision import Precision, in_float32

OPTIMIZER_FILES, EMA_FILE = "optimizer*.safetensors", "ema.safetensors"


@dataclass
class TrainingState:
    """All that changes while a run trains: what a checkpoint holds."""

    module: object
    parameters: dict  # {structured name: parameter}, those that learn
    optimizer: object
    lr_scheduler: object
    precision: Precision
    ema: object  # an EMA, or None
    seed: int
    max_grad_norm: float
    bad_samples: BadSamples
    step: int = 0  # optimizer steps taken
    position: int = 0  # samples seen
    skipped_steps: int = 0  # of those steps, the ones that were no numbers

    def gradients(self) -> list:
        """The gradients that there are."""
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def gradient_norm(self):
        """Norm of all gradients together, as they are without the loss scaler: a scalar on the device."""
        self.precision.scaler.unscale_(self.optimizer)
        gradients = self.gradients()
        return global_norm(gradients) if gradients else paddle.zeros([])

    def take_step(self, window: range, norm: float, factor: float = 1.0) -> None:
        """Update the weights from the gradients of `window`, and everything that follows them.

        Args:
            norm: the gradients' norm.
            factor: multiplies them before they are clipped.
        """
        if math.isfinite(norm):  # else a scaler in float16 has seen it, and leaves the weights alone
            scale_gradients(self.gradients(), factor * clipping_factor(factor * norm, self.max_grad_norm))
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        self.advance(window)
        with self.float32_weights():
            self.module.after_step()
        if self.ema:
            self.ema.update(self.optimizer._master_weights)

    def advance(self, window: range) -> None:
        """Go on behind `window`; by itself, a step that leaves the weights as they are."""
        self.optimizer.clear_grad(set_to_zero=False)
        self.lr_scheduler.step()
        self.step, self.position = self.step + 1, window.stop

    def float32_weights(self):
        """A context in which the parameters that learn hold float32, as files do."""
        return in_float32(self.parameters.values(), self.optimizer._master_weights)

    @contextlib.contextmanager
    def ema_weights(self):
        """A context in which the module holds the averaged weights, where there are any."""
        with self.float32_weights(), self.ema.applied() if self.ema else contextlib.nullcontext():
            yield

    def save_optimizer(self, file: Path) -> None:
        """Write the optimizer's tensors, of a sharded one this rank's share."""
        tensors = optimizer_tensors(self.optimizer, self.parameters)
        save_file({name: tensor.numpy() for name, tensor in tensors.items()}, file)

    def save(self, folder: Path) -> None:
        """Write weights and averages into a checkpoint's folder."""
        with self.float32_weights():
            self.module.save_weights(str(folder))
        if self.ema:
            save_file({name: tensor.numpy() for name, tensor in self.ema.averages.items()}, folder / EMA_FILE)
            with self.ema_weights():
                self.module.save_weights(str(folder / "ema"))

    def record(self) -> dict:
        """What else belongs to a checkpoint, as JSON."""
        return {
            "position": self.position,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": {name: np.asarray(value).tolist() for name, value in self.precision.scaler.state_dict().items()},
            "ema_updates": self.ema.updates if self.ema else None,
            "skipped_steps": self.skipped_steps,
            "bad_rows": sorted(self.bad_samples.rows),
        }

    def load(self, folder: Path, saved: dict) -> None:
        """Take over what `save` and `record` wrote."""
        flag = f"--resume_from_checkpoint: {folder}"
        if bool(self.ema) != (saved["ema_updates"] is not None):
            raise UserError(f"{flag} was written {'without' if self.ema else 'with'} --use_ema; expected the same now")
        tensors = {}
        for file in sorted(folder.glob(OPTIMIZER_FILES)):  # one, or one per rank that held a share
            tensors.update(load_file(file))
        # Fewer are right, too: what no step has used has no state.
        unknown = {name.split(SEPARATOR)[0] for name in tensors} - set(self.parameters)
        if unknown:
            raise UserError(
                f"{flag} holds an optimizer of other weights, such as {min(unknown)}, which do not learn here"
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
        self.skipped_steps, self.bad_samples.rows = saved["skipped_steps"], set(saved["bad_rows"])


def check_schedule(args, total_steps: int) -> None:
    """Raise a `UserError` for an optimizer or a learning rate that the run cannot have."""
    if args.lr_scheduler == "polynomial" and args.lr_warmup_steps >= total_steps:
        raise UserError(
            f"--lr_warmup_steps {args.lr_warmup_steps}: the run has {total_steps} steps; expected fewer with polynomial"
        )
    if args.use_8bit_adam and (args.sharding_degree > 1 or args.amp_level == "O2"):
        raise UserError(
            "--use_8bit_adam: its state is neither split over cards nor kept for low-precision weights; "
            "expected it without --sharding_degree and --amp_level O2"
        )


def build_training_state(module, args, total_steps: int, samples_per_step: int, ranks: Ranks) -> TrainingState:
    """Optimizer, learning rate, precision and average for what learns in `module`."""
    learning = {id(parameter) for parameter in module.trainable_parameters()}
    parameters = {name: parameter for name, parameter in module.named_parameters() if id(parameter) in learning}
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        learning_rate=args.learning_rate * (samples_per_step if args.scale_lr else 1),
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=total_steps,
    )
    optimizer_class = AdamW8bit if args.use_8bit_adam else paddle.optimizer.AdamW
    optimizer = optimizer_class(
        learning_rate=lr_scheduler,
        parameters=list(parameters.values()),
        beta1=args.adam_beta1,
        beta2=args.adam_beta2,
        epsilon=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
    )
    return TrainingState(
        module,
        parameters,
        ranks.shard(optimizer),
        lr_scheduler,
        Precision(args.mixed_precision, args.amp_level),
        EMA(parameters) if args.use_ema else None,
        args.seed,
        args.max_grad_norm,
        BadSamples(args.max_bad_samples),
    )
