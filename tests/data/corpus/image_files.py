"""Writes image files and colour profiles from their specifications, where Pillow cannot write them."""

import struct
import zlib

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
"""XYZ of the three colours, one column each, as adapted to D50."""


def png(size, depth: int, kind: int, rows: list, before=(), after=()) -> bytes:
    """A PNG file.

    Args:
        size: (width, height).
        depth, kind: bits per channel and type of colour, of its header.
        rows: the bytes of each row.
        before, after: chunks (name, content) before and after the pixels.
    """

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    before, after = (b"".join(chunk(*part) for part in parts) for parts in (before, after))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND", b"")


def tiff(size, content: bytes, bits: tuple, photometric: int, **more) -> bytes:
    """A TIFF file of one uncompressed strip; `more` are tags as `t<number>=value`."""
    tags = {256: size[0], 257: size[1], 259: 1, 262: photometric, 273: 8, 277: len(bits), 278: size[1]}
    tags = {**tags, 279: len(content), **{int(name[1:]): value for name, value in more.items()}}
    content += bytes(len(content) % 2)
    places = 8 + len(content)
    extra = struct.pack(f"<{len(bits)}H", *bits)
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    inline = extra.ljust(4, b"\0") if len(extra) <= 4 else struct.pack("<I", places)
    entries.append(struct.pack("<HHI", 258, 3, len(bits)) + inline)
    entries.sort(key=lambda entry: struct.unpack("<H", entry[:2]))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", places + len(extra)) + content + extra + directory


def fixed(*numbers) -> bytes:
    """Numbers as ICC's s15Fixed16."""
    return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))


def profile(name: str, space: bytes, tags: dict, kind=b"mntr", connection=b"XYZ ") -> bytes:
    """An ICC profile of version 2."""
    text = name.encode()
    described = b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(1 + 4 + 4 + 2 + 1 + 67)
    white = b"XYZ " + bytes(4) + fixed(*D50)
    tags = {b"desc": described, b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": white, **tags}
    table, data, place = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        table += tag + struct.pack(">II", place + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = struct.pack(">I4xI", place + len(data), 0x02400000) + kind + space + connection
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(*D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def gamma_curve(gamma: float) -> bytes:
    """A curve of a profile."""
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def colour_profile(name: str, colours: np.ndarray, curve: bytes) -> bytes:
    """A profile of three colours (see `SRGB`) and a curve."""
    tags = {part + b"XYZ": b"XYZ " + bytes(4) + fixed(*column) for part, column in zip((b"r", b"g", b"b"), colours.T)}
    return profile(name, b"RGB ", {**tags, **{part + b"TRC": curve for part in (b"r", b"g", b"b")}})


def rgb_profile(name: str, colours: np.ndarray, gamma: float) -> bytes:
    """A profile of three colours and a gamma."""
    return colour_profile(name, colours, gamma_curve(gamma))


def srgb_profile() -> bytes:
    """A profile of sRGB whose curve is a table, as that of cameras and scanners is."""
    values = np.linspace(0, 1, 1024)
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    table = np.rint(65535 * linear).astype(">u2").tobytes()
    return colour_profile("standard colours", SRGB, b"curv" + bytes(4) + struct.pack(">I", 1024) + table)


def grey_profile(gamma: float) -> bytes:
    """A profile of greys."""
    return profile("grey", b"GRAY", {b"kTRC": gamma_curve(gamma)})


def ink_profile() -> bytes:
    """A profile of four inks that are all the same grey: the lightness L* falls by a quarter of 100 for each."""
    straight = bytes(range(256))
    nodes = [255 * (4 - bin(inks).count("1")) // 4 for inks in range(16)]
    table = b"".join(bytes([lightness, 128, 128]) for lightness in nodes)
    shape = struct.pack(">4B", 4, 3, 2, 0) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return profile(
        "four grey inks", b"CMYK", {b"A2B0": b"mft1" + bytes(4) + shape + straight * 4 + table + straight * 3},
        b"prtr", b"Lab ",
    )  # fmt: skip


def as_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear sRGB, in [0, 1] -> uint8 (IEC 61966-2-1)."""
    linear = np.clip(linear, 0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * curved).astype(np.uint8)


def from_rgb(pixels: np.ndarray, colours: np.ndarray, gamma: float) -> np.ndarray:
    """uint8 [H, W, 3] of an `rgb_profile` -> sRGB."""
    return as_srgb((pixels / 255.0) ** gamma @ colours.T @ np.linalg.inv(SRGB).T)


def from_lightness(lightness: np.ndarray) -> np.ndarray:
    """The grey of a lightness L* in [0, 100]: [H, W] -> uint8 [H, W, 3]."""
    y = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    return as_srgb(np.repeat(y[..., None], 3, -1))
