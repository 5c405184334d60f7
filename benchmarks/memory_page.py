"""docs/en/memory.md and docs/zh/memory.md from the counts that `memory.py` wrote.

python benchmarks/memory_page.py    writes the pages anew
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

from pages import fill, table, write_page

from ppdiffusers_train.tools.recommend import (
    CACHED,
    GPU_SIZES,
    inventory_from,
    peak_of,
    read_counts,
    recommend,
    smallest_gpu,
)

FITS_NOT = "–"
# The words of the tables in each language. The first column of both tables is that of `job`.
WORDS = {
    "en": {
        "job": "job, pixels",
        "sizes": "trainable | weights, gradients, AdamW | base in int8 | in nf4 | encoders | activations | "
        "with checkpointing | peak without flags but the cache | smallest GPU",
    },
    "zh": {
        "job": "任务、分辨率",
        "sizes": "可训练参数 | 权重、梯度、AdamW | int8 底模 | nf4 底模 | 编码器 | 激活值 | 激活值（重计算） | "
        "只用缓存的峰值 | 最小的 GPU",
        "cache": "缓存",
        "checkpointing": "重计算",
        "8-bit Adam": "8 位 Adam",
        "fused": "逐参数更新",
        "bf16 weights": "bf16 权重",
    },
}
SHORT = {"encoded_cache": "cache", "gradient_checkpointing": "checkpointing", "use_8bit_adam": "8-bit Adam"}
SHORT |= {"fused_backward": "fused", "param_dtype": "bf16 weights"}


def write_pages(counts: dict) -> None:
    """Write both pages from {job: its counts}."""
    for language, words in WORDS.items():
        write_page(f"{language}/memory", page(counts, language, words))


def page(counts: dict, language: str, words: dict) -> str:
    """The page in one language."""
    rows = [(name, found, int(size)) for name, found in counts.items() for size in found["sizes"]]
    sizes = [[f"{name} {size}", *cells(found, size)] for name, found, size in rows]
    gpus = [[f"{name} {size}", *(fitting(found, size, gpu, words) for gpu in GPU_SIZES)] for name, found, size in rows]
    head = [words["job"], *words["sizes"].split(" | ")]
    tables = {"sizes": table(head, sizes), "gpus": table([head[0], *(f"{size} GB" for size in GPU_SIZES)], gpus)}
    return fill(f"memory_page_{language}.md", tables)


def cells(counts: dict, resolution: int) -> list:
    """The first table's cells of a job, in GB."""
    inventory = inventory_from(counts, resolution)
    elements, frozen = sum(inventory.trained), in_float32(inventory.frozen)
    quantized = [counts["quantized"].get(kind) for kind in ("int8", "nf4")]
    smallest = smallest_gpu(counts, resolution)
    return [
        f"{elements / 1e6:,.1f} M",
        in_gb(16 * elements + frozen),
        *(in_gb(in_float32(found)) if found else FITS_NOT for found in quantized),
        *map(in_gb, (in_float32(inventory.encoders), *inventory.activations.values())),
        in_gb(peak_of(counts, resolution, CACHED)),
        f"{smallest} GB" if smallest else FITS_NOT,
    ]


def in_float32(parts: dict) -> int:
    """Total bytes of models without mixed precision."""
    return sum(sizes["no"] for sizes in parts.values())


def in_gb(size: int) -> str:
    """A number of bytes in GB."""
    return f"{size / 1e9:.1f}"


def fitting(counts: dict, resolution: int, gigabytes: int, words: dict) -> str:
    """The flags with which a job fits a GPU, in short."""
    found = recommend(counts, resolution, gigabytes)
    if found is None:
        return FITS_NOT
    named = [SHORT.get(name, value) for name, value in found.flags.items() if name != "max_grad_norm"]
    return ("、" if "cache" in words else ", ").join(words.get(name, name) for name in named)


if __name__ == "__main__":
    write_pages(read_counts())
