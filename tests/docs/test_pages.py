"""The form of the pages: both languages alike, links and names that lead somewhere, lengths, titles."""

import ppdiffusers_train  # noqa: F401  (before paddle)
from ppdiffusers_train import cli

import functools
import inspect
import re
from pathlib import Path

import pytest
from paddle.distributed.launch.context import args_envs as paddle_launcher

from tests.conftest import ROOT
from tests.docs.pages import (
    FENCED,
    all_pages,
    anchors,
    code_blocks,
    english_pages,
    found,
    in_chinese,
    inline_code,
    links,
    prose,
    read,
    tables,
    titles,
    training_commands,
)
from website.flags import PAGES, command_parsers, script_parsers

pytestmark = pytest.mark.once  # no Paddle in it

NOT_MEASURED = {"qwen-image-lora"}  # pages of jobs that have no toy
JOB_PAGES = [f"docs/{language}/{name}.md" for name in PAGES for language in ("en", "zh") if name != "your-own-job"]
SECTIONS = {
    "en": [
        "Data", "One GPU", "Several GPUs", "Flags that matter", "Use the result", "Memory and speed", "Resume",
        "When it goes wrong", "See also",
    ],
    "zh": [
        "数据", "单卡训练", "多卡训练", "常用参数", "使用训练结果", "显存与速度", "断点续训", "常见问题", "相关页面",
    ],
}  # fmt: skip
TOPICS = (
    "your-data", "large-data", "single-files", "lora-files", "training", "several-gpus", "resume", "memory", "hardware",
    "from-other-trainers", "faq", "flags",
)  # fmt: skip

# Flags of other programs that pages name by themselves, and programs whose command lines are not looked at.
OTHER_FLAGS = {"--logdir", "--signal", "--model", "--local_dir"}  # of other programs
OTHER_PROGRAMS = (
    "pip",
    "visualdl",
    "tensorboard",
    "srun",
    "sbatch",
    "#SBATCH",
    "docker",
    "git",
    "apt",
    "apt-get",
    "uv",
)
OTHER_TRAINERS = re.compile(r"kohya|OneTrainer|diffusers|PaddleMIX|DiffSynth|SimpleTuner")


def exists(path):
    """Whether a path as pages write them (`tests/x.py`, `examples/*/run.sh`, `tests/x.py::test_y`) leads somewhere."""
    path, _, test = path.partition("::")
    if test:
        return f"def {test}(" in (ROOT / path).read_text(encoding="utf-8")
    return any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()


@functools.cache
def our_flags():
    """Option strings of all scripts, tools, programs of the project, and of Paddle's launcher."""
    parsers = [*script_parsers().values(), *command_parsers().values(), cli.build_parser()]
    others = [
        *(ROOT / "benchmarks").glob("*.py"),
        *(ROOT / "ppdiffusers_train" / "toy" / "recipes").glob("*.py"),
        ROOT / "ppdiffusers_train" / "tools" / "preview.py",
    ]
    sources = [inspect.getsource(paddle_launcher), *(path.read_text(encoding="utf-8") for path in others)]
    declared = {flag for source in sources for flag in re.findall(r'"(--\w+)"', source)}
    return declared | {option for parser in parsers for action in parser._actions for option in action.option_strings}


def test_every_page_that_is_promised_is_there():
    names = [*PAGES, *TOPICS]
    expected = sorted([f"docs/{language}/{name}.md" for name in names for language in ("en", "zh")])
    assert sorted(found(["docs/en/*.md", "docs/zh/*.md"])) == expected


def test_every_script_has_a_page_that_trains_with_it():
    scripts = {str(path.relative_to(ROOT / "examples")) for path in (ROOT / "examples").glob("*/train_*.py")}
    assert scripts == set(PAGES.values())
    for page, script in PAGES.items():
        commands = training_commands(f"docs/en/{page}.md")
        assert any(script.split("/")[1] in words for words in commands), page


