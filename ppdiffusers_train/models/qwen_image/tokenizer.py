"""Captions to the tokens that Qwen-Image's text encoder reads."""

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ppdiffusers_train.errors import UserError

VERSION = 1  # raised when its functions change encoded samples
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
SKIPPED = 34  # tokens of the template before the caption, whose states are dropped
LONGEST = 1024  # tokens of a caption with what follows it in the template; the rest is cut off
# How Qwen2's tokenizer cuts text into words, before it joins bytes (the published tokenizer.json).
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class QwenTokenizer:
    """The tokenizer in a folder.

    Raises:
        UserError: it has neither `tokenizer.json` nor `vocab.json` and `merges.txt`, or they cannot be read.
    """

    model_max_length = SKIPPED + LONGEST

    def __init__(self, folder):
        folder = Path(folder)
        try:
            self.tokenizer = read_whole(folder) or read_parts(folder)
        except UserError:
            raise
        except Exception as error:  # the library raises this very class
            raise UserError(f"{folder}: its tokenizer cannot be read: {error}") from error
        if self.tokenizer.token_to_id("<|im_start|>") is None:
            raise UserError(f"{folder}: its tokenizer lacks <|im_start|>; expected Qwen2's tokenizer")
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    @classmethod
    def from_pretrained(cls, folder):
        """The tokenizer in a folder, as libraries call it."""
        return cls(folder)

    def __call__(self, captions: list) -> list:
        """Each caption in the template, as token ids, int64 [L], L <= SKIPPED + LONGEST."""
        found = self.tokenizer.encode_batch(list(map(TEMPLATE.format, captions)), add_special_tokens=False)
        return [np.array(encoded.ids[: SKIPPED + LONGEST], np.int64) for encoded in found]

    def read(self, ids: list) -> tuple:
        """The reverse of a call, for one caption: its text as far as the text encoder reads it, and how many of its
        states are used."""
        before, after = TEMPLATE.split("{}")
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text.removeprefix(before).removesuffix(after), len(ids) - SKIPPED

    def get_vocab(self) -> dict:
        """{token: id} of all tokens."""
        return self.tokenizer.get_vocab()


def read_whole(folder: Path):
    """The tokenizer of `tokenizer.json`, or None if there is none."""
    file = folder / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.is_file() else None


def read_parts(folder: Path) -> Tokenizer:
    """The tokenizer of `vocab.json`, `merges.txt`, and `added_tokens.json` or `tokenizer_config.json`."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise UserError(f"{folder} has no tokenizer.json, nor vocab.json and merges.txt; expected Qwen2's tokenizer")
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    added = sorted(added_tokens(folder).items(), key=lambda item: item[1])
    for token, number in added:
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        if tokenizer.token_to_id(token) != number:
            raise UserError(
                f"{folder}: {token} is to be number {number}; {vocabulary.name} has another number of tokens"
            )
    return tokenizer


def added_tokens(folder: Path) -> dict:
    """{token: id} of tokens that are not in the vocabulary."""
    added, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
    if added.is_file():
        return json.loads(added.read_text(encoding="utf-8"))
    entries = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {}) if config.is_file() else {}
    return {entry["content"]: int(number) for number, entry in entries.items()}
