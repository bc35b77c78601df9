from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from vit_jax import optim
from vit_jax.errors import ConfigError

RATE = 0.1
CONSTANT = optax.constant_schedule(RATE)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def vit(depth=2, width=3, seed=0):
    """Parameters named as a small ViT's; few shapes, because each is compiled."""
    rng = np.random.default_rng(seed)

    def dense():
        return {"kernel": rng.normal(size=(width, width)), "bias": rng.normal(size=width)}

    backbone = {
        "embed": dense(),
        "class_token": rng.normal(size=(1, 1, width)),
        "position": rng.normal(size=(1, 5, width)),
        "norm": {"scale": rng.normal(size=width), "bias": rng.normal(size=width)},
        **{f"block_{i}": {"mlp": dense()} for i in range(depth)},
    }
    tree = {"backbone": backbone, "head": dense()}
    return jax.tree.map(lambda x: x.astype(np.float32), tree)


def scanned(params):
    """The same with all blocks stacked in `blocks`."""
    backbone = dict(params["backbone"])
    blocks = [backbone.pop(k) for k in sorted(backbone) if k.startswith("block_")]
    backbone["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    return params | {"backbone": backbone}


def by_name(tree):
    return dict(zip(optim.names(tree), jax.tree.leaves(tree), strict=True))


def run(params, gradients, spec):
    """The updates of one step for each gradient, and the last state."""
    optimizer = optim.make(spec, params=params, schedule=CONSTANT)
    state, every = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        every.append(updates)
    return every, state


def first_update(params, gradient, **spec):
    return run(params, [gradient], spec)[0][0]


def count(state):
    return sum(np.size(x) for x in jax.tree.leaves(state))


# Durations and schedules


@pytest.mark.parametrize(
    ("lengths", "steps"),
    [
        ({"steps": 7, "examples": 999, "epochs": 9.0}, 7),
        ({"examples": 999, "epochs": 9.0}, 99),
        ({"epochs": 3.0}, 31),  # 3 * 105 examples are 31 batches and a half
        ({"epochs": 0.29}, 3),
        ({"epochs": 0.001}, 1),
        ({"examples": 1}, 1),
    ],
)
def test_a_duration_is_the_first_length_that_is_set_in_whole_batches(lengths, steps):
    assert optim.duration("run", **lengths, examples_per_epoch=105, batch_size=10) == steps


def test_epochs_count_as_the_decimal_number_that_was_written():
    assert 0.29 * 100 < 29
    assert optim.duration("run", epochs=0.29, examples_per_epoch=100, batch_size=1) == 29


def test_only_what_may_be_left_out_lasts_no_step():
    size = {"examples_per_epoch": 105, "batch_size": 10}
    assert optim.duration("warmup", **size, may_be_zero=True) == 0
    with pytest.raises(ConfigError, match="training: one of steps, examples and epochs"):
        optim.duration("training", **size)


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"examples": -1}, {"epochs": float("nan")}])
def test_a_duration_that_is_none_is_refused_with_its_name(wrong):
    with pytest.raises(ConfigError, match=f"warmup: {next(iter(wrong))}="):
        optim.duration("warmup", **wrong, examples_per_epoch=9, batch_size=2, may_be_zero=True)


def test_a_duration_needs_a_batch():
    with pytest.raises(ConfigError, match="batch_size=0 must be at least 1"):
        optim.duration("training", epochs=1.0, examples_per_epoch=9, batch_size=0)


@pytest.mark.parametrize(
    ("name", "values"),
    [  # at steps 0, 2, 4 (the peak), 7, 10, 99, by hand
        ("cosine", [0.4, 1.2, 2.0, 0.2 + 1.8 * (1 + 0.5) / 2, 0.2 + 1.8 * (1 - 0.5) / 2, 0.2]),
        ("linear", [0.4, 1.2, 2.0, 2 - 1.8 / 3, 2 - 1.8 * 2 / 3, 0.2]),
        ("polynomial", [0.4, 1.2, 2.0, *(0.2 + 1.8 * (1 - t) ** 0.7 for t in (1 / 3, 2 / 3)), 0.2]),
        ("steps", [0.4, 1.2, 2.0, 0.5, 0.125, 0.125]),  # after 7 and after 10 of 13 steps
        ("constant", [0.4, 1.2, 2.0, 2.0, 2.0, 2.0]),
    ],
)
def test_a_schedule_warms_up_on_a_line_and_then_decays(name, values):
    rate = optim.schedule(
        name=name,
        learning_rate=2.0,
        total_steps=13,
        warmup_steps=4,
        final=0.2,
        warmup_from=0.4,
        power=0.7,
        drops=(0.55, 0.75),
        drop_to=0.25,
    )
    steps = [0, 2, 4, 7, 10, 99]
    np.testing.assert_allclose([rate(s) for s in steps], values, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(rate))(jnp.array(steps)), values, rtol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "polynomial", "steps", "constant"])
