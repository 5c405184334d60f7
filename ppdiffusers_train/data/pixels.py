"""From a stored image to the pixels that training sees: 8-bit sRGB, upright, on a background where it is transparent.

`read` is the only function that decodes an image, whatever its format and mode. `upright_size` reads its size from the
header alone.
"""

import contextlib
import functools
import importlib
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

VERSION = 1  # of the decoded pixels: another version makes encoded samples and facts about images outdated
WHITE = "#ffffff"
EXTREME = 8  # an image has an extreme shape if one side is more than this many times the other
ORIENTATION_TAG = 0x0112  # in EXIF data
# How an image with an EXIF orientation is turned upright; from 5 on, height and width are swapped.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PLUGINS = ("pillow_heif.HeifImagePlugin", "pillow_avif")  # optional; importing one teaches Pillow its format
MORE_EXTENSIONS = {".heic", ".heif", ".avif"}  # of images even without the plugins, so that these files are reported
NO_PICTURES = {"BUFR", "FITS", "GRIB", "HDF5", "MCIDAS", "MPEG"}  # scientific data and videos
PHOTOMETRIC, BITS, SAMPLE_FORMAT = 262, 258, 339  # TIFF tags
WHITE_IS_ZERO, SIGNED = 0, 2  # values of the first and the last of these tags
GREY_STEPS = {"1": 255, "L;2": 85, "L;4": 17}  # by which Pillow multiplies greys of 1, 2 and 4 bits
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # modes of images by the colour space of an ICC profile
IS_SRGB = 2  # a profile is sRGB's if it changes no value by more than this

# Pillow warns of images larger than half of its limit. `check` reports them.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
for plugin in PLUGINS:
    with contextlib.suppress(ImportError):
        importlib.import_module(plugin)


@functools.cache
def extensions() -> frozenset:
    """The extensions of files that are images: all that Pillow can read, and those that its plugins can."""
    Image.preinit()  # Pillow tries formats in this order: else the most common ones came after rare ones
    Image.init()
    known = {extension for extension, form in Image.EXTENSION.items() if form in Image.OPEN and form not in NO_PICTURES}
    return frozenset(known | MORE_EXTENSIONS)


def decode(stored, background: str = WHITE) -> Image.Image:
    """The pixels that training sees of an image's bytes or path, in mode RGB.

    Args:
        background: colour behind transparent pixels, as #rrggbb.
    """
    return on_background(read(stored)[0], background)


