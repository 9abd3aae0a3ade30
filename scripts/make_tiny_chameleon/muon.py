"""The Muon optimizer, all matrices of one shape at once, in float32.

scripts/make_tiny_janus has it in bfloat16, which a CPU without instructions for it takes a hundred times as long for.
"""

import torch


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024, Muon), for matrices.

    torch.optim.Muon takes one matrix at a time, which a CPU is slow at; here all matrices of one shape go through one
    batched product. Steps are scaled so that AdamW's learning rates fit (Liu et al. 2025).
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, members in shapes.items():
                updates = []
                for p in members:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                update = orthogonal(torch.stack(updates))
                for p, u in zip(members, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonal(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U·Vᵀ of each matrix's singular value decomposition; (B, rows, columns)."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x
