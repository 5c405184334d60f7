"""Makes PaddleNLP import its parts on demand.

`import ppdiffusers` imports PaddleNLP for its models and tokenizers, and PaddleNLP imports its trainers, task flows and
servers with scikit-learn, pandas and FastAPI: a third of a script's start-up time, and 120 MB of memory.
"""

import ast
import logging
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader

PACKAGE = "paddlenlp"
NOISE = "datasets module was imported before paddlenlp"  # which matters to its own `datasets` alone


class LightPackage(SourceFileLoader):
    """Loads a package whose submodules are imported when they are first used, and not with the package (PEP 562)."""

    def exec_module(self, module):
        statements = ast.parse(self.get_data(self.path)).body
        parts = [found for found in statements if isinstance(found, ast.ImportFrom) and found.level == 1]
        homes = {part.module: part.module for part in parts if part.module}
        homes |= {alias.name: part.module or alias.name for part in parts for alias in part.names}
        if "*" in homes or not homes:  # an unknown version of PaddleNLP: leave it as it is
            return super().exec_module(module)

        def part_of_package(name):
            if name not in homes:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            home = import_module(f"{module.__name__}.{homes[name]}")
            return home if homes[name] == name else getattr(home, name)

        module.__getattr__ = part_of_package
        rest = ast.Module([found for found in statements if found not in parts], type_ignores=[])
        exec(compile(rest, self.path, "exec"), module.__dict__)
        # Its submodules import each other in a circle, which works only from the one that the package imports first.
        import_module(f"{module.__name__}.{parts[0].names[0].name}")


class LightPackageFinder(MetaPathFinder):
    """Finds PaddleNLP, for `LightPackage` to load."""

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == PACKAGE else None
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = LightPackage(spec.loader.name, spec.loader.path)
        return spec


def import_paddlenlp_lightly() -> None:
    """From now on, `import paddlenlp` imports its submodules on demand. A second call does nothing."""
    if not any(isinstance(finder, LightPackageFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, LightPackageFinder())
        logging.getLogger("PaddleNLP").addFilter(lambda record: NOISE not in record.getMessage())
