"""Updates in the backward pass: each gradient is used and freed when it is complete (`--fused_backward`).

Gradients of all parameters are then never in memory together (Lv et al. 2023, arXiv 2306.09782).
"""

import contextlib
import math
import weakref

import paddle

from ppdiffusers_train.errors import RunError
from ppdiffusers_train.runtime.gradients import clipping_factor, scale_gradients


class FusedBackward:
    """Takes the place of `GradientSums` on one rank with one batch per step.

    A gradient that is NaN or inf is not used, and neither are those that follow it.

    Args:
        parameters: {structured name: parameter} of all trainable ones.
        optimizer: one that can update one parameter alone.
        max_norm: each gradient is clipped to this norm; None does not clip.
    """

    def __init__(self, parameters: dict, optimizer, max_norm=None):
        self._parameters, self._optimizer, self._max_norm = parameters, optimizer, max_norm
        self._updated, self._square, self._error = set(), 0.0, None
        arrived = weakref.WeakMethod(self._arrived)  # parameters outlive a run
        for name, parameter in parameters.items():
            parameter._register_backward_hook(lambda name=name: arrived() and arrived()(name))

    @property
    def is_torn(self) -> bool:
        """Whether perhaps only some of the last step's gradients have been used."""
        return not math.isfinite(self._square)

    @contextlib.contextmanager
    def micro_batch(self, last: bool):
        """A context for the backward pass of a step.

        Raises:
            RunError: the step has another batch, or a gradient came in several parts.
        """
        if not last:
            raise RunError(
                "--fused_backward: a step has several batches; expected one; the last checkpoint is untouched"
            )
        self._updated, self._square, self._error = set(), 0.0, None
        if hasattr(self._optimizer, "begin_step"):
            self._optimizer.begin_step()
        yield
        if self._error:
            raise self._error

    def send_rest(self) -> bool:
        """Nothing is sent on one rank."""
        return False

    def finish(self, changed: bool) -> None:
        """Nothing is left to do after the backward pass."""

    def squared_norm(self):
        """Σ g² of the gradients of the last step: a float32 scalar."""
        return paddle.to_tensor(self._square, "float32")

    def take_own_squares(self) -> list:
        """An empty list, as on one rank."""
        return []

    @paddle.no_grad()
    def _arrived(self, name: str) -> None:
        """Called after a gradient has been added to `parameter.grad`."""
        parameter = self._parameters[name]
        gradient = parameter.grad
        if gradient is None or self._error:
            return
        if name in self._updated:  # Paddle's engine would ignore an error that is raised here
            self._error = RunError(
                f"--fused_backward: the gradient of {name} comes in several parts; expected a model that uses each "
                "weight once, or no --fused_backward; the last checkpoint is untouched"
            )
        flat = gradient.astype("float32").flatten()
        square = float(paddle.matmul(flat, flat))
        self._square += square
        if math.isfinite(self._square) and not self._error:
            if self._max_norm:
                norm = paddle.to_tensor(math.sqrt(square))
                scale_gradients([gradient], clipping_factor(norm, self._max_norm))
            self._optimizer._apply_optimize(None, None, [(parameter, gradient)])
            self._updated.add(name)
        parameter.clear_gradient(False)
