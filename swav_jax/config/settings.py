"""Every setting: its default, what else it may be, and what it means.

Names are VISSL's where VISSL has one (config/defaults.yaml). The defaults are VISSL's SwAV recipe
for ResNet-50 at 400 epochs. Upper ends of ranges are no recommendations: they lie far above what
was ever trained and below what no machine could hold or count, so that a typing mistake is refused
at once.
"""

from typing import Any, NamedTuple

from swav_jax.config import trunks
from swav_jax.config.kinds import SWITCH, TEXT, Kind, Pair, Several, one_of, positive, real, whole
from swav_jax.config.schedules import MOST_EPOCHS, Schedule, warmup_cosine
from swav_jax.config.trunks import WIDEST

MOST_STEPS = 2**31 - 1  # steps are counted in int32
MOST_CROPS = 100  # of an image
# For each image of the batch and the queue: lightly trains CIFAR-10 with 512 in a batch of 128, the
# demo learns nearly as much with 200 as with 60 in a batch of 64. With more, codes are chance.
MOST_PROTOTYPES_PER_IMAGE = 4
ONLINE = ('knn', 'linear', 'nmi', 'rankme', 'alignment', 'prototypes')  # evaluations in a run
MOST_HEADS = 16  # of prototypes, and layers of the projection

METHODS = ('swav', 'swav_momentum', 'deepcluster_v2')
_SWAV, _MOMENTUM, _DEEPCLUSTER = METHODS[:2], METHODS[1:2], METHODS[2:]
_SHARE = real(0, 1)
_BELOW_1 = real(0, 1 - 2**-53, 'a number from 0 to below 1')
_STEPS = whole(0, MOST_STEPS)
_EPOCHS = whole(0, MOST_EPOCHS)


class Setting(NamedTuple):
    """One setting."""

    default: Any
    kind: Kind  # what it may be by itself; `validation` has what settings must be together
    about: str  # what it means, for `--help` and docs/settings.md
    methods: tuple[str, ...] = ()  # those of config.method that use it; (): all


