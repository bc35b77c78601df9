"""The command that trains a tokenizer and shows what one does."""

import json

import numpy as np
import pytest
from PIL import Image

from vit_jax import tokenizer
from vit_jax.data.text import open_tokenizer, train_tokenizer

SAID = ["a dog runs", "a dog sleeps", "two dogs run and sleep"]


@pytest.fixture
def pictures(tmp_path):
    """A folder with captions for its splits."""
    for split, captions in (("train", SAID), ("val", ["a cow"])):
        (tmp_path / split).mkdir()
        for i, caption in enumerate(captions):
            Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / split / f"{i}.png")
            with (tmp_path / split / "captions.txt").open("a") as file:
                file.write(f"{i}.png\t{caption}\n")
    return tmp_path


def test_it_trains_on_the_captions_of_a_configs_training_split(pictures, capsys):
    out = pictures / "tokenizer.json"
    options = [f"--config.data.data_dir={pictures}", "--config.data.length=7", f"--output={out}"]
    assert tokenizer.main(["--config=configs/clip.py:folder", *options, "--vocabulary=300"]) == 0
    found = open_tokenizer(out)
    assert found == train_tokenizer(SAID, 300)
    lengths = [len(found.encode(caption)) + 2 for caption in SAID]
    assert capsys.readouterr().out.splitlines() == [
        f"3 captions, {found.size} entries",
        f"lengths: 50 % at most {sorted(lengths)[1]}, 99 % at most {max(lengths)}, "
        f"100 % at most {max(lengths)} tokens",
        f"config.data.length=7 cuts {sum(n > 7 for n in lengths)} of them",
        f"written: {out}",
    ]
    assert sum(n > 7 for n in lengths)


def test_it_trains_on_text_files_and_shows_the_pieces(pictures, capsys):
    (pictures / "more.txt").write_bytes("\ufeffa dog eats\r\n\n".encode())
    files = [str(pictures / "train/captions.txt"), str(pictures / "more.txt")]
    out = pictures / "tokenizer.json"
    assert tokenizer.main([*files, f"--output={out}", "--show", "a dog \u4f60"]) == 0
    found = open_tokenizer(out)
    assert found == train_tokenizer([*SAID, "a dog eats"], 8000)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"4 captions, {found.size} entries"
    pieces = [line.split(maxsplit=1) for line in told[3:]]
    assert [int(number) for number, _ in pieces] == found.encode("a dog \u4f60")
    assert [piece for _, piece in pieces[:2]] == ["' a'", "' dog'"]
    assert len(pieces) == 6  # the space and three bytes of one character
    assert tokenizer.main([f"--tokenizer={pictures}", "--show", "a dog"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{found.size} entries; start 1, end 2, padding 0"
    assert len(told) == 3


WRONG = {
    "": (2, "wanted one of these: --config=FILE, text files, or --tokenizer=REF"),
    "a.txt": (2, "nothing to do: say --output=tokenizer.json, or --show TEXT"),
    "a.txt --config=configs/clip.py --output=t.json": (2, "wanted one of these"),
    "a.txt --otput=t.json": (2, "--otput=t.json is no flag of vit_jax.tokenizer"),
    "a.txt --output=none/t.json": (2, "--output=none/t.json cannot be written"),
    "a.txt --output=t.json --config.data.length=3": (2, "--config.data.length=3 needs --config"),
    "a.txt --output=t.json --vocabulary=100": (2, "a vocabulary of 100 is too small"),
    "empty.txt --output=t.json": (3, "there are no captions to train a tokenizer on"),
    "none.txt --output=t.json": (3, "none.txt cannot be read: No such file"),
    "latin.txt --output=t.json": (3, "line 2 of latin.txt is not UTF-8 (the byte 0xe9)"),
    "--tokenizer=none.json --show a": (2, "tokenizer none.json cannot be read: No such file"),
    "--tokenizer=a.txt --show a": (2, "a.txt is no tokenizer.json of Hugging Face's library"),
    "--tokenizer=t.json --show a --vocabulary=9": (2, "--vocabulary is for training one"),
    "--tokenizer=hf:a/b/c --show a": (4, "wanted hf:OWNER/NAME, or hf:OWNER/NAME@REVISION"),
    "--config=configs/clip.py:foldr --output=t.json": (2, "no recipe 'foldr'"),
    "--config=configs/clip.py:folder --output=t.json": (3, "'captions' needs --config.data.data_"),
    "--config=configs/vit.py --output=t.json": (2, "the dataset has no captions to read, only"),
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_is_one_sentence_and_writes_nothing(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a dog\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"a dog\ncaf\xe9\n")
    status, said = WRONG[line]
    assert tokenizer.main(line.split()) == status
    out, err = capsys.readouterr()
    assert said in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "t.json").exists()
    assert not out


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        tokenizer.main(["--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert "--config.data.tokenizer=tokenizer.json" in told
    assert "--config=configs/clip.py:folder" in told


def test_what_it_writes_is_json_that_others_read(pictures):
    out = pictures / "t.json"
    assert tokenizer.main([str(pictures / "train/captions.txt"), f"--output={out}"]) == 0
    content = json.loads(out.read_text())
    assert content["model"]["type"] == "BPE"
    assert [t["content"] for t in content["added_tokens"]] == ["<pad>", "<start>", "<end>"]
