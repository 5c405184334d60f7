"""The ranks of a run: processes that `paddle.distributed.launch` started, one per card. One process alone needs no
collective, and Paddle has none to offer it, so each call asks first."""

import contextlib
import itertools
import os
import secrets
import sys
import threading
import time
from functools import partial

import paddle
import paddle.distributed as dist
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer import DygraphShardingOptimizer

from ppdiffusers_train.errors import RunError, UserError
from ppdiffusers_train.launcher.stand_in import is_left_alone
from ppdiffusers_train.runtime.groups import check_sharding_degree, connect_ranks, make_sharding_groups
from ppdiffusers_train.runtime.waiting import Absent, Failure, Meetings, add, start_signs_of_life

LEFT_ALONE_SECONDS = 60.0  # of waiting, once the launcher has given a rank up, and probably another one, too


class Ranks:
    """This process among all: `rank` of `world_size`.

    Args:
        sharding_degree: over how many ranks the optimizer's state is split (ZeRO stage 1).
        timeout: seconds that a rank waits for the others in a collective, or elsewhere for a sign of life of theirs,
            before it gives up, and says where.
    """

    def __init__(self, rank: int, world_size: int, sharding_degree: int = 1, timeout: float = 1800):
        self.rank, self.world_size, self.sharding_degree = rank, world_size, sharding_degree
        self.timeout, self.step = timeout, 0
        self._rounds, self._totals = 0, ({}, {})  # of `total`: how many so far, and what its counters stand at
        self.name = ""  # the run's, among those of a process
        self._meetings, self._counters = Meetings(rank, world_size, timeout), 0
        # Gloo, which CPUs have, waits 30 s for another rank, and Paddle has no way to say how long.
        self._has_gloo = paddle.get_device().startswith("cpu")
        self._waiting = None  # (for what, the `Absent`, or since when in a collective), while waiting for others
        if world_size > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def broadcast(self, parameters) -> None:
        """Give every rank the parameters of rank 0."""
        if self.world_size > 1:
            with self.waits_for("the others to load their models", even=False):
                for parameter in parameters:
                    dist.broadcast(parameter, src=0)
                synchronize()

    def sum(self, values):
        """The sum of a tensor over all ranks."""
        if self.world_size > 1:
            with self.waits_for("a sum"):
                dist.all_reduce(values)
        return values

    def gather_objects(self, value, what: str = "the others to come to the same point") -> list:
        """Every rank's picklable `value`, on every rank; however long it takes one of them to have it (`wait_for_all`).

        Args:
            what: is waited for.
        """
        if self.world_size == 1:
            return [value]
        values = []
        with self.waits_for(what, even=False):
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value):
        """Rank 0's picklable `value`, on every rank."""
        return self.gather_objects(value)[0]

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
        names = {name: f"{self.name} total {turn} {name}" for name in counts}
        for name, more in counts.items():
            if more:
                self._add(names[name], int(more))
        self.wait_for_all("the others to come to the end of their backward passes")
        totals = []
        for name in counts:
            now = self._add(names[name], 0)
            totals.append(now - seen.get(name, 0))
            seen[name] = now
        return totals

    def counter(self):
        """A function that adds to a number, 0 at first, which all ranks see, and returns it.

        All ranks have to ask for theirs in the same order.
        """
        self._counters += 1
        if self.world_size > 1:
            return partial(self._add, f"{self.name} counter {self._counters}")
        return partial(add_to, [0])

    def pieces(self, count: int, size: int = 1):
        """Share out `count` things: an iterator of ranges of at most `size`. Whoever is free takes the next one.

        All ranks have to ask for it in the same order.
        """
        taken = self.counter()
        starts = iter(lambda: (taken(1) - 1) * size, None)
        return (range(start, min(start + size, count)) for start in itertools.takewhile(lambda s: s < count, starts))

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

    def share_optimizer_state(self, degree: int) -> None:
        """From now on, split an optimizer's state over so many ranks; raises a `UserError` where that cannot be."""
        check_sharding_degree(degree)
        if degree > 1:
            make_sharding_groups(self.world_size, degree)
        self.sharding_degree = degree

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
    def only_main(self, what: str):
        """Rank 0 runs the body, the others wait for its end, however long it takes (`wait_for_all`).

        Yields whether this rank is to run it. An error in the body ends the waiting, too, with an error there.

        Args:
            what: the others wait for.
        """
        try:
            yield self.is_main
        except BaseException:
            if self.world_size > 1:
                with contextlib.suppress(RuntimeError):  # rank 0 has ended, so nobody listens
                    self._meetings.fail()
            raise
        self.wait_for_all(what)

    def wait_for_all(self, what: str) -> None:
        """Wait until all ranks have come here, as long as those that have not give signs of life.

        Before a collective, and after whatever may take one rank longer than another.

        Raises:
            RunError: another rank has failed, or rank 0 has ended.
        """
        if self.world_size == 1:
            return
        with self._asks_store(what) as absent:
            self._meetings.come()
            self._meetings.wait(absent)

    def _add(self, name: str, more: int) -> int:
        """Add `more` to a number that all ranks see, and return it."""
        with self._asks_store("rank 0's answer"):
            return add(name, more)

    @contextlib.contextmanager
    def _asks_store(self, what: str):
        """Around what asks the store for `what`. Yields an `Absent`: how long this may last depends on it."""
        absent = Absent()
        around, self._waiting = self._waiting, (what, absent)
        try:
            yield absent
        except Failure as failure:
            raise RunError(f"{self._place}: {failure} while this one waited for {what}") from failure
        except ConnectionError as error:
            raise RunError(f"{self._place}: rank 0 has ended while this one waited for {what}") from error
        finally:
            self._waiting = around

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
    def waits_for(self, what: str, even: bool = True):
        """Around a collective, which all ranks come to. On CPUs it begins when all are here.

        Args:
            even: whether they come at about the same time, so that the collective may begin to wait for the others.
        Raises:
            RunError: another rank has ended, or failed.
        """
        if self._has_gloo or not even:
            self.wait_for_all(what)
        with self.watch(what):
            try:
                yield
            except RuntimeError as error:
                raise RunError(
                    f"{self._place}: the connection to another rank broke while this one waited for {what} "
                    f"({str(error).splitlines()[-1].strip()})"
                ) from error

    @property
    def _place(self) -> str:
        return f"rank {self.rank} of {self.world_size}, step {self.step + 1}"

    def _watch(self) -> None:
        """End the process when a collective does not come back, and say who waited where for what."""
        while True:
            time.sleep(min(1.0, self.timeout / 4))
            waiting, timeout = self._waiting, self.timeout
            if not waiting:
                continue
            if is_left_alone():
                timeout = min(timeout, LEFT_ALONE_SECONDS)
            what, since = waiting
            absent = since if isinstance(since, Absent) else None
            if time.monotonic() - (absent.since if absent else since) > timeout:
                silent = ", ".join(map(str, absent.silent(timeout))) if absent else ""
                of = f" without a sign of life from rank {silent}" if silent else ", and another rank did not come"
                print(f"{self._place}: waited {timeout:g} s for {what}{of}", file=sys.stderr, flush=True)
                os._exit(1)


