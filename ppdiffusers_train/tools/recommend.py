"""`ppdiffusers-train recommend`: the flags with which a job of the published models fits a GPU.

The counts behind it are those of `--dry_run`. `benchmarks/memory.py` writes them into `memory_counts.json`, so that
nothing has to be measured here.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ppdiffusers_train.arguments.parser import positive_int
from ppdiffusers_train.errors import UserError

COUNTS = Path(__file__).with_name("memory_counts.json")
GPU_SIZES = (8, 12, 16, 24, 40, 80)  # GB
USABLE = 0.9  # of a GPU's memory; Paddle, CUDA and fragmentation take the rest
LARGEST_BATCH = 64
WEIGHTS = (
    "lowered",
    "frozen",
    "encoders",
    "float32_beside",
)  # the parts of an `Inventory` that do not depend on images
CACHED, LOW = {"encoded_cache": True}, {"encoded_cache": True, "mixed_precision": "bf16"}
RECOMPUTED = {**LOW, "gradient_checkpointing": True}
FUSED = {
    **CACHED, "gradient_checkpointing": True, "optimizer": "adafactor", "fused_backward": True, "max_grad_norm": 0,
}  # fmt: skip
# From the fastest to the slowest: 16 bits and a cache save time, each further flag costs more than the one before.
CHOICES = (
    LOW, {**LOW, "use_8bit_adam": True}, RECOMPUTED, {**RECOMPUTED, "use_8bit_adam": True},
    {**RECOMPUTED, "quantize_base": "int8"}, {**RECOMPUTED, "quantize_base": "nf4"},
    {**CACHED, "gradient_checkpointing": True, "use_8bit_adam": True}, FUSED, {**FUSED, "param_dtype": "bf16"},
)  # fmt: skip


@dataclass(frozen=True)
class Recommendation:
    """The fastest flags of a job that fit a GPU.

    Args:
        flags: {name: value}, as in a file for `--config`.
        peak: bytes per GPU with a sample at a time.
        batch: the largest `--train_batch_size` that fits, up to `LARGEST_BATCH`; powers of two.
    """

    flags: dict
    peak: int
    batch: int


def read_counts() -> dict:
    """{job: its counts, as `as_counts` gives them}."""
    return json.loads(COUNTS.read_text("utf-8"))


def as_counts(script: str, inventory, quantized: dict, sizes: dict) -> dict:
    """The counts of a job as JSON.

    Args:
        script: its file, below `examples`.
        inventory: the job's `Inventory`, whose weights are counted.
        quantized: {"int8" or "nf4": what `Inventory.frozen` is with it}.
        sizes: {resolution: `measured`}.
    """
    shapes = inventory.shapes
    return {
        "script": script,
        "trained": [[list(shape), shapes.count(shape)] for shape in sorted(set(shapes))],
        **{name: getattr(inventory, name) for name in WEIGHTS},
        "quantized": quantized,
        "sizes": sizes,
    }


def measured(inventory) -> dict:
    """What was measured at a resolution, as JSON."""
    kept, recomputed = (inventory.activations[recompute] for recompute in (False, True))
    return {"activations": [kept, recomputed], "encoding": inventory.encoding, "encoded": inventory.encoded}


def inventory_from(counts: dict, resolution: int, quantize_base: str = "no"):
    """The `Inventory` of a job's counts."""
    from ppdiffusers_train.loop.memory_estimate import Inventory

    found = dict(counts["sizes"][str(resolution)])
    found["activations"] = dict(zip((False, True), found["activations"]))
    frozen = counts["frozen"] if quantize_base == "no" else counts["quantized"][quantize_base]
    shapes = tuple(tuple(shape) for shape, count in counts["trained"] for _ in range(count))
    return Inventory(
        tuple(map(prod, shapes)),
        shapes=shapes,
        **{name: counts[name] for name in WEIGHTS} | {"frozen": frozen},
        **found,
    )


