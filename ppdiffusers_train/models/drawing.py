"""Validation pictures, the way a user would draw them."""

import paddle


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
