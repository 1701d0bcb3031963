import math

import pytest
import torch

from model import GPT, Classifier, GPTConfig
from optim import BlockMuon, clip, learning_rate, make_optimizers, share_done
from settings import TrainSettings, build

SHAPES = [(64, 64)] * 3 + [(64, 128)] * 2 + [(128, 64)]


@pytest.mark.parametrize("side", [0, 1])
def test_muon_of_whole_matrices_equals_the_library_one(side):
    ours, theirs = ([torch.nn.Parameter(torch.full(shape, 0.1)) for shape in SHAPES] for _ in range(2))
    blocks = [(shape[side], side) for shape in SHAPES]
    optimizers = [BlockMuon([dict(params=ours, blocks=blocks)], torch.bfloat16, lr=0.02, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)]
    torch.manual_seed(0)
    for _ in range(5):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)  # both orthogonalise in bfloat16
    assert optimizers[0].state_dict()["state"][0].keys() == optimizers[1].state_dict()["state"][0].keys()


@pytest.mark.parametrize("side", [0, 1])
def test_muon_of_blocks_equals_muon_of_each_alone_but_for_the_norm(side):
    whole = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    parts = [[torch.nn.Parameter(part.clone()) for part in matrix.detach().split(32, dim=side)] for matrix in whole]
    torch.manual_seed(0)
    for matrix, blocks in zip(whole, parts):
        matrix.grad = torch.randn_like(matrix)
        for block, gradient in zip(blocks, matrix.grad.split(32, dim=side)):
            block.grad = gradient.clone()

    def step(matrices, blocks):
        BlockMuon([dict(params=matrices, blocks=blocks)], torch.float32, lr=1.0, weight_decay=0).step()

    step(whole, [(32, side)] * len(whole))
    for matrix, blocks in zip(whole, parts):
        step(blocks, [(block.shape[0], 0) for block in blocks])
        together = torch.cat([block.detach() for block in blocks], dim=side)
        torch.testing.assert_close(matrix.detach() / matrix.norm(), together / together.norm(), atol=1e-5, rtol=1e-4)
        assert matrix.norm().item() == pytest.approx(math.sqrt(matrix.shape[0]), rel=0.2)  # of torch.optim.Muon's update


@pytest.mark.parametrize("arch, width, unit", [("gpt2", 80, 64), ("gpt2", 100, 80), ("modern", 80, 64)])
def test_muon_takes_attention_by_heads_and_hidden_units_by_64_or_more(arch, width, unit):
    model = GPT(GPTConfig(vocab_size=70, arch=arch, n_layer=1, n_head=4, n_kv_head=2, n_embd=width, block_size=16))
    muon, _ = make_optimizers(model, build(TrainSettings, dict(optimizer="muon")), torch.float32)
    (group,) = muon.param_groups
    names = {id(parameter): name.removeprefix("blocks.0.").removesuffix(".weight") for name, parameter in model.named_parameters()}
    blocks = {names[id(p)]: (p.shape[side], size, side) for p, (size, side) in zip(group["params"], group["blocks"])}
    hidden, head = model.config.hidden_size, width // 4
    wanted = {"q": (width, head, 0), "k": (width // 2, head, 0), "v": (width // 2, head, 0), "out": (width, head, 1)}
    assert {part: blocks[f"attention.{part}"] for part in wanted} == wanted
    assert blocks["mlp.up"] == (hidden, unit, 0) and blocks["mlp.out"] == (hidden, unit, 1)


@pytest.mark.parametrize("frozen", [False, True])
def test_muon_trains_what_a_classifier_leaves_to_be_trained(frozen):
    classifier = Classifier(GPT(GPTConfig(vocab_size=70, arch="modern", n_layer=2, n_embd=64, block_size=16)), 2)
    classifier.freeze(2, frozen)
    before = {name: parameter.clone() for name, parameter in classifier.named_parameters()}
    optimizers = make_optimizers(classifier, build(TrainSettings, dict(optimizer="muon")), torch.float32)
    for _ in range(2):  # what writes to the residual stream starts at 0, and hides all before it from the first gradient
        classifier(torch.arange(3, 19)[None], torch.tensor([16])).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    moved = {name for name, parameter in classifier.named_parameters() if not parameter.equal(before[name])}
    assert moved == {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}


def test_clipping_scales_large_gradients_and_leaves_others_untouched():
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (2, 3, 4)]
    for limit, factor in ((0.0, 1.0), (20.0, 1.0), (5.0, 0.5)):
        parameters[0].grad, parameters[1].grad = torch.tensor([6.0, 0.0]), torch.tensor([0.0, 8.0, 0.0])  # the third has none
        assert clip(parameters, limit) == 10
        assert parameters[0].grad.tolist() == [6 * factor, 0] and parameters[1].grad.tolist() == [0, 8 * factor, 0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["gpt2", "modern", "classifier"])
def test_every_trained_parameter_has_one_optimizer_and_vectors_do_not_decay(optimizer, kind):
    arch = "gpt2" if kind == "gpt2" else "modern"
    model = GPT(GPTConfig(vocab_size=70, arch=arch, n_layer=2, n_embd=32, block_size=16))
    model = Classifier(model, 2) if kind == "classifier" else model
    optimizers = make_optimizers(model, build(TrainSettings, dict(optimizer=optimizer, weight_decay=0.3)), torch.float32)
    groups = [group for made in optimizers for group in made.param_groups]
    parameters = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(parameters) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    left = {".".join(name.split(".")[-2:]) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert left == (set() if arch == "gpt2" else {"norm1.weight", "norm2.weight"})
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.3 if parameter.dim() == 2 else 0)


def test_schedules_have_their_shapes():
    cosine = build(TrainSettings, dict(lr=1e-3, min_lr=1e-4, warmup_steps=9))
    assert learning_rate(0, 0.0, cosine) == pytest.approx(0.1)
    assert learning_rate(10, 0.0, cosine) == pytest.approx(1.0)
    assert learning_rate(99, 0.5, cosine) == pytest.approx(0.55)
    assert learning_rate(99, 1.0, cosine) == pytest.approx(0.1)
    wsd = build(TrainSettings, dict(lr=1e-3, schedule="wsd", decay_share=0.4))
    assert [learning_rate(99, done, wsd) for done in (0.0, 0.6, 0.8, 1.0)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    constant = build(TrainSettings, dict(schedule="wsd", decay_share=0.0))
    assert learning_rate(99, 1.0, constant) == 1
    originals = dict(lr=1e-3, min_lr=1e-4, decay_steps=400)  # its schedule ends there, wherever the run does
    assert learning_rate(200, 0.1, build(TrainSettings, originals)) == pytest.approx(0.55)
    assert learning_rate(200, 0.0, build(TrainSettings, originals | dict(max_steps=300))) == pytest.approx(1.0)


def test_a_run_is_as_far_as_by_the_limit_that_comes_first():
    limits = dict(max_steps=100, max_minutes=10.0, max_epoch=4)
    done = lambda **left_out: share_done(build(TrainSettings, limits | left_out), 30, 4.0, 2.0)
    assert done() == pytest.approx(0.5)
    assert done(max_epoch=40) == pytest.approx(0.4)
    assert done(max_epoch=40, max_minutes=None) == pytest.approx(0.3)
    assert done(max_epoch=40, max_minutes=None, max_steps=None) == pytest.approx(0.05)
