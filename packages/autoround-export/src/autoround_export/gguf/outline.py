"""What a GGUF file will hold, before any of it is computed: metadata, and where each of its rows comes from.

A converter (`architectures`, or llama.cpp's own through `llama_cpp`) says of every tensor of the file which rows of
which tensors of the model it is made of. That covers all that a conversion does to a quantized matrix: heads that
are permuted, experts that are stacked, projections that are joined. Scales run along a row, so whole rows move with
their codes and scales, and nothing is rounded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows of one tensor of the model.

    source: its checkpoint name, `model.layers.0.self_attn.q_proj.weight`. rows: int64 [n], which of its rows (of a
    vector: numbers) in the order of the file; None = all of them as they are.
    """

    source: str
    rows: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class FileTensor:
    """One tensor of the file: its pieces one below the other, viewed as `shape`.

    name: in the file, `blk.0.attn_q.weight`. shape: outermost axis first, (experts, out, in) for stacked experts.
    offset: added to every number (Gemma's gains).
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    offset: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """fields: metadata, whose types follow from Python's: bool, int = uint32, float = float32, str, and lists of
    these (of int: int32). constants: float32 tensors that come from the configuration, not from the model.
    """

    fields: Mapping[str, Any]
    tensors: tuple[FileTensor, ...]
    constants: Mapping[str, torch.Tensor]
