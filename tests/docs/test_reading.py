"""Every page is read from top to bottom, and everything done that it says."""

import ppdiffusers_train  # noqa: F401  (before paddle)

import pytest

from tests.docs.pages import executable_pages
from tests.docs.reader import Reader, generate_small_images, published

pytestmark = pytest.mark.once  # what it runs has tests of its own


@pytest.mark.parametrize("page", executable_pages())
def test_a_reader_can_type_all_of_it_in_this_order(page, kandinsky, sdxl, sd3, sd, qwen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generate_small_images(monkeypatch)
    Reader(page, tmp_path, published(kandinsky, sdxl, sd3, sd, qwen)).read()
