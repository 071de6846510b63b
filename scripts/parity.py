"""Train a PyTorch twin next to swav_jax, from the same weights on the same crops, and compare.

    python scripts/parity.py [--arch resnet18] [--steps 10] [--precision float64] [--batch 8]
        [--method swav]

The twin is torchvision's model, SwAV's head and loss, LARC and SGD, all written in plain
PyTorch (torch_twin.py), so that what it computes can be read on one page; torch_methods.py has what
the other methods add. Epochs of DeepCluster-v2 have four steps. Every step prints both losses, and
how far the parameters have drifted apart. Float64 agrees to rounding. In float32 the two orders of
summation differ by 1e-7, and training multiplies the difference.
"""

import os
import sys
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_methods
from torch_twin import make_twin, twin_tensors, twin_update

from swav_jax import cli, methods, models, optim, step
from swav_jax import config as settings
from swav_jax.config import trunks
from swav_jax.parallel.layout import Layout
from swav_jax.parallel.mesh import AXES, make_mesh, put

CROPS = ((64, 2), (32, 2))  # size, number
PROTOTYPES, HIDDEN, DIM, FROZEN_STEPS, STEPS_PER_EPOCH = 30, 64, 16, 2, 4
TWINS = {
    'swav': torch_methods.SwAV,
    'swav_momentum': torch_methods.SwAVMomentum,
    'deepcluster_v2': partial(torch_methods.DeepClusterV2, steps_per_epoch=STEPS_PER_EPOCH),
}
TRUNKS = {
    'resnet18': dict(name='resnet', depth=18),
    'resnet34': dict(name='resnet', depth=34),
    'resnet50': dict(name='resnet', depth=50),
    'resnet101': dict(name='resnet', depth=101),
    'resnext50_32x4d': dict(name='resnet', depth=50, groups=32, width_per_group=4),
    'regnet_y_400mf': dict(name='regnet_y_400mf'),
    'regnet_y_800mf': dict(name='regnet_y_800mf'),
}


def make_config(arch, method):
    """Our settings of the same training."""
    config = settings.default()
    config.method = method
    config.data.size_crops, config.data.num_crops = zip(*CROPS, strict=True)
    config.model.trunk = trunks.section(**TRUNKS[arch])
    config.model.head.dims = (0, HIDDEN, DIM)
    config.model.head.num_clusters = (PROTOTYPES,)
    config.model.temp_frozen_params_iter_map = (('head/prototypes0', FROZEN_STEPS),)
    return config


def drift(ours, twin):
    """Largest distance of a tensor from its twin, relative to the tensor's length."""
    worst, where = 0.0, ''
    for name, tensor in twin.items():
        if name.endswith('num_batches_tracked'):
            continue
        theirs = tensor.detach().double().numpy()
        distance = np.linalg.norm(ours[name] - theirs) / max(np.linalg.norm(theirs), 1e-12)
        if distance > worst:
            worst, where = distance, name
    return worst, where


def ours_as_torch(state, trunk):
    """Our weights under the twin's names."""
    variables = jax.device_get({'params': state.params, 'batch_stats': state.batch_stats})
    return twin_tensors(variables, trunk)


def main(argv: Sequence[str]) -> None:
    """Parse, train both, print the table."""
    parser = cli.Parser(__doc__)
    parser.add_argument('--arch', choices=sorted(TRUNKS), default='resnet18')
    parser.add_argument('--steps', type=cli.integer(1), default=10)
    parser.add_argument('--precision', choices=('float32', 'float64'), default='float64')
    parser.add_argument('--batch', type=cli.integer(1), default=8)
    parser.add_argument('--method', choices=sorted(TWINS), default='swav')
    args = parser.parse(argv)
    jax.config.update('jax_enable_x64', args.precision == 'float64')
    dtype = np.dtype(args.precision)

    config = make_config(args.arch, args.method)
    mesh = make_mesh(config.model.sync_bn, jax.devices()[:1])
    net = models.build(config.model, dtype=dtype)
    example = [jnp.zeros((2, size, size, 3), dtype) for size, _ in CROPS]
    variables = jax.jit(lambda: net.init(jax.random.key(0), example, train=True))()
    images = STEPS_PER_EPOCH * args.batch
    sizes = SimpleNamespace(
        batch_size=args.batch, steps_per_epoch=STEPS_PER_EPOCH, num_images=images
    )
    method = methods.make(config)
    method.check_run(sizes)
    params, own = method.init(variables['params'], variables['batch_stats'], sizes)
    rates = np.linspace(0.3, 1.2, args.steps)
    tx = optim.make_optimizer(
        config.optimizer,
        lambda count: jnp.asarray(rates, dtype)[count],
        dict(config.model.temp_frozen_params_iter_map),
        params,
    )
    state = step.TrainState(
        step=jnp.int32(0),
        failed=jnp.array(False),
        params=params,
        batch_stats=variables['batch_stats'],
        opt_state=tx.init(params),
        method=own,
        loss_scale=None,
    )
    state = put(mesh, jax.device_get(state))

    tensors = ours_as_torch(state, net.trunk)
    twin = make_twin(args.arch, tensors).to(getattr(torch, args.precision))
    twin.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    buffers, twins = {}, TWINS[args.method](twin, config, args.batch)

    net = models.build(config.model, dtype=dtype, axis_names=('member',), mesh_axes=AXES)
    layout = Layout(mesh, state, 'replicated', method.specs(state.method))
    update = jax.jit(partial(step.update, net, tx, config, layout))
    weights = np.ones(args.batch, np.float32)

    def batch_of(t):
        """Crops here and in PyTorch, and the images' numbers, each once in an epoch."""
        rng, epoch = np.random.default_rng(t), t // STEPS_PER_EPOCH
        crops = [
            rng.standard_normal((n, args.batch, size, size, 3)).astype(dtype) for size, n in CROPS
        ]
        order = np.random.default_rng([epoch, images]).permutation(images)
        index = order.reshape(STEPS_PER_EPOCH, -1)[t % STEPS_PER_EPOCH].astype(np.int32)
        return crops, [torch.tensor(c).flatten(0, 1).movedim(-1, 1) for c in crops], index

    if method.fills:
        see = step.make_fill(net, config, layout)
        for t in range(STEPS_PER_EPOCH):
            crops, groups, index = batch_of(t)
            state = see(state, np.int32(t), crops, weights, index)
            twins.fill(groups, t, index)

    print(f'{args.method}, {args.arch}, {args.precision}, batch {args.batch}, crops {CROPS}, LARC')
    print('step   PyTorch loss      our loss          difference   largest drift of a tensor')
    for t in range(args.steps):
        crops, groups, index = batch_of(t)
        twin.zero_grad()
        loss = twins.loss(groups, t, index)
        loss.backward()
        trains_prototypes = twins.trains_prototypes and t >= FROZEN_STEPS
        frozen = () if trains_prototypes else ('prototypes.weight',)
        twin_update(twin, buffers, rates[t], config.optimizer, frozen)
        twins.after_update()

        state, metrics = update(state, crops, weights, index)
        ours, theirs = float(metrics['loss']), loss.item()
        worst, where = drift(ours_as_torch(state, net.trunk), twin.state_dict())
        print(
            f'{t:4d}   {theirs:<16.12f}  {ours:<16.12f}  {abs(ours / theirs - 1):<10.1e}   '
            f'{worst:.1e}  {where}'
        )


if __name__ == '__main__':
    sys.exit(cli.run(main, sys.argv[1:]))
