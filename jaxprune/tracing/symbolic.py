"""Symbolic sizes: programs for arrays of any size, such as `jax.export` makes for batches.

Channels are followed with numbers in the place of symbols, (b, 2 * b + 1) as (101, 203): primes, so that nothing that
is of another size is taken to be of the same. What is made of that holds for all sizes.
"""

from typing import Any

from jax.export import is_symbolic_dim
from jax.extend.core import JaxprEqn, Literal, Var

from jaxprune.compat import ClosedJaxpr, closed, size_at
from jaxprune.tracing.inlined import with_bodies

LEAST = 101
"""The smallest number that stands for a symbol."""


def at_numbers(jaxpr: ClosedJaxpr) -> tuple[ClosedJaxpr, dict[Var, Var]]:
    """The program with numbers for symbols, and variable -> the one that is its own there; both are as before if none.

    Args:
        jaxpr: a program without calls.
    """
    if not any(map(is_symbolic_dim, (size for var in jaxpr.jaxpr.invars for size in var.aval.shape))):
        return jaxpr, {}
    numbers = _Numbers()
    return numbers.of_program(jaxpr), numbers.same


class _Numbers:
    """Numbers for symbols, in the order of their first use.

    Attributes:
        same: variable with symbols in its shape -> variable with numbers.
    """

    def __init__(self) -> None:
        self.same: dict[Var, Var] = {}
        self._of: dict[str, int] = {}

    def of_program(self, jaxpr: ClosedJaxpr) -> ClosedJaxpr:
        inner = jaxpr.jaxpr
        return closed(
            inner.replace(
                constvars=list(map(self._atom, inner.constvars)),
                invars=list(map(self._atom, inner.invars)),
                outvars=list(map(self._atom, inner.outvars)),
                eqns=list(map(self._equation, inner.eqns)),
            ),
            jaxpr.consts,
        )

    def _equation(self, eqn: JaxprEqn) -> JaxprEqn:
        params = {word: self._value(value) for word, value in with_bodies(eqn, self.of_program).items()}
        invars, outvars = (list(map(self._atom, atoms)) for atoms in (eqn.invars, eqn.outvars))
        return eqn.replace(params=params, invars=invars, outvars=outvars)

    def _atom(self, atom: Any) -> Any:
        if isinstance(atom, Literal) or not any(map(is_symbolic_dim, atom.aval.shape)):
            return atom
        if atom not in self.same:
            self.same[atom] = Var(atom.aval.update(shape=self._value(tuple(atom.aval.shape))))
        return self.same[atom]

    def _value(self, value: Any) -> Any:
        """Sizes anywhere in a parameter."""
        if isinstance(value, tuple):
            parts = map(self._value, value)
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return size_at(value, self._number) if is_symbolic_dim(value) else value

    def _number(self, symbol: str) -> int:
        if symbol not in self._of:
            number = max([LEAST - 1, *self._of.values()]) + 1
            while any(number % factor == 0 for factor in range(2, int(number**0.5) + 1)):
                number += 1
            self._of[symbol] = number
        return self._of[symbol]
