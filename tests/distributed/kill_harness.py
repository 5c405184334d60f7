"""Kill a run again and again, resume it each time, and look at what is left.

    python -m tests.distributed.kill_harness --kills 160 --double_kills 40 --job prior

Every run is a process forked from one that has imported everything and computed nothing, so that it starts in no time.
It is killed (SIGKILL) after a random time, while it starts, computes, saves, or writes its result. After each kill,
every checkpoint that was complete before must still be; in the end, the result must be that of a run nobody has killed.

Every other run is killed early. Before it, the class images, the encoded samples or the index of the images are taken
away, in turns, and it is killed as soon as it begins an image or a pack, or a moment after it begins an index. The next
runs read what it has completed.
"""

import ppdiffusers_train  # noqa: F401

import argparse
import contextlib
import glob
import os
import random
import re
import signal
import socket
import tempfile
import time
from pathlib import Path

from paddle.distributed import parallel

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.runtime.checkpoint import checkpoints, read_state
from tests.conftest import KANDINSKY, LCM, ROOT, copy_photos, load_script, photo_shards, same, tensors, weights

STEPS_PER_KILL = 3


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(job, flags: list, ranks: int, log: Path, own=lambda rank: ((), {})) -> list:
    """Fork `ranks` processes that run a job together; returns their numbers.

    Args:
        log: a file, or one for each rank: `{rank}` in it is the rank's number.
        own: (more flags, environment variables) of a rank.
    """
    endpoints = [f"127.0.0.1:{free_port()}" for _ in range(ranks)]
    master = f"127.0.0.1:{free_port()}"
    processes = []
    for rank in range(ranks):
        process = os.fork()
        if process:
            processes.append(process)
            continue
        more, variables = own(rank)
        os.environ.update(variables)
        output = os.open(str(log).format(rank=rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if ranks > 1:
            os.environ.update(
                PADDLE_TRAINER_ID=str(rank),
                PADDLE_TRAINERS_NUM=str(ranks),
                PADDLE_TRAINER_ENDPOINTS=",".join(endpoints),
                PADDLE_CURRENT_ENDPOINT=endpoints[rank],
                PADDLE_MASTER=master,
                PADDLE_DISTRI_BACKEND="gloo",
            )
            parallel._global_parallel_env = None  # an import has read the variables of a process alone
        status = 1
        try:
            job.main([*flags, *more])
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        finally:
            os._exit(status)
    return processes


def end(processes: list, seconds: float, enough=lambda: False) -> bool:
    """Wait so long for the processes, or until `enough()`, then kill them; returns whether they had ended by
    themselves, and well."""
    deadline, left, good = time.monotonic() + seconds, set(processes), True
    while left and time.monotonic() < deadline and not enough():
        for process in list(left):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                left.remove(process)
                good = good and status == 0
        time.sleep(0.001)
    # One dies first, as a card or a machine does; whoever started them ends the others.
    for process in random.sample(sorted(left), len(left)):
        os.kill(process, signal.SIGKILL)
    for process in left:
        os.waitpid(process, 0)
    return good and not left


def complete(output_dir: Path) -> dict:
    """`{checkpoint: its files with the time of their last change}` of those that are complete."""
    found = {}
    for folder in checkpoints(output_dir):
        with contextlib.suppress(UserError):
            read_state(folder)
            found[folder.name] = {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    return found


def take_away(folder: Path, pattern: str) -> int:
    """Remove files of a cache; returns how many there were."""
    found = list(folder.glob(pattern))
    for file in found:
        file.unlink()
    return len(found)


def torture(job, flags: list, folder: Path, kills: int, ranks: int, longest: float, seed: int = 0) -> tuple:
    """Kill a run `kills` times and let it end: within `longest` seconds, and, in every second run, only after it has
    written its checkpoints. Returns how many of the kills found a run that had written one, and how many an unfinished
    pack or table."""
    chance, done, useful, unfinished = random.Random(seed), 0, 0, 0
    caches = [(folder.parent / "encoded", "*/*.pack"), (folder.parent / "cache" / "ppdiffusers_train", "*/*.arrow")]
    if (folder.parent / "classes").exists():
        caches.insert(0, (folder.parent / "classes", "*/class-*.png"))
    flags = [*flags, f"--output_dir={folder}", "--resume_from_checkpoint=latest", "--checkpointing_steps=1"]
    before = complete(folder)
    while done < kills:
        # However fast the machine: the run's steps last for all kills.
        share, more = folder / f"checkpoint-{STEPS_PER_KILL * (done + 1)}", chance.uniform(0, 0.1)
        cache, pattern = caches[done // 2 % len(caches)]
        writes = done % 2 == 0 and take_away(cache, pattern)
        if writes and done % 4 == 0:
            more = 0  # within the pack for certain, on a fast machine too

        def is_enough(share=share, more=more, writes=writes, files=(cache / "*/.*", cache / pattern)):
            begun = any(glob.glob(str(file)) for file in files) if writes else share.exists()
            return begun and not time.sleep(more)

        seconds = 600 if done % 2 or writes else chance.uniform(0.2, longest)
        ended = end(start(job, flags, ranks, folder.parent / "log"), seconds, is_enough)
        unfinished += writes and any(cache.glob("*/.*"))
        now = complete(folder)
        assert before.items() <= now.items(), f"kill {done}: a good checkpoint is gone or has changed"
        assert not ended, "the run came to its end before it was killed often enough; give it more steps"
        done, useful, before = done + 1, useful + (len(now) > len(before)), now
    for cache, pattern in caches:
        take_away(cache, pattern)
    assert end(start(job, flags, ranks, folder.parent / "log"), 600), (folder.parent / "log").read_text()[-2000:]
    # But for the empty file by which ranks compare their folders, which is there for milliseconds.
    left = [str(file) for cache, _ in caches for file in cache.glob("*/.*") if not file.name.startswith(".same-for")]
    assert not left, f"what killed runs have left is removed: {left}"
    return useful, unfinished


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=160, help="of runs of one process")
    parser.add_argument("--double_kills", type=int, default=40, help="of runs of two")
    parser.add_argument("--job", choices=sorted(JOBS), default="prior")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as root:
        for kills, ranks in ((args.kills, 1), (args.double_kills, 2)):
            if kills:
                useful, unfinished = survive(args.job, Path(root) / str(ranks), kills, ranks, args.seed)
                print(
                    f"{args.job}: {kills} kills of {ranks} process(es), {useful} after a new checkpoint, {unfinished} "
                    "within a pack or an index: the same bits",
                    flush=True,
                )


def survive(name: str, root: Path, kills: int, ranks: int, seed: int) -> tuple:
    """Torture a job in `root` and compare it with a run that nobody kills."""
    script, build_models, data, learned = JOBS[name]
    flags = [*make_flags(root, build_models), *data(root), f"--max_train_steps={STEPS_PER_KILL * kills + 8}"]
    job = load_script(script)
    began = time.monotonic()
    whole = [*flags, f"--output_dir={root / 'whole'}", "--checkpointing_steps=100000"]
    assert end(start(job, whole, ranks, root / "log"), 600)
    # However slow the machine: most runs are killed after they have begun to train.
    counts = torture(job, flags, root / "killed", kills, ranks, time.monotonic() - began, seed)
    assert same(learned(root / "whole"), learned(root / "killed"))
    # 1 x 2 samples of each rank: that they have trained together, not each for itself.
    assert set(re.findall(r"steps of (\d+) samples", (root / "log").read_text())) == {str(2 * ranks)}
    return counts


def make_flags(root: Path, build_models) -> list:
    """Flags of a run whose models, data and encoded samples are below `root`, made in a process of its own."""
    if os.fork() == 0:
        build_models(root / "base")
        os._exit(0)
    assert os.wait()[1] == 0
    copy_photos(root / "photos", 7)
    models = {folder.name: folder for folder in (root / "base").iterdir()}
    return [
        *(f"--{MODEL_FLAGS[name]}={folder}" for name, folder in models.items()),
        f"--cache_dir={root / 'cache'}",
        *["--train_batch_size=1", "--gradient_accumulation_steps=2", "--use_ema", "--seed=0", "--report_to=none"],
        *["--checkpoints_total_limit=1000", "--resolution=64"],
    ]


def build_kandinsky(folder: Path) -> None:
    from ppdiffusers_train.toy.models import kandinsky2_2

    kandinsky2_2.build_kandinsky(folder, channels=(16, 32))


def build_sdxl(folder: Path) -> None:
    from ppdiffusers_train.toy.models import sdxl

    sdxl.build_sdxl(folder / "sdxl")


def build_sd3(folder: Path) -> None:
    from tests import toy_pipelines

    toy_pipelines.build_sd3(folder / "sd3")


def build_sd(folder: Path) -> None:
    from tests import toy_pipelines

    toy_pipelines.build_sd(folder / "sd")


def build_sd_to_tune(folder: Path) -> None:
    from tests import toy_pipelines

    toy_pipelines.build_sd(folder / "sd_to_tune")


def encoded_folder(root: Path) -> list:
    """Flags of a folder of photographs that is encoded once."""
    return [f"--train_data_dir={root / 'photos'}", f"--encoded_cache_dir={root / 'encoded'}"]


def with_class_images(root: Path) -> list:
    """Flags of such a folder and of class images, which the base has to generate."""
    words = ["--class_prompt=a cat", "--num_class_images=5", "--validation_inference_steps=2"]
    return [*encoded_folder(root), f"--class_data_dir={root / 'classes' / 'cats'}", *words]


def stream(root: Path) -> list:
    """Flags of the same photographs as a stream."""
    shards = photo_shards(root / "photos", root / "shards")
    return [f"--train_shards_path_or_url=pipe:cat {shards}/{{0..2}}.tar", "--max_train_samples=7"]


MODEL_FLAGS = {
    "prior": "pretrained_prior_model_name_or_path",
    "decoder": "pretrained_decoder_model_name_or_path",
    "sdxl": "pretrained_model_name_or_path",
    "sd3": "pretrained_model_name_or_path",
    "sd": "pretrained_teacher_model",
    "sd_to_tune": "pretrained_model_name_or_path",
}
# name: (script, what builds its models, its data, what of its result to compare)
JOBS = {
    "prior": (
        KANDINSKY / "train_text_to_image_prior.py",
        build_kandinsky,
        encoded_folder,
        lambda folder: weights(folder, "prior"),
    ),
    "lora_sd": (
        ROOT / "examples" / "stable_diffusion" / "train_text_to_image_lora.py",
        build_sd_to_tune,
        with_class_images,
        lambda folder: tensors(folder / "paddle_lora_weights.safetensors"),
    ),
    "lora_sdxl": (
        ROOT / "examples" / "sdxl" / "train_text_to_image_lora_sdxl.py",
        build_sdxl,
        encoded_folder,
        lambda folder: tensors(folder / "paddle_lora_weights.safetensors"),
    ),
    "lora_sd3": (
        ROOT / "examples" / "sd3" / "train_text_to_image_lora_sd3.py",
        build_sd3,
        encoded_folder,
        lambda folder: tensors(folder / "paddle_lora_weights.safetensors"),
    ),
    "lcm_sd": (
        LCM / "train_lcm_distill_sd_wds.py",
        build_sd,
        stream,
        lambda folder: {**weights(folder, "unet"), **prefixed("target", weights(folder, "unet_target"))},
    ),
}


def prefixed(word: str, arrays: dict) -> dict:
    """The same under names of their own."""
    return {f"{word}.{name}": array for name, array in arrays.items()}


if __name__ == "__main__":
    main()
