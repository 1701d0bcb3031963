import math

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from model import GPT, GPTConfig, KVCache, Sampling, adjust, drop, generate, rotate, sample

SHAPES = {"gpt2": dict(arch="gpt2", n_head=4), "modern": dict(arch="modern", n_head=4, n_kv_head=2)}


@pytest.fixture(params=SHAPES)
def model(request):
    torch.manual_seed(0)
    made = GPT(GPTConfig(vocab_size=100, block_size=64, n_layer=3, n_embd=64, **SHAPES[request.param])).eval().requires_grad_()
    with torch.no_grad():
        for parameter in made.parameters():  # so that nothing is 0 and greedy tokens vary
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def test_dropout_drops_the_same_features_at_all_positions_of_a_row_and_keeps_the_mean():
    dropped = drop(torch.ones(64, 5, 1000), 0.2)
    assert (dropped == dropped[:, :1]).all() and not (dropped[0] == dropped[1]).all()
    assert dropped.unique().tolist() == [0, 1.25] and dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert (drop(torch.ones(2, 3, 4), 0.2, training=False) == 1).all()


def kept_bytes(model, dtype):
    """Bytes that the loss of rows of 64 keeps of a position for its backward pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def kept(rows):
        held = {}

        def pack(tensor):
            held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids = torch.randint(3, 100, (rows, 64))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", dtype, dtype != torch.float32):
            loss = model.loss(ids, ids, torch.zeros_like(ids))
        assert loss.requires_grad
        return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in weights)

    return (kept(6) - kept(2)) / (4 * 64)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", SHAPES)
def test_a_step_keeps_as_many_bytes_as_it_is_said_to(arch, dtype, dropout):
    model = GPT(GPTConfig(vocab_size=100, block_size=64, n_layer=3, n_embd=192, arch=arch, n_head=4, dropout=dropout))
    width = torch.finfo(dtype).bits // 8
    assert kept_bytes(model, dtype) == pytest.approx(model.kept_bytes(width), rel=0.03)
    model.checkpointing = True
    assert 3 * width * 192 < kept_bytes(model, dtype) < model.kept_bytes(width, checkpointing=True)


def test_what_writes_to_the_residual_stream_begins_small_by_depth_or_with_nothing():
    """Radford et al. 2019: 1 / sqrt(2 n_layer); modern blocks have no biases and begin as the identity."""
    for arch, spread in (("gpt2", 0.02 / 8 ** 0.5), ("modern", 0.0)):
        model = GPT(GPTConfig(200, arch=arch, block_size=32, n_layer=4, n_head=4, n_embd=128))
        out = torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith("out.weight")])
        assert len(out) == 4 * (128 ** 2 + model.blocks[0].mlp.out.weight.numel()) and out.std().item() == pytest.approx(spread, rel=0.02)
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        assert bool(biases) == (arch == "gpt2") and not any(p.any() for p in biases)


@pytest.mark.parametrize("tied", [True, False])
def test_an_untrained_model_thinks_all_tokens_equally_likely(tied):
    """A tied embedding of the usual size made each token predict itself: the 90M shape began at 15 nats where 8.4 know nothing."""
    model = GPT(GPTConfig(vocab_size=100, arch="modern", n_layer=1, n_embd=256, tied=tied))
    ids = torch.randint(3, 100, (4, 65))
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() / 256 == pytest.approx(math.log(100), abs=0.15)


@pytest.mark.parametrize(("vocab_size", "within"), [(400, 0.09), (40, 0.02)])
def test_a_start_from_bigrams_predicts_what_follows_before_the_first_step(vocab_size, within):
    """Held-out text of Markov chains, whose tokens are as unequally frequent as words: of what lies between the unigrams' loss
    and the chains' entropy only the share `within` is left."""
    torch.manual_seed(0)
    likely = (torch.randn(vocab_size, 12) @ torch.randn(12, vocab_size) - 1.5 * torch.arange(1, vocab_size + 1).log()).softmax(dim=1)
    chains = [torch.zeros(64, dtype=torch.long)]
    for _ in range(1000):
        chains.append(likely[chains[-1]].multinomial(1)[:, 0])
    text = torch.stack(chains, dim=1)  # (64, 1001)
    known, ids = text[:48], text[48:, :641].unfold(1, 65, 64).flatten(0, 1)
    pairs, count = torch.stack([known[:, :-1].flatten(), known[:, 1:].flatten()]).unique(dim=1, return_counts=True)
    model = GPT(GPTConfig(vocab_size, arch="modern", n_layer=2, n_embd=64, tied=False))
    model.start_from_bigrams(*pairs, count, prior=20.0)
    assert (model.embedding.weight[:vocab_size].std(dim=0) > 1e-3).sum() >= 60  # no part of the width lies idle
    inputs, targets = ids[:, :-1], ids[:, 1:]
    with torch.no_grad():
        loss = model.loss(inputs, targets).item() / targets.numel()
    unigrams = -(known[:, 1:].flatten().bincount(minlength=vocab_size) + 0.5).div(48_000).log()[targets].mean().item()
    entropy = -likely[inputs, targets].log().mean().item()
    assert entropy < loss < entropy + within * (unigrams - entropy), (entropy, loss, unigrams)


