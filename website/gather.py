"""Gathers the pages of one language for the site: `docs/LANGUAGE`, the READMEs, and pages that both languages share.

Each page keeps its words. Links lead to where their targets are on the site: a page, a picture, or a page that shows
a source file; links to folders lose their target. The link to the other language is left out, since every page of the
site has one in its header.
"""

import posixpath
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
LINK = re.compile(r'(\]\(|\b(?:src|href)=")(<[^>]+>|[^)"\s]+)')
OTHER_LANGUAGE = re.compile(r"\A(# .*\n\n)\[(?:中文|English)\]\([^)]+\)\n\n?")
CHINESE = r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
LINE_BREAK = re.compile(rf"(?<={CHINESE})\n(?={CHINESE})")  # which a browser would show as a space
SOURCE_PAGE = "---\nsearch:\n  exclude: true\n---\n# {source}\n\n~~~~~{language}\n{text}\n~~~~~\n"
PICTURES = (".png", ".svg", ".jpg")


def pages_of(language):
    """{path in the repository: path on the site} of the pages of a language."""
    readme = "README.md" if language == "en" else "README_zh.md"
    pages = {readme: "index.md", f"examples/{readme}": "examples/index.md"}
    for path in sorted((ROOT / "examples").glob(f"*/{readme}")):
        pages[f"examples/{path.parent.name}/{readme}"] = f"examples/{path.parent.name}.md"
    for path in sorted((ROOT / "docs" / language).glob("*.md")):
        pages[f"docs/{language}/{path.name}"] = path.name
    for path in sorted((ROOT / "docs").glob("*.md")):
        pages[f"docs/{path.name}"] = path.name
    if (ROOT / "CHANGELOG.md").is_file():
        pages["CHANGELOG.md"] = "changelog.md"
    pages["ppdiffusers_train/toy/README.md"] = "toys.md"
    return pages


def gather(languages, folder):
    """Write the pages of each language into a folder with its name, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    gatherers = [Gatherer(language, Path(folder) / language) for language in languages]
    for gatherer in gatherers:
        gatherer.write_pages()
    linked = {source: target for gatherer in gatherers for source, target in gatherer.linked.items()}
    for gatherer in gatherers:  # a page has the same neighbours in each language
        gatherer.write_linked(linked)


class Gatherer:
    """Writes the pages of one language into a folder."""

    def __init__(self, language, folder):
        self.language, self.folder, self.pages = language, folder, pages_of(language)
        self.linked = {}  # {path in the repository: path on the site} of pictures and source files

    def write_pages(self):
        for source, target in self.pages.items():
            self.write(target, self.converted(source, target))

    def write_linked(self, linked):
        for source, target in linked.items():
            if source.endswith(PICTURES):
                (self.folder / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, self.folder / target)
            else:
                text = (ROOT / source).read_text(encoding="utf-8")
                self.write(target, SOURCE_PAGE.format(source=source, language=language_of(source), text=text))

    def write(self, target, text):
        path = self.folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def converted(self, source, target):
        text = OTHER_LANGUAGE.sub(r"\1", (ROOT / source).read_text(encoding="utf-8"))
        parts, last = [], 0
        for block in FENCED.finditer(text):
            parts += [self.prose(text[last : block.start()], source, target), block[0]]
            last = block.end()
        return "".join([*parts, self.prose(text[last:], source, target)])

    def prose(self, text, source, target):
        if self.language == "zh":
            text = LINE_BREAK.sub("", text)
        text = LINK.sub(lambda link: link[1] + self.link(link[2], source, target), text)
        return re.sub(r"(?<!!)\[([^\]]*)\]\(\)", r"\1", text)  # links that lead nowhere on the site

    def link(self, link, source, target):
        """A link of the file `source`, as it must be on the page `target`."""
        path, sharp, anchor = link.strip("<>").partition("#")
        if not path or re.match(r"\w+:", path):
            return link
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / wanted).exists():
            return link  # the build reports it
        there = self.on_site(wanted)
        if there is None:
            return ""
        there = posixpath.relpath(there, posixpath.dirname(target) or ".") + sharp + anchor
        return f"<{there}>" if " " in there else there

    def on_site(self, path):
        """Where a file of the repository is on the site, or None for a folder."""
        other = path.replace("/en/", f"/{self.language}/").replace("/zh/", f"/{self.language}/")
        readmes = [path.replace("README_zh.md", "README.md"), path.replace("README.md", "README_zh.md")]
        for name in (path, other, *readmes):
            if name in self.pages:
                return self.pages[name]
        if (ROOT / path).is_dir():
            return None
        self.linked[path] = f"images/{path}" if path.endswith(PICTURES) else f"source/{path}.md"
        return self.linked[path]


def language_of(source):
    """The name by which a source file's colours are chosen."""
    suffixes = {".py": "python", ".sh": "bash", ".md": "markdown", ".json": "json", ".txt": "text"}
    return suffixes.get(Path(source).suffix, "text")
