"""docs/en/memory.md and docs/zh/memory.md from the figures of `memory.py`.

python benchmarks/memory_page.py    writes the pages anew from docs/memory.json
"""

from pages import DOCS, fill, read_figures, table, write_page

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
        write_page(f"{language}/memory", page(figures, language))


def page(figures: dict, language: str) -> str:
    """The page in one language."""
    words = WORDS[language]
    sizes = [[job, *found["sizes"]] for job, found in figures.items()]
    gpus = [[job, *(translated(flags, words) for flags in found["fits"].values())] for job, found in figures.items()]
    head, names = words["head"].split(" | "), next(iter(figures.values()))["fits"]
    tables = {"sizes": table(head, sizes), "gpus": table([head[0], *(f"{size} GB" for size in names)], gpus)}
    return fill(f"memory_page_{language}.md", tables)


def translated(flags: str, words: dict) -> str:
    """`cache, checkpointing, bf16` in the language of `words`; names of flags stay."""
    comma = "、" if "nothing" in words else ", "
    return comma.join(words.get(flag, flag) for flag in flags.split(", "))


if __name__ == "__main__":
    write_pages(read_figures("memory"))
