"""What pages say about the code and about each other's numbers is what stands there."""

import ppdiffusers_train  # noqa: F401  (before paddle)

import re
import sys

import pytest

from ppdiffusers_train.toy.demo.jobs import JOBS
from tests.conftest import ROOT, load_script
from tests.docs.pages import found, read, tables

pytestmark = pytest.mark.once  # no Paddle in it


def test_the_architecture_names_files_and_functions_that_exist():
    text = read("docs/architecture.md")
    find = {
        name: next((p for p in (ROOT / name, ROOT / "ppdiffusers_train" / name) if p.is_file()), None)
        for name in re.findall(r"`([\w/]+\.py)`", text)
    }
    assert len(find) > 30 and None not in find.values(), [name for name, path in find.items() if not path]
    rows = [row for row in text.split("## Four questions")[1].split("\n## ")[0].splitlines() if "`" in row]
    assert len(rows) == 4
    for row in rows:
        code = "".join(find[name].read_text(encoding="utf-8") for name in re.findall(r"`([\w/]+\.py)`", row))
        names = re.findall(r"`(\w+)`", row)
        assert names and not [name for name in names if not re.search(rf"^ *(def|class) {name}\b", code, re.M)], row


@pytest.mark.parametrize("name", ["examples/README.md", "examples/README_zh.md"])
def test_every_script_has_a_row_with_its_smallest_gpu(name):
    """That of the page about memory, at each size that stands there."""
    sizes, *jobs = next(table for table in tables("docs/en/memory.md") if "8 GB" in table[0])
    smallest = {}  # {job: [(pixels, GB)]}
    for job, *cells in jobs[1:]:
        gpus = [int(gpu.removesuffix(" GB")) for gpu, cell in zip(sizes[1:], cells) if cell != "–"]
        which, pixels = job.rsplit(maxsplit=1)
        smallest.setdefault(which, []).extend((pixels, gpu) for gpu in gpus[:1])
    rows = [row for table in tables(name) for row in table[2:]]
    named = [re.search(r"`([^`]*/train_[^`]*\.py)`", " ".join(row)) for row in rows]
    rows = {script[1]: row[-1] for script, row in zip(named, rows) if script and "your_own_job" not in script[1]}
    names = {job.script: name for name, job in JOBS.items()}
    scripts = {str(file.relative_to(ROOT / "examples")): file for file in (ROOT / "examples").glob("*/train_*.py")}
    assert rows.keys() == {script for script in scripts if "your_own_job" not in script}
    for script, cell in rows.items():
        gpus = smallest.get(names.get(script), [])
        if len({gpu for _, gpu in gpus}) > 1:
            expected = ", ".join(f"{gpu} GB ({pixels})" for pixels, gpu in gpus)
        elif len(gpus) > 1:
            expected = f"{gpus[0][1]} GB ({', '.join(pixels for pixels, _ in gpus)})"
        else:
            expected = f"{gpus[0][1]} GB" if gpus else "`--dry_run`"
        assert cell == expected, script


@pytest.mark.parametrize("name", found(["docs/*/your-own-job.md"]))
def test_methods_of_a_job_that_are_named_exist(name):
    job = load_script(ROOT / "examples" / "your_own_job" / "train_vae_decoder.py")
    (table,) = [table for table in tables(name) if any("`preprocess(" in row[0] for row in table)]
    methods = [re.match(r"`(\w+)", row[0])[1] for row in table[2:]]
    assert len(methods) == 15 and all(hasattr(job.VAEDecoderTrainingModule, method) for method in methods)


@pytest.mark.parametrize("language", ("en", "zh"))
def test_the_pages_of_memory_are_those_of_the_counts(language):
    sys.path.append(str(ROOT / "benchmarks"))
    import memory_page

    page = memory_page.page(memory_page.read_counts(), language, memory_page.WORDS[language])
    assert read(f"docs/{language}/memory.md") == page
