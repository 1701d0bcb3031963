"""Optimizers and learning rates."""

import math

import torch


class StackedMuon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024), with the matrices of one shape orthogonalised together.

    The same update and state, with fewer and larger kernels. `dtype` is the arithmetic of the
    orthogonalisation: bfloat16 as there, or float32, where runs are to agree to float32's precision.
    """

    def __init__(self, params, dtype=torch.bfloat16, **options):
        super().__init__(params, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            shapes = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                gradients = [parameter.grad for parameter in parameters]
                for parameter in parameters:
                    if "momentum_buffer" not in self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
                torch._foreach_lerp_(momentum, gradients, 1 - group["momentum"])
                updates = torch._foreach_lerp(gradients, momentum, group["momentum"]) if group["nesterov"] else momentum
                updates = orthogonalise(torch.stack(updates).to(self.dtype), group["ns_coefficients"], group["ns_steps"], group["eps"])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                scale = group["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
                torch._foreach_add_(parameters, [u.to(parameters[0].dtype) for u in updates.unbind()], alpha=-scale)
        return loss


def orthogonalise(matrices, coefficients, steps, eps):
    """(N, A, B) matrices, each with its singular values driven towards 1 by Newton-Schulz iterations."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT.contiguous() if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def make_optimizers(model, settings, dtype=torch.bfloat16):
    """The optimizers of `model`: AdamW on everything, or Muon on the blocks' matrices and AdamW on the rest.

    `dtype` is that of the model's matrix products: a float32 run has Muon compute in float32 too.

    Each group keeps its peak learning rate as "peak"; frozen parameters are left out.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [p for name, p in named if p.dim() == 2 and "blocks." in name and settings.optimizer == "muon"]
    hidden = {id(p) for p in matrices}
    decayed = [p for _, p in named if p.dim() == 2 and id(p) not in hidden]
    vectors = [p for _, p in named if p.dim() < 2]
    groups = [dict(params=decayed, weight_decay=settings.weight_decay), dict(params=vectors, weight_decay=0.0)]
    adamw = torch.optim.AdamW([g | dict(peak=settings.lr) for g in groups if g["params"]], lr=settings.lr,
                              betas=(settings.beta1, settings.beta2), fused=True)
    if not matrices:
        return [adamw]
    muon = StackedMuon([dict(params=matrices, peak=settings.muon_lr)], lr=settings.muon_lr, weight_decay=settings.weight_decay,
                       dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16)
    return [muon, adamw]


def learning_rate(step, done, settings):
    """The factor on every peak learning rate at `step`, when the share `done` (0 to 1) of the run lies behind."""
    floor = settings.min_lr / settings.lr if settings.lr else 0.0
    if settings.schedule == "cosine":
        factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    else:
        share = settings.decay_share
        factor = floor + (1 - floor) * (min(1.0, max(0.0, 1 - done) / share) if share else 1.0)
    return factor * min(1.0, (step + 1) / (settings.warmup_steps + 1))


def share_done(settings, steps, minutes, epochs):
    """How much of the run lies behind, by whichever limit comes first: 1 or more at its end."""
    return max(steps / settings.max_steps if settings.max_steps else 0,
               minutes / max(settings.max_minutes, 1e-9) if settings.max_minutes is not None else 0,
               epochs / settings.max_epoch)


def schedule_share(settings, steps, share):
    """How much of the learning rate's schedule lies behind."""
    if settings.decay_steps and not settings.max_steps and settings.max_minutes is None:
        return min(1.0, steps / settings.decay_steps)
    return share


def update(optimizers, scaler, model, settings, keep):
    """Clips the gradient, takes a step unless it is not finite, and clears it (`keep`: to zeros, in place); its norm."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)
    if torch.isfinite(norm):  # the same in every process: gradients are
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=not keep)
    return norm


def set_learning_rate(optimizers, factor):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
