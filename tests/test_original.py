"""The original's configurations, checkpoints and resume files work here."""

import glob
import os
import random
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import train
from model import Sampling, generate
from optim import make_optimizers
from runs import ROOT
from settings import ChatSettings, SentimentSettings, TrainSettings, UserError, build, read_yaml
from tokenizer import PAD, SPECIALS

CONFIGS = sorted(glob.glob(os.path.join(ROOT, "tests", "original_configs", "*.yaml")))
TEXT = "你好\n你好呀\n\n今天天气真好\n出去走走吧\n好呀\n\n吃了吗\n吃了\n吃的什么\n面\n\n晚安 abc\n"


class Reference(nn.Module):
    """The original's model, from the facts known of it, with its parameter names; forward gives logits (B, T, V)."""

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, bias):
        super().__init__()
        self.n_head = n_head
        linear = lambda a, b: nn.Linear(a, b, bias=bias)

        def block():
            inner = nn.Module()
            inner.register_buffer("mask", torch.ones(block_size, block_size).tril()[None])
            attention = nn.ModuleDict(dict(attention=inner, **{name: linear(n_embd, n_embd) for name in ("W_q", "W_k", "W_v", "out_net")}))
            ffn = nn.ModuleDict(dict(dense1=linear(n_embd, 4 * n_embd), out_net=linear(4 * n_embd, n_embd)))
            return nn.ModuleDict(dict(ln1=nn.LayerNorm(n_embd, bias=bias), ln2=nn.LayerNorm(n_embd, bias=bias),
                                      attention=attention, ffn=ffn))

        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(vocab_size, n_embd), wpe=nn.Embedding(block_size, n_embd),
            h=nn.ModuleList(block() for _ in range(n_layer)), ln_f=nn.LayerNorm(n_embd, bias=bias)))
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)  # nothing at 0 or 1: a swapped or forgotten tensor shows
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, ids):
        B, T = ids.shape
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[:T]
        split = lambda y: y.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        for block in self.transformer.h:
            a, y = block.attention, block.ln1(x)
            y = F.scaled_dot_product_attention(split(a.W_q(y)), split(a.W_k(y)), split(a.W_v(y)), is_causal=True)
            x = x + a.out_net(y.transpose(1, 2).reshape(B, T, -1))
            x = x + block.ffn.out_net(F.gelu(block.ffn.dense1(block.ln2(x))))
        return self.lm_head(self.transformer.ln_f(x))

    def optimizer(self):
        named = list(self.parameters())
        groups = [dict(params=[p for p in named if p.dim() >= 2], weight_decay=0.1),
                  dict(params=[p for p in named if p.dim() < 2], weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def vocabulary(text):
    counts = {}
    for character in text.replace("\n", ""):
        counts[character] = counts.get(character, 0) + 1
    return [*SPECIALS, *sorted(counts, key=lambda c: -counts[c])]  # a stable sort: ties by first appearance


def write_original(folder, bias=True, prefix="", text=TEXT, steps=0):
    """(path, corpus, reference, its optimizer): a file as the original writes it, after some training steps."""
    torch.manual_seed(1)
    shape = dict(block_size=16, vocab_size=len(vocabulary(text)), n_layer=2, n_head=2, n_embd=16, bias=bias)
    reference = Reference(**shape)
    optimizer = reference.optimizer()
    for step in range(steps):
        train_reference(reference, optimizer, step)
    corpus, path = folder / "corpus.txt", folder / "cpt7.pth"
    corpus.write_text(text, encoding="utf-8")
    content = dict(global_step=7, global_epoch=0, dataset="data/train.txt", optimizer=optimizer.state_dict(), **shape,
                   state_dict={prefix + name: tensor for name, tensor in reference.state_dict().items()})
    torch.save(content, path)
    return str(path), str(corpus), reference, optimizer


def train_reference(reference, optimizer, step):
    ids = torch.randint(3, reference.lm_head.out_features, (4, 9), generator=torch.Generator().manual_seed(step))
    F.cross_entropy(reference(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@torch.no_grad()
def test_logits_and_greedy_tokens_are_the_originals(tmp_path, bias, prefix):
    path, corpus, reference, _ = write_original(tmp_path, bias, prefix)
    model, tokenizer, meta = checkpoint.load_model(path, corpus=corpus)
    assert [*SPECIALS, *tokenizer.vocabulary] == vocabulary(TEXT)
    assert meta["progress"]["step"] == 7 and model.config.bias == bias
    ids = torch.tensor([tokenizer.encode("今天天气真好\n出去").tolist()])
    logits, expected = model.logits(model.hidden(ids)), reference(ids)
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits.logsumexp(-1), expected.logsumexp(-1), atol=1e-4, rtol=0)
    greedy, wanted = ids[:, :3], ids[:, :3]
    for _ in range(13):
        wanted = torch.cat([wanted, reference(wanted)[:, -1:].argmax(-1)], dim=1)
    found = torch.stack(list(generate(model, greedy.tolist(), Sampling(temperature=0, max_new_tokens=13, banned=()))), dim=1)
    assert found.tolist() == wanted[:, 3:].tolist()


def test_vocabulary_follows_frequency_then_first_appearance_over_the_whole_file_with_any_line_end(tmp_path):
    text = "乙甲 甲\n\n丙丁\t\n\n丁x" * 3
    expected = vocabulary(text)
    for number, data in enumerate((text, text.replace("\n", "\r\n"), "\ufeff" + text)):
        corpus = tmp_path / f"{number}.txt"
        corpus.write_bytes(data.encode())
        found = checkpoint.original_vocabulary(str(corpus), len(expected), "x.pth")
        assert [*SPECIALS, *found.vocabulary] == expected
    with_mark = checkpoint.original_vocabulary(str(corpus), len(expected) + 1, "x.pth")
    assert "\ufeff" in with_mark.vocabulary  # a corpus with a byte-order mark: the original counted it


def test_without_its_corpus_the_file_is_refused_with_the_way_out(tmp_path):
    path, _, _, _ = write_original(tmp_path)
    with pytest.raises(UserError, match="convert .*data_path="):
        checkpoint.load_model(path)
    with pytest.raises(UserError, match="no.txt cannot be read: No such file"):
        checkpoint.load_model(path, corpus=str(tmp_path / "no.txt"))


def test_a_corpus_with_another_vocabulary_size_is_refused(tmp_path):
    path, corpus, _, _ = write_original(tmp_path)
    (tmp_path / "other.txt").write_text(TEXT + "新", encoding="utf-8")
    size = len(vocabulary(TEXT))
    with pytest.raises(UserError, match=f"vocabulary of {size + 1}, the file has {size}"):
        checkpoint.load_model(path, corpus=str(tmp_path / "other.txt"))


def test_a_corpus_with_as_many_but_other_characters_is_refused_when_the_model_has_learned(tmp_path, capsys):
    letters = "".join(chr(ord("一") + i) for i in range(40))
    lines = ["".join(letters[(start + i) % 40] for i in range(8)) for start in range(0, 120, 3)]  # the next character follows
    other = [random.Random(number).sample(letters, 40) for number in range(8)]  # any character follows
    text = "\n\n".join(lines)
    path, corpus, reference, _ = write_original(tmp_path, text=text)
    checkpoint.load_model(path, corpus=corpus)
    assert "learned too little to tell" in capsys.readouterr().err
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01)
    ids = torch.tensor([[vocabulary(text).index(c) for c in line] + [PAD] for line in lines])
    for _ in range(100):
        F.cross_entropy(reference(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(torch.load(path) | dict(state_dict=reference.state_dict()), path)
    checkpoint.load_model(path, corpus=corpus)
    assert capsys.readouterr().err == ""
    (tmp_path / "other.txt").write_text("\n\n".join("".join(line) for line in other), encoding="utf-8")
    with pytest.raises(UserError, match="as many different characters"):
        checkpoint.load_model(path, corpus=str(tmp_path / "other.txt"))


def test_an_incomplete_file_of_the_original_is_refused(tmp_path):
    path, corpus, _, _ = write_original(tmp_path)
    for change in (lambda c: c.pop("n_head"), lambda c: c["state_dict"].pop("transformer.ln_f.weight"),
                   lambda c: c["state_dict"].pop("transformer.wte.weight"), lambda c: c.update(n_embd=32)):
        content = torch.load(path)
        change(content)
        torch.save(content, tmp_path / "broken.pth")
        with pytest.raises(UserError, match="not complete|damaged"):
            checkpoint.load_model(str(tmp_path / "broken.pth"), corpus=corpus)


def convert(*arguments):
    command = [sys.executable, os.path.join(ROOT, "checkpoint.py"), "convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.soak
def test_convert_makes_the_file_self_contained(tmp_path):
    path, corpus, reference, _ = write_original(tmp_path, steps=1)
    target = str(tmp_path / "new" / "out.pth")
    done = convert(path, "--corpus", corpus, target)
    assert done.returncode == 0 and "vocabulary of" in done.stdout, done.stderr
    for arguments, reason in (((path, "--corpus", corpus, target), "exists"),
                              ((target, "--corpus", corpus, target + "2"), "no conversion"),
                              (("no.pth", "--corpus", corpus, target + "2"), "does not exist"),
                              ((path, "--corpus", "none.txt", str(tmp_path / "other" / "2")), "none.txt"),
                              ((path, "--corpus", corpus, path + "/2"), "cannot be written")):
        refused = convert(*arguments)
        assert refused.returncode == 2 and reason in refused.stderr.splitlines()[-1] and "Traceback" not in refused.stderr, refused.stderr
        assert not os.path.exists(arguments[3]) or reason == "exists"
    assert not os.path.exists(tmp_path / "other")
    os.unlink(corpus)
    model, tokenizer, _ = checkpoint.load_model(target)
    assert [*SPECIALS, *tokenizer.vocabulary] == vocabulary(TEXT)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model.logits(model.hidden(ids)), reference(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_the_optimizers_state_goes_on_as_in_the_original(tmp_path, bias):
    """One more step here and there, from the same file and gradients, ends in the same weights and moments."""
    path, corpus, reference, optimizer = write_original(tmp_path, bias, steps=3)
    content = checkpoint.read(path, corpus)
    model, _ = checkpoint.unpack(content, path)
    (ours,) = make_optimizers(model, build(TrainSettings, dict(lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95)), torch.float32)
    train.load_optimizers([ours], None, content)
    ids = torch.randint(3, model.config.vocab_size, (4, 9), generator=torch.Generator().manual_seed(3))
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    ours.step()
    train_reference(reference, optimizer, 3)
    expected = {checkpoint._our_name(name): parameter for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        V = len(expected[name])
        if not name.endswith(".k.bias"):  # its gradient is zero but for rounding, which AdamW blows up
            torch.testing.assert_close(parameter[:V], expected[name], atol=1e-5, rtol=1e-4)
        assert not parameter[V:].any()  # the rows added to the vocabulary stay zero
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours.state[parameter][moment][:V], optimizer.state[expected[name]][moment], atol=1e-4, rtol=1e-3)
        assert ours.state[parameter]["step"] == 4


def test_training_goes_on_from_the_originals_file_and_leaves_it_alone(tmp_path):
    path, corpus, reference, _ = write_original(tmp_path, steps=2, text="".join(f"你好{c}\n好{c}\n\n" for c in "甲乙丙丁戊己庚辛" * 4))
    before = open(path, "rb").read()
    config = tmp_path / "config.yaml"
    config.write_text(f"data_path: {corpus}\nblock_size: 16\ntrain_percent: 0.9\nn_layer: 2\nn_head: 2\nn_embd: 16\nlr : 2e-4\n"
                      f"train_batch: 2\nsave_freq: 1\neval_freq: 9\nmax_steps: 9\ncheckpoint_root: {tmp_path}/new\nresume_from: {path}\n"
                      "tensorboard_path: NULL\ndtype: float32\n", encoding="utf-8")
    command = [sys.executable, os.path.join(ROOT, "train.py"), str(config), "device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is not what" not in done.stdout
    assert open(path, "rb").read() == before
    assert sorted(os.listdir(tmp_path)) == [".cache", "config.yaml", "corpus.txt", "cpt7.pth", "new"]
    content = checkpoint.read(str(tmp_path / "new" / "last.pth"))
    assert content["progress"]["step"] == 9
    assert content["optimizer"][0]["state"][0]["step"] == 4  # two there, two here
    again = subprocess.run([*command, "resume_from=auto", "max_steps=11"], capture_output=True, text=True)
    assert again.returncode == 0 and checkpoint.newest(str(tmp_path / "new"))[1]["progress"]["step"] == 11, again.stderr


@pytest.mark.soak
def test_a_converted_file_goes_on_with_its_corpus_and_begins_anew_with_another(tmp_path):
    path, corpus, _, _ = write_original(tmp_path, steps=2, text="".join(f"你好{c}\n好{c}\n\n" for c in "甲乙丙丁戊己庚辛" * 4))
    target, other = str(tmp_path / "out.pth"), tmp_path / "other.txt"
    assert convert(path, "--corpus", corpus, target).returncode == 0
    other.write_text("".join(f"你{c}\n好{c}\n\n" for c in "甲乙丙丁" * 8))
    config = tmp_path / "config.yaml"
    config.write_text("block_size: 16\nn_layer: 2\nn_head: 2\nn_embd: 16\ntrain_batch: 2\ntensorboard_path: none\ndevice: cpu\n")
    for text, says, step in ((corpus, "at step 7", 9), (other, "a new run with its weights, from step 0", 2)):
        done = subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), config, f"data_path={text}", f"resume_from={target}",
                               f"max_steps={step}", f"checkpoint_root={tmp_path}/{step}"], capture_output=True, text=True)
        assert done.returncode == 0 and says in done.stdout, done.stdout + done.stderr
        content = checkpoint.read(str(tmp_path / str(step) / "last.pth"))
        assert content["progress"]["step"] == step and content["optimizer"][0]["state"][0]["step"] == (4 if step == 9 else 2)


SHAPES = {"90M": (12, 12, 768), "300M": (26, 15, 960)}


@pytest.mark.parametrize("path", CONFIGS, ids=os.path.basename)
@pytest.mark.parametrize("script", [TrainSettings, ChatSettings, SentimentSettings])
def test_the_originals_configurations_load_in_every_script(path, script):
    settings = build(script, read_yaml(path))
    name = os.path.basename(path)
    assert (script is ChatSettings or settings.block_size == 256) and settings.device == "cuda" and settings.data_path == "data/train.txt"
    assert settings.resume_from == ("checkpoints/pretrained/cpt300M.pth" if name == "chat300M.yaml" else None)
    if script is TrainSettings and name.startswith("train"):
        size = name.removeprefix("train").removesuffix(".yaml")
        small = size.startswith("90M")
        assert (settings.n_layer, settings.n_head, settings.n_embd) == SHAPES[size.removesuffix("_ddp")]
        assert settings.arch == "gpt2" and settings.optimizer == "adamw" and settings.schedule == "cosine" and settings.tokenizer == "char"
        assert (settings.lr, settings.min_lr, settings.warmup_steps) == ((3e-4, 6e-6, 2000) if small else (2e-4, 1e-5, 1000))
        assert settings.decay_steps == 100000 and settings.max_epoch == 1919810 and settings.max_steps is None
        assert settings.train_batch == {"90M": 80, "90M_ddp": 160, "300M": 24, "300M_ddp": 48}[size]
        assert settings.dropout == (0.2 if small else 0.05) and settings.bias is True and settings.compile is True
        assert (settings.beta1, settings.beta2, settings.weight_decay, settings.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    if script is SentimentSettings and name.startswith("sentimental"):
        masks = {"sentimental.yaml": (True, False), "sentimental1.yaml": (True, True), "sentimental2.yaml": (False, False)}
        assert (settings.use_mask, settings.frozen) == masks[name]
        assert (settings.lr, settings.min_lr, settings.max_epoch, settings.train_percent) == (5e-5, 6e-6, 20, 0.8)
        assert settings.base_model == "checkpoints/pretrained/cpt300M.pth"


def test_there_are_eight_of_the_originals_configurations():
    assert len(CONFIGS) == 8


@pytest.mark.parametrize("config", ["tests/original_configs/train90M.yaml", "config/train90M.yaml"])
def test_train_accepts_a_90M_configuration_unchanged(tmp_path, config):
    corpus = tmp_path / "train.txt"
    corpus.write_text(TEXT, encoding="utf-8")
    done = subprocess.run([sys.executable, "train.py", config, "--dry-run", f"data_path={corpus}", f"checkpoint_root={tmp_path}/none"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("gpt2" if "original" in config else "modern") in done.stdout.split("model")[1]


@pytest.mark.parametrize("name", ["train90M", "train300M", "train90M_ddp", "train300M_ddp"])
def test_this_projects_configurations_have_the_same_shapes_and_sizes(name):
    ours = build(TrainSettings, read_yaml(os.path.join(ROOT, "config", f"{name}.yaml")))
    size = name.removeprefix("train").removesuffix("_ddp")
    assert (ours.n_layer, ours.n_head, ours.n_embd) == SHAPES[size] and ours.block_size == 256 and ours.vocab_size == 7587
    assert ours.arch == "modern" and ours.optimizer == "muon" and ours.compile
    assert ours.train_batch % 8 == 0 or "ddp" not in name
    with torch.device("meta"):
        model = train.GPT(train.GPTConfig(vocab_size=7587, arch=ours.arch, n_layer=ours.n_layer, n_head=ours.n_head, n_embd=ours.n_embd,
                                          tied=ours.tied))
    assert not model.config.tied  # the original's is: its size is that of the rest
    count = model.count_parameters() - model.head.weight.numel()
    assert abs(count / 1e6 - int(size[:-1])) <= (3 if size == "90M" else 6)
