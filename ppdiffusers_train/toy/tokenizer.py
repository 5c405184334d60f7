"""A CLIP tokenizer without downloads: one token per byte, so any text in any language can be tokenised."""

import json
from pathlib import Path

from ppdiffusers.transformers import CLIPTokenizer

END, START = "<|endoftext|>", "<|startoftext|>"


def byte_symbols() -> list:
    """The 256 printable characters by which byte-level BPE writes bytes (Radford et al. 2019, GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]


def build_tokenizer(directory) -> CLIPTokenizer:
    """Write the tokenizer's files into `directory` and load it from there."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    symbols = byte_symbols()
    vocabulary = [*symbols, *(f"{symbol}</w>" for symbol in symbols), START, END]
    (directory / "vocab.json").write_text(
        json.dumps({token: index for index, token in enumerate(vocabulary)}, ensure_ascii=False), encoding="utf-8"
    )
    (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (directory / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({**special, "model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}),
        encoding="utf-8",
    )
    return CLIPTokenizer.from_pretrained(str(directory))
