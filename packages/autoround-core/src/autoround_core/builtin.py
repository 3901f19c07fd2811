"""Core's own contributions, registered like any plugin's."""

from __future__ import annotations

from autoround_core.hookspecs import hookimpl


@hookimpl
def autoround_number_families():
    from autoround_core.float_family import Fp, MxFp, NvFp
    from autoround_core.int_family import IntFamily

    return [IntFamily(), Fp(), MxFp(), NvFp()]


@hookimpl
def autoround_algorithms():
    from autoround_core.rtn import RoundToNearest, SearchedScales
    from autoround_core.signround import SignRound

    return [RoundToNearest(), SearchedScales(), SignRound()]


@hookimpl(trylast=True)
def autoround_model_adapter(config):
    from autoround_core.causal_lm import CausalLM
    from autoround_core.errors import ModelError
    from autoround_core.transformers_adapter import takes_images

    if takes_images(config):
        raise ModelError(f"`{config['model_type']}` is a vision-language model; pip install autoround-mllm")
    return CausalLM()
