"""A lower bound of a caption's number of tokens, without a tokenizer's files."""

import ftfy
import regex

# CLIP splits a caption into these pieces before anything else (Radford et al. 2021); each becomes at least one token.
PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
LONGEST = 77  # tokens that CLIP's text encoder can read


def fewest_tokens(caption: str) -> int:
    """A lower bound of a caption's number of CLIP tokens, special tokens included."""
    fewest = _count(caption)
    # CLIP's tokenizer runs ftfy first, which may leave fewer pieces. It is slow, and only long texts need it.
    return fewest if fewest <= LONGEST else _count(ftfy.fix_text(caption))


def _count(caption: str) -> int:
    return 2 + sum(1 for _ in PIECES.finditer(caption.lower()))
