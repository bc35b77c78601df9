"""How activations lie on a mesh whose devices share the parameters."""

import jax
from jax.sharding import PartitionSpec

from vit_jax.contracts import ROW_AXES, Array


def keep_rows(x: Array) -> Array:
    """[B, ...], each device with its own rows, where the mesh around has an axis `fsdp`.

    Left to itself the compiler may gather a whole group's activations at a layer whose parameters
    are split, instead of the parameters, which are fewer: Rajbhandari et al. 2020, "ZeRO"
    (arXiv:1910.02054), section 5.3, sends parameters only. Without a mesh (`jax.set_mesh`), or
    with nothing on that axis, it is the array itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
        return x
    spec = PartitionSpec(ROW_AXES, *[None] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, spec)
