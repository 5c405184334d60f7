"""One of four ranks, two of which share an optimizer's state: each sums numbers with all and with either half. Then the
last one is killed while the others wait for it."""

import ppdiffusers_train  # noqa: F401

import os
import signal
import sys
import time
from pathlib import Path

import paddle
import paddle.distributed as dist
from paddle.distributed import fleet

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ppdiffusers_train.errors import one_line_errors  # noqa: E402
from ppdiffusers_train.runtime.distributed import start_ranks  # noqa: E402


@one_line_errors
def main(argv=None):
    ranks = start_ranks(sharding_degree=2)
    topology = fleet.get_hybrid_communicate_group()
    sums = []
    for group in (None, topology.get_sharding_parallel_group(), topology.get_data_parallel_group()):
        number = paddle.full([1], 10.0**ranks.rank)
        dist.all_reduce(number, group=group)
        sums.append(int(number))
    told = ranks.gather_objects(sums)
    if ranks.is_main:
        print(f"sums: {told}", flush=True)
        print(f"killed at: {time.time()}", flush=True)
    if ranks.rank == 3:
        time.sleep(2)  # the launcher reads rank 0's log once a second
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.gather_objects(None)


if __name__ == "__main__":
    main()
