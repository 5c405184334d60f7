"""docs/en/memory.md and docs/zh/memory.md from the figures of `memory.py`.

python benchmarks/memory_page.py    writes the pages anew from docs/memory.json
"""

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
FIGURES = DOCS / "memory.json"
FITS_NOT = "–"
# The words of the tables in each language; `head` is that of the first table, whose first column both have.
WORDS = {
    "en": {
        "head": "job, pixels | trainable | weights, gradients, AdamW | encoders | activations | with checkpointing",
    },
    "zh": {
        "head": "任务、分辨率 | 可训练参数 | 权重、梯度、AdamW | 编码器 | 激活值 | 激活值（重计算）",
        "nothing": "无需参数",
        "cache": "缓存",
        "checkpointing": "重计算",
        "8-bit Adam": "8 位 Adam",
    },
}


def write_pages(figures: dict) -> None:
    """Write both pages.

    Args:
        figures: {"decoder 512": {"sizes": cells of the first table, "fits": {"8": flags for a GPU of 8 GB, …}}, …}
    """
    for language in WORDS:
        (DOCS / language / "memory.md").write_text(page(figures, language), encoding="utf-8")


def page(figures: dict, language: str) -> str:
    """The page in one language."""
    text = Path(__file__).with_name(f"memory_page_{language}.md").read_text(encoding="utf-8")
    words = WORDS[language]
    sizes = [[job, *found["sizes"]] for job, found in figures.items()]
    gpus = [[job, *(translated(flags, words) for flags in found["fits"].values())] for job, found in figures.items()]
    head, names = words["head"].split(" | "), next(iter(figures.values()))["fits"]
    text = text.replace("{sizes}", table(head, sizes))
    return text.replace("{gpus}", table([head[0], *(f"{size} GB" for size in names)], gpus))


def translated(flags: str, words: dict) -> str:
    """`cache, checkpointing, bf16` in the language of `words`; names of flags stay."""
    comma = "、" if "nothing" in words else ", "
    return comma.join(words.get(flag, flag) for flag in flags.split(", "))


def table(header, rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    write_pages(json.loads(FIGURES.read_text(encoding="utf-8")))
