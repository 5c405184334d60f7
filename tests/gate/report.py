"""Writes docs/results.md from what `make gate` measured.

python -m tests.gate.report outputs/gate docs
"""

import json
import shutil
import sys
from pathlib import Path

from ppdiffusers_train.toy.jobs import JOBS
from tests.gate.experiments import FAMILIES, GUIDANCE, RUNS

INTRODUCTION = """# What each job learns, measured

`make gate` trains every job on [the world of shapes](../ppdiffusers_train/toy/shapes.py) with the script that trains the published models, draws 200 pictures with the
result, and has them read by [a judge](../ppdiffusers_train/toy/judge.py) that is a program: shape, colour, background, and look (plain, outlined, striped). All captions name
combinations that no training has had. This page is written by that command; [tests/gate/test_gate.py](../tests/gate/test_gate.py) has the bounds.
Everything runs on a CPU.
"""
WHAT = ("shape", "colour", "background", "all")


def percent(share: float) -> str:
    return f"{share:.1%}".replace(".0%", "%").replace("%", " %")


def table(head, rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def figures_row(name, figures, looks=("outlined",)):
    return [name, *(percent(figures[what]) for what in (*WHAT, *looks))]


def report(measured: dict) -> str:
    """The page, from {experiment: figures}."""
    head = ["", "shape right", "colour right", "background right", "all three"]
    parts = [INTRODUCTION, "## The pretrained pipelines\n"]
    parts.append(table(head, [figures_row(family, measured[f"pretrained {family}"], ()) for family in FAMILIES]))
    for family in FAMILIES:
        parts.append(f"\n![What {family} draws](results/pretrained-{family}.png)")
    for family in FAMILIES:
        parts.append(f"\nWhat {family} was asked for, and what the judge saw:")
        for counts in measured[f"pretrained {family}"]["confusion"].values():
            seen = [name for name in next(iter(counts.values()))]
            parts.append(
                "\n" + table(["asked \\ seen", *seen], [[asked, *row.values()] for asked, row in counts.items()])
            )
    parts.append("\n## A new look\n\nFine-tuned on 24 outlined pictures; the pretrained pipelines draw plain ones.\n")
    rows = []
    for name, job in JOBS.items():
        if not job.distils:
            figures = measured[name]
            rows += [
                figures_row(f"{name}, {when}", figures[when]) for when in figures if isinstance(figures[when], dict)
            ]
    parts.append(table([*head, "outlined"], rows))
    for name, job in JOBS.items():
        if not job.distils:
            if job.kind.endswith("lora"):
                parts.append(
                    f"\n{name} learns {percent(measured[name]['share of parameters'])} of the parameters; at scale 0 its pictures are the base's "
                    + ("to the bit." if measured[name]["scale 0 is the base"] else "NOT.")
                )
            parts.append(f"\n![{name}, before and after](results/{name}.png)")
    parts.append("\n## Four steps instead of fifty\n")
    rows = [
        figures_row(f"{name}: {who}", figures, ())
        for name, job in JOBS.items()
        if job.distils
        for who, figures in measured[name].items()
    ]
    parts.append(table(head, rows))
    parts += [f"\n![{name}, before and after](results/{name}.png)" for name, job in JOBS.items() if job.distils]
    parts.append(
        "\n## What options do\n\nStable Diffusion's UNet from random weights, 1000 steps of 16 plain pictures; the share of 100 pictures with all three right, by guidance scale.\n"
    )
    rows = [[name, *(percent(measured["options"][name][str(scale)]["all"]) for scale in GUIDANCE)] for name in RUNS]
    parts.append(table(["", *(f"guidance {scale}" for scale in GUIDANCE)], rows))
    return "\n".join(parts) + "\n"


def main(source, docs):
    source, docs = Path(source), Path(docs)
    measured = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in source.glob("*.json")}
    (docs / "results").mkdir(exist_ok=True)
    for picture in source.glob("*.png"):
        shutil.copy(picture, docs / "results")
    (docs / "results.md").write_text(report(measured), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
