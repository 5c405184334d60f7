"""The looks and sizes of pictures of shapes. Nothing heavy is imported here, because the command line reads them."""

LOOKS = ("plain", "outlined", "striped")
SIZES = (32, 64)  # height and width, in pixels
