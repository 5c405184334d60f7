"""Captions that are lists of tags, in another order or with fewer tags each time they are used."""

import re

VERSION = 2  # raised when its functions change encoded samples


CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")  # {a|b}, without another one in it


def vary_tags(draws, caption: str, shuffle: bool, keep: int, dropout: float, wildcards: bool = False) -> str:
    """A caption of tags between commas, with random numbers of `draws`; as it is, where nothing is asked for.

    Args:
        shuffle: whether tags change their order.
        keep: how many tags at the beginning stay what and where they are.
        dropout: probability with which each of the others is left out.
        wildcards: whether one of the texts in `{a|b|c}` is taken, before anything else.
    """
    if wildcards:
        caption = choose_wildcards(draws, caption)
    if not (shuffle or dropout):
        return caption
    tags = [tag.strip() for tag in re.split("[,，]", caption) if tag.strip()]
    order = list(range(keep, len(tags)))
    if shuffle:
        order.sort(key=[draws.uniform(f"shuffle_tag_{number}") for number in range(len(tags))].__getitem__)
    kept = [number for number in order if not draws.bernoulli(f"drop_tag_{number}", dropout)]
    return ", ".join(tags[number] for number in [*range(min(keep, len(tags))), *kept])


def choose_wildcards(draws, caption: str) -> str:
    """A caption in which one of its texts stands for each `{a|b|c}`, all equally likely; those inside others first."""
    count = 0
    while found := CHOICE.search(caption):
        texts = found[1].split("|")
        text = texts[int(draws.integers(f"wildcard_{count}", 0, len(texts)))]
        caption, count = caption[: found.start()] + text + caption[found.end() :], count + 1
    return caption


def draw_caption(
    draws, caption: str, empty: float, shuffle: bool, keep: int, dropout: float, wildcards: bool = False
) -> str:
    """The same, or with probability `empty` an empty caption."""
    is_empty = draws.bernoulli("drop_caption", empty)
    return "" if is_empty else vary_tags(draws, caption, shuffle, keep, dropout, wildcards)
