"""Every setting with its default, the checks on them, and the numbers that follow from them.

Settings carry VISSL's names where VISSL has one (config/defaults.yaml). A config file calls
`default()`, changes what its recipe changes, and returns it; `validate` refuses what cannot work
before anything is compiled.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from swav_jax.errors import UserError


def default() -> ConfigDict:
    """VISSL's SwAV recipe for ResNet-50 at 400 epochs; every config starts from it."""
    config = ConfigDict()
    config.seed = 0
    config.precision = 'float32'

    config.data = ConfigDict()
    config.data.source = ''  # 'demo', 'folder:/path', …: see swav_jax/data/sources.py
    config.data.limit = 0  # use the first N images only (0: all of them)
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
    config.model.trunk.name = 'resnet'
    config.model.trunk.depth = 50
    config.model.trunk.width_multiplier = 1.0  # doubles every stage, the output too, when 2
    config.model.trunk.groups = 1
    config.model.trunk.width_per_group = 64
    config.model.trunk.layer4_stride = 2
    config.model.trunk.zero_init_residual = False
    config.model.trunk.stem = 'imagenet'  # 'small': 3×3, stride 1, no pooling
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
    config.optimizer.name = 'sgd'
    config.optimizer.use_larc = True
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

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1
    config.checkpoint.every_steps = 0  # also every so many steps (0: no)
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
    return config


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
