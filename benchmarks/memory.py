"""Which job of the published models fits which GPU: writes the counts that `ppdiffusers-train recommend` reads, the
pages docs/*/memory.md and examples/presets.

    python benchmarks/memory.py
    python benchmarks/memory.py lcm lcm-lora    only these jobs; the counts of others stay

Models are built from the configurations beside this file: their size, without their weights. Takes about an hour.
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import json
import sys
import tempfile
from pathlib import Path

from memory_page import write_pages

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.loop.dry_run import first_row, inventories_of
from ppdiffusers_train.loop.memory_estimate import take_inventory
from ppdiffusers_train.reporting.quiet import quiet_libraries
from ppdiffusers_train.runtime.quantized import quantize_models
from ppdiffusers_train.tools.recommend import COUNTS, GPU_SIZES, as_counts, measured, preset, read_counts
from ppdiffusers_train.toy.demo.jobs import JOBS
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "examples" / "presets"
sys.path.insert(0, str(ROOT))
from tests.conftest import load_script, module_class  # noqa: E402

DECODER, PRIOR = "pretrained_decoder_model_name_or_path", "pretrained_prior_model_name_or_path"
CONFIGURATIONS = {DECODER: "kandinsky2_2_decoder", PRIOR: "kandinsky2_2_prior"}  # the others are named by the family
FAMILIES = {"sd": "sd1_5", "lcm": "sd1_5", "sdxl": "sdxl", "lcm-sdxl": "sdxl", "sd3": "sd3"}
RESOLUTIONS = {
    "decoder": (512, 768), "prior": (512,), "sd": (512, 768), "sdxl": (512, 1024), "sd3": (512, 1024), "lcm": (512,),
    "lcm-sdxl": (1024,),
}  # fmt: skip


def write_folder(name: str, folder: Path) -> Path:
    """A pipeline's folder of configurations, without weights; the tokenizer is the toys', which has as many tokens per
    caption."""
    parts = json.loads((Path(__file__).parent / "configurations" / f"{name}.json").read_text(encoding="utf-8"))
    for part, config in parts.items():
        names = {"model_index": "model_index.json", "scheduler": "scheduler_config.json"}
        names["image_processor"] = "preprocessor_config.json"
        file = folder / ("" if part == "model_index" else part) / names.get(part, "config.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config), encoding="utf-8")
    for part in parts["model_index"]:
        if part.startswith("tokenizer"):
            build_tokenizer(folder / part)
    return folder


def main():
    quiet_libraries()
    counts = read_counts() if COUNTS.exists() else {}
    with tempfile.TemporaryDirectory() as root:
        for name in sys.argv[1:] or sorted(JOBS, key=is_lora, reverse=True):
            counts[name] = counts_of(name, Path(root), counts)
            print(name, counts[name]["sizes"], flush=True)
            keep({name: counts[name] for name in JOBS if name in counts})


def is_lora(name: str) -> bool:
    """Whether a job trains LoRA layers. Its full sibling has the same name without the end."""
    return name.endswith("-lora")


def keep(counts: dict) -> None:
    """Write the counts, the pages, and the presets."""
    COUNTS.write_text(json.dumps(counts, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8")
    write_pages(counts)
    write_presets(counts)


def write_presets(counts: dict) -> None:
    """Write the file of each job and each GPU that it fits."""
    PRESETS.mkdir(exist_ok=True)
    for name, found in counts.items():
        for size in GPU_SIZES:
            file, text = PRESETS / f"{name}-{size}gb.yaml", preset(found, size)
            if text:
                file.write_text(text, encoding="utf-8")
            else:
                file.unlink(missing_ok=True)


def counts_of(name: str, root: Path, known: dict) -> dict:
    """The counts of a job, as `recommend` reads them. What is measured of a job in full is taken from its LoRA sibling,
    which keeps a few percent more for the backward pass."""
    module, args = build(name, root)
    if not is_lora(name):
        return as_counts(JOBS[name].script, take_inventory(module, {}, 0, 0), {}, known[f"{name}-lora"]["sizes"])
    resolutions = RESOLUTIONS[name.removesuffix("-lora")]
    found = inventories_of(module, first_row(build_dataset(args)), args, resolutions)
    quantized = {kind: frozen_in(kind, name, root) for kind in ("int8", "nf4")}
    return as_counts(
        JOBS[name].script, found[resolutions[0]], quantized, {str(size): measured(each) for size, each in found.items()}
    )


def frozen_in(kind: str, name: str, root: Path) -> dict:
    """What `Inventory.frozen` is with `--quantize_base`."""
    module, _ = build(name, root, f"--quantize_base={kind}")
    module.load_rest()
    quantize_models(module, has_values=False)
    return take_inventory(module, {}, 0, 0).frozen


def build(name: str, root: Path, *more: str) -> tuple:
    """A job's module of the published models' size, without weights, and its flags."""
    script = load_script(ROOT / "examples" / JOBS[name].script)
    family = FAMILIES.get(name.removesuffix("-lora"))
    flags = [
        f"--{flag}={write_folder(part, root / part)}"
        for flag in JOBS[name].model_flags
        for part in [CONFIGURATIONS.get(flag, family)]
    ]
    flags += ["--no_t5"] if family == "sd3" else []
    photos = ROOT / "examples" / "data" / "photos"
    flags += ["--dry_run", "--train_batch_size=1", "--resolution=512", "--encoded_cache_dir=x"]
    args = script.build_parser().parse_args([*flags, f"--train_data_dir={photos}", *more])
    return module_class(script)(args), args


if __name__ == "__main__":
    main()
