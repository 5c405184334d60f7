"""Packs of encoded samples: what is written is read, whoever writes, and whatever ends a writer."""

import ppdiffusers_train  # noqa: F401

import os
import re
import resource
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pytest

from ppdiffusers_train.data import pack_writer, packs
from ppdiffusers_train.data.arrow_files import remove_leftovers
from ppdiffusers_train.data.pack_writer import PackWriter, merge_small, rewrite
from ppdiffusers_train.data.packs import Packs, as_keys, open_packs
from ppdiffusers_train.errors import RunError
from ppdiffusers_train.runtime.processes import this_machine

pytestmark = pytest.mark.once  # no Paddle in it


def key(number):
    """Some end in zeros, which NumPy cuts off."""
    return number.to_bytes(8, "big") + number.to_bytes(2, "little").ljust(8, b"\0")


def sample(number):
    return {
        "latents": np.full([4, 3, 2], number, "float32"),
        "caption": np.full([5], number // 10, "uint16"),
        "ids": np.int64(number),
    }


def write(folder, numbers):
    with PackWriter(folder) as writer:
        for number in numbers:
            writer.add(key(number), sample(number))
    return writer.written


def assert_holds(folder, numbers):
    found = Packs(folder, log=print)
    for number in numbers:
        arrays = found.read(key(number))
        for name, array in sample(number).items():
            assert arrays[name].dtype == array.dtype and arrays[name].shape == array.shape
            assert np.array_equal(arrays[name], array), name
    assert found.find(as_keys(map(key, numbers))).all()
    assert not found.find(as_keys([key(60_000)])).any()
    with pytest.raises(KeyError):
        found.read(key(60_000))


def test_what_is_written_is_read_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_writer, "PACK_SAMPLES", 100)
    assert len(write(tmp_path / "a", range(256))) == 3
    assert_holds(tmp_path / "a", np.random.default_rng(0).permutation(256).tolist())
    assert not Packs(tmp_path / "none").find(as_keys([key(0)])).any()


