"""What a function costs, read off its trace: floating-point operations, parameters, bytes."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

RULE = "2 x multiply-adds of matrix products and convolutions"
ATTENTION = "fused_attention"  # of `layers.fused`, whose products are inside a kernel


def flops(function: Callable, *abstract_args: Any) -> int:
    """Floating-point operations of one call, by a rule; nothing is computed.

    A matrix product or a convolution counts 2 for each multiply-add, products with the zeros of a
    padding included and with those that a dilation puts between inputs not; anything elementwise
    (activations, norms, softmax, sums) counts nothing. A loop of known length counts all its
    rounds, a `while` one round, a choice its dearest branch: what is written once for each
    platform, such as a depthwise convolution, counts as the dearest of its forms. A fused
    attention counts the two products of the plain one. The program is
    taken as traced, before a compiler leaves out what nobody reads.

    Papers that count multiply-adds as one operation give half of this number.

    Args:
      function: any function of arrays that JAX can trace.
      *abstract_args: trees of arrays or `jax.ShapeDtypeStruct`.
    """
    return count(jax.make_jaxpr(function)(*abstract_args).jaxpr)


def count(jaxpr: core.Jaxpr) -> int:
    """`flops` of what is traced already."""
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        left = equation.invars[0].aval.shape
        (contracted, _), _ = params["dimension_numbers"]
        return (
            2
            * math.prod(equation.outvars[0].aval.shape)
            * math.prod(left[axis] for axis in contracted)
        )
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        _, inputs, *space = params["dimension_numbers"].rhs_spec
        taps = math.prod(kernel[axis] for axis in (inputs, *space))  # a group's inputs only
        products = math.prod(equation.outvars[0].aval.shape) * taps
        return 2 * products // math.prod(params["lhs_dilation"])
    if params.get("name") == ATTENTION:
        query, key = (variable.aval.shape for variable in equation.invars[:2])
        return 2 * 2 * math.prod(query) * key[-3]
    inner = [count(jaxpr) for jaxpr in _jaxprs(list(params.values()))]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _jaxprs(value: Any) -> Iterator[core.Jaxpr]:
    """The programs among an equation's parameters: loop bodies, branches, called functions."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _jaxprs(item)


def parameters(tree: Any) -> int:
    """How many numbers a tree of arrays, or of their shapes, holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def bytes_of(tree: Any) -> int:
    """How many bytes a tree of arrays, or of their shapes, takes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def human(number: float) -> str:
    """19990000 -> "19.99 M": four digits, powers of 1000; ends so that a unit can follow: "12 "."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        text = f"{number:.4g}"
        if abs(float(text)) < 1000:
            return f"{text} {prefix}"
        number /= 1000
    return f"{number:.4g} E"


def taken(compiled: Any) -> int:
    """Bytes of a compiled program: arguments, results that do not take their place, temporaries.

    0 where the backend does not tell.
    """
    account = compiled.memory_analysis()
    if account is None:
        return 0
    kept = account.output_size_in_bytes - account.alias_size_in_bytes
    return account.argument_size_in_bytes + account.temp_size_in_bytes + kept
