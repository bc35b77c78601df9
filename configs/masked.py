"""Learning without labels: patches of pictures are hidden, and restored, in three ways.

MAE: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners" (arXiv:2111.06377);
SimMIM: Xie et al. 2022, "SimMIM: A Simple Framework for Masked Image Modeling" (arXiv:2111.09886);
masked patch prediction: Dosovitskiy et al. 2021 (arXiv:2010.11929), appendix B.1.2.

    python -m vit_jax.main --config=configs/masked.py            MAE on the digits
    python -m vit_jax.main --config=configs/masked.py:simmim     SimMIM on them, with Swin
    python -m vit_jax.main --config=configs/masked.py:colours    masked patch prediction on them
    python -m vit_jax.main --config=configs/masked.py:cifar10    MAE on CIFAR-10
    python -m vit_jax.main --config=configs/masked.py:folder --config.data.data_dir=my_pictures
    python -m vit_jax.main --config=configs/masked.py:imagenet   MAE-B/16 of the paper

What was learned is the `backbone`, from which any other recipe starts with the run folder as its
`init`, such as configs/vit.py (all of it, :finetune, :probe) and, after :simmim, configs/swin.py.
The papers' sizes on ImageNet: imagenet, imagenet_l and imagenet_h (MAE: 83.6, 85.9 and 86.9 %
after fine-tuning), imagenet_simmim (Swin-B: 84.0 %), imagenet_colours (ViT-B/16 on JFT: 79.9 %).
Ours not run. Numbers: experiments/masked_vs_supervised.
"""

from ml_collections import ConfigDict, FieldReference

from configs import common


def get_config(recipe: str = "digits"):
    """The config of a recipe: digits, simmim, colours, cifar10, folder, imagenet, imagenet_l,
    imagenet_h, imagenet_simmim, imagenet_colours or tiny.
    """
    return common.choose(
        recipe,
        {
            "digits": digits,
            "simmim": simmim,
            "colours": colours,
            "cifar10": cifar10,
            "folder": folder,
            "imagenet": imagenet,
            "imagenet_l": imagenet_l,
            "imagenet_h": imagenet_h,
            "imagenet_simmim": imagenet_simmim,
            "imagenet_colours": imagenet_colours,
            "tiny": tiny,
        },
    )


def hide(config, statistics, *, patch, ratio=0.75, unit=0, way="token"):
    """Adds the step that hides patches to both lists of transforms; returns the ratio.

    It is one number in training, in evaluation and, with MAE, in the model:
    `--config.train.transforms[N].ratio` sets all of them.
    """
    ratio = FieldReference(ratio)
    step = {"target": "data.patches.HidePatches", "patch": patch, "unit": unit, "way": way}
    for part in (config.train, config.eval):
        moves = [t for t in part.transforms if not t.target.endswith(".Standardize")]
        hidden = ConfigDict(step | {"ratio": ratio})
        part.transforms = (*moves, hidden, common.standardize(statistics))
    return ratio


def model(config, name, task, statistics, **fields):
    """Sets the model, around a backbone, and the task."""
    with config.unlocked():
        config.model = ConfigDict(
            {"target": f"models.masked.{name}", "dtype": config.get_ref("dtype"), **fields}
        )
        config.task = ConfigDict({"target": f"tasks.masked.{task.pop('name')}"} | task | statistics)


def vit_of(config, recipe):
    """The ViT of a recipe of configs/vit.py, which can then start from what was learned."""
    shared = {"pooling": "mean", "image_size": config.get_ref("image_size")}
    return common.backbone(config, "vit.ViT", **shared, **VITS[recipe])


# As configs/vit.py has them: a config imports no other.
VITS = {
    "digits": {"patch": 4, "width": 64, "depth": 4, "heads": 4, "mlp_ratio": 2.0},
    "cifar10": {
        "patch": 4,
        "width": 64,
        "depth": 6,
        "heads": 4,
        "positions": "sincos",
        "activation": "gelu_tanh",
    },
    "folder": {"patch": 8, "width": 128, "depth": 6, "heads": 4},
}


