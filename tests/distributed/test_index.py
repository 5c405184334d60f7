"""Several ranks look at the images of a data set."""

import json
import shutil
import time

import pytest

from ppdiffusers_train.data.inspection import TICK_SECONDS
from tests.conftest import copy_photos
from tests.distributed import index_worker
from tests.distributed.kill_harness import start
from tests.distributed.test_waiting import wait_for

pytestmark = pytest.mark.once  # next to no Paddle in it
COPIES = 8  # of each of ten photographs


def photographs(folder):
    """80 images of small files."""
    copy_photos(folder, 10)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    for copy in range(1, COPIES):
        for line in lines[:10]:
            name = json.loads(line)["file_name"]
            content = (folder / name).read_bytes()
            (folder / f"{copy}-{name}").write_bytes(content + bytes([copy]))
            lines.append(line.replace(name, f"{copy}-{name}"))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    time.sleep(2 * TICK_SECONDS)  # a file that was written a moment ago would be looked at again
    return folder


def look(tmp_path, *folders, ranks):
    results = tmp_path / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir()
    log = tmp_path / "log"
    log.touch()
    processes = start(index_worker, [*folders, tmp_path / "index", results], ranks, log)
    assert [wait_for(process) for process in processes] == [0] * ranks, log.read_text()
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(ranks)]


def test_four_ranks_open_each_image_once_among_them_and_know_the_same(tmp_path):
    folder = photographs(tmp_path / "data")
    first = look(tmp_path, folder, ranks=4)
    count = len(first[0]["sizes"])
    assert count == 80 and sum(found["opened"] for found in first) == count
    assert max(found["opened"] for found in first) <= 0.5 * count, "also on a busy machine nobody does it alone"
    assert len({(found["digest"], str(found["sizes"])) for found in first}) == 1
    second = look(tmp_path, folder, ranks=4)
    assert [found["opened"] for found in second] == [0] * 4 and second[0]["digest"] == first[0]["digest"]


def test_ranks_with_their_own_copies_look_at_these(tmp_path):
    one = photographs(tmp_path / "one")
    other = shutil.copytree(one, tmp_path / "other")
    file = other / "astronaut.jpg"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    found = look(tmp_path, one, other, ranks=2)
    assert [each["opened"] for each in found] == [80, 80] and found[0]["digest"] != found[1]["digest"]
