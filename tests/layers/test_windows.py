import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.layers import windows


def test_windows_are_numbered_row_by_row_and_so_are_their_pixels():
    x = jnp.arange(24).reshape(1, 4, 6, 1)
    cut = windows.partition(x, 2)[0, :, :, 0]
    assert cut.shape == (6, 4)
    assert cut[1].tolist() == [2, 3, 8, 9]  # the second window of the upper row
    assert cut[3].tolist() == [12, 13, 18, 19]  # the first window of the lower row


def test_reverse_undoes_partition_without_mixing_images():
    x = jnp.arange(3.0 * 6 * 9 * 5).reshape(3, 6, 9, 5)
    chex.assert_trees_all_equal(windows.reverse(windows.partition(x, 3), 3, 6, 9), x)


@pytest.mark.parametrize(
    ("height", "width", "window", "shift"), [(6, 9, 3, 1), (8, 12, 4, 2), (10, 15, 5, 2)]
)
def test_shifted_pixels_see_only_those_that_were_near_before_the_shift(
    height, width, window, shift
):
    # Roll the coordinates themselves: neighbours stay within a window's side of each other, while
    # pixels brought together from opposite borders are further apart.
    rows = np.roll(np.arange(height), -shift)
    columns = np.roll(np.arange(width), -shift)
    wanted = []
    for top in range(0, height, window):
        for left in range(0, width, window):
            cells = [
                (rows[top + i], columns[left + j]) for i in range(window) for j in range(window)
            ]
            wanted.append(
                [
                    [abs(p[0] - q[0]) < window and abs(p[1] - q[1]) < window for q in cells]
                    for p in cells
                ]
            )
    wanted = np.where(np.asarray(wanted), 0.0, -100.0)
    chex.assert_trees_all_equal(windows.shift_bias(height, width, window, shift), wanted)


def test_relative_bias_of_window_two_by_hand():
    # Offsets query - key, row by row: (-1,-1) (-1,0) (-1,1) (0,-1) (0,0) (0,1) (1,-1) (1,0) (1,1).
    table = jnp.stack([jnp.arange(9.0), 10 * jnp.arange(9.0)], 1)
    wanted = np.array(
        [
            [4, 3, 1, 0],  # the upper left pixel as query: itself, right, below, diagonally below
            [5, 4, 2, 1],
            [7, 6, 4, 3],
            [8, 7, 5, 4],
        ]
    )
    bias = windows.relative_bias(table, 2)
    chex.assert_trees_all_equal(bias[0], wanted.astype(np.float32))
    chex.assert_trees_all_equal(bias[1], 10 * bias[0])


def test_a_smaller_window_gives_each_offset_the_same_number():
    table = jnp.arange(7.0 * 7 * 3).reshape(7 * 7, 3)  # window 4
    full = windows.relative_bias(table, 4).reshape(3, 4, 4, 4, 4)
    for window in (1, 2, 3):
        part = windows.relative_bias(table, window).reshape(3, *([window] * 4))
        chex.assert_trees_all_equal(part, full[:, :window, :window, :window, :window])


def test_gradient_of_the_table_counts_the_pairs_at_each_offset():
    grad = jax.grad(lambda table: windows.relative_bias(table, 3).sum())(jnp.zeros((25, 1)))
    counts = np.array([1, 2, 3, 2, 1])
    chex.assert_trees_all_equal(grad.reshape(5, 5), np.outer(counts, counts).astype(np.float32))


def test_logarithmic_offsets_by_hand():
    one = np.log2(9) / 3  # the largest offset is 8, and log2(8) is 3
    wanted = [[i, j] for i in (-one, 0, one) for j in (-one, 0, one)]
    np.testing.assert_allclose(windows.log_offsets(2), wanted, rtol=1e-6)
    # Made for windows of 5: a pixel is a quarter of their largest offset.
    middle = windows.log_offsets(3, made_for=5).reshape(5, 5, 2)[2]
    steps = np.sign([-2, -1, 0, 1, 2]) * np.log2(1 + np.array([4, 2, 0, 2, 4])) / 3
    np.testing.assert_allclose(middle, np.stack([np.zeros(5), steps], -1), rtol=1e-6)
    np.testing.assert_array_equal(windows.log_offsets(1), [[0, 0]])


def test_within_undoes_padding_and_shift():
    x = jnp.arange(2.0 * 5 * 7 * 3).reshape(2, 5, 7, 3)
    for shift in (0, 1):
        seen = {}

        def attention(tokens, bias, seen=seen):
            seen.update(tokens=tokens, bias=bias)
            return 2 * tokens

        out = windows.within(attention, x, jnp.zeros((4, 9, 9)), 3, shift)
        chex.assert_trees_all_equal(out, 2 * x)
        assert seen["tokens"].shape == (2, 6, 9, 3)  # 6x9 pixels in windows of 3x3
        assert seen["bias"].shape == ((6, 4, 9, 9) if shift else (4, 9, 9))
        assert seen["tokens"][0, 0, 0, 0] == x[0, shift, shift, 0]
