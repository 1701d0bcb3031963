"""Corpora to batches: readers, the token store on disk, packing into rows, and their order in an epoch.

Positions and targets. A dialogue of n tokens (its last one is `<pad>`, the end) has n - 1 positions: input i predicts
token i + 1. Positions that are mere filling have the target -100 and the document number -1.
"""

import bisect
import codecs
import contextlib
import glob
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import uuid

import numpy as np
from tqdm import tqdm

import settings as settings_module
import tokenizer as tokenizer_module
from settings import TrainSettings, UserError, quoted
from tokenizer import PAD, SEP, UNK, BPETokenizer, CharTokenizer, code_points, text_of

LAYOUT = 6  # of a token store
BLOCK = 1 << 19  # bytes read at once; arrays of this size stay in the cache
IGNORE = -100  # target of a position that is not scored
NEWLINE = ord("\n")
END = ord("\r")  # closes a dialogue in a store of characters; readers leave none in the text
ARRAY = "; one array of them all becomes that by jq -c '.[]' FILE > NEW.jsonl"
UNSPOKEN = {"system", "developer", "tool", "ipython", "function", "function_call", "observation"}  # roles in JSONL
SPACE = np.array([chr(point).isspace() for point in range(0x3002)])  # by code point; the last, no space, is for all above


# Readers: a corpus is dialogues, a dialogue is its utterances joined by newlines.

def read_dialogues(path):
    """Yields each dialogue of a .txt or .jsonl corpus."""
    for points, spans in read_groups(path):
        for begin, end in spans:
            yield text_of(points[begin:end - 1])


def read_groups(path, bar=None):
    """Yields the dialogues of a corpus some at a time: (code points (N,) uint32, where each dialogue begins and ends (D, 2)).

    The last character of a dialogue is a newline, and those between dialogues, at least one after each, are newlines too. Never holds
    more than a block of the file and the dialogue it ends in. `bar` is told of the bytes read.
    """
    with corpus_errors(path), open(path, "rb") as file:
        for group in (_read_jsonl if _is_jsonl(path) else _read_text)(file, path):
            yield group
            if bar is not None:
                bar.update(file.tell() - bar.n)


