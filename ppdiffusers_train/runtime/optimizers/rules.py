"""Optimizers in Paddle's tensor operations, whose rule for one parameter is a pure function."""

from math import prod

import paddle

SIZES = {"float32": 4, "bfloat16": 2, "uint8": 1}


class RuleOptimizer(paddle.optimizer.Optimizer):
    """An optimizer that updates one parameter after the other by `update`.

    A subclass has `defaults`, `layout` and `update`. Paddle's sharded optimizer and `FusedBackward` call
    `_apply_optimize` with a part of the parameters. The rate of a parameter is the run's times its own factor
    (`optimize_attr`).

    Args:
        learning_rate: the rate or its schedule.
        parameters: those to update.
        rounding: of parameters in bfloat16, a `Rounding`.
        options: those of `defaults` that have other values.
    """

    defaults = {}
    """{option: default}, whose types are those of the options."""

    bytes_per_element = 20
    """Temporary bytes while a float32 matrix is updated, for each of its elements."""

    positive = ()
    """Names of options that may not be 0."""

    needs_all_gradients = False
    """Whether an update depends on the gradients of all parameters."""

    averages = False
    """Whether the result has other weights than those that are trained (`evaluation_value`)."""

    def __init__(self, learning_rate, parameters, rounding=None, **options):
        super().__init__(learning_rate=learning_rate, parameters=parameters)
        self.options, self.rounding = {**self.defaults, **options}, rounding
        self.states = {}  # {parameter's name: {name: tensor}}
        self.counts = {}  # {parameter's name: its updates so far}
        self.shared = {}  # {name: number} of all parameters together, which a checkpoint's record holds

    @staticmethod
    def layout(shape: list, options: dict) -> dict:
        """{name: (shape, dtype)} of the state of a parameter of this shape."""
        raise NotImplementedError

    @staticmethod
    def update(value, gradient, state: dict, step: int, rate: float, options: dict) -> tuple:
        """(new value, new state) of a parameter, from float32 tensors of the same shape.

        Args:
            state: tensors of `layout`; zeros at the first step.
            step: the number of this update of the parameter, from 1.
        """
        raise NotImplementedError

    @classmethod
    def bytes_of(cls, shape: list, options: dict) -> int:
        """Bytes of the state of a parameter of this shape."""
        return sum(prod(shape) * SIZES[dtype] for shape, dtype in cls.layout(shape, options).values())

    @classmethod
    def update_bytes(cls, size: int) -> int:
        """Temporary bytes while a float32 parameter with `size` elements is updated."""
        return cls.bytes_per_element * size

    def begin_step(self) -> None:
        """Called before the first update of a step."""

    @paddle.no_grad()
    def step(self):
        """Update every parameter that has a gradient."""
        pairs = [(p, p.grad) for p in self._parameter_list if not p.stop_gradient and p.grad is not None]
        self.begin_step()
        self._apply_optimize(None, None, pairs)

    @paddle.no_grad()
    def _apply_optimize(self, loss, startup_program, params_grads, param_group_idx=0):
        for parameter, gradient in params_grads:
            self.update_parameter(parameter, gradient)

    def update_parameter(self, parameter, gradient) -> None:
        """Update one parameter; its master weight, if it has one, is what is updated."""
        name, target = parameter.name, self._master_weights.get(parameter.name, parameter)
        count = self.counts[name] = self.counts.get(name, 0) + 1
        state = self.states.pop(name, None) or self.initial_state(target)
        is_narrow = target.dtype == paddle.bfloat16
        value = self.rounding.widen(target, self.rounding.take(state)) if is_narrow else target
        rate = self.rate_of(parameter)
        value, state = self.update(value, gradient.astype("float32"), state, count, rate, self.options)
        if is_narrow:
            state |= self.rounding.store(target, value, count)
        else:
            paddle.assign(value, output=target)  # `set_value` copies through NumPy in Paddle 2.6
        if target is not parameter:
            paddle.assign(target.astype(parameter.dtype), output=parameter)
        self.states[name] = state

    def rate_of(self, parameter) -> float:
        """The learning rate of a parameter."""
        return self.get_lr() * getattr(parameter, "optimize_attr", {}).get("learning_rate", 1.0)

    def initial_state(self, parameter) -> dict:
        """The state before a parameter's first update."""
        tensors = self.layout(parameter.shape, self.options).items()
        return {name: paddle.zeros(shape, dtype) for name, (shape, dtype) in tensors}

    def state_dict(self) -> dict:
        """`{"<parameter's name>_<name>": tensor}`."""
        tensors = {f"{name}_{key}": tensor for name, state in self.states.items() for key, tensor in state.items()}
        counts = {f"{name}_step": paddle.to_tensor([count], dtype="int64") for name, count in self.counts.items()}
        return {**tensors, **counts}

    def set_state_dict(self, state_dict: dict) -> None:
        """Load what `state_dict` returned."""
        self.states, self.counts = {}, {}
        for parameter in self._parameter_list:
            name = parameter.name
            if f"{name}_step" in state_dict:
                own = self.layout(parameter.shape, self.options)
                if parameter.dtype == paddle.bfloat16 and not self._master_weights:
                    own = {**own, **self.rounding.layout(parameter.shape)}
                self.states[name] = {key: state_dict[f"{name}_{key}"] for key in own}
                self.counts[name] = int(state_dict[f"{name}_step"])
