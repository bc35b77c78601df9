"""CLIP and SigLIP in transformers' form: opened with their words, and written so that they open."""

import json
from functools import cache, partial
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers, processors

import vit_jax
from tests.golden import clip as golden
from tests.golden import vit as shared
from vit_jax import export, step
from vit_jax.data.text import train_tokenizer
from vit_jax.errors import CheckpointError, ConfigError
from vit_jax.models.classifier import Classifier
from vit_jax.pretrained import finetune, hf, load, names
from vit_jax.pretrained.families import clip, siglip
from vit_jax.pretrained.opened import backbone_fields
from vit_jax.pretrained.preprocess import from_hf as preprocessing_of

GOLDEN = Path(__file__).parents[2] / "golden"
FAMILIES = {"clip_tiny": clip, "siglip_tiny": siglip}
# What OpenAI's model has beside its weights, as transformers publishes it.
PROCESSOR = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}


@cache
def arrays_of(name):
    return dict(np.load(GOLDEN / f"{name}.npz"))


def publish(name, folder, **changes):
    """A folder as transformers writes it, of a golden model."""
    arrays = arrays_of(name)
    config = shared.config_of(arrays)
    for part, entries in changes.items():
        config[part] = config[part] | entries if isinstance(entries, dict) else entries
    (folder / "config.json").write_text(json.dumps(config))
    save_file(shared.state_of(arrays), folder / "model.safetensors")
    return folder


def words(folder):
    """A tokenizer.json of as many words as the golden models know."""
    vocabulary = {"<pad>": 0, "<start>": 1} | {f"w{i}": i for i in range(2, golden.WORDS)}
    vocabulary = {k: v for k, v in vocabulary.items() if v != golden.END} | {"<end>": golden.END}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<start>", 1), ("<end>", golden.END)]
    backend.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=marks
    )
    backend.add_special_tokens(["<pad>", "<start>", "<end>"])
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_published_folder_gives_the_published_embeddings(name, tmp_path):
    arrays = arrays_of(name)
    loaded = vit_jax.load(publish(name, tmp_path))
    found = loaded(image=arrays["0/image"], tokens=arrays["tokens"])
    for key in ("image_embedding", "text_embedding"):
        wanted = arrays[f"0/{key}" if key.startswith("image") else key]
        chex.assert_trees_all_close(found[key], wanted, atol=1e-5)
    assert loaded.reads == {"image", "tokens"}
    assert loaded.preprocess.size == golden.SIZES[0]
    assert "no preprocessor_config.json" in loaded.remarks[0]
    with pytest.raises(CheckpointError, match=r"there is no tokenizer\.json to read"):
        loaded.tokenize(["w5"])


def test_a_folder_with_a_tokenizer_reads_texts(tmp_path):
    words(publish("clip_tiny", tmp_path))
    loaded = vit_jax.load(tmp_path)
    assert loaded.tokenize("w5 w30 w7").tolist() == [[1, 5, 30, 7, golden.END, 0, 0]]
    # Cut so that the end stays.
    assert loaded.tokenize(["w3", "w2 " * 9])[1].tolist() == [1, 2, 2, 2, 2, 2, golden.END]
    found = loaded(tokens=loaded.tokenize("w5 w30 w7"))
    wanted = arrays_of("clip_tiny")["text_embedding"][:1]
    chex.assert_trees_all_close(found["text_embedding"], wanted, atol=1e-5)


def test_a_tokenizer_of_another_size_is_refused_with_both(tmp_path):
    train_tokenizer(["a word"], 300).save(publish("clip_tiny", tmp_path) / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"has \d+ entries, and its weights are for 31"):
        vit_jax.load(tmp_path).tokenize(["a"])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_has_the_published_names_and_opens_again(name, tmp_path):
    source, output = tmp_path / "source", tmp_path / "written"
    source.mkdir()
    words(publish(name, source))
    loaded = vit_jax.load(source)
    assert export.export(loaded, "hf", output) == 0.0
    again = vit_jax.load(output)
    chex.assert_trees_all_equal(again.variables, loaded.variables)
    assert again.preprocess == loaded.preprocess
    assert again.recipe.classifier == loaded.recipe.classifier
    texts = ["w5 W30 w7!", "w2 " * 9]
    np.testing.assert_array_equal(again.tokenize(texts), loaded.tokenize(texts))
    written = hf.open_folder(output, "it").arrays
    arrays = arrays_of(name)
    assert sorted(written) == list(arrays["names"])
    for key, value in shared.state_of(arrays).items():
        assert written.shapes[key] == value.shape
        np.testing.assert_array_equal(written[key], value)
    theirs, ours = shared.config_of(arrays), json.loads((output / "config.json").read_text())
    for part in ("vision_config", "text_config"):
        for key in ours[part].keys() & theirs[part].keys() - {"projection_dim"}:
            assert ours[part][key] == theirs[part][key], key


