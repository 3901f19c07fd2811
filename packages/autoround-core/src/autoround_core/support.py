"""What a backend takes, said as data: its row in `autoround backends`, and most of its `why_not`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from autoround_core.scheme import WHOLE_ROW

if TYPE_CHECKING:
    import torch

    from autoround_core.recipe import LinearSpec
    from autoround_core.scheme import QuantScheme


@dataclass(frozen=True, slots=True)
class Support:
    """An empty tuple sets no limit.

    devices: device types. dtypes: of activations, by name ("bfloat16"). data_types: number families. bits,
    group_sizes, sym: of schemes; a group size of -1 allows whole rows. activations: whether the backend rounds the
    inputs of layers whose scheme asks for it; without, such layers are refused. in_multiple, out_multiple: what
    the features of a layer must be divisible by. whole_groups: whether in_features must be divisible by the group
    size. dense: the backend takes layers that are not quantized, and no others. packages: what must be importable, by
    import name. install: what to give to pip where one of them is not.
    """

    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    data_types: tuple[str, ...] = ("int",)
    bits: tuple[int, ...] = ()
    group_sizes: tuple[int, ...] = ()
    sym: tuple[bool, ...] = (True, False)
    activations: bool = False
    in_multiple: int = 1
    out_multiple: int = 1
    whole_groups: bool = False
    dense: bool = False
    packages: tuple[str, ...] = ()
    install: str = ""

    def why_not(self, spec: LinearSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if the layer, the device and the dtype are within these limits, otherwise the reason."""
        wanted, kind = spec.scheme, str(dtype).removeprefix("torch.")
        if (wanted is None) != self.dense:
            return "the layer is quantized" if self.dense else "the layer is not quantized"
        if self.devices and device.type not in self.devices:
            return f"runs on {_either(self.devices)}, not on {device.type}"
        if self.dtypes and kind not in self.dtypes:
            return f"needs {_either(self.dtypes)}, got {kind}; load with --dtype {self.dtypes[0]}"
        return self._why_not_scheme(wanted) or self._why_not_shape(spec)

    def _why_not_scheme(self, wanted: QuantScheme | None) -> str | None:
        if wanted is None:
            return None
        if self.data_types and wanted.data_type not in self.data_types:
            return f"needs numbers of kind {_either(self.data_types)}, got {wanted.data_type}"
        if wanted.activation and not self.activations:
            return f"needs inputs in 16 bits, and {wanted} rounds them"
        if self.bits and wanted.bits not in self.bits:
            return f"needs bits {_either(self.bits)}, got {wanted.bits}"
        if wanted.sym not in self.sym:
            return f"needs {'symmetric' if True in self.sym else 'asymmetric'} weights, got {wanted}"
        return None

    def _why_not_shape(self, spec: LinearSpec) -> str | None:
        length = spec.in_features if spec.scheme is None else spec.scheme.group_length(spec.in_features)
        sizes = {length, WHOLE_ROW} if length == spec.in_features else {length}
        if self.group_sizes and not sizes & {*self.group_sizes}:
            return f"needs group_size {_either(self.group_sizes)}, got {length}"
        if self.whole_groups and spec.in_features % length:
            return f"needs in_features divisible by the group size {length}, got {spec.in_features}"
        if spec.in_features % self.in_multiple:
            return f"needs in_features divisible by {self.in_multiple}, got {spec.in_features}"
        if spec.out_features % self.out_multiple:
            return f"needs out_features divisible by {self.out_multiple}, got {spec.out_features}"
        return None

    def missing(self) -> str | None:
        """None if every package is there, otherwise what to install. Nothing is imported to find out."""
        absent = [package for package in self.packages if not _importable(package)]
        if not absent:
            return None
        return f"{' and '.join(absent)} not installed; pip install {self.install or ' '.join(absent)}"


def _importable(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a module that was put into sys.modules by hand has no spec
        return True


def _either(values: tuple) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last
