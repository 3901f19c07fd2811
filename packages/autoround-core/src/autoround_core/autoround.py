"""The face of the library: `AutoRound(model, tokenizer, bits=4).quantize_and_save(directory)`."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from autoround_core.activations import QuantizedInputs
from autoround_core.adapter import ModelAdapter, ModelView
from autoround_core.calibration import DEFAULT_DATASET, load_calibration
from autoround_core.calibration_set import CalibrationSet
from autoround_core.checkpoints import Checkpoints
from autoround_core.compute import Compute, find_device, product_dtype
from autoround_core.errors import UsageError, unknown_name
from autoround_core.format import CheckpointFormat
from autoround_core.fusing import CHECK, FUSE_MODES
from autoround_core.int_family import IntFamily
from autoround_core.model_outline import choose, outline, with_choices
from autoround_core.output import OutputDirectory
from autoround_core.plan import Plan, make_plan
from autoround_core.progress import Progress
from autoround_core.quantize import BlockDriver, BlockOutcome, check_finite
from autoround_core.recipe import choose_scheme, parse_layer_config
from autoround_core.registry import get_registry
from autoround_core.report import Phases, build_report
from autoround_core.scheme import SCALE_SIGNS, QuantScheme
from autoround_core.settings import TuningSettings, tuning_settings
from autoround_core.shards import write_json
from autoround_core.source import check_source, copy_companions, find_model
from autoround_core.target import ANY, Target
from autoround_core.verify import PROBE_TOKENS

REPORT = "report.json"


class AutoRound:
    """Quantizes one model.

    model: a directory, a hub id, or a loaded Transformers model (which is then changed: it ends up
    fake-quantized). tokenizer: None = the one beside the model. scheme: "W4G128", "W2G64-asym"; or bits,
    group_size, sym. recipe: best, base, light, opt_rtn, rtn; its numbers can be overridden by keyword:
    algorithm, iters, nsamples, seqlen, batch_size, gradient_accumulate_steps, lr, minmax_lr, seed.
    layer_config: {layer name or regular expression: scheme, 16, or {bits, group_size, sym}}. dataset: see
    `load_calibration`. amp: matrix products in 16 bits while tuning; None = where the device is faster at
    them. strict: a layer that the format cannot store is an error; otherwise it stays in 16 bits and the plan
    says so. fuse: "check" refuses different schemes for layers that engines run as one, "promote" gives all of
    them the widest, "off" lets them be. scale_sign: "positive" keeps symmetric scales of integers from being negative,
    for kernels that want them so. target: the engine to check the plan against, see `Target.parse`. format_options: of
    the formats that have any, {"gguf_pre": "qwen2"}. quant_nontext_module: also what is outside the language tower of a
    model of images or sound. skip_bad_samples: leave out samples that cannot be read, and count them in the report.

    Raises UsageError for anything that cannot be meant, before the model is loaded.
    """

    def __init__(
        self,
        model: str | Path | torch.nn.Module,
        tokenizer: Any = None,
        *,
        scheme: str | QuantScheme | None = None,
        bits: int | None = None,
        group_size: int | None = None,
        sym: bool | None = None,
        recipe: str | None = None,
        layer_config: Any = None,
        dataset: Any = None,
        device: str | torch.device | None = None,
        device_map: str | torch.device | None = None,
        low_gpu_mem_usage: bool = False,
        quant_lm_head: bool = False,
        quant_nontext_module: bool = False,
        skip_bad_samples: bool = False,
        amp: bool | None = None,
        strict: bool = True,
        fuse: str = CHECK,
        scale_sign: str = "any",
        target: str = ANY,
        trust_remote_code: bool = False,
        format_options: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> None:
        if fuse not in FUSE_MODES:
            raise unknown_name("fuse mode", str(fuse), FUSE_MODES)
        if scale_sign not in SCALE_SIGNS:
            raise unknown_name("scale sign", str(scale_sign), SCALE_SIGNS)
        names = [*inspect.signature(AutoRound).parameters, *TuningSettings.__dataclass_fields__]
        for name in settings:
            if name not in TuningSettings.__dataclass_fields__:
                raise unknown_name("option", name, set(names) - {"settings"})
        self._recipe = parse_layer_config(layer_config, choose_scheme(scheme, bits, group_size, sym))
        self._scheme_given = any(part is not None for part in (scheme, bits, group_size, sym))
        self._format_options = dict(format_options or {})
        self._settings = tuning_settings(recipe, **settings)
        self._algorithm = get_registry().algorithm(self._settings.algorithm)
        self._families = get_registry().number_families()
        if scale_sign == "positive":
            self._families = {**self._families, IntFamily.data_type: IntFamily(positive=True)}
        self._dataset, self._tokenizer = dataset, tokenizer
        self._device = find_device(device if device is not None else device_map)
        self._low_gpu_mem_usage, self._amp, self._strict = low_gpu_mem_usage, amp, strict
        self._fuse, self._target = fuse, Target.parse(target)
        self._quant_lm_head, self._trust = quant_lm_head, trust_remote_code
        self._quant_nontext, self._skip_bad = quant_nontext_module, skip_bad_samples
        self._progress = progress or Progress()
        self._phases = Phases()
        self._outcomes: list[BlockOutcome] = []
        self._products = torch.float32
        self._inputs = QuantizedInputs()
        self._calibration: CalibrationSet | None = None
        self._loaded: torch.nn.Module | None = None
        self._path: Path | None = None
        self._tokenizer_home: TemporaryDirectory | None = None
        if isinstance(model, torch.nn.Module):
            if not hasattr(model, "config"):
                raise UsageError(
                    f"model is a {type(model).__name__} without a config; give a Transformers model, "
                    "a directory or a hub id"
                )
            self._loaded = model
            path = Path(getattr(model, "name_or_path", "") or "/nonexistent")
            self._path = path if path.is_dir() else None
            self._config = model.config.to_dict()
        else:
            self._path = find_model(model)
            self._config = check_source(self._path, trust_remote_code=trust_remote_code)
        self._name = str(model) if self._loaded is None else type(model).__name__
        self._owns_model = self._loaded is None
        self._adapter: ModelAdapter = get_registry().adapter(self._config)
        self._view: ModelView | None = None

    # --- before the run -------------------------------------------------------------------------------------

    def plan(self, format: str = "auto_round") -> Plan:
        """What would happen to each layer. Loads no weights. Raises as `quantize_and_save` would."""
        if self._view is not None or self._loaded is not None:
            return self._plan(self._get_view(), self._formats(format))
        assert self._path is not None
        skeleton = self._adapter.skeleton(self._path, trust_remote_code=self._trust)
        return self._plan(self._adapter.view(skeleton), self._formats(format))

    def _formats(self, spelling: str) -> list[CheckpointFormat]:
        names = [name.strip() for name in spelling.split(",")]
        if len(set(names)) != len(names):
            raise UsageError(f"format `{spelling}` names a format twice")
        return [get_registry().format(name) for name in names]

    def _plan(self, view: ModelView, formats: Sequence[CheckpointFormat]) -> Plan:
        model = outline(
            self._adapter, view, self._config, self._tokenizer_files(), self._name, options=self._format_options,
            calibrated=self._algorithm.needs_data, formats=formats,
        )
        choices = choose(formats, model)
        plan = make_plan(
            view,
            with_choices(self._recipe, choices, given=self._scheme_given),
            self._settings,
            formats=formats,
            families=self._families,
            backends=list(get_registry().backends().values()),
            device=self._device,
            dtype=view.model.dtype,
            quant_lm_head=self._quant_lm_head,
            quant_nontext=self._quant_nontext,
            strict=self._strict,
            needs_data=self._algorithm.needs_data,
            model_type=self._config.get("model_type"),
            fuse=self._fuse,
            target=self._target,
            other_formats=list(get_registry().formats().values()),
            choices=choices,
        )
        return replace(plan, model=model)

    def _tokenizer_files(self) -> Path | None:
        """Where the tokenizer lies; one that was given with a loaded model is written somewhere first."""
        if self._path is None and self._tokenizer is not None and self._tokenizer_home is None:
            self._tokenizer_home = TemporaryDirectory(prefix="autoround-")
            weakref.finalize(self, self._tokenizer_home.cleanup)
            self._tokenizer.save_pretrained(self._tokenizer_home.name)
        return self._path if self._tokenizer_home is None else Path(self._tokenizer_home.name)

    # --- the run --------------------------------------------------------------------------------------------

    def quantize(self) -> torch.nn.Module:
        """Quantize and keep the records in memory; return the fake-quantized model."""
        plan = self._plan(self._get_view(), [])
        self._outcomes = list(self._run(plan))
        return self._get_view().model

    def save_quantized(self, output_dir: str | Path, format: str = "auto_round", *, overwrite: bool = False) -> Path:
        """Write what `quantize` made. Raises UsageError when it has not run."""
        if not self._outcomes:
            raise UsageError("nothing is quantized yet; call quantize() first, or quantize_and_save()")
        outcomes = self._outcomes
        try:
            return self._save(output_dir, format, overwrite, lambda plan: _as_planned(outcomes, plan))
        except Exception:
            self._outcomes = outcomes  # what was tuned for hours is still there for another format
            raise

    def quantize_and_save(self, output_dir: str | Path, format: str = "auto_round", *, overwrite: bool = False) -> Path:
        """Quantize and write layer by layer; verify; return the directory.

        format: one name, written straight into `output_dir`, or several joined by commas, each into a folder of its
        name. Nothing appears under `output_dir` until everything is written and verified.
        """
        return self._save(output_dir, format, overwrite, self._run)

    def _save(self, output_dir, spelling: str, overwrite: bool, produce) -> Path:
        output = OutputDirectory(output_dir, self._path, overwrite=overwrite)
        formats = self._formats(spelling)
        plan = self._plan(self._get_view(), formats)
        with output as work:
            checkpoints = self._write(plan, formats, work, produce(plan))
            self._progress.phase("verify")
            with self._phases.measure("verify"):
                verification = self._verify(checkpoints)
            report = build_report(
                model=self._name,
                formats=[fmt.name for fmt in formats],
                plan=plan,
                settings=self._settings,
                device=self._device,
                products=self._products,
                outcomes=self._outcomes,
                calibration=self._calibration,
                phases=self._phases,
                verification=verification,
            )
            for folder in checkpoints.folders:
                write_json(folder / REPORT, report)
        return output.final

    def _write(
        self, plan: Plan, formats: Sequence[CheckpointFormat], work: Path, outcomes: Iterator[BlockOutcome]
    ) -> Checkpoints:
        checkpoints = Checkpoints(
            formats, work, plan, self._get_view(), self._adapter, config=self._config, settings=self._settings
        )
        self._outcomes = []
        for outcome in outcomes:
            self._outcomes.append(outcome)
            for done in outcome.layers:
                checkpoints.add(done.layer)
        self._progress.phase("save")
        with self._phases.measure("save"):
            checkpoints.finish()
            for folder in checkpoints.folders:
                self._copy_companions(folder)
        return checkpoints

    def _copy_companions(self, folder: Path) -> None:
        if self._path is not None:
            copy_companions(self._path, folder, with_code=self._trust)
        elif self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)

    def _run(self, plan: Plan) -> Iterator[BlockOutcome]:
        view = self._get_view()
        data = self._calibrate() if plan.needs_data else None
        self._progress.phase("quantize")
        storage = torch.device("cpu") if self._low_gpu_mem_usage else self._device
        self._products = product_dtype(view.model.dtype, self._device, self._amp)
        compute = Compute(self._device, storage, self._products, self._settings.batch_size)
        driver = BlockDriver(
            view, plan, self._algorithm, self._families, self._settings, compute, self._progress, self._inputs
        )
        tuning = self._adapter.tuning(view.model, self._device)
        with self._phases.measure("quantize"), tuning:
            yield from driver.run(data)

    def _calibrate(self) -> CalibrationSet:
        self._progress.phase("calibrate")
        settings, wanted = self._settings, self._dataset
        numbers = dict(nsamples=settings.nsamples, seqlen=settings.seqlen, seed=settings.seed)
        with self._phases.measure("calibrate"):
            self._calibration = self._adapter.calibration_set(
                wanted, self._tokenizer, self._path, **numbers,
                skip_bad_samples=self._skip_bad, trust_remote_code=self._trust,
            )
            if self._calibration is None:
                if self._skip_bad:
                    raise UsageError("skip_bad_samples is for models of images and text; leave it out")
                if self._tokenizer is None and self._path is not None:
                    self._tokenizer = self._adapter.tokenizer(self._path, trust_remote_code=self._trust)
                dataset = DEFAULT_DATASET if wanted is None else wanted
                self._calibration = load_calibration(dataset, self._tokenizer, **numbers)
        return self._calibration

    def _verify(self, checkpoints: Checkpoints) -> dict[str, Any]:
        inputs = self._probe_inputs()
        expected = checkpoints.expected(inputs, self._inputs)
        if self._owns_model:
            # the loaded checkpoint needs the room; a model that the user passed in is not ours to drop
            self._view = self._loaded = None
            gc.collect()
        return checkpoints.verify(inputs, expected, trust_remote_code=self._trust)

    def _probe_inputs(self) -> dict[str, torch.Tensor]:
        """What the saved model is tried on."""
        model = self._get_view().model
        inputs = self._adapter.probe_inputs(model, self._tokenizer, self._path, trust_remote_code=self._trust)
        if inputs is not None:
            return inputs
        tokens = torch.arange(PROBE_TOKENS) % model.get_input_embeddings().num_embeddings
        if self._calibration is not None:
            tokens = self._calibration.input_ids[0, :PROBE_TOKENS]
        return {"input_ids": tokens[None]}

    # --- the model ------------------------------------------------------------------------------------------

    def _get_view(self) -> ModelView:
        if self._view is None:
            self._progress.phase("load")
            with self._phases.measure("load"):
                if self._loaded is None:
                    assert self._path is not None
                    self._loaded = self._adapter.load(self._path, trust_remote_code=self._trust)
                check_finite(self._loaded)
                self._view = self._adapter.view(self._loaded)
        return self._view


def _as_planned(outcomes: Sequence[BlockOutcome], plan: Plan) -> Iterator[BlockOutcome]:
    """The outcomes. Raises UsageError when they are not what the plan of a format asks for."""
    made = {done.layer.name: done.layer.weight.scheme for outcome in outcomes for done in outcome.layers}
    for name in sorted(made.keys() | plan.quantized().keys()):
        spec = plan.quantized().get(name)
        if spec is None or made.get(name) != spec.scheme:
            raise UsageError(f"this format wants `{name}` as {spec.scheme if spec else '16 bits'}, it was quantized as "
                             f"{made.get(name, '16 bits')}; use quantize_and_save with this format instead")
    return iter(outcomes)
