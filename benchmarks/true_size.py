"""Jobs at the size of the published models, from a folder on disk to a result that loads: writes docs/true_size.md.

    python benchmarks/true_size.py                     all cases, from small to large: some hours and 24 GB of memory
    python benchmarks/true_size.py --cases sdxl_lora   some of them; the others' figures stay
    python benchmarks/true_size.py --tiny              all cases with tiny models, writes nothing: does everything run?

Weights are made up, their sizes and layout are not. Every step is a command as a user types it, in a process of its
own, watched from outside. Figures are kept in docs/true_size.json. Needs the environment of `make parity`
(`--torch_python`) to write the models; everything else runs in the ordinary one.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from true_size_page import page

ROOT = Path(__file__).resolve().parent.parent
FIGURES, PAGE = ROOT / "docs" / "true_size.json", ROOT / "docs" / "true_size.md"
PHOTOS = ROOT / "examples" / "data" / "photos"
STEPS, EVERY = 2, 1  # of a run; between its checkpoints
PARTS = ("estimate", "run")  # of a case
# The smallest image that all of these models take: on a processor, steps of this size are slow enough.
SHORT_RUN = [
    "--resolution=64", "--train_batch_size=1", f"--max_train_steps={STEPS}", f"--checkpointing_steps={EVERY}",
    "--checkpoints_total_limit=1", "--learning_rate=1e-5", "--report_to=none", "--seed=0",
]  # fmt: skip
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Case:
    """A job at its true size.

    Args:
        script: below examples.
        models: {flag: (configuration, type of the weights on disk)}.
        flags: besides those that all cases have.
        load: Python that leaves in `model` what was trained, from the folder `result`, and `models` with those that it
            was trained from; `from_diffusers` says for which library the result is.
        needs: GB of memory that have to be free.
        on_resume: more flags of the runs that go on.
    """

    script: str
    models: dict
    load: str
    needs: int
    flags: tuple = field(default=())
    on_resume: tuple = field(default=())

    @property
    def is_full(self) -> bool:
        """Whether its result is a whole model."""
        return "lora" not in self.script


KANDINSKY = {
    "pretrained_prior_model_name_or_path": ("kandinsky2_2_prior", "float32"),
    "pretrained_decoder_model_name_or_path": ("kandinsky2_2_decoder", "float32"),
}
PRIOR = dict([*KANDINSKY.items()][:1])  # it needs the decoder only to draw
SDXL = {"pretrained_model_name_or_path": ("sdxl", "float32")}
LOAD_LORA = """
from ppdiffusers import {0}
model = {0}.from_pretrained(models + "/{1}/{2}", from_diffusers=True)
model.load_attn_procs(result, from_diffusers=from_diffusers)
assert any("lora" in name for name, _ in model.named_parameters())
"""
# Its reader is for ppdiffusers' file, which the checkpoint has.
LOAD_SD3_LORA = """
from ppdiffusers import SD3Transformer2DModel
from ppdiffusers_train.models.attention import provide_joint_attention
from ppdiffusers_train.models.lora import load_lora
provide_joint_attention()
model = SD3Transformer2DModel.from_pretrained(models + "/sd3/transformer", from_diffusers=True)
load_lora(model, result + "/checkpoint-2")
"""
LOAD_FULL = """
from ppdiffusers import {0}
model = {0}.from_pretrained(result + "/{1}", from_diffusers=from_diffusers)
"""
# ppdiffusers' own reader holds all tensors beside the model, twice where it transposes them: too much for this one.
LOAD_SDXL = """
from ppdiffusers import UNet2DConditionModel
from ppdiffusers_train.models.pipeline_folder import PipelineFolder
model = PipelineFolder(result, "result", ["unet"]).load("unet", UNet2DConditionModel)
"""
# Training in full with the least memory.
FUSED = (
    "--encoded_cache", "--gradient_checkpointing", "--optimizer=adafactor", "--fused_backward", "--max_grad_norm=0",
)  # fmt: skip
# From small to large; those with the same models follow each other.
CASES = {
    "sd1_5_lcm_lora": Case(
        "lcm/train_lcm_distill_lora_sd_wds", {"pretrained_teacher_model": ("sd1_5", "float32")},
        LOAD_LORA.format("UNet2DConditionModel", "sd1_5", "unet"), 9,
    ),
    "sd3_lora": Case(
        "sd3/train_text_to_image_lora_sd3", {"pretrained_model_name_or_path": ("sd3", "float16")}, LOAD_SD3_LORA,
        13, ("--no_t5",),
    ),
    "prior_lora": Case(
        "kandinsky2_2/train_text_to_image_prior_lora", PRIOR,
        LOAD_LORA.format("PriorTransformer", "kandinsky2_2_prior", "prior"), 16,
    ),
    "prior_full": Case(
        "kandinsky2_2/train_text_to_image_prior", PRIOR,
        LOAD_FULL.format("PriorTransformer", "prior"), 19, ("--encoded_cache",),
    ),
    "decoder_lora": Case(
        "kandinsky2_2/train_text_to_image_decoder_lora", KANDINSKY,
        LOAD_LORA.format("UNet2DConditionModel", "kandinsky2_2_decoder", "unet"), 16,
    ),
    "decoder_full": Case(
        "kandinsky2_2/train_text_to_image_decoder", KANDINSKY,
        LOAD_FULL.format("UNet2DConditionModel", "unet"), 17, ("--encoded_cache", "--use_8bit_adam"),
    ),
    "sdxl_lora": Case(
        "sdxl/train_text_to_image_lora_sdxl", SDXL,
        LOAD_LORA.format("UNet2DConditionModel", "sdxl", "unet"), 17,
    ),
    "sdxl_full": Case(
        "sdxl/train_text_to_image_sdxl", SDXL,
        LOAD_SDXL, 17, ("--trainable_modules=mid_block",),
    ),
    # With one checkpoint: two take 20 GB of disk beside the result.
    "sdxl_fused": Case(
        "sdxl/train_text_to_image_sdxl", SDXL, LOAD_SDXL, 16, (*FUSED, "--max_train_steps=1"),
        ("--max_train_steps=3", "--checkpointing_steps=10", "--no_final_checkpoint"),
    ),
    "sdxl_bf16": Case(
        "sdxl/train_text_to_image_sdxl", SDXL, LOAD_SDXL, 16, (*FUSED, "--param_dtype=bf16"),
    ),
}  # fmt: skip


class Run:
    """A command in a process of its own, watched until it ends.

    Args:
        command: words.
        folder: of its results, where checkpoints appear; None: it writes none.
        kill_at: the checkpoint, a number of steps, at whose appearance it is killed.
    """

    def __init__(self, command: list, folder: Path = None, kill_at: int = None):
        self.folder, self.began = folder, time.monotonic()
        self.lines, self.marks, self.levels = [], {}, []
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=environment(), start_new_session=True,
        )  # fmt: skip
        reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        reader.start()
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            self._look(process.pid)
            if kill_at and f"checkpoint-{kill_at}" in self.marks:
                process.kill()
            time.sleep(POLL_SECONDS)
        process.returncode = os.waitstatus_to_exitcode(status)
        reader.join()
        self.seconds, self.peak, self.status = self.now(), usage.ru_maxrss * 1024, process.returncode

    def now(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def _read(self, stream) -> None:
        for line in stream:
            self.lines.append(line.rstrip())
            for mark, words in (("loaded", "trainable parameters, "), ("written", "wrote the result")):
                if words in line:
                    self.marks.setdefault(mark, self.now())

    def _look(self, pid: int) -> None:
        """Note what has appeared, and how much memory the process has of its own (not: mapped files)."""
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        except OSError:
            return
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            self.levels.append((self.now(), int(found[1]) * 1024))
        for path in self.folder.iterdir() if self.folder and self.folder.is_dir() else ():
            self.marks.setdefault(path.name, self.now())

    def between(self, first: str, last: str):
        """Seconds from one mark to another, None where one is missing."""
        if first in self.marks and last in self.marks:
            return self.marks[last] - self.marks[first]
        return None

    def highest(self) -> dict:
        """{phase: most bytes of its own memory in it}; phases are load, train, checkpoint and result."""
        found = {}
        for moment, level in self.levels:
            phase = self.phase(moment)
            found[phase] = max(found.get(phase, 0), level)
        return found

    def phase(self, moment: float) -> str:
        """What the process was doing."""
        if moment < self.marks.get("loaded", float("inf")):
            return "load"
        if moment > self.marks.get("..result.tmp", float("inf")):
            return "result"
        for step in range(EVERY, STEPS + 1, EVERY):
            begin, end = (self.marks.get(name) for name in (f".checkpoint-{step}.tmp", f"checkpoint-{step}"))
            if begin and begin <= moment <= (end or float("inf")):
                return "checkpoint"
        return "train"

    def figures(self) -> dict:
        """A description of it."""
        return {
            "seconds": self.seconds,
            "peak": self.peak,
            "own_peak": max((level for _, level in self.levels), default=0),
            "phases": self.highest(),
            "loaded": self.marks.get("loaded"),
            "checkpoint_seconds": self.between(f".checkpoint-{EVERY}.tmp", f"checkpoint-{EVERY}"),
            "result_seconds": self.between("..result.tmp", "written"),
            "status": self.status,
        }


def environment() -> dict:
    """Of every process: this checkout's code, nothing from the network."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