def mae(config, statistics, vit, *, ratio=0.75, patch, **decoder):
    """An MAE with normalised pixels."""
    ratio = hide(config, statistics, patch=patch, ratio=ratio)
    task = {"name": "MaskedPixels", "loss": "l2", "normalized": True}
    model(
        config, "MAE", task, statistics, ratio=ratio, remat=common.remat(), **decoder, backbone=vit
    )


def small_decoder(width):
    """Two blocks of that width."""
    return {
        "decoder_width": width,
        "decoder_depth": 2,
        "decoder_heads": 4,
        "decoder_hidden": 2 * width,
    }


def digits(config):
    """MAE on the digits of configs/vit.py: 16 patches, of which 10 are hidden."""
    common.digits(config, image_size=16)
    vit = vit_of(config, "digits")
    mae(config, common.DIGITS, vit, patch=4, ratio=0.6, **small_decoder(64))
    common.muon(config)
    config.epochs, config.learning_rate = 100.0, 4e-3
    config.schedule.warmup_epochs = 5.0
    config.eval_every = 220


def simmim(config):
    """SimMIM on the digits, with the Swin of configs/swin.py: 10 of 16 squares of 4x4 pixels."""
    common.digits(config, image_size=16)
    hide(config, common.DIGITS, patch=2, unit=4, ratio=0.6)
    swin = common.backbone(
        config,
        "swin.Swin",
        width=64,
        depths=(2, 2),
        heads=(2, 4),
        window=4,
        patch=2,
        mlp_ratio=2.0,
        norm_map=True,
    )
    task = {"name": "MaskedPixels", "loss": "l1", "normalized": False}
    model(config, "SimMIM", task, common.DIGITS, backbone=swin)
    common.muon(config)
    config.epochs, config.learning_rate = 60.0, 4e-3
    config.schedule.warmup_epochs = 3.0
    config.eval_every = 220


def colours(config):
    """Masked patch prediction on the digits, with the ViT of configs/vit.py: half the patches."""
    common.digits(config, image_size=16)
    hide(config, common.DIGITS, patch=4, ratio=0.5, way="mixed")
    task = {"name": "MaskedColours", "bits": 3}
    vit = vit_of(config, "digits")
    model(config, "MaskedPatches", task, common.DIGITS, classes=512, backbone=vit)
    common.muon(config)
    config.epochs, config.learning_rate = 100.0, 4e-3
    config.schedule.warmup_epochs = 5.0
    config.eval_every = 220


def cifar10(config):
    """MAE on CIFAR-10, for the ViT of configs/vit.py:cifar10: 48 of 64 patches are hidden."""
    common.cifar10(config)
    vit = vit_of(config, "cifar10")
    mae(config, common.CIFAR10, vit, patch=4, **small_decoder(64))
    common.muon(config)
    config.batch_size, config.epochs, config.learning_rate = 128, 40.0, 5e-3
    config.schedule.warmup_epochs = 2.0


def folder(config):
    """MAE on pictures of one's own, for the ViT of configs/vit.py:folder.

    They need no classes: all pictures below `data.data_dir`.
    """
    common.folder(config, image_size=64)
    size = config.get_ref("image_size")
    config.train.transforms = (
        common.step("RandomResizedCrop", size=size, scale=(0.2, 1.0), interpolation="bicubic"),
        common.step("RandomFlip"),
        common.standardize(common.IMAGENET),
    )
    with config.unlocked():
        config.data.options.labels = False
    vit = vit_of(config, "folder")
    mae(config, common.IMAGENET, vit, patch=8, **small_decoder(128))
    config.epochs, config.batch_size, config.learning_rate = 200.0, 64, 1e-3
    config.schedule.warmup_epochs = 10.0
    config.optimizer.b2 = 0.95