def test_a_schedule_may_be_all_warmup_or_none(name):
    common = {"name": name, "learning_rate": 0.5, "total_steps": 2, "drops": (0.9,), "drop_to": 1.0}
    assert [float(optim.schedule(**common, warmup_steps=2)(s)) for s in (0, 1, 2)] == [0, 0.25, 0.5]
    assert float(optim.schedule(**common, warmup_steps=0)(0)) == 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "cosin"}, "schedule.name='cosin' does not exist. Did you mean 'cosine'"),
        ({"warmup_steps": 11}, "warmup_steps=11 must lie between 0 and the 10 steps"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must lie"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a finite number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"final": 0.6}, r"schedule.final=0.6 must lie in \[0, learning_rate=0.5\]"),
        ({"warmup_from": -0.1}, "schedule.warmup_from=-0.1 must lie"),
        ({"power": 0.0}, "schedule.power=0.0 must be above 0"),
        ({"drops": (0.8, 0.5)}, r"schedule.drops=\(0.8, 0.5\) must be shares of the run"),
        ({"drops": (1.0,)}, "schedule.drops"),
        ({"drop_to": 0.0}, "schedule.drop_to=0.0 must lie"),
        ({"name": "steps"}, "needs schedule.drops"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(wrong, message):
    right = {"name": "cosine", "learning_rate": 0.5, "total_steps": 10, "warmup_steps": 1}
    with pytest.raises(ConfigError, match=message):
        optim.schedule(**right | wrong)


# Optimizers, by arithmetic


def test_adamw_is_adam_plus_decay_in_proportion_to_the_learning_rate():
    b1, b2, eps, decay = 0.8, 0.9, 1e-3, 0.05
    p, gradients = normal(0, 3, 4), [normal(1, 3, 4), normal(2, 3, 4)]
    spec = {"b1": b1, "b2": b2, "epsilon": eps, "weight_decay": decay}
    updates, _ = run({"kernel": p}, [{"kernel": g} for g in gradients], spec)
    m = v = np.zeros_like(p)
    for t, (g, update) in enumerate(zip(gradients, updates, strict=True), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        adam = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        expected = -RATE * (adam + decay * p)
        np.testing.assert_allclose(update["kernel"], expected, rtol=1e-5)
        p = p + expected


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_adds_decay_to_the_gradient_before_the_momentum(nesterov):
    decay, momentum = 0.05, 0.7
    p, gradients = normal(0, 3, 4), [normal(1, 3, 4), normal(2, 3, 4)]
    spec = {"name": "sgd", "momentum": momentum, "nesterov": nesterov, "weight_decay": decay}
    updates, _ = run({"kernel": p}, [{"kernel": g} for g in gradients], spec)
    velocity = np.zeros_like(p)
    for g, update in zip(gradients, updates, strict=True):
        g = g + decay * p
        velocity = momentum * velocity + g
        expected = -RATE * (g + momentum * velocity if nesterov else velocity)
        np.testing.assert_allclose(update["kernel"], expected, rtol=1e-5)
        p = p + expected


def test_sgd_without_momentum_keeps_no_velocity():
    params = {"kernel": normal(0, 30, 40)}
    _, state = run(params, [params], {"name": "sgd", "momentum": 0.0})
    assert count(state) == 1  # the schedule's step


def test_lamb_makes_each_update_as_long_as_its_parameter():
    params, gradients = vit(seed=0), vit(seed=1)
    updates = by_name(first_update(params, gradients, name="lamb", weight_decay=0.3))
    for name, p in by_name(params).items():
        g = by_name(gradients)[name]
        direction = g / (np.abs(g) + 1e-8) + (0.3 * p if name.endswith("kernel") else 0)
        direction *= np.linalg.norm(p) / np.linalg.norm(direction)
        np.testing.assert_allclose(updates[name], -RATE * direction, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("form", [lambda p: p, scanned])
def test_muon_turns_matrices_in_blocks_and_leaves_the_rest_to_adam(form):
    params, gradients = form(vit(width=8, seed=0)), form(vit(width=8, seed=1))
    updates = by_name(first_update(params, gradients, name="muon", b1=0.9, b2=0.999))
    turned = 0
    for name, g in by_name(gradients).items():
        if "block" in name and name.endswith("kernel"):
            turned += 1
            stretch = np.linalg.svd(updates[name] / RATE, compute_uv=False)
            size = 0.2 * max(g.shape[-2:]) ** 0.5  # all directions alike, as large as adamw's
            assert (stretch > 0.5 * size).all(), name
            assert (stretch < 1.3 * size).all(), name
        else:
            np.testing.assert_allclose(updates[name], -RATE * np.sign(g), rtol=1e-4, err_msg=name)
    assert turned


@pytest.mark.parametrize("on", [True, False])
def test_muon_turns_convolutions_of_maps_where_asked_to(on):
    shapes = {  # the first two are alike, and small: not to be laid on each other
        "stage_1": {"conv": {"kernel": (3, 3, 6, 8)}, "other": {"kernel": (3, 3, 6, 8)}},
        "depthwise": {"kernel": (3, 3, 1, 8)},
        "embed": {"kernel": (4, 4, 3, 8), "bias": (8,)},
        "block_0": {"conv": {"kernel": (1, 1, 40, 8)}, "query": {"kernel": (8, 8)}},
    }
    trees = []
    for seed in range(2):
        leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
        trees.append(structure.unflatten([normal(9 * seed + i, *s) for i, s in enumerate(leaves)]))
    params, gradients = trees
    updates = by_name(first_update(params, gradients, name="muon", muon_convolutions=on, b1=0.9))
    for name, g in by_name(gradients).items():
        if "query" in name or (on and "conv" in name) or (on and "other" in name):
            stretch = np.linalg.svd(updates[name].reshape(-1, 8) / RATE, compute_uv=False)
            size = 0.2 * max(g.size // 8, 8) ** 0.5
            assert (stretch > 0.5 * size).all(), name
            assert (stretch < 1.3 * size).all(), name
        else:
            np.testing.assert_allclose(updates[name], -RATE * np.sign(g), rtol=1e-4, err_msg=name)


def test_adafactor_starts_with_signs_and_decays_by_mask():
    params, gradients = vit(seed=0), vit(seed=1)
    updates = by_name(first_update(params, gradients, name="adafactor", b1=0.6, weight_decay=0.3))
    for name, p in by_name(params).items():
        decay = 0.3 * p if name.endswith("kernel") else 0
        expected = -RATE * (0.4 * np.sign(by_name(gradients)[name]) + decay)
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5, err_msg=name)


def test_adafactor_forgets_at_most_as_slowly_as_b2():
    p, gradients = normal(0, 2, 3), [normal(s, 2, 3) for s in range(1, 7)]
    spec = {"name": "adafactor", "b1": 0.0, "b2": 0.6}
    updates, _ = run({"kernel": p}, [{"kernel": g} for g in gradients], spec)
    v = 0.0
    for t, g in enumerate(gradients, 1):
        forget = min(0.6, 1 - t**-0.8)  # capped from the fourth step on
        v = forget * v + (1 - forget) * g**2
    np.testing.assert_allclose(updates[-1]["kernel"], -RATE * g / np.sqrt(v), rtol=1e-4)


def test_adafactor_keeps_rows_columns_and_half_a_momentum():
    params = {"kernel": jnp.zeros((130, 150))}
    spec = {"name": "adafactor", "b1": 0.9}
    state = jax.eval_shape(optim.make(spec, params=params, schedule=CONSTANT).init, params)
    sizes = sorted((s.size, str(s.dtype)) for s in jax.tree.leaves(state) if s.size > 1)
    assert sizes == [(130, "float32"), (150, "float32"), (130 * 150, "bfloat16")]


def test_the_gradient_is_clipped_before_everything_else():
    params = {"a": normal(0, 3, 4), "b": normal(1, 5)}
    gradients = {"a": normal(2, 3, 4), "b": normal(3, 5)}
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    spec = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.5}
    clipped = first_update(params, gradients, **spec, clip=0.25)
    expected = -RATE * (gradients["a"] * 0.25 / norm + 0.5 * params["a"])
    np.testing.assert_allclose(clipped["a"], expected, rtol=1e-5)
    free = first_update(params, gradients, **spec, clip=float(norm) * 1.01)
    chex.assert_trees_all_close(free, first_update(params, gradients, **spec))


def test_the_schedule_is_read_at_the_number_of_updates_so_far():
    params = {"kernel": normal(0, 2, 3)}
    optimizer = optim.make(
        {"name": "sgd", "momentum": 0.0}, params=params, schedule=lambda step: 0.5 + step
    )
    state = optimizer.init(params)
    for step in range(3):
        updates, state = optimizer.update(params, state, params)
        np.testing.assert_allclose(updates["kernel"], -(0.5 + step) * params["kernel"], rtol=1e-6)


# Parameters by name


def decayed(params, **spec):
    """Names of what weight decay moves where there is no gradient."""
    updates = first_update(params, jax.tree.map(np.zeros_like, params), weight_decay=0.5, **spec)
    for name, update in by_name(updates).items():
        p = by_name(params)[name]
        assert not np.any(update) or np.allclose(update, -RATE * 0.5 * p), name
    return {name for name, update in by_name(updates).items() if np.any(update)}


@pytest.mark.parametrize("shape", [lambda p: p, scanned])
def test_by_default_only_matrices_decay(shape):
    params = shape(vit())
    assert decayed(params) == {n for n in optim.names(params) if n.endswith("kernel")}


def test_swins_position_table_does_not_decay_and_a_relative_of_its_name_does():
    table = normal(0, 9, 2)
    params = {"block_0": {"relative_position_bias": table, "compositional": {"kernel": table}}}
    assert decayed(params) == {"block_0/compositional/kernel"}


def test_no_decay_replaces_the_default_but_one_axis_never_decays_unless_asked():
    params, every = vit(), set(optim.names(vit()))
    flat = {n for n, p in by_name(params).items() if p.ndim == 1}
    assert decayed(params, no_decay="") == every - flat
    assert decayed(params, no_decay="", decay_1d=True) == every
    assert decayed(params, no_decay="^head/", decay_1d=True) == every - {"head/kernel", "head/bias"}


def test_one_axis_of_a_scanned_block_is_one_axis():
    params = scanned(vit())
    spared = {n for n, p in by_name(params).items() if p.ndim - ("/blocks/" in n) == 1}
    assert "backbone/blocks/mlp/bias" in spared
    assert decayed(params, no_decay="") == set(optim.names(params)) - spared


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "adafactor", "muon"])
def test_frozen_parameters_stay_and_hold_no_state_and_do_not_clip(name):
    params, gradients = vit(seed=0), vit(seed=1)
    head, head_gradients = {"head": params["head"]}, {"head": gradients["head"]}
    spec = {"name": name, "weight_decay": 0.3, "clip": 0.5}
    updates, state = run(params, [gradients], {**spec, "freeze": "^backbone/"})
    alone, alone_state = run(head, [head_gradients], spec)
    chex.assert_trees_all_equal(updates[0]["head"], alone[0]["head"])
    chex.assert_trees_all_equal(
        updates[0]["backbone"], jax.tree.map(np.zeros_like, params["backbone"])
    )
    assert count(state) == count(alone_state)


def test_trainable_is_what_the_pattern_does_not_match():
    params = vit()
    kept = by_name(optim.trainable(params, "embed|block_0"))
    assert [n for n, k in kept.items() if not k] == [
        n for n in optim.names(params) if "embed" in n or "block_0" in n
    ]
    assert all(jax.tree.leaves(optim.trainable(params, "")))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "adafactor", "muon"])
