"""The ranks of a run. One process needs no collective, and Paddle has none to offer it, so each call asks first."""

from dataclasses import dataclass

import paddle
import paddle.distributed as dist
from paddle.distributed import fleet


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world_size`."""

    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def sum_gradients(self, parameters) -> None:
        """Replace every gradient by its sum over all ranks; a rank that had no samples contributes zeros."""
        if self.world_size == 1:
            return
        with paddle.no_grad():
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = paddle.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def sum(self, value):
        """The sum of a scalar tensor over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def share(self, value):
        """Rank 0's picklable `value`, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Return when all ranks are here."""
        if self.world_size > 1:
            dist.barrier()


def start_ranks() -> Ranks:
    """Join the ranks that `paddle.distributed.launch` started, or be the only one."""
    if dist.get_world_size() > 1 and not dist.is_initialized():
        fleet.init(is_collective=True)
    return Ranks(dist.get_rank(), dist.get_world_size())
