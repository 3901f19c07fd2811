"""From a weight to ggml's blocks on one thread: `autoround`, ggml's C library, Intel's `auto-round`.

One matrix of 4.2 million heavy-tailed weights becomes the bytes of each block type, without an importance of its
columns and with one: search of the scales and packing together. All take turns within a run, so that a machine whose
speed drifts treats them alike; a time is the least of several. Start-up, imports and the copy of what a packer
overwrites are not counted. Not all do the same work: without an importance ggml rounds the types of 32 weights without
any search, and with one too in Q8_0; auto-round never searches in these types.

    python benchmarks/bench_gguf.py --llama_python PY [--peer_python PY]

--llama_python: interpreter of an environment with llama-cpp-python, whose ggml is called. --peer_python: one with
auto-round, whose packers are called. Each runs in a process of its own; without one its columns stay empty.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

# argument: the files of weight and importance; then for each line [type, with importance] the seconds that it took
LLAMA = """
import ctypes, glob, json, os, sys, time
import llama_cpp, numpy
job = json.loads(sys.argv[1])
numbers = dict(q4_0=2, q4_1=3, q5_0=6, q5_1=7, q8_0=8, q2_k=10, q3_k=11, q4_k=12, q5_k=13, q6_k=14)
library = glob.glob(os.path.join(os.path.dirname(llama_cpp.__file__), "lib", "*ggml-base*"))[0]
quantize = ctypes.CDLL(library).ggml_quantize_chunk
floats = ctypes.POINTER(ctypes.c_float)
quantize.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats]
quantize.restype = ctypes.c_size_t
weight, importance = numpy.load(job["weight"]), numpy.load(job["importance"])
blocks = numpy.zeros(weight.nbytes, numpy.uint8)
print("READY", "llama-cpp-python", llama_cpp.__version__, flush=True)
for line in sys.stdin:
    name, known = json.loads(line)
    given = importance.ctypes.data_as(floats) if known else None
    start = time.perf_counter()
    quantize(numbers[name], weight.ctypes.data_as(floats), blocks.ctypes.data, 0, *weight.shape, given)
    print("SECONDS", time.perf_counter() - start, flush=True)
"""
PEER = """
import importlib.metadata, json, sys, time
import numpy, torch
torch.set_num_threads(1)
from auto_round.export.export_to_gguf.packing import ggml_quant
job = json.loads(sys.argv[1])
weight, importance = (torch.from_numpy(numpy.load(job[name])) for name in ("weight", "importance"))
print("READY", "auto-round", importlib.metadata.version("auto-round"), flush=True)
for line in sys.stdin:
    name, known = json.loads(line)
    copy, given = weight.clone(), importance.clone() if known else None  # it overwrites its inputs
    start = time.perf_counter()
    with torch.no_grad():
        ggml_quant(copy, name, imatrix=given, device="cpu")
    print("SECONDS", time.perf_counter() - start, flush=True)
"""


class Child:
    """A program in another environment that quantizes on demand and says how long it took."""

    def __init__(self, python: str, program: str, files: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, "-c", program, json.dumps(files)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, env=dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"), text=True,
            )  # fmt: skip
        self.version = self._answer("READY")

    def seconds(self, name: str, known: bool) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, known]) + "\n")
        self._process.stdin.flush()
        return float(self._answer("SECONDS"))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self, word: str) -> str:
        """The rest of the next line that begins with `word`; programs print what they like between."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(f"{word} "):
                return line.removeprefix(word).strip()
        raise SystemExit(f"a child process failed:\n{self._log.read_text()[-3000:]}")


def ours(weight, importance):
    """A function like `Child.seconds`."""
    import torch

    from autoround_core import get_registry
    from autoround_export.gguf.blocks import LAYOUTS

    def seconds(name: str, known: bool) -> float:
        layout = LAYOUTS[name.upper()]
        family = get_registry().number_family(layout.scheme.data_type)
        start = time.perf_counter()
        with torch.no_grad():
            record = (family.search(weight, layout.scheme, importance) if known
                      else family.round_to_nearest(weight, layout.scheme))
            layout.pack(record)
        return time.perf_counter() - start

    return seconds


