"""ViT, and the hybrid ViT whose patches are cut from a CNN's map."""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from vit_jax.contracts import Array, Features
from vit_jax.errors import nearest
from vit_jax.layers.patches import PatchEmbed, grid_size
from vit_jax.layers.position import LearnedPositions, sincos_positions
from vit_jax.layers.residual import HybridStem
from vit_jax.layers.transformer import EncoderBlock, apply_blocks, drop_path_rates


class ViT(nn.Module):
    """ViT as a backbone: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"
    (arXiv:2010.11929), section 3.1 and table 1.

    An image may have any size that the patch divides. Where that is not `image_size`, learned
    positions are resampled (section 3.2), and fixed ones are those of the new grid.

    Parameters: `stem` in a hybrid, `embed`, `class_token` with token pooling, `position` where it
    is learned, `block_0`, `block_1`, ... (with `scan` one `blocks` with a leading axis), `norm`.

    Attributes:
      patch: side of a patch, in pixels of the image, or of the CNN's map in a hybrid.
      width: D.
      depth: number of blocks.
      heads: attention heads of each block.
      mlp_ratio: hidden width of the MLPs over D.
      pooling: "token", a class token; "mean", the mean of all normalised patches and no class
        token, as in Beyer et al. 2022 (arXiv:2205.01580).
      positions: "learned", or "sincos", `layers.position.sincos_positions`; a class token has no
        fixed position.
      image_size: side or (H, W), in pixels, that learned positions are made for.
      position_resize: how learned positions are resampled, a name of `layers.position.RESIZERS`;
        the default is that of Google's fine-tuning.
      activation: of the MLPs, a name of `layers.transformer.ACTIVATIONS`. Google's weights are
        trained with `gelu_tanh`; ports of them to PyTorch compute `gelu`.
      epsilon: of the layer norms.
      drop_path: rate of the last block; the first has 0, on a line between.
      dropout: rate after the positions, the attentions and the MLPs' layers.
      attention_dropout: rate on the attention weights.
      stem: None, or a hybrid's CNN as the number of bottlenecks in each stage; () is its root
        alone. See `layers.residual.HybridStem`.
      stem_width: features of the CNN's root.
      dtype: of the computation; parameters stay float32.
      scan: compiles one block and loops over it.
      remat: recomputes each block's activations in the backward pass instead of keeping them.
    """

    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    pooling: str = "token"
    positions: str = "learned"
    image_size: int | tuple[int, int] = 224
    position_resize: str = "align_corners"
    activation: str = "gelu"
    epsilon: float = 1e-6
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    stem: tuple[int, ...] | None = None
    stem_width: int = 64
    dtype: jnp.dtype = jnp.float32
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, image: Array, *, train: bool) -> Features:
        """[B, H, W, 3] -> the normalised patches as a map, and a description.

        Returns:
          `maps`: one map [B, h, w, D]; h = H / patch, or H over patch and the CNN's stride.
          `pooled`: [B, D], the normalised class token or the mean of the map.

        Raises:
          ValueError: if the patch does not divide the image or `image_size`, if heads do not
            divide the width, or if a name does not exist.
        """
        for name, valid in (("pooling", ("token", "mean")), ("positions", ("learned", "sincos"))):
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(f"{name}={value!r} does not exist.{nearest(value, valid)}")
        stride = 1 if self.stem is None else HybridStem.stride(self.stem)
        size = grid_size(*image.shape[1:3], self.patch, stride)
        x = image
        if self.stem is not None:
            x = HybridStem(self.stem, self.stem_width, self.remat, self.dtype, name="stem")(x)
        x = PatchEmbed(self.width, self.patch, self.dtype, name="embed")(x)  # [B, h, w, D]
        x = rearrange(x, "b h w d -> b (h w) d")

        tokens = int(self.pooling == "token")
        if tokens:
            token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
            token = jnp.broadcast_to(token.astype(x.dtype), (len(x), 1, self.width))
            x = jnp.concatenate([token, x], 1)  # [B, 1 + h w, D]
        x = x + self._positions(size, stride, tokens).astype(x.dtype)[None]
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)

        block = partial(
            EncoderBlock,
            self.heads,
            mlp_ratio=self.mlp_ratio,
            activation=self.activation,
            epsilon=self.epsilon,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
        )
        rates = drop_path_rates(self.drop_path, self.depth)
        x = apply_blocks(block, x, rates, scan=self.scan, remat=self.remat, train=train)
        x = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(x)
        patches = x[:, tokens:]
        pooled = x[:, 0] if tokens else patches.mean(1)
        grid = rearrange(patches, "b (h w) d -> b h w d", h=size[0])
        return Features(maps=(grid,), pooled=pooled)

    def _positions(self, size: tuple[int, int], stride: int, tokens: int) -> jax.Array:
        """[tokens + h * w, D] for a grid of `size` (h, w)."""
        if self.positions == "sincos":
            fixed = jnp.asarray(sincos_positions(*size, self.width))
            return jnp.pad(fixed, ((tokens, 0), (0, 0)))
        made_for = self.image_size
        if isinstance(made_for, int):
            made_for = (made_for, made_for)
        grid = grid_size(*made_for, self.patch, stride)
        return LearnedPositions(grid, self.width, tokens, self.position_resize, name="position")(
            size
        )


vit_ti16 = partial(ViT, patch=16, width=192, depth=12, heads=3)
vit_s32 = partial(ViT, patch=32, width=384, depth=12, heads=6)
vit_s16 = partial(ViT, patch=16, width=384, depth=12, heads=6)
vit_b32 = partial(ViT, patch=32, width=768, depth=12, heads=12)
vit_b16 = partial(ViT, patch=16, width=768, depth=12, heads=12)
vit_b8 = partial(ViT, patch=8, width=768, depth=12, heads=12)
vit_l32 = partial(ViT, patch=32, width=1024, depth=24, heads=16)
vit_l16 = partial(ViT, patch=16, width=1024, depth=24, heads=16)
vit_h14 = partial(ViT, patch=14, width=1280, depth=32, heads=16)

# The stages' strides and the patch together give the number in the name, but for R+Ti/16, whose
# root of stride 4 is followed by patches of 8: its published weights are of stride 32.
vit_r_ti16 = partial(ViT, stem=(), patch=8, width=192, depth=12, heads=3)
vit_r26_s32 = partial(ViT, stem=(2, 2, 2, 2), patch=1, width=384, depth=12, heads=6)
vit_r50_b16 = partial(ViT, stem=(3, 4, 9), patch=1, width=768, depth=12, heads=12)
vit_r50_l32 = partial(ViT, stem=(3, 4, 6, 3), patch=1, width=1024, depth=24, heads=16)