@contextlib.contextmanager
def corpus_errors(path):
    """What a person can get wrong about a corpus, in one line each."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"data_path={path} does not exist; put a text file there, an utterance a line and an empty line "
                        "between dialogues (data/sample_dialogues.txt is one), or fetch one: python data.py download chat")
    except UnicodeDecodeError as error:
        with open(path, "rb") as file:
            head = file.read(min(max(64, error.start), BLOCK))
        if head.startswith((b"PK\3\4", b"\x1f\x8b")):
            raise UserError(f"{path} is a zip or gzip archive, or an Excel or Word file: unpack it, or save it as text in UTF-8")
        if b"\0" in head and not head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{path} is no text in UTF-8; a corpus is a .txt or .jsonl file")
        what, advice, options = "not UTF-8", "save it as UTF-8 in an editor, or convert it", "-f GB18030"
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            options = "-f UTF-16"
        elif max(head[:error.start], default=0) >= 0xE0 or sum(byte >= 0x80 for byte in head[:error.start]) > 32:  # UTF-8, as far as that
            what, advice, options = "damaged", "leave such bytes out", "-c -f UTF-8"
        raise UserError(f"{path} is {what} ({error.reason} at byte {error.start}); {advice}: "
                        f"iconv {options} -t UTF-8 {quoted(path)} > utf8{os.path.splitext(path)[1]}")
    except OSError as error:
        raise UserError(f"data_path={path} cannot be read: {error.strerror}")


def _is_jsonl(path):
    return path.lower().endswith((".jsonl", ".json"))


def _read_text(file, path):
    tail, size, block = file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8), BLOCK, b" "
    while block:
        block = file.read(size)
        text, tail = _whole_lines(tail + block, file.tell(), not block)
        if len(text) >= 1 << 29:  # NumPy has no larger texts
            raise UserError(f"{path} has no empty line in {len(text):,} characters; put one between dialogues")
        points = code_points(text)
        spans, end = _find_dialogues(points)
        if len(spans):
            yield points[:end], spans
        tail = text[end:].encode() + tail  # its line ends are \n already
        size = BLOCK if end else 2 * size  # a dialogue that is longer than the block


def _find_dialogues(points):
    """(where each dialogue begins and ends (D, 2), where the last blank line ends, up to which all are whole) of lines of text. Blank lines
    become mere newlines. All is done in arrays: work on one line costs as much as a hundred characters in an array.

    Of "a⏎b⏎⏎ ⏎c⏎⏎d⏎" the lines begin at 0, 2, 4, 5, 7, 9, 10; those at 4, 5 and 9 are blank; the dialogues are [0, 4) and [7, 9).
    """
    bounds = np.append(0, np.flatnonzero(points == NEWLINE) + 1)  # of lines
    begins, ends = bounds[:-1], bounds[1:]
    blank = ends - begins == 1
    spaced = np.flatnonzero(~blank & SPACE.take(points.take(begins), mode="clip"))
    for line in spaced[SPACE.take(points.take(ends[spaced] - 2), mode="clip")]:  # begins and ends with a space: has it anything else?
        if SPACE.take(points[begins[line]:ends[line]], mode="clip").all():
            points[begins[line]:ends[line]], blank[line] = NEWLINE, True
    whole = np.flatnonzero(blank)[-1] + 1 if blank.any() else 0  # lines
    changes = np.flatnonzero(np.diff(blank[:whole], prepend=True))  # the first line of a dialogue, the blank one after it, and so on
    return begins[changes].reshape(-1, 2), bounds[whole]


def _whole_lines(raw, place, last):
    """(text of the complete lines of `raw`, each ended by \\n alone, the bytes after them). `raw` ends at byte `place` of its file.

    At the `last` of a file a blank line is added."""
    carriage = raw.rfind(b"\r", 0, -1)  # a last \r may be half an end
    whole = len(raw) if last else max(raw.rfind(b"\n"), carriage) + 1
    text = _decode(raw[:whole], place - len(raw))
    if carriage >= 0 or last:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text + "\n\n" * last, raw[whole:]


def _read_jsonl(file, path):
    dialogues, ends = [], [0]
    for dialogue in itertools.chain(_jsonl_dialogues(file, path), [""]):
        if ends[-1] >= BLOCK or dialogues and not dialogue:
            yield code_points("".join(dialogues)), np.stack([ends[:-1], np.array(ends[1:]) - 1], axis=1)
            dialogues, ends = [], [0]
        dialogues.append(dialogue)
        ends.append(ends[-1] + len(dialogue))


def _jsonl_dialogues(file, path):
    for number, line in enumerate(file, 1):
        line = _decode(line, file.tell() - len(line)).removeprefix("\ufeff")
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not {"messages", "conversations"} & entry.keys():
                raise KeyError
            turns = [(role, text) for role, text in map(_turn, entry.get("messages") or entry.get("conversations") or []) if text]
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}; each line should "
                            "be an object" + ARRAY * line.lstrip().startswith("["))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f'{path}, line {number}: expected {{"messages": [{{"role": …, "content": …}}, …]}} '
                            'or {"conversations": [{"from": …, "value": …}, …]}, an object a line, each text a string'
                            + ARRAY * line.lstrip().startswith("["))
        if turns:  # what one says in several is one utterance, so that speakers alternate
            speakers = itertools.groupby(turns, key=lambda turn: turn[0])
            yield "\n".join(" ".join(text for _, text in said) for _, said in speakers) + "\n\n"


def _turn(turn):
    """(role, its text in one line, "" where nothing is said) of a JSONL file's object. A turn without a role has one of its own."""
    first = lambda *names: next((turn[name] for name in names if turn.get(name) is not None), None)  # where files are mixed, absent is null
    role, text = first("role", "from"), first("content", "value")
    role = object() if role is None else str(role).lower()
    if role in UNSPOKEN or text is None and turn.keys() & {"content", "value", "tool_calls"}:
        return role, ""
    if isinstance(text, list):  # of parts: pictures and the like are left out
        text = "".join(part["text"] for part in text if part["type"] == "text")
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no character
    return role, " ".join(text.splitlines()).strip()


