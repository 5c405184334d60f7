import ppdiffusers_train  # noqa: F401
from ppdiffusers_train import cli

import argparse
import importlib
import pkgutil
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from ppdiffusers_train.arguments import add_data_arguments
from ppdiffusers_train.data.dataset import build_dataset, index_folder
from ppdiffusers_train.data.image_index import index_images
from ppdiffusers_train.errors import BadSampleError, UserError
from ppdiffusers_train.runtime.distributed import Ranks
from ppdiffusers_train.training import index_dataset
from tests.data import corpus

pytestmark = pytest.mark.once  # no Paddle in it

for module in pkgutil.iter_modules(corpus.__path__):
    importlib.import_module(f"{corpus.__name__}.{module.name}")


def open_data(flags, may_have_bad_samples=False):
    """The data as a run has it before its first step."""
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    args = parser.parse_args(list(map(str, flags)))
    args.seed, args.dry_run = 0, False
    rows = build_dataset(args)
    if may_have_bad_samples:
        index_images(rows, Ranks(0, 1), index_folder(args))
        print(rows.summary())
    else:
        index_dataset(rows, SimpleNamespace(args=args, ranks=Ranks(0, 1), log=print, saved={}))
    return rows


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
            open_data([*expected.flags, *places], may_have_bad_samples=False)
        message = str(refused.value)
        assert "\n" not in message and all(part in message for part in expected.refused), message
    else:
        bad = any(isinstance(sample, str) for sample in expected.samples)
        rows = open_data([*expected.flags, *places], may_have_bad_samples=bad)
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
