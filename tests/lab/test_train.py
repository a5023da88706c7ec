"""A stage of training: what NumPy says it should be, the same bits however often it is stopped, nothing fetched."""

import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.array import ArrayImpl
from lab_helpers import Stopped, arrays_of, bits, checkpoints

import jaxprune as jp
from jaxprune import tree
from jaxprune.lab import models
from jaxprune.lab.checkpoints import checkpoint
from jaxprune.lab.data import samples as lab_samples
from jaxprune.lab.models import parts
from jaxprune.lab.recipe.config import Model
from jaxprune.lab.runs import train

pytestmark = pytest.mark.usefixtures("relaxed", "quick")  # optax itself promotes: decay ** count


N, SIDE, CLASSES = 23, 3, 4
PARAMS = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(SIDE**2, CLASSES)), jnp.float32)}
PARAMS["bias"] = jnp.zeros((CLASSES,))


def apply(params, images, key=None):
    """Softmax regression, with a noise that only a key switches on."""
    logits = images.reshape(images.shape[0], -1) @ params["kernel"] + params["bias"]
    return logits if key is None else logits * jax.random.bernoulli(key, 0.9, logits.shape)


def plain(params, images, key=None):
    return apply(params, images)


def samples(n=N, seed=1):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n).astype(np.int32)
    images = rng.integers(0, 8, (n, SIDE, SIDE, 1)).astype(np.uint8)
    images[np.arange(n), 0, labels % SIDE] += 8
    return lab_samples.Samples(jnp.asarray(images), jnp.asarray(labels), jnp.float32(16))


def stage(**changes):
    """5 steps an epoch (3 samples of 23 left over), 17 steps: the last epoch is cut short, saves fall within epochs."""
    settings = {
        "name": "train", "tx": optax.adam(0.05), "steps": 17, "batch_size": 4, "steps_per_epoch": 5, "save_every": 4,
        "keep": 2, "key": jax.random.key(7),
    }  # fmt: skip
    return train.Stage(**(settings | changes))


def pruning():
    method = jp.Method(criterion=jp.criteria.random)
    return jp.prune(
        optax.adam(0.05), method, sparsity=jp.cubic(0.5, begin=0, end=12), update_when=jp.every(3),
        key=jax.random.key(3),
    )  # fmt: skip


def go(stage, folder, fn=apply, params=PARAMS, data=None, **told):
    data = samples() if data is None else data
    told = {"validate": lambda params: None} | told
    return train.run_stage(stage, fn, train.start(params, stage.tx), data, folder, **told)


