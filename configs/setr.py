"""SETR: Zheng et al. 2021, "Rethinking Semantic Segmentation from a Sequence-to-Sequence
Perspective with Transformers" (arXiv:2012.15840).

    python -m vit_jax.main --config=configs/setr.py           scenes of 96x96 pixels, 13 classes
    python -m vit_jax.main --config=configs/setr.py:folder --config.data.data_dir=FOLDER
    python -m vit_jax.main --config=configs/setr.py:camvid --config.data.data_dir=TFDS
    python -m vit_jax.main --config=configs/setr.py:ade20k --config.data.data_dir=TFDS

`folder` takes pictures of one's own with masks; `camvid` is 468 street scenes, 11 classes.
`--config.eval.inference.window=512` and so on test by windows, flips and scales.
Numbers: experiments/scenes, experiments/camvid. The paper's 48.6 mIoU on ADE20K was not run here.
"""

from configs import common


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
    """A small hybrid ViT with the PUP decoder, from scratch; 144 tokens of 8x8 pixels."""
    small(config, auxiliary=False, stem=(1,), stem_width=32, patch=2, taps=(3,))
    common.segmented_scenes(config, image_size=96, weight=2.0)
    common.muon(config, convolutions=True)
    config.steps, config.batch_size, config.learning_rate = 8800, 8, 6e-3
    config.schedule.warmup_steps = 200
    config.eval_every = 2200


def camvid(config):
    """CamVid from scratch; 225 tokens of 16x16 pixels behind a ResNet's root."""
    common.camvid(config)
    behind_root(config)


def behind_root(config):
    """Tokens of 16x16 pixels behind a ResNet's root, for pictures of any size."""
    small(config, stem=(), stem_width=32, patch=4, width=128, depth=6, taps=(2, 5))


def folder(config):
    """Pictures of one's own with masks in `data.data_dir`, from scratch."""
    common.masks(config)
    behind_root(config)


def ade20k(config):
    """SETR-MLA on ViT-L/16, ADE20K (`scene_parse150`): section 4.1 of the paper.

    SGD with momentum 0.9 and without weight decay, 1e-3, 16 parts of 512x512 a batch, 160,000
    steps: 48.6 mIoU, 50.3 with several scales. The rate falls with the power 0.9 of what is left.
    Tested by windows of 512. It starts from weights of ImageNet-21k:
    --config.init=hf:timm/vit_large_patch16_224.augreg_in21k.
    """
    common.ade20k(config, "setr.setr_mla_l16")
    config.learning_rate = 1e-3
    config.optimizer.update({"name": "sgd", "momentum": 0.9, "weight_decay": 0.0, "clip": 0.0})
    config.schedule.name = "polynomial"
    config.eval.inference.update({"window": 512, "stride": 341})


def tiny(config):
    """Two steps of a small one."""
    scenes(config)
    common.tiny(config)
    config.schedule.warmup_steps = 0
    config.model.features = 8
    config.model.backbone.update({"width": 16, "depth": 2, "heads": 2, "taps": (0, 1)})
