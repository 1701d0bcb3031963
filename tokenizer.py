"""Text to token ids and back: characters, or byte-level BPE, behind one interface.

Both number `<unk>`, `<sep>`, `<pad>` as 0, 1, 2 and the vocabulary from 3 on. A newline is `<sep>`: a dialogue is
its utterances joined by newlines. `<pad>` ends a dialogue. Neither can be typed: "<sep>" in a text is five characters.
"""

import codecs
import json
import re
import signal
import threading
import unicodedata

import numpy as np

from settings import UserError

UNK, SEP, PAD = 0, 1, 2
SPECIALS = ("<unk>", "<sep>", "<pad>")
PIECES = ("\ufffd".encode(), b"\n", b"")  # what they are in a text


def code_points(text):
    """The text's Unicode code points, (len(text),) uint32, without a Python loop."""
    return np.array([text]).view(np.uint32)[:len(text)]  # "" has a place there


def text_of(points):
    """The text of an array of code points."""
    return points.tobytes().decode("utf-32-le", "surrogatepass")


def _in_words(character):
    """Whether it is a letter, digit or mark of a script whose words are longer than a character."""
    ideograph = "\u3400" <= character <= "\u9fff" or "\uf900" <= character <= "\ufaff" or character >= "\U00020000"
    return unicodedata.category(character)[0] in "LMN" and not ideograph


class Tokenizer:
    """What both tokenizers share. A subclass has `size`, `pieces` (bytes of each id), `encode` and `state`."""

    def decode(self, ids):
        """Text of a sequence of ids; bytes that are no whole character become U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def decode_stream(self, ids):
        """Yields the text of each id as it comes, holding bytes back until their character is whole; at the end they are dropped."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield decoder.decode(self.pieces[i])

    def banned(self, vocab_size):
        """Ids below `vocab_size` that must never be sampled: <unk>, line breaks and control characters, a classifier's <start> and
        <extract>."""
        harmful = lambda piece: any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in piece.decode("utf-8", "ignore"))
        return (*(i for i, piece in enumerate(self.pieces) if i == UNK or i > PAD and harmful(piece)), *range(self.size, vocab_size))

    def parts(self):
        """Ids that are parts of words or numbers, or of a character in UTF-8: these repeat where nothing is said twice. A Chinese
        character is a word, and so is what begins with a space in BPE."""
        return tuple(i for i, piece in enumerate(self.pieces) if re.fullmatch(rb"[ \x80-\xff]|[\x80-\xbf].*", piece, re.DOTALL)
                     or i > PAD and all(map(_in_words, piece.decode("utf-8", "replace"))))

    def encode_batch(self, texts):
        """The ids of each text, a list of (n,) arrays."""
        return [self.encode(text) for text in texts]

    @property
    def characters(self):
        """(size,) int64: how many characters begin in each id; `<sep>`, `<pad>` and `<unk>` count as one."""
        counts = [sum(byte & 0xC0 != 0x80 for byte in piece) for piece in self.pieces]
        counts[PAD] = 1
        return np.array(counts)

    @property
    def dtype(self):
        """uint16 if that holds every id, else uint32."""
        return np.uint16 if self.size <= 0x10000 else np.uint32

    def save(self, path):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.state(), file, ensure_ascii=False)


