"""Folders as people arrange them, right and wrong."""

import io

import pytest
from PIL import Image

from vit_jax.contracts import Dataset
from vit_jax.data import folder
from vit_jax.data.pipeline import decoded
from vit_jax.errors import ConfigError, DataError


def write(root, *paths):
    """Tiny pictures at these paths."""
    file = io.BytesIO()
    Image.new("RGB", (5, 3)).save(file, "png")
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(file.getvalue())


def names(dataset):
    return [dataset.name(i) for i in range(len(dataset))]


def test_train_and_val_folders_are_the_splits(tmp_path):
    write(tmp_path, "train/dog/b.png", "train/dog/a.PNG", "train/cat/deep/er/c.jpeg")
    write(tmp_path, "val/cat/x.webp", "val/dog/y.Tif")
    train = folder.open("train", data_dir=str(tmp_path))
    assert isinstance(train, Dataset)
    assert names(train) == ["cat/deep/er/c.jpeg", "dog/a.PNG", "dog/b.png"]
    assert [train[i]["label"] for i in range(3)] == [0, 1, 1]
    assert train.class_names == ("cat", "dog")
    assert decoded(train[0])["image"].shape == (3, 5, 3)
    held_out = folder.open("validation", data_dir=str(tmp_path))
    assert names(held_out) == ["cat/x.webp", "dog/y.Tif"]


@pytest.mark.parametrize("spelling", ["validation", "test", "valid"])
def test_the_held_out_folder_may_have_other_names(tmp_path, spelling):
    write(tmp_path, "train/cat/a.png", f"{spelling}/cat/b.png")
    assert names(folder.open("validation", data_dir=str(tmp_path))) == ["cat/b.png"]


def test_without_such_folders_a_hash_splits_each_class(tmp_path):
    write(tmp_path, *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(200)))
    parts = [names(folder.open(s, data_dir=str(tmp_path))) for s in ("train", "validation")]
    assert sorted(parts[0] + parts[1]) == sorted(
        f"{c}/{i}.png" for c in ("cat", "dog") for i in range(200)
    )
    assert 0.12 < len(parts[1]) / 400 < 0.28
    half = folder.open("validation", data_dir=str(tmp_path), validation_share=0.5)
    assert set(parts[1]) < set(names(half))


def test_a_new_picture_moves_none_of_the_others_across(tmp_path):
    write(tmp_path, *(f"cat/{i}.png" for i in range(50)))
    before = set(names(folder.open("validation", data_dir=str(tmp_path))))
    write(tmp_path, *(f"cat/new{i}.png" for i in range(9)), "dog/a.png", "dog/b.png")
    after = set(names(folder.open("validation", data_dir=str(tmp_path))))
    assert before <= after


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_small_class_has_a_picture_in_each_split(tmp_path, count):
    for c in "abcdef":
        write(tmp_path, *(f"{c}/{i}.png" for i in range(count)))
    for split in ("train", "validation"):
        dataset = folder.open(split, data_dir=str(tmp_path))
        assert {dataset[i]["label"] for i in range(len(dataset))} == set(range(6))


def test_what_is_there_once_is_there_to_be_learned(tmp_path):
    write(tmp_path, "cat/a.png", "dog/a.png", "dog/b.png")
    assert "cat/a.png" in names(folder.open("train", data_dir=str(tmp_path)))
    write(tmp_path / "single", "cat/a.png", "dog/a.png")
    with pytest.raises(DataError, match="no class has two pictures"):
        folder.open("validation", data_dir=str(tmp_path / "single"))


def test_hidden_files_are_passed_over_and_others_named(tmp_path, caplog):
    write(tmp_path, "cat/a.png", "cat/b.png", "cat/.c.png", ".git/d.png", "cat/.thumbs/e.png")
    (tmp_path / "cat" / "notes.txt").write_text("a cat")
    (tmp_path / "readme.md").write_text("cats")
    train = folder.open("train", data_dir=str(tmp_path))
    assert train.class_names == ("cat",)
    assert train.ignored == ("cat/notes.txt",)
    assert "1 files are no pictures by their suffix and are left out: cat/notes.txt" in caplog.text
    found = set(names(train)) | set(names(folder.open("validation", data_dir=str(tmp_path))))
    assert found == {"cat/a.png", "cat/b.png"}


def test_a_link_back_into_the_tree_ends(tmp_path):
    write(tmp_path, "cat/a.png", "cat/b.png")
    (tmp_path / "cat" / "again").symlink_to(tmp_path / "cat")
    assert len(folder.open("train", data_dir=str(tmp_path))) == 1


def test_a_picture_that_went_away_is_a_data_error(tmp_path):
    write(tmp_path, "cat/a.png", "cat/b.png")
    train = folder.open("train", data_dir=str(tmp_path))
    (tmp_path / train.name(0)).unlink()
    with pytest.raises(DataError, match="No such file"):
        train[0]


def wrong_folders(root):
    """(folder, what its error says)."""
    (root / "pictures").mkdir()
    yield "picturse", "has no 'picturse'. Did you mean 'pictures'"
    yield "no/such/thing", "has no 'no'"
    yield "pictures", "is empty: it must hold one folder of pictures for each class"
    (root / "file").write_text("")
    yield "file", "is a file"
    write(root, "flat/a.png", "flat/b.png")
    yield "flat", "holds 2 pictures but no folders: .*flat/CLASS/a.png"
    write(root, "hole/cat/a.png")
    (root / "hole" / "dog").mkdir()
    yield "hole", "the class 'dog' has no picture"
    (root / "hole" / "dog" / "b.txt").write_text("")
    yield "hole", "the class 'dog' has no picture in .*, only 'dog/b.txt'"
    write(root, "half/train/cat/a.png")
    yield "half", "has a folder 'train' but none for validation"
    write(root, "differ/train/cat/a.png", "differ/train/dog/a.png", "differ/val/cats/a.png")
    write(root, "differ/val/dog/a.png")
    yield "differ", "same classes, but 'cat' is only in train, and 1 more differ. .*'cats'"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_wrong_folder_is_one_sentence_that_says_what_to_do(tmp_path, split):
    for name, text in wrong_folders(tmp_path):
        with pytest.raises(DataError, match=text) as error:
            folder.open(split, data_dir=str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="data_dir"):
        folder.open(split, data_dir="")


def test_wrong_options_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'train'"):
        folder.open("trian", data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="validation_share=1"):
        folder.open("train", data_dir=str(tmp_path), validation_share=1)
