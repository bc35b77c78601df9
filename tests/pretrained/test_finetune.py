"""A run that starts from a checkpoint takes what fits, and says what does not."""

import json
from functools import partial

import chex
import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax
from vit_jax import checkpoint, main, step
from vit_jax.build import build
from vit_jax.errors import CheckpointError, ConfigError
from vit_jax.pretrained import finetune, names, resample
from vit_jax.pretrained.arrays import Arrays
from vit_jax.pretrained.opened import Opened
from vit_jax.pretrained.preprocess import Preprocessing, standardize
from vit_jax.pretrained.preprocess import step as transform
from vit_jax.pretrained.recipe import Recipe

VIT = {
    "target": "models.vit.ViT",
    "patch": 4,
    "width": 8,
    "depth": 2,
    "heads": 2,
    "image_size": 16,
}
SWIN = {
    "target": "models.swin.Swin",
    "width": 8,
    "depths": (2, 2),
    "heads": (1, 2),
    "window": 3,
    "patch": 2,
}


def fresh(module, size=16, seed=0):
    """Variables of a module, every number drawn."""
    batch = {"image": jnp.zeros((1, size, size, 3))}
    shapes = jax.eval_shape(partial(step.init_variables, model=module), jax.random.key(0), batch)
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), shapes)


def classifier(backbone, classes):
    return build(
        {
            "target": "models.classifier.Classifier",
            "num_classes": classes,
            "backbone": backbone,
        }
    )


def opened(backbone, classes=5, size=16):
    """A checkpoint with drawn numbers, and those numbers."""
    steps = (transform("Resize", size=(size, size)), standardize((0.1,) * 3, (0.2,) * 3))
    recipe = Recipe("ours", backbone, names.Ours(), classes)
    found = Opened("my checkpoint", "a test", recipe, Arrays({}, {}, None), Preprocessing(steps))
    variables = fresh(found.module(), size)
    flat = {k: np.asarray(v) for k, v in names.flat(variables).items()}
    shapes = {k: v.shape for k, v in flat.items()}
    dtypes = dict.fromkeys(flat, "float32")
    arrays = Arrays(shapes, dtypes, flat.__getitem__)
    return Opened(found.ref, found.format, recipe, arrays, found.preprocessing), variables


def start(source, module, size=16, skip=""):
    own = fresh(module, size, seed=1)
    warm = finetune.warm_start(source, module, own, skip)
    return warm, own, warm.fill(own)


def test_a_head_of_another_size_starts_anew_and_the_rest_is_taken():
    source, there = opened(VIT)
    warm, own, filled = start(source, classifier(VIT, 3))
    chex.assert_trees_all_equal(filled["params"]["backbone"], there["params"]["backbone"])
    chex.assert_trees_all_equal(filled["params"]["head"], own["params"]["head"])
    assert any("head starts anew: [8, 3] here, [8, 5] there" in r for r in warm.remarks)


def test_a_head_of_the_same_size_is_taken():
    source, there = opened(VIT)
    _, _, filled = start(source, classifier(VIT, 5))
    chex.assert_trees_all_equal(filled, there)


def test_a_backbone_alone_starts_a_whole_model():
    source, there = opened(VIT, classes=0)
    warm, own, filled = start(source, classifier(VIT, 5))
    chex.assert_trees_all_equal(filled["params"]["backbone"], there["params"])
    chex.assert_trees_all_equal(filled["params"]["head"], own["params"]["head"])
    assert any("head starts anew: [8, 5] here, not there" in r for r in warm.remarks)


def test_positions_are_resampled_for_another_image_size():
    source, there = opened(VIT)
    larger = VIT | {"image_size": (24, 16)}
    warm, _, filled = start(source, classifier(larger, 5), 16)
    old = there["params"]["backbone"]["position"]["grid"]
    new = filled["params"]["backbone"]["position"]["grid"]
    assert new.shape == (6, 4, 8)
    # The default resizer keeps the outermost places.
    np.testing.assert_allclose(new[::5], old[::3], atol=1e-6)
    assert any("positions resampled from 4x4 to 6x4 (align_corners)" in r for r in warm.remarks)


