"""Large ViTs on ImageNet-1k, to plan and launch: a config that starts from another and changes it.

    python -m vit_jax.plan --config=experiments/launch/pod.py:l16 --topology=v5e:16x16
    python -m vit_jax.plan --config=experiments/launch/pod.py:h14 --topology=v5p:8x8x8
    python -m vit_jax.plan --config=experiments/launch/pod.py:e14 --topology=v5p:8x8x8

Recipes: l16 and h14 of Dosovitskiy et al. 2021 (arXiv:2010.11929, table 1), batch 4,096; e14 is the
4-billion-parameter ViT-e of Chen et al. 2022, "PaLI" (arXiv:2209.06794, section 3.1). They are here
for their size: none was trained, and a model this large on ImageNet-1k alone would overfit.
"""

from configs import common, vit

SIZES = {
    "l16": {"patch": 16, "width": 1024, "depth": 24, "heads": 16},
    "h14": {"patch": 14, "width": 1280, "depth": 32, "heads": 16},
    "e14": {"patch": 14, "width": 1792, "depth": 56, "heads": 16, "mlp_ratio": 15360 / 1792},
}


def get_config(recipe: str = "l16"):
    """The config of a recipe: l16, h14 or e14."""
    return common.choose(recipe, {name: lambda config, n=name: _pod(config, n) for name in SIZES})


def _pod(config, name: str) -> None:
    vit.imagenet(config)
    common.classifier(
        config,
        "vit.ViT",
        pooling="mean",
        positions="sincos",
        image_size=config.get_ref("image_size"),
        **SIZES[name],
    )
    config.model.num_classes = 1000
    # One block is compiled and looped over: a depth of 56 compiles as fast as one of 12.
    config.model.backbone.scan = True
    config.dtype = "bfloat16"
    config.batch_size, config.epochs = 4096, 300.0
    if name == "e14":  # its parameters and optimizer, 47 GB, would leave little of a chip
        config.model.backbone.remat = True
        config.mesh.data, config.mesh.fsdp = -1, 64
