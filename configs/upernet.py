"""UPerNet on Swin: Xiao et al. 2018, "Unified Perceptual Parsing for Scene Understanding"
(arXiv:1807.10221), and Liu et al. 2021 (arXiv:2103.14030), section 4.3.

    python -m vit_jax.main --config=configs/upernet.py        scenes of 96x96 pixels, 13 classes

Numbers: experiments/scenes. The published 44.5 mIoU on ADE20K (Swin-T) was not run here.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(recipe: str = "scenes"):
    """The config of a recipe: scenes or tiny."""
    return common.choose(recipe, {"scenes": scenes, "tiny": tiny})


def scenes(config):
    """A small Swin, from scratch."""
    common.scenes(config, boxes=0, stuff="names")
    with config.unlocked():
        config.task = ConfigDict({"target": "tasks.segmentation.Segmentation"})
        config.model = ConfigDict(
            {
                "target": "models.upernet.UPerNet",
                "num_classes": 0,
                "features": 32,
                "dtype": config.get_ref("dtype"),
                "backbone": {
                    "target": "models.swin.Swin",
                    "patch": 4,
                    "width": 32,
                    "depths": (2, 2, 2),
                    "heads": (1, 2, 4),
                    "window": 6,
                    "mlp_ratio": 2.0,
                    "dtype": config.get_ref("dtype"),
                },
            }
        )
    common.muon(config)
    config.steps, config.batch_size, config.learning_rate = 3000, 16, 3e-3
    config.schedule.warmup_steps = 200
    config.eval_every = 500


def tiny(config):
    """Two steps of a small one."""
    scenes(config)
    common.tiny(config)
    config.schedule.warmup_steps = 0
    config.model.features = 8
    config.model.backbone.update({"width": 8, "depths": (1, 1), "heads": (1, 2)})
