"""Picture files, as people have them -> uint8 RGB."""

import io
import os
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from vit_jax.errors import DataError

MAX_PIXELS = 178_956_970  # Pillow's own limit: half a gigabyte of RGB
ORIENTATION = 0x0112  # the EXIF tag
BASELINE = (0xC0, 0xC1)  # frames (SOF) of a JPEG whose rows are coded once, from top to bottom
END, SCAN = b"\xff\xd9", b"\xff\xda"  # its markers EOI and SOS
MARKER = re.compile(rb"\xff[^\x00]")  # any, among coded pixels

# (offset, signature, reader). The reader is called by us, not by `Image.open`, whose limit on the
# size is a global that `max_pixels` could not raise, and which would try forty formats.
READERS = (
    (0, b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (0, b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (0, b"GIF8", GifImagePlugin.GifImageFile),
    (8, b"WEBP", WebPImagePlugin.WebPImageFile),
    (4, b"ftypavi", AvifImagePlugin.AvifImageFile),
    (0, b"II*\x00", TiffImagePlugin.TiffImageFile),
    (0, b"MM\x00*", TiffImagePlugin.TiffImageFile),
    (0, b"BM", BmpImagePlugin.BmpImageFile),
    *((0, b"P%d" % kind, PpmImagePlugin.PpmImageFile) for kind in range(1, 7)),
)
KNOWN = {  # what people have and we cannot read: (offset, signature) -> its name
    (4, b"ftyphei"): "a HEIC picture: convert it to JPEG",
    (4, b"ftypmif1"): "a HEIF picture: convert it to JPEG",
    (4, b"ftyp"): "a film, not a picture",
    (0, b"%PDF"): "a PDF, not a picture",
    (0, b"PK\x03\x04"): "a zip archive, not a picture",
    (0, b"<"): "markup (SVG, HTML or XML), not a picture of pixels",
}


# A JPEG's blocks of 8 x 8 pixels, decoded as blocks of 4, 2 or 1.
REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


def decode(
    data: bytes, *, max_pixels: int = MAX_PIXELS, reduced: int = 1, rows: int | None = None
) -> np.ndarray:
    """The bytes of a JPEG, PNG, GIF, WebP, AVIF, TIFF, BMP or PNM file -> uint8 [H, W, 3], RGB.

    The picture stands upright (EXIF orientation is applied) and opaque (transparent parts are laid
    on white). Grey, palette and CMYK become RGB; of 16 bits the upper 8 remain; of an animation,
    the first frame.

    Args:
      data: the whole file.
      max_pixels: larger pictures are refused by their header, before they are decoded.
      reduced: 1, 2, 4 or 8: a JPEG whose `jpeg_size` is known is decoded to [ceil(H / reduced),
        ceil(W / reduced), 3] pixels, each about the mean of those in its place, in less time (of
        sides that are no multiples of it, the last ones of the picture as the file has it, before
        it is turned upright, have fewer). Any other file is decoded to all of its pixels.
      rows: how many from the top are wanted: of a JPEG those below, of a reduced one those below
        its first ceil(rows / reduced), may be left out. The others are the same.

    Raises:
      DataError: saying why the bytes are no picture.
    """
    readers = (each for start, mark, each in READERS if data.startswith(mark, start))
    reader = next(readers, None)
    if reader is None:
        raise DataError(_no_picture(data))
    if reader is JpegImagePlugin.JpegImageFile:
        picture = _decode_jpeg(data, max_pixels, reduced, rows)
        if picture is not None:
            return picture
    try:
        with reader(io.BytesIO(data)) as opened:
            _check_size(*opened.size, max_pixels)
            opened.load()
            return _to_rgb(_upright(opened))
    except DataError:
        raise
    except Exception as error:  # a reader of foreign bytes may raise anything
        raise DataError(f"{_reason(error)} ({len(data):,} bytes)") from error


def as_rgb(picture: Any, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture of any kind -> uint8 [H, W, 3], RGB.

    Args:
      picture: the path of a file, its bytes, a Pillow image, or an array: grey [H, W] or
        [H, W, 1], RGB or RGBA, of uint8, or of numbers from 0 to 1.
      max_pixels: larger pictures are refused.

    Raises:
      DataError: naming the file, or the shape and type, and why it is no picture.
    """
    if isinstance(picture, (str, os.PathLike)):
        try:
            return decode(Path(picture).read_bytes(), max_pixels=max_pixels)
        except (OSError, DataError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{picture}: {reason}") from error
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return decode(bytes(picture), max_pixels=max_pixels)
    if isinstance(picture, Image.Image):
        _check_size(*picture.size, max_pixels)
        return _to_rgb(_upright(picture))
    array = np.asarray(picture)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise DataError(
            f"an array of shape {array.shape} is no picture: wanted [H, W] or [H, W, 1, 3 or 4]"
        )
    _check_size(array.shape[1], array.shape[0], max_pixels)
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise DataError("a picture of floating-point numbers must lie between 0 and 1")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise DataError(f"a picture of {array.dtype}: wanted uint8, or numbers from 0 to 1")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)))


def _no_picture(data: bytes) -> str:
    if not data:
        return "the file is empty"
    for (offset, signature), name in KNOWN.items():
        if data.startswith(signature, offset):
            return name
    start = data[:16]
    shown = repr(start.decode()) if start.isascii() else start.hex(" ")
    return f"no picture: it starts with {shown} ({len(data):,} bytes)"


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, (struct.error, IndexError, EOFError)):
        return f"cut short or damaged: {text}"
    return text


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DataError(
            f"{width} x {height} are {width * height:,} pixels, more than max_pixels={max_pixels:,}"
        )


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(H, W) of an ordinary JPEG, standing upright, from its header; None of any other file."""
    header = _jpeg_header(data) if data.startswith(b"\xff\xd8\xff") else None
    if header is None or not _ordinary(data, header):
        return None
    height, width = header.height, header.width
    return (width, height) if header.orientation in (5, 6, 7, 8) else (height, width)


class _Header(NamedTuple):
    """What a JPEG says of itself."""

    width: int
    height: int
    channels: int
    orientation: int  # EXIF
    frame: int  # where its frame header (SOF) begins


def _ordinary(data: bytes, header: _Header) -> bool:
    """OpenCV reads CMYK differently, and fills the missing part of a file that was cut short."""
    return header.channels in (1, 3) and END in data[-32:]


def _decode_jpeg(data: bytes, max_pixels: int, reduced: int, rows: int | None) -> np.ndarray | None:
    """An ordinary JPEG by OpenCV, 1.4 times as fast as Pillow; None if it is not ordinary."""
    header = _jpeg_header(data)
    if header is None:
        return None
    _check_size(header.width, header.height, max_pixels)
    if not _ordinary(data, header):
        return None
    if rows is not None:
        shorter, height = _shortened(data, header, rows + 3 * reduced)
        if height < header.height:
            picture = _read_jpeg(shorter, height, header.width, reduced)
            if picture is not None:
                return _rotated(picture, header.orientation)
    picture = _read_jpeg(data, header.height, header.width, reduced)
    return None if picture is None else _rotated(picture, header.orientation)


def _read_jpeg(data: bytes, height: int, width: int, reduced: int) -> np.ndarray | None:
    """By OpenCV, not turned; None where it cannot, or finds another size."""
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION | REDUCED[reduced]
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    if picture is None or picture.shape != (-(-height // reduced), -(-width // reduced), 3):
        return None
    return picture


def _shortened(data: bytes, header: _Header, rows: int) -> tuple[bytes, int]:
    """The file as one of fewer rows, at least `rows`, and how many; all of it where it must be.

    libjpeg decodes as many rows as the frame header says. What follows it skips, up to a marker,
    which it would complain of: so it gets none, and zeros after the last byte, since it reads a
    little ahead. The last rows are not quite the same, for colours are smoothed over those below.
    """
    height = -(-rows // 16) * 16  # as many as it decodes at a time
    frame = header.frame
    if (
        height >= header.height
        or header.orientation not in (1, 2)  # otherwise the top is not at the file's beginning
        or data[frame + 1] not in BASELINE
    ):
        return data, header.height
    marker = MARKER.search(data, data.find(SCAN, frame) + len(SCAN))
    if marker is None or marker.group() != END:  # of a restart, say
        return data, header.height
    kept = data[: frame + 5], height.to_bytes(2, "big"), data[frame + 7 : marker.start()]
    return b"".join((*kept, bytes(1024))), height


def _jpeg_header(data: bytes) -> _Header | None:
    """Of an 8-bit JPEG; None if it has no such header."""
    place, exif = 2, b""
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            precision, height, width, channels = struct.unpack_from(">BHHB", data, place + 4)
            if precision != 8 or not height:
                return None
            return _Header(width, height, channels, _orientation(exif) if exif else 1, place)
        if marker == 0xE1 and data.startswith(b"Exif\0\0", place + 4):
            exif = data[place + 4 : place + 2 + length]
        place += 2 + length
    return None


def _orientation(exif: bytes) -> int:
    tags = Image.Exif()
    try:
        tags.load(exif)
        return tags.get(ORIENTATION, 1)
    except Exception:  # a damaged remark is no reason to lose the picture
        return 1


def _rotated(picture: np.ndarray, orientation: int) -> np.ndarray:
    """Applies EXIF orientation 1..8; other values mean nothing."""
    if orientation not in range(2, 9):
        return picture
    if orientation in (5, 6, 7, 8):
        picture = picture.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        picture = picture[:, ::-1]
    if orientation in (3, 4, 7, 8):
        picture = picture[::-1]
    return np.ascontiguousarray(picture)


def _upright(picture: ImageFile.ImageFile) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a damaged remark is no reason to lose the picture
        return picture


def _to_rgb(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I"):  # 16 bits in 16 or 32: Pillow would clip them at 255
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(f"grey values from {grey.min()} to {grey.max()}: not 8 or 16 bits")
        return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    if picture.mode == "F":
        raise DataError("a picture of floating-point numbers, whose range nobody can guess")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return np.array(picture.convert("RGB"))
