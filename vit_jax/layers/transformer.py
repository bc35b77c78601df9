"""What transformer blocks are made of: MLP, drop path, the pre-norm block, stacks of blocks."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.errors import nearest
from vit_jax.layers.activation import activation
from vit_jax.layers.attention import Attention
from vit_jax.layers.dense import Dense
from vit_jax.layers.norm import LayerNorm
from vit_jax.layers.remat import recomputed
from vit_jax.layers.rows import keep_rows


class Mlp(nn.Module):
    """Two dense layers with an activation between them, applied to each token.

    Attributes:
      hidden: width between the two.
      activation: a name of `layers.activation.ACTIVATIONS`.
      dropout: rate after each layer.
    """

    hidden: int
    activation: str = "gelu"
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> jax.Array:
        """[..., D] -> [..., D]."""
        dense = partial(Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        drop = nn.Dropout(self.dropout, deterministic=not train)
        hidden = drop(activation(self.activation)(dense(self.hidden, name="fc1")(x)))
        return drop(dense(x.shape[-1], name="fc2")(hidden))


class DropPath(nn.Module):
    """Drops a residual branch for whole examples.

    Huang et al. 2016 (arXiv:1603.09382), section 3; the survivors are scaled up in training, so
    that nothing changes in evaluation.
    """

    @nn.compact
    def __call__(self, x: Array, rate: float | Array, *, train: bool) -> jax.Array:
        """[B, ...] -> [B, ...]; `rate` in [0, 1) may be traced, so that a scan can vary it."""
        if not train or (isinstance(rate, (int, float)) and rate == 0):
            return x
        keep = 1.0 - rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
        return jnp.where(kept, x / jnp.asarray(keep, x.dtype), jnp.zeros_like(x))


class SwiGlu(nn.Module):
    """An MLP whose hidden layer is gated: Shazeer 2020 (arXiv:2002.05202), eq. 6, with biases.

    Attributes:
      hidden: width between the layers of an `Mlp` with as many parameters: the three layers here
        have two thirds of it between them, rounded up to a multiple of 8, as in DINOv2.
      dropout: rate after each of the two steps.
    """

    hidden: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> jax.Array:
        """[..., D] -> [..., D]."""
        width = (int(self.hidden * 2 / 3) + 7) // 8 * 8
        dense = partial(Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        drop = nn.Dropout(self.dropout, deterministic=not train)
        hidden = nn.silu(dense(width, name="gate")(x)) * dense(width, name="up")(x)
        return drop(dense(x.shape[-1], name="down")(drop(hidden)))


class LayerScale(nn.Module):
    """A learned gain for each channel of a residual branch: Touvron et al. 2021, "CaiT"
    (arXiv:2103.17239), section 2.

    Attributes:
      initial: of all gains.
    """

    initial: float

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        gamma = self.param("gamma", nn.initializers.constant(self.initial), (x.shape[-1],))
        return jnp.einsum("...d,d->...d", x, gamma.astype(x.dtype))


FEED_FORWARDS = ("mlp", "swiglu")


class EncoderBlock(nn.Module):
    """The pre-norm block of ViT: Dosovitskiy et al. 2021 (arXiv:2010.11929), eq. 2 and 3.

    Attributes:
      heads: A.
      mlp_ratio: hidden width of the MLP over D.
      feed_forward: "mlp", or "swiglu", `SwiGlu`.
      activation: of the MLP; a gated one has its own.
      epsilon: of the layer norms.
      qkv_bias: whether query, key and value have a bias.
      key_bias: whether the key has one where they do.
      layer_scale: None, or what the gains on both branches start at: `LayerScale`.
      causal: whether a token sees itself and those before it only, as in a language model.
      dropout: rate after the attention and the MLP's layers.
      attention_dropout: rate on the attention weights.
      dtype: of the computation; parameters stay float32.
    """

    heads: int
    mlp_ratio: float = 4.0
    feed_forward: str = "mlp"
    activation: str = "gelu"
    epsilon: float = 1e-6
    qkv_bias: bool = True
    key_bias: bool = True
    layer_scale: float | None = None
    causal: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        drop_path: float | Array = 0.0,
        *,
        bias: Array | None = None,
        train: bool,
    ) -> jax.Array:
        """[B, N, D] -> [B, N, D].

        Args:
          x: the tokens.
          drop_path: this block's rate.
          bias: added to the attention's logits; broadcasts to [B, A, N, N].
          train: whether dropout and drop path act.

        Raises:
          ValueError: if heads do not divide D, or a name does not exist.
        """
        if self.feed_forward not in FEED_FORWARDS:
            name = self.feed_forward
            raise ValueError(f"feed_forward={name!r} does not exist.{nearest(name, FEED_FORWARDS)}")
        norm = partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
        mask = np.tri(x.shape[-2], dtype=bool) if self.causal else None  # [N, N]
        y = Attention(
            self.heads,
            qkv_bias=self.qkv_bias,
            key_bias=self.key_bias,
            dropout=self.attention_dropout,
            dtype=self.dtype,
            name="attention",
        )(norm(name="norm1")(x), bias=bias, mask=mask, train=train)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        if self.layer_scale is not None:
            y = LayerScale(self.layer_scale, name="layer_scale1")(y)
        x = x + DropPath(name="drop_path1")(y, drop_path, train=train)
        hidden = int(x.shape[-1] * self.mlp_ratio)
        if self.feed_forward == "swiglu":
            mlp = SwiGlu(hidden, self.dropout, dtype=self.dtype, name="mlp")
        else:
            mlp = Mlp(hidden, self.activation, self.dropout, dtype=self.dtype, name="mlp")
        y = mlp(norm(name="norm2")(x), train=train)
        if self.layer_scale is not None:
            y = LayerScale(self.layer_scale, name="layer_scale2")(y)
        return x + DropPath(name="drop_path2")(y, drop_path, train=train)


def drop_path_rates(rate: float, depth: int) -> tuple[float, ...]:
    """0 at the first block, `rate` at the last, on a line between: Huang et al. 2016, eq. 4."""
    return tuple(rate * i / max(depth - 1, 1) for i in range(depth))


def apply_blocks(
    block: Callable[..., nn.Module],
    x: jax.Array,
    rates: Sequence[float],
    *,
    scan: bool = False,
    remat: bool | str = False,
    train: bool,
    **shared: Array,
) -> jax.Array:
    """Runs `x` through one block for each drop-path rate; call it inside a compact method.

    Args:
      block: makes a module from `name`; the module maps (x, rate, train=) to x of equal shape.
      x: [B, ...].
      rates: drop-path rate of each block; equal blocks only.
      scan: compiles one block and loops over it. Parameters then lie in `blocks` with a leading
        axis [L, ...]; otherwise in `block_0`, `block_1`, ...
      remat: what is recomputed of each block in the backward pass: `layers.remat`.
      train: whether dropout and drop path act.
      **shared: what each block is given besides, the same for all.
    """
    return tapped_blocks(block, x, rates, (), scan=scan, remat=remat, train=train, **shared)[0]


def tapped_blocks(
    block: Callable[..., nn.Module],
    x: jax.Array,
    rates: Sequence[float],
    taps: Sequence[int],
    *,
    scan: bool = False,
    remat: bool | str = False,
    train: bool,
    **shared: Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """`apply_blocks`, and what leaves the blocks whose numbers, from 0, are in `taps`.

    Raises:
      ValueError: if there is no such block.
    """
    if not all(0 <= tap < len(rates) for tap in taps):
        raise ValueError(f"taps={tuple(taps)} must lie between 0 and {len(rates) - 1}")
    if not scan:
        left = []
        for i, rate in enumerate(rates):
            # Closed over, not passed: `remat` would trace the rate, and a traced 0 still draws.
            def run(module: nn.Module, x: jax.Array, rate: float = rate) -> jax.Array:
                return module(x, rate, train=train, **shared)

            run = recomputed(run, remat)
            x = keep_rows(run(block(name=f"block_{i}"), keep_rows(x)))
            left.append(x)
        return x, tuple(left[tap] for tap in taps)

    drops = np.any(rates)

    def body(
        module: nn.Module, carry: jax.Array, rate: Array
    ) -> tuple[jax.Array, jax.Array | None]:
        rate = rate if drops else rates[0]
        carry = keep_rows(module(keep_rows(carry), rate, train=train, **shared))
        return carry, carry if taps else None

    loop = nn.scan(
        recomputed(body, remat, prevent_cse=False),
        variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=len(rates),
    )
    x, stack = loop(block(name="blocks"), x, jnp.asarray(rates, jnp.float32))
    return x, tuple(stack[tap] for tap in taps)
