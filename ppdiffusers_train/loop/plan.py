"""What a run is going to do, known once data and models are loaded."""

from dataclasses import dataclass

from ppdiffusers_train.data.order import CLASS, SampleOrder, micro_batches
from ppdiffusers_train.loop.prompts import wants_images
from ppdiffusers_train.loop.run import Run


@dataclass(frozen=True)
class Plan:
    """What is trained, on which data, in which order and for how long.

    Args:
        run: the resolved flags and the ranks.
        module: the `DiffusionTrainingModule`.
        dataset: the rows of data.
        order: which row comes at which position.
        held_out: the `HeldOut` samples whose loss is reported, or None.
        total_steps, steps_per_epoch: numbers of optimizer steps.
        info: identity, flags and versions, which are written into the run's folder and its checkpoints.
    """

    run: Run
    module: object
    dataset: object
    order: SampleOrder
    total_steps: int
    steps_per_epoch: int
    info: dict
    held_out: object = None

    def steps_from(self, state):
        """Yield (window, [positions of each of this rank's batches]) of the remaining steps."""
        ranks, batch_size = self.run.ranks, self.run.args.train_batch_size
        windows = self.order.windows(state.position, self.run.samples_per_step)
        for _, window in zip(range(state.step, self.total_steps), windows):
            parts = [
                micro_batches(positions, ranks.rank, ranks.world_size, batch_size, self.order.bucket)
                for positions in (window, self.order.class_window(window))
            ]
            yield window, [*parts[0], *parts[1]]

    def loss_weight(self, positions) -> float:
        """The factor of the loss of a batch, whose samples are all of the data or all class images."""
        return self.run.args.prior_loss_weight if positions[0] >= CLASS else 1.0

    def checkpoint_is_due(self, state) -> bool:
        """Whether a checkpoint is to be written after the last step."""
        is_last = state.step == self.total_steps and self.run.args.final_checkpoint
        return is_last or state.step % self.run.args.checkpointing_steps == 0

    def loss_is_due(self, state) -> bool:
        """Whether the loss of samples that are not trained on is to be reported now."""
        if self.held_out is None:
            return False
        return state.step % self.run.args.validation_loss_steps == 0 or state.step == self.total_steps

    def validation_is_due(self, state) -> bool:
        """Whether validation images are to be generated before the next step. The last ones follow the result."""
        args = self.run.args
        if not wants_images(args) or state.step == self.total_steps:
            return False
        if args.validation_steps:
            return state.step % args.validation_steps == 0
        return state.position % (self.order.size * args.validation_epochs) == 0
