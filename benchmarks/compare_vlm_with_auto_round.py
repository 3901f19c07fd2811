"""Vision-language models: `autoround-mllm` beside Intel's `auto-round` on the same tokens, seconds and peak memory.

The models have random weights in the structure of each family, for a time depends on shapes; quality is measured on
trained ones (`vlm_quality.py`). Both are given the same rows of token ids, seed, iterations and batch size, because the
data of images that `auto-round` knows lie on a hub. The two run in turn; times and memory are those of whole processes.
A model that `auto-round` cannot run is named with its reason.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from compare_with_auto_round import run

from tiny_vlms import FAMILIES

NAMES = ["llava", "gemma3", "idefics3", "paligemma", "llava_next", "aya_vision"]
PEER = """
import json, sys, torch
job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
from auto_round import AutoRound
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(job["model"])
model = AutoModelForImageTextToText.from_pretrained(job["model"], dtype=torch.float32)
rows = [torch.tensor([json.loads(line)["input_ids"]]) for line in open(job["rows"])]
tuned = AutoRound(model, processor.tokenizer, processor=processor, bits=4, group_size=64, sym=True, iters=job["iters"],
                  nsamples=len(rows), seqlen=job["seqlen"], batch_size=job["batch_size"], dataset=rows,
                  device_map="cpu", seed=job["seed"], enable_torch_compile=False, disable_opt_rtn=True).quantize()
tuned = tuned[0] if isinstance(tuned, tuple) else tuned
tuned.float().save_pretrained(job["output"])
processor.save_pretrained(job["output"])
"""
OURS = "from autoround_mllm.main import main; main()"


def build(name: str, directory: Path, width: int, layers: int) -> None:
    """A model of the family, its language tower `width` wide and `layers` deep."""
    row = FAMILIES[name]
    text = dict(row.options["text_config"], hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                num_attention_heads=width // 64, num_key_value_heads=width // 64, head_dim=64)
    text.pop("layer_types", None)
    changed = {"text_config": text}
    for key in ("hidden_size", "projection_dim") if name == "paligemma" else ():
        changed[key] = width
    directory.mkdir()
    replace(row, options={**row.options, **changed}).build(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", required=True, help="interpreter of an environment with auto-round and pillow")
    parser.add_argument("--families", nargs="+", default=NAMES)
    for name, default in dict(
        width=512, layers=4, iters=100, nsamples=64, seqlen=256, batch_size=8, seed=42, threads=2
    ).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    common = {name: getattr(options, name) for name in ("iters", "seqlen", "batch_size", "seed")}
    ratios = []
    print("| family | seconds, auto-round | autoround | ratio | peak MiB | | ratio |\n" + "|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as scratch:
        generator = torch.Generator().manual_seed(options.seed)
        rows = Path(scratch, "rows.jsonl")
        ids = torch.randint(20, 250, (options.nsamples, options.seqlen), generator=generator).tolist()
        rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
        for name in options.families:
            source = Path(scratch, name)
            build(name, source, options.width, options.layers)
            output, threads = f"{scratch}/{name}-peer", options.threads
            job = dict(model=str(source), rows=str(rows), output=output, threads=threads, **common)
            try:
                theirs = run([options.peer_python, "-c", PEER, json.dumps(job)], options.threads)
            except SystemExit as error:
                reason = str(error).strip().splitlines()[-1]
                print(f"| {name} | {reason[:100]} | | | | | |", flush=True)
                continue
            flags = [text for key, value in common.items() for text in (f"--{key}", str(value))]
            command = ["quantize", "--model", str(source), "--scheme", "W4G64", "--dataset", str(rows), "--nsamples",
                       str(options.nsamples), "--format", "dense", "--output_dir", f"{scratch}/{name}-ours", *flags]
            ours = run([sys.executable, "-c", OURS, *command], options.threads)
            ratio = (ours[0] / theirs[0], ours[1] / theirs[1])
            ratios.append(ratio)
            print(f"| {name} | {theirs[0]:.0f} | {ours[0]:.0f} | {ratio[0]:.2f} | {theirs[1]:.0f} | {ours[1]:.0f} "
                  f"| {ratio[1]:.2f} |", flush=True)
    means = [math.exp(sum(math.log(ratio[i]) for ratio in ratios) / len(ratios)) for i in range(2)]
    print(f"| geometric mean | | | {means[0]:.2f} | | | {means[1]:.2f} |")


if __name__ == "__main__":
    main()
