"""An interpreter of pickles that builds plain data. It looks no name up and calls nothing of what a file names."""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass

MOST_OPCODES = 1_000_000  # a state dict of 10,000 tensors has about 300,000
LONGEST_NAME = 1000  # bytes
LONGEST_IN_MEMORY = 4096  # bytes; longer ones stay in the file until they are fetched
OPCODES = {opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes}


class RefusedPickle(Exception):
    """A pickle is damaged, or holds something besides numbers. The message says what."""


@dataclass(frozen=True)
class Name:
    """What a pickle imports, as the name that it is."""

    module: str
    name: str

    def __str__(self):
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Bytes:
    """Bytes that stay in the file; `is_text`: they are UTF-8 of characters that stand for a byte each."""

    offset: int
    length: int
    is_text: bool


class Part:
    """A range of an open file, read to its end and no further."""

    def __init__(self, file, start: int, end: int):
        self.file, self.end = file, end
        file.seek(start)

    def tell(self) -> int:
        """Where the next byte is in the file."""
        return self.file.tell()

    def read(self, length: int) -> bytes:
        """The next bytes. A `RefusedPickle` if there are not as many, before any memory is taken for them."""
        if length > self.end - self.file.tell():
            raise RefusedPickle("it ends too early")
        return self.file.read(length)

    def readline(self) -> bytes:
        """The next short line."""
        return self.file.readline(min(LONGEST_NAME, self.end - self.file.tell()))

    def skip(self, length: int) -> None:
        """Pass over bytes without reading them."""
        if length > self.end - self.file.tell():
            raise RefusedPickle("it ends too early")
        self.file.seek(length, 1)


class Machine:
    """Interprets one pickle.

    Args:
        source: a `Part`, at the pickle's first byte.
        call: `call(name, arguments)` is what the function of that `Name` makes.
        set_state: `set_state(object, state)` completes an object that `call` has made.
        persistent: `persistent(id)` is the object that a persistent id stands for.
    """

    def __init__(self, source: Part, call: Callable, set_state: Callable, persistent: Callable):
        self.source, self.call, self.set_state, self.persistent = source, call, set_state, persistent
        self.stack, self.marks, self.memo = [], [], {}

    def run(self):
        """The object that the pickle describes.

        Raises:
            RefusedPickle: it is damaged, or needs more than data need.
        """
        try:
            for _ in range(MOST_OPCODES):
                opcode = OPCODES.get(self.source.read(1))
                if opcode is None:
                    raise RefusedPickle("it is no pickle, or a damaged one")
                if opcode.name == "STOP":
                    return self.stack.pop()
                argument = self._argument(opcode)
                if opcode.name in PUSHED:
                    self.stack.append(argument)
                elif opcode.name in CONSTANTS:
                    self.stack.append(CONSTANTS[opcode.name]())
                elif opcode.name in ACTIONS:
                    ACTIONS[opcode.name](self, argument)
                else:
                    raise RefusedPickle(f"it has the opcode {opcode.name}, which weights do not need")
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RefusedPickle(f"it is damaged ({type(error).__name__}: {error})") from error
        raise RefusedPickle(f"it has more than {MOST_OPCODES} opcodes")

    def _argument(self, opcode):
        if opcode.arg is None:
            return None
        if opcode.name not in BYTES:
            return opcode.arg.reader(self.source)
        width, is_text = BYTES[opcode.name]
        length = int.from_bytes(self.source.read(width), "little")
        if length > LONGEST_IN_MEMORY:
            found = Bytes(self.source.tell(), length, is_text)
            self.source.skip(length)
            return found
        content = self.source.read(length)
        return content.decode("utf-8", "surrogatepass") if is_text else content

    def pop_mark(self) -> list:
        """The objects above the last mark, which goes as well."""
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def pop(self, count: int) -> list:
        """So many objects from the top of the stack, in order."""
        if len(self.stack) < count:
            raise RefusedPickle("it is damaged (too few objects)")
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found

    def set_items(self, items: list) -> None:
        """Put keys and values into the dictionary on the top of the stack."""
        target = self.stack[-1]
        # Names are those of classes: Lightning keeps the states of callbacks under them.
        if type(target) is not dict or not all(type(key) in (str, int, Name) for key in items[::2]):
            raise RefusedPickle("it has a dictionary whose keys are not text, numbers or names")
        target.update(zip(items[::2], items[1::2], strict=True))

    def extend(self, items: list) -> None:
        """Put objects at the end of the list on the top of the stack."""
        if type(self.stack[-1]) is not list:
            raise RefusedPickle("it is damaged (objects are put into something that is no list)")
        self.stack[-1].extend(items)

    def push_name(self, module, name) -> None:
        """Push a name that is imported."""
        if type(module) is not str or type(name) is not str:
            raise RefusedPickle("it is damaged (a name that is no text)")
        self.stack.append(Name(module, name))

    def reduce(self) -> None:
        """Replace a name and arguments by what `call` makes of them."""
        function, arguments = self.pop(2)
        if type(function) is not Name or type(arguments) is not tuple:
            raise RefusedPickle("it calls something that is no function")
        self.stack.append(self.call(function, arguments))

    def build(self) -> None:
        """Complete the object below the top of the stack by the state on the top."""
        (state,) = self.pop(1)
        self.set_state(self.stack[-1], state)


# {opcode: (bytes of the length before the content, whether it is text)}
BYTES = {
    "SHORT_BINBYTES": (1, False), "BINBYTES": (4, False), "BINBYTES8": (8, False), "BYTEARRAY8": (8, False),
    "SHORT_BINUNICODE": (1, True), "BINUNICODE": (4, True), "BINUNICODE8": (8, True),
}  # fmt: skip
# Opcodes that push their argument.
PUSHED = {*BYTES, "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"}
CONSTANTS = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict,
}  # fmt: skip
ACTIONS = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, _: machine.pop(1),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_mark())),
    "TUPLE1": lambda machine, _: machine.stack.append(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.stack.append(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.stack.append(tuple(machine.pop(3))),
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "BINPUT": lambda machine, index: machine.memo.update({index: machine.stack[-1]}),
    "LONG_BINPUT": lambda machine, index: machine.memo.update({index: machine.stack[-1]}),
    "MEMOIZE": lambda machine, _: machine.memo.update({len(machine.memo): machine.stack[-1]}),
    "BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "GLOBAL": lambda machine, names: machine.push_name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.push_name(*machine.pop(2)),
    "REDUCE": lambda machine, _: machine.reduce(),
    "NEWOBJ": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.stack.append(machine.persistent(*machine.pop(1))),
}
