"""Every setting with its default, the checks on them, and the numbers that follow from them.

Settings carry VISSL's names where VISSL has one (config/defaults.yaml). A config file calls
`default()`, changes what its recipe changes, and returns it; `validate` refuses what cannot work
before anything is compiled. A setting has the type of its default, and its range in
swav_jax/config/validation.py.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from swav_jax.config import validation
from swav_jax.errors import UserError


def default() -> ConfigDict:
    """VISSL's SwAV recipe for ResNet-50 at 400 epochs; every config starts from it."""
    config = ConfigDict()
    config.seed = 0
    config.precision = 'float32'
    config.sharding = 'replicated'  # 'zero': each device keeps a slice of weights and momentum
    config.init_from = ''  # PyTorch weights, FILE or FILE:student, or a run's folder
    config.init_allow_partial = False  # start from them also where they do not fill the trunk

    config.data = ConfigDict()
    config.data.source = ''  # 'demo', 'folder:/path', …: see swav_jax/data/sources.py
    config.data.limit = 0  # use so many images, spread evenly over the source (0: all)
    config.data.batchsize_per_replica = 64
    config.data.canvas_size = 512  # images are decoded onto a uint8 square of this side
    config.data.channels = 3
    config.data.num_crops = (2, 6)
    config.data.size_crops = (224, 96)
    config.data.crop_scales = ((0.14, 1.0), (0.05, 0.14))
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.max_bad_fraction = 0.01  # of all images; more unreadable ones stop the run

    config.augment = ConfigDict()
    config.augment.flip_p = 0.5
    config.augment.brightness = 0.8
    config.augment.contrast = 0.8
    config.augment.saturation = 0.8
    config.augment.hue = 0.2
    config.augment.color_jitter_p = 0.8
    config.augment.grayscale_p = 0.2
    config.augment.blur_p = 0.5
    config.augment.blur_radius_min = 0.1  # standard deviation of the blur, in pixels of the crop
    config.augment.blur_radius_max = 2.0

    config.model = ConfigDict()
    config.model.trunk = ConfigDict()
    config.model.trunk.name = 'resnet'  # or 'regnet', or torchvision's name, as regnet_y_400mf
    config.model.trunk.depth = 50
    config.model.trunk.width_multiplier = 1.0  # doubles every stage, the output too, when 2
    config.model.trunk.groups = 1
    config.model.trunk.width_per_group = 64
    config.model.trunk.layer4_stride = 2
    config.model.trunk.zero_init_residual = False
    config.model.trunk.stem = 'imagenet'  # 'small': 3×3, stride 1, no pooling
    config.model.trunk.w_0 = 0  # 'regnet': width of the first block, slope of the widths, …
    config.model.trunk.w_a = 0.0
    config.model.trunk.w_m = 0.0  # … ratio of the stages' widths
    config.model.trunk.group_width = 0
    config.model.trunk.se_ratio = 0.25  # squeeze-and-excitation of a RegNetY; 0: RegNetX
    config.model.head = ConfigDict()
    config.model.head.dims = (0, 2048, 128)  # a first 0 is the trunk's output width
    config.model.head.use_bn = True
    config.model.head.use_bias = True
    config.model.head.skip_last_bn = True
    config.model.head.normalize_feats = True
    config.model.head.activation_name = 'relu'
    config.model.head.num_clusters = (3000,)
    config.model.head.use_weight_norm_prototypes = False
    config.model.sync_bn = ConfigDict()
    config.model.sync_bn.enabled = True
    config.model.sync_bn.group_size = 0  # 0: all replicas; n: groups of n; -1: one process's
    config.model.remat = 'none'  # 'block', 'stage': what is computed again to save memory
    config.model.temp_frozen_params_iter_map = (('head/prototypes0', 313),)

    config.loss = ConfigDict()
    config.loss.temperature = 0.1
    config.loss.use_double_precision = False
    config.loss.normalize_last_layer = True
    config.loss.num_iters = 3
    config.loss.epsilon = 0.05
    config.loss.crops_for_assign = (0, 1)
    config.loss.temp_hard_assignment_iters = 0
    config.loss.shk_powerlaw = 0.0
    config.loss.queue = ConfigDict()
    config.loss.queue.queue_length = 0  # over all replicas; 0: no queue
    config.loss.queue.start_iter = 0

    config.optimizer = ConfigDict()
    config.optimizer.name = 'sgd'  # 'lars': optax.lars, with larc_config's numbers
    config.optimizer.use_larc = True  # with 'sgd'; 'lars' scales each layer in any case
    config.optimizer.larc_config = ConfigDict()
    config.optimizer.larc_config.clip = False
    config.optimizer.larc_config.trust_coefficient = 0.001
    config.optimizer.larc_config.eps = 1e-8
    config.optimizer.weight_decay = 1e-6
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = False
    config.optimizer.num_epochs = 400
    config.optimizer.regularize_bn = True
    config.optimizer.regularize_bias = True
    config.optimizer.param_schedulers = ConfigDict()
    config.optimizer.param_schedulers.lr = warmup_cosine(warmup=0.025)

    config.train = ConfigDict()
    config.train.max_steps = 0  # stop after so many steps (0: when the epochs are done)
    config.train.log_every_steps = 10
    config.train.on_nan = 'stop'  # 'skip': back to the last checkpoint, and past those batches
    config.train.max_nan_skips = 3  # in a run; one more stops it
    config.train.on_collapse = 'warn'  # 'stop': end the run
    config.train.collapse_patience = 1000  # steps that look collapsed until it is said
    # VISSL's SINGLE_PASS_EVERY_CROP: each crop goes through the trunk alone, with BatchNorm
    # statistics of its own, and the backward pass holds the activations of one crop at a time.
    config.train.per_crop_pass = False

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1
    config.checkpoint.every_steps = 0  # also every so many steps (0: no)
    config.checkpoint.every_minutes = 0.0  # also every so many minutes (0: no)
    config.checkpoint.keep = 2  # newest ones
    config.checkpoint.keep_every_epochs = 50  # kept for good (0: none)

    config.evaluate = ConfigDict()
    config.evaluate.train_source = ''  # labelled images that the kNN votes with ('': no kNN)
    config.evaluate.test_source = ''
    config.evaluate.every_epochs = 0  # 0: before and after the run only
    config.evaluate.k = 20
    config.evaluate.temperature = 0.07
    config.evaluate.size = 224
    config.evaluate.resize = 256
    config.evaluate.batch_size = 256
    config.evaluate.report = True  # write a page with pictures at the end of the run
    return config.lock()  # so that a misspelt name is an error and not a new setting