@pytest.mark.parametrize(("shape", "tied", "millions", "within"), [((12, 12, None, 768), True, 90, 3), ((26, 15, None, 960), None, 300, 6)])
@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_the_published_shapes_have_their_sizes(shape, tied, millions, within, arch):
    with torch.device("meta"):
        made = GPT(GPTConfig(7587, arch, 256, *shape, tied=tied))
    assert abs(made.count_parameters() / 1e6 - millions) <= within


@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_cached_generation_equals_uncached(model, batch):
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12], [50] * 20, [3]][:batch]
    cached = torch.stack(list(generate(model, prompts, Sampling(temperature=0, max_new_tokens=30))), dim=1).tolist()
    for prompt, found in zip(prompts, cached):
        ids = list(prompt)
        for _ in range(30):
            logits = model.logits(model.hidden(torch.tensor([ids]))[:, -1])
            logits[:, 0] = -1e9
            ids.append(logits.argmax().item())
        assert found == ids[len(prompt):]


def test_a_cache_of_generation_s_own_is_no_longer_than_it_can_get(model, monkeypatch):
    sizes = []
    monkeypatch.setattr("model.KVCache", lambda *arguments: sizes.append(arguments[2]) or KVCache(*arguments))
    for new, size in ((7, 10), (1000, 64)):
        assert len(list(generate(model, [[5, 6, 7], [8]], Sampling(max_new_tokens=new)))) == min(new, 64 - 3 + 1)
        assert sizes.pop() == size


@torch.no_grad()
def test_a_cache_goes_on_where_it_was_left(model):
    cache = KVCache(model.config, 1, 64, "cpu", torch.float32)
    sampling = Sampling(temperature=0, max_new_tokens=5)
    first = torch.cat(list(generate(model, [[5, 6, 7]], sampling, cache=cache))).tolist()
    assert cache.length == 3 + 4  # the last token is not in yet
    second = torch.cat(list(generate(model, [[first[-1], 9, 10]], sampling, cache=cache))).tolist()
    whole = torch.cat(list(generate(model, [[5, 6, 7, *first, 9, 10]], sampling))).tolist()
    assert second == whole


@torch.no_grad()
def test_a_document_packed_with_others_has_the_logits_it_has_alone(model):
    a, b = torch.randint(3, 100, (1, 20)), torch.randint(3, 100, (1, 30))
    filling = torch.full((1, 14), 2)
    numbers = torch.tensor([[0] * 20 + [1] * 30 + [-1] * 14])
    packed = model.logits(model.hidden(torch.cat([a, b, filling], dim=1), numbers))
    torch.testing.assert_close(packed[:, :20], model.logits(model.hidden(a)))
    torch.testing.assert_close(packed[:, 20:50], model.logits(model.hidden(b)))


