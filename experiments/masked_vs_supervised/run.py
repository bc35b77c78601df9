"""What is pre-training without labels worth, where 1 %, 10 % or all of the labels are there?

python experiments/masked_vs_supervised/run.py [--data=digits] [--data_dir=FOLDER] [--seeds=1]

Interrupted, the same command goes on. `--shorten=50` tries all of it in a fiftieth of the steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.report import read_metrics

HERE = Path(__file__).parent
SHARES = (0.01, 0.1, 1.0)
WAYS = {
    "scratch": ("from scratch", "#0072B2"),
    "probe": ("masked, linear probe", "#CC79A7"),
    "masked": ("masked, fine-tuned", "#D55E00"),
    "supervised": ("all labels, fine-tuned", "#009E73"),
}


@dataclass(frozen=True)
class Lengths:
    """Updates of each kind of run on one dataset.

    Attributes:
      masked: of pre-training without labels.
      supervised: of pre-training with all of them.
      learning: of what follows, for each share of the labels.
      rate: learning rate from scratch.
    """

    masked: int
    supervised: int
    learning: dict[float, int]
    rate: float


LENGTHS = {
    "digits": Lengths(4400, 700, {0.01: 300, 0.1: 500, 1.0: 700}, 4e-3),
    "cifar10": Lengths(16_000, 3900, {0.01: 800, 0.1: 1500, 1.0: 3900}, 5e-3),
}
# An encoder that has learned something learns on at a quarter of the rate.
AFTERWARDS = 0.25
PROBE = {
    "optimizer.name": "adamw",
    "optimizer.freeze": "^backbone/",
    "optimizer.weight_decay": 0.0,
    "learning_rate": 1e-2,
}


def train(config: str, workdir: Path, steps: int, settings: dict) -> float:
    """Runs one command, unless its run is finished; the last held-out accuracy, or the loss."""
    if not (rows := finished(workdir, steps)):
        settings = settings | {
            "steps": steps,
            "eval_every": max(steps // 4, 1),
            "log_every": max(steps // 10, 1),
            "schedule.warmup_epochs": 0.0,
            "schedule.warmup_steps": steps // 20,
        }
        command = [sys.executable, "-m", "vit_jax.main", f"--config={config}"]
        command += [f"--config.{name}={value}" for name, value in settings.items()]
        subprocess.run([*command, f"--workdir={workdir}"], check=True)
        rows = finished(workdir, steps)
    return rows[-1].get("accuracy", rows[-1]["loss"])


def finished(workdir: Path, steps: int) -> list[dict]:
    """The held-out rows of a run that reached its last step; [] of any other."""
    if not (workdir / "metrics.jsonl").exists():
        return []
    rows = [row for row in read_metrics(workdir) if row["split"] == "validation"]
    return rows if rows and rows[-1]["step"] == steps else []


def study(data: str, data_dir: str, seed: int, out: Path, shorten: float) -> list[dict]:
    """All runs of one seed: rows of {"way", "share", "accuracy"}."""
    lengths, recipe = LENGTHS[data], f"configs/vit.py:{data}"

    def steps(full: int) -> int:
        return max(round(full / shorten), 4)

    shared = {"seed": seed} | ({"data.data_dir": data_dir} if data_dir else {})
    before = {"masked": out / f"pretrained-masked-{seed}"}
    before["supervised"] = out / f"pretrained-supervised-{seed}"
    loss = train(f"configs/masked.py:{data}", before["masked"], steps(lengths.masked), shared)
    print(f"masked pre-training, seed {seed}: held-out loss {loss:.4f}", flush=True)
    rate = {"learning_rate": lengths.rate}
    length = steps(lengths.supervised)
    accuracy = train(recipe, before["supervised"], length, shared | rate)
    print(f"supervised pre-training, seed {seed}: {accuracy:.1%}", flush=True)
    rows = []
    for share in SHARES:
        for way in WAYS:
            settings = shared | rate | {"data.options.share": share}
            if way != "scratch":
                settings["init"] = before["masked" if way == "probe" else way]
                settings["learning_rate"] = lengths.rate * AFTERWARDS
            if way == "probe":
                settings |= PROBE
            workdir = out / f"{way}-{share:g}-{seed}"
            accuracy = train(recipe, workdir, steps(lengths.learning[share]), settings)
            rows.append({"way": way, "share": share, "seed": seed, "accuracy": accuracy})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def means(rows: list[dict]) -> dict[str, list[float]]:
    """For each way, the mean accuracy over the seeds at each share."""

    def mean(way: str, share: float) -> float:
        same = [r["accuracy"] for r in rows if (r["way"], r["share"]) == (way, share)]
        return statistics.mean(same)

    return {way: [mean(way, share) for share in SHARES] for way in WAYS}


def plot(data: str, rows: list[dict], file: Path) -> None:
    """One line for each way, over the share of the labels; a dot for each seed."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for way, line in means(rows).items():
        name, color = WAYS[way]
        percent = [100 * value for value in line]
        axes.plot([100 * s for s in SHARES], percent, "-", color=color, label=name)
        dots = [(100 * r["share"], 100 * r["accuracy"]) for r in rows if r["way"] == way]
        axes.plot(*zip(*dots, strict=True), "o", color=color)
    axes.set_xscale("log")
    axes.set_xticks([100 * share for share in SHARES], [f"{share:.0%}" for share in SHARES])
    axes.set(xlabel="share of the labels", ylabel="held-out accuracy, %", title=data)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120)


def table(rows: list[dict]) -> str:
    """A line for each way, a column for each share."""
    lines = ["| | " + " | ".join(f"{100 * share:g} % of the labels" for share in SHARES) + " |"]
    lines.append("|---|" + "---|" * len(SHARES))
    for way, line in means(rows).items():
        lines.append(f"| {WAYS[way][0]} | " + " | ".join(f"{x:.1%}" for x in line) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=list(LENGTHS), default="digits")
    parser.add_argument("--data_dir", default="", help="of TFDS's cifar10")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--shorten", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("runs/masked_vs_supervised"))
    options = parser.parse_args()
    out = options.out / (options.data + (f"-{options.shorten:g}" if options.shorten != 1 else ""))
    results = HERE if options.shorten == 1 else out
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for seed in range(options.seeds):
        rows += study(options.data, options.data_dir, seed, out, options.shorten)
        kept = results / "result.json"  # what ran on the other dataset stays beside it
        found = json.loads(kept.read_text()) if kept.exists() else {}
        found[options.data] = rows
        kept.write_text(json.dumps(found, indent=1) + "\n")
        plot(options.data, rows, results / f"{options.data}.png")
    print(table(rows))


if __name__ == "__main__":
    main()
