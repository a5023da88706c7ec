"""Small files: a pruned model on disk, never larger than dense, and safe to open.

    save("model.jaxprune", params)                       # the smallest encoding of every tensor
    params = load("model.jaxprune")                      # bit for bit; or masks, or straight to a sparse format
    small = to_codebooks(params, masks, bits=4)          # 16 shared values a leaf; save(..., small) is smaller still
    predict = int8(apply_fn, calibrate(apply_fn, params, batches))      # weights and activations in 8 bits, simulated

FORMAT.md beside this file is all that a reader in another language needs.
"""

from jaxprune.quantize.codes import Affine, Codebook, cast, dequantize, to_codebooks, to_integers
from jaxprune.quantize.int8 import calibrate, int8
from jaxprune.quantize.sharing import reshare, share_weights
from jaxprune.storage.artifact import Artifact, save
from jaxprune.storage.container import FileError
from jaxprune.storage.loading import load

__all__ = [
    "Affine",
    "Artifact",
    "Codebook",
    "FileError",
    "calibrate",
    "cast",
    "dequantize",
    "int8",
    "load",
    "reshare",
    "save",
    "share_weights",
    "to_codebooks",
    "to_integers",
]
