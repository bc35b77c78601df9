"""What a picture costs as it grows: global attention (ViT) beside attention in windows (Swin).

    python experiments/attention_cost/run.py [--only=vit_s16] [--dtype=bfloat16]

Measures inference of one picture at five sizes with `vit_jax.benchmark`, and draws the times
beside the formulas of Liu et al. 2021 (arXiv:2103.14030), eq. 1 and 2, and the memory. What is in
result.json of the sizes that are not measured again is kept.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax import cost

HERE = Path(__file__).parent
SIZES = (224, 448, 672, 896, 1024)
COLORS = {"vit_s16": "#0072B2", "swin_t": "#D55E00"}
NAMES = {"vit_s16": "ViT-S/16", "swin_t": "Swin-T"}


def attention(tokens: int, width: int, seen: int) -> int:
    """Multiply-adds of one layer: 4 hw C^2 + 2 hw S C, where each of hw tokens sees S."""
    return 4 * tokens * width**2 + 2 * tokens * seen * width


def multiply_adds(model: str, size: int) -> int:
    """Of all blocks for a picture of size x size: attention, and an MLP of 8 hw C^2."""
    if model == "vit_s16":
        tokens, width = (size // 16) ** 2 + 1, 384
        return 12 * (attention(tokens, width, tokens) + 8 * tokens * width**2)
    total = 0
    for stage, depth in enumerate((2, 2, 6, 2)):
        side, width = size // 4 // 2**stage, 96 * 2**stage
        side = -(-side // 7) * 7  # padded to whole windows
        total += depth * (attention(side**2, width, 49) + 8 * side**2 * width**2)
    return total


def measure(model: str, size: int, options: argparse.Namespace) -> dict:
    """One row: milliseconds, bytes and FLOPs of one picture."""
    line = [sys.executable, "-m", "vit_jax.benchmark", model, "--work=inference", "--batch_size=1"]
    line += [f"--image_size={size}", f"--dtype={options.dtype}", "--json"]
    line += [f"--seconds={options.seconds}", "--rounds=3"]
    print(" ".join(line[1:]), flush=True)
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    (row,) = found["rows"]
    ours = row["sides"]["ours"]
    kept = {k: ours[k] for k in ("median", "quartiles", "memory", "flops", "images_per_second")}
    return {
        "model": model,
        "size": size,
        "dtype": options.dtype,
        **kept,
        "machine": found["machine"],
    }


def by_formula(own: list[dict], size: int) -> float:
    """Milliseconds on the formula's line through the smallest of a model's measured sizes."""
    first = min(own, key=lambda r: r["size"])
    model = first["model"]
    return 1000 * first["median"] * multiply_adds(model, size) / multiply_adds(model, first["size"])


def draw(rows: list[dict], file: Path) -> None:
    """Time over pixels beside the formula's line through the first point; memory."""
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for model, color in COLORS.items():
        own = sorted((r for r in rows if r["model"] == model), key=lambda r: r["size"])
        if not own:
            continue
        sizes = [r["size"] for r in own]
        line = [by_formula(own, size) for size in sizes]
        left.plot(sizes, line, "-", color=color, label=f"{NAMES[model]}, by the formula")
        times = [1000 * r["median"] for r in own]
        left.plot(sizes, times, "o", color=color, label=f"{NAMES[model]}, measured")
        memory = [r["memory"] / 1e6 for r in own]
        right.plot(sizes, memory, "o-", color=color, label=NAMES[model])
    left.set(ylabel="ms for one picture", title="time")
    right.set(ylabel="MB", title="memory")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="side of the picture, pixels")
        axes.set_xticks(SIZES, SIZES)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)


def table(rows: list[dict]) -> str:
    """A line of Markdown for each row."""
    lines = ["| model | side | GFLOPs | ms | times the formula's line | MB |", "|---" * 6 + "|"]
    for row in rows:
        line = by_formula([r for r in rows if r["model"] == row["model"]], row["size"])
        cells = [NAMES[row["model"]], row["size"], f"{row['flops'] / 1e9:.1f}"]
        cells += [f"{1000 * row['median']:.0f}", f"{1000 * row['median'] / line:.2f}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['memory'] / 1e6:.0f}"])) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures what is asked for, and draws all there is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", default=",".join(NAMES), help="models, with commas")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="in pixels")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=3, help="of each of three turns")
    options = parser.parse_args()
    file = HERE / "result.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    for model in options.only.split(","):
        for size in map(int, options.sizes.split(",")):
            new = measure(model, size, options)
            rows = [r for r in rows if (r["model"], r["size"]) != (model, size)] + [new]
            rows.sort(key=lambda r: (list(NAMES).index(r["model"]), r["size"]))
            file.write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, HERE / "cost.png")
    print(f"FLOPs: {cost.RULE}\n{table(rows)}")


if __name__ == "__main__":
    main()