def warmup_cosine(
    warmup: float, base_value: float = 0.3, start_value: float = 0.3, end_value: float = 4.8
) -> ConfigDict:
    """VISSL's schedule: linear warm-up over a share of the run, then a cosine to a thousandth.

    `base_value` is the learning rate for 256 images; `optim.schedule` multiplies it, once, by the
    global batch size over 256, and the peak of the warm-up and the cosine are rescaled to it.
    """
    return ConfigDict(
        dict(
            auto_lr_scaling=dict(
                auto_scale=True,
                base_value=base_value,
                base_lr_batch_size=256,
                scaling_type='linear',
            ),
            name='composite',
            schedulers=(
                ConfigDict(dict(name='linear', start_value=start_value, end_value=end_value)),
                ConfigDict(dict(name='cosine', start_value=end_value, end_value=end_value / 1000)),
            ),
            update_interval='step',
            interval_scaling=('rescaled', 'fixed'),
            lengths=(warmup, 1 - warmup),
        )
    )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The numbers of a run that follow from its settings, its devices and its data."""

    num_images: int
    num_replicas: int
    batch_size: int  # of all replicas together
    steps_per_epoch: int  # whole batches only
    total_steps: int  # of the schedule: all epochs
    last_step: int  # where the run ends: total_steps, or max_steps if that is less
    queue_batches: int  # global batches that the queue holds

    @property
    def queue_length(self) -> int:
        """Images that the queue holds over all replicas."""
        return self.queue_batches * self.batch_size


def sizes(config: ConfigDict, *, num_images: int, num_replicas: int) -> Sizes:
    """The numbers of a run.

    Raises:
      UserError: the data does not fill a batch, the queue does not hold one, or there are more
        steps than can be counted.
    """
    per_replica = config.data.batchsize_per_replica
    batch_size = per_replica * num_replicas
    if num_images < batch_size:
        raise UserError(
            f'config.data.batchsize_per_replica={per_replica} on {num_replicas} devices makes a '
            f'batch of {batch_size} images, but {config.data.source!r} has only {num_images}'
            f'{_limit_note(config)}: use at most {max(num_images // num_replicas, 1)}'
        )
    queue_length = config.loss.queue.queue_length
    if 0 < queue_length < batch_size:
        raise UserError(
            f'config.loss.queue.queue_length={queue_length} is less than the global batch of '
            f'{batch_size}: use a multiple of it, or 0 for no queue'
        )
    steps_per_epoch = num_images // batch_size
    epochs = config.optimizer.num_epochs
    total_steps = steps_per_epoch * epochs
    if total_steps > validation.MOST_STEPS:
        raise UserError(
            f'config.optimizer.num_epochs={epochs} of {steps_per_epoch:,} steps are '
            f'{total_steps:,} steps: use at most {validation.MOST_STEPS // steps_per_epoch:,}, '
            'since steps are counted in int32'
        )
    return Sizes(
        num_images=num_images,
        num_replicas=num_replicas,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        last_step=min(config.train.max_steps or total_steps, total_steps),
        queue_batches=queue_length // batch_size,
    )


def _limit_note(config: ConfigDict) -> str:
    return f' (config.data.limit={config.data.limit})' if config.data.limit else ''


def validate(config: ConfigDict) -> None:
    """Check every setting that can be checked without images, devices and networks.

    Args:
      config: anything; what is not made as `default()` makes it is refused, too.

    Raises:
      UserError: naming the first setting that cannot work, its value and what is allowed.
    """
    validation.check(config, _default_once())


@functools.cache
def _default_once() -> ConfigDict:
    return default()


def to_dict(config: ConfigDict | Sequence | Any) -> Any:
    """The settings as plain dicts, lists and scalars, for JSON."""
    if isinstance(config, ConfigDict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    return config


def flatten(config: ConfigDict, prefix: str = 'config') -> Iterator[tuple[str, object]]:
    """Every setting of a config with its full name, as ('config.loss.epsilon', 0.05)."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f'{prefix}.{key}')
        else:
            yield f'{prefix}.{key}', value
