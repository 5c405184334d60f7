"""Qwen-Image's text encoder: the language model inside Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923), without its
vision half, which text does not need. Names of layers are those of transformers' `Qwen2_5_VLForConditionalGeneration`.
"""

import json
import re
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.attention import attention
from ppdiffusers_train.models.rms_norm import RMSNorm
from ppdiffusers_train.models.rotary import angles, cos_sin, rotate_halves

VERSION = 1  # raised when its functions change encoded samples
CONFIG = "config.json"
# The language model's names, in files of transformers below 4.52, and of newer versions; and what is not part of it.
LANGUAGE_MODEL = re.compile(r"^(?:model\.language_model|language_model\.model|language_model|model)\.(?!visual\.)")
OTHER_PARTS = re.compile(r"^(?:model\.)?visual\.|^(?:language_model\.)?lm_head\.")
NUMBERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"
)  # fmt: skip


class QwenTextEncoder(nn.Layer):
    """Token ids to hidden states.

    Args:
        config: the dictionary of `config.json`; the language model's numbers are at its top or below `text_config`.
    Raises:
        UserError: it lacks a number, or asks for what is not built here.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = {**config, **(config.get("text_config") or {})}
        if missing := [name for name in NUMBERS if name not in self.config]:
            raise UserError(f"{CONFIG}: {missing[0]} is missing; expected the configuration of a Qwen2.5-VL")
        if self.config.get("use_sliding_window"):
            raise UserError(f"{CONFIG}: use_sliding_window is true; expected full attention")
        self.embed_tokens = nn.Embedding(self.config["vocab_size"], self.config["hidden_size"])
        self.layers = nn.LayerList([DecoderLayer(self.config) for _ in range(self.config["num_hidden_layers"])])
        self.norm = RMSNorm(self.config["hidden_size"], self.config["rms_norm_eps"])

    @classmethod
    def load_config(cls, folder) -> dict:
        """The configuration in a folder."""
        return json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))

    @classmethod
    def from_config(cls, config: dict):
        """A new model."""
        return cls(config)

    def adapt_published(self, tensors: dict) -> None:
        """Give a file's tensors the names that they have here, and leave out what this model does not have."""
        for name in list(tensors):
            tensor = tensors.pop(name)
            if not OTHER_PARTS.match(name):
                tensors[LANGUAGE_MODEL.sub("", name)] = tensor

    def forward(self, input_ids):
        """Token ids [B, L] without padding -> the last hidden states [B, L, D]."""
        head_size = self.config["hidden_size"] // self.config["num_attention_heads"]
        rotary = cos_sin(angles(np.arange(input_ids.shape[1]), head_size, rope_theta(self.config)))
        states = self.embed_tokens(input_ids)
        for layer in self.layers:
            states = layer(states, rotary)
        return self.norm(states)


def rope_theta(config: dict) -> float:
    """θ of the rotary positions, which transformers 5 keeps among `rope_parameters`."""
    return float(config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 1_000_000))


class DecoderLayer(nn.Layer):
    """Attention to the tokens before, and a gated feed-forward network. [B, L, D] -> [B, L, D]."""

    def __init__(self, config):
        super().__init__()
        width, hidden, epsilon = config["hidden_size"], config["intermediate_size"], config["rms_norm_eps"]
        self.self_attn = CausalAttention(config)
        self.mlp = nn.Layer()
        self.mlp.gate_proj = nn.Linear(width, hidden, bias_attr=False)
        self.mlp.up_proj = nn.Linear(width, hidden, bias_attr=False)
        self.mlp.down_proj = nn.Linear(hidden, width, bias_attr=False)
        self.input_layernorm = RMSNorm(width, epsilon)
        self.post_attention_layernorm = RMSNorm(width, epsilon)

    def forward(self, states, rotary):
        states = states + self.self_attn(self.input_layernorm(states), rotary)
        normed = self.post_attention_layernorm(states)
        return states + self.mlp.down_proj(functional.silu(self.mlp.gate_proj(normed)) * self.mlp.up_proj(normed))


class CausalAttention(nn.Layer):
    """Each token looks at itself and those before it; some heads share keys and values. [B, L, D] -> [B, L, D]."""

    def __init__(self, config):
        super().__init__()
        width, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.key_heads = config.get("num_key_value_heads") or self.heads
        shared = width // self.heads * self.key_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, shared)
        self.v_proj = nn.Linear(width, shared)
        self.o_proj = nn.Linear(width, width, bias_attr=False)

    def forward(self, states, rotary):
        batch, length, _ = states.shape
        query = rotate_halves(self.q_proj(states).reshape([batch, length, self.heads, -1]), *rotary)
        key = rotate_halves(self.k_proj(states).reshape([batch, length, self.key_heads, -1]), *rotary)
        value = self.v_proj(states).reshape([batch, length, self.key_heads, -1])
        key, value = (x.repeat_interleave(self.heads // self.key_heads, axis=2) for x in (key, value))
        seen = paddle.tril(paddle.ones([length, length])).astype("bool").expand([batch, 1, length, length])
        return self.o_proj(attention(query, key, value, seen).flatten(2))
