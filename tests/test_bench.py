import argparse
import itertools
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import checkpoint
import data
import runtime as rt
from runs import ROOT, write_corpus
from settings import UserError
from test_chat import make, talk
from tokenizer import SEP


@pytest.fixture(autouse=True)
def bench_is_importable(monkeypatch):
    monkeypatch.syspath_prepend(os.path.join(ROOT, "bench"))


def lines(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def in_memory(*dialogues):
    documents = data.Documents.__new__(data.Documents)
    documents.ids = np.array(sum(([*ids, 2] for ids in dialogues), []), dtype=np.uint16)
    ends = np.cumsum([len(ids) + 1 for ids in dialogues])
    documents.spans = np.stack([np.append(0, ends[:-1]), ends], axis=1)
    return documents


def test_a_score_counts_each_token_of_each_dialogue_once_whatever_the_batches():
    import common
    documents = in_memory([5, 6, 7], [8], list(range(10, 40)))
    seen = []

    def nats(inputs, targets):
        seen.extend(targets[targets != data.IGNORE].tolist())
        return (targets != data.IGNORE).sum() * 1.5

    for tokens in (8, 10000):
        seen.clear()
        assert common.score(nats, documents, 64, torch.device("cpu"), tokens) == 1.5
        assert sorted(seen) == sorted([6, 7, 2, 2, *range(11, 40), 2])


def test_our_loss_of_a_packed_row_is_the_shared_score():
    import common

    from model import GPT, GPTConfig
    documents = in_memory(*[[3 + (i * j) % 20 for j in range(1 + i % 9)] for i in range(30)])
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=24, arch="modern", n_layer=2, n_head=2, n_embd=16, block_size=32)).eval()
    torch.nn.init.normal_(model.head.weight)
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.out.weight)
    rows = data.Epoch(documents, 32, 0, 0)
    inputs, targets, numbers = map(torch.from_numpy, rows.batch(0, len(rows)))
    with torch.no_grad():
        packed = model.loss(inputs, targets, numbers).item() / rows.real_targets(0, len(rows))
    assert common.score(model.loss, documents, 32, torch.device("cpu")) == pytest.approx(packed, rel=1e-5)


def test_nanogpts_way_draws_from_the_training_part_alone():
    import common
    import peers
    settings = common.settings_module.build(common.TrainSettings, dict(n_layer=1, n_head=2, n_embd=16, block_size=8, device="cpu"))
    documents = in_memory(list(range(10, 30)), [40] * 90)
    documents.spans = documents.spans[:1]
    (inputs, targets), count = next(peers.nanogpt(settings, documents, 64, rt.start(settings), compile=False).batches)
    assert set(inputs.flat) <= set(range(10, 30)) and set(targets.flat) <= {2, *range(10, 30)} and count == targets.size


def test_the_original_recipe_trains_on_pads_and_goes_on_with_the_batch_that_comes_next():
    import common
    import original
    settings = common.settings_module.build(common.TrainSettings, dict(n_layer=1, n_head=2, n_embd=16, block_size=8, device="cpu"))
    runtime = rt.start(settings)
    make = lambda: original.contender(settings, in_memory([5, 6, 7], list(range(10, 30))), 32, runtime, batch=2)
    run = make()
    (inputs, targets), count = next(run.batches)
    short = inputs[:, 0] == 5
    assert inputs[short].tolist() == [[5, 6, 7, 2, 2, 2, 2, 2]] and targets[short].tolist() == [[6, 7, 2, 2, 2, 2, 2, 2]]
    assert targets[~short].tolist() == [[*range(11, 18), 2]] and count == 3 + 8
    run.train(0.05)
    again = make()
    next(again.batches)  # as for `run` above
    again.load(run.state())
    assert again.steps == run.steps > 0
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), again.model.parameters()))
    for (mine, _), (theirs, _) in zip(itertools.islice(run.batches, 5), again.batches):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs))


def test_our_step_takes_the_rows_that_train_py_takes():
    import common
    keys = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, train_batch=4, chain=1.0, device="cpu")
    settings = common.settings_module.build(common.TrainSettings, keys)
    documents = in_memory(*[[5, 6, 7, 8]] * 40)
    arrays, count = next(common.ours(settings, documents, 32, rt.start(settings)).batches)
    epoch = data.Epoch(documents, 16, settings.seed, 0, settings.chain)
    assert count == epoch.real_targets(0, 4) and all(map(np.array_equal, arrays, epoch.batch(0, 4)))


