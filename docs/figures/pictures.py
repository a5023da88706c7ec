"""The site's pictures, drawn from masks and measured results.

    python docs/figures/pictures.py

SVG that is set into the page, so that text and lines take the page's colour, light or dark.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune.lab.report import curves

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parents[1] / "experiments" / "results"
ALIVE, SECOND = "#2f81d6", "#d9822b"  # readable on white and on near black
CELL = 12


def svg(width, height, title, parts):
    """A picture; the title is read aloud."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}"'
    style = f'width="{width}" height="{height}" font-size="11" fill="currentColor"'
    return "\n".join([f"{head} {style}>", *parts, "</svg>"])


def text(x, y, words, anchor="middle", **more):
    """Words at a place."""
    rest = "".join(
        f' {name.replace("_", "-")}="{value}"' for name, value in more.items()
    )
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{rest}>{words}</text>'


def grid(x, y, shades, cell=CELL):
    """Squares, each as opaque as its number between 0 and 1; an empty one shows its frame alone."""
    parts = [
        f'<g fill="{ALIVE}" stroke="currentColor" stroke-opacity="0.25" stroke-width="0.5">'
    ]
    for row, line in enumerate(shades):
        for col, shade in enumerate(line):
            place = f'd="M{x + col * cell:g} {y + row * cell:g}h{cell - 1}v{cell - 1}h-{cell - 1}z"'
            parts.append(f'<path {place} fill-opacity="{shade:.2g}"/>')
    return [*parts, "</g>"]


def arrow(x, y, words):
    """An arrow between two grids, with a name above it."""
    line = f'<path d="M{x} {y} h28 m-5 -4 l5 4 l-5 4" fill="none" stroke="currentColor" stroke-width="1.2"/>'
    return [line, text(x + 14, y - 8, words, font_size=8.5)]


def weights():
    """Eight inputs, eight outputs."""
    return np.random.default_rng(3).normal(size=(8, 8)).astype(np.float32)


def masks(**answers):
    """What a method leaves of them at half."""
    found = jp.compute_masks(
        jp.Method(**answers), {"kernel": jnp.asarray(weights())}, 0.5
    )
    return np.asarray(found["kernel"]).astype(float)


def method():
    """Weights, scores, groups, verdicts, masks: a picture each, with an arrow before it."""
    scores = np.abs(weights())
    tiles = scores.reshape(4, 2, 4, 2).mean((1, 3))
    alive = masks(granularity=jp.Block(2, 2))
    steps = [
        ("weights", 0.15 + 0.85 * scores / scores.max(), CELL, ""),
        ("scores", scores / scores.max(), CELL, "criterion"),
        ("groups", tiles / tiles.max(), 2 * CELL, "pool"),
        ("verdicts", alive[::2, ::2], 2 * CELL, "distribution"),
        ("masks", alive, CELL, "expand"),
    ]
    side = 8 * CELL
    pictures = []
    for name, shades, cell, verb in steps:
        x = 54 if verb else 2
        parts = [
            *(arrow(12, 20 + side / 2, verb) if verb else []),
            text(x + side / 2, 12, name),
        ]
        pictures.append(
            svg(x + side + 2, side + 24, name, [*parts, *grid(x, 20, shades, cell)])
        )
    return pictures


def granularities():
    """Four masks of one matrix."""
    cases = {
        "Element()": masks(),
        "Block(2, 2)": masks(granularity=jp.Block(2, 2)),
        "NM(2, 4)": masks(distribution=jp.NM(2, 4)),
        "Output()": masks(granularity=jp.Output()),
    }
    side = 8 * CELL
    return [
        svg(
            side + 30,
            side + 24,
            name,
            [text(side / 2, 12, name, font_family="monospace"), *grid(0, 20, alive)],
        )
        for name, alive in cases.items()
    ]


