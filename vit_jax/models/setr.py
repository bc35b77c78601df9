"""SETR: segmentation from a plain ViT's depths."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.errors import nearest
from vit_jax.layers.dense import Dense
from vit_jax.layers.norm import LayerNorm
from vit_jax.layers.pyramid import ConvNorm, bilinear
from vit_jax.models.vit import vit_l16

DECODERS = ("naive", "pup", "mla")
SMALL = nn.initializers.normal(0.01)  # of the layer that gives logits


class UpHead(nn.Module):
    """Convolutions, each followed by an enlargement: Zheng et al. 2021 (arXiv:2012.15840), section
    3.2, "naive" and "progressive upsampling".

    Parameters: `norm`, `conv_0`, ..., `classifier`.

    Attributes:
      num_classes: K.
      features: of each convolution.
      convs: how many there are.
      kernel: their side.
      scale: by which the map grows after each.
      epsilon: of the layer norm in front.
      dropout: rate before the classifier, of whole channels.
      dtype: of the computation; parameters stay float32.
    """

    num_classes: int
    features: int = 256
    convs: int = 1
    kernel: int = 1
    scale: int = 4
    epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, size: tuple[int, int], *, train: bool) -> jax.Array:
        """[B, h, w, D] -> logits [B, h * scale**convs, w * scale**convs, K], but none larger than
        the image, whose (H, W) is `size`.
        """
        x = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(x)
        for i in range(self.convs):
            conv = ConvNorm(self.features, self.kernel, dtype=self.dtype, name=f"conv_{i}")
            x = conv(x, train=train)
            if i == self.convs - 1:  # an enlargement of logits is the logits of one, and cheaper
                x = _classified(self, x, train)
            x = bilinear(x, [min(n * self.scale, most) for n, most in zip(x.shape[1:3], size)])
        return x


class MlaNeck(nn.Module):
    """Multi-level aggregation: Zheng et al. 2021, section 3.2.

    Each map is normalised and mixed to fewer channels, and takes the sum of all deeper ones.

    Parameters: for each map `norm_{i}`, `mix_{i}`, `conv_{i}`, from 0, the shallowest.

    Attributes:
      features: of what comes out.
      epsilon: of the layer norms.
      dtype: of the computation; parameters stay float32.
    """

    features: int = 256
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: tuple[Array, ...], *, train: bool) -> list[jax.Array]:
        """Maps [B, h, w, D], shallow to deep -> as many [B, h, w, C], in that order."""
        found, total = [], 0.0
        for i in reversed(range(len(maps))):
            x = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=f"norm_{i}")(maps[i])
            total = total + ConvNorm(self.features, dtype=self.dtype, name=f"mix_{i}")(
                x, train=train
            )
            conv = ConvNorm(self.features, 3, dtype=self.dtype, name=f"conv_{i}")
            found.append(conv(total, train=train))
        return found[::-1]


class MlaHead(nn.Module):
    """Two convolutions on each map of the neck, four times the size, side by side: Zheng et al.
    2021, section 3.2.

    Parameters: for each map `conv_{i}a`, `conv_{i}b`; `classifier`.

    Attributes:
      num_classes: K.
      features: of the convolutions.
      dropout: rate before the classifier, of whole channels.
      dtype: of the computation; parameters stay float32.
    """

    num_classes: int
    features: int = 128
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: list[Array], *, train: bool) -> jax.Array:
        """Maps [B, h, w, C] -> logits [B, 4h, 4w, K]."""
        conv = partial(ConvNorm, self.features, 3, dtype=self.dtype)
        parts = []
        for i, x in enumerate(maps):
            for name in (f"conv_{i}a", f"conv_{i}b"):
                x = conv(name=name)(x, train=train)
            parts.append(x)
        # Enlarged behind the classifier, which is linear: the same numbers for less.
        x = _classified(self, jnp.concatenate(parts, -1), train)
        return bilinear(x, (4 * x.shape[1], 4 * x.shape[2]))


class SETR(nn.Module):
    """SETR: Zheng et al. 2021, "Rethinking Semantic Segmentation from a Sequence-to-Sequence
    Perspective with Transformers" (arXiv:2012.15840), section 3.2, with the sizes of
    mmsegmentation's models, which reach the paper's numbers.

    "naive" and "pup" decode the deepest map, with auxiliary heads on those before; "mla" decodes
    all, with auxiliary heads on all.

    Parameters: `backbone`, `neck` with "mla", `decoder`, `auxiliary_0`, ...

    Attributes:
      backbone: a module that maps (image, train=) to `Features` whose maps are those of several
        depths, shallow to deep, not normalised, such as `ViT` with `taps`.
      num_classes: K.
      decoder: "naive", "pup" or "mla".
      features: of the convolutions.
      head_features: of those of the last part of "mla".
      auxiliary: whether there are auxiliary heads.
      epsilon: of the layer norms.
      dropout: rate before each classifier, of whole channels.
      dtype: of the computation behind the backbone; parameters stay float32.
    """

    backbone: nn.Module
    num_classes: int
    decoder: str = "mla"
    features: int = 256
    head_features: int = 128
    auxiliary: bool = True
    epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Array, *, train: bool) -> jax.Array | dict:
        """[B, H, W, 3] -> logits, float32 [B, H, W, K].

        In training {"logits": [B, H, W, K], "auxiliary": [such logits, ...]}.

        Raises:
          ValueError: if there is no such decoder, or K is less than 1.
        """
        if self.decoder not in DECODERS:
            raise ValueError(
                f"decoder={self.decoder!r} does not exist.{nearest(self.decoder, DECODERS)}"
            )
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} must be at least 1")
        maps = self.backbone(image, train=train).maps
        shared = {"dropout": self.dropout, "dtype": self.dtype}
        up = partial(UpHead, self.num_classes, self.features, epsilon=self.epsilon, **shared)
        helped, of_image = maps[:-1], {"size": image.shape[1:3]}
        if self.decoder == "mla":
            neck = MlaNeck(self.features, self.epsilon, self.dtype, name="neck")
            maps = neck(maps, train=train)
            head = MlaHead(self.num_classes, self.head_features, **shared, name="decoder")
            logits = head(maps, train=train)
            helper, helped, of_image = partial(_Linear, self.num_classes, **shared), maps, {}
        elif self.decoder == "pup":
            # As often as it takes to the image's size: four times from patches of 16 pixels.
            steps = max(math.ceil(math.log2(image.shape[1] / maps[-1].shape[1])), 1)
            logits = up(convs=steps, kernel=3, scale=2, name="decoder")(
                maps[-1], train=train, **of_image
            )
            helper = partial(up, convs=-(-steps // 2), kernel=3, scale=4)
        else:
            logits = up(name="decoder")(maps[-1], train=train, **of_image)
            helper = up

        def full(logits: jax.Array) -> jax.Array:
            return bilinear(logits.astype(jnp.float32), image.shape[1:3])

        # Evaluation has no use for them, but they have to be there from the start.
        if not (train or self.is_initializing()):
            return full(logits)
        heads = enumerate(helped if self.auxiliary else ())
        others = [helper(name=f"auxiliary_{i}")(x, train=train, **of_image) for i, x in heads]
        if not train:
            return full(logits)
        return {"logits": full(logits), "auxiliary": [full(x) for x in others]}


class _Linear(nn.Module):
    """Logits from a map, pixel by pixel."""

    num_classes: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> jax.Array:
        return _classified(self, x, train)


def _classified(head: nn.Module, x: Array, train: bool) -> jax.Array:
    """A head's logits of each pixel, behind its dropout of whole channels."""
    x = nn.Dropout(head.dropout, (1, 2), deterministic=not train)(x)
    classifier = Dense(head.num_classes, dtype=head.dtype, kernel_init=SMALL, name="classifier")
    return classifier(x)


# ADE20K, as mmsegmentation trains them.
_large = partial(vit_l16, image_size=512)
_deep = partial(_large, taps=(9, 14, 19, 23))
setr_naive_l16 = partial(SETR, backbone=_deep(), num_classes=150, decoder="naive")
setr_pup_l16 = partial(SETR, backbone=_deep(), num_classes=150, decoder="pup")
setr_mla_l16 = partial(
    SETR, backbone=_large(taps=(5, 11, 17, 23), pooling="mean"), num_classes=150, decoder="mla"
)
