"""Labelled reviews to batches: reading, splitting, encoding, and measuring what a classifier says of them."""

import codecs
import csv
import hashlib
import io
import json
import math
import re
import sys

import numpy as np

from settings import UserError
from tokenizer import PAD

MOST_CLASSES = 100  # more different labels than that are no classes


# Reading

def read_text(path, advice=""):
    """The text of a file in UTF-8, with or without BOM, GB18030, or UTF-16 with BOM, its line ends \\n; `-` is standard input. `advice`
    is for a file that is not there."""
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise UserError(f"{path or 'a file without a name'} does not exist{advice}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}")
    if content.startswith(b"PK\3\4"):
        raise UserError(f"{path} is an Excel workbook, or another zip archive: save it as CSV in UTF-8")
    found = []
    for encoding in ["utf-16"] if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ["utf-8-sig", "gb18030"]:
        try:
            return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            found.append(f"{encoding.removesuffix('-sig').upper()} (byte {error.start})")
            if encoding == "utf-8-sig" and len(re.findall(b"[\xe0-\xef]", content[3:error.start])) > 3:  # Chinese, as far as that
                raise UserError(f"{path} is damaged UTF-8 ({error.reason} at byte {error.start}); save it anew as UTF-8")
    raise UserError(f"{path} is not {' nor '.join(found)}; save it as UTF-8")


def read_table(path, columns, advice=""):
    """The rows of a CSV file, each the cells of `columns`, which its first line names; cells that a short row lacks are empty.

    The delimiter is the comma, semicolon or tab that separates the names in the first line."""
    if path.lower().endswith((".json", ".jsonl")):
        raise UserError(f"{path} is no table: save it as .csv, with {','.join(columns)} as its first line")
    csv.field_size_limit(1 << 30)
    text = read_text(path, advice)
    open_by = lambda mark, **more: csv.reader(io.StringIO(text), skipinitialspace=True, delimiter=mark, **more)
    named = lambda mark: sum(name.strip().lower() in columns for name in next(filter(None, open_by(mark)), []))
    reader = open_by(delimiter := max("\t,;" if path.lower().endswith(".tsv") else ",;\t", key=named), strict=True)
    names, rows = [], []
    try:
        for row in reader:
            if not names:
                names = [name.strip().lower() for name in row]
                for column in columns if row else []:
                    if column not in names:
                        raise UserError(f"{path} has no column {column!r} but {', '.join(map(repr, names[:5]))}; its first line should "
                                        f"name its columns, with commas between: {','.join(columns)}")
            elif any(field.strip() for field in row[len(names):]):
                raise csv.Error(f'more fields than the first line names; a text with {delimiter!r} in it must stand in quotes: "…"')
            elif row or len(names) == 1:  # a blank line between rows of several cells is none
                rows.append([row[place].strip() if place < len(row) else "" for place in map(names.index, columns)])
    except csv.Error as error:
        advice = '; a quotation mark " is not closed' if "unexpected end" in str(error) else ""
        advice = '; inside quotes a " must be doubled: "太""差""了"' if "expected after" in str(error) else advice
        raise UserError(f"{path}, line {reader.line_num}: {error}{advice}")
    if not names:
        raise UserError(f"{path} is empty; its first line should name the columns, label,review say")
    return rows


def read_reviews(path):
    """(texts, labels (N,) ints, names of the classes in order, how many rows were left out for want of a text or label)."""
    rows = list(filter(any, read_table(
        path, ("label", "review"), "; it should be a CSV with the columns label and review (data/sample_reviews.csv is one), or fetch one: "
        "python data.py download sentiment")))
    pairs = [(text, " ".join(name.split())) for name, text in rows if text and name]  # a label is printed in one line
    if not pairs:
        raise UserError(f"{path} holds no review")
    classes = sorted({name for _, name in pairs}, key=lambda name: (len(name), name) if name.isdigit() else (0, name))
    if len(classes) > MOST_CLASSES:
        raise UserError(f"{path}: the column label has {len(classes)} different values ({', '.join(classes[:3])}, …); "
                        f"classes are {MOST_CLASSES} at most")
    if len(classes) < 2:
        raise UserError(f"{path}: all {len(pairs)} reviews have the label {classes[0]!r}; it takes two classes")
    return ([text for text, _ in pairs], np.array([classes.index(name) for _, name in pairs]), classes, len(rows) - len(pairs))


def read_unlabelled(path):
    """The texts to be classified: a .csv's column review, else the lines."""
    if not path.lower().endswith((".csv", ".tsv", ".json", ".jsonl")):
        texts = [line.rstrip("\n") for line in io.StringIO(read_text(path))]
    else:
        texts = [text for text, in read_table(path, ("review",))]
    if not texts:
        raise UserError(f"{'standard input' if path == '-' else path} holds no review")
    return texts


# Splitting: reviews of the same text are always on the same side, but for those of split_path.

def hashes(texts):
    """(N,) int64, a number for each text that no other has."""
    return np.array([int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=7).digest()) for text in texts])


