"""What of a block's activations is kept for the backward pass, and what is computed again."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from vit_jax.errors import nearest

# What is kept, in the names of `jax.checkpoint_policies`: nothing but the block's input; what
# dense layers return, not the products of heads; what all matrix products return, attention
# weights among them. In this order they take more memory and less time.
POLICIES = ("nothing_saveable", "dots_with_no_batch_dims_saveable", "dots_saveable")


def recomputed(run: Any, remat: bool | str, **options: Any) -> Callable:
    """A function of a module, or a module's class, that recomputes activations as `remat` says.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174), section 4.

    Args:
      run: what to wrap.
      remat: False keeps everything, True nothing but what goes in; or a name of `POLICIES`.
      **options: of `nn.remat`.

    Raises:
      ValueError: if there is no such policy.
    """
    if remat is False:
        return run
    name = POLICIES[0] if remat is True else remat
    if name not in POLICIES:
        raise ValueError(
            f"remat={remat!r} must be True, False or the name of what is kept."
            f"{nearest(str(remat), POLICIES)}"
        )
    return nn.remat(run, policy=getattr(jax.checkpoint_policies, name), **options)
