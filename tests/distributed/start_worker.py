"""One of four ranks, two of which share an optimizer's state: each sums numbers with all and with either half."""

import ppdiffusers_train  # noqa: F401

import sys
from pathlib import Path

import paddle
import paddle.distributed as dist
from paddle.distributed import fleet

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ppdiffusers_train.runtime.distributed import start_ranks  # noqa: E402

ranks = start_ranks(sharding_degree=2)
topology = fleet.get_hybrid_communicate_group()
sums = []
for group in (None, topology.get_sharding_parallel_group(), topology.get_data_parallel_group()):
    number = paddle.full([1], 10.0**ranks.rank)
    dist.all_reduce(number, group=group)
    sums.append(int(number))
told = ranks.gather(sums)
if ranks.is_main:
    print(f"sums: {told}", flush=True)
ranks.gather(None)  # rank 0 serves the store
