"""The shape of the toys' CLIP text encoders."""

from ppdiffusers.transformers import CLIPTextConfig


def text_config(tokenizer, width: int, layers: int, heads: int, **options) -> CLIPTextConfig:
    """A text encoder of `width` channels for a tokenizer, whose end token is where the caption's embedding is read."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
