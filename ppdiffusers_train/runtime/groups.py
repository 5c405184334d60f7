"""Process groups: all ranks and, with a sharded optimizer, the ranks that its state is sharded over."""

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
    """Create the group of all ranks, once per process."""
    # The store's newer server (Paddle 3) aborts rank 0, often at the end of a run, when another rank's connection is
    # reset. Paddle 2.6 has only the older server, and no flag.
    with contextlib.suppress(ValueError):
        paddle.set_flags({"FLAGS_tcp_store_using_libuv": False})
    dist.init_parallel_env()


def check_sharding_degree(sharding_degree: int) -> None:
    """Raise a `UserError` unless the number of processes is a multiple of the sharding degree."""
    if dist.get_world_size() % sharding_degree:
        raise UserError(
            f"--sharding_degree: {sharding_degree} does not divide the number of processes, which is "
            f"{dist.get_world_size()}"
        )


@functools.cache
def make_sharding_groups(world_size: int, sharding_degree: int) -> None:
    """Create fleet's groups, once per process, for `DygraphShardingOptimizer`."""
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
    """A context in which each new gloo group has its own store.

    In one store, Paddle's gloo groups write their addresses under the same keys: a fast member reads the address that
    another one had in the previous group, and is refused or waits forever. Members of two groups that are created at
    the same time read each other's addresses.
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
    """A store for the members of a group. The first member serves it, and writes its address to the shared store."""
    key, members_to_wait_for = f"store of {name}", 0
    if rank == 0:
        host = os.environ["PADDLE_CURRENT_ENDPOINT"].rpartition(":")[0]
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        store = core.TCPStore(host, port, True, members_to_wait_for)
        shared.set(key, f"{host}:{port}")
        return store
    host, _, port = shared.get(key).decode().rpartition(":")
    return core.TCPStore(host, int(port), False, members_to_wait_for)