def _decode(raw, place):
    """The text of bytes that begin at this place of their file; an error names its place there too."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        error.start += place
        raise


# The token store

def file_sha256(path):
    with corpus_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprints(points, spans):
    """A number for each dialogue that its copies share and others hardly ever do (but many of digits alone), (D,) uint32: a sum over
    pairs of characters, so the same utterances in another order share it too."""
    pairs = points * points
    pairs[1:] *= points[:-1]  # before a dialogue's first character stands a newline
    pairs[:1] *= NEWLINE
    return np.add.reduceat(pairs, spans.ravel(), dtype=np.uint32)[::2]


def split_mask(numbers, train_percent, seed):
    """(D,) bool, True for the training part, of the dialogues' fingerprints (D,).

    A hash of the fingerprint and the seed is a dialogue's place in a random order, whatever else the corpus holds; those first in it
    are trained on. So copies are on one side, and when a corpus grows or is reordered, nearly all that were held out before still are.
    Both parts get at least one, if they can.
    """
    places = numbers.astype(np.uint64) | np.uint64(seed << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):  # SplitMix64 (Steele et al. 2014)
        places = (places ^ places >> np.uint64(shift)) * np.uint64(factor)
    last = max(1, round(len(places) * train_percent)) - 1
    training = places <= np.partition(places, last)[last]  # copies of the last one too
    if train_percent == 1 or not training.all():
        return training
    others = places < places.max()  # than the last one and its copies: these or those are held out, whichever are fewer
    return max(others, others.any() & ~others, key=np.sum)


def prepare(settings, tokenizer=None, before=None):
    """The token store of `settings.data_path`, made if it is not there: its folder in .cache beside the corpus.

    `tokenizer` is one to use; without it settings.tokenizer names one or the kind to train on the training part. `before`: the
    identity of the store that its model was trained on. If this is another, a character tokenizer is extended by the new characters
    of the training part; the store holds the tokenizer used.
    """
    path = settings.data_path
    state = lambda: os.path.exists(path) and (os.path.getsize(path), os.path.getmtime(path))
    begun = path and state()
    corpus = corpus_of(settings)
    tokenizer = tokenizer or _named_tokenizer(settings)
    grow = isinstance(tokenizer, CharTokenizer) and before is not None and before != identity(corpus, tokenizer)
    folder = _place_of_store(settings, tokenizer, grow, corpus)
    if not manifest(folder):
        with _new_store(folder, path) as work:
            _write_store(work, path, settings, tokenizer, grow, corpus)
            if state() != begun:  # the store would have another corpus's name
                raise UserError(f"{path} was changed while it was read: start again once it is complete")
    return folder


def _named_tokenizer(settings):
    """The tokenizer in the file that settings.tokenizer names; None where it names a kind to train."""
    if settings.tokenizer.endswith(".pth"):
        import checkpoint  # here: it needs torch, which takes seconds
        return checkpoint.load_model(settings.tokenizer, corpus=settings.data_path)[1]
    return None if settings.tokenizer in ("char", "bpe") else tokenizer_module.load(settings.tokenizer)


def _place_of_store(settings, tokenizer, grow, corpus):
    cache, file = os.path.split(settings.data_path)
    stem = os.path.join(cache or ".", ".cache", os.path.splitext(file)[0][:50])
    # A tokenizer that is yet to be made is known by its recipe alone, which names the store. With a given one the store's ids are known,
    # and name it, unless there is a store with the same ids that was made by a recipe.
    if tokenizer is None or grow:
        recipe = corpus | dict(layout=LAYOUT, tokenizer=tokenizer.state() if grow else settings.tokenizer, vocab_size=settings.vocab_size,
                               min_freq=settings.min_freq)
        return f"{stem}-{_digest(recipe)}"
    wanted = identity(corpus, tokenizer)
    same = (store for store in glob.glob(glob.escape(stem) + "-*") if (manifest(store) or {}).get("identity") == wanted)
    return next(same, f"{stem}-{wanted}")


@contextlib.contextmanager
def _new_store(folder, path):
    """Gives a folder to write to, which becomes `folder` at the end and is gone after an error."""
    cache = os.path.dirname(folder)
    try:
        for left in glob.glob(os.path.join(glob.escape(cache), ".making-*")):  # by a process that was killed
            with contextlib.suppress(FileNotFoundError):  # another process has just finished it
                if time.time() - os.path.getmtime(left) > 7 * 86400:
                    shutil.rmtree(left, ignore_errors=True)
        os.makedirs(work := os.path.join(cache, f".making-{uuid.uuid4().hex}"))
    except OSError as error:
        raise UserError(f"{cache} cannot be written ({error.strerror}); the token store goes there: copy {path} to a folder of yours, or "
                        "link it there (ln -s)")
    try:
        yield work
        if os.path.isdir(folder) and not manifest(folder):  # some of it was deleted
            shutil.rmtree(folder, ignore_errors=True)
        os.rename(work, folder)  # atomic: a store is whole or not there
    except OSError as error:
        if not manifest(folder):  # else another process was faster
            raise UserError(f"the token store {folder} cannot be written: {error.strerror or 'is the disk full?'}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(cache)


def _digest(mapping):
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:16]


def corpus_of(settings):
    """What the ids of a corpus and its split follow from, but for the tokenizer."""
    path = settings.data_path
    if path is None:
        raise UserError("data_path is not set; name a corpus, for example data_path=data/sample_dialogues.txt")
    if path.lower().endswith((".csv", ".tsv", ".pth", ".yaml", ".yml")):
        raise UserError(f"data_path={path} is no corpus: .txt, an utterance a line and an empty line between dialogues, or .jsonl")
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"data_path={path} is a pipe or device, and a corpus is read twice: save it as a file")
    # Raise format when ids or the split change (older runs can then not be resumed), LAYOUT when only the files do.
    corpus = dict(format=3, corpus=file_sha256(path), train_percent=settings.train_percent, seed=settings.seed)
    return corpus | (dict(reader="jsonl 3") if _is_jsonl(path) else {})


def identity(corpus, tokenizer):
    """A short hash of what a token store holds: stores with the same ids in the same split have the same. `corpus`: from `corpus_of`."""
    return _digest(corpus | dict(tokenizer=tokenizer.state()))


def manifest(folder):
    """What a token store says of itself, a dict, or None where it is not there or not whole."""
    try:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:
            content = json.load(file)
        whole = all(os.path.getsize(os.path.join(folder, name)) == size for name, size in content["sizes"].items())
        return content if whole and content.get("layout") == LAYOUT else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _write_text(file, path):
    """Writes the code points of a corpus, its dialogues each closed by END; (their spans (D, 2), their fingerprints (D,), how often each
    code point occurs)."""
    all_spans, numbers, counts, place = [], [], np.zeros(0, dtype=np.int64), 0
    with tqdm(total=os.path.getsize(path), unit="B", unit_scale=True, desc=f"reading {path}", disable=None) as bar:
        for points, spans in read_groups(path, bar):
            all_spans.append(spans + place)
            numbers.append(fingerprints(points, spans))
            some = np.bincount(points, minlength=len(counts))
            some[:len(counts)] += counts
            counts = some
            points[spans[:, 1] - 1] = END
            file.write(points)
            place += len(points)
    if not place:
        raise UserError(f"{path} holds no dialogue")
    return np.concatenate(all_spans), np.concatenate(numbers), counts


def _write_store(folder, path, settings, tokenizer, grow, corpus):
    text_stays = isinstance(tokenizer, CharTokenizer) or tokenizer is None and settings.tokenizer == "char"
    with open(os.path.join(folder, "text.bin"), "w+b") if text_stays else tempfile.TemporaryFile(dir=os.path.dirname(folder)) as file:
        spans, numbers, counts = _write_text(file, path)
        points = np.memmap(file, np.uint32, mode="r")  # a temporary file is gone with it, however this process ends
    training = split_mask(numbers, settings.train_percent, settings.seed)
    if not training.any():
        raise UserError(f"{path} holds one dialogue{' over and over' if len(training) > 1 else ''}; at least two are needed, for "
                        "training and validation (an empty line separates dialogues; JSONL must be named .jsonl; "
                        "train_percent=1 holds nothing out)")
    lengths = np.diff(spans)[:, 0]
    utterances = counts[NEWLINE] - (len(points) - lengths.sum())  # all that lies between dialogues is newlines

    def texts(spans, doing):
        for begin, end in tqdm(spans, desc=doing, disable=None):
            yield text_of(points[begin:end - 1])

    if tokenizer is None and settings.tokenizer == "bpe":
        os.rmdir(folder)  # still empty: a Ctrl-C in the training, which ends the process, leaves an empty .cache
        tokenizer = BPETokenizer.train(texts(spans[training], "making the vocabulary"), settings.vocab_size or 8000, settings.min_freq)
        os.makedirs(folder)
    elif tokenizer is None or grow:
        trained = counts.copy()
        blocks = np.cumsum(lengths[~training]) // BLOCK
        for some in np.split(spans[~training], np.flatnonzero(np.diff(blocks)) + 1):  # less what is held out
            trained -= np.bincount(points[ranges(some[:, 0], some[:, 1] - some[:, 0] - 1)], minlength=len(counts))
        made = CharTokenizer.of_counts(trained, settings.vocab_size, settings.min_freq)
        tokenizer = tokenizer.grown(made, settings.vocab_size) if grow else made
        if tokenizer.size == len(tokenizer_module.SPECIALS):
            raise UserError(f"min_freq={settings.min_freq} leaves no character of {path}; lower it (1 keeps all)")
    if text_stays:
        unknown = counts[tokenizer.table.take(np.arange(len(counts)), mode="clip") == UNK].sum()
    else:
        unknown, sizes = 0, []
        with open(os.path.join(folder, "ids.bin"), "wb") as file:
            end, all_texts = np.array([PAD], tokenizer.dtype), texts(spans, "encoding")
            while some := list(itertools.islice(all_texts, 1 + BLOCK * len(spans) // len(points))):
                for ids in tokenizer.encode_batch(some):
                    file.write(np.append(ids, end))
                    sizes.append(len(ids) + 1)
        lengths, ends = np.array(sizes), np.cumsum(sizes)
        spans = np.stack([ends - lengths, ends], axis=1)
    np.save(os.path.join(folder, "spans.npy"), spans)
    np.save(os.path.join(folder, "training.npy"), training)
    tokens = dict(train=int(lengths[training].sum()), val=int(lengths[~training].sum()))
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    sizes = {name: os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)}
    content = dict(corpus, layout=LAYOUT, identity=identity(corpus, tokenizer), tokens=tokens, unknown=int(unknown),
                   dialogues=len(training), utterances=int(utterances), sizes=sizes)
    with open(os.path.join(folder, "manifest.json"), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


class Characters:
    """The ids of a store that holds code points: they are looked up as they are read, so that preparing a corpus is reading it once."""

    def __init__(self, points, tokenizer):
        self.points, self.table = points, tokenizer.table.copy()
        self.table[END] = PAD

    def __getitem__(self, place):
        return self.table.take(self.points[place], mode="clip")


class Documents:
    """One part ("train" or "val") of a token store. `ids`: those of the whole corpus, on disk. `spans` (D, 2): begin and end in `ids`
    of this part's dialogues."""

    def __init__(self, folder, part):
        tokenizer = tokenizer_module.load(os.path.join(folder, "tokenizer.json"))
        on_disk = lambda name, dtype: np.memmap(os.path.join(folder, name), dtype, mode="r")
        self.ids = (Characters(on_disk("text.bin", np.uint32), tokenizer) if isinstance(tokenizer, CharTokenizer) else
                    on_disk("ids.bin", tokenizer.dtype))
        spans, training = (np.load(os.path.join(folder, f"{name}.npy")) for name in ("spans", "training"))
        self.spans = spans[training if part == "train" else ~training]


