"""Settings: flat YAML plus `key=value` overrides, checked, into one frozen dataclass per script."""

import argparse
import ctypes
import dataclasses
import difflib
import errno
import glob
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap
import types
import typing

import yaml

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk says
FULL_MEMORY = re.compile("allocate memory|not enough memory|MPS backend out of memory")  # what PyTorch says on Linux, Windows and a Mac


def quoted(path):
    """A path as a shell here wants it."""
    return shlex.quote(path) if os.name == "posix" else subprocess.list2cmdline([path])


class UserError(Exception):
    """Something a user can put right: `main` makes it one line on standard error and exit status 2."""


def key(default, help, low=-math.inf, high=math.inf, choices=None):
    """A documented dataclass field. `low` and `high` are inclusive bounds."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclasses.dataclass(frozen=True)
class Common:
    """Keys that every script understands."""

    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps; where there is no GPU the CPU is used, with a message")
    dtype: str = key("auto", "precision of matrix products; auto: bfloat16 where the device is fast at it",
                     choices=("auto", "float32", "bfloat16", "float16"))
    seed: int = key(1337, "seed of weights, data order, dropout, sampling and the choice of what is held out", low=0, high=2**32 - 1)
    data_path: str | None = key(None, "corpus: .txt (an utterance a line, an empty line between dialogues) or .jsonl; chat.py, "
                                     "sentimentalTrain.py: that of a checkpoint of the original")
    checkpoint_root: str = key("checkpoints", "folder of checkpoints: train.py and sentimentalTrain.py write there, chat.py reads")
    resume_from: str | None = key(None, "checkpoint to start from; auto: in checkpoint_root, the newest (train.py) or the best (chat.py), "
                                         "if there is one; empty: start anew (chat.py: as auto)")


@dataclasses.dataclass(frozen=True)
class Training(Common):
    """Keys of everything that trains."""

    compile: bool = key(False, "train.py: compile the model's parts with torch.compile; on one GPU also record each step as a CUDA graph")
    block_size: int = key(256, "row length in tokens, the longest context", low=2, high=2**20)
    dropout: float = key(0.0, "dropout on embeddings and residual branches (arch=gpt2: on attention too)", low=0, high=0.95)
    train_percent: float = key(0.98, "share of the dialogues (reviews) that is trained on", low=0, high=1)
    train_batch: int = key(16, "rows in a step, over all processes and accumulation", low=1, high=2**20)
    test_batch: int = key(16, "rows at once in an evaluation", low=1)
    micro_batch: int | str = key("auto", "rows that a process holds at once, the rest by gradient accumulation; auto: what fits on a GPU, "
                                 "8192 tokens elsewhere (sentimentalTrain.py: half of the batch, which is the most there)")
    checkpointing: bool = key(False, "recompute activations in the backward pass: less memory, a third more time")
    max_epoch: int = key(1919810, "stop after so many passes over the data; the default is next to no limit", low=1)
    max_steps: int | None = key(None, "stop after so many steps; the schedule ends there too", low=1)
    max_minutes: float | None = key(None, "stop after so many minutes; the schedule ends there too", low=0)
    patience: int | None = key(None, "stop after so many evaluations without improvement", low=1)
    optimizer: str = key("adamw", "muon: Muon for hidden matrices, AdamW for the rest", choices=("adamw", "muon"))
    lr: float = key(3e-4, "peak learning rate of AdamW; with optimizer=muon of embeddings, output layer and vectors", low=0, high=1e6)
    muon_lr: float = key(0.02, "peak learning rate of Muon", low=0, high=1e6)
    min_lr: float = key(0.0, "AdamW's learning rate at the end; Muon's ends at muon_lr * min_lr / lr", low=0)
    warmup_steps: int = key(0, "steps of linear warm-up", low=0)
    schedule: str = key("cosine", "after the warm-up: cosine, or wsd: stable, then linear decay", choices=("cosine", "wsd"))
    decay_steps: int | None = key(None, "steps of the schedule without max_steps and max_minutes; empty: max_epoch", low=1)
    decay_share: float = key(0.6, "wsd: last share of the run, in which the rate falls; 1: all of it", low=0, high=1)
    weight_decay: float = key(0.1, "on matrices; vectors have none", low=0)
    beta1: float = key(0.9, "AdamW's decay of the mean of gradients", low=0, high=0.9999)
    beta2: float = key(0.95, "AdamW's decay of the mean of their squares", low=0, high=0.99999)
    grad_clip: float = key(1.0, "largest norm of the gradient; 0: no clipping", low=0)
    tensorboard_path: str | None = key("runs", "folder of TensorBoard's logs; empty: none")


@dataclasses.dataclass(frozen=True)
class TrainSettings(Training):
    """train.py: pretrain a GPT on dialogues."""

    arch: str = key("gpt2", "gpt2: learned positions, LayerNorm, GELU; modern: RoPE, RMSNorm, QK-norm, SwiGLU", choices=("gpt2", "modern"))
    n_layer: int = key(6, "blocks", low=1, high=2**10)
    n_head: int = key(4, "attention heads", low=1, high=2**10)
    n_kv_head: int | None = key(None, "heads of keys and values; empty: n_head", low=1)
    n_embd: int = key(256, "width", low=1, high=2**20)
    bias: bool = key(True, "gpt2: biases in Linear and LayerNorm (modern has none)")
    tied: bool | None = key(None, "output layer shares the token embedding; empty: gpt2 yes, modern no")
    bigram_start: bool = key(True, "start a new modern model that has its own output layer from the bigram counts of the corpus")
    chain: float = key(0.0, "probability that a dialogue joins the one before, where both fit, as a change of subject", low=0, high=1)
    tokenizer: str = key("char", "char, bpe, or the path of a tokenizer or checkpoint to take it from")
    vocab_size: int | None = key(None, "largest vocabulary; empty: all characters (bpe: 8000)", low=4, high=2**24)
    min_freq: int = key(1, "char: rarer characters become <unk>; bpe: rarer pairs are not merged (at least 2)", low=1, high=2**31 - 1)
    eval_freq: int = key(500, "steps between evaluations", low=1)
    eval_steps: int | None = key(None, "batches of test_batch in an evaluation; empty: all that is held out", low=1)
    save_freq: int = key(1000, "steps between checkpoints; an evaluation saves one too", low=1)
    keep: int = key(2, "numbered checkpoints kept besides the newest and the best", low=0)


@dataclasses.dataclass(frozen=True)
class ChatSettings(Common):
    """chat.py: talk with a checkpoint."""

    seed: int | None = key(None, "same seed, same replies; empty: other ones each time", low=0)
    quantize: str | None = key(None, "CPU only: weights in 8 or 4 bits, faster", choices=("int8", "int4"))
    temperature: float = key(0.65, "0: always the likeliest token", low=0, high=1e6)
    top_k: int = key(0, "sample among the k likeliest tokens; 0: all", low=0)
    top_p: float = key(0.92, "sample among the likeliest tokens that hold this share of probability", low=0, high=1)
    min_p: float = key(0.0, "drop tokens under this share of the likeliest one's probability", low=0, high=1)
    repetition_penalty: float = key(1.0, "above 1: tokens already in the reply become less likely", low=1)
    no_repeat_ngram: int = key(3, "no reply repeats this many tokens in a row, parts of words aside; 0: off", low=0)
    max_new_tokens: int = key(100, "longest reply", low=1)
    best_of: int = key(1, "replies to choose from; they come in one batch, and the reply is not streamed", low=1, high=256)
    mmi_weight: float = key(0.5, "best_of: how much to penalise a reply for being likely after anything", low=0)
    history_path: str | None = key("~/.small_gpt_history", "file of the lines typed at the terminal; empty: forget them")


@dataclasses.dataclass(frozen=True)
class SentimentSettings(Training):
    """sentimentalTrain.py: fine-tune a checkpoint into a classifier of reviews."""

    sentimental_data_path: str = key("data/ChnSentiCorp_htl_all.csv", "CSV with the columns label and review")
    base_model: str | None = key(None, "checkpoint to start from: a GPT or another classifier")
    use_mask: bool = key(True, "True: read the class at <extract>; False: at the last position of the padded row")
    frozen: bool = key(False, "train only the last block, the final norm, the head and the two new embeddings")
    ngrams: int = key(0, "add a linear model on the hashed 1- to n-grams of tokens to the scores; 0: none", low=0, high=8)
    val_percent: float = key(0.1, "share of the training part that the epoch is chosen on; 0: take the last epoch", low=0, high=0.9)
    seeds: list[int] | None = key(None, "repeat with each of these seeds (weights and split); empty: seed alone", low=0, high=2**32 - 1)
    folds: int | None = key(None, "cross-validate: every review is tested once in so many parts", low=2, high=1000)
    split_path: str | None = key(None, "JSON list of test sets, each a list of reviews by number (from 0, empty ones not counted)")


SCRIPTS = (TrainSettings, ChatSettings, SentimentSettings)
IGNORED = {"ddp", "local_rank", "world_size"}  # the original's: torchrun's environment decides
KNOWN = IGNORED.union(*(script.__dataclass_fields__ for script in SCRIPTS))


def _parse(field, value):
    """`value` as the field's type; YAML and command lines give strings where numbers were meant."""
    name, hint = field.name, field.type
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "null", "none", "~")):
        if types.NoneType in allowed:
            return None
        raise UserError(f"{name} is empty; it needs a value ({field.metadata['help']})")
    for kind in (kind for kind in allowed if kind is not types.NoneType):  # that is dealt with above
        try:
            if kind is bool:
                parsed = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[str(value).lower()]
            elif kind is int:
                whole = str(value).strip().lstrip("+-").isdigit()  # where a float would lose digits
                parsed = int(value) if whole else int(float(value))
                if isinstance(value, bool) or not whole and parsed != float(value):
                    continue
            elif kind is float:
                parsed = float(value)
                if isinstance(value, bool) or not math.isfinite(parsed):
                    continue
            elif kind == list[int]:
                parts = value if isinstance(value, list) else str(value).strip("[]").split(",")
                parsed = [int(str(part)) for part in parts if str(part).strip()]
            elif isinstance(value, (bool, list, dict)) or value in ("true", "True", "false", "False"):  # tensorboard_path: false
                continue
            else:
                parsed = os.path.expanduser(str(value))  # "~" in a YAML file; a shell replaces only its own
        except (ValueError, KeyError, OverflowError, TypeError):
            continue
        low, high, choices = (field.metadata[k] for k in ("low", "high", "choices"))
        if choices and parsed not in choices:
            raise UserError(f"{name}={parsed} is not one of {', '.join(choices)}")
        for number in parsed if isinstance(parsed, list) else [parsed] if kind in (int, float) else []:
            if not low <= number <= high:
                raise UserError(f"{name}={value} must be at least {low}" + (f" and at most {high}" if high < math.inf else ""))
        return parsed
    plain = {types.NoneType: "empty", int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    names = " or ".join(plain.get(kind, "a list of whole numbers") for kind in allowed)
    raise UserError(f"{name}={value!r} must be {names} ({field.metadata['help']})")


def refuse_key(path):
    """A UserError where key=value stands in place of a file."""
    if path.partition("=")[0] in KNOWN:
        raise UserError(f"{path} is not a file: name the configuration first, then key=value")


def read_yaml(path):
    """The mapping in a YAML file, or a UserError that says what is wrong with it."""
    if path.endswith(".pth") or os.path.isdir(path):
        kind = "folder" if os.path.isdir(path) else "checkpoint"
        raise UserError(f"{path} is a {kind}, but a configuration is needed here: a YAML file, config/demo.yaml say")
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        values = yaml.safe_load(text)
    except FileNotFoundError:
        refuse_key(path)
        for folder in (os.path.dirname(path) or ".", "config"):
            if files := sorted(glob.glob("*.y*ml", root_dir=folder)):
                raise UserError(f"{path} does not exist; in {folder} there are {', '.join(files)}")
        raise UserError(f"{path} does not exist")
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:  # not all that it raises is a YAMLError
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}")
    if not isinstance(values, (dict, types.NoneType)):
        raise UserError(f"{path} is not a list of `key: value` lines; a corpus is named by data_path=…")
    names = [name.value for name, _ in yaml.compose(text).value] if values else []
    if twice := [name for name in names if names.count(name) > 1]:  # YAML itself would take the last
        raise UserError(f"{path} sets {twice[0]} twice; leave one of the lines")
    return values or {}


