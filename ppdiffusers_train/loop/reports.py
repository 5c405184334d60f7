"""What a run logs about its steps: the progress line, the trackers, and the reason why it cannot continue."""

import contextlib
from collections import deque

from ppdiffusers_train.errors import RunError
from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.state import StepFigures, TrainingState
from ppdiffusers_train.loop.step import describe_failure, losses_by_file
from ppdiffusers_train.reporting.progress import Progress
from ppdiffusers_train.reporting.trackers import open_trackers
from ppdiffusers_train.runtime.flops import peak_tflops


class StepReports:
    """Logs the figures of steps. They are kept until the device has computed them.

    Args:
        progress: the progress line on the screen.
        trackers: those that scalars and images are logged to.
    """

    def __init__(self, plan: Plan, state: TrainingState, progress: Progress, trackers):
        self.plan, self.state, self.progress, self.trackers = plan, state, progress, trackers
        self._waiting = deque()  # (figures, micro-batches) of steps that have not been fetched from the device

    def add(self, figures: StepFigures, micro_batches: list) -> None:
        """Add a step's figures, which the device may still be computing."""
        self._waiting.append((figures, micro_batches))

    def fetch(self, keep: int) -> None:
        """Fetch and log all figures except those of the last `keep` steps.

        Raises:
            RunError: a loss or a norm is NaN or inf, and the step may not be skipped.
        """
        while len(self._waiting) > keep:
            figures, micro_batches = self._waiting.popleft()
            figures.fetch(self.plan.run.ranks)
            if figures.failed:
                self._handle_failure(figures, micro_batches)
            self._show(figures)
            if self.plan.run.args.debug_loss:
                self._show_losses_by_file(figures, micro_batches)

    def _handle_failure(self, figures: StepFigures, micro_batches: list) -> None:
        plan, state = self.plan, self.state
        found = plan.run.ranks.gather_objects(
            describe_failure(micro_batches, figures, plan.run.ranks, plan.order, plan.dataset)
        )
        together = f"summed over all ranks, the loss is {figures.loss} and the norm of the gradients is {figures.norm}"
        reason, limit = next(filter(None, found), together), plan.run.args.skip_nonfinite
        if not state.checks_before_update or state.failed_steps > limit:
            raise RunError(f"step {figures.step}, {reason}; the last checkpoint is untouched")
        plan.run.log(f"skipped step {figures.step}, {state.failed_steps} of at most {limit}: {reason}")

    def _show(self, figures: StepFigures) -> None:
        loss, skipped = figures.factor * figures.loss, self.state.skipped_steps
        rate = self.progress.add_step(loss, figures.learning_rate, len(figures.window), skipped)
        scalars = {
            "loss": loss,
            "learning_rate": figures.learning_rate,
            "gradient_norm": figures.factor * figures.norm,
            "samples_per_second": rate,
            "skipped_steps": skipped,
        }
        self.trackers.scalars({f"train/{name}": value for name, value in scalars.items()}, figures.step)

    def _show_losses_by_file(self, figures: StepFigures, micro_batches: list) -> None:
        plan = self.plan
        losses = losses_by_file(micro_batches, len(figures.window), plan.order, plan.dataset)
        found = plan.run.ranks.gather_objects(losses)
        self.trackers.scalars({f"loss_for/{name}": loss for part in found for name, loss in part.items()}, figures.step)


@contextlib.contextmanager
def open_reports(plan: Plan, state: TrainingState):
    """A context with the `StepReports` of a run; ranks other than 0 log nothing."""
    args, ranks = plan.run.args, plan.run.ranks
    # Recomputed operations would be counted twice.
    peak = None if args.gradient_checkpointing else args.peak_tflops or peak_tflops(state.precision.enabled)
    peak = peak and peak * ranks.world_size
    folder, names = plan.run.output_dir / args.logging_dir, args.report_to if ranks.is_main else "none"
    with (
        open_trackers(names, folder, args.tracker_project_name, plan.info["arguments"]) as trackers,
        Progress(state.step, plan.total_steps, visible=ranks.is_main, peak_tflops=peak) as progress,
    ):
        yield StepReports(plan, state, progress, trackers)
