"""Sentences as numbers: tokenizers of one's own and published ones, and the step that applies them.

All through Hugging Face's `tokenizers`, so that a published `tokenizer.json` gives the ids its
model was trained with.
"""

import functools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from vit_jax.contracts import Dataset, Example
from vit_jax.errors import ConfigError, DataError, nearest

FILE = "tokenizer.json"
SETTINGS = ("tokenizer_config.json", "config.json")  # beside it, where transformers wrote them
OWN = ("<pad>", "<start>", "<end>")  # 0, 1, 2 of a vocabulary trained here
LEAST = len(OWN) + 256  # entries: every byte has one
PADDINGS = ("<pad>", "[PAD]", "<|pad|>")  # what vocabularies call it
CHOICES = ("random", "first")
BROKEN = "\ufffd"  # what stands for a part of a character
LOOKED_AT = 100_000  # examples whose captions are read to train a tokenizer and to count
TOGETHER = 256  # of them, read at once

# What a family's tokenizer does to a text before its `tokenizer.json`, which need not say so: Zhai
# et al. 2023 (arXiv:2303.15343) learned from words in lower case, without ASCII punctuation; their
# second version (Tschannen et al. 2025, arXiv:2502.14786) from lower case. Done twice, it is the
# same, so that a file which does say so is none the worse.
BEFORE = {
    "siglip": (
        normalizers.Lowercase(),
        normalizers.Replace(tokenizers.Regex(r"[!-/:-@\[-`{-~]"), ""),
        normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
        normalizers.Strip(),
    ),
    "siglip2": (normalizers.Lowercase(),),
}
CLASSES = {"SiglipTokenizer": "siglip", "Siglip2Tokenizer": "siglip2"}

# Its threads gain nothing on captions, and it complains about them when the process forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True)
class Tokenizer:
    """Words to numbers and back; two with the same `content` are equal.

    A mark inside a text, such as a caption that says "<end>", is read as the letters it has: only
    `fill` puts in a start and an end.

    Attributes:
      content: what its `tokenizer.json` says.
      padding: the id that fills a row up.
      start: the id before the words; None if there is none.
      end: the id after them; None likewise.
    """

    content: str = field(repr=False)
    padding: int
    start: int | None
    end: int | None

    @functools.cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self.content)
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        return backend

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_backend"}

    @functools.cached_property
    def size(self) -> int:
        """V: one more than the highest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def marks(self) -> int:
        """How many places of a row the start and the end take."""
        return (self.start is not None) + (self.end is not None)

    def encode(self, text: str) -> list[int]:
        """Text -> its ids, without start, end and padding.

        Raises:
          DataError: if the text is no Unicode, such as half of a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{text!r} is no Unicode text: {error.reason}") from error
        return self._backend.encode(text, add_special_tokens=False).ids

    def pieces(self, text: str) -> list[tuple[int, str]]:
        """(id, what it stands for) of each piece of a text, for people.

        Where that is a part of a character, it is how the vocabulary spells the part.
        """
        found = []
        for i in self.encode(text):
            letters = self._backend.decode([i], skip_special_tokens=False)
            found.append((i, self._backend.id_to_token(i) if BROKEN in letters else letters))
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text, up to the first end; start, padding and other marks are left out.

        Raises:
          DataError: if an id is none of 0 to V - 1.
        """
        words = []
        for i in map(int, ids):
            if i == self.end:
                break
            if not 0 <= i < self.size:
                raise DataError(f"the id {i} is no word: the vocabulary is 0 to {self.size - 1}")
            words.append(i)
        text = self._backend.decode(words, skip_special_tokens=True)
        # CLIP's vocabulary ends a word with a mark of its own, which its decoder leaves.
        suffix = getattr(self._backend.model, "end_of_word_suffix", None)
        return (text.replace(suffix, " ") if suffix else text).strip()

    def fill(self, text: str, length: int) -> np.ndarray:
        """Text -> int32 [T]: start, words, end, then padding; cut so that start and end stay.

        Raises:
          ConfigError: if T leaves no room for a word.
          DataError: as of `encode`.
        """
        self.check_length(length)
        ids = self.encode(text)[: length - self.marks]
        ids = [i for i in (self.start, *ids, self.end) if i is not None]
        row = np.full(length, self.padding, np.int32)
        row[: len(ids)] = ids
        return row

    def check_length(self, length: int) -> None:
        """ConfigError unless rows of T ids hold a word besides the marks."""
        if length <= self.marks:
            raise ConfigError(
                f"a length of {length} tokens leaves no room for a word: with "
                f"{('no mark', 'an end', 'a start and an end')[self.marks]} it must be at least "
                f"{self.marks + 1}"
            )

    def too_long(self, captions: Iterable[str], length: int) -> int:
        """How many of these captions `fill` would cut to T ids."""
        self.check_length(length)
        return sum(len(self.encode(text)) > length - self.marks for text in captions)

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as a `tokenizer.json`, the whole file or none."""
        unfinished = Path(path).with_name(Path(path).name + ".tmp")
        unfinished.write_text(self.content, encoding="utf-8")
        os.replace(unfinished, path)


