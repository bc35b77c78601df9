"""CvT: Wu et al. 2021, "Introducing Convolutions to Vision Transformers" (arXiv:2103.15808).

    python -m vit_jax.main --config=configs/cvt.py            the digits: `make train`
    python -m vit_jax.main --config=configs/cvt.py:cifar10    8.5 epochs of CIFAR-10
    python -m vit_jax.main --config=configs/cvt.py:imagenet   CvT-13 as the paper trained it

Numbers: README.md and experiments/cifar10. ImageNet: 81.6 % for CvT-13 in the paper; ours not run.
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


def small(config, kernels, strides, paddings, widths, depths, heads, **fields):
    """A CvT for small pictures: the first embedding has a smaller kernel and stride."""
    common.classifier(
        config,
        "cvt.CvT",
        kernels=kernels,
        strides=strides,
        paddings=paddings,
        widths=widths,
        depths=depths,
        heads=heads,
        mlp_ratio=2.0,
        **fields,
    )


def digits(config):
    """8x8 pictures enlarged to 16x16; maps of 8x8, 4x4 and 2x2."""
    common.digits(config, image_size=16)
    small(config, (3, 3, 3), (2, 2, 2), (1, 1, 1), (32, 48, 64), (1, 1, 2), (1, 3, 4))
    common.muon(config)
    config.epochs, config.learning_rate = 30.0, 4e-3
    config.schedule.warmup_epochs = 2.0


def tiny(config):
    """Two steps of a small one."""
    digits(config)
    small(config, (3, 3, 3), (2, 2, 2), (1, 1, 1), (8, 8, 16), (1, 1, 1), (1, 1, 2))
    common.tiny(config)


def cifar10(config):
    """Maps of 16x16, 8x8 and 4x4; attention on the last two; 25 to 40 minutes of two CPU cores.

    Each embedding is two or three convolutions: in few epochs they learn faster than attention.
    """
    common.cifar10(config, padding=2)
    stages = (3, 3, 3), (2, 2, 2), (1, 1, 1), (48, 96, 192), (0, 1, 2), (1, 2, 4)
    small(config, *stages, embed_depths=(3, 3, 2))
    common.muon(config, convolutions=True)
    config.batch_size, config.epochs, config.learning_rate = 128, 8.5, 6e-3
    config.schedule.update({"name": "linear", "warmup_epochs": 0.2})
    config.task.label_smoothing = 0.1
    config.eval_every = 830


def folder(config):
    """A small CvT from scratch on pictures of one's own."""
    common.folder(config, image_size=96)
    small(config, (7, 3, 3), (4, 2, 2), (2, 1, 1), (48, 96, 192), (1, 2, 3), (1, 3, 6))
    config.epochs, config.batch_size, config.learning_rate = 30.0, 32, 1e-3
    config.schedule.warmup_epochs = 2.0
    config.task.label_smoothing = 0.1


def imagenet(config):
    """CvT-13, 300 epochs: section 4.1 of the paper; batch 2048, 81.6 % there, ours not run."""
    common.imagenet(config, common.IMAGENET, crop=0.875)
    common.classifier(config, "cvt.cvt_13", drop_path=0.1)
    config.model.num_classes = 1000
    config.batch_size, config.epochs, config.learning_rate = 2048, 300.0, 2e-3
    config.schedule.update({"warmup_epochs": 5.0, "warmup_from": 1e-6, "final": 1e-5})
    config.optimizer.clip = 5.0
