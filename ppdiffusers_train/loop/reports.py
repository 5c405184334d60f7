"""What a run logs about its steps: the progress line, the trackers, and the reason why it cannot continue."""

import contextlib

from ppdiffusers_train.errors import NotFiniteError
from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.state import StepFigures, TrainingState
from ppdiffusers_train.loop.step import describe_failure, losses_by_file
from ppdiffusers_train.reporting.progress import Progress
from ppdiffusers_train.reporting.trackers import open_trackers
from ppdiffusers_train.runtime.flops import peak_tflops


class StepReports:
    """Logs the figures of steps, and ends the run at a step that is NaN or inf.

    Args:
        progress: the progress line on the screen.
        trackers: those that scalars and images are logged to.
    """

    def __init__(self, plan: Plan, state: TrainingState, progress: Progress, trackers):
        self.plan, self.state, self.progress, self.trackers = plan, state, progress, trackers

    def check(self, figures: StepFigures, micro_batches: list) -> None:
        """Log that a step is skipped because its loss or norm is NaN or inf. Called before the step changes anything.

        Raises:
            NotFiniteError: it may not be skipped.
        """
        if not figures.failed:
            return
        plan, count = self.plan, self.state.failed_steps + 1
        found = plan.run.ranks.gather_objects(
            describe_failure(micro_batches, figures, plan.run.ranks, plan.order, plan.dataset)
        )
        together = f"summed over all ranks, the loss is {figures.loss} and the norm of the gradients is {figures.norm}"
        reason, limit = next(filter(None, found), together), plan.run.args.skip_nonfinite
        if count > limit:
            raise NotFiniteError(f"step {figures.step}, {reason}")
        plan.run.log(f"skipped step {figures.step}, {count} of at most {limit}: {reason}")

    def add(self, figures: StepFigures, micro_batches: list) -> None:
        """Log the figures of a step that has been taken."""
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
        if self.plan.run.args.debug_loss:
            self._show_losses_by_file(figures, micro_batches)

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
