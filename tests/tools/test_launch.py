"""What `ppdiffusers-train launch` makes of its words, and what is said of ranks that have ended."""

import ppdiffusers_train  # noqa: F401

import argparse
import sys

import pytest

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.launcher.tokens import secrets_in
from ppdiffusers_train.launcher.watched_ranks import final_message
from ppdiffusers_train.tools.launch import output_folder, place_of_script

KILLED, STOPPED, FAILED = 9, 15, 2 << 8  # wait statuses


def test_the_script_is_found_where_the_launcher_finds_it(monkeypatch):
    from paddle.distributed.launch.context import args_envs

    parsers = []

    class Recorded(argparse.ArgumentParser):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            parsers.append(self)

    words = ["--gpus", "0,1", "--nproc_per_node=2", "train.py", "--gpus", "x"]
    monkeypatch.setattr(args_envs, "ArgumentParser", Recorded)
    monkeypatch.setattr(sys, "argv", ["launch", *words])
    found = args_envs.parse_args()[0]
    assert words[place_of_script(words) :] == [found.training_script, *found.training_script_args]
    flags = [action for action in parsers[0]._actions if action.option_strings and action.dest != "help"]
    assert len(flags) > 20 and all(action.nargs is None for action in flags), "each has one value"
    with pytest.raises(UserError, match="no script"):
        place_of_script(words[:3])


def test_logs_go_where_the_run_goes(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("output_dir: from-file\n")
    assert str(output_folder(["--seed", "1", "--output_dir", "here"])) == "here"
    assert str(output_folder([f"--config={config}", "--output_dir=here"])) == "here"
    assert str(output_folder(["--config", str(config)])) == "from-file"
    assert str(output_folder(["--config", str(tmp_path / "none.yaml")])) == "."


def test_secrets_are_known_by_their_names():
    secret = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AISTUDIO_ACCESS_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"]
    secret += ["AWS_ACCESS_KEY_ID", "PGPASSWORD", "OPENAI_APIKEY", "db_passwd", "S3_CREDENTIALS", "TOKEN_2"]
    public = ["TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "KEYBOARD", "PATH", "PADDLE_TRAINER_ID"]
    assert list(secrets_in(dict.fromkeys([*public, *secret], "x"))) == secret


@pytest.mark.parametrize(
    "ends, message, memory_ran_out, expected",
    [
        ([(0, 0), (1, 0)], "", False, ""),
        ([(1, FAILED), (0, STOPPED)], "why", False, "why"),
        ([(1, FAILED), (0, KILLED)], "why", False, "why"),
        (
            [(1, KILLED), (0, FAILED)],
            "another rank has ended",
            False,
            "rank 1 was killed by SIGKILL (9); if not by a user",
        ),
        ([(1, KILLED), (0, STOPPED)], "", True, "rank 1 was killed by SIGKILL (9): the machine ran out of memory"),
        ([(1, 11), (0, STOPPED)], "", False, "rank 1 was killed by SIGSEGV (11)"),
        ([(0, KILLED), (1, KILLED)], "", False, "rank 0 was killed by SIGKILL (9), as were all on this host"),
        ([(1, None), (0, FAILED)], "why", False, "why"),
        ([(0, STOPPED), (1, STOPPED)], "", False, ""),
    ],
)
def test_the_final_message_is_of_the_rank_that_ended_first(ends, message, memory_ran_out, expected):
    said = final_message(ends, message, memory_ran_out)
    assert said.startswith(expected) and bool(said) == bool(expected)
