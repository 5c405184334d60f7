"""Images of every mode, turned, with profiles, of several frames, of odd shapes, and broken ones.

What must be seen is computed from the specifications of formats and colour spaces, with NumPy.
"""

import io
import struct

import numpy as np
from PIL import Image
from PIL.ImageCms import ImageCmsProfile, createProfile

from tests.data.corpus import Expected, case
from tests.data.corpus.files import pixels, save, write_jsonl
from tests.data.corpus.image_files import (
    ADOBE_RGB,
    SRGB,
    from_lightness,
    from_rgb,
    grey_profile,
    ink_profile,
    png,
    rgb_profile,
    srgb_profile,
    tiff,
)

WHITE = (255, 255, 255)


def expect(folder, images: dict, tolerance=0, flags=(), **options) -> Expected:
    """What must come of `{file: what must be seen}`, pixels or a part of the message why not."""
    write_jsonl(folder, [{"file_name": name, "text": f"caption of {name}"} for name in images])
    samples = [seen if isinstance(seen, str) else (seen, f"caption of {name}") for name, seen in sorted(images.items())]
    return Expected(["--train_data_dir", folder, *flags], samples, tolerance=tolerance, **options)


def write(folder, name: str, content: bytes) -> None:
    """Write an image file."""
    (folder / name).write_bytes(content)


def grey(values) -> np.ndarray:
    """[H, W] -> uint8 [H, W, 3]."""
    return np.repeat(np.asarray(values).astype(np.uint8)[..., None], 3, -1)


