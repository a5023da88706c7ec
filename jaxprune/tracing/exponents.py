r"""Exponents: a model computed on arrays that have one exponent each, an integer that cannot overflow.

    x = mantissa * 2**exponent        max |mantissa| about 2**32 (of float32), exponent one int32 for the array

In a deep network of absolute weights every layer multiplies by the same large number, and float32 ends at $2^{128}$.
Products, and what else grows, give a new exponent; sums bring their terms to one. Powers of two are exact, so that a
network that stays in range is computed as without. Exponents are no variables to a derivative: that of the mantissa is
the derivative of x, by a factor of $2^{-\mathrm{exponent}}$.

What no rule is for is computed on plain numbers, as the model has it, and may be infinite as there.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.compat import present_forms, scan_groups
from jaxprune.tracing.inlined import CALLS, bind, evaluate
from jaxprune.tracing.operations import IDENTITIES
from jaxprune.tracing.sites import OPS

_NOTHING = -(2**20)
"""Exponent of an array of zeros where the largest of several is looked for."""


class Scaled(NamedTuple):
    """An array, mantissa * 2**exponent.

    Attributes:
        mantissa: of the array's shape and dtype.
        exponent: scalar int32.
    """

    mantissa: Any
    exponent: Any


def scaled(fn: Callable[..., Any], *args: Any) -> Scaled:
    """The array `fn(*args)` as a `Scaled`; may be traced and differentiated, with regard to its mantissa.

    Args:
        fn: gives one floating array.
        args: pytrees of arrays.
    """
    with present_forms():
        jaxpr = jax.make_jaxpr(fn)(*args)
        (result,) = evaluate(jaxpr, jax.tree.leaves(args), _run, _ENTERED)
    return _as_scaled(result, jaxpr.jaxpr.outvars[0])


def times_power(values: Any, power: Any) -> Any:
    """values * 2**power, exact as long as it is in range; powers out of the dtype's range are 0 and infinity.

    Args:
        values: floating.
        power: int32, a scalar or of the rank of `values`.
    """
    bits, mantissa, bias = _format(values.dtype)
    field = jnp.clip(power + bias, 0, 2 * bias + 1).astype(bits)
    return values * lax.bitcast_convert_type(lax.shift_left(field, jnp.full_like(field, mantissa)), values.dtype)


def _moved(values: Any, power: Any) -> Any:
    """`times_power` by a scalar, as a branch: compilers otherwise compute long chains of sums anew at every use."""
    return lax.cond(power == 0, lambda values, power: values, times_power, values, power)


def known_power(exponent: Any, dtype: Any) -> Any:
    """A power of two that numbers of `scaled` bear whatever else they are multiplied by, the exponent if it can be."""
    most, usual = jnp.finfo(dtype).maxexp // 3, -_limit(dtype)
    return jnp.clip(exponent, usual - most, usual + most)


def _top(values: Any, exponent: Any) -> Any:
    """k of the largest finite |values| * 2**exponent, which is in [2**k, 2**(k + 1)); `_NOTHING` if all are zero.

    The exponent is added before the maximum is taken: what a reduction gives is computed once, while sums of scalars
    are computed anew wherever they go, and those of sixty layers took a compiler minutes.
    """
    bits, mantissa, bias = _format(values.dtype)
    words = lax.bitcast_convert_type(jnp.abs(lax.stop_gradient(values)), bits)
    field = lax.shift_right_logical(words, jnp.full_like(words, mantissa)).astype(jnp.int32)
    some = (field > 0) & (field <= 2 * bias)
    return jnp.max(jnp.where(some, field - bias + exponent, _NOTHING), initial=_NOTHING)


def _format(dtype: Any) -> tuple[Any, int, int]:
    """Unsigned integers of a floating dtype's size, the bits of its mantissa, the bias of its exponent."""
    known = jnp.finfo(dtype)
    return jnp.dtype(f"uint{known.bits}"), known.nmant, known.maxexp - 1


def _limit(dtype: Any) -> int:
    return jnp.finfo(dtype).maxexp // 4  # cubes and products of two stay in range


def _floating(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)


def _as_scaled(value: Any, atom: Any) -> Any:
    """Floating numbers with an exponent, others as they are; literals, which are no arrays, of their atom's dtype."""
    if isinstance(value, Scaled) or not _floating(atom.aval):
        return value
    return Scaled(jnp.asarray(value, atom.aval.dtype), jnp.int32(0))


def _mantissa(value: Any) -> Any:
    return value.mantissa if isinstance(value, Scaled) else value


def _plain(value: Any) -> Any:
    return times_power(*_in_range(value, 0)) if isinstance(value, Scaled) else value


def _in_range(value: Any, limit: int | None = None) -> Any:
    """The same number, its largest mantissa in [2**limit, 2**(limit + 1)); there is room for much smaller ones."""
    if not isinstance(value, Scaled) or not value.mantissa.size:
        return value
    top = _top(*value)
    exponent = top - (_limit(value.mantissa.dtype) if limit is None else limit)
    return Scaled(times_power(value.mantissa, jnp.where(top == _NOTHING, 0, value.exponent - exponent)), exponent)


