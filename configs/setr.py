"""SETR: Zheng et al. 2021, "Rethinking Semantic Segmentation from a Sequence-to-Sequence
Perspective with Transformers" (arXiv:2012.15840).

    python -m vit_jax.main --config=configs/setr.py           scenes of 96x96 pixels, 13 classes

Numbers: experiments/scenes. The paper's 48.6 mIoU on ADE20K was not run here.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(recipe: str = "scenes"):
    """The config of a recipe: scenes or tiny."""
    return common.choose(recipe, {"scenes": scenes, "tiny": tiny})


def scenes(config):
    """A small ViT with the PUP decoder, from scratch."""
    common.scenes(config, boxes=0, stuff="names")
    with config.unlocked():
        config.task = ConfigDict({"target": "tasks.segmentation.Segmentation"})
        config.model = ConfigDict(
            {
                "target": "models.setr.SETR",
                "num_classes": 0,
                "decoder": "pup",
                "features": 32,
                "dtype": config.get_ref("dtype"),
                "backbone": {
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
    config.model.backbone.update({"width": 16, "depth": 2, "heads": 2, "taps": (0, 1)})
