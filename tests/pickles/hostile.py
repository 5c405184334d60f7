"""Pickles that do something when Python's reader, or a careless one, reads them. Each tries to make a file."""

import io
import os
import pickle
import struct
import zipfile

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments, state=None, items=None, pairs=None):
        self.reduced = (function, arguments, state, items, pairs)

    def __reduce__(self):
        return self.reduced


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    """The opcodes of an import by names on the stack."""
    return text(module) + text(name) + b"\x93"


def payloads(marker) -> dict:
    """{what it tries: bytes of a pickle}; each would make the file `marker`, or fill the memory."""
    command = f"touch {marker}"
    array = np.arange(4, dtype="float32")
    shell = text(command) + b"\x85R"
    found = {
        f"os.system, protocol {protocol}": pickle.dumps({"w": array, "x": Calls(os.system, command)}, protocol)
        for protocol in range(6)
    }
    run = b"cos\nsystem\n" + shell
    reconstruct = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n"
    rebuild = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    found |= {
        "alone": pickle.dumps(Calls(os.system, command), 2),
        "as a key": pickle.dumps({Calls(os.system, command): array}, 2),
        "deep inside": pickle.dumps({"w": array, "x": {"y": [({"z": [Calls(os.system, command)]},)]}}, 4),
        "eval": pickle.dumps({"x": Calls(eval, f"__import__('os').system({command!r})")}, 2),
        "eval, as Paddle calls it": pickle.dumps({"x": Calls(eval, f"open({str(marker)!r}, 'w')", {"data": array})}, 2),
        "exec": pickle.dumps({"x": Calls(exec, f"open({str(marker)!r}, 'w')")}, 4),
        "by its name in C": b"\x80\x02cposix\nsystem\n" + shell + b".",
        "a state": pickle.dumps({"x": Calls(dict, state={"a": Calls(os.system, command)})}, 2),
        "list items": pickle.dumps({"x": Calls(list, items=iter([Calls(os.system, command)]))}, 2),
        "dictionary items": pickle.dumps({"x": Calls(dict, pairs=iter([("a", Calls(os.system, command))]))}, 2),
        "names on the stack": b"\x80\x04" + named("os", "system") + shell + b".",
        "a dotted name": b"\x80\x04" + named("numpy", "os.system") + shell + b".",
        "a name of torch": b"\x80\x04" + named("torch._utils", "os.system") + shell + b".",
        "a name from the memo": b"\x80\x04"
        + text("os")
        + b"\x94"
        + text("system")
        + b"\x94h\x00h\x01\x93"
        + shell
        + b".",
        "INST": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text(command) + b"o.",
        "NEWOBJ": b"\x80\x02cos\nsystem\n" + text(command) + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + named("os", "system") + text(command) + b"\x85}\x92.",
        "an extension": b"\x80\x02\x82\x01.",
        "copyreg": b"\x80\x02ccopyreg\n__newobj__\ncos\nsystem\n" + text(command) + b"\x86R.",
        "copyreg's reconstructor": b"\x80\x02ccopyreg\n_reconstructor\ncos\nsystem\nc__builtin__\nobject\nN\x87R.",
        "functools": b"\x80\x02cfunctools\npartial\ncos\nsystem\n" + text(command) + b"\x86R)R.",
        "a state of a function": b"\x80\x02cos\nsystem\n}" + text("__wrapped__") + text("x") + b"sb.",
        "attributes of an array": b"\x80\x02cnumpy\nndarray\n}" + text("__setstate__") + b"cos\nsystem\nsb.",
        "attributes of a dictionary": b"\x80\x02ccollections\nOrderedDict\n)R}"
        + text("x")
        + b"cos\nsystem\n"
        + shell
        + b"sb.",
        "a persistent id": b"\x80\x02" + run + b"Q.",
        "a persistent id as text": b"Pos.system\n.",
        "another persistent id": b"\x80\x02(" + text("module") + b"cos\nsystem\n" + text("a") + text("b") + b"tQ.",
        "torch's rebuilt tensor of a function": rebuild + b"(cos\nsystem\nK\x00))\x89NtR.",
        "torch's rebuilt type": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncos\nsystem\n"
        + text(command)
        + b"\x85NtR.",
        "torch's load in a load": b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x01x\x85R.",
        "NumPy's load": b"\x80\x02cnumpy\nload\n" + text(str(marker)) + b"\x85R.",
        "an array of objects": pickle.dumps({"x": np.array([Calls(os.system, command)], dtype=object)}, 4),
        "an array of objects in its bytes": reconstruct
        + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01K\x01\x85cnumpy\ndtype\n"
        + text("O")
        + b"\x89\x88\x87R\x89C\x08xxxxxxxxtb.",
        "a scalar of objects": b"\x80\x02cnumpy.core.multiarray\nscalar\n"
        + b"cnumpy\ndtype\n"
        + text("O8")
        + b"\x89\x88\x87R"
        + b"C\x08"
        + b"\0" * 8
        + b"\x86R.",
        "another class than an array": reconstruct + b"cos\nsystem\nK\x00\x85C\x01b\x87R.",
        "a dtype by a function": b"\x80\x02cnumpy\ndtype\ncos\nsystem\n" + shell + b"\x85R.",
        "codecs": b"\x80\x02c_codecs\ndecode\n" + text(command) + text("zip") + b"\x86R.",
        "codecs' encode": b"\x80\x02c_codecs\nencode\n" + text(command) + text("rot13") + b"\x86R.",
        "pickle in a pickle": pickle.dumps({"x": Calls(pickle.loads, pickle.dumps(Calls(os.system, command)))}, 4),
        "a tuple of a function's result": b"\x80\x02c__builtin__\ntuple\ncos\nsystem\n" + shell + b"\x85R.",
    }
    return found


