"""SwAV self-supervised pretraining of convnets in JAX (Caron et al. 2020, arXiv 2006.09882).

The names below are loaded when they are first used: `import swav_jax` imports neither JAX nor
TensorFlow, and changes nothing in the process.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = '0.1.0'

# Where each public name is; what type checkers read below says the same.
_PLACES = {
    'Features': 'evaluate.extraction.Features',
    'Model': 'evaluate.model.Model',
    'RunFailedError': 'errors.RunFailedError',
    'StoppedError': 'errors.StoppedError',
    'UserError': 'errors.UserError',
    'build_model': 'models.build',
    'default_config': 'config.default',
    'load': 'evaluate.model.load',
    'load_config': 'config.file.load_config',
    'load_weights': 'evaluate.model.load_weights',
    'neighbors': 'evaluate.knn.neighbors',
    'scale_by_larc': 'optim.scale_by_larc',
    'sinkhorn_codes': 'methods.swav.sinkhorn_codes',
    'swav_loss': 'methods.swav.swav_loss',
    'train': 'training.run',
    'vote': 'evaluate.knn.vote',
}

__all__ = [
    'Features',
    'Model',
    'RunFailedError',
    'StoppedError',
    'UserError',
    'build_model',
    'default_config',
    'load',
    'load_config',
    'load_weights',
    'neighbors',
    'scale_by_larc',
    'sinkhorn_codes',
    'swav_loss',
    'train',
    'vote',
]

if TYPE_CHECKING:
    from swav_jax.config import default as default_config
    from swav_jax.config.file import load_config
    from swav_jax.errors import RunFailedError, StoppedError, UserError
    from swav_jax.evaluate.extraction import Features
    from swav_jax.evaluate.knn import neighbors, vote
    from swav_jax.evaluate.model import Model, load, load_weights
    from swav_jax.methods.swav import sinkhorn_codes, swav_loss
    from swav_jax.models import build as build_model
    from swav_jax.optim import scale_by_larc
    from swav_jax.training import run as train
else:

    def __getattr__(name: str) -> Any:
        if name not in _PLACES:
            raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
        module, _, attribute = _PLACES[name].rpartition('.')
        found = getattr(importlib.import_module(f'{__name__}.{module}'), attribute)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return ['__version__', *__all__]
