"""Captioners: a sentence about a picture, from any backbone."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.errors import nearest
from vit_jax.layers.decoder import TransformerDecoder
from vit_jax.layers.dense import Dense
from vit_jax.layers.position import sincos_positions
from vit_jax.layers.recurrent import RecurrentDecoder
from vit_jax.layers.search import Written, search
from vit_jax.models.resnet import resnet_50
from vit_jax.models.vit import vit_b16

DECODERS = ("lstm", "attention", "transformer")


class Captioner(nn.Module):
    """Words from a picture, one after the other.

    The line from sequence to sequence to the transformer, on one encoder:

    "lstm": an LSTM that begins with the encoder's description of the picture and sees no more of
      it: Sutskever et al. 2014 (arXiv:1409.3215), and Vinyals et al. 2015, "Show and Tell"
      (arXiv:1411.4555).
    "attention": an LSTM that looks at the encoder's last map at each word: Bahdanau et al. 2015
      (arXiv:1409.0473), and Xu et al. 2015, "Show, Attend and Tell" (arXiv:1502.03044).
    "transformer": masked self-attention, attention to that map: Vaswani et al. 2017
      (arXiv:1706.03762).

    Fixed sin-cos positions are added to the map, since a CNN's hardly knows where it is.

    In training the decoder reads the true words before each one. In evaluation it also writes: an
    evaluation step is a function of the model and the task alone, a task holds no parameters, and a
    sentence needs the model once for each of its words; so writing is part of the outputs, and
    training, evaluation and `predict` share one path. It costs as many decoder steps as the longest
    sentence of the batch has words, each with the keys and values of those before remembered.

    Parameters: `backbone`, `memory` but for the decoder "lstm", `decoder`.

    Attributes:
      backbone: a module that maps (image, train=) to `Features`; the last map is looked at, and the
        pooled description is what an LSTM begins with.
      vocabulary: V, of the tokenizer.
      length: T, the most ids of a sentence with its start and end.
      decoder: a name of `DECODERS`.
      width: D of the decoder; 4 must divide it, and so must the heads.
      depth: blocks of the transformer, layers of the LSTM.
      heads: attention heads of a transformer's block.
      mlp_ratio: hidden width of a transformer's MLPs over D.
      dropout: rate in the decoder.
      beams: sentences that are followed at once in writing; 1 is greedy. `layers.search.search`.
      length_penalty: the power of `layers.search.length_penalty`, 0.6 in Vaswani et al. 2017,
        section 6.1; with one beam it has no meaning.
      start: id before the first word.
      end: id after the last.
      padding: id after that.
      dtype: of the computation behind the backbone; parameters stay float32.
    """

    backbone: nn.Module
    vocabulary: int = 0
    length: int = 32
    decoder: str = "transformer"
    width: int = 256
    depth: int = 2
    heads: int = 4
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    beams: int = 1
    length_penalty: float = 0.6
    start: int = 1
    end: int = 2
    padding: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, image: Array, tokens: Array | None = None, *, train: bool
    ) -> dict[str, jax.Array]:
        """[B, H, W, 3], and int32 [B, T] that start with `start`.

        Returns:
          `logits`, where there are tokens: float32 [B, T - 1, V], of tokens 1 to T - 1, each from
            those before it.
          In evaluation also what it writes by itself:
          `generated`: int32 [B, T], `start`, words, `end`, `padding`.
          `log_prob`: float32 [B], of the whole sentence.
          `attention`: float32 [B, T, h, w], where it looked when it chose each word, adding up to
            1; of a transformer the mean over heads and blocks; 0 at `start` and `padding`. The
            decoder "lstm" has none.

        Raises:
          ValueError: if a name does not exist, a number is out of range, or there are no tokens in
            training.
        """
        self._check(tokens, train)
        features = self.backbone(image, train=train)
        pooled, memory = features.pooled, None
        size = features.maps[-1].shape[1:3]
        if self.decoder != "lstm":
            cells = rearrange(features.maps[-1], "b h w c -> b (h w) c")
            memory = Dense(self.width, dtype=self.dtype, name="memory")(cells)  # [B, h w, D]
            positions = jnp.asarray(sincos_positions(*size, self.width), memory.dtype)
            memory = memory + positions[None]
        decoder = self._decoder()

        def read(decoder: nn.Module, tokens: Array, state: Any = None, **options: Any) -> Any:
            """Logits of the words that follow `tokens`, and what to remember of them."""
            seen = memory if state is None else None
            if self.decoder == "transformer":
                return decoder(tokens, seen, state, **options)
            options = {"train": options["train"]}  # it always remembers, and needs no place
            return decoder(tokens, pooled, seen, state, **options)

        outputs = {}
        first = jnp.full((len(image), 1), self.start, jnp.int32)
        if tokens is not None:
            outputs["logits"] = read(decoder, tokens[:, :-1], train=train)[0]
        elif self.is_initializing():
            read(decoder, first, train=False)  # for its parameters
        if train or self.is_initializing():
            return outputs
        written = self._write(decoder, partial(read, train=False), first)
        outputs |= {"generated": written.tokens, "log_prob": written.log_prob}
        if self.decoder != "lstm":
            weights = rearrange(written.weights, "b t (h w) -> b t h w", h=size[0])
            outputs["attention"] = weights
        return outputs

    def _check(self, tokens: Array | None, train: bool) -> None:
        if self.decoder not in DECODERS:
            raise ValueError(
                f"decoder={self.decoder!r} does not exist.{nearest(self.decoder, DECODERS)}"
            )
        least = {"vocabulary": 1, "length": 3, "depth": 1, "beams": 1, "length_penalty": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {number}")
        for name in ("start", "end", "padding"):
            if not 0 <= getattr(self, name) < self.vocabulary:
                raise ValueError(
                    f"{name}={getattr(self, name)} is no id of a vocabulary of {self.vocabulary}"
                )
        if tokens is None and train:
            raise ValueError("a captioner is trained on `tokens`; the batch has none")
        if tokens is not None and tokens.shape[1] != self.length:
            raise ValueError(
                f"captions have {tokens.shape[1]} ids; the model is made for length={self.length}"
            )

    def _decoder(self) -> nn.Module:
        common = {"width": self.width, "depth": self.depth, "dropout": self.dropout}
        common |= {"dtype": self.dtype, "name": "decoder"}
        if self.decoder == "transformer":
            sizes = {"heads": self.heads, "mlp_ratio": self.mlp_ratio}
            return TransformerDecoder(self.vocabulary, self.length - 1, **sizes, **common)
        return RecurrentDecoder(self.vocabulary, attention=self.decoder == "attention", **common)

    def _write(self, decoder: nn.Module, read: Any, first: jax.Array) -> Written:
        """Sentences of the decoder's own, from the starts [B, 1]."""
        # A pure function of its variables, so that a loop may hold it.
        decoder, variables = decoder.unbind()

        def ask(tokens: jax.Array, state: Any, place: Array | int) -> Any:
            (logits, state), sown = decoder.apply(
                variables,
                tokens,
                state,
                place=place,
                remember=True,
                method=read,
                mutable=["intermediates"],
            )
            maps = [
                leaf.mean((1,)) if leaf.ndim == 4 else leaf  # over heads
                for path, leaf in jax.tree_util.tree_leaves_with_path(sown)
                if "self_attention" not in jax.tree_util.keystr(path)
                and "attention_weights" in jax.tree_util.keystr(path)
            ]
            weights = [rearrange(x, "b n m -> (b n) m") for x in maps]
            return logits[:, -1], sum(weights) / len(weights), state

        logits, weights, (rows, picture) = ask(first, None, 0)

        def step(tokens: jax.Array, rows: Any, place: Array) -> Any:
            logits, weights, (rows, _) = ask(tokens[:, None], (rows, picture), place)
            return logits, weights, rows

        return search(
            step,
            (logits, weights),
            rows,
            beams=self.beams,
            length=self.length,
            start=self.start,
            end=self.end,
            padding=self.padding,
            power=self.length_penalty,
        )


# The decoder's width is what COCO's captions are usually written with.
captioner_r50 = partial(Captioner, backbone=resnet_50(), decoder="attention", width=512, depth=1)
captioner_b16 = partial(Captioner, backbone=vit_b16(), width=512, depth=6, heads=8)
