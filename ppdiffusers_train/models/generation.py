"""Validation images, generated the way a user would."""

import paddle
from PIL import Image


def generate_images(pipeline, prompts, seeds, resolution: int, inference_steps: int, **options) -> list:
    """One PIL image per pair of prompt and seed. Paddle's generator is seeded for each, so images are independent."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for prompt, seed in zip(prompts, seeds):
        paddle.seed(seed)
        images += pipeline(
            prompt, height=resolution, width=resolution, num_inference_steps=inference_steps, **options
        ).images
    return images


def side_by_side(images: list) -> Image.Image:
    """Images of the same height joined into one, from left to right."""
    joined = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    left = 0
    for image in images:
        joined.paste(image, (left, 0))
        left += image.width
    return joined
