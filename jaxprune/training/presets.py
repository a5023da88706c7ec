"""Presets: published algorithms, each a row of the four answers and of how training goes on around them.

preset = presets()["rigl"]
tx = preset.optimizer(optax.adam(1e-3), sparsity=0.9, steps=5000, key=key)
masks = compute_masks(preset.method, params, 0.9, grads=grads)               # those that prune in one shot
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import optax
from jaxtyping import Array, Key

from jaxprune import criteria, distributions, granularity, schedules
from jaxprune.methods import Method
from jaxprune.training.prune import prune, regrow
from jaxprune.training.splice import splice

How = Literal["one-shot", "gradual", "iterative", "alternating", "regrow", "splice"]


@dataclasses.dataclass(frozen=True)
class Preset:
    """A method, and when and how it runs.

    Attributes:
        method: what to prune and how to choose.
        paper: who, when, and where to read it; what differs here.
        use: what it is for.
        how: "one-shot": masks once, before or after training, in `iterations` steps; "gradual": as training goes on,
            by `schedule`; "iterative": `rounds` of training, masks before each; "alternating": dense and sparse phases;
            "regrow": sparse from the first step, weights move; "splice": dead weights go on learning out of sight.
        schedule: of a gradual or spliced preset, such as `cubic`.
        grow: of a preset that regrows: the criterion for dead weights.
        rewind: of an iterative preset, where each round begins: "" with the weights as they are, "rate" likewise, and
            with the learning rate from its start; "initialisation"; or "early", a step soon after it.
        iterations: of a one-shot preset: steps of `iterative_masks`.
        margin: see `splice`.
        decay: see `splice`.
    """

    method: Method
    paper: str = ""
    use: str = ""
    how: How = "one-shot"
    schedule: Callable[..., Any] = schedules.cubic
    grow: Any = None
    rewind: Literal["", "rate", "initialisation", "early"] = ""
    iterations: int = 1
    margin: float = 0.0
    decay: float = 0.0

    def optimizer(
        self,
        inner: optax.GradientTransformation,
        *,
        sparsity: float | None,
        steps: int,
        every: int | None = None,
        rounds: int = 5,
        key: Key[Array, ""] | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """`inner`, pruning as this preset does within `steps` updates; the last masks fall within them.

        Args:
            inner: the optimizer, its whole chain.
            sparsity: reached at the end; None for distributions that decide themselves.
            steps: length of the training.
            every: updates between masks; of an alternating preset, length of a phase. None: 100, and a tenth of a
                training of less than 1000 steps, which would otherwise jump to its sparsity.
            rounds: of an iterative preset, which here goes on with its weights and its learning rate; for others see
                `jaxprune.iterative_pruning`.
            key: needed by presets that draw.

        Raises:
            ValueError: a one-shot preset; a length below 1; phases longer than the training; what `prune`, `regrow` and
                `splice` raise.
        """
        every = min(100, max(steps // 10, 1)) if every is None else every
        if steps < 1 or every < 1 or rounds < 1:
            raise ValueError(f"`optimizer` needs steps, every and rounds of 1 or more; got {steps}, {every}, {rounds}.")
        if self.how == "one-shot":
            raise ValueError(
                "A one-shot preset has no optimizer: call `compute_masks` or `iterative_masks` with its method, and "
                "train with `keep_params_sparse(masks)`."
            )
        if sparsity is None and self.how in ("alternating", "regrow"):
            raise ValueError(f"A preset that prunes {self.how!r} needs a sparsity: the fraction to remove, in [0, 1).")
        last = (steps - 1) // every * every
        settled = steps * 3 // 4 // every * every  # a quarter of the training is left to masks that stay
        if self.how == "regrow":
            if key is None:
                raise ValueError("A preset that regrows begins with random masks: hand in a `key`.")
            given: Any = {"sparsity": sparsity, "update_when": schedules.every(every, begin=every, end=settled)}
            fraction = optax.cosine_decay_schedule(0.3, max(settled, 1))
            return regrow(inner, self.method, key=key, grow=self.grow, drop_fraction=fraction, **given)
        course = partial(self.schedule, begin=0, end=settled if self.how == "splice" else last)
        if self.how == "iterative":
            every = max(steps // rounds, 1)
            course = partial(schedules.rounds, count=rounds, length=every)
        if self.how == "alternating":
            if not settled:
                raise ValueError(
                    f"Phases of {every} steps do not fit into {steps} steps: three quarters of them must hold one."
                    " Train longer, or choose shorter phases."
                )
            course = partial(schedules.alternating, dense=every, sparse=every, begin=every, end=settled)
        when = schedules.every(every, end=settled if self.how == "alternating" else None)
        given = {"sparsity": None if sparsity is None else course(sparsity), "update_when": when, "key": key}
        if self.how == "splice":
            return splice(inner, self.method, margin=self.margin, decay=self.decay, **given)
        return prune(inner, self.method, **given)


OUTPUT, UNIFORM, ERK = granularity.Output(), distributions.Uniform(), distributions.ERK()

_PRESETS = {
    "random": Preset(
        Method(criteria.random, distribution=UNIFORM), "baseline", "what every criterion must beat", "gradual",
    ),
    "han": Preset(
        Method(distribution=distributions.SigmaThreshold(1.0)), "Han et al. 2015, arXiv:1506.02626",
        "a threshold for every layer, from its own weights",
    ),
    "magnitude": Preset(
        Method(), "Han et al. 2015, arXiv:1506.02626, one threshold for all layers",
        "a trained model, at once; then fine-tune",
    ),
    "magnitude_gradual": Preset(
        Method(distribution=UNIFORM), "Zhu and Gupta 2017, arXiv:1710.01878", "the first one to try", "gradual",
    ),
    "magnitude_global": Preset(
        Method(), "Zhu and Gupta 2017 with one contest of all layers", "the same, where layers differ much in size",
        "gradual",
    ),
    "magnitude_erk": Preset(
        Method(distribution=ERK), "Zhu and Gupta 2017; Evci et al. 2020, arXiv:1911.11134, for the shares",
        "the same, sparing small layers", "gradual",
    ),
    "lamp": Preset(
        Method(criteria.lamp), "Lee et al. 2021, arXiv:2010.07611", "the same, with shares found by scores", "gradual",
    ),
    "taylor": Preset(
        Method(criteria.taylor), "Molchanov et al. 2019, arXiv:1906.10771, of single weights",
        "scores that look at the loss", "gradual",
    ),
    "obd": Preset(
        Method(criteria.fisher), "LeCun et al. 1990, Optimal Brain Damage, its Hessian by Fisher's diagonal",
        "a trained model, in rounds", "iterative",
    ),
    "movement": Preset(
        Method(criteria.movement), "Sanh et al. 2020, arXiv:2005.07683", "fine-tuning of pretrained models", "gradual",
    ),
    "lottery_ticket": Preset(
        Method(), "Frankle and Carbin 2019, arXiv:1803.03635", "whether the early weights alone would do", "iterative",
        rewind="initialisation",
    ),
    "weight_rewinding": Preset(
        Method(), "Frankle et al. 2020, arXiv:1912.05671", "the same, for larger models", "iterative", rewind="early",
    ),
    "rate_rewinding": Preset(
        Method(), "Renda et al. 2020, arXiv:2003.02389", "best accuracy, time no matter", "iterative", rewind="rate",
    ),
    "snip": Preset(Method(criteria.snip), "Lee et al. 2019, arXiv:1810.02340", "before training, from one batch"),
    "grasp": Preset(Method(criteria.grasp), "Wang et al. 2020, arXiv:2002.07376", "before training, by gradient flow"),
    "synflow": Preset(
        Method(criteria.synflow), "Tanaka et al. 2020, arXiv:2006.05467", "before training, without data, to extremes",
        iterations=100,
    ),
    "static_sparse": Preset(
        Method(criteria.random, distribution=ERK), "Mocanu et al. 2018, arXiv:1707.04780, without its moves",
        "the baseline of sparse training",
    ),
    "set": Preset(
        Method(distribution=ERK), "Mocanu et al. 2018, arXiv:1707.04780", "training within a sparse budget", "regrow",
        grow=criteria.random,
    ),
    "rigl": Preset(
        Method(distribution=ERK), "Evci et al. 2020, arXiv:1911.11134", "the same, growing where gradients are",
        "regrow", grow=criteria.gradient,
    ),
    "sparse_momentum": Preset(
        Method(distribution=ERK), "Dettmers and Zettlemoyer 2019, arXiv:1907.04840, within each layer",
        "the same, gradients averaged", "regrow", grow=criteria.momentum(),
    ),
    "acdc": Preset(
        Method(distribution=UNIFORM), "Peste et al. 2021, arXiv:2106.12379",
        "a dense and a sparse model in one training", "alternating",
    ),
    "surgery": Preset(
        Method(), "Guo et al. 2016, dynamic network surgery, arXiv:1608.04493",
        "high sparsities; masks may err and recover", "splice", margin=0.2,
    ),
    "straight_through": Preset(
        Method(), "Bengio et al. 2013, arXiv:1308.3432, as Lin et al. 2020 use it (arXiv:2006.07253)",
        "the same, without a margin", "splice",
    ),
    "nm": Preset(
        Method(distribution=distributions.NM(2, 4)), "Mishra et al. 2021, arXiv:2104.08378",
        "hardware that skips 2 of 4; then fine-tune",
    ),
    "nm_gradual": Preset(
        Method(distribution=distributions.NM(2, 4)), "Kao et al. 2022, arXiv:2209.07617, by decaying N",
        "the same, run by run emptier", "gradual", schedule=schedules.linear,
    ),
    "sr_ste": Preset(
        Method(distribution=distributions.NM(2, 4)), "Zhou et al. 2021, arXiv:2102.04010",
        "the same, from the first step", "splice", decay=2e-4,
    ),
    "wanda": Preset(
        Method(criteria.wanda, distribution=distributions.PerOutput()), "Sun et al. 2023, arXiv:2306.11695",
        "language models, no training",
    ),
    "owl": Preset(
        Method(criteria.wanda, distribution=distributions.OWL(per_output=True)), "Yin et al. 2023, arXiv:2310.05175",
        "the same, sparing layers with outliers",
    ),
    "filters": Preset(
        Method(criteria.magnitude, OUTPUT, UNIFORM), "Li et al. 2017, arXiv:1608.08710",
        "fewer filters or neurons; then compact", "iterative",
    ),
    "fpgm": Preset(
        Method(criteria.geometric_median, OUTPUT, UNIFORM), "He et al. 2019, arXiv:1811.00250",
        "the same, the most replaceable first",
    ),
    "slimming": Preset(
        Method(criteria.norm_scale, OUTPUT), "Liu et al. 2017, arXiv:1708.06519",
        "networks with batch normalisation, trained with `l1` on its scales",
    ),
    "apoz": Preset(
        Method(criteria.apoz, OUTPUT, UNIFORM), "Hu et al. 2016, arXiv:1607.03250", "neurons that rarely fire",
    ),
    "activation_mean": Preset(
        Method(criteria.activation_mean, OUTPUT, UNIFORM), "Molchanov et al. 2017, arXiv:1611.06440, section 2.2",
        "neurons that do little when they fire",
    ),
    "taylor_filters": Preset(
        Method(criteria.joint_taylor(OUTPUT), OUTPUT), "Molchanov et al. 2019, arXiv:1906.10771",
        "fewer filters, by the loss", "gradual",
    ),
}  # fmt: skip


def presets() -> Mapping[str, Preset]:
    """All presets by name, read-only; to change an answer, `dataclasses.replace` it."""
    return MappingProxyType(_PRESETS)