class Failed(Exception):
    """A step of a case has ended as it should not."""


class Chain:
    """The commands of a case, one after another; `figures` has what each of them took.

    Args:
        models: where the pipelines are.
        folder: for the rest.
    """

    def __init__(self, case: Case, models: Path, folder: Path, say=print):
        self.case, self.models, self.result, self.say, self.figures = case, models, folder / "result", say, {}
        copy_photos(folder / "photos", 2)
        command = [sys.executable, ROOT / "examples" / f"{case.script}.py", *SHORT_RUN, f"--output_dir={self.result}"]
        command += [f"--train_data_dir={folder / 'photos'}", f"--cache_dir={folder / 'cache'}", *case.flags]
        self.train = [*command, *(f"--{flag}={models / name}" for flag, (name, _) in case.models.items())]
        self.without_models = [*command, *(f"--{flag}={folder / 'nowhere'}" for flag in case.models)]

    def step(self, name: str, command: list, expected: int = 0, **options) -> Run:
        """A command in a process of its own; raises `Failed` where it ends as it should not."""
        run = Run(command, **options)
        self.figures[name] = run.figures()
        self.say(f"  {name}: {run.seconds:.0f} s, {run.peak / 1e9:.2f} GB, {run.highest()}", flush=True)
        if run.status != expected:
            raise Failed(f"{name}: status {run.status}\n" + "\n".join(run.lines[-15:]))
        return run

    def estimate(self) -> None:
        """The memory of the run, as a dry run estimates it."""
        self.step("nothing", self.without_models, expected=2)
        self.figures["estimate"] = read_estimate(self.step("dry run", [*self.train, "--dry_run"]).lines)

    def run(self) -> None:
        """Train, be killed, go on, and load the result."""
        resume, is_full = [*self.train, "--resume_from_checkpoint=latest", *self.case.on_resume], self.case.is_full
        self.step("train", self.train, folder=self.result, kill_at=EVERY, expected=-signal.SIGKILL)
        self.figures["checkpoint_bytes"] = size_of(self.result / f"checkpoint-{EVERY}")
        # A LoRA's checkpoint holds the file for ppdiffusers; its result is for diffusers. Whole models come both ways.
        self.step("resume", [*resume, *([] if is_full else ["--save_format=diffusers"])], folder=self.result)
        for library in ("ppdiffusers", "diffusers") if is_full else ("diffusers",):
            if is_full and library == "diffusers":
                self.step("export", [*resume, "--save_format=diffusers"], folder=self.result)
            self.figures[f"result_bytes {library}"] = result_size(self.result)
            folders = {"models": str(self.models), "result": str(self.result)}
            code = LOAD.format(**folders, is_torch=library == "diffusers", load=self.case.load)
            self.step(f"load {library}", [sys.executable, "-c", code])


