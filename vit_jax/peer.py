"""The other side of a benchmark: the same work in PyTorch, by transformers or timm.

Run as a file, by a Python that has them (and need not have JAX), it takes orders as `worker.py`
beside it says. Weights are random: only time and memory are looked at.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

CLASSES = 1000
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.05
PRODUCT, LARGE, PRODUCTS = 2048, 8192, 8  # as in workload.py
# timm's names of our sizes; transformers' models are made from their published form.
TIMM = {
    **{
        f"vit_{ours}{patch}": f"vit_{theirs}_patch{patch}_224"
        for ours, theirs in {"ti": "tiny", "s": "small", "b": "base", "l": "large"}.items()
        for patch in (16, 32)
    },
    "vit_b8": "vit_base_patch8_224",
    "vit_h14": "vit_huge_patch14_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_l": "swin_large_patch4_window7_224",
    **{f"resnet_{depth}": f"resnet{depth}" for depth in (18, 26, 34, 50, 101, 152)},
}
PICTURES = ("*.jpg", "*.jpeg", "*.png", "*.JPEG")


class WrongError(Exception):
    """What the peer has not, in a sentence."""


class Theirs:
    """A competitor: see `worker.py`."""

    def __init__(self, library: str, compiled: bool) -> None:
        import torch

        self._torch, self._library, self._compile = torch, library, compiled
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._run: Callable[[int], None] = lambda steps: None

    def prepare(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Builds and warms up the work of an order.

        Args:
          order: `work`, `batch_size`, `dtype`, `image_size`; `model`, our name of it, or
            `published`, its config.json in transformers; for "input" also `transforms`, our specs,
            and `pictures`, a folder.

        Returns:
          {"compile_seconds" of the first steps, less two later ones, "memory" in bytes (of the
          process, on a CPU), "parameters", "library"}.
        """
        torch = self._torch
        self._run = lambda steps: None
        if order["work"] == "input":
            self._run = _pipeline(order)
            return {"library": self._version()}
        torch._dynamo.reset()
        torch.manual_seed(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model = self._model(order)
        parameters = sum(p.numel() for p in model.parameters())
        began = time.perf_counter()
        make = self._training if order["work"] == "training" else self._inference
        self._run = make(model, order)
        self._run(2)
        first = time.perf_counter() - began
        began = time.perf_counter()
        self._run(2)
        later = time.perf_counter() - began
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()  # until its turn others may want it
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        said = {"memory": memory, "parameters": parameters, "library": self._version()}
        return said | {"compile_seconds": max(first - later, 0.0)}

    def run(self, steps: int) -> None:
        """That many steps."""
        self._run(steps)

    def rate(self, dtype: str) -> float:
        """FLOP/s of products of two large square matrices of `dtype`."""
        torch = self._torch
        n = LARGE if self._device.type == "cuda" else PRODUCT
        a = torch.randn(n, n, dtype=getattr(torch, dtype), device=self._device) / math.sqrt(n)
        times = []
        for _ in range(6):
            began, x = time.perf_counter(), a
            for _ in range(PRODUCTS):
                x = x @ a
            self._wait()
            times.append(time.perf_counter() - began)
        return 2 * n**3 * PRODUCTS / min(times)

    def wrong(self, error: Exception) -> str:
        """The kind of an error."""
        memory = isinstance(error, (MemoryError, self._torch.OutOfMemoryError))
        # What a CPU's allocator says, for want of a type of its own.
        if memory or "can't allocate memory" in str(error):
            return "memory"
        return "wrong" if isinstance(error, (WrongError, ImportError)) else "bug"

    def _wait(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()

    def _version(self) -> str:
        other = __import__(self._library)
        return f"{self._library} {other.__version__}, torch {self._torch.__version__}"

    def _model(self, order: Mapping[str, Any]) -> Any:
        if self._library == "timm":
            import timm

            name = TIMM.get(order.get("model", ""))
            if name is None:
                raise WrongError(f"timm has no {order.get('model') or 'such model'}")
            sized = {} if name.startswith("resnet") else {"img_size": tuple(order["image_size"])}
            return timm.create_model(name, num_classes=CLASSES, **sized).to(self._device)
        from transformers import AutoConfig, AutoModelForImageClassification

        published = dict(order.get("published") or {})
        if "model_type" not in published:
            raise WrongError(published.get("refused", "transformers has no such model"))
        config = AutoConfig.for_model(**published)
        if hasattr(config, "image_size"):
            H, W = order["image_size"]
            config.image_size = H if H == W else (H, W)
        try:
            model = AutoModelForImageClassification.from_config(config)
        except ValueError as error:
            raise WrongError(
                f"{published['model_type']} is no classifier, and others are not compared"
            ) from error
        return model.to(self._device)

    def _inputs(self, order: Mapping[str, Any], dtype: Any) -> Any:
        shape = (order["batch_size"], 3, *order["image_size"])
        return self._torch.randn(shape, dtype=dtype, device=self._device)

    def _logits(self, outputs: Any) -> Any:
        return getattr(outputs, "logits", outputs)

    def _inference(self, model: Any, order: Mapping[str, Any]) -> Callable[[int], None]:
        dtype = getattr(self._torch, order["dtype"])
        model, image = model.to(dtype).eval(), self._inputs(order, dtype)
        called = self._torch.compile(model) if self._compile else model

        def run(steps: int) -> None:
            with self._torch.inference_mode():
                for _ in range(steps):
                    called(image)
            self._wait()

        return run

    def _training(self, model: Any, order: Mapping[str, Any]) -> Callable[[int], None]:
        """Parameters stay float32, as ours do; other dtypes are autocast's."""
        torch = self._torch
        dtype = getattr(torch, order["dtype"])
        model, image = model.train(), self._inputs(order, torch.float32)
        label = torch.randint(0, CLASSES, (order["batch_size"],), device=self._device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
        called = torch.compile(model) if self._compile else model
        cast = partial(
            torch.autocast, self._device.type, dtype=dtype, enabled=dtype != torch.float32
        )

        def run(steps: int) -> None:
            for _ in range(steps):
                with cast():
                    logits = self._logits(called(image))
                    loss = torch.nn.functional.cross_entropy(logits, label)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self._wait()

        return run


def _pipeline(order: Mapping[str, Any]) -> Callable[[int], None]:
    """Training transforms of timm for ours, in one process, on picture files in memory.

    Raises:
      WrongError: if a transform of ours has no like in timm, or there is no picture.
    """
    import io

    import torch
    from PIL import Image
    from timm.data import create_transform

    arguments: dict[str, Any] = {"is_training": True, "color_jitter": 0.0, "hflip": 0.0}
    for spec in order["transforms"]:
        match spec["target"].rpartition(".")[2]:
            case "RandomResizedCrop":
                size = spec["size"] if isinstance(spec["size"], int) else tuple(spec["size"])
                arguments |= {"input_size": size, "scale": spec.get("scale", (0.08, 1.0))}
                arguments["interpolation"] = spec.get("interpolation", "bilinear")
            case "RandomFlip":
                arguments["hflip"] = spec.get("p", 0.5)
            case "RandAugment":
                text = "rand-m{magnitude:.0f}-n{layers}-mstd{std}-p{probability}-inc1"
                default = {"layers": 2, "magnitude": 9, "std": 0.5, "probability": 0.5}
                arguments["auto_augment"] = text.format(**default | spec)
            case "Standardize":
                arguments |= {"mean": spec["mean"], "std": spec["std"]}
            case "RandomErasing":
                arguments |= {"re_prob": spec.get("probability", 0.25), "re_mode": "pixel"}
            case other:
                raise WrongError(f"timm's training transforms have no {other}")
    if "input_size" not in arguments:
        raise WrongError(
            "timm's training transforms begin with RandomResizedCrop, and these do not"
        )
    transform = create_transform(**arguments)
    folder = Path(order["pictures"])
    files = sorted({f for pattern in PICTURES for f in folder.glob(pattern)})
    if not files:
        raise WrongError(f"{folder}: there is no picture")
    contents, place = [f.read_bytes() for f in files], 0

    def run(steps: int) -> None:
        nonlocal place
        torch.set_num_threads(1)
        for _ in range(steps):
            batch = []
            for _ in range(order["batch_size"]):
                with Image.open(io.BytesIO(contents[place % len(contents)])) as image:
                    batch.append(transform(image.convert("RGB")))
                place += 1
            torch.stack(batch)

    return run


if __name__ == "__main__":
    from worker import serve

    # Of all that lies beside this file nothing else is to be found by its short name.
    sys.path.remove(str(Path(__file__).resolve().parent))
    serve(lambda: Theirs(sys.argv[1], sys.argv[2] == "compiled"))