def on_background(image, background: str = WHITE) -> Image.Image:
    """An image that `read` has returned, in mode RGB."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image


def read(stored) -> tuple:
    """The upright pixels of an image's bytes or path, in sRGB.

    Returns:
        (image in mode RGB, or RGBA if it may be transparent; {kind of remark: one line of what was found}), with kinds
        of `tools.check.KINDS`.
    """
    with open_image(stored) as file:
        if file.format == "PNG" and isinstance(stored, bytes):
            refuse_damaged_png(stored)
        raw = str(file.tile[0][3]) if file.tile else ""  # how pixels are stored; forgotten when they are loaded
        file.load()
        orientation = orientation_of(file)  # None once Pillow has turned the image itself, as it does for TIFF
        if file.mode.startswith("I"):
            colours, alpha = grey_of_integers(file)
        else:
            colours, alpha = split_alpha(file, raw)
        image, remarks = to_srgb(colours, file.info.get("icc_profile"))
        remarks = {**remarks_of(file, raw, alpha), **remarks}  # last: to look for a second frame moves the file on
    if alpha:
        image.putalpha(alpha)
    image.info = {}  # a profile or a key of transparency that a file of these pixels must not have
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image, remarks


def open_image(stored):
    """Open an image's bytes or path with Pillow. Only its header is read.

    Raises:
        UnidentifiedImageError: it is of no format that can be read.
        ValueError: it is of one that holds no picture.
    """
    try:
        file = Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored)
    except UnidentifiedImageError:  # its message contains a memory address
        raise UnidentifiedImageError(why_unknown(stored)) from None
    problem = ""
    if file.format == "EPS":
        problem = "EPS is a program, which is not run; expected an image, such as PNG"
    elif file.format in NO_PICTURES:
        problem = f"{file.format} is no format of pictures; expected one such as JPEG or PNG"
    elif file.mode == "F":
        problem = "its pixels are floating-point numbers (mode F) of unknown range; expected integers of 8 or 16 bits"
    if problem:
        file.close()
        raise ValueError(problem)
    return file


def refuse_damaged_png(content: bytes) -> None:
    """Raise a `ValueError` if pixels of a PNG file do not have their checksum, which Pillow does not compare.

    (Portable Network Graphics, third edition, section 5.3.)
    """
    place, whole = 8, memoryview(content)
    while place + 12 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, place)
        end = place + 8 + size
        if kind == b"IDAT" and end + 4 <= len(content):
            if zlib.crc32(whole[place + 4 : end]) != struct.unpack_from(">I", content, end)[0]:
                raise ValueError("the file is damaged: its pixels do not have their checksum")
        place = end + 4


def why_unknown(stored) -> str:
    """Why an image's bytes or path cannot be opened."""
    if isinstance(stored, bytes):
        head = stored[:32]
    else:
        with open(stored, "rb") as file:
            head = file.read(32)
    if head[4:8] == b"ftyp":  # the container of HEIC, AVIF and films, followed by the names of what is in it
        for name, plugin, brands in (
            ("AVIF", "pillow-avif-plugin", (b"avif", b"avis")),
            ("HEIF", "pillow-heif<1", (b"hei", b"hev", b"mif1", b"msf1")),
        ):
            if name not in Image.OPEN and any(brand in head[8:] for brand in brands):
                return f"it is an image of the format {name}; reading it needs a package: pip install '{plugin}'"
    if head[:4] in (b"II*\0", b"MM\0*"):
        return "it is a TIFF file of a kind that is not read; expected integers of 8 or 16 bits per channel"
    return "it is no image of a known format"


def upright_size(file) -> tuple:
    """Width and height, after `decode`, of the image in Pillow's open `file`, of which nothing is loaded yet."""
    if file.format == "PNG":  # its EXIF data may follow the pixels
        file.load()
    return file.size[::-1] if (orientation_of(file) or 0) >= 5 else file.size


def orientation_of(file):
    """The EXIF orientation of an image, if it is one that turns the image.

    (`ImageOps.exif_transpose` also rewrites the EXIF data, which fails on photographs with malformed data.)
    """
    try:
        orientation = file.getexif().get(ORIENTATION_TAG)
    except Exception:  # malformed EXIF data raises any error; the pixels are sound nevertheless
        return None
    return orientation if orientation in TURNS else None


