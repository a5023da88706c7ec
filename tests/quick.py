"""`jax.jit` that compiles in a third of the time, to slower programs: for tests of what a function computes.

Of what rests on how a compiler rounds, masks first of all, programs are compiled as users have them.
"""

import functools

import jax

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_llvm_disable_expensive_passes": True,
}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
