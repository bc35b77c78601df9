"""Swin Transformer V2: cosine attention, norms behind the branches, biases for any window."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.contracts import Array, Features
from vit_jax.layers import windows
from vit_jax.layers.attention import Attention
from vit_jax.layers.dense import Dense
from vit_jax.layers.norm import LayerNorm
from vit_jax.layers.transformer import DropPath, Mlp
from vit_jax.models.swin import PatchMerging, pyramid


class ContinuousBias(nn.Module):
    """Position biases from a small network of the offset: Liu et al. 2022 (arXiv:2111.09883),
    section 3.3, eq. 3 and 4.

    Between 0 and 16, which keeps them in proportion to cosines times their scale, as in the
    authors' code.

    Attributes:
      heads: A.
      window: side of the windows, in pixels of the map.
      pretrained_window: side of the windows that the network was trained on; 0 is `window`.
    """

    heads: int
    window: int
    pretrained_window: int = 0

    @nn.compact
    def __call__(self) -> jax.Array:
        """[A, N, N], N = window**2: heads, queries, keys."""
        offsets = jnp.asarray(windows.log_offsets(self.window, self.pretrained_window))
        hidden = nn.relu(Dense(512, name="fc1")(offsets))
        table = 16 * nn.sigmoid(Dense(self.heads, use_bias=False, name="fc2")(hidden))
        return windows.relative_bias(table, self.window)


class SwinV2Block(nn.Module):
    """Cosine attention in windows and an MLP, each normalised before it is added: Liu et al. 2022,
    section 3.2.

    Both norms start at 0, the block at its input, as in the authors' code.

    Attributes:
      heads: A.
      window: side of a window, in pixels of the map.
      pretrained_window: see `ContinuousBias`.
      shift: how far the windows of a shifted block lie down and right, in pixels.
      shifted: whether this is a shifted block.
    """

    heads: int
    window: int = 8
    pretrained_window: int = 0
    shift: int = 4
    shifted: bool = False
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    epsilon: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, drop_path: float | Array = 0.0, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]; `drop_path` is this block's rate."""
        norm = partial(
            LayerNorm,
            epsilon=self.epsilon,
            scale_init=nn.initializers.zeros,
            dtype=self.dtype,
        )
        attention = Attention(
            self.heads,
            key_bias=False,
            cosine=True,
            dropout=self.attention_dropout,
            dtype=self.dtype,
            name="attention",
        )
        bias = ContinuousBias(self.heads, self.window, self.pretrained_window, name="position")()
        shift = self.shift if self.shifted else 0
        y = windows.within(partial(attention, train=train), x, bias, self.window, shift)
        y = norm(name="norm1")(nn.Dropout(self.dropout, deterministic=not train)(y))
        x = x + DropPath(name="drop_path1")(y, drop_path, train=train)
        y = Mlp(
            int(x.shape[-1] * self.mlp_ratio),
            self.activation,
            self.dropout,
            dtype=self.dtype,
            name="mlp",
        )(x, train=train)
        return x + DropPath(name="drop_path2")(norm(name="norm2")(y), drop_path, train=train)


