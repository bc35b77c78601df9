"""The loop between two evaluations does nothing but steps: no compilation, no hidden copies."""

import jax
import pytest

from vit_jax import main, mesh

CONFIG = "--config=configs/vit.py:tiny"
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # whether or not it is kept already
STEPS, SETTLED = 8, 3  # compiled by then: the step, what a logged row needs


@pytest.fixture
def compilations():
    """Programs compiled so far, as JAX itself counts them."""
    counted = []

    def listen(event, seconds, **_):
        if event == LOWERED:
            counted.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counted
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Trains; `at(n)` is called as step n, from 1, is about to be made."""

    def run(at):
        put, made = mesh.put_batch, []

        def put_batch(batch, devices, **options):
            made.append(batch)
            at(len(made))
            return put(batch, devices, **options)

        monkeypatch.setattr(mesh, "put_batch", put_batch)
        lines = [f"--config.steps={STEPS}", f"--config.eval_every={STEPS}", "--config.log_every=1"]
        return main.main([CONFIG, *lines, f"--workdir={tmp_path / 'run'}"])

    return run


def test_nothing_is_compiled_after_the_first_steps(run, compilations):
    seen = {}
    assert run(lambda step: seen.setdefault(step, len(compilations))) == 0
    assert seen[SETTLED] > 0
    assert seen[STEPS] == seen[SETTLED]


def test_a_batch_is_the_only_thing_that_travels_to_the_device_in_a_step(run):
    # What is copied without being asked for raises, from the third step to the last.
    def at(step):
        jax.config.update(
            "jax_transfer_guard_host_to_device",
            "disallow" if SETTLED <= step < STEPS else "allow",
        )

    try:
        assert run(at) == 0
    finally:
        jax.config.update("jax_transfer_guard_host_to_device", "allow")
