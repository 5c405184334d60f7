"""Masks in the space of latents."""

from paddle.nn import functional

VERSION = 1  # raised when its functions change encoded samples


def encode_masks(batch: dict, latents) -> dict:
    """`{"mask": [B, 1, h, w]}`, from 0 to 1, of a batch with masks uint8 [B, 1, H, W]: of each element of its latents
    [B, C, h, w] the share of the area that is in the mask. {} for a batch without masks."""
    if "mask" not in batch:
        return {}
    return {"mask": functional.adaptive_avg_pool2d(batch["mask"].astype("float32") / 255, latents.shape[-2:])}
