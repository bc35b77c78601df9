from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from vit_jax import mesh, step
from vit_jax.tasks.classification import Classification


class Small(nn.Module):
    """A classifier with everything a step must carry: parameters, statistics and dropout."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, image, *, train):
        x = image.reshape(image.shape[0], -1)
        x = nn.Dense(8, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(self.rate, deterministic=not train)(nn.tanh(x))
        return nn.Dense(3)(x)


def batch_of(rows=8, seed=0):
    random = np.random.default_rng(seed)
    return {
        "image": random.normal(size=(rows, 2, 3, 3)).astype(np.float32),
        "label": random.integers(0, 3, rows).astype(np.int32),
        "valid": np.ones(rows, bool),
    }


def parts(rate=0.0, ema=False):
    model, task, optimizer = Small(rate), Classification(), optax.adamw(1e-2)
    variables = step.init_variables(jax.random.key(0), batch_of(), model=model)
    state = step.init_state(variables, optimizer=optimizer, ema=ema)
    function = partial(step.train_step, model=model, task=task, optimizer=optimizer)
    return state, function


def test_a_model_reads_the_batch_entries_its_signature_names():
    class Reader(nn.Module):
        def __call__(self, image, tokens=None, *, train):
            return image

    assert set(step.inputs(Reader(), {"image": 1, "label": 2})) == {"image"}
    assert set(step.inputs(Reader(), {"image": 1, "tokens": 2})) == {"image", "tokens"}
    with pytest.raises(ValueError, match="reads 'image'; the batch has label"):
        step.inputs(Reader(), {"label": 2})


class FirstPicture(nn.Module):
    """Parameters that begin as the first picture seen is, which no architecture here does."""

    @nn.compact
    def __call__(self, image, *, train):
        mean = self.param("mean", lambda _: image.mean() + 3.0)
        mean *= self.param("scale", lambda _: jnp.float32(2.5))  # CLIP's temperature is such a one
        return nn.Dense(3)(image.reshape(image.shape[0], -1) - mean)


@pytest.mark.parametrize(
    ("model", "products"),
    [(Small(), 18 * 8 + 8 * 3), (FirstPicture(), 18 * 3)],
    ids=["small", "first"],
)
def test_first_variables_are_computed_without_the_forward_pass_that_found_them(model, products):
    batch = {name: np.zeros_like(value) for name, value in batch_of().items()}
    task, key = Classification(), jax.random.key(3)
    shapes, compute, flops = step.traced(
        partial(step.init_and_score, model=model, task=task), jax.random.key(0), batch
    )
    expected = jax.jit(partial(step.init_variables, model=model))(key, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, expected)
    chex.assert_trees_all_close(jax.jit(compute)(key), expected, rtol=1e-6)
    assert "dot_general" not in str(jax.make_jaxpr(compute)(key))
    assert flops == 2 * len(batch["image"]) * products


def test_randomness_is_a_function_of_key_and_step():
    state, function = parts(rate=0.5)
    run = jax.jit(function)
    first, again = (run(state, batch_of(), key=jax.random.key(1))[1] for _ in range(2))
    later = run(state.replace(step=jnp.int32(7)), batch_of(), key=jax.random.key(1))[1]
    chex.assert_trees_all_equal(first, again)
    assert first["loss"] != later["loss"]


def test_accumulated_parts_give_the_sums_of_the_whole_batch_and_its_gradient():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, image, *, train):
            return nn.Dense(3)(image.reshape(image.shape[0], -1))

    batch = batch_of()
    batch["valid"][1:4] = False  # the parts count unequal numbers of rows
    optimizer = optax.sgd(1.0)
    variables = step.init_variables(jax.random.key(0), batch, model=Plain())
    state = step.init_state(variables, optimizer=optimizer)
    run = partial(
        step.train_step,
        model=Plain(),
        task=Classification(),
        optimizer=optimizer,
        key=jax.random.key(0),
    )
    whole, sums = run(state, batch)
    cut, cut_sums = run(state, batch, accumulate=4)
    chex.assert_trees_all_close(cut.params, whole.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(cut_sums, sums, rtol=1e-5)


def test_one_device_and_two_agree():
    state, function = parts()
    outcomes = []
    for count in (1, 2):
        devices = mesh.make_mesh(devices=jax.devices()[:count])
        run = jax.jit(function, out_shardings=mesh.replicated(devices))
        now = jax.device_put(state, mesh.replicated(devices))
        for i in range(4):
            now, _ = run(now, mesh.put_batch(batch_of(seed=i), devices), key=jax.random.key(0))
        outcomes.append(jax.device_get(now))
    chex.assert_trees_all_close(*outcomes, rtol=1e-5, atol=1e-6)


def test_an_update_that_is_not_finite_is_not_made():
    state, function = parts(ema=True)
    batch = batch_of()
    batch["image"][0, 0, 0, 0] = np.nan
    new, sums = jax.jit(partial(function, ema_decay=0.9))(state, batch, key=jax.random.key(0))
    assert sums["finite"] == 0
    assert new.step == 1
    chex.assert_trees_all_equal(new.replace(step=state.step), state)


def test_the_guard_changes_no_bit_of_a_good_update():
    state, function = parts()
    batch, key = batch_of(), jax.random.key(0)
    new, sums = jax.jit(function)(state, batch, key=key)

    @jax.jit
    def plain(state, batch):
        def loss_of(params):
            outputs, updated = Small().apply(
                {"params": params, **state.model_state},
                batch["image"],
                train=True,
                rngs={"dropout": jax.random.fold_in(key, state.step)},
                mutable=["batch_stats"],
            )
            return Classification().score(outputs, batch)[0], updated

        grads, _ = jax.grad(loss_of, has_aux=True)(state.params)
        updates, _ = optax.adamw(1e-2).update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates)

    assert sums["finite"] == 1
    chex.assert_trees_all_equal(new.params, plain(state, batch))


def test_the_mean_of_parameters_and_statistics_lags_behind_them():
    state, function = parts(ema=True)
    new, _ = jax.jit(partial(function, ema_decay=0.9))(state, batch_of(), key=jax.random.key(0))
    old, now, mean = (t["Dense_0"]["kernel"] for t in (state.params, new.params, new.ema["params"]))
    share = np.asarray((mean - old) / (now - old))
    np.testing.assert_allclose(
        share, np.full_like(share, 0.9), rtol=1e-3
    )  # (1 + 0) / (10 + 0) stays
    assert "batch_stats" in new.ema


def test_evaluation_predicts_and_sums_without_touching_the_state():
    state, _ = parts(rate=0.5)
    variables = {"params": state.params, **state.model_state}
    evaluate = partial(step.eval_step, model=Small(0.5), task=Classification())
    sums, predictions = evaluate(variables, batch_of())
    again, _ = evaluate(variables, batch_of())
    chex.assert_trees_all_equal(sums, again)
    assert predictions["label"].shape == (8,)
