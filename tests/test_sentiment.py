"""The sentiment classifier: what is read where, what is trained, how reviews are split, measured and predicted."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch

import chat
import checkpoint
import ngrams
import reviews
import runtime as rt
import sentimentalTrain
import settings as settings_module
import train
from model import GPT, Classifier, GPTConfig, extended
from runs import ROOT, THREAD, finish, start, wait_for
from settings import ChatSettings, SentimentSettings, UserError
from tokenizer import SEP, BPETokenizer, CharTokenizer

SCRIPT = os.path.join(ROOT, "sentimentalTrain.py")
GOOD, BAD = ["很好", "干净", "满意", "舒服"], ["很差", "太脏", "失望", "吵闹"]


def write_reviews(path, count=60, encoding="utf-8", names=("0", "1")):
    rng = np.random.default_rng(0)
    lines = ["label,review"]
    for i in range(count):
        words = [rng.choice(GOOD if i % 2 else BAD)] + list(rng.choice(["房间", "早餐", "服务", "位置", "大堂"], size=rng.integers(1, 6)))
        lines.append(f'{names[i % 2]},"第{i}次住，{"，".join(rng.permutation(words))}"')
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return str(path)


def tiny_gpt(arch="modern"):
    torch.manual_seed(0)
    tokenizer = CharTokenizer("".join(sorted(set("".join(GOOD + BAD) + "房间早餐服务位置大堂第次住，0123456789"))))
    config = GPTConfig(vocab_size=tokenizer.size, arch=arch, block_size=48, n_layer=2, n_head=2, n_embd=16)
    model = GPT(config)
    if arch == "modern":  # its blocks start as identities
        for block in model.blocks:
            torch.nn.init.normal_(block.attention.out.weight, std=0.2)
            torch.nn.init.normal_(block.mlp.out.weight, std=0.2)
    return model, tokenizer


@pytest.fixture
def base(tmp_path):
    model, tokenizer = tiny_gpt()
    return checkpoint.save(str(tmp_path / "base"), 1, checkpoint.describe(model, tokenizer) | dict(optimizer=None))


@pytest.fixture
def config(tmp_path, base):
    path = tmp_path / "tiny.yaml"
    data = write_reviews(tmp_path / "reviews.csv")
    path.write_text(f"""sentimental_data_path: {data}
