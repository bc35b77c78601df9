import contextlib
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import pallas as pl

from vit_jax import cost
from vit_jax.errors import ConfigError
from vit_jax.layers import fused
from vit_jax.layers.attention import Attention, attend
from vit_jax.mesh import make_mesh


def draw(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.fixture
def fused_calls(monkeypatch):
    """A GPU whose library computes what JAX does, and the shapes that it was asked for."""
    shapes, true = [], jax.nn.dot_product_attention

    def library(query, key, value, bias=None, *, implementation, **options):
        assert implementation == "cudnn"
        biases = [] if bias is None else [bias]
        assert {x.dtype for x in (query, key, value, *biases)} == {jnp.dtype("bfloat16")}
        shapes.append((query.shape, key.shape, *(x.shape for x in biases)))
        return true(query, key, value, bias, **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", library)
    monkeypatch.setenv(fused.VARIABLE, "fused")
    yield shapes
    fused.cudnn.clear_cache()


@pytest.mark.parametrize("tokens", [7, 8])
def test_the_fused_form_is_the_plain_one_over_any_leading_axes(tokens, fused_calls, monkeypatch):
    x, other = (jnp.asarray(x, jnp.bfloat16) for x in draw((2, 3, 5, 16), (2, 3, tokens, 16)))
    module = Attention(heads=2, scale=0.2, dtype=jnp.bfloat16)
    variables = jax.jit(partial(module.init, train=False))(jax.random.key(0), x, other)

    def value_and_gradient():
        def loss(variables):
            out = module.apply(variables, x, other, train=True)
            return (out.astype(jnp.float32) ** 2).sum(), out

        return jax.jit(jax.grad(loss, has_aux=True))(variables)

    fused.cudnn.clear_cache()
    fused_calls.clear()
    found = value_and_gradient()
    assert fused_calls == [((6, 6, 2, 8), (6, tokens + tokens % 2, 2, 8))]
    monkeypatch.setenv(fused.VARIABLE, "plain")
    wanted = value_and_gradient()
    assert len(fused_calls) == 1
    for got, right in zip(found, wanted, strict=True):  # gradients, then values
        difference = jax.tree.map(jnp.subtract, got, right)
        assert optax.tree.norm(difference) < 0.02 * optax.tree.norm(right)


@pytest.mark.parametrize(
    ("shape", "seen"),
    [
        ((2, 5, 5), (1, 2, 6, 6)),  # of Swin's windows that are not shifted, and BEiT's
        ((3, 2, 5, 5), (6, 2, 6, 6)),  # each of three windows has its own
        ((1, 1, 1, 5, 5), (1, 2, 6, 6)),
    ],
)
def test_a_bias_and_its_gradient_go_through_the_fused_form(shape, seen, fused_calls, monkeypatch):
    *arrays, bias = draw(*[(2, 3, 5, 2, 8)] * 3, shape)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in arrays]

    def value_and_gradients():
        def loss(arrays, bias):
            out, _ = attend(*arrays, scale=0.3, bias=bias, want_weights=False)
            return (out.astype(jnp.float32) ** 2).sum(), out

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(arrays, bias)

    fused.cudnn.clear_cache()
    found = value_and_gradients()
    assert fused_calls == [((6, 6, 2, 8), (6, 6, 2, 8), seen)]
    monkeypatch.setenv(fused.VARIABLE, "plain")
    wanted = value_and_gradients()
    for got, right in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert got.shape == right.shape
        difference = got.astype(jnp.float32) - right.astype(jnp.float32)
        assert jnp.linalg.norm(difference) < 0.03 * jnp.linalg.norm(right.astype(jnp.float32))


def test_a_bias_of_each_row_stays_plain_where_devices_share_the_rows(monkeypatch):
    monkeypatch.setattr(fused, "platform", lambda: "gpu")
    x = jax.ShapeDtypeStruct((2, 3, 5, 2, 8), jnp.bfloat16)
    of_all, of_each = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 5, 5), (3, 2, 5, 5)))
    assert fused.kernel(x, x, of_each) is fused.cudnn
    with jax.set_mesh(make_mesh({"data": 2})):
        assert fused.kernel(x, x, of_all) is fused.cudnn
        assert fused.kernel(x, x, of_each) is None


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({"dtype": jnp.float32}, {}),
        ({"heads": 4}, {}),  # of 4 channels
        ({"dropout": 0.5}, {"train": True, "rngs": {"dropout": jax.random.key(0)}}),
        ({}, {"mask": np.tri(5, dtype=bool)}),
        ({}, {"mutable": ["intermediates"]}),
    ],
    ids=["float32", "narrow heads", "dropout", "mask", "weights wanted"],
)
def test_what_the_fused_form_cannot_do_stays_plain(fields, arguments, fused_calls):
    module = Attention(**{"heads": 2, "dtype": jnp.bfloat16} | fields)
    (x,) = draw((1, 5, 16))
    variables = module.init(jax.random.key(0), x, train=False)
    fused.cudnn.clear_cache()
    fused_calls.clear()
    module.apply(variables, x, **{"train": False} | arguments)
    assert not fused_calls


