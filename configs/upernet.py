"""UPerNet: Xiao et al. 2018, "Unified Perceptual Parsing for Scene Understanding"
(arXiv:1807.10221), on a ResNet as there, and on Swin as in Liu et al. 2021 (arXiv:2103.14030),
section 4.3.

    python -m vit_jax.main --config=configs/upernet.py        scenes of 96x96 pixels, 13 classes
    python -m vit_jax.main --config=configs/upernet.py:folder --config.data.data_dir=FOLDER
    python -m vit_jax.main --config=configs/upernet.py:finetune --config.data.data_dir=FOLDER \
        --config.init=hf:openmmlab/upernet-swin-tiny
    python -m vit_jax.main --config=configs/upernet.py:camvid --config.data.data_dir=TFDS
    python -m vit_jax.main --config=configs/upernet.py:ade20k --config.data.data_dir=TFDS

`folder` takes pictures of one's own with masks, and `finetune` a trained segmenter as well, a SETR
too; `camvid` is 468 street scenes, 11 classes. From
scratch a small ResNet learns faster than a small Swin of the same cost; `ade20k` is on Swin-T.
`--config.eval.inference.flip=True` and its other keys test by windows, flips and scales.
Numbers: experiments/scenes, experiments/camvid. The published 44.5 mIoU on ADE20K (Swin-T) was not
run here.
"""

from configs import common


def get_config(recipe: str = "scenes"):
    """The config of a recipe: scenes, folder, finetune, camvid, ade20k or tiny."""
    return common.choose(
        recipe,
        {
            "scenes": scenes,
            "folder": folder,
            "finetune": finetune,
            "camvid": camvid,
            "ade20k": ade20k,
            "tiny": tiny,
        },
    )


def small(config, *, depths, features):
    """A pyramid on a small ResNet, for training from scratch."""
    backbone = {
        "target": "models.resnet.ResNet",
        "depths": depths,
        "block": "basic",
        "width": 32,
        "dtype": config.get_ref("dtype"),
    }
    head = {"features": features, "auxiliary_features": 0, "map_norm": False}
    common.segmenter(config, "upernet.UPerNet", **head, backbone=backbone)


def scenes(config):
    """A small ResNet from scratch, on all 96x96 pixels: its first map is a quarter of them."""
    small(config, depths=(1, 2, 2), features=32)
    common.segmented_scenes(config, image_size=96, weight=1.5)
    common.muon(config, convolutions=True)
    config.steps, config.batch_size, config.learning_rate = 5200, 16, 6e-3
    config.schedule.warmup_steps = 200
    config.eval_every = 1300


def tiny(config):
    """Two steps of a small one."""
    scenes(config)
    common.tiny(config)
    config.schedule.warmup_steps = 0
    config.model.features = 8
    config.model.backbone.update({"width": 8, "depths": (1, 1)})


def camvid(config):
    """CamVid from scratch; about half an hour of two CPU cores."""
    common.camvid(config)
    small(config, depths=(2, 2, 2, 2), features=48)


def folder(config):
    """Pictures of one's own with masks in `data.data_dir`, from scratch."""
    common.masks(config)
    small(config, depths=(2, 2, 2, 2), features=48)


def finetune(config):
    """A trained segmenter on masks of one's own: --config.init=hf:openmmlab/upernet-swin-tiny.

    All of it goes on but the layers that name classes, with the rates of its training, on squares
    of 512 pixels out of pictures whose short side is that long.
    """
    shapes = ((512, 704), (704, 512), (704, 704), (1024, 1024))
    sizes = {"crop": 512, "short": 512, "longest": 1024, "shapes": shapes}
    common.segments(config, "masks", **sizes, statistics=None)
    common.model_of_init(config, "tasks.segmentation.Segmentation")
    config.epochs, config.batch_size = 50.0, 8
    published(config)
    config.schedule.warmup_epochs = 1.0


def published(config):
    """The published optimizer: AdamW and a line to 0."""
    config.learning_rate = 6e-5
    config.optimizer.update({"weight_decay": 0.01, "clip": 0.0})
    config.schedule.name = "linear"


def ade20k(config):
    """UPerNet on Swin-T, ADE20K (`scene_parse150`): Liu et al. 2021, section 4.3; 59,943,398
    parameters, with the auxiliary head.

    AdamW, 6e-5, weight decay 0.01, 1,500 steps of warm-up and then a line to 0, 16 parts of 512x512
    a batch, 160,000 steps: 44.5 mIoU; 46.1 with the scales 0.5, 0.75 .. 1.75 and flips
    (--config.eval.inference). It starts from weights of ImageNet:
    --config.init=hf:timm/swin_tiny_patch4_window7_224.ms_in1k.
    """
    common.ade20k(config, "upernet.upernet_swin_t")
    published(config)
    config.schedule.warmup_steps = 1500
