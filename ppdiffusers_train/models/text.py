"""Captions to tokens."""

from pathlib import Path

import numpy as np

from ppdiffusers_train.errors import BadSampleError, UserError, one_line

VERSION = 2  # raised when its functions change encoded samples


def tokenize(tokenizer, caption: str, length=None) -> tuple:
    """A caption as input of the text encoder: input_ids and attention_mask, int64 [L], truncated or padded to L tokens.

    L is `length`, by default the longest sequence of the tokenizer's model.
    """
    tokens = tokenizer(
        caption,
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_attention_mask=True,
    )
    return np.asarray(tokens["input_ids"], np.int64), np.asarray(tokens["attention_mask"], np.int64)


def tokenize_chunks(tokenizer, caption: str, chunks: int = 1) -> np.ndarray:
    """A caption as input_ids of several sequences of the tokenizer's model, one after the other: int64 [chunks · L].

    Each has a token for its beginning and one for its end; the last ones are empty where the caption is short. With one
    chunk, the result is that of `tokenize`.
    """
    if chunks == 1:
        return tokenize(tokenizer, caption)[0]
    ids, size = tokenizer(caption)["input_ids"][1:-1], tokenizer.model_max_length - 2
    padded = []
    for start in range(0, chunks * size, size):
        part = ids[start : start + size]
        padded += [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
        padded += [tokenizer.pad_token_id] * (size - len(part))
    return np.asarray(padded, np.int64)


def split_chunks(input_ids, chunks: int):
    """Token ids of `tokenize_chunks`, [B, chunks · L] -> [B · chunks, L]: each chunk is a sequence of its own."""
    return input_ids.reshape([input_ids.shape[0] * chunks, -1])


def join_chunks(states, chunks: int):
    """Hidden states of chunks one after the other: [B · chunks, L, D] -> [B, chunks · L, D]."""
    return states.reshape([states.shape[0] // chunks, -1, states.shape[-1]])


def as_computed(encoder, states):
    """Hidden states in the dtype of their encoder's weights.

    Autocast leaves them in float32 after their last norm or sum. The products that a trained model begins with round
    them to that dtype in any case, so nothing but space is saved: in the cache, and in memory.
    """
    return states.astype(encoder.parameters()[0].dtype)


def warn_of_long_captions(tokenizer, dataset) -> None:
    """Print how many captions are longer than the text encoder can read, and name one."""
    longest = tokenizer.model_max_length
    # A token is at least one byte of text, and there is one more token at each end.
    suspects = (
        (row, caption)
        for row in range(len(dataset))
        for caption in usable_captions(dataset, row)
        if len(caption.encode()) > longest - 2
    )
    cut = [row for row, caption in suspects if count_tokens(tokenizer, caption) > longest]
    if cut:
        example = one_line(dataset.name(cut[0]))
        print(f"{len(cut)} captions are longer than {longest} tokens and are truncated, for example that of {example}")


def usable_captions(dataset, row: int) -> list:
    """The captions of a row; none if it is a bad sample."""
    try:
        return dataset.captions(row)
    except BadSampleError:
        return []


def load_tokenizer(folder, flag: str):
    """The CLIP tokenizer in a folder, its own or a pipeline's.

    Args:
        flag: the flag that named the folder, for messages.
    Raises:
        UserError: there is none.
    """
    from ppdiffusers.transformers import CLIPTokenizer  # only here: the loader's threads need no models

    places = [Path(folder) / name for name in ("", "tokenizer", "prior_tokenizer")]
    found = next((place for place in places if (place / "vocab.json").is_file()), None)
    if found is None:
        raise UserError(f"{flag}: {str(folder)!r} has no vocab.json; expected a CLIP tokenizer or a pipeline")
    return CLIPTokenizer.from_pretrained(str(found))


def count_tokens(tokenizer, caption: str) -> int:
    """How many tokens a caption has before it is truncated, special tokens included."""
    return len(tokenizer(caption)["input_ids"])


def read_tokens(tokenizer, input_ids) -> tuple:
    """The reverse of `tokenize`: the caption as far as the text encoder reads it, and its number of tokens.

    CLIP's captions begin with a token of their own, T5's do not; both end with one, before the padding.
    """
    ids = [int(token) for token in input_ids]
    if hasattr(tokenizer, "read"):
        return tokenizer.read(ids)
    start = int(ids[0] == tokenizer.bos_token_id)
    end = ids.index(tokenizer.eos_token_id, start)
    return tokenizer.decode(ids[start:end]), end + 1
