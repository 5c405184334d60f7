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
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

from ppdiffusers_train.errors import RunError, UserError
from ppdiffusers_train.runtime.signals import STOP_SIGNALS

POLL_SECONDS = 0.1


class Ranks:
    """This process among all: `rank` of `world_size`.

    Args:
        sharding_degree: over how many ranks the optimizer's state is split (ZeRO stage 1).
        timeout: seconds that a rank waits for the others in a collective before it gives up, and says where.
    """

    def __init__(self, rank: int, world_size: int, sharding_degree: int = 1, timeout: float = 1800):
        self.rank, self.world_size, self.sharding_degree = rank, world_size, sharding_degree
        self.timeout, self.step, self.turns = timeout, 0, 0
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
            with self._waits_for("the first weights"):
                for parameter in parameters:
                    dist.broadcast(parameter, src=0)

    def average_gradients(self, parameters) -> None:
        """Replace every gradient by its mean over all ranks; a rank that had no samples contributes zeros.

        A parameter that no rank used has no gradient afterwards, either: on one card AdamW leaves it alone, too.
        """
        if self.world_size == 1:
            return
        parameters = list(parameters)
        used = self.sum(paddle.to_tensor([float(parameter.grad is not None) for parameter in parameters])).tolist()
        parameters = [parameter for parameter, ranks in zip(parameters, used) if ranks]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = paddle.zeros_like(parameter)
        with self._waits_for("the mean of gradients"):
            fused_allreduce_gradients(parameters, None)

    def sum(self, values):
        """The sum of a tensor over all ranks."""
        if self.world_size > 1:
            with self._waits_for("a sum"):
                dist.all_reduce(values)
        return values

    def gather(self, value) -> list:
        """Every rank's picklable `value`, on every rank."""
        if self.world_size == 1:
            return [value]
        values = []
        with self._waits_for("messages"):
            dist.all_gather_object(values, value)
        return values

    def share(self, value):
        """Rank 0's picklable `value`, on every rank."""
        return self.gather(value)[0]

    def shard(self, optimizer):
        """The optimizer with its state split over ranks: each holds and updates its share, and sends the others the
        new weights (Rajbhandari et al. 2019, arXiv 1910.02054: stage 1)."""
        if self.sharding_degree == 1:
            return optimizer
        return DygraphShardingOptimizer(optimizer, fleet.get_hybrid_communicate_group())

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
    def _waits_for(self, what: str):
        self._waiting = (what, time.monotonic())
        try:
            yield
        except RuntimeError as error:
            raise RunError(
                f"rank {self.rank} of {self.world_size}, step {self.step + 1}: another rank has ended while this one "
                f"waited for {what} ({str(error).splitlines()[-1].strip()})"
            ) from error
        finally:
            self._waiting = None

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


def start_ranks(sharding_degree: int = 1, timeout: float = 1800) -> Ranks:
    """Join the ranks that `paddle.distributed.launch` started, or be the only one.

    Raises:
        UserError: the optimizer's state cannot be split as asked for.
    """
    world_size = dist.get_world_size()
    if world_size % sharding_degree:
        raise UserError(
            f"--sharding_degree: {sharding_degree} does not divide the number of processes, which is {world_size}"
        )
    on_cpu = paddle.get_device().startswith("cpu")
    if world_size > 1 and on_cpu and os.environ.get("PADDLE_DISTRI_BACKEND") != "gloo":
        raise UserError(
            f"{world_size} processes were started for cards, and there is none (or this Paddle was built without "
            "them); on CPUs, start with --nproc_per_node instead of --gpus, and unset CUDA_VISIBLE_DEVICES"
        )
    if world_size > 1 and not dist.is_initialized():
        # The store's newer server (Paddle 3) aborts rank 0, often after its last word, when another rank's connection
        # is reset; Paddle 2.6 has the older one only, and not the flag.
        with contextlib.suppress(ValueError):
            paddle.set_flags({"FLAGS_tcp_store_using_libuv": False})
        strategy = fleet.DistributedStrategy()
        strategy.hybrid_configs = {
            "dp_degree": world_size // sharding_degree,
            "mp_degree": 1,
            "pp_degree": 1,
            "sharding_degree": sharding_degree,
        }
        fleet.init(is_collective=True, strategy=strategy)
    ranks = Ranks(dist.get_rank(), world_size, sharding_degree, timeout)
    ranks.name = ranks.share(secrets.token_hex(8))
    return ranks