def measure(case: Case, models: Path, folder: Path, parts, torch_python: str, is_tiny: bool, say=print) -> dict:
    """{step: its figures} of a case; the first step that fails is the last.

    Args:
        models: where the pipelines are, or get written to.
        folder: for the rest, which is new.
        parts: of `PARTS`.
    """
    figures, chain = {"models": {}}, Chain(case, models, folder, say)
    try:
        for name, dtype in case.models.values():
            figures["models"][name] = provide(models / name, name, dtype, torch_python, is_tiny)
        if "estimate" in parts:
            chain.estimate()
        if "run" in parts:
            chain.run()
    except Failed as error:
        figures["failed"] = str(error).replace(f"{folder.parent}/", "")
        say(error)
    return {**figures, **chain.figures}


LOAD = """
import ppdiffusers_train
import numpy as np
models, result, from_diffusers = {models!r}, {result!r}, {is_torch}
{load}
for name, parameter in model.named_parameters():
    assert np.isfinite(parameter.numpy()).all(), name
"""


def provide(folder: Path, name: str, dtype: str, torch_python: str, is_tiny: bool) -> dict:
    """Write a pipeline where there is none yet, and return a description of it."""
    about = folder / "about.json"
    if not about.exists():
        flags = ["--dtype", dtype, *(["--tiny"] if is_tiny else [])]
        run = Run([torch_python, ROOT / "benchmarks" / "true_size_models.py", folder, name, *flags])
        if run.status:
            raise Failed("\n".join(run.lines[-15:]))
        found = {"parameters": json.loads(run.lines[-1]), "dtype": dtype, "bytes": size_of(folder)}
        about.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(about.read_text(encoding="utf-8"))