def build(script, values):
    """A checked `script` dataclass from a mapping of any known keys; keys of other scripts are left out."""
    for name in values:
        if name not in KNOWN:
            raise UserError(f"unknown key {name!r}; did you mean {_nearest(str(name))!r}? --help lists the keys")
    settings = script(**{f.name: _parse(f, values[f.name]) for f in dataclasses.fields(script) if f.name in values})
    _check_pairs(settings)
    return settings


def _nearest(name):
    """The known key that is most likely meant: other programs' names for it, then what is written most like it."""
    others = dict(batch_size="train_batch", learning_rate="lr", max_iters="max_steps", iterations="max_steps", epochs="max_epoch",
                  context="block_size", context_length="block_size", out_dir="checkpoint_root", eval_interval="eval_freq")
    return others.get(name.lower()) or difflib.get_close_matches(name.lower(), KNOWN - IGNORED, n=1, cutoff=0)[0]


def _check_pairs(settings):
    has = lambda name: getattr(settings, name, None) is not None
    if has("n_embd") and settings.n_embd % settings.n_head:
        raise UserError(f"n_embd={settings.n_embd} cannot be split over n_head={settings.n_head}; "
                        f"use a multiple of {settings.n_head} ({-(-settings.n_embd // settings.n_head) * settings.n_head})")
    if has("n_embd") and settings.arch == "modern" and settings.n_embd // settings.n_head % 2:
        raise UserError(f"arch=modern needs an even head size; n_embd={settings.n_embd} / n_head={settings.n_head} "
                        f"is {settings.n_embd // settings.n_head}")
    if has("n_kv_head") and settings.n_head % settings.n_kv_head:
        raise UserError(f"n_head={settings.n_head} is not a multiple of n_kv_head={settings.n_kv_head}")
    if has("min_lr") and settings.min_lr > settings.lr:
        raise UserError(f"min_lr={settings.min_lr} is above lr={settings.lr}")
    if has("folds") and has("split_path"):
        raise UserError(f"folds={settings.folds} and split_path={settings.split_path} both say what is tested; leave one out")
    if has("micro_batch") and settings.micro_batch != "auto" and not (isinstance(settings.micro_batch, int) and settings.micro_batch > 0):
        raise UserError(f"micro_batch={settings.micro_batch} must be auto or a number of rows, at least 1")
    if has("train_percent") and settings.train_percent == 0:
        raise UserError("train_percent=0 leaves nothing to train on; use 0.98, say")
    if has("sentimental_data_path") and settings.train_percent == 1 and not has("folds") and not has("split_path"):
        raise UserError("train_percent=1 leaves nothing to test; use 0.8, say")


