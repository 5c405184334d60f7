"""The configurations of the toys' CLIP encoders for texts and pictures."""

from ppdiffusers.transformers import CLIPImageProcessor, CLIPTextConfig, CLIPVisionConfig

IMAGE_SIZE = 32
POSITIONS = 77  # largest number of tokens, as in the published text encoders


def text_config(tokenizer, width: int, layers: int, heads: int, **options) -> CLIPTextConfig:
    """A text encoder of `width` channels for a tokenizer. The caption's embedding is that of the end token."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=POSITIONS,
        projection_dim=width,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def vision_config(width: int, layers: int, heads: int, intermediate: int) -> CLIPVisionConfig:
    """An image encoder of `width` channels, for pictures of 32x32 pixels in 16 patches."""
    return CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )


def build_image_processor() -> CLIPImageProcessor:
    """The image processor that resizes and normalises pictures for the image encoder."""
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
