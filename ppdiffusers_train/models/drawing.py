"""Validation pictures, the way a user would draw them."""

import paddle
from PIL import Image


def draw(pipeline, prompts, seeds, resolution: int, inference_steps: int, **options) -> list:
    """One PIL image per pair of prompt and seed. Paddle's generator is seeded for each: it stands for itself."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for prompt, seed in zip(prompts, seeds):
        paddle.seed(seed)
        images += pipeline(
            prompt, height=resolution, width=resolution, num_inference_steps=inference_steps, **options
        ).images
    return images


def beside(images: list) -> Image.Image:
    """Images of one height as one, from left to right."""
    joined = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    left = 0
    for image in images:
        joined.paste(image, (left, 0))
        left += image.width
    return joined
