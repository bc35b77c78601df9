"""Contrast: which text of a batch belongs to which picture."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.contracts import Array, Batch, Example, Predictions, Sums
from vit_jax.errors import ConfigError, DataError, nearest

LOSSES = ("softmax", "sigmoid")
RANKS = (1, 5, 10)
MASKED = -1e30  # finite, so that its softmax and its gradient are
ROWS = 512  # queries that are ranked at once


@dataclass(frozen=True)
class Contrastive:
    """Learns embeddings of pictures and texts that are alike where they belong together.

    Attributes:
      loss: "softmax", the symmetric cross-entropy of Radford et al. 2021 (arXiv:2103.00020), figure
        3: each picture chooses among all texts of the batch, and each text among all pictures; or
        "sigmoid", a binary decision for each pair: Zhai et al. 2023 (arXiv:2303.15343), algorithm
        1, which needs the model's `logit_bias`.
      among: recall is measured within groups of this many examples, in their order; what makes no
        whole group is left out. 0 is the whole split as one group.
      tokenizer: what turns `tokens` into words, to draw them; given where a run is set up.
    """

    loss: str = "softmax"
    among: int = 0
    tokenizer: Any = None
    headline = "text_to_image_r1"
    wants_results = True
    cell = 224
    # Rows are compared with each other: a batch cut into parts would lose most comparisons.
    whole_batch = True

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ConfigError(f"there is no loss {self.loss!r}.{nearest(self.loss, LOSSES)}")
        if self.among < 0 or self.among == 1:
            raise ConfigError(f"among={self.among} must be 0, the whole split, or at least 2")

    def score(self, outputs: dict[str, Array], batch: Batch) -> tuple[jax.Array, Sums]:
        """The mean loss over the valid rows, and sums.

        The batch is the global one: on a mesh each device compares its rows with all others'. Rows
        that are not valid are neither asked nor compared with, and their gradient is exactly zero.
        In evaluation the loss is the mean of those of the batches, so it depends on their size;
        recall does not.

        Returns:
          The loss and {"loss", "image_to_text", "text_to_image" (rows whose own partner is the
          likeliest of the batch), "logit_scale", "count"}, float32 scalars.

        Raises:
          ValueError: if the model has no text, the batch is of one row, or "sigmoid" lacks a bias.
        """
        if "text_embedding" not in outputs:
            raise ValueError(
                "there are no tokens in the batch: contrast needs a dataset with captions and "
                "data.text.Tokenize among the transforms"
            )
        image, text = outputs["image_embedding"], outputs["text_embedding"]  # [B, D]
        rows = image.shape[0]
        if rows < 2:
            raise ValueError(
                f"batch_size={rows}: a contrastive loss compares the rows of a batch, so it needs "
                "at least 2"
            )
        if self.loss == "sigmoid" and "logit_bias" not in outputs:
            raise ValueError(
                "the sigmoid loss needs the model's bias: set --config.model.bias=-10.0"
            )
        valid = batch.get("valid")
        valid = jnp.ones(rows, bool) if valid is None else jnp.asarray(valid)
        # Masked before the products as well as after: a gradient of 0 times infinity is NaN.
        image, text = (jnp.where(valid[:, None], x, 0.0).astype(jnp.float32) for x in (image, text))
        logits = jnp.exp(outputs["logit_scale"].astype(jnp.float32)) * (image @ text.T)  # [B, B]
        if "logit_bias" in outputs:
            logits += outputs["logit_bias"].astype(jnp.float32)
        both = valid[:, None] & valid[None, :]
        if self.loss == "sigmoid":
            sign = 2 * jnp.eye(rows) - 1
            losses = jnp.where(both, -jax.nn.log_sigmoid(sign * logits), 0.0).sum(1)  # [B]
        else:
            seen = jnp.where(both, logits, MASKED)
            own = jnp.diagonal(seen)
            losses = (jax.nn.logsumexp(seen, 0) + jax.nn.logsumexp(seen, 1)) / 2 - own
            losses = jnp.where(valid, losses, 0.0)
        ranked = jax.lax.stop_gradient(jnp.where(both, logits, MASKED))
        count = valid.sum(dtype=jnp.float32)
        place = jnp.arange(rows)
        sums = {
            "loss": losses.sum(),
            "image_to_text": ((ranked.argmax(1) == place) & valid).sum(dtype=jnp.float32),
            "text_to_image": ((ranked.argmax(0) == place) & valid).sum(dtype=jnp.float32),
            "logit_scale": outputs["logit_scale"].astype(jnp.float32) * count,
            "count": count,
        }
        return losses.sum() / jnp.maximum(count, 1.0), sums

    def predict(self, outputs: dict[str, Array], batch: Batch) -> Predictions:
        """Embeddings, and for each picture the likeliest text of its batch.

        Returns:
          {"image_embedding", "text_embedding" [B, D], "best_tokens" [B, T], "probability" [B]}; the
          probability is among the batch's valid texts, or of the pair alone with "sigmoid".
        """
        image, text = outputs["image_embedding"], outputs["text_embedding"]
        logits = probabilities_of(outputs, self.loss, batch.get("valid"))
        best = logits.argmax(1)
        return {
            "image_embedding": image.astype(jnp.float32),
            "text_embedding": text.astype(jnp.float32),
            "best_tokens": jnp.asarray(batch["tokens"])[best],
            "probability": jnp.take_along_axis(logits, best[:, None], 1)[:, 0],
        }

    def summarize(
        self, sums: Sums, results: Iterable[tuple[Predictions, Example]] | None = None
    ) -> dict[str, float]:
        """Sums of a split -> {"loss", "batch_image_to_text", "batch_text_to_image", "logit_scale"}
        and, with its results, recall as of `recalls`.

        Raises:
          DataError: if no row was valid, or there are fewer results than `among`.
        """
        count = float(sums["count"])
        if not count:
            raise DataError("there was no valid example to measure: no picture, or all are broken")
        found = {
            "loss": float(sums["loss"]) / count,
            "batch_image_to_text": float(sums["image_to_text"]) / count,
            "batch_text_to_image": float(sums["text_to_image"]) / count,
            "logit_scale": float(sums["logit_scale"]) / count,
        }
        if results is None:
            return found
        image, text, captions = [], [], []
        for prediction, example in results:
            image.append(np.asarray(prediction["image_embedding"]))
            text.append(np.asarray(prediction["text_embedding"]))
            captions.append(tuple(example["captions"]))
        size = self.among or len(image)
        if len(image) < size:
            raise DataError(f"among={size}, but only {len(image)} held-out examples were measured")
        groups = [slice(at, at + size) for at in range(0, len(image) - size + 1, size)]
        per_group = [recalls(np.stack(image[g]), np.stack(text[g]), captions[g]) for g in groups]
        return found | {k: float(np.mean([one[k] for one in per_group])) for k in per_group[0]}

    def draw(
        self, image: np.ndarray, example: Example, prediction: Predictions, names: tuple[str, ...]
    ) -> tuple[np.ndarray, str, bool]:
        """A picture and its likeliest caption -> (picture, "a red six (51 %), is ...", False)."""
        guess = self._words(prediction["best_tokens"])
        # As the tokenizer gives it back, which may be in lower case, or cut.
        length = len(prediction["best_tokens"])
        right = any(guess == self._again(caption, length) for caption in example["captions"])
        title = f"{guess} ({100 * float(prediction['probability']):.0f} %)"
        return image, title if right else f"{title}, is {example['captions'][0]}", right

    def draw_target(
        self, image: np.ndarray, row: Batch, names: tuple[str, ...]
    ) -> tuple[np.ndarray, str]:
        """A batch's picture and row -> (picture, its caption)."""
        return image, self._words(row["tokens"])

    def _words(self, tokens: Array) -> str:
        ids = [int(i) for i in np.asarray(tokens)]
        return str(ids) if self.tokenizer is None else self.tokenizer.decode(ids)

    def _again(self, caption: str, length: int) -> str:
        if self.tokenizer is None:
            return caption
        return self.tokenizer.decode(self.tokenizer.fill(caption, length))


