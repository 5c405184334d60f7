"""Finds the code that prepares and encodes a training module's samples, so that changes of it are noticed.

Scripts are made to be edited, so their code counts as it is written. Files of this package that encodings reach have a
number, VERSION, which is raised when their functions compute something else (tests/data/test_encoding_versions.py).
"""

import ppdiffusers_train

import inspect
from itertools import chain
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import numpy as np

PACKAGE = Path(ppdiffusers_train.__file__).parent


def code_of(module_class, methods: tuple, also=()) -> list:
    """What `methods` of a class, and the functions and classes `also`, run: one text for each function, sorted.

    Of a file of the package that has a version, this is a text for the file: its name and that version. Of any other
    function, it is its source, and the numbers and texts outside of it that it names.
    """
    return sorted({described(function, module_class) for function in reached(module_class, methods, also)})


def reached(module_class, methods: tuple, also=()) -> set:
    """`methods` of a class, the functions `also`, those of the classes `also`, and all functions that they call.

    Calls are found by name, among the names of the function's file, the class and its bases. Only functions of this
    package, or in a folder with one of the methods, are included; those of other libraries are not.
    """
    waiting = list(chain(*(own_functions(module_class, name) for name in methods)))
    folders = {file_of(function).parent for function in waiting}
    waiting += chain(*map(functions_of, also))
    found = set()
    while waiting:
        function = inspect.unwrap(waiting.pop())
        if function not in found and (is_of_package(function) or file_of(function).parent in folders):
            found.add(function)
            waiting += called_functions(function, module_class)
    return found


def described(function: FunctionType, module_class) -> str:
    """What stands for a function in `code_of`."""
    if is_of_package(function) and "VERSION" in function.__globals__:
        return f"{file_of(function).relative_to(PACKAGE).as_posix()} {function.__globals__['VERSION']}"
    return source_of(function, module_class)


def source_of(function: FunctionType, module_class) -> str:
    """The source of a function, and the numbers and texts that it takes from its file or its class by name."""
    lines = [inspect.getsource(function)]
    for name in sorted(names_in(function.__code__)):
        owners = [function.__globals__, *map(vars, module_class.__mro__)]
        text = text_of(next((owner[name] for owner in owners if name in owner), None))
        if text:
            lines.append(f"{name} = {text}")
    return "\n".join(lines)


def text_of(value) -> str:
    """A number or text, or an array, tuple, list, set or dictionary of them, in writing; empty for anything else.

    Sets have another order in each process, so theirs is that of their elements' texts.
    """
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, dict):
        parts = [text_of(part) for pair in value.items() for part in pair]
    elif isinstance(value, (tuple, list, set, frozenset)):
        parts = [text_of(part) for part in value]
    else:
        return ""
    parts = sorted(parts) if isinstance(value, (set, frozenset)) else parts
    return f"{type(value).__name__} {', '.join(parts)}" if all(parts) else ""


def called_functions(function: FunctionType, module_class):
    """The functions that a function may call by the names in its code; of a class, all of its methods."""
    known = function.__globals__
    for name in names_in(function.__code__):
        if not name.startswith("__"):  # such as __init__, which is a call of another class
            yield from own_functions(module_class, name)
        modules = (value for value in map(known.get, names_in(function.__code__)) if isinstance(value, ModuleType))
        for value in (known.get(name), *(getattr(module, name, None) for module in modules)):
            yield from functions_of(value)


def functions_of(value):
    """A function itself, and all methods of a class and its bases. Errors compute nothing."""
    if isinstance(value, FunctionType):
        yield value
    elif inspect.isclass(value) and not issubclass(value, BaseException):
        for name in set(chain(*map(vars, value.__mro__))):
            yield from own_functions(value, name)


def own_functions(module_class, name: str):
    """The functions of that name in a class and its bases: a method may call the one that it overrides."""
    for base in module_class.__mro__:
        value = vars(base).get(name)
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if isinstance(value, FunctionType):
            yield value


def names_in(code: CodeType) -> set:
    """All names in a function's code, and in that of functions within it."""
    within = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(names_in, within))


def is_of_package(function: FunctionType) -> bool:
    """Whether a function is defined in this package."""
    return file_of(function).is_relative_to(PACKAGE)


def file_of(function: FunctionType) -> Path:
    """The file that defines a function."""
    return Path(function.__code__.co_filename)
