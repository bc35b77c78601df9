"""Swin Transformer: Liu et al. 2021 (arXiv:2103.14030).

    python -m vit_jax.main --config=configs/swin.py            the digits
    python -m vit_jax.main --config=configs/swin.py:cifar10    10 epochs of CIFAR-10
    python -m vit_jax.main --config=configs/swin.py:imagenet   Swin-T as the paper trained it

Numbers: README.md and experiments/cifar10. ImageNet: 81.2 % for Swin-T in the paper; ours not run.
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


def small(config, patch, window, width, depths, heads):
    """A Swin of few stages."""
    common.classifier(
        config,
        "swin.Swin",
        patch=patch,
        window=window,
        width=width,
        depths=depths,
        heads=heads,
        mlp_ratio=2.0,
    )


def digits(config):
    """8x8 pictures enlarged to 16x16; maps of 8x8 and 4x4, windows of 4x4."""
    common.digits(config, image_size=16)
    small(config, patch=2, window=4, width=64, depths=(2, 2), heads=(2, 4))
    common.muon(config)
    config.epochs, config.learning_rate = 30.0, 4e-3
    config.schedule.warmup_epochs = 2.0


def tiny(config):
    """Two steps of a small one."""
    digits(config)
    small(config, patch=2, window=4, width=8, depths=(2, 1), heads=(1, 2))
    common.tiny(config)


def cifar10(config):
    """Maps of 16x16, 8x8 and 4x4, windows of 4x4."""
    common.cifar10(config)
    small(config, patch=2, window=4, width=32, depths=(2, 2, 2), heads=(1, 2, 4))
    common.muon(config)
    config.batch_size, config.epochs, config.learning_rate = 128, 10.0, 4e-3
    config.schedule.warmup_epochs = 0.5


def folder(config):
    """A small Swin from scratch on pictures of one's own."""
    common.folder(config, image_size=96)
    small(config, patch=4, window=6, width=48, depths=(2, 2, 2), heads=(3, 6, 12))
    config.epochs, config.batch_size, config.learning_rate = 30.0, 32, 1e-3
    config.schedule.warmup_epochs = 2.0
    config.task.label_smoothing = 0.1


def imagenet(config):
    """Swin-T, 300 epochs: appendix A2.1 of the paper; batch 1024, 81.2 % there, ours not run."""
    common.imagenet(config, common.IMAGENET, crop=0.9)
    common.classifier(config, "swin.swin_t", drop_path=0.2)
    config.model.num_classes = 1000
    config.batch_size, config.epochs, config.learning_rate = 1024, 300.0, 1e-3
    config.schedule.update({"warmup_epochs": 20.0, "warmup_from": 1e-6, "final": 1e-5})
    config.optimizer.clip = 5.0
