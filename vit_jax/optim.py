"""Optax, by name: durations, schedules, the chain of an optimizer, and a running mean of weights.

Parameters are chosen by regular expressions that are searched (`re.search`) in names such as
`backbone/stage_1/block_0/attention/query/kernel`.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.bundles import Bundles
from vit_jax.errors import ConfigError, nearest
from vit_jax.mesh import name_of

Tree = Any

NO_DECAY = (  # biases, norms, layer scale, class and other tokens, positions
    r"(^|/)(bias|scale|gamma|cls|(\w+_)?token|pos(ition)?(_embed(ding)?)?|relative_position\w*)(/|$)"
)
DEFAULTS = {
    "name": "adamw",
    "weight_decay": 0.0,
    "clip": 0.0,
    "b1": 0.9,
    "b2": 0.999,
    "epsilon": 1e-8,
    "momentum": 0.9,
    "nesterov": False,
    "no_decay": None,
    "decay_1d": False,
    "muon_convolutions": False,
    "freeze": "",
    "layer_decay": 1.0,
    "lr_scale": (),
    "clamp": (),
}
ELEMENTWISE = ("adamw", "sgd", "muon")  # each number of a small parameter is updated by itself
_RANGES = {  # key: (what is wanted, whether a number is that)
    "weight_decay": ("at least 0", lambda v: 0 <= v < math.inf),
    "clip": ("at least 0 (0 is off)", lambda v: 0 <= v < math.inf),
    "b1": ("in [0, 1)", lambda v: 0 <= v < 1),
    "b2": ("in [0, 1)", lambda v: 0 <= v < 1),
    "epsilon": ("above 0", lambda v: 0 < v < math.inf),
    "momentum": ("in [0, 1)", lambda v: 0 <= v < 1),
    "layer_decay": ("in (0, 1] (1 is off)", lambda v: 0 < v <= 1),
}


def duration(
    name: str,
    *,
    steps: int = 0,
    epochs: float = 0.0,
    examples: int = 0,
    examples_per_epoch: int,
    batch_size: int,
    may_be_zero: bool = False,
) -> int:
    """A length in steps from a length in steps, examples or epochs, the first of them that is set.

    Examples and epochs are rounded down to whole batches, but never to none. Epochs count as the
    decimal number that was written: 0.29 epochs of 100 examples are 29 examples.

    Args:
      name: what lasts so long, for the message.
      steps: updates.
      epochs: passes over the data; may be a fraction.
      examples: pictures seen.
      examples_per_epoch: the size of the training data.
      batch_size: pictures in an update.
      may_be_zero: whether it may be left out, as a warm-up may.

    Raises:
      ConfigError: on a negative length, and on none where there must be one.
    """
    for key, value in {"steps": steps, "examples": examples, "epochs": epochs}.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name}: {key}={value} must be a finite number, at least 0")
    if batch_size < 1:
        raise ConfigError(f"{name}: batch_size={batch_size} must be at least 1")
    if steps:
        return int(steps)
    if examples or epochs:
        total = Fraction(examples) if examples else Fraction(str(epochs)) * examples_per_epoch
        return max(1, int(total // batch_size))
    if may_be_zero:
        return 0
    raise ConfigError(f"{name}: one of steps, examples and epochs must be above 0; all three are 0")


def schedule(
    *,
    name: str,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int,
    final: float = 0.0,
    warmup_from: float = 0.0,
    power: float = 0.9,
    drops: Sequence[float] = (),
    drop_to: float = 0.1,
) -> optax.Schedule:
    """Learning rate by the number of updates so far: a linear warm-up, then `name`.

    Cosine is Loshchilov & Hutter 2017 (arXiv:1608.03983), eq. 5, without restarts; polynomial is
    the "poly" rate of Chen et al. 2018 (arXiv:1606.00915), section 3.1.

    Args:
      name: "cosine", "linear" or "polynomial", all from `learning_rate` to `final`; "steps", which
        falls at `drops`; or "constant".
      learning_rate: reached at `warmup_steps`.
      total_steps: where `final` is reached.
      warmup_steps: 0 starts at `learning_rate`.
      final: a learning rate, not a factor; "steps" and "constant" do without.
      warmup_from: a learning rate, not a factor: the value at 0 where there is a warm-up.
      power: of the share of steps that is left, with "polynomial".
      drops: shares of the run, in (0, 1) and rising, with "steps": 0.8 is after four fifths of it.
      drop_to: what each drop multiplies the rate by.

    Raises:
      ConfigError: on an unknown name, a warm-up longer than the run, rates or drops out of order.
    """
    if not 0 < learning_rate < math.inf:
        raise ConfigError(f"learning_rate={learning_rate} must be a finite number above 0")
    for key, value in {"final": final, "warmup_from": warmup_from}.items():
        if not 0 <= value <= learning_rate:
            raise ConfigError(
                f"schedule.{key}={value} must lie in [0, learning_rate={learning_rate}]"
            )
    if not 0 <= warmup_steps <= total_steps:
        raise ConfigError(
            f"warmup_steps={warmup_steps} must lie between 0 and the {total_steps} steps of the run"
        )
    if not 0 < power < math.inf:
        raise ConfigError(f"schedule.power={power} must be above 0")
    if any(not a < b for a, b in itertools.pairwise((0, *drops, 1))):
        raise ConfigError(
            f"schedule.drops={tuple(drops)} must be shares of the run between 0 and 1, rising"
        )
    if not 0 < drop_to <= 1:
        raise ConfigError(f"schedule.drop_to={drop_to} must lie in (0, 1]")
    if name == "steps" and not drops:
        raise ConfigError('schedule.name="steps" needs schedule.drops, such as (0.8,)')
    rest = max(total_steps - warmup_steps, 1)
    places = [max(round(share * total_steps) - warmup_steps, 0) for share in drops]
    decays = {
        "cosine": optax.cosine_decay_schedule(learning_rate, rest, alpha=final / learning_rate),
        "linear": optax.linear_schedule(learning_rate, final, rest),
        "polynomial": optax.polynomial_schedule(learning_rate, final, power, rest),
        "steps": optax.piecewise_constant_schedule(
            learning_rate, {place: drop_to ** places.count(place) for place in places}
        ),
        "constant": optax.constant_schedule(learning_rate),
    }
    if name not in decays:
        raise ConfigError(f"schedule.name={name!r} does not exist.{nearest(name, decays)}")
    if not warmup_steps:
        return decays[name]
    warmup = optax.linear_schedule(warmup_from, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, decays[name]], [warmup_steps])


def make(
    spec: Mapping[str, Any], *, params: Tree, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """The gradient transformation that a config's `optimizer` block asks for.

    In this order: frozen parameters leave, so that they get no update, hold no state and count in
    no norm; the gradient is clipped to the global norm `clip`; the optimizer gives a direction;
    weight decay joins it; all is scaled by the schedule, `layer_decay` and `lr_scale`. So weight
    decay is in proportion to a parameter's own learning rate, with every optimizer. At last `clamp`
    cuts the update of a parameter that would leave its range.

    - adamw: Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2; reads b1, b2, epsilon.
    - sgd: reads momentum, nesterov. Weight decay joins the gradient before the momentum, as in
      PyTorch and timm, whose published numbers rest on it; big_vision adds it after.
    - lamb: You et al. 2020 (arXiv:1904.00962), algorithm 2, as in Optax; reads b1, b2, epsilon.
    - adafactor: Shazeer & Stern 2018 (arXiv:1804.04235) as changed for ViT by Zhai et al. 2022
      (arXiv:2106.04560), section 3.4: no scaling by the parameter's size, so that the learning
      rate of adamw fits; a first moment b1 in bfloat16 (0 is none); second-moment decay up to b2.

    - muon: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), as in Optax, for the kernels of
      dense layers inside blocks, adamw for all else. The orthogonal direction is scaled by
      0.2 sqrt(max(D_in, D_out)), which has adamw's size, so that its learning rate and weight decay
      fit: Liu et al. 2025 (arXiv:2502.16982), eq. 4. Reads momentum, b1, b2, epsilon. With
      `muon_convolutions` also for the kernels of convolutions, as matrices whose D_in is all that
      lies under the kernel, as in the post; not for those that see pictures, or each channel alone.

    The optimizers share one block of a config: what the chosen one does not read is left unread.
    LAMB takes one norm over all layers of scanned `blocks`. Those that treat each number alike keep
    their own numbers of small parameters in common vectors: see `vit_jax.bundles`.

    Args:
      spec: values for keys of `DEFAULTS`. `no_decay`, `freeze` and the first entry of each pair
        (pattern, factor) of `lr_scale` are regular expressions; all factors that match multiply.
        `no_decay` chooses parameters without weight decay: None is `NO_DECAY`, "" is none of them.
        Parameters of one axis have none either, unless `decay_1d`. `clamp` holds triples (pattern,
        least, most), such as CLIP's for its temperature.
      params: arrays or their shapes.
      schedule: the learning rate.

    Raises:
      ConfigError: on an unknown key or name, a value out of range, a pattern that is no regular
        expression or that matches no parameter, or nothing left to train.
    """
    for key in spec:
        if key not in DEFAULTS:
            raise ConfigError(f"optimizer.{key} does not exist.{nearest(key, DEFAULTS)}")
    spec = {**DEFAULTS, **spec}
    for key, (wanted, fits) in _RANGES.items():
        if not (isinstance(spec[key], int | float) and fits(spec[key])):
            raise ConfigError(f"optimizer.{key}={spec[key]!r} must be a number {wanted}")

    b1, b2, epsilon = spec["b1"], spec["b2"], spec["epsilon"]
    mask = _decayed(params, spec["no_decay"], spec["decay_1d"])
    kept = jax.tree.map(lambda _: True, params)
    if spec["freeze"]:
        kept = trainable(params, spec["freeze"])
    scales = _scales(params, spec["layer_decay"], spec["lr_scale"])
    ranges = [_range(params, entry, kept) for entry in spec["clamp"]]
    no_matrix = jax.tree.map(lambda _: False, params)
    matrices = convolutions = no_matrix
    if spec["name"] == "muon":
        matrices = _inside_blocks(params)
        convolutions = _of_maps(params) if spec["muon_convolutions"] else no_matrix
    together = spec["name"] in ELEMENTWISE
    # A factor for each scanned layer belongs to one array; so do the axes of a convolution.
    apart = jax.tree.map(
        lambda s, conv: not together or conv or isinstance(s, np.ndarray), scales, convolutions
    )
    kinds = (mask, kept, scales, *(found for found, *_ in ranges))
    bundles = Bundles(params, apart=apart, matrices=matrices, kinds=kinds)
    decay = optax.identity()
    if spec["weight_decay"]:
        decay = optax.add_decayed_weights(spec["weight_decay"], bundles.of(mask))
    momentum = optax.trace(spec["momentum"], spec["nesterov"])
    factored = optax.scale_by_factored_rms(
        decay_rate_fn=lambda step, power: jnp.minimum(b2, 1 - (step + 1.0) ** -power)
    )
    first_moment = optax.ema(b1, debias=False, accumulator_dtype=jnp.bfloat16)
    directions = {
        "adamw": [optax.scale_by_adam(b1, b2, epsilon), decay],
        "sgd": [decay, momentum] if spec["momentum"] else [decay],
        "lamb": [optax.scale_by_adam(b1, b2, epsilon), decay, optax.scale_by_trust_ratio()],
        "adafactor": [factored, first_moment, decay] if b1 else [factored, decay],
        "muon": [_muon(spec, bundles.of(matrices), bundles.of(convolutions)), decay],
    }
    name = spec["name"]
    if name not in directions:
        raise ConfigError(f"optimizer.name={name!r} does not exist.{nearest(name, directions)}")
    clip = [optax.clip_by_global_norm(spec["clip"])] if spec["clip"] else []
    chain = optax.chain(*clip, *directions[name], optax.scale_by_learning_rate(schedule))

    if spec["freeze"]:
        labels = jax.tree.map(lambda k: "train" if k else "freeze", bundles.of(kept))
        chain = optax.partition({"train": chain, "freeze": optax.set_to_zero()}, labels)
    if spec["layer_decay"] != 1 or spec["lr_scale"]:
        factors = bundles.of(scales)

        def scaled(updates: Tree, _: Tree) -> Tree:
            return jax.tree.map(lambda u, s: u * jnp.asarray(s, u.dtype), updates, factors)

        chain = optax.chain(chain, optax.stateless(scaled))
    for chosen, least, most in ranges:
        chain = optax.chain(chain, _clamp(bundles.of(chosen), least, most))
    return bundles.around(chain)


def _range(params: Tree, entry: Any, kept: Tree) -> tuple[Tree, float, float]:
    """The parameters that a pattern finds, but frozen ones, and the range they must stay in.

    Raises:
      ConfigError: if `entry` is no (pattern, least, most), or its pattern matches nothing.
    """
    match entry:
        case (str(pattern), int(least) | float(least), int(most) | float(most)) if least < most:
            found = _matches("clamp", pattern, params)
            return jax.tree.map(lambda f, k: f and k, found, kept), least, most
        case _:
            raise ConfigError(
                f"optimizer.clamp must hold triples (pattern, least, most), not {entry!r}"
            )


def _clamp(chosen: Tree, least: float, most: float) -> optax.GradientTransformation:
    """Cuts updates so that the chosen parameters stay within a range.

    Radford et al. 2021 (arXiv:2103.00020), section 2.5: CLIP's logits are scaled by 100 at most.
    """

    def within(updates: Tree, params: Tree) -> Tree:
        return jax.tree.map(
            lambda u, p, c: jnp.clip(p + u, least, most) - p if c else u, updates, params, chosen
        )

    return optax.stateless(within)


def _inside_blocks(params: Tree) -> Tree:
    """A tree of bool, True for the matrices of dense layers in blocks."""

    def is_matrix(path: Any, x: Any) -> bool:
        place = name_of(path).split("/")
        scanned = "blocks" in place
        inside = scanned or any(re.fullmatch(r"(block|encoder|decoder)_\d+", p) for p in place)
        return inside and place[-1] == "kernel" and x.ndim == 2 + scanned

    return jax.tree.map_with_path(is_matrix, params)


def _of_maps(params: Tree) -> Tree:
    """A tree of bool, True for the kernels of convolutions that mix the channels of a map."""

    def is_one(path: Any, x: Any) -> bool:
        # The last axes but one: 1 where each channel has a kernel of its own, 3 or 4 of a picture.
        return name_of(path).endswith("/kernel") and x.ndim == 4 and x.shape[-2] > 4

    return jax.tree.map_with_path(is_one, params)


def _muon(
    spec: Mapping[str, Any], matrices: Tree, convolutions: Tree
) -> optax.GradientTransformation:
    """Muon for matrices and convolutions, Adam for all else; before weight decay and the rate."""
    labels = jax.tree.map(
        lambda matrix, conv: "muon" if matrix else "convolutions" if conv else "adam",
        matrices,
        convolutions,
    )

    def turned(inputs: int) -> optax.GradientTransformation:
        """Muon where so many axes before the last one are what an output is made of."""

        def axes(params: Tree) -> Tree:
            return jax.tree.map(
                lambda x: optax.contrib.MuonDimensionNumbers(
                    tuple(range(x.ndim - 1 - inputs, x.ndim - 1)), x.ndim - 1
                ),
                params,
            )

        def scaled(u: jax.Array) -> jax.Array:
            return u * (0.2 * math.sqrt(max(math.prod(u.shape[-1 - inputs : -1]), u.shape[-1])))

        muon = optax.contrib.scale_by_muon(beta=spec["momentum"], weight_dimension_numbers=axes)
        return optax.chain(muon, optax.stateless(lambda u, _: jax.tree.map(scaled, u)))

    adam = optax.scale_by_adam(spec["b1"], spec["b2"], spec["epsilon"])
    parts = {"muon": turned(1), "adam": adam}
    if any(jax.tree.leaves(convolutions)):  # else the state is that of runs from before there were
        parts["convolutions"] = turned(3)
    return optax.partition(parts, labels)


def names(tree: Tree) -> list[str]:
    """The path of each leaf, joined by "/", in the order of `jax.tree.leaves`."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [name_of(path) for path, _ in paths]


