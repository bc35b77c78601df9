"""Swin Transformer: attention inside windows, windows that shift, maps that shrink."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.contracts import Array, Features
from vit_jax.layers import windows
from vit_jax.layers.attention import Attention
from vit_jax.layers.dense import Dense
from vit_jax.layers.norm import LayerNorm
from vit_jax.layers.remat import recomputed
from vit_jax.layers.rows import keep_rows
from vit_jax.layers.transformer import DropPath, Mlp, apply_blocks, drop_path_rates


class SwinBlock(nn.Module):
    """W-MSA or SW-MSA and an MLP: Liu et al. 2021 (arXiv:2103.14030), eq. 3.

    The map is padded with zeros to whole windows after the normalisation and before the shift, as
    in the authors' detection code; the padded pixels are seen as keys. A map whose shorter side
    is no larger than the window is cut into windows of that side and is not shifted, unless
    `always_shift` says so.

    Attributes:
      heads: A.
      window: side of a window, in pixels of the map.
      shifted: whether the windows lie half a window further down and right.
      always_shift: as of `Swin`.
    """

    heads: int
    window: int = 7
    shifted: bool = False
    always_shift: bool = False
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    epsilon: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, drop_path: float | Array = 0.0, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]; `drop_path` is this block's rate."""
        norm = partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
        y = self._attend(norm(name="norm1")(x), train=train)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        x = x + DropPath(name="drop_path1")(y, drop_path, train=train)
        y = Mlp(
            int(x.shape[-1] * self.mlp_ratio),
            self.activation,
            self.dropout,
            dtype=self.dtype,
            name="mlp",
        )(norm(name="norm2")(x), train=train)
        return x + DropPath(name="drop_path2")(y, drop_path, train=train)

    def _attend(self, x: jax.Array, *, train: bool) -> jax.Array:
        table = self.param(
            "relative_position_bias",
            nn.initializers.truncated_normal(0.02),
            ((2 * self.window - 1) ** 2, self.heads),
        )
        smaller = min(x.shape[1:3])
        large = self.always_shift or smaller > self.window
        window = self.window if large else smaller
        attention = Attention(
            self.heads, dropout=self.attention_dropout, dtype=self.dtype, name="attention"
        )
        return windows.within(
            partial(attention, train=train),
            x,
            windows.relative_bias(table, window),
            window,
            self.window // 2 if self.shifted and large else 0,
        )


class SwinPair(nn.Module):
    """A block with regular windows, `block_0`, and one with shifted ones, `block_1`.

    Attributes:
      block: makes a block from `shifted` and `name`.
    """

    block: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, drop_path: Sequence[float] | Array, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]; `drop_path` holds both blocks' rates."""
        x = self.block(shifted=False, name="block_0")(x, drop_path[0], train=train)
        return self.block(shifted=True, name="block_1")(x, drop_path[1], train=train)


class PatchMerging(nn.Module):
    """Halves a map and doubles its channels: Liu et al. 2021, section 3.1.

    Four neighbours' channels are laid side by side in the published order (both rows of the left
    column, then of the right), normalised, and mixed without a bias. A side of odd length is
    padded with zeros at its end.

    Attributes:
      norm_last: normalises after the mixing, as Swin V2 does.
    """

    norm_last: bool = False
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2C]."""
        norm = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")
        reduction = Dense(
            2 * x.shape[-1],
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            name="reduction",
        )
        x = windows.pad_to_multiple(x, 2)
        quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x = jnp.concatenate(quarters, -1)  # [B, H/2, W/2, 4C]
        return norm(reduction(x)) if self.norm_last else reduction(norm(x))


class SwinStage(nn.Module):
    """Patch merging, except in the first stage, then blocks with regular and shifted windows.

    Attributes:
      rates: drop-path rate of each block.
      block: makes a block from `shifted` and `name`.
      merge: makes the patch merging from `name`; None leaves the map as large as it is.
      scan: compiles one pair of blocks and loops over it, where their number is even.
      remat: what is recomputed in the backward pass, of each block, or each scanned pair:
        `layers.remat`.
    """

    rates: tuple[float, ...]
    block: Callable[..., nn.Module]
    merge: Callable[..., nn.Module] | None
    scan: bool = False
    remat: bool | str = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C], or [B, ceil(H / 2), ceil(W / 2), 2C] with `merge`."""
        if self.merge:
            x = self.merge(name="merge")(x)
        if self.scan and len(self.rates) % 2 == 0:
            pairs = list(zip(self.rates[::2], self.rates[1::2], strict=True))
            pair = partial(SwinPair, self.block)
            return apply_blocks(pair, x, pairs, scan=True, remat=self.remat, train=train)

        for i, rate in enumerate(self.rates):
            # Closed over, not passed: `remat` would trace the rate, and a traced 0 still draws.
            def run(block: SwinBlock, x: jax.Array, rate: float = rate) -> jax.Array:
                return block(x, rate, train=train)

            run = recomputed(run, self.remat)
            x = keep_rows(run(self.block(shifted=i % 2 == 1, name=f"block_{i}"), keep_rows(x)))
        return x