def open_tokenizer(source: str | os.PathLike) -> Tokenizer:
    """A tokenizer from a `tokenizer.json`, or from a folder that has one, such as a run's.

    What `tokenizer.json` leaves open is read off the files that transformers writes beside it: the
    id of the padding, and what SigLIP does to a text first. CLIP's own padding is its end, which a
    caption's last word could not be told from: there we pad with 0, as OpenAI's code does. The
    text's row up to its end is the same.

    Raises:
      ConfigError: if there is no such file, or it cannot be read, saying why.
    """
    if str(source).startswith("hf:"):
        raise ConfigError(f"{source} is no file: download it, as vit_jax.pretrained.hf does")
    given = Path(source).expanduser()
    file = given / FILE if given.is_dir() else given
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no {FILE}: it is not UTF-8") from error
    except OSError as error:
        beside = [path.name for path in file.parent.glob("*")]
        hint = "" if given.is_dir() else nearest(file.name, beside)
        raise ConfigError(f"tokenizer {file} cannot be read: {error.strerror}.{hint}") from error
    settings = {}
    for name in reversed(SETTINGS):
        settings |= _settings(file.with_name(name))
    return _tokenizer(content, settings, str(file))


def _settings(file: Path) -> dict[str, Any]:
    """A JSON beside a tokenizer; nothing where there is none."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _tokenizer(content: str, settings: dict[str, Any], called: str) -> Tokenizer:
    """What a `tokenizer.json` holds, with what is said beside it written into it."""
    try:
        backend = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing else
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"{called} is no {FILE} of Hugging Face's library: {reason}") from error
    marked = backend.padding or {}
    backend.no_padding()
    backend.no_truncation()
    start, end = _marks(backend)
    padding = marked.get("pad_id")
    if padding is None:
        token = settings.get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        names = ([token] if isinstance(token, str) else []) + list(PADDINGS)
        ids = (backend.token_to_id(name) for name in names)
        padding = next((i for i in ids if i is not None), 0)
    if padding == end and start is not None:
        padding = 0
    family = CLASSES.get(settings.get("tokenizer_class"), settings.get("model_type"))
    before = BEFORE.get(family, ()) if settings.get("do_lower_case", True) else ()
    if before:
        own = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([*before, *own])
    backend.enable_padding(pad_id=padding, pad_token=backend.id_to_token(padding) or "")
    return Tokenizer(backend.to_str(), padding, start, end)


def _marks(backend: tokenizers.Tokenizer) -> tuple[int | None, int | None]:
    """The ids that a tokenizer puts before and after a text."""
    coded = backend.encode("a")
    special, ids = coded.special_tokens_mask, coded.ids
    words = [place for place, mark in enumerate(special) if not mark]
    first, last = (words[0], words[-1]) if words else (0, -1)
    return (ids[0] if first > 0 else None), (ids[-1] if last < len(ids) - 1 else None)


def train_tokenizer(captions: Iterable[str], size: int) -> Tokenizer:
    """A byte-pair vocabulary of at most V entries, of what occurs in the captions most often.

    Sennrich et al. 2016 (arXiv:1508.07909), on bytes as Radford et al. 2019 have it ("Language
    Models are Unsupervised Multitask Learners", section 2.2): any text can be written, and `decode`
    gives it back. Upper and lower case differ. The same captions give the same vocabulary, in any
    order.

    Args:
      captions: what to learn from.
      size: V; fewer if nothing occurs twice any more.

    Raises:
      ConfigError: if V is too small to hold every byte.
      DataError: if there is no caption, or one is no Unicode.
    """
    if size < LEAST:
        raise ConfigError(
            f"a vocabulary of {size} is too small: it must be at least {LEAST}, one entry for each "
            f"byte and {len(OWN)} marks"
        )
    captions = [text for text in captions if text.strip()]
    if not captions:
        raise DataError("there are no captions to train a tokenizer on")
    for text in captions:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the caption {text!r} is no Unicode text: {error.reason}") from error
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    # The first word, too, has a space before it, so that it is the same entry as anywhere else.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=list(OWN),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    _, start, end = OWN
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 1), (end, 2)]
    )
    return _tokenizer(backend.to_str(), {}, FILE)


@dataclass(frozen=True)
class Tokenize:
    """Makes `tokens` of an example's `captions`: one of them, as numbers.

    It may stand anywhere among the steps, before `Pad` if that is there.

    Attributes:
      tokenizer: a `Tokenizer`, or, in a config, what `run.set_up` opens one from.
      length: T; longer captions are cut so that the end stays.
      choose: which caption of several: "random", or the "first", for evaluation.
    """

    tokenizer: Tokenizer | str = ""
    length: int = 32
    choose: str = "random"

    def __post_init__(self):
        if self.choose not in CHOICES:
            hint = nearest(self.choose, CHOICES)
            raise ValueError(f"choose={self.choose!r} does not exist.{hint}")
        if isinstance(self.tokenizer, Tokenizer):
            self.tokenizer.check_length(self.length)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """`captions`, a tuple of str -> `tokens` int32 [T]; the captions themselves are dropped.

        Raises:
          ConfigError: if the examples have no captions, or it was not given a tokenizer.
        """
        if not isinstance(self.tokenizer, Tokenizer):
            raise ConfigError("data.text.Tokenize was built without a tokenizer")
        if "captions" not in example:
            raise ConfigError(
                f"data.text.Tokenize needs captions, and the dataset has only {sorted(example)}"
            )
        captions = example["captions"]
        place = int(self._draw(rng) * len(captions))
        rest = {key: value for key, value in example.items() if key != "captions"}
        return rest | {"tokens": self.tokenizer.fill(captions[place], self.length)}

    def sized(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        """The picture's size, which stays; as much chance is used up as in a call."""
        self._draw(rng)
        return size

    def _draw(self, rng: np.random.Generator) -> float:
        return rng.random() if self.choose == "random" else 0.0


def looked_at(dataset: Dataset) -> int:
    """Of how many examples the captions are read: of all, up to 100,000.

    A dataset whose captions cost time may say how many tell as much as all: `enough_captions`.
    """
    return min(len(dataset), getattr(dataset, "enough_captions", LOOKED_AT))


def captions_of(dataset: Dataset) -> list[str]:
    """The captions of `looked_at` examples, which lie evenly in a dataset.

    No picture is read where the dataset has `captions(index)`. Examples that cannot be read are
    passed over.

    Raises:
      ConfigError: if the dataset has no captions.
    """
    count = looked_at(dataset)
    places = [place * len(dataset) // count for place in range(count)]
    read = getattr(dataset, "captions", None)
    found: list[str] = []
    for first in range(0, count, TOGETHER):
        for index, example in _examples(dataset, places[first : first + TOGETHER], bool(read)):
            try:
                if read:
                    found += read(index)
                    continue
                example = dataset[index] if example is None else example
            except DataError:
                continue
            if "captions" not in example:
                raise ConfigError(f"the dataset has no captions to read, only {sorted(example)}")
            found += example["captions"]
    return found


def _examples(
    dataset: Dataset, places: list[int], unread: bool
) -> Iterable[tuple[int, Example | None]]:
    """Examples by their place, read together where the dataset can; None is still to be read."""
    if not unread and hasattr(dataset, "__getitems__"):
        try:
            return zip(places, dataset.__getitems__(places), strict=True)
        except DataError:
            pass  # one of them is broken: find out which
    return [(place, None) for place in places]
