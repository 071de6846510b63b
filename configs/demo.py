"""SwAV on 10,000 images of Fashion-MNIST, on a laptop: learns in minutes what the classes are.

Paper      the method of Caron et al. 2020, arXiv 2006.09882, scaled down: a ResNet-18 with stages
           of 8, 16, 32, 64 channels and a 3×3 stem, 2×28 + 4×16 crops, batch 64, 30 prototypes.
Data       embedded in the package, nothing to download (MIT licence, Zalando Research).
Run        make demo
           or: python -m swav_jax.main --config configs/demo.py --workdir runs/demo

What differs from the ImageNet recipe, and why: LARC moves too slowly for a run of a thousand steps,
so plain SGD; a batch of 64 cannot fill thousands of prototypes, so 30, and a sharper epsilon; crops
keep more of these small pictures. Jitter stays at full strength: with less of it the network
clusters by mean brightness.
"""

from swav_jax import config as settings


def get_config():
    """The demo."""
    config = settings.default()
    config.recipe = 'demo'
    config.data.source = 'demo'
    config.data.channels = 1
    config.data.mean, config.data.std = (0.286,), (0.353,)
    config.data.canvas_size = 28
    config.data.num_crops = (2, 4)
    config.data.size_crops = (28, 16)
    config.data.crop_scales = ((0.4, 1.0), (0.2, 0.4))

    config.model.trunk.depth = 18
    config.model.trunk.width_multiplier = 0.125
    config.model.trunk.stem = 'small'
    config.model.head.dims = (0, 128, 32)
    config.model.head.num_clusters = (30,)
    config.model.temp_frozen_params_iter_map = (('head/prototypes0', 20),)
    config.loss.epsilon = 0.03

    config.optimizer.use_larc = False
    config.optimizer.num_epochs = 10
    config.optimizer.param_schedulers.lr = settings.warmup_cosine(
        warmup=0.1, base_value=1.6, start_value=0.024, end_value=1.6
    )

    config.evaluate.train_source = 'demo'
    config.evaluate.test_source = 'demo:test'
    config.evaluate.size = config.evaluate.resize = 28
    return config
