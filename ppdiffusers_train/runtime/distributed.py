"""The ranks of a run: processes that `paddle.distributed.launch` started, one per GPU. Paddle has no collectives for a
single process, so each method does without them there."""

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
from ppdiffusers_train.launcher.supervisor import has_lost_supervisor
from ppdiffusers_train.runtime.groups import check_sharding_degree, connect_ranks, make_sharding_groups
from ppdiffusers_train.runtime.start import all_ranks_needed
from ppdiffusers_train.runtime.waiting import Absent, Failure, Meetings, add, start_signs_of_life

LEFT_ALONE_SECONDS = 60.0  # of waiting, once the launcher has given up this rank, and so probably others


class Ranks:
    """This process among all ranks: `rank` of `world_size`.

    Args:
        sharding_degree: number of ranks that the optimizer's state is sharded over (ZeRO stage 1).
        timeout: seconds that a rank waits in a collective, or elsewhere without a sign of life of others; then it
            ends with a message that says where.
    """

    def __init__(self, rank: int, world_size: int, sharding_degree: int = 1, timeout: float = 1800):
        self.rank, self.world_size, self.sharding_degree = rank, world_size, sharding_degree
        self.timeout, self.step = timeout, 0
        self._rounds, self._totals = 0, ({}, {})  # of `total`: how many so far, and the last values of its counters
        self.name = ""  # of the run, which is unique among the runs of a process
        self._meetings, self._counters = Meetings(rank, world_size, timeout), 0
        # Gloo, the backend on CPUs, waits 30 s for another rank, and Paddle cannot change that.
        self._has_gloo = paddle.get_device().startswith("cpu")
        self._waiting = (
            None  # (for what, an `Absent` or the time at which a collective began), while waiting for others
        )
        if world_size > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def broadcast(self, parameters) -> None:
        """Copy the parameters of rank 0 to every rank."""
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
        """Every rank's picklable `value`, on every rank, in the order of ranks. Waits as long as `wait_for_all`.

        Args:
            what: what is waited for, for messages.
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
        """The sum over all ranks of each of some small integers, in their order.

        The hosts exchange them through the store at which the ranks met, so no rank waits for its device. Each rank
        adds to shared counters, waits until all ranks have, and reads them. Two sets of counters are used in turns: a
        rank that adds to one again has seen all ranks add to the other, so all ranks have read this one by then.
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
        """A function that adds to a counter of all ranks, which starts at 0, and returns its new value.

        All ranks have to create their counters in the same order.
        """
        self._counters += 1
        if self.world_size > 1:
            return partial(self._add, f"{self.name} counter {self._counters}")
        return partial(add_to, [0])

    def pieces(self, count: int, size: int = 1, taken=None):
        """Distribute `count` items: an iterator of ranges of at most `size`. A rank takes the next one when it is free.

        All ranks have to call it in the same order, unless `taken` is a counter that those share who divide the items.
        """
        taken = taken or self.counter()
        starts = iter(lambda: (taken(1) - 1) * size, None)
        return (range(start, min(start + size, count)) for start in itertools.takewhile(lambda s: s < count, starts))

    def broadcast_in_shard(self, tensor, parameter, owner: int):
        """Broadcast a float32 tensor of the shape of `parameter` among the ranks that an optimizer's state is sharded
        over.

        Args:
            tensor: the tensor on its owner; None on other ranks.
            owner: index of the owner in the group.
        """
        group = fleet.get_hybrid_communicate_group().get_sharding_parallel_group()
        tensor = paddle.empty(parameter.shape, "float32") if tensor is None else tensor
        with self.waits_for("another rank's shard of the weights"):
            dist.broadcast(tensor, src=group.ranks[owner], group=group)
        return tensor

    def share_optimizer_state(self, degree: int) -> None:
        """From now on, shard an optimizer's state over so many ranks; raises a `UserError` if that is impossible."""
        check_sharding_degree(degree)
        if degree > 1:
            make_sharding_groups(self.world_size, degree)
        self.sharding_degree = degree

    def shard(self, optimizer):
        """The optimizer with its state sharded over ranks: each holds and updates its shard, and sends the new weights
        to the others (Rajbhandari et al. 2019, arXiv 1910.02054: stage 1)."""
        if self.sharding_degree == 1:
            return optimizer
        sharded = DygraphShardingOptimizer(optimizer, fleet.get_hybrid_communicate_group())
        # Paddle 3 broadcasts only weights with a gradient, but at stage 2 the receiving ranks have none.
        sharded._get_param_grad = lambda parameter: parameter
        return sharded

    @property
    def holds_a_shard(self) -> bool:
        """Whether this rank writes its shard of the optimizer's state; of equal shards, one is written."""
        return self.rank < self.sharding_degree

    @contextlib.contextmanager
    def only_main(self, what: str):
        """A context whose body is for rank 0 alone; the others wait for its end (`wait_for_all`).

        Yields whether this is rank 0. After an error in the body, the others stop waiting and raise an error, too.

        Args:
            what: what the others wait for, for messages.
        """
        try:
            yield self.is_main
        except BaseException:
            if self.world_size > 1:
                with contextlib.suppress(RuntimeError):  # rank 0 has ended
                    self._meetings.fail()
            raise
        self.wait_for_all(what)

    def wait_for_all(self, what: str) -> None:
        """Wait until all ranks have called this, as long as the missing ones give signs of life.

        For use before a collective, and after work that may take one rank longer than another.

        Raises:
            RunError: another rank has failed, or rank 0 has ended.
        """
        if self.world_size == 1:
            return
        with self._asks_store(what) as absent:
            self._meetings.come()
            self._meetings.wait(absent)

    def _add(self, name: str, more: int) -> int:
        """Add `more` to a counter of all ranks, and return its new value."""
        with self._asks_store("rank 0's answer"):
            return add(name, more)

    @contextlib.contextmanager
    def _asks_store(self, what: str):
        """A context for a request to the store. Yields an `Absent`, which determines how long it may take."""
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
        """A context in which waiting longer than the timeout ends the process. On a GPU, the host waits for its device
        only where it fetches a value, so that is where a hanging collective is noticed."""
        around, self._waiting = self._waiting, (what, time.monotonic())
        try:
            yield
        finally:
            self._waiting = around

    @contextlib.contextmanager
    def waits_for(self, what: str, even: bool = True):
        """A context for a collective of all ranks. On CPUs it starts when all ranks are there.

        Args:
            even: whether ranks arrive at about the same time, so that they may wait inside the collective.
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
        """End the process if a collective does not return; the message says which rank waited where for what."""
        while True:
            time.sleep(min(1.0, self.timeout / 4))
            waiting, timeout = self._waiting, self.timeout
            if not waiting:
                continue
            if has_lost_supervisor():
                timeout = min(timeout, LEFT_ALONE_SECONDS)
            what, since = waiting
            absent = since if isinstance(since, Absent) else None
            if time.monotonic() - (absent.since if absent else since) > timeout:
                silent = ", ".join(map(str, absent.silent(timeout))) if absent else ""
                of = f" without a sign of life from rank {silent}" if silent else ", and another rank did not come"
                print(f"{self._place}: waited {timeout:g} s for {what}{of}", file=sys.stderr, flush=True)
                os._exit(1)


def add_to(number: list, more: int) -> int:
    """Add to the only element of a list, and return it."""
    number[0] += more
    return number[0]


def synchronize() -> None:
    """Wait until the device has finished its work."""
    if not paddle.get_device().startswith("cpu"):
        paddle.device.synchronize()


def start_ranks(sharding_degree: int = 1, timeout: float = 1800) -> Ranks:
    """Connect to the other ranks that `paddle.distributed.launch` started, if there are any.

    Raises:
        UserError: the optimizer's state cannot be sharded as the flags say.
    """
    world_size = dist.get_world_size()
    on_cpu = paddle.get_device().startswith("cpu")
    if world_size > 1 and on_cpu and os.environ.get("PADDLE_DISTRI_BACKEND") != "gloo":
        raise UserError(
            f"{world_size} processes were started for GPUs, and there is none (or this Paddle was built without "
            "CUDA); on CPUs, start with --nproc_per_node instead of --gpus, and unset CUDA_VISIBLE_DEVICES"
        )
    with all_ranks_needed() if world_size > 1 else contextlib.nullcontext():
        if world_size > 1:
            connect_ranks()
            start_signs_of_life(dist.get_rank())
        ranks = Ranks(dist.get_rank(), world_size, timeout=timeout)
        ranks.name = ranks.broadcast_object(secrets.token_hex(8))
    ranks.share_optimizer_state(sharding_degree)
    return ranks
