"""Max-pooling, bias, residual and ReLU, done by the kernel while a layer's sums are still in the cache.

    relu(pool(W x) + bias + residual)

At the speed of a sparse product, what follows it in a layer costs as much as the product: each step reads and writes
all activations. So `fused` looks in the traced function for native products that are only reshaped, added to, passed
to `jax.nn.relu` and max-pooled, and has each such chain computed by one call:

    product -> [reshape] -> [+ (..., 1, n_out)] -> [+ same shape] -> [relu]        additions in any order

A convolution's pixels may be pooled anywhere before a residual, in windows that neither overlap nor reach outside: the
largest of several sums is also the largest with the same bias added, and with ReLU. A step joins the chain if nobody
else uses its input. The result is the same but for rounding: 16-bit results are rounded once, not at every step. Of
products of integers it is the same to the bit: additions join in this order alone, and of 32 bits alone.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray, Tracer, eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jaxprune.compat import closed
from jaxprune.native import LARGEST_POOL
from jaxprune.sparse.encoded import with_codes
from jaxprune.sparse.native_product import Steps, fused_product_p, int8_product_p, native_product_p

F = TypeVar("F", bound=Callable[..., Any])
_BRANCHES_ON_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Chain(NamedTuple):
    """A product and the steps that join it.

    Attributes:
        steps: numbers of the equations, the product first.
        bias: what is added to every row, if anything.
        residual: what is added element by element, if anything.
        relu: whether negative results become 0.
        pool: height and width of the windows of max-pooling.
    """

    steps: tuple[int, ...]
    bias: Var | None = None
    residual: Var | None = None
    relu: bool = False
    pool: tuple[int, ...] = (1, 1)


def fused(fn: F) -> F:
    """`fn`, when traced, with the steps after its native products done by the kernel; elsewhere `fn` as it is."""

    def with_chains(*args: Any, **kwargs: Any) -> Any:
        inputs, rest = eqx.partition((args, kwargs), lambda leaf: isinstance(leaf, Tracer))
        if not jax.tree.leaves(inputs):
            return fn(*args, **kwargs)
        static: list[Any] = []

        def arrays(inputs: Any) -> Any:
            args, kwargs = eqx.combine(inputs, rest)
            outputs, other = eqx.partition(fn(*args, **kwargs), eqx.is_array)
            static.append(other)
            return outputs

        try:
            closed, shape = jax.make_jaxpr(arrays, return_shape=True)(inputs)
        except _BRANCHES_ON_VALUES:  # as it may where only derivatives are traced
            return fn(*args, **kwargs)
        outputs = eval_jaxpr(with_codes(_with_chains(closed.jaxpr)), closed.consts, *jax.tree.leaves(inputs))
        return eqx.combine(jax.tree.unflatten(jax.tree.structure(shape), outputs), static[-1])

    return with_chains  # pyright: ignore[reportReturnType]


def find_chains(jaxpr: Jaxpr) -> list[Chain]:
    """The chains of a jaxpr's native products, none sharing a step; those without one only of integers."""
    uses = Counter(var for eqn in jaxpr.eqns for var in eqn.invars if isinstance(var, Var))
    uses.update(var for var in jaxpr.outvars if isinstance(var, Var))
    users = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if isinstance(var, Var)}
    taken: set[int] = set()
    chains = []
    for i, eqn in enumerate(jaxpr.eqns):
        if eqn.primitive in (native_product_p, int8_product_p):
            chain = _follow(jaxpr.eqns, Chain((i,)), uses, users, taken)
            taken.update(chain.steps)
            chains.append(chain)
    return [c for c in chains if c != Chain(c.steps) or jaxpr.eqns[c.steps[0]].primitive is int8_product_p]


def _follow(
    eqns: Sequence[JaxprEqn], chain: Chain, uses: Counter[Var], users: dict[Var, int], taken: set[int]
) -> Chain:
    product = eqns[chain.steps[0]]
    while True:
        var = eqns[chain.steps[-1]].outvars[0]
        if uses[var] != 1 or var not in users or users[var] in taken:
            return chain
        longer = _join(chain, users[var], eqns[users[var]], var, product)
        if longer is None:
            return chain
        chain = longer


