"""How long does a save of a ViT-L hold up the loop, and how long is a step? See README.md."""

import tempfile
import time

import jax

from vit_jax import checkpoint, main, mesh, step
from vit_jax.run import set_up
from vit_jax.standin import StandIn

ARGUMENTS = ["--config=experiments/launch/pod.py:l16", "--config.batch_size=2"]


def timed(function, *arguments):
    """Seconds and result."""
    began = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began, result


def measure():
    splits = [StandIn(8, 1000, "classification")] * 2
    run = set_up(main.parse(ARGUMENTS)[0], splits=splits)
    state, function = run.init(), run.compile_train_step()
    print(f"state: {sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9:.2f} GB")
    batch = mesh.put_batch(next(iter(run.batches(0))), run.mesh)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = checkpoint.Checkpoints(folder, keep_last=1)
        for number in (1, 2, 3):
            a_step, (state, _) = timed(lambda s: function(s, batch, key=run.key), state)
            looked, _ = timed(step.all_finite, state)
            held, _ = timed(checkpoints.save, number, state)
            written, _ = timed(checkpoints.wait)
            print(
                f"step {a_step:.2f} s; save holds up the loop for {looked + held:.2f} s, is on the "
                f"disk {written:.2f} s later"
            )
        checkpoints.close()


if __name__ == "__main__":
    measure()
