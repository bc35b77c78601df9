"""Files of arrays: read one by one, never executed, and clear where they are damaged."""

import hashlib
import json
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from vit_jax.errors import CheckpointError
from vit_jax.pretrained import arrays

WEIGHTS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.float16([[1.5]]),
}


@pytest.fixture
def safetensors(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def same(opened, wanted=WEIGHTS):
    assert set(opened) == set(wanted)
    for name, array in wanted.items():
        assert opened.shapes[name] == array.shape
        assert opened.dtypes[name] == array.dtype.name
        np.testing.assert_array_equal(opened[name], array)
        assert opened[name].dtype == array.dtype


def test_safetensors_are_read_as_they_were_written(safetensors):
    same(arrays.open_safetensors(safetensors))


def test_a_model_in_several_files_is_one(tmp_path):
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in names.items():
        save_file({name: WEIGHTS[name]}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    same(arrays.open_safetensors(index), {k: WEIGHTS[k] for k in names})
    (tmp_path / names["b"]).unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 2 .*00002-of-00002"):
        arrays.open_safetensors(index)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "a/b.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="leaves its folder"):
        arrays.open_safetensors(index)


@pytest.mark.parametrize("content", [b"[1]", b"{}", b"not json"])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content)
    with pytest.raises(CheckpointError, match="no index"):
        arrays.open_safetensors(index)


@pytest.mark.parametrize("size", [0, 4, 50, -3])
def test_safetensors_that_were_cut_short_are_refused(safetensors, size):
    safetensors.write_bytes(safetensors.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="cut short"):
        arrays.open_safetensors(safetensors)


def test_npz_is_read_as_it_was_written(tmp_path):
    wanted = {k: WEIGHTS[k] for k in ("a", "c")} | {"x/y": np.ones((2, 1, 4))}
    np.savez(tmp_path / "model.npz", **wanted)
    same(arrays.open_npz(tmp_path / "model.npz"), wanted)


def test_npz_with_pickles_is_refused_and_nothing_is_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    np.savez(tmp_path / "model.npz", a=np.array([Bomb()], dtype=object))
    with pytest.raises(CheckpointError, match="pickled objects"):
        arrays.open_npz(tmp_path / "model.npz")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("size", [0, 20, 200, -10])
def test_npz_that_was_cut_short_is_refused(tmp_path, size):
    path = tmp_path / "model.npz"
    np.savez(path, **{k: WEIGHTS[k] for k in ("a", "c")})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="cut short"):
        arrays.open_npz(path)


def test_npz_with_a_damaged_array_says_which(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, a=np.zeros(1000))
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="a is damaged"):
        arrays.open_npz(path)["a"]


def test_a_zip_of_other_things_is_no_npz(tmp_path):
    path = tmp_path / "model.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="no npz"):
        arrays.open_npz(path)


def test_pth_without_pytorch_says_how_to_convert(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    path = tmp_path / "model.pth"
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"(?s)PyTorch is not installed.*safetensors"):
        arrays.open_pth(path)


@pytest.mark.parametrize("where", ["name", "beside", "cache"])
def test_a_hash_that_does_not_match_is_refused(tmp_path, where):
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    if where == "name":
        path = tmp_path / f"deit-{digest[:8]}.pth"
    elif where == "beside":
        path = tmp_path / "model.safetensors"
        (tmp_path / "model.safetensors.sha256").write_text(f"{digest}  model.safetensors\n")
    else:
        path = tmp_path / "snapshot.safetensors"
        path.symlink_to(tmp_path / digest)
    path.write_bytes(content)
    assert "SHA-256" in arrays.check_hash(path)
    path.write_bytes(content + b"!")
    with pytest.raises(CheckpointError, match="SHA-256"):
        arrays.check_hash(path)


@pytest.mark.parametrize("name", ["model.safetensors", "resnet50-20230101.pth", "vit-base.pth"])
def test_a_file_without_a_hash_is_not_compared(tmp_path, name):
    (tmp_path / name).write_bytes(b"weights")
    assert arrays.check_hash(tmp_path / name) == ""
