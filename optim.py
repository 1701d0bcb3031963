"""Optimizers and learning rates."""

import math

import torch
import torch.distributed as dist


class BlockMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) that orthogonalises matrices in blocks, those of one shape together.

    `blocks` of a parameter group has for each matrix the size of its blocks and the side (0 or 1) that they divide. A block
    as large as the side is torch.optim.Muon; an update has that one's norm in any case. `dtype` is the arithmetic of the
    orthogonalisation: bfloat16 as there, or float32, where runs are to agree to float32's precision. The processes of
    `process_group`, whose gradients are the same, orthogonalise a share of the matrices each and exchange them.
    """

    def __init__(self, params, dtype, process_group=None, **options):
        super().__init__(params, **options)
        self.dtype, self.process_group = dtype, process_group

    @torch.no_grad()
    def step(self):
        processes = self.process_group
        rank, world = (dist.get_rank(processes), dist.get_world_size(processes)) if processes else (0, 1)
        for group in self.param_groups:
            alike = {}
            for parameter, block in zip(group["params"], group["blocks"]):
                if parameter.grad is not None:
                    alike.setdefault((parameter.shape, *block), []).append(parameter)
                    if "momentum_buffer" not in self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            for (shape, size, side), parameters in alike.items():
                gradients = [parameter.grad for parameter in parameters]
                momentum = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
                # On a CPU one matrix after the other, which stays in its cache meanwhile.
                together = 1 if parameters[0].device.type == "cpu" else len(parameters)
                parts = [slice(i, i + together) for i in range(0, len(parameters), together)]
                share = -(-len(parameters) // world)  # of each process; the last may have less to do
                updates = torch.empty(share * world, *shape, dtype=self.dtype, device=parameters[0].device)  # (N, A, B)
                for part in parts:
                    torch._foreach_lerp_(momentum[part], gradients[part], 1 - group["momentum"])
                    torch._foreach_copy_(updates[part].unbind(), torch._foreach_lerp(gradients[part], momentum[part], group["momentum"]))
                own = updates[rank * share:(rank + 1) * share].movedim(1 + side, 1)  # first the side that blocks divide
                blocks = orthogonalise(own.reshape(-1, size, own.shape[2]), group["ns_coefficients"], group["ns_steps"], group["eps"])
                own = blocks.reshape(own.shape).movedim(1, 1 + side)
                if processes:
                    dist.all_gather(list(updates.split(share)), own.contiguous(), group=processes)
                updates = (updates if processes else own).to(parameters[0].dtype, memory_format=torch.contiguous_format).contiguous()
                # torch.optim.Muon's update has the norm sqrt(rows).
                scale = math.sqrt(shape[0] * size / (shape[side] * min(size, shape[1 - side])))
                for part in parts:
                    if group["weight_decay"]:
                        torch._foreach_mul_(parameters[part], 1 - group["lr"] * group["weight_decay"])
                    torch._foreach_add_(parameters[part], updates[part].unbind(), alpha=-group["lr"] * scale)


def muon_block(name, matrix, head_size):
    """(size, side) of the blocks of a matrix inside a GPT's block: an attention head, or 64 hidden units of the MLP (where 64
    does not divide them, the next number that does). In 60 steps of the 7M shape it learnt more than whole matrices, in
    1,640 as much, for a fraction of the operations (bench/LOG.md)."""
    side = int(name.endswith("out.weight"))  # what writes to the residual stream has its heads or units in its columns
    if ".attention." in name:
        return head_size, side
    units = matrix.shape[side]
    return next(size for size in range(min(64, units), units + 1) if units % size == 0), side


def orthogonalise(matrices, coefficients, steps, eps):
    """(N, A, B) matrices, each with its singular values driven towards 1 by Newton-Schulz iterations."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT.contiguous() if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)  # + a x would be another pass; in bfloat16 3.5 % off the exact result, not 1.4
        x = polynomial @ x
    return x.mT if tall else x


def make_optimizers(model, settings, dtype, process_group=None):
    """The optimizers of `model`: AdamW on everything, or Muon on the blocks' matrices and AdamW on the rest.

    `dtype` is that of the model's matrix products: Muon computes in bfloat16 where they do, else in float32. `process_group`: see
    BlockMuon.

    Each group keeps its peak learning rate as "peak"; frozen parameters are left out.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = {name: p for name, p in named if p.dim() == 2 and "blocks." in name and settings.optimizer == "muon"}
    decayed = [p for name, p in named if p.dim() == 2 and name not in matrices]
    vectors = [p for _, p in named if p.dim() < 2]
    groups = [dict(params=decayed, peak=settings.lr, weight_decay=settings.weight_decay), dict(params=vectors, peak=settings.lr)]
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), weight_decay=0.0, fused=True)
    if not matrices:
        return [adamw]
    head_size = getattr(model, "gpt", model).config.head_size  # a classifier has its GPT inside
    blocks = [muon_block(name, matrix, head_size) for name, matrix in matrices.items()]
    muon = BlockMuon([dict(params=list(matrices.values()), blocks=blocks, peak=settings.muon_lr)], lr=settings.muon_lr,
                     weight_decay=settings.weight_decay, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
                     process_group=process_group)
    return [muon, adamw]


def learning_rate(step, done, settings):
    """The factor on every peak learning rate at `step`, when the share `done` (0 to 1) of the run lies behind."""
    if settings.decay_steps and not settings.max_steps and settings.max_minutes is None:
        done = step / settings.decay_steps  # the original's way
    floor = settings.min_lr / settings.lr if settings.lr else 0.0
    if settings.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    else:
        height = min(1.0, max(0.0, 1 - done) / settings.decay_share) if settings.decay_share else 1.0
    return (floor + (1 - floor) * height) * min(1.0, (step + 1) / (settings.warmup_steps + 1))


def share_done(settings, steps, minutes, epochs):
    """How much of the run lies behind, by whichever of its limits (steps, minutes, epochs) comes first: 1 or more at its end."""
    return max(steps / settings.max_steps if settings.max_steps else 0,
               minutes / max(settings.max_minutes, 1e-9) if settings.max_minutes is not None else 0,
               epochs / settings.max_epoch)


def clip(parameters, limit):
    """Scales the gradients so that their total norm is at most `limit` (0: no limit); returns the norm before, a float."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    if limit and norm > limit:
        torch._foreach_mul_(gradients, limit / norm)
    return norm


def update(optimizers, scaler, model, settings):
    """Clips the gradient and takes a step unless it is not finite; returns the gradient's norm before clipping, a float."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = clip(model.parameters(), settings.grad_clip)
    if math.isfinite(norm):  # the same in every process: gradients are
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()
    return norm


def set_learning_rate(optimizers, factor):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
