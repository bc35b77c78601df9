"""What do small detectors and segmenters learn from scratch on a laptop?

python experiments/dense.py scenes [--only=setr,upernet] [--out=runs/scenes]
python experiments/dense.py scenes --only=setr_longer
python experiments/dense.py bccd --data_dir=TFDS
python experiments/dense.py camvid --data_dir=TFDS

Each config as a process of its own, timed whole: by the clock, and by the processors' time, which
counts where other work runs beside it. Interrupted, the same command goes on, and its time is then
that of the last part only. Numbers and curves go to the folder of that name beside this file.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.report import read_metrics

DETECTED, SEGMENTED = ("ap50", "ap"), ("miou",)
LINES = {"ap50": "-", "ap": "--", "miou": "-"}
COLORS = ("#D55E00", "#009E73", "#56B4E9", "#0072B2", "#CC79A7", "#E69F00", "#000000")


@dataclass(frozen=True)
class Trained:
    """A config to train, which numbers are shown, and what is changed, only where it is named."""

    config: str
    shown: tuple[str, ...]
    changes: tuple[str, ...] = ()


STUDIES = {
    "scenes": {
        "setr": Trained("setr.py", SEGMENTED),
        "setr_longer": Trained("setr.py", SEGMENTED, ("steps=17600",)),
        "upernet": Trained("upernet.py", SEGMENTED),
        "detr": Trained("detr.py", DETECTED),
    },
    "bccd": {"detr": Trained("detr.py:bccd", DETECTED)},
    "camvid": {
        "setr": Trained("setr.py:camvid", SEGMENTED),
        "upernet": Trained("upernet.py:camvid", SEGMENTED),
    },
}
TITLES = {
    "scenes": ("Scenes of digits", "on 500 held-out scenes"),
    "bccd": ("BCCD, from scratch", "on 87 held-out pictures"),
    "camvid": ("CamVid, from scratch", "on 101 held-out pictures"),
}


def train(run: Trained, workdir: Path, data_dir: Path | None) -> dict:
    """Trains one config; what it reached and how long it took."""
    command = [sys.executable, "-m", "vit_jax.main", f"--config=configs/{run.config}"]
    command += [f"--config.data.data_dir={data_dir}"] * (data_dir is not None)
    command += [f"--config.{change}" for change in run.changes]
    command.append(f"--workdir={workdir}")
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    seconds, used = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    rows = [r for r in read_metrics(workdir) if r["split"].startswith("validation")]
    keys = ("step", "split", *run.shown, "loss")
    return {
        "seconds": round(seconds),
        "processor_seconds": round(processors),
        "curve": [{k: r[k] for k in keys if k in r} for r in rows],
    }


def plot(study: str, results: dict[str, dict], file: Path) -> None:
    """The held-out numbers over steps."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    title, held_out = TITLES[study]
    for color, name in zip(COLORS, [n for n in STUDIES[study] if n in results]):
        result = results[name]
        last = result["curve"][-1]["split"]
        rows = [r for r in result["curve"] if r["split"] == last]
        for key in STUDIES[study][name].shown:
            minutes = result["processor_seconds"] / 120
            label = f"{name}: {key} {rows[-1][key]:.3f} in {minutes:.0f} min of two cores"
            x, y = [r["step"] for r in rows], [r[key] for r in rows]
            axes.plot(x, y, LINES[key], marker="o", color=color, label=label)
    axes.set(xlabel="step", ylabel=held_out, ylim=(0, 1), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--only", default="", help="names, comma between; default: the short ones")
    parser.add_argument("--data_dir", type=Path, help="where TFDS keeps the data")
    parser.add_argument("--out", type=Path, help="default: runs/STUDY")
    arguments = parser.parse_args()
    study, out = arguments.study, arguments.out or Path("runs") / arguments.study
    folder = Path(__file__).parent / study
    kept = folder / "result.json"  # what ran before stays beside what ran now
    results = json.loads(kept.read_text()) if kept.exists() else {}
    usual = [name for name, run in STUDIES[study].items() if not run.changes]
    for name in arguments.only.split(",") if arguments.only else usual:
        results[name] = train(STUDIES[study][name], out / name, arguments.data_dir)
        folder.mkdir(exist_ok=True)
        kept.write_text(json.dumps(results, indent=1) + "\n")
        plot(study, results, folder / "curves.png")


if __name__ == "__main__":
    main()
