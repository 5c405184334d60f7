"""What `ppdiffusers-train lora inspect` says about a LoRA's file."""

import re
from collections import Counter
from pathlib import Path

from ppdiffusers_train.models.lora_files import adapter_config, read_lora
from ppdiffusers_train.models.lora_init import find_full
from ppdiffusers_train.models.lora_merge import WholePipeline, add_changes
from ppdiffusers_train.models.lora_names import PEFT_PREFIX
from ppdiffusers_train.models.lora_svd import norm_of
from ppdiffusers_train.runtime.checkpoint import STATE_FILE
from ppdiffusers_train.runtime.run_folder import ARGUMENTS_FILE, read_json
from ppdiffusers_train.tensor_files import open_tensors

# Width of the text embeddings that a UNet's cross-attention reads.
UNETS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL", 1280: "SDXL's refiner"}
SHOWN = 5  # layers with the largest norms


def report(file: Path, base=None) -> dict:
    """All that is known about a LoRA's file, as JSON.

    Args:
        base: a pipeline that it has to fit, or None.
    Raises:
        UserError: it cannot be read, or does not fit.
    """
    tensors, metadata = open_tensors(file)
    pipeline = WholePipeline(base, "--base") if base else None
    updates = read_lora(file, pipeline.layers_per_block()) if pipeline else read_lora(file)
    if pipeline:
        changes = {}
        add_changes(changes, pipeline, file, 1.0, file)
    norms = {layer: norm_of(update) for layer, update in updates.items()}
    return {
        "file": str(file),
        "layout": layout_of(tensors, metadata),
        "fits": fits(updates),
        "base": f"{base}: {', '.join(changes)}" if pipeline else None,
        "layers": dict(Counter(layer.partition(".")[0] for layer in updates)),
        "targets": sorted({end_of(layer) for layer in updates}),
        "ranks": counted(update.rank for update in updates.values()),
        "alphas": counted(update.scale * update.rank for update in updates.values()),
        "dtypes": counted(str(update.stored_up.dtype) for update in updates.values()),
        "norms": norms,
        "trained_in_full": sorted(open_tensors(beside)[0]) if (beside := find_full(file, file.parent)) else [],
        "metadata": metadata,
        "config": adapter_config(file, {}, any(key.startswith(PEFT_PREFIX) for key in tensors)),
        "flags": training_flags(file.parent),
    }


def layout_of(tensors: dict, metadata: dict) -> str:
    """The library whose names the tensors have."""
    if any(".lora_down." in key for key in tensors):
        original = any(re.match(r"lora_unet_(input|output|middle)_", key) for key in tensors)
        return f"kohya, layers named as in {'the original code' if original else 'diffusers'}"
    if any(key.startswith(PEFT_PREFIX) for key in tensors):
        return "PEFT"
    return "ppdiffusers" if metadata.get("format") == "pd" else "diffusers"


def fits(updates: dict) -> str:
    """The family of models that a LoRA's layers belong to."""
    components = {layer.partition(".")[0] for layer in updates}
    names = [layer.partition(".")[2] for layer in updates if layer.startswith(("unet.", "transformer."))]
    if not names:
        return f"the text encoders {', '.join(sorted(components))} alone"
    if "transformer" in components:
        return "the transformer of Stable Diffusion 3"
    if all(name.startswith(("transformer_blocks.", "proj_", "embedding_", "time_embedding.")) for name in names):
        return "the prior of Kandinsky 2.2"
    if any(re.search(r"attentions\.\d+\.(to_|add_)", name) for name in names):
        return "the UNet of Kandinsky 2.2's decoder"
    widths = {u.shape[1] for layer, u in updates.items() if re.search(r"attn2\.to_[kv]$", layer)}
    if len(widths) != 1:
        return "a UNet; no layer that reads text tells of which family"
    width = widths.pop()
    return f"a UNet that reads text embeddings of width {width}: {UNETS.get(width, 'no published family')}"


def end_of(layer: str) -> str:
    """The end of a layer's name, as `--lora_target_modules` takes it."""
    words = layer.split(".")
    return ".".join(words[-2 if words[-1].isdigit() else -1 :])


def counted(values) -> dict:
    """{value as text: how often it occurs}."""
    found = Counter(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def training_flags(folder: Path) -> dict:
    """The flags of the run that wrote a folder, of which it keeps a record; {} if there is none."""
    record = read_json(folder / ARGUMENTS_FILE) or read_json(folder / STATE_FILE) or {}
    flags = record.get("arguments", {})
    return {name: value for name, value in flags.items() if value is not None} if isinstance(flags, dict) else {}


def describe(found: dict) -> str:
    """The report as text."""

    def listed(counts: dict) -> str:
        return (
            ", ".join(f"{value} ({count})" for value, count in counts.items())
            if len(counts) > 1
            else next(iter(counts))
        )

    norms = sorted(found["norms"].items(), key=lambda pair: -pair[1])
    lines = {
        "file": found["file"],
        "layout": found["layout"],
        "fits": found["fits"],
        "base": found["base"] and f"fits {found['base']}",
        "layers": ", ".join(f"{count} of {component}" for component, count in found["layers"].items()),
        "targets": ",".join(found["targets"]),
        "rank": listed(found["ranks"]),
        "alpha": listed(found["alphas"]),
        "dtype": listed(found["dtypes"]),
        "norms": f"median {norms[len(norms) // 2][1]:.4g}, largest {norms[0][1]:.4g}, smallest {norms[-1][1]:.4g}",
        "largest": ", ".join(f"{layer} {norm:.4g}" for layer, norm in norms[:SHOWN]),
        "trained in full": ", ".join(found["trained_in_full"]),
        "metadata": ", ".join(f"{name}={value}" for name, value in found["metadata"].items()),
        "config": ", ".join(f"{name}={value}" for name, value in found["config"].items()),
        "flags": " ".join(f"--{name} {value}" for name, value in found["flags"].items()),
    }
    return "\n".join(f"{name}: {text}" for name, text in lines.items() if text)