def test_padding_changes_no_loss_and_no_gradient(model):
    ids, targets = torch.randint(3, 100, (2, 24)), torch.randint(3, 100, (2, 24))
    numbers = torch.zeros_like(ids)
    plain = model.loss(ids, targets, numbers)
    plain.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    pad = lambda tensor, value: F.pad(tensor, (0, 40), value=value)
    padded = model.loss(pad(ids, 2), pad(targets, -100), pad(numbers, -1))
    padded.backward()
    torch.testing.assert_close(padded, plain)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad[:24] if name == "positions.weight" else parameter.grad,
                                   wanted[name][:24] if name == "positions.weight" else wanted[name], rtol=1e-4, atol=1e-4)


def test_the_chunked_loss_has_the_value_and_gradients_of_cross_entropy(model, monkeypatch):
    monkeypatch.setattr("model.LOSS_ROWS", 50)
    ids, targets = torch.randint(0, 100, (4, 64)), torch.randint(0, 100, (4, 64))
    targets[0, :7] = -100
    loss = model.loss(ids, targets)
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    plain = F.cross_entropy(model.logits(model.hidden(ids)).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    plain.backward()
    torch.testing.assert_close(loss, plain)
    for gradient, parameter in zip(found, model.parameters()):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(ids, targets), plain)


def test_bfloat16_loss_is_near_the_float32_one(model):
    ids, targets = torch.randint(0, 100, (4, 64)), torch.randint(0, 100, (4, 64))
    with torch.autocast("cpu", torch.bfloat16):
        low = model.loss(ids, targets)
    torch.testing.assert_close(low, model.loss(ids, targets), rtol=0.01, atol=0)


def test_checkpointed_activations_give_the_same_gradients(model):
    model.train()
    ids = torch.randint(0, 100, (2, 32))
    model.loss(ids, ids).backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.checkpointing = True
    model.loss(ids, ids).backward()
    for gradient, parameter in zip(wanted, model.parameters()):
        torch.testing.assert_close(gradient, parameter.grad)


def test_compiled_parts_keep_names_values_and_gradients(model):
    ids, targets = torch.randint(0, 100, (2, 64)), torch.randint(0, 100, (2, 64))
    targets[0, :7] = -100
    plain, names = model.loss(ids, targets), list(model.state_dict())
    plain.backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.compile_parts()
    loss = model.loss(ids, targets)
    loss.backward()
    torch.testing.assert_close(loss, plain)
    for gradient, parameter in zip(wanted, model.parameters()):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == names


def test_gradients_of_compiled_parts_are_the_same_each_time_with_several_threads():
    model = GPT(GPTConfig(vocab_size=200, arch="modern", block_size=256, n_layer=1, n_head=1, n_embd=64))
    model.compile_parts()
    threads = torch.get_num_threads()
    ids, targets = torch.randint(0, 4, (16, 256)), torch.randint(0, 200, (16, 256))  # often the same rows of the embedding
    found = []
    torch.set_num_threads(2)
    for _ in range(3):
        model.zero_grad()
        model.loss(ids, targets).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(again, found[0]))


def test_the_written_out_attention_is_the_library_one(model, monkeypatch):
    ids = torch.randint(3, 100, (2, 32))
    written = model.hidden(ids)
    monkeypatch.setattr("model.attend", lambda q, k, v, mask, dropout: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True))
    torch.testing.assert_close(model.hidden(ids), written)


@torch.no_grad()
def test_unk_and_ids_beyond_the_vocabulary_are_never_sampled(model):
    model.head.weight[0] = 100.0
    model.head.weight[100:] = 100.0
    ids = torch.stack(list(generate(model, [[5]] * 50, Sampling(temperature=5.0, max_new_tokens=20))))
    assert ids.min() > 0 and ids.max() < 100