def bombs() -> dict:
    """{what it declares: bytes of a pickle}; a careless reader takes the memory, or never ends."""
    ndarray = (
        b"\x80\x04"
        + named("numpy.core.multiarray", "_reconstruct")
        + named("numpy", "ndarray")
        + b"K\x00\x85C\x01b\x87R"
    )
    f4 = named("numpy", "dtype") + text("f4") + b"\x89\x88\x87R"
    huge = struct.pack("<Q", 2**40)

    def state(shape, content):
        return b"}" + text("w") + ndarray + b"(K\x01" + shape + f4 + b"\x89" + content + b"tbs."

    return {
        "bytes": b"\x80\x04\x8e" + huge + b"x.",
        "text": b"\x80\x04\x8d" + huge + b"x.",
        "a byte array": b"\x80\x05\x96" + huge + b"x.",
        "a long number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
        "an old text": b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b"x.",
        "a frame": b"\x80\x04\x95" + huge + b"N.",
        "a shape": b"\x80\x04" + state(b"\x8a\x06" + (2**45).to_bytes(6, "little") + b"\x85", b"C\x04abcd"),
        "a shape with nothing in it": b"\x80\x04"
        + state(b"K\x00" + 2 * (b"\x8a\x06" + (2**39).to_bytes(6, "little")) + b"\x87", b"C\x00"),
        "a negative shape": b"\x80\x04" + state(b"J\xff\xff\xff\xff\x85", b"C\x04abcd"),
        "many objects": b"\x80\x04" + b"}" * 1_200_000 + b".",
        "a name without end": b"\x80\x02c" + b"x" * 100_000,
        "itself": b"\x80\x04}\x94" + text("state_dict") + b"h\x00s.",
        "deeply nested": b"\x80\x04" + b"N" + b"\x85" * 500_000 + b".",
        "a nested key": b"\x80\x04}" + b"N" + b"\x85" * 500_000 + b"Ns.",
        "an index of the memo": b"\x80\x04}r\xff\xff\xff\xff.",
    }


def zipped(pickled: bytes, folder="archive", name="data.pkl", compression=zipfile.ZIP_STORED, **storages) -> bytes:
    """A file as torch writes it since 1.6."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        archive.writestr(f"{folder}/{name}", pickled)
        for key, numbers in storages.items():
            archive.writestr(f"{folder}/data/{key.removeprefix('s')}", numbers)
        archive.writestr(f"{folder}/version", "3\n")
    return content.getvalue()


def older(pickled: bytes, keys=(), storages=b"") -> bytes:
    """A file as torch wrote it before 1.6."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(part, 2) for part in (MAGIC, 1001, system)]
    return b"".join([*parts, pickled, pickle.dumps(list(keys), 2)]) + storages


def torch_tensor(count: int, first=0, shape=(4,), strides=(1,), key="0", kind="FloatStorage") -> bytes:
    """A pickle of {"w": tensor}, without torch."""

    def numbers(values):
        return b"(" + b"".join(b"\x8a\x08" + value.to_bytes(8, "little", signed=True) for value in values) + b"t"

    storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu")
    storage += b"\x8a\x08" + count.to_bytes(8, "little", signed=True) + b"tQ"
    view = b"\x8a\x08" + first.to_bytes(8, "little", signed=True) + numbers(shape) + numbers(strides)
    return b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"\x89NtRs."