# Packing

def cut(documents, block_size):
    """Pieces of at most `block_size` positions: (start (P,), length (P,)) into documents.ids.

    A dialogue that fits is one piece. A longer one is continued: a piece ends at the last `<sep>` that fits, as its
    last target, and the next begins with that `<sep>` as its first input; so every token but a dialogue's first is a
    target exactly once. An utterance longer than a row is cut where the row ends.
    """
    starts, lengths = documents.spans[:, 0], np.diff(documents.spans)[:, 0] - 1
    long, pieces = lengths > block_size, []
    for start, length in zip(starts[long], lengths[long]):
        while length > block_size:
            separators = np.flatnonzero(documents.ids[start + 1:start + block_size + 1] == SEP)
            piece = separators[-1] + 1 if len(separators) else block_size
            pieces.append((start, piece))
            start, length = start + piece, length - piece
        pieces.append((start, length))
    pieces = np.array(pieces, dtype=np.int64).reshape(-1, 2)  # of the long ones
    return np.append(starts[~long], pieces[:, 0]), np.append(lengths[~long], pieces[:, 1])


def ranges(begins, lengths):
    """The integers from begins[i] on, lengths[i] of them, for all i, in one array."""
    ends = np.cumsum(lengths)
    return np.repeat(begins - ends + lengths, lengths) + np.arange(lengths.sum())


