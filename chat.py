"""Talk with a checkpoint, at a terminal or through a pipe: python chat.py CONFIG|CHECKPOINT [key=value …]."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import time

import torch

import checkpoint
import data
import runtime as rt
import settings as settings_module
from model import GPT, KVCache, Sampling, generate, most_informative
from quantize import quantize
from settings import ChatSettings, UserError
from tokenizer import PAD, SEP

HELP = """\
/help            this
/set             the sampling keys and their values
/set KEY VALUE   changes one, from the next reply on
/retry           another reply to what you said last
/undo            takes back what you said last, and the reply
/save FILE       writes the conversation: .jsonl or .json as messages, anything else an utterance a line
/load FILE       goes on from such a file
/stats           speed, time to the first token, context used
flush            forgets the conversation
exit             leaves, as Ctrl-D does; Ctrl-C stops a reply"""
SAMPLING = [field.name for field in dataclasses.fields(Sampling) if field.name in ChatSettings.__dataclass_fields__]
ADJUSTABLE = [*SAMPLING, "best_of", "mmi_weight", "seed"]


class Conversation:
    """What was said so far, and the one cache of keys and values that grows with it.

    `utterances` are (text, ids), the person's and the model's in turn. The model sees them from `first` on, each closed
    by `<sep>`. `notice` is called with a line when the person should know something.
    """

    def __init__(self, model, tokenizer, settings, notice=lambda line: None):
        self.model, self.tokenizer, self.settings, self.notice = model, tokenizer, settings, notice
        weight = model.embedding.weight
        self.cache = KVCache(model.config, 1, model.config.block_size, weight.device, weight.dtype)
        self.cached = []  # the ids that the cache was filled with
        self.computed = 0  # positions that went through the model
        self.attempts = 0  # replies so far: each draws other random numbers
        self.interrupted = False  # set it at any time to stop a reply after the token that is being made
        self.tokens, self.seconds, self.first_seconds = 0, 0.0, 0.0  # of the last reply
        self.banned, self.exempt = tokenizer.banned(model.config.vocab_size), tokenizer.parts()
        self.flush()

    def flush(self):
        self.utterances, self.first = [], 0
        self.saved = set()  # files that hold this conversation

    def hear(self, text):
        """The next utterance; its newlines are spaces, for a newline would end it."""
        text = " ".join(text.encode("utf-8", "replace").decode().splitlines())  # a shell may pass what is not UTF-8
        self.utterances.append((text, self.tokenizer.encode(text).tolist()))

    def forget(self, count):
        """Takes back the last `count` utterances."""
        del self.utterances[-count:]
        if self.first >= len(self.utterances):
            self.first = 0

    def used(self):
        """Positions of the context that are taken, the <sep> that closes the last reply among them where it still fits."""
        return min(sum(len(ids) + 1 for _, ids in self.utterances[self.first:]), self.model.config.block_size)

    def context(self):
        """The ids that the next reply goes on from, with room left for it. Where there is none the oldest whole turns
        are dropped until half is free: after a drop all the rest is computed anew, so drops should be rare."""
        size = self.model.config.block_size
        room = size - min(self.settings.max_new_tokens, size // 2)
        left = sum(len(ids) + 1 for _, ids in self.utterances[self.first:])
        if left > room:
            while self.first + 2 < len(self.utterances) and left > room // 2:
                left -= sum(len(ids) + 1 for _, ids in self.utterances[self.first:self.first + 2])
                self.first += 2
        ids = [i for _, utterance in self.utterances[self.first:] for i in (*utterance, SEP)]
        if len(ids) > room:
            self.notice(f"(too long for the context: only the last {room - 1} of {len(ids) - 1} tokens are seen)")
        return ids[-room:]

    def reply(self):
        """Yields the model's next utterance as text, piece by piece, whole characters only."""
        begin, self.interrupted = time.perf_counter(), False
        context, ids, pieces = self.context(), [], []
        same = next((n for n, (a, b) in enumerate(zip(self.cached, context)) if a != b), min(len(self.cached), len(context)))
        self.cache.length = before = min(same, self.cache.length, len(context) - 1)
        new = context[before:]
        settings, device = self.settings, self.model.embedding.weight.device
        chosen = {name: getattr(settings, name) for name in SAMPLING}
        sampling = Sampling(min_new_tokens=1, banned=self.banned, exempt=self.exempt, **chosen)
        generator = torch.Generator(device)
        if settings.seed is None:
            generator.seed()
        else:
            generator.manual_seed((settings.seed * 1_000_003 + self.attempts) % 2**63)
        self.attempts += 1

        def said():
            for i in self._best(new, sampling, generator) if settings.best_of > 1 else self._next(new, sampling, generator):
                if not ids:
                    self.first_seconds = time.perf_counter() - begin
                if i in (SEP, PAD):
                    return
                ids.append(i)
                yield i
        try:
            for piece in self.tokenizer.decode_stream(said()):
                pieces.append(piece)
                yield piece
        finally:  # also when nobody listens any more: what was said stays
            self.tokens, self.seconds = len(ids), time.perf_counter() - begin
            self.computed += self.cache.length - before
            self.cached = context + ids
            if ids:
                self.utterances.append(("".join(pieces), ids))
            else:  # stopped before a word
                self.forget(1)

    def _next(self, new, sampling, generator):
        for row in generate(self.model, [new], sampling, (SEP, PAD), self.cache, generator):
            yield int(row)
            if self.interrupted:
                return

    def _best(self, new, sampling, generator):
        """Ids of the best of several replies: likely in this conversation but not by itself (Li et al. 2016)."""
        settings, count, device = self.settings, self.settings.best_of, self.cache.start.device
        if new[:-1]:
            with torch.inference_mode():
                self.model.hidden(torch.tensor([new[:-1]], device=device), cache=self.cache)
        branch, scores, rows = self.cache.branch(count), torch.zeros(count, device=device), []
        for row in generate(self.model, [new[-1:]] * count, sampling, (SEP, PAD), branch, generator, scores):
            rows.append(row.tolist())
            if self.interrupted:
                break
        replies = [[i for i in reply if i >= 0] for reply in zip(*rows)]
        best = most_informative(self.model, replies, scores, settings.mmi_weight, SEP)
        yield from replies[best]  # the cache ends before it: the next turn computes it along with its own


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while loading: leave at once, without a traceback
    parser = settings_module.parser(ChatSettings, "python chat.py CONFIG|CHECKPOINT [key=value …] [--prompt TEXT]")
    parser.add_argument("config", help="YAML file, a checkpoint, or a folder of checkpoints")
    parser.add_argument("override", nargs="*", default=[], help="key=value")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and stop")
    options = parser.parse_intermixed_args()
    values = {"resume_from": options.config}
    if options.config.endswith((".yaml", ".yml")):
        values = settings_module.read_yaml(options.config)
    elif not os.path.exists(options.config):
        settings_module.refuse_key(options.config)
    settings = settings_module.build(ChatSettings, values | settings_module.overrides(options.override))
    if options.prompt is not None and not options.prompt.strip():
        raise UserError("--prompt is empty; give it something to answer")
    path = find_checkpoint(settings)
    model, tokenizer = load(path, settings)
    conversation = Conversation(model, tokenizer, settings, lambda line: print(line, file=sys.stderr, flush=True))
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    if options.prompt is not None:
        answer(conversation, options.prompt.strip())
    elif sys.stdin.isatty() and sys.stdout.isatty():
        terminal(conversation, path)
    else:
        pipe(conversation)


