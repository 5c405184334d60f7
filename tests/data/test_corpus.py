import ppdiffusers_train  # noqa: F401
from ppdiffusers_train import cli

import argparse
import importlib
import pkgutil
import shutil

import numpy as np
import pytest

from ppdiffusers_train.arguments import add_data_arguments
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.errors import BadSampleError, UserError
from tests.data import corpus

pytestmark = pytest.mark.once  # no Paddle in it

for module in pkgutil.iter_modules(corpus.__path__):
    importlib.import_module(f"{corpus.__name__}.{module.name}")


def open_data(flags):
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    args = parser.parse_args(list(map(str, flags)))
    args.seed = 0
    return build_dataset(args)


def status_of(*argv):
    try:
        cli.main(list(map(str, argv)))
    except SystemExit as end:
        return end.code or 0
    return 0


def read(rows, index):
    """A sample, or the message why there is none."""
    try:
        return rows[index]
    except BadSampleError as error:
        return str(error)


def compare(row, sample, tolerance):
    if isinstance(sample, str):
        assert isinstance(row, str) and sample in row
        assert "\n" not in row
        return
    assert not isinstance(row, str), row
    pixels, captions = sample
    assert row["caption"] == captions
    if pixels is not None:
        seen = np.asarray(row["image"])
        assert seen.shape == pixels.shape and np.abs(seen.astype(int) - pixels).max() <= tolerance


@pytest.mark.parametrize("name", sorted(corpus.CASES))
def test_training_sees_what_it_must_or_refuses_it_in_one_line_and_check_agrees(name, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    expected = corpus.CASES[name](tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    places = ["--cache_dir", tmp_path / "cache"]
    if expected.samples is None:
        with pytest.raises(UserError) as refused:
            open_data([*expected.flags, *places])
        message = str(refused.value)
        assert "\n" not in message and all(part in message for part in expected.refused), message
    else:
        rows = open_data([*expected.flags, *places])
        rows_read = [read(rows, index) for index in range(len(rows))]
        assert len(rows_read) == len(expected.samples), [
            row if isinstance(row, str) else row["name"] for row in rows_read
        ]
        for row, sample in zip(rows_read, expected.samples):
            compare(row, sample, expected.tolerance)
        for index, row in enumerate(rows_read):
            if not isinstance(row, str):
                assert rows.image_size(index) == row["image"].size
    printed = "".join(capsys.readouterr())
    assert all(part in printed for part in expected.printed), printed
    flags = ["--processes=1", "--resolution=1", *expected.check_flags, *places]
    status = status_of("check", expected.flags[1], *flags)
    printed = "".join(capsys.readouterr())
    assert "Traceback" not in printed and status == expected.status, printed
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written beside the data