class CharTokenizer(Tokenizer):
    """One id a character, most frequent first."""

    def __init__(self, characters):
        """`characters`: string of the vocabulary in order, without the three specials."""
        if len(set(characters)) != len(characters):
            raise ValueError("a character stands twice in the vocabulary")
        self.vocabulary = characters
        self.pieces = [*PIECES, *(c.encode("utf-8", "surrogatepass") for c in characters)]
        self.size = len(self.pieces)
        points = code_points(characters)
        self.table = np.zeros(points.max(initial=127) + 2, dtype=self.dtype)  # code point -> id; the last place is for all above
        self.table[points] = np.arange(3, self.size)
        self.table[ord("\n")] = SEP

    @classmethod
    def train(cls, texts, vocab_size=None, min_freq=1):
        """From an iterable of texts."""
        return cls.of_counts(np.bincount(code_points("".join(texts))), vocab_size, min_freq)

    @classmethod
    def of_counts(cls, counts, vocab_size=None, min_freq=1):
        """From how often each code point occurs, up to the highest that does: characters by falling frequency, ties by code point."""
        counts[ord("\n"):ord("\n") + 1] = 0  # a slice: the array may be shorter
        found = np.flatnonzero(counts >= max(1, min_freq))
        order = found[np.argsort(-counts[found], kind="stable")]
        order = order[:None if vocab_size is None else vocab_size - len(SPECIALS)]
        return cls(text_of(order.astype(np.uint32)))

    def grown(self, other, vocab_size=None):
        """A copy with the other's new characters appended, up to `vocab_size` ids in all."""
        known = set(self.vocabulary)
        new = [character for character in other.vocabulary if character not in known]
        return CharTokenizer(self.vocabulary + "".join(new[:None if vocab_size is None else max(0, vocab_size - self.size)]))

    def encode(self, text):
        """(len(text),) ids; characters outside the vocabulary are `<unk>`."""
        return self.table.take(code_points(text), mode="clip")

    def state(self):
        return {"kind": "char", "characters": self.vocabulary}


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Radford et al. 2019), trained and run by the `tokenizers` library."""

    def __init__(self, description):
        """`description`: the JSON text of a `tokenizers.Tokenizer`, whose ids are ours less 3."""
        import tokenizers  # here: a character model needs no such package
        self.description = description
        try:
            self.bpe = tokenizers.Tokenizer.from_str(description)
        except Exception as error:  # it raises nothing narrower
            raise ValueError(error)
        # Byte-level BPE writes bytes as printable characters: itself where printable, else 256 and up in order.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = (byte for byte in range(256) if byte not in printable)
        to_byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
        tokens = map(self.bpe.id_to_token, range(self.bpe.get_vocab_size()))
        self.pieces = [*PIECES, *(bytes(to_byte[c] for c in token) for token in tokens)]
        self.size = len(self.pieces)

    @classmethod
    def train(cls, texts, vocab_size=8000, min_freq=2):
        """From an iterable of texts; all 256 bytes are in the vocabulary, so nothing is ever `<unk>`."""
        import tokenizers
        if vocab_size < 256 + len(SPECIALS):
            raise UserError(f"vocab_size={vocab_size} is too small for tokenizer=bpe; it needs {256 + len(SPECIALS)} at least (8000, say)")
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIALS), min_frequency=max(2, min_freq), show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
        # For minutes the library lets Python hear no Ctrl-C: here it ends the process at once, unless it was given another meaning.
        plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler and threading.current_thread() is threading.main_thread()
        if plain:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            bpe.train_from_iterator((line for text in texts for line in text.split("\n") if line), trainer)
        finally:
            if plain:
                signal.signal(signal.SIGINT, signal.default_int_handler)
        return cls(bpe.to_str())

    def encode_batch(self, texts):
        lines = [text.split("\n") for text in texts]
        flat = [line for text in lines for line in text]
        encoded = (some for begin in range(0, len(flat), 4096)  # an encoding takes a hundred times what its ids do
                   for some in self.bpe.encode_batch_fast(flat[begin:begin + 4096], add_special_tokens=False))
        joined = []
        for text in lines:
            ids = []
            for _ in text:
                ids += [SEP, *(i + len(SPECIALS) for i in next(encoded).ids)]
            joined.append(np.array(ids[1:], dtype=self.dtype))
        return joined

    def encode(self, text):
        """(n,) ids; n is at most the number of bytes."""
        return self.encode_batch([text])[0]

    def state(self):
        return {"kind": "bpe", "tokenizer": self.description}


def from_state(state):
    """The tokenizer whose `state()` this is."""
    if (kind := state.get("kind")) == "char":
        return CharTokenizer(state["characters"])
    if kind == "bpe":
        return BPETokenizer(state["tokenizer"])
    raise ValueError(f"unknown kind of tokenizer: {kind!r}")


def load(path):
    """A tokenizer from the JSON file that `save` wrote."""
    try:
        with open(path, encoding="utf-8") as file:
            return from_state(json.load(file))
    except OSError:
        raise UserError(f"tokenizer={path} is neither char, bpe nor a file that can be read")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"tokenizer={path} is not a tokenizer that this program wrote ({error!r})")
