"""DETR: Carion et al. 2020, "End-to-End Object Detection with Transformers" (arXiv:2005.12872).

    python -m vit_jax.main --config=configs/detr.py           digits in scenes of 96x96 pixels
    python -m vit_jax.main --config=configs/detr.py:folder --config.data.data_dir=FOLDER
    python -m vit_jax.main --config=configs/detr.py:finetune --config.data.data_dir=FOLDER \
        --config.init=hf:facebook/detr-resnet-50
    python -m vit_jax.main --config=configs/detr.py:bccd --config.data.data_dir=TFDS
    python -m vit_jax.main --config=configs/detr.py:coco --config.data.data_dir=COCO

`folder` takes pictures of one's own in COCO's or VOC's form, and `finetune` a trained detector as
well; `bccd` is 292 microscope pictures.
Numbers: experiments/scenes, experiments/bccd. The paper's 42.0 AP on COCO (R50, 500 epochs) was
not run here.
"""

from ml_collections import ConfigDict

from configs import common

BCCD = {"mean": (0.7370, 0.6970, 0.7148), "std": (0.0613, 0.1024, 0.0761)}


def get_config(recipe: str = "scenes"):
    """The config of a recipe: scenes, folder, finetune, bccd, coco or tiny."""
    return common.choose(
        recipe,
        {
            "scenes": scenes,
            "folder": folder,
            "finetune": finetune,
            "bccd": bccd,
            "coco": coco,
            "tiny": tiny,
        },
    )


def small(config, *, queries, width, **backbone):
    """A small DETR on a small ViT, for training from scratch.

    DETR adds positions to keys, never to what is read there, and a CNN's maps hardly know where
    they are: on one, thousands of steps predict mean boxes only. A ViT's tokens know it, and its
    blocks do what DETR's encoder would.
    """
    with config.unlocked():
        config.task = ConfigDict({"target": "tasks.detection.Detection", "detections": queries})
        config.model = ConfigDict(
            {
                "target": "models.detr.DETR",
                "num_classes": 0,
                "queries": queries,
                "width": width,
                "heads": 4,
                "hidden": 256,
                "encoder_depth": 0,
                "decoder_depth": 2,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "dtype": config.get_ref("dtype"),
                "backbone": {
                    "target": "models.vit.ViT",
                    "width": width,
                    "heads": 4,
                    "mlp_ratio": 2.0,
                    "pooling": "mean",
                    "positions": "sincos",
                    "image_size": config.get_ref("image_size"),
                    "dtype": config.get_ref("dtype"),
                    **backbone,
                },
            }
        )
    config.optimizer.clip = 0.0
    config.optimizer.weight_decay = 0.01


def scenes(config):
    """A small DETR from scratch: 12 queries, 64 tokens of a ViT behind the root of a ResNet."""
    common.scenes(config, boxes=4, stuff="none", image_size=64)
    hybrid = {"stem": (), "stem_width": 32, "patch": 2, "positions": "learned"}
    small(config, queries=12, width=64, depth=4, **hybrid)
    common.muon(config, convolutions=True)
    config.steps, config.batch_size, config.learning_rate = 22_000, 16, 2e-3
    config.schedule.warmup_steps = 200
    config.eval_every = 2200


def tiny(config):
    """Two steps of a small one."""
    scenes(config)
    common.tiny(config)
    config.schedule.warmup_steps = 0
    config.model.update({"width": 16, "heads": 2, "hidden": 16})
    config.model.backbone.update({"width": 16, "depth": 1, "heads": 2})


def pictures(config, *steps, shapes, short, longest, boxes, statistics):
    """Pictures of any size, padded to one of `shapes`; mirrored, and by `steps`, in training."""
    standardize = common.standardize(statistics)
    pad = common.moving("Pad", shapes=shapes, boxes=boxes, segmentation=False)
    config.train.transforms = (common.moving("RandomFlip"), *steps, standardize, pad)
    resize = common.moving("ResizeShortSide", sizes=(short,), longest=longest)
    config.eval.transforms = (resize, standardize, pad)


