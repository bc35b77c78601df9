"""What can be done to one picture: pure functions of uint8 [H, W, 3].

The point operations compute what Pillow's ImageEnhance and ImageOps do. One difference: saturation
and sharpness are rounded, where Pillow cuts off the fraction, so they lie up to one level apart.
"""

import cv2
import numpy as np
from PIL import Image

from vit_jax.errors import nearest

try:
    import cykooz_resizer as simd
except ImportError:  # no wheel for Linux on Arm
    simd = None

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "hamming": Image.Resampling.HAMMING,
}
GREY = np.array([[0.299, 0.587, 0.114]], np.float32)  # ITU-R 601-2, as Pillow's mode L
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
LEVELS = np.arange(256.0)


def interpolation(name: str) -> Image.Resampling:
    """ValueError with the valid names if there is no such interpolation."""
    if name not in INTERPOLATIONS:
        raise ValueError(f"interpolation={name!r} does not exist.{nearest(name, INTERPOLATIONS)}")
    return INTERPOLATIONS[name]


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    name: str,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """[H, W, 3] -> [*size, 3]; by Pillow, which averages over what it shrinks (antialiasing).

    `box` is what to resize of the picture, (x0, y0, x1, y1) in pixels, None all of it.
    """
    height, width = size
    whole = (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))
    if image.shape[:2] == (height, width) and box in (None, whole):
        return image
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((width, height), interpolation(name), box))


def resample(
    image: np.ndarray,
    size: tuple[int, int],
    name: str,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """`resize` in a fifth of the time, for training: most values are the same, none 3 levels off.

    Pillow's weights in its order, columns before rows, by the processor's vectors. (Pillow 13 takes
    the rows first where the height shrinks and the width does not; there noise of all levels can be
    some 15 off.) Other interpolations than bilinear and bicubic are Pillow's.
    """
    if simd is None or name not in ("bilinear", "bicubic"):
        return resize(image, size, name, box)
    (height, width), (H, W) = size, image.shape[:2]
    x0, y0, x1, y1 = box or (0, 0, W, H)
    kernel = simd.FilterType.bilinear if name == "bilinear" else simd.FilterType.catmull_rom
    resizer, method = simd.Resizer(), simd.ResizeAlg.convolution(kernel)
    picture = simd.ImageData(W, H, simd.PixelType.U8x3, image.tobytes())
    across, down = (x0, 0, x1 - x0, H), (0, y0, width, y1 - y0)
    for shape, place in (((width, H), across), ((width, height), down)):
        given, picture = picture, simd.ImageData(*shape, simd.PixelType.U8x3)
        options = simd.ResizeOptions(method, crop_box=simd.CropBox(*place))
        resizer.resize(given, picture, options)
    return np.frombuffer(picture.get_buffer(), np.uint8).reshape(height, width, 3)


def grey(image: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> [H, W]: the luma of each pixel."""
    return cv2.transform(image, GREY).reshape(image.shape[:2])


def look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Replaces each value by its entry in a table [256] or, for each channel, [256, 3].

    Entries are limited to 0..255, and lose their fraction.
    """
    table = np.clip(table, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table if table.ndim == 1 else table[None])


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """0 is black, 1 the picture."""
    return look_up(image, _from(0, factor))


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """0 is the mean of the grey picture, 1 the picture."""
    mean = np.floor(grey(image).mean() + 0.5)
    return look_up(image, _from(mean, factor))


def _from(level: float, factor: float) -> np.ndarray:
    """Each level's distance from `level`, times the factor; in Pillow's precision."""
    start, levels = np.float32(level), LEVELS.astype(np.float32)
    return start + np.float32(factor) * (levels - start)


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """0 is the grey picture, 1 the picture."""
    return _blend(cv2.merge([grey(image)] * 3), image, factor)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """0 is smoothed by the kernel (1 1 1, 1 5 1, 1 1 1) / 13, 1 the picture; its rim stays."""
    smooth = image.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, SMOOTH)[1:-1, 1:-1]
    return _blend(smooth, image, factor)


def _blend(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    return cv2.addWeighted(first, 1 - share, second, share, 0)


def hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Turns every hue by that part of the circle, -0.5 to 0.5."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # [H, W, 3], the hue in 256 parts
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel to 0..255; one of a single value stays."""
    table = np.repeat(LEVELS[:, None], 3, axis=1)  # [256, 3]
    for channel in range(3):
        low, high = cv2.minMaxLoc(cv2.extractChannel(image, channel))[:2]
        if high > low:
            scale = 255 / (high - low)
            table[:, channel] = LEVELS * scale - low * scale
    return look_up(image, table)


def equalize(image: np.ndarray) -> np.ndarray:
    """Makes every level of each channel about equally frequent, as PIL.ImageOps.equalize."""
    table = np.repeat(LEVELS[:, None], 3, axis=1)  # [256, 3]
    for channel in range(3):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        before = np.cumsum(counts) - counts  # pixels below each level
        if step:
            table[:, channel] = (step // 2 + before) // step
    return look_up(image, table)


def invert(image: np.ndarray) -> np.ndarray:
    """The negative."""
    return 255 - image


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the upper `bits` of 8."""
    return image & np.uint8(256 - 2 ** (8 - bits))


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts the levels from `threshold` on."""
    return look_up(image, np.where(threshold <= LEVELS, 255 - LEVELS, LEVELS))


def solarize_add(image: np.ndarray, amount: int) -> np.ndarray:
    """Brightens the levels under 128 by `amount`."""
    return look_up(image, np.where(LEVELS < 128, LEVELS + amount, LEVELS))


def warp(
    image: np.ndarray, matrix: tuple[float, float, float, float, float, float], fill: tuple
) -> np.ndarray:
    """Reads out(x, y) from image(a x + b y + c, d x + e y + f), bilinear; outside is `fill`.

    Coordinates are of pixel corners, as in Pillow's `Image.transform`.
    """
    a, b, c, d, e, f = matrix
    # OpenCV counts from the centre of the first pixel.
    c, f = c + (a + b - 1) / 2, f + (d + e - 1) / 2
    return cv2.warpAffine(
        image,
        np.array([[a, b, c], [d, e, f]]),
        image.shape[1::-1],
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )


def shear_x(image: np.ndarray, amount: float, fill: tuple) -> np.ndarray:
    """Moves each row to the left by `amount` of its distance from the top."""
    return warp(image, (1, amount, 0, 0, 1, 0), fill)


def shear_y(image: np.ndarray, amount: float, fill: tuple) -> np.ndarray:
    """Moves each column up by `amount` of its distance from the left."""
    return warp(image, (1, 0, 0, amount, 1, 0), fill)


def translate_x(image: np.ndarray, share: float, fill: tuple) -> np.ndarray:
    """Moves the picture to the left by `share` of its width."""
    return warp(image, (1, 0, share * image.shape[1], 0, 1, 0), fill)


def translate_y(image: np.ndarray, share: float, fill: tuple) -> np.ndarray:
    """Moves the picture up by `share` of its height."""
    return warp(image, (1, 0, 0, 0, 1, share * image.shape[0]), fill)


def rotate(image: np.ndarray, degrees: float, fill: tuple) -> np.ndarray:
    """Turns the picture counter-clockwise about its centre."""
    height, width = image.shape[:2]
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    x, y = width / 2, height / 2
    return warp(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y), fill)
