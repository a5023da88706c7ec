"""`jax.jit` that compiles in a third of the time, to slower programs: for tests of what a function computes.

Of what rests on how a compiler rounds, masks first of all, programs are compiled as users have them.
"""

import contextlib
import functools

import jax
from jax._src import compiler


def _is_known(option, value):
    """Whether this compiler has the option: XLA drops some from one release to the next."""
    try:
        jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


WANTED = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,  # of jaxlib 0.10, where it saves most
    "xla_llvm_disable_expensive_passes": True,
}
QUICK = {option: value for option, value in WANTED.items() if _is_known(option, value)}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
_quick = jax.make_user_context(False)  # in the key of every cache of JAX's: programs compiled so are kept apart


@contextlib.contextmanager
def quickly():
    """Everything in here compiles so, and is seen in here alone."""
    real = compiler.get_compile_options

    def options(*args, env_options_overrides=None, **kwargs):
        always = QUICK if _quick.value else {}  # not in other threads, which are out of the context
        return real(*args, env_options_overrides={**always, **(env_options_overrides or {})}, **kwargs)

    compiler.get_compile_options = options
    try:
        with _quick(True):
            yield
    finally:
        compiler.get_compile_options = real
