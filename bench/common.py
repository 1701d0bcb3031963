"""What the benchmarks share: scoring, contenders that train, alternation, the machine's rates, tables, results.jsonl.

Everything here runs A against B in turns within one call, so that a machine's moods fall on both alike.
"""

import argparse
import json
import os
import sys
import time

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if ROOT not in sys.path:  # `python bench/x.py` puts bench/ there, not the folder above
    sys.path.insert(0, ROOT)

import data  # noqa: E402
import runtime as rt  # noqa: E402
import settings as settings_module  # noqa: E402
import tokenizer as tokenizer_module  # noqa: E402
from model import GPT, GPTConfig, Recorded  # noqa: E402
from optim import clip, make_optimizers  # noqa: E402
from settings import TrainSettings  # noqa: E402
from tokenizer import PAD  # noqa: E402

CONFIG = os.path.join(ROOT, "config/cpu.yaml")
RESULTS = os.path.join(ROOT, "bench/results.jsonl")
SMOKE = dict(data_path="data/sample_dialogues.txt", train_percent=0.9, n_layer=1, n_head=2, n_embd=32, block_size=64, train_batch=4,
             compile=False, device="cpu", tensorboard_path=None, max_minutes=None)


def parser(description):
    """The command line of a benchmark: CONFIG key=value … --smoke --results."""
    arguments = argparse.ArgumentParser(description=description.splitlines()[0])
    arguments.add_argument("config", nargs="?", default=CONFIG, help="shape, data and recipe of ours")
    arguments.add_argument("override", nargs="*", default=[], help="key=value")
    arguments.add_argument("--smoke", action="store_true", help="seconds instead of minutes, to show that the script works")
    arguments.add_argument("--results", default=RESULTS, help="file that lines are appended to")
    return arguments


def read_settings(options):
    """TrainSettings of the command line."""
    if "=" in options.config:  # no CONFIG, only key=value
        options.config, options.override = CONFIG, [options.config, *options.override]
    values = settings_module.read_yaml(options.config)
    if options.smoke:
        options.results = os.devnull if options.results == RESULTS else options.results
        values |= SMOKE | dict(data_path=os.path.join(ROOT, SMOKE["data_path"]))
    return settings_module.build(TrainSettings, values | settings_module.overrides(options.override))


