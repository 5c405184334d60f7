"""Validation images, generated the way a user would."""

import copy

import paddle
from PIL import Image

from ppdiffusers_train.tensor_files import is_rehearsal


def generate_images(pipeline, prompts, seeds, resolution: int, inference_steps: int, own=None, **options) -> list:
    """One PIL image per pair of prompt and seed. Paddle's generator is seeded for each, so images are independent.

    Args:
        own: further arguments of the pipeline for each image, which come before all others; None without.
        options: further arguments for all images.
    """
    if is_rehearsal():
        return rehearsed_images(pipeline, prompts, resolution, inference_steps)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    same = {"height": resolution, "width": resolution, "num_inference_steps": inference_steps, **options}
    for prompt, seed, more in zip(prompts, seeds, own or [{}] * len(prompts)):
        paddle.seed(seed)
        images += pipeline(prompt, **{**same, **more}).images
    return images


def rehearsed_images(pipeline, prompts, resolution: int, inference_steps: int) -> list:
    """Blank images, after the prompts have become tokens, and steps the timesteps of the pipeline's schedulers."""
    for part in pipeline.components.values():
        if hasattr(part, "set_timesteps"):
            copy.deepcopy(part).set_timesteps(max(inference_steps, 2))
        if hasattr(part, "get_vocab"):
            part(list(prompts))
    return [Image.new("RGB", (resolution, resolution)) for _ in prompts]


def side_by_side(images: list) -> Image.Image:
    """Images of the same height joined into one, from left to right."""
    joined = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    left = 0
    for image in images:
        joined.paste(image, (left, 0))
        left += image.width
    return joined
