"""Checkpoints: one file with all that chat, fine-tuning and resuming need; reads those of the original (CJL196/small-gpt) too.

    python checkpoint.py convert IN.pth --corpus data/train.txt OUT.pth
"""

import argparse
import collections
import contextlib
import dataclasses
import errno
import glob
import hashlib
import itertools
import os
import pickle
import re
import shutil
import struct
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

import settings as settings_module
import tokenizer as tokenizer_module
from model import GPT, GPTConfig
from settings import FULL_MEMORY, UserError
from tokenizer import PAD, CharTokenizer

FORMAT = 1
OURS = re.compile(r"cpt\d+\.pth|(best|last)\.pth|metrics\.json")  # what a run writes into its checkpoint_root
CHECKED = 4000  # characters of the corpus that check_vocabulary reads
SURPRISE = 1.0  # nats a character over what a model expects: its own corpus gives 0 or less, a permuted vocabulary 4 or 5

# Names in the original's state_dict -> ours, applied in this order.
RENAMED = (
    ("_orig_mod.", ""), ("module.", ""), ("transformer.wte.", "embedding."), ("transformer.wpe.", "positions."),
    ("transformer.h.", "blocks."), ("transformer.ln_f.", "norm."), ("lm_head.", "head."), (".ln1.", ".norm1."), (".ln2.", ".norm2."),
    (".attention.W_", ".attention."), (".ffn.dense1.", ".mlp.up."), (".ffn.", ".mlp."), (".out_net.", ".out."))


class Damaged(UserError):
    """A file whose content is not a checkpoint; other errors of reading may pass by themselves."""


def make_folder(folder, wish):
    """Makes the folder for checkpoints, or says now, not at the first save, that `wish` cannot be written."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{wish} cannot be written ({error.strerror}); name another place")


def save(folder, step, content, keep=2, tell=None):
    """Writes `content` as folder/cpt{step}.pth, makes last.pth that file too, and prunes; returns its path.

    The file is complete under its name or not there at all. `keep` files stay beside those two. `tell`: this is a new run's first, so an
    earlier run's files are set aside, once the new one is written, and a line about it goes to this function.
    """
    def make_room():
        if tell and (old := set_aside(folder)):
            tell(f"an earlier run's checkpoints are now in {old}")

    path = os.path.join(folder, f"cpt{step}.pth")
    write(path, content, make_room)
    name_also(path, "last.pth")
    for _, old in numbered(folder)[keep + 1:]:  # the newest is last.pth
        if old != path:  # another run is in this folder, and further
            _patiently(os.unlink, old)
    for left in glob.glob(".saving-cpt*.pth", root_dir=folder):  # by a run that was killed while it saved
        os.unlink(os.path.join(folder, left))
    return path


def write(path, content, make_room=lambda: None):
    """Writes `content` as the checkpoint file `path`, which is complete or not there at all. `make_room` is called in between."""
    with whole(path) as temporary:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)  # it may have gone since the run began
        with open(temporary, "wb") as file:
            try:
                torch.save({"format": FORMAT} | content, file)
            except RuntimeError as error:  # it says "unexpected pos" where the disk is full
                raise OSError if "unexpected pos" in str(error) else error
            file.flush()
            os.fsync(file.fileno())
        make_room()


@contextlib.contextmanager
def whole(path):
    """Gives the name for a temporary file or folder, which becomes `path` at the end and is gone after an error."""
    temporary = os.path.join(os.path.dirname(path), f".saving-{os.path.basename(path)}")
    _remove(temporary)  # of a program that was killed
    try:
        yield temporary
        _patiently(os.replace, temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or 'is the disk full?'}; earlier files are intact")
    finally:
        _remove(temporary)  # after an error, or where it was a link to `path` already


def _patiently(do, *names):
    """Windows replaces and removes no file that another program is just reading."""
    for wait in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2) if os.name == "nt" else ():
        try:
            return do(*names)
        except PermissionError:
            time.sleep(wait)
    return do(*names)


def _remove(path):
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.unlink(path)


def name_also(path, name):
    """Gives the checkpoint `path` a second name in its folder, best.pth say; it outlives the pruning of the first.

    `name` may lead out of the folder: "../best.pth".
    """
    with whole(os.path.join(os.path.dirname(path), name)) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)


def numbered(folder):
    """[(step, path)] of a folder's cpt{step}.pth, newest first."""
    matches = (re.fullmatch(r"cpt(\d+)\.pth", name) for name in glob.glob("cpt*.pth", root_dir=folder))
    return sorted(((int(match[1]), os.path.join(folder, match[0])) for match in matches if match), reverse=True)


