"""Live, where PyTorch, transformers and timm are installed: python -m pytest -m peers."""

import numpy as np
import pytest

import vit_jax
from tests.golden.report import (
    LIMIT,
    ROWS,
    STAGES,
    Row,
    detr,
    difference,
    hf,
    measure,
    upernet,
)
from vit_jax.errors import CheckpointError
from vit_jax.pretrained import hf as form
from vit_jax.pretrained.arrays import open_pth

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),  # theirs are not ours to mend
]
TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = TINY | {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
SWIN = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "image_size": 48}
RESNET = {"embedding_size": 4, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1]}
RESNET |= {"out_features": STAGES}
DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5}
DETR |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
TIMM = {"use_timm_backbone": True}
UPERNET = SWIN | {"depths": [2, 1, 1, 2], "num_heads": [1, 2, 2, 4], "window_size": 3}
S32, S48 = (32, 32), (48, 48)
SMALL = (
    hf("ViT", "ViT", [S32, (40, 56)], {"interpolate_pos_encoding": True}, **VIT),
    hf("BEiT", "Beit", [S32], use_relative_position_bias=True, **VIT),
    hf("DINOv2", "Dinov2", [S32, (40, 56)], **VIT),
    hf("DINOv2 registers", "Dinov2WithRegisters", [S32, (40, 56)], **VIT),
    hf("Swin", "Swin", [S48, (50, 62)], window_size=3, **SWIN),
    hf("Swin V2", "Swinv2", [S48, (50, 62)], window_size=3, **SWIN),
    hf("CvT", "Cvt", [S48, (50, 62)], embed_dim=[8, 16, 24], depth=[1, 2, 3], num_heads=[1, 2, 4]),
    hf("ResNet", "ResNet", [S48, (50, 62)], embedding_size=8, hidden_sizes=[32, 64], depths=[1, 2]),
    detr("DETR", sizes=[(70, 90)], backbone_config=RESNET, **DETR),
    detr("DETR, timm's ResNet", sizes=[(70, 90)], backbone="resnet18", **TIMM, **DETR),
    detr("DETR-DC5", sizes=[(70, 90)], backbone="resnet26", dilation=True, **TIMM, **DETR),
    detr("panoptic", "Segmentation", [(70, 90)], backbone_config=RESNET, **DETR),
    # The last map is larger than a window, as large, and smaller.
    upernet("UPerNet", [(130, 162), (96, 128), (70, 90)], UPERNET, hidden_size=8),
)


@pytest.fixture(autouse=True)
def _installed():
    for name in ("torch", "transformers", "timm"):
        pytest.importorskip(name)


@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.name)
def test_logits_agree_with_the_live_peer(row: Row):
    assert max(measure(row)["differences"].values()) < LIMIT


@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.name)
def test_transformers_opens_what_was_written_with_the_same_logits(row: Row, tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    ours.mkdir()
    made = row.make()
    made.save_pretrained(theirs)
    loaded = vit_jax.load(theirs)
    form.save(loaded, ours)
    model, told = type(made).from_pretrained(ours, output_loading_info=True)
    # The first is a counter, the second only has an effect in pre-training.
    without_effect = ("num_batches_tracked", "mask_token")
    for kind, names in told.items():
        assert not {n for n in names if not str(n).endswith(without_effect)}, kind
    assert difference(loaded, model.eval(), row.sizes[0], row.masked, {}) < LIMIT


@pytest.mark.parametrize("wrapper", ["", "model", "state_dict"])
def test_a_pickle_of_pytorch_gives_its_weights(wrapper, tmp_path):
    import ml_dtypes
    import torch

    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    saved = {f"module.{k}": v for k, v in weights.items()}
    torch.save({wrapper: saved, "epoch": 3} if wrapper else saved, tmp_path / "model.pth")
    found = open_pth(tmp_path / "model.pth")
    assert found.shapes == {"a": (2, 3), "b": (4,)}
    assert found.dtypes == {"a": "float32", "b": "bfloat16"}
    np.testing.assert_array_equal(found["a"], weights["a"].numpy())
    np.testing.assert_array_equal(found["b"], np.ones(4, ml_dtypes.bfloat16))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    import torch

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"a": torch.ones(2), "bomb": Bomb()}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        open_pth(tmp_path / "model.pth")
    assert not (tmp_path / "executed").exists()
    (tmp_path / "cut.pth").write_bytes((tmp_path / "model.pth").read_bytes()[:300])
    with pytest.raises(CheckpointError, match="was not read"):
        open_pth(tmp_path / "cut.pth")


def test_the_published_sizes_have_names_of_their_own():
    names = [(row.peer, row.name) for row in ROWS]
    assert len(set(names)) == len(names)
