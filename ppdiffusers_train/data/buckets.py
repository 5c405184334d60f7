"""Aspect-ratio buckets: images roughly keep their aspect ratio, and those of a batch share one size.

(NovelAI 2022, "Improvements on Stable Diffusion"; Podell et al. 2023, arXiv 2307.01952, section 2.3 and appendix I.)
"""

import math
from collections import Counter

from tqdm import tqdm

from ppdiffusers_train.errors import BadSampleError

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


def assign_buckets(sizes: list, dataset) -> list:
    """The index of each row's bucket; 0 for a row that cannot be read."""
    buckets = []
    for row in tqdm(range(len(dataset)), desc="reading sizes", unit="image", delay=5):
        try:
            buckets.append(nearest_bucket(sizes, *dataset.image_size(row)))
        except BadSampleError:  # training reports it when it reads the row
            buckets.append(0)
    return buckets


def describe_buckets(sizes: list, buckets: list) -> str:
    """A line with the number of images of each size."""
    counts = Counter(buckets)
    found = ", ".join(f"{sizes[index][0]} x {sizes[index][1]}: {counts[index]}" for index in sorted(counts))
    return f"{len(counts)} of {len(sizes)} sizes are used (height x width: images): {found}"