def set_aside(folder, ours=OURS):
    """Moves an earlier run's checkpoints and figures, files with such names, out of the way of a new one; returns where to, or None if
    there were none."""
    names = list(filter(ours.fullmatch, os.listdir(folder))) if os.path.isdir(folder) else []
    if not names:
        return None
    target = os.path.join(folder, time.strftime("before-%Y%m%d-%H%M%S"))
    while os.path.exists(target):  # two within a second
        target += "+"
    os.makedirs(target)
    for name in names:
        _patiently(os.rename, os.path.join(folder, name), os.path.join(target, name))
    return target


def load(path):
    """What torch.save wrote to a file, on the CPU; a UserError if there is none or it cannot be read, Damaged if it is damaged
    or needs code to be run."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; name a file in it, {os.path.join(path, 'best.pth')} say")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        folder, name = os.path.dirname(path) or ".", os.path.basename(path)
        earlier = sorted(glob.glob(os.path.join("before-*", glob.escape(name)), root_dir=folder))  # `set_aside` put it there
        if there := sorted(glob.glob("*.pth", root_dir=folder) + glob.glob("seed*/best.pth", root_dir=folder)) + earlier[-1:]:
            raise UserError(f"{path} does not exist; in {folder} there are {', '.join(there)}")
        if os.path.basename(folder) == "pretrained":
            raise UserError(f"{path} does not exist; download it: python data.py download pretrained")
        raise UserError(f"{path} does not exist; train one first (python train.py CONFIG, a classifier: python sentimentalTrain.py "
                        "CONFIG), or name another")
    except pickle.UnpicklingError:
        raise Damaged(f"{path} is refused: it is not a checkpoint, is damaged, or would run code when loaded")
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError, AssertionError, struct.error) as error:
        passing = isinstance(error, OSError) and error.errno != errno.EINVAL or FULL_MEMORY.search(str(error))  # EINVAL: a cut file
        reason = " ".join(str(error).splitlines()[:1]).split(". ")[0]
        if passing:
            raise UserError(f"{path} cannot be read: {reason}")
        raise Damaged(f"{path} is no checkpoint, or damaged: {type(error).__name__}{', ' * bool(reason)}{reason}")


def read(path, corpus=None):
    """The content of a checkpoint file, a dict. One of the original's becomes one of this program: its vocabulary is
    rebuilt from `corpus`, the text that it was trained on."""
    content = load(path)
    if is_original(content):
        return from_original(content, path, corpus)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this program (format {FORMAT})")
    return content


def newest(folder, corpus=None, rename=True):
    """(path, content) of the newest checkpoint in `folder` that is not damaged, or (None, None) where there is no checkpoint.

    Damaged newer ones are renamed if `rename`, so that the run goes on in its folder as if they had not been written.
    """
    damaged, paths = {}, [path for _, path in numbered(folder)] + [os.path.join(folder, name) for name in ("last.pth", "best.pth")]
    for path in filter(os.path.exists, paths):
        try:
            content = read(path, corpus)
        except Damaged as error:
            damaged[path] = error
            continue
        for other, error in damaged.items():
            renamed = f"; it is now {other}.unreadable" if rename else ""
            print(f"warning: {error}{renamed}; taking {path}", file=sys.stderr)
        present = filter(os.path.exists, paths if rename else [])
        for name in [name for name in present if any(os.path.samefile(name, other) for other in damaged)]:
            os.replace(name, name + ".unreadable")  # best.pth and last.pth may be names of a damaged file, too
        return path, content
    if damaged:
        raise UserError(f"every checkpoint in {folder} is damaged: {next(iter(damaged.values()))}; drop resume_from=auto to start over")
    return None, None


def unpack(content, path, **changes):
    """(model in evaluation mode on the CPU, tokenizer) of a checkpoint's content; `changes` to its configuration: another dropout."""
    try:
        with torch.device("meta"):  # no time spent on random weights
            model = GPT(GPTConfig(**content["config"] | changes))
        model.load_state_dict(content["model"], assign=True)
        tokenizer = tokenizer_module.from_state(content["tokenizer"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or was changed: {str(error).splitlines()[-1].strip()[:200]}")  # PyTorch's first is a heading
    if model.config.tied:
        model.head.weight = model.embedding.weight
    return model.eval(), tokenizer


def load_model(path, device="cpu", corpus=None):
    """(model, tokenizer, meta) of a checkpoint file: the one way in for chat, fine-tuning, export and other programs.

    `meta` holds the rest: config, progress, settings, metrics. The model is in evaluation mode on `device`. `corpus`
    is looked at for the original's files alone, whose vocabulary is in the text that they were trained on.
    """
    content = read(path, corpus)
    model, tokenizer = unpack(content, path)
    meta = {key: value for key, value in content.items() if key not in ("model", "tokenizer", "optimizer", "scaler")}
    return model.to(device), tokenizer, meta


def describe(model, tokenizer):
    """What a checkpoint must say of a model and its tokenizer to be enough by itself."""
    return dict(model=model.state_dict(), config=dataclasses.asdict(model.config), tokenizer=tokenizer.state())


# The original's files

def is_original(content):
    """Whether a loaded file is one that the original wrote."""
    return isinstance(content, dict) and {"state_dict", "global_step", "n_layer"} <= content.keys()


def from_original(content, path, corpus):
    """The original's checkpoint as one of this program: weights, vocabulary, step, and AdamW's state if it is there."""
    if corpus is None:
        raise UserError(f"{path} is one of the original's files, whose vocabulary is in the corpus it was trained on: convert it "
                        f"once, python checkpoint.py convert {path} --corpus data/train.txt OUT.pth, or name the corpus to "
                        "train.py, chat.py or sentimentalTrain.py by data_path=…")
    try:
        shape = {name: content[name] for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias")}
        weights = {_our_name(name): tensor for name, tensor in content["state_dict"].items() if not name.endswith(".mask")}
        tied = torch.equal(weights.setdefault("head.weight", weights["embedding.weight"]), weights["embedding.weight"])
        config = GPTConfig(arch="gpt2", tied=tied, **shape)
        weights |= {name: _padded(weights[name], config.rows) for name in ("embedding.weight", "head.weight")}
        optimizer = _optimizer_state(content, config)
        progress = dict(step=int(content["global_step"]), epoch=int(content.get("global_epoch", 0)))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} looks like one of the original's files but is not complete: {error!r}")
    tokenizer = original_vocabulary(corpus, config.vocab_size, path)
    with open(corpus, "rb") as file:
        progress["original"] = hashlib.file_digest(file, "sha256").hexdigest()  # of what it was trained on
    ours = dict(format=FORMAT, model=weights, config=dataclasses.asdict(config), tokenizer=tokenizer.state(), optimizer=optimizer,
                progress=progress, settings=dict(data_path=content.get("dataset")), metrics={})
    check_vocabulary(unpack(ours, path)[0], tokenizer, corpus, path)
    return ours


def _our_name(name):
    for old, new in RENAMED:
        name = name.replace(old, new)
    return name


def _padded(tensor, rows):
    """(V, C) with rows of zeros up to `rows`: the loss masks them and nothing looks them up, so they stay zero."""
    return F.pad(tensor, (0, 0, 0, rows - len(tensor)))


def _optimizer_state(content, config):
    """[AdamW's state_dict] with its parameters in our order, or None: matrices in one group, vectors in the next, as there."""
    saved = content.get("optimizer")
    if not saved or not saved["state"]:
        return None
    in_order = lambda named: sorted(named, key=lambda name: named[name].dim() < 2)  # a stable sort: matrices first
    theirs = {_our_name(name): tensor for name, tensor in content["state_dict"].items() if not name.endswith((".mask", "lm_head.weight"))}
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    id_of = dict(zip(in_order(theirs), ids, strict=True))
    with torch.device("meta"):
        ours = dict(GPT(config).named_parameters())
    state = {i: dict(saved["state"][id_of[name]]) for i, name in enumerate(in_order(ours))}
    for moment in ("exp_avg", "exp_avg_sq"):
        state[0][moment] = _padded(state[0][moment], config.rows)  # the embedding
    matrices = sum(parameter.dim() == 2 for parameter in ours.values())
    groups = [dict(fused=True, params=list(members)) for members in (range(matrices), range(matrices, len(ours)))]
    return [dict(state=state, param_groups=groups)]  # learning rates and the like are the settings'


def original_vocabulary(corpus, vocab_size, path):
    """The original's vocabulary: every character of the corpus file but the newline, most frequent first, ties by first appearance."""
    for encoding in ("utf-8", "utf-8-sig"):  # the original counted a byte-order mark as a character
        with _open_corpus(corpus, encoding) as file:
            counts = collections.Counter(itertools.chain.from_iterable(file))
        tokenizer = CharTokenizer("".join(character for character, _ in counts.most_common() if character != "\n"))
        if tokenizer.size == vocab_size:
            return tokenizer
    raise UserError(f"{corpus} is not what {path} was trained on: it gives a vocabulary of {tokenizer.size}, the file has {vocab_size}; "
                    "name the corpus that the file was trained on, unchanged")


@contextlib.contextmanager
def _open_corpus(corpus, encoding="utf-8-sig"):
    try:
        with open(corpus, encoding=encoding) as file:
            yield file
    except OSError as error:
        raise UserError(f"the corpus {corpus} cannot be read: {error.strerror}; it holds the vocabulary of the original's file")
    except UnicodeDecodeError as error:
        raise UserError(f"{corpus} is not UTF-8 ({error.reason})")


@torch.inference_mode()
def check_vocabulary(model, tokenizer, corpus, path):
    """Refuses a corpus of the right vocabulary size in another order.

    A model knows how uncertain it is: on its own corpus the mean loss is close to the mean entropy of its predictions,
    whether it has learned much or little. With the ids of other characters it is sure of what does not come. A model that
    knows little but how frequent each id is cannot tell: vocabularies are ordered by frequency. Then a line says so.
    """
    with _open_corpus(corpus) as file:
        dialogues = [text for text in file.read(CHECKED).split("\n\n") if text.strip("\n")]
    loss = entropy = count = 0
    seen = torch.zeros(model.config.vocab_size)
    for dialogue in dialogues:
        ids = torch.tensor([*tokenizer.encode(dialogue.strip("\n")).tolist(), PAD])[:model.config.block_size + 1]
        scores = model.logits(model.hidden(ids[None, :-1]))[0].log_softmax(dim=-1)  # (T, V)
        loss -= scores.gather(1, ids[1:, None]).sum().item()
        entropy -= (scores.exp() * scores).sum().item()
        seen += torch.bincount(ids[1:], minlength=len(seen))
        count += len(ids) - 1
    if not count:
        raise UserError(f"{corpus} holds no dialogue in its first {CHECKED} characters")
    if not (loss - entropy) / count <= SURPRISE:
        raise UserError(f"{corpus} is not what {path} was trained on: it has as many different characters, but in another order: "
                        f"the model expects {entropy / count:.1f} nats a character and gets {loss / count:.1f}")
    share = seen[seen > 0] / count
    if entropy / count > -(share * share.log()).sum() - 0.5:
        print(f"{path} has learned too little to tell whether {corpus}, unchanged, is what it was trained on: mind that it is",
              file=sys.stderr)


def convert(source, corpus, target):
    """Writes the original's file `source` as a checkpoint that is enough by itself."""
    if os.path.exists(target):
        raise UserError(f"{target} exists; name another file, or remove it first")
    content = load(source)
    if not is_original(content):
        raise UserError(f"{source} is not one of the original's files: a checkpoint of this program needs no corpus and no conversion")
    content = from_original(content, source, corpus)
    write(target, content)
    model, tokenizer = unpack(content, target)
    print(f"{target}: step {content['progress']['step']}, {model.count_parameters() / 1e6:.1f}M parameters, vocabulary of "
          f"{tokenizer.size}{', with the state of the optimizer' if content['optimizer'] else ''}")


def main():
    parser = argparse.ArgumentParser(description="Make a checkpoint of the original self-contained: with its vocabulary in it.")
    parser.add_argument("command", choices=["convert"])
    parser.add_argument("source", help="the original's file, cpt90M.pth say")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("--corpus", required=True, help="the text it was trained on: its vocabulary")
    options = parser.parse_args()
    convert(options.source, options.corpus, options.target)


if __name__ == "__main__":
    settings_module.main(main)
