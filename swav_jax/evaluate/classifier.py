"""A linear classifier on a trunk's features, the trunk frozen or fine-tuned with it."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from rich.progress import track

from swav_jax import augment, models
from swav_jax import config as settings
from swav_jax.data import pipeline
from swav_jax.data.bad_images import BadImages
from swav_jax.data.images import Source
from swav_jax.errors import UserError, printable
from swav_jax.evaluate import command, labelled
from swav_jax.evaluate.model import Model
from swav_jax.models.norm import BatchNorm
from swav_jax.parallel import mesh as meshes
from swav_jax.runs.checkpoint import Checkpoints

Tree = dict[str, Any]
Batches = Iterator[dict[str, np.ndarray]]  # `label`, `weight` (B,) and the input of `Look`
Look = Callable[[models.SwAVNet, dict[str, jax.Array], bool], jax.Array]  # features of a batch


@dataclasses.dataclass(frozen=True)
class Recipe:
    """SGD with momentum 0.9; learning rates change once an epoch.

    Attributes:
      epochs: passes over the images; an incomplete last batch is left out.
      learning_rate: initial one of the classifier, for 256 images a step.
      trunk_learning_rate: the same for the trunk; 0 freezes it, in eval mode.
      milestones: epochs after which learning rates are multiplied by `gamma`; if empty, they
        follow half a cosine down to 0.
      gamma: see `milestones`.
      weight_decay: of the linear layer.
      nesterov: whether the momentum is Nesterov's.
      batch_norm: whether to normalise the features first.
      batch_size: images per step, at most all of them.
    """

    epochs: int
    learning_rate: float
    trunk_learning_rate: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    weight_decay: float = 0.0
    nesterov: bool = False
    batch_norm: bool = False
    batch_size: int = 256

    def factor(self, epoch: jax.Array) -> jax.Array:
        """The factor of learning rates in an epoch, counted from 0."""
        if self.milestones:
            return self.gamma ** jnp.sum(epoch >= jnp.array(self.milestones))
        return (1 + jnp.cos(jnp.pi * epoch / self.epochs)) / 2


class Classifier(nn.Module):
    """Logits (N, classes) of features (N, F)."""

    num_classes: int
    batch_norm: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalise the features, if so chosen, and apply the linear layer."""
        x = BatchNorm(name='bn')(x, train) if self.batch_norm else x
        small = nn.initializers.normal(0.01)
        return nn.Dense(self.num_classes, kernel_init=small, name='linear')(x)


def fit(
    model: Model,
    train: Source,
    test: Source,
    recipe: Recipe,
    out: Path,
    *,
    crop_scale: tuple[float, float] | None = (0.08, 1.0),
    seed: int = 0,
) -> dict[str, float]:
    """Train a classifier and test it; resumes an interrupted call with the same `out`.

    Args:
      model: the trunk.
      train: labelled images to learn from, seen as random resized crops, flipped half of the time.
      test: labelled images to test on, prepared according to `config.evaluate`. Classes are matched
        by name, see `labelled.pair`.
      recipe: the optimizer.
      out: folder for a checkpoint per epoch and a list of the images that cannot be read.
      crop_scale: least and largest share of an image's area in a crop; None computes the features
        of each image's centre once, which needs a frozen trunk.
      seed: of the weights, the order and the crops.

    Returns:
      `top1` and `top5` in percent after the last epoch, and the `loss` of the last step.

    Raises:
      UserError: `out` holds another training, the loss is not finite, the classes cannot be
        matched, or too many images cannot be read.
    """
    matched = labelled.pair(train, test)
    train, test = matched.train, matched.test
    mesh = meshes.make_mesh({'enabled': True, 'group_size': 0})
    batch_size = min(recipe.batch_size, len(train)) // mesh.size * mesh.size
    if batch_size == 0:
        raise UserError(f'{len(train)} labelled images cannot be spread over {mesh.size} devices')
    steps_per_epoch = len(train) // batch_size
    if recipe.epochs * steps_per_epoch >= 2**31:
        raise UserError(
            f'{recipe.epochs:,} epochs of {steps_per_epoch:,} steps are too many: use at most '
            f'{(2**31 - 1) // steps_per_epoch:,} epochs'
        )
    net = Classifier(len(train.class_names), recipe.batch_norm)
    tx = _optimizer(recipe, batch_size, steps_per_epoch)
    state = meshes.put(mesh, _initial_state(model, net, recipe, tx, seed))
    about = {
        'recipe': dataclasses.asdict(recipe) | {'milestones': list(recipe.milestones)},
        'crop_scale': crop_scale and list(crop_scale),
        'batch_size': batch_size,
        'seed': seed,
    } | describe(model, train)
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(out / 'checkpoints', keep=1)
    restored = checkpoints.restore(state, lambda before: _check_same(about, before, out))
    state = restored[0] if restored else state

    first, last = int(state['step']), recipe.epochs * steps_per_epoch
    if first < last:
        if crop_scale is None:
            look, batches = _centres(model, train, batch_size, seed, first)
        else:
            look, batches = _crops(model, train, batch_size, seed, first, crop_scale, out)
        step = jax.jit(
            _make_step(model.net, net, tx, look),
            out_shardings=NamedSharding(mesh, meshes.REPLICATED),
            donate_argnums=0,
        )
        trunk = meshes.put(mesh, _trunk_of(model.variables))
        loss = None
        for number in track(range(first + 1, last + 1), 'training', last, completed=first):
            batch = meshes.put_batch(mesh, next(batches))
            previous, (state, loss) = loss, step(state, trunk, batch)
            jax.block_until_ready(previous)  # one step runs, one waits; more would hold memory
            if number % steps_per_epoch == 0:
                if not np.isfinite(loss):
                    raise UserError(f'the loss is {loss}: lower the learning rates')
                checkpoints.save(number, state, about)
    checkpoints.close()
    return measure(model, net, state, test) | {'loss': float(state['loss'])}


