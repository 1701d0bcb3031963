"""Settings: what is written is what is meant, or one line says why not."""

import dataclasses
import os
import subprocess
import sys

import pytest

import settings
from settings import ChatSettings, SentimentSettings, TrainSettings, UserError, build, overrides, read_yaml


def train(**values):
    return build(TrainSettings, values)


def test_an_empty_mapping_gives_the_defaults():
    assert train() == TrainSettings() and build(ChatSettings, {}) == ChatSettings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        train().lr = 1.0


@pytest.mark.parametrize(("written", "meant"), [
    ("lr : 2e-4", dict(lr=2e-4)), ("lr: 2E-4", dict(lr=2e-4)), ("min_lr: 6e-6\nlr: 3e-4", dict(min_lr=6e-6)), ("lr: .001", dict(lr=0.001)),
    ("resume_from: NULL", dict(resume_from=None)), ("resume_from:", dict(resume_from=None)), ("resume_from: none", dict(resume_from=None)),
    ("resume_from: ''", dict(resume_from=None)), ("tensorboard_path: ~", dict(tensorboard_path=None)),
    ("max_epoch : 1919810", dict(max_epoch=1919810)), ("max_steps: 1e3", dict(max_steps=1000)), ("max_steps: 1000.0", dict(max_steps=1000)),
    ("max_steps: '20'", dict(max_steps=20)),
    ("bias: False", dict(bias=False)), ("bias: no", dict(bias=False)), ("bias: 'true'", dict(bias=True)),
    ("bias: 0", dict(bias=False)), ("micro_batch: 4", dict(micro_batch=4)), ("micro_batch: auto", dict(micro_batch="auto")),
    ("device: cuda  # here", dict(device="cuda")), ("tied: NULL", dict(tied=None)), ("tied: True", dict(tied=True)),
    ("checkpoint_root: 我的/检查点", dict(checkpoint_root="我的/检查点")), ("checkpoint_root: 2024", dict(checkpoint_root="2024")),
    ("checkpoint_root: ~/x", dict(checkpoint_root=os.path.expanduser("~/x"))),
    ("ddp: True\nlocal_rank: 0\nworld_size: 8", {}), ("temperature: 0.5\nuse_mask: True", {}), ("", {}), ("# only a comment", {})])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_yaml_means_what_it_says(tmp_path, written, meant, mark):
    (tmp_path / "c.yaml").write_text(mark + written, encoding="utf-8")
    found = build(TrainSettings, read_yaml(str(tmp_path / "c.yaml")))
    assert found == dataclasses.replace(TrainSettings(), **{"lr": found.lr} | meant)
    assert all(type(getattr(found, name)) is type(value) for name, value in meant.items())


@pytest.mark.parametrize(("values", "message"), [
    (dict(n_layer=0), "n_layer=0 must be at least 1"), (dict(n_layer=2.5), "n_layer=2.5 must be a whole number"),
    (dict(n_layer="two"), "n_layer='two' must be a whole number"), (dict(n_layer=True), "n_layer=True must be a whole number"),
    (dict(n_layer=None), "n_layer is empty"), (dict(n_layer="NULL"), "n_layer is empty"),
    (dict(n_layer=[3]), r"n_layer=\[3\] must be a whole number"),
    (dict(lr="fast"), "lr='fast' must be a number"), (dict(lr=-1), "lr=-1 must be at least 0"),
    (dict(lr="nan"), "lr='nan' must be a number"),
    (dict(lr=True), "lr=True must be a number"), (dict(lr="inf"), "lr='inf' must be a number"),
    (dict(max_steps="many"), "max_steps='many' must be a whole number"),
    (dict(max_steps="inf"), "max_steps='inf' must be a whole number or empty"),
    (dict(dropout=1.0), "dropout=1.0 must be at least 0 and at most 0.95"), (dict(bias="maybe"), "bias='maybe' must be True or False"),
    (dict(bias=None), "bias is empty"), (dict(train_percent=80), "train_percent=80 must be at least 0 and at most 1"),
    (dict(train_percent=0), "train_percent=0 leaves nothing"), (dict(seed=-1), "seed=-1 must be at least 0"),
    (dict(dtype="fp16"), "dtype=fp16 is not one of auto, float32, bfloat16, float16"),
    (dict(arch="llama"), "arch=llama is not one of gpt2, modern"),
    (dict(optimizer="sgd"), "optimizer=sgd is not one of adamw, muon"), (dict(schedule="linear"), "schedule=linear is not one of"),
    (dict(n_embd=100, n_head=3), r"n_embd=100 cannot be split over n_head=3; use a multiple of 3 \(102\)"),
    (dict(n_head=4, n_kv_head=3), "n_head=4 is not a multiple of n_kv_head=3"),
    (dict(arch="modern", n_embd=12, n_head=4), "even head size.* is 3"), (dict(lr=1e-4, min_lr=1e-3), "min_lr=0.001 is above lr=0.0001"),
    (dict(micro_batch=0), "micro_batch=0 must be auto or a number"), (dict(micro_batch="some"), "micro_batch=some must be auto"),
    (dict(checkpoint_root=True), "checkpoint_root=True must be text"), (dict(tensorboard_path="false"), "must be text or empty"),
    (dict(data_path=["a"]), r"data_path=\['a'\] must be text or empty"), (dict(block_size=10**23), "block_size=.* at most 1048576"),
    (dict(vocab_size=3), "vocab_size=3 must be at least 4"), (dict(block_size=1), "block_size=1 must be at least 2")])