def link(lengths, share, block_size, rng):
    """Chains of dialogues of these numbers of positions: (order (P,), first (N,)); chain n begins with the dialogue order[first[n]].

    The order is random, and the `share` of the dialogues goes on the chain of the one before, if all of it fits into a row.
    """
    order, first, space = rng.permutation(len(lengths)), [], 0
    for n, (length, wish) in enumerate(zip(lengths[order].tolist(), (rng.random(len(lengths)) < share).tolist())):
        space -= length + 1  # the joint's
        if not wish or space < 0:
            first.append(n)
            space = block_size - length
    return order, np.array(first, dtype=np.int64)


def pack(lengths, block_size, rng):
    """Rows of whole pieces: (order (P,), first (R + 1,)); row r holds the pieces order[first[r]:first[r + 1]].

    Each row takes the longest piece left, then again the longest that still fits (best fit decreasing); which of
    the pieces of one length, and the order of rows, are random.
    """
    shuffled = rng.permutation(len(lengths))
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    ends = np.searchsorted(lengths[by_length], np.arange(block_size + 1), side="right").tolist()  # bucket of length n ends there
    begins = [0] + ends[:-1]
    left = [n for n in range(1, block_size + 1) if ends[n] > begins[n]]  # lengths of which there are pieces left
    taken, rows = [], []
    while left:
        rows.append(len(taken))
        space = block_size
        while fitting := bisect.bisect(left, space):  # how many of these lengths
            n = left[fitting - 1]
            ends[n] -= 1
            taken.append(ends[n])
            space -= n
            if ends[n] == begins[n]:
                del left[fitting - 1]
    rows = np.array(rows + [len(taken)])
    order = rng.permutation(len(rows) - 1)
    sizes = np.diff(rows)[order]
    return by_length[np.array(taken, dtype=np.int64)[ranges(rows[:-1][order], sizes)]], np.append(0, np.cumsum(sizes))


