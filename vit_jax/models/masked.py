"""Pictures with hidden patches, restored: three published ways to learn without labels."""

import inspect
import math
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.errors import nearest
from vit_jax.layers.dense import Dense
from vit_jax.layers.norm import LayerNorm
from vit_jax.layers.position import LearnedPositions, sincos_positions
from vit_jax.layers.transformer import EncoderBlock, apply_blocks, drop_path_rates
from vit_jax.models.swin import swin_b
from vit_jax.models.vit import vit_b16, vit_h14, vit_l16

TOKEN = nn.initializers.normal(0.02)
# In ours the patches' map is the last block's, normalised, only with these.
SEEN = ("token", "mean")
POSITIONS = ("sincos", "learned")


def hidden_count(total: int, ratio: float) -> int:
    """How many of `total` patches a ratio hides: the next whole number above, as in SimMIM's code
    and, since it keeps the next below, in MAE's.

    Raises:
      ValueError: unless that is at least one, and not all.
    """
    # A little below: in floating point 0.14 of 50 is above 7.
    hidden = math.ceil(total * ratio - 1e-6) if 0 < ratio < 1 else 0
    if not 0 < hidden < total:
        raise ValueError(
            f"ratio={ratio} of {total} patches must hide some and not all: above 0, and at most "
            f"{total - 1}/{total}"
        )
    return hidden


class MaskedPatches(nn.Module):
    """Tells, for each hidden patch, which of K classes it is: Dosovitskiy et al. 2021
    (arXiv:2010.11929), appendix B.1.2, where they are the 512 mean colours of 3 bits a channel.

    So does BEiT in pre-training (Bao et al. 2022, arXiv:2106.08254, section 2.3), where they are
    the 8192 visual words of a tokenizer of pictures.

    Parameters: `backbone`, `mask_token`, `decoder`, one dense layer.

    Attributes:
      backbone: a module that maps (image, corrupt=, train=) to `Features`, such as `ViT` or `Beit`;
        its last map has one pixel a patch.
      classes: K.
      dtype: of the head's computation; parameters stay float32.
    """

    backbone: nn.Module
    classes: int = 512
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: Array,
        patch_mask: Array | None = None,
        patch_source: Array | None = None,
        *,
        train: bool,
    ) -> jax.Array:
        """[B, H, W, 3] -> logits, float32 [B, h, w, K].

        Args:
          image: the pictures.
          patch_mask: bool [B, h, w], True is hidden; None hides nothing.
          patch_source: int32 [B, h, w]: -1 puts the mask token there, any other number the patch of
            that place, row by row, which may be its own; None is a mask token wherever it is
            hidden.
          train: whether dropout and drop path act.

        Raises:
          ValueError: if the backbone cannot hide patches, or its patches are others than the
            mask's.
        """
        corrupt = partial(_corrupted, token=_token(self), mask=patch_mask, source=patch_source)
        x = self.backbone(image, corrupt=corrupt, train=train).maps[-1]  # [B, h, w, D]
        return Dense(self.classes, dtype=self.dtype, name="decoder")(x).astype(jnp.float32)


class SimMIM(nn.Module):
    """Restores hidden pixels by one layer on the encoder's last map: Xie et al. 2022, "SimMIM"
    (arXiv:2111.09886), section 3.

    Parameters: `backbone`, `mask_token`, `decoder`, one dense layer: for each pixel of the last
    map the colours of the square of the picture below it, channel by channel.

    Attributes:
      backbone: a module that maps (image, corrupt=, train=) to `Features`: `ViT`, `Swin` or
        `SwinV2`, these with `norm_map`, as published.
      dtype: of the head's computation; parameters stay float32.
    """

    backbone: nn.Module
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Array, patch_mask: Array | None = None, *, train: bool) -> jax.Array:
        """[B, H, W, 3] -> the picture, as the image is standardised, float32 [B, H, W, 3].

        Args:
          image: the pictures.
          patch_mask: bool [B, h, w] on the patches of the embedding, True is hidden; None hides
            nothing.
          train: whether dropout and drop path act.

        Raises:
          ValueError: if the backbone cannot hide patches, its patches are others than the mask's,
            or the last map's sides do not divide the image's into squares.
        """
        corrupt = partial(_corrupted, token=_token(self), mask=patch_mask)
        x = self.backbone(image, corrupt=corrupt, train=train).maps[-1]  # [B, h', w', D]
        (H, W), (h, w) = image.shape[1:3], x.shape[1:3]
        stride = H // h
        if (h * stride, w * stride) != (H, W):
            raise ValueError(
                f"an image of {H}x{W} (height x width) is no multiple of the backbone's map of "
                f"{h}x{w}"
            )
        x = Dense(3 * stride**2, dtype=self.dtype, name="decoder")(x).astype(jnp.float32)
        return rearrange(x, "b h w (c i j) -> b (h i) (w j) c", i=stride, j=stride)


