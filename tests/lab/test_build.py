"""From words to objects: every word of a config builds what it names, and ramps end inside their stage."""

import importlib
import inspect
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_helpers import tiny, write_config

import jaxprune as jp
from jaxprune.lab.recipe import build, words
from jaxprune.lab.recipe import config as cfg

pytestmark = pytest.mark.usefixtures("relaxed")  # optax itself promotes: decay ** count, 1 - count / steps

PARAMS = {"a": {"kernel": jnp.full((6, 4), 2.0), "bias": jnp.full((4,), 2.0)}}
ONES = jax.tree.map(jnp.ones_like, PARAMS)


def prune_section(folder, *words):
    return tiny(folder, "--prune", "{sparsity = 0.5}", *words).prune


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ([], jp.Method()),
        (["--prune.criterion", "magnitude"], jp.Method(criterion=jp.magnitude)),
        (["--prune.criterion", "random"], jp.Method(criterion=jp.criteria.random)),
        (["--prune.criterion", "taylor"], jp.Method(criterion=jp.taylor)),
        (["--prune.granularity", "element"], jp.Method(granularity=jp.Element())),
        (["--prune.granularity", "{name='block', rows=4, cols=2}"], jp.Method(granularity=jp.Block(4, 2))),
        (["--prune.granularity", "input"], jp.Method(granularity=jp.Input())),
        (["--prune.granularity", "output"], jp.Method(granularity=jp.Output())),
        (["--prune.distribution", "uniform"], jp.Method(distribution=jp.Uniform())),
        (["--prune.distribution", "{name='global', floor=0.1}"], jp.Method(distribution=jp.Global(floor=0.1))),
        (["--prune.distribution", "erk"], jp.Method(distribution=jp.ERK())),
        (["--prune.distribution", "per_output"], jp.Method(distribution=jp.PerOutput())),
        (["--prune.distribution", "{name='nm', n=2, m=4}"], jp.Method(distribution=jp.NM(2, 4))),
        (["--prune.granularity", "kernel"], jp.Method(granularity=jp.Kernel())),
        (["--prune.granularity", "{name='head', heads=4}"], jp.Method(granularity=jp.Head(4))),
        (
            ["--prune.granularity", "{name='by_rule', rules={'z*'='kernel', '*'={name='block', rows=4, cols=2}}}"],
            jp.Method(granularity=jp.granularity.ByRule((("z*", jp.Kernel()), ("*", jp.Block(4, 2))))),
        ),
        (["--prune.distribution", "owl"], jp.Method(distribution=jp.OWL())),
        (["--prune.distribution", "budget"], jp.Method(distribution=jp.distributions.Budget())),
        (
            ["--prune", "{distribution={name='budget', costs={'conv*'=9.0, '*'=1.0}, limit=100.0, per_cost=true}}"],
            jp.Method(distribution=jp.distributions.Budget({"conv*": 9, "*": 1}, limit=100, per_cost=True)),
        ),
        (
            ["--prune.distribution", "{name='nm', n=2, m=4, along='outputs'}"],
            jp.Method(distribution=jp.NM(2, 4, "outputs")),
        ),
        (["--prune.select", "['layers/*']"], jp.Method(select=("layers/*",))),
        (
            ["--prune", "{distribution={name='sigma_threshold', k=1.5, pooled=true}}"],
            jp.Method(distribution=jp.distributions.SigmaThreshold(1.5, pooled=True)),
        ),
        (
            ["--prune", "{distribution={name='threshold', t=0.03}}"],
            jp.Method(distribution=jp.distributions.Threshold(0.03)),
        ),
        (
            [
                "--prune.distribution",
                "{name='by_rule', rules={'z*'=0.25, 'a*'={name='by_rule', rules={'ab*'='uniform', '*'=0.75}},"
                " '*'={name='nm', n=1, m=2}}}",
            ],
            jp.Method(
                distribution=jp.distributions.ByRule(
                    (
                        ("z*", 0.25),
                        ("a*", jp.distributions.ByRule((("ab*", jp.Uniform()), ("*", 0.75)))),
                        ("*", jp.NM(1, 2)),
                    )
                )
            ),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_build_the_method_they_name(tmp_path, words, method):
    built = build.method(prune_section(tmp_path, *words))
    assert built == method
    # `==` of a by_rule ignores no order, since its rules are a tuple
    if isinstance(method.distribution, jp.distributions.ByRule):
        assert [pattern for pattern, _ in built.distribution.rules] == ["z*", "a*", "*"]


def test_every_public_answer_has_a_word():
    """A criterion, granularity or distribution that the library has, a config can name."""
    for kind, table in words.REGISTRY.items():
        for name, found in table.items():
            assert words.known(kind, name) is found
    rooms = (jp, jp.granularity, jp.distributions)
    named = [pair for room in rooms for pair in vars(room).items() if not pair[0].startswith("_")]
    classes = {one for _, one in named if inspect.isclass(one)}
    classes = {one for one in classes if not getattr(one, "_is_protocol", False)}
    granularities = {one for one in classes if hasattr(one, "pool") or hasattr(one, "pool_leaves")}
    granularities |= {jp.granularity.ByRule}
    assert set(words.REGISTRY["granularity"].values()) == granularities
    distributions = {one for one in classes if list(inspect.signature(one.__call__).parameters)[-1:] == ["dims"]}
    assert set(words.REGISTRY["distribution"].values()) == distributions
    assert set(words.REGISTRY["format"]) == {*jp.sparse.FORMATS, "dense"} - {"int8"}  # which no config has ranges for


@pytest.mark.parametrize("name", jp.presets())
def test_a_preset_named_in_a_config_is_the_preset(tmp_path, name):
    """Words, and what they build, agree with the object; of the statistics' decay and the like there is one default."""
    preset, wants = jp.presets()[name], {"sparsity": 0.5}
    if isinstance(preset.method.distribution, jp.distributions.SigmaThreshold):
        wants = {}
    section = cfg.Prune.model_validate({"preset": name, **wants})
    built = build.preset(section)
    meant = words.words_of(preset) | {"rewind": ""}
    assert {key: word for key, word in words.words_of(built).items() if key in meant} | {"rewind": ""} == meant
    assert section.rewind == words.words_of(preset)["rewind"]
    assert built.method.granularity == preset.method.granularity
    assert built.method.distribution == preset.method.distribution
    assert (built.how, built.schedule, built.margin, built.decay) == (
        preset.how, preset.schedule, preset.margin, preset.decay
    )  # fmt: skip


def test_what_is_given_goes_before_the_preset():
    given = {"preset": "rigl", "how": "gradual", "sparsity": 0.5, "distribution": "uniform"}
    section = cfg.Prune.model_validate(given)
    assert (section.how, section.distribution.name, section.criterion) == ("gradual", "uniform", "magnitude")


def mine(params, /, **_):
    """A user's criterion."""
    return {name: jnp.ones_like(leaf, dtype=jnp.float32) for name, leaf in params.items()}


def test_a_users_own_answers_are_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "users_own", types.SimpleNamespace(mine=mine, two=jp.Block(2, 2), share=jp.ERK))
    table = {
        "criterion": "users_own:mine", "granularity": "users_own:two", "distribution": "users_own:share",
        "sparsity": 0.5,
    }  # fmt: skip
    made = build.method(cfg.Prune.model_validate(table))
    assert (made.criterion, made.granularity, made.distribution) == (mine, jp.Block(2, 2), jp.ERK())
    for name, message in (("users_own:other", "cannot be imported"), ("nowhere:mine", "No module named"),
                          ("magnitud", 'did you mean "magnitude"')):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            cfg.Prune.model_validate(table | {"criterion": name})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"criterion": "wanda", "how": "gradual"},
            "'wanda' looks at input_norms, which a run that prunes 'gradual' does not have",
        ),
        ({"criterion": "movement"}, "looks at statistics"),
        ({"criterion": "grasp", "how": "gradual"}, "'grasp' looks at hessian_grads"),
    ],
)
def test_evidence_that_a_run_does_not_have_is_asked_for_before_training(table, message):
    with pytest.raises(cfg.ConfigError, match=message):
        build.check(cfg.Prune.model_validate({"sparsity": 0.5, **table}), PARAMS)


