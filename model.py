"""The GPT: two shapes of block, cached generation, and a loss that never holds all logits at once.

Shapes: B rows, T positions, C = n_embd, H heads, K heads of keys and values, D = C / H, V vocabulary.
"""

import copy
import dataclasses
import functools
import gc
import math
import weakref

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # target of a position that is not scored
LOSS_ROWS = 1024  # positions whose logits exist at the same time


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """`gpt2` is the shape of Radford et al. 2019; `modern` is the one that Hugging Face calls Qwen3."""

    vocab_size: int
    arch: str = "gpt2"
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 4
    n_kv_head: int | None = None
    n_embd: int = 256
    dropout: float = 0.0  # of embeddings and of what blocks add; gpt2: of attention too (bench/LOG.md)
    bias: bool = True  # modern has none
    tied: bool | None = None  # output layer is the token embedding; None: gpt2 yes, modern no

    def __post_init__(self):
        object.__setattr__(self, "n_kv_head", self.n_kv_head or self.n_head)
        object.__setattr__(self, "bias", self.bias and not self.modern)
        object.__setattr__(self, "tied", not self.modern if self.tied is None else self.tied)

    @classmethod
    def of(cls, settings, vocab_size):
        """The shape that settings describe."""
        return cls(vocab_size, **{f.name: getattr(settings, f.name) for f in dataclasses.fields(cls) if f.name != "vocab_size"})

    @property
    def modern(self):
        return self.arch == "modern"

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    @property
    def hidden_size(self):
        """Width inside the MLP: 4 C, or 8/3 C for SwiGLU's three matrices (Shazeer 2020), in steps of 64."""
        return 4 * self.n_embd if not self.modern else max(64, round(self.n_embd * 8 / 3 / 64) * 64)

    @property
    def rows(self):
        """Rows of the embedding: the vocabulary rounded up to a multiple of 64, the sizes that matrix units like."""
        return -(-self.vocab_size // 64) * 64


class KVCache:
    """Keys and values of the positions so far, in buffers of fixed shape (n_layer, B, K, size, D).

    Rows may begin at different places (`start`, (B,)): a shorter prompt is padded on its left. On a CPU they are float32
    whatever `dtype` says: attention of a single position is five times as fast there as in bfloat16.
    """

    def __init__(self, config, batch, size, device, dtype):
        dtype = torch.float32 if torch.device(device).type == "cpu" else dtype
        shape = (config.n_layer, batch, config.n_kv_head, size, config.head_size)
        self.keys, self.values = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.start = torch.zeros(batch, dtype=torch.long, device=device)
        self.size, self.length = size, 0
        self.place = None  # (T,) of the ids that are being computed
        self.steps = {}  # CUDA graphs, see `next_logits`; None: record none, for a cache that serves few tokens

    def update(self, layer, k, v):
        """Writes (B, K, T, D) to `self.place`; returns all keys and values up to a multiple of 64 positions."""
        seen = self.seen(k.shape[2])
        self.keys[layer].index_copy_(2, self.place, k.to(self.keys.dtype))
        self.values[layer].index_copy_(2, self.place, v.to(self.keys.dtype))
        return self.keys[layer, :, :, :seen], self.values[layer, :, :, :seen]

    def seen(self, new):
        """How many positions attention covers with `new` more: in steps of 64, so that kernels can be reused."""
        return min(self.size, -(-(self.length + new) // 64) * 64)

    def open(self, new, place=None):
        """Takes `place` (new,), by default what comes next, for the positions that `update` writes; returns which positions
        each of them may look at, (B, 1, new, seen) bool."""
        self.place = torch.arange(self.length, self.length + new, device=self.start.device) if place is None else place
        query, others = self.place[:, None], torch.arange(self.seen(new), device=self.start.device)
        mask = (others <= query) & (others >= self.start[:, None, None])
        return (mask | (others == query))[:, None]  # left padding looks at itself: no empty softmax

    def branch(self, rows):
        """A cache of `rows` copies of this one's only row."""
        branch = copy.copy(self)
        branch.keys, branch.values = (t.repeat(1, rows, 1, 1, 1) for t in (self.keys, self.values))
        branch.start, branch.steps = self.start.repeat(rows), None
        return branch


def drop(x, share, training=True):
    """Dropout of whole features of (B, T, C): the same ones at all positions of a row (Gal and Ghahramani 2016). It prevents
    memorising as well as a mask per element, whose random numbers are a third of a step on a CPU (bench/LOG.md)."""
    return x * F.dropout(torch.ones_like(x[:, :1]), share) if training and share else x


def rms_norm(x, weight=None):
    return F.rms_norm(x, (x.shape[-1],), weight, eps=1e-6)


class RMSNorm(nn.RMSNorm):
    """Zhang and Sennrich 2019, with the weight in the precision of the activations."""

    def forward(self, x):
        return rms_norm(x, self.weight.to(x.dtype))


def make_norm(config):
    return RMSNorm(config.n_embd) if config.modern else nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)


def make_embedding(rows, width):
    """nn.Embedding; on the meta device without random numbers, for which PyTorch imports the compiler: half of chat's start."""
    weight = torch.empty(rows, width)
    return nn.Embedding.from_pretrained(weight, freeze=False) if weight.is_meta else nn.Embedding(rows, width)


def rotate(x, cos, sin):
    """Rotary position embedding (Su et al. 2021) of (B, heads, T, D), halves paired as in Hugging Face.

    With tables of D / 2 as a CPU likes it; with tables of D, the first half of `sin` negated, in one `addcmul`, as a GPU does.
    """
    if cos.shape[-1] == x.shape[-1]:
        return torch.addcmul(x * cos, x.unflatten(-1, (2, -1)).flip(-2).flatten(-2), sin)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q, k, v, mask, dropout):
    """Attention of (B, H, T, D) to (B, K, S, D); the mask (B, 1, T, S) is 0 where it is allowed and -inf elsewhere."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    if q.device.type == "cpu" and 1 < T <= 512:  # written out is faster there, backwards above all
        scores = q.reshape(B, K, -1, D) @ k.transpose(-2, -1)  # heads that share keys and values in one product
        scores = scores.view(B, H, T, S) * (1 / math.sqrt(D))
        weights = F.dropout(F.softmax(scores.float() + mask, dim=-1).to(v.dtype), dropout)
        return (weights.view(B, K, -1, S) @ v).view(B, H, T, D)
    if K != H:
        k, v = (t.repeat_interleave(H // K, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width, kv_width = config.n_embd, config.n_kv_head * config.head_size
        self.q = nn.Linear(width, width, bias=config.bias)
        self.k = nn.Linear(width, kv_width, bias=config.bias)
        self.v = nn.Linear(width, kv_width, bias=config.bias)
        self.out = nn.Linear(width, width, bias=config.bias)
        if config.modern:  # QK-norm (Henry et al. 2020)
            self.q_norm, self.k_norm = RMSNorm(config.head_size), RMSNorm(config.head_size)

    def forward(self, x, cos, sin, mask, cache=None, layer=0):
        B, T, C = x.shape
        config = self.config
        q = self.q(x).view(B, T, config.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = self.k(x).view(B, T, config.n_kv_head, -1).transpose(1, 2)  # (B, K, T, D)
        v = self.v(x).view(B, T, config.n_kv_head, -1).transpose(1, 2)
        if config.modern:
            q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, K, S, D)
        y = attend(q.to(k.dtype), k, v, mask, config.dropout if self.training and not config.modern else 0.0)
        return self.out(y.to(x.dtype).transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """GELU between two matrices, or SwiGLU between three."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.hidden_size, bias=config.bias)
        self.gate = nn.Linear(config.n_embd, config.hidden_size, bias=False) if config.modern else None
        self.out = nn.Linear(config.hidden_size, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.out(F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.attention = make_norm(config), Attention(config)
        self.norm2, self.mlp = make_norm(config), MLP(config)
        if config.modern:  # the matrices behind them can learn their scales; that saves a twentieth of a step on a CPU
            self.norm1.requires_grad_(False)
            self.norm2.requires_grad_(False)
        self.dropout = config.dropout

    def forward(self, x, cos, sin, mask, cache=None, layer=0):
        x = x + drop(self.attention(self.norm1(x), cos, sin, mask, cache, layer), self.dropout, self.training)
        return x + drop(self.mlp(self.norm2(x)), self.dropout, self.training)


def _loss_of_rows(hidden, weight, targets, unused, by_weight=None):
    """Summed cross-entropy of (n, C) rows, its gradient by hidden (n, C), and that by weight (V, C) added to `by_weight`.

    Without `by_weight` there are no gradients. `unused` (V,) is -inf at the rows of the embedding that are no token's, else 0. It
    is added, and the target scattered: comparing columns' numbers would double the compiled time outside the matrix products.
    """
    logits = (hidden @ weight.t()).float() + unused  # (n, V)
    real = (targets != IGNORE)[:, None]
    index = targets.clamp(min=0)[:, None]
    total = logits.logsumexp(dim=-1, keepdim=True)
    found = logits.gather(1, index) - total  # (n, 1), log-probabilities of the targets
    loss = -(found * real).sum()
    if by_weight is None:
        return loss, None, None
    by_logits = ((logits - total).exp() * real).to(hidden.dtype)  # probabilities, less 1 at the target
    by_logits = by_logits.scatter(1, index, (found.expm1() * real).to(hidden.dtype))
    return loss, by_logits @ weight, by_weight + by_logits.t() @ hidden


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T`, a few rows at a time, with the gradients made on the way forward.

    All logits at once would be the largest tensor of the step by far, written and read several times over.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, unused, loss_of_rows):
        low = weight.to(hidden.dtype)
        loss = torch.zeros((), device=hidden.device)
        by_hidden, by_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for rows in range(0, len(hidden), LOSS_ROWS):
            part = slice(rows, rows + LOSS_ROWS)
            one, by_hidden[part], by_weight = loss_of_rows(hidden[part], low, targets[part], unused, by_weight)
            loss += one
        ctx.save_for_backward(by_hidden, by_weight)
        return loss

    @staticmethod
    def backward(ctx, slope):
        by_hidden, by_weight = ctx.saved_tensors
        return by_hidden.float().mul_(slope).to(by_hidden.dtype), by_weight * slope, None, None, None  # `slope` is not rounded


def _enter(x, normalise, dropout, dtype):
    """What enters the first block, of embeddings (B, T, C)."""
    return drop(rms_norm(x) if normalise else x, dropout).to(dtype)


class GPT(nn.Module):
    """A decoder-only transformer over token ids."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = make_embedding(config.rows, config.n_embd)
        self.positions = None if config.modern else make_embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.n_embd, config.rows, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.checkpointing = False  # recompute activations in the backward pass
        self._enter, self._loss_of_rows = _enter, _loss_of_rows
        if not self.embedding.weight.is_meta:
            self._initialise()

    @torch.no_grad()
    def _initialise(self):
        """Normal(0, 0.02); what writes to the residual stream starts at 0 (modern) or scaled by depth (GPT-2).

        A modern embedding's size matters where it is the output layer too, and there alone: look-ups are normalised. At
        0.02 each token would predict itself, with a logit of 0.02 C, so a tied one starts at 1 / C.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:  # the norms' vectors are made as 1
                nn.init.normal_(parameter, std=0.02)
                if name.endswith("out.weight"):
                    parameter.mul_(0.0 if self.config.modern else 1 / math.sqrt(2 * self.config.n_layer))
        if self.config.modern and self.config.tied:
            nn.init.normal_(self.embedding.weight, std=1 / self.config.n_embd)

    @torch.no_grad()
    def start_from_bigrams(self, first, second, count, prior=500.0):
        """Sets embedding and output layer so that a token's logits are about the log-probabilities of what follows it.

        `first`, `second`, `count` (N,), sorted: pairs of tokens and how often they occur. Smoothed by `prior` tokens drawn from
        the unigram distribution u, log P(v | t) is log u(v) + log(1 + count / (prior u(v))) and a constant of t: a vector and a
        sparse matrix. The embedding is that matrix's best approximation of low rank, weighted by the frequency of both tokens
        (compare Levy and Goldberg 2014), and a constant; the output layer is the least-squares fit to its normalised rows. For
        modern blocks, which begin by adding nothing, and an output layer of its own. The numbers are from bench/LOG.md.
        """
        V, C = self.config.vocab_size, self.config.n_embd
        exact = torch.float64  # in float32 the number of threads would turn the axes
        count = count.to(exact)
        frequency = torch.ones(V, 1, dtype=exact).index_add(0, first, count[:, None])
        unigram = torch.full((V,), 0.5, dtype=exact).index_add(0, second, count)
        frequency, unigram = frequency / frequency.sum(), unigram / unigram.sum()
        score = torch.log1p(count / (prior * unigram[second]))

        @torch.sparse.check_sparse_tensor_invariants(False)  # as an argument, torch 2.11 would warn that it is not said
        def sparse(values):
            return torch.sparse_coo_tensor(torch.stack([first, second]), values, (V, V), is_coalesced=True)

        weighted = sparse(score * (frequency[first, 0] * unigram[second]).sqrt())
        basis = torch.randn(V, min(C - 1, V), dtype=exact)  # becomes the largest right singular vectors (Halko et al. 2011)
        for _ in range(2):
            basis = torch.linalg.qr(weighted.t() @ (weighted @ basis)).Q.contiguous()  # sparse products want it so
        left = weighted @ basis
        left = left @ torch.linalg.eigh(left.t() @ left).eigenvectors  # AdamW learns faster along singular vectors
        left /= frequency.sqrt()  # (V, C - 1)
        mean_norm = (frequency.t() @ left.norm(dim=1)).item()
        rows = 0.3 * mean_norm / math.sqrt(C) * torch.randn(V, C, dtype=exact)  # stays where the vocabulary is smaller than the width
        rows[:, :left.shape[1]] = left
        rows[:, -1] = 0.3 * mean_norm  # carries the unigrams; rare tokens have little else
        rows = rms_norm(rows)
        by_frequency = rows * frequency  # (V, C)
        gram = by_frequency.t() @ rows  # (C, C)
        gram += 1e-4 * gram.diagonal().mean() * torch.eye(C)
        target = sparse(score).t() @ by_frequency  # (V, C)
        target += (unigram.log() - unigram.log().mean())[:, None] * by_frequency.sum(dim=0)
        self.head.weight[:V] = torch.linalg.solve(gram, target, left=False)
        self.embedding.weight[:V] = 0.1 * rows  # look-ups are normalised: this is for the size of AdamW's steps

    def compile_parts(self):
        """Compiles the parts in place: one compilation serves all blocks, and DDP's hooks still run block by block."""
        for part in (*self.blocks, self.norm):
            part.compile(dynamic=False)
        self._enter = torch.compile(_enter, dynamic=False)
        self._loss_of_rows = torch.compile(_loss_of_rows, dynamic=False)

    def hidden(self, ids, documents=None, cache=None, place=None):
        """Last hidden states (B, T, C) of ids (B, T).

        `documents` (B, T): positions attend only to earlier ones with the same number, and places are counted from
        the number's first position. With a `cache` the ids come after what it holds, and it is advanced; `place` (T,) is
        the same as a tensor, for a recorded step.
        """
        B, T = ids.shape
        if cache is not None:
            mask = cache.open(T, place)
            place = (cache.place - cache.start[:, None]).clamp(min=0)  # (B, T)
        else:
            place = torch.arange(T, device=ids.device)
            mask = (place <= place[:, None])[None, None]  # (1, 1, T, T)
            if documents is not None:
                mask = mask & (documents[:, None] == documents[:, :, None])[:, None]  # (B, 1, T, T)
                begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
                place = place - torch.where(begins, place, 0).cummax(dim=1).values  # (B, T)
            place = place.view(-1, T)
        x = self.embedding(ids)  # not compiled: the order in which its gradients are added would depend on the threads
        if not self.config.modern:
            x = x + self.positions(place)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        x = self._enter(x, self.config.modern, self.config.dropout if self.training else 0.0, dtype)
        cos, sin = self._rotation(place, x) if self.config.modern else (None, None)
        # Additive: with it a compiled softmax is a quarter faster than with a boolean mask.
        mask = torch.where(mask, 0.0, -math.inf).to(x.dtype if cache is None else cache.keys.dtype)
        for layer, block in enumerate(self.blocks):
            if self.checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache, layer)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def _rotation(self, place, x):
        """Cosines and sines (B or 1, 1, T, D / 2) of the places as `rotate` wants them, in the precision of the activations."""
        half = self.config.head_size // 2
        rates = 10000.0 ** (-torch.arange(half, device=place.device, dtype=torch.float32) / half)
        angles = place[:, None, :, None] * rates
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        # Both halves: three kernels in place of seven on a GPU, and a faster one where it is compiled; slower on a CPU.
        return (cos, sin) if x.device.type == "cpu" else (torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))

    def logits(self, hidden):
        """(…, V) float32 of hidden states (…, C); only ids of the vocabulary."""
        return self.head(hidden)[..., :self.config.vocab_size].float()

    def loss(self, ids, targets, documents=None):
        """Summed nats over the real targets (those that are not -100), a float32 scalar."""
        hidden = self.hidden(ids, documents).flatten(0, 1)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        targets = targets.flatten()
        unused = torch.where(torch.arange(self.config.rows, device=hidden.device) < self.config.vocab_size, 0.0, -math.inf)
        if torch.is_grad_enabled():
            return _LinearCrossEntropy.apply(hidden, self.head.weight, targets, unused, self._loss_of_rows)
        weight = self.head.weight.to(hidden.dtype)
        parts = zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS))
        return sum(_loss_of_rows(rows, weight, wanted, unused)[0] for rows, wanted in parts)

    forward = loss  # what DistributedDataParallel calls

    def count_parameters(self):
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self):
        """Training FLOPs of a position: 6 for each weight in a matrix product (Kaplan et al. 2020), and attention's at
        half of block_size."""
        matrices = sum(p.numel() for block in self.blocks for p in block.parameters() if p.dim() == 2)
        return 6 * (matrices + self.head.weight.numel() + self.config.n_layer * self.config.n_embd * self.config.block_size)

    def kept_bytes(self, width, checkpointing=False):
        """Bytes that a training step keeps of a position for its backward pass where activations have `width` bytes (2 or 4), as
        counted for an eager step on a CPU; compiled blocks and a GPU's attention keep less."""
        c = self.config
        features = {(True, 2): 60, (True, 4): 94, (False, 2): 32, (False, 4): 65}[c.modern, width]
        weights = {2: 6, 4: 4}[width] + ({2: 2, 4: 8}[width] if c.dropout and not c.modern else 0)  # of attention
        block = features * c.n_embd + weights * c.n_head * c.block_size
        return (c.n_layer * width * c.n_embd + block if checkpointing else c.n_layer * block) + 4 * c.n_embd


def extended(model, tokens, dropout, like, known=None):
    """A copy of `model` with `tokens` more tokens, whose embeddings start near that of the token `like`. `known`: how many of its
    tokens to keep, by default all."""
    known = known or model.config.vocab_size
    new = GPT(dataclasses.replace(model.config, vocab_size=known + tokens, dropout=dropout))
    state = model.state_dict()
    for name in ("embedding.weight", "head.weight"):
        old = state[name][:known]
        added = old[like] + 0.1 * old.std() * torch.randn(new.config.rows - known, old.shape[1])
        state[name] = torch.cat([old, added.to(old)])
    new.load_state_dict(state)
    return new


class Classifier(nn.Module):
    """A GPT whose last hidden state at one position is classified (Radford et al. 2018)."""

    def __init__(self, gpt, classes, use_mask=True):
        """`use_mask`: read at each row's last real position, `<extract>`; else at the last of all."""
        super().__init__()
        self.gpt, self.use_mask = gpt, use_mask
        self.classifier = nn.Linear(gpt.config.n_embd, classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, ids, lengths):
        """Scores (B, classes) float32 of ids (B, T), of which `lengths` (B,) in each row are real."""
        B, T = ids.shape
        hidden = self.gpt.hidden(ids)  # filling lies behind, where no real position sees it
        read = hidden[torch.arange(B, device=ids.device), lengths - 1 if self.use_mask else T - 1]  # (B, C)
        with torch.autocast(ids.device.type, enabled=False):
            return self.classifier(read.float())

    def freeze(self, tokens, frozen):
        """Keeps trainable what is used, or if `frozen` only the last block, the norm, the head and the last `tokens` embeddings;
        returns how many parameters that is."""
        gpt, others = self.gpt, 0
        if not gpt.config.tied:
            gpt.head.requires_grad_(False)  # the language model's: of no use here
        if frozen:
            gpt.requires_grad_(False)
            for part in (gpt.blocks[-1], gpt.norm, gpt.embedding):
                part.requires_grad_(True)
            new = torch.zeros(gpt.config.rows, 1, device=gpt.embedding.weight.device)
            new[gpt.config.vocab_size - tokens:gpt.config.vocab_size] = 1
            gpt.embedding.weight.register_hook(lambda gradient: gradient * new)
            others = (gpt.config.rows - tokens) * gpt.config.n_embd  # embeddings that stay
        return sum(p.numel() for p in self.parameters() if p.requires_grad) - others


class Recorded:
    """A function of tensors of fixed shapes as a CUDA graph: the first call just runs it, the second records it, and that and all
    later ones play it back. What it returns is overwritten by the next call.

    A host launches a kernel in 5 to 30 µs; those of a small model, or of one token, are over sooner.
    """

    def __init__(self, function):
        self.function, self.graph, self.warm = function, None, False

    def __call__(self, *tensors):
        if not self.warm:
            self.warm = True
            return self.function(*tensors)
        with torch.cuda.device(tensors[0].device):
            if self.graph is None:
                gc.collect()  # a graph that is freed while another is recorded spoils that one
                inputs, graph = [tensor.clone() for tensor in tensors], torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # its own: freed, it takes that one's workspace (pytorch#193402)
                    self.output = self.function(*inputs)
                self.inputs, self.graph = inputs, graph
            for own, given in zip(self.inputs, tensors):
                own.copy_(given)
            self.graph.replay()
        return self.output


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest."""

    temperature: float = 0.8
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0  # 0: no limit
    min_new_tokens: int = 0  # no stop before that
    max_new_tokens: int = 100
    banned: tuple = (0,)  # ids that are never chosen: <unk>
    exempt: tuple = ()  # ids that no_repeat_ngram leaves alone: parts of words


@functools.lru_cache(maxsize=16)
def _on_device(ids, device):
    """A tuple of ids as a tensor that is made once: a copy to a GPU waits for all that runs there."""
    with torch.inference_mode(False):
        return torch.tensor(ids, dtype=torch.long, device=device)


def adjust(logits, history, sampling):
    """Logits (B, V) with what `sampling` forbids at -inf; `history` (B, n) are the ids of the reply so far."""
    logits = logits.index_fill(1, _on_device(sampling.banned, logits.device), -math.inf)
    n, penalty = sampling.no_repeat_ngram, sampling.repetition_penalty
    if penalty != 1:  # Keskar et al. 2019
        seen = logits.gather(1, history)
        logits.scatter_(1, history, torch.where(seen > 0, seen / penalty, seen * penalty))
    if 0 < n <= history.shape[1]:
        ngrams = history.unfold(1, n, 1)  # (B, m, n)
        last = history[:, history.shape[1] - n + 1:]  # (B, n - 1)
        repeats = (ngrams[:, :, :-1] == last[:, None]).all(dim=-1).to(logits.dtype)  # (B, m)
        repeats = torch.zeros_like(logits).scatter_add_(1, ngrams[:, :, -1], repeats)  # (B, V), without waiting for a GPU
        repeats[:, _on_device(sampling.exempt, logits.device)] = 0
        logits = logits.masked_fill(repeats > 0, -math.inf)
    if sampling.temperature == 0:
        return logits
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / max(sampling.temperature, 1e-30)  # a smaller one is 0 in float32
    if 0 < sampling.top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -math.inf)
    if sampling.min_p > 0:
        logits = logits.masked_fill(logits < math.log(sampling.min_p), -math.inf)  # the likeliest has 0 by now
    if sampling.top_p < 1:  # nucleus (Holtzman et al. 2020): the token that crosses the share stays in
        ordered, share = _likeliest(logits, 256 if logits.device.type == "cpu" else logits.shape[1])
        if ordered.shape[1] < logits.shape[1] and share.sum(dim=-1).min() <= sampling.top_p:
            ordered, share = _likeliest(logits, logits.shape[1])
        kept = share.cumsum(dim=-1) - share <= sampling.top_p
        logits = logits.masked_fill(logits < ordered.masked_fill(~kept, math.inf).min(dim=-1, keepdim=True).values, -math.inf)
    return logits


def _likeliest(logits, count):
    """The highest `count` logits in falling order and their probabilities among all: (B, count) each."""
    ordered = logits.topk(count).values if count < logits.shape[1] else logits.sort(descending=True).values
    return ordered, (ordered - logits.logsumexp(dim=-1, keepdim=True)).exp()


def sample(logits, history, sampling, generator=None):
    """(B,) ids from logits (B, V)."""
    logits = adjust(logits, history, sampling)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # argmax(p / noise) draws from p, without a sync. On a Mac some of the noise is 0, and 0 / 0, of what is forbidden, would win.
    noise = torch.empty_like(logits).exponential_(generator=generator).clamp_(min=1e-30)
    return (logits.softmax(dim=-1) / noise).argmax(dim=-1)


def next_logits(model, ids, cache):
    """(B, V) float32 logits of what follows ids (B, T), which come after what the cache holds. On a GPU single tokens are
    recorded, for each number of positions that attention looks at; not under autocast, whose copies of weights do not last."""
    if ids.device.type != "cuda" or ids.shape[1] > 1 or cache.steps is None or torch.is_autocast_enabled("cuda"):
        return model.logits(model.hidden(ids, cache=cache)[:, -1])
    length, seen = cache.length, cache.seen(1)
    if seen not in cache.steps:
        own = weakref.proxy(cache)  # without a cycle the graphs are freed with the cache
        cache.steps[seen] = Recorded(lambda ids, place: model.logits(model.hidden(ids, cache=own, place=place)[:, -1]))
    try:
        logits = cache.steps[seen](ids, torch.full((1,), length, device=ids.device))
    finally:
        cache.length = length  # recording advances it, even if it is interrupted; playing back does not
    cache.length += 1
    return logits


@torch.inference_mode()
def generate(model, prompts, sampling, stop=(), cache=None, generator=None, scores=None):
    """Yields the next ids (B,) of B prompts (lists of ids) until each has met an id of `stop`; a finished row gives -1.

    A `cache` goes on from an earlier call (prompts are then only what is new, of equal length); it ends up holding
    all but the last ids yielded. Generation ends where the cache, or block_size, is full. `scores` (B,) float32 is
    increased by the log-probability that the model gives each id, whatever `sampling` makes of it.
    """
    device, dtype = model.embedding.weight.device, model.embedding.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    longest = max(len(prompt) for prompt in prompts)
    if cache is None:
        cache = KVCache(model.config, len(prompts), min(model.config.block_size, longest + sampling.max_new_tokens), device, dtype)
        cache.start = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
        cache.steps = None
    elif any(len(prompt) != longest for prompt in prompts):
        raise ValueError("with a cache all prompts must have the same length")
    if longest == 0 or cache.length + longest > cache.size:
        raise ValueError(f"a prompt of {longest} tokens does not fit: {cache.length} of {cache.size} places are taken")
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    history = torch.empty((len(prompts), 0), dtype=torch.long, device=device)
    stops = torch.tensor(list(stop), device=device, dtype=torch.long)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(sampling.max_new_tokens):
        logits = next_logits(model, ids, cache)
        allowed = logits if step >= sampling.min_new_tokens else logits.index_fill(1, stops, -math.inf)
        chosen = sample(allowed, history, sampling, generator)
        if scores is not None:
            scores += logits.log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0].masked_fill(finished, 0.0)
        yield torch.where(finished, -1, chosen)
        history = torch.cat([history, chosen[:, None]], dim=1)
        finished = finished | torch.isin(chosen, stops)
        if finished.all() or cache.length >= cache.size:
            return
        ids = chosen[:, None]


@torch.inference_mode()
def log_probability(model, contexts, replies):
    """(B,) float32: log-probability of each reply (a list of ids) after its context (a list of at least one id)."""
    pairs = list(zip(contexts, replies))
    ids = pad_sequence([torch.tensor([*context, *reply]) for context, reply in pairs], batch_first=True)
    targets = pad_sequence([torch.tensor([IGNORE] * (len(context) - 1) + [*reply]) for context, reply in pairs], True, IGNORE)
    ids, targets = ids.to(model.embedding.weight.device), targets.to(model.embedding.weight.device)
    logits = model.logits(model.hidden(ids[:, :-1]))
    return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).sum(dim=1)


def most_informative(model, replies, scores, weight, opening):
    """Number of the reply with the highest log-probability in its conversation (`scores`) less `weight` times that of the
    reply after nothing but the id `opening`: maximum mutual information (Li et al. 2016), which thinks little of what can
    be said to anything. Both are taken per token: as sums they would prefer short replies."""
    alone = log_probability(model, [[opening]] * len(replies), replies)
    lengths = torch.tensor([len(reply) for reply in replies], device=alone.device)
    return int(((scores - weight * alone) / lengths).argmax())
