"""Images per second of the input pipeline on one CPU core.

Counted in CPU time of the process, which other work on the machine does not change. tf.data gets
one thread and no background optimisation, so that nothing is computed before the clock starts.
"""

import itertools
import os
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from swav_jax.config import default
from swav_jax.data import sources

HEIGHT, WIDTH = 375, 500  # the usual size in ImageNet
BATCH = 64
ROUNDS = 5
PEER_IMAGES = 1000


def measure(folder: Path, with_peer: bool, batches: int) -> dict[str, float | int]:
    """Images per second of one core, ours and the peer's, and how far memory grew."""
    if hasattr(os, 'sched_setaffinity'):  # not on macOS; CPU time counts there as well
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    source = sources.open_source(f'folder:{folder}', channels=3)
    ours, peer, memory = Rate(), Rate(), []
    if with_peer:
        import torchvision  # noqa: F401 (now: it cannot be loaded once TensorFlow is there)
    for _ in range(ROUNDS):  # in turns, so that other work on the machine slows both alike
        ours.measure(our_batches(source), batches // ROUNDS, rows=BATCH, warm_up=3)
        memory.append(resident_megabytes())
        if with_peer:
            peer.measure(peer_images(source), PEER_IMAGES // ROUNDS, rows=1, warm_up=5)
    results = {
        'images_per_second': ours.images_per_second,
        'batches': ours.images // BATCH,
        'mean_file_kb': np.mean([len(source.read(i)) for i in range(len(source))]) / 1e3,
        'memory_mb': memory[0],
        'memory_growth_mb': memory[-1] - memory[0],
    }
    if with_peer:
        results['peer_images_per_second'] = peer.images_per_second
        results['ratio'] = ours.images_per_second / peer.images_per_second  # how many times more
        results['ratio_input'] = 1 / results['ratio']  # our time over the peer's
    return results


class Rate:
    """Images that the process makes in one second of its CPU time."""

    def __init__(self):
        self.images, self.seconds = 0, 0.0

    @property
    def images_per_second(self) -> float:
        """Over all measurements."""
        return self.images / self.seconds

    def measure(self, items: Iterator, count: int, rows: int, warm_up: int) -> None:
        """Takes `count` items of `rows` images each, after some that warm up."""
        for _ in itertools.islice(items, warm_up):
            pass
        start = time.process_time()
        for _ in itertools.islice(items, count):
            self.images += rows
        self.seconds += time.process_time() - start


def resident_megabytes() -> float:
    """Largest memory of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def our_batches(source: sources.Source) -> Iterator:
    """Batches of canvases and boxes, made by one thread."""
    import tensorflow as tf

    from swav_jax.data import pipeline

    data = default().data
    dataset = pipeline.train_dataset(source, data, seed=0, global_batch=BATCH, first_step=0)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    return dataset.with_options(options).as_numpy_iterator()


def peer_images(source: sources.Source) -> Iterator[list]:
    """All eight crops of one image after another, as facebookresearch/swav's dataset makes them."""
    import torch
    from torchvision import transforms

    torch.set_num_threads(1)
    data, augment = default().data, default().augment
    jitter = transforms.ColorJitter(
        augment.brightness, augment.contrast, augment.saturation, augment.hue
    )

    def blur(image: Image.Image) -> Image.Image:
        if random.random() >= augment.blur_p:
            return image
        radius = random.uniform(augment.blur_radius_min, augment.blur_radius_max)
        return image.filter(ImageFilter.GaussianBlur(radius))

    crops = []
    for count, side, scale in zip(data.num_crops, data.size_crops, data.crop_scales, strict=True):
        crop = transforms.Compose(
            [
                transforms.RandomResizedCrop(side, scale=scale),
                transforms.RandomHorizontalFlip(augment.flip_p),
                transforms.RandomApply([jitter], augment.color_jitter_p),
                transforms.RandomGrayscale(augment.grayscale_p),
                blur,
                transforms.ToTensor(),
                transforms.Normalize(data.mean, data.std),
            ]
        )
        crops += [crop] * count
    for i in itertools.cycle(range(len(source))):
        with Image.open(source.name(i)) as image:
            image = image.convert('RGB')
        yield [crop(image) for crop in crops]


def write_photos(folder: Path, count: int = 256) -> Path:
    """JPEGs as large and as hard to decode as photographs: clouds, sharp shapes, grain."""
    rng = np.random.default_rng(0)
    for i in range(count):
        layers = np.zeros((HEIGHT, WIDTH, 3))
        for octave in range(2, 8):
            noise = rng.normal(
                size=(HEIGHT * 2**octave // 512 + 2, WIDTH * 2**octave // 512 + 2, 3)
            )
            noise += 2 * noise[..., :1]  # brightness varies more than colour
            scaled = [
                np.asarray(
                    Image.fromarray(noise[..., c].astype(np.float32)).resize((WIDTH, HEIGHT))
                )
                for c in range(3)
            ]
            layers += np.stack(scaled, -1) * 2.0 ** (2 - octave) * 30
        image = Image.fromarray((128 + layers).clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            x, y = rng.integers(0, (WIDTH, HEIGHT))
            width, height = rng.integers(5, 120, 2)
            colour = tuple(int(c) for c in rng.integers(0, 256, 3))
            draw.ellipse((x, y, x + width, y + height), fill=colour)
        grain = rng.normal(0, 4, (HEIGHT, WIDTH, 1))
        pixels = (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f'{i:04d}.jpg', quality=90)
    return folder
