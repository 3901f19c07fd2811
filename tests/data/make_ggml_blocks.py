"""Make ggml_blocks.safetensors: what ggml's C library makes of one matrix, for each block type that we write.

    pip install llama-cpp-python==0.3.36 safetensors && python tests/data/make_ggml_blocks.py

    weight              float32 [16, 512], the matrix
    importance          float32 [512], of its columns
    TYPE.plain          uint8, the bytes of ggml_quantize_chunk without an importance
    TYPE.important      the same with it; Q8_0 has none, as it ignores the importance
    TYPE.WHICH.values   float32 [16, 512], what dequantize_row_TYPE makes of those bytes
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from safetensors.numpy import save_file

ROWS, COLUMNS = 16, 512
# name -> (number of the type in ggml, weights in a block, bytes of a block, dequantize_row_NAME)
TYPES = {
    "Q4_0": (2, 32, 18, "q4_0"), "Q4_1": (3, 32, 20, "q4_1"), "Q5_0": (6, 32, 22, "q5_0"),
    "Q5_1": (7, 32, 24, "q5_1"), "Q8_0": (8, 32, 34, "q8_0"), "Q2_K": (10, 256, 84, "q2_K"),
    "Q3_K": (11, 256, 110, "q3_K"), "Q4_K": (12, 256, 144, "q4_K"), "Q5_K": (13, 256, 176, "q5_K"),
    "Q6_K": (14, 256, 210, "q6_K"),
}  # fmt: skip
TARGET = Path(__file__).with_name("ggml_blocks.safetensors")
_FLOATS = ctypes.POINTER(ctypes.c_float)


def make_weight() -> np.ndarray:
    """Heavy-tailed, with the blocks that a layout gets wrong first."""
    generator = np.random.default_rng(20261124)
    weight = generator.standard_t(4, (ROWS, COLUMNS)) * generator.uniform(0.005, 0.1, (ROWS, 1))
    weight[0] = 0.0  # nothing at all
    weight[1, :256] = 0.0  # a dead block of a K type
    weight[2, 32:64] = 0.0  # a dead group
    weight[3] = 0.0625  # constant rows of both signs
    weight[4] = -0.0625
    weight[5, 64:96] = -0.03  # a constant group
    weight[6, 77] = 30.0  # one outlier that swallows its block
    weight[7] = np.abs(weight[7])  # zero is at the edge of the range
    weight[8] = -np.abs(weight[8])
    weight[9] *= 1e-5  # scales that are subnormal in float16
    weight[10] *= 1e5  # and large ones
    return weight.astype(np.float32)


def make_importance() -> np.ndarray:
    generator = np.random.default_rng(20261125)
    return (generator.standard_t(4, COLUMNS) ** 2 + 1e-3).astype(np.float32)


def library() -> ctypes.CDLL:
    """ggml without its engines. On Linux; elsewhere the file has another ending."""
    return ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))


def quantized(lib: ctypes.CDLL, name: str, weight: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    number, block, size, _ = TYPES[name]
    call = lib.ggml_quantize_chunk
    call.argtypes = [ctypes.c_int, _FLOATS, ctypes.c_void_p, *[ctypes.c_int64] * 3, _FLOATS]
    call.restype = ctypes.c_size_t
    out = np.zeros((ROWS, COLUMNS // block * size), np.uint8)
    given = None if importance is None else importance.ctypes.data_as(_FLOATS)
    written = call(number, weight.ctypes.data_as(_FLOATS), out.ctypes.data, 0, ROWS, COLUMNS, given)
    assert written == out.nbytes
    return out


def dequantized(lib: ctypes.CDLL, name: str, blocks: np.ndarray) -> np.ndarray:
    call = getattr(lib, f"dequantize_row_{TYPES[name][3]}")
    call.argtypes, call.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    out = np.empty((ROWS, COLUMNS), np.float32)
    call(blocks.ctypes.data, out.ctypes.data, out.size)
    return out


def main() -> None:
    lib, weight, importance = library(), make_weight(), make_importance()
    tensors = {"weight": weight, "importance": importance}
    for name in TYPES:
        for which, given in (("plain", None), ("important", importance)):
            if name == "Q8_0" and given is not None:
                continue
            blocks = quantized(lib, name, weight, given)
            tensors |= {f"{name}.{which}": blocks, f"{name}.{which}.values": dequantized(lib, name, blocks)}
    save_file(tensors, TARGET, metadata={"made by": f"ggml of llama-cpp-python {llama_cpp.__version__}"})
    print(f"{TARGET}: {TARGET.stat().st_size} bytes, {len(TYPES)} types")


if __name__ == "__main__":
    main()
