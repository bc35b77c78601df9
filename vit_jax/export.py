"""A checkpoint for other programs: python -m vit_jax.export --checkpoint=REF --to=FORM ..."""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import command, programs
from vit_jax.errors import CheckpointError, ConfigError

USAGE = """Writes a checkpoint for other programs, opens what was written, and compares its logits
with those of the live model before calling it done.

  python -m vit_jax.export --checkpoint=runs/vit-finetune --to=hf --output=my_model
      config.json, model.safetensors, preprocessor_config.json: transformers opens the folder

  python -m vit_jax.export --checkpoint=runs/vit-finetune --to=stablehlo --output=my_program
      a program for CPU, CUDA and TPU, any batch size, that needs JAX and not this package, and a
      script that shows how: python my_program/run.py cat.jpg

  python -m vit_jax.export --checkpoint=runs/vit-finetune --to=onnx --output=my_onnx
      for ONNX Runtime, any batch size; needs the extra: pip install -e ".[onnx]"
"""
LIMIT = 1e-4  # of the logits' scale, in float32
BATCHES = (1, 3)  # that are compared
PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, WEIGHTS, ONNX = "model.stablehlo", "model.safetensors", "model.onnx"
STEPS, LABELS, SCRIPT = "preprocessing.json", "labels.json", "run.py"


def to_hf(loaded: Any, folder: Path) -> float:
    """Writes a folder that transformers opens; returns the difference of what opens again.

    Raises:
      ConfigError: if transformers has no such model.
    """
    from vit_jax.pretrained import hf
    from vit_jax.pretrained.load import load

    hf.save(loaded, folder)
    again = load(folder, dtype=_dtype(loaded))
    return _compare(loaded, lambda **batch: again(**batch))


def to_stablehlo(loaded: Any, folder: Path) -> float:
    """Writes a program `(weights, image) -> logits` and its weights; returns the difference.

    The weights, by path, lie in a file of their own: inside, they would meet the program format's
    limit of two gigabytes.
    """
    import jax
    from safetensors.numpy import load_file, save_file

    from vit_jax import step
    from vit_jax.pretrained import names, standalone

    _headed(loaded)
    weights = {path: np.asarray(x) for path, x in names.flat(loaded.variables).items()}

    def forward(weights: dict[str, Any], image: Any) -> Any:
        return step.forward(names.nested(weights), {"image": image}, model=loaded.module)

    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in weights.items()}
    (batch,) = jax.export.symbolic_shape("batch")
    image = jax.ShapeDtypeStruct((batch, *_size(loaded), 3), np.float32)
    program = jax.export.export(jax.jit(forward), platforms=PLATFORMS)(shapes, image)
    (folder / PROGRAM).write_bytes(program.serialize())
    save_file({k: np.ascontiguousarray(v) for k, v in weights.items()}, folder / WEIGHTS)
    _write_settings(loaded, folder)
    shutil.copyfile(standalone.__file__, folder / SCRIPT)

    again = jax.export.deserialize((folder / PROGRAM).read_bytes())
    stored = load_file(folder / WEIGHTS)
    return _compare(loaded, lambda image: again.call(stored, image))


def to_onnx(loaded: Any, folder: Path) -> float:
    """Writes `model.onnx`, image [B, H, W, 3] -> logits [B, K]; returns the difference.

    B is any number where jax2onnx can follow it through the model (ViT, BEiT), else 1, which is
    said.

    Raises:
      ConfigError: without the extra `onnx`, or if an operation has no form in ONNX.
    """
    try:
        import jax2onnx
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f'--to=onnx needs {error.name}: pip install -e ".[onnx]" where this package is'
        ) from error
    _headed(loaded)
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of its own inner values
    onnxruntime.set_default_logger_severity(4)

    def forward(image: Any) -> Any:
        return loaded.module.apply(loaded.variables, image, train=False)

    def attempt(batch: str | int, rows: tuple[int, ...]) -> float:
        with _one_form_for_all_platforms():
            model = jax2onnx.to_onnx(forward, [(batch, *_size(loaded), 3)], model_name="vit_jax")
        # Weights beside the graph, which alone could not pass two gigabytes.
        (folder / f"{ONNX}.data").unlink(missing_ok=True)
        onnx.save_model(model, folder / ONNX, save_as_external_data=True, location=f"{ONNX}.data")
        session = onnxruntime.InferenceSession(folder / ONNX, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return _compare(loaded, lambda image: session.run(None, {name: image})[0], rows)

    try:
        difference = attempt("B", BATCHES)
        if not difference <= LIMIT:
            raise ValueError(f"other logits, by {difference:.1e} of their scale")
    except Exception:  # jax2onnx and its runtime raise what their parts raise
        try:
            difference = attempt(1, (1,))
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"jax2onnx cannot convert this model: {reason[:300]}") from error
        print("note: this model takes one image at a time, as jax2onnx cannot follow its batch")
    _write_settings(loaded, folder)
    return difference


@contextmanager
def _one_form_for_all_platforms() -> Iterator[None]:
    """Lets what is written once for each platform be traced in its general form alone."""
    import jax

    chosen = jax.lax.platform_dependent
    jax.lax.platform_dependent = lambda *args, default, **_: default(*args)
    try:
        yield
    finally:
        jax.lax.platform_dependent = chosen


