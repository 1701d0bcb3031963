"""Real tokens/s of the training step, ours against others', and MFU: python bench/throughput.py [CONFIG] [key=value …]

Each contender is warmed up (compiled), then all train in turns for --seconds, --rounds times; medians are shown. A real
token is a target that counts: filling does not. MFU is against the matrix-product rate measured in the same turns.
"""

import dataclasses
import os
import statistics
import time

import common  # first: it makes the folder above importable
import original
import peers
import torch

import runtime as rt
import settings as settings_module


def contenders(settings, training, vocab_size, runtime):
    """{name: function that makes the contender}"""
    ours = lambda compile: common.ours(dataclasses.replace(settings, compile=compile), training, vocab_size, runtime)
    arguments = (settings, training, vocab_size, runtime)
    makers = dict(ours=lambda: ours(True), ours_eager=lambda: ours(False), original=lambda: original.contender(*arguments))
    for suffix, compile in (("", True), ("_eager", False)):
        makers["nanogpt" + suffix] = lambda compile=compile: peers.nanogpt(*arguments, compile=compile)
        for kind in ("gpt2", "qwen3"):
            makers[f"transformers_{kind}{suffix}"] = lambda kind=kind, compile=compile: peers.transformers(
                *arguments, kind=kind, compile=compile)
    return makers


def warm_up(contender, seconds, steps):
    """Steps for at least `seconds` and `steps`; returns the seconds it took."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or contender.steps < steps:
        contender.step()
    common.synchronize(contender.runtime.device)
    return time.perf_counter() - begin


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def main(arguments=None):
    parser = common.parser(__doc__)
    parser.add_argument("--only", default="ours,ours_eager,original,nanogpt,transformers_gpt2,transformers_qwen3",
                        help="contenders, by commas; nanogpt_eager, transformers_gpt2_eager, transformers_qwen3_eager are others")
    parser.add_argument("--seconds", type=float, default=5, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=float, default=3, help="seconds, at least")
    parser.add_argument("--warm-up-steps", type=int, default=6, help="and so many steps")
    options = parser.parse_intermixed_args(arguments)
    settings = common.read_settings(options)
    if options.smoke:
        options.seconds, options.rounds, options.warm_up = 0.1, 2, 0
    runtime = rt.start(settings)
    training, _, tokenizer = common.open_store(settings)
    makers = contenders(settings, training, tokenizer.size, runtime)
    names = options.only.split(",")
    for name in names:
        if name not in makers:
            raise settings_module.UserError(f"--only {name} is not one of {', '.join(makers)}")
    racing = {name: makers[name]() for name in names}
    warm = {}
    for name, contender in racing.items():
        warm[name] = warm_up(contender, options.warm_up, options.warm_up_steps)
        print(f"{name}: warm after {warm[name]:.1f} s", flush=True)
    compiled = graphs()
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trials = {name: lambda contender=contender: contender.train(options.seconds) for name, contender in racing.items()}
    trials["matmul"] = lambda: rt.matmul_rate(runtime.device, runtime.dtype, 256 if options.smoke else None, seconds=0.5)
    found = common.alternate(trials, options.rounds)
    rate = statistics.median(found.pop("matmul"))
    first, rows = statistics.median(found[names[0]]), []
    for name, speeds in found.items():
        speed, mfu = statistics.median(speeds), None
        if name.startswith("ours"):
            mfu = speed * racing[name].model.flops_per_token() / rate
        parameters = sum(p.numel() for p in racing[name].model.parameters())
        rows.append([name, f"{parameters / 1e6:.2f}M", speed, min(speeds), max(speeds), first / speed, "" if mfu is None else f"{mfu:.1%}",
                     warm[name]])
        common.record(options.results, "throughput", name=name, tokens_per_second=speeds, median=speed, parameters=parameters, mfu=mfu,
                      matmul_rate=rate, warm_up=warm[name], config=os.path.relpath(options.config, common.ROOT), override=options.override,
                      smoke=options.smoke)
    common.table(["contender", "parameters", "real tokens/s", "least", "most", f"{names[0]} is times faster", "MFU", "warm-up s"], rows)
    print(f"matrix product {str(runtime.dtype).removeprefix('torch.')}: {rate / 1e12:.3f} TFLOP/s; graphs compiled while warming up: "
          f"{compiled}, afterwards: {graphs() - compiled}")
    if runtime.device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, all contenders together")


if __name__ == "__main__":
    settings_module.main(main)
