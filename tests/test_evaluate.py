"""Evaluation beside the loop: how the model is asked, and which pictures are drawn."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn

from vit_jax import evaluate, mesh
from vit_jax.data import scenes
from vit_jax.data.geometry import Pad
from vit_jax.data.transforms import Standardize
from vit_jax.errors import ConfigError
from vit_jax.tasks.segmentation import Segmentation

TRACED = []  # each time that Python ran the model below


class Conv(nn.Module):
    """Logits from the pixels around: enough to see where a window ends."""

    @nn.compact
    def __call__(self, image, *, train):
        TRACED.append(image.shape)
        return nn.Conv(13, (3, 3), name="conv")(image)


@pytest.fixture(scope="module")
def variables():
    return Conv().init(jax.random.key(0), np.zeros((1, 4, 4, 3)), train=False)


def run_of(data=None, **inference):
    spec = {"target": "tasks.inference.Averaged", **inference} if inference else {}
    return SimpleNamespace(
        config={"eval": {"inference": spec} if inference else {}, "batch_size": 4},
        model=Conv(),
        task=Segmentation(),
        mesh=mesh.make_mesh(),
        eval_data=data,
        eval_transforms=(Standardize(), Pad(((32, 40), (40, 40)))),
        max_pixels=None,
    )


def batch_of(size=(12, 15)):
    key = jax.random.key(1)
    image = np.asarray(jax.random.normal(key, (2, *size, 3)))
    truth = np.asarray(jax.random.randint(key, (2, *size), 0, 13))
    return {"image": image, "segmentation": truth, "valid": np.array([True, True])}


def test_the_recipe_says_how_the_model_is_asked(variables):
    batch = batch_of()
    plain = evaluate.EvalStep(run_of())(variables, batch)
    whole = evaluate.EvalStep(run_of(window=15))(variables, batch)
    jax.tree.map(np.testing.assert_array_equal, whole, plain)
    parts = evaluate.EvalStep(run_of(window=8, flip=True))(variables, batch)
    assert float(parts[0]["count"]) == float(plain[0]["count"])
    assert abs(float(parts[0]["loss"] - plain[0]["loss"])) > 1e-3


def test_each_shape_of_a_batch_is_compiled_once(variables):
    step = evaluate.EvalStep(run_of(window=8))
    for size in ((12, 15), (15, 12)):
        step(variables, batch_of(size))
    traced = len(TRACED)
    for size in ((12, 15), (15, 12)):
        step(variables, batch_of(size))
    assert len(TRACED) == traced


def test_a_misspelt_way_to_ask_is_named():
    with pytest.raises(ConfigError, match=r"has no argument 'windows'.* 'window'"):
        evaluate.EvalStep(run_of(windows=8))


def test_pictures_are_drawn_as_many_as_a_sheet_holds_at_the_tasks_size(variables):
    data = scenes.open("validation", size=32)
    run = run_of(data)
    drawn = evaluate.draw(run, evaluate.EvalStep(run), variables, 32)
    assert len(drawn) == 12
    assert all(picture.shape[1] >= 360 for picture, _, _ in drawn)


def test_a_part_of_a_dataset_knows_its_pictures_sizes():
    data = scenes.open("validation", size=40)
    part = evaluate._Subset(data, np.array([3, 7]))
    assert (len(part), part.name(1), part.size(0)) == (2, "scenes validation 7", (40, 40))

    assert not hasattr(part, "fullest")

    class WithoutSizes:
        class_names = ()

        def fullest(self):
            return 5, 9

        def __getitem__(self, index):
            return {"image": np.zeros((5, 6 + index, 3), np.uint8)}

    assert evaluate._Subset(WithoutSizes(), np.array([2])).size(0) == (5, 8)
    assert Pad(((5, 8),), boxes=-1).fitted(evaluate._Subset(WithoutSizes(), [2])).boxes == 9
