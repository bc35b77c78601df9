"""Winograd's convolution is the plain one."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from vit_jax.layers import winograd as module
from vit_jax.layers.convolution import convolve
from vit_jax.layers.winograd import CHANNELS, PIXELS, pays, winograd


def plain(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def inputs(batch, height, width, channels=6, features=5):
    random = np.random.default_rng(0)
    x = random.normal(size=(batch, height, width, channels))
    kernel = random.normal(size=(3, 3, channels, features)) / np.sqrt(9 * channels)
    return jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)


def shapes(batch=1, height=32, width=32, channels=CHANNELS, features=CHANNELS, dtype=jnp.float32):
    return (
        jax.ShapeDtypeStruct((batch, height, width, channels), dtype),
        jax.ShapeDtypeStruct((3, 3, channels, features), dtype),
    )


def value_and_gradients(form, x, kernel):
    out, pull = jax.vjp(form, x, kernel)
    return out, pull(jnp.cos(out))


@pytest.mark.parametrize("strip", [None, 1, 2])
@pytest.mark.parametrize("size", [(2, 1, 1), (1, 6, 4), (3, 7, 10), (2, 10, 3)], ids=str)
def test_equals_the_plain_convolution_in_value_and_gradients(size, strip, monkeypatch):
    x, kernel = inputs(*size)
    if strip:  # so many rows of tiles at a time
        monkeypatch.setattr(module, "TILES", strip * 16 * -(-x.shape[2] // 2) * x.shape[3] * 4)
    chex.assert_trees_all_close(
        jax.jit(partial(value_and_gradients, winograd))(x, kernel),
        value_and_gradients(plain, x, kernel),
        rtol=1e-5,
        atol=1e-5,
    )


def test_of_many_channels_too():
    x, kernel = inputs(1, 9, 11, 512, 130)
    out, gradients = jax.jit(partial(value_and_gradients, winograd))(x, kernel)
    wanted, pull = jax.vjp(plain, x, kernel)
    chex.assert_trees_all_close(out, wanted, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(gradients, pull(jnp.cos(out)), rtol=1e-5, atol=3e-5)  # up to 33


def text(function, *arguments, platform="cpu"):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("form", [winograd, partial(value_and_gradients, winograd)])
def test_only_a_cpu_gets_it(form):
    x, kernel = inputs(2, 5, 8)
    assert "stablehlo.convolution" not in text(form, x, kernel)
    there = text(form, x, kernel, platform="tpu")
    assert "stablehlo.convolution" in there
    assert "stablehlo.dot_general" not in there


def test_it_pays_with_many_channels_and_pixels_in_float32_on_one_device():
    assert PIXELS == 32 * 32  # the smallest of `shapes`
    assert pays(*shapes())
    assert pays(*shapes(8, 14, 14, 256, 256))
    assert not pays(*shapes(channels=CHANNELS - 1))
    assert not pays(*shapes(features=CHANNELS - 1))
    assert not pays(*shapes(height=31))
    assert not pays(*shapes(dtype=jnp.bfloat16))
    x, _ = shapes()
    assert not pays(x, jax.ShapeDtypeStruct((5, 5, CHANNELS, CHANNELS), jnp.float32))
    (rows,) = jax.export.symbolic_shape("b")
    unknown = jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
    assert not pays(unknown, shapes()[1])
    with jax.set_mesh(Mesh(np.array(jax.devices()[:2]), ("data",))):
        assert not pays(*shapes())


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, True),
        ({"padding": 1}, True),
        ({"padding": 0}, False),
        ({"padding": 1, "stride": 2}, False),
        ({"padding": 2, "dilation": 2}, False),
    ],
)
def test_convolve_takes_it_where_it_fits(options, chosen):
    jaxpr = str(jax.make_jaxpr(partial(convolve, **options))(*shapes()))
    assert ("custom_vjp_call" in jaxpr) == chosen