# ---------------------------------------------------------------- optimizers


def rates(phase, steps):
    """The learning rate of every step: SGD without momentum on a gradient of ones moves by it."""
    tx = build.optimizer(phase, steps)
    state, moved = tx.init(PARAMS), []
    for _ in range(steps + 2):
        updates, state = tx.update(ONES, state, PARAMS)
        moved.append(-float(updates["a"]["bias"][0]))
    return moved


@pytest.mark.parametrize("steps", [1, 8])
def test_learning_rates_decay_to_zero_at_the_end_of_the_phase(steps):
    t = np.arange(steps + 2)
    left = np.clip(1 - t / steps, 0, 1)
    expected = {"constant": 0.5 + 0 * t, "linear": 0.5 * left, "cosine": 0.25 * (1 - np.cos(np.pi * left))}
    for decay, curve in expected.items():
        phase = cfg.Phase(optimizer="sgd", momentum=0.0, learning_rate=0.5, decay=decay)
        np.testing.assert_allclose(rates(phase, steps), curve, atol=1e-6)


def test_a_phase_of_no_steps_has_an_optimizer():
    for decay in ("constant", "linear", "cosine"):
        build.optimizer(cfg.Phase(decay=decay), 0).init(PARAMS)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_weight_decay_acts_on_matrices_alone(optimizer):
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    phase = cfg.Phase(optimizer=optimizer, learning_rate=0.1, decay="constant", weight_decay=0.01)
    tx = build.optimizer(phase, 10)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    assert np.all(np.asarray(updates["a"]["bias"]) == 0)
    # 2 is the weight: sgd and adamw move by rate * decay * 2; adam by its rate, whatever the size of a gradient
    expected = {"sgd": -0.1 * 0.01 * 2, "adamw": -0.1 * 0.01 * 2, "adam": -0.1}[optimizer]
    np.testing.assert_allclose(updates["a"]["kernel"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "reference"),
    [("sgd", optax.sgd(0.1, momentum=0.7)), ("adam", optax.adam(0.1)), ("adamw", optax.adamw(0.1, weight_decay=0.0))],
)
def test_optimizers_are_those_of_optax(optimizer, reference):
    given = {"momentum": 0.7} if optimizer == "sgd" else {}
    tx = build.optimizer(cfg.Phase(optimizer=optimizer, learning_rate=0.1, decay="constant", **given), 9)
    ours, theirs = (PARAMS, tx.init(PARAMS)), (PARAMS, reference.init(PARAMS))
    for scale in (1.0, -3.0, 0.5):
        grads = jax.tree.map(lambda one, scale=scale: one * scale, ONES)
        (p, s), (q, r) = ours, theirs
        up, s = tx.update(grads, s, p)
        uq, r = reference.update(grads, r, q)
        ours, theirs = (optax.apply_updates(p, up), s), (optax.apply_updates(q, uq), r)
    for a, b in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(theirs[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# ---------------------------------------------------------------- ramps


def updates_of(monkeypatch, prune, per_epoch=10):
    """[(step, sparsity)] of the mask updates that fall within the stage."""
    caught = {}
    monkeypatch.setattr(
        importlib.import_module("jaxprune.training.presets"),
        "prune",
        lambda inner, method, **options: caught.update(options) or inner,
    )
    build.pruning_optimizer(optax.sgd(0.1), prune, per_epoch, None)
    due = [step for step in range(build.prune_steps(prune, per_epoch)) if caught["update_when"](step)]
    return [(step, float(caught["sparsity"](step))) for step in due]


def steps_(n):
    return cfg.Duration(float(n), "steps")


@settings(max_examples=15)
@given(length=st.integers(1, 40), every=st.integers(1, 45), sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.999]))
def test_a_gradual_ramp_ends_at_its_sparsity_inside_the_stage(length, every, sparsity):
    prune = cfg.Prune(how="gradual", sparsity=sparsity, duration=steps_(length), update_every=steps_(every))
    with pytest.MonkeyPatch.context() as patch:
        updates = updates_of(patch, prune)
    assert [step for step, _ in updates] == list(range(0, length, every))
    ramp = [s for _, s in updates]
    assert ramp[-1] == np.float32(sparsity)
    assert ramp == sorted(ramp)
    assert ramp[0] == (np.float32(sparsity) if len(ramp) == 1 else 0)


