"""From pictures as people have them to what a checkpoint was trained on."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_jax.build import build
from vit_jax.data.decode import MAX_PIXELS, as_rgb
from vit_jax.data.geometry import Pad
from vit_jax.errors import CheckpointError, ConfigError, DataError

TRANSFORMS, GEOMETRY = "data.transforms.", "data.geometry."
PAD = GEOMETRY + "Pad"
GRID = 64  # pixels, to a multiple of which pictures of any size are padded
HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Pillow's codes of its filters, which configs of image processors hold.
RESAMPLING = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "area",
    5: "hamming",
}
CAPPED = ("Detr", "ConditionalDetr", "DeformableDetr", "Yolos")  # with a cap on the long one too
SHORT_SIDE = ("ConvNext", "Bit", "CLIP", "Cvt")  # processors whose one number is the short side


def step(name: str, **arguments: Any) -> dict[str, Any]:
    """The spec of a transform of `vit_jax.data.transforms`."""
    return {"target": TRANSFORMS + name, **arguments}


def short_side(size: int, longest: int | None, interpolation: str = "bilinear") -> dict[str, Any]:
    """The spec of a resize that keeps the aspect ratio, with a cap on the long side."""
    arguments = {"sizes": (size,), "longest": longest, "interpolation": interpolation}
    return {"target": GEOMETRY + "ResizeShortSide", **arguments}


def standardize(mean: Iterable[float], std: Iterable[float]) -> dict[str, Any]:
    """The spec of the last step."""
    return step("Standardize", mean=tuple(mean), std=tuple(std))


@dataclass(frozen=True)
class Preprocessing:
    """The transforms of a checkpoint, one after the other.

    Attributes:
      steps: specs of `vit_jax.data.transforms` and `vit_jax.data.geometry`; a `Pad` at the end
        acts on batches alone.
    """

    steps: tuple[dict[str, Any], ...]

    def transforms(self) -> tuple:
        """The steps for a picture, built: all but `Pad`."""
        return tuple(build(dict(spec)) for spec in self.steps if spec["target"] != PAD)

    @property
    def pad(self) -> Pad | None:
        """The step that makes a batch of pictures of different sizes, None if there is none."""
        return next((build(dict(s)) for s in self.steps if s["target"] == PAD), None)

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of what comes out, in pixels; None if it depends on the picture."""
        for spec in reversed(self.steps):
            size = spec.get("size")
            if spec["target"] == GEOMETRY + "ResizeShortSide":
                return None
            if size is None:
                continue
            if spec["target"] == TRANSFORMS + "Resize" and isinstance(size, int):
                return None
            return (size, size) if isinstance(size, int) else tuple(size)
        return None

    @property
    def typical(self) -> tuple[int, int]:
        """(H, W) that a batch of ordinary pictures has; theirs is 480x640 where that matters."""
        if self.size is not None and self.pad is None:
            return self.size
        try:
            return self.shape(self.one(np.zeros((480, 640, 3), np.uint8)).shape[:2])
        except DataError:  # larger than any that the model was trained on
            return max(self.pad.shapes, key=math.prod)

    def resized(self, size: tuple[int, int]) -> "Preprocessing":
        """The same for another size of the image: all sizes grow in proportion.

        Where the size depends on the picture, the short and the long side get the smaller and the
        larger of the two, at most.
        """
        old = self.size or size
        steps = []
        for spec in self.steps:
            if spec["target"] == GEOMETRY + "ResizeShortSide":
                longest = spec.get("longest") and max(
                    max(size), round(min(size) * spec["longest"] / max(spec["sizes"]))
                )
                spec = spec | {"sizes": (min(size),), "longest": longest}
            if spec["target"] == PAD:
                continue  # of the old size
            if "size" in spec and self.size is not None:
                pair, one = spec["size"], isinstance(spec["size"], int)
                pair = (pair, pair) if one else tuple(pair)
                # The last step must give `size` itself, those before it about as much more.
                new = tuple(round(p * n / o) for p, n, o in zip(pair, size, old, strict=True))
                short_side = one and spec["target"] == TRANSFORMS + "Resize"
                spec = spec | {"size": max(new) if short_side else new}
            steps.append(spec)
        return Preprocessing(tuple(steps))

    def one(self, picture: Any, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """A picture of any kind -> float32 [H, W, 3], unpadded; DataError if it is none."""
        example = {"image": as_rgb(picture, max_pixels=max_pixels)}
        random = np.random.default_rng(0)  # which no step of an evaluation needs
        for transform in self.transforms():
            example = transform(example, random)
        return np.asarray(example["image"], np.float32)

    def shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) that a prepared picture of that size is padded to, whatever else is in its batch.

        The smallest of `Pad` that holds it; else, where the size depends on the picture, the next
        multiples of `GRID`, so that few shapes occur; else its own.

        Raises:
          DataError: if no shape of `Pad` holds it.
        """
        if (pad := self.pad) is not None:
            try:
                return pad.shape([size])
            except ConfigError:
                most = " and ".join(f"{h} x {w}" for h, w in pad.shapes)
                raise DataError(
                    f"it has {size[0]} x {size[1]} pixels (height x width) as the model gets it, "
                    f"which was trained on at most {most}"
                ) from None
        if self.size is None:
            return tuple(-(-n // GRID) * GRID for n in size)
        return size

    def batch(self, pictures: Any) -> dict[str, np.ndarray]:
        """Pictures of any kind and size -> {"image" [B, H, W, 3], "image_mask" [B, H, W]}.

        Padded with zeros at the bottom and right to the largest of them, as published.

        Args:
          pictures: as of `__call__`.

        Raises:
          DataError: if one is no picture.
        """
        images = self._each(pictures)
        H, W = (max(image.shape[axis] for image in images) for axis in (0, 1))
        return padded(images, (H, W))

    def __call__(self, pictures: Any) -> np.ndarray:
        """Pictures of any kind and size -> float32 [B, H, W, 3].

        Args:
          pictures: one, or a list: paths, bytes of files, Pillow images, arrays [H, W, 3]; or an
            array [B, H, W, 3].

        Raises:
          DataError: if one is no picture, or if they come out in several sizes: `batch` takes them.
        """
        images = self._each(pictures)
        if sizes := {image.shape[:2] for image in images} - {images[0].shape[:2]}:
            raise DataError(
                f"the pictures come out in several sizes, {images[0].shape[:2]} and {sizes.pop()}: "
                "this checkpoint keeps their shapes, so give them one by one, or pad them by "
                "`preprocess.batch` if the model reads a mask"
            )
        return np.stack(images)

    def _each(self, pictures: Any) -> list[np.ndarray]:
        alone = isinstance(pictures, (str, bytes, bytearray)) or not isinstance(pictures, Iterable)
        if alone or hasattr(pictures, "__fspath__") or getattr(pictures, "ndim", 4) < 4:
            pictures = [pictures]
        images = [self.one(picture) for picture in pictures]
        if not images:
            raise DataError("no picture was given")
        return images

    def __str__(self) -> str:
        """For a person: "resize to 256, bicubic; crop the middle 224x224; ..."."""
        return "; ".join(_sentence(spec) for spec in self.steps)


def padded(images: Sequence[np.ndarray], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Images [h, w, 3] -> {"image" [B, H, W, 3], "image_mask" [B, H, W]}, zeros around them."""
    image = np.zeros((len(images), *shape, 3), np.float32)
    mask = np.zeros((len(images), *shape), bool)
    for row, one in enumerate(images):
        h, w = one.shape[:2]
        image[row, :h, :w], mask[row, :h, :w] = one, True
    return {"image": image, "image_mask": mask}