def test_replies_are_measured_as_chat_makes_them():
    """Letters, which no_repeat_ngram leaves alone in chat.py, were not to repeat here."""
    import chat_quality
    conversation = make("gpt2", silent=True, temperature=0, no_repeat_ngram=1, max_new_tokens=20)
    prompt = [*conversation.tokenizer.encode("你好").tolist(), SEP]
    replies = chat_quality.reply(conversation.model, conversation.tokenizer, [prompt], conversation.settings, 1)
    assert replies == [talk(conversation, "你好")]


def test_decoding_on_another_device_leaves_out_what_only_a_cpu_does():
    import decode
    options = argparse.Namespace(shape="7M", arch="gpt2", context=[16], tokens=4, device="meta")
    assert [way for way in ("original", "bfloat16", "int8", "int4") if decode.prepare(way, options)] == ["original", "bfloat16"]


def test_a_missing_file_ends_a_benchmark_in_one_line():
    pytest.importorskip("sklearn")
    done = subprocess.run([sys.executable, "bench/linear.py", "none.csv"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: none.csv does not exist") and done.stderr.count("\n") == 1


def test_as_many_rows_are_scored_with_fewer_bits_as_were_asked_for(tmp_path, monkeypatch):
    import common
    import quantized_loss

    from model import GPT, GPTConfig
    write_corpus(tmp_path / "corpus.txt")
    keys = dict(data_path=str(tmp_path / "corpus.txt"), train_percent=0.5)
    _, held_out, tokenizer = common.open_store(common.settings_module.build(common.TrainSettings, keys))
    model = GPT(GPTConfig(tokenizer.size, block_size=32, n_layer=1, n_head=2, n_embd=32))
    checkpoint.write(str(tmp_path / "a.pth"), checkpoint.describe(model, tokenizer) | dict(settings=keys))
    monkeypatch.setattr(sys, "argv", ["quantized_loss.py", str(tmp_path / "a.pth"), "--rows", "9"])
    counts = []
    monkeypatch.setattr(common, "record", lambda path, name, tokens, **values: counts.append(tokens))
    quantized_loss.main()
    assert counts == [data.Epoch(held_out, 32, 0, 0).real_targets(0, 9)] * 4


def test_a_baseline_whose_loss_rose_again_is_measured_by_its_best(tmp_path, capsys):
    import time_to_loss
    run = dict(mode="eager", steps=10, loss=3.5, all_in=5.0, start=1.0, training=4.0)
    options = argparse.Namespace(against="original", targets=[], png=str(tmp_path / "curves.png"))
    time_to_loss.report(options, [(10.0, 5.0), (20.0, 3.6), (30.0, 4.0)], [run])
    told = capsys.readouterr().out
    assert "validation loss 3.6000 in 20 s" in told and "all_in: 5.0 s, 4.0 times less" in told


@pytest.mark.soak
def test_every_benchmark_runs_in_smoke_mode(tmp_path, capsys):
    import original
    import prepare
    import throughput
    import time_to_loss
    results = str(tmp_path / "results.jsonl")
    options = ["--smoke", "--results", results]
    original.main(options)
    throughput.main([*options, "--only", "ours_eager,original,nanogpt_eager"])
    prepare.main(options)
    state = ["--state", str(tmp_path / "baseline.pth"), "--png", str(tmp_path / "curves.png")]
    with pytest.raises(UserError, match="nothing has run"):
        time_to_loss.main([*options, *state, "--report"])
    for _ in range(2):  # the second call finds all done
        time_to_loss.main([*options, *state])
    with pytest.raises(UserError, match=r"another run's \(baseline=.*'lr': 0.0003"):
        time_to_loss.main([*options, *state, "--lr", "0.5"])
    found = lines(results)
    assert [line["name"] for line in found if line["bench"] == "throughput"] == ["ours_eager", "original", "nanogpt_eager"]
    assert {line["way"] for line in found if line["bench"] == "prepare"} == {"ours", "original"}
    (run,) = [line for line in found if line["bench"] == "time_to_loss"]
    assert run["steps"] == 10 and 0 < run["training"] < run["all_in"] and 2 < run["loss"] < 10
    assert os.path.getsize(tmp_path / "curves.png") > 1000 and "real tokens/s" in capsys.readouterr().out


def test_the_rate_that_mfu_is_of_comes_of_more_than_the_first_product():
    """One product of 256, slowed by another program, once stood for the machine: MFU was 6000 %."""
    slow_first = iter([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])

    class Slow(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), others=None):
            if function is torch.Tensor.matmul or function is torch.Tensor.__matmul__:
                time.sleep(next(slow_first, 0.0))
            return function(*arguments, **(others or {}))
    with Slow():
        rate = rt.matmul_rate(torch.device("cpu"), torch.float32, size=256, seconds=0.2)
    assert rate > 2 * 256 ** 3 / 0.5
