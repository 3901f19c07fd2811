"""Integers of 2, 3, 4 and 8 bits, in groups or whole rows, on GPUs that Triton compiles for.

One layout of our own in 32-bit words, `pack`, serves three ways to multiply. A few rows, a decode step, are bound by
memory, and a kernel streams the words. Up to some hundred rows tiles of weights are decoded in registers and multiplied
at once. For more rows a matrix product of the vendor's library outweighs the writing of a dense matrix, which is
then made piece by piece; also for float32, which tensor cores do not multiply. Codes, scales and zero points stay
what the record says.

Triton's interpreter runs the kernels on a CPU, for tests: with TRITON_INTERPRET=1 in the environment before
Triton is imported the backend takes the device `cpu` too. It is slow.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch

from autoround_core import AffineWeight, Backend, LinearSpec, QuantizedLayer, Support

# of weights that share a word, or the three words of 3 bits
PLANES = {2: 16, 3: 32, 4: 8, 8: 4}
# rounds in which the planes of a tile are decoded: 32 at once would need too many registers
STEPS = {2: 1, 3: 4, 4: 1, 8: 1}
MOST_ROWS = 256  # above this a dense matrix is made; a guess, no GPU has run this yet
PIECE = 2**26  # weights that are dense at a time
_OLDEST = (8, 0)  # compute capability that Triton compiles for
_SUPPORT = Support(
    devices=("cuda", "xpu"), dtypes=("bfloat16", "float16", "float32"), bits=tuple(PLANES), packages=("triton",),
    install="autoround-backends[cuda]",
)


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


class TritonInt(Backend):
    """Groups of any size; the best speed needs a multiple of 16, so that a tile of words has one scale."""

    name = "triton"
    priority = 50

    @property
    def support(self) -> Support:
        """With the CPU where Triton's interpreter is asked for."""
        return replace(_SUPPORT, devices=(*_SUPPORT.devices, "cpu")) if interpreted() else _SUPPORT

    def why_not_layer(self, spec: LinearSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        if interpreted():
            return None
        if sys.platform == "linux" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "Triton needs a C compiler to start kernels; install gcc, or name one in CC"
        if device.type != "cuda" or torch.version.hip or (device.index or 0) >= torch.cuda.device_count():
            return None
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            needed, given = (f"{major}.{minor}" for major, minor in (_OLDEST, capability))
            return f"needs a GPU of compute capability {needed} or later, got {given}"
        return None

    def build(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        return _TritonLinear(layer, device, dtype)


class PackedWeight(NamedTuple):
    """What the kernels read.

    words: int32 [out, words of a column, width], see `pack`. scale: [groups, out] as in the record. zero_point: uint8
    [groups, out], None = 2**(bits - 1).
    """

    words: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bits: int
    group: int
    in_features: int

    @property
    def out_features(self) -> int:
        return self.words.shape[0]

    def constants(self) -> dict[str, int]:
        """What a kernel is compiled for."""
        return {
            "IN": self.in_features, "GROUP": self.group, "WIDTH": self.words.shape[-1], "BITS": self.bits,
            "PLANES": PLANES[self.bits], "STEPS": STEPS[self.bits],
        }  # fmt: skip

    def rows(self, start: int, stop: int) -> PackedWeight:
        """Some of the output features."""
        zero_point = None if self.zero_point is None else self.zero_point[:, start:stop].contiguous()
        scale = self.scale[:, start:stop].contiguous()
        return self._replace(words=self.words[start:stop], scale=scale, zero_point=zero_point)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [out, in] to int32 words [out, 3 with 3 bits and otherwise 1, width].

    width = ceil(in / PLANES[bits]). Code j * width + w of a row is at bit bits * j of word w. With 3 bits the words of
    column w are the two low bits of planes 0 to 15, those of planes 16 to 31, and the high bits of all.
    Raises ValueError for a code that does not fit.
    """
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    out_features, in_features = codes.shape
    planes = PLANES[bits]
    width = -(-in_features // planes)
    padded = torch.nn.functional.pad(codes, (0, planes * width - in_features)).view(out_features, planes, width)
    parts = [(padded, bits)]
    if bits == 3:
        parts = [(padded[:, :16] & 3, 2), (padded[:, 16:] & 3, 2), (padded >> 2, 1)]
    return torch.stack([_join(part, size) for part, size in parts], dim=1)


def _join(codes: torch.Tensor, bits: int) -> torch.Tensor:
    words = codes[:, 0].to(torch.int32)
    for j in range(1, codes.shape[1]):
        words |= codes[:, j].to(torch.int32) << (bits * j)
    return words


def unpack(words: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 codes [out, in]."""
    if bits == 3:
        low = torch.cat([_split(words[:, 0], 2), _split(words[:, 1], 2)], dim=1)
        codes = low | (_split(words[:, 2], 1) << 2)
    else:
        codes = _split(words[:, 0], bits)
    return codes.flatten(1)[:, :in_features]


def _split(words: torch.Tensor, bits: int) -> torch.Tensor:
    mask = (1 << bits) - 1
    return torch.stack([((words >> at) & mask).to(torch.uint8) for at in range(0, 32, bits)], dim=1)


class _TritonLinear(torch.nn.Module):
    def __init__(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, AffineWeight)
        self.out_features, self.in_features = weight.shape
        self._scheme, self._dtype = weight.scheme, dtype
        zero_point = None if weight.scheme.sym else weight.zero_point.T.contiguous().to(device)
        self.register_buffer("words", pack(weight.codes.to(device), weight.scheme.bits))
        self.register_buffer("scale", weight.scale.T.contiguous().to(device))
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(device, dtype))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        from autoround_backends import triton_kernels

        rows = inputs.reshape(-1, self.in_features).contiguous()
        with _on(rows.device):
            if len(rows) == 0:
                output = rows.new_empty(0, self.out_features)
            elif len(rows) <= triton_kernels.FEW_ROWS:
                output = triton_kernels.few(rows, self._packed, self.bias)
            elif len(rows) <= MOST_ROWS and rows.dtype != torch.float32:
                output = triton_kernels.many(rows, self._packed, self.bias)
            else:
                output = _multiply_dense(rows, self._packed, self.bias)
        return output.reshape(*inputs.shape[:-1], self.out_features)

    @property
    def _packed(self) -> PackedWeight:
        scheme = self._scheme
        group = scheme.group_length(self.in_features)
        return PackedWeight(self.words, self.scale, self.zero_point, scheme.bits, group, self.in_features)

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized [out, in], for models that read a layer's weight themselves. Needs no Triton."""
        codes, scale = unpack(self.words, self._scheme.bits, self.in_features), self.scale.T
        middle = 2 ** (self._scheme.bits - 1)
        zero_point = torch.full_like(scale, middle, dtype=torch.uint8) if self._scheme.sym else self.zero_point.T
        return AffineWeight(self._scheme, codes, scale, zero_point).dequantize(self._dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._scheme}, backend=triton"


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton starts kernels on the current device, which need not be that of the tensors."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _multiply_dense(rows: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """rows [rows, in] -> [rows, out], with a dense weight of at most PIECE elements at a time."""
    from autoround_backends.triton_kernels import dequantize

    step = max(1, PIECE // weight.in_features)
    bias = None if bias is None else bias.to(rows.dtype)
    if step >= weight.out_features:
        return torch.nn.functional.linear(rows, dequantize(weight, rows.dtype), bias)
    output = rows.new_empty(len(rows), weight.out_features)
    for start in range(0, weight.out_features, step):
        stop = min(start + step, weight.out_features)
        dense = dequantize(weight.rows(start, stop), rows.dtype)
        part = None if bias is None else bias[start:stop]
        output[:, start:stop] = torch.nn.functional.linear(rows, dense, part)
    return output
