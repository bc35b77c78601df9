"""Captions, from sequence to sequence to the transformer: Sutskever et al. 2014 (arXiv:1409.3215),
Xu et al. 2015, "Show, Attend and Tell" (arXiv:1502.03044), Vaswani et al. 2017 (arXiv:1706.03762).

    python -m vit_jax.main --config=configs/captioner.py      scenes of two digits
    python -m vit_jax.main --config=configs/captioner.py:folder --config.data.data_dir=FOLDER
    python -m vit_jax.main --config=configs/captioner.py:coco --config.data.data_dir=COCO

`--config.model.decoder=attention` is an LSTM that looks at the picture, `lstm` one that was told of
it once. `folder` takes pictures of one's own with a `captions.jsonl` or `captions.txt`, `coco` the
plain folder of COCO or what TFDS prepares. Numbers: experiments/captions. Xu et al. report a BLEU-4
of 24.3 on COCO with soft attention; ours not run.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(recipe: str = "scenes"):
    """The config of a recipe: scenes, folder, coco or tiny."""
    return common.choose(recipe, {"scenes": scenes, "folder": folder, "coco": coco, "tiny": tiny})


def captioner(config, backbone, **decoder):
    """Sets the task, and a model that reads `backbone` and writes with these fields."""
    with config.unlocked():
        config.task = ConfigDict({"target": "tasks.captioning.Captioning", "label_smoothing": 0.0})
        config.model = ConfigDict(
            {
                "target": "models.captioner.Captioner",
                "vocabulary": 0,  # as many as the tokenizer has
                "length": config.data.get_ref("length"),
                "decoder": "transformer",
                "dropout": 0.0,
                "beams": 1,  # greedy in evaluation; `predict --beam` may follow more
                "length_penalty": 0.6,
                "start": -1,  # the tokenizer's, as the end and the padding
                "end": -1,
                "padding": -1,
                "dtype": config.get_ref("dtype"),
                **decoder,
                "backbone": backbone | {"dtype": config.get_ref("dtype")},
            }
        )


def vit(config, **fields):
    """A ViT to start from scratch with."""
    own = {
        "target": "models.vit.ViT",
        "pooling": "mean",
        "image_size": config.get_ref("image_size"),
    }
    return own | fields


def scenes(config):
    """Two digits on 64x64 pixels; any of the two sentences that are true of them is right."""
    common.scenes(config, boxes=0, stuff="none", image_size=64)
    with config.unlocked():
        # Drawn at the size that the model sees: half the work, and no blur.
        config.data.options.update({"size": 64, "digits": 2, "sentences": "all"})
    config.data.length, config.data.vocabulary = 16, 512
    # A small CNN, whose step is cheaper than that of a ViT with 64 tokens.
    backbone = {"target": "models.resnet.ResNet", "depths": (1, 1), "block": "basic", "width": 32}
    captioner(config, backbone, width=64, depth=2, heads=4, mlp_ratio=2.0)
    resize, standardize, pad = config.train.transforms
    pad.segmentation = False
    for part, choose in (("train", "random"), ("eval", "first")):
        config[part].transforms = (common.tokenize(config, choose), resize, standardize, pad)
    common.muon(config)
    config.steps, config.batch_size, config.learning_rate = 18_000, 16, 2e-3
    config.schedule.warmup_steps = 200
    config.eval_every = 3000


def pictures(config):
    """Squares of pictures; no flip, since a caption may say left and right."""
    size = config.get_ref("image_size")
    config.train.transforms = (
        common.tokenize(config, "random"),
        common.step("RandomResizedCrop", size=size, scale=(0.7, 1.0), interpolation="bicubic"),
        common.standardize(common.IMAGENET),
    )
    config.eval.transforms = (
        common.tokenize(config, "first"),
        common.step("ResizeCenterCrop", size=size, crop=1.0, interpolation="bicubic"),
        common.standardize(common.IMAGENET),
    )


def folder(config):
    """Pictures of one's own with captions in `data.data_dir`, from scratch."""
    config.data.name = "captions"
    config.image_size = 128
    config.data.length, config.data.vocabulary = 32, 4000
    backbone = vit(config, patch=16, width=192, depth=6, heads=3)
    captioner(config, backbone, width=192, depth=3, heads=3, mlp_ratio=4.0)
    config.model.dropout = config.task.label_smoothing = 0.1
    pictures(config)
    config.epochs, config.batch_size, config.learning_rate = 30.0, 64, 1e-3
    config.schedule.warmup_epochs = 1.0


def coco(config):
    """COCO 2017's 118,287 pictures with five captions each: a ViT-B/16 that a published checkpoint
    starts, and six blocks of decoder.

    It needs --config.init=hf:google/vit-base-patch16-224-in21k: 120,000 pictures do not teach a ViT
    to see. Sizes of the decoder, its dropout and smoothing are those of Vaswani et al. 2017.
    """
    config.data.name = "captions"
    config.data.threads = 16
    config.image_size = 224
    config.data.length, config.data.vocabulary = 32, 8000
    backbone = vit(config, patch=16, width=768, depth=12, heads=12, pooling="token")
    captioner(config, backbone, width=512, depth=6, heads=8, mlp_ratio=4.0)
    config.model.dropout = config.task.label_smoothing = 0.1
    pictures(config)
    config.epochs, config.batch_size, config.learning_rate = 20.0, 256, 4e-4
    config.schedule.warmup_epochs = 1.0
    config.optimizer.lr_scale = (("^backbone/", 0.1),)


def tiny(config):
    """Two steps of a small one."""
    scenes(config)
    common.tiny(config)
    config.image_size = 32
    config.schedule.warmup_steps = 0
    config.model.update({"width": 16, "depth": 1, "heads": 2})
    config.model.backbone.width = 8
