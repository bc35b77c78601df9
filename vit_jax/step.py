"""One step of training and one of evaluation: pure functions of arrays, jitted over the mesh."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.extend import core

from vit_jax import cost, optim
from vit_jax.contracts import Batch, Outputs, Predictions, Sums, Task

Tree = Any


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on, arrays only: no functions, no random state.

    Attributes:
      step: updates so far, int32.
      params: the learned arrays.
      model_state: collections that a forward pass updates, such as `batch_stats`.
      opt_state: the optimizer's.
      ema: running mean of {"params", **model_state}; empty where it is switched off.
    """

    step: jax.Array
    params: Tree
    model_state: Tree
    opt_state: Tree
    ema: Tree


def inputs(model: nn.Module, batch: Batch) -> dict[str, jax.Array]:
    """The batch entries that the model's signature names, before what is by keyword only.

    Raises:
      ValueError: if the batch lacks an entry that has no default.
    """
    chosen = {}
    for name, parameter in inspect.signature(type(model).__call__).parameters.items():
        if name == "self" or parameter.kind is parameter.KEYWORD_ONLY:
            continue
        if name in batch:
            chosen[name] = batch[name]
        elif parameter.default is inspect.Parameter.empty:
            raise ValueError(
                f"{type(model).__name__} reads {name!r}; the batch has {', '.join(sorted(batch))}"
            )
    return chosen


def init_variables(key: jax.Array, batch: Batch, *, model: nn.Module) -> Tree:
    """Fresh {"params", **model_state}; `batch` gives the shapes only."""
    return init_and_score(key, batch, model=model)


def init_and_score(
    key: jax.Array, batch: Batch, *, model: nn.Module, task: Task | None = None
) -> Tree:
    """`init_variables`, once the task has scored what the model makes of the batch.

    Traced for shapes alone, it lets a task refuse model and data before anything is written. The
    scoring leaves no trace: what is counted is the model.
    """
    outputs, variables = model.init_with_output(key, **inputs(model, batch), train=False)
    if task is not None:
        jax.eval_shape(task.score, outputs, batch)
    return {name: tree for name, tree in variables.items() if name != "intermediates"}


