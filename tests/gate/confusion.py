"""What the judge sees instead of what a prompt asks for."""

from ppdiffusers_train.toy.world.judge import NAMES, judge, parse_caption

NOTHING = "nothing"  # where the judge recognises nothing


def confusion_table(pictures, prompts, field: str) -> dict:
    """Confusion table of one field of `Content`: {prompted: {recognised or "nothing": count}}."""
    table = {name: dict.fromkeys([*NAMES[field], NOTHING], 0) for name in NAMES[field]}
    for picture, prompt in zip(pictures, prompts, strict=True):
        table[getattr(parse_caption(prompt), field)][getattr(judge(picture).content, field) or NOTHING] += 1
    return table
