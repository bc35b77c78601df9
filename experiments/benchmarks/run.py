"""How fast are we beside PyTorch on this machine, and how long until the first step?

    python experiments/benchmarks/run.py cpu --peer_python=PATH [--only=training]
    python experiments/benchmarks/run.py input --peer_python=PATH --pictures=FOLDER
    python experiments/benchmarks/run.py start
    python experiments/benchmarks/run.py gpu --peer_python=PATH [--attention=fused]

PATH is a Python with torch, transformers and timm. Each part writes its numbers to result.json and
draws all of them again, so that parts can be run on their own; what is there is kept, other
processors' numbers as well.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.benchmark import processor

HERE = Path(__file__).parent
RESULT = HERE / "result.json"
MODELS = ("vit_s16", "swin_t", "cvt_13", "resnet_50")
# The authors' CvT has another activation than transformers', which costs another time.
ALIKE = {"cvt_13": ["--set", "activation=gelu"]}
LARGE = ("vit_b16", "vit_l16", "swin_t", "swin_b", "cvt_13")
STARTS = 5  # of the command, cold and warm


def benchmark(*options: str) -> list[dict]:
    """Rows of one `vit_jax.benchmark`."""
    done = subprocess.run(line(*options), stdout=subprocess.PIPE, text=True, check=True)
    return rows_of(done.stdout)


def line(*options: str) -> list[str]:
    """A command of `vit_jax.benchmark`."""
    print("vit_jax.benchmark", *options, flush=True)
    return [sys.executable, "-m", "vit_jax.benchmark", *options, "--json"]


def rows_of(text: str) -> list[dict]:
    """What it has found."""
    found = json.loads(text)
    for row in found["rows"]:
        row.pop("pictures", None)  # where they lie on this machine says nothing elsewhere
    return [row | {"machine": found["machine"]} for row in found["rows"]]


def cpu(options: argparse.Namespace) -> list[dict]:
    """Training at batch 8, inference at 1, 8 and 32, float32."""
    peer = ["--peer=transformers", f"--peer_python={options.peer_python}"]
    rows = []
    for model in options.models or MODELS:
        alike = ALIKE.get(model, [])
        if "training" in options.only:
            rows += benchmark(model, "--work=training", "--batch_size=8", *peer, *alike)
        if "inference" in options.only:
            rows += benchmark(model, "--work=inference", "--batch_size=1,8,32", *peer, *alike)
        keep("cpu", rows)
    return rows


def gpu(options: argparse.Namespace) -> list[dict]:
    """Training and inference in bfloat16, of batches that fill the device.

    All start at once: PyTorch compiles for as long as each of the others together, and what is
    timed is alone on the device. What has not ended after --minutes is ended, and told.
    """
    end = time.monotonic() + 60 * options.minutes
    common = ["--dtype=bfloat16", f"--batch_size={options.batch_size}", "--modes=compiled"]
    common += ["--seconds=1", "--rounds=3", f"--peer_python={options.peer_python}"]
    chosen = os.environ | {"VIT_JAX_ATTENTION": options.attention}
    # Each of the peers has as many processes of its own as this says.
    chosen |= {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
    processes, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models or LARGE:
            library = "transformers" if model.startswith("cvt") else "timm"
            given = [*ALIKE.get(model, []), *common, f"--peer={library}", f"--turns={folder}/turns"]
            for work in options.only.split(","):
                processes[f"{model}, {work}"] = subprocess.Popen(
                    line(model, f"--work={work}", *given),
                    stdout=subprocess.PIPE,
                    env=chosen,
                    text=True,
                    start_new_session=True,  # to be ended with all that it has started
                )
        try:
            for title, process in processes.items():
                try:
                    text, _ = process.communicate(timeout=max(end - time.monotonic(), 0.1))
                except subprocess.TimeoutExpired:
                    print(f"{title}: not done in {options.minutes:g} minutes", flush=True)
                    continue
                if process.returncode:
                    print(f"{title}: failed, as said above", flush=True)
                    continue
                rows += [row | {"attention": options.attention} for row in rows_of(text)]
                keep("gpu", rows)
        finally:
            for process in processes.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
    return rows


def read(options: argparse.Namespace) -> list[dict]:
    """The training transforms of the ImageNet recipe in one thread, without mixing."""
    if not options.pictures:
        sys.exit("--pictures=FOLDER: pictures of full size")
    return benchmark(
        "--config=configs/cvt.py:imagenet",
        "--work=input",
        "--batch_size=50",
        f"--pictures={options.pictures}",
        "--peer=timm",
        f"--peer_python={options.peer_python}",
        "--rounds=7",
    )


def start(options: argparse.Namespace) -> list[dict]:
    """Seconds from the command to the first finished step, without and with kept programs."""
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    # A person's Python keeps what it has parsed.
    usual = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    line = [sys.executable, "-m", "vit_jax.main", "--config=configs/cvt.py", "--config.log_every=1"]
    for _ in range(STARTS):
        programs = tempfile.mkdtemp()
        for kind in times:
            workdir = tempfile.mkdtemp()
            shutil.rmtree(workdir)
            began = time.perf_counter()
            process = subprocess.Popen(
                [*line, f"--workdir={workdir}"],
                stdout=subprocess.PIPE,
                env=usual | {"XDG_CACHE_HOME": programs},
                text=True,
            )
            for text in process.stdout:
                if text.startswith("step 1/"):
                    times[kind].append(time.perf_counter() - began)
                    break
            process.kill()
            process.wait()
            process.stdout.close()
            shutil.rmtree(workdir, ignore_errors=True)
        shutil.rmtree(programs)
        print({k: [round(t, 1) for t in v] for k, v in times.items()}, flush=True)
    machine = {"cores": os.cpu_count(), "processor": processor()}
    return [{"start": k, "seconds": values, "machine": machine} for k, values in times.items()]


PARTS = {"cpu": cpu, "gpu": gpu, "input": read, "start": start}


def keep(part: str, rows: list[dict]) -> None:
    """Writes the part's rows in the place of those there."""
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}

    def title(row: dict) -> tuple:
        keys = ("model", "work", "batch_size", "dtype", "start", "attention")
        return (device(row), *(row.get(k) for k in keys))

    new = {title(row) for row in rows}
    found[part] = [row for row in found.get(part, []) if title(row) not in new] + rows
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


