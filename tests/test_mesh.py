import math
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh

import vit_jax
from vit_jax import cost, mesh, step
from vit_jax.errors import ConfigError


def devices_of(hosts, each):
    """Stand-ins for the devices of several hosts, in the order of their numbers."""
    return [
        SimpleNamespace(process_index=i // each, id=i, platform="cpu", device_kind="cpu")
        for i in range(hosts * each)
    ]


def abstract(**axes):
    """A mesh of devices that nobody has."""
    sizes = tuple(axes.get(name, 1) for name in mesh.AXES)
    return AbstractMesh(sizes, mesh.AXES, axis_types=(AxisType.Auto,) * 3)


def spec_of(name, shape, axes, rules=()):
    tree = jax.ShapeDtypeStruct(shape, np.float32)
    for part in reversed(name.split("/")):
        tree = {part: tree}
    (leaf,) = jax.tree.leaves(mesh.lay_out(tree, tree, abstract(**axes), rules))
    return tuple(leaf.sharding.spec)


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
    text = mesh.describe(mesh.make_mesh(devices=jax.devices()[:1]))
    assert text == "1 x cpu (data=1), 1 process"


def test_one_axis_takes_what_the_others_leave():
    assert dict(mesh.make_mesh({"data": 1, "fsdp": -1}).shape) == {
        "data": 1,
        "fsdp": 2,
        "tensor": 1,
    }
    assert mesh.describe(mesh.make_mesh({"fsdp": -1})) == "2 x cpu (data=1, fsdp=2), 1 process"


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"data": -1, "fsdp": 3}, r"fsdp=3 does not fit 2 devices.*\(1, 2\)"),
        ({"data": 4}, "data=4 does not fit 2 devices"),
        ({"data": 1}, "data=1 does not fit 2 devices"),
        ({"data": -1, "tensor": -1}, "only one axis may be -1, not data and tensor"),
        ({"data": 0}, "mesh.data=0 must be at least 1"),
        ({"date": -1}, "no axis 'date'. Did you mean 'data'"),
    ],
)
def test_a_mesh_that_does_not_fit_names_the_numbers_that_would(axes, said):
    with pytest.raises(ConfigError, match=said):
        mesh.make_mesh(axes)


def test_rows_are_split_over_data_and_fsdp_and_shared_along_tensor():
    placed = mesh.put_batch({"image": np.zeros((4, 3))}, mesh.make_mesh({"data": 1, "fsdp": 2}))
    assert [s.data.shape for s in placed["image"].addressable_shards] == [(2, 3)] * 2
    placed = mesh.put_batch({"image": np.zeros((4, 3))}, mesh.make_mesh({"tensor": 2, "data": 1}))
    assert [s.data.shape for s in placed["image"].addressable_shards] == [(4, 3)] * 2
    with pytest.raises(ConfigError, match=r"over 1 device \(x 2 that share rows\) x 2 parts"):
        mesh.check_batch_size(3, mesh.make_mesh({"tensor": 2, "data": 1}), 2)


