"""Pictures for people: grids with captions."""

from PIL import Image, ImageDraw, ImageFont

MARGIN, LINE = 4, 14


def captioned_grid(rows: list, captions: list, scale: int = 1) -> Image.Image:
    """Rows of images, a caption above each row.

    Args:
        rows: lists of PIL images of one size.
        captions: one text per row; empty for none.
        scale: each pixel becomes scale × scale.
    """
    width, height = (side * scale for side in rows[0][0].size)
    line = LINE if any(captions) else 0
    columns = max(len(row) for row in rows)
    size = (MARGIN + columns * (width + MARGIN), MARGIN + len(rows) * (height + line + MARGIN))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default()
    for i, (row, caption) in enumerate(zip(rows, captions)):
        top = MARGIN + i * (height + line + MARGIN)
        # The font that ships with Pillow knows Latin letters only; a missing one must not stop a run.
        draw.text((MARGIN, top), _fitting(caption, draw, font, size[0] - 2 * MARGIN), fill="black", font=font)
        for j, image in enumerate(row):
            picture = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            grid.paste(picture, (MARGIN + j * (width + MARGIN), top + line))
    return grid


def _fitting(text, draw, font, width):
    text = text.encode("latin-1", "replace").decode("latin-1")
    while text and draw.textlength(text, font=font) > width:
        text = text[:-1]
    return text
