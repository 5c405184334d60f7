"""docs/true_size.md from the figures of `true_size.py`.

python benchmarks/true_size_page.py    writes the page anew from docs/true_size.json
"""

import json
from pathlib import Path

HEAD = Path(__file__).with_name("true_size_page.md")
DOCS = Path(__file__).resolve().parent.parent / "docs"
TITLES = {
    "sd1_5_lcm_lora": "Stable Diffusion 1.5, LCM LoRA",
    "prior_lora": "Kandinsky 2.2 prior, LoRA",
    "decoder_lora": "Kandinsky 2.2 decoder, LoRA",
    "sd3_lora": "SD3 medium, LoRA, without T5",
    "sdxl_lora": "SDXL, LoRA",
    "prior_full": "Kandinsky 2.2 prior, full",
    "decoder_full": "Kandinsky 2.2 decoder, full, 8-bit AdamW",
    "sdxl_full": "SDXL, full layout, its middle block is trained",
}
BAR = 0.15  # by which a peak may differ from its estimate
TRAINING = ("train", "resume", "export")  # steps that are runs of the script


def page(figures: dict) -> str:
    """The page from {case: figures}; it lists what is missing."""
    text = HEAD.read_text(encoding="utf-8")
    measured = {name: figures[name] for name in TITLES if {"estimate", "train"} <= figures.get(name, {}).keys()}
    for mark, rows in (
        ("models", models(measured)),
        ("memory", [memory_row(name, found) for name, found in measured.items()]),
        ("phases", [phase_row(name, found, step) for name, found in measured.items() for step in TRAINING]),
        ("seconds", [seconds_row(name, found) for name, found in measured.items()]),
    ):
        text = text.replace(f"{{{mark}}}", "\n".join("| " + " | ".join(row) + " |" for row in rows if row))
    failed = [
        f"**{TITLES[name]}** failed:\n\n```\n{found['failed']}\n```"
        for name, found in figures.items()
        if "failed" in found
    ]
    missing = [title for name, title in TITLES.items() if name not in measured]
    if missing:
        failed.append(f"Not measured yet: {'; '.join(missing)}.")
    return text.replace("{failed}", "\n\n".join(failed)).rstrip() + "\n"


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


def phase_row(name: str, found: dict, step: str) -> list:
    """The peaks of a run's phases."""
    if step not in found:
        return None
    phases = found[step]["phases"]
    cells = [
        gigabytes(phases[phase]) if phase in phases else "–" for phase in ("load", "train", "checkpoint", "result")
    ]
    return [TITLES[name], {"train": "train, killed", "export": "export for diffusers"}.get(step, step), *cells]


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
    figures = json.loads((DOCS / "true_size.json").read_text(encoding="utf-8"))
    (DOCS / "true_size.md").write_text(page(figures), encoding="utf-8")
