"""What examples/README.md says: its commands are run, its snippets and tables compared with what they cite."""

import ppdiffusers_train  # noqa: F401

import json
import os
import re
import sys

import pytest

from tests.conftest import ROOT, copy_photos, load_script
from tests.test_readme import SD, code_blocks, commands, draw_small, read

pytestmark = pytest.mark.once  # what it runs has tests of its own

READMES = ("examples/README.md", "examples/README_zh.md")
FOLDER = ROOT / "examples" / "your_own_job"


def tables(name):
    """The tables of a README: lists of rows, which are lists of cells."""
    found = re.findall(r"(?:^\|.*\|\n)+", read(name), re.M)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()] for table in found]


def test_both_languages_show_the_same_code_and_tables_of_the_same_size():
    english, chinese = map(code_blocks, READMES)
    assert len(english) == 5 and english == chinese
    shapes = [[[len(row) for row in table] for table in tables(name)] for name in READMES]
    assert len(shapes[0]) == 4 and shapes[0] == shapes[1]


@pytest.mark.parametrize("name", READMES)
def test_every_script_has_a_row_with_its_smallest_card(name):
    """That of docs/en/memory.md, at each size that stands there."""
    sizes, *jobs = tables("docs/en/memory.md")[-1]
    smallest = {}  # {job: [(pixels, GB)]}
    for job, *cells in jobs[1:]:
        cards = [int(card.removesuffix(" GB")) for card, cell in zip(sizes[1:], cells) if cell != "–"]
        which, pixels = job.rsplit(maxsplit=1)
        smallest.setdefault(which, []).extend((pixels, card) for card in cards[:1])
    rows = {row[1].strip("`"): row[-1] for row in tables(name)[0][2:-1]}
    scripts = {str(file.relative_to(ROOT / "examples")): file for file in (ROOT / "examples").glob("*/train_*.py")}
    assert rows.keys() == {script for script in scripts if "your_own_job" not in script}
    for script, cell in rows.items():
        cards = smallest.get(scripts[script].stem.removeprefix("train_text_to_image_"), [])
        if len({card for _, card in cards}) > 1:
            expected = ", ".join(f"{card} GB ({pixels})" for pixels, card in cards)
        elif len(cards) > 1:
            expected = f"{cards[0][1]} GB ({', '.join(pixels for pixels, _ in cards)})"
        else:
            expected = f"{cards[0][1]} GB" if cards else "`--dry_run`"
        assert cell == expected, script


@pytest.mark.parametrize("name", READMES)
def test_flags_and_methods_that_are_named_exist(name):
    job = load_script(FOLDER / "train_text_to_image_sd.py")
    text, theirs = read(name), {"--task"}  # DiffSynth-Studio's
    known = {option for action in job.build_parser()._actions for option in action.option_strings}
    assert set(re.findall(r"--\w+", text)) - theirs - known == set()
    methods = [re.match(r"`(\w+)", row[0])[1] for row in tables(name)[1][2:]]
    assert len(methods) == 13 and all(hasattr(job.SDTrainingModule, method) for method in methods)


def test_a_reader_can_type_all_of_it_in_this_order(sd, tmp_path, monkeypatch):
    copy_photos(tmp_path / "examples" / "data" / "photos", 7)
    (tmp_path / FOLDER.relative_to(ROOT)).mkdir()
    monkeypatch.chdir(tmp_path)
    draw_small(monkeypatch)
    script = (FOLDER / "train_text_to_image_sd.py").read_text(encoding="utf-8")
    job = load_script(FOLDER / "train_text_to_image_sd.py")
    small = ["--resolution=64", "--max_train_steps=2", "--checkpointing_steps=2", "--report_to=none"]
    small += ["--num_validation_images=1", "--validation_inference_steps=2", "--validation_steps=2"]
    for language, code in code_blocks("examples/README.md"):
        if language == "bash":
            for words in commands(code):
                if words[0] == "cd":
                    os.chdir(words[1])  # `monkeypatch.chdir` above goes back at the end
                else:
                    assert words[:3] == ["python", "-u", "train_text_to_image_sd.py"]
                    job.main([word.replace(SD, str(sd)) for word in words[3:]] + small)
        elif code.startswith("    "):
            assert code in script, "what is shown of the script stands in it"
        else:
            exec(compile(code, "examples/README.md", "exec"), {})
    written = {path.name for path in (tmp_path / FOLDER.relative_to(ROOT)).iterdir()}
    assert written == {"sd-model", "sd.png"}


@pytest.mark.parametrize("language", ("en", "zh"))
def test_the_pages_of_memory_are_those_of_the_figures(language):
    sys.path.append(str(ROOT / "benchmarks"))
    import memory_page

    figures = json.loads(memory_page.FIGURES.read_text(encoding="utf-8"))
    assert read(f"docs/{language}/memory.md") == memory_page.page(figures, language)
