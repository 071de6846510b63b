r"""SwAV on small images of your own, 28 to 96 pixels wide: settings that fit their number.

Run        python -m swav_jax.main --config configs/small_images.py --workdir RUN \
               --config.data.source=folder:/my/images
           with --plan instead of --workdir: what it chooses, and why
Data       any source of 64 images or more: CIFAR-10, STL-10, SVHN, thumbnails
Hardware   one CPU: 28,000 to 60,000 images are seen (40,000 took six minutes on one core with
           AVX-512); or GPUs, with a ResNet-18 and 10 million images, not run here yet

Words after a colon: the number of GPUs, or `cpu`; without one, what this machine has.

What is chosen by the number and the size of the images, and from where:

  trunk        CPU: a ResNet-10 of 24 channels, because a CPU multiplies large matrices best and
               needs few layers to be quick (compared on the demo). GPU: ResNet-18. Both with a 3×3
               stem up to 48 pixels, "most important" for small images (users of lightly).
  crops        CPU: 2×16 + 4×10 from 28 pixels on, up to 2×24 + 4×14: few pixels and more channels
               learn more a second (compared on the demo). GPU: 2 of the images' own size and 4 of
               half of it.
  distortions  full jitter and blur on the CPU's few pixels (compared on the demo); on GPUs jitter
               of strength 0.5 and no blur (recipes of lightly and solo-learn for CIFAR-10).
  prototypes   one for 100 images, 30 to 3,000; about ten times the classes (lightly: 512).
  the rest     swav_jax/config/small_data.py: batch, queue, epsilon, epochs, learning rate, freeze.

Published for settings like the GPU's, with CIFAR-10 and ResNet-18 (not run here): kNN 81% after
200 epochs at batch 128, 84% at batch 512, 88% after 800 epochs (lightly's benchmarks); linear 89.2%
after 1,000 epochs (solo-learn).
"""

from swav_jax.config import small_data
from swav_jax.data.survey import survey

SIX_MINUTES = 55_000_000  # pixels in crops that one core with AVX-512 learns from


def get_config(words='', *, changes):
    """The recipe for the images and the devices; `changes` are those of the command line."""
    devices = small_data.read_devices(words)
    choose = small_data.Choices('small_images', changes)
    given, images = choose.given, survey(choose.given.data)
    config, side = choose.config, min(max(images.side, 28), 96)
    on_gpu = devices.count > 0

    config.data.channels = given.data.channels
    of = f'of images whose shorter side is {images.sides[0]} to {images.sides[1]} pixels'
    if on_gpu:
        crops = (side, max(side // 2, 16))
        why = f'own size, from 28 to 96, and half of it, {of}'
    else:
        crops = (16, 10) if side <= 40 else (20, 12) if side <= 64 else (24, 14)
        why = f'few pixels and more channels suit the CPU, {of}'
    counts = choose('data.num_crops', (2, 4), 'four small crops cost less than one large one more')
    crops = choose('data.size_crops', crops, why)
    canvas = max(crops[0], 32) if on_gpu else 2 * crops[0]
    choose('data.canvas_size', canvas, 'no more pixels than the crops can show')
    scales = ((0.2, 1.0), (0.1, 0.3)) if on_gpu else ((0.4, 1.0), (0.2, 0.4))
    choose('data.crop_scales', scales, 'larger shares than on ImageNet: small images hold less')
    choose('data.mean', images.mean, "the images' own")
    choose('data.std', images.std, "the images' own")
    if on_gpu:
        for name, value in dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1).items():
            choose(f'augment.{name}', value, 'half strength, as for CIFAR-10 in lightly')
        choose('augment.blur_p', 0.0, 'small images are blurred enough')

    if config.model.trunk.name == given.model.trunk.name:
        choose('model.trunk.depth', 18 if on_gpu else 10, f'for {devices}')
        choose('model.trunk.width_multiplier', 1.0 if on_gpu else 0.375, f'for {devices}')
        small = crops[0] <= 48
        choose('model.trunk.stem', 'small' if small else 'imagenet', 'small up to 48 pixels')
    hidden, dim = (2048, 128) if on_gpu else (256, 64)
    choose('model.head.dims', (0, hidden, hidden, dim), 'one more layer than on ImageNet')

    pixels = sum(n * size**2 for n, size in zip(counts, crops, strict=False))
    small_data.choose_training(
        choose,
        images.num_images,
        devices,
        batch=max(256 // devices.replicas, 32) if on_gpu else 64,
        images_seen=10_000_000 if on_gpu else SIX_MINUTES // pixels,
        epochs=(100, 800) if on_gpu else (3, 100),
        base_value=2e-3 if on_gpu else 4e-3,
    )
    size = choose('evaluate.size', crops[0] + 2, 'as large as objects look in the crops')
    choose('evaluate.resize', size, 'the whole image')
    if not on_gpu:
        choose('evaluate.feature_grid', 3, 'places count: a small network has few channels')
    config.evaluate.online = ('knn', 'linear', 'nmi', 'rankme', 'alignment', 'prototypes')
    config.evaluate.pixels = True
    return config
