"""What is said of an error."""

import errno
import os
import shutil
import sys

import pytest

from ppdiffusers_train.errors import WAYS_OUT, WriteError, hide_tokens, one_line_errors, writing

pytestmark = pytest.mark.once  # Paddle has no part in it


@pytest.mark.parametrize("words", [["--hub_token", "s3cret"], ["--hub_token=s3cret"]])
def test_no_token_is_said_wherever_it_comes_from(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.setenv("HF_TOKEN", "another")
    said = hide_tokens("401 for s3cret, another and hf_abcdefgh12; Authorization: Bearer abc.def")
    assert said == "401 for ***, *** and ***; Authorization: Bearer ***"


def test_an_unknown_error_keeps_its_traceback_and_loses_the_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cret")

    @one_line_errors
    def main(argv=None):
        raise ValueError("the server did not like s3cret", 3)

    with pytest.raises(ValueError) as raised:
        main()
    assert raised.value.args == ("the server did not like ***", 3) and raised.traceback[-1].name == "main"


def test_several_errors_of_a_copied_folder_are_one_reason_with_a_way_out(tmp_path):
    found = [(f"vae/{name}", f"out/{name}", f"[Errno 28] {os.strerror(errno.ENOSPC)}: '{name}'") for name in "ab"]
    with pytest.raises(WriteError) as raised, writing("the result", tmp_path):
        raise shutil.Error(found)
    assert str(raised.value) == (
        f"the result cannot be written to {str(tmp_path)!r}: {os.strerror(errno.ENOSPC)} ({WAYS_OUT[errno.ENOSPC]})"
    )
