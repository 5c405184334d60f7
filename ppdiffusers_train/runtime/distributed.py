"""The ranks of a run: processes that `paddle.distributed.launch` started, one per card. One process alone needs no
collective, and Paddle has none to offer it, so each call asks first."""

import contextlib
import os
import secrets
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import paddle
import paddle.distributed as dist
from paddle.base import core
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer import DygraphShardingOptimizer

from ppdiffusers_train.errors import RunError, UserError
from ppdiffusers_train.runtime.groups import connect_ranks, make_sharding_groups
from ppdiffusers_train.runtime.signals import STOP_SIGNALS

POLL_SECONDS = 0.1  # between two questions whether rank 0 has written a checkpoint, which takes seconds
ASK_SECONDS = 0.0005  # between two questions whether the others have come to the end of a step


class Ranks:
    """This process among all: `rank` of `world_size`.

    Args:
        sharding_degree: over how many ranks the optimizer's state is split (ZeRO stage 1).
        timeout: seconds that a rank waits for the others in a collective before it gives up, and says where.
    """

    def __init__(self, rank: int, world_size: int, sharding_degree: int = 1, timeout: float = 1800):
        self.rank, self.world_size, self.sharding_degree = rank, world_size, sharding_degree
        self.timeout, self.step, self.turns = timeout, 0, 0
        self._rounds, self._totals = 0, ({}, {})  # of `total`: how many so far, and what its counters stand at
        self.name = ""  # the run's, among those of a process
        self._waiting = None  # (for what, since when), while in a collective
        if world_size > 1:
            # Paddle's store takes a call that a signal interrupts for a broken connection: none reaches this thread.
            self._undisturbed = ThreadPoolExecutor(1, "store", signal.pthread_sigmask, (signal.SIG_BLOCK, STOP_SIGNALS))
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def broadcast(self, parameters) -> None:
        """Give every rank the parameters of rank 0."""
        if self.world_size > 1:
            with self.waits_for("the first weights"):
                for parameter in parameters:
                    dist.broadcast(parameter, src=0)
                synchronize()

    def sum(self, values):
        """The sum of a tensor over all ranks."""
        if self.world_size > 1:
            with self.waits_for("a sum"):
                dist.all_reduce(values)
        return values

    def gather(self, value) -> list:
        """Every rank's picklable `value`, on every rank."""
        if self.world_size == 1:
            return [value]
        values = []
        with self.waits_for("messages"):
            dist.all_gather_object(values, value)
        return values

    def share(self, value):
        """Rank 0's picklable `value`, on every rank."""
        return self.gather(value)[0]

    def total(self, **counts: int) -> list:
        """The sum over all ranks of each of some small numbers, in their order.

        It goes by the store that the ranks met at, from host to host: nobody waits for a device. Every rank adds to
        counters that all can see, and looks until all ranks have. Two sets of counters take turns: who adds to one
        again has seen all ranks add to the other, so all had read this one by then.
        """
        if self.world_size == 1:
            return list(counts.values())
        seen, turn = self._totals[self._rounds % 2], self._rounds % 2
        self._rounds += 1
        names = {name: f"{self.name} total {turn} {name}" for name in [*counts, ""]}
        with self.waits_for("the others to come to the end of their backward passes"):
            for name, count in counts.items():
                if count:
                    self._count(names[name], int(count))
            self._count(names[""], 1)
            seen[""] = seen.get("", 0) + self.world_size
            while self._count(names[""], 0) < seen[""]:
                time.sleep(ASK_SECONDS)
            totals = []
            for name in counts:
                now = self._count(names[name], 0)
                totals.append(now - seen.get(name, 0))
                seen[name] = now
        return totals

    def broadcast_in_shard(self, tensor, parameter, owner: int):
        """A float32 tensor of the shape of `parameter` that one rank has of those that share an optimizer's state, on
        all of them.

        Args:
            tensor: on that rank; elsewhere None.
            owner: its number among them.
        """
        group = fleet.get_hybrid_communicate_group().get_sharding_parallel_group()
        tensor = paddle.empty(parameter.shape, "float32") if tensor is None else tensor
        with self.waits_for("another rank's share of the weights"):
            dist.broadcast(tensor, src=group.ranks[owner], group=group)
        return tensor

    def shard(self, optimizer):
        """The optimizer with its state split over ranks: each holds and updates its share, and sends the others the
        new weights (Rajbhandari et al. 2019, arXiv 1910.02054: stage 1)."""
        if self.sharding_degree == 1:
            return optimizer
        sharded = DygraphShardingOptimizer(optimizer, fleet.get_hybrid_communicate_group())
        # Paddle 3 sends those weights that have a gradient. At stage 2 the sender alone has one: nobody would listen.
        sharded._get_param_grad = lambda parameter: parameter
        return sharded

    @property
    def holds_a_shard(self) -> bool:
        """Whether this rank's share of the optimizer's state has to be written: one of each set of equal ones."""
        return self.rank < self.sharding_degree

    @contextlib.contextmanager
    def main_first(self):
        """Rank 0 runs the body, the others wait for its end however long it takes: no collective, so no timeout.

        Yields whether this rank is to run it. An error in the body ends the waiting, too, with an error there.
        """
        if self.world_size == 1:
            yield True
            return
        self.turns += 1
        done = f"{self.name} {self.turns}"
        failed = f"{done} failed"
        if self.is_main:
            try:
                yield True
            except BaseException:
                self._count(failed, 1)
                raise
            self._count(done, 1)
            return
        yield False
        while self._count(done, 0) == 0:
            if self._count(failed, 0):
                raise RunError(f"rank {self.rank}: rank 0 failed")
            time.sleep(POLL_SECONDS)

    def _count(self, name: str, more: int) -> int:
        """Add `more` to a number that all ranks see, and return it."""
        return self._undisturbed.submit(core.create_or_get_global_tcp_store().add, name, more).result()

    @contextlib.contextmanager
    def watch(self, what: str):
        """Within, waiting longer than the timeout ends the process. On a GPU a host waits for its device only where it
        fetches a number, so that is where a collective that hangs is noticed."""
        around, self._waiting = self._waiting, (what, time.monotonic())
        try:
            yield
        finally:
            self._waiting = around

    @contextlib.contextmanager
    def waits_for(self, what: str):
        with self.watch(what):
            try:
                yield
            except RuntimeError as error:
                raise RunError(
                    f"rank {self.rank} of {self.world_size}, step {self.step + 1}: another rank has ended while this "
                    f"one waited for {what} ({str(error).splitlines()[-1].strip()})"
                ) from error

    def _watch(self) -> None:
        """End the process when a collective does not come back, and say who waited where for what."""
        while True:
            time.sleep(min(1.0, self.timeout / 4))
            waiting = self._waiting
            if waiting and time.monotonic() - waiting[1] > self.timeout:
                print(
                    f"rank {self.rank} of {self.world_size}, step {self.step + 1}: waited {self.timeout:g} s for "
                    f"{waiting[0]}; another rank hangs or has ended",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


def synchronize() -> None:
    """Wait for the device to finish what it was asked to do."""
    if not paddle.get_device().startswith("cpu"):
        paddle.device.synchronize()


def check_sharding_degree(sharding_degree: int) -> None:
    """Raise a `UserError` unless the optimizer's state can be split over so many of the processes."""
    if dist.get_world_size() % sharding_degree:
        raise UserError(
            f"--sharding_degree: {sharding_degree} does not divide the number of processes, which is "
            f"{dist.get_world_size()}"
        )


def start_ranks(sharding_degree: int = 1, timeout: float = 1800) -> Ranks:
    """Join the ranks that `paddle.distributed.launch` started, or be the only one.

    Raises:
        UserError: the optimizer's state cannot be split as asked for.
    """
    check_sharding_degree(sharding_degree)
    world_size = dist.get_world_size()
    on_cpu = paddle.get_device().startswith("cpu")
    if world_size > 1 and on_cpu and os.environ.get("PADDLE_DISTRI_BACKEND") != "gloo":
        raise UserError(
            f"{world_size} processes were started for cards, and there is none (or this Paddle was built without "
            "them); on CPUs, start with --nproc_per_node instead of --gpus, and unset CUDA_VISIBLE_DEVICES"
        )
    if world_size > 1:
        connect_ranks()
    if sharding_degree > 1:
        make_sharding_groups(world_size, sharding_degree)
    ranks = Ranks(dist.get_rank(), world_size, sharding_degree, timeout)
    ranks.name = ranks.share(secrets.token_hex(8))
    return ranks
