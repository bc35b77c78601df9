"""Classification: one label for each picture, or shares of several."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.contracts import Array, Batch, Example, Predictions, Sums
from vit_jax.errors import ConfigError, DataError, nearest

LOSSES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Classification:
    """Learns which of K classes a picture shows, from logits [B, K].

    Attributes:
      label_smoothing: share of each target that is spread evenly over the K classes: Szegedy et
        al. 2016 (arXiv:1512.00567), section 7.
      loss: "softmax" for the cross-entropy, or "sigmoid" for K binary cross-entropies, added up:
        Beyer et al. 2020 (arXiv:2006.07159).
      top: how many classes a prediction lists; the true one among them counts as `correct_top5`
        (for 5) where there are more classes than that.
    """

    label_smoothing: float = 0.0
    loss: str = "softmax"
    top: int = 5
    headline = "accuracy"
    wants_results = False
    cell = 128

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing={self.label_smoothing} must be in [0, 1)")
        if self.loss not in LOSSES:
            raise ConfigError(f"there is no loss {self.loss!r}.{nearest(self.loss, LOSSES)}")
        if self.top < 1:
            raise ConfigError(f"top={self.top} must be at least 1")

    def score(self, outputs: Array, batch: Batch) -> tuple[jax.Array, Sums]:
        """Logits [B, K] -> the mean loss over the valid rows, and sums.

        The target is `label_probs` [B, K] where the batch has it, else `label` [B]; what counts as
        correct is its largest entry. A valid row whose label is not in 0..K-1 makes the loss NaN,
        so that no wrong label passes for an easy one. Rows that are not valid have a gradient of
        exactly zero, and without any valid row the loss is 0.

        Returns:
          The loss and {"loss", "correct", "correct_top5", "count"}, float32 scalars.
        """
        classes = outputs.shape[-1]
        valid = batch.get("valid")
        valid = jnp.ones(outputs.shape[0], bool) if valid is None else jnp.asarray(valid)
        # Masked before the logarithms as well as after: a gradient of 0 times infinity is NaN.
        logits = jnp.where(valid[:, None], outputs.astype(jnp.float32), 0.0)  # [B, K]
        if "label_probs" in batch:
            target = jnp.asarray(batch["label_probs"], jnp.float32)  # [B, K]
            label = target.argmax(-1)
        else:
            label = jnp.asarray(batch["label"])
            known = (label >= 0) & (label < classes)
            target = jnp.where(known[:, None], jax.nn.one_hot(label, classes), jnp.nan)
        target = (1 - self.label_smoothing) * target + self.label_smoothing / classes
        if self.loss == "sigmoid":
            losses = -target * jax.nn.log_sigmoid(logits)
            losses -= (1 - target) * jax.nn.log_sigmoid(-logits)
        else:
            losses = -target * jax.nn.log_softmax(logits)
        losses = jnp.where(valid, losses.sum(-1), 0.0)  # [B]
        count = valid.sum(dtype=jnp.float32)

        _, best = jax.lax.top_k(jax.lax.stop_gradient(logits), min(self.top, classes))  # [B, k]
        hit = (best == label[:, None]) & valid[:, None]
        sums = {"loss": losses.sum(), "correct": hit[:, 0].sum(dtype=jnp.float32), "count": count}
        if 1 < self.top < classes:
            sums[f"correct_top{self.top}"] = hit.sum(dtype=jnp.float32)
        return losses.sum() / jnp.maximum(count, 1.0), sums

    def predict(self, outputs: Array, batch: Batch) -> Predictions:
        """Logits [B, K] -> the likeliest class and the k = min(top, K) likeliest ones.

        Returns:
          {"label" [B] int32, "probability" [B], "top_labels" [B, k] int32, "top_probabilities"
          [B, k]}, likeliest first; with the sigmoid loss the probabilities do not add up to 1.
        """
        activation = jax.nn.sigmoid if self.loss == "sigmoid" else jax.nn.softmax
        probabilities = activation(outputs.astype(jnp.float32))
        values, labels = jax.lax.top_k(probabilities, min(self.top, outputs.shape[-1]))
        labels = labels.astype(jnp.int32)
        return {
            "label": labels[:, 0],
            "probability": values[:, 0],
            "top_labels": labels,
            "top_probabilities": values,
        }

    def summarize(self, sums: Sums, results: None = None) -> dict[str, float]:
        """Sums of a split -> {"loss", "accuracy", "accuracy_top5"}, accuracies in [0, 1].

        Raises:
          DataError: if no row was valid.
        """
        count = float(sums["count"])
        if not count:
            raise DataError("there was no valid example to measure: no picture, or all are broken")
        names = {"loss": "loss"} | {
            k: k.replace("correct", "accuracy") for k in sorted(sums) if k.startswith("correct")
        }
        return {name: float(sums[key]) / count for key, name in names.items()}

    def draw(
        self, image: np.ndarray, example: Example, prediction: Predictions, names: tuple[str, ...]
    ) -> tuple[np.ndarray, str, bool]:
        """A picture and its prediction -> (picture, "7 (51 %), is 1", False)."""
        guess, truth = int(prediction["label"]), int(example["label"])
        title = f"{names[guess]} ({100 * float(prediction['probability']):.0f} %)"
        right = guess == truth
        return image, title if right else f"{title}, is {names[truth]}", right

    def draw_target(
        self, image: np.ndarray, row: Batch, names: tuple[str, ...]
    ) -> tuple[np.ndarray, str]:
        """A batch's picture and row -> (picture, its class, or both with their shares if mixed)."""
        if "label_probs" not in row:
            return image, names[int(row["label"])]
        probs = np.asarray(row["label_probs"])
        top = [k for k in np.argsort(-probs)[:2] if probs[k] > 0]
        return image, " + ".join(f"{names[k]} {probs[k]:.0%}" for k in top)
