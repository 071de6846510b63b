r"""SwAV on photographs of your own, 1,000 to 200,000 of them, on one GPU: settings that fit.

Run        python -m swav_jax.main --config configs/own_images.py --workdir RUN \
               --config.data.source=folder:/my/photos
           with --plan instead of --workdir: what it chooses, and why
Data       any source of 64 images or more. From 1,000 on it is worth the time; with fewer, and for
           features at once, use a trained network.
Hardware   one GPU of 16 GB or more, or several; on a CPU a small network on small crops runs, to
           try the recipe. Not run on a GPU here yet: the settings are those of published runs.

Words after a colon: the number of GPUs, or `cpu`; without one, what this machine has.

What is chosen by the number of images, and from where:

  trunk        ResNet-18 below 50,000 images, like lightly for Imagenette (9,469 images); ResNet-50
               from there on, like SwAV's own recipes.
  crops        ResNet-18: 2×128 + 4×64, lightly's size for Imagenette. ResNet-50: 2×160 + 4×96, the
               official script for less memory. Shares of the image as on ImageNet.
  distortions  jitter and blur as on ImageNet.
  prototypes   one for 100 images, 30 to 3,000; a queue where a batch cannot fill them.
  the rest     swav_jax/config/small_data.py: batch, queue, epsilon, epochs, learning rate, freeze.

Published for settings like these (not run here): Imagenette, ResNet-18, kNN 86% after 200 epochs
and 90% after 800 (lightly's benchmarks).
"""

from swav_jax.config import small_data
from swav_jax.data.survey import survey


def get_config(words='', *, changes):
    """The recipe for the images and the devices; `changes` are those of the command line."""
    devices = small_data.read_devices(words)
    choose = small_data.Choices('own_images', changes)
    given, images = choose.given, survey(choose.given.data)
    config, on_gpu = choose.config, devices.count > 0
    large = on_gpu and images.num_images >= 50_000

    config.data.channels = given.data.channels
    crops = (160, 96) if large else (128, 64) if on_gpu else (48, 24)
    width = 64 if on_gpu else 24
    choose('data.num_crops', (2, 4), 'the official choice where memory or time is short')
    crops = choose('data.size_crops', crops, f'for {images.num_images:,} images on {devices}')
    choose('data.canvas_size', 2 * crops[0], 'twice the large crops, which show a part of an image')
    choose('data.crop_scales', ((0.14, 1.0), (0.05, 0.14)), 'as on ImageNet')
    choose('data.mean', images.mean, "the images' own")
    choose('data.std', images.std, "the images' own")

    if config.model.trunk.name == given.model.trunk.name:
        depth = 50 if large else 18 if on_gpu else 10
        choose('model.trunk.depth', depth, f'for {images.num_images:,} images on {devices}')
        choose('model.trunk.width_multiplier', width / 64, f'for {devices}')
    hidden, dim = (2048, 128) if on_gpu else (256, 64)
    choose('model.head.dims', (0, hidden, hidden, dim), 'one more layer than on ImageNet')
    if on_gpu:
        choose('precision', 'bfloat16', 'half the memory, and faster on tensor cores')

    small_data.choose_training(
        choose,
        images.num_images,
        devices,
        batch=64 if large else 128 if on_gpu else 64,
        images_seen=20_000_000 if on_gpu else 30_000,
        epochs=(100, 800) if on_gpu else (3, 100),
        base_value=2e-3 if on_gpu else 4e-3,
    )
    size = choose('evaluate.size', crops[0], 'as large as the crops')
    choose('evaluate.resize', size * 8 // 7, 'a seventh wider, like 256 for 224')
    config.evaluate.online = ('knn', 'linear', 'nmi', 'rankme', 'alignment', 'prototypes')
    config.evaluate.pixels = True
    return config
