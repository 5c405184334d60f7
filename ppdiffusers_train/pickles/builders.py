"""What the names in pickled weights stand for. Nothing is imported: each makes one of the objects of `arrays.py`."""

from ppdiffusers_train.pickles.arrays import (
    NUMPY_TYPES,
    TORCH_NAMES,
    TORCH_TYPES,
    NumpyArray,
    Storage,
    TorchTensor,
    Type,
)
from ppdiffusers_train.pickles.machine import Bytes, Name, RefusedPickle

NDARRAY, BYTES = Name("numpy", "ndarray"), Name("torch.storage", "UntypedStorage")


class Builder:
    """Makes the objects of one file.

    Args:
        file: its path.
    """

    def __init__(self, file):
        self.file, self.storages = file, {}

    def call(self, function: Name, arguments: tuple):
        """What a function makes of arguments. A `RefusedPickle` for any function that does not make numbers."""
        known = FUNCTIONS.get((function.module, function.name))
        if known is None:
            raise RefusedPickle(f"it holds {function}, which is no array of numbers, and could be code")
        return known(self, *arguments)

    def set_state(self, target, state) -> None:
        """Complete an array or a type. Attributes of a dictionary, as torch adds, hold nothing that is needed."""
        if isinstance(target, (NumpyArray, Type)):
            target.set_state(state)
        elif type(target) is not dict:
            raise RefusedPickle("it changes something that is no array of numbers")

    def storage(self, identity):
        """torch's storage with a persistent id ("storage", type, key, device, number of elements, …)."""
        if type(identity) is not tuple or len(identity) < 5 or identity[0] != "storage":
            raise RefusedPickle("it refers to something outside of it that is no storage of numbers")
        _, kind, key, _, count = identity[:5]
        if kind == BYTES:
            kind = Name("torch", "ByteStorage")
        if type(kind) is not Name or kind.module != "torch" or kind.name not in TORCH_TYPES:
            raise RefusedPickle(f"it holds numbers of type {kind}; expected one of {', '.join(TORCH_TYPES)}")
        if type(key) is not str or type(count) is not int or any(identity[5:]):
            raise RefusedPickle("it refers to a storage in a way that is not understood")
        found = self.storages.setdefault(key, Storage(self.file, TORCH_TYPES[kind.name], count))
        if (found.dtype, found.count) != (Storage(self.file, TORCH_TYPES[kind.name], count).dtype, count):
            raise RefusedPickle(f"it refers to the storage {key} as two different ones")
        return found

    def array(self, kind, shape, order):
        if kind != NDARRAY:
            raise RefusedPickle(f"it holds {kind}, which is no array of numbers")
        return NumpyArray(self.file)

    def buffered_array(self, content, kind, shape, order):
        if type(kind) is not Type or order not in ("C", "F"):
            raise RefusedPickle("it holds an array that is not made of numbers")
        return NumpyArray(self.file).fill(shape, kind, content, order)

    def scalar(self, kind, content):
        return self.buffered_array(content, kind, (), "C")

    def type(self, code, *_):
        return Type(code)

    def encoded(self, text, encoding):
        """Python 3's bytes in pickles for Python 2."""
        if encoding != "latin1":
            raise RefusedPickle("it holds bytes in an encoding that is not understood")
        return text if type(text) is Bytes else text.encode("latin1")

    def tensor(self, storage, first, shape, strides, *_):
        return TorchTensor(storage, first, shape, strides)

    def typed_tensor(self, storage, first, shape, strides, requires_grad, hooks, kind, *_):
        if type(kind) is not Name or kind.module != "torch" or kind.name not in TORCH_NAMES:
            raise RefusedPickle(f"it holds numbers of type {kind}; expected one of {', '.join(TORCH_NAMES)}")
        return TorchTensor(storage, first, shape, strides, NUMPY_TYPES[TORCH_NAMES[kind.name]])

    def parameter(self, tensor, *_):
        return tensor

    def default_dictionary(self, *_):
        """A dictionary whose missing values a function makes, which is not called."""
        return {}

    def dictionary(self, pairs=()):
        return {key: value for key, value in pairs if type(key) is str}

    def evaluated(self, expression, names):
        """The one expression that Paddle writes, of a tensor outside of its own class."""
        if expression != "data" or type(names) is not dict or not isinstance(names.get("data"), NumpyArray):
            raise RefusedPickle("it holds builtins.eval, which is no array of numbers, and could be code")
        return names["data"]

    def tuple(self, items=()):
        if type(items) not in (tuple, list):
            raise RefusedPickle("it is damaged (a tuple of something that is no list)")
        return tuple(items)

    def bytes(self):
        return b""


FUNCTIONS = {
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", Builder.array),
            ("multiarray", "scalar", Builder.scalar),
            ("numeric", "_frombuffer", Builder.buffered_array),
        )
    },
    **{(module, "tuple"): Builder.tuple for module in ("builtins", "__builtin__")},
    **{(module, "eval"): Builder.evaluated for module in ("builtins", "__builtin__")},
    **{(module, "bytes"): Builder.bytes for module in ("builtins", "__builtin__")},
    ("numpy", "dtype"): Builder.type,
    ("_codecs", "encode"): Builder.encoded,
    ("collections", "OrderedDict"): Builder.dictionary,
    ("collections", "defaultdict"): Builder.default_dictionary,
    ("torch._utils", "_rebuild_tensor"): Builder.tensor,
    ("torch._utils", "_rebuild_tensor_v2"): Builder.tensor,
    ("torch._utils", "_rebuild_tensor_v3"): Builder.typed_tensor,
    ("torch._utils", "_rebuild_parameter"): Builder.parameter,
    ("torch", "Size"): Builder.tuple,
}
