"""Doubles of GPTQModel's classes: their arguments and buffers as in 7.7.0, and the product in float64.

The words are taken apart bit by bit here, with no help from the code that packed them.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import ClassVar

import torch

AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the code of each of its eight columns lies
PARTS = (
    "gptqmodel", "gptqmodel.nn_modules", "gptqmodel.nn_modules.qlinear", "gptqmodel.utils", "gptqmodel.utils.exllamav2",
    "gptqmodel.nn_modules.qlinear.marlin", "gptqmodel.nn_modules.qlinear.exllamav2",
    "gptqmodel.nn_modules.qlinear.gemm_awq",
)


class Double(torch.nn.Module):
    """What the three have in common. seen: the options of each layer made; refusal: what validate answers."""

    seen: ClassVar[list[dict]] = []
    refusal: Exception | None = None
    awq = False

    def __init__(self, bits, group_size, desc_act, sym, in_features, out_features, bias=False,
                 pack_dtype=torch.int32, register_buffers=False, adapter=None, dtype=None, name=None):
        super().__init__()
        assert not desc_act and not bias and register_buffers and pack_dtype == torch.int32 and adapter is None
        self.bits, self.in_features, self.out_features = bits, in_features, out_features
        self.group_size = in_features if group_size == -1 else group_size
        groups, factor, self.ready = in_features // self.group_size, 32 // bits, False
        columns, rows = (out_features // factor, in_features) if self.awq else (out_features, in_features // factor)
        self.register_buffer("qweight", torch.zeros(rows, columns, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, out_features // factor, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=self.scale_dtype(dtype)))
        if not self.awq:
            self.register_buffer("g_idx", torch.ones(in_features, dtype=torch.int32))
        self.seen.append({"bits": bits, "group_size": group_size, "sym": sym, "dtype": dtype, "name": name})

    @classmethod
    def validate(cls, bits, group_size, desc_act, sym, in_features, out_features, pack_dtype, dtype, device):
        return cls.refusal is None, cls.refusal

    def scale_dtype(self, dtype):
        return torch.float16

    def post_init(self):
        self.ready = True

    def train(self, mode=True):
        if mode:
            raise NotImplementedError("switching to training mode")
        return super().train(mode)

    def forward(self, rows):
        assert self.ready and rows.dim() == 2 and rows.is_contiguous() and len(rows) and not self.training
        zeros = unpack(self.qzeros, self.bits, 1, self.awq)[:, : self.out_features]
        codes = unpack(self.qweight, self.bits, int(self.awq), self.awq)
        scales, zeros = (part.double().repeat_interleave(self.group_size, 0) for part in (self.scales, zeros))
        with torch.inference_mode():  # as GPTQModel's AWQ layers do
            return (rows.double() @ (scales * (codes.double() - zeros))).to(rows.dtype)


def unpack(words, bits, axis, awq):
    """Codes along `axis` of int32 words."""
    factor = 32 // bits
    parts = [(words >> (bits * (AWQ_COLUMNS[i] if awq else i))) & (2**bits - 1) for i in range(factor)]
    shape = list(words.shape)
    shape[axis] *= factor
    return torch.stack(parts, dim=axis + 1).reshape(shape)


class MarlinLinear(Double):
    def scale_dtype(self, dtype):
        return dtype

    def post_init(self):
        assert not self.g_idx.any() and set(unpack(self.qzeros, self.bits, 1, False).flatten().tolist()) == {
            2 ** (self.bits - 1)
        }
        super().post_init()


class ExllamaV2Linear(Double):
    def temp_dq_size(self):
        return self.in_features * self.out_features * 2 + 128

    def post_init(self, scratch_space):
        assert not self.g_idx.any()  # otherwise the kernel permutes rows
        assert len(scratch_space.get_slice(self.temp_dq_size())) >= self.in_features * self.out_features
        super().post_init()


class AwqGEMMLinear(Double):
    awq = True


class ScratchSpace:
    made: ClassVar[list[int]] = []  # sizes in bytes

    def __init__(self, scratch_bytes, dev):
        self.scratch_bytes, self.scratch = scratch_bytes, torch.empty(scratch_bytes // 2, dtype=torch.float16)
        self.made.append(scratch_bytes)

    def get_slice(self, size_bytes):
        return self.scratch.narrow(0, 0, (size_bytes + 127) // 128 * 128 // 2)


def install(monkeypatch) -> None:
    """Put the doubles where `gptqmodel` would be, and a GPU of capability 8.0 under every question."""
    modules = {name: ModuleType(name) for name in PARTS}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    modules[PARTS[4]].ScratchSpace = ScratchSpace
    modules[PARTS[5]].MarlinLinear = MarlinLinear
    modules[PARTS[6]].ExllamaV2Linear = ExllamaV2Linear
    modules[PARTS[7]].AwqGEMMLinear = AwqGEMMLinear
    monkeypatch.setattr(Double, "seen", [])
    monkeypatch.setattr(ScratchSpace, "made", [])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (8, 0))


def on_the_cpu(backend):
    """The backend, which takes the CPU for its GPU."""
    kind = type(backend)

    class OnTheCpu(kind):
        def why_not(self, spec, device, dtype):
            return super().why_not(spec, torch.device("cuda") if device.type == "cpu" else device, dtype)

    return OnTheCpu()