def test_lr_scale_multiplies_the_whole_update_by_every_factor_that_matches(name):
    params, gradients = vit(seed=0), vit(seed=1)
    spec = {"name": name, "weight_decay": 0.3}
    plain = by_name(first_update(params, gradients, **spec))
    pairs = [["^backbone/", 0.5], ("kernel", 3)]
    for key, update in by_name(first_update(params, gradients, **spec, lr_scale=pairs)).items():
        factor = (0.5 if key.startswith("backbone") else 1) * (3 if "kernel" in key else 1)
        np.testing.assert_allclose(update, factor * plain[key], rtol=1e-5, err_msg=key)


def test_lr_scale_and_layer_decay_multiply_and_leave_frozen_parameters_alone():
    params, gradients = vit(seed=0), vit(seed=1)
    spec = {"name": "sgd", "momentum": 0.0}
    updates = by_name(
        first_update(
            params, gradients, **spec, layer_decay=0.5, lr_scale=[("bias", 4)], freeze="^head/"
        )
    )
    for name, scale in by_name(optim.layer_scales(params, 0.5)).items():
        factor = 0 if name.startswith("head") else scale * (4 if name.endswith("bias") else 1)
        expected = -RATE * factor * by_name(gradients)[name]
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_a_clamped_parameter_stops_at_its_range_and_can_turn_back(name):
    params = {"logit_scale": jnp.float32(4.5), "head": {"kernel": jnp.ones((2, 2))}}
    spec = {"name": name, "clamp": (("^logit_scale$", 0.0, 4.6),), "momentum": 0.0}
    optimizer = optim.make(spec, params=params, schedule=optax.constant_schedule(0.3))
    state, seen = optimizer.init(params), []
    for sign in (-1, -1, 1):
        gradient = jax.tree.map(partial(jnp.full_like, fill_value=sign), params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(params["logit_scale"]))
    np.testing.assert_allclose(seen[:2], 4.6, rtol=1e-6)
    assert params["head"]["kernel"].max() != 1.0
    if name == "sgd":
        assert seen[2] == pytest.approx(4.3)
    low = optim.make(spec | {"name": "sgd"}, params=params, schedule=optax.constant_schedule(99.0))
    updates, _ = low.update(jax.tree.map(jnp.ones_like, params), low.init(params), params)
    assert float(optax.apply_updates(params, updates)["logit_scale"]) == pytest.approx(0, abs=1e-6)


