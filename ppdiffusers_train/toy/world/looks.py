"""How pictures of shapes can be asked for. Nothing heavy is imported here: the command line reads the names."""

LOOKS = ("plain", "outlined", "striped")
SIZES = (32, 64)  # height and width, in pixels