def describe(model: Model, train: Source) -> dict[str, Any]:
    """What a classifier is made from, for JSON: two that differ have different values."""
    data, evaluate = (settings.to_dict(model.config[name]) for name in ('data', 'evaluate'))
    return {
        'trunk_weights': model.digest(),
        'precision': model.config.precision,
        'data': {name: data[name] for name in ('canvas_size', 'channels', 'mean', 'std')},
        'evaluate': {name: evaluate[name] for name in ('size', 'resize', 'feature_grid')},
        'images': len(train),
        'classes': len(train.class_names),
        'images_and_labels': train.digest(labels=True, contents=True),
    }


def measure(model: Model, net: Classifier, state: Tree, test: Source) -> dict[str, float]:
    """`accuracies` of a classifier on `test`, with the trunk that was fine-tuned, if it was."""
    state = jax.tree.map(np.asarray, state)
    trunk = _trunk_of(model.variables, state)
    found = command.extract(dataclasses.replace(model, variables=trunk), test, of_head=())
    variables = {kind: state[kind]['classifier'] for kind in ('params', 'batch_stats')}
    logits = jax.jit(lambda x: net.apply(variables, x, False))(found.trunk)
    return accuracies(np.asarray(logits)[found.readable], test.labels[found.readable])


def accuracies(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`top1` and `top5` in percent: how often a label is among the largest logits (N, C)."""
    best = np.argsort(-logits, axis=1, kind='stable')[:, :5]
    hit = best == labels[:, None]
    return {'top1': float(100 * hit[:, 0].mean()), 'top5': float(100 * hit.any(1).mean())}


def _centres(
    model: Model, source: Source, batch_size: int, seed: int, first: int
) -> tuple[Look, Batches]:
    """Batches of features of the images' centres, which are computed once."""
    found = command.extract(model, source, of_head=())
    weight = np.float32(found.readable)
    share = batch_size // jax.process_count()
    start = jax.process_index() * share

    def batches():
        for step in itertools.count(first):
            epoch, place = divmod(step, len(source) // batch_size)
            order = np.random.default_rng([seed, epoch]).permutation(len(source))
            chosen = order[place * batch_size :][start : start + share]
            yield {
                'features': found.trunk[chosen],
                'label': source.labels[chosen],
                'weight': weight[chosen],
            }

    return (lambda net, batch, train: batch['features']), batches()


def _crops(
    model: Model,
    source: Source,
    batch_size: int,
    seed: int,
    first: int,
    scale: tuple[float, float],
    out: Path,
) -> tuple[Look, Batches]:
    """Batches of images, of which the network sees a random crop, flipped half of the time."""
    data = model.config.data.copy_and_resolve_references().unlock()
    data.update(num_crops=(1,), size_crops=(model.config.evaluate.size,), crop_scales=(scale,))
    flip = model.config.augment.copy_and_resolve_references()
    flip.update(flip_p=0.5, color_jitter_p=0.0, grayscale_p=0.0, blur_radius_max=0.0)
    bad = BadImages(source, out / 'bad_images.txt', data.max_bad_fraction)

    def batches():
        rows = np.arange(batch_size).reshape(jax.process_count(), -1)[jax.process_index()]
        for batch in pipeline.train_batches(
            source, data, seed=seed, global_batch=batch_size, first_step=first, rows=rows
        ):
            for name in bad.update(batch['index'], batch['weight']):
                command.say([f'cannot be read, does not count: {name}'])
            if len(bad.names) == len(source):
                raise UserError(f'none of {len(source):,} images can be read: see {bad.path}')
            yield batch | {'label': source.labels[batch['index']]}

    def look(net, batch, train):
        (images,) = augment.multi_crop(batch, seed=seed, data=data, augment=flip)
        return net.features(images, train, model.config.evaluate.feature_grid)

    return look, batches()


def _make_step(
    trunk_net: models.SwAVNet, net: Classifier, tx: optax.GradientTransformation, look: Look
) -> Callable[[Tree, Tree, Tree], tuple[Tree, jax.Array]]:
    """A step: state, variables of the frozen trunk, batch → next state, loss."""

    def step(state, trunk, batch):
        finetune = 'trunk' in state['params']
        stats = state['batch_stats']

        def loss_of(params):
            seen = _trunk_of(trunk, {'params': params, 'batch_stats': stats})
            features, moved = trunk_net.apply(
                seen, batch, finetune, method=look, mutable=['batch_stats']
            )
            variables = {'params': params['classifier'], 'batch_stats': stats['classifier']}
            logits, new = net.apply(variables, features, True, mutable=['batch_stats'])
            new_stats = {'classifier': new.get('batch_stats', {})}
            if finetune:
                new_stats |= moved.get('batch_stats', {})
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
            weight = batch['weight']  # 0 for an image that could not be read
            return jnp.sum(losses * weight) / jnp.maximum(jnp.sum(weight), 1), new_stats

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state['params'])
        updates, opt_state = tx.update(grads, state['opt_state'], state['params'])
        state = {
            'step': state['step'] + 1,
            'params': optax.apply_updates(state['params'], updates),
            'batch_stats': stats,
            'opt_state': opt_state,
            'loss': loss,
        }
        return state, loss

    return step


def _optimizer(
    recipe: Recipe, batch_size: int, steps_per_epoch: int
) -> optax.GradientTransformation:
    def decays(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: 'linear' in [part.key for part in path], params
        )

    def sgd(learning_rate):
        peak = learning_rate * batch_size / 256
        return optax.chain(
            optax.add_decayed_weights(recipe.weight_decay, mask=decays),
            optax.trace(0.9, nesterov=recipe.nesterov),
            optax.scale_by_learning_rate(lambda n: peak * recipe.factor(n // steps_per_epoch)),
        )

    parts = {'classifier': sgd(recipe.learning_rate), 'trunk': sgd(recipe.trunk_learning_rate)}
    return optax.partition(parts, lambda params: {name: name for name in params})


def _initial_state(
    model: Model, net: Classifier, recipe: Recipe, tx: optax.GradientTransformation, seed: int
) -> Tree:
    width = models.feature_width(model.net.trunk, model.config.data.channels)
    width *= model.config.evaluate.feature_grid**2
    variables = net.init(jax.random.key(seed), jnp.zeros((2, width)), train=True)
    parts = {kind: {'classifier': variables.get(kind, {})} for kind in ('params', 'batch_stats')}
    if recipe.trunk_learning_rate:
        trunk = _trunk_of(model.variables)
        parts = {kind: part | trunk[kind] for kind, part in parts.items()}
    return parts | {
        'step': np.int32(0),
        'opt_state': tx.init(parts['params']),
        'loss': np.float32(np.nan),
    }


def _trunk_of(*variables: Tree) -> Tree:
    """The trunk's variables in the last of several trees that has them."""
    found = {'params': {}, 'batch_stats': {}}
    for tree in variables:
        for kind, part in found.items():
            part |= {name: x for name, x in tree.get(kind, {}).items() if name == 'trunk'}
    return found


def _check_same(about: Tree, before: Tree, out: Path) -> None:
    for name, value in about.items():
        if before.get(name) != value:
            was = f'{name} {before[name]}' if name in before else f'an unknown {name}'
            raise UserError(
                f'--out={printable(out)} holds a training with {was} instead of {value}: '
                'name another'
            )
