"""Text files that people write: UTF-8, with or without a byte order mark. An error names the probable encoding."""

import codecs


def decoded(content: bytes) -> str:
    """The text of a file or of one of its lines.

    Raises:
        ValueError: it is not UTF-8; the message says what it probably is, and how to convert it.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        name = probable_encoding(content)
        raise ValueError(f"it is not UTF-8, but probably {name} (`iconv -f {name} -t UTF-8` converts it)") from None
    if "\0" in text:
        raise ValueError("it holds NUL bytes, as UTF-16 does; expected UTF-8")
    return text


def probable_encoding(content: bytes) -> str:
    """The name that `iconv` has for the encoding of a text that is not UTF-8."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    try:
        content.decode("gb2312")  # in which each Chinese character is two bytes from 0xA1 on, unlike Latin texts
    except UnicodeDecodeError:
        return "WINDOWS-1252"
    return "GB18030"
