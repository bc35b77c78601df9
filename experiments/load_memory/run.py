"""How much memory does it take to open a checkpoint, over the size of its parameters?

python experiments/load_memory/run.py [--model=vit_l16]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

DTYPES = ("float32", "bfloat16")


def make(model: str, folder: Path) -> None:
    """Writes a checkpoint of that size in Hugging Face's form, with drawn weights."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import vit_jax
    from vit_jax.pretrained import hf, names
    from vit_jax.pretrained.load import Loaded
    from vit_jax.pretrained.preprocess import HALF, Preprocessing, standardize, step
    from vit_jax.pretrained.recipe import Recipe

    module = vit_jax.create(model)
    init = partial(module.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    random = np.random.default_rng(0)
    steps = (step("Resize", size=(224, 224)), standardize(HALF, HALF))
    loaded = Loaded(
        module=module,
        variables=jax.tree.map(lambda x: random.random(x.shape, np.float32), shapes),
        preprocess=Preprocessing(steps),
        labels=(),
        source=model,
        recipe=Recipe("drawn", {}, names.Ours(), 1000),
    )
    hf.save(loaded, folder)


def resident() -> int:
    """Bytes of this process in memory, mapped files included (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(folder: str, dtype: str) -> dict:
    """Opens the checkpoint in this process, looking at its memory every two milliseconds."""
    import jax
    import jax.numpy as jnp

    import vit_jax
    from vit_jax.pretrained.load import open_checkpoint

    jnp.zeros(3).block_until_ready()
    open_checkpoint(folder).match(open_checkpoint(folder).module())  # what is imported on the way
    before, peak, done = resident(), 0, False

    def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    loaded = vit_jax.load(folder, dtype=dtype)
    seconds = time.monotonic() - began
    done = True
    watcher.join()
    size = sum(x.nbytes for x in jax.tree.leaves(loaded.variables))
    return {
        "dtype": dtype,
        "parameters_mb": round(size / 1e6),
        "peak_mb": round((peak - before) / 1e6),
        "ratio": round((peak - before) / size, 2),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_l16")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make(options.model, Path(folder))
        for dtype in DTYPES:  # each in a process of its own
            command = [sys.executable, __file__, "--measure", folder, dtype]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"model": options.model} | json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    (Path(__file__).parent / "result.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
