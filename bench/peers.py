"""Other ways to train the same shape: nanoGPT's, and Hugging Face transformers' at its best settings."""

import common  # first: it makes the folder above importable
import numpy as np
import original
import torch


def step_functions(logits_of, runtime, compile, compile_loss=False):
    """(loss, nats) of a model whose `logits_of(inputs)` are (B, T, V), under the runtime's autocast; compiled whole, or what comes
    after the logits alone."""
    cross_entropy = torch.compile(original.cross_entropy) if compile_loss else original.cross_entropy

    def mean(inputs, targets):
        return cross_entropy(logits_of(inputs), targets)

    compiled = torch.compile(mean) if compile else mean

    def loss(inputs, targets, count):
        with runtime.autocast():
            return compiled(inputs, targets)

    def nats(inputs, targets):
        with runtime.autocast():
            return original.cross_entropy(logits_of(inputs), targets, "sum")

    return loss, nats


def nanogpt(settings, documents, vocab_size, runtime, lr=1e-3, compile=True):
    """One stream of all dialogues, rows cut from it anywhere, no document mask; fused attention, all logits at once."""
    torch.manual_seed(settings.seed)
    model = original.GPT2(vocab_size, settings.block_size, settings.n_layer, settings.n_head, settings.n_embd, 0.0, fused=True)
    model.to(runtime.device)

    def batches():
        rng, place = np.random.default_rng(settings.seed), np.arange(settings.block_size)
        stream = np.concatenate([documents.ids[begin:end] for begin, end in documents.spans]).astype(np.int64)
        while True:
            begins = rng.integers(len(stream) - settings.block_size, size=settings.train_batch)
            rows = begins[:, None] + place
            yield (stream[rows], stream[rows + 1]), rows.size

    return common.Contender(model, [original.adamw(model, lr, fused=True)], batches(),
                            *step_functions(model, runtime, compile), runtime)


def transformers_model(kind, settings, vocab_size):
    """GPT2LMHeadModel or Qwen3ForCausalLM of the settings' shape, without dropout, with SDPA."""
    import transformers

    from model import GPTConfig
    shape = GPTConfig(vocab_size, arch="modern", n_embd=settings.n_embd, n_head=settings.n_head)
    common_keys = dict(vocab_size=vocab_size, attn_implementation="sdpa", use_cache=False, bos_token_id=None, eos_token_id=None)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_positions=settings.block_size, n_embd=settings.n_embd, n_layer=settings.n_layer,
                                         n_head=settings.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common_keys)
        return transformers.GPT2LMHeadModel(config)
    heads = settings.n_kv_head or settings.n_head
    config = transformers.Qwen3Config(hidden_size=settings.n_embd, intermediate_size=shape.hidden_size, num_hidden_layers=settings.n_layer,
                                      num_attention_heads=settings.n_head, num_key_value_heads=heads, head_dim=shape.head_size,
                                      max_position_embeddings=settings.block_size, tie_word_embeddings=False, **common_keys)
    return transformers.Qwen3ForCausalLM(config)


def transformers(settings, documents, vocab_size, runtime, kind="gpt2", lr=1e-3, compile=True, horizon=None):
    """transformers' `kind` (gpt2 or qwen3): rows grouped by length, filled to the longest in steps of 32, about
    train_batch * block_size positions a step. Filling lies to the right and is not scored, so no attention mask is
    needed, which lets SDPA take its causal kernel. With a `horizon` (seconds) the rate falls in a straight line to zero there."""
    torch.manual_seed(settings.seed)
    model = transformers_model(kind, settings, vocab_size).to(runtime.device).train()
    by_layer = compile and runtime.device.type == "cuda"  # as a whole 26 layers were not compiled in two minutes
    if by_layer:
        for layer in model.transformer.h if kind == "gpt2" else model.model.layers:
            layer.compile()
    positions = settings.train_batch * settings.block_size

    def batches():
        starts, lengths = common.pieces_by_length(documents, settings.block_size)
        rng, groups, row = np.random.default_rng(settings.seed), [], 0
        while row < len(starts):  # rows [row, end) of the sorted pieces, as many as fill the step at the width of the longest
            end = row + 1
            while end < len(starts) and (end + 1 - row) * min(settings.block_size, -(-lengths[end] // 32) * 32) <= positions:
                end += 1
            groups.append(slice(row, end))
            row = end
        while True:
            for number in rng.permutation(len(groups)):
                rows = groups[number]
                width = min(settings.block_size, int(-(-lengths[rows][-1] // 32) * 32))
                yield common.padded(documents, starts[rows], lengths[rows], width), int(lengths[rows].sum())

    def factor(step, seconds):
        return min(1.0, (step + 1) / 20) * (1.0 if horizon is None else max(0.0, 1 - seconds / horizon))

    logits_of = lambda inputs: model(input_ids=inputs).logits
    return common.Contender(model, [original.adamw(model, lr, fused=True)], batches(),
                            *step_functions(logits_of, runtime, compile and not by_layer, by_layer), runtime, factor=factor)
