"""Tables in files on this machine: which files of a folder belong to which split, and what is in them."""

import contextlib
import os
import posixpath

import datasets
import pyarrow
from pyarrow import parquet, types

from ppdiffusers_train.data.column_types import Columns
from ppdiffusers_train.data.folder_files import walk
from ppdiffusers_train.data.folder_kinds import TABLE_FORMATS, TEXT_FORMATS
from ppdiffusers_train.data.folder_metadata import usable_captions
from ppdiffusers_train.data.metadata import read_lines
from ppdiffusers_train.data.problems import Problems
from ppdiffusers_train.data.rows import content_digest, stamp_of
from ppdiffusers_train.data.splits import split_of
from ppdiffusers_train.data.tables import ImageCaptionDataset
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.reporting.status_line import print_on_main

ROWS_AT_ONCE = 1000  # so that no file is in memory as a whole


def is_table(name: str) -> bool:
    """Whether a file holds a table, by its extension."""
    return posixpath.splitext(name)[1].lower() in TABLE_FORMATS


def table_files(folder: str) -> dict:
    """{split: paths of its files}, of one format. The files of other formats are not used, which is printed."""
    found = {}
    for name in walk(folder):
        if is_table(name):
            found.setdefault(posixpath.splitext(name)[1].lower(), []).append(name)
    chosen = next(ending for ending in TABLE_FORMATS if ending in found)
    others = [name for ending, names in found.items() if ending != chosen for name in names]
    if others:
        print_on_main(
            f"{folder}: the data are its {chosen} files; {len(others)} others are not used, such as {others[0]}"
        )
    splits = {}
    for name in found[chosen]:
        splits.setdefault(split_of(name), []).append(os.path.join(folder, name))
    return splits


def open_files(files: list, columns: Columns, cache_dir, problems: Problems) -> ImageCaptionDataset:
    """The rows of files of one format.

    Args:
        columns: of the file or folder that the user has named; paths of images are relative to it, or to their file.
        cache_dir: of `datasets`.
        problems: those of texts are added to it.
    Raises:
        UserError: a column does not exist or cannot be used, or a file cannot be read.
        OSError, pyarrow.ArrowException: a file cannot be read.
    """
    folders = [os.path.dirname(file) or "." for file in files]
    bases = tuple(dict.fromkeys([columns.source, *folders] if os.path.isdir(columns.source) else folders))
    ending = posixpath.splitext(files[0])[1].lower()
    fingerprint = content_digest(b"".join(stamp_of(os.stat(file)) for file in files)).hex()
    if ending in TEXT_FORMATS:
        table = text_table(files, columns, problems)
    else:
        table = parquet_table(files, columns, cache_dir) if ending == ".parquet" else mapped_table(files, columns)
    return ImageCaptionDataset(table, *columns.check(table.schema)[:2], fingerprint, bases, mask_column=columns.mask)


def mapped_table(files: list, columns: Columns):
    """The named columns of Arrow files as they are on disk. Only what is compressed is read and copied."""
    tables = []
    for file in files:
        with naming(file):
            table = read_mapped(file)
        tables.append(table.select(columns.check(table.schema)))
    return pyarrow.concat_tables(tables, promote_options="permissive")


def read_mapped(file: str):
    """The table of an Arrow file or of a stream in a file, which is what `datasets` writes."""
    mapped = pyarrow.memory_map(file)
    try:
        return pyarrow.ipc.open_file(mapped).read_all()
    except pyarrow.ArrowInvalid:
        mapped.seek(0)
        return pyarrow.ipc.open_stream(mapped).read_all()


@contextlib.contextmanager
def naming(file: str):
    """A context in which an error of reading is one that names the file."""
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: it cannot be read: {' '.join(str(error).split())}") from error


def parquet_table(files: list, columns: Columns, cache_dir):
    """The named columns of Parquet files. `datasets` writes them once into its cache, as files that can be mapped."""
    schemas, rows = [], 0
    for file in files:
        with naming(file), parquet.ParquetFile(file) as opened:
            schemas.append(opened.schema_arrow.remove_metadata())
            rows += opened.metadata.num_rows
    names = [columns.check(schema) for schema in schemas][0]
    whole = pyarrow.unify_schemas([readable(schema, names) for schema in schemas], promote_options="permissive")
    if not rows:  # which `datasets` refuses
        return whole.empty_table()
    options = {"columns": names, "features": datasets.Features.from_arrow_schema(whole), "batch_size": ROWS_AT_ONCE}
    table = datasets.load_dataset("parquet", data_files=files, cache_dir=cache_dir, split="train", **options)
    return table.data.table


def readable(schema, names: list):
    """Some columns of a schema, with types that `datasets` can write."""
    fields = []
    for field in map(schema.field, names):
        kind = field.type
        if types.is_dictionary(kind):
            kind = kind.value_type
        elif types.is_fixed_size_list(kind) or types.is_large_list(kind):
            kind = pyarrow.list_(kind.value_type)
        fields.append(pyarrow.field(field.name, kind))
    return pyarrow.schema(fields)


def text_table(files: list, columns: Columns, problems: Problems):
    """The same of files of text. Rows that cannot be used are added to `problems`, but for missing captions."""
    images, captions, masks = [], [], []
    for file in files:
        for place, row, problem in read_lines(file):
            problems.columns.update(dict.fromkeys(row))
            image = columns.image_in(row)
            texts, wrong = usable_captions(row.get(columns.caption), columns.caption)
            if problem or not is_path(row.get(image)):
                problem = problem or f"column {image!r} holds {row.get(image)!r}; expected the path of an image"
            elif columns.mask and not (row.get(columns.mask) is None or is_path(row[columns.mask])):
                problem = f"column {columns.mask!r} holds {row[columns.mask]!r}; expected the path of a mask"
            elif wrong:  # a missing caption is none: it makes a bad sample
                problem = wrong
            if problem:
                problems.add("bad_metadata", f"{place}: {problem}")
                continue
            images.append(row[image])
            captions.append(texts)
            masks.append(row.get(columns.mask))
    names = [columns.image_in(problems.columns), columns.caption, *([columns.mask] if columns.mask else [])]
    if problems.columns:
        names = columns.check(pyarrow.schema(dict.fromkeys(problems.columns, pyarrow.string())))
    if all(texts is None or len(texts) == 1 for texts in captions):
        captions, kind = [texts and texts[0] for texts in captions], pyarrow.string()
    else:
        kind = pyarrow.list_(pyarrow.string())
    arrays = [images, captions, masks][: len(names)]
    return pyarrow.table(arrays, pyarrow.schema(zip(names, (pyarrow.string(), kind, pyarrow.string()))))


def is_path(value) -> bool:
    """Whether a value of a row can be the path of an image."""
    try:
        return isinstance(value, str) and bool(value.encode()) and "\0" not in value
    except UnicodeEncodeError:
        return False
