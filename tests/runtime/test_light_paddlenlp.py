"""PaddleNLP is imported in part, and what is asked for is there."""

import ast
import subprocess
import sys
from importlib.util import module_from_spec

import pytest

from ppdiffusers_train.runtime import light_paddlenlp

pytestmark = pytest.mark.once  # PaddleNLP is the same for both

HEAVY = {"sklearn", "pandas", "fastapi", "datasets"}
LOADED = f"; print(*sorted({HEAVY} & set(sys.modules)))"
PARTS = """
import ast, importlib.util, json, sys
import ppdiffusers_train, paddlenlp
with open(paddlenlp.__file__) as file:
    imports = [found for found in ast.parse(file.read()).body if isinstance(found, ast.ImportFrom) and found.level]
names = [alias.name for found in imports for alias in found.names] + [found.module for found in imports if found.module]
kinds = {name: type(getattr(paddlenlp, name)).__name__ for name in names}
print([paddlenlp.__version__, kinds, hasattr(paddlenlp, "no_such_part")])
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1], done.stderr


def test_ppdiffusers_comes_without_the_heavy_packages_that_paddlenlp_would_load():
    assert run("import sys, ppdiffusers_train, ppdiffusers" + LOADED)[0] == ""


def test_paddlenlp_would_load_them_by_itself():
    """When this fails, PaddleNLP has become light itself, and `light_paddlenlp.py` can go."""
    assert run("import sys, paddlenlp" + LOADED)[0].split() == sorted(HEAVY)


def test_all_that_paddlenlp_offers_is_there_for_who_asks():
    version, kinds, has_what_is_not_there = ast.literal_eval(run(PARTS)[0])
    assert version.startswith("2.8.1")
    assert kinds.pop("Taskflow") == "type" and kinds.pop("SimpleServer") in ("type", "ABCMeta", "ModelMetaclass")
    assert {"data", "trainer", "taskflow", "server"} <= set(kinds) and set(kinds.values()) == {"module"}
    assert not has_what_is_not_there


@pytest.mark.parametrize("source", ["from .part import *\n", "from light_package.part import name\n"])
def test_a_package_that_is_written_in_another_way_is_loaded_as_it_comes(source, tmp_path, monkeypatch):
    package = tmp_path / "light_package"
    package.mkdir()
    (package / "part.py").write_text("name = 3\n")
    (package / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(light_paddlenlp, "PACKAGE", "light_package")
    found = light_paddlenlp.LightPackageFinder().find_spec("light_package")
    assert isinstance(found.loader, light_paddlenlp.LightPackage)
    module = module_from_spec(found)
    monkeypatch.setitem(sys.modules, "light_package", module)
    found.loader.exec_module(module)
    assert module.name == 3 and not hasattr(module, "__getattr__")
    monkeypatch.delitem(sys.modules, "light_package.part")


def test_paddlenlp_does_not_complain_that_datasets_came_first():
    assert "datasets" not in run("import ppdiffusers_train, datasets, paddlenlp; print(0)")[1]
