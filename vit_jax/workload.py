"""Our side of a benchmark: a model's inference or training step, or a config's step and pipeline.

Run as `python -m vit_jax.workload` it takes orders as `vit_jax.worker` says.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import vit_jax
from vit_jax import cost, heap, programs, step
from vit_jax.build import build, named_sizes
from vit_jax.errors import ConfigError, DataError
from vit_jax.pretrained import hf
from vit_jax.run import Run, set_up
from vit_jax.standin import splits_of
from vit_jax.worker import serve

CLASSES, OBJECTS, TEXT = 1000, 20, 16  # of stand-in targets
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.05
PRODUCT = {"cpu": 2048}  # side of the matrices that measure the device
LARGE = 8192  # the same where there is no entry
PRODUCTS = 8  # one after the other in a measurement
PICTURES = ("*.jpg", "*.jpeg", "*.png", "*.JPEG")


class Ours:
    """A competitor: see `vit_jax.worker`."""

    def __init__(self) -> None:
        # The time to compile is one of the numbers: nothing of it may come from a cache.
        jax.config.update("jax_enable_compilation_cache", False)
        self._run: Callable[[int], None] = lambda steps: None

    def prepare(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Compiles the work of an order.

        Args:
          order: `work` ("inference", "training", "input"), `batch_size`, `dtype`, `seed`; and
            either `model`, a name, with `fields` of its backbone, or `config`, plain data, with
            `pictures`, a folder of them for "input".

        Returns:
          {"compile_seconds", "memory" in bytes, "flops" of an image, "parameters", "device",
          "published": the model's config.json in transformers, or why it has none}; of "input"
          only {"examples", "shape"}.
        """
        self._run = lambda steps: None  # frees what it held
        if order["work"] == "input":
            self._run, said = _pipeline(order)
            return said
        if order.get("config"):
            program, said = _of_config(order)
        else:
            program, said = _of_model(order)
        self._run = program
        program(2)
        stats = jax.devices()[0].memory_stats() or {}
        device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        return said | device | {"memory": stats.get("peak_bytes_in_use", said["memory"])}

    def run(self, steps: int) -> None:
        """That many steps."""
        self._run(steps)

    def rate(self, dtype: str) -> float:
        """FLOP/s of products of two large square matrices of `dtype`."""
        n = PRODUCT.get(jax.default_backend(), LARGE)
        a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype)) / n**0.5

        @jax.jit
        def products(a: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, PRODUCTS, lambda _, x: x @ a, a)

        products(a).block_until_ready()
        times = []
        for _ in range(5):
            began = time.perf_counter()
            products(a).block_until_ready()
            times.append(time.perf_counter() - began)
        return 2 * n**3 * PRODUCTS / min(times)

    def wrong(self, error: Exception) -> str:
        """The kind of an error."""
        if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
            return "memory"
        return "wrong" if isinstance(error, (ConfigError, DataError)) else "bug"


def model_of(name: str, dtype: str, size: tuple[int, int], fields: Mapping[str, Any]) -> nn.Module:
    """A named size with a head of 1000 classes, for images of `size`.

    Raises:
      ConfigError: if there is no such size or field.
    """
    known = named_sizes()[name].func.__dataclass_fields__ if name in named_sizes() else ()
    # Positions of that size, or each step would resample them.
    sized = {"image_size": size} if "image_size" in known else {}
    return vit_jax.create(name, CLASSES, **sized | {"dtype": jnp.dtype(dtype)} | dict(fields))


def stand_in(
    module: nn.Module, size: tuple[int, int], batch_size: int, seed: int = 0
) -> tuple[Any, dict[str, jax.Array]]:
    """The task of a whole model, and a random batch of the size [H, W] that it can learn from.

    Raises:
      ConfigError: if nobody knows what the model learns from.
    """
    rng = np.random.default_rng(seed)
    batch = {"image": rng.standard_normal((batch_size, *size, 3), np.float32)}
    kind = type(module).__module__.rpartition(".")[2]
    if kind == "classifier":
        task = "classification.Classification"
        batch["label"] = rng.integers(0, CLASSES, batch_size).astype(np.int32)
    elif kind == "detr":
        task = "detection.Detection"
        low = rng.uniform(0.2, 0.8, (batch_size, OBJECTS, 4))
        batch["boxes"] = (low * (1, 1, 0.2, 0.2)).astype(np.float32)
        batch["box_label"] = rng.integers(0, CLASSES, (batch_size, OBJECTS)).astype(np.int32)
        batch["image_mask"] = np.ones((batch_size, *size), bool)
    elif kind in ("setr", "upernet"):
        task = "segmentation.Segmentation"
        batch["segmentation"] = rng.integers(0, 150, (batch_size, *size)).astype(np.int32)
    elif kind == "clip":
        task = "contrastive.Contrastive"
        batch["tokens"] = rng.integers(3, 256, (batch_size, TEXT)).astype(np.int32)
        batch["tokens"][:, -1] = 2
    else:
        raise ConfigError(f"what {kind} learns from is said by a config: --config=configs/...")
    return build({"target": f"tasks.{task}"}), jax.tree.map(jnp.asarray, batch)


