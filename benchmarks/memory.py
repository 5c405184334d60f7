"""Which job of the published models fits which GPU: writes docs/memory.json and the pages docs/*/memory.md.

    python benchmarks/memory.py
    python benchmarks/memory.py "lcm sd" "lcm lora_sd"    only these jobs; the figures of others stay

Models are built from the configurations beside this file: their size, without their weights. Takes some minutes.
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from memory_page import FIGURES, FITS_NOT, write_pages

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.loop.dry_run import GPU_SIZES, first_row, inventory_of, options_of
from ppdiffusers_train.reporting.quiet import quiet_libraries
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.conftest import load_script, module_class  # noqa: E402

DECODER, PRIOR = "pretrained_decoder_model_name_or_path", "pretrained_prior_model_name_or_path"
KANDINSKY = {DECODER: "kandinsky2_2_decoder", PRIOR: "kandinsky2_2_prior"}
SD, SDXL = ({"pretrained_model_name_or_path": name} for name in ("sd1_5", "sdxl"))
SD_TEACHER, SDXL_TEACHER = {"pretrained_teacher_model": "sd1_5"}, {"pretrained_teacher_model": "sdxl"}
JOBS = [
    ("kandinsky2_2/train_text_to_image_decoder", KANDINSKY, (512, 768)),
    ("kandinsky2_2/train_text_to_image_decoder_lora", KANDINSKY, (512, 768)),
    ("kandinsky2_2/train_text_to_image_prior", KANDINSKY, (512,)),
    ("kandinsky2_2/train_text_to_image_prior_lora", KANDINSKY, (512,)),
    ("stable_diffusion/train_text_to_image", SD, (512, 768)),
    ("stable_diffusion/train_text_to_image_lora", SD, (512, 768)),
    ("sdxl/train_text_to_image_sdxl", SDXL, (512, 1024)),
    ("sdxl/train_text_to_image_lora_sdxl", SDXL, (512, 1024)),
    ("lcm/train_lcm_distill_sd_wds", SD_TEACHER, (512,)),
    ("lcm/train_lcm_distill_lora_sd_wds", SD_TEACHER, (512,)),
    ("lcm/train_lcm_distill_sdxl_wds", SDXL_TEACHER, (1024,)),
    ("lcm/train_lcm_distill_lora_sdxl_wds", SDXL_TEACHER, (1024,)),
]
# Tried one after another until a job fits: what costs least comes first.
STEPS = [
    ("nothing", {"cached": False}),
    ("cache", {}),
    ("cache, checkpointing", {"gradient_checkpointing": True}),
    ("cache, checkpointing, bf16", {"gradient_checkpointing": True, "mixed_precision": "bf16"}),
    ("cache, checkpointing, 8-bit Adam", {"gradient_checkpointing": True, "use_8bit_adam": True}),
    (
        "cache, checkpointing, bf16 O2",
        {"gradient_checkpointing": True, "mixed_precision": "bf16", "amp_level": "O2"},
    ),
]


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
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    with tempfile.TemporaryDirectory() as root:
        for script, models, resolutions in JOBS:
            if sys.argv[1:] and short_name(script) not in sys.argv[1:]:
                continue
            job = load_script(ROOT / "examples" / f"{script}.py")
            flags = [f"--{flag}={write_folder(name, Path(root) / name)}" for flag, name in models.items()]
            for resolution in resolutions:
                args = job.build_parser().parse_args(
                    [*flags, "--dry_run", "--train_batch_size=1", f"--resolution={resolution}", "--encoded_cache_dir=x",
                     f"--train_data_dir={ROOT / 'examples' / 'data' / 'photos'}"]
                )  # fmt: skip
                name = f"{short_name(script)} {resolution}"
                figures[name] = figures_of(module_class(job)(args), args)
                print(name, figures[name], flush=True)
                keep(figures)


def keep(figures: dict) -> None:
    """Write the figures, in the order of `JOBS`, and the pages."""
    order = [f"{short_name(script)} {size}" for script, _, sizes in JOBS for size in sizes]
    figures = {name: figures[name] for name in order if name in figures}
    FIGURES.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_pages(figures)


def figures_of(module, args) -> dict:
    """The figures of a job, as `write_pages` takes them."""
    inventory, options = inventory_of(module, first_row(build_dataset(args)), args), options_of(args)
    fixed = sum(size for kind, size in inventory.memory(options).items() if kind != "activations")
    encoders = inventory.memory(replace(options, cached=False))["encoders"]
    sizes = (f"{size / 1e9:.1f}" for size in (fixed, encoders, *inventory.activations.values()))
    return {
        "sizes": [f"{sum(inventory.trained) / 1e6:,.1f} M", *sizes],
        "fits": {str(size): flags_for(inventory, options, size) for size in GPU_SIZES},
    }


def short_name(script: str) -> str:
    """`lcm/train_lcm_distill_sd_wds` -> "lcm sd"; Stable Diffusion's scripts do not name it."""
    script = script.replace("stable_diffusion/train_text_to_image", "train_sd").replace("sd_lora", "lora_sd")
    name = Path(script).name.replace("train_lcm_distill_", "lcm ").removeprefix("train_text_to_image_")
    return name.removeprefix("train_").removesuffix("_wds")


def flags_for(inventory, options, size: int) -> str:
    """The first of `STEPS` with which a job fits a GPU of so many GB, in each phase of the run."""
    for name, change in STEPS:
        if inventory.peak(replace(options, **change)) <= size * 1e9:
            return name
    return FITS_NOT


if __name__ == "__main__":
    main()
