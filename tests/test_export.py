import json
import os
import subprocess
import sys
import urllib.request

import pytest
import torch
import transformers
import xllamacpp

import checkpoint
import export
from chat import Conversation
from model import GPT, GPTConfig, Sampling, extended, generate
from runs import write_corpus
from settings import ChatSettings, UserError
from tokenizer import PAD, SEP, BPETokenizer, CharTokenizer

TEXT = "abc 你好，<sep>\nj😀 ij\n\tgef"


def write_checkpoint(folder, kind, **shape):
    """The path of a checkpoint with random weights, also where training would begin with 0 or 1."""
    corpus = os.path.join(folder, "corpus.txt")
    write_corpus(corpus)
    with open(corpus) as file:
        ours = BPETokenizer.train([file.read()], 300) if kind == "bpe" else CharTokenizer.train([file.read()])
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=ours.size, block_size=48, n_layer=2, n_head=4, n_embd=64, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    path = os.path.join(folder, "random.pth")
    checkpoint.write(path, checkpoint.describe(model, ours) | dict(settings={}, metrics={}, progress={}))
    return path


every_kind = pytest.mark.parametrize(("kind", "shape"), [
    ("char", dict(arch="modern")), ("bpe", dict(arch="modern", tied=True, n_kv_head=2)), ("char", dict(arch="gpt2")),
    ("bpe", dict(arch="gpt2", tied=False, bias=False, n_kv_head=2)),
])


@every_kind
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
    said = ("system", "x"), ("user", "abc\r\nj\n"), ("assistant", None), ("tool", "x"), ("assistant", "gef"), ("user", " ij")
    turns = [dict(role=role, content=content) for role, content in said]
    for content in ("abc\r\nj\n", "gef", "ij"):
        chat.hear(content)
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


@every_kind
def test_a_folder_that_transformers_trained_and_saved_becomes_a_checkpoint_again(tmp_path, monkeypatch, capsys, kind, shape):
    path, folder, back = write_checkpoint(tmp_path, kind, **shape), str(tmp_path / "exported"), str(tmp_path / "new" / "back.pth")
    export.export(path, folder)
    theirs, coder = transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "embed_tokens" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
            else:
                parameter.mul_(0.8)  # as by weight decay
    theirs.save_pretrained(folder + "-trained")
    expected = coder(TEXT)["input_ids"]
    coder([TEXT], padding=True, truncation=True, max_length=8)  # leaves its traces in what is saved
    coder.save_pretrained(folder + "-trained")
    monkeypatch.setattr(sys, "argv", ["export.py", folder + "-trained", back])
    export.main()
    assert capsys.readouterr().err.count("differ in size") == 0
    if shape["arch"] == "gpt2" and shape.get("tied", True):  # transformers 4 leaves it out
        with open(folder + "-trained/config.json") as file:
            config = json.load(file)
        with open(folder + "-trained/config.json", "w") as file:
            json.dump({key: value for key, value in config.items() if key != "tie_word_embeddings"}, file)
        os.unlink(back)
        export.main()
    model, ours, _ = checkpoint.load_model(back)
    assert ours.encode(TEXT).tolist() == expected and ours.pieces == checkpoint.load_model(path)[1].pieces
    ids = torch.randint(3, ours.size, (2, 48))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model.hidden(ids)), theirs.eval()(ids).logits, atol=2e-4, rtol=1e-4)
    with pytest.raises(UserError, match="exists; name a new one"):
        export.main()


def test_what_a_checkpoint_cannot_hold_of_a_folder_is_said_in_one_line(tmp_path, capsys):
    path, folder = write_checkpoint(tmp_path, "char", arch="modern"), tmp_path / "exported"
    export.export(path, str(folder))
    with pytest.raises(UserError, match="is a folder: of Hugging Face's files name a new file NAME.pth"):
        export.export(str(folder), str(tmp_path / "back.gguf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        theirs.model.embed_tokens.weight[5] *= 1.2
    theirs.save_pretrained(folder)
    export.export(str(folder), str(tmp_path / "back.pth"))
    assert "differ in size by up to 20%" in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    for change, message in ((dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)), "rope_parameters is"),
                            (dict(model_type="llama"), "KeyError"), (dict(vocab_size=7), "vocab_size is 7")):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=f"no folder that export.py wrote, or not whole.*{message}"):
            export.export(str(folder), str(tmp_path / "other.pth"))
    assert not (tmp_path / "other.pth").exists()


