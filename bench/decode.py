"""Tokens/s of decoding: this program's, the original's way (float32, no cache), transformers' generate, and the limit that the
memory bandwidth sets, measured in the same run: python bench/decode.py [--batch 1 8 64] [--context 32 128 1024].

Weights are random: speed does not depend on them. Each round measures every way once, one after the other, so that a
noisy machine is noisy for all alike; the table shows medians. A JSON line for each row goes to bench/results.jsonl.
"""

import argparse
import functools
import statistics
import time

import common  # first: it makes the folder above importable
import torch

from model import GPT, GPTConfig, KVCache, Sampling, generate
from quantize import quantize

SHAPES = {"7M": dict(n_layer=6, n_head=4, n_embd=256), "90M": dict(n_layer=12, n_head=12, n_embd=768),
          "300M": dict(n_layer=26, n_head=15, n_embd=960)}
VOCABULARY = 7587
WAYS = ["original", "float32", "bfloat16", "int8", "int4", "transformers"]
SAMPLING = dict(temperature=0.65, top_p=0.92)  # as shipped, but for no_repeat_ngram


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="90M")
    parser.add_argument("--arch", choices=["gpt2", "modern"], default="gpt2")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, nargs="+", default=[128])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens in a measurement; the original's way makes an eighth")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_intermixed_args()
    torch.manual_seed(0)
    ways = {way: prepare(way, options) for way in options.ways}
    missing = [way for way, run in ways.items() if run is None]
    ways = {way: run for way, run in ways.items() if run}
    print(f"{options.shape} {options.arch} on {', torch '.join(common.machine().values())}; "
          f"not measured: {', '.join(missing) or 'nothing'}")
    print(f"{'way':<14}{'batch':>6}{'context':>8}{'tokens/s':>10}{'times original':>16}{'GB/s':>8}{'of bandwidth':>14}")
    for batch in options.batch:
        for context in options.context:
            measure(ways, batch, context, options)


def measure(ways, batch, context, options):
    """Alternates the ways at one batch and context; prints and writes a row for each."""
    speeds, bandwidths = {way: [] for way in ways}, []
    for number in range(options.rounds + 1):
        for way, (run, _) in ways.items():
            tokens = max(2, options.tokens // 8) if way == "original" else options.tokens
            seconds = run(torch.randint(3, VOCABULARY, (batch, context)), tokens)
            if number:  # the first round warms up
                speeds[way].append(batch * tokens / seconds)
        bandwidths.append(memory_bandwidth(options.device))
    bandwidth = statistics.median(bandwidths[1:])
    print(f"memory reads at {bandwidth / 1e9:.1f} GB/s")
    for way, (_, size) in ways.items():
        speed = statistics.median(speeds[way])
        times = statistics.median(a / b for a, b in zip(speeds[way], speeds["original"])) if "original" in ways else None
        reads = speed / batch * size
        print(f"{way:<14}{batch:>6}{context:>8}{speed:>10.1f}{times or 0:>16.1f}{reads / 1e9:>8.1f}{reads / bandwidth:>14.0%}", flush=True)
        common.record(common.RESULTS, "decode", shape=options.shape, arch=options.arch, device=options.device, way=way, batch=batch,
                      context=context, tokens_per_second=round(speed, 2), times_original=times and round(times, 2), weight_bytes=size,
                      memory_bandwidth=round(bandwidth))


def prepare(way, options):
    """(function of prompt ids (B, T) and a number of new tokens that returns seconds, bytes of weights read for a token), or
    None where the way is missing: transformers is not installed, or the device is no CPU."""
    shape = SHAPES[options.shape]
    block_size = max(options.context) + options.tokens + 1
    if way == "transformers":
        return prepare_transformers(shape, block_size, options)
    if way in ("int8", "int4") and options.device != "cpu":
        return None
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=VOCABULARY, arch=options.arch, block_size=block_size, **shape)).eval().requires_grad_(False)
    model.norm.weight.data.mul_(8)  # predictions as peaked as a trained model's, not nearly uniform ones: sampling sorts the nucleus
    model.to(options.device, torch.float32 if way in ("original", "float32") else torch.bfloat16)
    if way in ("int8", "int4"):
        quantize(model, way)
    read = [parameter for name, parameter in model.named_parameters()
            if model.config.tied and way not in ("int8", "int4") or not name.startswith("embedding")]
    read += [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]  # packed weights
    size = sum(tensor.numel() * tensor.element_size() for tensor in read)
    if way == "original":
        return lambda ids, tokens: original_way(model, ids.to(options.device), tokens), size
    make = functools.lru_cache(1)(lambda batch: KVCache(model.config, batch, block_size, options.device, model.embedding.weight.dtype))
    return lambda ids, tokens: cached(model, ids.to(options.device), tokens, make(len(ids))), size


@torch.inference_mode()
def original_way(model, ids, tokens):
    """Every token computes the whole context anew."""
    common.synchronize(ids.device)
    begin = time.perf_counter()
    for _ in range(tokens):
        logits = model.logits(model.hidden(ids)[:, -1])
        chosen = torch.multinomial((logits / 0.5).softmax(dim=-1), 1)
        ids = torch.cat([ids[:, 1:], chosen], dim=1)
    common.synchronize(ids.device)
    return time.perf_counter() - begin


def cached(model, ids, tokens, cache):
    """`generate`, from the second token on: the first one includes the prompt. The cache is one that a conversation keeps."""
    cache.length = 0
    stream = generate(model, ids.tolist(), Sampling(max_new_tokens=tokens + 1, **SAMPLING), cache=cache)
    next(stream)
    common.synchronize(ids.device)
    begin = time.perf_counter()
    for _ in stream:
        pass
    common.synchronize(ids.device)
    return time.perf_counter() - begin


def prepare_transformers(shape, block_size, options):
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=block_size, **shape)).eval()
    model.to(options.device, torch.bfloat16)

    @torch.inference_mode()
    def run(ids, tokens):
        ids = ids.to(options.device)
        keys = dict(do_sample=True, temperature=0.8, top_p=0.9, top_k=0, pad_token_id=0, eos_token_id=None)
        seconds = []
        for count in (1, tokens + 1):  # the difference is `tokens` tokens without the prompt
            common.synchronize(ids.device)
            begin = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **keys)
            common.synchronize(ids.device)
            seconds.append(time.perf_counter() - begin)
        return seconds[1] - seconds[0]
    return run, sum(p.numel() * p.element_size() for p in model.parameters())


def memory_bandwidth(device):
    """Bytes/s of reading 512 MB, as often as a decoding takes long: the median, as for the decoding itself."""
    data, speeds = torch.ones(1 << 27, device=device), []
    for _ in range(10):
        common.synchronize(data.device)
        begin = time.perf_counter()
        data.sum()
        common.synchronize(data.device)
        speeds.append(data.numel() * 4 / (time.perf_counter() - begin))
    return statistics.median(speeds)


if __name__ == "__main__":
    main()
