"""Any published checkpoint, or a run of one's own, by one string."""

import dataclasses
import difflib
import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vit_jax import bucket, programs, step
from vit_jax.build import TARGET, build
from vit_jax.contracts import Array, Outputs
from vit_jax.data.text import FILE, Tokenizer, open_tokenizer
from vit_jax.errors import CheckpointError, ConfigError
from vit_jax.pretrained import google, hf, names, own, resample, state
from vit_jax.pretrained.opened import Opened, refuse
from vit_jax.pretrained.preprocess import Preprocessing
from vit_jax.pretrained.recipe import Recipe

SEGMENTATION, AVERAGED = "tasks.segmentation.Segmentation", "tasks.inference.Averaged"
logger = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16")
KINDS = (
    "hf:OWNER/NAME on the Hugging Face Hub, a folder with config.json and model.safetensors, a "
    "Google .npz, a .safetensors or .pth of timm or the authors, or a run folder, also gs://BUCKET/RUN"
)


@dataclass(frozen=True)
class Loaded:
    """A model with its weights.

    Called with batch entries by name, `loaded(image=...)`, it gives what the module's documentation
    says: logits [B, K] for a classifier, `Features` for a backbone without a head, {"logits"
    [B, Q, K + 1], "boxes" [B, Q, 4]} for a detector, which also reads `image_mask`, logits
    [B, H, W, K] for a segmenter, and of pictures and texts what `vit_jax.models.clip.CLIP` says.

    Attributes:
      module: a Linen module.
      variables: its variables.
      preprocess: pictures of any kind and size -> `image` [B, H, W, 3].
      labels: a name for each class; empty if the checkpoint has none.
      source: what was opened, and in which form.
      recipe: how it was rebuilt.
      remarks: what was assumed or resampled, for a person.
      words: the folder with its tokenizer.json; None if it has none.
    """

    module: nn.Module
    variables: Any = field(repr=False)
    preprocess: Preprocessing
    labels: tuple[str, ...] = field(repr=False)
    source: str
    recipe: Recipe = field(repr=False)
    remarks: tuple[str, ...] = ()
    words: Path | None = None

    @property
    def reads(self) -> frozenset[str]:
        """The batch entries that the model's signature names."""
        parameters = inspect.signature(type(self.module).__call__).parameters.values()
        return frozenset(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY) - {"self"}

    def __call__(self, **batch: Array) -> Outputs:
        """Batch entries by their names in `vit_jax.contracts` -> the model's output.

        Raises:
          ConfigError: if an entry is missing, or the model does not read it.
        """
        if unknown := sorted(set(batch) - self.reads):
            raise ConfigError(f"the model reads {sorted(self.reads)}, not {unknown[0]!r}")
        try:
            return self._forward(self.variables, {k: jnp.asarray(v) for k, v in batch.items()})
        except ValueError as error:  # a size that it cannot work with, or an entry too few
            raise ConfigError(str(error)) from error

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What turns texts into the numbers that the model was trained with.

        Raises:
          CheckpointError: if there is none, or its vocabulary is of another size than the model's.
        """
        if self.words is None:
            raise CheckpointError(f"{self.source}: there is no {FILE} to read texts with")
        found = open_tokenizer(self.words)
        wanted = getattr(getattr(self.module, "text", self.module), "vocabulary", found.size)
        if found.size != wanted:
            raise CheckpointError(
                f"{self.source}: its {FILE} has {found.size:,} entries, and its weights are for "
                f"{wanted:,}"
            )
        return found

    def tokenize(self, texts: str | Iterable[str]) -> np.ndarray:
        """Texts -> `tokens`, int32 [B, T]; longer ones are cut.

        Raises:
          ConfigError: if the model reads no texts.
          CheckpointError: as of `tokenizer`.
        """
        if "tokens" not in self.recipe.inputs:
            raise ConfigError(f"{self.source} reads no texts, only {', '.join(sorted(self.reads))}")
        (length,), _ = self.recipe.inputs["tokens"]
        texts = [texts] if isinstance(texts, str) else texts
        return np.stack([self.tokenizer.fill(text, length) for text in texts])

    def writing(self, beams: int) -> "Loaded":
        """The same captioner, following so many sentences at once, of which it tells the best.

        Raises:
          ConfigError: if the model writes nothing, or `beams` is less than 1.
        """
        if "beams" not in type(self.module).__dataclass_fields__:
            raise ConfigError(f"{self.source} writes no sentences, so it has no beam")
        if beams < 1:
            raise ConfigError(f"a beam of {beams} must be at least 1")
        if beams == self.module.beams:
            return self
        return dataclasses.replace(self, module=self.module.clone(beams=beams))

    def averaged(self, **how: Any) -> "Loaded":
        """The same segmenter, asked by windows, mirrored or at several scales.

        Args:
          **how: fields of `vit_jax.tasks.inference.Averaged`; those that are not given are as in
            the run that it comes from, but for a stride, which belongs to its window.

        Raises:
          ConfigError: if the model is no segmenter, or a number cannot be.
        """
        if self.recipe.task[TARGET] != SEGMENTATION:
            raise ConfigError(
                f"{self.source} is no segmenter: windows, mirrored pictures and scales are for one"
            )
        stride = {"stride": 0} if "window" in how else {}
        spec = {TARGET: AVERAGED} | self.recipe.inference | stride | how
        return dataclasses.replace(self, module=build(spec, model=self.module))

    def caption(self, pictures: Any, beams: int | None = None) -> list[tuple[str, float]]:
        """Pictures, as `preprocess` takes them -> a sentence about each, and its probability.

        Args:
          pictures: of any kind and size.
          beams: sentences that are followed at once; 1 takes the likeliest word each time, None is
            the model's own number.

        Raises:
          ConfigError: as of `writing`.
          CheckpointError: as of `tokenizer`.
        """
        model = self.writing(getattr(self.module, "beams", 1) if beams is None else beams)
        found = model(image=self.preprocess(pictures))
        probabilities = np.exp(np.asarray(found["log_prob"], np.float64))
        texts = map(self.tokenizer.decode, np.asarray(found["generated"]))
        return list(zip(texts, probabilities.tolist(), strict=True))

    @cached_property
    def _forward(self) -> Callable[..., Outputs]:
        options = programs.options(jax.default_backend())
        return jax.jit(partial(step.forward, model=self.module), compiler_options=options)


def open_checkpoint(ref: str | Path) -> Opened:
    """Finds out what `ref` is; the large arrays stay in their file.

    Args:
      ref: `hf:OWNER/NAME[@REVISION]`; a folder in Hugging Face's form; a `.npz`, `.safetensors`,
        `.safetensors.index.json`, `.pth`, `.pt` or `.bin` file; a run folder of ours, which may lie
        in a bucket (`gs://BUCKET/RUN`).

    Raises:
      CheckpointError: if there is no such thing, or it cannot be read, in one sentence.
    """
    ref = str(ref)
    if ref.startswith("hf:"):
        return hf.open_folder(hf.download(ref.removeprefix("hf:")), ref)
    if bucket.is_address(ref):
        return own.open_folder(_in_bucket(ref), ref)
    path = Path(ref).expanduser()
    if not path.exists():
        raise refuse(ref, f"there is no such file or folder.{_similar(path)} Wanted: {KINDS}")
    if path.is_dir():
        if own.is_run(path):
            return own.open_folder(bucket.Folder(path, path), ref)
        if (path / "config.json").is_file():
            return hf.open_folder(path, ref)
        raise refuse(ref, f"the folder holds no config.json. Wanted: {KINDS}")
    if path.suffix == ".npz":
        return google.open_file(path, ref)
    if path.suffix in (".safetensors", ".pth", ".pt", ".bin") or path.name.endswith(".index.json"):
        return state.open_file(path, ref)
    raise refuse(ref, f"files of the kind {path.suffix!r} are not known here. Wanted: {KINDS}")


def _in_bucket(ref: str) -> bucket.Folder:
    try:
        folder = bucket.fetched(ref)
    except ConfigError as error:
        raise refuse(ref, str(error)) from error
    if not own.is_run(folder.files):
        raise refuse(ref, "that is no run folder with a checkpoint, all that is read of a bucket")
    return folder


def _similar(path: Path) -> str:
    """A hint at what is there, or at the Hub."""
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    if close:
        return f" Did you mean {str(path.parent / close[0])!r}?"
    if not path.is_absolute() and len(path.parts) == 2 and not path.suffix:
        return f" On the Hub it would be hf:{path.as_posix()}."
    return ""


def load(
    ref: str | Path,
    *,
    dtype: Any = "float32",
    image_size: int | tuple[int, int] | None = None,
    **fields: Any,
) -> Loaded:
    """Opens a checkpoint: architecture, weights, preprocessing and class names.

    Args:
      ref: as of `open_checkpoint`.
      dtype: of the parameters and the computation: "float32", "bfloat16" or "float16".
      image_size: side or (H, W), in pixels, of the images it will see, where that is not the
        checkpoint's own; learned positions are resampled once, here.
      **fields: other fields of the backbone, such as `window=12`, `drop_path=0.1`, `remat=True`.

    Raises:
      CheckpointError: if the checkpoint does not exist, is damaged, or does not fit, with all
        names that do not.
      ConfigError: if there is no such field.
    """
    if str(np.dtype(dtype) if dtype in DTYPES[::2] else dtype) not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: wanted one of {', '.join(DTYPES)}")
    opened = open_checkpoint(ref)
    preprocessing, remarks = opened.preprocessing, list(opened.remarks)
    native = opened.module(dtype=dtype)
    wanted = native
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        preprocessing = preprocessing.resized(size)
        if "image_size" in type(getattr(native, "backbone", native)).__dataclass_fields__:
            fields["image_size"] = size
    if fields:
        wanted = opened.module(dtype=dtype, **fields)
    paths = opened.read(native, dtype=dtype)
    if fields:
        paths, told = resample.fit(paths, names.shapes_of(opened.abstract(wanted)), wanted)
        remarks += told
    for remark in remarks:
        logger.info("%s: %s", ref, remark)
    return Loaded(
        module=wanted,
        variables=names.nested(paths),
        preprocess=preprocessing,
        labels=opened.labels,
        source=f"{ref}, {opened.format}",
        recipe=opened.recipe,
        remarks=tuple(remarks),
        words=opened.words,
    )
