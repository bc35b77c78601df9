"""The picture of a first batch shows what each task is to learn."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vit_jax import dry_run, main, train
from vit_jax.data import pipeline, scenes
from vit_jax.data.geometry import Pad
from vit_jax.data.transforms import Standardize
from vit_jax.tasks.classification import Classification
from vit_jax.tasks.detection import Detection
from vit_jax.tasks.panoptic import Panoptic
from vit_jax.tasks.segmentation import Canvas, Segmentation


def first_batch(steps, **options):
    data = scenes.open("validation", size=48, **options)
    return data, next(pipeline.eval_batches(data, steps, batch_size=3))


def drawn(task, data, steps, batch, path):
    run = SimpleNamespace(task=task, train_data=data, train_transforms=steps)
    with Image.open(dry_run._draw(run, batch, path)) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize(
    ("task", "pad", "options"),
    [
        (Detection(), {"boxes": 4, "segmentation": False}, {"stuff": "none"}),
        (Panoptic(stuff=(10, 11, 12)), {"boxes": 6, "masks": True}, {"stuff": "boxes"}),
        (Segmentation(), {}, {"stuff": "names"}),
    ],
    ids=["detection", "panoptic", "segmentation"],
)
def test_what_a_dense_task_learns_is_on_the_picture(task, pad, options, tmp_path):
    steps = (Standardize(), Pad(((64, 56),), **pad))
    data, batch = first_batch(steps, **options)
    pixels = drawn(task, data, steps, batch, tmp_path / "batch.png")
    key = "segmentation" if isinstance(task, Segmentation) else "box_label"
    labels = {int(k) for k in np.unique(batch[key]) if 0 <= k < 255}
    for label in labels:
        colour = np.array(Canvas.colour(label))
        assert (np.abs(pixels.astype(int) - colour).max(-1) < 40).any(), data.class_names[label]
    assert pixels.shape[1] > 1000  # three columns that can be read


def test_titles_say_how_much_there_is_to_learn():
    steps = (Standardize(), Pad(((64, 56),), boxes=4))
    data, batch = first_batch(steps, stuff="none")
    image = np.zeros((64, 56, 3), np.uint8)
    row = {k: v[0] for k, v in batch.items()}
    count = int((row["box_label"] >= 0).sum())
    _, title = Detection().draw_target(image, row, data.class_names)
    assert title == f"{count} object{'s' * (count != 1)}"
    _, title = Segmentation().draw_target(image, row, data.class_names)
    ignored = 100 * (row["segmentation"] == 255).mean()
    assert title == f"{np.ceil(ignored):.0f} % ignored"
    empty = row | {"box_label": np.full(4, -1)}
    assert Detection().draw_target(image, empty, data.class_names)[1] == "0 objects"


def test_classes_are_named_with_their_shares_where_they_are_mixed(tmp_path):
    image, names = np.zeros((8, 8, 3), np.uint8), ("cat", "dog", "cow")
    task = Classification()
    assert task.draw_target(image, {"label": np.int32(1)}, names) == (image, "dog")
    row = {"label": np.int32(1), "label_probs": np.float32([0.3, 0.7, 0.0])}
    assert task.draw_target(image, row, names)[1] == "dog 70% + cat 30%"
    row["label_probs"] = np.float32([0.0, 0.0, 1.0])
    assert task.draw_target(image, row, names)[1] == "cow 100%"


@pytest.mark.slow
def test_pictures_of_several_shapes_are_drawn_timed_trained_and_evaluated(tmp_path, capsys):
    root = tmp_path / "data"
    for i in range(8):
        size = ((16, 24), (24, 16))[i // 2 % 2]
        for part in ("images", "masks"):
            (root / part).mkdir(parents=True, exist_ok=True)
            Image.new("L", size[::-1], i % 2).save(root / part / f"{i}.png")
    argv = [f"--config.data.data_dir={root}", "--config.model.decoder=naive"]
    argv.append("--config.task.class_weights=()")
    config = main.parse(["--config=configs/setr.py:tiny", *argv])[0]
    config["data"] |= {"name": "masks", "options": {"class_names": ["dark", "bright"]}}
    config |= {"batch_size": 2, "steps": 3, "eval_every": 3}
    pad = {"target": "data.geometry.Pad", "shapes": [[16, 24], [24, 16], [24, 24]]}
    steps = [{"target": "data.geometry.RandomFlip"}, config["train"]["transforms"][1], pad]
    config["train"]["transforms"], config["eval"]["transforms"] = steps, steps[1:]
    dry_run.dry_run(config, tmp_path / "run")
    assert "ms a step" in capsys.readouterr().out
    numbers = train.train(config, tmp_path / "run")
    assert np.isfinite(numbers["loss"])
    assert "compiling the training step for" in capsys.readouterr().out
    assert (tmp_path / "run/predictions.png").exists()


@pytest.mark.long
def test_a_dense_recipe_is_drawn_and_timed(tmp_path, capsys):
    argv = ["--config=configs/setr.py:tiny", "--dry_run", f"--workdir={tmp_path / 'run'}"]
    assert main.main(argv) == 0, capsys.readouterr().err
    assert (tmp_path / "run/batch.png").stat().st_size > 10_000
    assert "ms a step" in capsys.readouterr().out