def _one_exponent(eqn: Any, values: list[Any], places: Sequence[int]) -> tuple[list[Any], Any]:
    """The values with mantissas of one exponent at these places, and that exponent."""
    found = [values[i].exponent for i in places if isinstance(values[i], Scaled)]
    others = [i for i in places if not isinstance(values[i], Scaled)]
    if all(one is found[0] for one in found) and all(_of_any_exponent(values[i]) for i in others):
        return [_mantissa(value) for value in values], found[0]
    pairs = {i: _as_scaled(values[i], eqn.invars[i]) for i in places}
    tops = {i: _top(*pair) for i, pair in pairs.items()}
    limit = _limit(next(iter(pairs.values())).mantissa.dtype)
    exponent = functools.reduce(jnp.maximum, tops.values()) - limit
    powers = {i: jnp.where(top == _NOTHING, 0, pairs[i].exponent - exponent) for i, top in tops.items()}
    return [_moved(pairs[i].mantissa, powers[i]) if i in pairs else v for i, v in enumerate(values)], exponent


def _of_any_exponent(value: Any) -> bool:
    """Whether it is the literal 0 or infinity."""
    return not isinstance(value, jax.Array) and not np.ndim(value) and bool(value == 0 or np.isinf(value))


def _bound(eqn: Any, values: list[Any]) -> list[Any]:
    return list(bind(eqn, values, eqn.params))


def _passed(eqn: Any, values: list[Any]) -> list[Any]:
    """Homogeneous in its first operand."""
    results = _bound(eqn, [values[0].mantissa, *map(_plain, values[1:])])
    return [Scaled(one, values[0].exponent) if _floating(one) else one for one in results]


def _summed(eqn: Any, values: list[Any]) -> list[Any]:
    """Homogeneous, and may grow."""
    return [_in_range(one) for one in _passed(eqn, values)]


def _each(eqn: Any, values: list[Any]) -> list[Any]:
    """Every operand handed on."""
    results = _bound(eqn, [_mantissa(value) for value in values])
    return [Scaled(y, x.exponent) if isinstance(x, Scaled) else y for x, y in zip(values, results, strict=True)]


def _together(places: slice = slice(None), *, gives: bool = True) -> Callable[..., list[Any]]:
    """Homogeneous in the operands at these places taken together; of comparisons the result has no exponent."""

    def rule(eqn: Any, values: list[Any]) -> list[Any]:
        at = range(len(values))[places]
        rest = [value if i in at else _plain(value) for i, value in enumerate(values)]
        if not any(isinstance(rest[i], Scaled) for i in at):
            return _bound(eqn, rest)
        mantissas, exponent = _one_exponent(eqn, rest, at)
        return [Scaled(one, exponent) if gives else one for one in _bound(eqn, mantissas)]

    return rule


def _multiplied(eqn: Any, values: list[Any]) -> list[Any]:
    """Homogeneous in each operand; a product with plain numbers grows little, one that sums may."""
    signs = (1, -1 if eqn.primitive.name == "div" else 1)
    exponents = [
        v.exponent if sign == 1 else -v.exponent for sign, v in zip(signs, values, strict=True) if isinstance(v, Scaled)
    ]
    (product,) = _bound(eqn, [_mantissa(value) for value in values])
    if not exponents:
        return [_in_range(Scaled(product, jnp.int32(0)))]
    found = Scaled(product, sum(exponents[1:], exponents[0]))
    return [found if len(exponents) == 1 and eqn.primitive.name in ("mul", "div") else _in_range(found)]


def _power(eqn: Any, values: list[Any]) -> list[Any]:
    """x**n, of mantissas so small that it stays in range."""
    n = 2 if eqn.primitive.name == "square" else eqn.params["y"]
    base = _in_range(values[0], 0)
    (result,) = _bound(eqn, [base.mantissa])
    return [_in_range(Scaled(result, n * base.exponent))]


def _root(eqn: Any, values: list[Any]) -> list[Any]:
    """Square root, or one over it, of a number whose exponent is made even."""
    (mantissa, exponent), sign = values[0], 1 if eqn.primitive.name == "sqrt" else -1
    half = exponent // 2
    (root,) = _bound(eqn, [times_power(mantissa, exponent - 2 * half)])
    return [Scaled(root, sign * half)]


def _levelled(eqn: Any, values: list[Any]) -> list[Any]:
    """Goes to a limit where its operand is large: the largest power of two says as much as a larger one."""
    most = jnp.finfo(values[0].mantissa.dtype).maxexp - 4
    close = _in_range(values[0], 0)
    return _bound(eqn, [times_power(close.mantissa, jnp.minimum(close.exponent, most))])


