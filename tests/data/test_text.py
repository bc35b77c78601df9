"""Tokenizers: one's own and published ones, and the step that applies them."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.golden.text import LENGTH, TEXTS
from vit_jax.data import pipeline, scenes
from vit_jax.data.geometry import Pad, RandomFlip, Resize
from vit_jax.data.text import Tokenize, captions_of, open_tokenizer, train_tokenizer
from vit_jax.data.transforms import ColorJitter, Standardize
from vit_jax.errors import ConfigError, DataError

ROOT = Path(__file__).parent.parent.parent
CAPTIONS = ["a dog chases a cat", "a cat sleeps", "two dogs sleep"] * 3
ODD = "na\u00efve caf\u00e9 \u4f60\u597d \U0001f600 <end> <pad>"


@pytest.fixture(scope="module")
def own():
    return train_tokenizer(CAPTIONS, 300)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{kind: (tokenizer, the ids that transformers gives)}."""
    found = {}
    for kind, golden in json.loads((ROOT / "tests/golden/text.json").read_text()).items():
        folder = tmp_path_factory.mktemp(kind)
        (folder / "tokenizer.json").write_text(json.dumps(golden["tokenizer"]))
        (folder / "tokenizer_config.json").write_text(json.dumps(golden["beside"]))
        found[kind] = open_tokenizer(folder), golden["ids"]
    return found


def test_any_text_comes_back_as_it_was(own):
    for words in (*CAPTIONS, ODD, "", "Dog, dog!"):
        assert own.decode(own.encode(words)) == words
    assert min(own.encode(ODD)) > 2  # what looks like a mark is letters


def test_a_row_is_start_words_end_and_padding(own):
    row = own.fill("a cat sleeps", 8)
    assert (own.padding, own.start, own.end) == (0, 1, 2)
    assert row.dtype == np.int32
    assert row.tolist() == [1, *own.encode("a cat sleeps"), 2, 0, 0, 0]
    assert own.decode(row) == "a cat sleeps"
    assert own.fill("", 3).tolist() == [1, 2, 0]


def test_a_longer_text_is_cut_so_that_the_end_stays(own):
    row = own.fill("a dog chases a cat", 4)
    assert row.tolist() == [1, *own.encode("a dog"), 2]
    assert own.decode(row) == "a dog"
    assert own.too_long(CAPTIONS, 4) == 9
    assert own.too_long(CAPTIONS, 7) == 0
    assert own.too_long(CAPTIONS, 6) == 3
    with pytest.raises(ConfigError, match=r"a length of 2 tokens leaves no room .* at least 3"):
        own.fill("a", 2)


def test_the_same_captions_give_the_same_file_in_any_order_and_process(own, tmp_path):
    assert train_tokenizer(CAPTIONS[::-1], 300) == own
    assert train_tokenizer(CAPTIONS[:3], 300) != own
    own.save(tmp_path / "tokenizer.json")
    code = (
        "import sys; from vit_jax.data.text import train_tokenizer;"
        f"train_tokenizer({CAPTIONS!r}, 300).save(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "other.json"], cwd=ROOT, check=True)
    assert (tmp_path / "other.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_what_is_saved_opens_as_the_same_and_so_does_a_pickle(own, published, tmp_path):
    for tokenizer in (own, *(pair[0] for pair in published.values())):
        tokenizer.encode("a")  # the library's own object is there now
        tokenizer.save(tmp_path / "tokenizer.json")
        assert open_tokenizer(tmp_path) == tokenizer
        assert open_tokenizer(tmp_path / "tokenizer.json").encode(ODD) == tokenizer.encode(ODD)
        assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
        assert len(pickle.dumps(tokenizer)) < 1.1 * len(tokenizer.content) + 500


def test_frequent_words_are_one_piece_at_the_start_and_inside(own):
    dog, other = own.encode("dog"), own.encode("a dog")
    assert len(dog) == 1
    assert other[-1:] == dog
    assert own.size < 300  # nothing else occurs twice


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_a_published_tokenizer_gives_the_ids_of_transformers(published, kind):
    tokenizer, wanted = published[kind]
    for words, ids in zip(TEXTS, wanted, strict=True):
        row = tokenizer.fill(words, LENGTH).tolist()
        if kind == "clip":  # transformers pads with the end, we do as OpenAI's code does
            end = ids.index(tokenizer.end)
            assert row[: end + 1] == ids[: end + 1]
            assert set(row[end + 1 :]) <= {0}
        else:
            assert row == ids


def test_published_marks_are_found(published):
    clip, siglip, siglip2 = (published[k][0] for k in ("clip", "siglip", "siglip2"))
    assert (clip.start, clip.end, clip.padding) == (clip.size - 2, clip.size - 1, 0)
    assert (siglip.start, siglip.end, siglip.padding) == (None, 1, 1)
    assert (siglip2.start, siglip2.end, siglip2.padding) == (None, 1, 0)
    assert clip.decode(clip.fill("A woman, holding  a bat", 16)) == "a woman , holding a bat"
    assert siglip.decode(siglip.fill("A photo of a CAT!", 20)) == "a photo of a cat"


def test_a_text_that_is_no_unicode_is_a_data_error(own):
    with pytest.raises(DataError, match="is no Unicode text: surrogates not allowed"):
        own.encode("half of \ud83d")
    with pytest.raises(DataError, match="is no Unicode"):
        train_tokenizer(["half of \ud83d"], 300)
    with pytest.raises(DataError, match=r"the id 400 is no word: the vocabulary is 0 to \d+"):
        own.decode([400])


def test_what_is_no_tokenizer_is_one_sentence_that_says_why(own, tmp_path):
    own.save(tmp_path / "tokenizer.json")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text('{"model": 3}')
    (tmp_path / "latin.json").write_bytes(b'{"caf\xe9": 3}')
    for source, said in {
        "tokeniser.json": r"tokeniser.json cannot be read: No such.* mean 'tokenizer.json'",
        "empty": r"empty/tokenizer.json cannot be read: No such file",
        "other.json": "other.json is no tokenizer.json of Hugging Face's library",
        "latin.json": "latin.json is no tokenizer.json: it is not UTF-8",
    }.items():
        with pytest.raises(ConfigError, match=said) as error:
            open_tokenizer(tmp_path / source)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="hf:a/b is no file"):
        open_tokenizer("hf:a/b")


@pytest.mark.parametrize(
    ("captions", "size", "kind", "said"),
    [
        (CAPTIONS, 258, ConfigError, "a vocabulary of 258 is too small: it must be at least 259"),
        ([], 300, DataError, "no captions to train a tokenizer on"),
        ([" "], 300, DataError, "no captions to train a tokenizer on"),
    ],
)
def test_a_vocabulary_that_cannot_be_trained_says_why(captions, size, kind, said):
    with pytest.raises(kind, match=said):
        train_tokenizer(captions, size)


def test_tokenize_draws_a_caption_by_the_rng_and_drops_the_others(own):
    example = {"image": np.zeros((2, 3, 3), np.uint8), "captions": ("a dog", "a cat", "two dogs")}
    rows = {words: own.fill(words, 6).tobytes() for words in example["captions"]}
    step = Tokenize(own, 6)
    drawn = [step(example, np.random.default_rng(seed)) for seed in range(60)]
    assert all(d.keys() == {"image", "tokens"} for d in drawn)
    assert "captions" in example
    counts = [sum(d["tokens"].tobytes() == row for d in drawn) for row in rows.values()]
    assert sum(counts) == 60
    assert min(counts) > 8
    first = Tokenize(own, 6, choose="first")(example, np.random.default_rng(0))
    assert first["tokens"].tobytes() == rows["a dog"]


def test_tokenize_says_what_it_lacks(own):
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match=r"needs captions, and the dataset has only \['label'\]"):
        Tokenize(own)({"label": 1}, rng)
    with pytest.raises(ConfigError, match="without a tokenizer"):
        Tokenize("somewhere")({"captions": ("a",)}, rng)
    with pytest.raises(ValueError, match=r"choose='fist' does not exist. Did you mean 'first'"):
        Tokenize(own, choose="fist")
    with pytest.raises(ConfigError, match="a length of 2 tokens leaves no room"):
        Tokenize(own, 2)


