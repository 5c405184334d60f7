"""Streams of tar shards: one order for any number of ranks, found again after a stop."""

import ppdiffusers_train  # noqa: F401

import http.server
import threading
from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppdiffusers_train.data import streams
from ppdiffusers_train.data.loader import PreprocessedSamples, iterate_batches
from ppdiffusers_train.data.order import SampleOrder, micro_batches
from ppdiffusers_train.data.streams import Stream
from ppdiffusers_train.errors import BadSampleError, RunError
from tests.data import corpus
from tests.data.make_shards import shards_of
from tests.data.test_corpus import compare

pytestmark = pytest.mark.once  # no Paddle in it

COUNTS = [5, 1, 7, 3, 4, 6, 2, 8, 5, 3, 9, 4]


@pytest.fixture
def folder(tmp_path):
    """Twelve shards of different sizes, `000.tar` to `011.tar`."""
    return shards_of(tmp_path / "shards", COUNTS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of four, so that few samples reach over many."""
    monkeypatch.setattr(streams, "BLOCK", 4)


def open_stream(folder, size=57, shards=range(12), seed=0, cache=None, command="cat"):
    addresses = [f"pipe:echo {n} >> {folder}/opened; {command} {folder}/{n:03d}.tar" for n in shards]
    return Stream(addresses, size, seed, "text", cache or folder / "cache")


def opened(folder):
    """The shards that were opened since the last time."""
    file = folder / "opened"
    found = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return [int(line) for line in found]


def captions(stream, positions):
    return [stream[position]["caption"] for position in positions]


def test_every_sample_comes_equally_often_and_each_epoch_in_another_order(folder):
    shards_of(folder, [6] * 8)
    stream = open_stream(folder, size=48, shards=range(8))
    seen = captions(stream, range(48 * 4))
    assert len(set(seen)) == 48 and set(Counter(seen).values()) <= {3, 4, 5}, "blocks reach over the ends of epochs"
    assert seen[:48] != seen[48:96]
    assert captions(open_stream(folder, size=48, shards=range(8), seed=1), range(48)) != seen[:48]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 8, 11]), st.integers(1, 5), st.integers(0, 2**30), st.integers(1, 12))
def test_ranks_get_the_samples_that_one_process_would(tmp_path_factory, ranks, batch, seed, shards):
    folder = shards_of(tmp_path_factory.mktemp("x"), COUNTS)
    alone = open_stream(folder, shards=range(shards), seed=seed)
    expected = captions(alone, range(120))
    order = SampleOrder(seed, 57, sequential=True)
    for rank in range(ranks):
        mine = open_stream(folder, shards=range(shards), seed=seed, cache=folder / "none")
        for window in order.windows(0, ranks * batch):
            for positions in micro_batches(window, rank, ranks, batch):
                assert captions(mine, positions) == [expected[position] for position in positions]
            if window.stop >= 100:
                break


def test_each_of_two_ranks_opens_half_of_the_shards(folder):
    shards_of(folder, [40] * 16)
    captions(open_stream(folder, size=600, shards=range(16)), range(0, 300, 2))
    even = opened(folder)
    captions(open_stream(folder, size=600, shards=range(16), cache=folder / "other"), range(1, 300, 2))
    odd = opened(folder)
    assert sorted(even + odd) == list(range(16)) or len(set(even) | set(odd)) == len(even + odd) <= 16


def test_a_resumed_stream_goes_on_where_it_stopped_and_opens_only_what_it_needs(folder):
    whole = captions(open_stream(folder), range(400))
    opened(folder)
    again = open_stream(folder)
    assert captions(again, range(300, 400)) == whole[300:]
    assert len(opened(folder)) < 60, "where the samples of the shards have been counted, they are passed over"
    unknown = open_stream(folder, cache=folder / "other")
    assert captions(unknown, range(300, 400)) == whole[300:]


def test_two_processes_write_down_counts_at_the_same_time(folder):
    streams = [open_stream(folder) for _ in range(2)]
    for position in range(100):
        captions(streams[position % 2], [position])
    fresh = open_stream(folder)
    assert fresh.counts.known.items() <= dict(enumerate(COUNTS)).items() and len(fresh.counts.known) > 6


@pytest.mark.parametrize("shards", [1, 3])
def test_fewer_shards_than_lanes_and_ranks_are_enough(folder, shards):
    seen = captions(open_stream(folder, shards=range(shards)), range(200))
    assert set(seen) == {f"{shard} {index}" for shard in range(shards) for index in range(COUNTS[shard])}


def test_loading_in_threads_changes_nothing(folder):
    order = SampleOrder(0, 57, sequential=True)

    def load(workers):
        samples = PreprocessedSamples(open_stream(folder), lambda row, draws: as_numbers(row), order)
        batches = [range(start, start + 6) for start in range(0, 120, 6)]
        return [batch["caption"].tolist() for batch, _ in iterate_batches(samples, batches, workers)]

    assert load(0) == load(4)


def as_numbers(row):
    return {"caption": np.array(list(map(int, row["caption"].split())))}


def test_a_connection_that_breaks_is_opened_again(folder, capfd):
    expected = captions(open_stream(folder), range(60))
    flaky = f"f() {{ test -e $1.tried && cat $1 || {{ touch $1.tried; head -c 3000 $1; exit 7; }}; }}; cd {folder}; f"
    stream = Stream([f"pipe:{flaky} {n:03d}.tar" for n in range(12)], 57, 0, "text", folder / "flaky")
    assert captions(stream, range(60)) == expected


def test_a_shard_that_cannot_be_read_is_named_with_what_its_command_said(folder):
    stream = Stream(
        [f"pipe:cat {folder}/000.tar; curl -H 'Authorization: Bearer abc123' 2>&-; exit 7"], 9, 0, "text", folder
    )
    with pytest.raises(RunError) as error:
        captions(stream, range(9))
    assert "could not be read in 3 attempts, the last time up to its sample 5: its command ended with status 7" in str(
        error.value
    )
    assert "abc123" not in str(error.value) and "Bearer ***" in str(error.value)


@pytest.mark.parametrize("name", sorted(name for name in corpus.CASES if name.startswith("tar_")))
def test_a_stream_sees_what_is_seen_of_the_same_shard_on_disk(tmp_path, name):
    expected = corpus.CASES[name](tmp_path)
    if expected.samples is None or name == "tar_is_compressed_under_another_name":  # both can be streamed
        return
    (path,) = tmp_path.rglob("*.tar")
    field = dict(zip(expected.flags, expected.flags[1:])).get("--caption_column", "text")
    samples = list(streams.read_shard(f"pipe:cat {path}", field))
    assert len(samples) == len(expected.samples)
    for sample, wanted in zip(samples, expected.samples):
        try:
            compare(Stream.decode(sample), wanted, expected.tolerance)
        except BadSampleError as error:
            compare(str(error), wanted, 0)


def test_shards_come_over_http(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            """Not to the test's output."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        stream = Stream([f"{address}/{n:03d}.tar" for n in range(12)], 57, 0, "text", folder / "http")
        assert captions(stream, range(60)) == captions(open_stream(folder), range(60))
        missing = Stream([f"{address}/100.tar"], 57, 0, "text", folder / "http")
        with pytest.raises(RunError, match=r"/100\.tar could not be read .* its command ended with status 22"):
            missing[0]
    finally:
        server.shutdown()