class Swin(nn.Module):
    """Swin Transformer as a backbone: Liu et al. 2021, "Swin Transformer: Hierarchical Vision
    Transformer using Shifted Windows" (arXiv:2103.14030), section 3 and table 7.

    Takes an image of any size with one set of parameters: the image, the maps and the windows are
    padded with zeros at the bottom and right where something does not divide. Where a map is
    smaller than the window, the authors' code builds a smaller table of position biases for that
    image size; here the smaller window reads the middle of the full table, which is the same
    wherever the shorter side of the map is at least the window, as in every published model.

    Parameters: `embed`, `embed_norm`, `stage_1` .. `stage_4` with `merge` (not in `stage_1`) and
    `block_0`, `block_1`, ..., and `norm`. With `scan`, a stage with an even number of blocks keeps
    them in `blocks/block_0` (regular windows) and `blocks/block_1` (shifted), each with a leading
    axis of half the number.

    Attributes:
      width: C, channels of the first stage; each later stage doubles them.
      depths: blocks of each stage.
      heads: attention heads of each stage.
      window: side of the windows, in pixels of the maps.
      always_shift: pads a map that is smaller than the window to a whole one, and shifts the
        windows of all maps, as the authors' code for detection and segmentation does; that for
        classification takes a smaller window and does not shift it.
      patch: side of a patch, in pixels of the image.
      mlp_ratio: hidden width of the MLPs over their input's.
      activation: of the MLPs, a name of `layers.activation.ACTIVATIONS`.
      epsilon: of the layer normalisations.
      drop_path: rate of the last block; the first has 0, on a line between, through all stages.
      dropout: rate after the embedding, the attentions and the MLPs' layers.
      attention_dropout: rate on the attention weights.
      norm_map: whether the last map is the normalised one that the description is the mean of, as
        pre-training by hidden patches reads it.
      dtype: of the computation; parameters stay float32.
      scan: compiles one pair of blocks per stage and loops over it.
      remat: what is recomputed of each block in the backward pass: `layers.remat`.
    """

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    always_shift: bool = False
    patch: int = 4
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    epsilon: float = 1e-5
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    norm_map: bool = False
    dtype: jnp.dtype = jnp.float32
    scan: bool = False
    remat: bool | str = False

    @nn.compact
    def __call__(
        self, image: Array, *, corrupt: Callable[[Array], Array] | None = None, train: bool
    ) -> Features:
        """[B, H, W, 3] -> maps of each stage before any final normalisation, and a description.

        Args:
          image: the pictures.
          corrupt: what becomes of the normalised patches before the first stage, [B, h, w, C] ->
            the same shape: `models.masked` puts mask tokens there.
          train: whether dropout and drop path act.

        Returns:
          `maps`: [B, h, w, C * 2**i] for stage i from 0, h = ceil(ceil(H / patch) / 2**i).
          `pooled`: the mean of the last stage's normalised pixels.

        Raises:
          ValueError: if `depths` and `heads` differ in length, or heads do not divide a width.
        """
        block = partial(
            SwinBlock,
            window=self.window,
            always_shift=self.always_shift,
            mlp_ratio=self.mlp_ratio,
            activation=self.activation,
            epsilon=self.epsilon,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
        )
        merge = partial(PatchMerging, epsilon=self.epsilon, dtype=self.dtype)
        blocks = [block] * len(self.depths)
        return pyramid(self, image, blocks, merge, corrupt=corrupt, train=train)


def _small_bias(
    key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """As the published code draws the embedding's bias, for a patch of 4x4.

    Zero would let a picture's padding reach the layer norms as vectors of nothing but zeros, and
    each of those multiplies the gradient by a thousand.
    """
    return jax.random.uniform(key, shape, dtype, -0.144, 0.144)


def pyramid(
    model: nn.Module,
    image: Array,
    blocks: Sequence[Callable[..., nn.Module]],
    merge: Callable[..., nn.Module],
    *,
    corrupt: Callable[[Array], Array] | None = None,
    train: bool,
) -> Features:
    """Patches, stages of blocks, a last normalisation: what both Swins are around their blocks.

    Call it inside the compact method of a module with the fields of `Swin`.

    Args:
      model: that module.
      image: [B, H, W, 3].
      blocks: for each stage, what makes a block from `heads`, `shifted` and `name`.
      merge: makes a patch merging from `name`.
      corrupt: as of `Swin`.
      train: whether dropout and drop path act.

    Returns:
      As `Swin`; ValueError if there is not one number of heads for each stage.
    """
    if len(model.depths) != len(model.heads):
        raise ValueError(
            f"heads={tuple(model.heads)} must name one number for each stage of "
            f"depths={tuple(model.depths)}"
        )
    norm = partial(LayerNorm, epsilon=model.epsilon, dtype=model.dtype)
    x = nn.Conv(
        model.width,
        (model.patch, model.patch),
        (model.patch, model.patch),
        padding="VALID",
        dtype=model.dtype,
        bias_init=_small_bias,
        name="embed",
    )(windows.pad_to_multiple(image, model.patch))
    x = norm(name="embed_norm")(x)
    if corrupt is not None:
        x = corrupt(x)
    x = nn.Dropout(model.dropout, deterministic=not train)(x)
    rates = drop_path_rates(model.drop_path, sum(model.depths))
    maps = []
    for i, (depth, heads) in enumerate(zip(model.depths, model.heads, strict=True)):
        first = sum(model.depths[:i])
        x = SwinStage(
            rates[first : first + depth],
            partial(blocks[i], heads=heads),
            merge if i else None,
            scan=model.scan,
            remat=model.remat,
            name=f"stage_{i + 1}",
        )(x, train=train)
        maps.append(x)
    x = norm(name="norm")(x)
    if model.norm_map:
        maps[-1] = x
    return Features(maps=tuple(maps), pooled=x.mean((1, 2)))


swin_t = partial(Swin, width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24))
swin_s = partial(Swin, width=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24))
swin_b = partial(Swin, width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32))
swin_l = partial(Swin, width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48))
swin_b_384 = partial(swin_b, window=12)
swin_l_384 = partial(swin_l, window=12)