def test_old_files_that_leave_most_to_transformers_are_read_as_it_reads_them():
    # As OpenAI's are published: the end has the number 2, which is a mark of age.
    config = {
        "model_type": "clip",
        "projection_dim": 512,
        "text_config": {"eos_token_id": 2},
        "vision_config": {"patch_size": 16},
    }
    recipe = clip.from_hf(config, {})
    assert recipe.classifier["text"]["end"] is None
    assert recipe.backbone["patch"] == 16
    assert recipe.backbone["activation"] == "quick_gelu"
    # As LAION's are: the same once more, which counts.
    config |= {"text_config_dict": {"hidden_act": "gelu"}, "vision_config_dict": None}
    recipe = clip.from_hf(config | {"text_config": {"hidden_act": "quick_gelu"}}, {})
    assert recipe.classifier["text"]["activation"] == "gelu"
    assert recipe.classifier["text"]["end"] == 49_407
    assert recipe.backbone["activation"] == "quick_gelu"


def test_the_published_preprocessing_is_bicubic_and_cuts_out_the_middle():
    usual = clip.from_hf({"model_type": "clip"}, {}).preprocessing
    assert preprocessing_of(PROCESSOR).steps == usual
    assert [s["target"].split(".")[-1] for s in usual] == ["Resize", "CenterCrop", "Standardize"]
    assert usual[0]["interpolation"] == "bicubic"
    assert usual[0]["size"] == 224


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("clip_tiny", {"vision_config": {"hidden_act": "gelo"}}, "hidden_act='gelo'"),
        ("clip_tiny", {"vision_config": {"num_channels": 1}}, "num_channels=1"),
        ("siglip_tiny", {"vision_config": {"vision_use_head": False}}, "vision_use_head=False"),
        ("siglip_tiny", {"text_config": {"projection_size": 7}}, "projection_size=7"),
    ],
)
def test_a_config_that_cannot_be_is_refused(name, changes, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        vit_jax.load(publish(name, tmp_path, **changes))


def test_weights_that_are_not_of_the_config_are_all_named(tmp_path):
    folder = publish("clip_tiny", tmp_path, text_config={"num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match="text/block_2/attention/key/bias"):
        vit_jax.load(folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text_bias": True}, "text_bias=True: transformers' CLIP has False"),
        ({"bias": -10.0}, "bias=-10.0"),
        ({"backbone": {"target": "models.swin.Swin"}}, "models.swin.Swin: .* CLIP has a ViT"),
    ],
)
def test_a_model_that_transformers_lacks_is_not_written(fields, said, tmp_path):
    loaded = vit_jax.load(publish("clip_tiny", tmp_path))
    spec = backbone_fields(loaded.module)
    spec |= {"backbone": backbone_fields(loaded.module.backbone)} | fields
    with pytest.raises(ConfigError, match=said):
        clip.to_hf(spec, 0)


def test_the_image_encoder_alone_can_be_fine_tuned(tmp_path):
    opened = load.open_checkpoint(publish("clip_tiny", tmp_path))
    native = opened.module()
    classifier = Classifier(native.backbone, 3)
    image = {"image": opened.batch["image"]}
    init = partial(step.init_variables, model=classifier)
    variables = jax.eval_shape(init, jax.random.key(0), image)
    start = finetune.warm_start(opened, classifier, variables)
    wanted = {path for path in names.shapes_of(variables) if "/backbone/" in path}
    assert start.taken == wanted
    others = "image_projection, logit_scale, text, text_projection"
    assert f"left out of the checkpoint: {others}" in start.remarks
    with pytest.raises(ConfigError, match="patch_bias=False: transformers has such a model with"):
        hf.published(classifier)


def test_half_precision_reaches_both_encoders(tmp_path):
    loaded = vit_jax.load(publish("siglip_tiny", tmp_path), dtype="bfloat16")
    assert {str(x.dtype) for x in names.flat(loaded.variables).values()} == {"bfloat16"}
    assert loaded.module.text.dtype == loaded.module.backbone.dtype == loaded.module.dtype
    arrays = arrays_of("siglip_tiny")
    found = loaded(tokens=arrays["tokens"])["text_embedding"]
    assert found.dtype == np.float32
    assert (np.asarray(found) * arrays["text_embedding"]).sum(1).min() > 0.999
