"""What do small detectors and segmenters learn from scenes of digits in minutes on a laptop?

python experiments/scenes/run.py [--only=setr,upernet,detr,detr-from-setr] [--out=runs/scenes]

Each config as a process of its own, timed whole; `detr-from-setr` starts from the backbone that
`setr` has left in the same folder. Interrupted, the same command goes on, and its time is then that
of the last part only.
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
SHOWN = {
    "setr": ("miou",),
    "upernet": ("miou",),
    "detr": ("ap50", "ap"),
    "detr-from-setr": ("ap50", "ap"),
}
COLORS = dict(zip(SHOWN, ("#D55E00", "#009E73", "#56B4E9", "#0072B2")))
LINES = {"ap50": "-", "ap": "--", "miou": "-"}


def train(name: str, out: Path) -> dict:
    """Trains one config; what it reached and how long it took."""
    workdir = out / name
    config, _, start = name.partition("-from-")
    command = [sys.executable, "-m", "vit_jax.main", f"--config=configs/{config}.py"]
    command += [f"--config.init={out / start}"] * bool(start)
    began = time.monotonic()
    subprocess.run([*command, f"--workdir={workdir}"], check=True)
    seconds = time.monotonic() - began
    rows = [r for r in read_metrics(workdir) if r["split"].startswith("validation")]
    keys = ("step", "split", *SHOWN[name], "loss")
    return {"seconds": round(seconds), "curve": [{k: r[k] for k in keys if k in r} for r in rows]}


def plot(results: dict[str, dict], file: Path) -> None:
    """The held-out numbers over steps."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, result in results.items():
        last = result["curve"][-1]["split"]
        rows = [r for r in result["curve"] if r["split"] == last]
        for key in SHOWN[name]:
            label = f"{name}: {key} {rows[-1][key]:.3f} in {result['seconds'] / 60:.0f} min"
            x, y = [r["step"] for r in rows], [r[key] for r in rows]
            axes.plot(x, y, LINES[key], marker="o", color=COLORS[name], label=label)
    axes.set(xlabel="step", ylabel="on 500 held-out scenes", ylim=(0, 1), title="Scenes of digits")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(SHOWN))
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"))
    arguments = parser.parse_args()
    kept = HERE / "result.json"  # what ran before stays beside what ran now
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in filter(None, arguments.only.split(",")):
        results[name] = train(name, arguments.out)
        kept.write_text(json.dumps(results, indent=1) + "\n")
        plot(results, HERE / "curves.png")


if __name__ == "__main__":
    main()
