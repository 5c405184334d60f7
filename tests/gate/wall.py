"""The README's wall of pictures: for each job, images before training above those of the same captions after it."""

import numpy as np
from PIL import Image

from ppdiffusers_train.reporting.contact_sheet import Tile, contact_sheet
from ppdiffusers_train.toy.demo.demo import PROMPTS, SHOWN, plot_figure

TITLES = {
    "decoder": "Kandinsky decoder",
    "decoder-lora, longer": "Kandinsky decoder, LoRA",
    "prior": "Kandinsky prior",
    "prior-lora": "Kandinsky prior, LoRA",
    "sd": "SD",
    "sd-lora": "SD, LoRA",
    "sdxl": "SDXL",
    "sdxl-lora": "SDXL, LoRA",
    "sd3": "SD3",
    "sd3-lora": "SD3, LoRA",
    "lcm": "SD in 4 steps",
    "lcm-lora": "SD in 4 steps, LoRA",
    "lcm-sdxl": "SDXL in 4 steps",
    "lcm-sdxl-lora": "SDXL in 4 steps, LoRA",
}
COLUMNS, SIDE, SPACE = 4, 48, 4  # tiles in a row; pixels of an image and between images
EVERY = 2  # which of the captions


def wall(results) -> Image.Image:
    """The wall, cut out of the figures `<results>/<job>.png` that the demos draw."""
    boxes = places()
    tiles = [Tile([before_and_after(results / f"{job}.png", boxes)], [title]) for job, title in TITLES.items()]
    return contact_sheet(tiles, COLUMNS).image


def places() -> list:
    """The boxes (left, top, right, bottom) of the images before and after training in a demo's figure: [2][caption]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    image = np.zeros((1, 1, 3))
    figure = plot_figure([image] * SHOWN, {when: [image] * len(PROMPTS) for when in ("before", "after")}, [0.1, 1.0])
    FigureCanvasAgg(figure).draw()
    images = [axes.get_window_extent() for axes in figure.axes if axes.images][SHOWN:]
    height = figure.bbox.height
    # A pixel less on each side: the position of an image depends on the labels of the loss.
    boxes = [(box.x0 + 1, height - box.y1 + 1, box.x1 - 1, height - box.y0 - 1) for box in images]
    return [boxes[: len(PROMPTS)], boxes[len(PROMPTS) :]]


def before_and_after(figure, boxes: list) -> Image.Image:
    """Two rows of images, cut out of one figure."""
    shown = [row[::EVERY] for row in boxes]
    picture = Image.new("RGB", (len(shown[0]) * (SIDE + SPACE) - SPACE, 2 * (SIDE + SPACE) - SPACE), "white")
    with Image.open(figure) as drawn:
        for top, row in enumerate(shown):
            for left, box in enumerate(row):
                part = drawn.convert("RGB").crop([round(edge) for edge in box]).resize((SIDE, SIDE))
                picture.paste(part, (left * (SIDE + SPACE), top * (SIDE + SPACE)))
    return picture
