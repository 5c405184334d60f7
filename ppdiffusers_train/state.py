"""What changes while a run trains, and so what a checkpoint holds."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from ppdiffusers.optimization import get_scheduler
from safetensors.numpy import load_file, save_file

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.runtime.ema import EMA
from ppdiffusers_train.runtime.optimizer_state import load_optimizer_tensors, optimizer_tensors
from ppdiffusers_train.runtime.precision import Precision

OPTIMIZER_FILE, EMA_FILE = "optimizer.safetensors", "ema.safetensors"


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

    def record(self) -> dict:
        """What else belongs to a checkpoint, as JSON."""
        return {
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
