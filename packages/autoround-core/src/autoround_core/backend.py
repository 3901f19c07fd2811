"""The interface of a backend (a module made from a record), and the choice among backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from autoround_core.errors import UnsupportedError, unknown_name
from autoround_core.recipe import LinearSpec
from autoround_core.support import Support

if TYPE_CHECKING:
    import torch

    from autoround_core.records import QuantizedLayer

AUTO = "auto"


class Backend(ABC):
    """Builds inference modules for quantized layers on one kind of device."""

    name: str
    priority: int = 0
    """Among the backends that can take a layer the highest priority wins; the reference has 0."""
    support: Support = Support()
    """What it takes, and which packages it needs."""

    def why_not(self, spec: LinearSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if this backend can run such a layer there, otherwise the reason as one sentence."""
        return (
            self.support.why_not(spec, device, dtype) or self.missing() or self.why_not_layer(spec, device, dtype)
        )

    def missing(self) -> str | None:
        """None if what the backend needs is installed, otherwise what is not, with the command that helps."""
        return self.support.missing()

    def why_not_layer(self, spec: LinearSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """What `support` cannot say about a layer. Asked last, with everything installed."""
        return None

    @abstractmethod
    def build(
        self, layer: QuantizedLayer | torch.nn.Linear, device: torch.device, dtype: torch.dtype
    ) -> torch.nn.Module:
        """A module that maps [..., in] to [..., out] in `dtype`: x @ dequantized weight.T + bias.

        A backend with `support.dense` gets a torch.nn.Linear for `layer`, and shares its parameters.
        """


def answers(
    backends: Iterable[Backend], spec: LinearSpec, device: torch.device, dtype: torch.dtype
) -> list[tuple[Backend, str | None]]:
    """Each backend, best first, with its `why_not` for the layer."""
    ranked = sorted(backends, key=lambda backend: (-backend.priority, backend.name))
    return [(backend, backend.why_not(spec, device, dtype)) for backend in ranked]


def select_backend(
    backends: Iterable[Backend], spec: LinearSpec, device: torch.device, dtype: torch.dtype, wanted: str = AUTO
) -> Backend:
    """The backend of highest priority that takes the layer, or the one called `wanted`.

    Raises UnsupportedError with every reason when none does.
    """
    backends = list(backends)
    if wanted != AUTO:
        named = {backend.name: backend for backend in backends}
        if wanted not in named:
            raise unknown_name("backend", wanted, [*named, AUTO])
        backends = [named[wanted]]
    replies = answers(backends, spec, device, dtype)
    for backend, reason in replies:
        if reason is None:
            return backend
    reasons = "; ".join(f"{backend.name}: {reason}" for backend, reason in replies)
    raise UnsupportedError(f"no backend runs `{spec.name}` ({spec.scheme}, {device}, {dtype}): {reasons}")
