import pytest
import torch

from model import GPT, GPTConfig
from optim import StackedMuon, learning_rate, make_optimizers
from settings import TrainSettings, build


def test_stacked_muon_equals_the_library_one():
    torch.manual_seed(0)
    shapes = [(64, 64)] * 3 + [(64, 128)] * 2 + [(128, 64)]
    ours, theirs = ([torch.nn.Parameter(torch.full(shape, 0.1)) for shape in shapes] for _ in range(2))
    optimizers = [kind(parameters, lr=0.02, weight_decay=0.1) for kind, parameters in ((StackedMuon, ours), (torch.optim.Muon, theirs))]
    for _ in range(5):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)  # both orthogonalise in bfloat16
    assert optimizers[0].state_dict().keys() == optimizers[1].state_dict().keys()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_every_parameter_has_one_optimizer_and_vectors_do_not_decay(optimizer, arch):
    model = GPT(GPTConfig(vocab_size=70, arch=arch, n_layer=2, n_embd=32, block_size=16))
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