@pytest.mark.parametrize("name", english_pages())
def test_both_languages_have_the_same_blocks_and_tables_of_the_same_size(name):
    other = in_chinese(name)
    english, chinese = ([(language, code) for language, code, _ in code_blocks(page)] for page in (name, other))
    assert english == chinese
    shapes = [[[len(row) for row in table] for table in tables(page)] for page in (name, other)]
    assert shapes[0] == shapes[1]
    assert len(titles(name)) == len(titles(other))


@pytest.mark.parametrize("name", [name for name in all_pages() if name.startswith(("docs/en/", "docs/zh/"))])
def test_a_page_leads_to_the_other_language(name):
    language, other, label = ("en", "zh", "中文") if name.startswith("docs/en/") else ("zh", "en", "English")
    title, empty, link = read(name).split("\n")[:3]
    assert title.startswith("# ") and not empty
    assert link == f"[{label}]({name.replace(f'docs/{language}/', f'../{other}/')})"


@pytest.mark.parametrize("name", all_pages())
def test_links_anchors_and_named_files_lead_somewhere(name):
    folder, missing = (ROOT / name).parent, []
    for link in links(name):
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / name
        if not target.exists() or ROOT not in [target.resolve(), *target.resolve().parents]:
            missing.append(link)
        elif anchor and anchor not in anchors(str(target.resolve().relative_to(ROOT))):
            missing.append(link)
    named = [code for code in inline_code(prose(name)) if re.fullmatch(r"(tests|docs|examples|benchmarks)/\S*", code)]
    assert not missing + [path for path in named if not exists(path)]


@pytest.mark.parametrize("name", all_pages())
def test_flags_that_are_named_exist(name):
    """But in a table from another trainer's flags (first column) to ours (second), where only ours are looked at."""
    text = re.sub(r"^\|.*\n", "", prose(name), flags=re.M)
    for table in tables(name):
        theirs = OTHER_TRAINERS.search(table[0][0])
        text += "\n".join(row[1] if theirs else " ".join(row) for row in table)
    flags = set()
    for code in inline_code(text):
        if code.split()[:1] and code.split()[0] not in OTHER_PROGRAMS:
            flags.update(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", code))
    assert flags - our_flags() - OTHER_FLAGS == set()


@pytest.mark.parametrize("name", all_pages())
def test_markup_means_the_same_on_github_and_on_the_site(name):
    """The site begins lists and tables after an empty line only, and takes a list's inner lines by four spaces."""
    lines = FENCED.sub("```", read(name)).split("\n")
    for pattern in (r"([*+-]|1\.) ", r"\|"):
        first = [line for before, line in zip(lines, lines[1:]) if before and not re.match(rf"{pattern}|  ", before)]
        assert not [line for line in first if re.match(pattern, line)], "an empty line must stand before it"
    assert not re.search(r"^ {1,3}(```|[*+-] )", "\n".join(lines), re.M)


@pytest.mark.parametrize("name", [*english_pages(), *map(in_chinese, english_pages())])
def test_no_page_is_longer_than_a_reader_likes(name):
    lines, shown = read(name).splitlines(), prose(name).splitlines()
    if name in ("README.md", "README_zh.md"):
        assert len(lines) <= 200
    if name in JOB_PAGES:
        assert 80 <= len(lines) <= 150
    if not name.endswith("_zh.md") and "/zh/" not in name:
        assert not [line for line in shown if len(line) > 120 and not line.startswith(("|", "!["))]


@pytest.mark.parametrize("name", [name for name in JOB_PAGES if (ROOT / name).is_file()])
def test_job_pages_have_the_same_sections(name):
    assert titles(name, level="##") == SECTIONS[name.split("/")[1]]
    if Path(name).stem not in NOT_MEASURED:
        assert "docs/results/" in str([(ROOT / name).parent.joinpath(link).resolve() for link in links(name)])


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_each_claim_names_the_test_of_it(name):
    (table,) = [table for table in tables(name) if sum("`tests/" in row[-1] for row in table) > 2]
    claims = table[2:]
    assert len(claims) > 15 and all(re.search(r"`tests/[\w/]+(\.py)?`", row[-1]) for row in claims)
