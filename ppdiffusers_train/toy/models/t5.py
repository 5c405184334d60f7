"""A tiny T5 encoder and its tokenizer, without downloads. Tokens are single bytes and chosen words."""

import io
import json
from pathlib import Path

import numpy as np
import paddle
import sentencepiece
from ppdiffusers.transformers import T5Config, T5EncoderModel, T5Tokenizer

from ppdiffusers_train.draws import generator

PAD, END, UNKNOWN = 0, 1, 2
LARGEST = 4096  # tokens, more than any vocabulary here has


def build_t5_tokenizer(directory, words=()) -> T5Tokenizer:
    """Write the tokenizer's files into `directory` and load it from there.

    Args:
        words: words or Chinese characters that become one token each.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=LARGEST,
        hard_vocab_limit=False,  # fewer tokens are fine
        byte_fallback=True,
        normalization_rule_name="identity",
        user_defined_symbols=[f"▁{word}" for word in words if word.isascii() and word.isalpha()] + list(words),
        pad_id=PAD,
        eos_id=END,
        unk_id=UNKNOWN,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (directory / "spiece.model").write_bytes(model.getvalue())
    settings = {"extra_ids": 0, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return T5Tokenizer.from_pretrained(str(directory))


@paddle.no_grad()
def build_t5(vocabulary_size: int, width: int, layers: int, seed: int) -> T5EncoderModel:
    """A T5 encoder of `width` channels whose random weights are a function of `seed`, the same with every Paddle."""
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary_size,
            d_model=width,
            d_kv=width // 2,
            d_ff=2 * width,
            num_layers=layers,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            pad_token_id=PAD,
            eos_token_id=END,
        )
    )
    for name, weight in encoder.state_dict().items():
        if weight.ndim == 2:  # norms start at one
            weight.set_value(generator(seed, 0, f"t5 {name}").standard_normal(weight.shape, np.float32) / width**0.5)
    return encoder
