"""A whole model on a CPU, beside Transformers in bfloat16 and llama.cpp's q4_0, and what loading it costs.

The model has the shape of Qwen3-0.6B and random weights: speed does not depend on them, quality is measured elsewhere.
Each runs in a process of its own, in turn, several rounds; the fastest step of each counts, and the median is shown
beside it. llama.cpp's file is made by our format `gguf:q4_0` from the same weights: its matrices have 4.5 bits, its
head 6.6, where ours keeps a head of 16 bits that is the embedding too.

Loading is compared with what it cannot do without: reading the bytes of the files, and for each layer unpacking its
codes and packing them as the kernels want them. Memory is the growth of the process from a model without weights.

    python benchmarks/compare_decode.py --threads 2 --llama_python PY

--llama_python: interpreter of an environment with llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
SHAPE = dict(
    hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    intermediate_size=3072, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=40960,
    max_window_layers=28,
)  # fmt: skip
PROMPT, STEPS = 32, 24
# each program prints one JSON object; argv: path, threads, prompt tokens, steps
TIMED = """
import json, sys, time
path, threads, prompt, steps = sys.argv[1], *map(int, sys.argv[2:])
def report(first, step, **more):
    start = time.perf_counter(); first(); prefill = time.perf_counter() - start
    times = []
    for _ in range(steps):
        start = time.perf_counter(); step(); times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    print(json.dumps(dict(prefill=prompt / prefill, best=times[0], median=times[len(times) // 2], **more)))
"""
TORCH = TIMED + """
import torch
torch.set_num_threads(threads)
MODEL
ids = torch.randint(0, 2000, (1, prompt), generator=torch.Generator().manual_seed(0))
state = {}
@torch.inference_mode()
def run(ids):
    output = model(input_ids=ids, past_key_values=state.get("past"), use_cache=True, logits_to_keep=1)
    state["past"], state["token"] = output.past_key_values, output.logits[:, -1:].argmax(-1)
report(lambda: run(ids), lambda: run(state["token"]))
"""
PROGRAMS = {
    "transformers bfloat16": TORCH.replace(
        "MODEL", "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)"
    ),
    "autoround W4G128": TORCH.replace("MODEL", "from autoround_core import load\nmodel = load(path)"),
    "llama.cpp q4_0": TIMED + """
from llama_cpp import Llama
model = Llama(path, n_threads=threads, n_threads_batch=threads, n_ctx=256, verbose=False)
report(lambda: model.eval(list(range(100, 100 + prompt))), lambda: model.eval([5]))
""",
}  # fmt: skip
LOADING = """
import json, sys, time
from pathlib import Path
import torch
from autoround_backends import native_library
from autoround_core import get_registry, read_json
from autoround_core.loading import assemble, find_format
path = Path(sys.argv[1]); torch.set_num_threads(int(sys.argv[2]))
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
found = find_format(path)
adapter = get_registry().adapter(read_json(path / "config.json"))
adapter.skeleton(path, trust_remote_code=False, dtype=None)  # imports
buffer = bytearray(16 << 20)
def read():
    for file in path.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
def timed(function):
    start = time.perf_counter(); function(); return time.perf_counter() - start
def repack():
    for layer in found.read(path).layers():
        native_library.pack(layer.weight.codes, layer.weight.scheme.bits)
def load():
    model = adapter.skeleton(path, trust_remote_code=False, dtype=None)
    return assemble(model, adapter, found.read(path), device=torch.device("cpu"), backend="auto")
read()
if sys.argv[3] == "memory":
    before = peak(); model = load()
    with torch.inference_mode(): model(torch.arange(8)[None])
    print(json.dumps(dict(peak=peak() - before)))
else:
    best = {name: min(timed(function) for _ in range(3)) for name, function in
            (("read", read), ("repack", repack), ("load", load))}
    print(json.dumps(best))
"""


def make_models(work: Path, with_llama: bool) -> dict[str, Path]:
    """The random model, and what is made of it; kept where `work` has them from an earlier run."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model = work / "model"
    if not (model / "model.safetensors").exists():
        model.mkdir(parents=True, exist_ok=True)
        config = json.loads((SMALL / "config.json").read_text()) | SHAPE
        config.pop("layer_types", None)
        (model / "config.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        random = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
        random.save_pretrained(model)
        AutoTokenizer.from_pretrained(SMALL).save_pretrained(model)
    paths = {"transformers bfloat16": model, "autoround W4G128": work / "w4"}
    formats = {"auto_round": work / "w4"} | ({"gguf:q4_0": work / "gguf"} if with_llama else {})
    for name, out in formats.items():
        if not out.exists():
            program = "from autoround_cli.main import main; main()"
            command = [sys.executable, "-c", program, "quantize", "--model", model, "--recipe", "rtn", "--format",
                       name, "--output_dir", out, "--quiet"]  # fmt: skip
            subprocess.run([str(part) for part in command], check=True)
    if with_llama:
        paths["llama.cpp q4_0"] = next((work / "gguf").glob("*.gguf"))
    return paths


def call(python: str, program: str, *arguments: object) -> dict[str, float]:
    command = [python, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def show_speed(paths: dict[str, Path], llama_python: str | None, threads: int, rounds: int) -> None:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, path in paths.items():
            python = llama_python if name.startswith("llama") and llama_python else sys.executable
            results[name].append(call(python, PROGRAMS[name], path, threads, PROMPT, STEPS))
    ours = min(result["best"] for result in results["autoround W4G128"])
    print(f"{threads} threads{'':16} ms a token, best   median   tokens/s   autoround / this   prefill tokens/s")
    for name, rows in results.items():
        best, median = (min(row[key] for row in rows) for key in ("best", "median"))
        prefill = max(row["prefill"] for row in rows)
        print(f"{name:25} {best:18.1f} {median:8.1f} {1e3 / best:10.1f} {best / ours:18.2f} {prefill:18.1f}")


def show_loading(path: Path, threads: int) -> None:
    times, memory = (call(sys.executable, LOADING, path, threads, what) for what in ("time", "memory"))
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    least = times["read"] + times["repack"]
    print(f"\nloading {size / 1e6:,.0f} MB: {times['load']:.2f} s; reading {times['read']:.2f} s and one repack "
          f"{times['repack']:.2f} s: {times['load'] / least:.2f} of them together")
    print(f"peak memory {memory['peak'] / 1e6:,.0f} MB, {memory['peak'] / size:.2f} of the packed model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama_python")
    parser.add_argument("--work", type=Path, help="where the models are made and kept; a temporary directory otherwise")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        paths = make_models(asked.work or Path(temporary), bool(asked.llama_python))
        show_speed(paths, asked.llama_python, asked.threads, asked.rounds)
        show_loading(paths["autoround W4G128"], asked.threads)


if __name__ == "__main__":
    main()