def _name(spec: Mapping[str, Any]) -> str:
    return spec["target"].removeprefix(TRANSFORMS).removeprefix(GEOMETRY)


def _sentence(spec: Mapping[str, Any]) -> str:
    name, size = _name(spec), spec.get("size")
    shown = f"{size[0]}x{size[1]}" if isinstance(size, (tuple, list)) else f"{size}"
    filter_ = spec.get("interpolation", "bilinear")
    if name == "Resize":
        what = f"the short side to {shown}" if isinstance(size, int) else f"to {shown}"
        return f"resize {what}, {filter_}"
    if name == "ResizeShortSide":
        sides = " or ".join(map(str, spec["sizes"]))
        cap = f", the long one to at most {spec['longest']}" if spec.get("longest") else ""
        return f"resize the short side to {sides}{cap}, {filter_}"
    if name == "Pad":
        return "pad to " + " or ".join(f"{h}x{w}" for h, w in spec["shapes"])
    if name == "CenterCrop":
        return f"cut out the middle {shown}"
    if name == "ResizeCenterCrop":
        share = spec.get("crop", 0.875)
        return f"resize and cut out the middle {shown}, {share:g} of the short side, {filter_}"
    if name == "Standardize":
        mean, std = (", ".join(f"{x:.4g}" for x in spec[key]) for key in ("mean", "std"))
        return f"mean ({mean}), std ({std})"
    rest = ", ".join(f"{k}={v}" for k, v in spec.items() if k != "target")
    return f"{name}({rest})"