class SwinV2(nn.Module):
    """Swin Transformer V2 as a backbone: Liu et al. 2022, "Swin Transformer V2: Scaling Up
    Capacity and Resolution" (arXiv:2111.09883), section 3.

    The windows of each stage are those of `image_size`: no larger than its map there, and not
    shifted where one window covers it. An image of another size is cut into the same windows, and
    padded with zeros at the bottom and right where something does not divide. For training at
    another size set `image_size` and `window` to the new and `pretrained_window` to the old, so
    that an offset in pixels keeps its bias.

    Pixels that a shift brought together are kept apart by -100, as in the authors' code; a widely
    used port adds it twice, which matters where a head's scale comes near its limit of 100.

    Parameters: `embed`, `embed_norm`, `stage_1` .. `stage_4` with `merge` (not in `stage_1`) and
    `block_0`, `block_1`, ... (scanned as in `Swin`), and `norm`.

    Attributes:
      width: C, channels of the first stage; each later stage doubles them.
      depths: blocks of each stage.
      heads: attention heads of each stage.
      window: side of the windows, in pixels of the maps.
      pretrained_window: side of each stage's windows in pre-training; () if they were the same.
      image_size: side or (H, W), in pixels, that the windows are made for.
      patch: side of a patch, in pixels of the image.
      mlp_ratio: hidden width of the MLPs over their input's.
      activation: of the MLPs, a name of `layers.activation.ACTIVATIONS`.
      epsilon: of the layer normalisations.
      drop_path: rate of the last block; the first has 0, on a line between, through all stages.
      dropout: rate after the embedding, the attentions and the MLPs' layers.
      attention_dropout: rate on the attention weights.
      norm_map: as of `Swin`.
      dtype: of the computation; parameters stay float32.
      scan: compiles one pair of blocks per stage and loops over it.
      remat: what is recomputed of each block in the backward pass: `layers.remat`.
    """

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 8
    pretrained_window: tuple[int, ...] = ()
    image_size: int | tuple[int, int] = 256
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
          corrupt: as of `Swin`.
          train: whether dropout and drop path act.

        Returns:
          `maps`: [B, h, w, C * 2**i] for stage i from 0, h = ceil(ceil(H / patch) / 2**i).
          `pooled`: the mean of the last stage's normalised pixels.

        Raises:
          ValueError: if `depths`, `heads` and `pretrained_window` differ in length, or heads do
            not divide a width.
        """
        if len(self.pretrained_window) not in (0, len(self.depths)):
            raise ValueError(
                f"pretrained_window={tuple(self.pretrained_window)} must name one number for each "
                f"stage of depths={tuple(self.depths)}, or none"
            )
        blocks = []
        for i in range(len(self.depths)):
            side = self._side(i)
            blocks.append(
                partial(
                    SwinV2Block,
                    window=min(self.window, side),
                    pretrained_window=self.pretrained_window[i] if self.pretrained_window else 0,
                    shift=self.window // 2 if side > self.window else 0,
                    mlp_ratio=self.mlp_ratio,
                    activation=self.activation,
                    epsilon=self.epsilon,
                    dropout=self.dropout,
                    attention_dropout=self.attention_dropout,
                    dtype=self.dtype,
                )
            )
        merge = partial(PatchMerging, norm_last=True, epsilon=self.epsilon, dtype=self.dtype)
        return pyramid(self, image, blocks, merge, corrupt=corrupt, train=train)

    def _side(self, stage: int) -> int:
        """The shorter side of a stage's map, for images of `image_size`."""
        size = self.image_size
        shorter = size if isinstance(size, int) else min(size)
        return -(-shorter // (self.patch * 2**stage))


swin_v2_t = partial(SwinV2, width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24))
swin_v2_s = partial(SwinV2, width=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24))
swin_v2_b = partial(SwinV2, width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32))
swin_v2_t_w16 = partial(swin_v2_t, window=16)
swin_v2_s_w16 = partial(swin_v2_s, window=16)
swin_v2_b_w16 = partial(swin_v2_b, window=16)

# Pre-trained on 22,000 classes at 192 pixels with windows of 12: the last stage's map was 6x6.
_from_192 = {"pretrained_window": (12, 12, 12, 6)}
swin_v2_b_192 = partial(swin_v2_b, window=12, image_size=192)
swin_v2_b_w12to16 = partial(swin_v2_b, window=16, **_from_192)
swin_v2_b_384 = partial(swin_v2_b, window=24, image_size=384, **_from_192)
swin_v2_l_192 = partial(
    SwinV2, width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12, image_size=192
)
swin_v2_l = partial(swin_v2_l_192, window=16, image_size=256, **_from_192)
swin_v2_l_384 = partial(swin_v2_l, window=24, image_size=384)
