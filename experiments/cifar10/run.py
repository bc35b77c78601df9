"""What do ViT, CvT and Swin of similar cost reach in 10 epochs of CIFAR-10 on a laptop?

python experiments/cifar10/run.py --data_dir=FOLDER [--only=vit,cvt,swin] [--epochs=10]

FOLDER holds TFDS's `cifar10` in array_record form. Interrupted, the same command goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.report import read_metrics

HERE = Path(__file__).parent
COLORS = {"vit": "#0072B2", "cvt": "#D55E00", "swin": "#009E73"}
NOTEBOOK = 0.7263  # the study notebook's text, on the original pixels
REBUILT = 0.6745  # the same network rebuilt in Keras, on the copy used here


def train(name: str, epochs: float, data_dir: Path, out: Path) -> None:
    command = [sys.executable, "-m", "vit_jax.main", f"--config=configs/{name}.py:cifar10"]
    command += [f"--config.data.data_dir={data_dir}", f"--config.epochs={epochs}"]
    command += [f"--workdir={out / name}"]
    began = time.monotonic()
    subprocess.run(command, check=True)
    print(f"{name}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)


def curve(workdir: Path) -> list[dict]:
    rows = [r for r in read_metrics(workdir) if r["split"].startswith("validation")]
    splits = {r["split"] for r in rows}
    shown = "validation_ema" if "validation_ema" in splits else "validation"
    keys = ("step", "epoch", "accuracy", "loss")
    return [{k: r[k] for k in keys} for r in rows if r["split"] == shown]


def plot(curves: dict[str, list[dict]], file: Path) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, rows in curves.items():
        x, y = [r["epoch"] for r in rows], [100 * r["accuracy"] for r in rows]
        axes.plot(x, y, "o-", color=COLORS[name], label=f"{name}: {y[-1]:.1f} %")
    axes.axhline(100 * NOTEBOOK, color="0.4", ls="--", label=f"notebook's text: {NOTEBOOK:.2%}")
    axes.axhline(100 * REBUILT, color="0.6", ls=":", label=f"rebuilt in Keras: {REBUILT:.2%}")
    axes.set(xlabel="epochs", ylabel="test accuracy, %", title="CIFAR-10, from scratch")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--only", default="vit,cvt,swin")
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    arguments = parser.parse_args()
    for name in filter(None, arguments.only.split(",")):
        train(name, arguments.epochs, arguments.data_dir, arguments.out)
    kept = HERE / "curves.json"  # what ran before stays beside what ran now
    curves = json.loads(kept.read_text()) if kept.exists() else {}
    done = [n for n in COLORS if (arguments.out / n / "metrics.jsonl").exists()]
    curves |= {name: curve(arguments.out / name) for name in done}
    kept.write_text(json.dumps(curves, indent=1) + "\n")
    plot(curves, HERE / "accuracy.png")


if __name__ == "__main__":
    main()
