import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.layers.sine import sine_positions


def test_numbers_are_those_of_the_paper():
    mask = np.ones((1, 2, 3), bool)
    got = sine_positions(mask, 8)  # y at two frequencies, then x
    y, x = 2 * np.pi * 1 / 2, 2 * np.pi * 3 / 3  # the first of two rows, the last of three columns
    wanted = [f(place / scale) for place in (y, x) for scale in (1, 100) for f in (np.sin, np.cos)]
    chex.assert_trees_all_close(got[0, 0, 2], np.array(wanted, np.float32), atol=1e-5)


def test_an_image_has_its_positions_however_far_it_is_padded():
    mask = np.zeros((2, 5, 7), bool)
    mask[0, :4, :3] = mask[1, :5, :7] = True
    got = jax.jit(sine_positions, static_argnums=1)(mask, 12)
    assert got.shape == (2, 5, 7, 12)
    alone = sine_positions(np.ones((1, 4, 3), bool), 12)
    chex.assert_trees_all_close(got[:1, :4, :3], alone, atol=1e-6)
    assert jnp.isfinite(sine_positions(np.zeros((1, 2, 2), bool), 4)).all()


def test_a_width_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match="a width that 4 divides, not 10"):
        sine_positions(np.ones((1, 2, 2), bool), 10)
