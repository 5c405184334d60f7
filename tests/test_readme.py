"""Runs the commands of the READMEs on tiny models; an unknown command is an error."""

import ppdiffusers_train  # noqa: F401
from ppdiffusers_train import cli

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from ppdiffusers import (
    KandinskyV22CombinedPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from tests.conftest import ROOT, copy_photos
from tests.distributed.launching import environment, launch_command

pytestmark = pytest.mark.once  # what it runs has tests of its own

READMES = ("README.md", "README_zh.md")
GUIDES = (
    *READMES,
    "examples/README.md",
    "examples/README_zh.md",
    "ppdiffusers_train/toy/README.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))),
)
SMALL_PICTURE = {"height": 64, "width": 64, "num_inference_steps": 2}
SMALL_PICTURES = {
    KandinskyV22CombinedPipeline: {**SMALL_PICTURE, "prior_num_inference_steps": 2},
    StableDiffusionPipeline: SMALL_PICTURE,
    StableDiffusionXLPipeline: SMALL_PICTURE,
    StableDiffusion3Pipeline: SMALL_PICTURE,
}
HUB = "kandinsky-community/kandinsky-2-2-{}"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
SD = "runwayml/stable-diffusion-v1-5"
CHECKPOINT = "checkpoint-15000"  # the last one of the README's run; here a run has two steps


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def script_name(job):
    return f"train_text_to_image_{job}.py"


def code_blocks(name):
    """[(language, code)] of the fenced blocks of a README, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", read(name), re.M | re.S)


def commands(code):
    """The commands of a bash block, continued lines joined, as lists of words."""
    return [shlex.split(line) for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def test_both_languages_show_the_same_code():
    english, chinese = map(code_blocks, READMES)
    assert len(english) > 8 and english == chinese


@pytest.mark.parametrize("name", GUIDES)
def test_links_and_named_tests_lead_to_files(name):
    text, folder = read(name), (ROOT / name).parent
    links = [link.strip("<>") for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    titles = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)}
    assert {link[1:] for link in links if link.startswith("#")} <= titles
    links = [link for link in links if not link.startswith("#")]
    missing = [link for link in links if not (folder / link).exists()]
    missing += [path for path in re.findall(r"`(tests/[^`]+)`", text) if not (ROOT / path).exists()]
    assert not missing


def test_the_architecture_names_files_and_functions_that_exist():
    text = read("docs/architecture.md")
    find = {
        name: next((p for p in (ROOT / name, ROOT / "ppdiffusers_train" / name) if p.is_file()), None)
        for name in re.findall(r"`([\w/]+\.py)`", text)
    }
    assert len(find) > 30 and None not in find.values(), [name for name, path in find.items() if not path]
    rows = [row for row in text.split("## Four questions")[1].split("\n## ")[0].splitlines() if "`" in row]
    assert len(rows) == 4
    for row in rows:
        code = "".join(find[name].read_text(encoding="utf-8") for name in re.findall(r"`([\w/]+\.py)`", row))
        names = re.findall(r"`(\w+)`", row)
        assert names and not [name for name in names if not re.search(rf"^ *(def|class) {name}\b", code, re.M)], row


def check_make(words):
    """`make TARGET`: the Makefile has it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for target in words[1:]:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def check_pip(words):
    """`pip install …`: the files and extras that it names exist."""
    assert words[1] == "install"
    arguments = iter(words[2:])
    for word in arguments:
        if word in ("-r", "-c"):
            assert (ROOT / next(arguments)).is_file(), words
        elif word == "-e":
            extra = re.fullmatch(r"\.(?:\[(\w+)\])?", next(arguments))[1]
            assert (ROOT / "setup.py").is_file() and (extra is None or f'"{extra}": ' in read("setup.py")), words
        else:
            assert word == "--no-deps", words


def check_json_lines(code, photos):
    """The README's metadata is that of photographs which are there."""
    known = (photos / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line) in map(json.loads, known) for line in code.splitlines())


def launch_two(words, last):
    """The command for several GPUs, with two CPU processes instead."""
    assert words[:2] == ["--gpus", "0,1,2,3"]
    script = ROOT / "examples" / "kandinsky2_2" / words[2]
    command = launch_command(script, *words[3:], *last, "--max_train_steps=2", form=("--gpus", "0,1"))
    more = {"CUDA_VISIBLE_DEVICES": "0,1", "PADDLE_DISTRI_BACKEND": "gloo"}
    done = subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "wrote the result to kandi2-" in done.stdout, done.stdout[-3000:] + done.stderr


def draw_small(monkeypatch):
    """Make the pipelines generate small images in few steps, whatever their arguments."""
    for pipeline, small in SMALL_PICTURES.items():
        call = pipeline.__call__
        monkeypatch.setattr(
            pipeline,
            "__call__",
            lambda self, *prompt, call=call, small=small, **options: call(self, *prompt, **{**options, **small}),
        )


