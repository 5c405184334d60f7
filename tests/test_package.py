"""The archive of the sources and the wheel: what they hold, and that the wheel works in a folder of its own."""

import ppdiffusers_train
from ppdiffusers_train import cli

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = [
    pytest.mark.once,  # setuptools, and scripts that have tests of their own
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone, which knows the project's files"),
]

NOT_PACKED = {".ci/run", ".gitignore"}
# What work in a checkout leaves in it, and no archive may hold.
LEFT_BEHIND = (
    "examples/.ipynb_checkpoints/README-checkpoint.md",
    "examples/.ipynb_checkpoints/quickstart-checkpoint.ipynb",
    "examples/sdxl/__pycache__/train_text_to_image_sdxl.cpython-311.pyc",
    "examples/sdxl/my-lora/README.md",
    "examples/sdxl/my-lora/paddle_lora_weights.safetensors",
    "ppdiffusers_train/data/__pycache__/order.cpython-311.pyc",
    "tests/device/build/libdevice.so",
)
LARGEST = 16e6  # bytes of the wheel; the toys' weights are 13 MB of it
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def run(command, folder, **more):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)), cwd=folder, env={**environment, **more}, capture_output=True, text=True, timeout=600
    )


def succeed(command, folder, **more):
    done = run(command, folder, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(hook, source, output):
    """Build an archive as `pip` and `build` do. Returns its file."""
    output.mkdir()
    succeed([sys.executable, "-c", BUILD, hook, output], source)
    return next(output.iterdir())


def pip(*words):
    return [sys.executable, "-m", "pip", *words, "--no-index", "--no-deps", "-q", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def project():
    """The names of the project's files."""
    listed = succeed(["git", "-c", "safe.directory=*", "ls-files", "-z"], ROOT)
    return {name for name in listed.split("\0") if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def examples(project):
    """Those of examples/, relative to it."""
    return {name.removeprefix("examples/") for name in project if name.startswith("examples/")}


@pytest.fixture(scope="module")
def checkout(project, tmp_path_factory):
    """A copy of the project, with what work leaves behind."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in project:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in LEFT_BEHIND:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left behind")
    return folder


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    return build("build_sdist", checkout, tmp_path_factory.mktemp("archives") / "sdist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    succeed([*pip("wheel", "--no-build-isolation"), "-w", folder, sdist], folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder that the wheel is installed into."""
    folder = tmp_path_factory.mktemp("installed") / "packages"
    succeed([*pip("install"), "--target", folder, wheel], folder.parent)
    return folder


@pytest.fixture
def elsewhere(installed, tmp_path):
    """`elsewhere(*command)` runs a command in a folder that is not the project's, with the installed package first."""
    path = os.pathsep.join([str(installed / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])

    def in_folder(*command, folder=tmp_path, **more):
        return succeed(command, folder, PYTHONPATH=str(installed), PATH=path, HF_HUB_OFFLINE="1", **more)

    return in_folder


def test_the_sources_hold_the_whole_project_and_nothing_that_was_left_behind(project, sdist):
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    written = {name for name in packed if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert packed - written == project - NOT_PACKED


def test_the_wheel_holds_package_toys_and_examples_alone(project, examples, wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    ours = {name for name in project if name.startswith("ppdiffusers_train/") and not name.endswith(".md")}
    assert packed == ours | {f"ppdiffusers_train/examples/{name}" for name in examples}
    assert wheel.stat().st_size < LARGEST


def test_the_version_stands_in_one_place_and_leads_the_changelog(wheel):
    version = ppdiffusers_train.__version__
    assert wheel.name == f"ppdiffusers_train-{version}-py3-none-any.whl"
    entries = re.findall(r"^## \[(.+)\] - (\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert entries[0][0] == version and entries == sorted(entries, reverse=True)


def test_an_editable_installation_reads_the_examples_where_they_are(checkout, tmp_path):
    with zipfile.ZipFile(build("build_editable", checkout, tmp_path / "editable")) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        redirection = "".join(archive.read(name).decode() for name in names)
    assert str(checkout / "ppdiffusers_train") in redirection and not any("examples" in name for name in names)


TOYS = """
import ppdiffusers_train
from ppdiffusers_train.toy.demo.demo import what_next
from ppdiffusers_train.toy.demo.jobs import JOBS
from ppdiffusers_train.toy.demo.running import EXAMPLES, write_pretrained
print(ppdiffusers_train.__file__)
assert all((EXAMPLES / job.script).is_file() for job in JOBS.values())
write_pretrained(JOBS["decoder-lora"], "models")
print(what_next())
"""


def test_the_installed_package_trains_its_toys_with_copies_of_its_scripts(installed, elsewhere, tmp_path):
    said = elsewhere("python", "-c", TOYS).splitlines()
    assert Path(said[0]).is_relative_to(installed) and "  ppdiffusers-train examples examples" in said
    assert "examples" in elsewhere("ppdiffusers-train", "--help")
    assert elsewhere("ppdiffusers-train", "--version") == f"ppdiffusers-train {ppdiffusers_train.__version__}\n"
    assert "16 training scripts" in elsewhere("ppdiffusers-train", "examples", "mine")
    family, models = tmp_path / "mine" / "kandinsky2_2", tmp_path / "models"
    assert "--lora_rank" in elsewhere("python", "train_text_to_image_decoder_lora.py", "--help", folder=family)
    variables = {"MODEL_NAME": models / "decoder", "PRIOR_NAME": models / "prior", "OUTPUT_DIR": "my-lora"}
    small = ("--max_train_steps=2", "--resolution=32", "--num_validation_images=1", "--validation_inference_steps=2")
    said = elsewhere("bash", "run.sh", *small, folder=family, **{name: str(value) for name, value in variables.items()})
    assert "wrote the result to my-lora" in said
    assert (family / "my-lora" / "paddle_lora_weights.safetensors").is_file()


def test_a_checkout_copies_the_same_files(examples, tmp_path, capsys):
    cli.main(["examples", str(tmp_path / "mine" / "scripts")])
    folder = tmp_path / "mine" / "scripts"
    copied = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert copied == {name: (ROOT / "examples" / name).read_bytes() for name in examples}
    assert capsys.readouterr().out.startswith(f"{folder}: 16 training scripts")


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for target, reason in ((tmp_path, "is not empty"), (tmp_path / "notes.txt", "File exists")):
        with pytest.raises(SystemExit) as end:
            cli.main(["examples", str(target)])
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1 and said.find(f"{str(target)!r}") < said.find(reason)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
