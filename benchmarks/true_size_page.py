"""docs/true_size.md from the figures of `true_size.py`.

python benchmarks/true_size_page.py    writes the page anew from docs/true_size.json
"""

from pages import fill, read_figures, rows_of, write_page

TITLES = {
    "sd1_5_lcm_lora": "Stable Diffusion 1.5, LCM LoRA",
    "prior_lora": "Kandinsky 2.2 prior, LoRA",
    "decoder_lora": "Kandinsky 2.2 decoder, LoRA",
    "sd3_lora": "SD3 medium, LoRA, without T5",
    "sdxl_lora": "SDXL, LoRA",
    "prior_full": "Kandinsky 2.2 prior, full",
    "decoder_full": "Kandinsky 2.2 decoder, full, 8-bit AdamW",
    "sdxl_full": "SDXL, full layout, its middle block is trained",
    "sdxl_fused": "SDXL, full, `--fused_backward --optimizer adafactor`",
    "sdxl_bf16": "SDXL, the same with `--param_dtype bf16`",
}
BAR = 0.15  # by which a peak may differ from its estimate
TRAINING = ("train", "resume", "export")  # steps that are runs of the script


def page(figures: dict) -> str:
    """The page from {case: figures}; it lists what is missing."""
    measured = {name: figures[name] for name in TITLES if {"estimate", "train"} <= figures.get(name, {}).keys()}
    tables = {
        "models": models(measured),
        "memory": [memory_row(name, found) for name, found in measured.items()],
        "phases": [row for name, found in measured.items() for row in phase_rows(name, found)],
        "seconds": [seconds_row(name, found) for name, found in measured.items()],
    }
    failed = [
        f"**{TITLES[name]}** failed:\n\n```\n{found['failed']}\n```"
        for name, found in figures.items()
        if "failed" in found
    ]
    missing = [title for name, title in TITLES.items() if name not in measured]
    if missing:
        failed.append(f"Not measured yet: {'; '.join(missing)}.")
    parts = {mark: rows_of(rows) for mark, rows in tables.items()}
    return fill("true_size_page.md", {**parts, "failed": "\n\n".join(failed)}).rstrip() + "\n"


def models(measured: dict) -> list:
    """A row for each model on disk, once."""
    rows = {}
    for found in measured.values():
        for name, model in found["models"].items():
            parts = ", ".join(f"{part} {count:,}" for part, count in model["parameters"].items())
            rows[name] = [name, parts, model["dtype"], gigabytes(model["bytes"])]
    return list(rows.values())


def memory_row(name: str, found: dict) -> list:
    """Estimate and peak of a case."""
    runs = [found[step] for step in TRAINING if step in found]
    peak, mapped = max(run["own_peak"] for run in runs), max(run["peak"] for run in runs)
    before, estimate = found["nothing"]["own_peak"], found["estimate"]["peak"]
    off = peak / (estimate + before) - 1
    verdict = f"{off:+.0%}" if abs(off) <= BAR else f"**{off:+.0%}**"
    phase = max(((level, phase) for run in runs for phase, level in run["phases"].items()))[1]
    cells = [gigabytes(size) for size in (estimate, before, estimate + before, peak)]
    return [TITLES[name], *cells, verdict, phase, gigabytes(mapped)]


def phase_rows(name: str, found: dict):
    """Yield the peaks of the phases of each run."""
    titles = {"train": "train, killed", "resume": "resume", "export": "export for diffusers"}
    for step in filter(found.get, TRAINING):
        phases = found[step]["phases"]
        cells = [
            gigabytes(phases[phase]) if phase in phases else "–" for phase in ("load", "train", "checkpoint", "result")
        ]
        yield [TITLES[name], titles[step], *cells]


def seconds_row(name: str, found: dict) -> list:
    """How long things take, and how large they are."""
    train, resume, export = (found.get(step, {}) for step in TRAINING)
    seconds = [
        found["dry run"]["seconds"] if "dry run" in found else None, train.get("loaded"),
        train.get("checkpoint_seconds"), resume.get("loaded"), resume.get("result_seconds"),
        export.get("result_seconds"), found.get("load diffusers", {}).get("seconds"),
    ]  # fmt: skip
    sizes = [found.get("checkpoint_bytes"), found.get("result_bytes diffusers")]
    cells = ["–" if value is None else f"{value:.0f} s" for value in seconds]
    return [TITLES[name], *cells, *("–" if size is None else gigabytes(size) for size in sizes)]


def gigabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    write_page("true_size", page(read_figures("true_size")))