def find_checkpoint(settings):
    """The path that `resume_from` means: empty and auto are the best, or the newest, in checkpoint_root."""
    path = settings.resume_from or "auto"
    if path == "auto" or os.path.isdir(path):
        folder = settings.checkpoint_root if path == "auto" else path
        path = os.path.join(folder, "best.pth")
        last = os.path.join(folder, "last.pth")
        if not os.path.isfile(path) and (saved := checkpoint.numbered(folder)):
            path = saved[0][1]
        elif os.path.isfile(path) and os.path.isfile(last) and not os.path.samefile(path, last):
            print(f"{path} has the lowest validation loss; {last}, of a later step, knows its training text better", file=sys.stderr)
    return path


def load(path, settings):
    """(model, tokenizer) of a checkpoint, on the device and in the precision that the settings ask for."""
    runtime = rt.start(settings)
    model, tokenizer, meta = checkpoint.load_model(path, corpus=settings.data_path)
    if "classifier" in meta:
        print(f"{path} is a classifier: the model that it was made from talks better", file=sys.stderr)
    model.requires_grad_(False).to(runtime.device, runtime.dtype)
    if settings.quantize:
        quantize(model, settings.quantize)
    return model, tokenizer


def answer(conversation, text):
    """One utterance in, one line out."""
    conversation.hear(text)
    print("".join(conversation.reply()), flush=True)


