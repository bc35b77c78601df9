"""What do ViT, CvT and Swin reach in how much processor time on CIFAR-10?

python experiments/cifar10/run.py --data_dir=FOLDER [--only=vit,cvt,swin] [--out=runs/cifar10]

FOLDER holds TFDS's `cifar10` in array_record form. Each recipe is a process of its own, whose
processor time is taken whole: with its start, its compilation and its evaluations. Interrupted, the
same command goes on, and the time is then that of the last part only.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.report import read_metrics

HERE = Path(__file__).parent
COLORS = {"vit": "#0072B2", "cvt": "#D55E00", "swin": "#009E73"}
MINUTES = 52  # of the study notebook's network, rebuilt in Keras, for its 10 epochs
NOTEBOOK = 0.7263  # its text, on the original pixels
REBUILT = 0.6745  # rebuilt in Keras, on the copy used here


def train(name: str, data_dir: Path, workdir: Path) -> dict:
    """Trains a recipe; its processor time and what it reached."""
    command = [sys.executable, "-m", "vit_jax.main", f"--config=configs/{name}.py:cifar10"]
    command += [f"--config.data.data_dir={data_dir}", f"--workdir={workdir}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    rows = [r for r in read_metrics(workdir) if r["split"] == "validation"]
    keys = ("step", "epoch", "accuracy", "loss")
    return {"processor_seconds": round(seconds), "curve": [{k: r[k] for k in keys} for r in rows]}


def plot(results: dict[str, dict], file: Path) -> None:
    """Test accuracy over processor time, which lies evenly on a run's steps."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, result in results.items():
        rows, minutes = result["curve"], result["processor_seconds"] / 60
        x = [minutes * r["step"] / rows[-1]["step"] for r in rows]
        y = [100 * r["accuracy"] for r in rows]
        epochs = round(rows[-1]["epoch"], 1)
        label = f"{name}: {y[-1]:.1f} % in {minutes:.1f} min, {epochs:g} epochs"
        axes.plot(x, y, "o-", color=COLORS[name], label=label)
    axes.plot(MINUTES, 100 * REBUILT, "kx", label=f"notebook, rebuilt in Keras: {REBUILT:.2%}")
    axes.axhline(100 * NOTEBOOK, color="0.5", ls="--", label=f"notebook's text: {NOTEBOOK:.2%}")
    axes.axvline(MINUTES, color="0.8", lw=1)
    axes.set(xlabel="processor minutes", ylabel="test accuracy, %", xlim=0)
    axes.set_title("CIFAR-10, from scratch")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--only", default=",".join(COLORS))
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    arguments = parser.parse_args()
    kept = HERE / "curves.json"  # what ran before stays beside what ran now
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in filter(None, arguments.only.split(",")):
        results[name] = train(name, arguments.data_dir, arguments.out / name)
        kept.write_text(json.dumps(results, indent=1) + "\n")
        plot(results, HERE / "accuracy.png")


if __name__ == "__main__":
    main()