def deal(texts, labels, among, parts, seed):
    """Which of `parts` (shares that add up to 1) each review of `among` gets: stratified by class, duplicates together."""
    rng = np.random.default_rng(seed)
    first, group = {}, np.empty(len(texts), dtype=np.int64)
    for i in among:
        group[i] = first.setdefault(texts[i], i)  # a text's class is that of its first review
    part = np.full(len(texts), -1)
    ends = np.cumsum(parts)
    for label in np.unique(labels[among]):
        members = among[(group[among] == among) & (labels[among] == label)]
        members = members[rng.permutation(len(members))]
        part[members] = np.searchsorted(ends, (np.arange(len(members)) + 0.5) / len(members)).clip(max=len(parts) - 1)
    part[among] = part[group[among]]
    return part


def splits(texts, labels, names, settings):
    """Yields (title, seed, training, validation, test), the last three sorted review numbers, of every run to be made."""
    everything = np.arange(len(texts))
    for seed in dict.fromkeys(settings.seeds or [settings.seed]):
        if settings.split_path:
            sets = [(f"seed {seed}, split {k}", np.array(sorted(test)))
                    for k, test in enumerate(read_split(settings.split_path, len(texts)))]
        elif settings.folds:
            part = deal(texts, labels, everything, [1 / settings.folds] * settings.folds, seed)
            sets = [(f"seed {seed}, fold {k + 1}", np.flatnonzero(part == k)) for k in range(settings.folds)]
        else:
            part = deal(texts, labels, everything, [settings.train_percent, 1 - settings.train_percent], seed)
            sets = [(f"seed {seed}", np.flatnonzero(part == 1))]
        for title, test in sets:
            rest = np.setdiff1d(everything, test)
            part = deal(texts, labels, rest, [1 - settings.val_percent, settings.val_percent], seed)
            training, validation = np.flatnonzero(part == 0), np.flatnonzero(part == 1)
            wanted = [("training", training), ("test", test)] + [("validation", validation)] * (settings.val_percent > 0)
            for kind, members in wanted:
                for label, name in enumerate(names):
                    if not (labels[members] == label).any():
                        different = len({texts[i] for i in np.flatnonzero(labels == label)})
                        raise UserError(f"{title}: the {kind} part has no review of class {name!r} ({different} different ones in all); "
                                        "add reviews of it, or change train_percent, val_percent, folds or split_path")
            yield title, seed, training, validation, test


def read_split(path, count):
    """The test sets in a JSON file."""
    try:
        sets = json.loads(read_text(path))
        fits = sets and all(test and len(set(test)) == len(test) and all(type(i) is int and 0 <= i < count for i in test) for test in sets)
    except (ValueError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise UserError(f"split_path={path} is not a list of lists of different numbers from 0 to {count - 1}; "
                        "bench/linear.py --splits writes one")
    return sets


# Encoding and batches

def encode(whole, start, block_size):
    """`<start> review <extract>` of reviews as ids, each at most block_size long: of a longer one both ends stay.

    `<start>` has the number `start`, and `<extract>` the next.
    """
    extract, room, rows = start + 1, block_size - 2, []
    for ids in whole:
        if len(ids) > room:
            ids = np.concatenate([ids[:room - room // 2], ids[len(ids) - room // 2:]])
        rows.append(np.concatenate([[start], ids, [extract]]).astype(np.int64))
    return rows


def by_length(members, lengths, rows, rng=None):
    """Batches of so many review numbers, of similar length; with `rng` in random order, equal lengths mixed anew."""
    if rng is not None:
        members = rng.permutation(members)
    order = np.argsort(lengths[members] * (1 if rng is None else 1 + 0.04 * rng.random(len(members))), kind="stable")
    batches = [members[order[i:i + rows]] for i in range(0, len(members), rows)]
    return batches if rng is None else [batches[i] for i in rng.permutation(len(batches))]


def width_unit(use_mask, block_size):
    """What the width of every batch is a multiple of. oneDNN makes a kernel for each shape and keeps a thousand: with every width
    that occurs, an epoch took two thirds longer on a CPU, and twice the memory (bench/LOG.md)."""
    return math.gcd(8, block_size) if use_mask else block_size


def pad(rows, unit):
    """(ids (B, T), length (B,)) of rows of ids, filled with `<pad>` to a multiple of `unit`."""
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), -(-lengths.max() // unit) * unit), PAD, dtype=np.int64)
    ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return ids, lengths


# Measuring

def measure(probabilities, labels, names):
    """Accuracy, macro F1, ROC AUC and the confusion matrix [true][predicted] of (N, classes) probabilities."""
    said, count = probabilities.argmax(axis=1), len(names)
    confusion = np.bincount(labels * count + said, minlength=count * count).reshape(count, count)
    right = confusion.diagonal()
    f1 = 2 * right / np.maximum(1, confusion.sum(axis=0) + confusion.sum(axis=1))
    areas = [area(probabilities[:, k], labels == k) for k in ([1] if count == 2 else range(count))]
    return dict(accuracy=float(right.sum() / len(labels)), f1=float(f1.mean()), auc=float(np.mean(areas)),
                majority=float(confusion.sum(axis=1).max() / len(labels)), confusion=confusion.tolist(), reviews=len(labels))


def area(scores, positive):
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half (Hanley and McNeil 1982)."""
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # from 1, ties share their mean
    n, m = positive.sum(), (~positive).sum()
    return (ranks[positive].sum() - n * (n + 1) / 2) / (n * m) if n and m else float("nan")
