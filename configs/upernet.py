"""UPerNet on Swin: Xiao et al. 2018, "Unified Perceptual Parsing for Scene Understanding"
(arXiv:1807.10221), and Liu et al. 2021 (arXiv:2103.14030), section 4.3.

    python -m vit_jax.main --config=configs/upernet.py        scenes of 96x96 pixels, 13 classes
    python -m vit_jax.main --config=configs/upernet.py:folder --config.data.data_dir=FOLDER
    python -m vit_jax.main --config=configs/upernet.py:camvid --config.data.data_dir=TFDS
    python -m vit_jax.main --config=configs/upernet.py:ade20k --config.data.data_dir=TFDS

`folder` takes pictures of one's own with masks; `camvid` is 468 street scenes, 11 classes.
`--config.eval.inference.flip=True` and its other keys test by windows, flips and scales.
Numbers: experiments/scenes. The published 44.5 mIoU on ADE20K (Swin-T) was not run here.
"""

from configs import common

CAMVID = {"mean": (0.4094, 0.4216, 0.4284), "std": (0.3054, 0.3099, 0.3057)}


def get_config(recipe: str = "scenes"):
    """The config of a recipe: scenes, folder, camvid, ade20k or tiny."""
    return common.choose(
        recipe,
        {"scenes": scenes, "folder": folder, "camvid": camvid, "ade20k": ade20k, "tiny": tiny},
    )


def small(config, *, features=32, auxiliary_features=256, **backbone):
    """A pyramid on a small Swin, for training from scratch."""
    own = {
        "target": "models.swin.Swin",
        "patch": 4,
        "width": 32,
        "depths": (2, 2, 2),
        "heads": (1, 2, 4),
        "window": 6,
        "mlp_ratio": 2.0,
        "dtype": config.get_ref("dtype"),
    }
    head = {"features": features, "auxiliary_features": auxiliary_features}
    common.segmenter(config, "upernet.UPerNet", **head, backbone=own | backbone)


def scenes(config):
    """A small Swin on patches of 2 pixels, from scratch: digits are too thin for those of 4.

    Digits are 8 % of the pixels, so theirs weigh 8 times as much as the grounds'.
    """
    common.scenes(config, boxes=0, stuff="names", image_size=64)
    common.inference(config)
    own = {"patch": 2, "width": 16, "depths": (1, 1, 2), "window": 4}
    small(config, features=16, auxiliary_features=0, **own)
    common.muon(config)
    config.task.class_weights = (8.0,) * 10 + (1.0,) * 3
    config.steps, config.batch_size, config.learning_rate = 5000, 16, 3e-3
    config.schedule.warmup_steps = 200
    config.eval_every = 1000


def tiny(config):
    """Two steps of a small one."""
    scenes(config)
    common.tiny(config)
    config.schedule.warmup_steps = 0
    config.model.features = 8
    config.model.backbone.update({"width": 8, "depths": (1, 1), "heads": (1, 2)})


def camvid(config):
    """CamVid through TFDS: 367 + 101 pictures of 360x480, 11 classes; from scratch.

    Squares of 240 pixels out of pictures at two thirds of their size: for about an hour of two CPU
    cores.
    """
    shapes = ((240, 320),)
    sizes = {"crop": 240, "short": 240, "longest": 320, "shapes": shapes}
    common.segments(config, "camvid", **sizes, statistics=CAMVID)
    small(config)
    common.muon(config)
    config.steps, config.batch_size, config.learning_rate = 1500, 8, 2e-3
    config.schedule.warmup_steps = 150
    config.eval_every = 150


def folder(config):
    """Pictures of one's own with masks (`vit_jax/data/masks.py`) in `data.data_dir`; from scratch.

    Squares of 256 pixels out of pictures whose short side is that long.
    """
    shapes = ((256, 384), (384, 256), (384, 384), (512, 512))
    sizes = {"crop": 256, "short": 256, "longest": 512, "shapes": shapes}
    common.segments(config, "masks", **sizes, statistics=common.IMAGENET)
    small(config, window=8)
    common.muon(config)
    config.epochs, config.batch_size, config.learning_rate = 100.0, 8, 2e-3
    config.schedule.warmup_epochs = 2.0


def ade20k(config):
    """UPerNet on Swin-T, ADE20K (`scene_parse150`): Liu et al. 2021, section 4.3; 59,943,398
    parameters, with the auxiliary head.

    AdamW, 6e-5, weight decay 0.01, 1,500 steps of warm-up and then a line to 0, 16 parts of 512x512
    a batch, 160,000 steps: 44.5 mIoU; 46.1 with the scales 0.5, 0.75 .. 1.75 and flips
    (--config.eval.inference). It starts from weights of ImageNet:
    --config.init=hf:timm/swin_tiny_patch4_window7_224.ms_in1k.
    """
    shapes = ((512, 704), (704, 704), (1024, 1024), (2048, 2048))
    ade, imagenet = "scene_parse150", common.IMAGENET
    common.segments(
        config, ade, crop=512, short=512, longest=2048, shapes=shapes, statistics=imagenet
    )
    common.segmenter(config, "upernet.upernet_swin_t")
    config.model.num_classes = 150
    config.data.threads = 16
    config.batch_size, config.steps, config.learning_rate = 16, 160_000, 6e-5
    config.optimizer.update({"weight_decay": 0.01, "clip": 0.0})
    config.schedule.update({"name": "linear", "warmup_steps": 1500})
    config.eval_every = 16_000