def _cast(eqn: Any, values: list[Any]) -> list[Any]:
    new = eqn.params["new_dtype"]
    if not jnp.issubdtype(new, jnp.floating):
        return _bound(eqn, [_plain(values[0])])
    narrower = _limit(new) < _limit(values[0].mantissa.dtype)
    return _passed(eqn, [_in_range(values[0], _limit(new)) if narrower else values[0]])


def _custom(eqn: Any, values: list[Any]) -> list[Any]:
    """A function with derivatives of its own: on mantissas where it is homogeneous, as ReLU is."""
    exponents = [value.exponent for value in values if isinstance(value, Scaled)]
    results = evaluate(eqn.params["call_jaxpr"], values, _run, _ENTERED)
    same = all(isinstance(one, Scaled) and one.exponent is exponents[0] for one in results)
    if same and all(one is exponents[0] for one in exponents):
        return [Scaled(one, exponents[0]) for one in _bound(eqn, [_mantissa(value) for value in values])]
    return _bound(eqn, [_plain(value) for value in values])


def _scan(eqn: Any, values: list[Any]) -> list[Any]:
    """The loop over a body on scaled numbers; what every step gives is brought to one exponent."""
    consts, carried = scan_groups(eqn)
    stop = consts + carried
    layers = [_mantissa(value) for value in values[stop:]]

    def step(carry: list[Any], one: list[Any]) -> tuple[list[Any], list[Any]]:
        parts = [Scaled(x, value.exponent) if isinstance(value, Scaled) else x
                 for x, value in zip(one, values[stop:], strict=True)]  # fmt: skip
        results = evaluate(eqn.params["jaxpr"], [*values[:consts], *carry, *parts], _run, _ENTERED)
        results = list(map(_as_scaled, results, eqn.outvars))
        return results[:carried], results[carried:]

    options = {word: eqn.params[word] for word in ("length", "reverse", "unroll")}
    start = list(map(_as_scaled, values[consts:stop], eqn.invars[consts:stop]))
    carry, made = lax.scan(step, start, layers, **options)
    return [*carry, *(_stacked(value) for value in made)]


def _stacked(value: Any) -> Any:
    """Layers with an exponent each, as one array."""
    if not isinstance(value, Scaled):
        return value
    mantissa, exponents = value
    if not mantissa.size:
        return Scaled(mantissa, jnp.int32(0))
    dead = jnp.all(mantissa == 0, axis=tuple(range(1, mantissa.ndim)))
    top = jnp.max(jnp.where(dead, _NOTHING, exponents))
    return Scaled(times_power(mantissa, (exponents - top).reshape(-1, *[1] * (mantissa.ndim - 1))), top)


def _cond(eqn: Any, values: list[Any]) -> list[Any]:
    def branch(jaxpr: Any) -> Callable[..., list[Any]]:
        return lambda *given: list(map(_as_scaled, evaluate(jaxpr, given, _run, _ENTERED), eqn.outvars))

    return list(lax.switch(_plain(values[0]), [branch(one) for one in eqn.params["branches"]], *values[1:]))


def _run(eqn: Any, values: list[Any]) -> list[Any]:
    """Results of an equation, each a `Scaled` or a plain array."""
    rule = _RULES.get(eqn.primitive.name)
    if eqn.primitive.name in ("scan", "cond"):
        return _RULES[eqn.primitive.name](eqn, values)
    if eqn.primitive.name in OPS and _floating(eqn.outvars[0].aval):
        return _multiplied(eqn, values)
    if rule is None or not any(isinstance(value, Scaled) for value in values):
        return _bound(eqn, [_plain(value) for value in values])
    return rule(eqn, values)


_ENTERED = {name for name in CALLS if not name.startswith("custom_")}


_FIRST = """
    abs argmax argmin broadcast_in_dim cummax cummin dynamic_slice expand_dims gather neg real reduce_max reduce_min
    reduce_precision reduce_window_max reduce_window_min reshape rev sign slice split squeeze top_k transpose unstack
"""
_RULES: Mapping[str, Callable[[Any, list[Any]], list[Any]]] = {
    **dict.fromkeys(_FIRST.split(), _passed),
    **dict.fromkeys(("reduce_sum", "cumsum", "reduce_window_sum"), _summed),
    **dict.fromkeys(IDENTITIES, _each),
    **dict.fromkeys(("add", "add_any", "sub", "max", "min", "clamp", "concatenate"), _together()),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), _together(gives=False)),
    **dict.fromkeys(("pad", "dynamic_update_slice"), _together(slice(0, 2))),
    **dict.fromkeys(("scatter", "scatter-add", "scatter-max", "scatter-min"), _together(slice(0, 3, 2))),
    "select_n": _together(slice(1, None)),
    **dict.fromkeys(("mul", "div"), _multiplied),
    **dict.fromkeys(("square", "integer_pow"), _power),
    **dict.fromkeys(("sqrt", "rsqrt"), _root),
    **dict.fromkeys(("tanh", "logistic", "erf", "erfc", "exp", "exp2", "atan"), _levelled),
    "convert_element_type": _cast,
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _custom),
    "scan": _scan,
    "cond": _cond,
}