def traced(function: Callable, key: jax.Array, batch: Tree) -> tuple[Tree, Callable, int]:
    """Shapes of what a function of a key and a batch returns, and how to compute it from a key.

    Flax needs a whole forward pass to find a model's parameters, which takes a second to trace. It
    is traced once, for the shapes and for the values; these need the random numbers alone. What the
    whole pass would cost comes third, in FLOPs by `cost.flops`.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(key, batch)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shapes)
    needed = {v for v in jaxpr.outvars if isinstance(v, core.Var)}  # others are constants
    equations = []
    for equation in reversed(jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            needed |= {v for v in equation.invars if isinstance(v, core.Var)}
            equations.append(equation)
    jaxpr = jaxpr.replace(eqns=equations[::-1])
    rows = [v.aval for v in jaxpr.invars[1:]]
    again = core.jaxpr_as_fun(closed.replace(jaxpr=jaxpr))

    def compute(key: jax.Array) -> Tree:
        # What depends on the pictures, which no module here does, sees black ones.
        leaves = again(key, *(jnp.zeros(v.shape, v.dtype) for v in rows))
        return jax.tree.unflatten(structure, leaves)

    return shapes, compute, cost.count(closed.jaxpr)


def init_state(
    variables: Tree, *, optimizer: optax.GradientTransformation, ema: bool = False
) -> TrainState:
    """The state of step 0, from {"params", **model_state}."""
    variables = dict(variables)
    params = variables.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=variables,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, {"params": params, **variables}) if ema else {},
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    task: Task,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> tuple[TrainState, Sums]:
    """One update from one global batch.

    The randomness of a step is `fold_in(key, step)`, so a resumed run draws what an uninterrupted
    one would have. With `accumulate` > 1 the batch is cut into that many parts, whose gradients add
    up weighted by what they counted: the same update, a fraction of the activations. An update
    whose loss or gradient is not finite leaves parameters, statistics, optimizer and mean as they
    were, so that no later checkpoint can hold it; the caller reads it off the sums. What overflows
    only on the way from a finite gradient (times a huge learning rate) `all_finite` finds.

    Returns:
      The next state, and the task's sums with `grad_norm` and `finite` (0 or 1) of this step; and
      `stop`, 1 if any row of the batch's has it.
    """
    step_key = jax.random.fold_in(key, state.step)

    def loss_of(params: Tree, model_state: Tree, part: Batch, part_key: jax.Array):
        outputs, updated = model.apply(
            {"params": params, **model_state},
            **inputs(model, part),
            train=True,
            rngs={"dropout": part_key},
            mutable=list(model_state),
        )
        loss, sums = task.score(outputs, part)
        return loss, (sums, dict(updated))

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    if accumulate == 1:
        (loss, (sums, model_state)), grads = gradient_of(
            state.params, state.model_state, batch, step_key
        )
    else:
        loss, sums, model_state, grads = _accumulated(
            gradient_of, state, batch, step_key, accumulate
        )
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay:
        ema = optim.update_ema(ema, {"params": params, **model_state}, ema_decay, state.step)
    new = TrainState(state.step + 1, params, model_state, opt_state, ema)
    old = state.replace(step=state.step + 1)
    new = jax.tree.map(partial(jax.lax.select_n, finite), old, new)
    sums = sums | {"grad_norm": grad_norm, "finite": finite.astype(jnp.float32)}
    if "stop" in batch:
        sums["stop"] = jnp.any(batch["stop"]).astype(jnp.float32)
    return new, sums


@jax.jit
def all_finite(tree: Tree) -> jax.Array:
    """Whether every floating-point number of a tree is finite: a bool.

    Not part of the step: there it would keep two copies of the whole state alive.
    """
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def _accumulated(gradient_of, state: TrainState, batch: Batch, key: jax.Array, parts: int):
    """Loss, sums, model state and gradient of a batch, one part after the other."""

    def cut(x: jax.Array) -> jax.Array:
        # Part i takes rows i, i + parts, ...: each device's rows then stay on that device.
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def body(carry, numbered):
        loss, sums, model_state, grads = carry
        i, part = numbered
        (part_loss, (part_sums, model_state)), part_grads = gradient_of(
            state.params, model_state, part, jax.random.fold_in(key, i)
        )
        weight = part_sums["count"]
        grads = jax.tree.map(lambda a, g: a + g * weight.astype(g.dtype), grads, part_grads)
        sums = jax.tree.map(jnp.add, sums, part_sums)
        return (loss + part_loss * weight, sums, model_state, grads), None

    cut_batch = {k: cut(v) for k, v in batch.items()}
    first = {k: v[0] for k, v in cut_batch.items()}
    shapes = jax.eval_shape(gradient_of, state.params, state.model_state, first, key)
    (loss, (sums, _)), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    carry = (loss, sums, state.model_state, grads)
    numbered = (jnp.arange(parts), cut_batch)
    (loss, sums, model_state, grads), _ = jax.lax.scan(body, carry, numbered)
    total = jnp.maximum(sums["count"], 1.0)
    grads = jax.tree.map(lambda g: g / total.astype(g.dtype), grads)
    return loss / total, sums, model_state, grads


def forward(variables: Tree, batch: Batch, *, model: nn.Module) -> Outputs:
    """The model's outputs in evaluation."""
    return model.apply(variables, **inputs(model, batch), train=False)


def eval_step(
    variables: Tree, batch: Batch, *, model: nn.Module, task: Task
) -> tuple[Sums, Predictions]:
    """Sums and predictions of one batch; `variables` is {"params", **model_state} or an `ema`."""
    outputs = forward(variables, batch, model=model)
    return task.score(outputs, batch)[1], task.predict(outputs, batch)