@dataclass(frozen=True)
class Similarity:
    """How near pictures are to one text, to be ranked by it."""

    cell = 128

    def predict(self, outputs: Array, batch: Batch) -> Predictions:
        """Cosines [B, 1] -> {"similarity" [B]}."""
        return {"similarity": jnp.asarray(outputs, jnp.float32)[:, 0]}


def probabilities_of(outputs: dict[str, Array], loss: str, valid: Array | None = None) -> jax.Array:
    """Embeddings [B, D] and [T, D] -> how well each text fits each picture: [B, T].

    Args:
      outputs: of a model of pictures and texts.
      loss: it was trained with. "softmax": each row adds up to 1 over the texts (Radford et al.
        2021, section 3.1.2); "sigmoid": each pair by itself.
      valid: bool [T], True on texts to choose among; None is all.
    """
    image, text = (outputs[f"{kind}_embedding"] for kind in ("image", "text"))
    logits = jnp.exp(outputs["logit_scale"].astype(jnp.float32)) * jnp.einsum(
        "bd,td->bt", image, text, precision="highest"
    )
    logits += outputs.get("logit_bias", jnp.zeros(())).astype(jnp.float32)
    if valid is not None:
        logits = jnp.where(jnp.asarray(valid)[None], logits, MASKED)
    return jax.nn.sigmoid(logits) if loss == "sigmoid" else jax.nn.softmax(logits, -1)


def recalls(
    image: np.ndarray, text: np.ndarray, captions: list[tuple[str, ...]]
) -> dict[str, float]:
    """How often what belongs together is among the 1, 5, 10 nearest of a group.

    Each picture has one text, the first of its captions. A text is right for every picture that has
    it among its captions, so that equal sentences are no mistakes. Wrong ones that are as near as
    the right one count as nearer: a model that tells nothing apart gets 0.

    Args:
      image: [N, D].
      text: [N, D], of the first caption of each.
      captions: of each picture.

    Returns:
      {"image_to_text_r1", ..., "text_to_image_r10"}, shares of 1.
    """
    numbers: dict[str, int] = {}
    first = np.array([numbers.setdefault(own[0], len(numbers)) for own in captions])
    known = [np.array([numbers[c] for c in own if c in numbers]) for own in captions]
    holds = np.zeros((len(captions), len(numbers)), bool)  # which picture has which sentence
    for row, own in enumerate(known):
        holds[row, own] = True
    found = {}
    for name, query, others in (("image_to_text", image, text), ("text_to_image", text, image)):
        ranks = []
        for at in range(0, len(query), ROWS):
            part = slice(at, at + ROWS)
            near = query[part] @ others.T  # [n, N]
            right = holds[part][:, first] if name == "image_to_text" else holds[:, first[part]].T
            best = np.where(right, near, -np.inf).max(1, keepdims=True)
            ranks.append((~right & (near >= best)).sum(1))
        rank = np.concatenate(ranks)
        found |= {f"{name}_r{k}": float((rank < k).mean()) for k in RANKS}
    return found
