"""The methods in plain PyTorch, for parity.py: what each adds to a `torch_twin.Twin`.

Letters: V crops of B images, K prototypes, D dimensions. Images go through the network in groups of
crops of equal size, (n·B, C, S, S), crop-major.
"""

import copy

import jax
import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize
from torch_twin import twin_loss


class SwAV:
    """SwAV without a queue.

    Args:
      model: the twin, in train mode.
      config: our settings.
      batch: B.
    """

    trains_prototypes = True

    def __init__(self, model, config, batch):
        self.model, self.config, self.batch = model, config, batch

    def loss(self, groups, step, index):
        """The loss of a step, counted from 0, and of the images with the numbers `index` (B,)."""
        del step, index
        return self._swapped(self.model(groups), None)

    def after_update(self):
        """What follows the optimizer's step."""
        self.model.normalize_prototypes()

    def _swapped(self, scores, targets):
        loss = self.config.loss
        return twin_loss(
            scores, self.batch, loss.epsilon, loss.temperature, loss.num_iters, targets
        )


class SwAVMomentum(SwAV):
    """SwAV with codes from an encoder that follows the network, and evaluates."""

    encoder = None

    @torch.no_grad()
    def _follow(self):
        if self.encoder is None:
            self.encoder = copy.deepcopy(self.model).eval()
        for old, new in zip(self.encoder.parameters(), self.model.parameters(), strict=True):
            old.lerp_(new, 1 - self.config.loss.momentum)
        for old, new in zip(self.encoder.buffers(), self.model.buffers(), strict=True):
            old.copy_(new)

    def loss(self, groups, step, index):
        """See `SwAV.loss`."""
        scores = self.model(groups)
        self._follow()
        with torch.no_grad():
            targets = self.encoder(groups[:1])
        return self._swapped(scores, targets)

    def after_update(self):
        """Prototypes of both at length 1."""
        self.model.normalize_prototypes()
        self.encoder.normalize_prototypes()


class DeepClusterV2(SwAV):
    """DeepCluster-v2 with the first two crops in the bank, and every image once in an epoch."""

    trains_prototypes = False

    def __init__(self, model, config, batch, steps_per_epoch):
        super().__init__(model, config, batch)
        self.steps = steps_per_epoch
        rows, dim = batch * steps_per_epoch, model.prototypes.in_features
        self.bank = torch.zeros(2, rows, dim, dtype=model.prototypes.weight.dtype)
        self.index = np.zeros(rows, np.int64)

    @torch.no_grad()
    def fill(self, groups, step, index):
        """Store a batch before the first step; each crop has its own pass."""
        crops = groups[0].split(self.batch)[:2]
        self._store(torch.stack([self.model.embed([crop]) for crop in crops]), step, index)

    def _store(self, embeddings, step, index):
        at = slice(step % self.steps * self.batch, (step % self.steps + 1) * self.batch)
        self.bank[:, at] = embeddings
        self.index[at] = index

    @torch.no_grad()
    def _cluster(self, epoch):
        """Spherical k-means of bank 0, from the images that our code draws."""
        count, prototypes = len(self.index), self.model.prototypes.weight
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.config.seed), epoch), 0)
        drawn = np.argsort(-jax.random.uniform(key, (count,), minval=0.5))[: len(prototypes)]
        row_of = np.argsort(self.index)
        rows, centroids = self.bank[0], self.bank[0][row_of[drawn]]
        for _ in range(self.config.loss.kmeans_iters):
            codes = (rows @ centroids.T).argmax(1)
            for k in codes.unique():
                centroids[k] = rows[codes == k].mean(0)
            centroids = normalize(centroids)
        prototypes.copy_(centroids)
        self.assignments = (rows @ centroids.T).argmax(1)[row_of]

    def loss(self, groups, step, index):
        """See `SwAV.loss`."""
        if step % self.steps == 0:
            self._cluster(step // self.steps)
        embeddings = self.model.embed(groups)
        with torch.no_grad():
            self._store(embeddings.view(-1, self.batch, embeddings.shape[1])[:2], step, index)
        scores = self.model.prototypes(embeddings) / self.config.loss.temperature
        targets = self.assignments[index]
        return cross_entropy(scores, targets.repeat(len(scores) // self.batch))

    def after_update(self):
        """Nothing: the prototypes are the centroids."""