def untimed(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


# ---------------------------------------------------------------- what a stage computes


def by_hand(stage, data, rate):
    """Softmax regression by plain SGD in NumPy: (kernel, bias, mean loss of every epoch)."""
    kernel, bias = np.asarray(PARAMS["kernel"], np.float64), np.zeros(CLASSES)
    x = np.asarray(data.images, np.float64).reshape(N, -1) / 16
    y, losses = np.asarray(data.labels), []
    for step in range(stage.steps):
        epoch, within = divmod(step, stage.steps_per_epoch)
        order = np.asarray(train.epoch_order(stage.key, N, jnp.int32(epoch)))
        rows = order[within * stage.batch_size :][: stage.batch_size]
        z = x[rows] @ kernel + bias
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        losses.append(-np.mean(np.log(p[np.arange(len(rows)), y[rows]])))
        error = (p - np.eye(CLASSES)[y[rows]]) / len(rows)
        kernel, bias = kernel - rate * x[rows].T @ error, bias - rate * error.sum(0)
    epochs = range(0, stage.steps, stage.steps_per_epoch)
    return kernel, bias, [float(np.mean(losses[i : i + stage.steps_per_epoch])) for i in epochs]


def test_a_stage_is_the_loop_it_stands_for(tmp_path):
    given, data = stage(tx=optax.sgd(0.3)), samples()
    done = go(given, tmp_path, fn=plain, data=data)
    kernel, bias, losses = by_hand(given, data, 0.3)
    np.testing.assert_allclose(done.state.params["kernel"], kernel, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(done.state.params["bias"], bias, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([record["loss"] for record in done.records], losses, rtol=1e-4)
    assert [record["step"] for record in done.records] == [5, 10, 15, 17]
    assert [record["epoch"] for record in done.records] == [1, 2, 3, 17 / 5]
    assert int(done.state.step) == 17
    assert done.damaged == []


@pytest.mark.parametrize("most", [1, 2])
def test_images_are_moved_by_all_ways_alike(most):
    images = np.random.default_rng(0).integers(1, 256, (2000, SIDE, SIDE, 2)).astype(np.uint8)
    moved = lab_samples.shifted(jnp.asarray(images), jax.random.key(0), most)
    assert (moved.shape, moved.dtype) == (images.shape, jnp.uint8)
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    side = 2 * most + 1
    ways = np.stack([padded[:, y : y + SIDE, x : x + SIDE] for y in range(side) for x in range(side)], axis=1)
    same = (ways == np.asarray(moved)[:, None]).all((2, 3, 4))
    assert (same.sum(1) == 1).all()  # every image is one of its crops
    np.testing.assert_allclose(same.mean(0), 1 / side**2, atol=4 * np.sqrt(1 / side**2 / 2000))


def test_a_stage_moves_what_it_trains_on(tmp_path):
    seen = {}
    for shift in (0, 1):
        done = go(stage(tx=optax.sgd(0.0), shift=shift), tmp_path / str(shift), fn=plain)
        seen[shift] = [record["loss"] for record in done.records]
    assert not set(seen[0]) & set(seen[1])


def test_it_learns(tmp_path):
    done = go(stage(tx=optax.adam(0.1), steps=150, save_every=1000), tmp_path, fn=plain, data=samples(20))
    assert done.records[-1]["train_accuracy"] > done.records[0]["train_accuracy"] + 0.2
    assert done.records[-1]["loss"] < done.records[0]["loss"] / 2


def test_orders_are_permutations_and_differ():
    orders = [np.asarray(train.epoch_order(jax.random.key(seed), N, jnp.int32(e))) for seed in (0, 1) for e in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(N))
    assert len({tuple(order.tolist()) for order in orders}) == 6
    assert np.array_equal(orders[4], train.epoch_order(jax.random.key(1), N, jnp.int32(1)))


def test_the_same_key_gives_the_same_result_and_another_another(tmp_path):
    one, same = (go(stage(), tmp_path / name) for name in "ab")
    other = go(stage(key=jax.random.key(8)), tmp_path / "c")
    assert bits(one.state) == bits(same.state)
    assert untimed(one.records) == untimed(same.records)
    assert bits(one.state.params) != bits(other.state.params)


def test_the_callers_state_is_left_alone(tmp_path):
    given = stage(tx=pruning())
    before = train.start(PARAMS, given.tx)
    copy = bits(before.params)
    train.run_stage(given, apply, before, samples(), tmp_path, validate=lambda params: None)
    assert bits(before.params) == copy == bits(PARAMS)


def test_records_tell_validation_and_sparsity(tmp_path):
    data, seen = samples(), []

    def validate(params):
        return train.accuracy(train.predict(jax.jit(apply), params, data), data)

    done = go(stage(tx=pruning(), selected=["kernel"]), tmp_path, validate=validate, on_record=seen.append)
    assert untimed(seen) == untimed(done.records)
    dead = ~np.asarray(train.masks_of(done.state)["kernel"])
    assert dead.sum() == SIDE**2 * CLASSES // 2
    assert np.array_equal(np.asarray(done.state.params["kernel"]) == 0, dead)
    assert done.records[-1]["sparsity"] == pytest.approx(0.5)
    assert done.records[-1]["validation_accuracy"] == validate(done.state.params)
    assert [record["sparsity"] for record in done.records] == sorted(record["sparsity"] for record in done.records)


def test_predictions_come_in_chunks_and_are_those_of_the_whole(monkeypatch):
    data = samples()
    whole = np.argmax(np.asarray(apply(PARAMS, lab_samples.scaled(data, data.images))), -1)
    for chunk in (1, 7, N, 100):
        monkeypatch.setattr(train, "CHUNK", chunk)
        assert np.array_equal(train.predict(apply, PARAMS, data), whole)
    assert train.predict(apply, PARAMS, samples(0)).shape == (0,)
    assert train.accuracy(whole, data) == np.mean(whole == np.asarray(data.labels))


def test_a_stage_of_no_steps_is_a_checkpoint_and_a_look(tmp_path):
    given = stage(steps=0, tx=jp.keep_params_sparse(jax.tree.map(lambda p: p > 0.3, PARAMS)))
    first, again = go(given, tmp_path), go(given, tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["00000000"]
    assert bits(first.state) == bits(again.state)
    assert bits(first.state.params) == bits(PARAMS)
    assert first.records == again.records
    data = samples()
    right = train.accuracy(train.predict(apply, PARAMS, data), data)
    assert first.records[0]["train_accuracy"] == pytest.approx(right)
    assert first.records[0]["step"] == 0


# ---------------------------------------------------------------- stopped and taken up again


def test_checkpoints_fall_within_epochs_and_the_last_is_the_end(tmp_path):
    done = go(stage(keep=9), tmp_path)
    assert [int(path.name) for path in checkpoints(tmp_path)] == [4, 8, 12, 16, 17]
    assert int(arrays_of(checkpoints(tmp_path)[-1])["step"]) == 17
    found, _ = checkpoint.restore_latest(tmp_path, done.state)
    assert bits(found.state) == bits(done.state)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return {name: go(stage(tx=tx(), shift=1), tmp_path_factory.mktemp(name)) for name, tx in OPTIMIZERS.items()}


OPTIMIZERS = {"adam": lambda: optax.adam(0.05), "prune": pruning}


def stop_at(step):
    """Options of `run_stage` that end it after a step was handed to the device, or at a step's record."""

    def on_step(now):
        if now == step:
            raise Stopped

    def on_record(record):
        if record["step"] == -step:
            raise Stopped

    return {"on_step": on_step, "on_record": on_record}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("draw", range(2))
def test_stopped_anywhere_it_ends_bit_identical(tmp_path, uninterrupted, name, draw):
    rng = random.Random(f"{name} {draw}")
    given = stage(tx=OPTIMIZERS[name](), shift=1, keep=rng.choice([1, 2, 9]))
    # three steps in ascending order, or, negative, the records of three epochs
    stops = [sorted(rng.sample(range(1, 18), 3)), [-5, -10, -17]][draw]
    for step in stops:
        with pytest.raises(Stopped):
            go(given, tmp_path, **stop_at(step))
    done = go(given, tmp_path)
    assert bits(done.state) == bits(uninterrupted[name].state)
    assert untimed(done.records) == untimed(uninterrupted[name].records)


@pytest.fixture(scope="module")
def every_checkpoint(tmp_path_factory):
    """A pruning of which all checkpoints are there; not to be changed."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        go(stage(tx=pruning(), shift=1, keep=9), folder := tmp_path_factory.mktemp("every_checkpoint"))
    return folder


@pytest.mark.parametrize("kept", range(5))
def test_taken_up_from_any_checkpoint_it_ends_bit_identical(tmp_path, uninterrupted, every_checkpoint, kept):
    given = stage(tx=pruning(), shift=1, keep=9)
    shutil.copytree(every_checkpoint, tmp_path, dirs_exist_ok=True)
    for path in checkpoints(tmp_path)[kept:]:
        (path / "manifest.json").write_bytes(b"")  # damaged
    if not kept:
        with pytest.raises(checkpoint.CheckpointError, match="No checkpoint"):
            go(given, tmp_path)
        return
    steps = []
    done = go(given, tmp_path, on_step=steps.append)
    assert steps[0] == [4, 8, 12, 16][kept - 1] + 1
    assert len(done.damaged) == 5 - kept
    assert bits(done.state) == bits(uninterrupted["prune"].state)
    assert untimed(done.records) == untimed(uninterrupted["prune"].records)


def test_a_finished_stage_takes_no_step(tmp_path):
    first = go(stage(), tmp_path)
    steps, seen = [], []
    again = go(stage(), tmp_path, on_step=steps.append, on_record=seen.append)
    assert steps == []
    assert seen == again.records == first.records
    assert bits(again.state) == bits(first.state)


# ---------------------------------------------------------------- losses that are not finite


def blows_up_at(step):
    """Adds infinity to the weights at a step, so that the loss of the next is not finite; one program for all steps."""

    def update(updates, steps_left, params=None):
        bad = jnp.where(steps_left == 0, jnp.inf, 0.0)
        return jax.tree.map(lambda u: u + bad, updates), steps_left - 1

    return optax.chain(optax.sgd(0.1), optax.GradientTransformation(lambda p: jnp.asarray(step, jnp.int32), update))


@pytest.mark.parametrize("step", [1, 6, 10, 13, 15])
def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path, step):
    """`step` is the first bad one, counted from 1; saves come after 4, 8, 12, epochs end after 5, 10, 15."""
    given = stage(tx=blows_up_at(step - 2) if step > 1 else optax.sgd(0.1), keep=9)
    params = PARAMS if step > 1 else {**PARAMS, "bias": PARAMS["bias"] * jnp.nan}
    for _ in range(2):  # and the same again, from the checkpoint
        with pytest.raises(train.TrainingError, match=rf"not finite at step {step} of stage 'train'.*train.learning"):
            go(given, tmp_path, params=params)
    kept = [int(path.name) for path in checkpoints(tmp_path)]
    assert kept == [saved for saved in (4, 8, 12) if saved < step]
    for path in checkpoints(tmp_path):
        arrays = arrays_of(path)
        assert arrays["tally/bad_step"] == -1
        assert all(np.all(np.isfinite(arrays[f"params/{name}"])) for name in PARAMS) or int(path.name) == step - 1


def test_a_huge_learning_rate_diverges_and_says_so(tmp_path):
    given = stage(name="finetune", tx=optax.sgd(1e38, momentum=0.9), steps=40)
    with pytest.raises(train.TrainingError, match=r"step \d+ of stage 'finetune'\. Lower finetune\.learning_rate"):
        go(given, tmp_path)


# ---------------------------------------------------------------- speed


@pytest.fixture
def fetches(monkeypatch):
    """Reasons why the host waited for the device: every way from an array to Python goes through one of these."""
    seen = []

    def spy(name):
        real = getattr(ArrayImpl, name)
        if isinstance(real, property):
            return property(lambda self: seen.append(name) or real.fget(self))
        return lambda self, *args, **kwargs: seen.append(name) or real(self, *args, **kwargs)

    for name in ("_value", "__array__", "__int__", "__float__", "__bool__", "__index__", "item", "tolist",
                 "block_until_ready"):  # fmt: skip
        monkeypatch.setattr(ArrayImpl, name, spy(name))
    for name in ("asarray", "array"):  # these read the buffer itself
        real = getattr(np, name)
        monkeypatch.setattr(
            np, name, lambda x, *a, real=real, **k: (isinstance(x, jax.Array) and seen.append(x)) or real(x, *a, **k)
        )
    return seen


def test_the_spy_sees_every_way_to_the_host(fetches):
    x = jnp.arange(3.0)
    ways = [
        lambda: float(x[0]), lambda: int(x[0]), lambda: bool(x[0]), lambda: np.asarray(x), lambda: x.tolist(),
        lambda: x[0].item(), lambda: jax.device_get(x), lambda: x.block_until_ready(), lambda: jax.block_until_ready(x),
    ]  # fmt: skip
    for i, way in enumerate(ways):
        fetches.clear()
        way()
        assert fetches, i


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_is_fetched_within_an_epoch(tmp_path, fetches, name):
    given, counts = stage(tx=OPTIMIZERS[name](), steps=15, save_every=100), {}
    go(given, tmp_path, on_step=lambda step: counts.update({step: len(fetches)}))
    for epoch in range(3):
        within = [counts[step] for step in range(epoch * 5 + 1, epoch * 5 + 6)]
        assert len(set(within)) == 1, (epoch, fetches[within[0] : within[-1]])
    assert counts[6] > counts[5]  # it is at the end of an epoch that losses are looked at


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_compile_a_stage_also_when_taken_up(tmp_path, monkeypatch, name):
    made, make = [], train.make_step

    def make_step(*args):
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(train, "make_step", make_step)
    given = stage(tx=OPTIMIZERS[name]())
    with pytest.raises(Stopped):
        go(given, tmp_path, **stop_at(11))
    go(given, tmp_path)
    assert [step._cache_size() for step in made] == [1, 1]


def test_the_loss_with_a_teacher_is_the_papers():
    """(1 - a) cross-entropy + a T^2 KL(teacher || student), softened by T, in NumPy."""
    data, share, temperature = samples(), 0.7, 3.0
    teacher = jax.tree.map(lambda leaf: leaf * 2 + 0.1, PARAMS)
    given = train.Teacher(plain, teacher, share, temperature)
    loss, _ = train.mean_loss(plain, PARAMS, data, jnp.arange(N), None, teacher=given)

    def log_softmax(z):
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    x = np.asarray(data.images, np.float64).reshape(N, -1) / 16
    ours, theirs = (x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"]) for p in (PARAMS, teacher))
    hard = -log_softmax(ours)[np.arange(N), np.asarray(data.labels)].mean()
    p, q = log_softmax(theirs / temperature), log_softmax(ours / temperature)
    soft = temperature**2 * (np.exp(p) * (p - q)).sum(1).mean()
    np.testing.assert_allclose(loss, (1 - share) * hard + share * soft, rtol=1e-5)


def test_a_teacher_teaches_and_is_left_as_it_is(tmp_path):
    teacher = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(5).normal(size=leaf.shape), leaf.dtype), PARAMS
    )
    before = jax.tree.map(np.asarray, teacher)
    taught = stage(teacher=train.Teacher(plain, teacher, 0.99, 1.0), steps=60, save_every=60)
    params = go(taught, tmp_path / "a", plain).state.params
    alone = go(stage(steps=60, save_every=60), tmp_path / "b", plain).state.params
    x = lab_samples.scaled(samples(), samples().images)
    far = [float(jp.distillation_loss(plain(p, x), plain(teacher, x))) for p in (params, alone)]
    assert far[0] < 0.5 * far[1]
    jax.tree.map(np.testing.assert_array_equal, teacher, before)


def test_mirrored_images_are_every_other_one_and_keep_their_rows(tmp_path):
    images = jax.random.randint(jax.random.key(0), (400, 3, 4, 2), 0, 256).astype(jnp.uint8)
    found = np.asarray(lab_samples.mirrored(images, jax.random.key(1)))
    turned = np.asarray([np.array_equal(a, b[:, ::-1]) for a, b in zip(found, np.asarray(images), strict=True)])
    same = np.asarray([np.array_equal(a, b) for a, b in zip(found, np.asarray(images), strict=True)])
    assert np.all(turned ^ same)
    assert 150 < turned.sum() < 250
    odd = samples()
    odd = odd._replace(images=odd.images * jnp.arange(3, dtype=jnp.uint8).reshape(1, 1, 3, 1))
    plainly, turned = (go(stage(flip=flip, steps=2), tmp_path / str(flip), plain, data=odd) for flip in (False, True))
    assert bits(plainly.state.params) != bits(turned.state.params)


# ---------------------------------------------------------------- batch norm


def normed(params, x):
    return parts.affine(params["fc"], parts.batch_norm(params["bn"], x.reshape(x.shape[0], -1), 1e-5))


NORMED = {
    "bn": {"scale": jnp.full(9, 1.5), "bias": jnp.full(9, 0.1), "mean": jnp.full(9, 0.3), "var": jnp.full(9, 2.0)},
    "fc": PARAMS,
}


def test_batch_norms_in_training_use_the_batch_and_their_statistics_follow():
    x = lab_samples.scaled(samples(), samples().images)
    logits, seen = parts.observed(normed)(NORMED, x)
    flat = np.asarray(x, np.float64).reshape(N, -1)
    mean, var = flat.mean(0), flat.var(0)
    np.testing.assert_allclose(seen["bn/mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(seen["bn/var"], var, rtol=1e-5)
    hidden = (flat - mean) / np.sqrt(var + 1e-5) * 1.5 + 0.1
    np.testing.assert_allclose(logits, hidden @ np.asarray(PARAMS["kernel"], np.float64), rtol=1e-4, atol=1e-4)
    followed = parts.followed(NORMED, seen, momentum=0.75)
    np.testing.assert_allclose(followed["bn"]["var"], 0.75 * 2 + 0.25 * var, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, followed["fc"], NORMED["fc"])


def test_a_stage_with_batch_norms_ends_at_the_statistics_of_its_batches(tmp_path):
    """Each step moves them by a tenth; what is pruned stays zero, and validation uses them."""
    masks = jp.compute_masks(jp.Method(select=["fc/kernel"]), NORMED, 0.5)
    tx = optax.chain(optax.adam(0.05), jp.keep_params_sparse(masks))
    start = jp.apply_masks(NORMED, masks)
    whole = stage(tx=tx, batch_size=N, steps_per_epoch=1, steps=3, save_every=1)
    state = go(whole, tmp_path / "a", lambda params, x, key=None: parts.observed(normed)(params, x), start).state
    mean = np.asarray(lab_samples.scaled(samples(), samples().images), np.float64).reshape(N, -1).mean(0)
    np.testing.assert_allclose(state.params["bn"]["mean"], 0.9**3 * 0.3 + (1 - 0.9**3) * mean, rtol=1e-4)
    assert not np.any(np.asarray(state.params["fc"]["kernel"])[~np.asarray(masks["fc"]["kernel"])])
    assert np.any(state.params["bn"]["scale"] != 1.5)


def test_larger_networks_begin_as_they_should():
    network = models.build(Model(name="resnet20"), jax.random.key(0), (32, 32, 3), 10)
    leaves = tree.named_leaves(network.params)
    assert sum(leaf.size for leaf in leaves.values()) == 269_722 + 2 * 688  # the paper's 0.27 M, and statistics
    assert {float(leaf[0]) for name, leaf in leaves.items() if name.endswith(("scale", "var"))} == {1.0}
    assert {float(leaf[0]) for name, leaf in leaves.items() if name.endswith(("bias", "mean"))} == {0.0}
    assert network.observe is not None
    assert models.shapes(Model(name="cifar_vgg19"), (32, 32, 3), 10).observe is None
