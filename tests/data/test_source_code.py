import importlib
import sys

import numpy as np
import pytest

from ppdiffusers_train.data import transforms
from ppdiffusers_train.data.source_code import code_of, text_of

pytestmark = pytest.mark.once  # no Paddle in it

HELPERS = """
import numpy as np
MARGIN, MEANS, OTHER = 3, np.float32([0.5, 0.25]), 1
NAMES = {"a", "b", "c", "d", "e", "f", "g"}

class Padding:
    width = 2

    def apply(self, image):
        return image * self.width

def shrink(image):
    assert NAMES
    return Padding().apply(image[MARGIN : half(len(image))] - MEANS)

def half(number):
    return number // 2

def unused(image):
    return image
"""
SCRIPT = """
import helpers
from helpers import shrink
from ppdiffusers_train.data.transforms import normalize_pixels

class Base:
    def preprocess(self, row, draws):
        return self.prepared(row)

    def prepared(self, row):
        return row

    def forward(self, encoded, draws):
        return 0

class Job(Base):
    def preprocess(self, row, draws):
        return [normalize_pixels(part) for part in super().preprocess(shrink(row), draws)[: self.size]]

    @property
    def size(self):
        return 7

    @staticmethod
    def encode(batch):
        return (lambda: helpers.half(batch))()
"""


@pytest.fixture
def sources_of(tmp_path, monkeypatch):
    """`sources_of(old=new)` is the source of the job above in which `old` was edited."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would be taken for that of a file written just after

    def find(old="", new=""):
        for name, text in (("helpers", HELPERS), ("job", SCRIPT)):
            (tmp_path / f"{name}.py").write_text(text.replace(old, new) if old else text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        importlib.import_module("linecache").clearcache()
        return code_of(importlib.import_module("job").Job, ("preprocess", "encode"))

    yield find
    for name in ("helpers", "job"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "old, new",
    [
        ("number // 2", "number // 3"),  # called by a function that is called
        ("image[MARGIN", "image[1 + MARGIN"),
        ("MEANS, OTHER = 3", "MEANS, OTHER = 4"),  # numbers and arrays of the file
        ("0.25", "0.75"),
        ('"g"', '"h"'),
        ("image * self", "image + self"),  # a method of a class that is used
        ("return self.prepared(row)", "return self.prepared(2 * row)"),  # overridden, and called by `super`
        ("        return row\n", "        return 2 * row\n"),
        ("return 7", "return 6"),
        ("helpers.half(batch)", "helpers.half(2 * batch)"),
    ],
)
def test_an_edit_of_whatever_is_called_is_noticed(sources_of, old, new):
    assert sources_of() != sources_of(old, new)


@pytest.mark.parametrize(
    "old, new", [("return image\n", "return 2 * image\n"), ("return 0", "return 1"), ("0.25]), 1", "0.25]), 2")]
)
def test_an_edit_of_what_is_not_called_is_not(sources_of, old, new):
    assert sources_of() == sources_of(old, new)


def test_files_of_the_library_count_by_their_version_and_other_libraries_do_not(sources_of, monkeypatch):
    before = sources_of()
    (versioned,) = (text for text in before if text.startswith("data/transforms.py "))
    assert all("class" in text or "def " in text for text in before if text != versioned)
    monkeypatch.setattr(transforms, "VERSION", transforms.VERSION + 1)
    assert len(set(before) ^ set(sources_of())) == 2
    monkeypatch.delattr(transforms, "VERSION")
    assert any(text.startswith("def normalize_pixels") for text in sources_of()), "without a version, its source"


def test_the_text_of_a_value_is_the_same_in_every_process():
    """A set's order is not, and an object's address is no part of it."""
    assert text_of({"b": {"y", "x", 3}, "a": (1, 2.5, True)}) == "dict 'b', set 'x', 'y', 3, 'a', tuple 1, 2.5, True"
    assert text_of(np.float32([0.5, 1])) == "list 0.5, 1.0" and text_of(b"x") == "b'x'"
    assert text_of(object()) == text_of([1, object()]) == text_of(None) == ""