def overrides(pairs):
    """`["lr=1e-3", …]` as a mapping."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{pair!r} is not of the form key=value")
        values[name.strip()] = value.strip()
    return values


def parser(script, usage):
    """What the command lines of all scripts share: --help with the keys, a line each."""
    lines = ["keys (YAML or key=value):"]
    for field in dataclasses.fields(script):
        default = "-" if field.default is None else field.default
        choices = f" [{', '.join(field.metadata['choices'])}]" if field.metadata["choices"] else ""
        lines += textwrap.wrap(f"{field.metadata['help']}{choices} (default: {default})", 80, initial_indent=f"  {field.name:<22}",
                               subsequent_indent=" " * 24)
    return argparse.ArgumentParser(description=script.__doc__, usage=usage, epilog="\n".join(lines),
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def tune_allocator():
    """Keeps glibc's malloc from returning pages and faulting them in again (a fifth of a training step on a CPU) and asks Linux
    for huge pages (a twentieth)."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((-1, 2**31 - 1), (-2, 256 << 20), (-4, 0)):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
            libc.mallopt(parameter, value)
        with open("/proc/self/maps", "rb") as file:
            heap = next(int(line.split(b"-")[0], 16) for line in file if line.endswith(b"[heap]\n"))
    except (OSError, AttributeError, StopIteration):
        return  # not glibc, or not Linux
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    room = libc.malloc(ctypes.c_size_t(3 << 29))  # only what is mapped can be advised; the free end of a heap is kept below 2 GiB
    libc.madvise(ctypes.c_void_p(heap), ctypes.c_size_t(libc.sbrk(0) - heap), 14)  # MADV_HUGEPAGE
    libc.free(ctypes.c_void_p(room))


def main(function):
    """Runs a script's `function`; a UserError becomes one line and exit status 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")  # a character that the terminal or file has not
    tune_allocator()
    try:
        return function()
    except UserError as error:
        error.__traceback__ = error.__context__ = None  # ends the progress bars that the function had: the message begins a line
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)
    except KeyboardInterrupt as error:
        error.__traceback__ = None
        print("interrupted", file=sys.stderr)
        raise SystemExit(130)
    except OSError as error:
        if isinstance(error, BrokenPipeError) or os.name == "nt" and error.errno == errno.EINVAL and error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `… | head`: the reader has gone
            raise SystemExit(1)
        if error.errno not in FULL:
            raise
        error.__traceback__ = error.__context__ = None
        print(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(2)
