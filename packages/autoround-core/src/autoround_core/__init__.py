"""Core of AutoRound: records, numerics, algorithms, and the registry where formats and backends meet.

Names are imported when first used: `import autoround_core` itself loads neither torch nor transformers.
`__all__` is the contract with plugins; a minor release adds to it and takes nothing away.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "adapter": ("BlockView", "LinearSite", "ModelAdapter", "ModelView"),
    "algorithm": ("Algorithm", "Block", "BlockResult", "Run"),
    "autoround": ("AutoRound",),
    "backend": ("Backend", "select_backend"),
    "bitpack": ("pack_bits", "packed_bytes", "unpack_bits"),
    "calibration": ("load_calibration",),
    "calibration_set": ("CalibrationSet",),
    "compute": ("product_dtype",),
    "conversion": ("convert",),
    "errors": (
        "AutoRoundError", "CalibrationError", "CheckpointError", "ModelError", "NonFiniteError", "OutputError",
        "PluginError", "UnknownNameError", "UnsupportedError", "UsageError", "VerificationError", "unknown_name",
    ),
    "evaluation": ("Estimate", "Evaluation", "evaluate"),
    "family": ("NumberFamily", "TunableWeight"),
    "format": (
        "CheckpointContext", "CheckpointFormat", "CheckpointReader", "CheckpointWriter", "ModelOutline", "SchemeChoice",
    ),
    "fusing": ("fused_layers",),
    "hookspecs": ("hookimpl",),
    "layout": ("TensorLayout",),
    "loading": ("load",),
    "plan": ("LayerPlan", "Plan"),
    "progress": ("Progress",),
    "recipe": ("LinearSpec", "QuantRecipe", "parse_layer_config"),
    "records": ("AffineWeight", "FloatWeight", "QuantizedLayer", "QuantizedWeight"),
    "registry": ("PluginRecord", "Registry", "get_registry"),
    "scheme": ("ActivationScheme", "QuantScheme"),
    "settings": ("RECIPES", "TuningSettings", "tuning_settings"),
    "superblock": ("SuperBlockWeight",),
    "support": ("Support",),
    "target": ("Target", "Verdict"),
    "transformers_adapter": ("TransformersAdapter",),
    "shards": ("ShardWriter", "TensorFiles", "read_json", "write_json"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module `autoround_core` has no attribute `{name}`")
    return getattr(import_module(f"autoround_core.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