def grey_of_integers(file) -> tuple:
    """(image in mode L, alpha channel or None) of a loaded image with integers of 16 or 32 bits."""
    values, maximum = sixteen_bits(file)
    grey = grey_table(maximum)[values]
    if getattr(file, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    key = file.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.fromarray(grey), alpha


def sixteen_bits(file) -> tuple:
    """(values as uint16 [H, W], the value that is white) of a loaded image with integers of 12 to 32 bits.

    32 bits often hold a picture of 16 bits, because Pillow and NumPy widen such pictures; one of 32 bits with no value
    above 65535 would be black. So these values are taken for 16 bits.

    Raises:
        ValueError: there are negative numbers.
    """
    values, tags = np.asarray(file), getattr(file, "tag_v2", {})
    is_signed = tags.get(SAMPLE_FORMAT, (0,))[0] == SIGNED
    bits = tags.get(BITS, (8 * values.dtype.itemsize,))[0]
    if is_signed and values.min() < 0:
        raise ValueError("its pixels are signed integers, some of them negative; expected numbers from 0 on")
    if bits <= 16:
        return values.astype(np.uint16), 2 ** (bits - is_signed) - 1
    values = values.view(np.uint32)
    shift = (16 - is_signed) if values.max() > 65535 else 0
    return (values >> shift).astype(np.uint16), 65535


@functools.lru_cache(maxsize=8)
def grey_table(maximum: int) -> np.ndarray:
    """0 to `maximum` scaled to 0 to 255 and rounded, uint8 [65536]; what is above is white."""
    values = np.minimum(np.arange(65536), maximum)
    return ((values * 255 + maximum // 2) // maximum).astype(np.uint8)


def split_alpha(file, raw: str) -> tuple:
    """(image, alpha channel or None) of a loaded image with channels of 8 bits.

    Args:
        raw: Pillow's name of how the pixels are stored.
    """
    if not file.has_transparency_data:
        return file, None
    key = file.info.get("transparency")
    if file.format == "PNG" and isinstance(key, tuple):  # one colour that is transparent, as stored
        file.info["transparency"] = tuple(value >> 8 if ";16" in raw else value & 255 for value in key)
    elif file.format == "PNG" and raw in GREY_STEPS:
        file.info["transparency"] = key * GREY_STEPS[raw]
    image = file.convert("RGBA")
    return image if file.mode in ("P", "PA") else file, image.getchannel("A")


def to_srgb(image, profile) -> tuple:
    """(an image with channels of 8 bits in mode RGB and sRGB, {kind of remark: what was found}).

    Args:
        profile: the bytes of its ICC profile, or None. One that is broken, or of another kind of image, is ignored, as
            browsers and viewers do.
    """
    if image.mode == "LAB":  # whose meaning does not depend on a profile
        return image.convert("RGB"), {"profile": "Lab"}
    remarks = {}
    if profile:
        try:
            mode, transform, name = transform_of(profile)
            if (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and image.mode not in ("1", "L", "LA")):
                raise ValueError(f"{name!r} is for images of mode {mode}, and this is {image.mode}")
            if transform:
                return transform.apply(image.convert(mode)), {"profile": name}
        except (OSError, KeyError, ValueError, ImageCms.PyCMSError) as error:
            remarks["bad_profile"] = " ".join(str(error).split())
    elif image.mode == "CMYK":
        remarks["ink"] = "CMYK"
    return image.convert("RGB"), remarks


@functools.lru_cache(maxsize=32)
def transform_of(profile: bytes) -> tuple:
    """(mode of images that an ICC profile is for, transform of them to sRGB or None if it is sRGB's, its name).

    Raises:
        OSError, KeyError, PyCMSError: it is broken, or of a colour space that images do not have.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = PROFILE_MODES[source.profile.xcolor_space.strip()]
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    name = " ".join(ImageCms.getProfileDescription(source).split()) or "without a name"
    return mode, None if mode != "CMYK" and changes_little(transform, mode) else transform, name


def changes_little(transform, mode: str) -> bool:
    """Whether a transform of images of mode L or RGB leaves colours nearly as they are. Many profiles are sRGB's."""
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(len(steps), -1, 3)
    image = Image.fromarray(colours).convert(mode)
    changes = np.int16(transform.apply(image)) - np.int16(image.convert("RGB"))
    return np.abs(changes).max() <= IS_SRGB


def remarks_of(file, raw: str, alpha) -> dict:
    """{kind of remark: what was found} about a loaded image, besides its colours.

    Args:
        raw: Pillow's name of how the pixels were stored.
        alpha: the alpha channel, or None.
    """
    remarks = {}
    if alpha and alpha.getextrema()[0] < 255:
        remarks["transparent"] = "no pixel is opaque" if alpha.getextrema()[1] == 0 else file.mode
    if ";16" in raw or file.mode.startswith("I"):
        remarks["deep"] = "up to 32 bits" if file.mode == "I" else "16 bits"
    with contextlib.suppress(Exception):  # a broken second frame
        # Further images of MPO are previews, and a PSD's are the layers of the first.
        if file.format not in ("MPO", "PSD") and getattr(file, "is_animated", False):
            remarks["frames"] = file.format
    width, height = file.size
    if max(width, height) > EXTREME * min(width, height):
        remarks["long"] = f"{width} x {height}"
    return remarks
