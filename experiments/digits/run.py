"""How long does the first command take, and how well does each architecture read the digits?

python experiments/digits/run.py [--out=runs/digits]
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from vit_jax.report import read_metrics

ARCHITECTURES = ("cvt", "vit", "hybrid", "swin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    arguments = parser.parse_args()
    rows = []
    for name in ARCHITECTURES:
        workdir = arguments.out / name
        if workdir.exists():
            raise SystemExit(f"{workdir} exists: a run that goes on would not be timed whole")
        command = [sys.executable, "-m", "vit_jax.main", f"--config=configs/{name}.py"]
        began = time.monotonic()
        subprocess.run([*command, f"--workdir={workdir}"], check=True)
        seconds = time.monotonic() - began
        last = [r for r in read_metrics(workdir) if r["split"].startswith("validation")][-1]
        rows.append({"config": name, "seconds": round(seconds), "accuracy": last["accuracy"]})
        print(json.dumps(rows[-1]), flush=True)
    (Path(__file__).parent / "result.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("| config | held-out accuracy | whole command |\n|---|---|---|")
    for row in rows:
        print(f"| `{row['config']}` | {row['accuracy']:.1%} | {row['seconds']} s |")


if __name__ == "__main__":
    main()
