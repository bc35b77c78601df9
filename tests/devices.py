"""The same run on several meshes of simulated devices.

python -m tests.devices "--config=..." STEPS MESH ...

A mesh is such as `data=2,fsdp=4`; the first one is what the others are compared with. Prints one
JSON line a mesh: losses, the greatest difference of a parameter from the first mesh's, what one
device holds, and which examples each step saw.
"""

import json
import math
import os
import sys
from contextlib import closing

os.environ["JAX_PLATFORMS"] = "cpu"
# Tiny programs gain nothing from being optimised.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)

import jax
import numpy as np

from vit_jax import mesh
from vit_jax.main import parse
from vit_jax.run import set_up


def run_on(arguments: list[str], steps: int, axes: dict[str, int]) -> dict:
    """Some steps of a config on the first devices, as many as the axes multiply to."""
    config = parse(arguments)[0] | {"mesh": axes}
    run = set_up(config, devices=jax.devices()[: math.prod(axes.values())])
    state, train_step = run.init(), run.compile_train_step()
    losses, seen = [], []
    with closing(run.batches(0)) as batches:
        for _, batch in zip(range(steps), batches):
            state, sums = train_step(state, mesh.put_batch(batch, run.mesh), key=run.key)
            losses.append(float(sums["loss"] / sums["count"]))
            seen.append(batch["index"].tolist())
    held = jax.tree.leaves((state.params, state.opt_state))
    whole = sum(x.nbytes for x in held)
    own = sum(x.addressable_shards[0].data.nbytes for x in held)
    return {
        "losses": losses,
        "seen": seen,
        "params": jax.device_get((state.params, state.model_state)),
        "share": own / whole,
    }


def main() -> None:
    config, steps, *meshes = sys.argv[1:]
    first = None
    for spec in meshes:
        axes = {k: int(v) for k, v in (part.split("=") for part in spec.split(","))}
        result = run_on(config.split(), int(steps), axes)
        params = result.pop("params")
        first = params if first is None else first
        gaps = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b), initial=0)), params, first)
        result["gap"] = max(jax.tree.leaves(gaps))
        print(json.dumps({"mesh": spec, **result}), flush=True)


if __name__ == "__main__":
    main()
