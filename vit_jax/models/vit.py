"""ViT, and the hybrid ViT whose patches are cut from a CNN's map."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from vit_jax.contracts import Array, Features
from vit_jax.errors import nearest
from vit_jax.layers.attention_pool import AttentionPool
from vit_jax.layers.norm import LayerNorm
from vit_jax.layers.patches import PatchEmbed, grid_size
from vit_jax.layers.position import LearnedPositions, sincos_positions
from vit_jax.layers.residual import HybridStem
from vit_jax.layers.transformer import EncoderBlock, drop_path_rates, tapped_blocks

# What of the last block's output describes the image; see `ViT`.
POOLINGS = ("token", "mean", "mean_norm", "token+mean", "tokens", "attention")
POSITIONS = ("learned", "sincos", "sincos_closed")


class ViT(nn.Module):
    """ViT as a backbone: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"
    (arXiv:2010.11929), section 3.1 and table 1.

    With other numbers it is DeiT (Touvron et al. 2021, arXiv:2012.12877) and the encoder of MAE (He
    et al. 2022, arXiv:2111.06377); with layer scale, DeiT III (arXiv:2204.07118) and DINOv2 (Oquab
    et al. 2023, arXiv:2304.07193); with registers, Darcet et al. 2024 (arXiv:2309.16588); with a
    norm before the blocks, the image encoder of CLIP (Radford et al. 2021, arXiv:2103.00020), and
    with pooling "attention" that of SigLIP (Zhai et al. 2023, arXiv:2303.15343).

    An image may have any size that the patch divides. Where that is not `image_size`, learned
    positions are resampled (section 3.2), and fixed ones are those of the new grid.

    Parameters: `stem` in a hybrid, `embed`, `class_token` unless the pooling is "mean" or
    "attention", `distillation_token`, `register_token`, `position` where it is learned, `pre_norm`,
    `block_0`, `block_1`, ... (with `scan` one `blocks` with a leading axis), `norm`,
    `attention_pool`.

    Attributes:
      patch: side of a patch, in pixels of the image, or of the CNN's map in a hybrid.
      width: D.
      depth: number of blocks.
      heads: attention heads of each block.
      mlp_ratio: hidden width of the MLPs over D.
      pooling: what describes the image.
        "token": the normalised class token.
        "mean": the mean of the normalised patches, without a class token, as in Beyer et al. 2022
        (arXiv:2205.01580).
        "mean_norm": the mean of the patches as they leave the last block, then normalised; the
        class token only takes part. MAE's fine-tuning, and `fc_norm` in timm.
        "token+mean": the normalised class token and the mean of the normalised patches, side by
        side: DINOv2's classifier in transformers.
        "tokens": the normalised class and distillation token, side by side: DeiT.
        "attention": what a learned query gathers from the normalised patches, without a class
        token: `layers.attention_pool.AttentionPool`.
      distilled: whether a distillation token follows the class token: Touvron et al. 2021, section
        4; always with pooling "tokens".
      registers: how many tokens without a position lie between those and the patches.
      positions: "learned"; "sincos", `layers.position.sincos_positions`; or "sincos_closed", with
        the frequencies of big_vision. A class token has no fixed position.
      class_position: whether class and distillation token have learned positions too; in DeiT III,
        and in timm's DINOv2 with registers, they have none.
      image_size: side or (H, W), in pixels, that learned positions are made for.
      position_resize: how learned positions are resampled, a name of `layers.position.RESIZERS`;
        the default is that of Google's fine-tuning.
      feed_forward: "mlp", or "swiglu", `layers.transformer.SwiGlu`: DINOv2's giant.
      activation: of the MLPs, a name of `layers.activation.ACTIVATIONS`. Google's weights are
        trained with `gelu_tanh`; ports of them to PyTorch compute `gelu`.
      epsilon: of the layer norms.
      qkv_bias: whether query, key and value have a bias.
      patch_bias: whether the map of the patches has one.
      pre_norm: whether the tokens are normalised before the first block.
      layer_scale: None, or what the gains of `layers.transformer.LayerScale` start at.
      taps: numbers of blocks, from 0, whose patches are the maps, as they leave the block; () is
        the last block's, normalised. SETR reads several depths.
      drop_path: rate of the last block; the first has 0, on a line between.
      dropout: rate after the positions, the attentions and the MLPs' layers.
      attention_dropout: rate on the attention weights.
      stem: None, or a hybrid's CNN as the number of bottlenecks in each stage; () is its root
        alone. See `layers.residual.HybridStem`.
      stem_width: features of the CNN's root.
      stem_source: whose epsilons the CNN has, a name of `layers.residual.SOURCES`.
      dtype: of the computation; parameters stay float32.
      scan: compiles one block and loops over it.
      remat: what is recomputed of each block in the backward pass: `layers.remat`.
    """

    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    pooling: str = "token"
    distilled: bool = False
    registers: int = 0
    positions: str = "learned"
    class_position: bool = True
    image_size: int | tuple[int, int] = 224
    position_resize: str = "align_corners"
    feed_forward: str = "mlp"
    activation: str = "gelu"
    epsilon: float = 1e-6
    qkv_bias: bool = True
    patch_bias: bool = True
    pre_norm: bool = False
    layer_scale: float | None = None
    taps: tuple[int, ...] = ()
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    stem: tuple[int, ...] | None = None
    stem_width: int = 64
    stem_source: str = "google"
    dtype: jnp.dtype = jnp.float32
    scan: bool = False
    remat: bool | str = False

    @nn.compact
    def __call__(
        self,
        image: Array,
        *,
        corrupt: Callable[[Array], Array] | None = None,
        visible: Array | None = None,
        train: bool,
    ) -> Features:
        """[B, H, W, 3] -> the patches as a map, and a description.

        Args:
          image: the pictures.
          corrupt: what becomes of the patches before they get their positions, [B, h, w, D] -> the
            same shape: `models.masked` puts mask tokens there.
          visible: int [B, n], places of the patches that the blocks see, row by row; None is all.
          train: whether dropout and drop path act.

        Returns:
          `maps`: one map [B, h, w, D], or one for each of `taps`; h = H / patch, or H over patch
            and the CNN's stride. It is normalised, but not with `taps`, nor with pooling
            "mean_norm", whose norm knows means only. With `visible` it is [B, 1, n, D].
          `pooled`: [B, D], or [B, 2D] with pooling "token+mean" and "tokens".

        Raises:
          ValueError: if the patch does not divide the image or `image_size`, if heads do not
            divide the width, or if a name does not exist.
        """
        for name, valid in (("pooling", POOLINGS), ("positions", POSITIONS)):
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(f"{name}={value!r} does not exist.{nearest(value, valid)}")
        stride = 1 if self.stem is None else HybridStem.stride(self.stem)
        size = grid_size(*image.shape[1:3], self.patch, stride)
        x = image
        if self.stem is not None:
            x = HybridStem(
                self.stem,
                self.stem_width,
                self.stem_source,
                self.remat,
                self.dtype,
                name="stem",
            )(x)
        embed = PatchEmbed(self.width, self.patch, self.dtype, self.patch_bias, name="embed")
        x = embed(x)  # [B, h, w, D]
        if corrupt is not None:
            x = corrupt(x)
        x = rearrange(x, "b h w d -> b (h w) d")

        names = [] if self.pooling in ("mean", "attention") else ["class_token"]
        if self.distilled or self.pooling == "tokens":
            names.append("distillation_token")
        tokens = [self._token(name, 1, x) for name in names]
        x = jnp.concatenate([*tokens, x], 1)  # [B, tokens + h w, D]
        x = x + self._positions(size, stride, len(tokens)).astype(x.dtype)[None]
        if visible is not None:
            patches = jnp.take_along_axis(x[:, len(tokens) :], visible[..., None], 1)
            x = jnp.concatenate([x[:, : len(tokens)], patches], 1)  # [B, tokens + n, D]
            size = (1, visible.shape[1])
        leading = len(tokens) + self.registers
        if self.registers:
            registers = self._token("register_token", self.registers, x)
            x = jnp.concatenate([x[:, : len(tokens)], registers, x[:, len(tokens) :]], 1)
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        if self.pre_norm:
            x = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="pre_norm")(x)

        block = partial(
            EncoderBlock,
            self.heads,
            mlp_ratio=self.mlp_ratio,
            feed_forward=self.feed_forward,
            activation=self.activation,
            epsilon=self.epsilon,
            qkv_bias=self.qkv_bias,
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
        )
        rates = drop_path_rates(self.drop_path, self.depth)
        x, tapped = tapped_blocks(
            block, x, rates, self.taps, scan=self.scan, remat=self.remat, train=train
        )
        norm = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")
        if self.pooling == "mean_norm":
            patches = x[:, leading:]
            pooled = norm(patches.mean(1))
        else:
            x = norm(x)
            patches = x[:, leading:]
            pooled = {
                "token": lambda: x[:, 0],
                "mean": lambda: patches.mean(1),
                "token+mean": lambda: jnp.concatenate([x[:, 0], patches.mean(1)], -1),
                "tokens": lambda: jnp.concatenate([x[:, 0], x[:, 1]], -1),
                "attention": lambda: self._gathered(patches, train),
            }[self.pooling]()
        kept = [tokens[:, leading:] for tokens in tapped] if self.taps else [patches]
        maps = tuple(rearrange(p, "b (h w) d -> b h w d", h=size[0]) for p in kept)
        return Features(maps=maps, pooled=pooled)

    def _gathered(self, patches: jax.Array, train: bool) -> jax.Array:
        """[B, N, D] -> [B, D], by a learned query."""
        pool = AttentionPool(
            self.heads,
            self.mlp_ratio,
            self.activation,
            self.epsilon,
            self.dtype,
            name="attention_pool",
        )
        return pool(patches, train=train)

    def _token(self, name: str, number: int, x: jax.Array) -> jax.Array:
        """Learned tokens for each image of `x`: [B, number, D]."""
        token = self.param(name, nn.initializers.zeros, (1, number, self.width))
        return jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], number, self.width))

    def _positions(self, size: tuple[int, int], stride: int, tokens: int) -> jax.Array:
        """[tokens + h * w, D] for a grid of `size` (h, w)."""
        if self.positions != "learned":
            closed = self.positions == "sincos_closed"
            fixed = jnp.asarray(sincos_positions(*size, self.width, closed=closed))
            return jnp.pad(fixed, ((tokens, 0), (0, 0)))
        made_for = self.image_size
        if isinstance(made_for, int):
            made_for = (made_for, made_for)
        grid = grid_size(*made_for, self.patch, stride)
        placed = tokens if self.class_position else 0
        learned = LearnedPositions(grid, self.width, placed, self.position_resize, name="position")
        return jnp.pad(learned(size), ((tokens - placed, 0), (0, 0)))


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

# DINOv2 is published for images of 518 pixels, and its code resamples positions in its own way;
# `registers=4` with `position_resize="bicubic"` is the version with registers.
_dinov2 = partial(ViT, patch=14, image_size=518, layer_scale=1e-5, position_resize="bicubic_dinov2")
dinov2_s14 = partial(_dinov2, width=384, depth=12, heads=6)
dinov2_b14 = partial(_dinov2, width=768, depth=12, heads=12)
dinov2_l14 = partial(_dinov2, width=1024, depth=24, heads=16)
dinov2_g14 = partial(_dinov2, width=1536, depth=40, heads=24, feed_forward="swiglu")