def test_a_wrong_value_is_refused_with_its_name_and_what_it_must_be(values, message):
    with pytest.raises(UserError, match=message):
        train(**values)


@pytest.mark.parametrize(("script", "values", "message"), [
    (ChatSettings, dict(top_p=1.5), "top_p=1.5 must be at least 0 and at most 1"), (ChatSettings, dict(temperature=-1), "temperature=-1"),
    (ChatSettings, dict(repetition_penalty=0.5), "repetition_penalty=0.5"),
    (SentimentSettings, dict(use_mask="perhaps"), "use_mask='perhaps'"),
    (SentimentSettings, dict(seeds=[3, -1]), "must be at least 0 and at most 4294967295")])
def test_the_other_scripts_values_are_checked_too(script, values, message):
    with pytest.raises(UserError, match=message):
        build(script, values)


@pytest.mark.parametrize(("wrong", "near"), [("n_layers", "n_layer"), ("learning_rate", "lr"), ("train_batches", "train_batch"),
                                             ("LR", "lr"), ("Batch_Size", "train_batch"),
                                             ("Device", "device"), ("blocksize", "block_size"), ("temprature", "temperature")])
def test_an_unknown_key_names_a_known_one(wrong, near):
    with pytest.raises(UserError, match=f"unknown key '{wrong}'; did you mean '{near}'"):
        build(TrainSettings, {wrong: 1})


def test_a_key_that_is_no_text_is_refused_too():
    with pytest.raises(UserError, match="unknown key 7"):
        build(TrainSettings, {7: 1})


def test_keys_of_other_scripts_are_accepted_and_left_out():
    everything = {field.name: field.default for script in settings.SCRIPTS for field in dataclasses.fields(script)}
    for script in settings.SCRIPTS:
        assert build(script, everything) == build(script, {f.name: everything[f.name] for f in dataclasses.fields(script)})


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nseed: 5\n")
    found = build(TrainSettings, read_yaml(str(tmp_path / "c.yaml")) | overrides(["lr = 2e-4 ", "resume_from=", "data_path = a=b.txt "]))
    assert (found.lr, found.seed, found.resume_from, found.data_path) == (2e-4, 5, None, "a=b.txt")
    with pytest.raises(UserError, match="'lr' is not of the form key=value"):
        overrides(["lr"])


@pytest.mark.parametrize(("content", "message"), [
    (b"- a\n- b\n", "is not a list of `key: value` lines"), (b"lr: [1\n", "cannot be read"), (b"a: b: c\n", "cannot be read"),
    ("键: 值".encode("gb18030"), "cannot be read"), (b"just words", "is not a list of"), (b"lr: 1\nseed: 2\nlr: 3\n", "sets lr twice")])
def test_a_file_that_is_no_settings_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_yaml(str(tmp_path / "c.yaml"))
    assert "\n" not in str(error.value)


