"""Builds the site: `make docs`. One build for each language, so that each has its own search, and a page that leads to
the reader's language.

Broken links and anchors, and pages that the navigation does not have, end the build with an error.
"""

import logging
import shutil
import sys
from pathlib import Path

import jieba  # divides Chinese into words, for the search
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from website.gather import ROOT, gather

HERE = Path(__file__).parent
SITE = ROOT / "outputs" / "website"
OTHER = {"en": "zh", "zh": "en"}
NAMES = {"en": "English", "zh": "中文"}

# The order of pages, by their names on the site; the pages' own titles are shown.
JOBS = (
    "kandinsky-decoder", "kandinsky-decoder-lora", "kandinsky-prior", "kandinsky-prior-lora", "sd", "sd-lora",
    "sdxl", "sdxl-lora", "sd3", "sd3-lora", "qwen-image-lora", "lcm-sd", "lcm-sd-lora", "lcm-sdxl", "lcm-sdxl-lora",
    "your-own-job",
)  # fmt: skip
GUIDES = (
    "your-data", "large-data", "training", "single-files", "lora-files", "several-gpus", "resume", "memory", "hardware",
    "from-other-trainers", "faq",
)  # fmt: skip
REFERENCE = (
    "flags", "examples/index", "examples/kandinsky2_2", "examples/stable_diffusion", "examples/sdxl", "examples/sd3",
    "examples/qwen_image",
    "examples/lcm", "architecture", "results", "performance", "true_size", "toys", "changelog",
)  # fmt: skip
SECTIONS = {
    "en": {"Training jobs": JOBS, "Guides": GUIDES, "Reference": REFERENCE},
    "zh": {"训练任务": JOBS, "指南": GUIDES, "参考": REFERENCE},
}
ENGLISH_ONLY = {  # titles in the Chinese navigation of pages that are in English
    "architecture": "架构（英文）",
    "results": "实测效果（英文）",
    "performance": "速度（英文）",
    "true_size": "真实尺寸（英文）",
    "toys": "微型模型（英文）",
    "changelog": "更新日志（英文）",
}
PALETTES = {"en": ("As the system", "Light", "Dark"), "zh": ("跟随系统", "浅色", "深色")}
HOME = {"en": "Home", "zh": "首页"}
CHOICE_OF_LANGUAGE = """<!doctype html>
<meta charset="utf-8">
<title>ppdiffusers_train</title>
<script>location.replace((navigator.language || "").startsWith("zh") ? "zh/index.html" : "en/index.html")</script>
<p><a href="en/index.html">English</a> · <a href="zh/index.html">中文</a>
"""


def navigation(language):
    """Home, then the sections, without pages that do not exist."""
    pages = SITE / "pages" / language

    def entry(name):
        titled = language == "zh" and name in ENGLISH_ONLY
        return {ENGLISH_ONLY[name]: f"{name}.md"} if titled else f"{name}.md"

    sections = [
        {title: [entry(name) for name in names if (pages / f"{name}.md").is_file()]}
        for title, names in SECTIONS[language].items()
    ]
    return [{HOME[language]: "index.md"}, *sections]


def build_language(language):
    pages = SITE / "pages" / language
    config = load_config(
        str(HERE / "mkdocs.yml"),
        docs_dir=str(pages),
        site_dir=str(SITE / "html" / language),
        nav=navigation(language),
        strict=True,
    )
    config.theme["language"] = language
    for palette, name in zip(config.theme["palette"], PALETTES[language]):
        palette["toggle"]["name"] = name
    config.extra["other_language"] = OTHER[language]
    config.extra["names"] = NAMES
    config.plugins.on_startup(command="build", dirty=False)
    build(config)


def main():
    jieba.setLogLevel(logging.WARNING)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    gather(NAMES, SITE / "pages")
    for language in NAMES:
        try:
            build_language(language)
        except Abort as error:
            sys.exit(f"{language}: {error}")
    (SITE / "html" / "index.html").write_text(CHOICE_OF_LANGUAGE, encoding="utf-8")
    shutil.rmtree(SITE / "pages")
    folder = (SITE / "html").relative_to(ROOT)
    print(f"wrote {folder}; `python -m http.server -d {folder}` shows it on port 8000")


if __name__ == "__main__":
    main()
