"""docs/en/flags.md and docs/zh/flags.md say what the parsers say."""

import ppdiffusers_train  # noqa: F401  (before paddle)

import re

import pytest
import yaml

from tests.docs.pages import read
from website.flags import CHINESE, TEXTS, Writer, command_parsers, script_parsers, sentences

pytestmark = pytest.mark.once  # no Paddle in it


def test_each_english_sentence_has_a_chinese_one_and_no_other_does():
    chinese = yaml.safe_load(CHINESE.read_text(encoding="utf-8"))
    assert set(chinese) == set(sentences())
    for english, sentence in chinese.items():
        if english.endswith("."):
            assert re.search("[一-鿿]", sentence) and sentence.endswith("。"), english
        names, theirs = (sorted(re.findall(r"--\w+", text)) for text in (english, sentence))
        assert names == theirs, english


@pytest.mark.parametrize("language", TEXTS)
def test_the_page_is_what_the_parsers_say(language):
    assert read(f"docs/{language}/flags.md") == Writer(language).page(), "`make flags` writes it"


def test_every_flag_stands_on_the_page():
    text = read("docs/en/flags.md")
    for parser in [*script_parsers().values(), *command_parsers().values()]:
        for action in parser._actions:
            shown = [name for name in action.option_strings if f"`{name}`" in text]
            assert shown or not action.option_strings or action.dest == "help", action.option_strings
