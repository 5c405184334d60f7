"""Images with captions, from a folder or the hub, through `datasets`, as rows of one form whatever the columns."""

import contextlib
import hashlib
import io
import json
from pathlib import Path

import datasets
from PIL import Image, ImageOps
from tqdm import tqdm

from ppdiffusers_train.data.order import permutation
from ppdiffusers_train.errors import BadSampleError, UserError

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
ORIENTATION_TAG = 0x0112  # of EXIF; from 5 on, height and width change places


class ImageCaptionDataset:
    """A table of images and captions as rows `{"image": RGB PIL image, "caption": str or list of str}`.

    Args:
        table: a `datasets.Dataset`.
        image_column, caption_column: names of the columns in the table.
    """

    def __init__(self, table, image_column: str, caption_column: str):
        # Undecoded: the path names a broken file, and decoding happens where its error can be caught.
        self.table = table.cast_column(image_column, datasets.Image(decode=False))
        self.texts = table.select_columns([caption_column])  # so that reading a caption reads no image
        self.image_column, self.caption_column = image_column, caption_column

    def __len__(self):
        return len(self.table)

    def name(self, index: int) -> str:
        """How to call row `index` in a message: the file's name where there is one."""
        path = self.table[index][self.image_column]["path"]
        return f"{path} (row {index})" if path else f"row {index}"

    def captions(self, index: int) -> list:
        """The captions of row `index`: one, or several of which training takes one at random.

        Raises:
            BadSampleError: there is none, or it is no text.
        """
        caption = self.texts[index][self.caption_column]
        captions = caption if isinstance(caption, list) else [caption]
        if not captions or not all(isinstance(text, str) for text in captions):
            raise BadSampleError(
                f"{self.name(index)}: column {self.caption_column!r} holds {caption!r}; expected a text or several"
            )
        return captions

    def digest(self) -> str:
        """A hash of all captions in their order: what tells this data from other data of as many samples."""
        digest = hashlib.blake2b(digest_size=8)
        for batch in self.texts.iter(1000):
            digest.update(json.dumps(batch[self.caption_column]).encode())
        return digest.hexdigest()

    def image_digest(self, index: int) -> bytes:
        """A hash of the stored image of row `index`, as it is on disk.

        Raises:
            BadSampleError: the file cannot be read.
        """
        stored = self.table[index][self.image_column]
        try:
            content = stored["bytes"] or Path(stored["path"]).read_bytes()
        except OSError as error:
            raise BadSampleError(f"{self.name(index)}: the image cannot be read: {error}") from error
        return hashlib.blake2b(content, digest_size=16).digest()

    def image_size(self, index: int) -> tuple:
        """Width and height of row `index` as training sees it, from the file's header.

        Raises:
            BadSampleError: the image cannot be read.
        """
        with self._open(index) as file:
            turned = file.getexif().get(ORIENTATION_TAG, 1) >= 5
            return (file.height, file.width) if turned else file.size

    @contextlib.contextmanager
    def _open(self, index: int):
        stored = self.table[index][self.image_column]
        try:
            with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as file:
                yield file
        # Pillow reports a broken file through any of these.
        except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
            raise BadSampleError(f"{self.name(index)}: the image cannot be read: {error}") from error

    def __getitem__(self, index: int) -> dict:
        """Row `index`, decoded.

        Raises:
            BadSampleError: the image cannot be read, or the caption is no text.
        """
        with self._open(index) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
        self.captions(index)  # raises where there is none
        return {"image": image, "caption": self.texts[index][self.caption_column], "name": self.name(index)}


def build_dataset(args) -> ImageCaptionDataset:
    """The dataset that `--dataset_name` or `--train_data_dir` names.

    Raises:
        UserError: nothing is named, a folder or its metadata.jsonl is missing, or a column does not exist.
    """
    flag = "--dataset_name" if args.dataset_name else "--train_data_dir"
    source = args.dataset_name or args.train_data_dir
    if not source:
        raise UserError("no data: expected --train_data_dir DIR or --dataset_name NAME")
    if args.train_data_dir:
        check_image_folder(Path(args.train_data_dir))
    try:
        if args.dataset_name:
            tables = datasets.load_dataset(
                args.dataset_name, args.dataset_config_name, data_dir=args.train_data_dir, cache_dir=args.cache_dir
            )
        else:
            tables = datasets.load_dataset("imagefolder", data_dir=args.train_data_dir, cache_dir=args.cache_dir)
    except Exception as error:  # `datasets` raises whatever went wrong inside, wrapped or not; its root names the cause
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise UserError(f"{flag}: {source!r} cannot be loaded: {root or type(root).__name__}") from error
    if "train" not in tables:
        raise UserError(f"{flag}: {source!r} has the splits {', '.join(tables)}; expected one named train")
    table = tables["train"]
    for column_flag, column in (("--image_column", args.image_column), ("--caption_column", args.caption_column)):
        if column not in table.column_names:
            raise UserError(
                f"{column_flag}: {source!r} has no column {column!r}; it has {', '.join(table.column_names)}"
            )
    if not isinstance(table.features[args.image_column], datasets.Image):
        raise UserError(f"--image_column: column {args.image_column!r} of {source!r} does not hold images")
    text = getattr(table.features[args.caption_column], "feature", table.features[args.caption_column])
    if getattr(text, "dtype", None) not in ("string", "large_string", "null"):
        raise UserError(
            f"--caption_column: column {args.caption_column!r} of {source!r} holds {getattr(text, 'dtype', text)}; "
            "expected texts or lists of texts"
        )
    if len(table) == 0:
        raise UserError(f"{flag}: {source!r} has no samples")
    if args.max_train_samples is not None and args.max_train_samples < len(table):
        table = table.select(permutation(args.seed or 0, 0, len(table))[: args.max_train_samples])
    return ImageCaptionDataset(table, args.image_column, args.caption_column)


def check_image_folder(folder: Path) -> None:
    """Raise a `UserError` unless `folder` exists and has a metadata file with the captions, at the top or below."""
    if not folder.is_dir():
        raise UserError(f"--train_data_dir: {str(folder)!r} is not a folder; expected images with a metadata.jsonl")
    if not any(next(folder.rglob(name), None) for name in METADATA_FILES):
        raise UserError(
            f"--train_data_dir: {str(folder)!r} has no metadata.jsonl; expected one line per image, such as "
            '{"file_name": "cat.jpg", "text": "a cat on a chair"}'
        )


def warn_of_small_images(dataset: ImageCaptionDataset, size: int) -> None:
    """Say how many images have a side shorter than `size` pixels, and name one: enlarging makes them no sharper."""
    small = []
    for row in tqdm(range(len(dataset)), desc="reading sizes", unit="image", delay=5):
        with contextlib.suppress(BadSampleError):  # training says so when it meets it
            if min(dataset.image_size(row)) < size:
                small.append(row)
    if small:
        print(
            f"{len(small)} of {len(dataset)} images are smaller than {size} pixels and are enlarged, for example "
            f"{dataset.name(small[0])}"
        )
