"""CLIP: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision" (arXiv:2103.00020).

    python -m vit_jax.main --config=configs/clip.py           scenes of digits with sentences
    python -m vit_jax.main --config=configs/clip.py:folder --config.data.data_dir=FOLDER
    python -m vit_jax.main --config=configs/clip.py:shards --config.data.data_dir=FOLDER
    python -m vit_jax.main --config=configs/clip.py:coco --config.data.data_dir=FOLDER
    python -m vit_jax.main --config=configs/clip.py:imagetext --config.data.data_dir=SHARDS

`folder` takes pictures of one's own with a `captions.jsonl` or `captions.txt`, `shards` tar files
in WebDataset's form, `coco` COCO's captions. Two overrides make it SigLIP (Zhai et al. 2023,
arXiv:2303.15343), whose loss decides for each pair alone:

    --config.task.loss=sigmoid --config.model.bias=-10.0

The paper's 63.2 % of ImageNet without a label was not run here.
"""

from ml_collections import ConfigDict, config_dict

from configs import common

STATISTICS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
HIGHEST = 4.6052  # ln 100: the logits are scaled by 100 at most, section 2.5


def get_config(recipe: str = "scenes"):
    """The config of a recipe: scenes, folder, shards, coco, imagetext or tiny."""
    return common.choose(
        recipe,
        {
            "scenes": scenes,
            "folder": folder,
            "shards": shards,
            "coco": coco,
            "imagetext": imagetext,
            "tiny": tiny,
        },
    )


def contrast(config, features, backbone, text):
    """Sets the task, and a model of a ViT and a text transformer with these fields."""
    dtype = config.get_ref("dtype")
    shared = {"dtype": dtype, "scan": False}
    vit = {"target": "models.vit.ViT", "image_size": config.get_ref("image_size")}
    words = {
        "target": "models.clip.TextTransformer",
        "vocabulary": 0,  # as many as the tokenizer has
        "end": -1,  # the tokenizer's
        "length": config.data.get_ref("length"),
    }
    with config.unlocked():
        config.task = ConfigDict(
            {"target": "tasks.contrastive.Contrastive", "loss": "softmax", "among": 0}
        )
        config.model = ConfigDict(
            {
                "target": "models.clip.CLIP",
                "features": features,
                "bias": config_dict.placeholder(float),  # a number with the sigmoid loss
                "dtype": dtype,
                "backbone": vit | shared | {"remat": common.remat()} | backbone,
                "text": words | shared | {"remat": common.remat()} | text,
            }
        )
    config.optimizer.clamp = (("^logit_scale$", 0.0, HIGHEST),)


def published(config):
    """ViT-B/32: tables 18 and 20 of the paper, in bfloat16."""
    encoder = {"activation": "quick_gelu", "epsilon": 1e-5}
    vit = {"patch": 32, "width": 768, "depth": 12, "heads": 12, "pre_norm": True}
    text = {"width": 512, "depth": 12, "heads": 8}
    config.image_size = 224
    config.data.length = 77
    contrast(config, 512, vit | {"patch_bias": False} | encoder, text | encoder)


def small(config):
    """Encoders to start from scratch with, on thousands of pictures."""
    vit = {"patch": 16, "width": 192, "depth": 6, "heads": 3, "pooling": "mean"}
    contrast(config, 128, vit, {"width": 192, "depth": 4, "heads": 3, "activation": "gelu"})


def pictures(config, crop=(0.9, 1.0)):
    """Squares of pictures; no flip, since a caption may say left and right."""
    size = config.get_ref("image_size")
    config.train.transforms = (
        common.tokenize(config, "random"),
        common.step("RandomResizedCrop", size=size, scale=crop, interpolation="bicubic"),
        common.standardize(STATISTICS),
    )
    config.eval.transforms = (
        common.tokenize(config, "first"),
        common.step("ResizeCenterCrop", size=size, crop=1.0, interpolation="bicubic"),
        common.standardize(STATISTICS),
    )


def scenes(config):
    """A small ViT and a smaller text transformer, on scenes of 96x96 seen at 64x64."""
    common.scenes(config, boxes=0, stuff="none", image_size=64)
    with config.unlocked():
        config.data.options.sentences = "all"
    config.data.length, config.data.vocabulary = 16, 512
    backbone = {"patch": 8, "width": 64, "depth": 4, "heads": 4, "pooling": "mean"}
    text = {"width": 64, "depth": 2, "heads": 4, "activation": "gelu"}
    contrast(config, 64, backbone, text)
    resize, standardize, pad = config.train.transforms
    pad.segmentation = False
    for part, choose in (("train", "random"), ("eval", "first")):
        config[part].transforms = (common.tokenize(config, choose), resize, standardize, pad)
    config.task.among = 256
    common.muon(config)
    config.steps, config.batch_size, config.learning_rate = 2500, 96, 2e-3
    config.schedule.warmup_steps = 200
    config.eval_every = 500


def folder(config):
    """Pictures of one's own with captions in `data.data_dir`, from scratch."""
    config.data.name = "captions"
    config.image_size = 224
    config.data.length, config.data.vocabulary = 32, 8000
    small(config)
    pictures(config, crop=(0.5, 1.0))
    config.epochs, config.batch_size, config.learning_rate = 30.0, 128, 1e-3
    config.schedule.warmup_epochs = 1.0
    config.optimizer.weight_decay = 0.1


def coco(config):
    """COCO's 118,287 pictures with five captions each, from scratch or from `init`."""
    folder(config)
    config.batch_size = 1024
    config.data.threads = 16


def shards(config):
    """Tar files of pictures with texts in `data.data_dir`, from scratch."""
    folder(config)
    config.data.name = "shards"


def imagetext(config):
    """ViT-B/32 on 400 million pictures with texts: tables 18 and 20 of the paper.

    32 epochs of batches of 32,768, Adam with decoupled weight decay 0.2, 5e-4 after 2,000 steps;
    the pictures' only augmentation is a random square.
    """
    config.dtype = "bfloat16"
    config.data.name = "shards"
    config.data.tokenizer = "hf:openai/clip-vit-base-patch32"
    published(config)
    config.model.text.vocabulary = 49_408
    pictures(config)
    config.epochs, config.batch_size, config.learning_rate = 32.0, 32_768, 5e-4
    config.eval_every = 5000
    config.schedule.warmup_steps = 2000
    config.optimizer.update({"weight_decay": 0.2, "b2": 0.98, "epsilon": 1e-6, "clip": 0.0})
    config.data.threads = 16


def tiny(config):
    """Two steps of a small one."""
    scenes(config)
    common.tiny(config)
    config.image_size = 32
    config.task.among = 0
    config.schedule.warmup_steps = 0
    config.model.features = 8
    config.model.backbone.update({"width": 16, "depth": 1, "heads": 2})
    config.model.text.update({"width": 16, "depth": 1, "heads": 2})
