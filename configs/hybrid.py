"""Hybrid ViT: patches of a CNN's map, Dosovitskiy et al. 2021 (arXiv:2010.11929), section 3.1.

    python -m vit_jax.main --config=configs/hybrid.py            the digits
    python -m vit_jax.main --config=configs/hybrid.py:imagenet   R26+S/32 after AugReg

Numbers: README.md. ImageNet: 79.61 % for R26+S/32 from scratch in Steiner et al. 2022
(arXiv:2106.10270); ours not run.
"""

from configs import common


def get_config(recipe: str = "digits"):
    """The config of a recipe: digits, folder, cifar10, imagenet or tiny."""
    return common.choose(
        recipe,
        {
            "digits": digits,
            "folder": folder,
            "cifar10": cifar10,
            "imagenet": imagenet,
            "tiny": tiny,
        },
    )


def small(config, stem, stem_width, width, depth, heads):
    """A ViT on every pixel of the last map of a small ResNet."""
    common.classifier(
        config,
        "vit.ViT",
        patch=1,
        stem=stem,
        stem_width=stem_width,
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=2.0,
        pooling="mean",
        image_size=config.get_ref("image_size"),
    )


def digits(config):
    """8x8 pictures enlarged to 16x16; one stage of one bottleneck leaves a 4x4 map."""
    common.digits(config, image_size=16)
    small(config, (1,), 32, width=64, depth=3, heads=4)
    common.muon(config)
    config.epochs, config.learning_rate = 30.0, 4e-3
    config.schedule.warmup_epochs = 2.0


def tiny(config):
    """Two steps of a small one."""
    digits(config)
    small(config, (1,), 32, width=16, depth=1, heads=2)
    common.tiny(config)


def cifar10(config):
    """One stage on 32x32 pictures leaves an 8x8 map."""
    common.cifar10(config)
    small(config, (2,), 32, width=96, depth=6, heads=6)
    common.muon(config)
    config.batch_size, config.epochs, config.learning_rate = 128, 10.0, 4e-3
    config.schedule.warmup_epochs = 0.5


def folder(config):
    """A small hybrid from scratch on pictures of one's own."""
    common.folder(config, image_size=96)
    small(config, (1, 1), 32, width=128, depth=4, heads=4)
    config.epochs, config.batch_size, config.learning_rate = 30.0, 32, 1e-3
    config.schedule.warmup_epochs = 2.0
    config.task.label_smoothing = 0.1


def imagenet(config):
    """R26+S/32, 300 epochs, medium augmentation of Steiner et al. 2022, section 3.2."""
    common.imagenet(config, common.HALF, crop=0.875)
    common.classifier(config, "vit.vit_r26_s32", image_size=config.get_ref("image_size"))
    config.model.num_classes = 1000
    config.batch_size, config.epochs, config.learning_rate = 4096, 300.0, 1e-3
    config.schedule.warmup_steps = 10_000
    config.optimizer.weight_decay = 0.1
    config.task.label_smoothing = 0.0
