"""SETR: Zheng et al. 2021, "Rethinking Semantic Segmentation from a Sequence-to-Sequence
Perspective with Transformers" (arXiv:2012.15840).

    python -m vit_jax.main --config=configs/setr.py           scenes of 96x96 pixels, 13 classes
    python -m vit_jax.main --config=configs/setr.py:folder --config.data.data_dir=FOLDER
    python -m vit_jax.main --config=configs/setr.py:camvid --config.data.data_dir=TFDS
    python -m vit_jax.main --config=configs/setr.py:ade20k --config.data.data_dir=TFDS

`folder` takes pictures of one's own with masks; `camvid` is 468 street scenes, 11 classes.
`--config.eval.inference.window=512` and so on test by windows, flips and scales.
Numbers: experiments/scenes. The paper's 48.6 mIoU on ADE20K was not run here.
"""

from configs import common

CAMVID = {"mean": (0.4094, 0.4216, 0.4284), "std": (0.3054, 0.3099, 0.3057)}


def get_config(recipe: str = "scenes"):
    """The config of a recipe: scenes, folder, camvid, ade20k or tiny."""
    return common.choose(
        recipe,
        {"scenes": scenes, "folder": folder, "camvid": camvid, "ade20k": ade20k, "tiny": tiny},
    )


def small(config, *, auxiliary=True, **backbone):
    """The PUP decoder on a small ViT, for training from scratch."""
    own = {
        "target": "models.vit.ViT",
        "patch": 8,
        "width": 96,
        "depth": 4,
        "heads": 4,
        "mlp_ratio": 2.0,
        "pooling": "mean",
        "taps": (1, 3),
        "image_size": config.get_ref("image_size"),
        "dtype": config.get_ref("dtype"),
    }
    decoder = {"decoder": "pup", "features": 32, "auxiliary": auxiliary}
    common.segmenter(config, "setr.SETR", **decoder, backbone=own | backbone)


def scenes(config):
    """A small ViT with the PUP decoder, from scratch; 64 tokens.

    Digits are 8 % of the pixels, so theirs weigh 8 times as much as the grounds'.
    """
    common.scenes(config, boxes=0, stuff="names", image_size=64)
    common.inference(config)
    small(config, auxiliary=False, width=64, taps=(3,))
    common.muon(config)
    config.task.class_weights = (8.0,) * 10 + (1.0,) * 3
    config.steps, config.batch_size, config.learning_rate = 5500, 16, 3e-3
    config.schedule.warmup_steps = 200
    config.eval_every = 1100


def camvid(config):
    """CamVid through TFDS: 367 + 101 pictures of 360x480, 11 classes; from scratch.

    Squares of 240 pixels out of pictures at two thirds of their size, 225 tokens: for about an hour
    of two CPU cores.
    """
    shapes = ((240, 320),)
    common.segments(
        config, "camvid", crop=240, short=240, longest=320, shapes=shapes, statistics=CAMVID
    )
    small(config, patch=16, width=128, depth=6, taps=(2, 5))
    common.muon(config)
    config.steps, config.batch_size, config.learning_rate = 1500, 8, 2e-3
    config.schedule.warmup_steps = 150
    config.eval_every = 150


def folder(config):
    """Pictures of one's own with masks (`vit_jax/data/masks.py`) in `data.data_dir`; from scratch.

    Squares of 256 pixels out of pictures whose short side is that long.
    """
    shapes = ((256, 384), (384, 256), (384, 384), (512, 512))
    imagenet = common.IMAGENET
    common.segments(
        config, "masks", crop=256, short=256, longest=512, shapes=shapes, statistics=imagenet
    )
    small(config, patch=16, width=128, depth=6, taps=(2, 5))
    common.muon(config)
    config.epochs, config.batch_size, config.learning_rate = 100.0, 8, 2e-3
    config.schedule.warmup_epochs = 2.0


def ade20k(config):
    """SETR-MLA on ViT-L/16, ADE20K (`scene_parse150`): section 4.1 of the paper.

    SGD with momentum 0.9 and without weight decay, 1e-3, 16 parts of 512x512 a batch, 160,000
    steps: 48.6 mIoU, 50.3 with several scales. The rate falls with the power 0.9 of what is left.
    Tested by windows of 512. It starts from weights of ImageNet-21k:
    --config.init=hf:timm/vit_large_patch16_224.augreg_in21k.
    """
    shapes = ((512, 704), (704, 704), (1024, 1024), (2048, 2048))
    ade, imagenet = "scene_parse150", common.IMAGENET
    common.segments(
        config, ade, crop=512, short=512, longest=2048, shapes=shapes, statistics=imagenet
    )
    common.segmenter(config, "setr.setr_mla_l16")
    config.model.num_classes = 150
    config.data.threads = 16
    config.batch_size, config.steps, config.learning_rate = 16, 160_000, 1e-3
    config.optimizer.update({"name": "sgd", "momentum": 0.9, "weight_decay": 0.0, "clip": 0.0})
    config.schedule.name = "polynomial"
    config.eval_every = 16_000
    config.eval.inference.update({"window": 512, "stride": 341})


def tiny(config):
    """Two steps of a small one."""
    scenes(config)
    common.tiny(config)
    config.schedule.warmup_steps = 0
    config.model.features = 8
    config.model.backbone.update({"width": 16, "depth": 2, "heads": 2, "taps": (0, 1)})