@given(length=st.integers(1, 3000), sparsity=st.sampled_from([0.5, 0.999]))
def test_a_ramp_without_a_period_has_several_steps_however_short(length, sparsity):
    """Every 100 steps where that is often enough, and else ten times; the last masks are those asked for."""
    prune = cfg.Prune(how="gradual", sparsity=sparsity, duration=steps_(length))
    with pytest.MonkeyPatch.context() as patch:
        updates = updates_of(patch, prune)
    assert len(updates) >= min(length, 10)
    assert updates[-1][1] == np.float32(sparsity)
    assert length < 1000 or [step for step, _ in updates] == list(range(0, length, 100))
    assert build.too_few_updates(prune, 10) == "" or length < 3


@pytest.mark.parametrize("how", ["gradual", "regrow", "splice"])
@pytest.mark.parametrize(("length", "every", "count"), [(100, 100, 1), (10, 200, 1), (200, 100, 2), (201, 100, 3)])
def test_a_period_too_long_for_its_stage_says_so(how, length, every, count):
    prune = cfg.Prune(how=how, sparsity=0.5, duration=steps_(length), update_every=steps_(every))
    said = build.too_few_updates(prune, 10)
    assert (f"masks are computed {count} time(s) in the {length} steps" in said) == (count < 3)
    assert said == "" or said.startswith(f'prune.update_every: with "{every} steps"')
    if how == "gradual":
        with pytest.MonkeyPatch.context() as patch:
            assert len(updates_of(patch, prune)) == count