def test_swin_may_have_another_window():
    source, there = opened(SWIN)
    warm, _, filled = start(source, classifier(SWIN | {"window": 4}, 5))
    path = ("params", "backbone", "stage_1", "block_0", "relative_position_bias")
    old, new = there, filled
    for key in path:
        old, new = old[key], new[key]
    assert (old.shape, new.shape) == ((25, 1), (49, 1))
    np.testing.assert_allclose(new[24], old[12], atol=1e-6)  # no offset, in the middle
    assert any("from 5x5 to 7x7 (bicubic_torch) in 4 blocks" in r for r in warm.remarks)


def test_biases_of_beit_follow_the_shape_of_the_image():
    beit = {k: v for k, v in VIT.items() if k != "target"} | {"target": "models.beit.Beit"}
    source, there = opened(beit)
    warm, _, filled = start(source, classifier(beit | {"image_size": (16, 24)}, 5))
    old, new = (
        v["params"]["backbone"]["block_1"]["relative_position_bias"] for v in (there, filled)
    )
    assert (old.shape, new.shape) == ((7 * 7 + 3, 2), (7 * 11 + 3, 2))
    np.testing.assert_array_equal(new[-3:], old[-3:])  # those of the class token
    np.testing.assert_allclose(new[7 * 11 // 2], old[24], atol=1e-6)  # no offset, in the middle
    assert any("from 7x7 to 7x11 (bilinear_torch) in 2 blocks" in r for r in warm.remarks)


def test_scanned_blocks_start_from_single_ones_and_back():
    source, _ = opened(VIT)
    scanned = classifier(VIT | {"scan": True}, 5)
    _, _, filled = start(source, scanned)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 16, 3)), jnp.float32)
    plain = source.module()
    run = jax.jit(lambda module, v: module.apply(v, image, train=False), static_argnums=0)
    want = run(plain, names.nested(source.read(plain)))
    chex.assert_trees_all_close(run(scanned, filled), want, atol=1e-4)
    back = resample.unstacked(names.flat(filled))
    chex.assert_trees_all_equal(back, {k: source.arrays[k] for k in back})