def trainable(params: Tree, freeze: str) -> Tree:
    """A tree of bool, False where `freeze` matches the name; "" freezes nothing.

    Raises:
      ConfigError: if `freeze` is no regular expression, matches nothing, or matches everything.
    """
    kept = jax.tree.map(lambda found: not found, _matches("freeze", freeze, params))
    if not any(jax.tree.leaves(kept)):
        raise ConfigError(f"optimizer.freeze={freeze!r} leaves no parameter to train")
    return kept


def layer_scales(params: Tree, decay: float) -> Tree:
    """Factors of the learning rate that shrink from the last block to the first.

    Clark et al. 2020 (arXiv:2003.10555), as Bao et al. 2022 (arXiv:2106.08254) use it for vision: a
    parameter of layer n has decay ** (L + 1 - n). Below `backbone`, or from the top where nothing
    is called so:

    - `block_i`, or where there is none `stage_s/block_i`, are layers 1 to L, in the order of stage,
      then block; scanned `blocks` count as what they hold, `blocks/block_j` as groups of blocks;
    - what else lies in a stage has the layer of the stage's first block, but patch merging and
      downsampling that of the block before it, as in Microsoft's Swin;
    - the final norm, a head, and all outside the backbone are layer L + 1, of factor 1;
    - the rest comes before the first block and is layer 0: embeddings, tokens, positions, the CNN
      of a hybrid; so is what the first stage has besides blocks.

    Returns:
      A float for each parameter, [L, 1, ...] float32 for scanned ones.

    Raises:
      ConfigError: if there is no block.
    """
    every, (leaves, structure) = names(params), jax.tree.flatten(params)
    below = [re.search(r"(?:^|/)backbone/(.*)", name) for name in every]
    paths = [m[1] if m else "head" for m in below] if any(below) else every
    staged = not any(_BLOCK.match(path) for path in paths)

    rows = []  # of each parameter: path, stage, and the blocks it belongs to as sortable places
    for path, leaf in zip(paths, leaves, strict=True):
        in_stage = _STAGE.match(path) if staged else None
        stage = int(in_stage["index"]) if in_stage else -1
        path = path[in_stage.end() :] if in_stage else path
        block, places = _BLOCK.match(path), []
        if block and block["index"]:
            places = [(stage, int(block["index"]), 0)]
        elif block:
            places = [(stage, turn, int(block["inner"] or 0)) for turn in range(leaf.shape[0])]
        rows.append((path, stage, places))
    order = {p: n for n, p in enumerate(sorted({p for row in rows for p in row[2]}), 1)}
    if not order:
        raise ConfigError(
            "optimizer.layer_decay needs parameters named block_<i> or stage_<s>/block_<i> in the "
            f"backbone; there are {_some(every)}"
        )
    depth = len(order)

    def scale(leaf: Any, path: str, stage: int, places: list[tuple]) -> float | np.ndarray:
        if len(places) > 1:
            powers = np.array([depth + 1 - order[p] for p in places])
            return (decay**powers).astype(np.float32).reshape(-1, *[1] * (leaf.ndim - 1))
        if places:
            layer = order[places[0]]
        elif stage < 0 and _LAST.match(path):
            layer = depth + 1
        else:
            first = min((n for place, n in order.items() if place[0] == stage), default=1)
            layer = 0 if first == 1 else first - bool(_MERGE.match(path))
        return decay ** (depth + 1 - layer)

    scales = [scale(leaf, *row) for leaf, row in zip(leaves, rows, strict=True)]
    return jax.tree.unflatten(structure, scales)


