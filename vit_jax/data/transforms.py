"""Transforms of one example, from its decoded picture to the model's float32, and of a batch.

Each is a frozen dataclass called as `transform(example, rng)`. It returns a new example whose
`image` is changed; `rng` is the only source of chance. All take uint8 [H, W, 3] and return it, but
`Standardize`, which makes it float32, and `RandomErasing`, which comes after that.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np

from vit_jax.contracts import Batch, Example
from vit_jax.data import operations
from vit_jax.data.decode import MAX_PIXELS, REDUCED, decode, jpeg_size

Size = int | tuple[int, int]


def _pair(size: Size) -> tuple[int, int]:
    """A square's side or (H, W) -> (H, W); ValueError if it is neither."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"size={size!r} must be pixels: one number, or (height, width)")
    return pair


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must lie between 0 and 1")


def _check_range(name: str, value: tuple[float, float]) -> None:
    if len(value) != 2 or not 0 < value[0] <= value[1]:
        raise ValueError(f"{name}={value!r} must be (lowest, highest), both over 0")


@dataclass(frozen=True)
class Resize:
    """Resizes to (H, W), or, for one number, the short side to it, keeping the aspect ratio."""

    size: Size
    interpolation: str = "bilinear"

    def __post_init__(self):
        _pair(self.size)
        operations.interpolation(self.interpolation)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """`image` uint8 [H, W, 3] -> uint8 [*size, 3], or its short side is `size`."""
        size = self.size
        if isinstance(size, int):
            height, width = example["image"].shape[:2]
            short = min(height, width)
            size = (max(height * size // short, 1), max(width * size // short, 1))
        image = operations.resize(example["image"], size, self.interpolation)
        return example | {"image": image}


@dataclass(frozen=True)
class ResizeCenterCrop:
    """Resizes so that the middle `crop` of the short side is `size`, and cuts that out.

    With one number, what torchvision's Resize(floor(size / crop)) and CenterCrop(size) do.
    """

    size: Size
    crop: float = 0.875
    interpolation: str = "bilinear"

    def __post_init__(self):
        _pair(self.size)
        operations.interpolation(self.interpolation)
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop={self.crop!r} must be over 0, and at most 1")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """`image` uint8 [H, W, 3] -> uint8 [*size, 3]."""
        height, width = example["image"].shape[:2]
        H, W = _pair(self.size)
        full_H, full_W = math.floor(H / self.crop), math.floor(W / self.crop)
        if full_H * width >= full_W * height:  # the picture is wider than the crop
            resized = (full_H, width * full_H // height)
        else:
            resized = (height * full_W // width, full_W)
        image = operations.resize(example["image"], resized, self.interpolation)
        top, left = round((resized[0] - H) / 2), round((resized[1] - W) / 2)
        return example | {"image": image[top : top + H, left : left + W]}


@dataclass(frozen=True)
class CenterCrop:
    """Cuts out the middle; a picture that is smaller gets a black rim first.

    Where the rim cannot be the same on both sides, the place is rounded as torchvision does.
    """

    size: Size

    def __post_init__(self):
        _pair(self.size)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """`image` uint8 [H, W, 3] -> uint8 [*size, 3]."""
        image, (H, W) = example["image"], _pair(self.size)
        rows, columns = (max(n - m, 0) for n, m in zip((H, W), image.shape[:2], strict=True))
        if rows or columns:
            border = (rows // 2, rows - rows // 2, columns // 2, columns - columns // 2)
            image = cv2.copyMakeBorder(image, *border, cv2.BORDER_CONSTANT, value=(0, 0, 0))
        top, left = round((image.shape[0] - H) / 2), round((image.shape[1] - W) / 2)
        return example | {"image": image[top : top + H, left : left + W]}


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cuts out a random part and resizes it: Szegedy et al. 2015 (arXiv:1409.4842), section 6.

    Attributes:
      size: of the result.
      scale: the part's area, as a share of the picture's.
      ratio: the part's width over its height, uniform in its logarithm.
      interpolation: as of `Resize`.
      reducing_gap: a large JPEG is decoded to fewer pixels, as long as the part keeps so many times
        `size`, as of Pillow's `Image.resize`. None decodes every pixel and resizes by Pillow,
        to the last bit as torchvision does; otherwise `operations.resample` does it.
    """

    size: Size
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    reducing_gap: float | None = 2.0

    TRIES: ClassVar[int] = 10

    def __post_init__(self):
        _pair(self.size)
        _check_range("scale", self.scale)
        _check_range("ratio", self.ratio)
        operations.interpolation(self.interpolation)
        if self.reducing_gap is not None and self.reducing_gap < 1:
            raise ValueError(f"reducing_gap={self.reducing_gap!r} must be at least 1, or None")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """`image` uint8 [H, W, 3] -> uint8 [*size, 3]."""
        image = example["image"]
        box = self._box(*image.shape[:2], rng)
        return example | {"image": self._cut(image, box)}

    def from_file(
        self, data: bytes, rng: np.random.Generator, max_pixels: int = MAX_PIXELS
    ) -> np.ndarray:
        """What a call makes of a file's picture, uint8 [*size, 3], decoding what that needs.

        Raises:
          DataError: as of `decode`.
        """
        size = jpeg_size(data)
        if size is None:
            return self({"image": decode(data, max_pixels=max_pixels)}, rng)["image"]
        box = self._box(*size, rng)
        reduced = self._reduced(*box[2:])
        bottom = box[0] + box[2]
        image = decode(data, max_pixels=max_pixels, reduced=reduced, rows=bottom)
        height, width = (-(-side // reduced) for side in size)
        if image.shape[1] == width and -(-bottom // reduced) <= image.shape[0] <= height:
            return self._cut(image, box, reduced)
        return self({"image": image}, rng)["image"]  # not as its header said, so all of it is here

    def _reduced(self, height: int, width: int) -> int:
        """How much smaller a part of so many pixels can be decoded."""
        if self.reducing_gap is None:
            return 1
        H, W = _pair(self.size)
        room = min(height / H, width / W) / self.reducing_gap
        return max(reduced for reduced in REDUCED if reduced <= max(room, 1))

    def _cut(
        self, image: np.ndarray, box: tuple[int, int, int, int], reduced: int = 1
    ) -> np.ndarray:
        """The part of a picture at `box`, which is in pixels of the unreduced picture."""
        top, left, height, width = box
        # Of a reduced picture the part may begin and end between two pixels.
        rows = slice(top // reduced, -(-(top + height) // reduced))
        columns = slice(left // reduced, -(-(left + width) // reduced))
        x, y = left / reduced - columns.start, top / reduced - rows.start
        place = (x, y, x + width / reduced, y + height / reduced)
        part = image[rows, columns]
        resize = operations.resize if self.reducing_gap is None else operations.resample
        return resize(part, _pair(self.size), self.interpolation, place)

    def _box(self, H: int, W: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(top, left, height, width)."""
        for _ in range(self.TRIES):
            area = H * W * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < height <= H and 0 < width <= W:
                top, left = rng.integers(H - height + 1), rng.integers(W - width + 1)
                return int(top), int(left), height, width
        # No part of that shape fits: the largest one in the middle.
        ratio = min(max(W / H, self.ratio[0]), self.ratio[1])
        height, width = min(H, max(round(W / ratio), 1)), min(W, max(round(H * ratio), 1))
        return (H - height) // 2, (W - width) // 2, height, width


@dataclass(frozen=True)
class RandomCrop:
    """Pads with black, `padding` pixels on each side, and cuts out a random part of `size`.

    A picture that is smaller even then is padded until it fits.
    """

    size: Size
    padding: int = 0

    def __post_init__(self):
        _pair(self.size)
        if not isinstance(self.padding, int) or self.padding < 0:
            raise ValueError(f"padding={self.padding!r} must be a number of pixels")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """`image` uint8 [H, W, 3] -> uint8 [*size, 3]."""
        image, (H, W) = example["image"], _pair(self.size)
        rows = max(self.padding, math.ceil((H - image.shape[0]) / 2))
        columns = max(self.padding, math.ceil((W - image.shape[1]) / 2))
        if rows or columns:
            border = (rows, rows, columns, columns)
            image = cv2.copyMakeBorder(image, *border, cv2.BORDER_CONSTANT, value=(0, 0, 0))
        top = rng.integers(image.shape[0] - H + 1)
        left = rng.integers(image.shape[1] - W + 1)
        return example | {"image": image[top : top + H, left : left + W]}


@dataclass(frozen=True)
class RandomFlip:
    """Swaps left and right with probability `p`."""

    p: float = 0.5

    def __post_init__(self):
        _check_share("p", self.p)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """`image` uint8 [H, W, 3] -> the same shape."""
        if rng.random() >= self.p:
            return example
        return example | {"image": cv2.flip(example["image"], 1)}


@dataclass(frozen=True)
class ColorJitter:
    """Changes brightness, contrast, saturation and hue, in random order.

    As torchvision: a strength s draws the factor from [max(0, 1 - s), 1 + s], and the hue's from
    [-s, s] of the circle, s at most 0.5.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self):
        for name in ("brightness", "contrast", "saturation", "hue"):
            value, most = getattr(self, name), 0.5 if name == "hue" else math.inf
            if not 0 <= value <= most:
                raise ValueError(f"{name}={value!r} must lie between 0 and {most}")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """`image` uint8 [H, W, 3] -> the same shape."""
        image = example["image"]
        for name in rng.permutation(["brightness", "contrast", "saturation", "hue"]):
            strength = getattr(self, name)
            if strength:
                lowest = -strength if name == "hue" else max(0, 1 - strength)
                highest = strength if name == "hue" else 1 + strength
                image = getattr(operations, name)(image, rng.uniform(lowest, highest))
        return example | {"image": image}


@dataclass(frozen=True)
class RandAugment:
    """Random operations of one strength: Cubuk et al. 2020 (arXiv:1909.13719), section 3.

    The 15 operations and their strengths are those of timm's `rand-m9-mstd0.5-inc1`, with which
    DeiT, Swin and CvT were trained: all grow with the magnitude. Where timm picks bilinear or
    bicubic at random to turn and shear, this is bilinear.

    Attributes:
      layers: operations for one picture, drawn with replacement.
      magnitude: 0 to 10.
      std: of the normal noise on the magnitude, drawn for each operation.
      probability: that an operation drawn is carried out; 0.5 in timm, 1 in the paper.
      fill: the colour of what turning and shearing lay bare.
    """

    layers: int = 2
    magnitude: float = 9.0
    std: float = 0.5
    probability: float = 0.5
    fill: tuple[int, int, int] = (128, 128, 128)

    OPERATIONS: ClassVar[tuple[str, ...]] = (
        "autocontrast",
        "equalize",
        "invert",
        "rotate",
        "posterize",
        "solarize",
        "solarize_add",
        "saturation",
        "contrast",
        "brightness",
        "sharpness",
        "shear_x",
        "shear_y",
        "translate_x",
        "translate_y",
    )

    def __post_init__(self):
        _check_share("probability", self.probability)
        if not 0 <= self.magnitude <= 10:
            raise ValueError(f"magnitude={self.magnitude!r} must lie between 0 and 10")
        if self.layers < 0 or self.std < 0:
            raise ValueError(f"layers={self.layers!r} and std={self.std!r} must not be negative")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """`image` uint8 [H, W, 3] -> the same shape."""
        image = example["image"]
        for name in rng.choice(self.OPERATIONS, self.layers):
            if rng.random() < self.probability:
                strength = np.clip(self.magnitude + self.std * rng.standard_normal(), 0, 10) / 10
                image = self.apply(str(name), image, strength, 1 if rng.random() < 0.5 else -1)
        return example | {"image": image}

    def apply(self, name: str, image: np.ndarray, strength: float, sign: int) -> np.ndarray:
        """One operation at a strength of 0 to 1; `sign` is which way, where there are two."""
        operation = getattr(operations, name)
        match name:
            case "autocontrast" | "equalize" | "invert":
                return operation(image)
            case "posterize":
                return operation(image, 4 - int(strength * 4))
            case "solarize":
                return operation(image, 256 - int(strength * 256))
            case "solarize_add":
                return operation(image, int(strength * 110))
            case "saturation" | "contrast" | "brightness" | "sharpness":
                return operation(image, max(0.1, 1 + sign * 0.9 * strength))
            case "rotate":
                return operation(image, sign * 30 * strength, self.fill)
            case "shear_x" | "shear_y":
                return operation(image, sign * 0.3 * strength, self.fill)
            case "translate_x" | "translate_y":
                return operation(image, sign * 0.45 * strength, self.fill)
        raise ValueError(f"RandAugment has no operation {name!r}")


@dataclass(frozen=True)
class Standardize:
    """uint8 -> float32: (image / 255 - mean) / std, each channel for itself."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"mean={self.mean!r} and std={self.std!r} must be three numbers each, for red, "
                "green and blue between 0 and 1, std over 0"
            )

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """`image` uint8 [H, W, 3] -> float32 of the same shape."""
        return example | {"image": cv2.LUT(example["image"], _standard(self.mean, self.std))}


@functools.cache
def _standard(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """What each of the 256 levels becomes: float32 [1, 256, 3]."""
    levels = np.arange(256)[:, None] / 255  # [256, 1]
    return ((levels - np.array(mean)[None]) / np.array(std)[None]).astype(np.float32)[None]


@dataclass(frozen=True)
class RandomErasing:
    """Covers a random rectangle: Zhong et al. 2020 (arXiv:1708.04896), algorithm 1.

    Stands after `Standardize`, as in timm: there, noise of deviation 1 has the picture's own
    statistics, and 0 is its mean colour.

    Attributes:
      probability: that a picture is covered at all.
      scale: the rectangle's area, as a share of the picture's.
      ratio: its height over its width, uniform in its logarithm.
      mode: "pixel" fills it with normal noise, "const" with 0.
    """

    probability: float = 0.25
    scale: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 10 / 3)
    mode: str = "pixel"

    TRIES: ClassVar[int] = 10

    def __post_init__(self):
        _check_share("probability", self.probability)
        _check_range("scale", self.scale)
        _check_range("ratio", self.ratio)
        if self.mode not in ("pixel", "const"):
            raise ValueError(f"mode={self.mode!r} must be 'pixel' or 'const'")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """`image` float32 [H, W, 3] -> the same shape; ValueError if it is uint8 still."""
        if example["image"].dtype != np.float32:
            raise ValueError("RandomErasing must come after Standardize in the list of transforms")
        if rng.random() >= self.probability:
            return example
        H, W = example["image"].shape[:2]
        for _ in range(self.TRIES):
            area = H * W * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < height < H and 0 < width < W:
                top, left = rng.integers(H - height + 1), rng.integers(W - width + 1)
                image = example["image"].copy()
                hole = image[top : top + height, left : left + width]  # [height, width, 3]
                noise = self.mode == "pixel"
                hole[...] = rng.standard_normal(hole.shape, np.float32) if noise else 0
                return example | {"image": image}
        return example


@dataclass(frozen=True)
class MixUpCutMix:
    """Mixes neighbours of a batch: one picture with another, or with a patch of another.

    Mixup: Zhang et al. 2018 (arXiv:1710.09412), eq. 1; CutMix: Yun et al. 2019 (arXiv:1905.04899),
    eq. 1 and 2. Where timm mixes row i with row B - 1 - i, and draws once for the whole batch, this
    mixes rows 2i and 2i + 1 with each other and draws for each pair. So the pixels do not depend on
    how a batch lies on the hosts.

    Called on a batch (standardised `image` [B, H, W, 3], `label` [B], `valid` [B]; B even), it
    returns one with mixed `image` and with `label_probs` [B, K] float32. A pair with a row that is
    not valid stays as it is.

    Attributes:
      num_classes: K.
      mixup: alpha of mixup's Beta(alpha, alpha); 0 switches it off.
      cutmix: alpha of CutMix's; 0 switches it off.
      switch: probability of CutMix where both are on.
      probability: that a pair is mixed.
    """

    num_classes: int
    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    probability: float = 1.0

    def __post_init__(self):
        _check_share("switch", self.switch)
        _check_share("probability", self.probability)
        if min(self.mixup, self.cutmix) < 0 or max(self.mixup, self.cutmix) == 0:
            raise ValueError(
                f"mixup={self.mixup!r} and cutmix={self.cutmix!r} must not be negative, nor both 0"
            )
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes!r} must be at least 1")

    def __call__(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """A batch of an even number of rows -> the mixed one, with `label_probs` [B, K]."""
        image, valid = batch["image"].copy(), batch["valid"]
        probs = np.zeros((len(image), self.num_classes), np.float32)
        probs[np.arange(len(image)), batch["label"]] = 1
        for first in range(0, len(image), 2):
            rows = slice(first, first + 2)
            if valid[rows].all() and rng.random() < self.probability:
                share = self._mix(image[rows], rng)
                probs[rows] = share * probs[rows] + (1 - share) * probs[rows][::-1]
        return batch | {"image": image, "label_probs": probs}

    def _mix(self, pair: np.ndarray, rng: np.random.Generator) -> float:
        """Mixes two pictures in place; returns the share of its own that each keeps."""
        both = self.mixup > 0 and self.cutmix > 0
        if self.mixup > 0 and not (both and rng.random() < self.switch):
            share = rng.beta(self.mixup, self.mixup)
            other = pair[::-1] * np.float32(1 - share)
            pair *= np.float32(share)
            pair += other
            return share
        H, W = pair.shape[1:3]
        side = math.sqrt(1 - rng.beta(self.cutmix, self.cutmix))  # of the patch, as a share
        y, x = rng.integers(H), rng.integers(W)
        top, bottom = max(y - int(H * side) // 2, 0), min(y + int(H * side) // 2, H)
        left, right = max(x - int(W * side) // 2, 0), min(x + int(W * side) // 2, W)
        patch = pair[:, top:bottom, left:right]
        patch[...] = patch[::-1].copy()
        return 1 - (bottom - top) * (right - left) / (H * W)  # after the rim cut the patch
