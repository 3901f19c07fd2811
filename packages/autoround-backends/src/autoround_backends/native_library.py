"""The kernels of `native/`, called through ctypes: pointers and numbers in, nothing kept.

The library is built when this package is installed. It knows nothing of Python or torch, so one build serves every
version of both.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from functools import lru_cache
from importlib.util import find_spec

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
# out_features, in_features, group_length, bits, dtype of scales, codes, scales, zero points or None
_WEIGHT = [_LONG, _LONG, _LONG, _INT, _INT, _POINTER, _POINTER, _POINTER]
_SIGNATURES = {
    "autoround_instructions": (_INT, []),
    "autoround_packed_bytes": (_LONG, [_LONG, _LONG, _INT]),
    "autoround_pack": (None, [_POINTER, _LONG, _LONG, _INT, _POINTER, _INT]),
    "autoround_dequantize": (None, [*_WEIGHT, _LONG, _LONG, _INT, _POINTER, _INT]),
    "autoround_multiply_dense": (
        None, [_LONG, _LONG, _POINTER, _INT, _POINTER, _LONG, _POINTER, _POINTER, _INT]
    ),
    "autoround_multiply": (_INT, [*_WEIGHT, _POINTER, _LONG, _INT, _POINTER, _POINTER, _INT, _INT]),
}
_HUGE_PAGE = 2 << 20
INSTRUCTIONS = {1: "AVX2", 2: "AVX-512 VNNI"}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The library, None if it was not built or does not fit this system."""
    found = find_spec("autoround_backends._native")
    if found is None or found.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(found.origin)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):  # of another system, or of an older version of this package
        return None
    return loaded


@lru_cache(maxsize=1)
def instructions() -> int:
    """The best instruction set that processor and kernels share: a key of INSTRUCTIONS, or 0 for none."""
    loaded = library()
    return 0 if loaded is None else loaded.autoround_instructions()


def missing() -> str | None:
    """Why there are no native kernels here, None if there are."""
    if library() is None:
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return f"has kernels for x86-64 processors, this one is {platform.machine()}"
        return (
            "was not compiled when autoround-backends was installed; install gcc or clang, then "
            "pip install --force-reinstall --no-deps autoround-backends"
        )
    return None if instructions() else "needs a processor with AVX2, FMA and F16C"


def _pages(size: int) -> torch.Tensor:
    """uint8 [size] in pages of its own. In malloc's heap, weights that stay would lie between what loading them leaves
    behind, and keep it from being given back: a third more memory at the peak."""
    pages = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8, count=size) if size else torch.empty(0, dtype=torch.uint8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [out, in] in the layout of native/blocks.h: uint8 [bytes]. bits: 2, 3, 4 or 8."""
    out_features, in_features = codes.shape
    codes = codes.contiguous()
    packed = _pages(library().autoround_packed_bytes(out_features, in_features, bits))
    threads = torch.get_num_threads()
    library().autoround_pack(codes.data_ptr(), out_features, in_features, bits, packed.data_ptr(), threads)
    return packed
