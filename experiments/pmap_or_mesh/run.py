"""One training step under jax.pmap and under the mesh: equal numbers, time, lines of code.

python experiments/pmap_or_mesh/run.py [--devices=1,2,4,8] [--rounds=5] [--steps=10]
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
CONFIG = [
    *("--config=configs/vit.py", "--config.optimizer.name=adamw"),
    *("--config.learning_rate=1e-3", "--config.schedule.warmup_epochs=0"),
]
EQUAL = 1e-5  # largest difference of a loss, or of a parameter, that sums in another order explain


def under_the_mesh(run):
    """The project's own: the step knows nothing of devices."""
    from vit_jax import mesh

    return run.init(), run.compile_train_step(), partial(mesh.put_batch, mesh=run.mesh)


def under_pmap(run):
    """The same step, written for one device's rows: every number of the whole batch is summed."""
    import jax
    import jax.numpy as jnp
    import optax

    from vit_jax import mesh, step

    devices = list(run.mesh.devices.flat)

    def one_device(state, batch, key):
        key = jax.random.fold_in(jax.random.fold_in(key, state.step), jax.lax.axis_index("data"))

        def loss_of(params):
            outputs, updated = run.model.apply(
                {"params": params, **state.model_state},
                **step.inputs(run.model, batch),
                train=True,
                rngs={"dropout": key},
                mutable=list(state.model_state),
            )
            loss, sums = run.task.score(outputs, batch)
            # Devices may hold unequal numbers of valid rows: their losses are weighted by them.
            share = sums["count"] / jax.lax.psum(sums["count"], "data")
            return loss * share, (sums, dict(updated))

        (loss, (sums, model_state)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        loss, sums, grads = jax.lax.psum((loss, sums, grads), "data")
        model_state = jax.lax.pmean(model_state, "data")
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = run.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = step.TrainState(state.step + 1, params, model_state, opt_state, {})
        new = jax.tree.map(
            lambda n, o: jnp.where(finite, n, o), new, state.replace(step=state.step + 1)
        )
        return new, sums | {"grad_norm": grad_norm, "finite": finite.astype(jnp.float32)}

    def split(batch):
        rows = mesh.device_part(batch).items()
        return {k: v.reshape(len(devices), -1, *v.shape[1:]) for k, v in rows}

    def copies(x):
        return jnp.broadcast_to(x, (len(devices), *x.shape))

    state = jax.tree.map(copies, jax.device_get(run.init()))
    compiled = jax.pmap(
        one_device, axis_name="data", in_axes=(0, 0, None), devices=devices, donate_argnums=0
    )
    return state, lambda state, batch, key: compiled(state, batch, key), split


WAYS = {"mesh": under_the_mesh, "pmap": under_pmap}


def lines_of_code(function) -> int:
    """Lines that are neither blank, comment nor docstring."""
    source = inspect.getsource(function).replace(f'"""{function.__doc__}"""', "")
    lines = (line.strip() for line in source.splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def child(devices: int, rounds: int, steps: int) -> dict:
    """Both ways on that many simulated devices, in turns."""
    sys.path.insert(0, str(HERE.parent.parent))
    import jax
    import numpy as np

    from vit_jax import main
    from vit_jax.run import set_up

    run = set_up(main.parse(CONFIG)[0], devices=jax.devices()[:devices])
    batches = run.batches(0)
    batches = [next(batches) for _ in range(steps)]
    key, ways, losses = run.key, {}, {}
    for name, prepare in WAYS.items():
        state, step, place = prepare(run)
        ways[name] = {"state": state, "step": step, "place": place, "seconds": []}
        losses[name] = []
        for batch in batches:
            state, sums = step(state, place(batch), key=key)
            sums = jax.device_get(sums)
            whole = {k: np.ravel(v)[0] for k, v in sums.items() if np.ndim(v) < 2}
            losses[name].append(float(whole["loss"] / whole["count"]))
        ways[name]["state"] = state
    params = {name: jax.device_get(way["state"].params) for name, way in ways.items()}
    first = jax.tree.map(lambda x: x[0], params["pmap"])
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), params["mesh"], first)
    for _ in range(rounds):
        for way in ways.values():
            placed = [way["place"](batch) for batch in batches]
            for batch in placed:
                began = time.perf_counter()
                way["state"], sums = way["step"](way["state"], batch, key=key)
                jax.block_until_ready(sums)
                way["seconds"].append(time.perf_counter() - began)
    return {
        "devices": devices,
        "loss_difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
        "parameter_difference": float(max(jax.tree.leaves(differences))),
        "last_loss": losses["mesh"][-1],
        "milliseconds": {n: 1000 * float(np.median(way["seconds"])) for n, way in ways.items()},
        "least_milliseconds": {n: 1000 * min(way["seconds"]) for n, way in ways.items()},
    }


def main() -> None:
    """Each number of devices in a process of its own; writes result.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", default="1,2,4,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.rounds, options.steps)))
        return
    rows = []
    for devices in map(int, options.devices.split(",")):
        flags = f"--xla_force_host_platform_device_count={devices}"
        arguments = [f"--child={devices}", f"--rounds={options.rounds}", f"--steps={options.steps}"]
        done = subprocess.run(
            [sys.executable, __file__, *arguments],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            cwd=HERE.parent.parent,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1])
        if max(rows[-1]["loss_difference"], rows[-1]["parameter_difference"]) > EQUAL:
            sys.exit(f"pmap and mesh differ by more than {EQUAL} on {devices} devices")
    lines = {name: lines_of_code(way) for name, way in WAYS.items()}
    result = {"steps": options.steps, "rounds": options.rounds, "lines": lines, "rows": rows}
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
