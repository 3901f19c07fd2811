"""What a weight becomes: bits, group size, symmetry, number family, and what its layer's input becomes.

A scheme has one short spelling, `W4G128` or `W2G64-asym`, used on the command line, in reports and in
file names. `W4A16` and `W4` mean group size 128. Schemes of other number families, and those that quantize
activations too, go by the names that engines use for them, see `PRESETS`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from autoround_core.errors import UsageError, unknown_name

MIN_BITS, MAX_BITS = 2, 8
SCALE_SIGNS = ("any", "positive")
WHOLE_ROW = -1
_SPELLING = re.compile(
    r"W(?P<bits>\d+)(?:A(?P<activation>\d+))?(?:G(?P<group>-?\d+))?(?:-(?P<symmetry>a?sym))?", re.IGNORECASE
)
_EXAMPLES = ("W2", "W3", "W4", "W8", "W4A16", "W4G128", "W2G64-asym", "W8G-1")
# bits of a scale, as stored: float16 beside integers, float32, E8M0, E4M3
_SCALE_BITS = {"int": 16, "fp": 32, "mx_fp": 8, "nv_fp": 8}


@dataclass(frozen=True, slots=True)
class BlockType:
    """A block type of ggml whose scales have two levels, or a float minimum; see `SuperBlockWeight`.

    block: weights in a block, block_bytes: its size in a file. bits, group_size, sym: of its scheme.
    """

    bits: int
    group_size: int
    sym: bool
    block: int
    block_bytes: int


# by data_type, which is ggml's name in lower case
BLOCK_TYPES: dict[str, BlockType] = {
    "q4_1": BlockType(4, 32, False, 32, 20),
    "q5_1": BlockType(5, 32, False, 32, 24),
    "q2_k": BlockType(2, 16, False, 256, 84),
    "q3_k": BlockType(3, 16, True, 256, 110),
    "q4_k": BlockType(4, 32, False, 256, 144),
    "q5_k": BlockType(5, 32, False, 256, 176),
    "q6_k": BlockType(6, 16, True, 256, 210),
}


@dataclass(frozen=True, slots=True)
class ActivationScheme:
    """What the input of a layer becomes when the layer runs.

    bits, data_type: of its elements, as in QuantScheme. group_size: features that share a scale, -1 = all of a
    token. dynamic: scales are found as the layer runs; if false, one scale, found in calibration, serves all inputs.
    """

    bits: int = 8
    data_type: str = "int"
    group_size: int = WHOLE_ROW
    dynamic: bool = True

    @property
    def calibrated(self) -> bool:
        """Whether the layer needs a number from calibration, its `input_scale`."""
        return not self.dynamic or self.data_type == "nv_fp"

    def __str__(self) -> str:
        return f"A{self.bits}{self.data_type}G{self.group_size}" + ("" if self.dynamic else "-static")


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How one weight is stored.

    bits: 2 to 8. group_size: input features that share a scale, -1 = the whole row. sym: zero_point fixed at
    2**(bits-1); the range is full, so a scale may be negative. data_type: the number family, "int" for
    scale * (code - zero_point). activation: what the layer's input becomes, None = it stays in 16 bits.
    group_rows: output features that share a scale, 1 = none do, -1 = all of them; more than 1 for floats only.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    data_type: str = "int"
    activation: ActivationScheme | None = None
    group_rows: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(f"bits must be a whole number from {MIN_BITS} to {MAX_BITS}, got {self.bits}")
        size = self.group_size
        if not isinstance(size, int) or isinstance(size, bool) or not (size == WHOLE_ROW or size > 0):
            raise UsageError(f"group_size must be a positive whole number or -1 (the whole row), got {size}")
        if not isinstance(self.sym, bool):
            raise UsageError(f"sym must be true or false, got {self.sym!r}")

    def __str__(self) -> str:
        known = GGUF_TYPES if self.data_type in BLOCK_TYPES else PRESETS
        name = next((name for name, scheme in known.items() if scheme == self), None)
        if name:
            return name
        text = f"W{self.bits}G{self.group_size}" + ("" if self.group_rows == 1 else f"x{self.group_rows}")
        text += ("" if self.sym else "-asym") + ("" if self.data_type == "int" else f"-{self.data_type}")
        return text + (f"-{self.activation}" if self.activation else "")

    @classmethod
    def parse(cls, text: str) -> QuantScheme:
        """Read a spelling such as `W4G128`, `W4A16` or `W2G64-asym`, or a name in PRESETS.

        Raises UnknownNameError with examples when the text is no scheme.
        """
        named = {**PRESETS, **GGUF_TYPES}.get(text.strip().upper())
        if named:
            return named
        match = _SPELLING.fullmatch(text.strip())
        if match is None:
            known = (*_EXAMPLES, *PRESETS, *GGUF_TYPES)
            raise unknown_name("scheme", text, known, "; W<bits>[G<group size>][-asym] in general")
        if match["activation"] not in (None, "16"):
            raise UsageError(f"scheme `{text}` asks for {match['activation']}-bit activations, which have names of "
                             f"their own: {', '.join(name for name, scheme in PRESETS.items() if scheme.activation)}")
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

    def row_groups(self, out_features: int) -> int:
        """Number of groups of output features; the last one may be smaller."""
        return 1 if self.group_rows == WHOLE_ROW else -(-out_features // self.group_rows)

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits of codes, scales and zero points together (the honest size, before word padding)."""
        if self.data_type in BLOCK_TYPES:
            kind = BLOCK_TYPES[self.data_type]
            return 8 * out_features * -(-in_features // kind.block) * kind.block_bytes
        groups = self.row_groups(out_features) * self.groups(in_features)
        zero_point = self.bits if self.data_type == "int" else 0
        return out_features * in_features * self.bits + groups * (_SCALE_BITS.get(self.data_type, 16) + zero_point)


def _float(bits: int, group_size: int, data_type: str, group_rows: int = 1, *, static: bool = False) -> QuantScheme:
    """A float scheme whose activations are of the same kind, group by group of a token."""
    return QuantScheme(
        bits, group_size, True, data_type, ActivationScheme(bits, data_type, group_size, not static), group_rows
    )


# the names that users and engines know; MXFP4 and NVFP4 quantize activations, the forms with A16 do not
PRESETS: dict[str, QuantScheme] = {
    "INT8": QuantScheme(8, WHOLE_ROW, activation=ActivationScheme()),
    "FPW8A16": QuantScheme(8, WHOLE_ROW, data_type="fp", group_rows=WHOLE_ROW),
    "FP8_DYNAMIC": _float(8, WHOLE_ROW, "fp"),
    "FP8_STATIC": _float(8, WHOLE_ROW, "fp", static=True),
    "FP8_BLOCK": _float(8, 128, "fp", group_rows=128),
    "MXFP4": _float(4, 32, "mx_fp"),
    "MXFP8": _float(8, 32, "mx_fp"),
    "NVFP4": _float(4, 16, "nv_fp"),
    "MXFP4A16": QuantScheme(4, 32, data_type="mx_fp"),
    "NVFP4A16": QuantScheme(4, 16, data_type="nv_fp"),
}
# ggml's types by their names; the numbers of Q4_0, Q5_0 and Q8_0 are those of ordinary schemes, and print as such
GGUF_TYPES: dict[str, QuantScheme] = {
    **{f"GGUF:Q{bits}_0": QuantScheme(bits, 32) for bits in (4, 5, 8)},
    **{
        f"GGUF:{name.upper()}": QuantScheme(kind.bits, kind.group_size, kind.sym, name)
        for name, kind in BLOCK_TYPES.items()
    },
}
