"""The optimizers of `--optimizer`, by name."""

from math import inf, nan

import paddle

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.runtime.adamw_8bit import AdamW8bit
from ppdiffusers_train.runtime.optimizers.adafactor import Adafactor
from ppdiffusers_train.runtime.optimizers.adamw import AdamW
from ppdiffusers_train.runtime.optimizers.lion import Lion
from ppdiffusers_train.runtime.optimizers.prodigy import Prodigy
from ppdiffusers_train.runtime.optimizers.schedule_free import ScheduleFree

OPTIMIZERS = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "adafactor": Adafactor,
    "lion": Lion,
    "prodigy": Prodigy,
    "schedulefree": ScheduleFree,
}

BF16_UPDATE_BYTES = 8  # the value in float32, before and after it is rounded


def read_options(name: str, pairs) -> dict:
    """{option: value} from texts KEY=VALUE, in the types of the optimizer's defaults.

    Raises:
        UserError: it has no such option, or the value is of another type.
    """
    known, found = OPTIMIZERS[name].defaults, {}
    for pair in pairs or ():
        key, _, text = pair.partition("=")
        if key not in known:
            raise UserError(
                f"--optimizer_args: {key!r} is not an option of {name}; expected one of {', '.join(sorted(known))}"
            )
        found[key] = read_value(pair, text, known[key])
        if not found[key] and key in OPTIMIZERS[name].positive:
            raise UserError(f"--optimizer_args: {pair!r}; expected a number above 0")
    return found


def read_value(pair: str, text: str, default):
    """A value of the type of a default: a number from 0 on, or true or false."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"--optimizer_args: {pair!r}; expected true or false")
        return text.lower() == "true"
    try:
        value = float(text)
    except ValueError:
        value = nan
    below = 1 if pair.startswith("beta") else inf
    if not (value >= 0 and (value < below or value == default == inf)):
        raise UserError(f"--optimizer_args: {pair!r}; expected a number from 0 {'to below 1' if below == 1 else 'on'}")
    return value


def build_optimizer(name: str, rate, parameters: list, options: dict, rounding=None):
    """An optimizer.

    Args:
        rate: the learning rate or its schedule.
        options: those that are not the defaults.
        rounding: of parameters in bfloat16, a `Rounding`; None without such parameters.
    """
    if name == "adamw" and rounding is None:  # the same formulas, in one kernel
        known = {**AdamW.defaults, **options}
        return paddle.optimizer.AdamW(
            rate, known["beta1"], known["beta2"], known["epsilon"], parameters, known["weight_decay"]
        )
    return OPTIMIZERS[name](rate, parameters, rounding=rounding, **options)


def update_bytes(name: str, size: int, is_bf16: bool) -> int:
    """Temporary bytes while a parameter with `size` elements is updated."""
    if name == "adamw" and not is_bf16:
        return 0  # Paddle's kernel
    return OPTIMIZERS[name].update_bytes(size) + (BF16_UPDATE_BYTES * size if is_bf16 else 0)


def state_bytes(name: str, shape, options: dict = None) -> int:
    """Bytes of the state of a parameter of this shape."""
    kind = OPTIMIZERS[name]
    return kind.bytes_of(list(shape), {**kind.defaults, **(options or {})})