def test_a_frozen_parameter_outside_its_range_stays():
    params = {"logit_scale": jnp.float32(9.0), "kernel": jnp.ones((2, 2))}
    spec = {"name": "sgd", "clamp": (("logit_scale", 0.0, 4.6),), "freeze": "logit_scale"}
    updates = first_update(params, jax.tree.map(jnp.ones_like, params), **spec)
    assert float(updates["logit_scale"]) == 0.0


# Layer decay; the exponents are L + 1 - layer, by hand


def exponents(**tree):
    tree = jax.tree.map(lambda shape: np.zeros(shape), tree, is_leaf=lambda x: isinstance(x, tuple))
    scales = by_name(optim.layer_scales(tree, 0.5))
    return {name: (-np.log2(scale)).squeeze().tolist() for name, scale in scales.items()}


def test_layers_of_a_vit_count_from_the_embedding_to_the_head():
    backbone = {f"block_{i}": {"w": (2, 3)} for i in range(11)}  # block_10 sorts before block_2
    backbone |= {"class_token": (1, 1, 3), "embed": {"kernel": (2, 3)}, "position": (1, 4, 3)}
    backbone |= {"norm": {"scale": (3,)}, "pre_norm": {"scale": (3,)}}
    found = exponents(backbone=backbone, head={"kernel": (3, 5)}, decoder={"block_0": {"w": (2,)}})
    expected = {f"backbone/block_{i}/w": 11 - i for i in range(11)}
    expected |= {"backbone/class_token": 12, "backbone/embed/kernel": 12, "backbone/position": 12}
    expected |= {"backbone/norm/scale": 0, "backbone/pre_norm/scale": 12, "head/kernel": 0}
    assert found == expected | {"decoder/block_0/w": 0}