@pytest.fixture(scope="module")
def of_scenes():
    data = scenes.open("train")
    return train_tokenizer([c for i in range(60) for c in data.captions(i)], 400)


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4])
def test_tokens_are_those_of_the_picture_wherever_the_step_stands(of_scenes, place):
    data = scenes.open("validation")
    steps = [Resize((24, 32)), RandomFlip(), ColorJitter(brightness=0.2), Standardize()]
    steps.insert(place, Tokenize(of_scenes, 24, choose="first"))
    steps.append(Pad(((24, 32), (48, 48)), segmentation=False))
    batch = next(pipeline.eval_batches(data, steps, batch_size=3))
    assert batch["tokens"].dtype == np.int32
    assert [of_scenes.decode(row) for row in batch["tokens"]] == [
        data[int(index)]["captions"][0] for index in batch["index"]
    ]


class Told:
    """Three pictures; of each, what a person might say."""

    class_names = ()

    def __len__(self):
        return 3

    def __getitem__(self, index):
        image = np.full((4, 5, 3), 40 * index, np.uint8)
        return {"image": image, "captions": tuple(f"{n} dogs" for n in range(index + 1))}

    def name(self, index):
        return f"told {index}"


def test_training_batches_are_the_same_from_any_step_and_on_any_host(own):
    def batches(start=0, **host):
        steps = (Tokenize(own, 8), Standardize())
        return pipeline.train_batches(Told(), steps, batch_size=4, seed=3, start_step=start, **host)

    whole = [batch for _, batch in zip(range(6), batches())]
    assert whole[0].keys() == {"image", "tokens", "valid", "index"}
    (later, *_) = [batch for _, batch in zip(range(1), batches(5))]
    np.testing.assert_array_equal(later["tokens"], whole[5]["tokens"])
    halves = [next(batches(2, process_index=p, process_count=2))["tokens"] for p in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), whole[2]["tokens"])
    said = {own.decode(row) for batch in whole for row in batch["tokens"]}
    assert said == {"0 dogs", "1 dogs", "2 dogs"}


def test_captions_that_nobody_reads_stay_out_of_the_batch():
    (batch,) = pipeline.eval_batches(Told(), (Standardize(),), batch_size=3)
    assert batch.keys() == {"image", "valid", "index"}
    assert batch["valid"].all()


def test_captions_are_read_without_pictures_and_evenly():
    class Cheap(Told):
        def __len__(self):
            return 10

        def captions(self, index):
            return (f"number {index}", "again")

        def __getitem__(self, index):
            raise AssertionError("the picture was read")

    assert len(captions_of(Cheap())) == 20
    Cheap.enough_captions = 3
    assert captions_of(Cheap()) == [f for i in (0, 3, 6) for f in (f"number {i}", "again")]
    assert captions_of(Told()) == ["0 dogs", "0 dogs", "1 dogs", "0 dogs", "1 dogs", "2 dogs"]

    class Mute(Told):
        def __getitem__(self, index):
            return {"image": None, "label": 3}

    with pytest.raises(ConfigError, match=r"has no captions to read, only \['image', 'label'\]"):
        captions_of(Mute())
