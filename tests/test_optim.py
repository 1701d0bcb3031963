import math

import pytest
import torch

from model import GPT, Classifier, GPTConfig
from optim import BlockMuon, learning_rate, make_optimizers
from settings import TrainSettings, build

SHAPES = [(64, 64)] * 3 + [(64, 128)] * 2 + [(128, 64)]


def test_muon_of_whole_matrices_equals_the_library_one():
    ours, theirs = ([torch.nn.Parameter(torch.full(shape, 0.1)) for shape in SHAPES] for _ in range(2))
    blocks = [(shape[0], 0) for shape in SHAPES]
    optimizers = [BlockMuon([dict(params=ours, blocks=blocks)], lr=0.02, weight_decay=0.1),
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
    assert optimizers[0].state_dict().keys() == optimizers[1].state_dict().keys()


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
        BlockMuon([dict(params=matrices, blocks=blocks)], dtype=torch.float32, lr=1.0, weight_decay=0).step()

    step(whole, [(32, side)] * len(whole))
    for matrix, blocks in zip(whole, parts):
        step(blocks, [(block.shape[0], 0) for block in blocks])
        together = torch.cat([block.detach() for block in blocks], dim=side)
        torch.testing.assert_close(matrix.detach() / matrix.norm(), together / together.norm(), atol=1e-5, rtol=1e-4)
        assert matrix.norm().item() == pytest.approx(math.sqrt(matrix.shape[0]), rel=0.2)  # of torch.optim.Muon's update


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_muon_takes_attention_by_heads(arch):
    model = GPT(GPTConfig(vocab_size=70, arch=arch, n_layer=1, n_head=4, n_kv_head=2, n_embd=80, block_size=16))
    muon, _ = make_optimizers(model, build(TrainSettings, dict(optimizer="muon")))
    (group,) = muon.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks = {names[id(p)]: (p.shape[side], size, side) for p, (size, side) in zip(group["params"], group["blocks"])}
    attention = "blocks.0.attention."
    assert [blocks[f"{attention}{part}.weight"] for part in ("q", "k", "v", "out")] == [(80, 20, 0), (40, 20, 0), (40, 20, 0), (80, 20, 1)]
    hidden = model.config.hidden_size
    assert blocks["blocks.0.mlp.up.weight"] == (hidden, 64, 0) and blocks["blocks.0.mlp.out.weight"] == (hidden, 64, 1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["gpt2", "modern", "classifier"])
def test_every_parameter_has_one_optimizer_and_vectors_do_not_decay(optimizer, kind):
    arch = "gpt2" if kind == "gpt2" else "modern"
    model = GPT(GPTConfig(vocab_size=70, arch=arch, n_layer=2, n_embd=32, block_size=16))
    model = Classifier(model, 2) if kind == "classifier" else model
    optimizers = make_optimizers(model, build(TrainSettings, dict(optimizer=optimizer, weight_decay=0.3)))
    groups = [group for made in optimizers for group in made.param_groups]
    parameters = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(parameters) == sorted(id(parameter) for parameter in model.parameters())
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
