"""Checkpoint files: safe to read, whole or absent, pruned, found again."""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch

import checkpoint
import data
import tokenizer
from model import GPT, GPTConfig
from runs import ROOT
from settings import TrainSettings, UserError


def make_content(step=0):
    torch.manual_seed(step)
    vocabulary = tokenizer.CharTokenizer("你好呀")
    model = GPT(GPTConfig(vocab_size=vocabulary.size, block_size=8, n_layer=1, n_head=1, n_embd=8))
    return checkpoint.describe(model, vocabulary) | dict(progress=dict(step=step), settings={}, metrics={})


def test_a_saved_model_comes_back_with_its_tokenizer(tmp_path):
    content = make_content()
    path = checkpoint.save(str(tmp_path / "new"), 5, content)
    assert sorted(os.listdir(tmp_path / "new")) == ["cpt5.pth", "last.pth"]
    model, vocabulary, meta = checkpoint.load_model(path)
    assert not model.training and vocabulary.vocabulary == "你好呀" and meta["progress"]["step"] == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, content["model"][name])
    assert model.head.weight is model.embedding.weight


def test_a_file_that_windows_does_not_replace_while_it_is_read_is_replaced_a_little_later(monkeypatch):
    calls = []

    def replace(*names):
        calls.append(names)
        if len(calls) < 3:
            raise PermissionError
    monkeypatch.setattr(checkpoint.os, "name", "nt")
    checkpoint._patiently(replace, "a", "b")
    assert calls == [("a", "b")] * 3


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.mark.parametrize("kind", ["zip", "pickle", "inside"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, kind):
    target, path = str(tmp_path / "created"), str(tmp_path / "cpt1.pth")
    if kind == "pickle":
        with open(path, "wb") as file:
            pickle.dump(Evil(target), file, protocol=2)
    else:
        torch.save(make_content() | dict(format=checkpoint.FORMAT, more=Evil(target)) if kind == "inside" else Evil(target), path)
    with pytest.raises(UserError, match="refused: it is not a checkpoint, is damaged, or would run code"):
        checkpoint.load_model(path)
    assert not os.path.exists(target)
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.load(open(path, "rb"))  # it would have
    assert os.path.exists(target)


def test_a_damaged_file_is_an_error_of_one_line_wherever_it_is_damaged(tmp_path):
    path = checkpoint.save(str(tmp_path), 1, make_content())
    whole = open(path, "rb").read()
    rng = random.Random(0)
    broken = str(tmp_path / "broken.pth")
    for number in range(60):
        data = bytearray(whole[:rng.randrange(len(whole))] if number % 2 else whole)
        for _ in range(20):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        with open(broken, "wb") as file:
            file.write(data)
        try:
            checkpoint.load_model(broken)
        except UserError as error:
            assert "\n" not in str(error) and broken in str(error)


@pytest.mark.parametrize("change", [lambda c: c.pop("model"), lambda c: c.pop("tokenizer"), lambda c: c["config"].update(n_embd=16),
                                    lambda c: c["config"].update(unknown=1), lambda c: c["model"].pop("norm.weight"),
                                    lambda c: c.update(format=99), lambda c: c.clear(),
                                    lambda c: c.update(tokenizer=None)])
def test_a_file_of_other_content_is_refused(tmp_path, change):
    content = make_content() | dict(format=checkpoint.FORMAT)
    change(content)
    torch.save(content, tmp_path / "cpt1.pth")
    with pytest.raises(UserError, match="damaged or was changed|not a checkpoint of this program"):
        checkpoint.load_model(str(tmp_path / "cpt1.pth"))


def test_weights_that_do_not_fit_are_named(tmp_path):
    for name, change in (("Missing.*norm.weight", lambda c: c["model"].pop("norm.weight")),
                         ("size mismatch for .*weight", lambda c: c["config"].update(n_embd=16))):
        content = make_content() | dict(format=checkpoint.FORMAT)
        change(content)
        torch.save(content, tmp_path / "cpt1.pth")
        with pytest.raises(UserError, match=name):
            checkpoint.load_model(str(tmp_path / "cpt1.pth"))


def test_other_files_are_refused(tmp_path):
    for name, content in (("empty", b""), ("text", b"hello\n"), ("yaml", b"lr: 1\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            checkpoint.load_model(str(tmp_path / name))
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("a", "b")
    for name in ("zip", "missing", ""):
        with pytest.raises(UserError):
            checkpoint.load_model(str(tmp_path / name))


def test_auto_falls_back_from_a_damaged_newest_file_with_a_warning(tmp_path, capsys):
    for step in (9, 10, 100):
        checkpoint.save(str(tmp_path), step, make_content(step), keep=5)
    path, content = checkpoint.newest(str(tmp_path))
    assert path.endswith("cpt100.pth") and content["progress"]["step"] == 100  # by number, not by name
    newest = tmp_path / "cpt100.pth"
    whole = newest.read_bytes()
    for size in range(0, len(whole), 500):
        newest.write_bytes(whole[:size])
        with pytest.raises(checkpoint.Damaged):
            checkpoint.load(str(newest))
    path, content = checkpoint.newest(str(tmp_path))
    assert path.endswith("cpt10.pth") and content["progress"]["step"] == 10
    assert "warning" in (warning := capsys.readouterr().err) and "cpt100.pth" in warning and warning.count("\n") == 1
    assert [step for step, _ in checkpoint.numbered(str(tmp_path))] == [10, 9] and (tmp_path / "cpt100.pth.unreadable").exists()
    assert checkpoint.newest(str(tmp_path / "none")) == (None, None)


def test_auto_renames_nothing_that_may_be_whole_and_does_not_begin_anew_by_itself(tmp_path):
    checkpoint.save(str(tmp_path), 1, make_content(1))
    (tmp_path / "cpt2.pth").mkdir()  # cannot be read, as by a disk that does not answer
    with pytest.raises(UserError, match="cpt2.pth is a folder"):
        checkpoint.newest(str(tmp_path))
    (tmp_path / "cpt2.pth").rmdir()
    for name in ("cpt1.pth", "cpt2.pth"):
        (tmp_path / name).write_bytes(b"half")
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        checkpoint.newest(str(tmp_path))
    assert [step for step, _ in checkpoint.numbered(str(tmp_path))] == [2, 1]


def test_auto_takes_last_pth_and_then_best_pth_where_no_numbered_file_is_whole(tmp_path, capsys):
    for step in (1, 2):
        path = checkpoint.save(str(tmp_path), step, make_content(step))
        if step == 1:
            checkpoint.name_also(path, "best.pth")
    for _, path in checkpoint.numbered(str(tmp_path)):
        os.unlink(path)
    assert checkpoint.newest(str(tmp_path))[1]["progress"]["step"] == 2
    (tmp_path / "last.pth").write_bytes(b"half")
    assert checkpoint.newest(str(tmp_path), rename=False)[1]["progress"]["step"] == 1 and (tmp_path / "last.pth").exists()
    assert checkpoint.newest(str(tmp_path))[1]["progress"]["step"] == 1 and not (tmp_path / "last.pth").exists()
    assert capsys.readouterr().err.count("last.pth is no checkpoint, or damaged") == 2


def test_the_other_names_of_a_damaged_file_go_with_it(tmp_path, capsys):
    """Chat took best.pth, which was the damaged file."""
    for step in (1, 2):
        checkpoint.name_also(checkpoint.save(str(tmp_path), step, make_content(step)), "best.pth")
    (tmp_path / "cpt2.pth").write_bytes(b"half")
    assert checkpoint.newest(str(tmp_path))[1]["progress"]["step"] == 1
    assert sorted(os.listdir(tmp_path)) == ["best.pth.unreadable", "cpt1.pth", "cpt2.pth.unreadable", "last.pth.unreadable"]
    assert capsys.readouterr().err.count("\n") == 1


def test_best_pth_is_taken_where_the_only_numbered_file_is_damaged_under_both_of_its_names(tmp_path):
    for step in (1, 2):
        path = checkpoint.save(str(tmp_path), step, make_content(step), keep=0)
        if step == 1:
            checkpoint.name_also(path, "best.pth")
    (tmp_path / "cpt2.pth").write_bytes(b"half")
    assert checkpoint.newest(str(tmp_path))[1]["progress"]["step"] == 1
    assert sorted(os.listdir(tmp_path)) == ["best.pth", "cpt2.pth.unreadable", "last.pth.unreadable"]


@pytest.mark.parametrize("keep", [0, 1, 2, 5])
def test_so_many_are_kept_beside_the_best_and_the_last(tmp_path, keep):
    folder = str(tmp_path)
    for step in range(1, 9):
        path = checkpoint.save(folder, step, make_content(step), keep)
        if step == 2:
            checkpoint.name_also(path, "best.pth")
    assert [step for step, _ in checkpoint.numbered(folder)] == list(range(8, 8 - keep - 1, -1))
    assert checkpoint.read(os.path.join(folder, "best.pth"))["progress"]["step"] == 2
    assert checkpoint.read(os.path.join(folder, "last.pth"))["progress"]["step"] == 8
    assert len(os.listdir(folder)) == keep + 3


def test_a_run_does_not_prune_its_own_file_where_another_is_further(tmp_path):
    for step in (40, 60, 20):
        path = checkpoint.save(str(tmp_path), step, make_content(step), keep=0)
    checkpoint.name_also(path, "best.pth")
    assert checkpoint.read(path)["progress"]["step"] == 20


def test_files_that_a_person_named_are_neither_pruned_nor_gone_on_from(tmp_path):
    (tmp_path / "my_cpt100.pth").write_bytes(b"mine")
    checkpoint.save(str(tmp_path), 3, make_content(), keep=0)
    assert (tmp_path / "my_cpt100.pth").exists() and [step for step, _ in checkpoint.numbered(str(tmp_path))] == [3]


def test_naming_twice_leaves_nothing_behind_and_changes_no_other_file(tmp_path):
    first, second = (checkpoint.save(str(tmp_path), step, make_content(step)) for step in (1, 2))
    for path in (first, first, second, second):
        checkpoint.name_also(path, "best.pth")
    assert sorted(os.listdir(tmp_path)) == ["best.pth", "cpt1.pth", "cpt2.pth", "last.pth"]
    assert checkpoint.read(first)["progress"]["step"] == 1
    assert checkpoint.read(str(tmp_path / "best.pth"))["progress"]["step"] == 2


def test_an_earlier_run_is_set_aside_and_stays_readable(tmp_path):
    assert checkpoint.set_aside(str(tmp_path / "none")) is None and checkpoint.set_aside(str(tmp_path)) is None
    path = checkpoint.save(str(tmp_path), 3, make_content(3))
    checkpoint.name_also(path, "best.pth")
    for name in ("notes.txt", "300M-original.pth", "cpt3.pth.unreadable"):
        (tmp_path / name).write_text("mine")
    target = checkpoint.set_aside(str(tmp_path))
    assert sorted(os.listdir(target)) == ["best.pth", "cpt3.pth", "last.pth"]
    assert sorted(os.listdir(tmp_path)) == sorted([os.path.basename(target), "notes.txt", "300M-original.pth", "cpt3.pth.unreadable"])
    assert checkpoint.newest(target)[1]["progress"]["step"] == 3 and checkpoint.newest(str(tmp_path)) == (None, None)
    with pytest.raises(UserError, match=f"best.pth does not exist; in .* there are 300M-original.pth, {os.path.basename(target)}/best.pth"):
        checkpoint.read(str(tmp_path / "best.pth"))
    checkpoint.save(str(tmp_path), 1, make_content(1))
    said = []
    checkpoint.save(str(tmp_path), 2, make_content(2), tell=said.append)
    (again,) = {str(path) for path in tmp_path.glob("before-*")} - {target}  # within the same second too
    assert said == [f"an earlier run's checkpoints are now in {again}"] and sorted(os.listdir(again)) == ["cpt1.pth", "last.pth"]
    assert checkpoint.newest(str(tmp_path))[1]["progress"]["step"] == 2


SAVING = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
import checkpoint
print("ready", flush=True)
for step in range(1, 10**6):
    path = checkpoint.save(sys.argv[1], step, dict(progress=dict(step=step), model=dict(weight=torch.full((300_000,), step))), keep=1)
    if step % 3 == 1:
        checkpoint.name_also(path, "best.pth")
"""


def test_a_kill_at_any_moment_leaves_only_whole_checkpoints(tmp_path):
    rng = random.Random(0)
    for number in range(2):
        folder = str(tmp_path / str(number))
        process = subprocess.Popen([sys.executable, "-c", SAVING, folder, ROOT], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout.readline() == "ready\n"
            while not os.path.exists(os.path.join(folder, "cpt4.pth")):
                time.sleep(0.001)
                assert process.poll() is None
            time.sleep(rng.random() * 0.2)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
        assert {"best.pth", "last.pth"} <= set(names) and len(names) <= 5
        for name in names:
            content = checkpoint.read(os.path.join(folder, name))
            assert (content["model"]["weight"] == content["progress"]["step"]).all()


def test_what_a_killed_run_left_half_written_is_cleared_by_the_next_one(tmp_path):
    for name in (".saving-cpt1.pth", ".saving-cpt9.pth", ".saving-last.pth", ".saving-mine.pth"):
        (tmp_path / name).write_bytes(b"half")
    checkpoint.save(str(tmp_path), 1, make_content(1))
    assert sorted(os.listdir(tmp_path)) == [".saving-mine.pth", "cpt1.pth", "last.pth"]  # another program may be at work
    assert checkpoint.newest(str(tmp_path))[1]["progress"]["step"] == 1


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    class Unsaveable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    checkpoint.save(str(tmp_path), 1, make_content(1))
    with pytest.raises(UserError, match="cpt2.pth cannot be written: No space"):
        checkpoint.save(str(tmp_path), 2, make_content(2) | dict(more=Unsaveable()), tell=print)  # a new run's first leaves the old one too
    assert sorted(os.listdir(tmp_path)) == ["cpt1.pth", "last.pth"]
    assert checkpoint.newest(str(tmp_path))[1]["progress"]["step"] == 1


def test_a_checkpoint_s_tokenizer_prepares_a_corpus(tmp_path):
    checkpoint.save(str(tmp_path), 1, make_content(1))
    (tmp_path / "c.txt").write_text("你好\n好\n\n吃了吗\n")
    store = data.prepare(TrainSettings(data_path=str(tmp_path / "c.txt"), tokenizer=str(tmp_path / "cpt1.pth")))
    assert tokenizer.load(os.path.join(store, "tokenizer.json")).state() == make_content()["tokenizer"]
