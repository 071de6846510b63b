"""The demo with a network of a single block, which compiles in seconds: for chaos.py and tests."""

import runpy
from pathlib import Path

from swav_jax import config as settings
from swav_jax.config import trunks

DEMO = Path(__file__).parent.parent / 'configs' / 'demo.py'


def get_config(arg=''):
    """The demo on 32 of its images, with two crops each, by SGD, without evaluation."""
    config = runpy.run_path(str(DEMO))['get_config'](arg)
    config.recipe = ''
    config.data.batchsize_per_replica = 4
    config.data.limit = 32
    config.data.num_crops, config.data.size_crops = (2,), (16,)
    config.data.crop_scales = ((0.4, 1.0),)
    config.model.trunk = trunks.section('regnet', depth=1, w_0=8, w_m=2.0, group_width=4)
    config.model.head.dims, config.model.head.num_clusters = (0, 8, 4), (5,)
    config.optimizer.name, config.optimizer.num_epochs = 'sgd', 10
    config.optimizer.param_schedulers.lr = settings.warmup_cosine(
        warmup=0.1, base_value=1.6, start_value=0.024, end_value=1.6
    )
    config.evaluate.train_source = config.evaluate.test_source = ''
    config.evaluate.online, config.evaluate.pixels = ('knn', 'nmi'), False
    config.evaluate.size = config.evaluate.resize = 28
    config.evaluate.feature_grid = 1
    config.evaluate.report = False
    config.train.log_every_steps = 1
    return config
