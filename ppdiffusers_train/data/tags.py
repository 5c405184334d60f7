"""Captions that are lists of tags, in another order or with fewer tags each time they are used."""

import re

VERSION = 1  # raised when its functions change encoded samples


def vary_tags(draws, caption: str, shuffle: bool, keep: int, dropout: float) -> str:
    """A caption of tags between commas, with random numbers of `draws`; as it is, where nothing is asked for.

    Args:
        shuffle: whether tags change their order.
        keep: how many tags at the beginning stay what and where they are.
        dropout: probability with which each of the others is left out.
    """
    if not (shuffle or dropout):
        return caption
    tags = [tag.strip() for tag in re.split("[,，]", caption) if tag.strip()]
    order = list(range(keep, len(tags)))
    if shuffle:
        order.sort(key=[draws.uniform(f"shuffle_tag_{number}") for number in range(len(tags))].__getitem__)
    kept = [number for number in order if not draws.bernoulli(f"drop_tag_{number}", dropout)]
    return ", ".join(tags[number] for number in [*range(min(keep, len(tags))), *kept])


def draw_caption(draws, caption: str, empty: float, shuffle: bool, keep: int, dropout: float) -> str:
    """The same, or with probability `empty` an empty caption."""
    return "" if draws.bernoulli("drop_caption", empty) else vary_tags(draws, caption, shuffle, keep, dropout)