def peak_of(counts: dict, resolution: int, flags: dict, batch: int = 1) -> int:
    """Peak bytes per GPU of a job with these flags."""
    from ppdiffusers_train.loop.memory_estimate import Options

    inventory = inventory_from(counts, resolution, flags.get("quantize_base", "no"))
    options = Options(
        train_batch_size=batch, mixed_precision=flags.get("mixed_precision", "no"), amp_level="O1", use_ema=False,
        use_8bit_adam=flags.get("use_8bit_adam", False), sharding_degree=1,
        gradient_checkpointing=flags.get("gradient_checkpointing", False), cached=flags.get("encoded_cache", False),
        ranks=1, optimizer=flags.get("optimizer", "adamw"), fused_backward=flags.get("fused_backward", False),
        param_dtype=flags.get("param_dtype", "float32"),
    )  # fmt: skip
    return inventory.peak(options)


def recommend(counts: dict, resolution: int, gigabytes: float):
    """The `Recommendation` of a job for a GPU, or None where nothing fits."""
    room = USABLE * gigabytes * 1e9
    for flags in CHOICES:
        if "quantize_base" in flags and not counts["quantized"] or "optimizer" in flags and counts["quantized"]:
            continue  # the first are for LoRA, the second for training in full
        if (peak := peak_of(counts, resolution, flags)) <= room:
            batch = 1
            while batch < LARGEST_BATCH and peak_of(counts, resolution, flags, 2 * batch) <= room:
                batch *= 2
            return Recommendation(flags, peak, batch)
    return None


def smallest_gpu(counts: dict, resolution: int):
    """The smallest of `GPU_SIZES` that a job fits, in GB, or None."""
    return next((size for size in GPU_SIZES if recommend(counts, resolution, size)), None)


def as_words(flags: dict) -> str:
    """Flags as they are typed."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in flags.items())


def preset(counts: dict, gigabytes: int):
    """The text of the file for `--config` of a job and a GPU, at the largest resolution that fits; None without one."""
    for resolution in sorted(map(int, counts["sizes"]), reverse=True):
        if found := recommend(counts, resolution, gigabytes):
            flags = {"resolution": resolution, "train_batch_size": 1, **found.flags}
            lines = [f"{name}: {str(value).lower()}" for name, value in flags.items()]
            name, counted = Path(counts["script"]).name, f"{found.peak / 1e9:.1f} GB are counted"
            head = f"# {name} on a GPU with {gigabytes} GB: {counted}."
            return "\n".join([head, *lines]) + "\n"
    return None


def add_recommend_command(commands) -> None:
    """Add the command `recommend` to `ppdiffusers-train`."""
    command = commands.add_parser(
        "recommend", config=False, help="print the fastest flags with which a job fits a GPU",
        description="Print the fastest flags with which a job of the published models fits a GPU, and the memory that "
        "is counted with them. A tenth of the memory is left free. Exit status 1: the job does not fit.",
    )  # fmt: skip
    add = command.add_argument
    add("job", metavar="JOB", help="Name the job as `demo --job` does, such as sdxl-lora.")
    add("--memory", type=positive_int, required=True, metavar="GB", help="Fit a GPU with this much memory, in GB.")
    add("--resolution", type=positive_int, help="Train at this resolution; without it, at the largest that is known.")
    command.set_defaults(run=print_recommendation)


def print_recommendation(args) -> int:
    """Print the flags; the status is 1 where nothing fits."""
    jobs = read_counts()
    if args.job not in jobs:
        raise UserError(
            f"JOB: there are no counts of {args.job!r}; expected {', '.join(jobs)}, or --dry_run of the script"
        )
    counts = jobs[args.job]
    known = sorted(map(int, counts["sizes"]))
    resolution = args.resolution or known[-1]
    if resolution not in known:
        raise UserError(
            f"--resolution: there are no counts of {args.job} at {resolution}; expected "
            f"{' or '.join(map(str, known))}, or --dry_run of the script, which counts any"
        )
    found = recommend(counts, resolution, args.memory)
    script = counts["script"]
    if found is None:
        smallest = smallest_gpu(counts, resolution)
        expected = f"it needs {smallest} GB" if smallest else f"it does not fit one GPU with {GPU_SIZES[-1]} GB either"
        print(f"{script} at {resolution} does not fit a GPU with {args.memory} GB; {expected}")
        return 1
    print(f"{script} --resolution {resolution} --train_batch_size 1 {as_words(found.flags)}")
    print(f"counted: {found.peak / 1e9:.1f} GB of {args.memory} GB; the largest --train_batch_size is {found.batch}")
    return 0
