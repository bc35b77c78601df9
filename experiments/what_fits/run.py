"""What each way to save memory saves: ViT-L/16 trained on one TPU v5e, as its compiler says.

    python experiments/what_fits/run.py

No TPU is needed, only `pip install -e ".[tpu]"`; about two minutes a row on two cores. Rows that
are in result.json already are kept, so a run that was killed goes on. README.md has the table.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BATCH, TOPOLOGY = 64, "v5e:1x1"
REMAT, DTYPE, PARTS, OPTIMIZER = "model.backbone.remat", "dtype", "accumulate", "optimizer.name"
SIZE = "image_size"
ATTENTION = "VIT_JAX_ATTENTION"  # of the environment; the others are of the config
ROWS: dict[str, dict[str, Any]] = {
    "float32": {DTYPE: "float32"},
    "bfloat16": {},
    "bfloat16, 8 at a time": {PARTS: 8},
    "bfloat16, dots_saveable": {REMAT: "dots_saveable"},
    "bfloat16, dots_with_no_batch_dims_saveable": {REMAT: "dots_with_no_batch_dims_saveable"},
    "bfloat16, all made again": {REMAT: True},
    "bfloat16, all made again, Adafactor": {REMAT: True, OPTIMIZER: "adafactor"},
    "bfloat16, 8 at a time, 512x512 pixels": {PARTS: 8, SIZE: 512},
    "the same, fused attention": {PARTS: 8, SIZE: 512, ATTENTION: "fused"},
}


def study(change: dict[str, Any]) -> dict[str, Any]:
    """What `vit_jax.plan` says of a row."""
    form = {ATTENTION: change.get(ATTENTION, "plain")}
    command = [sys.executable, "-m", "vit_jax.plan", "--config=experiments/launch/pod.py:l16"]
    command += [f"--topology={TOPOLOGY}", "--seconds=0", "--json", f"--config.batch_size={BATCH}"]
    command += [f"--config.{key}={value}" for key, value in change.items() if key not in form]
    done = subprocess.run(
        command, cwd=HERE.parent.parent, capture_output=True, env=os.environ | form, text=True
    )
    if done.returncode not in (0, 6):  # 6: does not fit, and how much it would take
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def most(found: dict[str, Any], copies: int) -> int:
    """The largest batch by arithmetic: all but parameters, gradients and optimizer grows with it.

    `copies` are those of the parameters' size: themselves, their gradients, and of a step that is
    made in parts their sum so far.
    """
    memory = found["memory"]
    fixed = copies * memory["parameters"] + memory["optimizer"] + memory["program"]
    each = (memory["peak"] - fixed) / BATCH
    return int((found["limit"] - fixed) / each)


def table(results: dict[str, dict[str, Any]]) -> str:
    """In Markdown."""
    head = ("ViT-L/16", "held", "temporaries", "peak", f"{BATCH} fit", "most", "FLOPs", "traffic")
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for name, found in results.items():
        memory, compute = found["memory"], found["compute"]
        held = memory["parameters"] + memory["optimizer"]
        sizes = held, memory["temporaries"], memory["peak"]
        row = [name, *(f"{size / 1e9:.1f} GB" for size in sizes), "yes" if found["fits"] else "no"]
        row += [str(most(found, 2 + (PARTS in ROWS[name])))]
        if "compiled_flops" in compute:
            row += [f"{compute['compiled_flops'] / compute['model_flops']:.2f} x"]
            row += [f"{compute['memory_bytes'] / 1e9:.0f} GB"]
        else:  # the compiler stopped when it saw the memory
            row += ["-", "-"]
        lines.append(" | ".join(row))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE)
    file = parser.parse_args().out / "result.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(file.read_text()) if file.exists() else {}
    for number, (name, change) in enumerate(ROWS.items(), 1):
        if name not in results:
            results[name] = study(change)
            file.write_text(json.dumps(results, indent=1) + "\n")
        peak = results[name]["memory"]["peak"] / 1e9
        print(f"{number}/{len(ROWS)} | {name}: {peak:.1f} GB", flush=True)
    print(table({name: results[name] for name in ROWS}))


if __name__ == "__main__":
    main()
