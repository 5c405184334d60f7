"""run.sh and the README of each family of scripts."""

import ppdiffusers_train  # noqa: F401

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, load_script
from tests.shell_scripts import python_command

pytestmark = pytest.mark.once  # the scripts have tests of their own

FAMILIES = sorted(file.parent for file in (ROOT / "examples").glob("*/run.sh"))
SMALL = ["--resolution=64", "--max_train_steps=2", "--train_batch_size=2", "--report_to=none", "--seed=0"]
SMALL += ["--num_validation_images=1", "--validation_inference_steps=2", "--validation_steps=2"]


def command(family, *flags, **variables):
    """The beginning of the command that run.sh ends with, as far as the script, the script's flags, and variables."""
    words, exported = python_command(family, *flags, **variables)
    return words[:3], words[3:], exported


every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@every_family
def test_run_sh_trains_with_the_variables_that_are_set(
    family, kandinsky, sdxl, sd3, sd, qwen, photos, tmp_path, capsys
):
    model = {"kandinsky2_2": kandinsky[1], "sdxl": sdxl, "sd3": sd3, "qwen_image": qwen}.get(family.name, sd)
    output = tmp_path / "my result"
    variables = {"MODEL_NAME": model, "PRIOR_NAME": kandinsky[0], "DATASET_NAME": photos, "OUTPUT_DIR": output}
    (*python, script), flags, exported = command(family, *SMALL, **variables)
    assert python == ["python", "-u"] and exported == {name: str(value) for name, value in variables.items()}
    load_script(family / script).main(flags)
    assert f"wrote the result to {output}" in capsys.readouterr().out
    assert any(output.glob("**/*.safetensors")) or any(output.glob("**/*.pdparams"))


@every_family
def test_run_sh_has_defaults_and_takes_a_dataset_of_the_hub(family):
    (*_, script), flags, exported = command(family)
    parser = load_script(family / script).build_parser()
    args, model, data = parser.parse_args(flags), exported["MODEL_NAME"], exported["DATASET_NAME"]
    assert re.fullmatch(r"[\w-]+/[\w.-]+", model) and model in flags and args.output_dir == exported["OUTPUT_DIR"]
    assert args.train_data_dir == data and args.dataset_name is None
    assert (family / data).resolve() == ROOT / "examples" / "data" / "photos"
    args = parser.parse_args(command(family, DATASET_NAME="owner/pictures")[1])
    assert args.dataset_name == "owner/pictures" and args.train_data_dir is None


@every_family
def test_run_sh_is_clean(family):
    checker = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    done = subprocess.run([checker, "run.sh"], cwd=family, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_family_has_a_guide_in_both_languages_that_names_its_scripts():
    assert {family.name for family in FAMILIES} == {script.parent.name for script in ROOT.glob("examples/*/train_*.py")}
    for family in FAMILIES:
        scripts = {script.name for script in family.glob("train_*.py")}
        english, chinese = ((family / name).read_text("utf-8") for name in ("README.md", "README_zh.md"))
        for text in (english, chinese):
            assert set(re.findall(r"^\| `([^`]+)`", text, re.M)) == scripts and len(text.splitlines()) < 25
            assert re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) == [
                ("bash", f"cd examples/{family.name}\nbash run.sh\n")
            ]
        pages = [set(re.findall(r"docs/(?:en|zh)/([\w-]+\.md)\)", text)) for text in (english, chinese)]
        assert pages[0] == pages[1] and not re.search("docs/zh", english) and not re.search("docs/en", chinese)
