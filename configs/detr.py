"""DETR: Carion et al. 2020, "End-to-End Object Detection with Transformers" (arXiv:2005.12872).

    python -m vit_jax.main --config=configs/detr.py           digits in scenes of 96x96 pixels

Numbers: experiments/scenes. The paper's 42.0 AP on COCO (R50, 500 epochs) was not run here.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(recipe: str = "scenes"):
    """The config of a recipe: scenes or tiny."""
    return common.choose(recipe, {"scenes": scenes, "tiny": tiny})


def scenes(config):
    """A small DETR, from scratch: 12 queries, a ResNet of two stages, 144 tokens."""
    common.scenes(config, boxes=4, stuff="none")
    with config.unlocked():
        config.task = ConfigDict({"target": "tasks.detection.Detection", "detections": 12})
        config.model = ConfigDict(
            {
                "target": "models.detr.DETR",
                "num_classes": 0,
                "queries": 12,
                "width": 96,
                "heads": 4,
                "hidden": 256,
                "encoder_depth": 2,
                "decoder_depth": 3,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "dtype": config.get_ref("dtype"),
                "backbone": {
                    "target": "models.resnet.ResNet",
                    "depths": (1, 2),
                    "block": "basic",
                    "width": 32,
                    "norm": "batch",
                    "dtype": config.get_ref("dtype"),
                },
            }
        )
    common.muon(config)
    config.steps, config.batch_size, config.learning_rate = 6000, 32, 2e-3
    config.schedule.warmup_steps = 200
    config.optimizer.clip = 0.1
    config.optimizer.weight_decay = 0.01
    config.eval_every = 500


def tiny(config):
    """Two steps of a small one."""
    scenes(config)
    common.tiny(config)
    config.schedule.warmup_steps = 0
    config.model.update({"width": 16, "heads": 2, "hidden": 16})
    config.model.update({"encoder_depth": 1, "decoder_depth": 2})
    config.model.backbone.update({"depths": (1,), "width": 8})