class Epoch:
    """The packed rows of one pass over `documents`, in an order that (seed, epoch) alone decides.

    Pieces (of `cut`) make chains, chains make rows. A piece is a chain by itself, but for the share `chain` of the dialogues that fit into
    a row: each of these follows another one in the same document, as in a conversation that changes its subject. The joint of a b c <pad>
    and x y <pad> is one more position:

        inputs   a  b  c      <sep>  x  y
        targets  b  c  <pad>  x      y  <pad>
    """

    def __init__(self, documents, block_size, seed, epoch, chain=0.0):
        self.documents, self.block_size = documents, block_size
        starts, lengths = cut(documents, block_size)
        rng = np.random.default_rng([seed, epoch])
        pieces = heads = np.arange(len(lengths))  # chain n holds pieces[heads[n]:heads[n + 1]]
        if chain:
            whole = np.count_nonzero(np.diff(documents.spans) <= block_size + 1)  # dialogues in one piece: they come first
            linked, linked_heads = link(lengths[:whole], chain, block_size, rng)
            pieces, heads = np.append(linked, pieces[whole:]), np.append(linked_heads, heads[whole:])
        sizes = np.diff(np.append(heads, len(pieces)))  # pieces of each chain
        chains, rows = pack(np.add.reduceat(lengths[pieces], heads) + sizes - 1, block_size, rng)  # a joint is a position
        pieces = pieces[ranges(heads[chains], sizes[chains])]  # as they stand in the rows; so do all below
        ends = np.append(0, np.cumsum(sizes[chains]))  # of chains, in pieces
        self.first = ends[rows]  # piece of each row
        self.joined = np.ones(len(pieces), dtype=bool)  # to the piece after it
        self.joined[ends[1:] - 1] = False
        self.starts, self.lengths = starts[pieces], lengths[pieces] + self.joined
        self.positions = np.append(0, np.cumsum(self.lengths))[self.first]  # real positions before each row

    def __len__(self):
        return len(self.first) - 1

    @property
    def filling(self):
        """Share of positions that are mere filling."""
        return 1 - self.positions[-1] / max(1, len(self) * self.block_size)

    def real_targets(self, begin, end):
        """How many real targets the rows [begin, end) hold; rows after the last hold none."""
        return int(self.positions[min(end, len(self))] - self.positions[min(begin, len(self))])

    def batch(self, begin, end):
        """Rows [begin, end): inputs, targets, document numbers, each (end - begin, block_size) int64."""
        inputs = np.full((end - begin, self.block_size), PAD, dtype=np.int64)
        targets = np.full_like(inputs, IGNORE)
        documents = np.full_like(inputs, -1)
        rows = np.arange(begin, end + 1).clip(max=len(self))  # those after the last are empty
        real = np.arange(self.block_size) < np.diff(self.positions[rows])[:, None]  # (end - begin, block_size)
        pieces = slice(self.first[rows[0]], self.first[rows[-1]])
        inputs[real], targets[real] = self._tokens(pieces)
        closes = ~self.joined[pieces]  # its chain, which is a document
        documents[real] = np.repeat(np.cumsum(closes) - closes, self.lengths[pieces])
        return inputs, targets, documents

    def _tokens(self, pieces):
        """(inputs, targets) of the positions of a slice of pieces."""
        starts, lengths, joined = self.starts[pieces], self.lengths[pieces], np.flatnonzero(self.joined[pieces])
        place, joints = ranges(starts, lengths), np.cumsum(lengths)[joined] - 1
        inputs = self.documents.ids[place]  # a copy
        inputs[joints] = SEP  # where the dialogue's <pad> stands
        place += 1
        place[joints] = starts[joined + 1]
        return inputs, self.documents.ids[place]

    def bigrams(self, most=1 << 22):
        """Which token follows which, and how often, in about `most` positions, sorted: (first (N,), second (N,), count (N,))."""
        inputs, targets = self._tokens(slice(self.first[min(len(self), -(-most // self.block_size))]))
        pairs = inputs.astype(np.int64) << 32 | targets
        pairs, count = np.unique(pairs, return_counts=True)
        return pairs >> 32, pairs & 0xFFFFFFFF, count


def main():
    if sys.argv[1:2] == ["download"]:
        import download
        return download.main(sys.argv[2:])
    arguments = settings_module.parser(
        TrainSettings, "python data.py prepare CONFIG [key=value …]\n       python data.py download chat|sentiment|pretrained|all")
    arguments.description = ("Make the token store of a configuration's corpus, which train.py does by itself, or\n"
                             "fetch published files: python data.py download --help.")
    arguments.add_argument("command", choices=["prepare", "download"])
    arguments.add_argument("config", help="YAML file")
    arguments.add_argument("override", nargs="*", default=[], help="key=value")
    options = arguments.parse_args()
    settings = settings_module.build(
        TrainSettings, settings_module.read_yaml(options.config) | settings_module.overrides(options.override))
    folder = prepare(settings)
    made = manifest(folder)
    print(f"{folder}: {made['dialogues']} dialogues, {made['tokens']['train']} training tokens, "
          f"{made['tokens']['val']} held out, vocabulary of {tokenizer_module.load(os.path.join(folder, 'tokenizer.json')).size}")


if __name__ == "__main__":
    settings_module.main(main)