_STAGE = re.compile(r"stage_(?P<index>\d+)/")
_BLOCK = re.compile(r"(block_(?P<index>\d+)|blocks(/block_(?P<inner>\d+))?)/")
_MERGE = re.compile(r"\w*(merg|downsampl)\w*/")
_LAST = re.compile(r"(((final|post|out|pool|fc)_)?norm(_?\d+)?|head\w*|pre_logits)(/|$)")


def update_ema(ema: Tree, new: Tree, decay: float, step: jax.Array | int) -> Tree:
    """One step of the running mean of weights, in float32; integers are copied.

    The decay is min(decay, (1 + step) / (10 + step)), so that a short run forgets where it began:
    `tf.train.ExponentialMovingAverage` with `num_updates`.

    Args:
      ema: the mean so far.
      new: same shapes as `ema`.
      decay: in [0, 1).
      step: updates before this one.
    """
    rate = jnp.maximum(1 - decay, 9 / (10 + jnp.asarray(step, jnp.float32)))

    def blend(mean: jax.Array, value: jax.Array) -> jax.Array:
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            return value
        mean32 = mean.astype(jnp.float32)
        return (mean32 + rate * (value.astype(jnp.float32) - mean32)).astype(mean.dtype)

    return jax.tree.map(blend, ema, new)


