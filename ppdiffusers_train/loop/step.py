"""The parts of one optimizer step: the gradients of each batch, and a description of those that are NaN or inf."""

import math
from dataclasses import dataclass

import paddle

from ppdiffusers_train.cpu.patches import no_views
from ppdiffusers_train.data.order import SampleOrder
from ppdiffusers_train.draws import Draws, generator
from ppdiffusers_train.loop.dropout import dropout_follows, follow_samples
from ppdiffusers_train.loop.state import StepFigures, TrainingState
from ppdiffusers_train.module import trained_models
from ppdiffusers_train.runtime.distributed import Ranks


@dataclass
class MicroBatch:
    """One batch's contribution to a step."""

    loss: object  # its part of the mean loss of the global batch, on the device
    draws: Draws
    positions: list  # of its samples in the run
    errors: dict  # {position: message} of those that could not be used


@no_views()
def add_gradients(
    module, samples, loaded, draws: Draws, positions: list, window: range, state: TrainingState, is_last: bool
) -> MicroBatch:
    """Add the gradients of one batch, the samples at `positions`, to those of the step's global batch `window`.

    Args:
        samples: the source of the batch, with a method `encode`.
        loaded: the batch, and the messages of samples that cannot be used.
        draws: the random numbers of all its samples.
        is_last: whether it is this rank's last batch of the step.
    """
    batch, errors = loaded
    errors = {positions[i]: message for i, message in errors.items()}
    good = [position for position in positions if position not in errors]
    draws.keep(good)
    if not good:
        return MicroBatch(paddle.zeros([]), draws, good, errors)
    with dropout_follows(draws):
        with state.precision.autocast():
            encoded = samples.encode(batch)
            # Weighted by the number of samples, which is right for a short last batch and a short last window, too.
            loss = module(encoded, draws) * (len(good) / len(window))
        # Gradients are averaged over ranks, but each rank computes a part of one sum.
        scale = state.precision.loss_scale.value * state.ranks.world_size
        with state.gradients.micro_batch(is_last):
            (loss * scale if scale != 1 else loss).backward()
    return MicroBatch(loss.detach().astype("float32"), draws, good, errors)


def losses_by_file(parts: list, window_size: int, order: SampleOrder, dataset) -> dict:
    """{name of a sample: the loss of its batch, which is the sample's own with a batch size of 1}."""
    return {
        dataset.name(order.row(position)): float(part.loss) * window_size / len(part.positions)
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
