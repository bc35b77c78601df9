"""What a checkpoint is, before anything of it is used: python -m vit_jax.describe REF."""

import argparse
import json
import sys
from functools import partial
from typing import Any

from vit_jax import command

USAGE = """Says what a checkpoint is: format, architecture, size, cost, preprocessing, and which
of its arrays have a place in the model. Its weights are not read, save those of a run of one's own.

  python -m vit_jax.describe hf:google/vit-base-patch16-224      on the Hugging Face Hub
  python -m vit_jax.describe my_model                            a folder in Hugging Face's form
  python -m vit_jax.describe B_16.npz                            Google's, also of big_vision
  python -m vit_jax.describe swin_tiny_patch4_window7_224.pth    the authors', or timm's
  python -m vit_jax.describe runs/vit-digits                     a run of one's own
"""


def describe(ref: str) -> dict[str, Any]:
    """Everything that is known of a checkpoint without reading its weights.

    Returns:
      format, origin, architecture (of the backbone), fields, model ({} for a classifier, else the
      `target` and the fields of what stands on the backbone), task, parameters, gflops_per_image,
      image_size, activation, epsilon, preprocessing, classes, labels, arrays (mapped, unused,
      unmapped, missing, wrong) and remarks, as plain data.

    Raises:
      CheckpointError, ConfigError: as of `vit_jax.load`.
    """
    import jax
    import jax.numpy as jnp

    from vit_jax import cost, step
    from vit_jax.pretrained.hf import CLASSIFIER
    from vit_jax.pretrained.load import open_checkpoint
    from vit_jax.pretrained.opened import backbone_fields

    opened = open_checkpoint(ref)
    module = opened.module()
    variables = opened.abstract(module)
    match = opened.match(module)
    size = opened.preprocessing.typical
    batch = opened.batch | {"image": jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)}
    fields = backbone_fields(getattr(module, "backbone", module))
    fields.pop("dtype", None)
    target = fields.pop("target")
    model = backbone_fields(module) if hasattr(module, "backbone") else {}
    model = {} if model.get("target") == CLASSIFIER else model
    for name in ("backbone", "num_classes", "dtype"):
        model.pop(name, None)
    return {
        "source": ref,
        "format": opened.format,
        "origin": opened.recipe.origin,
        "architecture": target,
        "fields": fields,
        "model": model,
        "task": opened.recipe.task,
        "parameters": cost.parameters(variables["params"]),
        "gflops_per_image": cost.flops(partial(step.forward, model=module), variables, batch) / 1e9,
        "flops_rule": cost.RULE,
        "image_size": list(size),
        "activation": fields.get("activation", ""),
        "epsilon": fields.get("epsilon"),
        "preprocessing": [dict(spec) for spec in opened.preprocessing.steps],
        "preprocessing_in_words": str(opened.preprocessing),
        "classes": opened.recipe.num_classes,
        "labels": list(opened.labels),
        "dtypes": sorted(set(opened.arrays.dtypes.values())),
        "arrays": {
            "mapped": len(match.bindings),
            "unused": match.unused,
            "unmapped": list(match.unmapped),
            "missing": list(match.missing),
            "wrong": list(match.wrong),
        },
        "remarks": list(opened.remarks),
    }


def sentences(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each line that a person reads."""
    size = "x".join(map(str, found["image_size"]))
    shown = ", ".join(f"{k}={_plain(v)}" for k, v in found["fields"].items())
    arrays = found["arrays"]
    classes = "none" if found["model"] else "no head"  # a model that tells something else
    if found["classes"]:
        some = ", ".join(found["labels"][:4]) + (", ..." if len(found["labels"]) > 4 else "")
        classes = f"{found['classes']:,}" + (f": {some}" if some else ", without names")
    model = dict(found["model"])
    rows = [("format", f"{found['format']}, {', '.join(found['dtypes'])}")]
    if model:
        target = model.pop("target")
        settings = ", ".join(f"{k}={_plain(v)}" for k, v in model.items())
        rows.append(("architecture", f"{target}({settings})"))
    rows += [
        ("backbone" if model else "architecture", f"{found['architecture']}({shown})"),
        ("parameters", f"{found['parameters']:,}"),
        (
            "compute",
            f"{found['gflops_per_image']:.2f} GFLOPs per image of {size} ({found['flops_rule']})",
        ),
        ("activation", found["activation"] or "as the architecture has it"),
        ("epsilon", f"{found['epsilon']:g}" if found["epsilon"] else "as the architecture has it"),
        ("input", f"{size} pixels"),
        ("preprocessing", found["preprocessing_in_words"]),
        ("classes", classes),
        (
            "arrays",
            f"{arrays['mapped']} mapped, {len(arrays['unused'])} unused, "
            f"{len(arrays['unmapped'])} without a place, {len(arrays['missing'])} missing",
        ),
    ]
    reasons: dict[str, list[str]] = {}
    for name, reason in arrays["unused"].items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f", ... ({len(names)})" if len(names) > 1 else ""
        rows.append(("unused", f"{names[0]}{more}: {reason}"))
    rows += [("no place", name) for name in arrays["unmapped"]]
    rows += [("missing", name) for name in arrays["missing"]]
    rows += [("wrong shape", text) for text in arrays["wrong"]]
    return rows + [("remark", text) for text in found["remarks"]]


def _plain(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit status, 4 if an array has no place or is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.describe",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ref", metavar="REF", help="hf:OWNER/NAME, a file, a folder, or a run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)

    def body() -> int:
        command.quiet()
        found = describe(options.ref)
        if options.json:
            print(json.dumps(found, indent=2, default=str))
        else:
            print(found["source"])
            for name, text in sentences(found):
                print(f"  {name:14} {text}")
        arrays = found["arrays"]
        return 4 if arrays["unmapped"] or arrays["missing"] or arrays["wrong"] else 0

    return command.guard(body)


if __name__ == "__main__":
    sys.exit(main())
