"""A program whose products with chosen leaves are done in another way, and that hands a state from one to the next.

    program = Products(jaxpr, params, names, do)
    state, results = program.run(values, state)         do : (product, state) -> (state, result)
                                                        after : (product, what its result became, state) -> state

Loops and branches are run as such, the state carried through them.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Shaped

from jaxprune import tree
from jaxprune.compat import ClosedJaxpr, present_forms, primitive_name, scan_groups
from jaxprune.tracing.inlined import OF_DERIVATIVES, REMAT, bind, called, evaluate, inlined
from jaxprune.tracing.outputs import Became, Uses, became
from jaxprune.tracing.paths import Path, start
from jaxprune.tracing.sites import PRODUCTS, Site
from jaxprune.tracing.transfer import Value, end, use
from jaxprune.types import Leaves


class Product(NamedTuple):
    """A product or a convolution with a leaf, while it is run.

    Attributes:
        site: what it is; of a scan, of one step.
        number: which product with this leaf it is, from 0.
        weight: the operand that is made of the leaf.
        x: the other one.
        layer: of a leaf of stacked layers, the step of every scan that took it apart, the outermost first.
        plain: does it as it was.
    """

    site: Site
    number: int
    weight: Shaped[Array, "..."]
    x: Shaped[Array, "..."]
    layer: tuple[Shaped[Array, ""], ...]
    plain: Callable[[], Shaped[Array, "..."]]


Do: TypeAlias = Callable[[Product, Any], tuple[Any, Any]]
After: TypeAlias = Callable[[Product, Became, Any], Any]


class Known(NamedTuple):
    """An array, and what is known of it."""

    array: Any
    what: Value


class Products:
    """A program ready to be run.

    Args:
        jaxpr: of `jaxpr_of`.
        params: those that it was made with.
        names: leaves whose products are done in another way.
        do: (product, state) -> (state, result).
        after: (product, what its result became, state) -> state; told of each product at the end of the loop's body or
            the branch that it is in, or of the program.
        differentiated: rules of derivatives that the program has of its own hold for it when it is run, but where one
            of the leaves runs into them, and what it computes again for derivatives is computed again.
    """

    def __init__(
        self,
        jaxpr: ClosedJaxpr,
        params: Leaves,
        names: Collection[str],
        do: Do,
        after: After | None = None,
        differentiated: bool = False,
    ) -> None:
        self.jaxpr = inlined(jaxpr, OF_DERIVATIVES if differentiated else ())
        self.names, self.do, self.after = names, do, after
        named = {name: leaf for name, leaf in tree.named_leaves(params).items() if tree.is_array(leaf)}
        paths: list[Value] = [start(name, tuple(leaf.shape), leaf.dtype.name) for name, leaf in named.items()]
        self._inputs = paths + [True] * (len(self.jaxpr.in_avals) - len(paths))
        self._numbers: dict[int, int] = {}  # id of an equation, which may be traced more than once -> number
        self._counts: Counter[str] = Counter()
        self._steps: list[Any] = []  # of the scans whose bodies are being run

    def run(self, values: Sequence[Any], state: Any) -> tuple[Any, list[Any]]:
        """The state after all products, and the results.

        Args:
            values: inputs of the program.
            state: pytree of arrays, of one structure.

        Raises:
            ValueError: one of the leaves runs into something that cannot be followed.
        """
        state, results = self._run(self.jaxpr, values, self._inputs, state)
        return state, [one.array for one in results]

    def _run(
        self, jaxpr: ClosedJaxpr, values: Sequence[Any], known: Sequence[Value], state: Any
    ) -> tuple[Any, list[Known]]:
        inputs, made = pairs(values, known), {}
        done: list[tuple[JaxprEqn, Product]] = []

        def step(eqn: JaxprEqn, given: list[Any]) -> list[Known]:
            nonlocal state
            pairs = list(map(_known, given))
            state, results = self._step(eqn, [pair.array for pair in pairs], [pair.what for pair in pairs], state, done)
            if self.after is not None:
                made.update(zip(eqn.outvars, results, strict=True))
            return results

        results = evaluate(jaxpr, inputs, step, ())
        if self.after is not None and done:
            made |= zip(jaxpr.jaxpr.invars, inputs, strict=True)
            uses = Uses(jaxpr.jaxpr)
            for eqn, product in done:
                state = self.after(product, became(uses, eqn, made), state)
        return state, list(map(_known, results))

    def _step(
        self, eqn: JaxprEqn, arrays: list[Any], known: list[Value], state: Any, done: list[tuple[JaxprEqn, Product]]
    ) -> tuple[Any, list[Known]]:
        name, paths = eqn.primitive.name, any(isinstance(what, Path) for what in known)
        loops = {"scan": self._scan, "while": self._while, "cond": self._cond}
        if name in loops:
            return loops[name](eqn, arrays, known, state)
        if name in OF_DERIVATIVES and (name in REMAT or paths):
            return self._call(eqn, arrays, known, state)
        found = use(eqn, known, 1) if paths else end(eqn, known)
        self._check(eqn, [lost.path for lost in found.lost])
        sites = [site for site in found.sites if site.kind in PRODUCTS and site.name in self.names]
        if not sites:
            return state, pairs(bind(eqn, arrays, eqn.params), found.results)
        weight, x = arrays if sites[0].weight_first else reversed(arrays)
        number = self._number(eqn, sites[0].name)
        layer = tuple(self._steps[loop] for word, loop in sites[0].weight_transforms if word == "layer")
        product = Product(sites[0], number, weight, x, layer, lambda: bind(eqn, arrays, eqn.params)[0])
        state, result = self.do(product, state)
        done.append((eqn, product))
        return state, pairs([result], found.results)

    def _number(self, eqn: JaxprEqn, name: str) -> int:
        if id(eqn) not in self._numbers:
            self._numbers[id(eqn)] = self._counts[name]
            self._counts[name] += 1
        return self._numbers[id(eqn)]

    def _check(self, eqn: JaxprEqn, known: Iterable[Value]) -> None:
        """Refuses leaves that go no further than to this equation."""
        for path in known:
            if isinstance(path, Path) and path.name in self.names:
                changed = f", changed by `{path.changed_by}`," if path.changed_by else ""
                raise ValueError(
                    f"{path.name!r}{changed} runs into `{primitive_name(eqn)}` at "
                    f"{source_info_util.summarize(eqn.source_info)}, after which its products are not known. Leave it "
                    "out with `select`, or write this in other operations."
                )

    def _scan(self, eqn: JaxprEqn, arrays: list[Any], known: list[Value], state: Any) -> tuple[Any, list[Known]]:
        (consts, carry), body = scan_groups(eqn), eqn.params["jaxpr"]
        stop = consts + carry
        layers = [what.layer(len(self._steps)) if isinstance(what, Path) else what for what in known[stop:]]
        with self._at_step(jnp.int32(0)):
            inside = self._settled(eqn, body, [*known[:stop], *layers], slice(consts, stop), state)

        def step(carry: Any, xs: Any) -> Any:
            with self._at_step(xs[0]):
                state, results = self._run(body, [*arrays[:consts], *carry[0], *xs[1:]], inside, carry[1])
            made = [one.array for one in results]
            return (made[: stop - consts], state), made[stop - consts :]

        loop = {word: eqn.params[word] for word in ("length", "reverse", "unroll")}
        steps = jnp.arange(loop["length"], dtype=jnp.int32)
        with present_forms():
            (values, state), stacked = lax.scan(step, (arrays[consts:stop], state), [steps, *arrays[stop:]], **loop)
        return state, [*pairs(values, inside[consts:stop]), *pairs(stacked, [True] * len(stacked))]

    def _call(self, eqn: JaxprEqn, arrays: list[Any], known: list[Value], state: Any) -> tuple[Any, list[Known]]:
        found: list[Value] = []

        def run(arrays: list[Any], state: Any) -> Any:
            state, results = self._run(called(eqn), arrays, known, state)
            found[:] = [one.what for one in results]
            return state, [one.array for one in results]

        if eqn.primitive.name in REMAT:
            run = jax.checkpoint(run, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])
        with present_forms():
            state, values = run(arrays, state)
        return state, pairs(values, found)

    @contextlib.contextmanager
    def _at_step(self, number: Any) -> Iterator[None]:
        """What is run in here is the body of a scan, at this of its steps."""
        self._steps.append(number)
        try:
            yield
        finally:
            self._steps.pop()

    def _while(self, eqn: JaxprEqn, arrays: list[Any], known: list[Value], state: Any) -> tuple[Any, list[Known]]:
        tested, condition, body = eqn.params["cond_nconsts"], eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        consts = eqn.params["body_nconsts"]
        self._check(eqn, known[:tested])  # the condition hands no state on
        inside = self._settled(eqn, body, known[tested:], slice(consts, None), state)

        def test(carry: Any) -> Any:
            values = [*arrays[:tested], *carry[0]]
            return self._run(condition, values, [True] * len(values), carry[1])[1][0].array

        def step(carry: Any) -> Any:
            state, results = self._run(body, [*arrays[tested : tested + consts], *carry[0]], inside, carry[1])
            return [one.array for one in results], state

        values, state = lax.while_loop(test, step, (arrays[tested + consts :], state))
        return state, pairs(values, inside[consts:])

    def _cond(self, eqn: JaxprEqn, arrays: list[Any], known: list[Value], state: Any) -> tuple[Any, list[Known]]:
        after = [self._after(branch, known[1:], state) for branch in eqn.params["branches"]]
        results = functools.reduce(functools.partial(self._both, eqn), after)

        def of(branch: ClosedJaxpr) -> Callable[..., Any]:
            def run(state: Any, values: list[Any]) -> Any:
                state, results = self._run(branch, values, known[1:], state)
                return state, [one.array for one in results]

            return run

        state, values = lax.switch(arrays[0], [of(branch) for branch in eqn.params["branches"]], state, arrays[1:])
        return state, pairs(values, results)

    def _settled(
        self, eqn: JaxprEqn, body: ClosedJaxpr, known: Sequence[Value], carried: slice, state: Any
    ) -> list[Value]:
        """What is known of the inputs of a loop's body, after any number of steps."""
        known = list(known)
        count = len(known[carried])
        while True:
            after = self._after(body, known, state)
            self._check(eqn, after[count:])
            both = self._both(eqn, known[carried], after[:count])
            if both == known[carried]:
                return known
            known[carried] = both

    def _after(self, jaxpr: ClosedJaxpr, known: Sequence[Value], state: Any) -> list[Value]:
        """What is known of the results of a jaxpr; nothing is computed."""
        found: list[Value] = []

        def dry(values: list[Any], state: Any) -> None:
            found.extend(one.what for one in self._run(jaxpr, values, known, state)[1])

        jax.eval_shape(dry, [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in jaxpr.in_avals], state)
        return found

    def _both(self, eqn: JaxprEqn, some: Sequence[Value], others: Sequence[Value]) -> list[Value]:
        """What is known of values that are now the ones, now the others."""
        pairs = list(zip(some, others, strict=True))
        self._check(eqn, [one for pair in pairs if pair[0] != pair[1] for one in pair])
        return [a if a == b else True for a, b in pairs]


def _known(value: Any) -> Known:
    return value if isinstance(value, Known) else Known(value, False)


def pairs(arrays: Iterable[Any], known: Iterable[Value]) -> list[Known]:
    """Arrays, each with what is known of it."""
    return [Known(*pair) for pair in zip(arrays, known, strict=True)]