def _decayed(params: Tree, no_decay: str | None, decay_1d: bool) -> Tree:
    """A tree of bool, True where weight decay acts."""
    spared = _matches("no_decay", NO_DECAY if no_decay is None else no_decay, params)
    # The leading axis of scanned blocks counts layers: a bias in them is [L, D].
    scanned = jax.tree.unflatten(
        jax.tree.structure(params), ["blocks" in name.split("/") for name in names(params)]
    )
    return jax.tree.map(
        lambda s, p, layers: not s and (decay_1d or p.ndim - layers > 1), spared, params, scanned
    )


def _scales(params: Tree, layer_decay: float, lr_scale: Any) -> Tree:
    """Factors of the learning rate: a number for each parameter, or an array that broadcasts."""
    scales = jax.tree.map(lambda _: 1.0, params)
    if layer_decay != 1:
        scales = layer_scales(params, layer_decay)
    for entry in lr_scale:
        match entry:
            case (str(pattern), int(factor) | float(factor)) if 0 < factor < math.inf:
                chosen = _matches("lr_scale", pattern, params)
                scales = jax.tree.map(lambda s, c, f=factor: s * f if c else s, scales, chosen)
            case _:
                raise ConfigError(
                    f"optimizer.lr_scale must hold pairs (pattern, factor above 0), not {entry!r}; "
                    "optimizer.freeze is for what stays as it is"
                )
    return scales


def _matches(key: str, pattern: str, params: Tree) -> Tree:
    """A tree of bool, True where the name matches; "" matches nothing.

    Raises:
      ConfigError: unless it is a regular expression and some name matches it; the default
        `NO_DECAY`, which a person did not write, need not.
    """
    every = names(params)
    try:
        found = [bool(pattern and re.search(pattern, name)) for name in every]
    except (re.error, TypeError) as e:
        raise ConfigError(f"optimizer.{key}={pattern!r} is no regular expression: {e}") from e
    if pattern not in ("", NO_DECAY) and not any(found):
        raise ConfigError(
            f"optimizer.{key}={pattern!r} matches no parameter; there are {_some(every)}"
        )
    return jax.tree.unflatten(jax.tree.structure(params), found)


def _some(every: list[str]) -> str:
    """A few names from all over the list."""
    shown = every[:: max(1, len(every) // 4)][:4]
    return ", ".join(shown) + (", ..." if len(every) > len(shown) else "")
