import pytest

from vit_jax import create, list_models
from vit_jax.build import build, find
from vit_jax.errors import ConfigError


def test_a_spec_becomes_the_object_it_names_with_the_specs_inside_it():
    spec = {
        "target": "models.classifier.Classifier",
        "num_classes": 3,
        "backbone": {"target": "models.cvt.CvT", "widths": [8, 8, 16], "depths": [1, 1, 2]},
    }
    model = build(spec)
    assert model.num_classes == 3
    assert model.backbone.widths == (8, 8, 16)  # lists become tuples, so that modules are hashable


def test_plain_data_passes_through():
    assert build({"a": [1, {"b": 2}]}) == {"a": (1, {"b": 2})}
    assert build("text") == "text"


def test_a_named_size_takes_overrides():
    assert build({"target": "models.cvt.cvt_13", "drop_path": 0.1}).drop_path == 0.1


def test_code_of_ones_own_is_named_with_a_colon():
    assert find("collections:OrderedDict").__name__ == "OrderedDict"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"target": "models.cvtt.CvT"}, r"no module 'vit_jax.models.cvtt'. Did you mean 'cvt'"),
        ({"target": "models.cvt.CVT13"}, r"vit_jax.models.cvt has no 'CVT13'"),
        ({"target": "models.cvt.cvt_13", "widht": (1,)}, r"no argument 'widht'.*'widths'"),
        ({"target": "models.cvt.cvt_13", "parent": None}, r"no argument 'parent'"),
        ({"target": "tasks.classification.Classification", "loss": "hinge"}, "hinge"),
    ],
)
def test_what_does_not_exist_is_named_with_the_nearest(spec, message):
    with pytest.raises(ConfigError, match=message):
        build(spec)


def test_every_published_size_is_listed():
    assert list_models("*cvt*") == ["cvt_13", "cvt_21", "cvt_w24"]
    assert set(list_models("swin_[tsbl]*")) == {
        "swin_t", "swin_s", "swin_b", "swin_l", "swin_b_384", "swin_l_384"
    }  # fmt: skip
    assert len(list_models("vit_*")) == 13


def test_an_unknown_model_gets_the_nearest_names():
    with pytest.raises(ValueError, match=r"no model 'cvt_12'. Did you mean .*'cvt_13'"):
        create("cvt_12")


def test_zero_classes_give_the_backbone_alone():
    assert type(create("swin_t", num_classes=0)).__name__ == "Swin"
