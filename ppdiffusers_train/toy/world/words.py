"""The vocabulary of the captions of `shapes.py`, and captions that also name the look."""

import re

from ppdiffusers_train.toy.world.shapes import CONTENTS, WORDINGS, caption

LOOK_NAMES = {
    "en": {"plain": "filled", "outlined": "outlined", "striped": "striped"},
    "zh": {"plain": "实心", "outlined": "空心", "striped": "条纹"},
}


def name_look(text: str, look: str) -> str:
    """A caption that also names the look, in the caption's language."""
    if text.isascii():
        return f"{text}, {LOOK_NAMES['en'][look]}"
    return f"{text}，{LOOK_NAMES['zh'][look]}"


def vocabulary() -> list:
    """All English words, Chinese characters and punctuation marks of captions, each once."""
    captions = [
        caption(content, wording) for content in CONTENTS for wordings in WORDINGS.values() for wording in wordings
    ]
    captions += [name_look(text, look) for text in ("a", "一") for look in LOOK_NAMES["en"]]
    return sorted({word for text in captions for word in re.findall(r"[a-z]+|[^a-z ]", text)})