def test_a_stage_of_two_steps_says_so():
    said = build.too_few_updates(cfg.Prune(how="gradual", sparsity=0.5, duration=steps_(2)), 10)
    assert said.startswith('prune.duration: with "2 steps" masks are computed 2 time(s)')
    assert build.too_few_updates(cfg.Prune(sparsity=0.5), 10) == ""


@settings(max_examples=15)
@given(length=st.integers(1, 20), rounds=st.integers(1, 6), sparsity=st.sampled_from([0.0, 0.5, 0.99]))
def test_every_iterative_round_keeps_the_same_share(length, rounds, sparsity):
    prune = cfg.Prune(how="iterative", sparsity=sparsity, duration=steps_(length), rounds=rounds)
    assert build.prune_steps(prune, 10) == length * rounds
    with pytest.MonkeyPatch.context() as patch:
        updates = updates_of(patch, prune)
    assert [step for step, _ in updates] == [round * length for round in range(rounds)]
    expected = [1 - (1 - sparsity) ** ((round + 1) / rounds) for round in range(rounds)]
    np.testing.assert_allclose([s for _, s in updates], expected, atol=1e-6)
    assert updates[-1][1] == np.float32(sparsity)


@pytest.mark.parametrize("how", ["gradual", "iterative"])
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_the_optimizer_built_arrives_at_the_sparsity(how, sparsity):
    duration = cfg.Duration(0.7, "epochs")  # 7 steps of 10
    options = {"update_every": steps_(3)} if how == "gradual" else {"rounds": 2}
    prune = cfg.Prune(how=how, sparsity=sparsity, duration=duration, **options)
    tx = build.pruning_optimizer(optax.adam(0.01), prune, 10, jax.random.key(0))
    params = {"w": jax.random.normal(jax.random.key(1), (10, 9))}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(build.prune_steps(prune, 10)):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    dead = ~np.asarray(optax.tree.get(state, "masks")["w"])
    assert dead.sum() == round(90 * sparsity)
    assert np.array_equal(np.asarray(params["w"]) == 0, dead)


def test_distributions_that_decide_by_themselves_are_given_no_sparsity(monkeypatch):
    caught = {}
    monkeypatch.setattr(
        importlib.import_module("jaxprune.training.presets"),
        "prune",
        lambda inner, method, **options: caught.update(options) or inner,
    )
    distribution = cfg.Distribution(name="threshold", t=0.1)
    for how in ("gradual", "iterative"):
        build.pruning_optimizer(optax.sgd(0.1), cfg.Prune(how=how, distribution=distribution), 10, None)
        assert caught["sparsity"] is None


