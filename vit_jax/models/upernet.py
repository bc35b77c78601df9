"""UPerNet: segmentation from a pyramid of maps."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.layers.dense import Dense
from vit_jax.layers.norm import LayerNorm
from vit_jax.layers.pyramid import ConvNorm, SimplePyramid, bilinear, pool
from vit_jax.models.swin import swin_b_384, swin_l_384, swin_s, swin_t

SMALL = nn.initializers.normal(0.01)  # of the layer that gives logits


class PyramidHead(nn.Module):
    """Pyramid pooling, then a feature pyramid: Xiao et al. 2018, "Unified Perceptual Parsing"
    (arXiv:1807.10221), section 3.1 and figure 4.

    The last map is joined by its means over 1, 4, 9 and 36 parts (Zhao et al. 2017,
    arXiv:1612.01105); each finer map takes the sum of the coarser ones, and all are fused at the
    size of the finest.

    Parameters: `pool_0`, ..., `bottleneck`, `lateral_0`, ..., `conv_0`, ..., `fusion`.

    Attributes:
      features: of each convolution.
      pools: parts on each side that the last map is averaged over.
      dtype: of the computation; parameters stay float32.
    """

    features: int = 512
    pools: tuple[int, ...] = (1, 2, 3, 6)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: tuple[Array, ...], *, train: bool) -> jax.Array:
        """Maps [B, h, w, C], fine to coarse -> [B, h, w, features] at the size of the first."""
        conv = partial(ConvNorm, self.features, dtype=self.dtype)
        last = maps[-1]
        parts = [last]
        for i, bins in enumerate(self.pools):
            pooled = conv(name=f"pool_{i}")(pool(last, bins), train=train)
            parts.append(bilinear(pooled, last.shape[1:3]))
        x = conv(kernel=3, name="bottleneck")(jnp.concatenate(parts, -1), train=train)
        levels = [x]
        for i in reversed(range(len(maps) - 1)):
            lateral = conv(name=f"lateral_{i}")(maps[i], train=train)
            x = lateral + bilinear(x, lateral.shape[1:3])
            levels.append(conv(kernel=3, name=f"conv_{i}")(x, train=train))
        size = levels[-1].shape[1:3]
        joined = jnp.concatenate([bilinear(level, size) for level in reversed(levels)], -1)
        return conv(kernel=3, name="fusion")(joined, train=train)


class UPerNet(nn.Module):
    """UPerNet: Xiao et al. 2018, "Unified Perceptual Parsing for Scene Understanding"
    (arXiv:1807.10221), with its head for semantic segmentation, and with the auxiliary head of
    mmsegmentation's models: a convolution on the last map but one.

    Takes an image of any size that the backbone takes. A backbone with a single map, such as a
    plain ViT, gets a pyramid: `layers.pyramid.SimplePyramid`.

    Parameters: `backbone`, `norm_1`, ... for each of its maps, or `pyramid`, `head`, `classifier`,
    `auxiliary`, `auxiliary_classifier`.

    Attributes:
      backbone: a module that maps (image, train=) to `Features`, its maps fine to coarse.
      num_classes: K.
      features: of the convolutions.
      pools: parts on each side that the last map is averaged over.
      map_norm: whether each map of the backbone passes a layer norm, as those of Swin do, which
        leaves them without; off for a backbone whose maps end with a norm.
      auxiliary_features: of the auxiliary head; 0 is none.
      epsilon: of the layer norms.
      dropout: rate before the classifiers, of whole channels.
      dtype: of the computation behind the backbone; parameters stay float32.
    """

    backbone: nn.Module
    num_classes: int
    features: int = 512
    pools: tuple[int, ...] = (1, 2, 3, 6)
    map_norm: bool = True
    auxiliary_features: int = 256
    epsilon: float = 1e-5
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Array, *, train: bool) -> jax.Array | dict:
        """[B, H, W, 3] -> logits, float32 [B, H, W, K].

        In training {"logits": [B, H, W, K], "auxiliary": [such logits]}.

        Raises:
          ValueError: if K is less than 1.
        """
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} must be at least 1")
        maps = self.backbone(image, train=train).maps
        if len(maps) == 1:
            maps = SimplePyramid(dtype=self.dtype, name="pyramid")(maps[0])
        elif self.map_norm:
            norm = partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
            maps = tuple(norm(name=f"norm_{i}")(x) for i, x in enumerate(maps, 1))

        def classify(x: jax.Array, name: str) -> jax.Array:
            x = nn.Dropout(self.dropout, (1, 2), deterministic=not train)(x)
            classifier = Dense(self.num_classes, dtype=self.dtype, kernel_init=SMALL, name=name)
            return bilinear(classifier(x).astype(jnp.float32), image.shape[1:3])

        head = PyramidHead(self.features, self.pools, self.dtype, name="head")
        logits = classify(head(maps, train=train), "classifier")
        others = []
        # Evaluation has no use for it, but it has to be there from the start.
        if self.auxiliary_features and (train or self.is_initializing()):
            conv = ConvNorm(self.auxiliary_features, 3, dtype=self.dtype, name="auxiliary")
            others.append(classify(conv(maps[-2], train=train), "auxiliary_classifier"))
        return {"logits": logits, "auxiliary": others} if train else logits


# For the 150 classes of ADE20K. The two large ones start from Swins trained at 384 pixels, whose
# windows are of 12.
upernet_swin_t = partial(
    UPerNet, backbone=swin_t(drop_path=0.3, always_shift=True), num_classes=150
)
upernet_swin_s = partial(
    UPerNet, backbone=swin_s(drop_path=0.3, always_shift=True), num_classes=150
)
upernet_swin_b = partial(
    UPerNet, backbone=swin_b_384(drop_path=0.3, always_shift=True), num_classes=150
)
upernet_swin_l = partial(
    UPerNet, backbone=swin_l_384(drop_path=0.3, always_shift=True), num_classes=150
)
