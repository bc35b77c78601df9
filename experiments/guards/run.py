"""What the guards of a run cost together, as a share of a step: see README.md."""

import sys
import time
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import checkpoint, faults, main, mesh, step
from vit_jax.run import set_up
from vit_jax.watchdog import Watchdog

STEPS = 60
SAVE_EVERY = 1000  # steps, over which the price of a save is spread


def unguarded(run):
    """The compiled step, in which no update is ever left out."""
    isfinite = step.jnp.isfinite
    step.jnp.isfinite = lambda x: jnp.ones_like(x, bool)
    try:
        return run.compile_train_step()
    finally:
        step.jnp.isfinite = isfinite


def seconds(function, repeat):
    """The least time of `repeat` calls, which is the one that nothing else disturbed."""
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def measure(argv):
    """Prints a table."""
    run = set_up(main.parse(argv)[0])
    compiled = {"with": run.compile_train_step(), "without": unguarded(run)}
    with closing(run.batches(0)) as batches:
        batch = mesh.put_batch(next(batches), run.mesh)
    states = {name: run.init() for name in compiled}
    times = {name: [] for name in compiled}
    for _ in range(STEPS):  # in turn, so that both meet the same disturbances
        for name, function in compiled.items():
            began = time.perf_counter()
            states[name], sums = function(states[name], batch, key=run.key)
            jax.block_until_ready((states[name], sums))
            times[name].append(time.perf_counter() - began)
    least = {name: min(values[2:]) for name, values in times.items()}
    middle = {name: float(np.median(values[2:])) for name, values in times.items()}
    a, b = (jax.tree.leaves(states[name]) for name in compiled)
    equal = all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    state, planned = states["with"], faults.read({})
    with Watchdog(1800.0) as watchdog:
        wind = seconds(lambda: [watchdog.alive() for _ in range(1000)], 5) / 1000
        watchdog._wound = 0.0
        wound = seconds(lambda: watchdog._wind(1800.0), 20)
    asked = seconds(lambda: [bool(planned) for _ in range(1000)], 5) / 1000
    checkpoint.digest(state)
    sealed = seconds(lambda: checkpoint.digest(state), 5)
    jax.block_until_ready(step.all_finite(state))
    looked = seconds(lambda: bool(step.all_finite(state)), 5)

    base = least["without"]
    rows = {
        "skipping in the graph": max(least["with"] - base, 0.0),
        "watchdog, asked each step": wind,
        "watchdog, wound once a second": wound * base,
        "faults, none": asked,
        f"digest, every {SAVE_EVERY} steps": sealed / SAVE_EVERY,
        f"all finite, every {SAVE_EVERY} steps": looked / SAVE_EVERY,
    }
    for name in compiled:
        print(
            f"{name} guards: least {1e3 * least[name]:.1f} ms, median {1e3 * middle[name]:.1f} ms"
        )
    print(f"states equal bit for bit: {equal}")
    for name, value in rows.items():
        print(f"{name:36} {1e6 * value:10.1f} us {100 * value / base:8.4f} %")
    total = sum(rows.values())
    print(f"{'together':36} {1e6 * total:10.1f} us {100 * total / base:8.4f} %")
    print(f"one digest {1000 * sealed:.1f} ms, one look {1000 * looked:.1f} ms")


if __name__ == "__main__":
    measure(sys.argv[1:] or ["--config=configs/vit.py:cifar10", "--config.data.name=digits"])