def on(colours, alpha, background=WHITE) -> np.ndarray:
    """Colours [H, W, 3] with alpha [H, W] in front of a background: out = a c + (1 - a) b, in values of 8 bits."""
    alpha = np.asarray(alpha)[..., None] / 255
    return np.rint(alpha * colours + (1 - alpha) * np.array(background)).astype(np.uint8)


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, 3] as its EXIF orientation says: where the first row and column are (EXIF 2.3, table 6)."""
    flipped = {2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 7: array[::-1, ::-1]}.get(orientation, array)
    if orientation in (5, 7):
        return flipped.transpose(1, 0, 2)
    return {6: np.rot90(array, -1), 8: np.rot90(array)}.get(orientation, flipped)


def exif(orientation: int) -> Image.Exif:
    """EXIF data with an orientation."""
    data = Image.Exif()
    data[0x0112] = orientation
    return data


@case
def transparent_pixels_of_every_kind(folder):
    colours, alpha = pixels(1), pixels(2)[..., 0]
    Image.fromarray(np.dstack([colours, alpha])).save(folder / "rgba.png")
    Image.fromarray(np.dstack([colours, alpha])).save(folder / "rgba.tiff")
    Image.fromarray(np.dstack([colours, alpha])).save(folder / "rgba.webp", lossless=True, exact=True)
    Image.fromarray(np.dstack([colours[..., 0], alpha]), "LA").save(folder / "la.png")
    image = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12), "P")
    image.putpalette(colours.reshape(-1).tolist())
    image.save(folder / "palette.png", transparency=alpha.tobytes())
    image.save(folder / "palette.gif", transparency=5)
    key = np.where(np.arange(96).reshape(8, 12) == 5, 0, 255)
    seen = on(colours, alpha)
    return expect(folder, {
        "rgba.png": seen, "rgba.tiff": seen, "rgba.webp": seen, "la.png": on(grey(colours[..., 0]), alpha),
        "palette.png": seen, "palette.gif": on(colours, key),
    })  # fmt: skip


@case
def transparent_pixels_on_a_named_background(folder):
    colours, alpha = pixels(1), pixels(2)[..., 0]
    Image.fromarray(np.dstack([colours, alpha])).save(folder / "a.png")
    flags = ["--background_color", "tomato"]
    return expect(folder, {"a.png": on(colours, alpha, (255, 99, 71))}, flags=flags)


@case
def an_opaque_alpha_channel_changes_nothing(folder):
    colours = pixels(1)
    Image.fromarray(np.dstack([colours, np.full(colours.shape[:2], 255, np.uint8)])).save(folder / "a.png")
    return expect(folder, {"a.png": colours}, flags=["--background_color", "#102030"])


@case
def one_colour_is_transparent(folder):
    """The key of a PNG counts in the bits that the file stores."""
    row = bytes([9, 8, 7, 6, 5, 4])
    write(folder, "rgb.png", png((2, 1), 8, 2, [row], [(b"tRNS", struct.pack(">3H", 9, 8, 7))]))
    deep = struct.pack(">6H", 1000, 2000, 3000, 4000, 5000, 6000)
    write(folder, "rgb16.png", png((2, 1), 16, 2, [deep], [(b"tRNS", struct.pack(">3H", 1000, 2000, 3000))]))
    write(folder, "grey.png", png((2, 1), 8, 0, [bytes([200, 9])], [(b"tRNS", struct.pack(">H", 200))]))
    deep = struct.pack(">2H", 257 * 30, 257 * 30 + 1)
    write(folder, "grey16.png", png((2, 1), 16, 0, [deep], [(b"tRNS", struct.pack(">H", 257 * 30))]))
    write(folder, "grey2.png", png((4, 1), 2, 0, [b"\x1b"], [(b"tRNS", struct.pack(">H", 2))]))
    write(folder, "grey4.png", png((2, 1), 4, 0, [b"\x3f"], [(b"tRNS", struct.pack(">H", 3))]))
    write(folder, "one.png", png((4, 1), 1, 0, [b"\x50"], [(b"tRNS", struct.pack(">H", 0))]))
    red = ["--background_color", "#f00"]
    r = [255, 0, 0]
    return expect(folder, {
        "rgb.png": np.array([[r, [6, 5, 4]]]), "rgb16.png": np.array([[r, [16, 19, 23]]]),
        "grey.png": np.array([[r, [9] * 3]]), "grey16.png": np.array([[r, [30] * 3]]),
        "grey2.png": np.array([[[0] * 3, [85] * 3, r, [255] * 3]]), "grey4.png": np.array([[r, [255] * 3]]),
        "one.png": np.array([[r, [255] * 3, r, [255] * 3]]),
    }, flags=red, tolerance=1)  # fmt: skip


@case
def transparency_that_is_multiplied_already(folder):
    alpha = np.array([[255, 128, 0, 51]])
    colours = np.array([[[10, 20, 30], [255, 0, 255], [0, 0, 0], [255, 255, 0]]])
    stored = np.dstack([np.rint(colours * alpha[..., None] / 255), alpha]).astype(np.uint8)
    write(folder, "a.tiff", tiff((4, 1), stored.tobytes(), (8,) * 4, 2, t338=1))
    return expect(folder, {"a.tiff": on(colours, alpha)}, tolerance=1)


@case
def greys_of_sixteen_bits(folder):
    values = np.arange(0, 65536, 683, np.uint16).reshape(8, 12)
    seen = grey(np.rint(values / 257))
    for name in ("a.png", "b.tiff", "c.jp2"):
        Image.fromarray(values).save(folder / name)
    Image.frombytes("I;16B", (12, 8), values.astype(">u2").tobytes()).save(folder / "d.tif")
    write(folder, "e.pgm", b"P5 12 8 65535\n" + values.astype(">u2").tobytes())
    write(folder, "f.tif", tiff((12, 8), values.astype("<u2").tobytes(), (16,), 0))  # 0 is white
    Image.fromarray(values).save(folder / "g.tif", compression="tiff_lzw")
    names = ("a.png", "b.tiff", "c.jp2", "d.tif", "e.pgm", "g.tif")
    return expect(folder, {**dict.fromkeys(names, seen), "f.tif": 255 - seen})


@case
def greys_of_twelve_bits_and_signed_ones(folder):
    values = np.array([[0, 1000, 2048, 4095]])
    packed = bytes([0, 0x03, 0xE8, 0x80, 0x0F, 0xFF])
    write(folder, "twelve.tif", tiff((4, 1), packed, (12,), 1))
    write(folder, "signed.tif", tiff((4, 1), (values * 8).astype("<i2").tobytes(), (16,), 1, t339=2))
    write(folder, "negative.tif", tiff((4, 1), (values - 9).astype("<i2").tobytes(), (16,), 1, t339=2))
    return expect(folder, {
        "twelve.tif": grey(np.rint(values / 4095 * 255)), "signed.tif": grey(np.rint(values * 8 / 32767 * 255)),
        "negative.tif": "its pixels are signed integers, some of them negative",
    })  # fmt: skip


@case
def integers_of_thirty_two_bits(folder):
    values = np.arange(0, 65536, 683).reshape(8, 12)
    Image.fromarray(values.astype(np.int32)).save(folder / "sixteen.tif")  # a picture of 16 bits, widened
    Image.fromarray((values << 15).astype(np.int32)).save(folder / "signed.tif")
    write(folder, "unsigned.tif", tiff((12, 8), (values << 16).astype("<u4").tobytes(), (32,), 1))
    seen = grey(np.rint(values / 257))
    return expect(folder, {"sixteen.tif": seen, "signed.tif": seen, "unsigned.tif": seen}, tolerance=1)


@case
def colours_of_sixteen_bits(folder):
    values = np.random.default_rng(5).integers(0, 65536, (8, 12, 4))
    rows = [row.astype(">u2").tobytes() for row in values[..., :3]]
    write(folder, "a.png", png((12, 8), 16, 2, rows))
    write(folder, "b.png", png((12, 8), 16, 6, [row.astype(">u2").tobytes() for row in values]))
    write(folder, "c.png", png((12, 8), 16, 4, [row.astype(">u2").tobytes() for row in values[..., 2:]]))
    write(folder, "d.tif", tiff((12, 8), values[..., :3].astype("<u2").tobytes(), (16,) * 3, 2))
    seen = np.rint(values / 257)
    return expect(folder, {
        "a.png": seen[..., :3].astype(np.uint8), "b.png": on(seen[..., :3], seen[..., 3]),
        "c.png": on(grey(seen[..., 2]), seen[..., 3]), "d.tif": seen[..., :3].astype(np.uint8),
    }, tolerance=2)  # fmt: skip


@case
def floating_point_is_refused_by_name(folder):
    save(folder / "a.png", pixels(0))
    Image.fromarray(np.ones((4, 4), np.float32)).save(folder / "b.tiff")
    write(folder, "c.pfm", b"Pf\n2 1\n-1.0\n" + bytes(8))
    write(folder, "d.tiff", tiff((2, 1), bytes(16), (64,), 1, t339=3))
    refused, unknown = "floating-point numbers", "a TIFF file of a kind that is not read"
    return expect(folder, {"a.png": pixels(0), "b.tiff": refused, "c.pfm": refused, "d.tiff": unknown})


@case
def black_and_white(folder):
    bits = pixels(3)[..., 0] > 127
    for name in ("a.png", "b.tiff", "c.bmp", "d.pbm"):
        Image.fromarray(bits).save(folder / name)
    seen = grey(255 * bits)
    return expect(folder, dict.fromkeys(("a.png", "b.tiff", "c.bmp", "d.pbm"), seen))


@case
def inks(folder):
    """Without a profile: what an ink takes away is taken away of what black leaves."""
    cyan, magenta, yellow, black = values = np.array([[0, 255, 0, 90], [0, 0, 200, 10], [0, 0, 0, 60], [0, 0, 40, 99]])
    values = np.repeat(np.repeat(values.T[None], 16, 0), 16, 1)  # blocks of JPEG
    image = Image.fromarray(values.astype(np.uint8), "CMYK")
    image.save(folder / "a.tif")
    image.save(folder / "b.jpg", quality=100, subsampling=0)  # stored inverted, as Adobe's programs do
    left = np.rint((255 - values[..., :3]) * (255 - values[..., 3:]) / 255).astype(np.uint8)
    return expect(folder, {"a.tif": left, "b.jpg": left}, tolerance=2)


@case
def inks_with_a_profile(folder):
    values = np.random.default_rng(6).integers(0, 256, (8, 12, 4), np.uint8)
    image = Image.fromarray(values, "CMYK")
    image.save(folder / "a.tif", icc_profile=ink_profile())
    flat = Image.new("CMYK", (16, 16), (255, 0, 51, 0))
    flat.save(folder / "b.jpg", quality=100, icc_profile=ink_profile())
    lightness = 100 - 25 * values.astype(int).sum(-1) / 255
    return expect(folder, {
        "a.tif": from_lightness(lightness), "b.jpg": from_lightness(np.full((16, 16), 70.0)),
    }, tolerance=2)  # fmt: skip


@case
def lightness_and_two_colours(folder):
    """Lab in its 8 bits: L* of 0 to 100 as 0 to 255; a* and b* of 0 are neutral."""
    values = np.zeros((8, 12, 3), np.uint8)
    values[..., 0] = pixels(7)[..., 0]
    Image.frombytes("LAB", (12, 8), values.tobytes()).save(folder / "a.tif")
    return expect(folder, {"a.tif": from_lightness(values[..., 0] / 2.55)}, tolerance=2)


@case
def wide_gamut(folder):
    colours, alpha, gamma = pixels(8), pixels(9)[..., 0], 563 / 256
    wide = rgb_profile("a wide gamut", ADOBE_RGB, gamma)
    seen = from_rgb(colours, ADOBE_RGB, gamma)
    save(folder / "a.png", colours, icc_profile=wide)
    save(folder / "b.tif", colours, icc_profile=wide)
    save(folder / "c.webp", colours, icc_profile=wide, lossless=True)
    flat = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    save(folder / "d.jpg", flat, icc_profile=wide, quality=100)
    Image.fromarray(np.dstack([colours, alpha])).save(folder / "e.png", icc_profile=wide)
    image = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12), "P")
    image.putpalette(colours.reshape(-1).tolist())
    image.save(folder / "f.png", icc_profile=wide)
    return expect(folder, {
        **dict.fromkeys(("a.png", "b.tif", "c.webp", "f.png"), seen), "d.jpg": from_rgb(flat, ADOBE_RGB, gamma),
        "e.png": on(seen, alpha),
    }, tolerance=3)  # fmt: skip


@case
def greys_with_a_profile(folder):
    values = pixels(10)[..., 0]
    save(folder / "a.png", values, icc_profile=grey_profile(1.0))
    deep = (values * 257.0).astype(np.uint16)
    Image.fromarray(deep).save(folder / "b.png", icc_profile=grey_profile(1.0))
    save(folder / "c.png", values, icc_profile=rgb_profile("wide", ADOBE_RGB, 1.0))  # greys of colours
    seen = from_rgb(grey(values), SRGB, 1.0)
    return expect(folder, {"a.png": seen, "b.png": seen, "c.png": seen}, tolerance=2)


@case
def a_profile_of_srgb_changes_no_pixel(folder):
    profiles = {"a.png": srgb_profile(), "b.png": ImageCmsProfile(createProfile("sRGB")).tobytes()}
    colours = pixels(11, (64, 64))
    return expect(
        folder, {name: save(folder / name, colours, icc_profile=profile) for name, profile in profiles.items()}
    )


@case
def a_profile_that_is_near_srgb_is_followed(folder):
    colours = pixels(11) // 8  # dark ones, where the curves differ
    save(folder / "a.png", colours, icc_profile=rgb_profile("gamma 2.2", SRGB, 563 / 256))
    return expect(folder, {"a.png": from_rgb(colours, SRGB, 563 / 256)}, tolerance=2)


@case
def profiles_that_cannot_be_used_are_ignored(folder):
    images = {
        "broken.png": b"no profile", "cut.png": rgb_profile("wide", ADOBE_RGB, 2.2)[:300], "inks.png": ink_profile(),
        "greys.png": grey_profile(1.0),
    }  # fmt: skip
    return expect(
        folder, {name: save(folder / name, pixels(12), icc_profile=profile) for name, profile in images.items()}
    )


@case
def turned_images_of_every_format(folder):
    array, images = pixels(13), {}
    for orientation in range(1, 9):
        for ending, options in (("png", {}), ("tif", {}), ("webp", {"lossless": True})):
            name = f"{orientation}.{ending}"
            save(folder / name, array, exif=exif(orientation), **options)
            images[name] = turned(array, orientation)
        save(folder / f"{orientation}-lzw.tif", array, exif=exif(orientation), compression="tiff_lzw")
        images[f"{orientation}-lzw.tif"] = turned(array, orientation)
    return expect(folder, images)


@case
def a_png_that_is_told_to_be_turned_after_its_pixels(folder):
    array = pixels(14)
    chunk = (b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0"))
    write(folder, "a.png", png((12, 8), 8, 2, [row.tobytes() for row in array], after=[chunk]))
    return expect(folder, {"a.png": turned(array, 6)})


@case
def malformed_exif_data(folder):
    flat = np.full((16, 16, 3), 90, np.uint8)
    for number, data in enumerate((b"Exif\0\0nothing", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0")):
        for ending, options in (("jpg", {"quality": 100}), ("webp", {"lossless": True}), ("png", {})):
            save(folder / f"{number}.{ending}", flat, exif=data, **options)
    names = (f"{number}.{ending}" for number in range(3) for ending in ("jpg", "webp", "png"))
    return expect(folder, dict.fromkeys(names, flat), tolerance=1)


@case
def several_frames(folder):
    frames = [Image.fromarray(pixels(number)) for number in (15, 16, 17)]
    options = {"png": {}, "tif": {}, "webp": {"lossless": True}}
    for ending, more in options.items():
        frames[0].save(folder / f"a.{ending}", save_all=True, append_images=frames[1:], **more)
    flat = [Image.new("RGB", (12, 8), colour) for colour in ("red", "lime", "blue")]
    flat[0].save(folder / "b.gif", save_all=True, append_images=flat[1:])
    seen = {f"a.{ending}": pixels(15) for ending in options}
    return expect(folder, {**seen, "b.gif": np.array(flat[0])})


@case
def extreme_shapes(folder):
    sizes = {"long.png": (3000, 2), "one.png": (1, 1), "tall.png": (1, 999)}
    return expect(folder, {name: save(folder / name, pixels(18, size)) for name, size in sizes.items()})


@case
def a_bomb_is_refused_by_its_pixels(folder):
    write(folder, "a.png", png((20000, 20000), 1, 0, []))
    write(folder, "b.png", png((60000, 3000), 8, 2, []))
    bomb = "(180000000 pixels) exceeds limit"
    return expect(folder, {"a.png": "(400000000 pixels) exceeds limit", "b.png": bomb})


@case
def files_that_are_no_images_or_cut_short(folder):
    file = io.BytesIO()
    Image.fromarray(pixels(21, (64, 64))).save(file, "PNG")
    content = file.getvalue()
    write(folder, "a.png", content[:5000])
    write(folder, "b.png", b"")
    write(folder, "c.jpg", b"this is no picture")
    write(folder, "d.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    write(folder, "e.jpg", b"SIMPLE  =                    T".ljust(80) + b"BITPIX  = 16".ljust(80))
    return expect(folder, {
        "a.png": "truncated", "b.png": "no image of a known format", "c.jpg": "no image of a known format",
        "d.eps": "EPS is a program, which is not run", "e.jpg": "cannot be read",
    })  # fmt: skip


@case
def formats_of_phones_name_the_package_that_reads_them(folder):
    brands = {"a.heic": b"heic", "b.jpg": b"mif1", "c.avif": b"avif", "d.heif": b"msf1"}
    for name, brand in brands.items():
        write(folder, name, struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + brand + b"miaf" + bytes(40))
    heic, avif = "pip install 'pillow-heif<1'", "pip install 'pillow-avif-plugin'"
    unknown = "no image of a known format"
    heic, avif = (unknown if form in Image.OPEN else text for form, text in (("HEIF", heic), ("AVIF", avif)))
    return expect(folder, {"a.heic": heic, "b.jpg": heic, "c.avif": avif, "d.heif": heic})


@case
def a_bit_of_a_png_is_wrong(folder):
    save(folder / "a.png", pixels(0, (64, 64)))
    content = bytearray((folder / "a.png").read_bytes())
    content[len(content) // 2] ^= 0x40
    (folder / "a.png").write_bytes(content)
    write_jsonl(folder, [{"file_name": "a.png", "text": "x"}])
    return Expected(["--train_data_dir", folder], ["a.png (row 0): the image cannot be read: "])