def within(config, height, width, *, boxes, statistics):
    """Pictures of any size, resized within (height, width); parts of them in training."""
    config.image_size = width
    sides = {"short": height, "longest": width}
    pictures(
        config,
        common.moving("ScaleJitterCrop", size=(height, width), scale=(0.8, 1.4), **sides),
        common.step("ColorJitter", brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
        shapes=((height, width),),
        **sides,
        boxes=boxes,
        statistics=statistics,
    )


def bccd(config):
    """BCCD through TFDS: 205 + 87 pictures of 480x640, 3 kinds of blood cells, 13 to a picture.

    From scratch, at half the size: 300 tokens, 40 queries for at most 30 cells; about an hour of
    two CPU cores.
    """
    config.data.name = "bccd"
    within(config, 240, 320, boxes=40, statistics=BCCD)
    small(config, queries=40, width=96, patch=16, depth=4)
    common.muon(config)
    config.steps, config.batch_size, config.learning_rate = 10_000, 8, 2e-3
    config.schedule.warmup_steps = 200
    config.eval_every = 1000


def folder(config):
    """Pictures of one's own in `data.data_dir`, in COCO's or VOC's form, from scratch.

    Classes and the most boxes of a picture come from the data; 100 queries find up to 100.
    """
    config.data.name = "objects"
    within(config, 384, 384, boxes=-1, statistics=common.IMAGENET)
    small(config, queries=100, width=128, patch=16, depth=6)
    common.muon(config)
    config.epochs, config.batch_size, config.learning_rate = 300.0, 8, 2e-3
    config.schedule.warmup_epochs = 2.0


def finetune(config):
    """A trained detector on pictures of one's own: --config.init=hf:facebook/detr-resnet-50.

    All of it goes on but the layer that names classes, with the rates of its training, and pictures
    of 480x640 pixels or so, a third of the published ones: short sides of 384 to 480, and of 480 in
    evaluation.
    """
    config.data.name = "objects"
    config.image_size = 640
    sizes = {"sizes": (384, 416, 448, 480), "first": (400, 480), "part": (320, 480)}
    pictures(
        config,
        common.moving("ResizeOrCrop", longest=640, **sizes),
        shapes=((480, 640), (640, 480), (640, 640)),
        short=480,
        longest=640,
        boxes=-1,
        statistics=None,
    )
    common.model_of_init(config, "tasks.detection.Detection")
    published(config)
    config.batch_size, config.epochs = 8, 50.0
    config.schedule.warmup_epochs = 1.0


def published(config):
    """The paper's optimizer: section A.4; the backbone learns ten times slower."""
    config.learning_rate = 1e-4
    config.optimizer.update({"weight_decay": 1e-4, "clip": 0.1, "no_decay": ""})
    config.optimizer.decay_1d = True
    config.optimizer.lr_scale = (("^backbone/", 0.1),)
    config.schedule.update({"name": "steps", "drops": (0.8,)})


def coco(config):
    """DETR-R50 on COCO 2017: section 4 and A.4 of the paper; 41,302,368 parameters learn, and the
    222,400 of the backbone's root and first stage do not.

    AdamW, 1e-4 and a tenth of it in the backbone, weight decay 1e-4 on everything, 64 pictures a
    batch, 500 epochs with a tenth of the rate after 400: 42.0 AP; 300 with the drop after 200:
    40.6. Three and a half days of 16 V100 in the paper. As there, the backbone starts from
    ImageNet's weights (--config.init=hf:timm/resnet50.tv_in1k), without which its frozen norms are
    of no use. `data_dir` is the plain COCO folder.
    """
    config.data.name = "coco"
    config.data.threads = 16
    with config.unlocked():
        config.data.options = ConfigDict({"published_ids": True})
        config.task = ConfigDict({"target": "tasks.detection.Detection"})
        config.model = ConfigDict(
            {
                "target": "models.detr.detr_r50",
                "num_classes": 91,
                "queries": 100,
                "dropout": 0.1,
                "attention_dropout": 0.1,
                "remat": common.remat(),
                "dtype": config.get_ref("dtype"),
            }
        )
    # Most batches of portraits and landscapes fit the third; 1333 is the longest side there is.
    pictures(
        config,
        common.moving("ResizeOrCrop"),
        shapes=((800, 1344), (1344, 800), (1088, 1088), (1344, 1344)),
        short=800,
        longest=1333,
        boxes=100,
        statistics=common.IMAGENET,
    )
    published(config)
    config.batch_size, config.epochs = 64, 500.0
    config.optimizer.freeze = "^backbone/(root_conv|stage_1)/"