def add_to(number: list, more: int) -> int:
    """Add to the only number in a list, and return it."""
    number[0] += more
    return number[0]


def synchronize() -> None:
    """Wait for the device to finish what it was asked to do."""
    if not paddle.get_device().startswith("cpu"):
        paddle.device.synchronize()


def start_ranks(sharding_degree: int = 1, timeout: float = 1800) -> Ranks:
    """Join the ranks that `paddle.distributed.launch` started, or be the only one.

    Raises:
        UserError: the optimizer's state cannot be split as asked for.
    """
    world_size = dist.get_world_size()
    on_cpu = paddle.get_device().startswith("cpu")
    if world_size > 1 and on_cpu and os.environ.get("PADDLE_DISTRI_BACKEND") != "gloo":
        raise UserError(
            f"{world_size} processes were started for cards, and there is none (or this Paddle was built without "
            "them); on CPUs, start with --nproc_per_node instead of --gpus, and unset CUDA_VISIBLE_DEVICES"
        )
    if world_size > 1:
        connect_ranks()
        start_signs_of_life(dist.get_rank())
    ranks = Ranks(dist.get_rank(), world_size, timeout=timeout)
    ranks.name = ranks.broadcast_object(secrets.token_hex(8))
    ranks.share_optimizer_state(sharding_degree)
    return ranks
