"""What only a GPU does: recorded passes and steps. Skipped without one."""

import copy
import math

import pytest
import torch

import runs
from model import GPT, GPTConfig, KVCache, Recorded, Sampling, generate
from optim import make_optimizers, update
from settings import TrainSettings, build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CONFIG = dict(vocab_size=80, arch="modern", block_size=192, n_layer=2, n_head=2, n_embd=64)


def test_recorded_passes_learn_what_others_do_with_the_same_dropout_and_a_scaler():
    torch.manual_seed(0)
    models = [GPT(GPTConfig(**CONFIG, dropout=0.5)).cuda().train()]
    models.append(copy.deepcopy(models[0]))
    settings, batches = build(TrainSettings, dict(optimizer="muon", lr=0.01)), torch.randint(3, 20, (6, 8, 65), device="cuda")
    losses = []
    for record, model in enumerate(models):
        scaler = torch.amp.GradScaler("cuda", init_scale=256.0)

        def learn(inputs, targets, factor, model=model, scaler=scaler):
            total = torch.zeros((), device="cuda")
            for piece in (slice(0, 4), slice(4, 8)):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(inputs[piece], targets[piece])
                scaler.scale(loss * factor).backward()
                total += loss.detach()
            return total

        def step(number, seed, factor, record=record, model=model, scaler=scaler):
            torch.manual_seed(seed)
            loss = learn(batches[number, :, :-1], batches[number, :, 1:], torch.full((), factor, device="cuda")).item()
            norm = update(optimizers, scaler, model, settings)
            if not (record and learn.graph):
                model.zero_grad()
            return loss, norm

        learn, optimizers = Recorded(learn) if record else learn, make_optimizers(model, settings, torch.bfloat16)
        losses.append(torch.tensor([step(number, number, 1 / 512 / (number + 1))[0] for number in range(6)]))
        if record:
            assert learn.graph is not None
            before, scale = copy.deepcopy(model.state_dict()), scaler.get_scale()
            drawn, norms = zip(*(step(5, seed, float("inf")) for seed in (1, 1, 2)))
            assert drawn[0] == drawn[1] != drawn[2]  # dropout is drawn anew in every playback, from the seed set before it
            assert not any(map(math.isfinite, norms)) and scaler.get_scale() == scale / 8
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(*losses, rtol=5e-3, atol=0)
    torch.testing.assert_close(losses[0][:2], losses[1][:2], rtol=2e-4, atol=0)  # the second is the first playback


def test_recorded_steps_say_what_others_say_and_a_conversation_can_go_back_and_on():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIG)).cuda().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() == 2 else None
    said = []
    for record in (True, False):
        cache, replies = KVCache(model.config, 2, 192, "cuda", torch.float32), []
        cache.steps = cache.steps if record else None
        for prompt, length, tokens in (([[5, 6, 7], [8, 9, 10]], 0, 80), ([[11], [12]], 30, 20), ([[13], [14]], 30, 20)):
            cache.length = length
            replies += torch.stack(list(generate(model, prompt, Sampling(temperature=0, max_new_tokens=tokens), cache=cache))).tolist()
        said.append(replies)
        assert not record or {size for size, step in cache.steps.items() if step.graph} == {64, 128}
    assert said[0] == said[1] and len({tuple(pair) for pair in said[0]}) > 20


@pytest.mark.parametrize("dtype, torchrun", [("bfloat16", None), ("float16", None), ("bfloat16", ["--nproc_per_node=1"])])
def test_a_run_on_a_gpu_is_compiled_and_goes_on_where_it_ended(tmp_path, dtype, torchrun):
    values = dict(device="cuda", dtype=dtype, compile=True, dropout=0.1, micro_batch=8, resume_from="auto", eval_freq=10)
    for steps in (20, 30):
        output = runs.run(runs.write_config(str(tmp_path), **values, max_steps=steps), torchrun=torchrun)
        assert f"finished after {steps} steps" in output, output
        assert "going on without" not in output and "an earlier run's checkpoints" not in output
