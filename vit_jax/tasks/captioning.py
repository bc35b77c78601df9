"""Captioning: a sentence about each picture; and how it is drawn, word by word."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_jax.contracts import Array, Batch, Example, Predictions, Sums
from vit_jax.errors import ConfigError, DataError

PADDING, END = 0, 2  # of a vocabulary of our own
TILE, GAP, LINE = 160, 12, 22  # pixels of a drawn word
COLUMNS = 5
DARK = 0.2  # what is left of a picture where a word does not look at all


@dataclass(frozen=True)
class Captioning:
    """Learns to write the words of a caption, each from the picture and the true words before it:
    the mean cross-entropy over words and ends, Sutskever et al. 2014 (arXiv:1409.3215), eq. 2.

    Attributes:
      label_smoothing: share of each target that is spread evenly over the vocabulary: Vaswani et
        al. 2017 (arXiv:1706.03762), section 5.4.
      tokenizer: what turns ids into words; given where a run is set up, and where a run is opened.
    """

    label_smoothing: float = 0.0
    tokenizer: Any = None
    headline = "bleu4"
    wants_results = True
    cell = 256

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing={self.label_smoothing} must be in [0, 1)")

    def score(self, outputs: dict[str, Array], batch: Batch) -> tuple[jax.Array, Sums]:
        """The mean loss over the words of the valid rows, and sums.

        Logits [B, T - 1, V] are held against the tokens [B, T] from the second on; an end is a word
        too, padding is none. A token beyond the vocabulary makes the loss NaN, so that none passes
        unseen. What does not count has a gradient of exactly zero.

        Returns:
          The loss and {"loss", "nats" (the loss without smoothing), "correct" (words that were the
          likeliest), "count" (of words), "captions" (of rows)}, float32 scalars.

        Raises:
          ValueError: if there are no captions.
        """
        if "tokens" not in batch or "logits" not in outputs:
            raise ValueError(
                "there are no tokens in the batch: captions need a dataset with captions and "
                "data.text.Tokenize among the transforms"
            )
        target = jnp.asarray(batch["tokens"])[:, 1:]  # [B, T - 1]
        padding = getattr(self.tokenizer, "padding", PADDING)
        end = getattr(self.tokenizer, "end", END)
        ends = jnp.cumsum(target == end, 1)
        counted = jnp.where(target == end, ends == 1, (target != padding) & (ends == 0))
        valid = batch.get("valid")
        valid = jnp.ones(len(target), bool) if valid is None else jnp.asarray(valid)
        counted &= valid[:, None]
        # Masked before the logarithm as well as after: a gradient of 0 times infinity is NaN.
        logits = jnp.where(counted[..., None], outputs["logits"].astype(jnp.float32), 0.0)
        log_probs = jax.nn.log_softmax(logits)  # [B, T - 1, V]
        known = (target >= 0) & (target < logits.shape[-1])
        nats = -jnp.take_along_axis(log_probs, jnp.where(known, target, 0)[..., None], -1)[..., 0]
        smooth = self.label_smoothing
        losses = (1 - smooth) * nats - smooth * log_probs.mean(-1) if smooth else nats
        correct = (logits.argmax(-1) == target) & counted

        def total(x: jax.Array) -> jax.Array:
            return jnp.where(counted, jnp.where(known, x, jnp.nan), 0.0).sum()

        count = counted.sum(dtype=jnp.float32)
        sums = {
            "loss": total(losses),
            "nats": total(nats),
            "correct": correct.sum(dtype=jnp.float32),
            "count": count,
            "captions": valid.sum(dtype=jnp.float32),
        }
        return sums["loss"] / jnp.maximum(count, 1.0), sums

    def predict(self, outputs: dict[str, Array], batch: Batch) -> Predictions:
        """What the model wrote by itself: `generated` [B, T], `log_prob` [B], and `attention`
        [B, T, h, w] if it looks at the picture; see `models.captioner.Captioner`.
        """
        names = ("generated", "log_prob", "attention")
        return {name: outputs[name] for name in names if name in outputs}

    def summarize(
        self, sums: Sums, results: Iterable[tuple[Predictions, Example]] | None = None
    ) -> dict[str, float]:
        """Sums of a split -> {"loss", "perplexity", "token_accuracy"}, of the words given those
        before; with `results` also {"exact_match", "bleu4", "chrf"} of what is written, in [0, 1].

        "exact_match" is the share of pictures whose sentence is, to the letter, one of their
        captions as the tokenizer writes it. "bleu4" is Papineni et al. 2002 (P02-1040) with up to
        four words, "chrf" Popović 2015 (W15-3049), both as sacrebleu has them (Post 2018,
        arXiv:1804.08771), over the whole split, against all captions of a picture; upper and lower
        case are the same there, and BLEU's words are those of its tokenizer 13a.

        Raises:
          DataError: if no word counted.
          ConfigError: if sentences are to be compared without a tokenizer.
        """
        count = float(sums["count"])
        if not count:
            raise DataError("there was no word to measure: no picture, or all are broken")
        numbers = {
            "loss": float(sums["loss"]) / count,
            "perplexity": math.exp(min(float(sums["nats"]) / count, 700.0)),
            "token_accuracy": float(sums["correct"]) / count,
        }
        if results is None:
            return numbers
        written, captions = [], []
        for prediction, example in results:
            written.append(self.text(prediction["generated"]))
            captions.append(tuple(example["captions"]))
        return numbers | self._compared(written, captions)

    def _compared(self, written: list[str], captions: list[tuple[str, ...]]) -> dict[str, float]:
        from sacrebleu.metrics import BLEU, CHRF

        right = sum(
            text in [self.tokenizer.decode(self.tokenizer.encode(c)) for c in own]
            for text, own in zip(written, captions, strict=True)
        )
        # One list for each place among the captions; a picture may have fewer than others.
        most = max(map(len, captions))
        lists = [[own[i] if i < len(own) else None for own in captions] for i in range(most)]
        bleu = BLEU(lowercase=True, force=True).corpus_score(written, lists)
        chrf = CHRF(lowercase=True).corpus_score(written, lists)
        return {
            "exact_match": right / len(written),
            "bleu4": bleu.score / 100,
            "chrf": chrf.score / 100,
        }

    def text(self, ids: Iterable[int]) -> str:
        """Ids -> the sentence; ConfigError if the task was given no tokenizer."""
        if self.tokenizer is None:
            raise ConfigError("tasks.captioning.Captioning was built without a tokenizer")
        return self.tokenizer.decode(ids)

    def draw(
        self, image: np.ndarray, example: Example, prediction: Predictions, names: Sequence[str]
    ) -> tuple[np.ndarray, str, bool]:
        """A picture and what is written about it -> (picture, sentence, whether it is right).

        A picture without captions comes back as a sheet of itself and of where each word looks, if
        the model tells. A wrong sentence is followed by the first true one.
        """
        sentence = self.text(prediction["generated"])
        if "captions" not in example:
            if "attention" not in prediction or not sentence:
                return image, sentence, True
            return self._sheet(image, prediction), sentence, True
        captions = example["captions"]
        right = sentence in [self.text(self.tokenizer.encode(c)) for c in captions]
        return image, sentence if right else f"{sentence or '(nothing)'}; is: {captions[0]}", right

    def draw_target(
        self, image: np.ndarray, row: Batch, names: Sequence[str]
    ) -> tuple[np.ndarray, str]:
        """A batch's picture and row -> (picture, its caption as the model is to learn it)."""
        return image, self.text(row["tokens"])

    def words(self, prediction: Predictions) -> list[tuple[str, np.ndarray]]:
        """The words of a sentence, and where each looked [h, w]: the mean over its pieces."""
        ids = [int(i) for i in prediction["generated"]]
        whole = self.text(ids).split()
        pieces: list[list[np.ndarray]] = [[] for _ in whole]
        before = ""
        for place in range(1, len(ids)):
            # The end, and what follows it, are no part of the last word.
            if ids[place] == getattr(self.tokenizer, "end", END):
                break
            now = self.text(ids[: place + 1])
            # A piece that shows nothing is the space before the next word.
            word = len(now.split()) - (now != before)
            if 0 <= word < len(whole):
                pieces[word].append(np.asarray(prediction["attention"][place], np.float32))
            before = now
        pairs = zip(whole, pieces, strict=True)
        return [(word, np.mean(maps, 0)) for word, maps in pairs if maps]

    def _sheet(self, image: np.ndarray, prediction: Predictions) -> np.ndarray:
        """The picture, then one small picture a word, lit where it looks, uint8 [H, W, 3].

        As bright as in the picture is where a word looks most.
        """
        H, W = image.shape[:2]
        scale = TILE / max(H, W)
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
        size = (max(round(W * scale), 1), max(round(H * scale), 1))
        picture = cv2.resize(image, size, interpolation=method)
        tiles = [("", picture)]
        for word, weights in self.words(prediction):
            light = weights / max(float(weights.max()), 1e-12)
            light = cv2.resize(light, size, interpolation=cv2.INTER_LINEAR)[..., None]
            lit = picture * (DARK + (1 - DARK) * light)
            tiles.append((word, lit.round().astype(np.uint8)))
        w, h = size
        columns = min(COLUMNS, len(tiles))
        rows = -(-len(tiles) // columns)
        step_x, step_y = TILE + GAP, h + LINE + GAP
        sheet = np.full((rows * step_y + GAP, columns * step_x + GAP, 3), 255, np.uint8)
        for i, (_, tile) in enumerate(tiles):
            x, y = GAP + i % columns * step_x + (TILE - w) // 2, GAP + i // columns * step_y
            sheet[y : y + h, x : x + w] = tile
        drawn = Image.fromarray(sheet)
        pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(15)
        for i, (word, _) in enumerate(tiles):
            x, y = GAP + i % columns * step_x + TILE // 2, GAP + i // columns * step_y + h + 3
            word = word if len(word) <= 18 else word[:17] + "…"
            pen.text((x, y), word, (0, 0, 0), font, anchor="ma")
        return np.asarray(drawn)
