"""What is said of an error."""

import sys

import pytest

from ppdiffusers_train.errors import hide_tokens, one_line_errors

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
