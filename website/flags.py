"""Writes the reference of flags, docs/en/flags.md and docs/zh/flags.md: `make flags`.

Names, defaults and English sentences are those of the parsers, so that the pages say what `--help` says. flags_zh.yaml
pairs each English sentence with a Chinese one.
"""

import ppdiffusers_train  # noqa: F401  (before paddle)
from ppdiffusers_train import cli

import argparse
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import yaml

from ppdiffusers_train.arguments.parser import Flag
from ppdiffusers_train.loop.resume_rules import APPLIED, FREE, REFUSED
from ppdiffusers_train.tools.preview import load_script

ROOT = Path(__file__).resolve().parent.parent
CHINESE = Path(__file__).with_name("flags_zh.yaml")

PAGES = {  # {page of a job: its script, below examples/}
    "kandinsky-decoder": "kandinsky2_2/train_text_to_image_decoder.py",
    "kandinsky-decoder-lora": "kandinsky2_2/train_text_to_image_decoder_lora.py",
    "kandinsky-prior": "kandinsky2_2/train_text_to_image_prior.py",
    "kandinsky-prior-lora": "kandinsky2_2/train_text_to_image_prior_lora.py",
    "sd": "stable_diffusion/train_text_to_image.py",
    "sd-lora": "stable_diffusion/train_text_to_image_lora.py",
    "sdxl": "sdxl/train_text_to_image_sdxl.py",
    "sdxl-lora": "sdxl/train_text_to_image_lora_sdxl.py",
    "sd3": "sd3/train_text_to_image_sd3.py",
    "sd3-lora": "sd3/train_text_to_image_lora_sd3.py",
    "qwen-image-lora": "qwen_image/train_qwen_image_lora.py",
    "lcm-sd": "lcm/train_lcm_distill_sd_wds.py",
    "lcm-sd-lora": "lcm/train_lcm_distill_lora_sd_wds.py",
    "lcm-sdxl": "lcm/train_lcm_distill_sdxl_wds.py",
    "lcm-sdxl-lora": "lcm/train_lcm_distill_lora_sdxl_wds.py",
    "your-own-job": "your_own_job/train_vae_decoder.py",
}
# Names for several scripts at once, largest first; a set of scripts is written as the names that cover it.
SETS = {
    "all LoRA scripts": [page for page in PAGES if page.endswith("-lora")],
    "Kandinsky": [page for page in PAGES if page.startswith("kandinsky")],
    "LCM": [page for page in PAGES if page.startswith("lcm")],
    "SD": ["sd", "sd-lora"],
    "SDXL": ["sdxl", "sdxl-lora"],
    "SD3": ["sd3", "sd3-lora"],
    "Qwen-Image": ["qwen-image-lora"],
}
# Order of the groups on the page; a group that is not named here comes last.
GROUPS = (
    "positional arguments", "data", "class images", "models", "images", "training", "optimizer", "LoRA",
    "multiple GPUs", "output and checkpoints", "validation", "logging", "diffusion", "flow matching", "timesteps",
    "distillation", "student and target", "options",
)  # fmt: skip

TEXTS = {
    "en": {
        "page": "# Flags\n\n[中文](../zh/flags.md)\n\n"
        "All flags of the training scripts, then those of the command `ppdiffusers-train`. `--help` prints the same\n"
        "for one script. A switch such as `--use_ema` is turned off by `--no_use_ema`, for example if a file of\n"
        "`--config` turns it on. `make flags` writes this page.\n",
        "columns": ("Flag", "Scripts", "Default", "Meaning"),
        "all": "In all scripts.", "only": "Only in: {}.", "everywhere": "all",
        "required": "required", "various": "its own in each script", "switch": ("off", "on"), "choices": "One of {}.",
        "join": ", ", "between": "; ", "for": "{}: {}",
    },
    "zh": {
        "page": "# 命令行参数\n\n[English](../en/flags.md)\n\n"
        "本页先列出各训练脚本的全部参数，再列出 `ppdiffusers-train` 命令的参数。\n"
        "单个脚本的参数也可以用 `--help` 查看（英文）。\n"
        "像 `--use_ema` 这样的开关可以用 `--no_use_ema` 关闭，例如 `--config` 文件中已经打开它的时候。\n"
        "本页由 `make flags` 生成。\n",
        "columns": ("参数", "脚本", "默认值", "说明"),
        "all": "所有脚本都有。", "only": "仅限：{}。", "everywhere": "全部",
        "required": "必填", "various": "各脚本不同", "switch": ("关闭", "开启"), "choices": "可选值：{}。",
        "join": "、", "between": "；", "for": "{}：{}",
    },
}  # fmt: skip
# {language: (the section's beginning, titles of columns, what a change of flags does by rule)}
RESUME = {
    "en": (
        "## When a run is resumed\n\nWhat a changed flag does at a [resume](resume.md). A flag that only your own job "
        "has is applied.\n", "Flags | A change", "is refused, because it would mix two runs.",
        "is printed, and applies from the first step after the resume.",
        "has no effect on the training; contents of data and models are compared.",
    ),
    "zh": (
        "## 续训时\n\n[续训](resume.md)时改变各个参数的结果如下。只有您自己的任务才有的参数，改动会生效。\n",
        "参数 | 改动的结果", "被拒绝，因为会把两次训练混在一起。", "打印出来，并从续训后的第一步起生效。",
        "不影响训练；数据和模型按内容比较。",
    ),
}  # fmt: skip


