"""Does what a page says, from top to bottom, in a copy of the repository's folders, with tiny models and two steps.

Published models are replaced by local ones, long runs by short ones; flags, files and folders stay as they stand on the
page. A command, flag or language that is not known here is an error.
"""

import ppdiffusers_train
from ppdiffusers_train import cli

import contextlib
import functools
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import ppdiffusers

from tests.conftest import PHOTOS, ROOT, copy_photos, load_script
from tests.distributed.launching import environment
from tests.docs.pages import code_blocks, commands, inline_code, is_for_torch, read, words_of
from tests.shell_scripts import python_command

# How runs on several GPUs are started. Pages in LAUNCHED start two ranks on this CPU; elsewhere the words before the
# script are compared with these, and the script's `main` runs in this process.
LAUNCHED = ("docs/en/several-gpus.md", "docs/en/sdxl-lora.md")
LAUNCHERS = (
    ["python", "-u", "-m", "paddle.distributed.launch", "--gpus"],
    ["ppdiffusers-train", "launch", "--gpus"],
)
RANKS = {"--gpus": "0,1", "--nproc_per_node": "2", "--sharding_degree": "2"}

SMALL = {"height": 64, "width": 64, "num_inference_steps": 2}
SMALL_PICTURES = {
    "KandinskyV22CombinedPipeline": {**SMALL, "prior_num_inference_steps": 2},
    "KandinskyV22PriorPipeline": {"num_inference_steps": 2},
    "KandinskyV22Pipeline": SMALL,
    "StableDiffusionPipeline": SMALL,
    "StableDiffusionXLPipeline": SMALL,
    "StableDiffusion3Pipeline": SMALL,
    "QwenImagePipeline": SMALL,
}
PRIOR, DECODER = (f"kandinsky-community/kandinsky-2-2-{part}" for part in ("prior", "decoder"))
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_VAE = "madebyollin/sdxl-vae-fp16-fix"
SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
QWEN = "Qwen/Qwen-Image"
DATASETS = ("lambdalabs/naruto-blip-captions", "lambdalabs/pokemon-blip-captions")
GPU_ONLY = {'"cuda"': '"cpu"', "float16": "float32", "bfloat16": "float32"}  # in snippets
NUMBER_OF_PHOTOS = 7


def published(kandinsky, sdxl, sd3, sd, qwen):
    """{published name: local folder} of tiny pipelines."""
    prior, decoder = kandinsky
    folders = {PRIOR: prior, DECODER: decoder, SDXL: sdxl, SDXL_VAE: Path(sdxl) / "vae", SD3: sd3, SD: sd, QWEN: qwen}
    return {name: str(folder) for name, folder in folders.items()}


def generate_small_images(monkeypatch, library=ppdiffusers):
    """Make the pipelines of a library generate small images in few steps, whatever their arguments."""
    for name, small in SMALL_PICTURES.items():
        pipeline = getattr(library, name, None) or getattr(ppdiffusers_train, name)
        monkeypatch.setattr(
            pipeline,
            "__call__",
            lambda self, *prompt, call=pipeline.__call__, small=small, **options: call(
                self, *prompt, **{**options, **small}
            ),
        )


@functools.cache
def job(script):
    """A training script of `examples/`, by its file name."""
    (path,) = (ROOT / "examples").glob(f"*/{script}")
    return load_script(path)


@contextlib.contextmanager
def scripts_of_its_own():
    """A context in which scripts and those they extend are loaded anew, as in a process of its own."""

    def scripts():
        return {name: module for name, module in sys.modules.items() if name.startswith("train_")}

    path, before = list(sys.path), scripts()
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in scripts():
            del sys.modules[name]
        sys.modules.update(before)
        sys.path[:] = path


def value_of(words, flag):
    """The value of a flag in a command, or None."""
    return words[words.index(flag) + 1] if flag in words else None