def table(header, rows):
    """Prints rows under a header as a Markdown table."""
    cells = [[f"{cell:,.3g}" if isinstance(cell, float) and abs(cell) < 100 else f"{cell:,.0f}" if isinstance(cell, (int, float))
              else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    for line in (header, ["-" * width for width in widths], *cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |", flush=True)


def machine():
    """What seconds depend on besides the code: {machine, torch}."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "CPU")
        name = f"{name}, {torch.get_num_threads()} threads"
    return dict(machine=name, torch=str(torch.__version__))


def record(path, benchmark, **values):
    """Appends a line of results, with the date and the machine, to a .jsonl file."""
    line = dict(bench=benchmark, date=time.strftime("%Y-%m-%d %H:%M")) | machine() | values
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def alternate(trials, rounds):
    """{name: function} called in turns, `rounds` times: {name: [what it returned]}."""
    found = {name: [] for name in trials}
    for _ in range(rounds):
        for name, trial in trials.items():
            found[name].append(trial())
    return found


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pieces_by_length(documents, block_size):
    """(starts, lengths) of all pieces (data.cut), shortest first."""
    starts, lengths = data.cut(documents, block_size)
    order = np.argsort(lengths, kind="stable")
    return starts[order], lengths[order]


def padded(documents, starts, lengths, width):
    """Inputs and targets (rows, width) int64, a piece a row; filling has the target -100."""
    place = np.arange(width)
    inside = place < lengths[:, None]
    source = np.where(inside, starts[:, None] + place, 0)
    inputs = np.where(inside, documents.ids[source].astype(np.int64), PAD)
    targets = np.where(inside, documents.ids[source + inside].astype(np.int64), data.IGNORE)
    return inputs, targets


@torch.no_grad()
def score(nats, documents, block_size, device, tokens=4096):
    """Nats per real token of held-out `documents`, each scored alone in its row; `nats(inputs, targets)` sums over a batch."""
    starts, lengths = pieces_by_length(documents, block_size)
    total, row = 0.0, 0
    while row < len(starts):
        rows = slice(row, row + max(1, tokens // int(lengths[min(row + 16, len(starts) - 1)])))
        inputs, targets = padded(documents, starts[rows], lengths[rows], int(lengths[rows][-1]))
        total += float(nats(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)))
        row = rows.stop
    return total / max(1, int(lengths.sum()))


class Contender:
    """A recipe in training, ours or another's: one step after another, seconds counted, to be stopped and gone on with.

    `batches` yields ((array, …), count of real targets); `loss(arrays …, count)` is the mean loss that a step minimises;
    `nats(inputs, targets)` sums over a batch for `score`; `factor(step, seconds)` scales the learning rates; `record`: forward and
    backward pass as a CUDA graph, for arrays of one shape.
    """

    def __init__(self, model, optimizers, batches, loss, nats, runtime, clip=1.0, factor=lambda step, seconds: 1.0, record=False):
        self.model, self.optimizers, self.batches, self.runtime = model, optimizers, batches, runtime
        self._nats, self.clip, self.factor, self.record = nats, clip, factor, record

        def learn(*tensors):
            loss(*tensors).backward()

        self.learn = Recorded(learn) if record else learn
        self.steps, self.tokens, self.seconds, self.first_step, self.curve = 0, 0, 0.0, 0.0, []
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.setdefault("peak", group["lr"])

    def step(self):
        """One step; returns how many real targets it learnt from."""
        arrays, count = next(self.batches)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * self.factor(self.steps, self.seconds)
        tensors = [torch.from_numpy(array).to(self.runtime.device, non_blocking=True) for array in arrays]
        self.learn(*tensors, torch.full((), count, dtype=torch.float32, device=self.runtime.device))
        clip(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            if not (self.record and self.learn.graph):  # which has its gradients in its own memory
                optimizer.zero_grad()
        self.steps += 1
        self.tokens += count
        return count

    def train(self, seconds):
        """Steps for so long; returns real tokens/s."""
        synchronize(self.runtime.device)
        begin, tokens, before = time.perf_counter(), 0, self.seconds
        while self.seconds - before < seconds:
            tokens += self.step()
            if self.runtime.device.type == "cuda" and self.steps % 20 == 0 or self.steps == 1:
                synchronize(self.runtime.device)
            self.seconds = before + time.perf_counter() - begin
            if self.steps == 1:
                self.first_step = self.seconds
        synchronize(self.runtime.device)
        self.seconds = before + time.perf_counter() - begin
        return tokens / (self.seconds - before)

    def nats(self, inputs, targets):
        with torch.compiler.set_stance("force_eager"):
            return self._nats(inputs, targets)

    def score(self, documents, block_size):
        """Scores the held-out documents, notes (seconds, loss) in the curve, and returns the loss; takes no seconds."""
        self.model.eval()
        loss = score(self.nats, documents, block_size, self.runtime.device)
        self.model.train()
        self.curve.append((self.seconds, loss))
        return loss

    def state(self):
        return dict(model=self.model.state_dict(), optimizers=[o.state_dict() for o in self.optimizers], steps=self.steps,
                    tokens=self.tokens, seconds=self.seconds, first_step=self.first_step, curve=self.curve)

    def load(self, state):
        """Goes on from another's `state()`, with the batch that comes next."""
        self.model.load_state_dict(state["model"])
        for optimizer, one in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(one)
        for name in ("steps", "tokens", "seconds", "first_step", "curve"):
            setattr(self, name, state[name])
        for _ in range(self.steps):
            next(self.batches)


def open_store(settings):
    """(training Documents, held-out Documents, tokenizer) of the settings' corpus: the same for every contender."""
    store = data.prepare(settings)
    return data.Documents(store, "train"), data.Documents(store, "val"), tokenizer_module.load(os.path.join(store, "tokenizer.json"))


def ours(settings, documents, vocab_size, runtime):
    """The project's own step as train.py takes it: packed rows, its loss, its optimizers."""
    torch.manual_seed(settings.seed)
    model = GPT(GPTConfig.of(settings, vocab_size)).to(runtime.device).train()
    model.checkpointing = settings.checkpointing
    if settings.compile:
        model.compile_parts()

    def batches():
        for number in range(settings.max_epoch):
            epoch = data.Epoch(documents, settings.block_size, settings.seed, number, settings.chain)
            for row in range(0, len(epoch), settings.train_batch):
                yield epoch.batch(row, row + settings.train_batch), epoch.real_targets(row, row + settings.train_batch)

    def loss(inputs, targets, numbers, count):
        with runtime.autocast():
            return model(inputs, targets, numbers) / count

    optimizers, record = make_optimizers(model, settings, runtime.dtype), rt.can_record(runtime, settings, 1)
    return Contender(model, optimizers, batches(), loss, model.loss, runtime, settings.grad_clip, record=record)
