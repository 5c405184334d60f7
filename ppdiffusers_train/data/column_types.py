"""The types of Arrow columns that hold images or captions, as `datasets`, pandas, Polars and pyarrow write them."""

from dataclasses import dataclass

import pyarrow
from pyarrow import compute, types

from ppdiffusers_train.errors import UserError


def is_text(kind) -> bool:
    """Whether a type is a text; nulls count, because a column may hold nothing else."""
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)


def is_caption(kind) -> bool:
    """Whether a type is a text or a list of texts."""
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return is_text(kind.value_type if is_list else kind)


def is_binary(kind) -> bool:
    """Whether a type is bytes."""
    return types.is_binary(kind) or types.is_large_binary(kind)


def is_image(kind) -> bool:
    """Whether a type is bytes, a path, or a struct with one or both under the names `bytes` and `path`."""
    if not types.is_struct(kind):
        return is_binary(kind) or is_text(kind)
    fields = {field.name: field.type for field in kind}
    content, path = fields.get("bytes", pyarrow.null()), fields.get("path", pyarrow.null())
    is_content = is_binary(content) or types.is_null(content)
    return ("bytes" in fields or "path" in fields) and is_content and is_text(path)


def image_parts(column) -> tuple:
    """(bytes, paths) of a column of images, each a chunked array with nulls where there is none."""
    kind = column.type
    if types.is_struct(kind):
        fields = [field.name for field in kind]
        parts = [compute.struct_field(column, name) if name in fields else None for name in ("bytes", "path")]
    else:
        parts = [column, None] if is_binary(kind) else [None, column]
    content, path = (
        nulls(column, empty) if part is None or types.is_null(part.type) else part
        for part, empty in zip(parts, (pyarrow.binary(), pyarrow.string()))
    )
    return content, decoded(path)


def nulls(column, kind):
    """A column of nulls, as long as `column`."""
    return pyarrow.chunked_array([pyarrow.nulls(len(column), kind)])


def decoded(column):
    """A column of texts, written out where the column has them in a dictionary."""
    if not types.is_dictionary(column.type):
        return column
    return pyarrow.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], column.type.value_type)


def described(schema) -> str:
    """The names and types of columns, for messages."""
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


@dataclass(frozen=True)
class Columns:
    """The columns that a user has named.

    Args:
        source: the table, as the user has named it, for messages.
        image, caption: names of its columns.
        mask: that of its column with masks, or None.
    """

    source: str
    image: str
    caption: str
    mask: object = None

    def image_in(self, names) -> str:
        """The name of the images' column. Where there is no `image`, it is `file_name`, as in metadata of a folder."""
        return "file_name" if self.image == "image" and "image" not in names and "file_name" in names else self.image

    def check(self, schema) -> list:
        """The names of these columns in a table with this schema.

        Raises:
            UserError: one does not exist, or cannot hold what it should.
        """
        names = [self.image_in(schema.names), self.caption, *([self.mask] if self.mask else [])]
        for flag, name in zip(("--image_column", "--caption_column", "--mask_column"), names):
            if name not in schema.names:
                raise UserError(f"{flag}: {self.source!r} has no column {name!r}; it has {described(schema)}")
        if names[0] == names[1]:
            raise UserError(f"--caption_column: {names[1]!r} is the --image_column, too; expected another column")
        image, caption, *masks = (schema.field(name).type for name in names)
        kinds = [("--image_column", names[0], image), *(("--mask_column", self.mask, kind) for kind in masks)]
        for flag, name, kind in kinds:
            if not is_image(kind):
                raise UserError(
                    f"{flag}: column {name!r} of {self.source!r} does not hold images, but {kind}; expected "
                    f"bytes, paths, or a struct of bytes and path; the columns are {described(schema)}"
                )
        if not is_caption(caption):
            raise UserError(
                f"--caption_column: column {names[1]!r} of {self.source!r} holds {caption}; expected texts or lists of "
                f"texts; the columns are {described(schema)}"
            )
        return names