def test_scanned_pairs_hold_even_and_odd_blocks():
    deep = SWIN | {"depths": (2, 4)}
    source, there = opened(deep)
    _, _, filled = start(source, classifier(deep | {"scan": True}, 5))
    pairs = filled["params"]["backbone"]["stage_2"]["blocks"]
    for i in range(4):
        one = there["params"]["backbone"]["stage_2"][f"block_{i}"]
        pair = jax.tree.map(lambda x, i=i: x[i // 2], pairs[f"block_{i % 2}"])
        chex.assert_trees_all_equal(pair, one)
    back = resample.unstacked(names.flat(filled))
    chex.assert_trees_all_equal(back, {k: source.arrays[k] for k in back})


def test_what_does_not_match_is_listed_on_both_sides():
    source, _ = opened(VIT)
    module = classifier(VIT | {"depth": 3, "mlp_ratio": 2.0}, 5)
    with pytest.raises(CheckpointError) as caught:
        finetune.warm_start(source, module, fresh(module))
    assert "params/backbone/block_0/mlp/fc1/kernel [8, 16]: [8, 32] there" in str(caught.value)
    assert "init_skip" in str(caught.value)
    module = classifier(VIT | {"depth": 1}, 5)
    with pytest.raises(CheckpointError, match=r"block_1/.*the model has no such"):
        finetune.warm_start(source, module, fresh(module))


def test_what_is_skipped_starts_anew():
    source, there = opened(VIT)
    module = classifier(VIT | {"depth": 3}, 5)
    warm, own, filled = start(source, module, skip="block_2/|/norm1/")
    ours, old = filled["params"]["backbone"], own["params"]["backbone"]
    chex.assert_trees_all_equal(ours["block_2"], old["block_2"])
    chex.assert_trees_all_equal(ours["block_0"]["norm1"], old["block_0"]["norm1"])
    chex.assert_trees_all_equal(
        ours["block_0"]["norm2"], there["params"]["backbone"]["block_0"]["norm2"]
    )
    assert any(r.startswith("init_skip: ") for r in warm.remarks)
    for wrong, said in (("nothing_like_it", "matches no array"), ("(", "no regular expression")):
        with pytest.raises(ConfigError, match=said):
            finetune.warm_start(source, module, own, wrong)


def test_a_config_is_filled_in_by_its_checkpoint(monkeypatch):
    source, _ = opened(SWIN, size=12)
    monkeypatch.setattr(finetune, "open_checkpoint", lambda ref: source)
    config = main.parse(["--config=configs/vit.py:finetune", "--config.init=x"])[0]
    config["image_size"] = 24
    assert finetune.resolve(config) is source
    backbone = config["model"]["backbone"]
    assert backbone["target"] == "models.swin.Swin"
    assert (backbone["window"], backbone["depths"]) == (3, [2, 2])
    assert backbone["drop_path"] == 0.0
    assert "image_size" not in backbone  # Swin has none
    assert config["eval"]["transforms"][0]["size"] == [24, 24]
    assert config["train"]["transforms"][-1]["mean"] == [0.1] * 3
    build(config["model"] | {"num_classes": 2})


@pytest.mark.parametrize(
    ("recipe", "example"),
    [
        ("vit", "hf:google/vit-base-patch16-224-in21k"),
        ("detr", "hf:facebook/detr-resnet-50"),
        ("upernet", "hf:openmmlab/upernet-swin-tiny"),
    ],
)
def test_a_recipe_that_wants_a_checkpoint_says_so_and_names_one_that_serves(recipe, example):
    config = main.parse([f"--config=configs/{recipe}.py:finetune"])[0]
    with pytest.raises(ConfigError, match=rf"config.init is empty.*--config.init=REF.*{example},"):
        finetune.resolve(config)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of red and of blue pictures."""
    place = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name, channel in (("blue", 0), ("red", 2)):
        (place / name).mkdir()
        for i in range(8):
            image = random.integers(0, 60, (20, 26, 3), np.uint8)
            image[..., channel] += 150
            cv2.imwrite(str(place / name / f"{i}.png"), image)
    return place


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of two steps."""
    place = tmp_path_factory.mktemp("runs") / "first"
    assert main.main(["--config=configs/vit.py:tiny", f"--workdir={place}"]) == 0
    return place


@pytest.mark.parametrize("recipe", ["finetune", "probe"])
def test_a_run_starts_from_a_run(recipe, first, pictures, tmp_path, capsys):
    second = tmp_path / "second"
    argv = [f"--config=configs/vit.py:{recipe}", f"--config.init={first}", "--config.steps=3"]
    argv += [f"--config.data.data_dir={pictures}", "--config.batch_size=4"]
    argv += ["--config.schedule.warmup_epochs=0.0", "--config.eval_every=3"]
    argv += ["--config.image_size=20", f"--workdir={second}"]
    assert main.main(argv) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "head starts anew: [16, 2] here, [16, 10] there" in told
    assert "positions resampled from 4x4 to 5x5" in told
    assert json.loads((second / "labels.json").read_text()) == ["blue", "red"]
    before, after = checkpoint.read(first).params, checkpoint.read(second).params
    same = jax.tree.map(np.array_equal, before["backbone"]["norm"], after["backbone"]["norm"])
    assert all(jax.tree.leaves(same)) == (recipe == "probe")  # a probe leaves the backbone alone
    assert main.main(argv) == 0  # finished already, and the same config


def test_a_run_is_loaded_with_its_preprocessing_and_numbers(first):
    loaded = vit_jax.load(first)
    assert loaded.labels == tuple("0123456789")
    assert loaded.preprocess.size == (16, 16)
    image = loaded.preprocess([np.zeros((8, 8), np.uint8), np.full((9, 5), 200, np.uint8)])
    saved = checkpoint.read(first)
    want = loaded.module.apply({"params": saved.params}, image, train=False)
    chex.assert_trees_all_close(loaded(image=image), want, atol=1e-5)
    half = vit_jax.load(str(first), dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(half.variables)} == {"bfloat16"}
    got = half(image=jnp.asarray(image))
    assert got.dtype == jnp.float32
    chex.assert_trees_all_close(got, want, atol=0.05)
    with pytest.raises(ConfigError, match=r"reads \['image'\], not 'images'"):
        loaded(images=image)
    with pytest.raises(ConfigError, match="patch=4"):
        loaded(image=image[:, :15])


def test_an_init_that_does_not_exist_stops_before_anything_is_written(tmp_path, capsys):
    argv = ["--config=configs/vit.py:tiny", "--config.init=no/such", f"--workdir={tmp_path / 'x'}"]
    assert main.main(argv) == 4
    assert "no/such: there is no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
