from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from vit_jax import main, run, step
from vit_jax.cost import bytes_of, flops, human, parameters
from vit_jax.layers.attention import attend
from vit_jax.layers.convolution import depthwise_conv


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def matmul(x, w):
    return jnp.tanh(x @ w) + 1


def test_a_dense_layer_counts_its_product_and_not_its_bias():
    layer, x = nn.Dense(5), shape(2, 3, 7)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert flops(layer.apply, variables, x) == 2 * (2 * 3) * 7 * 5


def test_a_convolution_counts_output_pixels_times_kernel_times_a_groups_inputs():
    layer = nn.Conv(8, (3, 5), strides=(2, 1), padding=((1, 1), (2, 2)), feature_group_count=2)
    x = shape(2, 7, 9, 6)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert flops(layer.apply, variables, x) == 2 * (2 * 4 * 9 * 8) * (3 * 5 * 3)


def test_the_zeros_that_a_transposed_convolution_puts_in_are_no_work():
    def transposed(x, kernel):
        return jax.lax.conv_transpose(x, kernel, (2, 2), "VALID")

    # Each of the 3 x 5 inputs meets each of the 2 x 2 x 4 x 6 kernel entries once.
    assert flops(transposed, shape(1, 3, 5, 4), shape(2, 2, 4, 6)) == 2 * 15 * 2 * 2 * 4 * 6


def test_attention_counts_its_two_products():
    query, key = shape(2, 5, 3, 4), shape(2, 7, 3, 4)
    assert flops(lambda q, k: attend(q, k, k, scale=1.0), query, key) == 2 * (
        2 * (2 * 3 * 5 * 7 * 4)
    )


def test_a_depthwise_convolution_counts_though_a_cpu_runs_it_as_sums():
    count = flops(lambda x, k: depthwise_conv(x, k, 2, 1), shape(2, 7, 9, 4), shape(3, 3, 1, 4))
    assert count == 2 * (2 * 4 * 5 * 4) * 9


def test_a_scan_counts_all_rounds_and_a_while_one():
    x, w = shape(3, 5), shape(5, 5)
    one = 2 * 3 * 5 * 5
    assert flops(matmul, x, w) == one

    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (matmul(x, w), None), x, None, length=6)[0]

    def looped(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: matmul(x, w), x)

    assert flops(scanned, x, w) == 6 * one
    assert flops(looped, x, w) == one


def with_own_tangent(function):
    wrapped = jax.custom_jvp(function)
    wrapped.defjvps(None, None)
    return wrapped


def with_own_gradient(function):
    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(lambda *x: (wrapped(*x), x), lambda x, _: x)
    return wrapped


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, with_own_tangent, with_own_gradient])
def test_what_is_called_inside_counts(wrap):
    wrapped = wrap(matmul)
    assert flops(lambda x, w: wrapped(x, w) @ w, shape(3, 5), shape(5, 5)) == 2 * (2 * 3 * 25)


def test_of_a_choice_the_dearest_branch_counts():
    def choice(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x, lambda: matmul(x, w))

    assert flops(choice, shape(3, 5), shape(5, 5)) == 2 * 3 * 25


def test_a_gradient_counts_three_products_a_layer_but_two_for_the_first():
    x, w, v = shape(3, 5), shape(5, 7), shape(7, 2)

    def loss(weights, x):
        return (jnp.tanh(x @ weights[0]) @ weights[1]).sum()

    first, second = 2 * 3 * 5 * 7, 2 * 3 * 7 * 2
    assert flops(jax.grad(loss), (w, v), x) == 2 * first + 3 * second
    # A rematerialised forward pass is run again.
    again = flops(jax.grad(jax.checkpoint(loss)), (w, v), x)
    assert 2 * first + 3 * second < again <= 3 * first + 4 * second


def test_nothing_is_computed_for_a_count():
    huge = shape(10**6, 10**6)
    assert flops(jnp.matmul, huge, huge) == 2 * 10**18


def test_parameters_and_bytes_are_read_off_shapes():
    tree = {"a": shape(3, 5), "b": [shape(), shape(2, dtype=jnp.bfloat16)], "c": {}}
    assert parameters(tree) == 15 + 1 + 2
    assert bytes_of(tree) == 4 * 16 + 2 * 2
    assert bytes_of({"x": jnp.zeros((2, 3), jnp.int8)}) == 6


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 "),
        (12, "12 "),
        (999, "999 "),
        (1000, "1 k"),
        (19_990_000, "19.99 M"),
        (4_600_000_000, "4.6 G"),
        (999_990, "1 M"),
        (17.58e12, "17.58 T"),
        (2e21, "2000 E"),
    ],
)
def test_a_number_for_people_has_four_digits_and_a_prefix(number, text):
    assert human(number) == text


@pytest.mark.parametrize("name", ["cvt", "detr", "clip"])
def test_a_run_counts_one_forward_pass_of_one_picture(name):
    found = run.set_up(main.parse([f"--config=configs/{name}.py:tiny"])[0])
    one = {
        k: jax.ShapeDtypeStruct((1, *v.shape[1:]), v.dtype) for k, v in found.abstract_batch.items()
    }
    variables = {"params": found.abstract_state.params, **found.abstract_state.model_state}
    assert found.flops == flops(partial(step.forward, model=found.model), variables, one) > 0
