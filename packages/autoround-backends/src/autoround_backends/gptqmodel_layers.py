"""Layers of GPTQModel around our records: the tensors that its classes expect, and what the classes share.

GPTQ packs codes along the input, eight 4-bit codes a word, the first in the lowest bits: qweight [in * bits / 32, out].
AWQ packs them along the output, in the order 0 2 4 6 1 3 5 7: qweight [in, out / 8]. Both pack zero points along the
output, qzeros [groups, ...], and keep scales [groups, out]. Zero points are stored as they are, which GPTQModel calls
version 2. Importing GPTQModel patches other libraries, and its first CUDA layer compiles kernels, so both wait for
`build`. No GPU has run these backends; that the tensors mean our numbers is checked with GPTQModel's own torch layers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from autoround_backends.scale_range import rounded_scale
from autoround_core import AffineWeight, LinearSpec, QuantizedLayer, QuantScheme, UnsupportedError, pack_bits
from autoround_core.scheme import WHOLE_ROW

PACKAGE = "gptqmodel"
INSTALL = "gptqmodel"  # no extra of ours: its build wants a torch that is installed already
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_BITS = 4


def gptq_words(weight: AffineWeight) -> dict[str, torch.Tensor]:
    """qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], g_idx int32 [in].

    g_idx is all zeros, by which GPTQModel's kernels know that no input features were reordered.
    """
    bits, in_features = weight.scheme.bits, weight.shape[1]
    return {
        "qweight": pack_bits(weight.codes, bits).T.contiguous(),
        "qzeros": pack_bits(weight.zero_point.T.contiguous(), bits),
        "g_idx": torch.zeros(in_features, dtype=torch.int32, device=weight.codes.device),
    }


def awq_words(weight: AffineWeight) -> dict[str, torch.Tensor]:
    """qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], of 4 bits."""
    return {"qweight": _awq_pack(weight.codes.T), "qzeros": _awq_pack(weight.zero_point.T)}


def _awq_pack(values: torch.Tensor) -> torch.Tensor:
    rows, columns = values.shape
    eights = values.reshape(rows, columns // len(_AWQ_ORDER), len(_AWQ_ORDER))
    return pack_bits(eights[..., list(_AWQ_ORDER)].reshape(rows, columns), _AWQ_BITS)


def group_size_of(scheme: QuantScheme, in_features: int) -> int:
    """What GPTQModel calls the group size: -1 for whole rows, also where a group is longer than the row."""
    length = scheme.group_length(in_features)
    return WHOLE_ROW if length == in_features else length


def why_not_gpu(device: torch.device, dtype: torch.dtype, least: tuple[int, int]) -> str | None:
    """None if `device` is an NVIDIA GPU of at least the compute capability `least`, and 8.0 for bfloat16."""
    if torch.version.hip:
        return "needs CUDA, and this torch is built for ROCm"
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return f"torch sees no GPU `{device}` here"
    least, found = max(least, (8, 0) if dtype == torch.bfloat16 else least), torch.cuda.get_device_capability(device)
    if found >= least:
        return None
    kind = str(dtype).removeprefix("torch.")
    return f"needs compute capability {least[0]}.{least[1]} for {kind}, {device} has {found[0]}.{found[1]}"


def class_named(module: str, name: str) -> Any:
    """A class of GPTQModel, imported now. Raises UnsupportedError when GPTQModel is there and does not import."""
    try:
        return getattr(import_module(f"{PACKAGE}.{module}"), name)
    except ImportError as error:
        raise UnsupportedError(f"{PACKAGE} is installed but does not import: {_line(error)}") from error


def _line(error: Exception | None) -> str:
    return " ".join(str(error).split())


def make_inner(
    kind: Any, layer: QuantizedLayer, words: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """A layer of GPTQModel's class `kind` on `device` with our tensors in it, before its post_init.

    Raises UnsupportedError with the class's own words when it does not take the layer.
    """
    weight = layer.weight
    assert isinstance(weight, AffineWeight)
    out_features, in_features = weight.shape
    options = {
        "bits": weight.scheme.bits, "group_size": group_size_of(weight.scheme, in_features), "desc_act": False,
        "sym": weight.scheme.sym, "in_features": in_features, "out_features": out_features,
        "pack_dtype": torch.int32, "dtype": dtype,
    }
    taken, error = kind.validate(**options, device=device)
    if not taken:
        raise UnsupportedError(f"layer `{layer.name}`: GPTQModel refuses {kind.__name__}: {_line(error)}")
    inner = kind(**options, bias=False, register_buffers=True, name=layer.name)
    state = {**words, "scales": rounded_scale(layer, inner.scales.dtype).T.contiguous()}
    inner.load_state_dict(state)  # strict: another name or shape in another release is an error
    return inner.to(device)


def finish(inner: torch.nn.Module, **options: Any) -> None:
    """Its post_init, which repacks the tensors. Raises UnsupportedError when the kernel could not be compiled."""
    try:
        inner.post_init(**options)
    except ImportError as error:
        raise UnsupportedError(f"GPTQModel cannot compile {type(inner).__name__}: {_line(error)}") from error


def make_linear(
    kind: Any, layer: QuantizedLayer, words: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype,
    backend: str,
) -> GptqmodelLinear:
    """A finished layer of GPTQModel's class `kind`, for classes whose post_init wants nothing more."""
    inner = make_inner(kind, layer, words, device, dtype)
    finish(inner)
    return GptqmodelLinear(inner, layer, dtype, backend)


class GptqmodelLinear(torch.nn.Module):
    """A finished layer of GPTQModel behind the manners that a backend's module must have.

    The bias is added here, so that the inner layer is the bare product, and tells the weight when asked.
    """

    def __init__(self, inner: torch.nn.Module, layer: QuantizedLayer, dtype: torch.dtype, backend: str) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self._scheme, self._dtype, self._backend = layer.weight.scheme, dtype, backend
        self.inner = inner.eval()
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(inner.qweight.device, dtype))

    def train(self, mode: bool = True) -> GptqmodelLinear:
        """Only the flag: the inner layers are made for inference and raise when told to train."""
        self.training = mode
        return self

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, self.in_features).contiguous()
        if not len(rows):
            return inputs.new_empty(*inputs.shape[:-1], self.out_features)
        output = self.inner(rows)
        if torch.is_grad_enabled() and output.is_inference():
            output = output.clone()  # autograd refuses to touch what inference mode made
        output = output if self.bias is None else output + self.bias
        return output.reshape(*inputs.shape[:-1], self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized [out, in]: the product with the identity. The kernel's own packing cannot be read back."""
        return self.inner(torch.eye(self.in_features, dtype=self._dtype, device=self.inner.qweight.device)).T

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._scheme}, backend={self._backend}"


def length_of(spec: LinearSpec) -> int:
    """Weights in a full group of a quantized layer's rows."""
    assert spec.scheme is not None
    return spec.scheme.group_length(spec.in_features)
