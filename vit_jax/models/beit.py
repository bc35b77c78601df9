"""BEiT: a ViT whose blocks know places from biases between tokens."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from vit_jax.contracts import Array, Features
from vit_jax.errors import nearest
from vit_jax.layers.norm import LayerNorm
from vit_jax.layers.patches import PatchEmbed, grid_size
from vit_jax.layers.position import resize_grid
from vit_jax.layers.transformer import EncoderBlock, apply_blocks, drop_path_rates

POOLINGS = ("mean_norm", "mean")
EXTRA = 3  # rows behind the offsets: class to patch, patch to class, class to itself


def relative_bias(table: Array, size: tuple[int, int]) -> jax.Array:
    """One number for each offset between two patches, and three for the class token.

    Args:
      table: [(2h-1) (2w-1) + 3, A]; offsets (query - key) from (-(h-1), -(w-1)) to (h-1, w-1), row
        by row, then class to patch, patch to class, class to class, the query first.
      size: (h, w).

    Returns:
      [A, 1 + h w, 1 + h w]: heads, queries, keys; the class token first.
    """
    h, w = size
    offsets = table[:-EXTRA].reshape(2 * h - 1, 2 * w - 1, -1)
    rows = _unrolled(offsets, h)  # [k, q, 2w-1, A]
    both = _unrolled(rearrange(rows, "k q x a -> x k q a"), w)  # [l, p, k, q, A]
    patches = rearrange(both, "l p k q a -> a (q p) (k l)")
    to_patch, to_class, itself = table[-EXTRA:, :, None, None]  # each [A, 1, 1]
    first = jnp.concatenate([itself, jnp.broadcast_to(to_patch, (len(itself), 1, h * w))], 2)
    rest = jnp.concatenate(
        [jnp.broadcast_to(to_class, (len(itself), h * w, 1)), patches], 2
    )  # [A, h w, 1 + h w]
    return jnp.concatenate([first, rest], 1)


def _unrolled(offsets: Array, size: int) -> jax.Array:
    """x[query - key + size - 1] for all keys and queries: [2n-1, ...] -> [n, n, ...].

    Copies end to end, each one entry longer than a row, so that rows slip by one: the backward pass
    is a sum, where that of a gather would add n * n entries one after the other on a CPU.
    """
    padded = jnp.concatenate([offsets, offsets[:1]])  # [2n, ...]
    copies = jnp.concatenate([padded] * size)
    slipped = copies[size - 1 : size - 1 + size * (2 * size - 1)]
    return slipped.reshape(size, 2 * size - 1, *offsets.shape[1:])[:, :size]


class BeitBlock(EncoderBlock):
    """A pre-norm block with a bias for each offset: Bao et al. 2022, BEiT (arXiv:2106.08254),
    section 2.1 and appendix.

    Parameters: those of `EncoderBlock`, and `relative_position_bias` [(2h-1)(2w-1) + 3, A] unless
    the bias is given.

    Attributes:
      made_for: (h, w) of the grid that the table is made for.
      size: (h, w) of the grid that comes.
      position_resize: how the table is resampled where they differ.
    """

    made_for: tuple[int, int] = (14, 14)
    size: tuple[int, int] = (14, 14)
    position_resize: str = "bilinear_torch"

    @nn.compact
    def __call__(
        self,
        x: Array,
        drop_path: float | Array = 0.0,
        *,
        bias: Array | None = None,
        train: bool,
    ) -> jax.Array:
        """[B, 1 + h w, D] -> [B, 1 + h w, D]; `drop_path` is this block's rate.

        `bias` [A, 1 + h w, 1 + h w] is that of all blocks, where they share it.
        """
        if bias is None:
            bias = table_bias(self, self.heads, self.made_for, self.size, self.position_resize)
        return super().__call__(x, drop_path, bias=bias, train=train)


def table_bias(
    module: nn.Module,
    heads: int,
    made_for: tuple[int, int],
    size: tuple[int, int],
    position_resize: str,
) -> jax.Array:
    """`relative_bias` of a module's own table, `relative_position_bias`, resampled to `size`.

    Call it inside a compact method; arguments are those of `BeitBlock`.
    """
    old, new = ((2 * h - 1, 2 * w - 1) for h, w in (made_for, size))
    table = module.param(
        "relative_position_bias",
        nn.initializers.truncated_normal(0.02),
        (old[0] * old[1] + EXTRA, heads),
    )
    offsets = resize_grid(table[:-EXTRA].reshape(*old, -1), new, position_resize)
    table = jnp.concatenate([offsets.reshape(-1, heads), table[-EXTRA:]])
    return relative_bias(table, size)


class Beit(nn.Module):
    """BEiT as a backbone: Bao et al. 2022 (arXiv:2106.08254), section 2.

    As it is fine-tuned, by default; pre-training has one table of biases for all blocks and
    normalises the tokens (`shared_positions=True, pooling="mean"`).

    A ViT without positions in the tokens, without a bias on the keys and with layer scale. An image
    may have any size that the patch divides. Where that is not `image_size`, tables are resampled.

    Parameters: `embed`, `class_token`, `block_0`, `block_1`, ... (with `scan` one `blocks` with a
    leading axis), `norm`, and `relative_position_bias` where the blocks share it.

    Attributes:
      patch: side of a patch, in pixels.
      width: D.
      depth: number of blocks.
      heads: attention heads of each block.
      mlp_ratio: hidden width of the MLPs over D.
      image_size: side or (H, W), in pixels, that the tables are made for.
      position_resize: how the tables are resampled, a name of `layers.position.RESIZERS`; the
        default is that of transformers. The authors' and timm's loaders space the offsets
        geometrically, and give other numbers at another size.
      shared_positions: whether all blocks have the same table.
      pooling: "mean_norm", the mean of the patches, then normalised; or "mean", that of the
        normalised patches.
      activation: of the MLPs, a name of `layers.activation.ACTIVATIONS`.
      epsilon: of the layer norms.
      layer_scale: None, or what the gains start at: 0.1 in the base, 1e-5 in the large model.
      drop_path: rate of the last block; the first has 0, on a line between.
      dropout: rate after the embedding, the attentions and the MLPs' layers.
      attention_dropout: rate on the attention weights.
      dtype: of the computation; parameters stay float32.
      scan: compiles one block and loops over it.
      remat: what is recomputed of each block in the backward pass: `layers.remat`.
    """

    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    image_size: int | tuple[int, int] = 224
    position_resize: str = "bilinear_torch"
    shared_positions: bool = False
    pooling: str = "mean_norm"
    activation: str = "gelu"
    epsilon: float = 1e-6
    layer_scale: float | None = 0.1
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    scan: bool = False
    remat: bool | str = False

    @nn.compact
    def __call__(
        self, image: Array, *, corrupt: Callable[[Array], Array] | None = None, train: bool
    ) -> Features:
        """[B, H, W, 3] -> the patches as a map, and a description.

        Args:
          image: the pictures.
          corrupt: as of `models.vit.ViT`.
          train: whether dropout and drop path act.

        Returns:
          `maps`: one map [B, H / patch, W / patch, D], normalised with pooling "mean"; else as it
            leaves the last block, since the only norm is that of the mean.
          `pooled`: [B, D].

        Raises:
          ValueError: if the patch does not divide the image or `image_size`, if heads do not
            divide the width, or if a name does not exist.
        """
        if self.pooling not in POOLINGS:
            raise ValueError(
                f"pooling={self.pooling!r} does not exist.{nearest(self.pooling, POOLINGS)}"
            )
        size = grid_size(*image.shape[1:3], self.patch)
        made_for = self.image_size
        made_for = (made_for, made_for) if isinstance(made_for, int) else made_for
        x = PatchEmbed(self.width, self.patch, self.dtype, name="embed")(image)  # [B, h, w, D]
        if corrupt is not None:
            x = corrupt(x)
        x = rearrange(x, "b h w d -> b (h w) d")
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([token, x], 1)  # [B, 1 + h w, D]
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)

        tables = {
            "made_for": grid_size(*made_for, self.patch),
            "size": size,
            "position_resize": self.position_resize,
        }
        block = partial(
            BeitBlock,
            self.heads,
            mlp_ratio=self.mlp_ratio,
            activation=self.activation,
            epsilon=self.epsilon,
            key_bias=False,
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
            **tables,
        )
        shared = {"bias": table_bias(self, self.heads, **tables)} if self.shared_positions else {}
        rates = drop_path_rates(self.drop_path, self.depth)
        x = apply_blocks(block, x, rates, scan=self.scan, remat=self.remat, train=train, **shared)
        patches = x[:, 1:]
        norm = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")
        if self.pooling == "mean":
            patches = norm(patches)
            pooled = patches.mean(1)
        else:
            pooled = norm(patches.mean(1))
        grid = rearrange(patches, "b (h w) d -> b h w d", h=size[0])
        return Features(maps=(grid,), pooled=pooled)


beit_b16 = partial(Beit, width=768, depth=12, heads=12)
beit_l16 = partial(Beit, width=1024, depth=24, heads=16, layer_scale=1e-5)
