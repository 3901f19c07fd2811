"""`autoround` beside Intel's `auto-round` on the same work: KL divergence, seconds, peak memory, and their ratios.

Both get the same rows of token ids of the offline corpus, the same seed, iterations and batch size; both results
are scored as dense float32 models by one scorer on held-out text. The two run in turn, cell by cell, so that a
machine whose speed drifts treats both alike. Times and memory are those of whole processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
CELLS = ["W2G64", "W2G128", "W3G128", "W4G128", "W2G64-asym", "W2G128-asym", "W3G128-asym", "W4G128-asym"]
PEER = """
import json, sys, torch
job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(job["model"])
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
rows = [torch.tensor([json.loads(line)["input_ids"]]) for line in open(job["rows"])]
tuned = AutoRound(model, tokenizer, bits=job["bits"], group_size=job["group_size"], sym=job["sym"], iters=job["iters"],
                  nsamples=len(rows), seqlen=job["seqlen"], batch_size=job["batch_size"], dataset=rows,
                  device_map="cpu", seed=job["seed"], enable_torch_compile=False, disable_opt_rtn=True).quantize()
tuned = tuned[0] if isinstance(tuned, tuple) else tuned
tuned.float().save_pretrained(job["output"])
tokenizer.save_pretrained(job["output"])
"""


def run(argv: list[str], threads: int) -> tuple[float, float]:
    """(seconds, peak MiB) of a process. Ends the program with its output when it fails."""
    start = time.perf_counter()
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1")
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            sys.exit(f"{' '.join(argv[:3])} failed:\n{log.read()[-3000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", required=True, help="interpreter of an environment with auto-round")
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--model", type=Path, default=MODEL)
    for name, default in dict(iters=200, nsamples=64, seqlen=256, batch_size=8, seed=42, threads=2).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    import torch

    from autoround_core import QuantScheme, evaluate, load_calibration
    from autoround_core.evaluation import evaluation_texts, load_for_evaluation, windows_of

    torch.set_num_threads(options.threads)
    reference, tokenizer = load_for_evaluation(options.model, dtype=torch.float32)
    windows = windows_of(evaluation_texts(None), tokenizer, seqlen=256, windows=96)
    calibration = load_calibration(
        "stdlib", tokenizer, nsamples=options.nsamples, seqlen=options.seqlen, seed=options.seed
    )
    ratios = []
    print(
        "| cell | KL auto-round | KL autoround | ratio | seconds | ratio | peak MiB | ratio |\n" + "|---" * 8 + "|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch, "rows.jsonl")
        rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in calibration.input_ids.tolist()))
        common = {name: getattr(options, name) for name in ("iters", "seqlen", "batch_size", "seed")}
        for cell in options.cells:
            scheme = QuantScheme.parse(cell)
            job = dict(
                model=str(options.model),
                rows=str(rows),
                output=f"{scratch}/{cell}-peer",
                threads=options.threads,
                bits=scheme.bits,
                group_size=scheme.group_size,
                sym=scheme.sym,
                **common,
            )
            theirs = run([options.peer_python, "-c", PEER, json.dumps(job)], options.threads)
            flags = [text for name, value in common.items() for text in (f"--{name}", str(value))]
            algorithm = ["--recipe", "rtn"] if options.iters == 0 else []
            ours = run(
                [
                    sys.executable,
                    "-c",
                    "from autoround_cli.main import main; main()",
                    "quantize",
                    "--model",
                    str(options.model),
                    "--scheme",
                    cell,
                    "--dataset",
                    str(rows),
                    "--nsamples",
                    str(options.nsamples),
                    "--format",
                    "dense",
                    "--output_dir",
                    f"{scratch}/{cell}-ours",
                    *flags,
                    *algorithm,
                ],
                options.threads,
            )
            kl = [
                evaluate(load_for_evaluation(f"{scratch}/{cell}-{who}", dtype=torch.float32)[0], windows, reference).kl
                for who in ("peer", "ours")
            ]
            ratio = (kl[1].value / kl[0].value, ours[0] / theirs[0], ours[1] / theirs[1])
            ratios.append(ratio)
            print(
                f"| {cell} | {kl[0]} | {kl[1]} | {ratio[0]:.3f} | {theirs[0]:.0f}, {ours[0]:.0f} | {ratio[1]:.2f} "
                f"| {theirs[1]:.0f}, {ours[1]:.0f} | {ratio[2]:.2f} |",
                flush=True,
            )
    means = [math.exp(sum(math.log(ratio[i]) for ratio in ratios) / len(ratios)) for i in range(3)]
    print(f"| geometric mean | | | {means[0]:.3f} | | {means[1]:.2f} | | {means[2]:.2f} |")


if __name__ == "__main__":
    main()