def from_hf(config: Mapping[str, Any]) -> Preprocessing:
    """A `preprocessor_config.json`, of any of transformers' processors of plain images.

    Raises:
      CheckpointError: on a setting that would change the numbers and is not known here.
    """
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or ""
    steps = []
    filter_ = _filter(config.get("resample", 2))
    if config.get("do_resize", True):
        size, crop = config.get("size", 224), config.get("crop_pct")
        short = size if isinstance(size, int) else size.get("shortest_edge")
        longest = config.get("max_size")
        if not isinstance(size, int):
            longest = size.get("longest_edge", longest)
        if kind.startswith(CAPPED) and short is not None:
            steps.append(short_side(short, longest, filter_))
        elif isinstance(size, int) and not kind.startswith(SHORT_SIDE):
            steps.append(step("Resize", size=(size, size), interpolation=filter_))
        elif short is None:
            if not {"height", "width"} <= set(size):
                raise CheckpointError(f"the preprocessing's size={size} is not known here")
            pair = (size["height"], size["width"])
            steps.append(step("Resize", size=pair, interpolation=filter_))
        elif crop is not None or kind.startswith("ConvNext"):
            # ConvNeXt's: whole pictures from 384 pixels on, below that the middle.
            crop = 224 / 256 if crop is None else crop
            if short >= 384:
                steps.append(step("Resize", size=(short, short), interpolation=filter_))
            else:
                steps.append(step("Resize", size=int(short / crop), interpolation=filter_))
                steps.append(step("CenterCrop", size=(short, short)))
        else:
            steps.append(step("Resize", size=short, interpolation=filter_))
    if config.get("do_center_crop", False):
        crop = config.get("crop_size", 224)
        pair = (crop, crop) if isinstance(crop, int) else (crop.get("height"), crop.get("width"))
        steps.append(step("CenterCrop", size=pair))
    factor = config.get("rescale_factor", 1 / 255)
    if not config.get("do_rescale", True) or abs(factor * 255 - 1) > 1e-6:
        raise CheckpointError(
            f"the preprocessing's rescale_factor={factor} (do_rescale="
            f"{config.get('do_rescale', True)}) is not known here: 1/255 was wanted"
        )
    mean, std = config.get("image_mean", HALF), config.get("image_std", HALF)
    if not config.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    steps.append(standardize(mean, std))
    return Preprocessing(tuple(steps))


def _filter(code: Any) -> str:
    if code not in RESAMPLING:
        raise CheckpointError(f"the preprocessing's resample={code} is not known here")
    return RESAMPLING[code]


def to_hf(preprocessing: Preprocessing, processor: str = "") -> dict[str, Any]:
    """A `preprocessor_config.json` that transformers reads to the same steps.

    Args:
      preprocessing: the steps; `Pad` is what transformers' DETR does by itself.
      processor: the class that is to read it; "" is one that can.

    Raises:
      CheckpointError: if transformers has no such step.
    """
    config: dict[str, Any] = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": False,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }
    codes = {name: code for code, name in RESAMPLING.items()}
    for spec in preprocessing.steps:
        name, size = _name(spec), spec.get("size")
        if name == "ResizeShortSide":
            config["do_resize"] = True
            config["resample"] = codes[spec.get("interpolation", "bilinear")]
            config["size"] = {"shortest_edge": max(spec["sizes"])}
            if spec.get("longest"):
                config["size"]["longest_edge"] = spec["longest"]
            config["image_processor_type"] = "DetrImageProcessor"
        elif name == "Pad":
            continue
        elif name == "Resize":
            config["do_resize"] = True
            config["resample"] = codes[spec.get("interpolation", "bilinear")]
            if isinstance(size, int):
                config["size"] = {"shortest_edge": size}
            else:
                config["size"] = {"height": size[0], "width": size[1]}
                config["image_processor_type"] = "ViTImageProcessor"
        elif name == "ResizeCenterCrop":
            H, W = (size, size) if isinstance(size, int) else size
            if H != W:
                raise CheckpointError(f"transformers cannot crop {H}x{W} by a share of a side")
            config["do_resize"] = config["do_center_crop"] = True
            config["resample"] = codes[spec.get("interpolation", "bilinear")]
            config["size"] = {"shortest_edge": int(H / spec.get("crop", 0.875))}
            config["crop_size"] = {"height": H, "width": W}
        elif name == "CenterCrop":
            H, W = (size, size) if isinstance(size, int) else size
            config["do_center_crop"] = True
            config["crop_size"] = {"height": H, "width": W}
        elif name == "Standardize":
            config["image_mean"], config["image_std"] = list(spec["mean"]), list(spec["std"])
        else:
            raise CheckpointError(f"transformers' image processors have no step {name}")
    if config["do_center_crop"] and config["image_processor_type"] == "ViTImageProcessor":
        config["image_processor_type"] = "DeiTImageProcessor"
    if processor:
        config["image_processor_type"] = processor
    if config["image_processor_type"] == "DetrImageProcessor":
        config["do_pad"] = True
    return config


def from_timm(config: Mapping[str, Any]) -> Preprocessing:
    """The `pretrained_cfg` of timm: input_size, crop_pct, crop_mode, interpolation, mean, std.

    Raises:
      CheckpointError: on a setting that would change the numbers and is not known here.
    """
    size = tuple(config.get("input_size", (3, 224, 224))[1:])
    filter_ = config.get("interpolation", "bicubic")
    if filter_ not in RESAMPLING.values():
        raise CheckpointError(f"the preprocessing's interpolation={filter_!r} is not known here")
    mode, crop = config.get("crop_mode", "center"), config.get("crop_pct", 0.875)
    if mode == "squash":
        full = tuple(int(side / crop) for side in size)
        steps = [step("Resize", size=full, interpolation=filter_), step("CenterCrop", size=size)]
    elif mode == "center":
        steps = [step("ResizeCenterCrop", size=size, crop=crop, interpolation=filter_)]
    else:
        raise CheckpointError(f"the preprocessing's crop_mode={mode!r} is not known here")
    steps.append(standardize(config.get("mean", IMAGENET[0]), config.get("std", IMAGENET[1])))
    return Preprocessing(tuple(steps))
