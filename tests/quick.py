"""`jax.jit` that compiles in a third of the time, to slower programs: for tests of what a function computes.

Of what rests on how a compiler rounds, masks first of all, programs are compiled as users have them.
"""

import contextlib
import functools

import jax
from jax._src import compiler

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


@contextlib.contextmanager
def quickly():
    """Everything in here compiles so; what was compiled is forgotten at the end."""
    real = compiler.get_compile_options

    def options(*args, env_options_overrides=None, **kwargs):
        return real(*args, env_options_overrides={**QUICK, **(env_options_overrides or {})}, **kwargs)

    compiler.get_compile_options = options
    try:
        yield
    finally:
        compiler.get_compile_options = real
        jax.clear_caches()
