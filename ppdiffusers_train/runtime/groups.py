"""The groups of ranks that collectives run in: all ranks and, with a sharded optimizer, those that share one state."""

import contextlib
import functools
import os
import socket

import paddle
import paddle.distributed as dist
from paddle.base import core
from paddle.distributed import collective, fleet

from ppdiffusers_train.errors import UserError


@functools.cache
def connect_ranks() -> None:
    """Make the group of all ranks, once in a process."""
    # The store's newer server (Paddle 3) aborts rank 0, often after its last word, when another rank's connection
    # is reset; Paddle 2.6 has the older one only, and not the flag.
    with contextlib.suppress(ValueError):
        paddle.set_flags({"FLAGS_tcp_store_using_libuv": False})
    dist.init_parallel_env()


def check_sharding_degree(sharding_degree: int) -> None:
    """Raise a `UserError` unless the optimizer's state can be split over so many of the processes."""
    if dist.get_world_size() % sharding_degree:
        raise UserError(
            f"--sharding_degree: {sharding_degree} does not divide the number of processes, which is "
            f"{dist.get_world_size()}"
        )


@functools.cache
def make_sharding_groups(world_size: int, sharding_degree: int) -> None:
    """Make fleet's groups, once in a process: `DygraphShardingOptimizer` asks for them, and nothing else needs them."""
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {
        "dp_degree": world_size // sharding_degree,
        "mp_degree": 1,
        "pp_degree": 1,
        "sharding_degree": sharding_degree,
    }
    with stores_for_gloo():
        fleet.init(is_collective=True, strategy=strategy)


@contextlib.contextmanager
def stores_for_gloo():
    """Within, each new group over gloo has a store of its own.

    In one store, Paddle's gloo groups write their addresses under the same keys: a member that is faster than another
    reads where that one listened for the group before, and is refused, or waits for ever. Members of two groups that
    are made at the same time read each other's.
    """
    new_group = collective._new_process_group_impl

    def with_own_store(backend, store, rank, world_size, name, *rest, **options):
        if backend == "gloo":
            store = _new_store(store, name, rank)
        return new_group(backend, store, rank, world_size, name, *rest, **options)

    collective._new_process_group_impl = with_own_store
    try:
        yield
    finally:
        collective._new_process_group_impl = new_group


def _new_store(shared, name: str, rank: int):
    """A store for the members of a group; its first serves it, and says where in the store that all ranks share."""
    key, nobody_to_wait_for = f"store of {name}", 0
    if rank == 0:
        host = os.environ["PADDLE_CURRENT_ENDPOINT"].rpartition(":")[0]
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        store = core.TCPStore(host, port, True, nobody_to_wait_for)
        shared.set(key, f"{host}:{port}")
        return store
    host, _, port = shared.get(key).decode().rpartition(":")
    return core.TCPStore(host, int(port), False, nobody_to_wait_for)
