"""The rules of docs/architecture.md that a machine can check."""

import ast
import inspect
import re
import textwrap

import pytest

from ppdiffusers_train.arguments import ArgumentParser, add_run_arguments
from tests.conftest import ROOT, load_script, module_class

pytestmark = pytest.mark.once  # no Paddle in it

PACKAGE = ROOT / "ppdiffusers_train"
LIBRARY = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [path for path in sorted((ROOT / "examples").glob("*/train_*.py"))]

# Each part of the package and what of the package it may import. Scripts and toys may import anything.
MAY_IMPORT = {
    "objectives": set(),
    "draws": set(),
    "arguments": {"errors", "launcher"},
    "cpu": {"errors"},
    "launcher": set(),
    "errors": {"launcher"},
    "pickles": {"errors"},
    "tensor_files": {"errors", "pickles"},
    "batches": set(),
    "module": {"batches", "errors"},
    "reporting": {"errors"},
    "runtime": {"cpu", "draws", "errors", "launcher", "module"},
    "models": {"batches", "cpu", "draws", "errors", "module", "objectives", "tensor_files"},
    "data": {"batches", "cpu", "draws", "errors", "module", "reporting", "runtime", "tensor_files"},
    "loop": {"data", "draws", "errors", "launcher", "module", "reporting", "runtime", "tensor_files", "cpu"},
    "training": {"cpu", "data", "draws", "errors", "launcher", "loop", "module", "reporting", "runtime"},
    "job": {"data", "errors", "loop", "models", "module", "objectives", "training"},
    "tools": {"arguments", "cpu", "data", "errors", "launcher", "loop", "models", "module", "reporting", "runtime"}
    | {"tensor_files", "training"},
    "cli": {"arguments", "data", "errors", "models", "tools", "toy", "launcher"},
}


def part_of(path):
    """`ppdiffusers_train/data/order.py` -> "data"; `ppdiffusers_train/training.py` -> "training"."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """The modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", [path for path in LIBRARY if part_of(path) in MAY_IMPORT], ids=lambda p: p.name)
def test_each_part_imports_only_what_it_may(path):
    part = part_of(path)
    for name in imports(path):
        if name.startswith("ppdiffusers_train."):
            other = name.split(".")[1]
            assert other == part or other in MAY_IMPORT[part], f"{path.name} imports {name}"


def test_every_part_has_a_rule():
    assert {part_of(path) for path in LIBRARY} - {"__init__", "toy"} == set(MAY_IMPORT)


def test_models_and_pipelines_of_ppdiffusers_stay_in_models_and_toy():
    for path in LIBRARY:
        if part_of(path) not in ("models", "toy"):
            found = [name for name in imports(path) if re.match(r"ppdiffusers(\.|$)|paddlenlp", name)]
            # The learning-rate schedules, the version, and the logger are no models.
            assert set(found) <= {"ppdiffusers.optimization", "ppdiffusers", "paddlenlp.utils.log"}, path
            names = re.findall(r"from ppdiffusers import (.*)", path.read_text(encoding="utf-8"))
            assert not names, f"{path} imports {names}"


def test_one_place_knows_the_format_of_tensor_files():
    """Besides the toys' shipped weights, which are small and wanted whole."""
    knowing = {path.name for path in LIBRARY + SCRIPTS if any(name.startswith("safetensors") for name in imports(path))}
    assert knowing == {"tensor_files.py", "shipped.py"}


def test_jobs_leave_reading_and_writing_of_models_to_one_place():
    """`models/weights.py` divides large weights, and reads and writes a tensor at a time; the libraries do not."""
    for path in [*SCRIPTS, *(PACKAGE / "toy" / "recipes").glob("train_*.py")]:
        text = path.read_text(encoding="utf-8")
        for method, function in (("save_weights", "save_model"), ("load_weights", "load_in_place")):
            bodies = re.findall(rf"    def {method}\(.*\n((?:(?:        .*)?\n)+)", text)
            assert all(function in body or "lora" in body or "write_tensors" in body for body in bodies), (path, method)


def test_the_library_never_imports_a_script():
    assert not [path for path in LIBRARY for name in imports(path) if name.startswith("examples")]


# Where flags are read besides scripts: the loop, what builds a data set, and tools with flags of their own.
READ_FLAGS = {"training", "job", "loop", "tools", "cli"}
BUILD_DATASETS = {"dataset.py", "image_folder.py", "table_sources.py"}


def test_flags_are_read_only_in_scripts_dataset_and_loop():
    for path in LIBRARY:
        if part_of(path) not in READ_FLAGS | {"toy"} and path.name not in BUILD_DATASETS:
            assert not re.search(r"\bargs\.", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_declared_flag_is_read(script):
    """A job's own flags by methods that its module runs, those of every run by these or by the loop."""
    job, run = load_script(script), ArgumentParser()
    add_run_arguments(run, "out")
    declared, of_every_run = ({action.dest for action in parser._actions} for parser in (job.build_parser(), run))
    by_job = set().union(*map(flags_read_in, running_methods(module_class(job))))
    library = [path for path in LIBRARY if part_of(path) in ("training", "loop", "data")]
    by_loop = set().union(*(flags_read_in(path.read_text(encoding="utf-8")) for path in library)) & of_every_run
    by_loop |= flags_read_in((PACKAGE / "data" / "dataset.py").read_text(encoding="utf-8"))  # of masks: some jobs' own
    unread = declared - by_job - by_loop - {"help", "config"}
    assert not unread, f"read nowhere: {sorted(unread)}"


def flags_read_in(source):
    """The names x for which source code reads `args.x`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        if ast.unparse(node.value).split(".")[-1] == "args"
    }


def running_methods(cls):
    """The source of a class's methods, without those that are overridden and not called by `super()`."""
    for name in {name for base in cls.__mro__ for name in vars(base)}:
        for base in cls.__mro__:
            method = vars(base).get(name)
            method = getattr(method, "fget", method)
            if not inspect.isfunction(method) or not method.__module__.startswith(("train_", "ppdiffusers_train")):
                continue
            yield (source := textwrap.dedent(inspect.getsource(method)))
            if f"super().{name}(" not in source:
                break


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_cache_knows_every_flag_that_an_encoding_depends_on(script):
    depends = names_in(script, "preprocess", "encode")
    known = set().union(*(names_in(path, "encoding_settings", strings=True) for path in with_extended(script)))
    assert depends <= known, f"not in encoding_settings: {depends - known}"


def with_extended(script):
    """A script and those that it extends."""
    names = [name for name in imports(script) if name.startswith("train_")]
    return [script, *(path for name in names for path in with_extended(script.with_name(f"{name}.py")))]


def names_in(script, *functions, strings=False):
    """The flags that functions of a script read, and the strings in them."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    nodes = [
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name in functions
        for node in ast.walk(function)
    ]
    flags = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args")
    }
    return flags | {node.value for node in nodes if strings and isinstance(node, ast.Constant)}


def test_nothing_is_imported_by_star_and_no_version_is_compared():
    for path in [*LIBRARY, *SCRIPTS]:
        text = path.read_text(encoding="utf-8")
        assert "import *" not in text, path
        assert not re.search(r"__version__\s*(<|>|==|!=|\.startswith)", text), path


def test_files_are_short_enough_to_read():
    for path in [*LIBRARY, *SCRIPTS]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 300 and max(map(len, lines), default=0) <= 120, path


def test_functions_fit_on_a_screen():
    """But for those that only list flags."""
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not re.match(r"add_\w+_arguments|build_parser", node.name):
                assert node.end_lineno - node.lineno < 50, f"{path.name}: {node.name}"
