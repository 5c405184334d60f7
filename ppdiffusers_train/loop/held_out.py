"""The loss of samples that are not trained on: a number that begins to rise where a run begins to over-fit.

It is the mean over the same samples at the same noise and timesteps each time, whatever the seed of the run. Samples
are computed one at a time, and their losses are added in one order: so the number depends on the weights alone, not on
the number of GPUs, of loader threads, or on where a run was resumed. It uses nothing that training uses, and leaves
nothing behind.
"""

import math
from dataclasses import dataclass

import numpy as np

from ppdiffusers_train.data.loader import iterate_batches, to_device
from ppdiffusers_train.data.rows import Rows
from ppdiffusers_train.draws import Draws
from ppdiffusers_train.errors import BadSampleError, UserError
from ppdiffusers_train.loop.bad_samples import known_bad, why_bad
from ppdiffusers_train.module import evaluation
from ppdiffusers_train.reporting.status_line import counted
from ppdiffusers_train.runtime.agreement import digest

SEED = 2**63  # of all draws, which no run has as its own
FEWEST = 50  # losses of which the mean is taken; of fewer samples, each has several, each with other noise
LOSS, LOSS_OF_AVERAGES = "validation/loss", "validation/loss_ema"  # tags


@dataclass(frozen=True)
class HeldOut:
    """The samples that are not trained on, in their order: a sample's position is its place among those that can be
    used.

    Args:
        dataset: the rows.
        rows: numbers of those that can be used.
    """

    dataset: Rows
    rows: np.ndarray
    seed: int = SEED

    @property
    def losses_each(self) -> int:
        """How many losses are computed of each sample."""
        return math.ceil(FEWEST / len(self.rows))

    def digest(self) -> str:
        """A hash of the contents of the images, in their order; of a dry run, which has not read them, of their
        number."""
        contents = self.dataset.facts.digests[self.rows] if self.dataset.facts else repr(len(self.rows)).encode()
        return digest(bytes(contents))

    def row(self, position: int) -> int:
        """The row at a position."""
        return int(self.rows[position])


def held_out_rows(dataset):
    """The `Rows` of a data set that are not trained on, or None. A data set of one's own has none."""
    rows = getattr(dataset, "held_out", None)
    return rows if isinstance(rows, Rows) else None


def held_out_samples(dataset, run):
    """The `HeldOut` samples of a data set, or None; logs how many there are.

    Raises:
        UserError: none of them can be used.
    """
    held_out = held_out_rows(dataset)
    if held_out is None:
        return None
    bad = known_bad(held_out) if held_out.facts else []
    rows = np.setdiff1d(np.arange(len(held_out)), bad)
    example = f"{why_bad(held_out, bad[0])}" if bad else ""
    if not len(rows):
        raise UserError(f"--validation_loss_steps: no sample can be used, for example {example}")
    if dataset.facts and held_out.facts:
        both = np.flatnonzero(np.isin(held_out.facts.digests[rows], dataset.facts.digests))
        if len(both):
            name = held_out.name(int(rows[both[0]]))
            run.log(f"validation loss: {counted(len(both), 'image')} of these are also trained on, for example {name}")
    found = HeldOut(held_out, rows)
    unused = f"; not used: {counted(len(bad), 'sample')}, for example {example}" if bad else ""
    losses = len(rows) * found.losses_each
    run.log(f"validation loss: the mean of {losses} losses of {counted(len(rows), 'sample')}{unused}")
    if run.saved.get("held_out", found.digest()) not in (None, found.digest()):
        run.log(
            "validation loss: these are other samples than the checkpoint's, some of which may have been trained on; "
            "the numbers before and after this step cannot be compared"
        )
    return found


class HeldOutLoss:
    """Computes and reports the loss.

    Args:
        samples: the source of the samples at the positions of `plan.held_out`, with a method `encode`.
    """

    def __init__(self, plan, samples):
        self.plan, self.samples = plan, samples

    def report(self, state, trackers) -> None:
        """Report the loss with the current weights and, if there are any, with their averages. For all ranks."""
        with state.evaluation_weights():
            values = {LOSS: self._mean(state)}
        if state.ema:
            with state.ema.applied():
                values[LOSS_OF_AVERAGES] = self._mean(state)
        trackers.scalars(values, state.step)
        averages = f", with the averages {values[LOSS_OF_AVERAGES]:.6g}" if state.ema else ""
        self.plan.run.log(f"step {state.step}: validation loss {values[LOSS]:.6g}{averages}")

    def _mean(self, state) -> float:
        ranks, losses = self.plan.run.ranks, []
        own = range(len(self.plan.held_out.rows))[ranks.rank :: ranks.world_size]
        workers = self.plan.run.args.dataloader_num_workers
        batches = iterate_batches(self.samples, ([position] for position in own), workers)
        with evaluation(self.plan.module), state.precision.autocast():
            for position, (batch, errors) in zip(own, batches):
                if errors:
                    raise BadSampleError(f"--validation_loss_steps: {errors[0]}")
                losses += self._losses(position, self.samples.encode(batch))
        parts = ranks.gather_objects([float(loss) for loss in losses], "the others to compute the validation loss")
        losses = [loss for part in parts for loss in part]
        return math.fsum(losses) / len(losses)

    def _losses(self, position: int, encoded: dict):
        """Yield the losses of one sample."""
        held_out = self.plan.held_out
        for number in range(held_out.losses_each):
            draws = Draws(SEED, [position + number * len(held_out.rows)], to_device)
            yield self.plan.module(encoded, draws)