def test_layers_of_a_swin_count_through_its_stages_and_merging_closes_the_stage_before():
    found = exponents(
        backbone={
            "embed": {"kernel": (2, 3)},
            "embed_norm": {"scale": (3,)},
            "stage_1": {"block_0": {"w": (2,)}, "block_1": {"w": (2,)}},
            "stage_2": {"block_0": {"w": (2,)}, "merge": {"reduction": {"kernel": (4, 2)}}},
            "norm": {"scale": (3,)},
        },
        head={"kernel": (3, 5)},
    )
    assert found == {
        "backbone/embed/kernel": 4,
        "backbone/embed_norm/scale": 4,
        "backbone/stage_1/block_0/w": 3,
        "backbone/stage_1/block_1/w": 2,
        "backbone/stage_2/merge/reduction/kernel": 2,
        "backbone/stage_2/block_0/w": 1,
        "backbone/norm/scale": 0,
        "head/kernel": 0,
    }


def test_layers_of_a_cvt_have_a_stages_embedding_and_token_with_its_first_block():
    stage = {"embed": {"kernel": (2, 3)}, "embed_norm": {"scale": (3,)}, "block_0": {"w": (2,)}}
    last = stage | {"block_1": {"w": (2,)}, "class_token": (1, 1, 3), "norm": {"scale": (3,)}}
    found = exponents(stage_1=stage, stage_2=last, norm={"scale": (3,)})
    assert found == {
        "stage_1/embed/kernel": 4,
        "stage_1/embed_norm/scale": 4,
        "stage_1/block_0/w": 3,
        "stage_2/embed/kernel": 2,
        "stage_2/embed_norm/scale": 2,
        "stage_2/class_token": 2,
        "stage_2/norm/scale": 2,
        "stage_2/block_0/w": 2,
        "stage_2/block_1/w": 1,
        "norm/scale": 0,
    }


