"""The source code that methods of a training module run, as text, to detect changes of what they compute."""

import ppdiffusers_train

import inspect
from itertools import chain
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

PACKAGE = Path(ppdiffusers_train.__file__).parent


def sources(module_class, *methods: str) -> list:
    """The source of `methods` of a class and of all functions that they call, directly or not.

    Calls are found by name, among the names of the function's file, the class and its bases. Only functions of this
    package, or in a folder with one of the methods, are included; those of other libraries are not.
    """
    waiting = list(chain(*(own_functions(module_class, name) for name in methods)))
    found, folders = {}, {Path(function.__code__.co_filename).parent for function in waiting}
    while waiting:
        function = inspect.unwrap(waiting.pop())
        file = Path(function.__code__.co_filename)
        if function not in found and (file.is_relative_to(PACKAGE) or file.parent in folders):
            found[function] = inspect.getsource(function)
            waiting += called_functions(function, module_class)
    return sorted(found.values())


def called_functions(function: FunctionType, module_class):
    """The functions that a function may call by the names in its code."""
    known = function.__globals__
    for name in names_in(function.__code__):
        yield from own_functions(module_class, name)
        modules = (value for value in map(known.get, names_in(function.__code__)) if isinstance(value, ModuleType))
        for value in (known.get(name), *(getattr(module, name, None) for module in modules)):
            if isinstance(value, FunctionType):
                yield value


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
