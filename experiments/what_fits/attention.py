"""From how many tokens on does a TPU's fused attention move fewer bytes than the plain form?

    python experiments/what_fits/attention.py

Compiles both, with their gradients, for a TPU v5e that need not be there (`pip install -e
".[tpu]"`), and prints what the compiler says. A minute on two cores.
"""

import jax
import jax.numpy as jnp

from vit_jax.layers import fused
from vit_jax.layers.attention import attend
from vit_jax.plan import devices_of, parse_topology

PICTURES, HEADS, CHANNELS = 16, 16, 64  # ViT-L/16
TOKENS = (197, 257, 401, 577, 785, 1025)  # pictures of 224 to 512 pixels, and a class token


def plain(query: jax.Array, key: jax.Array, value: jax.Array, bias: None, scale: float):
    """The form of every backend."""
    return attend(query, key, value, scale=scale)[0]


def cost(form, tokens: int, device: jax.Device) -> tuple[float, float]:
    """MB of temporaries and of memory traffic, of values and gradients on one chip."""
    here = jax.sharding.SingleDeviceSharding(device)
    shape = (PICTURES, tokens, HEADS, CHANNELS)
    one = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return (form(query, key, value, None, CHANNELS**-0.5).astype(jnp.float32) ** 2).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(one, one, one).compile()
    traffic = compiled.cost_analysis()["bytes accessed"]
    return compiled.memory_analysis().temp_size_in_bytes / 1e6, traffic / 1e6


def main() -> None:
    device = devices_of(parse_topology("v5e:1x1"))[0]
    print("| tokens | plain: temporaries, traffic | fused |\n| --- | --- | --- |")
    for tokens in TOKENS:
        cells = (cost(form, tokens, device) for form in (plain, fused.pallas))
        told = (f"{temporaries:,.0f} MB, {traffic:,.0f} MB" for temporaries, traffic in cells)
        print(f"| {tokens:,} | {' | '.join(told)} |", flush=True)


if __name__ == "__main__":
    main()
