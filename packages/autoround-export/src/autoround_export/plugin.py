"""The formats of this package, as a plugin of autoround-core."""

from __future__ import annotations

from autoround_core.hookspecs import hookimpl


@hookimpl
def autoround_formats():
    from autoround_export.auto_awq import AutoAwqFormat
    from autoround_export.auto_gptq import AutoGptqFormat
    from autoround_export.auto_round import AutoRoundFormat
    from autoround_export.dense import DenseFormat
    from autoround_export.gguf.format import GgufFormat
    from autoround_export.llm_compressor import LlmCompressorFormat
    from autoround_export.mlx import MlxFormat

    return [AutoRoundFormat(), AutoGptqFormat(), AutoAwqFormat(), LlmCompressorFormat(), MlxFormat(), GgufFormat(),
            DenseFormat()]


@hookimpl
def autoround_number_families():
    from autoround_export.gguf.families import super_block_families

    return super_block_families()