def test_a_pack_is_complete_after_some_bytes_or_some_time_too(tmp_path, monkeypatch):
    for name, value in (("PACK_BYTES", 1000), ("PACK_SECONDS", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(pack_writer, name, value)
            assert len(write(tmp_path / name, range(20))) == (2 if name == "PACK_BYTES" else 20)


def test_equal_values_are_stored_once(tmp_path):
    value = np.random.default_rng(0).standard_normal([10_000])
    with PackWriter(tmp_path) as writer:
        for number in range(50):
            writer.add(key(number), {"caption": value, "crop": np.float32(number)})
    (file,) = tmp_path.glob("*.pack")
    assert value.nbytes < file.stat().st_size < 1.5 * value.nbytes
    assert np.array_equal(Packs(tmp_path).read(key(49))["caption"], value)


def test_a_sample_is_one_read_and_one_more_for_what_it_shares(tmp_path, monkeypatch):
    """A read is a round trip to the server of a network disk."""
    with PackWriter(tmp_path) as writer:
        for number in range(3):
            writer.add(key(number), {**sample(number), "latents": np.full([4], number)})
    found, reads, read = Packs(tmp_path), [], packs.OpenFile.read
    monkeypatch.setattr(packs.OpenFile, "read", lambda file, *place: reads.append(place) or read(file, *place))
    for number, expected in enumerate((1, 2, 2)):
        reads.clear()
        assert found.read(key(number))["ids"] == number and len(reads) == expected


def test_a_pack_is_a_file_that_arrow_reads(tmp_path):
    (name,) = write(tmp_path, range(3))
    with pyarrow.ipc.open_file(tmp_path / name) as file:
        values = [file.get_batch(number).column(0).to_pylist() for number in range(file.num_record_batches - 1)]
    first, more = (sample(number) for number in (0, 1))
    named = [first[part].tobytes() for part in ("caption", "ids", "latents")]
    assert values[:2] == [named, [more[part].tobytes() for part in ("ids", "latents")]]


def test_samples_of_several_shapes_share_a_pack(tmp_path):
    shapes = [[2, 3], [3, 2], [], [0, 2]]
    with PackWriter(tmp_path) as writer:
        for number, shape in enumerate(shapes):
            writer.add(key(number), {"x": np.ones(shape, "float16"), **({"y": np.int8(1)} if number else {})})
    found = Packs(tmp_path)
    assert [list(found.read(key(number))["x"].shape) for number in range(len(shapes))] == shapes
    assert [len(found.read(key(number))) for number in range(len(shapes))] == [1, 2, 2, 2]


def in_child(work):
    """The status of a forked process that runs `work()`."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_several_processes_write_into_one_folder(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        shares = [range(0, 60), range(40, 100), range(90, 120)]
        assert list(pool.map(lambda share: in_child(lambda: write(tmp_path, share)), shares)) == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 3
    assert_holds(tmp_path, range(120))


def test_a_kill_loses_the_pack_that_was_being_written_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_writer, "PACK_SAMPLES", 10)

    def be_killed():
        writer = PackWriter(tmp_path).__enter__()
        for number in range(25):
            writer.add(key(number), sample(number))
        writer._thread.submit(os.kill, os.getpid(), signal.SIGKILL).result()

    assert in_child(be_killed) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3 and len(Packs(tmp_path)) == 20
    assert_holds(tmp_path, range(20))
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_named_and_leaves_complete_packs(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(pack_writer, "PACK_SAMPLES", 10)

    def write_with_little_space():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with PackWriter(tmp_path) as writer:
            for number in range(10):
                writer.add(key(number), sample(number))
            for number in range(10, 1000):
                writer.add(key(number), {"x": np.random.default_rng(number).standard_normal(1000)})

    def report():
        try:
            write_with_little_space()
        except RunError as error:
            print(error, flush=True)

    assert in_child(report) == 0
    assert capfd.readouterr().out.startswith(
        f"--encoded_cache_dir: encoded samples cannot be written to {str(tmp_path)!r}: File too large"
    )
    assert len(list(tmp_path.iterdir())) == 1, "nothing unfinished is left"
    assert_holds(tmp_path, range(10))


def test_an_error_of_the_caller_completes_the_last_pack(tmp_path):
    with pytest.raises(ZeroDivisionError), PackWriter(tmp_path) as writer:
        writer.add(key(1), sample(1))
        raise ZeroDivisionError
    assert_holds(tmp_path, [1])


UNREADABLE = "{}: a sample in it cannot be read (.*); delete the file, and its samples are encoded again"


def test_a_pack_that_becomes_shorter_while_it_is_read_is_named(tmp_path):
    write(tmp_path, range(20))
    found, (file,) = Packs(tmp_path), tmp_path.glob("*.pack")
    found.read(key(0))
    os.truncate(file, 50)
    with pytest.raises(OSError, match=UNREADABLE.format(file)):
        found.read(key(19))


def test_whichever_byte_is_damaged_no_sample_is_read_wrong(tmp_path):
    """The pack is refused as a whole, a sample is named, or the byte is of none."""
    write(tmp_path, range(3))
    (file,), refused, named = tmp_path.glob("*.pack"), 0, 0
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        packs.open_file.cache_clear()
        lines = []
        found = Packs(tmp_path, log=lines.append)
        refused += len(lines)
        for number in range(3 if len(found) else 0):
            try:
                arrays = found.read(key(number))
            except OSError as error:
                assert re.fullmatch(UNREADABLE.format(file), str(error), re.S)
                named += 1
            else:
                assert all(arrays[name].tobytes() == array.tobytes() for name, array in sample(number).items()), place
    assert refused > len(whole) / 9 and named > 50, (refused, named, len(whole))


def test_small_packs_are_put_together_where_there_are_many_while_others_read(tmp_path):
    for number in range(pack_writer.MANY_SMALL):
        write(tmp_path, range(number, number + 3))
    reader = Packs(tmp_path)
    merge_small(tmp_path)
    assert len(list(tmp_path.iterdir())) == pack_writer.MANY_SMALL, "not that many"
    write(tmp_path, [500])
    merge_small(tmp_path)
    (merged,), _ = open_packs(tmp_path)
    assert len(merged) == pack_writer.MANY_SMALL + 2 + 1, "each sample once"
    assert_holds(tmp_path, [*range(pack_writer.MANY_SMALL + 2), 500])
    packs.open_file.cache_clear()
    assert reader.read(key(3))["ids"] == 3, "found again"


def test_rewriting_leaves_out_what_is_not_wanted(tmp_path):
    write(tmp_path, range(20))
    rewrite(tmp_path, open_packs(tmp_path)[0], lambda keys: np.isin(keys, as_keys(map(key, range(5)))))
    assert len(Packs(tmp_path)) == 5
    assert_holds(tmp_path, range(5))


def test_packs_that_cannot_be_read_are_kept_when_others_are_put_together(tmp_path):
    write(tmp_path, range(20))
    opened, (file,) = open_packs(tmp_path)[0], tmp_path.glob("*.pack")
    os.truncate(file, 50)
    with pytest.raises(OSError):
        rewrite(tmp_path, opened, lambda keys: np.ones(len(keys), bool))
    assert file.exists()


def test_unfinished_packs_go_when_their_writers_have_ended(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    here, name = f"{this_machine():x}", write(tmp_path, [1])[0]
    names = {
        f".ab.{here}.{ended.pid}": False,
        f".ab.{here}.{os.getpid()}": True,
        f".ab.{here}0.{ended.pid}": True,  # of another machine
        f".ab.{here}1.{ended.pid}": False,  # likewise, two days ago
    }
    for unfinished in names:
        (tmp_path / unfinished).write_bytes(b"half")
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / list(names)[-1], (long_ago, long_ago))
    remove_leftovers(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {name, *(name for name, is_kept in names.items() if is_kept)}


def test_the_description_says_what_a_pack_holds(tmp_path):
    """The layout of the file is what older packs have, too: a change needs another `encoders_key.FORMAT`."""
    write(tmp_path / "of", range(2))
    (pack,), _ = open_packs(tmp_path / "of")
    forms = [[["caption", "<u2", [5]], ["ids", "<i8", []], ["latents", "<f4", [4, 3, 2]]]]
    assert pack.description == {"of": "of", "forms": forms}
    names = {"key": "fixed_size_binary[16]", "form": "int32", "check": "uint32", "places": "list<item: int64>"}
    assert {part.name: str(part.type) for part in packs.index_schema({})} == names and len(packs.VALUES) == 1
