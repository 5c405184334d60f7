"""A CLIP tokenizer without downloads. Tokens are single bytes and chosen words."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from ppdiffusers.transformers import CLIPTokenizer

END, START = "<|endoftext|>", "<|startoftext|>"


def byte_symbols() -> dict:
    """{byte: the printable character by which byte-level BPE writes it} (Radford et al. 2019, GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{byte: chr(byte) for byte in printable},
        **{byte: chr(256 + number) for number, byte in enumerate(others)},
    }


def learn_merges(words) -> list:
    """Pairs of symbols to merge, in order, until each word is one symbol (Sennrich et al. 2015, arXiv 1508.07909).

    Args:
        words: tuples of symbols.
    """
    words, merges = [list(word) for word in words], []
    while pairs := Counter(pair for word in words for pair in pairwise(word)):
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        for word in words:
            for place in reversed(range(len(word) - 1)):
                if tuple(word[place : place + 2]) == merges[-1]:
                    word[place : place + 2] = ["".join(merges[-1])]
    return merges


def split_bytes(words) -> list:
    """Words as CLIP splits them into bytes: Latin words with an end mark, others with and without it.

    Chinese is written without spaces, so its words occur within a longer one or at its end.
    """
    symbols, split = byte_symbols(), []
    for word in words:
        pieces = [symbols[byte] for byte in word.encode()]
        split.append((*pieces[:-1], pieces[-1] + "</w>"))
        if not word.isascii():
            split.append(tuple(pieces))
    return split


def build_tokenizer(directory, words=(), max_length=77) -> CLIPTokenizer:
    """Write the tokenizer's files into `directory` and load it from there.

    Args:
        words: words or Chinese characters that become one token each.
        max_length: tokens of a caption, which is padded or truncated to this length; the published tokenizers have 77.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    symbols = list(byte_symbols().values())
    merges = learn_merges(split_bytes(words))
    vocabulary = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges), START, END]
    (directory / "vocab.json").write_text(
        json.dumps({token: index for index, token in enumerate(vocabulary)}, ensure_ascii=False), encoding="utf-8"
    )
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (directory / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {**special, "model_max_length": max_length, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
        ),
        encoding="utf-8",
    )
    return CLIPTokenizer.from_pretrained(str(directory))