def read_estimate(lines: list) -> dict:
    """{kind: bytes} as a dry run printed them."""
    begin = next(number for number, line in enumerate(lines) if line.startswith("memory per GPU"))
    found = {}
    for line in lines[begin + 1 :]:
        match = re.match(r"  (\w.*?)\s+([\d.]+) (GB|MB)\b", line)
        if not match:
            break
        found[match[1]] = float(match[2]) * {"GB": 1e9, "MB": 1e6}[match[3]]
    return found


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def result_size(folder: Path) -> int:
    """Bytes of a result: not its checkpoints, nor what its encoders have made, nor what is linked to the base model."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink == 1]
    return sum(
        path.stat().st_size
        for path in files
        if not path.relative_to(folder).parts[0].startswith(("checkpoint-", "encoded", "logs"))
    )


def copy_photos(folder: Path, count: int) -> None:
    """The first photographs, with their captions."""
    folder.mkdir(parents=True)
    rows = [json.loads(line) for line in (PHOTOS / "metadata.jsonl").read_text(encoding="utf-8").splitlines()][:count]
    for row in rows:
        shutil.copy(PHOTOS / row["file_name"], folder)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def wait_for_memory(gigabytes: int, say=print) -> None:
    """Until that much is free."""
    while True:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) * 1024 / 1e9
        if free >= gigabytes:
            return
        say(f"  {free:.1f} GB of memory are free, {gigabytes} are needed: waiting", flush=True)
        time.sleep(60)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="names, separated by commas")
    parser.add_argument("--parts", default=",".join(PARTS), help="of each case; the others' figures stay")
    parser.add_argument("--keep_models", action="store_true", help="for another run; by default they are deleted")
    parser.add_argument("--tiny", action="store_true", help="tiny models; nothing is written")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "true_size", help="folder for models and runs")
    parser.add_argument("--torch_python", default=str(ROOT / ".venv-parity" / "bin" / "python"))
    args = parser.parse_args()
    failed, names, models = [], args.cases.split(","), args.work / "models"
    for number, name in enumerate(names):
        case, folder = CASES[name], args.work / name
        print(name, flush=True)
        if "run" in args.parts and not args.tiny:
            wait_for_memory(case.needs)
        shutil.rmtree(folder, ignore_errors=True)
        found = measure(case, models, folder, args.parts.split(","), args.torch_python, args.tiny)
        failed += [name] if "failed" in found else []
        shutil.rmtree(folder)
        following = CASES[names[number + 1]].models.values() if number + 1 < len(names) else ()
        unused = {pipeline for pipeline, _ in case.models.values()} - {pipeline for pipeline, _ in following}
        for pipeline in () if args.keep_models else unused:
            shutil.rmtree(models / pipeline)
        if not args.tiny:
            figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
            kept = {key: value for key, value in figures.get(name, {}).items() if key != "failed"}
            figures[name] = {**kept, **found}
            FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
            PAGE.write_text(page(figures), encoding="utf-8")
    return f"failed: {', '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
