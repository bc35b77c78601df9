"""Vision transformers in JAX: `list_models`, `create`, `load`; the rest is in the modules.

>>> import jax, vit_jax
>>> vit_jax.list_models("*cvt*")
['cvt_13', 'cvt_21', 'cvt_w24']
>>> model = vit_jax.create("cvt_13", num_classes=10)
>>> image = jax.numpy.zeros((1, 224, 224, 3))
>>> variables = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
"""

from fnmatch import fnmatch
from typing import Any

__version__ = "0.1.0"


def list_models(pattern: str = "*") -> list[str]:
    """Names of the published sizes that match a shell pattern, sorted."""
    from vit_jax.build import named_sizes

    return sorted(name for name in named_sizes() if fnmatch(name, pattern))


def create(name: str, num_classes: int = 1000, **backbone: Any):
    """A named size as a Linen module.

    Args:
      name: one of `list_models()`.
      num_classes: K of a linear head on the pooled features, or of a detector or segmenter; 0
        gives a backbone alone. A model that tells no classes takes no notice of it.
      **backbone: fields of the backbone's class, such as `drop_path`, `dtype` or `image_size`.

    Returns:
      A module with `init(key, image, train=False)` and `apply(variables, image, train=False)` for
      `image` [B, H, W, 3]; it returns logits [B, K], or the `Features` of `vit_jax.contracts`
      without a head.

    Raises:
      ValueError: if there is no such name or field, with the nearest ones.
    """
    from vit_jax.build import build, named_sizes
    from vit_jax.errors import ConfigError, nearest

    sizes = named_sizes()
    if name not in sizes:
        raise ConfigError(f"there is no model {name!r}.{nearest(name, sizes)}")
    module = sizes[name].func.__module__.removeprefix("vit_jax.")
    spec = {"target": f"{module}.{name}", **backbone}
    if num_classes == 0:
        return build(spec)
    if "backbone" in (fields := sizes[name].func.__dataclass_fields__):  # a whole model
        return build(spec, **{"num_classes": num_classes} if "num_classes" in fields else {})
    dtype = {"dtype": backbone["dtype"]} if "dtype" in backbone else {}
    return build(
        {
            "target": "models.classifier.Classifier",
            "num_classes": num_classes,
            "backbone": spec,
            **dtype,
        }
    )


def load(ref: str, **options: Any):
    """A published checkpoint, or a run of one's own, by one string.

    >>> model = vit_jax.load("hf:google/vit-base-patch16-224")  # doctest: +SKIP
    >>> logits = model(image=model.preprocess(["cat.jpg"]))  # doctest: +SKIP
    >>> model.labels[int(logits[0].argmax())]  # doctest: +SKIP
    'Egyptian cat'

    Args:
      ref: `hf:OWNER/NAME[@REVISION]` on the Hugging Face Hub; a folder with config.json and
        model.safetensors; a Google `.npz`; a `.safetensors` or `.pth` of timm or the authors; a
        run folder of `vit_jax.main`.
      **options: `dtype`, `image_size` and fields of the backbone: `vit_jax.pretrained.load.load`.

    Returns:
      A `vit_jax.pretrained.load.Loaded`: `module`, `variables`, `preprocess`, `labels`, `source`;
      called as `loaded(image=...)` it gives logits [B, K], or `Features` without a head.

    Raises:
      CheckpointError: if it does not exist, is damaged, or does not fit, in one sentence.
      ConfigError: if an option does not exist.
    """
    from vit_jax.pretrained import load as opening

    return opening.load(ref, **options)
