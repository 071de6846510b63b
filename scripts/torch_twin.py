"""SwAV in plain PyTorch, on a page: what parity.py compares with and benchmark.py races."""

import torch
import torchvision


class Twin(torch.nn.Module):
    """SwAV in PyTorch: trunk, projection head, prototypes."""

    def __init__(self, arch, width, hidden, dim, prototypes):
        super().__init__()
        self.trunk = torchvision.models.get_model(arch)
        self.trunk.fc = torch.nn.Identity()
        self.projection_head = torch.nn.Sequential(
            torch.nn.Linear(width, hidden),
            torch.nn.BatchNorm1d(hidden),
            torch.nn.ReLU(),
            torch.nn.Linear(hidden, dim),
        )
        self.prototypes = torch.nn.Linear(dim, prototypes, bias=False)

    def forward(self, crops):
        """Scores of all crops, crop-major."""
        features = torch.cat([self.trunk(group) for group in crops])
        embeddings = torch.nn.functional.normalize(self.projection_head(features))
        return self.prototypes(embeddings)

    @torch.no_grad()
    def normalize_prototypes(self):
        """Every prototype at length 1."""
        self.prototypes.weight.copy_(torch.nn.functional.normalize(self.prototypes.weight))


def twin_loss(scores, batch, epsilon, temperature, num_iters):
    """Swapped prediction between the first two crops' codes and all other crops."""
    crops = scores.split(batch)
    log_p = [torch.log_softmax(s / temperature, 1) for s in crops]
    loss = 0
    for a in (0, 1):
        with torch.no_grad():
            q = torch.exp(crops[a] / epsilon)
            for _ in range(num_iters):
                q /= q.sum(0)
                q /= q.sum(1, keepdim=True)
        others = [p for v, p in enumerate(log_p) if v != a]
        loss -= sum((q * p).sum(1).mean() for p in others) / len(others)
    return loss / 2


@torch.no_grad()
def twin_update(model, buffers, lr, optimizer, frozen):
    """LARC as NVIDIA apex scales the gradients, then SGD with momentum."""
    decay, larc = optimizer.weight_decay, optimizer.larc_config
    for name, p in model.named_parameters():
        if name in frozen:
            continue
        g, p_norm, g_norm = p.grad, p.norm(), p.grad.norm()
        if p_norm > 0 and g_norm > 0:
            rate = larc.trust_coefficient * p_norm / (g_norm + decay * p_norm + larc.eps)
            g = (g + decay * p) * rate
        buffers[name] = optimizer.momentum * buffers.get(name, 0) + g
        p -= lr * buffers[name]
