"""The parts of one optimizer step: each batch's gradients, and what to say of those that are NaN or infinite."""

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

    loss: object  # its part of the window's mean loss, on the device
    draws: Draws
    positions: list  # of its samples
    errors: dict  # {position: message} of those that could not be used


@no_views()
def add_gradients(
    module, samples, loaded, draws: Draws, positions: list, window: range, state: TrainingState, is_last: bool
) -> MicroBatch:
    """Add the gradients of one batch, the samples at `positions`, to those of its step's `window`.

    Args:
        samples: where the batch comes from, with a method `encode`.
        loaded: the batch, and the messages of samples that cannot be used.
        draws: of all its samples.
        is_last: whether it is this rank's last batch of the window.
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
            # By its share of the samples: right for a short last batch, and for a short last window.
            loss = module(encoded, draws) * (len(good) / len(window))
        # Gradients are averaged over ranks, but each rank has its part of one sum.
        scale = state.precision.loss_scale.value * state.ranks.world_size
        with state.gradients.micro_batch(is_last):
            (loss * scale if scale != 1 else loss).backward()
    return MicroBatch(loss.detach().astype("float32"), draws, good, errors)


def losses_by_file(parts: list, window_size: int, order: SampleOrder, dataset) -> dict:
    """{name of a sample: the loss of its batch, which is its own where it was alone}."""
    return {
        dataset.name(order.row(position)): float(part.loss) * window_size / len(part.positions)
        for part in parts
        for position in part.positions
    }


def seed_layers(seed: int, step: int, rank: int) -> None:
    """Seed Paddle's own generator, from which a module of one's own may draw, as a function of (seed, step, rank)."""
    paddle.seed(int(generator(seed, step, f"layers of rank {rank}").integers(2**31)))


def set_training_mode(module) -> None:
    """Put every model that is trained into training mode; the frozen ones stay in evaluation mode."""
    learning = trained_models(module)
    follow_samples(learning)
    for model in module.children():
        if model in learning:
            model.train()
        else:
            model.eval()


def describe_failure(parts: list, figures: StepFigures, ranks: Ranks, order: SampleOrder, dataset) -> str:
    """Which of this rank's samples and draws made a step NaN or infinite; empty where none did.

    The norm is that of all ranks together, so it tells nothing: each looks at what it had before it got the others'.
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
