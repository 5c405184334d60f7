"""What one of two ranks does, of which one takes long, hangs or ends: `main([scenario, timeout, folder])`."""

import ppdiffusers_train  # noqa: F401

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
from paddle.base import core

from ppdiffusers_train.errors import BadSampleError, one_line_errors
from ppdiffusers_train.loop.bad_samples import BadSamples
from ppdiffusers_train.loop.filling import encode_dataset
from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.run import Run
from ppdiffusers_train.module import DiffusionTrainingModule
from ppdiffusers_train.runtime.distributed import start_ranks
from ppdiffusers_train.runtime.precision import Precision
from ppdiffusers_train.runtime.waiting import add

LONGER = 3  # times the timeout is what a rank works
SLOWER = 8  # times is how long rank 1 takes to encode a sample


def compute(seconds):
    """Spend a twelfth of the time on a processor, as one of many that share it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.process_time()
        while time.process_time() - began < 0.05:
            pass
        time.sleep(0.55)


def write(seconds, file):
    """Write as to a slow disk, with next to no work for a processor."""
    end = time.monotonic() + seconds
    with open(file, "wb", buffering=0) as opened:
        while time.monotonic() < end:
            opened.write(bytes(16384))
            time.sleep(0.6)


def work_long(ranks, folder):
    """Before a collective a rank writes, and in its turn rank 0 computes, longer than the timeout."""
    if ranks.rank == 1:
        write(LONGER * ranks.timeout, folder / "slow disk")
    assert ranks.gather_objects(ranks.rank) == [0, 1]
    with ranks.only_main("a slow rank 0") as is_turn:
        if is_turn:
            compute(LONGER * ranks.timeout)
    for _ in range(3):
        assert ranks.total(ones=1, ranks=ranks.rank) == [2, 1]
    ranks.gather_objects(None)


def hang_on_one(ranks, folder):
    if ranks.rank == 1:
        time.sleep(1000)
    ranks.gather_objects(None, "a share of something")


def sleep_beyond_gloo(ranks, folder):
    """Longer than gloo waits for another rank."""
    if ranks.rank == 1:
        time.sleep(31)
    assert float(ranks.sum(paddle.ones([]))) == 2


def ask_beside_paddle(ranks, folder):
    """Paddle waits in the store for what the other rank writes, as where a collective begins for the first time."""
    store = core.create_or_get_global_tcp_store()
    if ranks.is_main:
        time.sleep(2)
        store.set("address", "here")
    else:
        with ThreadPoolExecutor(1) as paddle_thread:
            address = paddle_thread.submit(store.get, "address")
            assert [add("questions", 1) for _ in range(50)] == list(range(1, 51))
            assert address.result(20) == b"here"
    ranks.gather_objects(None)


def stop_zero(ranks, folder):
    """Stopped from outside, with the store that it keeps."""
    if ranks.is_main:
        os.kill(os.getpid(), signal.SIGSTOP)
    with ranks.only_main("a checkpoint"):
        pass


def kill_zero(ranks, folder):
    with ranks.only_main("a checkpoint") as is_turn:
        if is_turn:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)


def kill_one(ranks, folder):
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.sum(paddle.ones([]))


def fail_on_zero(ranks, folder):
    try:
        with ranks.only_main("a checkpoint") as is_turn:
            if is_turn:
                raise OSError("no disk")
    finally:
        time.sleep(1)  # or its store is gone before the other one has asked


class Numbers:
    """Rows whose image is their number; the fourth cannot be used."""

    captions = staticmethod(lambda row: ["a", "b"])
    image_digest = staticmethod(lambda row: bytes([row]))

    def __len__(self):
        return 20

    def count_captions(self):
        return 40

    def __getitem__(self, row):
        if row == 3:
            raise BadSampleError("row 3 is spoiled")
        return {"image": row, "caption": ["a", "b"]}


class Encoding(DiffusionTrainingModule):
    encoders = ("encoder",)

    def __init__(self, rank):
        super().__init__()
        self.encoder, self.rank, self.encoded = paddle.nn.Linear(1, 1, paddle.nn.initializer.Constant(3.0)), rank, 0

    def preprocess(self, row, draws):
        return {"x": np.float32([row["image"] + len(row["caption"])])}

    def encode(self, batch):
        time.sleep(0.05 * (SLOWER if self.rank else 1))
        self.encoded += 1
        return {"x": self.encoder(batch["x"])}


def fill(ranks, folder):
    module, bad = Encoding(ranks.rank), BadSamples(1)
    args = SimpleNamespace(
        output_dir=folder, encoded_cache_dir=str(folder / "cache"), index_dir=str(folder / "index"), cache_variants=1,
        dataloader_num_workers=1,
    )  # fmt: skip
    plan = Plan(Run(args, ranks, None, {}, "run", []), module, Numbers(), None, 1, 1, {})
    encode_dataset(plan, SimpleNamespace(precision=Precision("no"), bad_samples=bad))
    told = {"encoded": module.encoded, "bad": sorted(bad.rows)}
    (folder / f"rank {ranks.rank} of {ranks.world_size}").write_text(json.dumps(told))
    ranks.gather_objects(None)


@one_line_errors
def main(argv):
    name, timeout, folder = argv
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # not those of who has forked this process
    ranks = start_ranks(1, float(timeout))
    began = time.monotonic()
    try:
        globals()[name](ranks, Path(folder))
    finally:
        print(f"rank {ranks.rank}: after {time.monotonic() - began:.1f} s", flush=True)
