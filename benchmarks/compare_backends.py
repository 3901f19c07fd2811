"""CPU backends beside torch's bfloat16 linear layer: milliseconds of one layer by rows of input, and their ratios.

All candidates take turns in each round and the least time of each counts, so that a change of the machine's clock
meets all of them. Each has several copies of its weights and goes through them in turn, because a layer of a model
never finds its weights in the cache. `auto-round-lib`, where it is installed, is the backend `ark`.

    python benchmarks/compare_backends.py --rows 1 512 --threads 2
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch

from autoround_core import LinearSpec, QuantizedLayer, QuantScheme, get_registry

CPU = torch.device("cpu")
BACKENDS = ["cpu_native", "cpu_dense", "ark", "cpu_int4", "cpu_int8"]
SCHEMES = ["W2G128", "W3G128", "W4G128", "W4G128-asym", "W4G32", "W8G128", "W8G-1"]
COPIES = 4


def candidates(size: tuple[int, int], names: list[str], schemes: list[str]) -> dict[str, Callable]:
    """{"backend scheme": function of the inputs}, "torch bfloat16" first."""
    out_features, in_features = size
    plain = [torch.nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16) for _ in range(COPIES)]
    found = {"torch bfloat16": plain}
    backends = get_registry().backends()
    weight = torch.randn(out_features, in_features)
    for spelling, name in itertools.product([None, *schemes], names):
        scheme = QuantScheme.parse(spelling) if spelling else None
        reason = backends[name].why_not(LinearSpec("layer", in_features, out_features, scheme), CPU, torch.bfloat16)
        if reason:
            continue
        if scheme is None:
            found[f"{name} bfloat16"] = [backends[name].build(linear, CPU, torch.bfloat16) for linear in plain]
            continue
        record = get_registry().number_family("int").round_to_nearest(weight, scheme)
        layer = QuantizedLayer("layer", record)
        found[f"{name} {spelling}"] = [backends[name].build(layer, CPU, torch.bfloat16) for _ in range(COPIES)]
    return {what: _in_turn(copies) for what, copies in found.items()}


def _in_turn(copies: list[torch.nn.Module]) -> Callable:
    turn = itertools.cycle(copies)
    return lambda inputs: next(turn)(inputs)


def measure(runs: dict[str, Callable], inputs: torch.Tensor, rounds: int) -> dict[str, float]:
    """Least milliseconds of each. What takes long is run fewer times."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for what, run in runs.items():
            spent = 0.0
            for _ in range(COPIES):
                start = time.perf_counter()
                run(inputs)
                seconds = time.perf_counter() - start
                best[what], spent = min(best[what], seconds * 1e3), spent + seconds
                if spent > 0.5:
                    break
    return best


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=sorted(get_registry().backends()))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    runs = candidates(tuple(asked.size), asked.backends, asked.schemes)
    print(f"{asked.size[0]}x{asked.size[1]}, {asked.threads} threads, torch {torch.__version__}, "
          f"{torch.backends.cpu.get_cpu_capability()}")
    for rows in asked.rows:
        inputs = torch.randn(rows, asked.size[1], dtype=torch.bfloat16)
        times = measure(runs, inputs, asked.rounds if rows < 64 else max(2, asked.rounds // 4))
        base = times["torch bfloat16"]
        print(f"\n{rows} rows{'':27}ms   torch bfloat16 / this")
        for what, milliseconds in times.items():
            print(f"{what:28} {milliseconds:9.3f}   {base / milliseconds:8.2f}")


if __name__ == "__main__":
    main()