# fmt: off
SETTINGS = {
    # jax.random.key takes 32 bits of a seed and would make the same weights of 0 and 2**32.
    'seed': Setting(0, whole(0, 2**32 - 1), 'of first weights, image order, crops and distortions'),
    'precision': Setting('float32', one_of('float32', 'bfloat16', 'float16', 'float64'),
        'in which the network computes; weights, statistics, Sinkhorn and loss stay float32'),
    'sharding': Setting('replicated', one_of('replicated', 'zero'),
        'zero: each device keeps a slice of weights and momentum'),
    'init_from': Setting('', TEXT, "PyTorch weights, FILE or FILE:student, or a run's folder"),
    'init_allow_partial': Setting(False, SWITCH,
        'start from them even if they do not fill the trunk'),
    'recipe': Setting('', TEXT,
        'its name; the report compares the run with the reference curves of this name'),
    'choices': Setting((), Several(Pair(TEXT, TEXT), 0, 100),
        'settings that the recipe has chosen, and why; --plan prints them'),

    'method': Setting('swav', one_of(*METHODS),
        'what is learned; swav_momentum: its codes are those of a momentum encoder; '
        'deepcluster_v2: its codes are clusters of the last epoch'),

    'data.source': Setting('', TEXT, 'the images: demo, folder:/path, …; see the README'),
    'data.limit': Setting(0, _STEPS, 'images to use, spread evenly over the source; 0: all'),
    'data.batchsize_per_replica': Setting(64, whole(1, 65_536),
        'images of a replica: of a device, or of one of its train.micro_batches'),
    'data.canvas_size': Setting(512, whole(1, 8192),
        'side in pixels of the square that an image is decoded onto'),
    'data.channels': Setting(3, whole(1, 1024), 'of an image; 1: gray'),
    'data.num_crops': Setting((2, 6), Several(whole(1, MOST_CROPS), 1, MOST_CROPS),
        'crops of an image, for each resolution'),
    'data.size_crops': Setting((224, 96), Several(whole(1, 4096), 1, MOST_CROPS),
        'side of the crops in pixels, for each resolution'),
    'data.crop_scales': Setting(((0.14, 1.0), (0.05, 0.14)),
        Several(Pair(positive(1e-6, 1), positive(1e-6, 1)), 1, MOST_CROPS),
        "least and largest share of the image's area that a crop covers, for each resolution"),
    'data.mean': Setting((0.485, 0.456, 0.406), Several(real(-1000, 1000), 1, 1024),
        'of each channel, subtracted from pixels in [0, 1]'),
    'data.std': Setting((0.229, 0.224, 0.225), Several(positive(1e-30, 1000), 1, 1024),
        'of each channel, by which the difference is divided'),
    'data.max_bad_fraction': Setting(0.01, _SHARE,
        'share of the images that may be unreadable; more of them stop the run'),

    'augment.flip_p': Setting(0.5, _SHARE, 'probability of a horizontal flip'),
    'augment.brightness': Setting(0.8, real(0, 100), 'strength of the color jitter'),
    'augment.contrast': Setting(0.8, real(0, 100), 'strength of the color jitter'),
    'augment.saturation': Setting(0.8, real(0, 100), 'strength of the color jitter'),
    'augment.hue': Setting(0.2, real(0, 0.5), 'strength of the color jitter, of the color circle'),
    'augment.color_jitter_p': Setting(0.8, _SHARE, 'probability of color jitter'),
    'augment.grayscale_p': Setting(0.2, _SHARE, 'probability of gray'),
    'augment.blur_p': Setting(0.5, _SHARE, 'probability of a Gaussian blur'),
    'augment.blur_radius_min': Setting(0.1, positive(1e-3, 100),
        'least standard deviation of the blur, in pixels of the crop'),
    'augment.blur_radius_max': Setting(2.0, positive(1e-3, 100),
        'largest standard deviation of the blur'),

    'model.trunk': Setting(trunks.section('resnet'), trunks.Trunk(),
        'the network below the head, by its name; see below'),
    'model.head.dims': Setting((0, 2048, 128), Several(whole(0, WIDEST), 2, MOST_HEADS + 1),
        "widths: of the trunk's output (0: as it is), hidden layers, embedding"),
    'model.head.use_bn': Setting(True, SWITCH, 'BatchNorm after hidden layers'),
    'model.head.use_bias': Setting(True, SWITCH, 'biases of the linear layers'),
    'model.head.skip_last_bn': Setting(True, SWITCH, 'no BatchNorm after the last layer'),
    'model.head.normalize_feats': Setting(True, SWITCH, 'embeddings of length 1', _SWAV),
    'model.head.activation_name': Setting('relu', TEXT, 'after hidden layers'),
    'model.head.num_clusters': Setting((3000,), Several(whole(2, 1_000_000), 1, MOST_HEADS),
        'prototypes, for each prototype head'),
    'model.head.use_weight_norm_prototypes': Setting(False, SWITCH,
        'weight normalization of the prototypes', _SWAV),
    'model.sync_bn.enabled': Setting(True, SWITCH, 'BatchNorm over several devices'),
    'model.sync_bn.group_size': Setting(0, whole(-1, 2**20),
        "devices of a group; 0: all of them, -1: one process's"),
    'model.remat': Setting('none', one_of('none', 'block', 'stage'),
        'what the backward pass computes again to save memory'),
    'model.temp_frozen_params_iter_map': Setting((('head/prototypes0', 313),),
        Several(Pair(TEXT, _STEPS), 0, 1000),
        'parameters that are frozen at first, and for how many steps'),

    'loss.temperature': Setting(0.1, positive(1e-4, 1e4), 'of the predictions'),
    'loss.use_double_precision': Setting(False, SWITCH, 'Sinkhorn and loss in float64', _SWAV),
    'loss.normalize_last_layer': Setting(True, SWITCH, 'prototypes of length 1', _SWAV),
    'loss.num_iters': Setting(3, whole(1, 1000), 'Sinkhorn iterations', _SWAV),
    'loss.epsilon': Setting(0.05, positive(1e-4, 1e4),
        'of the Sinkhorn codes; lower is sharper', _SWAV),
    'loss.crops_for_assign': Setting((0, 1), Several(whole(0, MOST_CROPS), 1, MOST_CROPS),
        'indices of the crops that get codes', _SWAV),
    'loss.temp_hard_assignment_iters': Setting(0, _STEPS,
        'steps with one-hot codes at the start', _SWAV),
    'loss.shk_powerlaw': Setting(0.0, real(0, 100),
        "exponent of the prototypes' shares of the images; 0: equal shares", _SWAV),
    'loss.momentum': Setting(0.99, _SHARE,
        'of the encoder of swav_momentum: how much of it stays in a step', _MOMENTUM),
    'loss.momentum_eval_mode_iter_start': Setting(0, _STEPS,
        "step from which this encoder's BatchNorm uses its running statistics", _MOMENTUM),
    'loss.queue.queue_length': Setting(0, whole(0, 10_000_000),
        'embeddings of earlier batches, over all devices; 0: no queue', _SWAV),
    'loss.queue.start_iter': Setting(0, _STEPS, 'step at which the queue begins to fill', _SWAV),
    'loss.crops_for_mb': Setting((0, 1), Several(whole(0, MOST_CROPS), 1, MOST_CROPS),
        'indices of the crops in the memory bank of deepcluster_v2', _DEEPCLUSTER),
    'loss.kmeans_iters': Setting(10, whole(1, 1000), 'iterations of k-means', _DEEPCLUSTER),

    'optimizer.name': Setting('sgd', one_of('sgd', 'lars', 'adam', 'adamw'),
        "lars: optax.lars with larc_config's numbers; adamw: decay beside the averages"),
    'optimizer.use_larc': Setting(True, SWITCH, 'with sgd: scale the gradient of each tensor'),
    'optimizer.larc_config.clip': Setting(False, SWITCH,
        'bound the rate of a tensor by the learning rate'),
    'optimizer.larc_config.trust_coefficient': Setting(0.001, positive(1e-9, 1e6),
        "share of a tensor's length that a step moves it at learning rate 1"),
    'optimizer.larc_config.eps': Setting(1e-8, real(0, 1), 'added to the denominator'),
    'optimizer.weight_decay': Setting(1e-6, real(0, 1000),
        'L2 penalty, added to the gradient; with adamw to the update'),
    'optimizer.momentum': Setting(0.9, _BELOW_1, 'of SGD'),
    'optimizer.nesterov': Setting(False, SWITCH, 'momentum of Nesterov'),
    'optimizer.betas': Setting((0.9, 0.999), Several(_BELOW_1, 2, 2),
        'of Adam: decay of the averages of the gradient and of its square'),
    'optimizer.eps': Setting(1e-8, positive(1e-30, 1), "of Adam: added to the latter's root"),
    'optimizer.num_epochs': Setting(400, whole(1, MOST_EPOCHS), 'of the run and its schedule'),
    'optimizer.regularize_bn': Setting(True, SWITCH, 'decay the parameters of BatchNorm'),
    'optimizer.regularize_bias': Setting(True, SWITCH, 'decay biases'),
    'optimizer.param_schedulers.lr': Setting(warmup_cosine(warmup=0.025), Schedule(),
        'the learning rate; see swav_jax/optim.py'),

    'train.max_steps': Setting(0, _STEPS, 'stop after so many steps; 0: after all epochs'),
    'train.micro_batches': Setting(1, whole(1, 65_536),
        'replicas that a device computes in turn; the batch is devices × micro_batches × '
        'batchsize_per_replica'),
    'train.log_every_steps': Setting(10, whole(1, MOST_STEPS), 'steps between rows of metrics'),
    'train.on_nan': Setting('stop', one_of('stop', 'skip'),
        'skip: go back to the last checkpoint, and leave out the batches since'),
    'train.max_nan_skips': Setting(3, _STEPS, 'skips in a run; one more stops it'),
    'train.on_collapse': Setting('warn', one_of('warn', 'stop'), 'stop: end the run'),
    'train.collapse_patience': Setting(1000, whole(1, MOST_STEPS),
        'steps that look collapsed until this is reported'),
    # VISSL's SINGLE_PASS_EVERY_CROP
    'train.per_crop_pass': Setting(False, SWITCH,
        'pass each crop through the trunk alone, with its own BatchNorm statistics: less memory'),

    'checkpoint.every_epochs': Setting(1, _EPOCHS, 'epochs between checkpoints; 0: none'),
    'checkpoint.every_steps': Setting(0, _STEPS, 'also after so many steps; 0: no'),
    'checkpoint.every_minutes': Setting(0.0, real(0, 1e6), 'also after so many minutes; 0: no'),
    'checkpoint.keep': Setting(2, whole(1, 1_000_000), 'newest checkpoints to keep'),
    'checkpoint.keep_every_epochs': Setting(50, _EPOCHS,
        'epochs between checkpoints that are kept for good; 0: none'),

    'evaluate.train_source': Setting('', TEXT,
        'labelled images for kNN and linear probe to learn from'),
    'evaluate.test_source': Setting('', TEXT, 'labelled images to classify'),
    'evaluate.online': Setting(('knn', 'nmi'), Several(one_of(*ONLINE), 0, 100),
        'what is evaluated; without labelled images only what needs none'),
    'evaluate.pixels': Setting(False, SWITCH,
        'also judge raw pixels by kNN and linear probe, once, to see what is gained'),
    'evaluate.every_epochs': Setting(0, _EPOCHS,
        'epochs between evaluations; 0: before and after the run only'),
    'evaluate.k': Setting(20, whole(1, 100_000), 'neighbors that vote'),
    'evaluate.temperature': Setting(0.07, positive(1e-3, 1e4), 'of their votes'),
    'evaluate.size': Setting(224, whole(1, 4096), 'side of the center crop in pixels'),
    'evaluate.resize': Setting(256, whole(1, 8192),
        "the image's shorter side before it is cropped"),
    'evaluate.encoder': Setting('network', one_of('network', 'momentum'),
        'whose features are evaluated; momentum: with swav_momentum', _MOMENTUM),
    # VISSL's LINEAR_EVAL_FEAT_POOL_OPS_MAP
    'evaluate.feature_grid': Setting(1, whole(1, 64),
        "parts along each side of the trunk's last map whose averages are the features"),
    'evaluate.batch_size': Setting(256, whole(1, 65_536), 'images at once, over all devices'),
    'evaluate.report': Setting(True, SWITCH, 'write a page with pictures at the end of the run'),
}
# fmt: on
