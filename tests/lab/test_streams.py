"""ImageNet as TFDS prepares it, with pictures of our own: read as they are needed, cut, trained on, taken up again."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxprune.lab.data import images, sets, streams
from jaxprune.lab.data.files import DataError
from jaxprune.lab.data.samples import samples_of
from jaxprune.lab.recipe import config
from jaxprune.lab.runs import run

TRAIN, TEST, SIDE = 10, 4, 224


def jpeg(width, height, colour):
    """A picture of one colour, with a black column at its left."""
    pixels = np.full((height, width, 3), colour, np.uint8)
    pixels[:, 0] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def colour(label):
    return 20 * label, 255 - 20 * label, 128


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data directory: pictures of several sizes whose colour tells their label."""
    root = tmp_path_factory.mktemp("imagenet")
    with sets.quiet_tfds() as tfds:
        builder = tfds.builder("imagenet2012", data_dir=root, file_format="array_record")

        def examples(count):
            for i in range(count):
                file = jpeg(240 + 40 * i, 300, colour(i))
                yield f"{i}.JPEG", {"file_name": f"{i}.JPEG", "image": file, "label": i}

        builder._split_generators = lambda _: {"train": examples(TRAIN), "validation": examples(TEST)}
        builder._log_download_bytes = builder._log_download_done = lambda: None
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return root


@pytest.fixture(scope="module")
def imagenet(root):
    return sets.load("imagenet2012", root)


