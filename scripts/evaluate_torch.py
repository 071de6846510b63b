"""Evaluate exported weights in PyTorch alone: kNN accuracy of torchvision's model that loads them.

    python -m swav_jax.export --workdir runs/demo --out runs/demo/trunk.pth
    python scripts/evaluate_torch.py runs/demo/trunk.pth --arch resnet18 --size 18 --grid 3

    python scripts/evaluate_torch.py trunk.pth --arch resnet50 --data /imagenet

Nothing of JAX is imported. `--data demo` is the embedded Fashion-MNIST; a folder has one of `train`
and one of `val`, with class folders in each. A ResNet of another width, stem, depth or number of
channels than torchvision's is made to fit the shapes in the file.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.nn import functional
from torchvision import transforms

DEMO = Path(__file__).parents[1] / 'swav_jax' / 'data' / 'fashion_mnist' / 'fashion_mnist.npz'
Dataset = torch.utils.data.Dataset


def load_trunk(weights: Path, arch: str) -> torch.nn.Module:
    """Torchvision's `arch` without its classifier, with the weights of the file; all must fit."""
    if weights.suffix == '.safetensors':
        from safetensors.torch import load_file

        state = load_file(weights)
    else:
        state = torch.load(weights, weights_only=True)
    model = make_trunk(arch, {name: tensor.shape for name, tensor in state.items()})
    model.load_state_dict(state, strict=True)
    return model.eval()


def make_trunk(arch: str, shapes: dict[str, tuple[int, ...]]) -> torch.nn.Module:
    """Torchvision's `arch` without its classifier, made to fit weights of these shapes."""
    model = torchvision.models.get_model(arch)
    model.fc = torch.nn.Identity()
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if 'conv1.weight' in shapes and own != {name: tuple(shape) for name, shape in shapes.items()}:
        _fit(model, shapes)
    return model


def _fit(model: torchvision.models.ResNet, shapes: dict[str, tuple[int, ...]]) -> None:
    """Gives a ResNet the width, the channels, the stem and the blocks that its weights have."""
    width, channels, size, _ = shapes['conv1.weight']
    stride = 1 if size == 3 else 2
    model.inplanes = width
    model.conv1 = torch.nn.Conv2d(channels, width, size, stride, size // 2, bias=False)
    model.bn1 = torch.nn.BatchNorm2d(width)
    if size == 3:
        model.maxpool = torch.nn.Identity()
    for i in range(4):
        old = getattr(model, f'layer{i + 1}')
        stride = 1 if i == 0 else 2
        blocks = len({name.split('.')[1] for name in shapes if name.startswith(f'layer{i + 1}.')})
        new = model._make_layer(type(old[0]), width * 2**i, blocks, stride)
        setattr(model, f'layer{i + 1}', new)


def open_data(data: str, size: int = 28) -> tuple[Dataset, Dataset]:
    """Labelled images to vote with and to be judged on, resized, cropped and normalised."""
    if data == 'demo':
        arrays = np.load(DEMO)
        return tuple(_demo(arrays, split, size) for split in ('train', 'test'))
    prepare = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    train, val = (
        torchvision.datasets.ImageFolder(Path(data) / split, prepare) for split in ('train', 'val')
    )
    _match_classes(train, val)
    return train, val


def _match_classes(train: Dataset, val: Dataset) -> None:
    """Number the classes of `val` as in `train`, by their names; leaves out images of others."""
    named = [(path, val.classes[label]) for path, label in val.samples]
    val.samples = [(p, train.class_to_idx[name]) for p, name in named if name in train.class_to_idx]
    if not val.samples:
        raise ValueError('train and val have no class in common')
    if left_out := len(named) - len(val.samples):
        print(f'{left_out} images of val are left out: train lacks their classes', file=sys.stderr)


def _demo(arrays: np.lib.npyio.NpzFile, split: str, size: int) -> Dataset:
    images = torch.from_numpy(arrays[f'{split}_images']).unsqueeze(1)
    images = transforms.functional.resize(images, size) / 255
    labels = torch.from_numpy(arrays[f'{split}_labels']).long()
    return torch.utils.data.TensorDataset((images - 0.286) / 0.353, labels)


@torch.no_grad()
def features(
    model: torch.nn.Module, data: Dataset, device: str, workers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-length features (N, F) and labels (N,) of all images."""
    loader = torch.utils.data.DataLoader(data, batch_size=256, num_workers=workers)
    parts = [(model(images.to(device)), labels.to(device)) for images, labels in _shown(loader)]
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    return functional.normalize(x), y


def _shown(loader: torch.utils.data.DataLoader) -> Iterator:
    for i, batch in enumerate(loader):
        print(f'\r{i + 1} of {len(loader)} batches', end='', file=sys.stderr, flush=True)
        yield batch
    print(file=sys.stderr)


def knn_top1(
    train: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    k: int,
    temperature: float,
) -> float:
    """Percent of images whose k nearest neighbours, weighted by exp(cosine / T), vote right."""
    correct = 0
    for x, y in zip(test[0].split(1024), test[1].split(1024), strict=True):
        cosine, nearest = (x @ train[0].T).topk(k)
        votes = torch.zeros(len(x), int(train[1].max()) + 1, device=x.device)
        votes.scatter_add_(1, train[1][nearest], (cosine / temperature).exp())
        correct += int((votes.argmax(1) == y).sum())
    return 100 * correct / len(test[1])


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('weights', type=Path, help='what swav_jax.export wrote, layout torchvision')
    parser.add_argument('--arch', default='resnet50', help="name of one of torchvision's models")
    parser.add_argument('--data', default='demo', help="'demo', or a folder with train and val")
    parser.add_argument(
        '--size', type=int, default=28, help="side of the demo's images (config.evaluate.resize)"
    )
    parser.add_argument(
        '--grid', type=int, default=1, help='parts along each side (config.evaluate.feature_grid)'
    )
    parser.add_argument('--k', type=int, default=20)
    parser.add_argument('--temperature', type=float, default=0.07)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--workers', type=int, default=0, help='processes that decode images')
    args = parser.parse_args()
    try:
        model = load_trunk(args.weights, args.arch).to(args.device)
        model.avgpool = torch.nn.AdaptiveAvgPool2d(args.grid)
        train, test = open_data(args.data, args.size)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f'error: {error}')
    train, test = (features(model, data, args.device, args.workers) for data in (train, test))
    top1 = knn_top1(train, test, args.k, args.temperature)
    print(f'{args.arch} {args.weights}: kNN top-1 {top1:.2f}% (k {args.k}, {len(test[1])} images)')


if __name__ == '__main__':
    main()
