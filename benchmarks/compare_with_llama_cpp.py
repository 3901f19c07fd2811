"""`autoround` beside llama.cpp's own quantizer on the same files: KL divergence, perplexity, top-1, and their ratios.

For each file type our recipes write a file, and `llama_model_quantize` makes one of our float32 file. Where a recipe
calibrates, llama.cpp gets an importance from the same rows of tokens: the mean square of what enters each linear layer
of the original model, its output matrix included where that is one of its own. `rtn` needs no data, and is compared
with llama.cpp without an importance.

All files are dequantized by our reader into one float32 Transformers model, and scored against the original on the
same windows of held-out text, which are close to independent. So a difference of two files is one of pairs of windows,
and its interval is far narrower than those of the two. What llama.cpp's kernels round besides is the same for both and
not part of this.

    python benchmarks/compare_with_llama_cpp.py --llama_python PY --file_types q4_k_m q2_k

--llama_python: interpreter of an environment with llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
FILE_TYPES = ["q2_k_s", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1",
              "q5_k_s", "q5_k_m", "q6_k", "q8_0"]  # fmt: skip
WINDOW = 256
# argument: source, target, number of the file type, threads, importance (.npz of float32 by tensor) or null
LLAMA = """
import ctypes, json, sys
import llama_cpp.llama_cpp as llama, numpy
job = json.loads(sys.argv[1])
settings = llama.llama_model_quantize_default_params()
settings.nthread, settings.ftype = job["threads"], job["number"]
if job["importance"]:
    given = dict(numpy.load(job["importance"]))
    array = (llama.llama_model_imatrix_data * (len(given) + 1))()  # ends with an empty one
    for entry, (name, values) in zip(array, given.items()):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    settings.imatrix = ctypes.cast(array, ctypes.POINTER(llama.llama_model_imatrix_data))
llama.llama_backend_init()
sys.exit(llama.llama_model_quantize(job["source"].encode(), job["target"].encode(), ctypes.byref(settings)))
"""


@dataclass(frozen=True, slots=True)
class Score:
    """A file: one number for each window, its size in bytes and the types of its tensors."""

    kl: list[float]
    nll: list[float]
    top1: list[float]
    size: int
    types: dict[str, str]


def mean(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error)."""
    center = sum(values) / len(values)
    variance = sum((value - center) ** 2 for value in values) / max(len(values) - 1, 1)
    return center, math.sqrt(variance / len(values))


class Scorer:
    """Puts what a file holds into a float32 model, and scores that against the original."""

    def __init__(self, reference, model, rows) -> None:
        self._reference, self._model, self._rows = reference, model, rows

    def score(self, path: Path) -> Score:
        import torch

        from autoround_core import evaluate
        from autoround_export.gguf.file import GgufFile
        from autoround_export.gguf.reader import GgufReader

        parameters = dict(self._model.named_parameters())
        reader = GgufReader(path)
        held = {f"{layer.name}.weight": layer.weight.dequantize(torch.float32) for layer in reader.layers()}
        biases = {f"{layer.name}.bias": layer.bias for layer in reader.layers() if layer.bias is not None}
        held |= biases | dict(reader.rest())
        if held.keys() != parameters.keys():
            stranger = min(held.keys() ^ parameters.keys())
            raise SystemExit(f"{path.name} and the model differ in {stranger}; a model whose parameters are not named "
                             "as in its checkpoint, as with experts, cannot be compared here")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(held[name])
        windows = [evaluate(self._model, row[None], self._reference) for row in self._rows]
        return Score(
            [window.kl.value for window in windows], [math.log(window.perplexity.value) for window in windows],
            [window.top1.value for window in windows], path.stat().st_size,
            {name: info.type for name, info in GgufFile(path).tensors.items()},
        )  # fmt: skip


def record_importance(model, input_ids, outline) -> dict:
    """{tensor of the file: mean square of what enters it, float32 [in]} of the linear layers of a model."""
    import torch

    sums: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def hook(module, inputs):
            rows = inputs[0].detach().flatten(0, -2)
            sums[f"{name}.weight"] = sums.get(f"{name}.weight", 0.0) + rows.double().square().sum(0)

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear)]  # fmt: skip
    with torch.no_grad():
        for rows in input_ids.split(8):
            model(input_ids=rows, use_cache=False)
    for handle in handles:
        handle.remove()
    # layers that are joined in the file have the same inputs; a head that is the embedding is no tensor of its own
    return {tensor.name: (sums[tensor.pieces[0].source] / input_ids.numel()).float().numpy()
            for tensor in outline.tensors if tensor.pieces[0].source in sums}  # fmt: skip


def llama_cpp(python: str, source: Path, target: Path, file_type: str, importance: Path | None, threads: int) -> bool:
    """Let llama.cpp quantize; false where it refuses, as it does with q2_k_s without an importance."""
    from autoround_export.gguf.mixture import FILE_TYPES as KNOWN

    job = dict(source=str(source), target=str(target), number=KNOWN[file_type].number, threads=threads,
               importance=None if importance is None else str(importance))  # fmt: skip
    done = subprocess.run([python, "-c", LLAMA, json.dumps(job)], capture_output=True, text=True, check=False)
    if done.returncode and (importance is not None or "imatrix" not in done.stderr):
        raise SystemExit(f"llama.cpp failed at {file_type}:\n{done.stderr[-3000:]}")
    return done.returncode == 0


