"""ViT: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (arXiv:2010.11929).

    python -m vit_jax.main --config=configs/vit.py            the digits
    python -m vit_jax.main --config=configs/vit.py:cifar10    10 epochs of CIFAR-10
    python -m vit_jax.main --config=configs/vit.py:folder --config.data.data_dir=my_pictures
    python -m vit_jax.main --config=configs/vit.py:imagenet   S/16 of Beyer et al. 2022
    python -m vit_jax.main --config=configs/vit.py:finetune --config.data.data_dir=my_pictures \
        --config.init=hf:google/vit-base-patch16-224-in21k    any checkpoint, on one's own pictures
    python -m vit_jax.main --config=configs/vit.py:probe ...  the same, and only the head learns

Numbers: README.md and experiments/cifar10. ImageNet: 76.5 % after 90 epochs in Beyer et al. 2022
(arXiv:2205.01580, table 1); ours not run.
"""

from configs import common


def get_config(recipe: str = "digits"):
    """The config of a recipe: digits, folder, finetune, probe, cifar10, imagenet or tiny."""
    return common.choose(
        recipe,
        {
            "digits": digits,
            "folder": folder,
            "finetune": finetune,
            "probe": probe,
            "cifar10": cifar10,
            "imagenet": imagenet,
            "tiny": tiny,
        },
    )


def digits(config):
    """8x8 pictures enlarged to 16x16, cut into 16 patches."""
    common.digits(config, image_size=16)
    common.classifier(
        config,
        "vit.ViT",
        patch=4,
        width=64,
        depth=4,
        heads=4,
        mlp_ratio=2.0,
        pooling="mean",
        image_size=config.get_ref("image_size"),
    )
    common.muon(config)
    config.epochs, config.learning_rate = 30.0, 4e-3
    config.schedule.warmup_epochs = 2.0


def tiny(config):
    """Two steps of a small one."""
    digits(config)
    common.tiny(config)
    config.model.backbone.update({"width": 16, "depth": 1, "heads": 2})


def cifar10(config):
    """Patch 4, width 64, 6 blocks, 10 epochs: a study notebook's ViT with 4 heads for its 8."""
    common.cifar10(config)
    common.classifier(
        config,
        "vit.ViT",
        patch=4,
        width=64,
        depth=6,
        heads=4,
        pooling="mean",
        positions="sincos",
        activation="gelu_tanh",
        image_size=config.get_ref("image_size"),
    )
    common.muon(config)
    config.batch_size, config.epochs, config.learning_rate = 128, 10.0, 5e-3
    config.schedule.warmup_epochs = 0.5


def folder(config):
    """A small ViT from scratch on pictures of one's own."""
    common.folder(config, image_size=64)
    common.classifier(
        config,
        "vit.ViT",
        patch=8,
        width=128,
        depth=6,
        heads=4,
        pooling="mean",
        image_size=config.get_ref("image_size"),
    )
    config.epochs, config.batch_size, config.learning_rate = 30.0, 32, 1e-3
    config.schedule.warmup_epochs = 2.0
    config.task.label_smoothing = 0.1


def finetune(config):
    """From the checkpoint of `init`, of any architecture: lower layers learn slower.

    Layer-wise decay of learning rates as in Clark et al. 2020 (arXiv:2003.10555) and Bao et al.
    2021 (arXiv:2106.08254).
    """
    common.finetune(config)
    config.epochs, config.batch_size, config.learning_rate = 10.0, 32, 3e-4
    config.schedule.warmup_epochs = 1.0
    config.optimizer.layer_decay = 0.75
    config.task.label_smoothing = 0.1


def probe(config):
    """A linear probe: the backbone stays as it is, its head learns."""
    common.finetune(config)
    config.epochs, config.batch_size, config.learning_rate = 10.0, 32, 1e-2
    config.optimizer.freeze = "^backbone/"
    config.optimizer.weight_decay = 0.0


def imagenet(config):
    """S/16, 90 epochs: Beyer et al. 2022, section 2; 76.5 % there, ours not run."""
    common.imagenet(config, common.HALF, crop=0.875, mixing=False)
    common.classifier(
        config,
        "vit.vit_s16",
        pooling="mean",
        positions="sincos",
        image_size=config.get_ref("image_size"),
    )
    config.model.num_classes = 1000
    size = config.get_ref("image_size")
    config.train.transforms = (
        common.step("RandomResizedCrop", size=size, scale=(0.05, 1.0)),
        common.step("RandomFlip"),
        # 10 in the paper; the operations here are timm's, whose 10 leaves some pictures black.
        common.step("RandAugment", layers=2, magnitude=9, std=0.0, probability=1.0),
        common.standardize(common.HALF),
    )
    with config.unlocked():
        config.train.mix = {"target": "data.transforms.MixUpCutMix", "mixup": 0.2, "cutmix": 0.0}
    config.task.label_smoothing = 0.0
    config.batch_size, config.epochs, config.learning_rate = 1024, 90.0, 1e-3
    config.schedule.warmup_steps = 10_000
    config.optimizer.weight_decay = 1e-4 / 1e-3  # decoupled from the learning rate in the paper
