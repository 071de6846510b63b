"""SwAV on 10,000 images of Fashion-MNIST, on a laptop: in minutes better features than pixels.

Paper      the method of Caron et al. 2020, arXiv 2006.09882, scaled down: a ResNet-10 with stages
           of 24, 48, 96, 192 channels and a 3×3 stem, 2×16 + 4×10 crops, batch 64, 60 prototypes.
Data       embedded in the package, nothing to download (MIT licence, Zalando Research).
Run        make demo
           or: python -m swav_jax.main --config configs/demo.py --workdir runs/demo
           or with another method: --config configs/demo.py:swav_momentum, :deepcluster_v2

What differs from the ImageNet recipe, and why:

- Few pixels, many channels. A CPU multiplies large matrices best, and most of what tells these
  images apart is left at 16 pixels. The evaluation sees images at 18, where objects are as large
  as in the crops, which show 0.83 of an image's side on average. The small stem keeps all pixels.
- AdamW: SGD ended half a percent lower (one seed each).
- 60 prototypes and a sharper epsilon: a batch of 64 cannot fill thousands of prototypes.
- One more layer in the head, which leaves the features below it more general.
- Larger shares of the image in crops. Jitter and blur stay at full strength.
- kNN and linear probe see the averages of 3×3 parts of the trunk's last map, like VISSL's linear
  probes see more than one average: where a sleeve is tells a coat from a dress, and raw pixels,
  which are judged beside it, know it, too.
"""

from swav_jax import config as settings


def get_config(arg=''):
    """The demo, with the method that `arg` names."""
    config = settings.default()
    config.recipe = '' if arg else 'demo'
    config.method = arg or 'swav'
    config.data.source = 'demo'
    config.data.channels = 1
    config.data.mean, config.data.std = (0.286,), (0.353,)
    config.data.canvas_size = 28
    config.data.num_crops = (2, 4)
    config.data.size_crops = (16, 10)
    config.data.crop_scales = ((0.4, 1.0), (0.2, 0.4))

    config.model.trunk.depth = 10
    config.model.trunk.width_multiplier = 0.375
    config.model.trunk.stem = 'small'
    config.model.head.dims = (0, 256, 256, 64)
    config.model.head.num_clusters = (60,)
    config.model.temp_frozen_params_iter_map = (('head/prototypes0', 20),)
    if config.method == 'deepcluster_v2':  # k-means sets the prototypes
        config.model.temp_frozen_params_iter_map = ()
    else:
        config.loss.epsilon = 0.03

    config.optimizer.name = 'adamw'
    config.optimizer.use_larc = False
    config.optimizer.num_epochs = 6
    config.optimizer.param_schedulers.lr = settings.warmup_cosine(
        warmup=0.1, base_value=4e-3, start_value=1e-5, end_value=4e-3
    )

    config.evaluate.train_source = 'demo'
    config.evaluate.test_source = 'demo:test'
    config.evaluate.size = config.evaluate.resize = 18
    config.evaluate.feature_grid = 3
    config.evaluate.online = ('knn', 'linear', 'nmi', 'rankme', 'alignment', 'prototypes')
    config.evaluate.pixels = True
    return config
