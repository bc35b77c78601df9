"""CvT: a transformer whose tokens and projections are made by convolutions."""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from vit_jax.contracts import Array, Features
from vit_jax.layers.attention import Attention
from vit_jax.layers.convolution import Conv, DepthwiseConv
from vit_jax.layers.norm import BatchNorm, LayerNorm
from vit_jax.layers.transformer import DropPath, Mlp, apply_blocks, drop_path_rates


def _batch_norm(dtype: jnp.dtype, name: str, *, train: bool) -> nn.Module:
    return BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name
    )


class ConvProjection(nn.Module):
    """The convolutional half of a projection: Wu et al. 2021 (arXiv:2103.15808), section 3.2.

    A depthwise 3x3 convolution, then batch normalisation; the attention's own matrix follows.
    The convolution has no bias, which the normalisation would take out again.

    Attributes:
      stride: 2 squeezes keys and values to a quarter.
    """

    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> jax.Array:
        """[B, h, w, C] -> [B, ceil(h / stride) * ceil(w / stride), C]."""
        x = DepthwiseConv(stride=self.stride, dtype=self.dtype, name="conv")(x)
        x = _batch_norm(self.dtype, "norm", train=train)(x)
        return rearrange(x, "b h w c -> b (h w) c")


class CvTBlock(nn.Module):
    """Attention with convolutional projections and an MLP: Wu et al. 2021, section 3.2.

    A class token, if there is one, comes first and goes around the convolutions. The logits are
    divided by the root of the whole width, not of a head's, as in the authors' code.

    Attributes:
      size: (h, w) of the map that the tokens are.
      heads: A.
      key_stride: of the convolutions for keys and values.
    """

    size: tuple[int, int]
    heads: int
    key_stride: int = 2
    mlp_ratio: float = 4.0
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, drop_path: float | Array = 0.0, *, train: bool) -> jax.Array:
        """[B, N, C] -> [B, N, C], N = h * w or 1 + h * w; `drop_path` is this block's rate."""
        norm = partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
        y = norm(name="norm1")(x)
        extra = y.shape[1] - self.size[0] * self.size[1]  # class tokens
        first, image = y[:, :extra], y[:, extra:]
        image = rearrange(image, "b (h w) c -> b h w c", h=self.size[0])

        def project(name: str, stride: int) -> jax.Array:
            tokens = ConvProjection(stride, self.dtype, name=name)(image, train=train)
            return jnp.concatenate([first, tokens], 1) if extra else tokens

        y = Attention(
            self.heads,
            scale=x.shape[-1] ** -0.5,
            dropout=self.attention_dropout,
            dtype=self.dtype,
            name="attention",
        )(
            project("conv_query", 1),
            project("conv_key", self.key_stride),
            project("conv_value", self.key_stride),
            train=train,
        )
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


class CvTStage(nn.Module):
    """Convolutional token embedding (Wu et al. 2021, section 3.1), then blocks.

    Attributes:
      width: C.
      rates: drop-path rate of each block.
      heads: of each block.
      kernel: side of the embedding's kernel, larger than its stride, so that patches overlap.
      stride: of the embedding.
      padding: zeros around the image, in pixels.
      embed_depth: convolutions of the embedding; those after the first are 3x3, each behind a batch
        normalisation and a ReLU.
      class_token: whether a class token is put before the pixels.
    """

    width: int
    rates: tuple[float, ...]
    heads: int
    kernel: int
    stride: int
    padding: int
    embed_depth: int = 1
    class_token: bool = False
    key_stride: int = 2
    mlp_ratio: float = 4.0
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    scan: bool = False
    remat: bool | str = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> tuple[jax.Array, jax.Array | None]:
        """[B, H, W, D] -> map [B, h, w, C] and class token [B, C]; ValueError if h or w is 0."""
        smallest = self.kernel - 2 * self.padding
        if min(x.shape[1:3]) < smallest:
            raise ValueError(
                f"the image or map of {x.shape[1]}x{x.shape[2]} pixels is smaller than the "
                f"{smallest}x{smallest} that a token embedding with kernel={self.kernel} and "
                f"padding={self.padding} needs"
            )
        x = Conv(
            self.width,
            self.kernel,
            self.stride,
            padding=self.padding,
            dtype=self.dtype,
            name="embed",
        )(x)
        for i in range(1, self.embed_depth):
            x = nn.relu(_batch_norm(self.dtype, f"embed_bn_{i}", train=train)(x))
            x = Conv(self.width, 3, dtype=self.dtype, name=f"embed_{i}")(x)
        x = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="embed_norm")(x)
        size = x.shape[1:3]
        x = rearrange(x, "b h w c -> b (h w) c")
        if self.class_token:
            token = self.param(
                "class_token", nn.initializers.truncated_normal(0.02), (1, 1, self.width)
            )
            token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
            x = jnp.concatenate([token, x], 1)  # [B, 1 + h w, C]
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        block = partial(
            CvTBlock,
            size,
            self.heads,
            key_stride=self.key_stride,
            mlp_ratio=self.mlp_ratio,
            activation=self.activation,
            epsilon=self.epsilon,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
        )
        x = apply_blocks(block, x, self.rates, scan=self.scan, remat=self.remat, train=train)
        token, x = (x[:, 0], x[:, 1:]) if self.class_token else (None, x)
        return rearrange(x, "b (h w) c -> b h w c", h=size[0]), token