class Row(NamedTuple):
    """A flag in a group, with the same sentence."""

    names: tuple  # ("--lora_rank", "--rank")
    sentence: str
    choices: tuple
    defaults: dict  # {page of a script: its default}


def script_parsers():
    """{page of a job: the parser of its script}."""
    return {page: load_script(ROOT / "examples" / script).build_parser() for page, script in PAGES.items()}


def command_parsers():
    """{name: parser} of the commands of `ppdiffusers-train`; a command that consists of others is not in it."""
    return {name: parser for name, (parser, _) in commands(cli.build_parser()).items()}


def commands(parser, before=""):
    """{name: (parser, the sentence about it in the list of commands)} of a parser's commands and theirs."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for name, own in action.choices.items():
                found |= commands(own, f"{before}{name} ") or {f"{before}{name}": (own, helps[name])}
    return found


def default_of(action):
    """Its default: a text, a bool for switches, None where there is none, "required"."""
    if action.required:
        return "required"
    if isinstance(action, Flag):
        return bool(action.default)
    if action.default is None or action.default is argparse.SUPPRESS:
        return None
    return str(action.default)


def rows_of(parsers):
    """{title of a group: [Row]}, in the order of the page."""
    groups = {}
    for page, parser in parsers.items():
        for group in parser._action_groups:
            for action in group._group_actions:
                if action.help == argparse.SUPPRESS or "--help" in action.option_strings:
                    continue
                names = tuple(name for name in action.option_strings if not name.startswith("--no_"))
                key = (names or (action.metavar or action.dest,), action.help)
                row = Row(*key, tuple(map(str, action.choices or ())), {})
                groups.setdefault(group.title, {}).setdefault(key, row).defaults[page] = default_of(action)
    order = [*GROUPS, *groups]
    return {title: [*groups[title].values()] for title in sorted(groups, key=order.index)}


def sentences():
    """All English texts of the parsers, in the order of the page, and the names of groups and sets of scripts."""
    scripts, tools = rows_of(script_parsers()), command_parsers()
    texts = [*scripts, *SETS]
    for rows in [*scripts.values(), *(rows for tool in tools for rows in rows_of({tool: tools[tool]}).values())]:
        texts += [row.sentence for row in rows]
    texts += [parser.description or summary_of(tool) for tool, parser in tools.items()]
    return list(dict.fromkeys(texts))


def summary_of(command):
    """The sentence about a command in the list of commands."""
    _, text = commands(cli.build_parser())[command]
    return text[0].upper() + text[1:] + "."


NAMES = re.compile(
    r"(?<![\w-])("
    r"--\w+"
    r"|[\w./-]*[_*<{][^\s;:]*"  # with a character that Markdown would read as markup
    r"|[\w-]*\.(?:jsonl|json|png|safetensors|sh)\b"
    r"|paddle\.[\w.]+\w"
    r"|pipe:COMMAND"
    r")"
)


def as_markdown(text):
    """A sentence of `--help` with names and patterns as code."""

    def as_code(match):
        name = match[0].rstrip(".,)")
        return f"`{name}`{match[0][len(name) :]}"

    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [NAMES.sub(as_code, part) for part in parts[::2]]
    return "".join(parts)


PIPE = r"\|"  # within a cell of a table


class Writer:
    """Writes the page of one language."""

    def __init__(self, language):
        self.language, self.texts = language, TEXTS[language]
        self.chinese = yaml.safe_load(CHINESE.read_text(encoding="utf-8")) if language == "zh" else {}

    def say(self, text):
        if self.language == "en":
            return as_markdown(text)
        if text not in self.chinese:
            sys.exit(f"{CHINESE.name} has no Chinese for: {text}")
        return self.chinese[text]

    def page(self):
        parts = [self.texts["page"]]
        parts += [self.group(title, rows) for title, rows in rows_of(script_parsers()).items()]
        for tool, parser in command_parsers().items():
            parts.append(self.tool(tool, parser))
        return "\n".join([*parts, self.resume_rules()])

    def resume_rules(self):
        """A table of what a changed flag does at a resume."""
        beginning, columns, *rules = RESUME[self.language]
        lines = [beginning, f"| {columns} |", "| --- | --- |"]
        for flags, rule in zip((REFUSED, APPLIED, FREE), rules):
            lines.append(f"| {self.texts['join'].join(f'`--{flag}`' for flag in sorted(flags))} | {rule} |")
        return "\n".join([*lines, ""])

    def group(self, title, rows):
        """A table of flags; its scripts stand above it if they are the same in all rows."""
        title = self.say(title)
        lines = [f"## {title[0].upper()}{title[1:]}", ""]
        pages = {tuple(row.defaults) for row in rows}
        if len(pages) == 1:
            (scripts,) = pages
            everywhere = len(scripts) == len(PAGES)
            lines += [self.texts["all"] if everywhere else self.texts["only"].format(self.scripts(scripts)), ""]
        return "\n".join([*lines, *self.table(rows, with_scripts=len(pages) > 1), ""])

    def tool(self, name, parser):
        rows = [row for rows in rows_of({name: parser}).values() for row in rows]
        about = self.say(parser.description or summary_of(name))
        if self.language == "en":
            about = textwrap.fill(about, 110, break_long_words=False, break_on_hyphens=False)
        return "\n".join([f"## `ppdiffusers-train {name}`", "", about, "", *self.table(rows, with_scripts=False), ""])

    def table(self, rows, with_scripts):
        columns = [c for number, c in enumerate(self.texts["columns"]) if with_scripts or number != 1]
        lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
        for row in rows:
            meaning = self.say(row.sentence)
            if row.choices:
                listed = self.texts["join"].join(f"`{choice}`" for choice in row.choices)
                meaning += (" " if self.language == "en" else "") + self.texts["choices"].format(listed)
            cells = [", ".join(f"`{name}`" for name in row.names), self.default(row.defaults), meaning]
            if with_scripts:
                cells.insert(1, self.scripts(row.defaults))
            lines.append(f"| {' | '.join(cell.replace('|', PIPE) for cell in cells)} |")
        return lines

    def default(self, defaults):
        """A default; those of fewer scripts name them."""
        counted = Counter(defaults.values()).most_common()
        if len(counted) > 4:
            return self.texts["various"]
        cells = [self.value(counted[0][0])]
        for value, _ in counted[1:]:
            pages = [page for page in defaults if defaults[page] == value]
            cells.append(self.texts["for"].format(self.scripts(pages), self.value(value)))
        return self.texts["between"].join(cells)

    def value(self, value):
        if value == "required":
            return self.texts["required"]
        if value is None:
            return "–"
        return self.texts["switch"][value] if isinstance(value, bool) else f"`{value}`"

    def scripts(self, pages):
        """A short list of names for some scripts, which lead to their pages."""
        left, names = list(pages), []
        if len(left) == len(PAGES):
            return self.texts["everywhere"]
        if sorted(left) == sorted(SETS["all LoRA scripts"]):
            return self.say("all LoRA scripts")
        for name, members in SETS.items():
            if name != "all LoRA scripts" and set(members) <= set(left):
                names.append(self.say(name))
                left = [page for page in left if page not in members]
        return self.texts["join"].join([*names, *(f"[{page}]({page}.md)" for page in left)])


def main():
    for language in TEXTS:
        page = ROOT / "docs" / language / "flags.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(Writer(language).page(), encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
