"""A linear classifier on any backbone."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.contracts import Array


class Classifier(nn.Module):
    """Logits from a backbone's pooled features.

    The head starts at 0, as in Google's fine-tuning of ViT (Dosovitskiy et al. 2021,
    arXiv:2010.11929, section 3.2), so that the first loss is log K whatever the backbone gives.

    Parameters: `backbone` and `head`.

    Attributes:
      backbone: a module that maps (image, train=) to `Features`.
      num_classes: K.
      dropout: rate on the pooled features.
      dtype: of the head's computation; parameters stay float32.
    """

    backbone: nn.Module
    num_classes: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Array, *, train: bool) -> jax.Array:
        """[B, H, W, 3] -> logits [B, K], float32; ValueError if K is less than 1."""
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} must be at least 1")
        x = self.backbone(image, train=train).pooled
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        head = nn.Dense(
            self.num_classes, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="head"
        )
        return head(x).astype(jnp.float32)