@every_kind
def test_llama_cpp_computes_and_writes_what_we_do_from_a_gguf_file(tmp_path, monkeypatch, kind, shape):
    path, target = write_checkpoint(tmp_path, kind, **shape), str(tmp_path / "new" / "random.gguf")
    monkeypatch.setattr(sys, "argv", ["export.py", path, target])
    export.main()
    model, ours, _ = checkpoint.load_model(path)
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_parallel, parameters.cpuparams.n_threads, parameters.verbosity = target, 1, 1, 0
    server = xllamacpp.Server(parameters)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(place, **body):
        body = json.dumps(body).encode() if body else None
        request = urllib.request.Request(server.listening_address + place, body, {"Content-Type": "application/json"})
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)

    sampling = ask("/props")["default_generation_settings"]["params"]
    assert (sampling["top_k"], sampling["min_p"]) == (0, 0) and sampling["top_p"] == pytest.approx(ChatSettings.top_p)
    text = "abc  <j>\n😀 ij\n\n gef "
    coded = ask("/tokenize", content=text)["tokens"]
    assert coded == ours.encode(text).tolist()
    assert ask("/detokenize", tokens=coded)["content"] == ours.decode(coded).replace("\ufffd", "<unk>")
    prompt = ours.encode("abc\nj\n").tolist()
    told = ask("/completion", prompt=prompt, n_predict=16, temperature=0, n_probs=5, return_tokens=True, logit_bias=[[0, False]])
    if kind == "char":  # bytes that are no whole character yet are left out of its probabilities
        with torch.no_grad():
            expected = model.logits(model.hidden(torch.tensor([prompt])))[0, -1].log_softmax(dim=-1)
        likeliest = {one["id"]: one["logprob"] for one in told["completion_probabilities"][0]["top_logprobs"]}
        assert likeliest == pytest.approx({i: expected[i].item() for i in likeliest}, abs=0.02)
    sampling = Sampling(temperature=0, max_new_tokens=16)
    assert told["tokens"] == [int(row) for row in generate(model, [prompt], sampling, (SEP, PAD))]
    chat = Conversation(model, ours, ChatSettings(max_new_tokens=8, resume_from=path), print)
    said = ("system", "x"), ("developer", "x"), ("user", "abc\r\nj\n"), ("assistant", "gef"), ("user", " ij")
    for content in ("abc\r\nj\n", "gef", "ij"):
        chat.hear(content)
    prompt = ask("/apply-template", messages=[dict(role=role, content=content) for role, content in said])["prompt"]
    assert ask("/tokenize", content=prompt, add_special=True)["tokens"] == chat.context()
    with pytest.raises(UserError, match="exists"):
        export.main()


def test_an_exported_classifier_has_no_more_ids_than_its_tokenizer_and_no_head(tmp_path, capsys):
    path = write_checkpoint(tmp_path, "char", arch="modern")
    model, ours, meta = checkpoint.load_model(path)
    content = checkpoint.describe(extended(model, 2, 0.0, like=SEP), ours)
    checkpoint.write(path, content | dict(settings={}, metrics={}, progress={}, classifier={}))
    export.export(path, str(tmp_path / "out"))
    assert "out (without the head of the classifier): load it" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert theirs.config.vocab_size == ours.size == len(transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out")))


@pytest.mark.parametrize("name", ["out.gguf", "out", "back.pth"])
def test_a_full_disk_leaves_nothing_of_an_export_and_one_line(tmp_path, name):
    path, target = write_checkpoint(tmp_path, "char", arch="modern"), tmp_path / name
    if name == "back.pth":
        export.export(path, str(tmp_path / "exported"))
        path = tmp_path / "exported"
    before = os.listdir(tmp_path)
    command = f"ulimit -f 64; exec {sys.executable} {export.__file__} {path} {target}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {target} cannot be written") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == before


@pytest.mark.parametrize(("name", "package"), [("out", "safetensors"), ("out.gguf", "gguf")])
def test_a_package_that_is_missing_is_named_and_no_folder_made(tmp_path, monkeypatch, name, package):
    path = write_checkpoint(tmp_path, "char", arch="modern")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs {package}: python -m pip install {package}"):
        export.export(path, str(tmp_path / "new" / name))
    assert sorted(os.listdir(tmp_path)) == ["corpus.txt", "random.pth"]


def test_bpe_without_merges_which_llama_cpp_refuses_is_said_and_nothing_written(tmp_path):
    ours = BPETokenizer.train(["a"], 259)
    model = GPT(GPTConfig(vocab_size=ours.size, arch="modern", n_layer=1, n_head=1, n_embd=8))
    path = str(tmp_path / "bytes.pth")
    checkpoint.write(path, checkpoint.describe(model, ours) | dict(settings={}, metrics={}, progress={}))
    with pytest.raises(UserError, match="without merges"):
        export.export(path, str(tmp_path / "bytes.gguf"))
    assert os.listdir(tmp_path) == ["bytes.pth"]


def test_export_writes_into_no_folder_that_holds_something(tmp_path):
    path = write_checkpoint(tmp_path, "char", arch="modern")
    with pytest.raises(UserError, match="exists; name a new one"):
        export.export(path, str(tmp_path))
    with pytest.raises(UserError, match="would be a folder"):
        export.export(path, str(tmp_path / "model.onnx"))
    assert sorted(os.listdir(tmp_path)) == ["corpus.txt", "random.pth"]

