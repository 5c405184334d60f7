"""Captions to tokens."""

import numpy as np


def tokenize(tokenizer, caption: str) -> tuple:
    """A caption as the text encoder takes it: input_ids and attention_mask, int64 [L], cut or padded to L tokens."""
    tokens = tokenizer(
        caption,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_attention_mask=True,
    )
    return np.asarray(tokens["input_ids"], np.int64), np.asarray(tokens["attention_mask"], np.int64)


def warn_of_long_captions(tokenizer, dataset) -> None:
    """Say how many captions are longer than the text encoder reads, and name one."""
    longest = tokenizer.model_max_length
    # A token is at least one byte of text, and two tokens stand around it.
    suspects = (
        (row, caption)
        for row in range(len(dataset))
        for caption in dataset.captions(row)
        if len(caption.encode()) > longest - 2
    )
    cut = [row for row, caption in suspects if len(tokenizer(caption)["input_ids"]) > longest]
    if cut:
        print(
            f"{len(cut)} captions are longer than {longest} tokens and are cut, for example of {dataset.name(cut[0])}"
        )
