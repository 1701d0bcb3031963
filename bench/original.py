"""The original's recipe, as a baseline: python bench/original.py [CONFIG] [key=value …] --seconds 500

Written from facts about it: characters, every dialogue cut at block_size or filled up to it with `<pad>`, pads counted in
the loss, attention written out, dropout on embeddings, attention and both residual branches, tied output, AdamW, float32.
Held-out dialogues are scored as ours are.
"""

import math

import common  # first: it makes the folder above importable
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import runtime as rt
import settings as settings_module
from tokenizer import PAD


class Attention(nn.Module):
    def __init__(self, n_embd, n_head, block_size, dropout, fused):
        super().__init__()
        self.W_q, self.W_k, self.W_v, self.out_net = (nn.Linear(n_embd, n_embd) for _ in range(4))
        self.n_head, self.dropout, self.fused = n_head, dropout, fused
        self.register_buffer("mask", torch.ones(block_size, block_size, dtype=torch.bool).tril(), persistent=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (net(x).view(B, T, self.n_head, -1).transpose(1, 2) for net in (self.W_q, self.W_k, self.W_v))  # (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(C // self.n_head)  # (B, H, T, T)
            weights = scores.masked_fill(~self.mask[:T, :T], -math.inf).softmax(dim=-1)
            y = F.dropout(weights, dropout) @ v
        return self.out_net(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, n_embd, n_head, block_size, dropout, fused):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attention = Attention(n_embd, n_head, block_size, dropout, fused)
        self.dense1, self.out_net = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.drop(self.attention(self.ln1(x)))
        return x + self.drop(self.out_net(F.gelu(self.dense1(self.ln2(x)))))


class GPT2(nn.Module):
    """`fused` attention is nanoGPT's; without it, the original's."""

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, dropout, fused=False):
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd), nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(n_embd, n_head, block_size, dropout, fused) for _ in range(n_layer))
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer) if "out_net" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids):
        """(B, T) → logits (B, T, V)."""
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def adamw(model, lr, fused=False):
    """AdamW with weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)


def cross_entropy(logits, targets, reduction="mean"):
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


def contender(settings, documents, vocab_size, runtime, lr=3e-4, batch=16, dropout=0.1):
    """The original's recipe in the shape of `settings`: float32 on a CPU, and on a GPU the runtime's autocast."""
    torch.manual_seed(settings.seed)
    model = GPT2(vocab_size, settings.block_size, settings.n_layer, settings.n_head, settings.n_embd, dropout).to(runtime.device)

    def batches():
        starts, ends = documents.spans.T
        lengths = np.minimum(ends - starts - 1, settings.block_size)  # real targets: each character's next, or the end
        rng = np.random.default_rng(settings.seed)
        while True:
            order = rng.permutation(len(starts))
            for first in range(0, len(order) - batch + 1, batch):
                rows = order[first:first + batch]
                inputs, _ = common.padded(documents, starts[rows], lengths[rows], settings.block_size)
                targets = np.concatenate([inputs[:, 1:], np.full((batch, 1), PAD)], axis=1)
                yield (inputs, targets), int(lengths[rows].sum())

    def autocast():
        return torch.autocast("cuda", runtime.dtype, enabled=runtime.device.type == "cuda")

    def loss(inputs, targets, count):
        with autocast():
            return cross_entropy(model(inputs), targets)

    def nats(inputs, targets):
        with autocast():
            return cross_entropy(model(inputs), targets, "sum")

    return common.Contender(model, [adamw(model, lr)], batches(), loss, nats, runtime)


def main(arguments=None):
    parser = common.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=500, help="of training")
    parser.add_argument("--every", type=float, default=30, help="seconds of training between scores")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.1)
    options = parser.parse_intermixed_args(arguments)
    settings = common.read_settings(options)
    if options.smoke:
        options.seconds, options.every = min(options.seconds, 1.0), 0.5
    runtime = rt.start(settings)
    training, held_out, tokenizer = common.open_store(settings)
    run = contender(settings, training, tokenizer.size, runtime, options.lr, options.batch, options.dropout)
    while run.seconds < options.seconds:
        speed = run.train(min(options.every, options.seconds - run.seconds))
        loss = run.score(held_out, settings.block_size)
        print(f"{run.seconds:7.1f} s, step {run.steps}: validation loss {loss:.4f}, {speed:,.0f} real tokens/s", flush=True)
    common.table(["seconds", "validation loss"], [[round(seconds, 1), f"{loss:.4f}"] for seconds, loss in run.curve])
    common.record(options.results, "original", seconds=run.seconds, steps=run.steps, loss=run.curve[-1][1], curve=run.curve,
                  tokens_per_second=run.tokens / run.seconds, lr=options.lr, batch=options.batch, dropout=options.dropout,
                  shape=[settings.n_layer, settings.n_head, settings.n_embd, settings.block_size])


if __name__ == "__main__":
    settings_module.main(main)