def of_imagenet(config, *, scale):
    """ImageNet-1k cut and flipped, and nothing else, with the optimizer that all three share."""
    common.imagenet(config, common.IMAGENET, crop=0.875, mixing=False)
    size = config.get_ref("image_size")
    config.train.transforms = (
        common.step("RandomResizedCrop", size=size, scale=scale, interpolation="bicubic"),
        common.step("RandomFlip"),
        common.standardize(common.IMAGENET),
    )
    config.optimizer.update({"name": "adamw", "clip": 0.0, "weight_decay": 0.05})


def imagenet(config, size="vit.vit_b16", patch=16):
    """MAE, 800 epochs: section 4 and table 8 of the paper; its best run has 1600.

    The learning rate is 1.5e-4 for each 256 pictures of a batch of 4096.
    """
    of_imagenet(config, scale=(0.2, 1.0))
    vit = common.backbone(config, size, positions="sincos", image_size=config.get_ref("image_size"))
    decoder = {
        "decoder_width": 512,
        "decoder_depth": 8,
        "decoder_heads": 16,
        "decoder_hidden": 2048,
    }
    mae(config, common.IMAGENET, vit, patch=patch, **decoder)
    config.batch_size, config.epochs, config.learning_rate = 4096, 800.0, 1.5e-4 * 16
    config.schedule.warmup_epochs = 40.0
    config.optimizer.b2 = 0.95


def imagenet_l(config):
    """MAE with ViT-L/16."""
    imagenet(config, "vit.vit_l16")


def imagenet_h(config):
    """MAE with ViT-H/14: 256 patches."""
    imagenet(config, "vit.vit_h14", 14)


def imagenet_simmim(config):
    """SimMIM, Swin-B with windows of 6 at 192 pixels, 800 epochs: the authors' published config.

    60 % of squares of 32 pixels; 1e-4 for each 512 pictures of a batch of 2048, a tenth of it from
    epoch 700 on.
    """
    of_imagenet(config, scale=(0.67, 1.0))
    config.image_size = 192
    hide(config, common.IMAGENET, patch=4, unit=32, ratio=0.6)
    swin = common.backbone(config, "swin.swin_b", window=6, norm_map=True)
    task = {"name": "MaskedPixels", "loss": "l1", "normalized": False}
    model(config, "SimMIM", task, common.IMAGENET, backbone=swin)
    config.batch_size, config.epochs, config.learning_rate = 2048, 800.0, 4e-4
    config.schedule.update({"name": "steps", "drops": (0.875,), "warmup_epochs": 10.0})
    config.optimizer.clip = 5.0


def imagenet_colours(config):
    """Masked patch prediction, ViT-B/16: 1M steps of 4096 pictures, there of JFT-300M.

    Adam at 2e-4 with 10,000 steps of warm-up; the weight decay of 0.1 is that of the paper's other
    runs on JFT, as is the crop, of which the appendix says nothing.
    """
    of_imagenet(config, scale=(0.05, 1.0))
    hide(config, common.IMAGENET, patch=16, ratio=0.5, way="mixed")
    vit = common.backbone(config, "vit.vit_b16", image_size=config.get_ref("image_size"))
    task = {"name": "MaskedColours", "bits": 3}
    model(config, "MaskedPatches", task, common.IMAGENET, classes=512, backbone=vit)
    config.batch_size, config.steps, config.learning_rate = 4096, 1_000_000, 2e-4
    config.schedule.warmup_steps = 10_000
    config.optimizer.weight_decay = 0.1


def tiny(config):
    """Two steps of a small MAE."""
    digits(config)
    common.tiny(config)
    config.epochs, config.schedule.warmup_epochs = 0.0, 0.0
    config.model.backbone.update({"width": 16, "depth": 1, "heads": 2})
    config.model.update({"decoder_width": 16, "decoder_depth": 1, "decoder_hidden": 32})