def row(file_type: str, recipe: str, ours: Score, theirs: Score | None) -> tuple[str, float | None]:
    """(a line of the table, the ratio of KL)."""

    def cell(values: Sequence[float]) -> str:
        center, error = mean(values)
        return f"{center:.4g} ± {error:.1g}"

    def perplexity(nll: Sequence[float]) -> str:
        center, error = mean(nll)
        return f"{math.exp(center):.4f} ± {math.exp(center) * error:.1g}"

    if theirs is None:
        parts = [cell(ours.kl), "refused", "", "", perplexity(ours.nll), "", cell(ours.top1), "", f"{ours.size}", ""]
        return f"| {file_type} | {recipe} | {' | '.join(parts)} |", None
    kl, nll, top1 = ((getattr(ours, name), getattr(theirs, name)) for name in ("kl", "nll", "top1"))
    ratio = mean(kl[0])[0] / mean(kl[1])[0]
    difference, error = mean([one - other for one, other in zip(*kl, strict=True)])
    interval = f"{difference:+.2g} ({difference - 1.96 * error:+.2g}, {difference + 1.96 * error:+.2g})"
    same = "" if ours.types == theirs.types else ", other types"
    parts = [cell(kl[0]), cell(kl[1]), f"{ratio:.3f}", interval, *map(perplexity, nll), *map(cell, top1),
             f"{ours.size}", f"{ours.size / theirs.size:.4f}{same}"]  # fmt: skip
    return f"| {file_type} | {recipe} | {' | '.join(parts)} |", ratio


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama_python", required=True, help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--file_types", nargs="+", default=FILE_TYPES, choices=FILE_TYPES)
    parser.add_argument("--recipes", nargs="+", default=["rtn", "opt_rtn", "base"])
    parser.add_argument("--dataset", default="stdlib", help="calibration data: a file, or the offline corpus")
    parser.add_argument("--text", type=Path, help="text to score on; default: the held-out part of the offline corpus")
    parser.add_argument("--iters", type=int, help="of the recipes that tune; default: theirs")
    parser.add_argument("--windows", type=int, default=96, help=f"of {WINDOW} tokens to score on")
    for name, default in dict(nsamples=64, seqlen=256, batch_size=8, seed=42, threads=1).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    os.environ.update(OMP_NUM_THREADS=str(options.threads), HF_HUB_OFFLINE="1")  # before torch is imported
    import numpy
    import torch

    from autoround_core import RECIPES, AutoRound, load_calibration
    from autoround_core.evaluation import evaluation_texts, load_for_evaluation, windows_of
    from autoround_export.gguf.composition import compose

    torch.set_num_threads(options.threads)
    reference, tokenizer = load_for_evaluation(options.model, dtype=torch.float32)
    model, _ = load_for_evaluation(options.model, dtype=torch.float32)
    rows = windows_of(evaluation_texts(options.text), tokenizer, seqlen=WINDOW, windows=options.windows)
    scorer = Scorer(reference, model, rows)
    data = dict(nsamples=options.nsamples, seqlen=options.seqlen, seed=options.seed)
    calibration = load_calibration(options.dataset, tokenizer, **data)
    outline = compose(AutoRound(options.model, recipe="rtn").plan("gguf:f32").model)
    print(f"{options.model.name}, {len(rows)} windows of {WINDOW} tokens; calibrated on {calibration.samples} x "
          f"{calibration.seqlen} tokens\n\n| file type | recipe | KL | KL llama.cpp | ratio | difference (95 %) | "
          "perplexity | llama.cpp | top-1 | llama.cpp | bytes | ratio |\n" + "|---" * 12 + "|")  # fmt: skip
    ratios: dict[str, list[float]] = {recipe: [] for recipe in options.recipes}
    with tempfile.TemporaryDirectory() as scratch:
        importance = Path(scratch, "importance.npz")
        numpy.savez(importance, **record_importance(reference, calibration.input_ids, outline))

        def ours(recipe: str, file_type: str) -> Path:
            tuned = RECIPES[recipe].algorithm == "signround"
            run = AutoRound(options.model, recipe=recipe, dataset=options.dataset, batch_size=options.batch_size,
                            iters=options.iters if tuned else None, device="cpu", **data)  # fmt: skip
            saved = run.quantize_and_save(Path(scratch, "ours"), f"gguf:{file_type}", overwrite=True)
            return next(saved.glob("*.gguf"))

        source = ours("rtn", "f32").rename(Path(scratch, "f32.gguf"))
        for file_type in options.file_types:
            theirs: dict[bool, Score | None] = {}
            for recipe in options.recipes:
                known = RECIPES[recipe].algorithm != "rtn"
                if known not in theirs:
                    target = Path(scratch, "theirs.gguf")
                    made = llama_cpp(options.llama_python, source, target, file_type, importance if known else None,
                                     options.threads)  # fmt: skip
                    theirs[known] = scorer.score(target) if made else None
                line, ratio = row(file_type, recipe, scorer.score(ours(recipe, file_type)), theirs[known])
                print(line, flush=True)
                if ratio is not None:
                    ratios[recipe].append(math.log(ratio))
    for recipe, logs in ratios.items():
        if logs:
            print(f"| geometric mean | {recipe} | | | {math.exp(sum(logs) / len(logs)):.3f} |{' |' * 7}")


if __name__ == "__main__":
    main()