base_model: {base}
train_percent: 0.7
val_percent: 0.2
block_size: 48
train_batch: 8
max_epoch: 6
lr: 1e-2
weight_decay: 0.1
dtype: float32
device: cpu
checkpoint_root: {tmp_path}/out
tensorboard_path: {tmp_path}/runs
""")
    return str(path)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["sentimentalTrain.py", *words])
    sentimentalTrain.main()


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_new_embeddings_start_like_the_others_and_old_ones_stay(arch):
    model, _ = tiny_gpt(arch)
    more = extended(model, 2, 0.1, like=SEP)
    old = model.config.vocab_size
    assert more.config.vocab_size == old + 2 and more.config.dropout == 0.1
    known, new = more.embedding.weight[:old], more.embedding.weight[old:old + 2]
    assert torch.equal(known, model.embedding.weight[:old])
    assert 0.3 < new.std() / known.std() < 3
    assert not torch.equal(new[0], new[1])
    if model.config.tied:
        assert more.head.weight is more.embedding.weight


def score(classifier, ids, width):
    padded, lengths = reviews.pad([np.array(ids)], width)
    with torch.no_grad():
        return classifier.eval()(torch.from_numpy(padded), torch.from_numpy(lengths))


def test_with_the_mask_filling_changes_no_score_and_without_it_does():
    for use_mask in (True, False):
        gpt, tokenizer = tiny_gpt()
        torch.manual_seed(1)
        classifier = Classifier(extended(gpt, 2, 0.0, like=SEP), 2, use_mask)
        ids = [tokenizer.size, *tokenizer.encode("房间很好").tolist(), tokenizer.size + 1]
        same = torch.allclose(score(classifier, ids, len(ids)), score(classifier, ids, 20), atol=1e-6)
        assert same == use_mask


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_frozen_moves_the_last_block_the_norm_the_head_and_the_two_new_embeddings_only(arch, config, tmp_path, monkeypatch):
    model, tokenizer = tiny_gpt(arch)
    path = checkpoint.save(str(tmp_path / arch), 1, checkpoint.describe(model, tokenizer))
    run(monkeypatch, config, f"base_model={path}", "frozen=True", "max_epoch=2", "use_mask=False")
    after = checkpoint.read(str(tmp_path / "out" / "best.pth"))
    old = model.config.vocab_size
    rows = after["model"]["embedding.weight"]
    assert torch.equal(rows[:old], model.embedding.weight[:old])
    torch.manual_seed(1337)
    fresh = extended(model, 2, 0.0, like=SEP).embedding.weight[old:]
    assert not torch.isclose(rows[old:old + 2], fresh[:2]).any()
    assert torch.equal(rows[old + 2:], fresh[2:])
    for name, value in model.state_dict().items():
        if name not in ("embedding.weight", "head.weight"):
            moved = not torch.equal(value, after["model"][name])
            assert moved == name.startswith(("blocks.1.", "norm.")), name
    expected = sum(p.numel() for p in [*model.blocks[-1].parameters(), *model.norm.parameters()]) + 2 * 16 + (2 * 16 + 2)
    assert metrics(tmp_path / "out")["trained"] == expected


def test_batches_by_length_have_under_five_percent_filling_and_hold_each_review_once():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(4.4, 0.9, 5000).astype(int) + 4, 256)
    members = rng.permutation(5000)[:4000]
    batches = reviews.by_length(members, lengths, 24, np.random.default_rng(1))
    assert sorted(np.concatenate(batches)) == sorted(members)
    computed = sum(reviews.pad([np.zeros(lengths[i], dtype=int) for i in batch], 8)[0].size for batch in batches)
    assert 1 - lengths[members].sum() / computed < 0.05
    others = reviews.by_length(members, lengths, 24, np.random.default_rng(2))
    assert {tuple(sorted(batch)) for batch in batches} != {tuple(sorted(batch)) for batch in others}


@pytest.mark.parametrize(("use_mask", "block_size", "widths"), [(True, 64, 8), (True, 20, 5), (True, 9, 8), (False, 20, 1)])
def test_batches_have_few_widths_none_above_block_size(use_mask, block_size, widths):
    unit = reviews.width_unit(use_mask, block_size)
    found = {reviews.pad([np.zeros(length, dtype=int)], unit)[0].shape[1] for length in range(2, block_size + 1)}
    assert len(found) == widths and max(found) == block_size


def test_a_long_review_keeps_its_beginning_and_its_end():
    row, short = reviews.encode([np.arange(100), np.arange(3)], 200, 12)
    assert row.tolist() == [200, 0, 1, 2, 3, 4, 95, 96, 97, 98, 99, 201]
    assert short.tolist() == [200, 0, 1, 2, 201]


def settings(**values):
    return settings_module.build(SentimentSettings, values)


def test_splits_are_stratified_repeatable_and_keep_duplicates_together():
    texts = [f"评论{i // 2}" for i in range(400)]  # each twice
    labels = np.array([i // 2 % 4 == 0 for i in range(400)]).astype(int)
    made = list(reviews.splits(texts, labels, ["a", "b"], settings(train_percent=0.8, seeds=[1, 2])))
    again = list(reviews.splits(texts, labels, ["a", "b"], settings(train_percent=0.8, seeds=[1, 2])))
    for (_, seed, *parts), (_, _, *others) in zip(made, again):
        assert all((a == b).all() for a, b in zip(parts, others))
        assert sorted(np.concatenate(parts)) == list(range(400))
        assert [len(part) for part in parts] == pytest.approx([288, 32, 80], abs=4)
        for part in parts:
            assert labels[part].mean() == pytest.approx(0.25, abs=0.04)
        for a in parts:
            for b in parts:
                assert a is b or not {texts[i] for i in a} & {texts[i] for i in b}
    assert made[0][4].tolist() != made[1][4].tolist()


def test_folds_test_every_review_once_and_given_test_sets_are_kept(tmp_path):
    texts, labels = [f"评论{i}" for i in range(50)], np.arange(50) % 2
    made = list(reviews.splits(texts, labels, ["a", "b"], settings(folds=5)))
    assert sorted(np.concatenate([test for *_, test in made])) == list(range(50))
    (tmp_path / "sets.json").write_text("[[3, 2, 1], [7, 8]]")
    made = list(reviews.splits(texts, labels, ["a", "b"], settings(split_path=str(tmp_path / "sets.json"), val_percent=0)))
    assert [test.tolist() for *_, test in made] == [[1, 2, 3], [7, 8]]
    assert [len(training) for _, _, training, _, _ in made] == [47, 48]


def test_measures_agree_with_counting_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 1])
    chance = np.array([0.1, 0.4, 0.8, 0.8, 0.3, 0.9])
    told = reviews.measure(np.stack([1 - chance, chance], axis=1), labels, ["n", "p"])
    pairs = [(p > n) + 0.5 * (p == n) for p in chance[labels == 1] for n in chance[labels == 0]]
    assert told["confusion"] == [[2, 1], [1, 2]]
    assert told["accuracy"] == pytest.approx(4 / 6) and told["f1"] == pytest.approx(2 / 3) and told["majority"] == 0.5
    assert told["auc"] == pytest.approx(np.mean(pairs))


def test_ngrams_stay_within_a_review_and_learn_what_single_tokens_cannot():
    one, two = np.array([5, 6]), np.array([6, 5])
    together, _, owner = ngrams.counts([one, two], 2)
    alone, _, _ = ngrams.counts([two], 2)
    assert owner.tolist() == [0, 0, 0, 1, 1, 1] and together[3:].tolist() == alone.tolist()
    model = ngrams.Ngrams.train([one, two] * 5, np.array([0, 1] * 5), 2, 2)
    assert model.log_probabilities([one, two]).argmax(axis=1).tolist() == [0, 1]
    again = ngrams.Ngrams(**vars(model))
    assert (again.log_probabilities([one]) == model.log_probabilities([one])).all()
    unmet = model.log_probabilities([np.array([9, 9, 5])])
    assert np.array_equal(unmet, model.log_probabilities([np.array([5])]))


def test_an_ngram_as_frequent_in_one_class_as_in_the_other_has_no_weight():
    model = ngrams.Ngrams.train([np.array([7, 8, 8, 8]), np.array([7, 5])] * 5, np.array([0, 1] * 5), 2, 1)
    (key,), _, _ = ngrams.counts([np.array([7])], 1)
    assert len(model.keys) == 3 and not model.weight[model.keys == key].any() and model.weight.abs().max() > 1


def test_a_linear_model_that_met_every_ngram_once_takes_no_side():
    model = ngrams.Ngrams.train([np.array([3, 4]), np.array([5, 6])], np.array([0, 1]), 2, 2)
    assert len(model.keys) == 0 and np.allclose(model.log_probabilities([np.array([3, 4])]), np.log(0.5))


@pytest.mark.parametrize("lengths", [[1], [2], [1, 1], [2, 5, 1]])
def test_ngrams_of_reviews_of_a_token_or_two_are_those_of_longer_batches(lengths):
    rows = [np.arange(7, 7 + length) for length in lengths]
    key, value, owner = ngrams.counts(rows, 4)
    longer, _, owners = ngrams.counts([*rows, np.arange(30)], 4)
    assert key.tolist() == longer[:len(key)].tolist() and owner.tolist() == owners[owners < len(rows)].tolist()
    assert len(key) == len(value) == sum(max(0, length - k) for length in lengths for k in range(4))


def test_a_run_learns_reports_and_predicts(config, tmp_path, monkeypatch, capsys):
    run(monkeypatch, config, "ngrams=2")
    told = metrics(tmp_path / "out")
    capsys.readouterr()
    assert told["accuracy"] > 0.8 and told["majority"] == pytest.approx(0.5, abs=0.1) and told["deviation"] is None
    (one,) = told["runs"]
    assert one["filling"] < 0.25  # of reviews of 20 tokens and widths of 24 and 32; whole rows would be more than half
    assert sum(map(sum, one["test"]["confusion"])) == one["test"]["reviews"]
    chosen = max(one["history"], key=lambda epoch: epoch["validation"])
    assert one["epoch"] == chosen["epoch"]
    assert os.listdir(tmp_path / "runs")

    texts = ["房间干净，很好，满意", "太脏，失望", "", "大堂吵闹，很差"]
    (tmp_path / "in.txt").write_text("\n".join(texts), encoding="utf-8")
    (tmp_path / "in.csv").write_text("id,review\n" + "".join(f"{i},{text}\n" for i, text in enumerate(texts)), encoding="gb18030")
    outputs = []
    for name in ("in.txt", "in.csv"):
        run(monkeypatch, config, "--predict", str(tmp_path / name))
        outputs.append(capsys.readouterr().out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(texts).encode())))
    monkeypatch.setattr(sentimentalTrain, "PART", 3)  # the second part has one review, in other files of thousands
    run(monkeypatch, str(tmp_path / "out" / "best.pth"), "--predict", "-", "device=cpu", "dtype=float32")
    outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]
    lines = outputs[0].split("\n")
    assert [line.split("\t")[0] for line in lines] == ["1", "0", "", "0", ""]
    assert all(0.5 <= float(line.split("\t")[1]) <= 1 for line in lines if line)
    run(monkeypatch, config, "--predict-text", texts[1])
    assert capsys.readouterr().out == lines[1] + "\n"
    run(monkeypatch, config, "--predict-text", " ")
    assert capsys.readouterr().out == "\n"


def test_a_file_written_by_a_run_gives_the_tested_accuracy_by_itself(config, tmp_path, monkeypatch, capsys):
    run(monkeypatch, config, "max_epoch=2")
    told = metrics(tmp_path / "out")["runs"][0]["test"]
    texts, labels, names, _ = reviews.read_reviews(str(tmp_path / "reviews.csv"))
    (_, _, _, _, test), = reviews.splits(texts, labels, names, settings(train_percent=0.7, val_percent=0.2))
    os.remove(tmp_path / "base" / "cpt1.pth")
    (tmp_path / "in.txt").write_text("\n".join(texts[i] for i in test), encoding="utf-8")
    capsys.readouterr()
    run(monkeypatch, config, "--predict", str(tmp_path / "in.txt"))
    said = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert np.mean([names[labels[i]] == name for i, name in zip(test, said)]) == pytest.approx(told["accuracy"])


@pytest.mark.parametrize("minutes", ["0", "0.0001"])
def test_max_minutes_ends_a_run_after_a_step_at_least(minutes, config, tmp_path, monkeypatch):
    run(monkeypatch, config, f"max_minutes={minutes}", "max_epoch=1000000")
    (one,) = metrics(tmp_path / "out")["runs"]
    assert [told["epoch"] for told in one["history"]] == [1] and one["history"][0]["loss"] > 0


def test_every_seed_of_given_test_sets_has_a_folder_of_its_own(config, tmp_path, monkeypatch):
    texts, _, _, _ = reviews.read_reviews(str(tmp_path / "reviews.csv"))
    (tmp_path / "split.json").write_text(json.dumps([list(range(k, len(texts), 3)) for k in range(2)]))
    run(monkeypatch, config, f"split_path={tmp_path}/split.json", "seeds=[1,2]", "max_epoch=1")
    made = metrics(tmp_path / "out")["runs"]
    assert len({one["folder"] for one in made}) == 4
    assert all(checkpoint.read(f"{one['folder']}/best.pth")["settings"]["seed"] == one["seed"] for one in made)
    assert len(list((tmp_path / "runs" / "out").glob("*"))) == 4  # not where another configuration's seed1 is


def test_a_run_stopped_between_folds_and_configurations_keeps_the_figures_of_what_ended(config, tmp_path, monkeypatch, capsys):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    make = checkpoint.make_folder

    def interrupted(folder, wish):
        make(folder, wish)
        if folder.endswith("two/seed1337-fold3"):
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(checkpoint, "make_folder", interrupted)
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.yaml").write_text(open(config).read().replace("/out", f"/{name}"))
    paths = [str(tmp_path / f"{name}.yaml") for name in ("one", "two", "three")]
    run(monkeypatch, *paths, "folds=3", "max_epoch=1", "--table", str(tmp_path / "t"))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert len(metrics(tmp_path / "one")["runs"]) == 3 and len(metrics(tmp_path / "two")["runs"]) == 2
    assert (tmp_path / "two" / "best.pth").exists() and not os.listdir(tmp_path / "three")
    assert "2 of 3 runs: test accuracy" in capsys.readouterr().out
    table = (tmp_path / "t.md").read_text()
    assert "two (2 of 3 runs)" in table and "three" not in table


def test_a_folder_that_another_run_writes_to_is_refused(config, tmp_path, monkeypatch):
    os.mkdir(tmp_path / "out")
    with rt.Processes() as another:
        another.claim(str(tmp_path / "out"))
        another.claim(str(tmp_path / "out" / ".." / "out"))  # its own, by whatever name
        with pytest.raises(UserError, match="another run is writing to checkpoint_root="):
            run(monkeypatch, config)
    run(monkeypatch, config, "max_epoch=1")


def opened(path):
    """A descriptor that writes to a named pipe, or None as long as nobody reads it."""
    with contextlib.suppress(OSError):
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK)


def test_a_signal_ends_a_run_while_it_still_reads_its_files(config, tmp_path):
    """The wish to stop was noted and looked at in the first training step only."""
    os.mkfifo(tmp_path / "slow.csv")
    process = start(config, f"sentimental_data_path={tmp_path}/slow.csv", script=SCRIPT)
    place = wait_for(lambda: process.poll() is None and opened(tmp_path / "slow.csv"))
    process.terminate()  # SIGINT is ignored where the tests run in the background of a script
    status, _ = finish(process, 60)
    os.close(place)
    assert status == -signal.SIGTERM and not (tmp_path / "out").exists()


@pytest.mark.parametrize("full", ["disk", "memory"])
def test_an_error_in_a_later_run_keeps_the_figures_of_what_ended(full, config, tmp_path, monkeypatch):
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.yaml").write_text(open(config).read().replace("/out", f"/{name}"))
    (tmp_path / "two").mkdir()
    if full == "disk":
        (tmp_path / "two" / "seed8").write_text("in the way")
    else:
        make = sentimentalTrain.make_optimizers

        def make_optimizers(model, settings, dtype, group, left=iter(range(4, -1, -1))):
            if next(left) == 0:
                raise torch.OutOfMemoryError
            return make(model, settings, dtype)
        monkeypatch.setattr(sentimentalTrain, "make_optimizers", make_optimizers)
    (tmp_path / "t.md").write_text("an earlier one")
    paths = [str(tmp_path / f"{name}.yaml") for name in ("one", "two", "three")]
    with pytest.raises(UserError, match="cannot be written" if full == "disk" else "the memory is full"):
        run(monkeypatch, *paths, "seeds=[7,8,9]", "max_epoch=1", "--table", str(tmp_path / "t"))
    assert len(metrics(tmp_path / "one")["runs"]) == 3 and len(metrics(tmp_path / "two")["runs"]) == 1
    assert (tmp_path / "two" / "best.pth").exists() and not os.listdir(tmp_path / "three")
    table = (tmp_path / "t.md").read_text()
    assert "| one " in table and "| two (1 of 3 runs)" in table
    assert [path.read_text() for path in tmp_path.glob("before-*/t.md")] == ["an earlier one"]


def test_figures_of_an_earlier_run_go_aside_with_its_checkpoints(config, tmp_path, monkeypatch):
    for seed in (1, 2):
        run(monkeypatch, config, "max_epoch=1", f"seed={seed}")
    (aside,) = (tmp_path / "out").glob("before-*")
    assert [metrics(folder)["settings"]["seed"] for folder in (aside, tmp_path / "out")] == [1, 2]


@pytest.mark.parametrize("content", ["[]", "[[]]", "[[0, 1], []]", "[[0, 0]]", "[[-1]]", "[[9]]", "[[0.0]]", "[[true]]", '[["0"]]', "[0]",
                                     "{}", "0, 1"])
def test_a_file_of_test_sets_that_are_none_is_refused(content, tmp_path):
    (tmp_path / "sets.json").write_text(content)
    with pytest.raises(UserError, match="sets.json is not a list of lists of different numbers from 0 to 8"):
        reviews.read_split(str(tmp_path / "sets.json"), 9)


def test_what_is_wrong_with_the_last_configuration_shows_before_the_first_is_trained(config, tmp_path, monkeypatch):
    written = open(config).read().replace("/out", "/last")
    for text, words in ((open(config).read(), "is shared by several configurations"),
                        (written.replace("cpt1.pth", "damaged.pth"), "damaged.pth is "),
                        (written.replace("cpt1.pth", "none.pth"), "none.pth does not exist"),
                        (re.sub("base_model: .*", "base_model: none", written), "base_model is not set"),
                        (re.sub("train_batch: .*", "train_batch: 10000", written), "train_batch=10000 is more than the"),
                        (re.sub("train_percent: .*", "train_percent: 1", written), "train_percent=1 leaves nothing to test")):
        (tmp_path / "last.yaml").write_text(text)
        (tmp_path / "base" / "damaged.pth").write_text("no checkpoint")
        with pytest.raises(UserError, match=words):
            run(monkeypatch, config, str(tmp_path / "last.yaml"))
        assert not (tmp_path / "out").exists()
    (tmp_path / "last.yaml").write_text(re.sub("tensorboard_path: .*", f"tensorboard_path: {config}", written))
    with pytest.raises(UserError, match="tensorboard_path=.*/tiny.yaml cannot be written"):
        run(monkeypatch, config, str(tmp_path / "last.yaml"))
    assert os.listdir(tmp_path / "out") == []


def test_lines_to_predict_end_at_line_ends_only(tmp_path):
    (tmp_path / "in.txt").write_text("好\u2028坏\n\x0b\n差\r\n", encoding="utf-8", newline="")
    (tmp_path / "in.CSV").write_text("\nreview\n好\n\n差\n", encoding="utf-8")
    assert reviews.read_unlabelled(str(tmp_path / "in.txt")) == ["好\u2028坏", "\x0b", "差"]
    assert reviews.read_unlabelled(str(tmp_path / "in.CSV")) == ["好", "", "差"]
    (tmp_path / "in.TSV").write_text("label\treview\n1\t好, 很好\n", encoding="utf-8")
    assert reviews.read_unlabelled(str(tmp_path / "in.TSV")) == ["好, 很好"]
    with pytest.raises(UserError, match="save it as .csv"):  # its names and brackets would be classified as well
        reviews.read_unlabelled("in.jsonl")
    (tmp_path / "bare.csv").write_text("好\n差\n", encoding="utf-8")
    with pytest.raises(UserError, match="no column 'review'"):  # its first line is no heading to be left out
        reviews.read_unlabelled(str(tmp_path / "bare.csv"))


def test_a_classifier_still_talks_and_says_what_it_is(config, tmp_path, monkeypatch, capsys):
    run(monkeypatch, config, "max_epoch=1")
    settings = settings_module.build(ChatSettings, dict(seed=1, temperature=5.0, top_p=1.0))
    model, tokenizer = chat.load(str(tmp_path / "out" / "best.pth"), settings)
    assert "best.pth is a classifier: the model that it was made from talks better" in capsys.readouterr().err
    conversation = chat.Conversation(model, tokenizer, settings)
    for _ in range(60):
        conversation.hear("好")
        "".join(conversation.reply())
    assert all(i < tokenizer.size for _, ids in conversation.utterances for i in ids)


def test_the_samples_of_a_run_that_starts_from_a_classifier_are_text(config, tmp_path, monkeypatch):
    """<start> and <extract> are about as likely as <sep> there, and stand for no text."""
    run(monkeypatch, config, "max_epoch=1")
    model, tokenizer, _ = checkpoint.load_model(str(tmp_path / "out" / "best.pth"))
    runtime = rt.Runtime(torch.device("cpu"), torch.float32, rt.Processes())
    assert len(list(train.sample_replies(model, ["好"] * 100, tokenizer, runtime))) == 100


def test_configurations_that_ask_for_different_machines_are_refused(config, tmp_path, monkeypatch):
    with open(config) as file:
        (tmp_path / "other.yaml").write_text(file.read().replace("float32", "bfloat16"))
    with pytest.raises(UserError, match="dtype is .* in these configurations"):
        run(monkeypatch, config, str(tmp_path / "other.yaml"))


def test_a_classifier_can_start_from_a_classifier(config, tmp_path, monkeypatch):
    run(monkeypatch, config)
    before = checkpoint.read(str(tmp_path / "out" / "best.pth"))
    run(monkeypatch, config, f"base_model={tmp_path}/out/best.pth", "lr=1e-9", "max_epoch=1", f"checkpoint_root={tmp_path}/second")
    after = checkpoint.read(str(tmp_path / "second" / "best.pth"))
    assert after["config"]["vocab_size"] == before["config"]["vocab_size"]
    assert torch.allclose(after["classifier"]["head"]["weight"], before["classifier"]["head"]["weight"], atol=1e-6)
    assert metrics(tmp_path / "second")["accuracy"] == metrics(tmp_path / "out")["accuracy"]


def test_reviews_tested_on_that_were_trained_on_are_counted(config, tmp_path, monkeypatch, capsys):
    """By a classifier that is started from, or one before that, and as copies where the test sets are given."""
    texts, labels, names, _ = reviews.read_reviews(str(tmp_path / "reviews.csv"))
    tested = {}
    for seed in (1337, 5, 6):
        (_, _, _, _, test), = reviews.splits(texts, labels, names, settings(seed=seed, train_percent=0.7))
        tested[seed] = set(test)
    run(monkeypatch, config, "max_epoch=1")
    for seed, base in ((1337, "out"), (5, "out5")):
        assert "warning" not in capsys.readouterr().out
        run(monkeypatch, config, f"base_model={tmp_path}/out/best.pth", f"seed={seed}", "max_epoch=1",
            f"checkpoint_root={tmp_path}/{base}x")
    both = len(tested[5] - tested[1337])
    assert f"warning: {both} of the {len(tested[5])} reviews" in capsys.readouterr().out
    run(monkeypatch, config, f"base_model={tmp_path}/out5x/best.pth", "seed=6", f"checkpoint_root={tmp_path}/out6", "--dry-run")
    both = len(tested[6] - (tested[5] & tested[1337]))
    assert f"warning: {both} of the {len(tested[6])} reviews" in capsys.readouterr().out

    with open(tmp_path / "reviews.csv", "a") as file:
        file.write(f'1,"{texts[0]}"\n')
    (tmp_path / "split.json").write_text("[[0, 1, 2, 3]]")
    run(monkeypatch, config, f"split_path={tmp_path}/split.json", "--dry-run")
    assert "warning: 1 of the 4 reviews" in capsys.readouterr().out


def test_a_base_in_checkpoint_root_is_refused_and_stays(config, tmp_path, monkeypatch):
    """The run would put its classifier in the base's place, and the same command would start from that, trained on the new test part."""
    run(monkeypatch, config, "max_epoch=1")
    for folder in ("seed1", "seed1-fold2", "mine"):
        shutil.copytree(tmp_path / "out", tmp_path / "in" / folder)
    (tmp_path / "other.yaml").write_text(open(config).read().replace("/out", "/other"))
    inside = f"checkpoint_root={tmp_path}/in"
    for base, *words in (("out", config), ("in/seed1", config, inside, "seeds=1,2"), ("in/seed1-fold2", config, inside, "folds=2"),
                         ("out", str(tmp_path / "other.yaml"), config)):
        with pytest.raises(UserError, match="lies in checkpoint_root"):
            run(monkeypatch, *words, f"base_model={tmp_path}/{base}/best.pth", "max_epoch=1")
    run(monkeypatch, config, inside, f"base_model={tmp_path}/in/mine/best.pth", "max_epoch=1")
    assert (tmp_path / "out" / "best.pth").exists() and not list(tmp_path.glob("*/before-*")) and not list(tmp_path.glob("*/*/before-*"))