def _join(chain: Chain, number: int, eqn: JaxprEqn, var: Var, product: JaxprEqn) -> Chain | None:
    """The chain with one more step, or None if this step is none of its kind."""
    steps = (*chain.steps, number)
    if _is_relu(eqn):
        return chain._replace(steps=steps, relu=True)
    if eqn.primitive is lax.reduce_window_max_p:
        joins = chain.pool == (1, 1) and chain.residual is None and _aval(var).shape == _aval(product.outvars[0]).shape
        return chain._replace(steps=steps, pool=pool) if joins and (pool := _pool_of_pixels(eqn)) else None
    if chain.relu:
        return None
    n_out = product.params["sizes"].n_out
    shape = _aval(eqn.outvars[0]).shape
    if shape[-1:] != (n_out,) or _aval(eqn.outvars[0]).dtype != _aval(var).dtype:
        return None
    if eqn.primitive is lax.reshape_p and eqn.params["dimensions"] is None:
        return chain._replace(steps=steps)
    if eqn.primitive is not lax.add_p:
        return None
    other = eqn.invars[0] if eqn.invars[1] is var else eqn.invars[1]
    if product.params["sizes"].grid and (chain.residual is not None or _aval(var).dtype != jnp.float32):
        return None
    if isinstance(other, Literal) or shape != _aval(var).shape:
        return None
    if chain.bias is None and _aval(other).size == n_out == _aval(other).shape[-1]:
        return chain._replace(steps=steps, bias=other)
    if chain.residual is None and _aval(other).shape == shape:
        return chain._replace(steps=steps, residual=other)
    return None


def _pool_of_pixels(eqn: JaxprEqn) -> tuple[int, ...]:
    """Height and width of the windows of max-pooling over (n, height, width, out); () if it is of another kind."""
    sizes = eqn.params["window_dimensions"]
    plain = (
        len(sizes) == 4
        and sizes[0] == sizes[3] == 1
        and max(sizes) <= LARGEST_POOL
        and sizes == eqn.params["window_strides"]
        and not any(map(any, eqn.params["padding"]))
        and set(eqn.params["base_dilation"] + eqn.params["window_dilation"]) == {1}
    )
    return sizes[1:3] if plain else ()


def _aval(var: Any) -> ShapedArray:
    return var.aval


def _with_chains(jaxpr: Jaxpr) -> Jaxpr:
    """The jaxpr with each chain as one equation, where the chain ended: all it adds is there by then."""
    chains = {chain.steps[-1]: chain for chain in find_chains(jaxpr)}
    inside = {step for chain in chains.values() for step in chain.steps[:-1]}
    eqns = [
        _one_equation(chains[i], jaxpr) if i in chains else eqn for i, eqn in enumerate(jaxpr.eqns) if i not in inside
    ]
    return jaxpr.replace(eqns=eqns)


def _is_relu(eqn: JaxprEqn) -> bool:
    """Whether the value is max(x, 0), within whatever calls; a derivative of its own does not matter here."""
    if eqn.primitive is lax.max_p:
        return any(isinstance(var, Literal) and var.val == 0 for var in eqn.invars)
    inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
    if eqn.primitive.name not in ("custom_jvp_call", "jit", "pjit") or len(eqn.invars) != 1 or inner is None:
        return False
    return len(inner.jaxpr.eqns) == 1 and _is_relu(inner.jaxpr.eqns[0])


def _one_equation(chain: Chain, jaxpr: Jaxpr) -> JaxprEqn:
    product, end = (jaxpr.eqns[chain.steps[i]] for i in (0, -1))
    added = [var for var in (chain.bias, chain.residual) if var is not None]
    inputs, outputs = [*product.invars, *added], end.outvars
    eqns = [jaxpr.eqns[step] for step in chain.steps]
    shape = _aval(end.outvars[0]).shape
    steps = Steps(chain.bias is not None, chain.residual is not None, chain.relu, shape, chain.pool)
    apart = jaxpr.replace(
        constvars=[],
        invars=inputs,
        outvars=outputs,
        eqns=eqns,
        debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
    )
    params = {"sizes": product.params["sizes"], "steps": steps, "apart": closed(apart, ())}
    return product.replace(primitive=fused_product_p, invars=inputs, outvars=outputs, params=params)