class Reader:
    """Reads a page.

    Args:
        page: its name, from the root of the repository.
        folder: a new folder, in which the copies are made; it becomes the current one.
        models: {published name: local folder}.
        torch_models: the same for snippets of diffusers and torch; without them, those snippets are not run.
    """

    def __init__(self, page, folder, models, torch_models=None):
        self.page, self.root, self.models, self.torch_models = page, folder.resolve(), models, torch_models
        self.variables = {}  # that were exported
        self.promised = []  # files and folders that must be there at the end
        self.launched = []  # beginnings of launched commands
        ignored = shutil.ignore_patterns("__pycache__", "photos", "outputs")
        shutil.copytree(ROOT / "examples", self.root / "examples", ignore=ignored)
        photos = copy_photos(self.root / "examples" / "data" / "photos", NUMBER_OF_PHOTOS)
        self.local = {**models, **dict.fromkeys(DATASETS, str(photos))}
        os.chdir(self.root)

    def read(self):
        """Do what all blocks say, then look for the files that they promise."""
        for language, code, before in code_blocks(self.page):
            if language == "bash":
                for command in commands(code):
                    self.type(command)
            elif language == "python":
                self.execute(code)
            elif language == "yaml":
                name = inline_code(before)[-1]
                assert name.endswith((".yaml", ".yml")), f"the code word before a yaml block is no file name: {name!r}"
                Path(name).write_text(self.localize(code), encoding="utf-8")
            elif language == "json":
                known = (PHOTOS / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
                assert all(json.loads(line) in map(json.loads, known) for line in code.splitlines()), code
            else:
                assert language == "text", f"{self.page}: a block in {language or 'no language'}:\n{code}"
        missing = [str(path.relative_to(self.root)) for path in self.promised if not path.exists()]
        assert not missing, f"{self.page} promises files that are not there: {missing}"

    def promise(self, name):
        self.promised.append(Path.cwd() / name)

    def localize(self, text):
        """A text with local names; a run here has checkpoints of steps 2 and 4."""
        for name, here in sorted(self.local.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(name, here)
        return re.sub(r"\bcheckpoint-\d+", "checkpoint-2", text)

    def type(self, command):
        """Do what one line of a bash block says."""
        words = words_of(command, self.variables)
        known = {
            "cd": self.change_folder,
            "export": self.export,
            "make": self.check_make,
            "pip": self.check_pip,
            "bash": self.run_shell_script,
            "python": self.run_python,
            "ppdiffusers-train": self.run_tool,
        }
        assert words[0] in known, f"{self.page}: not a command that this test knows: {command}"
        known[words[0]](words)

    def change_folder(self, words):
        os.chdir(words[1])
        assert Path.cwd().is_relative_to(self.root), words

    def export(self, words):
        for word in words[1:]:
            name, value = word.split("=", 1)
            self.variables[name] = value

    def check_make(self, words):
        """The Makefile has these targets."""
        assert Path.cwd() == self.root, f"{words}: the Makefile is in the root of the repository"
        variables = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def check_pip(self, words):
        """The files, extras and versions that a `pip install` names exist."""
        assert words[1] == "install", words
        setup, arguments = read("setup.py"), iter(words[2:])
        for word in arguments:
            if word in ("-r", "-c"):
                assert Path.cwd() == self.root and (ROOT / next(arguments)).is_file(), words
            elif word in ("-i", "--extra-index-url"):
                assert next(arguments).startswith("https://www.paddlepaddle.org.cn/packages/"), words
            elif word in ("-e", "."):
                extra = re.fullmatch(r"\.(?:\[(\w+)\])?", next(arguments) if word == "-e" else word)[1]
                assert Path.cwd() == self.root and (extra is None or f'"{extra}": ' in setup), words
            elif "==" in word:
                name, version = word.split("==")
                assert re.search(rf'"{name.removesuffix("-gpu")}(-gpu)?=={re.escape(version)}"', setup), word
            elif not word.startswith("-"):
                assert re.fullmatch(r"ppdiffusers_train(\[\w+\])?|tensorboardX|wandb|modelscope|jupyter", word), words
            else:
                assert word == "--no-deps", words

    def run_shell_script(self, words):
        """Train as a `run.sh` says, with the variables that the page has exported."""
        assert words[1] == "run.sh", words
        command, _ = python_command(Path.cwd(), *words[2:], **self.variables)
        self.run_python(command)

    def run_python(self, words):
        if "paddle.distributed.launch" in words:
            self.launch(words)
        else:
            assert words[:2] == ["python", "-u"], f"{self.page}: not a command that this test knows: {words}"
            self.train(words[2], words[3:])

    def run_tool(self, words):
        """Run `ppdiffusers-train COMMAND …` in this process."""
        command, rest = words[1], [self.localize(word) for word in words[2:]]
        if command == "launch":
            self.launch(words)
            return
        if command == "preview":
            script = next(number for number, word in enumerate(rest) if word.endswith(".py"))
            rest = [*rest[: script + 1], *self.short(rest[script], rest[script + 1 :])]
            self.promise(value_of(rest, "--preview_output") or "preview.png")
        elif command in ("check", "pack"):
            rest = [*rest, "--processes=1"]
        elif command == "demo":
            rest = [*rest, "--max_train_steps=2", "--pictures=30"]
        elif command == "toy-data":
            rest = [*rest, "--count=30"]
        if command == "pack":
            self.promise(rest[1])
        if "--output" in rest:
            self.promise(value_of(rest, "--output"))
        try:
            with contextlib.redirect_stdout(io.StringIO()), scripts_of_its_own():
                cli.main([command, *rest])
        except SystemExit as end:
            assert end.code == 0, f"{self.page}: {words} ends with status {end.code}"

    def short(self, script, flags):
        """A training command's flags for two small steps, with the base models that the script would download."""
        flags, parser = [self.localize(flag) for flag in flags], job(Path(script).name).build_parser()
        args, _ = parser.parse_known_args(flags)  # also what a file of `--config` says; `preview` has flags of its own
        flags += ["--resolution=64", "--checkpointing_steps=2", "--sharding_degree=1", "--sharding_stage=1"]
        flags.append(f"--max_train_steps={4 if args.resume_from_checkpoint else 2}")
        if args.report_to != "tensorboard":
            flags.append("--report_to=none")
        if args.validation_prompts:
            flags += ["--num_validation_images=1", "--validation_inference_steps=2", "--validation_steps=2"]
        if getattr(args, "class_prompt", None):
            flags += ["--num_class_images=2", "--validation_inference_steps=2"]
        for action in parser._actions:
            default = action.default if action.option_strings else None
            if default in self.models and getattr(args, action.dest) == default:
                flags.append(f"{action.option_strings[0]}={self.models[default]}")
        return flags

    def train(self, script, flags):
        """Run the `main` of a training script in this process."""
        assert Path(script).is_file(), f"{self.page}: no {script} in {Path.cwd().relative_to(self.root)}"
        module, flags, said = job(Path(script).name), self.short(script, flags), io.StringIO()
        args = module.build_parser().parse_args(flags)
        with contextlib.redirect_stdout(said):
            module.main(flags)
        said = said.getvalue()
        if args.dry_run:
            assert "a dry run, nothing is loaded" in said and "total, training" in said, said
            return
        assert f"wrote the result to {args.output_dir}" in said, said
        assert bool(args.resume_from_checkpoint) == ("resumed from" in said), said
        self.promise(args.output_dir)

    def launch(self, words):
        """Run a command for several GPUs."""
        script = next(number for number, word in enumerate(words) if word.endswith(".py"))
        beginning, name, flags = words[:script], words[script], words[script + 1 :]
        if self.page in LAUNCHED and beginning not in self.launched:
            self.launched.append(beginning)
            self.launch_two(beginning, name, flags)
        else:
            known = [*self.launched, *([*launcher, gpus] for launcher in LAUNCHERS for gpus in ("0,1", "0,1,2,3"))]
            assert beginning in known, f"{self.page}: not a launch that a test tries: {shlex.join(beginning)}"
            self.train(name, flags)

    def launch_two(self, beginning, script, flags):
        """Start two ranks on this CPU as the page says."""
        short = self.short(script, flags)
        if "--sharding_degree" in flags:
            short = [*short, "--sharding_degree=2", f"--sharding_stage={value_of(flags, '--sharding_stage') or 1}"]
        program = ["-m", "ppdiffusers_train.cli"] if beginning[0] == "ppdiffusers-train" else []
        fewer = [RANKS.get(before, word) for before, word in zip(beginning, beginning[1:])]
        done = subprocess.run(
            [sys.executable, *program, *fewer, script, *short],
            env=environment(CUDA_VISIBLE_DEVICES="0,1", PADDLE_DISTRI_BACKEND="gloo"),
            capture_output=True,
            text=True,
            timeout=300,
        )
        output_dir = job(Path(script).name).build_parser().parse_args(short).output_dir
        said = done.stdout + done.stderr
        assert done.returncode == 0 and f"wrote the result to {output_dir}" in said, said[-3000:]
        self.promise(output_dir)

    def execute(self, code):
        """Run a snippet, or compare it with the script that it is taken from."""
        if code.startswith("    "):
            scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*/*.py")]
            assert any(code in script for script in scripts), f"{self.page} shows code that no script has:\n{code}"
            return
        if is_for_torch(code):
            if self.torch_models is None:
                return
            self.local.update(self.torch_models)
        try:
            code = self.localize(code)
            for name, here in GPU_ONLY.items():
                code = re.sub(rf"(?<!\w){name}(?!\w)", here, code)
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, self.page, "exec"), {"__name__": "__main__"})
        finally:
            self.local.update(self.models)
        for name in re.findall(r"\.save\(\"([^\"{}]+)\"\)", code):
            self.promise(name)