def test_stage_lengths():
    assert build.prune_steps(cfg.Prune(sparsity=0.5), 10) == 0
    assert build.prune_steps(cfg.Prune(how="gradual", sparsity=0.5), 10) == 100
    assert build.prune_steps(cfg.Prune(how="iterative", sparsity=0.5), 10) == 500


@pytest.mark.parametrize("how", ["gradual", "iterative"])
@pytest.mark.parametrize("duration", [steps_(0), cfg.Duration(0.01, "epochs")])
def test_a_stage_that_would_prune_nothing_is_refused(how, duration):
    with pytest.raises(cfg.ConfigError, match=rf'prune\.duration: "{duration}" comes to 0 steps, .* {how}'):
        build.prune_steps(cfg.Prune(how=how, sparsity=0.5, duration=duration), 10)


@pytest.mark.parametrize(
    ("prune", "says"),
    [
        ({"sparsity": 0.5, "select": ("nope*",)}, "'nope\\*', which matches no leaf"),
        ({"distribution": {"name": "nm", "n": 2, "m": 7}}, "runs of 7 along the input axis"),
        ({"sparsity": 0.9, "distribution": {"name": "nm", "n": 2, "m": 4}}, "removes at most 0.5"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_training(prune, says):
    params = {"kernel": jnp.ones((10, 4))}
    with pytest.raises(ValueError, match=says):
        build.check(cfg.Prune(**prune), params)
    build.check(cfg.Prune(sparsity=0.5, criterion="taylor"), params)
    build.check(cfg.Prune(sparsity=0.5, criterion="random"), params)


def test_levels_of_rounds():
    """As they are given, each keeping the same share, or a threshold that grows."""
    thirds = cfg.Prune(how="iterative", levels=(0.1, 0.3))
    assert (build.levels(thirds), build.prune_steps(thirds, 10)) == ([0.1, 0.3], 200)
    sigma = {"name": "sigma_threshold", "k": 0.5}
    grown = cfg.Prune.model_validate({"how": "iterative", "distribution": sigma, "growth": 2.0, "rounds": 3})
    assert build.levels(grown) == [
        jp.distributions.SigmaThreshold(0.5),
        jp.distributions.SigmaThreshold(1.0),
        jp.distributions.SigmaThreshold(2.0),
    ]
    assert build.in_rounds(grown, build.method(grown))
    assert build.in_rounds(thirds, build.method(thirds))


def test_a_group_is_pruned_and_trained_alone():
    params = {"a": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "b": {"kernel": jnp.ones((4, 4))}}
    method = build.of_group(jp.Method(), ("a/*",), params)
    masks = jp.compute_masks(method, params, 0.5)
    assert [int(mask.sum()) for mask in jax.tree.leaves(masks)] == [4, 8, 16]
    tx = build.alone(optax.sgd(1.0), ("a/*",), params)
    updates, _ = tx.update(params, tx.init(params), params)
    assert [float(leaf.mean()) for leaf in jax.tree.leaves(updates)] == [-1, -1, 0]
    with pytest.raises(cfg.ConfigError, match=r"prune.groups: no matrix or kernel matches a/bias"):
        build.of_group(jp.Method(), ("a/bias",), params)
    with pytest.raises(ValueError, match="matches no leaf"):
        build.of_group(jp.Method(), ("c/*",), params)


def test_the_prune_stage_trains_as_the_dense_stage_but_for_its_learning_rate(tmp_path):
    text = "name = 'x'\ntrain.weight_decay = 1e-4\nprune = {how = 'iterative', sparsity = 0.5, learning_rate = 0.25}"
    config = cfg.load(write_config(tmp_path, text))
    assert build.pruning_phase(config) == cfg.Phase(weight_decay=1e-4, learning_rate=0.25)
    plain = cfg.load(write_config(tmp_path, text.replace(", learning_rate = 0.25", "")))
    assert build.pruning_phase(plain) is plain.train
    assert cfg.config_hash(plain) != cfg.config_hash(config)
    assert cfg.training_hash(plain) == cfg.training_hash(config)
