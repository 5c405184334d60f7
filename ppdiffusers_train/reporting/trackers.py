"""Trackers of a run's scalars and images: VisualDL, TensorBoard, Weights & Biases.

A tracker that fails does not end the run: one line reports the error, and the run continues without that tracker.
"""

import contextlib
import hashlib
import importlib.util
import re
from itertools import count
from pathlib import Path

import numpy as np

from ppdiffusers_train.errors import UserError, WriteError, one_line, writing
from ppdiffusers_train.reporting.event_files import PREFIX, EventFiles
from ppdiffusers_train.reporting.status_line import print_line

# The module that each tracker needs, and the package that has it.
PACKAGES = {"visualdl": "visualdl", "tensorboard": "tensorboardX", "wandb": "wandb"}


class VisualDLTracker:
    """Writes for `visualdl --logdir`."""

    def __init__(self, directory, files, project, config):
        from visualdl import LogWriter
        from visualdl.io.bfile import default_file_factory

        default_file_factory.register_filesystem(PREFIX, files)
        # VisualDL shows only the newest file of a folder, so each start of a run gets its own folder.
        folders = (directory / "visualdl" / f"start-{number}" for number in count(1))
        self.writer = LogWriter(logdir=files.path_of(next(folder for folder in folders if not folder.exists())))
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

    def __init__(self, directory, files, project, config):
        from tensorboardX import SummaryWriter
        from tensorboardX.record_writer import register_writer_factory

        register_writer_factory(PREFIX, files)
        self.writer = SummaryWriter(files.path_of(directory / "tensorboard"))
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

    def __init__(self, directory, files, project, config):
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
    """All trackers of a run as one; a context manager that closes them.

    Args:
        opened: {name: (tracker, its `EventFiles`)}.
        directory: where they write.
    """

    def __init__(self, opened: dict, directory):
        self.opened, self.directory = opened, directory

    def scalars(self, values: dict, step: int) -> None:
        """Report `{name: value}` of a step."""
        tags = {clean_tag(name): value for name, value in values.items()}
        self._each(lambda tracker: tracker.scalars(tags, step))

    def image(self, name: str, image, step: int) -> None:
        """Report a PIL image."""
        self._each(lambda tracker: tracker.image(clean_tag(name), image, step))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._each(lambda tracker: tracker.close())

    def _each(self, act) -> None:
        for name, (tracker, files) in list(self.opened.items()):
            try:
                with writing(f"--report_to {name}: figures", self.directory, "continuing without them"):
                    act(tracker)
                    files.check()
            except Exception as error:  # the libraries have errors of their own
                is_said = isinstance(error, WriteError)
                print_line(one_line(str(error) if is_said else f"--report_to {name}: {error!r}; continuing without it"))
                del self.opened[name]
                with contextlib.suppress(Exception):
                    tracker.close()


def clean_tag(name: str) -> str:
    """A name as a tag that all trackers take: letters and digits of any script and `_`, `-`, `.` and `/`.

    VisualDL refuses `%`; TensorBoard replaces what it does not take, so that two names may become one. Here a name that
    had to be changed ends with a hash of it.
    """
    cleaned = re.sub(r"[^-/.\w]+", "_", name)
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return name if cleaned == name else f"{cleaned.rstrip('_')}-{digest}"


def open_trackers(report_to: str, directory, project: str, config: dict) -> Trackers:
    """The trackers of a run, writing below `directory`. `config` holds plain values and no secrets."""
    opened = {}
    simple = {
        name: value if isinstance(value, (int, float)) else one_line(str(value)) for name, value in config.items()
    }
    for name in tracker_names(report_to):
        with writing("--logging_dir: logs", directory):
            directory.mkdir(parents=True, exist_ok=True)
            files = EventFiles()
            opened[name] = TRACKERS[name](directory, files, project, simple), files
            files.check()
    return Trackers(opened, directory)


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
