"""From sequence to sequence to the transformer: which decoder writes what is in a scene?

python experiments/captions/run.py [--only=lstm,attention] [--out=runs/captions] [--override=...]

Trains `configs/captioner.py` with each of the three decoders, as a process of its own, asks each
for sentences with a beam of 5 too, and draws what the words of the first pictures looked at.
Interrupted, the same command goes on: what is in result.json and whole in its folder is not trained
again, and a run that was cut goes on there; its time is then that of the last part only.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from vit_jax.data import scenes
from vit_jax.report import read_metrics

HERE = Path(__file__).parent
DECODERS = ("lstm", "attention", "transformer")
COLORS = {"lstm": "#D55E00", "attention": "#009E73", "transformer": "#0072B2"}
NUMBERS = ("exact_match", "bleu4", "chrf", "token_accuracy", "perplexity", "loss")
DRAWN = 4  # held-out scenes with their words
BEAM = 5


def spent(command: list[str]) -> tuple[int, int]:
    """Runs a command; its seconds by the clock, and by the processors."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return round(time.monotonic() - began), round(processors)


def train(decoder: str, workdir: Path, overrides: list[str]) -> dict:
    """Trains one decoder; what it reached, greedily and with a beam, and how long it took."""
    config = ["--config=configs/captioner.py", f"--config.model.decoder={decoder}", *overrides]
    command = [sys.executable, "-m", "vit_jax.main", f"--workdir={workdir}"]
    seconds, processors = spent([*command, *config])
    log = (workdir / "log.txt").read_text()
    (count,) = set(re.findall(r"([\d,]+) parameters", log))
    curve = [r for r in read_metrics(workdir) if r["split"] == "validation"]
    return {
        "parameters": int(count.replace(",", "")),
        "seconds": seconds,
        "processor_seconds": processors,
        "curve": [{key: row[key] for key in ("step", *NUMBERS)} for row in curve],
        "beam": exact(workdir, BEAM),
    }


def exact(workdir: Path, beams: int) -> dict[str, float]:
    """The share of held-out sentences that a beam writes exactly right."""
    import vit_jax

    model = vit_jax.load(workdir).writing(beams)
    options = json.loads((workdir / "config.json").read_text())["data"]["options"]
    data = scenes.open("validation", **options)
    right = 0
    for first in range(0, len(data), 50):
        examples = [data[i] for i in range(first, first + 50)]
        told = model.caption([example["image"] for example in examples])
        right += sum(text in e["captions"] for (text, _), e in zip(told, examples))
    return {"beams": beams, "exact_match": right / len(data)}


def draw(decoder: str, workdir: Path) -> None:
    """predictions.png of the run, and where each word of some sentences looked."""
    (HERE / f"{decoder}.png").write_bytes((workdir / "predictions.png").read_bytes())
    if decoder == "lstm":
        return
    options = json.loads((workdir / "config.json").read_text())["data"]["options"]
    data, folder = scenes.open("validation", **options), workdir / "held_out"
    folder.mkdir(exist_ok=True)
    for i in range(DRAWN):
        Image.fromarray(data[i]["image"]).save(folder / f"{i}.png")
    command = [sys.executable, "-m", "vit_jax.predict", f"--checkpoint={workdir}", str(folder)]
    subprocess.run([*command, f"--draw={workdir / 'words'}"], check=True)
    sheets = [np.asarray(Image.open(workdir / "words" / f"{i}.png")) for i in range(DRAWN)]
    width = max(sheet.shape[1] for sheet in sheets)
    fill = {"mode": "constant", "constant_values": 255}
    sheets = [np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), **fill) for s in sheets]
    Image.fromarray(np.concatenate(sheets)).save(HERE / f"{decoder}_words.png")


def plot(results: dict[str, dict]) -> None:
    """Sentences exactly right, and BLEU-4, over steps."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = zip(figure.subplots(1, 2), (("exact_match", "exactly right"), ("bleu4", "BLEU-4")))
    for axes, (key, label) in panels:
        for decoder in [d for d in DECODERS if d in results]:
            rows = results[decoder]["curve"]
            minutes = results[decoder]["processor_seconds"] / 60
            name = f"{decoder}, {minutes:.0f} min of a core"
            x, y = [r["step"] for r in rows], [r[key] for r in rows]
            axes.plot(x, y, marker="o", color=COLORS[decoder], label=name)
        axes.set(xlabel="step", ylabel=f"{label}, 500 held-out scenes", ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(HERE / "curves.png", dpi=120)


def table(results: dict[str, dict]) -> str:
    """The rows of README's table."""
    lines = []
    for decoder in [d for d in DECODERS if d in results]:
        result = results[decoder]
        row = result["curve"][-1]
        cells = [f"`{decoder}`", f"{result['parameters']:,}", f"{row['step']:,}"]
        cells += [f"{result['processor_seconds'] / 60:.0f}", f"{row['exact_match']:.3f}"]
        cells += [f"{result['beam']['exact_match']:.3f}"]
        cells += [f"{row[key]:.3f}" for key in ("bleu4", "chrf", "perplexity")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="decoders, comma between; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/captions"))
    parser.add_argument("--override", nargs="*", default=[], help="such as config.steps=100")
    arguments = parser.parse_args()
    kept = HERE / "result.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    overrides = [f"--{override}" for override in arguments.override]
    for decoder in arguments.only.split(",") if arguments.only else DECODERS:
        workdir = arguments.out / decoder
        if decoder not in results or not (workdir / "predictions.png").exists():
            results[decoder] = train(decoder, workdir, overrides)
            kept.write_text(json.dumps(results, indent=1) + "\n")
        draw(decoder, workdir)
        plot(results)
    print(table(results))


if __name__ == "__main__":
    main()