def panel(x, y, width, height, title, ticks, low, high, unit):
    """Axes over the removed fraction; returns the parts, and the function to places."""

    def place(removed, value):
        return x + width * removed, y + height * (1 - (value - low) / (high - low))

    parts = [text(x, y - 12, title, anchor="start", font_weight="bold")]
    for tick in ticks:
        _, at = place(0, tick)
        parts.append(
            f'<path d="M{x} {at:.1f} h{width}" stroke="currentColor" stroke-opacity="0.2"/>'
        )
        parts.append(text(x - 6, at + 4, f"{tick:g}{unit}", anchor="end"))
    for removed in (0, 0.25, 0.5, 0.75, 1):
        parts.append(text(x + width * removed, y + height + 16, f"{100 * removed:g} %"))
    return [
        *parts,
        text(x + width / 2, y + height + 32, "of the weights removed"),
    ], place


def line(places, colour):
    """A line with dots."""
    path = " L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dots = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>'
        for x, y in places
    ]
    return [
        f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>',
        *dots,
    ]


def speed_and_accuracy():
    """The CNN of the TensorFlow tutorial, its second convolution and dense layers pruned in rounds (S0)."""
    point = json.loads((RESULTS / "s0_tf_tutorial_cnn.json").read_text())["points"][1]
    accuracy = [
        (level.removed, 100 * np.mean(level.accuracy)) for level in curves.levels(point)
    ]
    dense = 100 * point["accuracy"]["dense"]["mean"]
    rows = [
        json.loads(row)
        for row in (RESULTS / "s0_latency_conv2.jsonl").read_text().splitlines()
    ]
    x, y, width, height = 48, 30, 250, 150
    parts, place = panel(
        x,
        y,
        width,
        height,
        "Test accuracy on MNIST",
        (98, 98.5, 99, 99.5),
        98,
        99.6,
        " %",
    )
    at = place(0, dense)[1]
    parts.append(
        f'<path d="M{x} {at:.1f} h{width}" stroke="currentColor" stroke-dasharray="4 3"/>'
    )
    parts.append(text(x + 6, at + 16, f"dense: {dense:.2f} %", anchor="start"))
    left = svg(
        320,
        226,
        "Accuracy over the weights removed",
        [*parts, *line([place(*one) for one in accuracy], ALIVE)],
    )
    parts, place = panel(
        x, y, width, height, "Times faster than dense", (1, 2, 3, 4), 0.5, 4.6, ""
    )
    for colour, batch, name in ((SECOND, 1, "one image"), (ALIVE, 64, "64 images")):
        found = [
            row for row in rows if row["contestant"] == "tune" and row["batch"] == batch
        ]
        places = [place(row["sparsity"], row["ratio"]) for row in found]
        away = 10 if batch > 1 else 24
        parts += line(places, colour)
        parts.append(
            text(
                places[-1][0] - away,
                places[-1][1] + 4,
                name,
                anchor="end",
                style=f"fill: {colour}",
            )
        )
    return [left, svg(320, 226, "Speed over the weights removed", parts)]


PICTURES = {
    "method": method,
    "granularities": granularities,
    "speed": speed_and_accuracy,
}


def for_the_readme():
    """Speed and accuracy side by side, in colours of its own, since an image knows nothing of its page."""
    left, right = speed_and_accuracy()
    right = right.replace("<svg ", '<svg x="320" ', 1)
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 226" width="640" height="226"'
    style = 'font-family="sans-serif" color="#222"'
    return "\n".join(
        [
            f"{head} {style}>",
            '<path fill="#fff" d="M0 0h640v226H0z"/>',
            left,
            right,
            "</svg>",
            "",
        ]
    )


def draw(name):
    """One of them, as a part of a page."""
    return "\n".join(['<div class="pictures">', *PICTURES[name](), "</div>", ""])


if __name__ == "__main__":
    for name in PICTURES:
        (FOLDER / f"{name}.html").write_text(draw(name))
    (FOLDER / "speed.svg").write_text(for_the_readme())
