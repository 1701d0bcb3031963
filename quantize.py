"""Weights in 4 or 8 bits for decoding on a CPU, where a token costs as much as reading all weights.

Both go through torch's `_weight_int4pack_mm_for_cpu`; its 8-bit sister reads a third as many weights a second. So 8 bits are
two planes of 4: w = scale * (16 * high + low), both in one product.
"""

import torch
import torch.nn as nn

from settings import UserError

GROUPS = {"int4": 32, "int8": 128}  # weights in a row that share a scale
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)  # 4 bits: shares of a group's range that are tried


class PackedLinear(nn.Module):
    """A Linear whose weight is integers in groups, each with a scale and a zero."""

    def __init__(self, linear, kind):
        super().__init__()
        weight = linear.weight.detach()
        self.rows, columns = weight.shape
        self.planes, self.group = 2 if kind == "int8" else 1, GROUPS[kind]
        while columns % self.group:
            self.group //= 2
        groups = weight.float().view(self.rows, -1, self.group)  # (N, K / g, g)
        values, scale, zero = (_eight if kind == "int8" else _four)(groups, weight.dtype)
        self.weight = torch._convert_weight_to_int4pack_for_cpu(values.view(-1, columns).int(), 1)
        self.scales = torch.cat([scale, zero], dim=2).transpose(0, 1).to(weight.dtype).contiguous()  # (K / g, planes * N, 2)
        self.bias = linear.bias

    def forward(self, x):
        y = torch._weight_int4pack_mm_for_cpu(x.reshape(-1, x.shape[-1]), self.weight, self.group, self.scales)
        if self.planes == 2:
            y = y[:, :self.rows] + y[:, self.rows:]
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.rows)


def _four(groups, dtype):
    """(values 0–15, scale, zero) with w = (value - 8) * scale + zero, the range clipped where that costs least. Scales and zeros are
    (N, K / g, 1)."""
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    best = (torch.inf, 0.0, 0.0, 0.0)  # error, values, scale, zero
    for clip in CLIPS:
        scale = ((high - low) * clip / 15).clamp(min=1e-8).to(dtype).float()
        zero = ((low + high) / 2 + scale / 2).to(dtype).float()  # value 7.5 is the middle
        values = ((groups - zero) / scale).round().clamp(-8, 7)
        error = (values * scale + zero - groups).square().sum(dim=2, keepdim=True)
        best = [torch.where(error < best[0], new, old) for new, old in zip((error, values, scale, zero), best)]
    return best[1] + 8, *best[2:]


def _eight(groups, dtype):
    """The same for the planes of 8 bits, the high ones above the low ones: w = 16 s * high + (s * (low - 8) + 8 s)."""
    scale = (groups.abs().amax(dim=2, keepdim=True) / 127).clamp(min=1e-8).to(dtype).float()
    values = (groups / scale).round().clamp(-128, 127)
    high = (values / 16).floor()
    low = values - 16 * high  # 0–15
    return torch.cat([high + 8, low]), torch.cat([16 * scale, scale]), torch.cat([torch.zeros_like(scale), 8 * scale])


def quantize(model, kind):
    """Replaces the model's Linears, its output layer too, by packed ones; embeddings are only looked up and stay."""
    if model.embedding.weight.device.type != "cpu":
        raise UserError(f"quantize={kind} is for CPUs; use device=cpu, or leave it out")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                if child.in_features % 32 or child.out_features % 16:
                    raise UserError(f"quantize={kind} needs input sizes divisible by 32 and output sizes by 16; this model has a "
                                    f"matrix from {child.in_features} to {child.out_features}")
                setattr(module, name, PackedLinear(child, kind))
    return model