class Decoder(nn.Module):
    """The light transformer that restores a picture from the patches that were seen.

    Parameters: `embed`, `position` where it is learned, `block_0`, ..., `norm`, `predict`.

    Attributes: as `MAE` has them, with `decoder_` before some names.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    pixels: int
    positions: str = "sincos"
    made_for: tuple[int, int] = (14, 14)
    position_resize: str = "bicubic_torch"
    epsilon: float = 1e-6
    activation: str = "gelu"
    dtype: jnp.dtype = jnp.float32
    remat: bool | str = False

    @nn.compact
    def __call__(
        self,
        seen: Array,
        first: Array | None,
        token: Array,
        restore: Array,
        size: tuple[int, int],
        *,
        train: bool,
    ) -> jax.Array:
        """The encoder's tokens -> pixels of all patches.

        Args:
          seen: [B, n, D], what the encoder says of the patches that it saw.
          first: [B, D], the class token, or None.
          token: [D'], put in the place of those it did not see.
          restore: int [B, N]: for each place, row by row, which of the seen tokens and then the
            hidden ones stands there.
          size: (h, w), N = h w.
          train: whether dropout acts.

        Returns:
          [B, N, pixels].
        """
        dense = partial(Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        embed = dense(self.width, name="embed")
        tokens = 0 if first is None else 1
        x = seen if first is None else jnp.concatenate([first[:, None], seen], 1)
        x = embed(x)  # [B, tokens + n, D']
        shape = (x.shape[0], restore.shape[1] - seen.shape[1], self.width)
        patches = jnp.concatenate(
            [x[:, tokens:], jnp.broadcast_to(token.astype(x.dtype), shape)], 1
        )
        patches = jnp.take_along_axis(patches, restore[..., None], 1)  # [B, N, D']
        x = jnp.concatenate([x[:, :tokens], patches], 1)
        x = x + self._positions(size, tokens).astype(x.dtype)[None]
        block = partial(
            EncoderBlock,
            self.heads,
            mlp_ratio=self.hidden / self.width,
            activation=self.activation,
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        x = apply_blocks(block, x, drop_path_rates(0.0, self.depth), remat=self.remat, train=train)
        x = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(x)
        return dense(self.pixels, name="predict")(x[:, tokens:])

    def _positions(self, size: tuple[int, int], tokens: int) -> jax.Array:
        """[tokens + h * w, D']."""
        if self.positions == "sincos":
            fixed = jnp.asarray(sincos_positions(*size, self.width))
            return jnp.pad(fixed, ((tokens, 0), (0, 0)))
        learned = LearnedPositions(
            self.made_for, self.width, tokens, self.position_resize, name="position"
        )
        return learned(size)


class MAE(nn.Module):
    """A masked autoencoder: He et al. 2022 (arXiv:2111.06377), section 3.

    The encoder sees the patches that are not hidden; a light decoder puts a token in the place of
    each of the others and restores the picture. The class token, where the encoder has one, goes
    through both. The authors start the patches' kernel as a dense layer's and the class token from
    a normal distribution; here both start as `ViT`'s do.

    Parameters: `backbone`, `mask_token`, `decoder`.

    Attributes:
      backbone: a `ViT` with pooling "token" or "mean" and without `taps`.
      ratio: share of the patches that is hidden, rounded up to whole patches; that of the batch's
        mask, whose every picture hides as many. A picture of which another number is hidden
        becomes NaN, so that none passes unseen.
      decoder_width: D'.
      decoder_depth: number of the decoder's blocks.
      decoder_heads: attention heads of each.
      decoder_hidden: width of their MLPs.
      positions: of the decoder: "sincos", fixed, or "learned", as published files hold them.
      dtype: of the decoder's computation; parameters stay float32.
      remat: what is recomputed of the decoder's blocks in the backward pass: `layers.remat`.
    """

    backbone: nn.Module
    ratio: float = 0.75
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decoder_hidden: int = 2048
    positions: str = "sincos"
    dtype: jnp.dtype = jnp.float32
    remat: bool | str = False

    @nn.compact
    def __call__(self, image: Array, patch_mask: Array | None = None, *, train: bool) -> jax.Array:
        """[B, H, W, 3] -> pixels, float32 [B, H, W, 3], in what unit the task compares them in.

        Args:
          image: the pictures.
          patch_mask: bool [B, h, w], True is hidden; None hides nothing.
          train: whether dropout and drop path act.

        Raises:
          ValueError: if the backbone is no such `ViT`, its patches are others than the mask's,
            `ratio` hides none or all of them, or there are no such positions.
        """
        self._check(image)
        h, w = (n // self.backbone.patch for n in image.shape[1:3])
        rows, total = image.shape[0], h * w
        if patch_mask is None:
            mask, kept = jnp.zeros((rows, total), bool), total
        else:
            _check_grid(patch_mask.shape[1:], (h, w))
            mask = rearrange(jnp.asarray(patch_mask), "b h w -> b (h w)")
            kept = total - hidden_count(total, self.ratio)
        order = jnp.argsort(mask, axis=1, stable=True)  # [B, N], seen ones first, in their order
        visible = order[:, :kept]
        found = self.backbone(image, visible=visible, train=train)
        seen = rearrange(found.maps[-1], "b one n d -> b (one n) d")
        made_for = self.backbone.image_size
        made_for = (made_for, made_for) if isinstance(made_for, int) else made_for
        decoder = Decoder(
            self.decoder_width,
            self.decoder_depth,
            self.decoder_heads,
            self.decoder_hidden,
            3 * self.backbone.patch**2,
            self.positions,
            tuple(n // self.backbone.patch for n in made_for),
            self.backbone.position_resize,
            self.backbone.epsilon,
            self.backbone.activation,
            self.dtype,
            self.remat,
            name="decoder",
        )
        x = decoder(
            seen,
            found.pooled if self.backbone.pooling == "token" else None,
            self.param("mask_token", TOKEN, (self.decoder_width,)),
            jnp.argsort(order, axis=1),
            (h, w),
            train=train,
        ).astype(jnp.float32)
        hidden = mask.sum(1)
        wrong = (hidden > 0) & (hidden != total - kept)  # a row that is no picture hides none
        x = jnp.where(wrong[:, None, None], jnp.nan, x)
        side = self.backbone.patch
        return rearrange(x, "b (h w) (i j c) -> b (h i) (w j) c", h=h, i=side, j=side)

    def _check(self, image: Array) -> None:
        if self.positions not in POSITIONS:
            raise ValueError(
                f"positions={self.positions!r} does not exist.{nearest(self.positions, POSITIONS)}"
            )
        _check_takes(self.backbone, "visible", "ViT")
        if self.backbone.pooling not in SEEN or self.backbone.taps or self.backbone.stem:
            raise ValueError(
                f"MAE reads the normalised patches of a ViT with pooling {SEEN[0]!r} or "
                f"{SEEN[1]!r} and without taps and stem, not of one with pooling "
                f"{self.backbone.pooling!r}, taps={self.backbone.taps} and "
                f"stem={self.backbone.stem}"
            )


def _token(model: MaskedPatches | SimMIM) -> jax.Array:
    """What stands in the place of a hidden patch: [D]; ValueError if it cannot."""
    _check_takes(model.backbone, "corrupt", "ViT, Beit, Swin or SwinV2")
    return model.param("mask_token", TOKEN, (model.backbone.width,))


def _check_takes(backbone: nn.Module, name: str, some: str) -> None:
    if name not in inspect.signature(type(backbone).__call__).parameters:
        raise ValueError(
            f"{type(backbone).__name__} cannot hide patches: wanted a backbone that takes "
            f"{name!r}, such as {some}"
        )


def _check_grid(mask: tuple[int, ...], patches: tuple[int, ...]) -> None:
    if tuple(mask) != tuple(patches):
        shown = ["x".join(map(str, grid)) for grid in (mask, patches)]
        raise ValueError(
            f"patch_mask is of {shown[0]} patches (height x width) and the backbone's embedding "
            f"has {shown[1]}: the `patch` of HidePatches must be the backbone's"
        )


def _corrupted(
    x: Array, token: Array, mask: Array | None, source: Array | None = None
) -> jax.Array:
    """Embedded patches [B, h, w, D] -> the same with tokens [D], or other patches, in places."""
    if mask is None:
        return x
    _check_grid(mask.shape[1:], x.shape[1:3])
    token = token.astype(x.dtype)
    if source is None:
        return jnp.where(mask[..., None], token[None, None, None], x)
    flat, at = rearrange(x, "b h w d -> b (h w) d"), rearrange(source, "b h w -> b (h w) 1")
    others = jnp.take_along_axis(flat, jnp.maximum(at, 0), 1)  # [B, N, D]
    return jnp.where(at < 0, token[None, None], others).reshape(x.shape)


_fixed = {"positions": "sincos"}
mae_b16 = partial(MAE, backbone=vit_b16(**_fixed))
mae_l16 = partial(MAE, backbone=vit_l16(**_fixed))
mae_h14 = partial(MAE, backbone=vit_h14(**_fixed))
simmim_b16 = partial(SimMIM, backbone=vit_b16())
simmim_swin_b = partial(SimMIM, backbone=swin_b(window=6, norm_map=True))
masked_patches_b16 = partial(MaskedPatches, backbone=vit_b16())
