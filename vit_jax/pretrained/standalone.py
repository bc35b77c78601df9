"""What is in pictures: python run.py PICTURE... Needs jax, numpy, pillow and safetensors.

It lies beside the program that `vit_jax.export` wrote, and does without `vit_jax`.
"""

import json
import math
import sys
from pathlib import Path

import jax.export
import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import load_file

HERE = Path(__file__).parent
FILTERS = {"area": "BOX"}  # the others have Pillow's own names


def prepare(path: str) -> np.ndarray:
    """A file -> float32 [H, W, 3], as the model was trained."""
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    for step in json.loads((HERE / "preprocessing.json").read_text()):
        name, size = step["target"].split(".")[-1], step.get("size")
        method = step.get("interpolation", "bilinear")
        method = Image.Resampling[FILTERS.get(method, method.upper())]
        width, height = picture.size if isinstance(picture, Image.Image) else (0, 0)
        if name == "Standardize":
            pixels = np.asarray(picture) / 255
            return ((pixels - np.array(step["mean"])) / np.array(step["std"])).astype(np.float32)
        if name == "Resize" and isinstance(size, int):
            short = min(width, height)
            picture = picture.resize((width * size // short, height * size // short), method)
            continue
        H, W = (size, size) if isinstance(size, int) else size
        if name == "Resize":
            picture = picture.resize((W, H), method)
        elif name in ("CenterCrop", "ResizeCenterCrop"):
            if name == "ResizeCenterCrop":
                tall, wide = math.floor(H / step["crop"]), math.floor(W / step["crop"])
                if tall * width >= wide * height:
                    new = (width * tall // height, tall)
                else:
                    new = (wide, height * wide // width)
                picture = picture.resize(new, method)
            rows, columns = max(H - picture.height, 0), max(W - picture.width, 0)
            edges = (columns // 2, rows // 2, columns - columns // 2, rows - rows // 2)
            picture = ImageOps.expand(picture, edges)
            top, left = round((picture.height - H) / 2), round((picture.width - W) / 2)
            picture = picture.crop((left, top, left + W, top + H))
        else:
            raise SystemExit(f"no such step: {step}")
    raise SystemExit("the last step must be Standardize")


def main() -> None:
    """Prints the likeliest classes of each picture."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    program = jax.export.deserialize((HERE / "model.stablehlo").read_bytes())
    weights = load_file(HERE / "model.safetensors")
    images = np.stack([prepare(path) for path in sys.argv[1:]])  # any number at once
    logits = np.asarray(program.call(weights, images), np.float64)
    labels = json.loads((HERE / "labels.json").read_text())
    for path, row in zip(sys.argv[1:], logits):
        odds = np.exp(row - row.max())
        print(path)
        for i in np.argsort(-row)[:5]:
            print(f"  {odds[i] / odds.sum():7.2%}  {labels[i] if labels else f'class {i}'}")


if __name__ == "__main__":
    main()
