"""Trackers of a run's scalars and images: VisualDL, TensorBoard, Weights & Biases."""

import importlib.util
from itertools import count
from pathlib import Path

import numpy as np

from ppdiffusers_train.errors import UserError

# The module that each tracker needs, and the package that has it.
PACKAGES = {"visualdl": "visualdl", "tensorboard": "tensorboardX", "wandb": "wandb"}


class VisualDLTracker:
    """Writes for `visualdl --logdir`."""

    def __init__(self, directory, project, config):
        from visualdl import LogWriter

        # VisualDL shows only the newest file of a folder, so each start of a run gets its own folder.
        folders = (directory / "visualdl" / f"start-{number}" for number in count(1))
        self.writer = LogWriter(logdir=str(next(folder for folder in folders if not folder.exists())))
        self.writer.add_hparams(hparams_dict=config, metrics_list=["train/loss"])

    def scalars(self, values, step):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, name, image, step):
        self.writer.add_image(name, np.asarray(image), step)

    def close(self):
        self.writer.close()


class TensorBoardTracker:
    """Writes for `tensorboard --logdir`."""

    def __init__(self, directory, project, config):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"))
        self.writer.add_hparams(config, {}, name="hparams")

    def scalars(self, values, step):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, name, image, step):
        self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self):
        self.writer.close()


class WandbTracker:
    """Writes to Weights & Biases, or with WANDB_MODE=offline into the folder."""

    def __init__(self, directory, project, config):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(project=project, dir=str(directory), config=config)

    def scalars(self, values, step):
        self.run.log(values, step=step)

    def image(self, name, image, step):
        self.run.log({name: self.wandb.Image(image)}, step=step)

    def close(self):
        self.run.finish()


TRACKERS = {"visualdl": VisualDLTracker, "tensorboard": TensorBoardTracker, "wandb": WandbTracker}


def tracker_names(report_to: str) -> list:
    """The names of the trackers that `--report_to` selects.

    Raises:
        UserError: the selected one is not installed.
    """
    installed = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]
    if report_to == "none":
        return []
    if report_to == "all":
        return installed
    if report_to not in installed:
        raise UserError(f"--report_to {report_to}: not installed; expected `pip install {PACKAGES[report_to]}` first")
    return [report_to]


class Trackers:
    """All trackers of a run as one; a context manager that closes them."""

    def __init__(self, trackers: list):
        self.trackers = trackers

    def scalars(self, values: dict, step: int) -> None:
        """Report `{name: value}` of a step."""
        for tracker in self.trackers:
            tracker.scalars(values, step)

    def image(self, name: str, image, step: int) -> None:
        """Report a PIL image."""
        for tracker in self.trackers:
            tracker.image(name, image, step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for tracker in self.trackers:
            tracker.close()


def open_trackers(report_to: str, directory, project: str, config: dict) -> Trackers:
    """The trackers of a run, writing below `directory`. `config` holds plain values and no secrets."""
    names = tracker_names(report_to)
    if names:
        directory.mkdir(parents=True, exist_ok=True)
    simple = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in config.items()}
    return Trackers([TRACKERS[name](directory, project, simple) for name in names])


def read_scalars(logs, tag: str) -> list:
    """The values of a scalar that a run reported to VisualDL below the folder `logs`, in order of steps.

    Of a step that was repeated after a resume, the last value counts.
    """
    from visualdl import LogReader

    values, files = {}, Path(logs, "visualdl").glob("start-*/*")
    for file in sorted(files, key=lambda file: int(file.parent.name.removeprefix("start-"))):
        reader = LogReader(file_path=str(file))
        if tag in reader.get_tags().get("scalar", []):
            values.update({record.id: record.value for record in reader.get_data("scalar", tag)})
    return [values[step] for step in sorted(values)]
