"""What a weight becomes: bits, group size, symmetry, number family.

A scheme has one short spelling, `W4G128` or `W2G64-asym`, used on the command line, in reports and in
file names. `W4A16` and `W4` mean group size 128.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from autoround_core.errors import UsageError, unknown_name

MIN_BITS, MAX_BITS = 2, 8
WHOLE_ROW = -1
_SPELLING = re.compile(
    r"W(?P<bits>\d+)(?:A(?P<activation>\d+))?(?:G(?P<group>-?\d+))?(?:-(?P<symmetry>a?sym))?", re.IGNORECASE
)
_EXAMPLES = ("W2", "W3", "W4", "W8", "W4A16", "W4G128", "W2G64-asym", "W8G-1")


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How one weight is stored.

    bits: 2 to 8. group_size: input features that share a scale, -1 = the whole row. sym: zero_point fixed at
    2**(bits-1); the range is full, so a scale may be negative. data_type: the number family, "int" for
    scale * (code - zero_point). activation: the scheme of the layer's input, None = 16 bit.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    data_type: str = "int"
    activation: QuantScheme | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(f"bits must be a whole number from {MIN_BITS} to {MAX_BITS}, got {self.bits}")
        size = self.group_size
        if not isinstance(size, int) or isinstance(size, bool) or not (size == WHOLE_ROW or size > 0):
            raise UsageError(f"group_size must be a positive whole number or -1 (the whole row), got {size}")
        if not isinstance(self.sym, bool):
            raise UsageError(f"sym must be true or false, got {self.sym!r}")

    def __str__(self) -> str:
        return f"W{self.bits}G{self.group_size}" + ("" if self.sym else "-asym")

    @classmethod
    def parse(cls, text: str) -> QuantScheme:
        """Read a spelling such as `W4G128`, `W4A16` or `W2G64-asym`.

        Raises UnknownNameError with examples when the text is no scheme.
        """
        match = _SPELLING.fullmatch(text.strip())
        if match is None:
            raise unknown_name("scheme", text, _EXAMPLES, "; W<bits>[G<group size>][-asym] in general")
        if match["activation"] not in (None, "16"):
            raise UsageError(f"scheme `{text}` asks for {match['activation']}-bit activations; only A16 is supported")
        return cls(
            bits=int(match["bits"]),
            group_size=int(match["group"] or 128),
            sym=(match["symmetry"] or "sym").lower() == "sym",
        )

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of `in_features` weights; the last one may be shorter."""
        return -(-in_features // self.group_length(in_features))

    def group_length(self, in_features: int) -> int:
        """Weights in a full group of a row: group_size, or the row where that is shorter or -1."""
        return in_features if self.group_size == WHOLE_ROW else min(self.group_size, in_features)

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits of codes, 16-bit scales and zero points together (the honest size, before word padding)."""
        groups = out_features * self.groups(in_features)
        return out_features * in_features * self.bits + groups * (16 + self.bits)
