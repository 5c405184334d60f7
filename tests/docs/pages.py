"""The pages of the docs, and what stands in them: blocks, tables, titles, links."""

import functools
import re
import shlex
from pathlib import Path

from tests.conftest import ROOT

ENGLISH = ("README.md", "examples/README.md", "docs/en/*.md", "examples/*/README.md")
OTHERS = ("docs/*.md", "ppdiffusers_train/toy/README.md", "CHANGELOG.md")  # in English only
EXECUTED = ("bash", "python", "yaml", "json")
SHOWN = ("text",)
THEIR_LIBRARIES = ("diffusers", "torch")  # a snippet that begins with one of them runs where they are installed

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def found(patterns):
    """Names of the files that match, from the root of the repository, in order."""
    return [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def in_chinese(name):
    """The Chinese page that belongs to an English one."""
    if name.startswith("docs/en/"):
        return name.replace("docs/en/", "docs/zh/")
    return name.replace("README.md", "README_zh.md")


def english_pages():
    return found(ENGLISH)


def all_pages():
    """Every page, in both languages."""
    chinese = [in_chinese(name) for name in english_pages()]
    return [*english_pages(), *(name for name in chinese if (ROOT / name).is_file()), *found(OTHERS)]


def executable_pages():
    """Pages that a test runs from top to bottom: a Chinese page has the blocks of the English one."""
    pages = [*english_pages(), *found(OTHERS)]
    return [name for name in pages if any(language in EXECUTED for language, _, _ in code_blocks(name))]


@functools.cache
def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(name):
    """[(language, code, text before it)] of the fenced blocks of a page, in order."""
    text = read(name)
    return [(block[1], block[2], text[: block.start()]) for block in FENCED.finditer(text)]


def prose(name):
    """A page without its fenced blocks."""
    return FENCED.sub("", read(name))


def inline_code(text):
    return re.findall(r"`([^`\n]+)`", text)


def tables(name):
    """The tables of a page: lists of rows, which are lists of cells."""
    rows = re.findall(r"(?:^\|.*\|\n)+", prose(name), re.M)
    return [[cells(row) for row in table.splitlines()] for table in rows]


def cells(row):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def titles(name, level=r"#+"):
    return re.findall(rf"^{level} (.*?) *$", prose(name), re.M)


def anchors(name):
    """The names that GitHub gives a page's titles; a repeated one gets a number."""
    seen, result = {}, set()
    for title in titles(name):
        title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title)
        anchor = re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
        result.add(f"{anchor}-{seen[anchor]}" if anchor in seen else anchor)
        seen[anchor] = seen.get(anchor, 0) + 1
    return result


def links(name):
    """Targets of a page's links and pictures, without those to other sites."""
    targets = (link.strip("<>") for link in re.findall(r"\]\(([^)]+)\)", prose(name)))
    return [link for link in targets if not link.startswith(("https://", "http://"))]


def is_for_torch(code):
    """Whether a snippet is for diffusers or torch: its first import says so."""
    first = re.search(r"^(?:import|from) (\w+)", code, re.M)
    return bool(first) and first[1] in THEIR_LIBRARIES


def commands(code):
    """The commands of a bash block, continued lines joined, comments left out."""
    lines = (line.strip() for line in code.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def words_of(command, variables):
    """A command's words; `$NAME` and `${NAME:-other}` are replaced, but not in single quotes.

    Raises:
        KeyError: a variable is not in `variables`.
    """

    def value(match):
        name = match[1] or match[2]
        if name is None:
            return match[0]
        return variables.get(name, match[3]) if match[3] is not None else variables[name]

    return shlex.split(re.sub(r"'[^']*'|\$(\w+)|\$\{(\w+)(?::-([^}]*))?\}", value, command))


def training_commands(name):
    """Words of the commands of a page that start a training script."""
    found = []
    for language, code, _ in code_blocks(name):
        if language == "bash":
            lines = [shlex.split(command) for command in commands(code)]
            found += [words for words in lines if any(Path(word).match("train_*.py") for word in words)]
    return found
