"""ResNet: the convolutional backbone that transformers are compared with, and stand on."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.contracts import Array, Features
from vit_jax.errors import nearest
from vit_jax.layers.convolution import Conv
from vit_jax.layers.lift import lift
from vit_jax.layers.norm import BatchNorm
from vit_jax.layers.pooling import max_pool
from vit_jax.layers.portions import in_portions
from vit_jax.layers.residual import BasicBlock, Bottleneck, ResidualStage

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
NORMS = ("batch", "frozen")
# Stages whose maps are larger than their weights: those that inference makes of a few pictures at
# a time.
EARLY = 2


class FrozenBatchNorm(nn.Module):
    """Batch normalisation all of whose numbers are constants: Carion et al. 2020, "DETR"
    (arXiv:2005.12872), section 4.

    Scale and bias lie beside the statistics in the collection `batch_stats`, where no optimizer,
    no weight decay and no gradient reaches them; training does not move them either.

    Attributes:
      epsilon: added to the variance.
      dtype: of the result; the numbers stay float32.
    """

    epsilon: float = 1e-5
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[..., C] -> [..., C]."""
        size = (x.shape[-1],)

        def constant(name: str, initial: nn.initializers.Initializer) -> jax.Array:
            # The initialisers of norms draw nothing: they need no key.
            found = self.variable("batch_stats", name, lambda: initial(None, size, jnp.float32))
            return found.value

        scale, bias = constant("scale", self.scale_init), constant("bias", nn.initializers.zeros)
        mean, var = constant("mean", nn.initializers.zeros), constant("var", nn.initializers.ones)
        factor = scale / jnp.sqrt(var + self.epsilon)
        shift = bias - mean * factor
        return (x * lift(factor, x) + lift(shift, x)).astype(self.dtype)


class ResNet(nn.Module):
    """ResNet as a backbone: He et al. 2016, "Deep Residual Learning for Image Recognition"
    (arXiv:1512.03385), table 1, in the form of PyTorch's networks: the stride of a bottleneck is
    in its 3x3 ("v1.5"), and all padding is alike on all sides.

    Batch statistics are in the collection `batch_stats`; under `jit` they are those of the whole
    batch, on however many devices it lies.

    Parameters: `root_conv`, `root_norm`, and `stage_1` .. `stage_4` with `block_0`, ... each.

    Attributes:
      depths: blocks of each stage.
      block: "bottleneck", or "basic" of the shallow networks.
      width: features of the root and of the first stage's 3x3; each later stage doubles them.
      norm: "batch", or "frozen": `FrozenBatchNorm`.
      dilation: 2 lets the last stage keep the map's size and look at every second pixel instead,
        DETR's "DC5"; the first block of that stage does not, as in the published networks.
      momentum: what a training step keeps of the running statistics.
      epsilon: of the norms.
      remat: what is recomputed of each block in the backward pass: `layers.remat`.
      dtype: of the computation; parameters stay float32.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    block: str = "bottleneck"
    width: int = 64
    norm: str = "batch"
    dilation: int = 1
    momentum: float = 0.9
    epsilon: float = 1e-5
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Array, *, train: bool) -> Features:
        """[B, H, W, 3] -> the maps of each stage, and a description.

        Returns:
          `maps`: [B, h, w, C * 2**i] for stage i from 0; h = H / (4 * 2**i), rounded up at each
            halving; C is `width`, or 4 times that with bottlenecks.
          `pooled`: the mean of the last map.

        Raises:
          ValueError: if a name does not exist, a stage has no block, or `dilation` is not 1 or 2.
        """
        for name, valid in (("block", BLOCKS), ("norm", NORMS)):
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(f"{name}={value!r} does not exist.{nearest(value, valid)}")
        if self.dilation not in (1, 2):
            raise ValueError(f"dilation={self.dilation} must be 1 or 2")
        if not self.depths or min(self.depths) < 1:
            raise ValueError(
                f"depths={tuple(self.depths)} must name at least one block for each stage"
            )
        maps = self._early(image) if self._alone(train) else []
        conv = partial(
            Conv, use_bias=False, kernel_init=nn.initializers.he_normal(), dtype=self.dtype
        )
        norm = partial(FrozenBatchNorm, epsilon=self.epsilon, dtype=self.dtype)
        if self.norm == "batch":
            norm = partial(
                BatchNorm,
                use_running_average=not train,
                momentum=self.momentum,
                epsilon=self.epsilon,
                dtype=self.dtype,
            )
        if maps:
            x = maps[-1]
        else:
            x = conv(self.width, 7, 2, name="root_conv")(image)
            x = nn.relu(norm(name="root_norm")(x))
            x = max_pool(x)
        for i in range(len(maps), len(self.depths)):
            dilation = self.dilation if i == len(self.depths) - 1 else 1
            x = ResidualStage(
                self.width * 2**i,
                self.depths[i],
                conv,
                norm,
                stride=1 if i == 0 or dilation > 1 else 2,
                remat=self.remat,
                block=BLOCKS[self.block],
                dilation=dilation,
                name=f"stage_{i + 1}",
            )(x)
            maps.append(x)
        return Features(maps=tuple(maps), pooled=x.mean((1, 2)))

    def _alone(self, train: bool) -> bool:
        """Whether no picture's maps depend on another's, and nobody looks into the stages."""
        looked_into = self.is_initializing() or self.is_mutable_collection("intermediates")
        return not train and not looked_into and len(self.depths) > EARLY

    def _early(self, image: Array) -> list[jax.Array]:
        """The maps of the first stages, which are large, from a few pictures at a time."""
        early = self.clone(depths=self.depths[:EARLY], dilation=1, parent=None, name=None)

        def maps(image: Array) -> tuple[Array, ...]:
            return early.apply(self.variables, image, train=False).maps

        _, height, width, _ = image.shape
        pixels = -(-height // 2) * -(-width // 2)
        root = self.width * pixels * jnp.dtype(self.dtype).itemsize
        return list(in_portions(maps, image, root))


resnet_18 = partial(ResNet, depths=(2, 2, 2, 2), block="basic")
resnet_26 = partial(ResNet, depths=(2, 2, 2, 2))
resnet_34 = partial(ResNet, depths=(3, 4, 6, 3), block="basic")
resnet_50 = partial(ResNet, depths=(3, 4, 6, 3))
resnet_101 = partial(ResNet, depths=(3, 4, 23, 3))
resnet_152 = partial(ResNet, depths=(3, 8, 36, 3))