def pipe(conversation):
    """A line in, a line out. `exit` and `flush` are the terminal's; an empty line, which ends a dialogue in a corpus, ends
    it here too and is answered by an empty line."""
    for line in sys.stdin.buffer:
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            damaged = max(line[:error.start], default=0) >= 0xE0  # Chinese in UTF-8, as far as that; else what a Chinese Windows pipes
            text = line.decode("utf-8-sig" if damaged else "gb18030", "replace").strip()
            if "\ufffd" in text:
                conversation.notice("(this line is not UTF-8: what cannot be read becomes <unk>)")
        if text == "exit":
            return
        if text in ("", "flush"):
            conversation.flush()
        if not text:
            print(flush=True)
        elif text != "flush":
            answer(conversation, text)


def terminal(conversation, path):
    """Prompt, commands, and replies as they come."""
    from prompt_toolkit import PromptSession, print_formatted_text
    from prompt_toolkit.formatted_text import FormattedText
    config = conversation.model.config
    with torch.device("meta"):
        parameters = GPT(config).count_parameters()  # quantized weights are none
    print(f"{path}: {config.arch}, {parameters / 1e6:.1f}M parameters, "
          f"vocabulary {conversation.tokenizer.size}, context {config.block_size}\n/help lists the commands; exit leaves")
    session = PromptSession([("ansigreen bold", "> ")], history=line_history(conversation.settings.history_path),
                            bottom_toolbar=lambda: status(conversation, path))
    signal.signal(signal.SIGINT, lambda *_: setattr(conversation, "interrupted", True))  # the prompt has its own meanwhile
    conversation.notice = lambda line: print_formatted_text(FormattedText([("ansiyellow", line)]))
    while True:
        try:
            text = session.prompt().strip()
        except KeyboardInterrupt:
            conversation.notice("(exit or Ctrl-D leaves)")
            continue
        except EOFError:
            return
        if text.startswith("／"):  # as a Chinese input method types it
            text = "/" + text[1:]
        try:
            if text in ("exit", "/exit"):
                return
            if text in ("flush", "/flush"):
                conversation.flush()
                conversation.notice("(forgotten)")
            elif text.startswith("/"):
                command(conversation, text)
            elif text and len(conversation.utterances) % 2:
                conversation.notice("(the last line loaded has no answer yet: /retry answers it, /undo takes it back)")
            elif text:
                conversation.hear(text)
                speak(conversation)
        except UserError as error:
            conversation.notice(str(error))


