"""Distillation: the dense model as the teacher of the pruned one.

Where masks take capacity away, the teacher's probabilities say more of each sample than its label does.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxprune.checks import check_number
from jaxprune.exact.numerics import at_least_float32


def distillation_loss(
    logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
) -> Float[Array, ""]:
    r"""How far the student's probabilities are from the teacher's, both softened by a temperature.

    $T^2 \, \mathrm{KL}(\mathrm{softmax}(z' / T) \,\Vert\, \mathrm{softmax}(z / T))$, the mean over the batch. The
    factor keeps gradients of one size as T moves. No gradient goes to the teacher.

    Args:
        logits: z, the student's, (*batch, classes).
        teacher_logits: z', likewise. A class at minus infinity has no say.
        temperature: T > 0; at high ones the loss compares logits rather than probabilities.

    Returns:
        Scalar >= 0, float32 (float64 for logits that are); 0 where the two agree.

    Raises:
        ValueError: shapes differ or have no sample, or the temperature is not above 0.

    References:
        Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2. The paper has the cross entropy, which is the same
        up to the teacher's entropy: the gradients are equal.

    Example:
        Mixed with the task's loss, while the model is pruned. The teacher is an argument like all weights.

        >>> import jax, jax.numpy as jnp, jaxprune as jp, optax
        >>> def model(params, x):
        ...     return x @ params["kernel"]
        >>> def loss(params, teacher, x, labels):
        ...     logits = model(params, x)
        ...     task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        ...     soft = jp.distillation_loss(logits, model(teacher, x), temperature=4.0)
        ...     return 0.1 * task + 0.9 * soft
        >>> tx = jp.prune(optax.sgd(0.1), jp.Method(), sparsity=0.5, update_when=jp.schedules.at(0))
        >>> @jax.jit
        ... def step(params, opt_state, teacher, x, labels):
        ...     grads = jax.grad(loss)(params, teacher, x, labels)
        ...     updates, opt_state = tx.update(grads, opt_state, params)
        ...     return optax.apply_updates(params, updates), opt_state
        >>> teacher = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
        >>> x, labels = jnp.eye(8), jnp.argmax(teacher["kernel"], -1)
        >>> params = jax.tree.map(jnp.copy, teacher)
        >>> opt_state = tx.init(params)
        >>> params, opt_state = step(params, opt_state, teacher, x, labels)
    """
    if jnp.shape(logits) != jnp.shape(teacher_logits) or 0 in jnp.shape(logits):
        raise ValueError(
            "`distillation_loss` needs logits (*batch, classes) of student and teacher for the same samples, at least "
            f"one; got shapes {jnp.shape(logits)} and {jnp.shape(teacher_logits)}."
        )
    check_number(temperature, "`distillation_loss` needs a finite temperature > 0,", ends="()")
    student, teacher = (_log_softmax(z, temperature) for z in (logits, jax.lax.stop_gradient(teacher_logits)))
    # 0 log 0 = 0, where the teacher leaves a class out.
    losses = optax.losses.kl_divergence_with_log_targets(student, teacher, where=teacher != -jnp.inf)
    return jnp.mean(losses) * jnp.square(jnp.asarray(temperature, losses.dtype))


def feature_loss(features: PyTree[Array], teacher_features: PyTree[Array]) -> Float[Array, ""]:
    r"""How far values inside the student are from the teacher's, such as the residual stream behind each block.

    $\sum_l \lVert f_l - t_l \rVert^2 / \lVert t_l \rVert^2$ over the arrays, each over the whole batch. No gradient
    goes to the teacher. Beside `distillation_loss` it saves data: a sample says more by its features than by its
    probabilities. A pruned model has not room for all that the teacher's features say, so its factor should fall
    while training.

    Args:
        features: f, the student's; an array or a pytree of them.
        teacher_features: t, likewise. An array of zeros alone is divided by nothing.

    Returns:
        Scalar >= 0, float32 (float64 where a feature is); 0 where the two agree.

    Raises:
        ValueError: structures or shapes differ, or there is no array.

    References:
        Kurtic et al. 2023, arXiv:2310.06927, section 3.1 (there "SquareHead").

    Example:
        >>> import jax.numpy as jnp, jaxprune as jp
        >>> hidden, logits = {"first": jnp.ones((8, 4))}, jnp.zeros((8, 3))
        >>> loss = jp.distillation_loss(logits, logits) + 2.0 * jp.feature_loss(hidden, {"first": 2 * jnp.ones((8, 4))})
        >>> float(loss)
        0.5
    """
    ours, theirs = (jax.tree.map(jnp.shape, one) for one in (features, teacher_features))
    if ours != theirs or not jax.tree.leaves(features):
        raise ValueError(
            f"`feature_loss` needs the same arrays of student and teacher, at least one; got shapes {ours}, {theirs}."
        )

    def off(student: Array, teacher: Array) -> Array:
        wide = at_least_float32(jnp.result_type(student, teacher))
        student, teacher = student.astype(wide), jax.lax.stop_gradient(teacher).astype(wide)
        size = jnp.sum(jnp.square(teacher))
        return jnp.sum(jnp.square(student - teacher)) / jnp.where(size > 0, size, 1)

    return jnp.sum(jnp.stack(jax.tree.leaves(jax.tree.map(off, features, teacher_features))))


def _log_softmax(logits: Array, temperature: float | Array) -> Array:
    wide = at_least_float32(logits.dtype)
    return jax.nn.log_softmax(logits.astype(wide) / jnp.asarray(temperature, wide))