def test_sampling_options_do_what_they_say():
    logits = torch.tensor([[0.0, 4.0, 3.0, 2.0, -5.0]])
    empty = torch.empty((1, 0), dtype=torch.long)

    def left(history=empty, **options):
        return adjust(logits, history, Sampling(temperature=1.0, **options)).isfinite()[0].nonzero()[:, 0].tolist()

    assert left() == [1, 2, 3, 4]
    assert left(top_k=2) == [1, 2]
    assert left(top_p=0.7) == [1, 2]
    assert left(min_p=0.2) == [1, 2]
    assert left(torch.tensor([[1, 2, 1]]), no_repeat_ngram=2) == [1, 3, 4]
    assert sample(logits, empty, Sampling(temperature=0)).tolist() == [1]
    assert sample(logits, torch.tensor([[1]]), Sampling(temperature=0, repetition_penalty=2.0)).tolist() == [2]


def test_sampling_never_waits_for_the_device():
    """A device without numbers refuses what would have to read one."""
    logits, history = torch.empty(2, 300, device="meta"), torch.empty(2, 8, device="meta", dtype=torch.long)
    sampling = Sampling(top_k=9, top_p=0.9, min_p=0.1, repetition_penalty=1.1, no_repeat_ngram=3, exempt=(7,))
    assert sample(logits, history, sampling).shape == (2,)


def test_the_gradient_below_the_head_is_scaled_as_exactly_as_the_head_s():
    """So that 3 processes, whose factor is not a power of two times one's, train as one does in bfloat16."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 128).bfloat16().requires_grad_(), torch.randn(50, 128)
    loss = model_module._LinearCrossEntropy.apply(hidden, weight, torch.randint(50, (64,)), torch.zeros(50), model_module._loss_of_rows)
    whole, = torch.autograd.grad(loss, hidden, retain_graph=True)
    part, = torch.autograd.grad(loss * 0.333, hidden)  # in bfloat16 0.332
    assert abs(part.float().abs().sum() / whole.float().abs().sum() / 0.333 - 1) < 1e-3


def test_noise_of_zero_draws_nothing_forbidden(monkeypatch):
    """As on a Mac, where an exponential variate may be 0."""
    draw = torch.Tensor.exponential_
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, **options: draw(self, **options).index_fill_(1, torch.tensor([0]), 0.0))
    assert sample(torch.zeros(4, 3), torch.empty((4, 0), dtype=torch.long), Sampling(temperature=1.0)).min() > 0  # <unk> is 0


def test_sampled_tokens_follow_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.0, 0.6, 0.3, 0.1])
    empty = torch.empty((20_000, 0), dtype=torch.long)
    drawn = sample(probabilities.log().expand(20_000, 4), empty, Sampling(temperature=1.0), generator)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 20_000, probabilities, atol=0.02, rtol=0)


@torch.no_grad()
def test_generation_stops_at_a_stop_id_and_where_the_context_is_full(model):
    free = torch.cat(list(generate(model, [[5, 6]], Sampling(temperature=0, max_new_tokens=20)))).tolist()
    stopped = torch.cat(list(generate(model, [[5, 6]], Sampling(temperature=0, max_new_tokens=20), stop=[free[3]]))).tolist()
    assert stopped == free[:free.index(free[3]) + 1]
    assert len(list(generate(model, [[5] * 60], Sampling(max_new_tokens=50)))) == 5  # 60 + 4 places, and one more token
    with pytest.raises(ValueError, match="does not fit"):
        next(generate(model, [[5] * 65], Sampling()))


def test_both_forms_of_the_rotation_turn_alike():
    model = GPT(GPTConfig(vocab_size=70, arch="modern", n_layer=1, n_head=2, n_embd=32, block_size=16))
    x, place = torch.randn(3, 2, 16, 16), torch.arange(16)[None]
    cos, sin = model._rotation(place, x)
    one = rotate(x, cos, sin)
    torch.testing.assert_close(rotate(x, torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)), one)
    assert torch.equal(one[:, :, 0], x[:, :, 0]) and not torch.allclose(one[:, :, 1:], x[:, :, 1:])
