"""Linear classifiers on any backbone."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.contracts import Array


class Classifier(nn.Module):
    """Logits from a backbone's pooled features.

    The head starts at 0, as in Google's fine-tuning of ViT (Dosovitskiy et al. 2021,
    arXiv:2010.11929, section 3.2), so that the first loss is log K whatever the backbone gives.

    Parameters: `backbone`, `head`, and `pre_logits` where there is a representation.

    Attributes:
      backbone: a module that maps (image, train=) to `Features`.
      num_classes: K.
      representation: width of a dense layer and a tanh before the head, as in Google's pre-training
        of ViT (section 3.1); 0 is none.
      dropout: rate on the pooled features.
      dtype: of the head's computation; parameters stay float32.
    """

    backbone: nn.Module
    num_classes: int
    representation: int = 0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Array, *, train: bool) -> jax.Array:
        """[B, H, W, 3] -> logits [B, K], float32; ValueError if K is less than 1."""
        head = _head(self.num_classes, self.dtype, "head")
        x = self.backbone(image, train=train).pooled
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        if self.representation:
            x = nn.tanh(nn.Dense(self.representation, dtype=self.dtype, name="pre_logits")(x))
        return head(x).astype(jnp.float32)


class DistilledClassifier(nn.Module):
    """Logits from a class and a distillation token: Touvron et al. 2021, "DeiT"
    (arXiv:2012.12877), section 4.

    Each token has a head; the logits are the mean of both heads', as in the authors' evaluation.
    So they are in training, where the authors give each head a target of its own.

    Parameters: `backbone`, `head`, `head_distilled`.

    Attributes:
      backbone: a module that maps (image, train=) to `Features` whose pooled [B, 2D] is the class
        token and the distillation token, such as `ViT` with pooling "tokens".
      num_classes: K.
      dropout: rate on the pooled features.
      dtype: of the heads' computation; parameters stay float32.
    """

    backbone: nn.Module
    num_classes: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Array, *, train: bool) -> jax.Array:
        """[B, H, W, 3] -> logits [B, K], float32; ValueError if K is less than 1."""
        heads = [_head(self.num_classes, self.dtype, n) for n in ("head", "head_distilled")]
        x = self.backbone(image, train=train).pooled
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        first, second = (h(y) for h, y in zip(heads, jnp.split(x, 2, -1), strict=True))
        return (first.astype(jnp.float32) + second.astype(jnp.float32)) / 2


def _head(classes: int, dtype: jnp.dtype, name: str) -> nn.Dense:
    if classes < 1:
        raise ValueError(f"num_classes={classes} must be at least 1")
    return nn.Dense(classes, dtype=dtype, kernel_init=nn.initializers.zeros, name=name)
