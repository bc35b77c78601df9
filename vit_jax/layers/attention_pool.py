"""Pooling by attention: one learned query looks at all tokens."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.layers.attention import Attention
from vit_jax.layers.norm import LayerNorm
from vit_jax.layers.transformer import Mlp


class AttentionPool(nn.Module):
    """One vector for a set of tokens: Zhai et al. 2022, "Scaling Vision Transformers"
    (arXiv:2106.04560), section 3.2, after Lee et al. 2019, "Set Transformer" (arXiv:1810.00825),
    section 3.2: attention of a learned query, then an MLP with its norm and a residual.

    Parameters: `probe`, `attention`, `norm`, `mlp`.

    Attributes:
      heads: A.
      mlp_ratio: hidden width of the MLP over D.
      activation: of the MLP, a name of `layers.activation.ACTIVATIONS`.
      epsilon: of the layer norm.
      dtype: of the computation; parameters stay float32.
    """

    heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> jax.Array:
        """[B, N, D] -> [B, D]; ValueError if the heads do not divide D."""
        width = x.shape[-1]
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width))
        query = jnp.broadcast_to(probe.astype(x.dtype), (x.shape[0], 1, width))
        y = Attention(self.heads, dtype=self.dtype, name="attention")(query, x, train=train)
        hidden = int(width * self.mlp_ratio)
        mlp = Mlp(hidden, self.activation, dtype=self.dtype, name="mlp")
        normed = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(y)
        return (y + mlp(normed, train=train))[:, 0]
