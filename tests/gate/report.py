"""Writes docs/results.md and its pictures from what `make gate` measured.

python -m tests.gate.report outputs/gate docs

The figures are kept in docs/results.json: an experiment that the folder does not have stays as it was measured before.
"""

import json
import math
import shutil
import sys
from pathlib import Path

from tests.gate.experiments import (
    DISTILLATION,
    EXPERIMENTS,
    FAMILIES,
    FINE_TUNING,
    GUIDANCE,
    JUDGED,
    LONGER,
    PROMPTS,
    THIRD,
    job_of,
)

INTRODUCTION = f"""# What each job learns, measured

`make gate` writes this page. It trains every job on [the world of shapes](../ppdiffusers_train/toy/shapes.py), on a
CPU, with the script that trains the published models, draws pictures with the result, and has them read by
[a judge](../ppdiffusers_train/toy/judge.py) that is a program: shape, colour, background, and the look (plain,
outlined, striped). There are {len(PROMPTS)} pictures for pretrained and distilled pipelines, {len(THIRD)} for each new
look and each option. All captions, English and Chinese, name combinations that no training has had.
[tests/gate/test_gate.py](../tests/gate/test_gate.py) has the bounds that these figures must keep.
"""
NEW_LOOK = """## A new look

Fine-tuned on pictures in one look, whose captions do not name it. Before, a caption that names no look gets a plain
shape; after, it should get one in the new look. That is outlined; for the prior striped, as embeddings tell
striped shapes from plain ones, but not outlined ones.
"""
OPTIONS = f"""## What options do

Stable Diffusion's UNet from random weights, 2000 steps of 16 plain pictures. Of {len(THIRD)} pictures, the share with
shape, colour and background right, by guidance scale.
"""
COMPARED = {
    "Min-SNR": (
        "`--snr_gamma 5` weighs timesteps so that none outvotes the others; what is expected is faster learning.",
        ("plain", "min-SNR"),
    ),
    "EMA": (
        "At a constant learning rate the last weights are noisy; their moving average (`--use_ema`) should be better.",
        ("constant rate", "constant rate, EMA"),
    ),
    "The smallest batch": (
        "One sample at a time, 16 to a step (`--gradient_accumulation_steps 16`), should do as well as all at once.",
        ("plain", "one sample at a time"),
    ),
    "Dropped captions": (
        "Guidance needs to know what is drawn without a caption: `--proportion_empty_prompts 0.1` teaches it.",
        ("no dropped captions", "plain"),
    ),
}
PROPERTIES = ("shape", "colour", "background", "all")
HEAD = ["", "shape right", "colour right", "background right", "all three"]


def report(measured: dict) -> str:
    """The page, from {experiment: figures} of what has been measured."""
    parts = [INTRODUCTION, *pretrained(measured), *new_look(measured), *few_steps(measured), *options(measured)]
    missing = [name for name in EXPERIMENTS if name not in measured]
    if missing:
        parts.insert(1, f"Not measured yet: {', '.join(missing)}.\n")
    return "\n".join(parts)


def pretrained(measured):
    families = [family for family in FAMILIES if f"pretrained {family}" in measured]
    yield "## The pretrained pipelines\n"
    yield table(HEAD, [row(family, measured[f"pretrained {family}"], PROPERTIES) for family in families])
    for family in families:
        yield f"![Drawn by {family}](results/pretrained-{family}.png)\n"
        for counts in measured[f"pretrained {family}"]["confusion"].values():
            head = ["asked for \\ seen", *next(iter(counts.values()))]
            yield table(head, [[asked, *seen.values()] for asked, seen in counts.items()])


def new_look(measured):
    names = [name for name in FINE_TUNING if name in measured]
    yield NEW_LOOK
    stages = [
        row(f"{name}, {stage}", figures, (*PROPERTIES, job_of(name).look))
        for name in names
        for stage, figures in measured[name].items()
        if isinstance(figures, dict)
    ]
    yield table([*HEAD, "in the new look"], stages)
    for name in names:
        _, flags, pictures = LONGER.get(name, (name, (), job_of(name).pictures))
        yield f"{name}: {' '.join([f'from {pictures} pictures', *flags])}."
        if "share of parameters" in measured[name]:
            same = "are" if measured[name]["scale 0 is the base"] else "are NOT"
            share = percent(measured[name]["share of parameters"])
            yield f"It is {share} of the model's parameters; at scale 0 its pictures {same} the base's to the bit."
        yield f"\n![{name}](<results/{name}.png>)\n"


def few_steps(measured):
    yield "## Four steps instead of fifty\n"
    names = [name for name in DISTILLATION if name in measured]
    drawn = [(f"{name}: {who}", figures) for name in names for who, figures in measured[name].items()]
    yield table(HEAD, [row(name, figures, PROPERTIES) for name, figures in drawn])
    yield from (f"![{name}](results/{name}.png)\n" for name in names)


def options(measured):
    if "options" not in measured:
        return
    yield OPTIONS
    figures = measured["options"]
    for title, (words, runs) in COMPARED.items():
        yield f"### {title}\n\n{words}\n"
        head = ["", *(f"guidance {scale:g}" for scale in GUIDANCE)]
        yield table(head, [[run, *(percent(figures[run][str(scale)]["all"]) for scale in GUIDANCE)] for run in runs])
        one, other = (figures[run][str(JUDGED)]["all"] for run in runs)
        yield f"At guidance {JUDGED:g}, {verdict(one, other)}\n"


def verdict(one: float, other: float, pictures: int = len(THIRD)) -> str:
    """Whether two shares differ by more than two standard errors of their difference."""
    difference = 100 * abs(one - other)
    chance = 200 * math.sqrt((one * (1 - one) + other * (1 - other)) / pictures)
    seen = "an effect is seen" if difference > chance else "no effect is seen"
    return f"{seen}: {difference:.1f} points, where chance alone explains up to {chance:.1f}."


def row(name: str, figures: dict, columns) -> list:
    return [name, *(percent(figures[column]) for column in columns)]


def percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def table(head: list, rows: list) -> str:
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in (head, ["---"] * len(head), *rows))


def main(source, docs):
    source, docs = Path(source), Path(docs)
    kept = docs / "results.json"
    measured = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    measured |= {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(source.glob("*.json"))}
    kept.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    (docs / "results").mkdir(exist_ok=True)
    for picture in source.glob("*.png"):
        shutil.copy(picture, docs / "results")
    (docs / "results.md").write_text(report(measured), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