def test_the_cnn_of_a_hybrid_lies_before_the_first_block():
    cnn = {"stage_1": {"block_0": {"w": (2,)}}}
    for stem in (cnn, {"cnn": cnn}):
        found = exponents(backbone={**stem, "block_0": {"w": (2,)}, "block_1": {"w": (2,)}})
        assert sorted(found.values()) == [1, 2, 3]
        assert next(v for k, v in found.items() if "stage_1" in k) == 3


def test_scanned_blocks_have_one_factor_a_layer():
    params = vit(depth=3)
    plain, loop = (optim.layer_scales(p, 0.7) for p in (params, scanned(params)))
    kernel = loop["backbone"]["blocks"]["mlp"]["kernel"]
    assert kernel.shape == (3, 1, 1)
    assert loop["backbone"]["blocks"]["mlp"]["bias"].shape == (3, 1)
    for i in range(3):
        assert np.isclose(kernel[i, 0, 0], plain["backbone"][f"block_{i}"]["mlp"]["kernel"])
    assert loop["backbone"]["embed"] == plain["backbone"]["embed"]


def test_scanned_pairs_of_blocks_alternate():
    found = exponents(
        stage_1={"blocks": {"block_0": {"w": (3, 5)}, "block_1": {"w": (3, 5)}}},
        stage_2={"block_0": {"w": (5,)}, "merge": {"kernel": (2, 2)}},
    )
    assert found == {
        "stage_1/blocks/block_0/w": [7, 5, 3],
        "stage_1/blocks/block_1/w": [6, 4, 2],
        "stage_2/block_0/w": 1,
        "stage_2/merge/kernel": 2,
    }


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_scanned_blocks_learn_as_separate_ones_do(name):
    params, gradients = vit(depth=3, seed=0), vit(depth=3, seed=1)
    spec = {"name": name, "weight_decay": 0.3, "clip": 1.0, "layer_decay": 0.7}
    plain = first_update(params, gradients, **spec)
    loop = first_update(scanned(params), scanned(gradients), **spec)
    chex.assert_trees_all_close(scanned(plain), loop, rtol=1e-5)


