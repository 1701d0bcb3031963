import os
import sys

import pytest
import torch
import transformers

import checkpoint
import export
import tokenizer
from chat import Conversation
from model import GPT, GPTConfig, Sampling, extended, generate
from runs import write_corpus
from settings import ChatSettings, UserError
from tokenizer import PAD, SEP

TEXT = "abc 你好，<sep>\nj😀 ij\n\tgef"


def write_checkpoint(folder, kind, **shape):
    """The path of a checkpoint with random weights, also where training would begin with 0 or 1."""
    corpus = os.path.join(folder, "corpus.txt")
    write_corpus(corpus)
    with open(corpus) as file:
        ours = tokenizer.train(kind, [file.read()], 300 if kind == "bpe" else None)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=ours.size, block_size=48, n_layer=2, n_head=4, n_embd=64, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    path = os.path.join(folder, "random.pth")
    checkpoint.write(path, checkpoint.describe(model, ours) | dict(settings={}, metrics={}, progress={}))
    return path


@pytest.mark.parametrize(("kind", "shape"), [
    ("char", dict(arch="modern")), ("bpe", dict(arch="modern", tied=True, n_kv_head=2)), ("char", dict(arch="gpt2")),
    ("bpe", dict(arch="gpt2", tied=False, bias=False, n_kv_head=2)),
])
def test_transformers_computes_and_writes_what_we_do_from_an_exported_folder(tmp_path, monkeypatch, kind, shape):
    path = write_checkpoint(tmp_path, kind, **shape)
    folder = str(tmp_path / "exported")
    monkeypatch.setattr(sys, "argv", ["export.py", path, folder])
    export.main()
    model, ours, _ = checkpoint.load_model(path)
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if shape["arch"] == "modern" else "GPT2LMHeadModel")
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(3, ours.size, (2, 48))
    with torch.no_grad():
        expected = model.logits(model.hidden(ids))
        torch.testing.assert_close(theirs.eval()(ids).logits, expected, atol=2e-4, rtol=1e-4)
    assert expected.std() > 0.5  # logits that could be told apart

    coder = transformers.AutoTokenizer.from_pretrained(folder)
    coded = coder(TEXT)["input_ids"]
    assert coded == ours.encode(TEXT).tolist()
    assert coder.decode(coded) == ours.decode(coded).replace("\ufffd", "<unk>")
    chat = Conversation(model, ours, ChatSettings(max_new_tokens=8, resume_from=path), print)
    said = ("system", "x"), ("user", "abc\r\nj\n"), ("assistant", "gef"), ("user", "ij")
    turns = [dict(role=role, content=content) for role, content in said]
    for turn in turns[1:]:
        chat.hear(turn["content"])
    prompt = coder.apply_chat_template(turns, return_tensors="pt", return_dict=True)
    assert prompt["input_ids"][0].tolist() == chat.context()

    def greedy(ids):
        sampling = Sampling(temperature=0, min_new_tokens=1, max_new_tokens=16)
        return [int(row) for row in generate(model, [ids], sampling, (SEP, PAD))]

    written = theirs.generate(**prompt, do_sample=False, max_new_tokens=16)[0, prompt["input_ids"].shape[1]:].tolist()
    assert written == greedy(chat.context())
    batch = coder(["abc\n", "gef ij\n", "<pad>j\n"], padding=True, return_tensors="pt")  # "<pad>" typed is five characters
    together = theirs.generate(**batch, do_sample=False, max_new_tokens=16)[:, batch["input_ids"].shape[1]:].tolist()
    for text, said in zip(["abc\n", "gef ij\n", "<pad>j\n"], together):
        alone = greedy(ours.encode(text).tolist())
        assert said[:len(alone)] == alone and set(said[len(alone):]) <= {PAD}


def test_an_exported_classifier_has_no_more_ids_than_its_tokenizer(tmp_path):
    path = write_checkpoint(tmp_path, "char", arch="modern")
    model, ours, meta = checkpoint.load_model(path)
    checkpoint.write(path, checkpoint.describe(extended(model, 2, 0.0, like=SEP), ours) | dict(settings={}, metrics={}, progress={}))
    export.export(path, str(tmp_path / "out"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert theirs.config.vocab_size == ours.size == len(transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out")))


def test_export_writes_into_no_folder_that_holds_something(tmp_path):
    path = write_checkpoint(tmp_path, "char", arch="modern")
    with pytest.raises(UserError, match="not empty"):
        export.export(path, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["corpus.txt", "random.pth"]

