"""Models of their real size without their weights, so that their memory can be counted before they are loaded; and
where the weights of models are put when they are loaded."""

import contextlib

import paddle
from paddle.nn.initializer import Initializer
from paddlenlp.transformers.model_utils import no_init_weights


def build_unloaded(part_class, folder: str):
    """The model that `folder` has a configuration of, with uninitialised parameters. The operating system hands out
    memory when it is first written to, so even a large model takes hardly any."""
    with nothing_initialised(), no_init_weights():
        return build_new(part_class, folder)


def build_new(part_class, folder: str):
    """The model that `folder` has a configuration of, with the initial values of its class."""
    if hasattr(part_class, "load_config"):
        return part_class.from_config(part_class.load_config(folder))
    return part_class(part_class.config_class.from_pretrained(folder))


@contextlib.contextmanager
def nothing_initialised():
    """A context in which new parameters have storage but are not initialised. (Paddle's own `LazyGuard` gives them no
    storage, and ppdiffusers' models write to some of theirs when they are built.)"""

    def allocate(self, parameter, block=None):
        empty = paddle.empty(parameter.shape, parameter.dtype)
        parameter.value().get_tensor()._share_data_with(empty.value().get_tensor())
        return parameter

    initialise, Initializer.__call__ = Initializer.__call__, allocate
    try:
        yield
    finally:
        Initializer.__call__ = initialise


_CHANGES = {}  # {part of a pipeline: what is done to its model before its weights are read}


@contextlib.contextmanager
def changed_before_loading(part: str, change):
    """A context in which folders call `change(model)` on the model of this part before they read its weights."""
    _CHANGES[part] = change
    try:
        yield
    finally:
        del _CHANGES[part]


def change_before_loading(part: str, model):
    """The model of a part, changed as the context asks for."""
    _CHANGES.get(part, lambda model: None)(model)
    return model


_PLACES = []  # the devices on which models are loaded instead of the current one; the last one counts


@contextlib.contextmanager
def loading_on_host():
    """A context in which folders load their models into the host's memory, whatever the device in use is."""
    _PLACES.append("cpu")
    try:
        yield
    finally:
        _PLACES.pop()


@contextlib.contextmanager
def loading_place():
    """The context in which a folder loads a model."""
    current = paddle.get_device()
    paddle.set_device(_PLACES[-1] if _PLACES else current)
    try:
        yield
    finally:
        paddle.set_device(current)


_LATER = []  # not empty: values of weights are read later


@contextlib.contextmanager
def values_later():
    """A context in which folders build models in the host's memory without reading their weights' values, so that they
    take hardly any. Each parameter has a method `load_value`, which reads its value. `weights.load_values` calls it,
    and `runtime.quantized` does for one layer after the other."""
    _LATER.append(True)
    try:
        with loading_on_host():
            yield
    finally:
        _LATER.pop()


def are_values_later() -> bool:
    """Whether values of weights are to be read later."""
    return bool(_LATER)
