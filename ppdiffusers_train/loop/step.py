"""The parts of one optimizer step: its batches, their gradients, and a description of those that are NaN or inf."""

import itertools
import math
from dataclasses import dataclass

import paddle

from ppdiffusers_train.cpu.patches import no_views
from ppdiffusers_train.data.loader import iterate_batches, to_device
from ppdiffusers_train.data.order import SampleOrder
from ppdiffusers_train.draws import Draws, generator, iterate_draws
from ppdiffusers_train.loop.dropout import dropout_follows, follow_samples
from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.state import StepFigures, TrainingState
from ppdiffusers_train.module import trained_models
from ppdiffusers_train.runtime.distributed import Ranks


@dataclass
class Batch:
    """A batch of one step, loaded."""

    positions: list  # of its samples in the run
    tensors: dict  # {name: [B, …]} of the samples that can be used
    errors: dict  # {index in the batch: message} of the others
    draws: Draws  # the random numbers of all its samples
    is_last: bool  # whether it is this rank's last batch of the step
    weight: float  # of its samples' losses


def load_steps(plan: Plan, state: TrainingState, samples):
    """Yield (window, iterator of its `Batch`es on this rank) of each step that remains.

    The loader and the random numbers are some batches ahead, so each of them goes through the steps by itself.
    """
    steps, to_load, to_draw = itertools.tee(plan.steps_from(state), 3)
    loaded = iterate_batches(samples, positions_of_batches(to_load), plan.run.args.dataloader_num_workers)
    draws = iterate_draws(plan.order.seed, positions_of_batches(to_draw), to_device)
    for window, share in steps:
        yield (
            window,
            (
                Batch(positions, *next(loaded), next(draws), positions is share[-1], plan.loss_weight(positions))
                for positions in share
            ),
        )


def positions_of_batches(steps):
    """Yield the positions of each batch of the steps."""
    for _, share in steps:
        yield from share


@dataclass
class MicroBatch:
    """One batch's contribution to a step."""

    loss: object  # its part of the mean loss of the global batch, on the device
    draws: Draws
    positions: list  # of its samples in the run
    errors: dict  # {position: message} of those that could not be used
    weight: float = 1.0  # of its samples' losses


@no_views()
def add_gradients(module, samples, batch: Batch, window: range, state: TrainingState) -> MicroBatch:
    """Add the gradients of one batch to those of the step's global batch `window`.

    Args:
        samples: the source of the batch, with a method `encode`.
    """
    draws, errors = batch.draws, {batch.positions[i]: message for i, message in batch.errors.items()}
    good = [position for position in batch.positions if position not in errors]
    draws.keep(good)
    if not good or (errors and state.args.fused_backward):  # this one cannot go back
        return MicroBatch(paddle.zeros([]), draws, good, errors)
    with dropout_follows(draws):
        with state.precision.autocast():
            encoded = samples.encode(batch.tensors)
            # Weighted by the number of samples, which is right for a short last batch and a short last window, too.
            loss = module(encoded, draws) * (batch.weight * len(good) / len(window))
        if state.args.fused_backward and not math.isfinite(float(loss)):
            return MicroBatch(loss.detach().astype("float32"), draws, good, errors, batch.weight)
        # Gradients are averaged over ranks, but each rank computes a part of one sum.
        scale = state.precision.loss_scale.value * state.ranks.world_size
        with state.gradients.micro_batch(batch.is_last):
            (loss * scale if scale != 1 else loss).backward()
    return MicroBatch(loss.detach().astype("float32"), draws, good, errors, batch.weight)


def complete_gradients(state: TrainingState, parts: list, is_asked_to_stop: bool) -> tuple:
    """Complete the sums of a step's gradients over all ranks.

    Returns:
        How many of the step's samples cannot be used, and whether to stop after it, because any rank was asked to.
    """
    changed = state.gradients.send_rest()
    missing, stopping, changed = state.ranks.total(
        bad=sum(len(part.errors) for part in parts), stopping=is_asked_to_stop, changed=changed
    )
    state.gradients.finish(bool(changed))
    return missing, bool(stopping)


def count_bad_samples(plan: Plan, state: TrainingState, parts: list) -> None:
    """Add the samples of a step that cannot be used, on any rank, to the state's.

    Raises:
        BadSampleError: there are more than `--max_bad_samples`.
    """
    own = {plan.order.row(position): message for part in parts for position, message in part.errors.items()}
    found = plan.run.ranks.gather_objects(own)
    state.bad_samples.add({row: message for part in found for row, message in part.items()}, plan.run.log)


def losses_by_file(parts: list, window_size: int, order: SampleOrder, dataset) -> dict:
    """{name of a sample: the loss of its batch, which is the sample's own with a batch size of 1}."""
    return {
        dataset.name(order.row(position)): float(part.loss) * window_size / (part.weight * len(part.positions))
        for part in parts
        for position in part.positions
    }


def seed_layers(seed: int, step: int, rank: int) -> None:
    """Seed Paddle's own generator, which a user's module may use, as a function of (seed, step, rank)."""
    paddle.seed(int(generator(seed, step, f"layers of rank {rank}").integers(2**31)))


def set_training_mode(module) -> None:
    """Put trained models into training mode and frozen ones into evaluation mode."""
    trained = trained_models(module)
    follow_samples(trained)
    for model in module.children():
        if model in trained:
            model.train()
        else:
            model.eval()


def describe_failure(parts: list, figures: StepFigures, ranks: Ranks, order: SampleOrder, dataset) -> str:
    """Which samples and draws of this rank made a step NaN or inf; empty if none did.

    The norm is that of all ranks together, so each rank looks at its own gradients, before the others' were added.
    """
    bad = [part for part in parts if not math.isfinite(float(part.loss))]
    own = float(sum(figures.own_squares)) if ranks.world_size > 1 else figures.norm
    if not bad and math.isfinite(own):
        return ""
    what = f"the loss is {float(bad[0].loss)}" if bad else f"the norm of the gradients is {own}"
    named = [
        f"{', '.join(dataset.name(order.row(position)) for position in part.positions)} ("
        + ("; ".join(f"{name} {values.tolist()}" for name, values in part.draws.drawn_integers.items()) or "no draws")
        + ")"
        for part in (bad[:1] or parts)
    ]
    return f"rank {ranks.rank}: {what} on {' and '.join(named)}"