class CvT(nn.Module):
    """CvT as a backbone: Wu et al. 2021, "CvT: Introducing Convolutions to Vision Transformers"
    (arXiv:2103.15808), section 3 and table 2.

    There is no position embedding, so an image of any size will do, from 3x3 pixels on. Only the
    last stage has a class token. Batch statistics are in the collection `batch_stats`; under `jit`
    they are those of the whole batch, on however many devices it lies.

    The authors trained with `quick_gelu`, the default. A widely used port of their weights
    computes the exact `gelu` with them, which moves the logits by a few percent.

    Parameters: `stage_1` .. `stage_3` with `embed`, `embed_norm`, `block_0`, `block_1`, ... (with
    `scan` one `blocks` with a leading axis), in the last stage `class_token`, and `norm`; with more
    `embed_depths` also `embed_bn_1`, `embed_1`, ...

    Attributes:
      widths: C of each stage.
      depths: blocks of each stage.
      heads: attention heads of each stage.
      kernels: side of each token embedding's kernel.
      strides: of each token embedding.
      paddings: zeros around each token embedding's input, in pixels.
      embed_depths: convolutions of each token embedding; () is one each, as published. More are
        Xiao et al. 2021, "Early Convolutions Help Transformers See Better" (arXiv:2106.14881),
        section 3: those after the first are 3x3, each behind a batch normalisation and a ReLU.
      key_stride: of the convolutions for keys and values.
      mlp_ratio: hidden width of the MLPs over their input's.
      activation: of the MLPs, a name of `layers.activation.ACTIVATIONS`.
      epsilon: of the layer normalisations.
      drop_path: rate of the last block; the last stage's first has 0, on a line between, and
        earlier stages have 0, as published.
      dropout: rate after the embeddings, the attentions and the MLPs' layers.
      attention_dropout: rate on the attention weights.
      dtype: of the computation; parameters and batch statistics stay float32.
      scan: compiles one block per stage and loops over it.
      remat: what is recomputed of each block in the backward pass: `layers.remat`.
    """

    widths: tuple[int, ...] = (64, 192, 384)
    depths: tuple[int, ...] = (1, 2, 10)
    heads: tuple[int, ...] = (1, 3, 6)
    kernels: tuple[int, ...] = (7, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2)
    paddings: tuple[int, ...] = (2, 1, 1)
    embed_depths: tuple[int, ...] = ()
    key_stride: int = 2
    mlp_ratio: float = 4.0
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    scan: bool = False
    remat: bool | str = False

    @nn.compact
    def __call__(self, image: Array, *, train: bool) -> Features:
        """[B, H, W, 3] -> maps of each stage and a description.

        Returns:
          `maps`: [B, h, w, C] of each stage, 1/4, 1/8 and 1/16 of the image as published.
          `pooled`: the normalised class token, C of the last stage.

        Raises:
          ValueError: if the fields that speak of stages differ in length, if heads do not divide
            a width, or if the image is too small for a token embedding.
        """
        stages = {
            "depths": self.depths,
            "heads": self.heads,
            "kernels": self.kernels,
            "strides": self.strides,
            "paddings": self.paddings,
            "embed_depths": self.embed_depths or (1,) * len(self.widths),
        }
        for name, numbers in stages.items():
            if len(numbers) != len(self.widths):
                raise ValueError(
                    f"{name}={tuple(numbers)} must name one number for each stage of "
                    f"widths={tuple(self.widths)}"
                )
        if min(stages["embed_depths"]) < 1:
            raise ValueError(f"embed_depths={tuple(self.embed_depths)} must be at least 1 each")
        x, token, maps = image, None, []
        for i, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            last = i == len(self.widths) - 1
            x, token = CvTStage(
                width,
                drop_path_rates(self.drop_path if last else 0.0, depth),
                self.heads[i],
                self.kernels[i],
                self.strides[i],
                self.paddings[i],
                stages["embed_depths"][i],
                class_token=last,
                key_stride=self.key_stride,
                mlp_ratio=self.mlp_ratio,
                activation=self.activation,
                epsilon=self.epsilon,
                dropout=self.dropout,
                attention_dropout=self.attention_dropout,
                dtype=self.dtype,
                scan=self.scan,
                remat=self.remat,
                name=f"stage_{i + 1}",
            )(x, train=train)
            maps.append(x)
        pooled = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(token)
        return Features(maps=tuple(maps), pooled=pooled)


cvt_13 = partial(CvT, widths=(64, 192, 384), depths=(1, 2, 10), heads=(1, 3, 6))
cvt_21 = partial(CvT, widths=(64, 192, 384), depths=(1, 4, 16), heads=(1, 3, 6))
cvt_w24 = partial(CvT, widths=(192, 768, 1024), depths=(2, 2, 20), heads=(3, 12, 16))
