"""Loss on held-out dialogues with weights in 16, 8 and 4 bits: python bench/quantized_loss.py CHECKPOINT [data_path=data/train.txt].

A JSON line for each precision goes to bench/results.jsonl.
"""

import argparse
import copy

import common  # first: it makes the folder above importable
import torch
import torch.nn.functional as F

import checkpoint
import data
import settings as settings_module
from quantize import quantize
from settings import TrainSettings


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("override", nargs="*", default=[], help="data_path=…")
    parser.add_argument("--rows", type=int, default=24, help="packed rows to score; the 4-bit kernel is slow at many")
    options = parser.parse_intermixed_args()
    model, tokenizer, meta = checkpoint.load_model(options.checkpoint)
    trained = settings_module.build(TrainSettings, meta["settings"] | settings_module.overrides(options.override))
    store = data.prepare(trained, tokenizer)
    rows = data.Epoch(data.Documents(store, "val"), model.config.block_size, 0, 0)
    batches = [torch.from_numpy(array).split(8) for array in rows.batch(0, min(options.rows, len(rows)))]
    first = None
    for kind in ("float32", "bfloat16", "int8", "int4"):
        other = copy.deepcopy(model).requires_grad_(False).to(torch.float32 if kind == "float32" else torch.bfloat16)
        if kind in ("int8", "int4"):
            quantize(other, kind)
        nats = count = 0
        for inputs, targets, numbers in zip(*batches):
            logits = other.logits(other.hidden(inputs, numbers))
            nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=data.IGNORE, reduction="sum").item()
            count += (targets != data.IGNORE).sum().item()
        first = first or nats / count
        print(f"{kind:<10} {nats / count:.4f} nats a token, {nats / count / first - 1:+.2%}", flush=True)
        common.record(common.RESULTS, "quantized_loss", weights=kind, loss=nats / count, tokens=count, width=model.config.n_embd)


if __name__ == "__main__":
    settings_module.main(main)