def test_a_missing_file_names_those_that_are_there(tmp_path):
    (tmp_path / "one.yaml").write_text("lr: 1\n")
    with pytest.raises(UserError, match="lr=0.1 is not a file: name the configuration first"):
        read_yaml("lr=0.1")
    with pytest.raises(UserError, match="two.yaml does not exist; in .* there are one.yaml"):
        read_yaml(str(tmp_path / "two.yaml"))
    with pytest.raises(UserError, match="is a folder, but a configuration is needed here"):
        read_yaml(str(tmp_path))


@pytest.mark.parametrize("script", settings.SCRIPTS)
def test_help_tells_of_every_key_with_meaning_and_default(script):
    text = settings.parser(script, "usage").format_help()
    assert max(map(len, text.split("\n"))) <= 80
    text = text.replace("\n" + " " * 24, " ")  # entries of several lines
    for field in dataclasses.fields(script):
        (line,) = (line for line in text.split("\n") if line.startswith(f"  {field.name} "))
        assert field.metadata["help"] in line
        assert f"(default: {'-' if field.default is None else field.default})" in line
        assert all(choice in line for choice in field.metadata["choices"] or ())


@pytest.mark.parametrize("body", [
    "raise settings.UserError('value=1 is wrong; use 2')", "print(1/0)", "print(open('/dev/full', 'w').write('x' * 10**6))"])
def test_an_error_of_the_user_is_one_line_and_status_2_and_a_bug_keeps_its_traceback(body):
    program = f"import settings\ndef f():\n    {body}\nsettings.main(f)"
    done = subprocess.run([sys.executable, "-c", program], cwd=settings.__file__.rpartition("/")[0], capture_output=True, text=True)
    if "UserError" in body:
        assert (done.returncode, done.stderr) == (2, "error: value=1 is wrong; use 2\n")
    elif "full" in body:
        assert done.returncode == 2 and done.stderr == "error: a file cannot be written: No space left on device\n"
    else:
        assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize("wrong", [
    "raise settings.UserError('wrong')", "open('/dev/full', 'w').write('x' * 10**6)", "raise KeyboardInterrupt"])
def test_an_error_during_long_work_begins_a_line_and_is_the_last(wrong):
    program = f"import settings, tqdm\ndef f():\n    bar = tqdm.tqdm(total=9)\n    {wrong}\nsettings.main(f)"
    done = subprocess.run([sys.executable, "-c", program], cwd=settings.__file__.rpartition("/")[0], capture_output=True, text=True)
    assert "0/9" in done.stderr and done.stderr.splitlines()[-1].startswith(("error: ", "interrupted")), done.stderr


def test_folds_and_given_test_sets_exclude_each_other():
    with pytest.raises(UserError, match="folds=3 and split_path=a.json"):
        build(SentimentSettings, dict(folds=3, split_path="a.json"))


def test_whole_numbers_keep_all_their_digits_and_nothing_else_becomes_one():
    assert build(ChatSettings, dict(seed=2**53 + 1)).seed == build(ChatSettings, dict(seed=str(2**53 + 1))).seed == 2**53 + 1
    for wrong in ([0.5], [True], ["a"]):
        with pytest.raises(UserError, match="seeds="):
            build(SentimentSettings, dict(seeds=wrong))


@pytest.mark.parametrize("text", ["max_minutes: 2024-99-99", "seed: !!int abc", "seed: !!timestamp 5", "a: " + "[" * 5000, "false", "[]"])
def test_yaml_that_cannot_be_meant_is_one_line(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match="c.yaml"):
        read_yaml(str(tmp_path / "c.yaml"))


def test_the_heap_is_to_have_huge_pages_whatever_paths_are_mapped(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff"  # not UTF-8
    with open(path, "wb") as file:
        file.truncate(256 << 20)  # too large for a gap between libraries: mapped, it stands near the heap
    code = ("import mmap, os, sys, settings; file = open(sys.argv[1], 'rb'); room = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); "
            "settings.tune_allocator(); maps = open('/proc/self/smaps', 'rb').read(); "
            "flags = maps[maps.index(b'[heap]'):].split(b'VmFlags:')[1].splitlines()[0].split(); "
            "print(os.fsencode(sys.argv[1]) in maps, b'hg' in flags)")
    found = subprocess.run([sys.executable, "-c", code, path], cwd=os.path.dirname(settings.__file__), capture_output=True, text=True,
                           check=True)
    assert found.stdout == f"True {os.path.exists('/sys/kernel/mm/transparent_hugepage')}\n"  # a kernel may be built without