def least(runners: dict[str, tuple], name: str, known: bool) -> dict[str, float]:
    """{who: seconds}. runners: (seconds function, repetitions) of each, who take turns."""
    times: dict[str, list[float]] = {who: [] for who in runners}
    for turn in range(max(count for _, count in runners.values())):
        for who, (seconds, count) in runners.items():
            if turn < count:
                times[who].append(seconds(name, known))
    return {who: min(found) for who, found in times.items()}


def row(name: str, known: bool, found: dict[str, float], size: int) -> str:
    """A line of the table. Times are for a million weights."""
    cells = [f"{found[who] / size * 1e9:.1f}" if who in found else "" for who in ("ours", "ggml", "peer")]
    ratios = [f"{found['ours'] / found[who]:.3g}" if who in found else "" for who in ("ggml", "peer")]
    return f"| {name.upper()} | {'yes' if known else 'no'} | {' | '.join([*cells, *ratios])} |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama_python", help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--peer_python", help="interpreter of an environment with auto-round")
    parser.add_argument("--types", nargs="+", help="block types, such as q4_k; default: all")
    parser.add_argument("--shape", type=int, nargs=2, default=(2048, 2048), metavar=("OUT", "IN"))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--peer_repetitions", type=int, default=2, help="of auto-round, which takes many seconds")
    return parser.parse_args()


def table(runners: dict[str, tuple], names: list[str], size: int) -> None:
    """Measure and print. names: of block types in lower case; size: of the weight."""
    print("| type | importance | autoround | ggml | auto-round | autoround / ggml | autoround / auto-round |\n"
          + "|---" * 7 + "|")  # fmt: skip
    logs: dict[str, list[float]] = {"ggml": [], "peer": []}
    for name in names:
        for known in (False, True):
            found = least(runners, name, known)
            print(row(name, known, found, size), flush=True)
            for who in found.keys() & logs.keys():
                logs[who].append(math.log(found["ours"] / found[who]))
    means = [f"{math.exp(sum(ratios) / len(ratios)):.3g}" if ratios else "" for ratios in logs.values()]
    print(f"| geometric mean | | | | | {' | '.join(means)} |")


def main() -> None:
    options = arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    import numpy
    import torch

    from autoround_export.gguf.blocks import LAYOUTS

    torch.set_num_threads(1)
    generator = numpy.random.default_rng(42)
    weight = (generator.standard_t(4, options.shape) * 0.02).astype(numpy.float32)
    importance = generator.gamma(1.0, 1.0, options.shape[1]).astype(numpy.float32) + 1e-3
    runners = {"ours": (ours(torch.from_numpy(weight), torch.from_numpy(importance)), options.repetitions)}
    others = {"ggml": (options.llama_python, LLAMA, options.repetitions),
              "peer": (options.peer_python, PEER, options.peer_repetitions)}  # fmt: skip
    children = []
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: str(Path(scratch, f"{name}.npy")) for name in ("weight", "importance")}
        numpy.save(files["weight"], weight)
        numpy.save(files["importance"], importance)
        for who, (python, program, count) in others.items():
            if python:
                children.append(Child(python, program, files, Path(scratch, f"{who}.log")))
                runners[who] = (children[-1].seconds, count)
        versions = ", ".join([f"torch {torch.__version__}", *(child.version for child in children)])
        print(f"{options.shape[0]} x {options.shape[1]} weights, one thread, {platform.machine()}; {versions}; "
              f"milliseconds for a million weights, the least of {options.repetitions} runs "
              f"({options.peer_repetitions} of auto-round)\n")  # fmt: skip
        table(runners, options.types or [name.lower() for name in LAYOUTS], weight.size)
        for child in children:
            child.close()


if __name__ == "__main__":
    main()
