"""From one checkpoint format to another: the same integers and scales, packed differently, or a refusal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from autoround_core.errors import UnsupportedError, UsageError
from autoround_core.format import CheckpointContext, CheckpointFormat, CheckpointReader, ModelOutline
from autoround_core.loading import find_format, spec_of
from autoround_core.model_outline import stored_shapes
from autoround_core.output import OutputDirectory
from autoround_core.recipe import LinearSpec, QuantRecipe
from autoround_core.registry import get_registry
from autoround_core.settings import TuningSettings
from autoround_core.source import copy_companions
from autoround_core.verify import Expectation

_SECTIONS = ("quantization_config", "quantization")


def convert(
    source: str | Path, output_dir: str | Path, format: str, *, overwrite: bool = False, trust_remote_code: bool = False
) -> Path:
    """Write the checkpoint `source` again in another format, verify every layer, and return the directory.

    Nothing is rounded: raises UnsupportedError, before anything is written, when the format cannot hold a layer as it
    is, and UsageError when the source holds no quantized layers.
    """
    source = Path(source)
    target, found = get_registry().format(format), find_format(source)
    reader = found.read(source)
    output = OutputDirectory(output_dir, source, overwrite=overwrite)
    quantized = {layer.name: spec_of(layer) for layer in reader.layers()}
    if not quantized:
        raise UsageError(f"`{source}` holds no quantized layers; make some with `autoround quantize`")
    _check(target, quantized)
    with found.home(source) as home, output as work:
        context = _context(home, source.resolve().stem, reader, quantized, trust_remote_code=trust_remote_code)
        expectation = Expectation(None if target.stores_records else context.dtype)
        writer = target.open(work, context)
        for layer in reader.layers():
            expectation.add(layer)
            writer.add(layer)
        for name, tensor in reader.rest():
            writer.keep(name, tensor)
        writer.finish()
        copy_companions(home, work, with_code=trust_remote_code)
        expectation.check_layers(target, work, set(context.transposed))
    return output.final


def _check(target: CheckpointFormat, quantized: Mapping[str, LinearSpec]) -> None:
    for name, spec in quantized.items():
        if reason := target.why_not(spec):
            raise UnsupportedError(f"layer `{name}` ({spec.scheme}) cannot be stored in {target.name}: {reason}")
    if reason := target.why_not_together(list(quantized.values())):
        raise UnsupportedError(f"format {target.name}: {reason}")


def _context(
    home: Path, name: str, reader: CheckpointReader, quantized: Mapping[str, LinearSpec], *, trust_remote_code: bool
) -> CheckpointContext:
    """What a writer wants to know, as far as a checkpoint tells: the default is the scheme of most layers."""
    config = {key: value for key, value in reader.config.items() if key not in _SECTIONS}
    adapter = get_registry().adapter(config)
    view = adapter.view(adapter.skeleton(home, trust_remote_code=trust_remote_code))
    nontext = any(site.name in quantized for site in view.nontext_sites())
    sites = [*(view.nontext_sites() if nontext else ()), *view.sites(),
             *(site for site in view.outer() if site.name in quantized)]
    layers = [
        quantized.get(site.name) or LinearSpec(site.name, site.in_features, site.out_features, None) for site in sites
    ]
    (default, _), = Counter(spec.scheme for spec in quantized.values()).most_common(1)
    return CheckpointContext(
        config=config,
        recipe=QuantRecipe(default),
        layers=layers,
        blocks=view.stored_blocks(quantized),
        kept=list(view.all_kept(nontext=nontext)),
        transposed=[site.name for site in view.all_sites() if site.transposed and site.expert is None],
        dtype=view.model.dtype,
        settings=TuningSettings(),
        model=ModelOutline(config, stored_shapes(adapter, view), home, {}, calibrated=False, name=name),
    )
