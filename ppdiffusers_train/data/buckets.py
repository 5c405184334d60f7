"""Aspect-ratio buckets: images roughly keep their aspect ratio, and those of a batch share one size.

(NovelAI 2022, "Improvements on Stable Diffusion"; Podell et al. 2023, arXiv 2307.01952, section 2.3 and appendix I.)
"""

import math

import numpy as np

VERSION = 1  # raised when its functions change encoded samples

STEP, LARGEST_RATIO = 64, 4


def bucket_sizes(resolution: int) -> list:
    """[(height, width)] in multiples of 64 pixels, each as large as fits into `resolution`² pixels, from 1:4 to 4:1."""
    pixels, sizes = resolution * resolution, []
    for height in range(STEP, pixels // STEP + 1, STEP):
        width = pixels // height // STEP * STEP
        if width and max(height, width) <= LARGEST_RATIO * min(height, width):
            sizes.append((height, width))
    # Of several heights with the same width, the largest is kept: it uses the most pixels.
    return sorted({width: (height, width) for height, width in sizes}.values())


def nearest_bucket(sizes: list, width: int, height: int) -> int:
    """Index of the size whose ratio of height to width is nearest, on a logarithmic scale, to an image's."""
    ratio = math.log(height / width)
    return min(range(len(sizes)), key=lambda index: abs(math.log(sizes[index][0] / sizes[index][1]) - ratio))


def size_for(width: int, height: int, resolution: int, buckets: list) -> tuple:
    """(height, width) that an image is resized and cropped to: the nearest of `buckets`, or else a square."""
    sizes = buckets or [(resolution, resolution)]
    return sizes[nearest_bucket(sizes, width, height)]


def assign_buckets(sizes: list, dataset) -> np.ndarray:
    """The index of each row's bucket, int16 [n]; 0 for a row that cannot be read."""
    found, places = np.unique(dataset.image_sizes(), axis=0, return_inverse=True)
    nearest = [nearest_bucket(sizes, width, height) if width else 0 for width, height in found.tolist()]
    return np.array(nearest, np.int16)[places.reshape(-1)]


def describe_buckets(sizes: list, buckets: np.ndarray) -> str:
    """A line with the number of images of each size."""
    used, counts = np.unique(buckets, return_counts=True)
    found = ", ".join(f"{sizes[index][0]} x {sizes[index][1]}: {count}" for index, count in zip(used, counts))
    return f"{len(used)} of {len(sizes)} sizes are used (height x width: images): {found}"
