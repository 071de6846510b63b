"""SwAV in plain PyTorch, on a page: what parity.py compares with and benchmark.py races."""

import itertools

import torch
from evaluate_torch import make_trunk

from swav_jax import torch_weights


class Twin(torch.nn.Module):
    """SwAV in PyTorch: trunk, projection head, prototypes.

    Args:
      trunk: images (N, C, H, W) → features (N, dims[0]).
      dims: widths of the features and of the head's layers.
      prototypes: their number.
    """

    def __init__(self, trunk, dims, prototypes):
        super().__init__()
        self.trunk = trunk
        layers = []
        for width, out in itertools.pairwise(dims):
            linear = torch.nn.Linear(width, out)
            layers += [linear, torch.nn.BatchNorm1d(out), torch.nn.ReLU()]
        self.projection_head = torch.nn.Sequential(*layers[:-2])
        self.prototypes = torch.nn.Linear(dims[-1], prototypes, bias=False)

    def embed(self, crops):
        """Embeddings of all crops, crop-major."""
        features = torch.cat([self.trunk(group) for group in crops])
        return torch.nn.functional.normalize(self.projection_head(features))

    def forward(self, crops):
        """Scores of all crops, crop-major."""
        return self.prototypes(self.embed(crops))

    @torch.no_grad()
    def normalize_prototypes(self):
        """Every prototype at length 1."""
        self.prototypes.weight.copy_(torch.nn.functional.normalize(self.prototypes.weight))


def twin_tensors(variables, trunk):
    """Tensors of our network, as arrays under the twin's names."""
    tensors = torch_weights.to_torch(variables, 'swav', trunk)
    head = ('projection_head', 'prototypes')
    names = {name: name.removeprefix('module.') for name in tensors}
    return {
        (short if short.startswith(head) else f'trunk.{short}'): tensors[name]
        for name, short in names.items()
    }


def make_twin(arch, tensors):
    """The twin of our network, given torchvision's name of its trunk and `twin_tensors`.

    It has their shapes, not their values.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    trunk = {n.removeprefix('trunk.'): s for n, s in shapes.items() if n.startswith('trunk.')}
    linear = [s for n, s in shapes.items() if n.startswith('projection_head') and len(s) == 2]
    dims = [linear[0][1], *(out for out, _ in linear)]
    twin = Twin(make_trunk(arch, trunk), dims, shapes['prototypes.weight'][0])
    if shapes != {name: tensor.shape for name, tensor in twin.state_dict().items()}:
        raise ValueError(f'{arch} is not the trunk of our network')
    return twin


def twin_loss(scores, batch, epsilon, temperature, num_iters, targets=None):
    """Swapped prediction between the first two crops' codes and all other crops.

    Codes are those of `targets`, scores of the first two crops; None: of `scores` themselves.
    """
    crops = scores.split(batch)
    coded = crops if targets is None else targets.split(batch)
    log_p = [torch.log_softmax(s / temperature, 1) for s in crops]
    loss = 0
    for a in (0, 1):
        with torch.no_grad():
            q = torch.exp(coded[a] / epsilon)
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