def test_a_form_that_does_not_exist_is_named_with_the_nearest(monkeypatch):
    monkeypatch.setenv(fused.VARIABLE, "fusd")
    with pytest.raises(ConfigError, match=r"VIT_JAX_ATTENTION=fusd .* Did you mean 'fused'"):
        fused.form()


@pytest.fixture
def on_a_tpu(monkeypatch):
    """A TPU whose kernel is interpreted, and wanted for few tokens too."""
    flash = pytest.importorskip("jax.experimental.pallas.ops.tpu.flash_attention")
    monkeypatch.setattr(flash.pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(fused, "platform", lambda: "tpu")
    monkeypatch.setattr(fused, "LEAST", 1)
    monkeypatch.setenv(fused.VARIABLE, "fused")
    yield
    fused.pallas.clear_cache()


@pytest.mark.parametrize(
    ("queries", "keys", "axes"),
    [(7, 9, None), (3, 128, {"data": 2}), (5, 6, {"tensor": 2})],
    ids=["one device", "rows on two devices", "heads on two devices"],
)
def test_the_kernel_of_a_tpu_is_the_plain_form(queries, keys, axes, on_a_tpu):
    shapes = (2, 3, queries, 2, 16), (2, 3, keys, 2, 16), (2, 3, keys, 2, 16)
    arrays = tuple(draw(*shapes))

    def all_of(function):
        def both(arrays):
            out, pull = jax.vjp(partial(function, scale=0.3), *arrays)
            return out, pull(jnp.cos(out))

        return jax.jit(both)(arrays)

    with contextlib.nullcontext() if axes is None else jax.set_mesh(make_mesh(axes)):
        found = all_of(partial(fused.pallas, bias=None))
    wanted = all_of(lambda *arrays, scale: attend(*arrays, scale=scale)[0])
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "least", "fits"),
    [
        ((4, 6, 2, 16), 6, True),
        ((4, 6, 2, 16), 7, False),  # too few keys to be worth it
        ((3, 6, 2, 16), 6, False),  # rows that two devices do not divide
    ],
)
def test_the_kernel_of_a_tpu_is_for_many_keys_and_whole_rows(shape, least, fits, monkeypatch):
    monkeypatch.setattr(fused, "platform", lambda: "tpu")
    monkeypatch.setattr(fused, "LEAST", least)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    with jax.set_mesh(make_mesh({"data": 2})):
        assert (fused.kernel(x, x, None) is fused.pallas) == fits


def test_the_platform_is_that_of_the_mesh_around(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert fused.platform() == "gpu"
    with jax.set_mesh(make_mesh()):
        assert fused.platform() == "cpu"


def test_a_fused_form_costs_what_the_plain_one_does(on_a_tpu, monkeypatch):
    query, key = (jax.ShapeDtypeStruct((2, n, 2, 16), jnp.bfloat16) for n in (7, 9))

    def of_both(query, key):
        return attend(query, key, key, scale=0.3, want_weights=False)

    assert cost.flops(of_both, query, key) == 2 * 2 * 2 * 7 * 9 * 2 * 16
    monkeypatch.setenv(fused.VARIABLE, "plain")
    assert cost.flops(of_both, query, key) == 2 * 2 * 2 * 7 * 9 * 2 * 16