def seen_colour(image, label):
    return np.abs(np.asarray(image, float)[SIDE // 2, SIDE // 2] - colour(label)).max() < 6


def test_it_is_like_arrays_and_knows_its_labels(imagenet):
    assert imagenet.train_images.shape == (TRAIN, SIDE, SIDE, 3)
    assert imagenet.train_images.dtype == np.uint8
    assert (imagenet.classes, imagenet.scale) == (1000, 255.0)
    labels = np.asarray(imagenet.train_labels)
    assert sorted(labels.tolist()) == list(range(TRAIN))
    for rows in (slice(2, 5), np.asarray([7, 0]), jnp.asarray([3])):
        numbers = np.arange(TRAIN)[rows if isinstance(rows, slice) else np.asarray(rows)]
        images = imagenet.train_images[rows]
        assert images.shape == (len(numbers), SIDE, SIDE, 3)
        assert all(seen_colour(image, labels[i]) for image, i in zip(images, numbers, strict=True))
    assert imagenet.train_images[:0].shape == (0, SIDE, SIDE, 3)


def test_the_middle_is_seven_eighths_of_the_short_side():
    pixels = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    found = streams.middle(file.getvalue(), SIDE)
    np.testing.assert_array_equal(found[:, :, 0], np.tile(np.arange(16, 240, dtype=np.uint8), (SIDE, 1)))


def test_a_prediction_looks_at_the_same_middle(tmp_path):
    rows, cols = np.meshgrid(np.arange(300), np.arange(400), indexing="ij")
    Image.fromarray(np.stack([rows // 2, cols // 2, cols // 4], 2).astype(np.uint8)).save(tmp_path / "x.png")
    prepared = images.PREPARE["imagenet2012"](images.read(tmp_path / "x.png"), (SIDE, SIDE, 3))
    np.testing.assert_allclose(255 * prepared, streams.middle((tmp_path / "x.png").read_bytes(), SIDE), atol=1.5)


def test_random_parts_lie_inside_and_cover_from_8_to_100_percent():
    """Pixels are coordinates, so that a part tells where it was cut."""
    width, height = 300, 200
    rows, cols = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    file = io.BytesIO()
    Image.fromarray(np.stack([rows, cols // 2, cols % 2], 2).astype(np.uint8)).save(file, "PNG")
    shares, ratios = [], []
    for seed in range(300):
        cut = streams.part(file.getvalue(), 64, np.random.default_rng(seed)).astype(float)
        high, wide = (np.ptp(cut[:, 32, 0]) * 64 / 63, 2 * np.ptp(cut[32, :, 1]) * 64 / 63)
        shares.append(high * wide / (width * height))
        ratios.append(wide / high)
    assert 0.05 < min(shares) < 0.12
    assert 0.8 < max(shares) < 1.03
    assert 0.7 < min(ratios) < 0.85 < 1.2 < max(ratios) < 1.45
    rng = np.random.default_rng(0)  # the paper's distribution, kept where it fits
    area, ratio = rng.uniform(0.08, 1, 100_000), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 100_000))
    size = area * width * height
    fits = (np.sqrt(size * ratio) <= width) & (np.sqrt(size / ratio) <= height)
    np.testing.assert_allclose(np.mean(shares), area[fits].mean(), atol=0.04)


def test_a_picture_too_narrow_for_any_part_gives_its_middle():
    cut = streams.part(jpeg(20, 2000, (9, 90, 200)), 32, np.random.default_rng(0))
    assert np.abs(cut[16, 16].astype(int) - (9, 90, 200)).max() < 6


def never(rows):
    raise AssertionError(f"{rows} were read")


def test_a_split_for_validation_is_not_read(imagenet):
    unread = imagenet._replace(train_images=streams.Images(never, np.arange(TRAIN), SIDE))
    smaller, (images, labels) = sets.split_validation(unread, 0.3, 0)
    assert (len(smaller.train_images), len(images), len(labels)) == (7, 3, 3)
    assert sorted([*smaller.train_images.rows, *images.rows]) == list(range(TRAIN))
    assert sorted([*np.asarray(smaller.train_labels), *np.asarray(labels)]) == list(range(TRAIN))


def test_steps_are_given_their_batches_whatever_was_done_before(imagenet):
    samples = samples_of(imagenet.train_images, imagenet.train_labels, imagenet.scale)
    key, order = jax.random.key(3), jnp.asarray(np.random.default_rng(0).permutation(TRAIN))

    def seen(steps):
        for step, (given, places) in zip(steps, streams.batches(samples, key, order, steps, 3), strict=True):
            rows = places[step % 3 * 3 :][:3]
            yield np.asarray(given.images)[np.asarray(rows)], np.asarray(given.labels)[np.asarray(rows)]

    whole = list(seen(range(3, 6)))
    for step, (pixels, labels) in enumerate(whole):
        expected = np.asarray(imagenet.train_labels)[np.asarray(order)[3 * step :][:3]]
        np.testing.assert_array_equal(labels, expected)
        assert all(seen_colour(image, label) for image, label in zip(pixels, labels, strict=True))
    for again, before in zip(seen(range(4, 6)), whole[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, again, before)


def test_held_samples_are_the_first(imagenet):
    samples = samples_of(imagenet.train_images, imagenet.train_labels, imagenet.scale)
    first = streams.held(samples, 3)
    assert isinstance(first.images, jax.Array)
    np.testing.assert_array_equal(first.images, imagenet.train_images[:3])
    assert streams.held(first, 2) is first


def test_a_damaged_picture_is_told():
    with pytest.raises(DataError, match="cannot be decoded"):
        streams.middle(jpeg(100, 100, (1, 2, 3))[:500], SIDE)


def test_a_set_that_is_not_there_says_how_to_prepare_it(tmp_path):
    with pytest.raises(DataError, match=r"array_record.*image-net\.org"):
        sets.load("imagenet2012", tmp_path)


@pytest.mark.usefixtures("relaxed", "quick")
def test_an_experiment_trains_on_it_to_the_same_digits(root, tmp_path):
    """The recipes' shape, with a small network: train, prune step by step, fine-tune, store; twice."""
    (tmp_path / "x.toml").write_text(f"""
        name = "x"
        data = {{ name = "imagenet2012", data_dir = "{root}", validation = 0.2, flip = true }}
        model = {{ name = "mlp", widths = [4] }}
        train = {{ duration = "2 epochs", batch_size = 4 }}
        prune = {{ how = "gradual", sparsity = 0.5, duration = "2 epochs", update_every = "1 steps" }}
        finetune = {{ duration = "1 epoch", batch_size = 4 }}
    """)
    given = config.load(tmp_path / "x.toml")
    one, two = (run.run(given, tmp_path / name, "a command") for name in ("one", "two"))
    assert one["dataset"] == {"name": "imagenet2012", "train": 8, "validation": 2, "test": TEST}
    assert (one["accuracy"], one["sparsity"]["mean"]) == (two["accuracy"], pytest.approx(0.5, abs=0.01))
    assert one["sparse"]["agreement"]["values"] == [1.0]