# The state


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "adafactor", "muon"])
def test_the_state_is_arrays_that_shapes_alone_can_plan_and_orbax_can_keep(name, tmp_path):
    params, gradients = vit(seed=0), vit(seed=1)
    spec = {"name": name, "freeze": "embed", "lr_scale": [("head", 2.0)], "weight_decay": 0.1}
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
    optimizer = optim.make(spec, params=shapes, schedule=CONSTANT)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    planned = jax.eval_shape(optimizer.init, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(planned, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        kept = checkpointer.restore(tmp_path / "state", planned)
    chex.assert_trees_all_equal(kept, state)


def test_the_same_steps_under_jit_give_the_same_bits():
    params, gradients = vit(seed=0), vit(seed=1)
    spec = {"weight_decay": 0.1, "clip": 1.0, "layer_decay": 0.8, "freeze": "position"}

    def steps():
        optimizer = optim.make(spec, params=params, schedule=CONSTANT)
        update, state, now = jax.jit(optimizer.update), optimizer.init(params), params
        for _ in range(3):
            updates, state = update(gradients, state, now)
            now = optax.apply_updates(now, updates)
        return now, state

    chex.assert_trees_all_equal(steps(), steps())


def test_the_running_mean_warms_up_and_copies_integers():
    mean = {"w": jnp.full((2, 3), 5.0), "seen": jnp.array(1)}
    new = {"w": jnp.full((2, 3), 15.0), "seen": jnp.array(8)}
    update = jax.jit(optim.update_ema, static_argnums=2)
    for step, weight in [(0, 0.9), (10, 9 / 20), (10**6, 0.001)]:
        found = update(mean, new, 0.999, jnp.array(step))
        np.testing.assert_allclose(found["w"], 5 + 10 * weight, rtol=1e-6)
        assert found["seen"] == 8
        assert found["seen"].dtype == new["seen"].dtype


def test_the_running_mean_of_a_constant_is_that_constant_bit_for_bit():
    w = {"w": jnp.asarray(normal(0, 7))}
    chex.assert_trees_all_equal(optim.update_ema(w, w, 0.9999, 123), w)


def test_the_running_mean_of_half_precision_weights_is_float32():
    mean = {"w": jnp.full(3, 1.001)}  # bfloat16 knows no number between 1 and 1.007
    found = optim.update_ema(mean, {"w": jnp.full(3, 3, jnp.bfloat16)}, 0.999, 10**6)["w"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1.001 + 0.001 * 1.999, rtol=1e-6)


# Bad input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight_deca": 0.1}, "optimizer.weight_deca does not exist. Did you mean 'weight_decay'"),
        ({"name": "adamW2"}, "optimizer.name='adamW2' does not exist. Did you mean 'adamw'"),
        ({"b1": 1.0}, r"optimizer.b1=1.0 must be a number in \[0, 1\)"),
        ({"b2": -0.1}, "optimizer.b2=-0.1"),
        ({"momentum": 1.0}, "optimizer.momentum=1.0"),
        ({"epsilon": 0.0}, "optimizer.epsilon=0.0 must be a number above 0"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay=-0.1 must be a number at least 0"),
        ({"weight_decay": "0.1"}, "optimizer.weight_decay='0.1' must be a number"),
        ({"clip": float("nan")}, "optimizer.clip=nan"),
        ({"layer_decay": 0.0}, r"optimizer.layer_decay=0.0 must be a number in \(0, 1\]"),
        ({"layer_decay": 1.1}, "optimizer.layer_decay=1.1"),
        ({"freeze": "^encoder/"}, r"freeze='\^encoder/' matches no parameter; there are backbone/"),
        ({"freeze": "(head"}, r"optimizer.freeze='\(head' is no regular expression: missing \)"),
        ({"freeze": "."}, "optimizer.freeze='.' leaves no parameter to train"),
        ({"no_decay": "biases", "weight_decay": 0.1}, "no_decay='biases' matches no parameter"),
        ({"no_decay": "["}, r"optimizer.no_decay='\[' is no regular expression"),
        ({"lr_scale": [("heads", 2.0)]}, "optimizer.lr_scale='heads' matches no parameter"),
        ({"lr_scale": [("*", 2.0)]}, r"optimizer.lr_scale='\*' is no regular expression"),
        ({"lr_scale": [("head", 0.0)]}, r"pairs .* not \('head', 0.0\); optimizer.freeze"),
        ({"lr_scale": [("head", "2")]}, "must hold pairs"),
        ({"lr_scale": ("head", 2.0)}, "must hold pairs .* not 'head'"),
        ({"clamp": [("heads", 0.0, 1.0)]}, "optimizer.clamp='heads' matches no parameter"),
        ({"clamp": [("head", 1.0, 0.0)]}, r"must hold triples .* not \('head', 1.0, 0.0\)"),
        ({"clamp": ("head", 0.0, 1.0)}, "must hold triples .* not 'head'"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        optim.make(wrong, params=vit(), schedule=CONSTANT)


def test_layer_decay_without_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"layer_decay needs .* there are head/bias, head/kernel"):
        optim.layer_scales({"head": {"bias": np.zeros(3), "kernel": np.zeros((2, 3))}}, 0.5)


def test_values_that_another_optimizer_reads_are_left_unread():
    params, gradients = vit(seed=0), vit(seed=1)
    plain = first_update(params, gradients, name="sgd")
    shared = first_update(params, gradients, name="sgd", b1=0.3, b2=0.4, epsilon=0.5)
    chex.assert_trees_all_equal(plain, shared)