FORMS: dict[str, Callable[[Any, Path], float]] = {
    "hf": to_hf,
    "stablehlo": to_stablehlo,
    "onnx": to_onnx,
}


def export(loaded: Any, form: str, output: Path) -> float:
    """Writes a loaded checkpoint in one of `FORMS`, complete and compared, or not at all.

    Args:
      loaded: of `vit_jax.load`.
      form: "hf", "stablehlo" or "onnx".
      output: a folder that does not exist, or is empty.

    Returns:
      The largest difference of the logits, over the largest logit.

    Raises:
      ConfigError: if the folder holds something, or the form has no such model.
      CheckpointError: if the logits differ by more than they may.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output={output} exists and is not empty: nothing was written")
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{output.name}-", dir=output.absolute().parent
        ) as name:
            folder = Path(name) / "unfinished"
            folder.mkdir()
            difference = FORMS[form](loaded, folder)
            limit = LIMIT if _dtype(loaded) == "float32" else 0.05
            if not difference <= limit:
                raise CheckpointError(
                    f"what was written gives other logits, by {difference:.1e} of their scale "
                    f"where {limit:g} is allowed: nothing is kept"
                )
            if output.exists():
                output.rmdir()
            folder.rename(output)
    except OSError as error:
        raise ConfigError(f"--output={output} cannot be written: {error.strerror}") from error
    return difference


def _compare(loaded: Any, call: Callable[..., Any], batches: tuple[int, ...] = BATCHES) -> float:
    """The largest difference of two models' outputs, over the largest of that output.

    Where the model reads a mask, only the upper left quarter of the first image is real.
    """
    random, worst = np.random.default_rng(0), 0.0
    for rows in batches:
        image = random.normal(size=(rows, *_size(loaded), 3)).astype(np.float32)
        batch = {"image": image}
        if "tokens" in loaded.recipe.inputs:
            shape, dtype = loaded.recipe.inputs["tokens"]
            batch["tokens"] = random.integers(1, 9, (rows, *shape)).astype(dtype)
        if "image_mask" in loaded.reads:
            batch["image_mask"] = mask = np.ones(image.shape[:3], bool)
            mask[0, image.shape[1] // 2 :] = mask[0, :, image.shape[2] // 2 :] = False
            image *= mask[..., None]
        pairs = zip(_arrays(loaded(**batch)), _arrays(call(**batch)), strict=True)
        for want, got in pairs:
            if not np.isfinite(got).all():
                return float("nan")
            worst = max(worst, float(np.abs(want - got).max() / max(np.abs(want).max(), 1e-30)))
    return worst


def _arrays(outputs: Any) -> list[np.ndarray]:
    """Logits, the description of a backbone, or what a detector gives."""
    outputs = getattr(outputs, "pooled", outputs)
    chosen = [outputs[k] for k in sorted(outputs)] if isinstance(outputs, dict) else [outputs]
    return [np.asarray(each, np.float64) for each in chosen]


def _headed(loaded: Any) -> None:
    from vit_jax.pretrained.hf import CLASSIFIER
    from vit_jax.pretrained.opened import backbone_fields

    if not hasattr(loaded.module, "num_classes"):
        raise ConfigError(f"{loaded.source} has no head: only a classifier is exported so")
    if (target := backbone_fields(loaded.module)["target"]) != CLASSIFIER:
        raise ConfigError(f"{loaded.source} is a {target}: only a classifier is exported so")


def _size(loaded: Any) -> tuple[int, int]:
    return loaded.preprocess.typical


def _dtype(loaded: Any) -> str:
    return np.dtype(getattr(loaded.module, "dtype", np.float32)).name


def _write_settings(loaded: Any, folder: Path) -> None:
    steps = [dict(spec) for spec in loaded.preprocess.steps]
    (folder / STEPS).write_text(json.dumps(steps, indent=2) + "\n")
    (folder / LABELS).write_text(json.dumps(loaded.labels, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.export",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="REF", help="hf:OWNER/NAME, a file, folder or run")
    add("--to", required=True, choices=list(FORMS), help="the form")
    add("--output", required=True, type=Path, metavar="DIR", help="new, or empty")
    add("--dtype", default="float32", help="float32, bfloat16 or float16")
    add("--image_size", type=int, help="pixels, where not the checkpoint's own")
    options = parser.parse_args(argv)

    def body() -> int:
        command.quiet()
        programs.keep()
        os.environ["VIT_JAX_ATTENTION"] = "plain"  # what is written has to run everywhere
        from vit_jax.pretrained.load import load

        loaded = load(options.checkpoint, dtype=options.dtype, image_size=options.image_size)
        print(loaded.source)
        for remark in loaded.remarks:
            print(f"note: {remark}")
        difference = export(loaded, options.to, options.output)
        print(f"opened again: the largest difference is {difference:.1e} of the logits' scale")
        for file in sorted(options.output.iterdir()):
            print(f"  {file} ({file.stat().st_size:,} bytes)")
        return 0

    return command.guard(body)


if __name__ == "__main__":
    sys.exit(main())
