"""Fixtures: tiny pipelines, a folder of photographs, and the real scripts."""

import ppdiffusers_train  # noqa: F401  (before paddle)

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "examples" / "data" / "photos"
DECODER_SCRIPT = ROOT / "examples" / "kandinsky2_2" / "train_text_to_image_decoder.py"


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory):
    """Keep the caches of `datasets` and the hub out of the user's home."""
    import datasets
    import huggingface_hub.constants

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    huggingface_hub.constants.HF_HUB_CACHE = str(tmp_path_factory.mktemp("hub"))
    datasets.disable_progress_bars()
    os.environ.pop("HF_TOKEN", None)


def load_script(path):
    """A script of `examples/` as a module, without running it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def decoder_job():
    return load_script(DECODER_SCRIPT)


@pytest.fixture(scope="session")
def kandinsky(tmp_path_factory):
    """(prior folder, decoder folder) of the tiny Kandinsky 2.2."""
    from ppdiffusers_train.reporting.quiet import quiet_libraries
    from ppdiffusers_train.toy.kandinsky2_2 import build_kandinsky

    quiet_libraries()
    return build_kandinsky(tmp_path_factory.mktemp("kandinsky"), channels=(16, 32))


def copy_photos(folder, count):
    """A folder of the first `count` photographs with their captions."""
    folder.mkdir(parents=True)
    rows = [json.loads(line) for line in (PHOTOS / "metadata.jsonl").read_text().splitlines()][:count]
    for row in rows:
        shutil.copy(PHOTOS / row["file_name"], folder)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 7 photographs: an odd number, so that batches and windows come out short."""
    return copy_photos(tmp_path_factory.mktemp("data") / "photos", 7)


@pytest.fixture
def decoder_flags(kandinsky, photos, tmp_path):
    """Flags of a short decoder run into `tmp_path/out`; later flags win."""
    prior, decoder = kandinsky
    return [
        f"--pretrained_decoder_model_name_or_path={decoder}",
        f"--pretrained_prior_model_name_or_path={prior}",
        f"--train_data_dir={photos}",
        f"--output_dir={tmp_path / 'out'}",
        "--resolution=64",
        "--train_batch_size=2",
        "--max_train_steps=2",
        "--learning_rate=1e-3",
        "--seed=0",
    ]


@pytest.fixture
def train_decoder(decoder_job, decoder_flags, tmp_path):
    """`train_decoder(*flags, out="out")` runs the script's `main` and returns its output folder."""

    def train(*flags, out="out"):
        decoder_job.main([*decoder_flags, f"--output_dir={tmp_path / out}", *map(str, flags)])
        return tmp_path / out

    return train


def scalars(output_dir, tag="train/loss", logging_dir="logs"):
    """The values of a scalar that a run reported to VisualDL, in order of steps, over all its starts."""
    from visualdl import LogReader

    values = {}
    for file in sorted((output_dir / logging_dir / "visualdl").iterdir()):
        reader = LogReader(file_path=str(file))
        if tag in reader.get_tags().get("scalar", []):
            values.update({record.id: record.value for record in reader.get_data("scalar", tag)})
    return [values[step] for step in sorted(values)]


def weights(folder, name="unet"):
    """The weights that a model's `save_pretrained` wrote, as NumPy arrays."""
    from safetensors.numpy import load_file

    return load_file(folder / name / "diffusion_paddle_model.safetensors")
