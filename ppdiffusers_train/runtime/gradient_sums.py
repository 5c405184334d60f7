"""The gradients of one optimizer step, summed over micro-batches and ranks.

Paddle's own ways do less. `DataParallel` reduces inside the backward pass and waits for ever when a rank has no sample;
`fused_allreduce_gradients` begins after it, and copies all gradients before it sends the first; both add up what is in
16 bits in 16 bits.
"""

import contextlib
import weakref
from collections import Counter, deque
from itertools import chain

import paddle
import paddle.distributed as dist
from paddle.base import core
from paddle.distributed import fleet

from ppdiffusers_train.errors import RunError
from ppdiffusers_train.runtime.distributed import Ranks

BUCKET_BYTES = 64 * 2**20
BUCKETS_IN_FLIGHT = 4


class GradientSums:
    """The gradients of one optimizer step: summed in float32 over micro-batches, and over ranks while the last
    micro-batch still goes backward.

    In a step, `micro_batch` is around each backward pass, then comes `send_rest`; the ranks tell each other whether it
    is true on any of them, and `finish`. The gradients are then where optimizers look for them, in `parameter.grad`, as
    float32 also of parameters of a lower type. Whoever takes the step frees them.

    What the ranks reduce, in which buckets and order, they agree on after their first step: the parameters that any of
    them has used, in the order in which their gradients came. It grows when they use others. A rank that has no
    gradient contributes zeros. A bucket goes as soon as the rank has all gradients of it that it has ever had, and
    those before it have gone; at the latest in `send_rest`. In one backward pass a gradient may come more than once:
    with recomputation, for each recomputed part that uses the parameter. So this is counted. Where one comes once more
    than ever, when its bucket has gone, `finish` adds it.

    Args:
        parameters: {structured name: parameter} of all that are trained, in the type that they are trained in.
        ranks: those of the run.
        owners: {structured name: place among the ranks that share an optimizer's state}, of the rank that holds the
            parameter's. Gradients are then reduced to their owners, and the others have none (ZeRO stage 2: Rajbhandari
            et al. 2019, arXiv 1910.02054). While micro-batches before the last add up, each rank holds all.
        bucket_bytes: gradients are sent in buckets of at most so many bytes, or of one gradient. Besides
            the gradients, no more memory is needed than for the buckets that are on the way.
    """

    def __init__(self, parameters: dict, ranks: Ranks, owners: dict = None, bucket_bytes: int = BUCKET_BYTES):
        self._parameters, self._ranks, self._owners, self._bucket_bytes = parameters, ranks, owners, bucket_bytes
        if owners:
            topology = fleet.get_hybrid_communicate_group()
            self._sharing, self._replicas = topology.get_sharding_parallel_group(), topology.get_data_parallel_group()
        self._buckets = []  # lists of names, the same on all ranks
        self._bucket_of = {}  # {name: its bucket's place}
        self._times = Counter()  # {name: how often its gradient comes in a backward pass here}
        self._agreed = None  # what this rank had used when the ranks last agreed
        self._used_by_any = set()  # by any rank, in the last step
        self._own_squares = []  # of this step's gradients, before they went: scalars on the device
        self._begin_step()
        come, came = weakref.WeakMethod(self._come), weakref.WeakMethod(self._came)  # parameters outlive a run
        for name, parameter in parameters.items():
            if ranks.world_size > 1 or parameter.dtype != paddle.float32:
                parameter.register_hook(lambda gradient, name=name: come() and come()(name, gradient))
                parameter._register_backward_hook(lambda name=name: came() and came()(name))

    def _begin_step(self) -> None:
        self._used = {}  # names, in the order in which their gradients came
        self._comes = Counter()  # as _times, in this step's last micro-batch
        self._missing = [{name for name in bucket if self._times[name]} for bucket in self._buckets]
        self._gone = set()  # names whose bucket has been sent
        self._on_the_way = deque()  # (names, numbers, task)
        self._next = 0  # bucket
        self._late = {}  # {name: what came when its bucket had gone}
        self._is_last, self._error = False, None

    @contextlib.contextmanager
    def micro_batch(self, last: bool):
        """Around a backward pass, the last of this rank's in the step or not.

        Raises:
            RunError: another rank has ended, or failed.
        """
        self._is_last = last and self._ranks.world_size > 1
        try:
            yield
        finally:
            self._is_last = False
        if self._error:
            raise self._error

    @paddle.no_grad()
    def send_rest(self) -> bool:
        """After the last micro-batch, if there was one: begin to reduce what has not gone in it.

        Before the ranks speak of anything else: another one may wait for this in its backward pass.

        Returns:
            whether they have to agree again on what any of them has used.
        """
        if self._ranks.world_size == 1:
            return False
        self._send_up_to(len(self._buckets))
        return set(self._used) != self._agreed or bool(self._late)

    @paddle.no_grad()
    def finish(self, changed: bool) -> None:
        """Leave in `parameter.grad` the float32 mean over ranks of the sum over micro-batches, for each parameter that
        any rank used; no gradient in the others, as on one GPU, where AdamW leaves them alone, too.

        Args:
            changed: whether `send_rest` said so on any rank.
        """
        if self._ranks.world_size == 1:
            return
        late = ()
        if changed:
            told = self._ranks.gather_objects((list(self._used), list(self._late)))
            used, late = (dict.fromkeys(chain.from_iterable(names)) for names in zip(*told))
            self._agreed, self._used_by_any = set(self._used), set(used)
            self._plan([name for name in used if name not in self._bucket_of])
            self._send_up_to(len(self._buckets))
        while self._on_the_way:
            self._land()
        for name in late:
            self._add_late(name)
        for name in self._bucket_of.keys() - self._used_by_any:
            self._parameters[name].clear_gradient(False)
        self._times |= self._comes  # the greater of both
        self._begin_step()

    @paddle.no_grad()
    def squared_norm(self):
        """Σ g² over all numbers of all gradients, of all owners: a float32 scalar, not yet fetched from the device.

        By products of each with itself: `Tensor.norm` takes over ten times as long on Paddle 3's CPUs, squares and
        their sum twice. Owners exchange them one by one, so that they add up as they do without owners.
        """
        gradients = {name: parameter.grad for name, parameter in self._parameters.items()}
        expected = self._used_by_any if self._owners else {name for name in gradients if gradients[name] is not None}
        flat = [gradients[name] for name in gradients if name in expected]
        flat = [paddle.zeros([1]) if gradient is None else gradient.flatten() for gradient in flat]
        if not flat:
            return paddle.zeros([])
        squares = paddle.stack([paddle.matmul(numbers, numbers) for numbers in flat])
        if self._owners:
            with self._ranks.waits_for("the norm of gradients"):
                dist.all_reduce(squares, group=self._sharing)
        return squares.sum()

    def take_own_squares(self) -> list:
        """Scalars on the device, all of them finite where this rank's part of the step's gradients was: its own sums
        over micro-batches, before the other ranks' came to them. None on one rank."""
        squares, self._own_squares = self._own_squares, []
        return squares

    @paddle.no_grad()
    def _come(self, name: str, gradient) -> None:
        """A gradient is about to be added to `parameter.grad`: keep it from there where that is not to be."""
        if gradient is None or not gradient._is_initialized():  # what a PyLayer has none for
            return
        self._used.pop(name, None)
        self._used[name] = None
        if self._is_last:
            self._comes[name] += 1
        so_far, is_low = self._parameters[name].grad, gradient.dtype != paddle.float32
        if name in self._gone:
            more = gradient.astype("float32") if is_low else gradient.clone()
            self._late[name] = self._late[name].add_(more) if name in self._late else more
        elif is_low and so_far is not None:
            so_far.add_(gradient.astype("float32"))
        else:
            return
        gradient._clear_data()

    @paddle.no_grad()
    def _came(self, name: str) -> None:
        """A gradient has been added to `parameter.grad`."""
        parameter = self._parameters[name]
        if parameter.dtype != paddle.float32 and parameter.grad is not None:
            core.eager.set_master_grads([parameter])  # in float32, where it is not yet
        if self._is_last and 0 < self._comes[name] == self._times[name] and not self._error:
            self._missing[self._bucket_of[name]].discard(name)
            ready = self._next
            while ready < len(self._missing) and not self._missing[ready]:
                ready += 1
            try:
                self._send_up_to(ready)
            except RunError as error:  # Paddle's engine would go on
                self._error = error

    def _plan(self, names: list) -> None:
        """Put parameters that are in no bucket yet into new ones, each of one owner."""
        filling = {}  # {owner: [bytes so far, names]}
        for name in names:
            size, owner = 4 * self._parameters[name].size, self._owners and self._owners[name]
            bucket = filling.get(owner)
            if bucket and bucket[0] + size > self._bucket_bytes:
                self._buckets.append(filling.pop(owner)[1])
            bucket = filling.setdefault(owner, [0, []])
            bucket[0] += size
            bucket[1].append(name)
        self._buckets += [names for _, names in filling.values()]
        self._bucket_of = {name: place for place, bucket in enumerate(self._buckets) for name in bucket}

    def _send_up_to(self, end: int) -> None:
        """Send the buckets before `end` that have not gone."""
        while self._next < end:
            names = self._buckets[self._next]
            self._next += 1
            self._gone.update(names)
            gradients = [self._gradient(name) for name in names]
            # One alone is reduced where it is.
            numbers = paddle.concat([g.flatten() for g in gradients]) if len(names) > 1 else gradients[0]
            self._on_the_way.append((names, numbers, self._reduce(numbers, names[0])))
            if len(self._on_the_way) > BUCKETS_IN_FLIGHT:
                self._land()

    def _gradient(self, name: str):
        parameter = self._parameters[name]
        return paddle.zeros(parameter.shape) if parameter.grad is None else parameter.grad

    def _reduce(self, numbers, name: str):
        """Begin to replace numbers by their mean over ranks, with owners only on those of `name`; returns the task."""
        numbers.scale_(1 / self._ranks.world_size)
        flat = numbers.flatten()
        self._own_squares.append(paddle.matmul(flat, flat))
        with self._ranks.waits_for("the mean of gradients"):
            if not self._owners:
                return dist.all_reduce(numbers, sync_op=False)
            owner = self._sharing.ranks[self._owners[name]]
            return dist.reduce(numbers, dst=owner, group=self._sharing, sync_op=False)

    def _wait(self, numbers, name: str, task) -> bool:
        """Wait for the end of `_reduce`; whether the mean is here."""
        with self._ranks.waits_for("the mean of gradients"):
            task.wait()
            if not self._owners:
                return True
            if self._sharing.rank != self._owners[name]:
                return False
            if self._replicas.nranks > 1:
                dist.all_reduce(numbers, group=self._replicas)
            return True

    def _land(self) -> None:
        """Take the means of the bucket that has been on the way for longest."""
        names, numbers, task = self._on_the_way.popleft()
        parameters = [self._parameters[name] for name in names]
        if not self._wait(numbers, names[0], task):
            for parameter in parameters:
                parameter.clear_gradient(False)
            return
        means = paddle.split(numbers, [parameter.size for parameter in parameters]) if len(names) > 1 else [numbers]
        for parameter, mean in zip(parameters, means):
            if parameter.grad is None:
                parameter.grad = mean.reshape(parameter.shape)
            elif len(names) > 1:
                paddle.assign(mean.reshape(parameter.shape), parameter.grad)

    def _add_late(self, name: str) -> None:
        """Add what came on any rank when the bucket had gone."""
        late = self._late.get(name, paddle.zeros(self._parameters[name].shape))
        if self._wait(late, name, self._reduce(late, name)):
            self._parameters[name].grad.add_(late)
