"""The engine that a checkpoint is made for: `--target vllm`, `--target vllm:cpu`."""

from __future__ import annotations

from dataclasses import dataclass

from autoround_core.errors import unknown_name

ANY = "any"
# engine -> the devices that formats have answers for, the usual one first
ENGINES: dict[str, tuple[str, ...]] = {
    "vllm": ("cuda", "cpu", "xpu"),
    "sglang": ("cuda", "cpu"),
    "transformers": ("cuda", "cpu"),
    "gptqmodel": ("cuda", "cpu"),
    "llamacpp": ("cpu", "cuda"),
}
_FUSING = ("vllm", "sglang", ANY)


@dataclass(frozen=True, slots=True)
class Target:
    """engine: a key of ENGINES, or "any". device: a device type; empty for "any"."""

    engine: str = ANY
    device: str = ""

    def __str__(self) -> str:
        return f"{self.engine} on {self.device}" if self.device else self.engine

    @property
    def fuses(self) -> bool:
        """Whether it runs q, k and v, gate and up, and the experts of a layer as one; "any" may."""
        return self.engine in _FUSING

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `engine` or `engine:device`. Raises UnknownNameError for another engine or device."""
        engine, _, device = text.strip().lower().partition(":")
        if engine == ANY and not device:
            return cls()
        if engine not in ENGINES:
            raise unknown_name("target", engine, [*ENGINES, ANY])
        if device and device not in ENGINES[engine]:
            raise unknown_name(f"device of target {engine}", device, ENGINES[engine])
        return cls(engine, device or ENGINES[engine][0])


ANY_ENGINE = Target()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an engine makes of a checkpoint. refusal: why it cannot run it. notes: what it needs besides."""

    refusal: str | None = None
    notes: tuple[str, ...] = ()