def _of_model(order: Mapping[str, Any]) -> tuple[Callable[[int], None], dict[str, Any]]:
    size = tuple(order["image_size"])
    module = model_of(order["model"], order["dtype"], size, order.get("fields", {}))
    task, batch = stand_in(module, size, order["batch_size"])
    init = jax.jit(partial(step.init_variables, model=module))
    key = jax.random.key(0)
    abstract = jax.eval_shape(init, key, batch)
    flops = cost.flops(partial(step.forward, model=module), abstract, batch)
    one = {k: v[:1] for k, v in batch.items()}
    variables = init.lower(key, one).compile(programs.once(jax.default_backend()))(key, one)
    said = {
        "flops": flops / order["batch_size"],
        "parameters": cost.parameters(abstract["params"]),
        "published": published(module),
    }
    if order["work"] == "inference":
        forward = jax.jit(partial(step.forward, model=module))
        compiled, told = _compiled(forward.lower(variables, batch))
        return partial(_infer, compiled, variables, batch), said | told
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    function = partial(step.train_step, model=module, task=task, optimizer=optimizer)
    state = jax.jit(partial(step.init_state, optimizer=optimizer))(variables)
    jitted = jax.jit(function, donate_argnums=0)
    compiled, told = _compiled(jitted.lower(state, batch, key=key))
    return _Training(compiled, state, batch, key), said | told


def _of_config(order: Mapping[str, Any]) -> tuple[Callable[[int], None], dict[str, Any]]:
    run = _set_up(order)
    shapes = run.abstract_batch.items()
    batch = {k: jnp.zeros(v.shape, v.dtype, device=v.sharding) for k, v in shapes}
    said = {
        "flops": run.flops,
        "parameters": cost.parameters(run.abstract_state.params),
        "published": published(run.model),
    }
    state = run.init()
    if order["work"] == "inference":
        given = {"params": state.params, **state.model_state}
        forward = jax.jit(partial(step.forward, model=run.model))
        compiled, told = _compiled(forward.lower(given, batch))
        return partial(_infer, compiled, given, batch), said | told
    began = time.perf_counter()
    compiled = run.compile_train_step(batch)
    told = _told(compiled, time.perf_counter() - began)
    return _Training(compiled, state, batch, run.key), said | told


def _set_up(order: Mapping[str, Any]) -> Run:
    config = copy.deepcopy(order["config"])
    config["dtype"] = order["dtype"]
    config["batch_size"] = order["batch_size"]
    given = order.get("pictures")
    splits = [Pictures(given)] * 2 if given else splits_of(config)[0]
    return set_up(config, splits=splits)


class Pictures:
    """A folder's picture files as a dataset of one class, in memory as the files have them.

    Raises:
      DataError: if there are none.
    """

    def __init__(self, folder: str):
        files = sorted({f for pattern in PICTURES for f in Path(folder).glob(pattern)})
        if not files:
            raise DataError(f"{folder}: there is no picture ({', '.join(PICTURES)})")
        self.class_names = tuple(str(i) for i in range(CLASSES))
        self._names, self._files = [f.name for f in files], [f.read_bytes() for f in files]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._files[index], "label": index % CLASSES}

    def name(self, index: int) -> str:
        """The file's name."""
        return self._names[index]


def _pipeline(order: Mapping[str, Any]) -> tuple[Callable[[int], None], dict[str, Any]]:
    run = _set_up(order)
    batches = run.batches(0)
    first = next(batches)
    said = {"examples": len(run.train_data), "shape": list(first["image"].shape)}
    return partial(_read, batches), said


def _read(batches: Iterator[Any], steps: int) -> None:
    for _ in range(steps):
        next(batches)


def _infer(compiled: Callable, variables: Any, batch: Any, steps: int) -> None:
    for _ in range(steps):
        outputs = compiled(variables, batch)
    jax.block_until_ready(outputs)


class _Training:
    """Steps that go on from each other's state."""

    def __init__(self, compiled: Callable, state: Any, batch: Any, key: jax.Array):
        self._compiled, self._state, self._batch, self._key = compiled, state, batch, key

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self._state, sums = self._compiled(self._state, self._batch, key=self._key)
        jax.block_until_ready(sums)


def _compiled(lowered: Any) -> tuple[Callable, dict[str, Any]]:
    began = time.perf_counter()
    compiled = lowered.compile(programs.options(jax.default_backend()))
    return compiled, _told(compiled, time.perf_counter() - began)


def _told(compiled: Any, seconds: float) -> dict[str, Any]:
    """What the compiler says."""
    return {"compile_seconds": seconds, "memory": cost.taken(compiled)}


def published(module: nn.Module) -> dict[str, Any]:
    """The config.json of the same model in transformers, or {"refused": why it has none}."""
    try:
        return hf.published(module)[0]
    except ConfigError as error:
        return {"refused": str(error)}


if __name__ == "__main__":
    heap.keep()
    serve(Ours)
