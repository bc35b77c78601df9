import jax
import numpy as np
import pytest

from vit_jax import mesh
from vit_jax.errors import ConfigError


def test_a_batch_is_split_by_rows_and_keeps_what_only_the_host_reads():
    devices = mesh.make_mesh()
    batch = {"image": np.arange(24.0).reshape(4, 2, 3), "index": np.arange(4)}
    placed = mesh.put_batch(batch, devices)
    assert set(placed) == {"image"}
    np.testing.assert_array_equal(placed["image"], batch["image"])
    assert [s.data.shape for s in placed["image"].addressable_shards] == [(2, 2, 3)] * 2


@pytest.mark.parametrize(
    ("size", "accumulate", "nearest"),
    [(7, 1, "6 or 8"), (10, 4, "8 or 16"), (1, 1, "2"), (0, 1, "2")],
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_does(size, accumulate, nearest):
    with pytest.raises(ConfigError, match=rf"batch_size={size} .*2 devices.*does: {nearest}$"):
        mesh.check_batch_size(size, mesh.make_mesh(), accumulate)


def test_a_batch_that_divides_passes():
    mesh.check_batch_size(16, mesh.make_mesh(), 4)


def test_the_mesh_is_described_in_one_line():
    text = mesh.describe(mesh.make_mesh(jax.devices()[:1]))
    assert text == "1 x cpu (data=1), 1 process"