@pytest.mark.parametrize(
    ("hosts", "each", "tensor", "parts"),
    [
        (2, 4, 1, {0: (0, 2), 1: (1, 2)}),
        (2, 4, 2, {0: (0, 2), 1: (1, 2)}),
        (2, 4, 8, {0: (0, 1), 1: (0, 1)}),  # both hosts read all rows
        (4, 2, 4, {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
    ],
)
def test_hosts_that_share_rows_read_the_same_part_of_a_batch(hosts, each, tensor, parts):
    devices = np.array(devices_of(hosts, each)).reshape(-1, 1, tensor)
    stand_in = SimpleNamespace(devices=devices, shape={"tensor": tensor})
    assert mesh._host_parts(stand_in) == parts


def test_a_host_whose_rows_are_torn_apart_is_noticed():
    shuffled = [devices_of(2, 2)[i] for i in (0, 2, 1, 3)]
    stand_in = SimpleNamespace(devices=np.array(shuffled).reshape(4, 1, 1), shape={"tensor": 1})
    assert mesh._host_parts(stand_in) is None


@pytest.mark.parametrize(
    ("name", "shape", "axes", "spec"),
    [
        ("block_0/mlp/fc1/kernel", (64, 256), {"fsdp": 4}, (None, "fsdp")),
        ("block_0/mlp/fc1/kernel", (64, 256), {"fsdp": 4, "tensor": 2}, ("fsdp", "tensor")),
        ("block_0/mlp/fc2/kernel", (256, 64), {"fsdp": 4, "tensor": 2}, ("tensor", "fsdp")),
        ("blocks/attention/query/kernel", (12, 64, 64), {"tensor": 2}, (None, None, "tensor")),
        ("blocks/attention/out/kernel", (12, 64, 64), {"tensor": 2}, (None, "tensor", None)),
        ("fc1/bias", (8192,), {"tensor": 2}, ("tensor",)),
        ("head/kernel", (63, 1001), {"fsdp": 4}, (None, None)),  # nothing divides
        ("norm/scale", (64,), {"fsdp": 4}, (None,)),  # too small to be worth a message
        ("patches/proj/kernel", (16, 16, 3, 768), {"fsdp": 8}, (None, None, None, "fsdp")),
    ],
)
def test_parameters_are_split_by_name_size_and_what_divides(name, shape, axes, spec):
    assert spec_of(name, shape, axes) == spec


def test_a_rule_decides_for_a_parameter_and_what_the_optimizer_keeps_of_it():
    rules = (("head/kernel", ("", "fsdp")), ("norm", (None,)))
    params = {
        "head": {"kernel": jax.ShapeDtypeStruct((8192, 64), np.float32)},
        "norm": {"scale": jax.ShapeDtypeStruct((8192,), np.float32)},
    }
    tree = {"params": params, "opt_state": jax.eval_shape(optax.adam(1e-3).init, params)}
    laid = mesh.lay_out(tree, params, abstract(fsdp=4), rules)
    for part in (laid["params"], laid["opt_state"][0].mu, laid["opt_state"][0].nu):
        assert tuple(part["head"]["kernel"].sharding.spec) == (None, "fsdp")
        assert tuple(part["norm"]["scale"].sharding.spec) == (None,)
    # Adafactor keeps sums along the rows and along the columns: no rule fits those.
    tree = jax.eval_shape(optax.adafactor(1e-3).init, params)
    jax.tree.map(
        lambda x: x.sharding.shard_shape(x.shape),
        mesh.lay_out(tree, params, abstract(fsdp=4), rules),
    )


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (("haed", (None,)), "'haed' matches no parameter"),
        (("(", (None,)), "no regular expression"),
        (("kernel", ("fsdp",)), "head/kernel has 2 axes, and its rule 1"),
        (("kernel", ("fdsp", "")), "no axis 'fdsp'. Did you mean 'fsdp'"),
        (("kernel", ("fsdp", "")), r"fsdp=4 does not divide the 10 of head/kernel \[10, 64\]"),
    ],
)
def test_a_rule_that_cannot_be_followed_says_so(rule, said):
    with pytest.raises(ConfigError, match=said):
        spec_of("head/kernel", (10, 64), {"fsdp": 4}, (rule,))


@pytest.mark.parametrize(
    "name", ["vit_b16", *(pytest.param(n, marks=pytest.mark.slow) for n in ("swin_t", "cvt_13"))]
)
def test_eight_devices_hold_an_eighth_of_parameters_and_optimizer_each(name):
    model = vit_jax.create(name)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    variables = jax.eval_shape(
        partial(step.init_variables, model=model), jax.random.key(0), {"image": image}
    )
    state = jax.eval_shape(partial(step.init_state, optimizer=optax.adamw(1e-3)), variables)
    held = (state.params, state.opt_state)
    laid = jax.tree.leaves(mesh.lay_out(held, state.params, abstract(fsdp=8)))
    own = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in laid)
    assert own <= 1.1 / 8 * cost.bytes_of(held)


def test_devices_of_one_host_come_in_the_order_that_make_mesh_gives():
    assert isinstance(mesh.make_mesh(), Mesh)
    assert mesh.host_part(mesh.make_mesh()) == (0, 1)


def test_of_one_process_all_rows_are_its_own():
    rows = {"valid": np.array([True, False])}
    assert mesh.gather(rows, mesh.make_mesh()) is rows
    whole = mesh.put_batch({"image": np.arange(4.0)}, mesh.make_mesh(), whole=True)
    np.testing.assert_array_equal(whole["image"], np.arange(4.0))
