"""How training scales over processes: measured here, and a model of what 8 and 16 GPUs would give.

python bench/scaling.py measure [CONFIG] [key=value …] [--processes 1 2 4]
python bench/scaling.py model [CONFIG …]
"""

import argparse
import os
import subprocess
import sys
import time

import common  # first: it makes the folder above importable
import torch
import torch.distributed as dist

import runtime as rt
import settings as settings_module
from model import GPT, GPTConfig
from optim import make_optimizers, muon_block
from settings import TrainSettings

VOCABULARY = 7587
GPU, MFU = 989e12, 0.4  # an H100's dense bfloat16 peak, and the share of it that a step without communication reaches
MEMORY = 3.35e12  # bytes/s of an H100's memory
LINKS = {"NVLink": 350e9, "InfiniBand 400 Gb/s": 45e9, "Ethernet 10 Gb/s": 1.1e9}  # bytes/s that one ring all-reduce moves over a link
OVERLAP = 0.9  # share of the backward pass that runs while gradients travel; the first bucket must be full before
LATENCY = 20e-6  # seconds of a ring step


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("command", choices=["measure", "model", "worker"])
    arguments.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("values", nargs="*", help="CONFIG files and key=value")
    options = arguments.parse_intermixed_args()
    configs = [value for value in options.values if "=" not in value] or ["config/cpu.yaml"]
    changes = settings_module.overrides([value for value in options.values if "=" in value])
    if options.command == "model":
        for config in configs:
            predict(config, settings_module.build(TrainSettings, settings_module.read_yaml(config) | changes))
    elif options.command == "measure":
        print("| processes | tokens/s | a step | of it all-reduce that nothing hides | gradients all-reduced alone |\n"
              "|---|---|---|---|---|", flush=True)
        for count in options.processes:
            subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}",
                            os.path.abspath(__file__), "worker", f"--steps={options.steps}", *options.values], check=True)
    else:
        with rt.Processes() as processes:
            settings = settings_module.build(TrainSettings, settings_module.read_yaml(configs[0]) | changes)
            measure(settings, rt.start(settings, processes), options.steps)


def measure(settings, runtime, steps):
    """Prints a row: steps on random rows, the same without all-reduce, and the all-reduce of as many bytes alone."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.of(settings, VOCABULARY)).to(runtime.device).train()
    optimizers = make_optimizers(model, settings, runtime.dtype, runtime.neighbours)
    if settings.compile:
        model.compile_parts()
    distributed = rt.distribute(runtime, model)
    rows = settings.train_batch // runtime.world
    batch = torch.randint(3, VOCABULARY, (2, rows, settings.block_size), device=runtime.device)

    def step(synchronise):
        with rt.exchange(distributed, synchronise):
            with runtime.autocast():
                loss = distributed(batch[0], batch[1], torch.zeros_like(batch[0]))
            (loss / batch[0].numel()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    def seconds(work):
        """The median of `steps`, each begun by all processes together."""
        times = []
        for _ in range(steps + 2):
            rt.add_up(runtime, 0)
            begin = time.perf_counter()
            work()
            common.synchronize(runtime.device)
            rt.add_up(runtime, 0)
            times.append(time.perf_counter() - begin)
        return sorted(times[2:])[steps // 2]

    gradients = torch.zeros(model.count_parameters(), device=runtime.device)
    whole, silent, alone = seconds(lambda: step(True)), seconds(lambda: step(False)), seconds(lambda: dist.all_reduce(gradients))
    runtime.say(f"| {runtime.world} | {settings.train_batch * settings.block_size / whole:,.0f} | {1e3 * whole:.0f} ms "
                f"| {max(0, 1 - silent / whole):.0%} | {1e3 * alone:.1f} ms for {gradients.numel() * 4 / 1e6:.0f} MB |")


def step_seconds(gradient_bytes, compute, update, gpus, bandwidth):
    """Of a data-parallel step: a ring all-reduce (Patarasuk and Yuan 2009) behind the backward pass, two thirds of `compute`,
    then the optimizer's `update`."""
    travel = 2 * (gpus - 1) / gpus * gradient_bytes / bandwidth + 2 * (gpus - 1) * LATENCY
    return compute + max(travel - OVERLAP * compute * 2 / 3, travel * (1 - OVERLAP)) + update


def update_seconds(model, settings, neighbours):
    """Of Muon: five Newton-Schulz iterations of three products each, which pass over the update six times in bfloat16, and some
    fourteen passes in float32 over gradient, momentum, update and weight. So many `neighbours` over NVLink do a share each of the
    iterations and gather the rest, in bfloat16. AdamW's few passes over the other weights are left out."""
    operations = iterated = passed = gathered = 0
    for name, matrix in model.named_parameters():
        if matrix.dim() == 2 and "blocks." in name and settings.optimizer == "muon":
            size, side = muon_block(name, matrix, model.config.head_size)
            operations += matrix.shape[side] // size * 5 * (4 * size ** 2 * matrix.shape[1 - side] + 2 * size ** 3)
            iterated += matrix.numel() * 5 * 6 * 2
            passed += matrix.numel() * 14 * 4
            gathered += matrix.numel() * 2
    return ((operations / (GPU * MFU) + iterated / MEMORY) / neighbours + passed / MEMORY
            + gathered * (neighbours - 1) / neighbours / LINKS["NVLink"])


def predict(config, settings):
    """Prints what 2, 8 and 16 GPUs give with the configured batch, and how many rows each needs to spend nine tenths on them."""
    with torch.device("meta"):
        model = GPT(GPTConfig.of(settings, VOCABULARY))
    gradient_bytes = 4 * model.count_parameters()
    second_per_row = settings.block_size * model.flops_per_token() / (GPU * MFU)
    update_alone = update_seconds(model, settings, 1)
    print(f"\n{config}: {gradient_bytes / 1e6:.0f} MB of gradients a step, {1e3 * second_per_row:.2f} ms of work a row, "
          f"{1e3 * update_alone:.1f} ms of optimizer a step, {1e3 * update_seconds(model, settings, 8):.1f} on eight GPUs of a machine\n")
    print("| link | GPUs | train_batch as it is: rows a GPU | speed-up | rows a GPU to spend 90 % on them | train_batch then |\n"
          "|---|---|---|---|---|---|")
    for link, bandwidth in LINKS.items():
        for gpus in (2, 8, 16):
            rows = settings.train_batch / gpus
            alone = settings.train_batch * second_per_row + update_alone
            update = update_seconds(model, settings, gpus) if link == "NVLink" else update_alone  # else a GPU a machine
            speed_up = alone / step_seconds(gradient_bytes, rows * second_per_row, update, gpus, bandwidth)
            enough = next(n for n in range(1, 10 ** 6) if n * second_per_row >= 0.9 * step_seconds(
                gradient_bytes, n * second_per_row, update, gpus, bandwidth))
            print(f"| {link} | {gpus} | {rows:g} | {speed_up:.1f} | {enough} | {enough * gpus} |")


if __name__ == "__main__":
    settings_module.main(main)