def line_history(path):
    """Lines typed before, from a file; without one, or where it cannot be written, for this time only."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Lines(FileHistory):
        def store_string(self, string):
            with contextlib.suppress(OSError):  # the disk is full: of what is typed nothing else is lost
                super().store_string(string)

    if path is None:
        return InMemoryHistory()
    path = os.path.expanduser(path)
    try:
        with open(path, "a", opener=lambda path, flags: os.open(path, flags, 0o600)):  # for nobody else to read
            return Lines(path)
    except OSError as error:
        print(f"history_path={path} cannot be written ({error.strerror}): what you type will not be remembered", file=sys.stderr)
        return InMemoryHistory()


def status(conversation, path):
    speed = f"{conversation.tokens / conversation.seconds:.0f} tokens/s" if conversation.seconds else "no reply yet"
    return f" {path} · context {conversation.used()}/{conversation.model.config.block_size} · {speed} "


def speak(conversation):
    """Prints the reply as it comes, until it ends or Ctrl-C stops it."""
    with unechoed():
        for piece in conversation.reply():
            print(piece, end="", flush=True)
    print()
    if conversation.interrupted:
        conversation.notice("(stopped)")


@contextlib.contextmanager
def unechoed():
    """What is typed meanwhile waits for the prompt: the terminal does not mix it into what is printed."""
    try:
        import termios  # Windows has none
    except ImportError:
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = before.copy()
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal is closed
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def command(conversation, text):
    """Does what a line that begins with / says."""
    name, rest = (text.split(None, 1) + [""])[:2]  # a full-width space divides too
    if name in ("/retry", "/undo", "/save") and not conversation.utterances:
        raise UserError("nothing was said yet")
    if name in ("/save", "/load") and not rest:
        raise UserError(f"{name} FILE: which file?")
    if name == "/help":
        print(HELP)
    elif name == "/set":
        change(conversation, rest)
    elif name == "/retry":
        if len(conversation.utterances) % 2 == 0:
            conversation.forget(1)
        speak(conversation)
    elif name == "/undo":
        conversation.forget(2 - len(conversation.utterances) % 2)
        conversation.notice(f"(turns left: {len(conversation.utterances) // 2})")
    elif name == "/save":
        save(conversation, os.path.expanduser(rest))
    elif name == "/load":
        load_conversation(conversation, os.path.expanduser(rest))
    elif name == "/stats":
        speed = conversation.tokens / conversation.seconds if conversation.seconds else 0.0
        print(f"last reply: {conversation.tokens} tokens, {speed:.1f} tokens/s, first token after {conversation.first_seconds:.3f} s\n"
              f"context: {conversation.used()} of {conversation.model.config.block_size} used, "
              f"turns: {len(conversation.utterances) // 2}, dropped: {conversation.first // 2}")
    else:
        raise UserError(f"{name} is no command; /help lists them")


def change(conversation, rest):
    """/set: shows the values, or changes one."""
    name, value = (rest.replace("＝", "=").replace("=", " ", 1).split(None, 1) + ["", ""])[:2]
    if name and name not in ADJUSTABLE:
        raise UserError(f"{name} cannot be set; the keys: {', '.join(ADJUSTABLE)}")
    if value:
        values = dataclasses.asdict(conversation.settings) | {name: value}
        conversation.settings = settings_module.build(ChatSettings, values)
        conversation.attempts = 0 if name == "seed" else conversation.attempts
    print("  ".join(f"{key}={getattr(conversation.settings, key)}" for key in ([name] if name else ADJUSTABLE)))


def transcript(conversation, path):
    """What /save writes into this file."""
    texts = [text.strip() or "…" for text, _ in conversation.utterances]  # an empty line would end the dialogue
    if not path.lower().endswith((".jsonl", ".json")):
        return "\n".join(texts) + "\n"
    turns = [dict(role=("user", "assistant")[n % 2], content=text) for n, text in enumerate(texts)]
    return json.dumps({"messages": turns}, ensure_ascii=False) + "\n"


def utterances(conversation):
    count = len(conversation.utterances)
    return f"{count} utterance{'s' * (count != 1)}"


def save(conversation, path):
    if not os.path.basename(path):
        raise UserError(f"{path} is a folder; name a file")
    if path not in conversation.saved and os.path.lexists(path):
        raise UserError(f"{path} exists; name a new file")
    try:
        with checkpoint.whole(os.path.realpath(path)) as temporary:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(transcript(conversation, path))
            if os.path.exists(path):  # it stays for nobody else to read
                shutil.copymode(path, temporary)
    except ValueError as error:
        raise UserError(f"{path!r} is no name for a file: {error}")
    conversation.saved.add(path)
    conversation.notice(f"({utterances(conversation)} written to {path})")


def load_conversation(conversation, path):
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}")
    dialogues = data.read_dialogues(path)
    dialogue, more = next(dialogues, None), next(dialogues, None)
    if dialogue is None:
        raise UserError(f"{path} holds no conversation")
    conversation.flush()
    for text in dialogue.split("\n"):
        conversation.hear(text)
    if not more:
        with open(path, encoding="utf-8") as file:
            if file.read() == transcript(conversation, path):  # so /save to it loses nothing
                conversation.saved.add(path)
    asked = "; /retry answers the last one" if len(conversation.utterances) % 2 else ""
    first = ", its first dialogue" if more else ""
    conversation.notice(f"({utterances(conversation)} read from {path}{first}{asked})")


if __name__ == "__main__":
    settings_module.main(main)
