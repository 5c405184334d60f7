"""Which files the examples are, and where: in the installed package, or beside it in a checkout.

`setup.py` runs this file to pack them, so it imports nothing of the package.
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
PACKED = PACKAGE / "examples"  # where a wheel has them
EXAMPLES = PACKED if PACKED.is_dir() else PACKAGE.parent / "examples"
# Listed, because users train in these folders, and their results are no examples.
PATTERNS = (
    "README*.md",
    "*.ipynb",
    "[!.]*/README*.md",
    "*/run.sh",
    "[!.]*/train_*.py",
    "presets/*.yaml",
    "data/photos/[!.]*",
)


def example_files(folder: Path) -> list:
    """The paths of the examples in a folder, relative to it, in order."""
    return sorted(file.relative_to(folder) for pattern in PATTERNS for file in folder.glob(pattern) if file.is_file())
