"""What the architectures' configs share: every key there is, and the recipes' data.

A config starts from `base()`, which is locked: a misspelt key stops it instead of being ignored.
"""

import difflib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict, FieldReference, config_dict

DIGITS = {"mean": (0.3053, 0.3053, 0.3053), "std": (0.3760, 0.3760, 0.3760)}
CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
SCENES = {"mean": (0.2780, 0.2914, 0.2599), "std": (0.1563, 0.1311, 0.1336)}
CAMVID = {"mean": (0.4094, 0.4216, 0.4284), "std": (0.3054, 0.3099, 0.3057)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def base() -> ConfigDict:
    """Every key with its default; 0 is "none" where a number may be absent. Locked."""
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 64  # of one update, over all devices
    # How long: the first of steps, examples and epochs that is not 0 counts.
    config.steps = 0
    config.examples = 0
    config.epochs = 0.0
    config.eval_every = 0  # steps; 0 is once an epoch
    config.checkpoint_every = 0  # steps; 0 is with each evaluation
    config.log_every = 0  # steps; 0 is about four times an epoch
    config.max_skipped = 10  # updates in a row that are not finite, after which the run stops
    config.hang_seconds = 1800.0  # without a finished step, then the process ends; 0 is never
    config.learning_rate = 1e-3
    config.accumulate = 1  # parts of a batch, one after the other: less memory, same update
    config.ema = 0.0  # decay of the running mean of the parameters
    config.image_size = 32
    # A checkpoint to start from: hf:OWNER/NAME, a file, a folder or a run; "" starts anew.
    config.init = ""
    config.init_skip = ""  # pattern of parameter names that start anew all the same
    config.dtype = "float32"  # of the computation; parameters are always float32
    # Devices on each axis; -1 is what is left. fsdp splits parameters and optimizer as well as the
    # batch, tensor the wide products; `sharding` says it otherwise for parameters whose name has a
    # pattern: (("head/kernel", ("fsdp", "tensor")),).
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.sharding = ()
    config.schedule = ConfigDict(
        {
            "name": "cosine",  # or linear, polynomial, steps, constant
            "warmup_steps": 0,
            "warmup_examples": 0,
            "warmup_epochs": 0.0,
            "warmup_from": 0.0,
            "final": 0.0,
            "power": 0.9,  # of what is left, with polynomial
            "drops": (),  # shares of the run, with steps: there the rate falls to `drop_to` of it
            "drop_to": 0.1,
        }
    )
    config.optimizer = ConfigDict(
        {
            "name": "adamw",  # or sgd, lamb, adafactor, muon
            "weight_decay": 0.05,
            "clip": 1.0,  # of the global gradient norm; 0 is off
            "b1": 0.9,
            "b2": 0.999,
            "epsilon": 1e-8,
            "momentum": 0.9,
            "nesterov": False,
            # Pattern of parameters without weight decay; None is biases, norms, tokens, positions.
            "no_decay": config_dict.placeholder(str),
            "decay_1d": False,  # weight decay on parameters of one axis too
            "muon_convolutions": False,  # muon turns their kernels too, as matrices
            "freeze": "",  # pattern of parameter names that stay as they are
            "layer_decay": 1.0,  # each earlier layer learns this much slower
            "lr_scale": (),  # ((pattern, factor), ...)
            "clamp": (),  # ((pattern, least, most), ...): ranges that parameters do not leave
        }
    )
    config.checkpoint = ConfigDict({"keep_last": 2, "keep_best": 1})
    config.data = ConfigDict(
        {
            "name": "digits",  # a file of vit_jax/data, or the name of a TFDS dataset
            "data_dir": "",
            "options": ConfigDict(),  # what that dataset's `open` takes besides
            # Of captions: where the tokenizer comes from, hf:OWNER/NAME, a tokenizer.json, a folder
            # or a run; "" trains one of `vocabulary` entries on the captions themselves.
            "tokenizer": "",
            "vocabulary": 8000,
            "length": 32,  # tokens of a caption, with its start and end
            "max_pixels": 178_956_970,  # larger pictures are refused before they are decoded
            "on_broken": "skip",  # or stop
            "max_broken": 0.05,  # share of the examples, past which the run stops all the same
            "threads": 2,
            "workers": 0,  # processes that read and transform; 0 is threads only
        }
    )
    config.train = ConfigDict({"transforms": (), "mix": ConfigDict()})
    config.eval = ConfigDict({"transforms": ()})
    config.task = ConfigDict(
        {"target": "tasks.classification.Classification", "label_smoothing": 0.0}
    )
    config.model = ConfigDict()
    return config.lock()


def remat() -> FieldReference:
    """Off; True, or what is kept, as a name of `vit_jax.layers.remat.POLICIES`."""
    return FieldReference(False, field_type=object)


def backbone(config: ConfigDict, size: str = "", **fields: Any) -> dict[str, Any]:
    """A backbone, by a named size or a class with its fields, with what every one of them has.

    A field `target` stands for the size where no model is named, but what is opened.
    """
    return {
        "target": f"models.{size}",
        "drop_path": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "dtype": config.get_ref("dtype"),
        "scan": False,
        "remat": remat(),
        **fields,
    }


def classifier(config: ConfigDict, size: str = "", **fields: Any) -> None:
    """Sets the model: a linear head on a `backbone`."""
    with config.unlocked():
        config.model = ConfigDict(
            {
                "target": "models.classifier.Classifier",
                "num_classes": 0,  # as many as the data has
                "dtype": config.get_ref("dtype"),
                "backbone": backbone(config, size, **fields),
            }
        )


def standardize(statistics: dict | None) -> ConfigDict:
    """The last transform: to float32 with mean 0 and deviation 1; None is as in `init`."""
    if statistics is None:
        return ConfigDict({"target": "init.standardize"})
    return ConfigDict({"target": "data.transforms.Standardize", **statistics})


def model_of_init(config: ConfigDict, target: str) -> None:
    """The whole model of the checkpoint of `init`, but for the layer that names classes.

    Args:
      config: changed in place.
      target: the task that it is for.
    """
    with config.unlocked():
        config.task = ConfigDict({"target": target})
        config.model = ConfigDict(
            {"target": "init.model", "num_classes": 0, "dtype": config.get_ref("dtype")}
        )
        config.model.backbone = ConfigDict({"dtype": config.get_ref("dtype")})


def step(name: str, **arguments) -> ConfigDict:
    """One transform of `vit_jax/data/transforms.py`."""
    return ConfigDict({"target": f"data.transforms.{name}", **arguments})


def tokenize(config: ConfigDict, choose: str = "random") -> ConfigDict:
    """The step that makes `tokens` of captions, as `config.data` says; "first" in evaluation."""
    references = {name: config.data.get_ref(name) for name in ("tokenizer", "length")}
    return ConfigDict({"target": "data.text.Tokenize", "choose": choose, **references})


def share(config: ConfigDict) -> None:
    """Adds the share of the training examples that is learned from, as many of each class: all."""
    with config.unlocked():
        config.data.options.share = 1.0


def digits(config: ConfigDict, image_size: int) -> None:
    """scikit-learn's 1,797 handwritten digits of 8x8, enlarged; 20 % held out."""
    config.data.name = "digits"
    share(config)
    config.image_size = image_size
    size = config.get_ref("image_size")
    config.train.transforms = (
        step("Resize", size=(32, 32)),  # first, so that a digit moves by a fraction of its pixels
        step("RandomCrop", size=32, padding=4),
        step("Resize", size=(size, size)),
        standardize(DIGITS),
    )
    config.eval.transforms = (
        step("Resize", size=(32, 32)),  # the same way: two enlargements blur more than one
        step("Resize", size=(size, size)),
        standardize(DIGITS),
    )
    config.task.label_smoothing = 0.1


def folder(config: ConfigDict, image_size: int) -> None:
    """Pictures of one's own in `data.data_dir`, one sub-folder a class."""
    config.data.name = "folder"
    share(config)
    config.image_size = image_size
    size = config.get_ref("image_size")
    config.train.transforms = (
        step("RandomResizedCrop", size=size, scale=(0.35, 1.0)),
        step("RandomFlip"),
        step("ColorJitter", brightness=0.3, contrast=0.3, saturation=0.3),
        standardize(IMAGENET),
    )
    config.eval.transforms = (step("ResizeCenterCrop", size=size), standardize(IMAGENET))


def finetune(config: ConfigDict) -> None:
    """Pictures of one's own, and the model, its weights and its preprocessing from `init`."""
    folder(config, image_size=224)
    size = config.get_ref("image_size")
    config.train.transforms = (
        step("RandomResizedCrop", size=size, scale=(0.35, 1.0), interpolation="bicubic"),
        step("RandomFlip"),
        standardize(None),
    )
    config.eval.transforms = (ConfigDict({"target": "init.preprocessing"}),)
    classifier(config, target="init.backbone", image_size=size)


def cifar10(config: ConfigDict, padding: int = 4) -> None:
    """CIFAR-10 (Krizhevsky 2009) through TFDS: 50,000 + 10,000 pictures of 32x32.

    Args:
      config: changed in place.
      padding: pixels by which a picture moves at most in training; a short run wants few.
    """
    config.data.name = "cifar10"
    share(config)
    config.image_size = 32
    config.train.transforms = (
        step("RandomCrop", size=32, padding=padding),
        step("RandomFlip"),
        standardize(CIFAR10),
    )
    config.eval.transforms = (standardize(CIFAR10),)


def imagenet(config: ConfigDict, statistics: dict, *, crop: float, mixing: bool = True) -> None:
    """ImageNet-1k (ILSVRC 2012) through TFDS, with the augmentation of DeiT, Swin and CvT."""
    config.data.name = "imagenet2012"
    config.image_size = 224
    config.data.threads = 16
    size = config.get_ref("image_size")
    config.train.transforms = (
        step("RandomResizedCrop", size=size, interpolation="bicubic"),
        step("RandomFlip"),
        step("RandAugment", layers=2, magnitude=9, std=0.5),
        standardize(statistics),
        step("RandomErasing", probability=0.25),
    )
    config.eval.transforms = (
        step("ResizeCenterCrop", size=size, crop=crop, interpolation="bicubic"),
        standardize(statistics),
    )
    config.task.label_smoothing = 0.1
    if mixing:
        with config.unlocked():
            config.train.mix = ConfigDict(
                {"target": "data.transforms.MixUpCutMix", "mixup": 0.8, "cutmix": 1.0}
            )


def scenes(config: ConfigDict, *, boxes: int, stuff: str, image_size: int = 96) -> None:
    """Digits on textured grounds, 96x96, made as they are asked for; 500 held out.

    Args:
      config: changed in place.
      boxes: the most a picture may have, 0 leaves them out.
      stuff: what the grounds are: "none" (nothing), "names" (classes of pixels) or "boxes".
      image_size: side to which the model sees them resized; numbers are those of 96x96.
    """
    config.data.name = "scenes"
    config.image_size = image_size
    size = config.get_ref("image_size")
    with config.unlocked():
        config.data.options = ConfigDict({"size": 96, "stuff": stuff})
    resize = moving("Resize", size=(size, size), interpolation="area")
    pad = moving("Pad", shapes=((size, size),), boxes=boxes, segmentation=not boxes)
    # No flips: a mirrored digit is another one, or none.
    config.train.transforms = config.eval.transforms = (resize, standardize(SCENES), pad)


def segmented_scenes(config: ConfigDict, *, image_size: int, weight: float) -> None:
    """Scenes of digits with every pixel's class, for a segmenter. Comes after the task is set.

    Args:
      config: changed in place.
      image_size: side to which the model sees them resized.
      weight: of a digit's pixels, which are 8 % of all, beside the grounds'. A large one helps a
        model to tell digits apart at all, and makes their masks swell.
    """
    scenes(config, boxes=0, stuff="names", image_size=image_size)
    inference(config)
    config.task.class_weights = (weight,) * 10 + (1.0,) * 3


def moving(name: str, **arguments: Any) -> ConfigDict:
    """One transform of `vit_jax/data/geometry.py`, which moves boxes and masks too."""
    return ConfigDict({"target": f"data.geometry.{name}", **arguments})


def segments(
    config: ConfigDict,
    data: str,
    *,
    crop: int,
    short: int,
    longest: int,
    shapes: tuple[tuple[int, int], ...],
    statistics: dict | None,
    scale: tuple[float, float] = (0.5, 2.0),
) -> None:
    """Segmentation: square parts of pictures of any size in training; whole ones in evaluation.

    Args:
      config: changed in place; also by `inference`.
      data: name of the dataset.
      crop: side of the parts.
      short: of a whole picture's sides, to which it is resized.
      longest: of the other one, at most, in evaluation.
      shapes: (H, W) of whole pictures' batches.
      statistics: mean and deviation, as of `standardize`.
      scale: least and greatest factor in training.
    """
    config.data.name = data
    config.image_size = crop
    config.train.transforms = (
        moving("RandomFlip"),
        moving("ScaleJitterCrop", size=(crop, crop), scale=scale, short=short, longest=4 * short),
        step("ColorJitter", brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05),
        standardize(statistics),
        moving("Pad", shapes=((crop, crop),)),
    )
    config.eval.transforms = (
        moving("ResizeShortSide", sizes=(short,), longest=longest),
        standardize(statistics),
        moving("Pad", shapes=shapes),
    )
    inference(config)


def camvid(config: ConfigDict) -> None:
    """CamVid through TFDS: 367 + 101 pictures of 360x480, 11 classes.

    Squares of 240 pixels out of pictures at two thirds of their size; 2,000 steps of 8, from
    scratch.
    """
    sizes = {"crop": 240, "short": 240, "longest": 320, "shapes": ((240, 320),)}
    segments(config, "camvid", **sizes, statistics=CAMVID)
    muon(config, convolutions=True)
    config.steps, config.batch_size, config.learning_rate = 2000, 8, 2e-3
    config.schedule.warmup_steps = 100
    config.eval_every = 250


def masks(config: ConfigDict) -> None:
    """Pictures of one's own with masks (`vit_jax/data/masks.py`) in `data.data_dir`.

    Squares of 256 pixels out of pictures whose short side is that long; 100 epochs in batches of
    8, from scratch.
    """
    shapes = ((256, 384), (384, 256), (384, 384), (512, 512))
    sizes = {"crop": 256, "short": 256, "longest": 512, "shapes": shapes}
    segments(config, "masks", **sizes, statistics=IMAGENET)
    muon(config, convolutions=True)
    config.epochs, config.batch_size, config.learning_rate = 100.0, 8, 2e-3
    config.schedule.warmup_epochs = 2.0


def ade20k(config: ConfigDict, target: str) -> None:
    """ADE20K (`scene_parse150`) in the papers' 160,000 steps of 16 parts of 512x512.

    Args:
      config: changed in place.
      target: the model, as of `segmenter`.
    """
    shapes = ((512, 704), (704, 704), (1024, 1024), (2048, 2048))
    sizes = {"crop": 512, "short": 512, "longest": 2048, "shapes": shapes}
    segments(config, "scene_parse150", **sizes, statistics=IMAGENET)
    segmenter(config, target)
    config.model.num_classes = 150
    config.data.threads = 16
    config.batch_size, config.steps, config.eval_every = 16, 160_000, 16_000


def inference(config: ConfigDict) -> None:
    """Adds `eval.inference` of a segmenter, with windows, flips and scales off."""
    with config.unlocked():
        config.eval.inference = ConfigDict(
            {
                "target": "tasks.inference.Averaged",
                "window": 0,  # side of the windows; 0 is the whole picture at once
                "stride": 0,  # from one window to the next; 0 is two thirds of a window
                "flip": False,
                "scales": (1.0,),
            }
        )


def segmenter(config: ConfigDict, target: str, **arguments: Any) -> None:
    """Sets the task and a model of segmentation."""
    with config.unlocked():
        task = {"target": "tasks.segmentation.Segmentation", "class_weights": ()}
        config.task = ConfigDict(task)
        config.model = ConfigDict(
            {
                "target": f"models.{target}",
                "num_classes": 0,
                "dtype": config.get_ref("dtype"),
                **arguments,
            }
        )


def tiny(config: ConfigDict) -> None:
    """Two steps of any recipe, for tests."""
    config.steps, config.batch_size = 2, 8
    config.eval_every = config.checkpoint_every = 2


def muon(config: ConfigDict, convolutions: bool = False) -> None:
    """Muon instead of AdamW: in a run of few epochs it learns about twice as fast.

    Args:
      config: changed in place.
      convolutions: whether their kernels are turned too.
    """
    config.optimizer.name = "muon"
    config.optimizer.momentum = 0.95
    config.optimizer.muon_convolutions = convolutions


def choose(recipe: str, recipes: dict[str, Callable[[ConfigDict], None]]) -> ConfigDict:
    """A locked config after the recipe of that name; ValueError names the others."""
    if recipe not in recipes:
        close = difflib.get_close_matches(recipe, recipes, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Valid: {', '.join(recipes)}."
        raise ValueError(f"there is no recipe {recipe!r}. {hint}")
    config = base()
    recipes[recipe](config)
    return config.lock()
