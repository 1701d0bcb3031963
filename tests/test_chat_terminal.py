"""chat.py in a true pseudo-terminal: pexpect types, pyte is the screen."""

import os
import re
import sys
import time

import pexpect
import pyte
import pytest

import checkpoint
from chat import line_history
from runs import ROOT
from test_chat import LETTERS, tiny_model
from tokenizer import CharTokenizer


class Terminal:
    """chat.py, run in the folder of its history file, and the screen that it draws on, 80 columns and 24 lines."""

    def __init__(self, path, history, *arguments):
        self.screen = pyte.HistoryScreen(80, 24, history=2000)
        self.stream = pyte.Stream(self.screen)
        command = [os.path.join(ROOT, "chat.py"), str(path), f"history_path={history}", "seed=1", *arguments]
        self.child = pexpect.spawn(sys.executable, command, cwd=str(history.parent), encoding="utf-8", dimensions=(24, 80), timeout=5,
                                   env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"})
        self.child.delaybeforesend = None
        self.screen.write_process_input = self.child.send  # it answers where the cursor is
        self.raw = ""

    def __enter__(self):
        self.wait("/help lists")
        self.ready()
        return self

    def __exit__(self, *_):
        self.child.close(force=True)

    def read(self, seconds=0.05):
        try:
            text = self.child.read_nonblocking(65536, timeout=seconds)
        except pexpect.TIMEOUT:
            return False
        self.raw += text
        self.stream.feed(text)
        return True

    @property
    def text(self):
        return "\n".join(line.rstrip() for line in self.screen.display)

    def until(self, condition, what, seconds=120):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what!r} on the screen:\n{self.text}"
            self.read()

    def wait(self, words):
        self.until(lambda: words in self.text, words)

    def line(self):
        """The line that the cursor is in."""
        return self.screen.display[self.screen.cursor.y].rstrip()

    def ready(self):
        """Waits for an empty prompt with the status line below."""
        self.until(lambda: self.line() == ">" and "context" in self.text.rstrip().splitlines()[-1], "an empty prompt")

    def say(self, text):
        """Types a line, and gives the lines that came in answer."""
        self.child.send(text)
        self.until(lambda: text in self.line().replace("> ", ""), text)
        before = self.raw.count("\x1b[?2004h")  # one for each prompt
        self.child.send("\r")
        self.until(lambda: self.raw.count("\x1b[?2004h") > before, "the next prompt")
        self.ready()
        lines = [line.rstrip() for line in self.screen.display[:self.screen.cursor.y]]
        asked = max((n for n, line in enumerate(lines) if line == f"> {text}".rstrip()), default=-1)
        return "\n".join(lines[asked + 1:])

    def leave(self, text="exit\r"):
        self.child.send(text)
        self.child.expect(pexpect.EOF, timeout=60)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    content = checkpoint.describe(tiny_model(block_size=128), CharTokenizer(LETTERS))
    return checkpoint.save(tmp_path_factory.mktemp("tiny"), 1, content)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A checkpoint whose replies end only at the maximum."""
    content = checkpoint.describe(tiny_model("gpt2", block_size=8000, silent=True), CharTokenizer(LETTERS))
    return checkpoint.save(tmp_path_factory.mktemp("talker"), 1, content)


def test_lines_are_edited_by_wide_characters_pasted_whole_and_remembered(path, tmp_path):
    history = tmp_path / "history"
    with Terminal(path, history) as terminal:
        terminal.child.send("你好吗")
        terminal.until(lambda: terminal.line() == "> 你好吗" and terminal.screen.cursor.x == 8, "你好吗")
        terminal.child.send("\x1b[D\x1b[D\x7f天")  # left, left, backspace
        terminal.until(lambda: terminal.line() == "> 天好吗" and terminal.screen.cursor.x == 4, "天好吗")
        terminal.child.send("\x05\x15")  # to the end, and the line away
        terminal.ready()
        terminal.child.send("\x1b[200~今天\n天气\x1b[201~")  # a paste, as terminals mark it
        terminal.wait("天气")
        assert "tokens/s" not in terminal.text  # nothing was sent yet
        terminal.child.send("\r")
        terminal.wait("tokens/s")
        terminal.ready()
        terminal.say("/save said.txt")
        assert (tmp_path / "said.txt").read_text(encoding="utf-8").split("\n")[0] == "今天 天气"
        assert terminal.say("很好吃饭吗")
        assert terminal.leave() == 0
    assert history.stat().st_mode & 0o077 == 0  # nobody else reads it
    with Terminal(path, history) as terminal:
        terminal.child.send("\x1b[A\x1b[A")  # up, up: past exit
        terminal.until(lambda: terminal.line() == "> 很好吃饭吗", "the line of the last time")
        terminal.child.send("\x15")
        terminal.ready()
        assert terminal.leave("\x04") == 0  # Ctrl-D


def test_lines_that_cannot_be_remembered_are_no_error(tmp_path):
    history = line_history(tmp_path / "folder")
    (tmp_path / "folder").unlink()
    (tmp_path / "folder").mkdir()
    history.append_string("你好")
    assert history.get_strings() == ["你好"]


def test_every_command_does_what_help_says(path, tmp_path):
    with Terminal(path, tmp_path / "history", "max_new_tokens=20") as terminal:
        assert all(name in terminal.say("/help") for name in ("/set", "/retry", "/undo", "/save", "/load", "/stats", "flush", "exit"))
        assert "temperature=0.65" in terminal.say("/set") and "best_of=1" in terminal.text
        assert terminal.say("/retry") == "nothing was said yet"
        assert terminal.say("/set temperature hot").startswith("temperature='hot' must be")
        assert terminal.say("/set temprature 1").startswith("temprature cannot be set; the keys: temperature, top_k")
        assert terminal.say("/set temperature") == "temperature=0.65" and terminal.say("/set temperature=0.5") == "temperature=0.5"
        first = terminal.say("你好")
        again = terminal.say("/retry")
        assert first and again and first != again
        assert terminal.say("/set temperature 0") == "temperature=0.0"
        assert terminal.say("/set no_repeat_ngram 2") == terminal.say("／set　no_repeat_ngram＝2") == "no_repeat_ngram=2"
        greedy = terminal.say("/retry")
        assert terminal.say("/retry") == greedy
        assert terminal.say("今天")
        assert "4 utterances written" in terminal.say("/save a b.JSONL") and "4 utterances written" in terminal.say("/save a b.JSONL")
        (tmp_path / "mine.txt").write_text("mine\n")
        assert "exists" in terminal.say("/save mine.txt")
        assert (tmp_path / "mine.txt").read_text() == "mine\n"
        assert terminal.say("/undo") == "(turns left: 1)"
        assert "turns: 1" in terminal.say("/stats") and "tokens/s" in terminal.text and "first token after" in terminal.text
        assert terminal.say("flush") == "(forgotten)"
        assert "context 0/128" in terminal.text.rstrip().splitlines()[-1]
        assert "4 utterances read" in terminal.say("/load a b.JSONL") and "4 utterances written" in terminal.say("/save a b.JSONL")
        assert terminal.say("／undo") == "(turns left: 1)"
        assert terminal.say("/retry") == greedy
        assert terminal.say("/set best_of 4") == "best_of=4"
        assert terminal.say("吃饭")
        assert terminal.say("/load nothing.txt") == "there is no file nothing.txt"
        (tmp_path / "broken.txt").write_bytes("你好\n早\n\n".encode() + b"a\n\n" * 10**5 + b"\xff")
        assert "2 utterances read" in terminal.say("/load broken.txt")
        (tmp_path / "odd.txt").write_text("你好\n在吗\n早\n\n另一个\n")
        assert "/retry answers the last one" in terminal.say("/load odd.txt")
        assert "exists" in terminal.say("/save odd.txt")
        assert terminal.say("今天") == "(the last line loaded has no answer yet: /retry answers it, /undo takes it back)"
        assert terminal.say("/retry") and "turns: 2" in terminal.say("/stats")
        assert terminal.say("/dance") == "/dance is no command; /help lists them"
        assert re.search(r"cpt1\.pth · context \d+/128 · \d+ tokens/s", terminal.text.rstrip().splitlines()[-1])
        assert terminal.leave() == 0


def test_ctrl_c_stops_the_reply_and_keeps_what_was_said(talker, tmp_path):
    with Terminal(talker, tmp_path / "history", "max_new_tokens=3000", "no_repeat_ngram=0") as terminal:
        terminal.child.send("abc\x03")  # at the prompt: the line away, nothing else
        terminal.wait("(exit or Ctrl-D leaves)")
        terminal.ready()
        terminal.child.send("你好\r")
        # Streamed: 200 letters are here long before the 3000th.
        terminal.until(lambda: sum(map(len, terminal.text.split("\n"))) > 300, "a long reply")
        terminal.child.sendintr()
        terminal.wait("(stopped)")
        assert "^C" not in terminal.raw
        terminal.ready()
        stats = terminal.say("/stats")
        assert 100 < int(re.search(r"last reply: (\d+) tokens", stats)[1]) < 3000 and "turns: 1" in stats
        assert "�" not in terminal.raw
        assert terminal.leave("\x04") == 0


def test_what_is_typed_during_a_reply_waits_for_the_prompt(talker, tmp_path):
    with Terminal(talker, tmp_path / "history", "max_new_tokens=500", "no_repeat_ngram=0") as terminal:
        terminal.child.send("你好\r")
        terminal.until(lambda: sum(map(len, terminal.text.split("\n"))) > 300, "a long reply")
        terminal.child.send("ABC")  # letters that no reply has
        terminal.until(lambda: terminal.line() == "> ABC", "> ABC")
        assert terminal.text.count("A") == 1
        terminal.child.send("\r")
        terminal.ready()
        assert "turns: 2" in terminal.say("/stats") and terminal.leave() == 0


@pytest.mark.soak
def test_two_hundred_turns(path, tmp_path):
    with Terminal(path, tmp_path / "history", "max_new_tokens=8") as terminal:
        for turn in range(200):
            terminal.child.send("你好吗\r")
            terminal.until(lambda: terminal.raw.count("\x1b[?2004h") == turn + 2, f"prompt {turn + 2}")
        terminal.ready()
        stats = terminal.say("/stats")
        assert "turns: 200" in stats and int(re.search(r"dropped: (\d+)", stats)[1]) > 180
        assert terminal.leave() == 0
