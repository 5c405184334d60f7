"""The gradients of one optimizer step, summed over micro-batches and ranks.

Paddle's own functions do less. `DataParallel` reduces inside the backward pass and waits forever if a rank has no
sample; `fused_allreduce_gradients` starts after it, and copies all gradients before it sends the first. Both add 16-bit
gradients in 16 bits.
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
    """The gradients of one optimizer step: summed in float32 over micro-batches, and over ranks while the backward pass
    of the last micro-batch is still running.

    In a step, each backward pass runs within `micro_batch`. Then each rank calls `send_rest`, the ranks exchange
    whether it returned True on any of them, and call `finish`. The gradients are then in `parameter.grad`, in float32
    also for low-precision parameters. The caller frees them after the update.

    After the first step, the ranks agree on what they reduce, in which buckets and order: the parameters that any of
    them has used, in the order in which their gradients arrived. More are added when more are used. A rank that has no
    gradient contributes zeros. A bucket is sent as soon as this rank has all gradients of it that it has ever had, and
    the buckets before it have been sent; at the latest in `send_rest`. In one backward pass a gradient may arrive more
    than once: with recomputation, once for each recomputed part that uses the parameter. So arrivals are counted. If
    one arrives after its bucket has been sent, `finish` adds it.

    Args:
        parameters: {structured name: parameter} of all trainable ones, in the dtype that they are trained in.
        ranks: those of the run.
        owners: {structured name: the rank that holds the parameter's optimizer state, among those it is sharded over}.
            Gradients are then reduced to their owners, and other ranks keep none (ZeRO stage 2: Rajbhandari et al.
            2019, arXiv 1910.02054). Until the last micro-batch, each rank holds the gradients of all parameters.
        bucket_bytes: gradients are sent in buckets of at most this size, or of one gradient. Besides the gradients,
            memory is needed only for the buckets in flight.
    """

    is_torn = False  # a step's gradients are used all together

    def __init__(self, parameters: dict, ranks: Ranks, owners: dict = None, bucket_bytes: int = BUCKET_BYTES):
        self._parameters, self._ranks, self._owners, self._bucket_bytes = parameters, ranks, owners, bucket_bytes
        if owners:
            topology = fleet.get_hybrid_communicate_group()
            self._sharing, self._replicas = topology.get_sharding_parallel_group(), topology.get_data_parallel_group()
        self._buckets = []  # lists of names, the same on all ranks
        self._bucket_of = {}  # {name: index of its bucket}
        self._expected_arrivals = Counter()  # {name: how often its gradient arrives in a backward pass on this rank}
        self._agreed = None  # names that this rank had used when the ranks last agreed
        self._used_by_any = set()  # by any rank, in the last step
        self._own_squares = []  # of this step's gradients, before they were sent: scalars on the device
        self._begin_step()
        # Weak, because parameters outlive a run.
        before, after = weakref.WeakMethod(self._before_accumulation), weakref.WeakMethod(self._after_accumulation)
        for name, parameter in parameters.items():
            if ranks.world_size > 1 or parameter.dtype != paddle.float32:
                parameter.register_hook(lambda gradient, name=name: before() and before()(name, gradient))
                parameter._register_backward_hook(lambda name=name: after() and after()(name))

    def _begin_step(self) -> None:
        self._used = {}  # names, in the order in which their gradients arrived
        self._arrivals = Counter()  # the same count for this step's last micro-batch
        self._missing = [{name for name in bucket if self._expected_arrivals[name]} for bucket in self._buckets]
        self._sent = set()  # names whose buckets have been sent
        self._in_flight = deque()  # (names, values, task)
        self._next = 0  # index of the next bucket to send
        self._late = {}  # {name: gradient that arrived after its bucket was sent}
        self._is_last, self._error = False, None

    @contextlib.contextmanager
    def micro_batch(self, last: bool):
        """A context for a backward pass.

        Args:
            last: whether it is this rank's last one of the step.

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
        """After the last micro-batch, if there was one: start to reduce the buckets that have not been sent.

        Call it before any other communication: another rank may wait for these buckets in its backward pass.

        Returns:
            whether the ranks have to agree again on the parameters that any of them has used.
        """
        if self._ranks.world_size == 1:
            return False
        self._send_up_to(len(self._buckets))
        return set(self._used) != self._agreed or bool(self._late)

    @paddle.no_grad()
    def finish(self, changed: bool) -> None:
        """Leave in `parameter.grad` the float32 mean over ranks of the sum over micro-batches, for each parameter that
        any rank used. Other parameters have no gradient, as on one GPU, so AdamW does not update them.

        Args:
            changed: whether `send_rest` returned True on any rank.
        """
        if self._ranks.world_size == 1:
            return
        late = ()
        if changed:
            found = self._ranks.gather_objects((list(self._used), list(self._late)))
            used, late = (dict.fromkeys(chain.from_iterable(names)) for names in zip(*found))
            self._agreed, self._used_by_any = set(self._used), set(used)
            self._plan([name for name in used if name not in self._bucket_of])
            self._send_up_to(len(self._buckets))
        while self._in_flight:
            self._receive()
        for name in late:
            self._add_late(name)
        for name in self._bucket_of.keys() - self._used_by_any:
            self._parameters[name].clear_gradient(False)
        self._expected_arrivals |= self._arrivals  # the maximum of both
        self._begin_step()

    @paddle.no_grad()
    def squared_norm(self):
        """Σ g² over all elements of all gradients, of all owners: a float32 scalar on the device.

        Computed as the product of each gradient with itself: on CPUs with Paddle 3, `Tensor.norm` takes over ten times
        as long, and the sum of squares twice. Owners exchange one value per gradient, so that the sum has the same
        order as without owners.
        """
        gradients = {name: parameter.grad for name, parameter in self._parameters.items()}
        expected = self._used_by_any if self._owners else {name for name in gradients if gradients[name] is not None}
        flat = [gradients[name] for name in gradients if name in expected]
        flat = [paddle.zeros([1]) if gradient is None else gradient.flatten() for gradient in flat]
        if not flat:
            return paddle.zeros([])
        squares = paddle.stack([paddle.matmul(values, values) for values in flat])
        if self._owners:
            with self._ranks.waits_for("the norm of gradients"):
                dist.all_reduce(squares, group=self._sharing)
        return squares.sum()

    def take_own_squares(self) -> list:
        """Squared norms of this rank's own gradients, before those of other ranks were added: scalars on the device,
        all finite if the gradients were. An empty list on one rank."""
        squares, self._own_squares = self._own_squares, []
        return squares

    @paddle.no_grad()
    def _before_accumulation(self, name: str, gradient) -> None:
        """Called before a gradient is added to `parameter.grad`; takes it away if it must not be added there."""
        if gradient is None or not gradient._is_initialized():  # a PyLayer has no gradient for this input
            return
        self._used.pop(name, None)
        self._used[name] = None
        if self._is_last:
            self._arrivals[name] += 1
        so_far, is_low = self._parameters[name].grad, gradient.dtype != paddle.float32
        if name in self._sent:
            more = gradient.astype("float32") if is_low else gradient.clone()
            self._late[name] = self._late[name].add_(more) if name in self._late else more
        elif is_low and so_far is not None:
            so_far.add_(gradient.astype("float32"))
        else:
            return
        gradient._clear_data()

    @paddle.no_grad()
    def _after_accumulation(self, name: str) -> None:
        """Called after a gradient has been added to `parameter.grad`."""
        parameter = self._parameters[name]
        if parameter.dtype != paddle.float32 and parameter.grad is not None:
            core.eager.set_master_grads([parameter])  # converts it to float32 if it is not
        if self._is_last and 0 < self._arrivals[name] == self._expected_arrivals[name] and not self._error:
            self._missing[self._bucket_of[name]].discard(name)
            ready = self._next
            while ready < len(self._missing) and not self._missing[ready]:
                ready += 1
            try:
                self._send_up_to(ready)
            except RunError as error:  # Paddle's engine would ignore it
                self._error = error

    def _plan(self, names: list) -> None:
        """Put parameters that are in no bucket yet into new buckets, each with one owner."""
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
        """Send the buckets before `end` that have not been sent."""
        while self._next < end:
            names = self._buckets[self._next]
            self._next += 1
            self._sent.update(names)
            gradients = [self._gradient(name) for name in names]
            # A single gradient is reduced in place.
            values = paddle.concat([g.flatten() for g in gradients]) if len(names) > 1 else gradients[0]
            self._in_flight.append((names, values, self._reduce(values, names[0])))
            if len(self._in_flight) > BUCKETS_IN_FLIGHT:
                self._receive()

    def _gradient(self, name: str):
        parameter = self._parameters[name]
        return paddle.zeros(parameter.shape) if parameter.grad is None else parameter.grad

    def _reduce(self, values, name: str):
        """Start to replace values by their mean over ranks, or only on the owner of `name`; returns the task."""
        values.scale_(1 / self._ranks.world_size)
        flat = values.flatten()
        self._own_squares.append(paddle.matmul(flat, flat))
        with self._ranks.waits_for("the mean of gradients"):
            if not self._owners:
                return dist.all_reduce(values, sync_op=False)
            owner = self._sharing.ranks[self._owners[name]]
            return dist.reduce(values, dst=owner, group=self._sharing, sync_op=False)

    def _wait(self, values, name: str, task) -> bool:
        """Wait for the end of `_reduce`; returns whether this rank has the mean."""
        with self._ranks.waits_for("the mean of gradients"):
            task.wait()
            if not self._owners:
                return True
            if self._sharing.rank != self._owners[name]:
                return False
            if self._replicas.nranks > 1:
                dist.all_reduce(values, group=self._replicas)
            return True

    def _receive(self) -> None:
        """Wait for the oldest bucket in flight, and store its means as gradients."""
        names, values, task = self._in_flight.popleft()
        parameters = [self._parameters[name] for name in names]
        if not self._wait(values, names[0], task):
            for parameter in parameters:
                parameter.clear_gradient(False)
            return
        means = paddle.split(values, [parameter.size for parameter in parameters]) if len(names) > 1 else [values]
        for parameter, mean in zip(parameters, means):
            if parameter.grad is None:
                parameter.grad = mean.reshape(parameter.shape)
            elif len(names) > 1:
                paddle.assign(mean.reshape(parameter.shape), parameter.grad)

    def _add_late(self, name: str) -> None:
        """Add gradients that arrived on any rank after the bucket was sent."""
        late = self._late.get(name, paddle.zeros(self._parameters[name].shape))
        if self._wait(late, name, self._reduce(late, name)):
            self._parameters[name].grad.add_(late)
