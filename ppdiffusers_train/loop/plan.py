"""What a run is going to do, once its data and models are there."""

from dataclasses import dataclass

from ppdiffusers_train.data.order import SampleOrder, micro_batches
from ppdiffusers_train.loop.run import Run


@dataclass(frozen=True)
class Plan:
    """What is trained on what, in which order and for how long.

    Args:
        run: its flags and ranks.
        module: the `DiffusionTrainingModule`.
        dataset: the rows.
        order: which of them comes when.
        total_steps, steps_per_epoch: optimizer steps.
        info: what is written about the run into its folder and its checkpoints.
        remarks: lines about flags without effect.
    """

    run: Run
    module: object
    dataset: object
    order: SampleOrder
    total_steps: int
    steps_per_epoch: int
    info: dict
    remarks: list

    def steps_from(self, state) -> list:
        """[(window, [positions of each of this rank's batches])] of the steps that are still to be taken."""
        ranks, batch_size = self.run.ranks, self.run.args.train_batch_size
        windows = self.order.windows(state.position, self.run.samples_per_step)
        return [
            (window, micro_batches(window, ranks.rank, ranks.world_size, batch_size, self.order.bucket))
            for _, window in zip(range(state.step, self.total_steps), windows)
        ]

    def checkpoint_is_due(self, state) -> bool:
        """Whether a checkpoint is to be written after the step that was taken last."""
        return state.step % self.run.args.checkpointing_steps == 0

    def validation_is_due(self, state) -> bool:
        """Whether pictures are to be drawn after the step that was taken last."""
        args = self.run.args
        if not args.validation_prompts:
            return False
        if state.step == self.total_steps:
            return True
        if args.validation_steps:
            return state.step % args.validation_steps == 0
        return state.position % (len(self.dataset) * args.validation_epochs) == 0