def test_several_configurations_end_in_one_table_and_a_picture(config, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.yaml"
    other.write_text(open(config).read().replace("/out", "/second") + "frozen: True\nuse_mask: False\n")
    os.rename(other, other := tmp_path / "other[t].yaml")
    (tmp_path / "othert.yaml").write_text("a name that the one before would mean as a pattern")
    run(monkeypatch, str(other), str(tmp_path / "t*y.yaml"), "seeds=[1,2]", "max_epoch=1", "--table", f"{tmp_path}/made/")
    text = (tmp_path / "made" / "ablation.md").read_text()
    assert text in capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[0][:4] == ["configuration", "mask", "frozen", "accuracy"]
    assert lines[2][:3] == ["other[t]", "no", "yes"] and lines[3][:3] == ["tiny", "yes", "no"]
    assert "±" in lines[3][3]
    assert (tmp_path / "made" / "ablation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    told = metrics(tmp_path / "out")
    assert [one["seed"] for one in told["runs"]] == [1, 2]
    assert told["accuracy"] == pytest.approx(np.mean([one["test"]["accuracy"] for one in told["runs"]]))
    assert (tmp_path / "out" / "best.pth").exists() and (tmp_path / "out" / "seed2" / "best.pth").exists()


def test_without_a_validation_part_all_the_rest_is_trained_on_and_the_last_epoch_is_taken(config, tmp_path, monkeypatch):
    run(monkeypatch, config, "val_percent=0", "max_epoch=3", "ngrams=2", "patience=1")
    told = metrics(tmp_path / "out")["runs"][0]
    assert told["validation"] is None and told["epoch"] == 3 and told["test"]["reviews"] == 18
    assert checkpoint.read(str(tmp_path / "out" / "best.pth"))["progress"]["epoch"] == 3


def test_a_bpe_checkpoint_serves_as_base(config, tmp_path, monkeypatch):
    tokenizer = BPETokenizer.train(["\n".join(GOOD + BAD)] * 3, vocab_size=300)
    model = GPT(GPTConfig(vocab_size=tokenizer.size, arch="modern", block_size=48, n_layer=1, n_head=2, n_embd=16))
    path = checkpoint.save(str(tmp_path / "bpe"), 1, checkpoint.describe(model, tokenizer))
    run(monkeypatch, config, f"base_model={path}", "max_epoch=15")
    history = metrics(tmp_path / "out")["runs"][0]["history"]
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    saved = checkpoint.read(str(tmp_path / "out" / "best.pth"))
    assert saved["tokenizer"] == tokenizer.state() and saved["config"]["vocab_size"] == tokenizer.size + 2


def test_more_than_two_classes_get_a_head_of_that_size(config, tmp_path, monkeypatch):
    write_reviews(tmp_path / "two.csv", names=("差", "好"))
    with open(tmp_path / "two.csv", "a", encoding="utf-8") as file:
        file.writelines(f"中,第{i}次住，位置\n" for i in range(30))
    run(monkeypatch, config, f"sentimental_data_path={tmp_path}/two.csv", "max_epoch=1")
    told = metrics(tmp_path / "out")
    assert len(told["classes"]) == 3 and len(told["runs"][0]["test"]["confusion"]) == 3
    assert checkpoint.read(str(tmp_path / "out" / "best.pth"))["classifier"]["head"]["weight"].shape[0] == 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_reviews_are_read_in_utf8_with_or_without_mark_and_in_gb18030(encoding, tmp_path):
    path = write_reviews(tmp_path / "a.csv", 4, encoding, ("差评", "好评"))
    with open(path, "ab") as file:
        file.write("好评,\n,没有标签\n".encode(encoding.removesuffix("-sig")))
    texts, labels, names, left_out = reviews.read_reviews(path)
    assert names == ["好评", "差评"] and labels.tolist() == [1, 0, 1, 0] and left_out == 2
    assert texts[0].startswith("第0次住")


def test_reviews_in_damaged_utf8_are_not_read_as_gb18030(tmp_path):
    """Characters in pairs are valid GB18030, others than those meant."""
    (tmp_path / "cut.txt").write_bytes("房间很好\n服务不错\n房间很好".encode()[:-2])
    with pytest.raises(UserError, match="cut.txt is damaged UTF-8 .* at byte 35"):
        reviews.read_unlabelled(str(tmp_path / "cut.txt"))


def test_a_label_is_a_line_without_tabs(tmp_path):
    (tmp_path / "a.csv").write_text('label,review\n"很\n好",干净\n"坏\t了",脏\n')
    assert reviews.read_reviews(str(tmp_path / "a.csv"))[2] == ["坏 了", "很 好"]


def test_a_corpus_key_that_names_reviews_is_refused(config, monkeypatch):
    with pytest.raises(UserError, match="data_path=mine.csv .*name reviews with sentimental_data_path"):
        run(monkeypatch, config, "data_path=mine.csv")


def test_what_stands_in_texts_does_not_decide_what_stands_between_cells(tmp_path):
    for text in ("label,review\r1,好;很;好\r0,坏\r", 'label,review,"a;b;c;d"\n1,好;很;好,x\n0,坏,y\n'):
        (tmp_path / "a.csv").write_text(text, newline="")
        assert reviews.read_reviews(str(tmp_path / "a.csv"))[0] == ["好;很;好", "坏"]


@pytest.mark.parametrize("delimiter, encoding", [(";", "utf-8-sig"), ("\t", "utf-16")])
def test_tables_as_other_programs_write_them_are_read(tmp_path, delimiter, encoding):
    lines = [("Label", "review"), ("1", "好，很好, 真的"), ("0", '"坏; 很坏"')]
    (tmp_path / "a.csv").write_text("\r\n".join(map(delimiter.join, lines)), encoding=encoding)
    assert reviews.read_reviews(str(tmp_path / "a.csv"))[0] == ["好，很好, 真的", "坏; 很坏"]


def test_blank_lines_of_a_table_are_no_rows_and_line_ends_in_cells_are_newlines(tmp_path):
    (tmp_path / "a.csv").write_text('label,review\r\n\r\n1,"好\r\n很好"\r\n\r\n0,\r\n,坏\r\n', newline="")
    assert reviews.read_unlabelled(str(tmp_path / "a.csv")) == ["好\n很好", "", "坏"]


def test_a_tsv_of_one_column_has_tabs_between_cells(tmp_path):
    (tmp_path / "a.tsv").write_text("review\ngood, cheap\nbad; dirty\n")
    assert reviews.read_unlabelled(str(tmp_path / "a.tsv")) == ["good, cheap", "bad; dirty"]


def test_a_space_before_a_quote_is_none_of_the_text(tmp_path):
    (tmp_path / "a.csv").write_text('label, review\n1, "好, 很好"\n0, 坏\n', encoding="utf-8")
    assert reviews.read_reviews(str(tmp_path / "a.csv"))[0] == ["好, 很好", "坏"]


def test_predicting_says_what_is_missing_and_takes_a_run_s_folder(config, tmp_path, monkeypatch, capsys):
    run(monkeypatch, config, "max_epoch=1")
    run(monkeypatch, str(tmp_path / "out"), "--predict-text", "很好")
    assert capsys.readouterr().out.count("\t") == 1
    with pytest.raises(UserError, match=r"none.csv does not exist$"):
        run(monkeypatch, str(tmp_path / "out"), "--predict", str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match="resume_from=a.pth is not used in predicting: name the classifier"):
        run(monkeypatch, config, "resume_from=a.pth", "--predict-text", "很好")
    os.rename(tmp_path / "out", tmp_path / "lr=1e-2")
    monkeypatch.chdir(tmp_path)  # where lr=1e-2 is a folder too
    run(monkeypatch, "lr=1e-2/best.pth", "lr=1e-2", "--predict-text", "很好")
    assert capsys.readouterr().out.count("\t") == 1


def test_reviews_in_json_are_refused_by_name(config, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"label": 1, "review": "好"}\n')
    with pytest.raises(UserError, match="a.jsonl is no table: save it as .csv, with label,review as its first line"):
        run(monkeypatch, config, f"sentimental_data_path={tmp_path}/a.jsonl")
    with pytest.raises(UserError, match="with review as its first line"):
        reviews.read_unlabelled(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("content, says", [
    ("review,mark\n好,1\n", "no column 'label'"),
    ("", "is empty"),
    ("label,review\n", "holds no review"),
    ("label,review\n1,\n", "holds no review"),
    ("label,review\n1,好\n1,很好\n", "all 2 reviews have the label '1'"),
    ("label,review\n" + "".join(f"{i},好{i}\n" for i in range(200)), "200 different values"),
    ("label,review\n1,好\n0,坏\n", "no review of class"),
    ("label,review\n" + "".join(f"{i % 2},好{i}\n" for i in range(9)), "train_batch=8 is more than the"),
    (b"label,review\n1,\xff\xff\xff\n", r"not UTF-8 \(byte 15\) nor GB18030 \(byte 15\)"),
    (b"\xff\xfel\0a\0b\0e\0l", r"not UTF-16 \(byte 10\)"),
    ("label,review\n" + "1,一样\n0,一样\n" * 20, "no review of class '0' \\(1 different ones in all\\)"),
    ("label,review\n1,good room, bad food\n0,坏\n", "line 2: more fields"),
    ("label|review\n1|good room, bad food\n0|坏\n", "no column 'label'.*with commas between"),
    (b"PK\3\4xl", "is an Excel workbook"),
    ('label,review\n1,"好\n0,"坏"\n', "line 3: ',' expected.*inside quotes a .* must be doubled"),
    ('label,review\n0,坏\n1,"好\n', 'line 3: unexpected end of data; a quotation mark " is not closed'),
])
def test_reviews_that_are_no_good_end_in_one_line_that_says_so(content, says, config, tmp_path, monkeypatch):
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says) as error:
        run(monkeypatch, config, f"sentimental_data_path={path}")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_base_or_a_checkpoint_without_a_classifier_says_what_to_do(config, base, monkeypatch):
    with pytest.raises(UserError, match="base_model is not set"):
        run(monkeypatch, config, "base_model=")
    with pytest.raises(UserError, match="cpt1.pth is a checkpoint; to classify with it: --predict FILE"):
        run(monkeypatch, base)
    with pytest.raises(UserError, match="is no classifier"):
        run(monkeypatch, base, "--predict-text", "好")


def test_labels_that_look_alike_are_told_of(config, tmp_path, monkeypatch, capsys):
    text = (tmp_path / "reviews.csv").read_text()
    run(monkeypatch, config, "--dry-run")
    assert "look alike" not in capsys.readouterr().out
    (tmp_path / "reviews.csv").write_text(text + "".join(f"0.0,别的{i}\n" for i in range(20)))
    run(monkeypatch, config, "--dry-run")
    assert "look alike, but are classes of their own" in capsys.readouterr().out


def test_a_classifier_whose_attention_was_not_causal_is_refused(config, tmp_path, monkeypatch):
    run(monkeypatch, config, "max_epoch=1")
    content = torch.load(tmp_path / "out" / "best.pth")
    content["classifier"]["causal"] = False
    torch.save(content, tmp_path / "older.pth")
    with pytest.raises(UserError, match="older.pth was trained with causal=False"):
        run(monkeypatch, str(tmp_path / "older.pth"), "--predict-text", "好")


def test_a_dry_run_describes_and_writes_nothing(config, tmp_path, monkeypatch, capsys):
    run(monkeypatch, config, "--dry-run")
    told = capsys.readouterr().out
    assert all(word in told for word in ("parameters", "filling", "memory", "TFLOP"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("frozen", [True, False])
def test_the_memory_told_holds_the_activations_of_whole_rows_and_of_frozen_blocks(frozen, config, monkeypatch, capsys):
    """Through frozen blocks a gradient goes to the new embeddings; without the mask every row is as wide as block_size."""
    monkeypatch.setattr(GPT, "kept_bytes", lambda *_: 2**30)
    run(monkeypatch, config, "use_mask=False", f"frozen={frozen}", "--dry-run")
    assert f"up to {4 * 48}.00 GiB of activations" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sentimental", "sentimental1", "sentimental2", "sentimental3", "demoSentimental", "cpuSentimental"])
def test_the_shipped_configurations_are_what_their_names_say(name):
    made = settings_module.build(SentimentSettings, settings_module.read_yaml(os.path.join(ROOT, "config", f"{name}.yaml")))
    expected = dict(sentimental=(True, False), sentimental1=(True, True), sentimental2=(False, False), sentimental3=(False, True))
    assert (made.use_mask, made.frozen) == expected.get(name, (True, False))


def test_one_and_two_processes_give_the_same_figures(config, tmp_path, monkeypatch):
    values = ["max_epoch=2", "dropout=0.2", "train_batch=6", "ngrams=2"]
    run(monkeypatch, config, f"checkpoint_root={tmp_path}/p1", *values)
    two_processes = start(config, f"checkpoint_root={tmp_path}/p2", *values, script=SCRIPT, torchrun=["--nproc_per_node=2"], **THREAD)
    status, output = finish(two_processes)
    assert status == 0, output
    one, two = (metrics(tmp_path / f"p{processes}")["runs"][0] for processes in (1, 2))
    assert one["test"]["confusion"] == two["test"]["confusion"] and one["epoch"] == two["epoch"]
    for a, b in zip(one["history"], two["history"]):
        assert a == pytest.approx(b, rel=1e-4)
    first, second = (checkpoint.read(str(tmp_path / f"p{processes}" / "best.pth"))["model"] for processes in (1, 2))
    assert max((first[name] - second[name]).abs().max() for name in first) < 1e-4