def test_a_reader_can_type_all_of_it_in_this_order(
    kandinsky_jobs, kandinsky, sdxl_jobs, sdxl, sd3_jobs, sd3, lcm_jobs, sd, tmp_path, monkeypatch, capsys
):
    """The commands start in a copy of the repository's folders, with two steps each, and four when resumed."""
    photos = copy_photos(tmp_path / "examples" / "data" / "photos", 7)
    for folder in ("kandinsky2_2", "sdxl", "sd3", "lcm"):
        (tmp_path / "examples" / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    draw_small(monkeypatch)
    prior, decoder = kandinsky
    small = ["--resolution=64", "--checkpointing_steps=2", "--report_to=none"]
    models = [f"--pretrained_prior_model_name_or_path={prior}", f"--pretrained_decoder_model_name_or_path={decoder}"]
    jobs = {script_name(name): (job, [*models, *small]) for name, job in kandinsky_jobs.items()}
    models = [f"--pretrained_model_name_or_path={sdxl}", f"--pretrained_vae_model_name_or_path={sdxl}"]
    jobs.update({script_name(name): (job, [*models, *small]) for name, job in sdxl_jobs.items()})
    models = [f"--pretrained_model_name_or_path={sd3}"]
    jobs.update({script_name(name): (job, [*models, *small]) for name, job in sd3_jobs.items()})
    for name, job in lcm_jobs.items():
        teacher = [f"--pretrained_teacher_model={sdxl if 'sdxl' in name else sd}"]
        vae = [f"--pretrained_vae_model_name_or_path={sdxl}"] if "sdxl" in name else []
        jobs[f"train_lcm_distill_{name}_wds.py"] = (job, [*teacher, *vae, *small])

    def train(words):
        if words[2:4] == ["-m", "paddle.distributed.launch"]:
            return launch_two(words[4:], jobs[words[6]][1])
        assert words[:2] == ["python", "-u"] and words[2] in jobs, f"not a command that this test knows: {words}"
        (job, last), flags = jobs[words[2]], words[3:]
        resumes = "--resume_from_checkpoint" in flags
        if "--validation_prompt" in flags or "--validation_prompts" in flags:
            flags = [*flags, "--num_validation_images=1", "--validation_inference_steps=2", "--validation_steps=2"]
        job.main([*flags, *last, f"--max_train_steps={4 if resumes else 2}"])
        said = capsys.readouterr().out
        if "--dry_run" in flags:
            assert "a dry run, nothing is loaded" in said and "total, training" in said
            return
        assert re.search("wrote the result to (kandi2|sdxl|sd3|lcm|my)-", said) and resumes == ("resumed from" in said)

    def change_folder(words):
        here = (Path.cwd() / words[1]).resolve().relative_to(tmp_path)
        assert (ROOT / here).is_dir()
        os.chdir(words[1])  # `monkeypatch.chdir` above goes back at the end

    def run_tool(words):
        if words[1] == "preview":
            words = [*words[:2], str(ROOT / "examples" / "lcm" / words[2]), *words[3:], *jobs[words[2]][1]]
        cli.main(words[1:])

    kinds = {
        "make": check_make,
        "pip": check_pip,
        "cd": change_folder,
        "python": train,
        "ppdiffusers-train": run_tool,
    }
    local = {
        HUB.format("prior"): prior,
        HUB.format("decoder"): decoder,
        SDXL: sdxl,
        SD3: sd3,
        SD: sd,
        CHECKPOINT: "checkpoint-2",
    }
    for language, code in code_blocks("README.md"):
        if language == "bash":
            for words in commands(code):
                assert words[0] in kinds, f"not a command that this test knows: {words}"
                kinds[words[0]](words)
        elif language == "python":
            for name, here in local.items():
                code = code.replace(name, str(here))
            exec(compile(code, "README.md", "exec"), {})
        elif language == "yaml":
            with open("decoder.yaml", "w", encoding="utf-8") as file:
                file.write(code)
        elif language == "json":
            check_json_lines(code, photos)
        else:
            pytest.fail(f"a block in {language or 'no language'} that this test does not know:\n{code}")

    written = {path.name for path in (tmp_path / "examples" / "kandinsky2_2").iterdir()}
    assert written >= {"kandi2-decoder", "kandi2-decoder-ema", "kandi2-decoder-lora-torch"}
    assert written >= {"robot-pokemon.png", "robot-pokemon-15000.png", "robot-pokemon-lora.png"}
    written = {path.name for path in (tmp_path / "examples" / "sdxl").iterdir()}
    assert written >= {"sdxl.png", "my-lora", "my-lora.png", "my-lora.safetensors"}
    written = {path.name for path in (tmp_path / "examples" / "sd3").iterdir()}
    assert written >= {"sd3.png", "sd3-lora.png", "sd3-lora-torch"}
    lcm = tmp_path / "examples" / "lcm"
    assert {"sushi.png", "lcm-lora.png", "preview.png", "photo-shards"} <= {path.name for path in lcm.iterdir()}
    ema = tmp_path / "examples" / "kandinsky2_2" / "kandi2-decoder-ema"
    assert (ema / "validation" / "step-2.png").is_file() and (ema / "checkpoint-2" / "ema" / "unet").is_dir()
