"""Scaled dot-product attention: the only softmax(q k) of the project."""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.layers import fused
from vit_jax.layers.dense import Dense
from vit_jax.layers.lift import lift

MASKED = -1e30  # finite, so that a row without any visible key gives numbers, not NaN


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float,
    bias: Array | None = None,
    mask: Array | None = None,
    dropout: nn.Module | None = None,
    want_weights: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention of Vaswani et al. 2017 (arXiv:1706.03762), eq. 1, over any leading axes.

    The heads move to a batch axis first, the query is scaled before the product and the sum of the
    softmax divides after it: the same numbers, in the order that needs the fewest passes over the
    [N, M] weights, which is what a CPU pays for. The softmax is float32 in any dtype.

    Args:
      query: [..., N, A, D].
      key: [..., M, A, D].
      value: [..., M, A, D].
      scale: multiplies the query.
      bias: added to the logits; broadcasts to [..., A, N, M].
      mask: bool, True where a query sees a key; broadcasts to [..., A, N, M].
      dropout: drops weights.
      want_weights: whether they are to be returned whatever `fused.form` says.

    Returns:
      The attended values [..., N, A, D] and the weights [..., A, N, M], which cost nothing where
      they are not used; None in their place where a fused form keeps none.
    """
    if fused.form() == "fused" and mask is None and dropout is None and not want_weights:
        kernel = fused.kernel(query, key, bias)
        if kernel is not None:
            return kernel(query, key, value, bias, scale=scale), None
    query = rearrange(query * scale, "... n a d -> ... a n d")
    key = rearrange(key, "... m a d -> ... a m d")
    value = rearrange(value, "... m a d -> ... a m d")
    logits = jnp.einsum("...nd,...md->...nm", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + jnp.broadcast_to(bias, logits.shape)
    if mask is not None:
        logits = jnp.where(jnp.broadcast_to(mask, logits.shape), logits, MASKED)
    # [..., A, N, M], not yet normalised
    kept, weights, total = _exponentials(logits, value.dtype)
    if dropout is not None:
        kept = dropout(kept)
    out = jnp.einsum("...nm,...md->...nd", kept, value)
    out = out / total.astype(out.dtype)
    return rearrange(out, "... a n d -> ... n a d"), weights / total


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _exponentials(logits: Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Powers of e, the largest of a row 1: in `dtype`, in float32, and summed up, [..., N, 1].

    The backward pass finds its factor in what the product with the values keeps anyway: by JAX's
    own rule a computation in bfloat16 would keep the same [N, M] numbers in float32 as well.
    """
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    return weights.astype(dtype), weights, weights.sum(-1, keepdims=True)


def _exponentials_forward(logits: Array, dtype: jnp.dtype) -> tuple[Any, jax.Array]:
    found = _exponentials(logits, dtype)
    return found, found[0]


def _exponentials_backward(
    dtype: jnp.dtype, weights: jax.Array, gradients: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array]:
    of_kept, of_weights, of_total = gradients
    whole = of_kept.astype(jnp.float32) + of_weights + of_total
    return (weights.astype(jnp.float32) * whole,)


_exponentials.defvjp(_exponentials_forward, _exponentials_backward)


@flax.struct.dataclass
class Cache:
    """What queries to come will read: keys and values [B, M, A, D/A], before any other use.

    A sentence that is written word by word would compute those of all earlier words at each word
    anew: Shazeer 2019 (arXiv:1911.02150), section 2.4.
    """

    key: Array
    value: Array

    @classmethod
    def empty(cls, batch: int, room: int, heads: int, width: int, dtype: jnp.dtype) -> "Cache":
        """Room for M tokens of D = `width` channels."""
        nothing = jnp.zeros((batch, room, heads, width // heads), dtype)
        return cls(nothing, nothing)

    def write(self, key: Array, value: Array, place: Array | int) -> "Cache":
        """With the keys and values [B, N, A, D/A] of N tokens from `place` on."""

        def put(old: Array, new: Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), place, 1)

        return Cache(put(self.key, key), put(self.value, value))


class Attention(nn.Module):
    """Multi-head attention with projections: Vaswani et al. 2017, section 3.2.2.

    The weights [..., A, N, M] are sown as `attention_weights` where the caller makes
    `intermediates` mutable.

    Attributes:
      heads: A.
      scale: of the logits; None is 1/sqrt(D/A). CvT divides by sqrt(D).
      qkv_bias: whether the three projections have a bias.
      key_bias: whether the key's has one where the others do; it moves all logits of a query
        alike, so BEiT and Swin V2 leave it out.
      cosine: compares directions instead of products: Liu et al. 2022, "Swin Transformer V2"
        (arXiv:2111.09883), eq. 2. Each head learns the logarithm of its scale, `logit_scale` [A].
      dropout: rate on the weights.
      dtype: of the computation; parameters stay float32.
    """

    heads: int
    scale: float | None = None
    qkv_bias: bool = True
    key_bias: bool = True
    cosine: bool = False
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        bias: Array | None = None,
        mask: Array | None = None,
        cache: Cache | None = None,
        place: Array | int | None = None,
        train: bool,
    ) -> jax.Array | tuple[jax.Array, Cache]:
        """[..., N, D], [..., M, D], [..., M, D] -> [..., N, D]; self-attention without `key`.

        With a `cache` of M places the queries read all of it, so `mask` has to hide what is not
        written yet; it comes back beside the result. Keys and values are first written into it from
        `place` on; without a place it is complete, and none are computed.

        Raises:
          ValueError: if the heads do not divide D.
        """
        key = query if key is None else key
        value = key if value is None else value
        width = query.shape[-1]
        if width % self.heads:
            raise ValueError(f"heads={self.heads} must divide the width {width}")

        def project(x: Array, name: str) -> jax.Array:
            x = Dense(
                width,
                use_bias=self.qkv_bias and (self.key_bias or name != "key"),
                dtype=self.dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                name=name,
            )(x)
            return rearrange(x, "... n (a d) -> ... n a d", a=self.heads)

        query = project(query, "query")
        if cache is None:
            key, value = project(key, "key"), project(value, "value")
        else:
            if place is not None:
                cache = cache.write(project(key, "key"), project(value, "value"), place)
            key, value = cache.key, cache.value
        scale = (width // self.heads) ** -0.5 if self.scale is None else self.scale
        if self.cosine:
            initial = nn.initializers.constant(jnp.log(10.0))
            logarithm = self.param("logit_scale", initial, (self.heads,))
            per_head = jnp.exp(jnp.minimum(logarithm, jnp.log(100.0)))[:, None]  # [A, 1]
            query = _direction(query) * lift(per_head, query)
            key, scale = _direction(key), 1.0
        dropout = nn.Dropout(self.dropout, deterministic=False) if self.dropout and train else None
        out, weights = attend(
            query,
            key,
            value,
            scale=scale,
            bias=bias,
            mask=mask,
            dropout=dropout,
            want_weights=self.is_mutable_collection("intermediates"),
        )
        self.sow("intermediates", "attention_weights", weights)
        out = rearrange(out, "... n a d -> ... n (a d)")
        out = Dense(
            width, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name="out"
        )(out)
        return out if cache is None else (out, cache)


def _direction(x: jax.Array) -> jax.Array:
    """Vectors of length 1 along the last axis, in float32; a vector near 0 stays near 0."""
    x = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
    return x / length
