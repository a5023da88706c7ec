"""The pretrained ResNet-50 pruned in one shot to per-layer profiles: costs, answers to 20 photographs, latency.

    python experiments/benchmarks/resnet50_profiles.py FOLDER --out experiments/results/s3_resnet50.json

Some minutes; nothing else should run meanwhile. FOLDER holds resnet50/ and imagenet_samples/, as for the tests. Weights
go by magnitude, in each layer as many as the profile says, and nothing is trained afterwards: the photographs tell what
one shot costs, not what the profiles are worth after training. INT8 is of weights and activations, simulated exactly,
its ranges found on the first four photographs. Times are medians, of the dense model and the native kernels in turns.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
import photographs

import jaxprune as jp
from jaxprune.lab.bench import contest, sparsify
from jaxprune.lab.commands import costs
from jaxprune.lab.runs import machine
from jaxprune.quantize.int8 import calibrate, int8
from jaxprune.sparse.tuning import timing

HERE = Path(__file__).parent
CALIBRATION = 4
COLUMNS = ("profile", *costs.HEADER[1:], "top-1, one shot", "INT8")


def pruned(params: dict, counts: dict[str, int]) -> dict:
    """Params with so many weights left in each leaf, the largest."""
    sizes = {name: params[name.removesuffix("/kernel")]["kernel"].size for name in counts}
    rules = tuple((name, 1 - left / sizes[name]) for name, left in counts.items())
    method = jp.Method(jp.magnitude, distribution=jp.distributions.ByRule(rules), select=tuple(counts))
    return jp.apply_masks(params, jp.compute_masks(method, params))


def answers(apply, params, images) -> np.ndarray:
    """Classes of the photographs."""
    return np.asarray(jax.jit(apply)(params, images).argmax(-1))


def latency(apply, params, images, seconds: float) -> str:
    """Milliseconds dense and native, and how many times faster that is."""
    results = contest.run(apply, contest.enter(params, ("native",)), images, seconds=seconds)
    dense, native = (timing.spread(results[name].runs).median for name in ("dense", "native"))
    return f"{dense:.3g} / {native:.3g} ms ({dense / native:.2f}x)"


def main() -> None:
    """Measure every column of the profile, and write the rows."""
    parser = argparse.ArgumentParser(description="The pretrained ResNet-50 under per-layer profiles.")
    parser.add_argument("folder", type=Path, help="of resnet50/ and imagenet_samples/")
    parser.add_argument("--profile", default=str(HERE / "profiles" / "resnet50.csv"), help="csv of non-zeros")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, for each batch")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model, params, images, truth = photographs.load(given.folder)
    known, rows = costs.of_model("resnet50", given.profile), []
    for column, cost in {"dense": known.dense, **known.profiles}.items():
        counts = sparsify.profile_counts(params, sparsify.read_profile(f"{given.profile}:{column}")) if rows else {}
        small = pruned(params, counts) if rows else params
        ranges = calibrate(model.apply, small, [images[:CALIBRATION]])
        right = [np.sum(answers(f, small, images) == truth) for f in (model.apply, int8(model.apply, ranges))]
        times = [latency(model.apply, small, images[:batch], given.seconds) for batch in given.batches]
        rows.append([*costs.total(column, cost), *(f"{count} of {len(truth)}" for count in right), *times])
        print(" | ".join(rows[-1]), flush=True)
    found = {
        "name": "s3_resnet50",
        "command": "python experiments/benchmarks/resnet50_profiles.py FOLDER --out FILE",
        "machine": machine.describe(),
        "columns": [*COLUMNS, *(f"batch {batch}, dense / native" for batch in given.batches)],
        "rows": rows,
    }
    given.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