def device(row: dict) -> str:
    """What it ran on: the accelerator's name, or the processor's."""
    kind = row.get("sides", {}).get("ours", {}).get("device", "cpu")
    return row["machine"]["processor"] if kind == "cpu" else kind


def best(row: dict) -> tuple[str, float] | None:
    """The faster peer, and ours / theirs in images/s; None without one."""
    ratios = {name: ratio[1] for name, ratio in row["ratios"].items()}
    name = min(ratios, key=ratios.get, default=None)
    return (name, ratios[name]) if name else None


def table(found: dict) -> str:
    """All numbers in Markdown."""
    heads = ("machine", "work", "batch", "ours, images/s", "of its rate")
    heads += ("faster peer, images/s", "ratio")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for part in ("cpu", "gpu", "input"):
        for row in found.get(part, []):
            ours, name = row["sides"]["ours"], best(row)
            title = f"{row.get('model') or 'ImageNet pipeline'}, {row['work']}, {row['dtype']}"
            title += f", {row['attention']} attention" if "attention" in row else ""
            cells = [device(row), title, row["batch_size"], f"{ours['images_per_second']:.3g}"]
            cells.append(f"{ours['of_machine']:.0%}" if "of_machine" in ours else "")
            if name:
                theirs = row["sides"][name[0]]["images_per_second"]
                cells += [f"{theirs:.3g} ({name[0]})", f"**{name[1]:.2f}**"]
            else:
                cells += ["", ""]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    for row in found.get("start", []):
        middle = statistics.median(row["seconds"])
        title = f"`configs/cvt.py`, {row['start']}, to the first step"
        lines.append(f"| {device(row)} | {title} | 64 | {middle:.1f} s | | | |")
    return "\n".join(lines)


def draw(found: dict) -> None:
    """Ratios as bars, a panel for each processor; the line is the peer."""
    panels: dict[str, dict[str, float]] = {}
    for row in (r for part in ("cpu", "gpu", "input") for r in found.get(part, []) if best(r)):
        name = f"{row.get('model') or 'pipeline'}, {row['work']}, {row['batch_size']}"
        name += ", fused attention" if row.get("attention") == "fused" else ""
        panels.setdefault(device(row), {})[name] = best(row)[1]
    if not panels:
        return
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    size = (3 + 4 * len(panels), 0.9 + 0.28 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)
    for axes, (title, ratios) in zip(grid[0], panels.items(), strict=True):
        values = [ratios.get(name, 0.0) for name in names]
        axes.barh(names, values, color=["#0072B2" if v >= 1 else "#D55E00" for v in values])
        for place, value in enumerate(values):
            axes.text(value, place, f" {value:.2f}" if value else "", va="center", fontsize=8)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].invert_yaxis()
    figure.supxlabel("our images/s over those of the faster of PyTorch eager and compiled", size=10)
    figure.savefig(HERE / "ratios.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "draw"])
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--pictures", default="")
    parser.add_argument("--only", default="training,inference")
    parser.add_argument("--models", nargs="*", default=())
    # Of the GPU's part.
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--attention", choices=("plain", "fused"), default="plain")
    options = parser.parse_args()
    if options.part != "draw":
        keep(options.part, PARTS[options.part](options))
    found = json.loads(RESULT.read_text())
    print(table(found))
    draw(found)


if __name__ == "__main__":
    main()
