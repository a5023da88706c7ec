"""What else multiplies sparse matrices in this process: SciPy and PyTorch, where they are installed.

    Y = relu(W X),   W (out, in) in CSR, X (in, batch)

Their activations are columns from first to last, which is what their products want: they pay for no transposes.
Neither is a dependency; what is missing is said.
"""

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

LIBRARIES = {"scipy.sparse": "SciPy", "torch": "PyTorch"}


class Rival(NamedTuple):
    """A contestant that is not JAX.

    Attributes:
        name: "scipy_csr", "torch_csr" or "torch_dense".
        call: the layers, once; answers (out, batch).
        bytes: of its weights, indices included.
        nse: weights stored.
    """

    name: str
    call: Callable[[], Any]
    bytes: int
    nse: int


def missing() -> list[str]:
    """Libraries that cannot be imported, with what is lost and the way to have it; [] if all are there."""
    return [
        f"{title} is not installed, its rows are left out (`pip install {module.partition('.')[0]}`)."
        for module, title in LIBRARIES.items()
        if _module(module) is None
    ]


def versions() -> dict[str, str]:
    """Versions of the libraries that are there."""
    names = {module: _module(module.partition(".")[0]) for module in LIBRARIES if _module(module) is not None}
    return {module.partition(".")[0]: str(getattr(found, "__version__", "?")) for module, found in names.items()}


def rivals(weights: Sequence[Float32[np.ndarray, "n_in n_out"]], x: Float32[np.ndarray, "batch n_in"]) -> list[Rival]:
    """The layers relu(x @ W) one after the other, as each installed library computes them.

    Args:
        weights: of the layers, dense with zeros.
        x: activations, one sample a row.
    """
    columns = np.array(x.T, order="C")  # a copy, since PyTorch wants to be able to write
    found: list[Rival] = []
    if (scipy_sparse := _module("scipy.sparse")) is not None:
        found.append(_scipy(scipy_sparse, weights, columns))
    if (torch := _module("torch")) is not None:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        found += [_torch_csr(torch, weights, columns), _torch_dense(torch, weights, columns)]
    return found


def _module(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except (ImportError, OSError):  # OSError: installed, but a library it needs cannot be loaded
        return None


def _scipy(scipy_sparse: Any, weights: Sequence[np.ndarray], columns: np.ndarray) -> Rival:
    matrices = [scipy_sparse.csr_matrix(np.ascontiguousarray(weight.T)) for weight in weights]

    def call() -> np.ndarray:
        y = columns
        for matrix in matrices:
            y = matrix @ y
            np.maximum(y, 0, out=y)
        return y

    parts = [part for matrix in matrices for part in (matrix.data, matrix.indices, matrix.indptr)]
    return Rival("scipy_csr", call, sum(part.nbytes for part in parts), sum(int(matrix.nnz) for matrix in matrices))


def _torch_csr(torch: Any, weights: Sequence[np.ndarray], columns: np.ndarray) -> Rival:
    matrices, size, nse = [], 0, 0
    for weight in weights:
        outputs, inputs = np.nonzero(weight.T)
        # 32-bit indices are what MKL's product takes; 64-bit ones would be converted or go another way.
        bounds = np.concatenate([[0], np.cumsum(np.bincount(outputs, minlength=weight.shape[1]))]).astype(np.int32)
        parts = (bounds, inputs.astype(np.int32), weight.T[outputs, inputs])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sparse CSR is "in beta", says PyTorch
            matrices.append(torch.sparse_csr_tensor(*map(torch.from_numpy, parts), size=weight.shape[::-1]))
        size, nse = size + sum(part.nbytes for part in parts), nse + len(inputs)
    return Rival("torch_csr", _torch_chain(torch, matrices, columns), size, nse)


def _torch_dense(torch: Any, weights: Sequence[np.ndarray], columns: np.ndarray) -> Rival:
    matrices = [torch.from_numpy(np.array(weight.T, order="C")) for weight in weights]
    size = sum(weight.nbytes for weight in weights)
    return Rival("torch_dense", _torch_chain(torch, matrices, columns), size, sum(weight.size for weight in weights))


def _torch_chain(torch: Any, matrices: Sequence[Any], columns: np.ndarray) -> Callable[[], Any]:
    start = torch.from_numpy(columns)

    def call() -> np.ndarray:
        with torch.inference_mode():
            y = start
            for matrix in matrices:
                y = torch.relu(matrix @ y)
            return y.numpy()

    return call
