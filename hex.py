# SPDX-License-Identifier: MIT
"""HEX: Hierarchical Emergence Exploitation in Self-Supervised Algorithms, in one file.

The paper is by Kokilepersaud, Kim, Prabhushankar and AlRegib (WACV 2025, arXiv 2410.23200). This
is not the authors' code. It is a reconstruction: the full text of the paper could not be had.

InfoNCE pulls the two views of an image together, and pushes all other images of the batch away,
all alike. But training makes some of them look like the anchor, and they often share its meaning.
HEX therefore splits the other images, the anchor's negatives, at a threshold eps on similarity:

    G(i), the global negatives, are not above eps. They are treated as in InfoNCE.
    H(i), the local negatives (the neighbors), are above eps. The nearest are pushed hardest.

For N images with two views each there are 2N normalized embeddings z. Here tau is the temperature,
s_ij = z_i . z_j is the cosine similarity, and p is the other view of image i:

    eps      = mean over i of the q-quantile of s_ij over all negatives j of i         (q = 0.99)
    loss_i   = log(positive + global + max(local, floor)) - s_ip/tau
    positive = e^{s_ip/tau}
    global   = sum over G(i) of e^{s_ij/tau}
    local    = (sum over H(i) of Q_ij e^{s_ij/tau} - tau_plus |H(i)| e^{s_ip/tau}) / (1 - tau_plus)
    floor    = |H(i)| e^{-1/tau}, the least that |H(i)| negatives can add up to
    Q_ij     = e^{beta s_ij/tau} / mean over h in H(i) of e^{beta s_ih/tau}            (beta = 1)

The subtraction in `local` assumes that a share tau_plus of the neighbors has the anchor's own
class (debiasing). No gradient passes through eps, H, Q or the floor. Limiting cases: with
beta = tau_plus = 0, or where H(i) is empty, a row is InfoNCE's; at the floor, neighbors are left in
peace. With N = 256 images and q = 0.99, |H(i)| is about 5 of 510 negatives.

What is known, and how. From the paper's abstract and figure: the split, a weighted local term, a
threshold that falls in training. From the authors' code alone: the mean of quantiles, the fixed
schedules, the warm-up, beta, tau_plus, the floor, the recipes. Inferred here: that Q is the
weighting of Robinson et al. (ICLR 2021), that |H(i)| stands for their N, that the quantile runs
over negatives alone, and that the positive is part of the sum (--decoupled leaves it out).

HEX joins any method that gives pairs of embeddings (a, b), as
    loss = (1 - alpha) own + alpha scale (mean over the pairs of the loss above)

    python hex.py                                                   minutes on a CPU
    python hex.py --data cifar10 --root DIR --recipe small          one GPU, or minutes on a CPU
    torchrun --nproc-per-node 8 hex.py --data imagenet --root DIR   paper scale
    python hex.py --data folder --root DIR --recipe small           your own unlabelled pictures

The sections, from what stands alone to what uses all: the loss, its variants, many processes,
methods, settings, backbones, data and views, optimizer, training, evaluation, the command.
"""
import argparse
import contextlib
import copy
import datetime
import fcntl
import functools
import hashlib
import inspect
import json
import math
import multiprocessing.forkserver
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

# === The loss =====================================================================================
# It needs math, dataclasses and torch alone, and can be copied into another project. Every function
# here is pure: it sees all images that share the loss, and knows nothing of processes or files.

def require(condition, message):
    if not condition:
        raise ValueError(message)


def similarities(a, b, temperature):
    """Compares the views of N images with each other. a, b: (N, D), row i is a view of image i.

    Returns s (2N, 2N), the cosine similarity of all views; s_p (2N,), that of each view and the
    other view of its image; negative (2N, 2N), true where two views are of different images.
    """
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    require(a.ndim == 2 and a.shape == b.shape, f"a and b must be row-aligned (N, D), not {shapes}")
    require(len(a) > 1, "N = 1: a contrastive loss needs 2 images, or there are no negatives")
    require(0 < temperature < math.inf, f"temperature = {temperature} must be above 0, and finite")

    # Embeddings are scaled to length 1, in float32 or better. One of length 0 stays as it is. One
    # that is too long for its dtype becomes NaN: else it would become 0, and the loss look sound.
    z = torch.cat([a, b])
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    length = length.masked_fill(length < 1e-12, 1)
    z = z / length.masked_fill(length == math.inf, math.nan)

    with torch.autocast(z.device.type, enabled=False):
        s = z @ z.T
    s_p = (z * z.roll(len(a), 0)).sum(1)
    image = torch.arange(len(a), device=z.device).repeat(2)
    return s, s_p, image[:, None] != image


def hex_nce(a, b, temperature=0.1, *, threshold=None, beta=1.0, tau_plus=0.1,
            decoupled=False, epoch=0):
    """The HEX loss of N images. a, b: (N, D), their two views, row-aligned, of any length.

    threshold: AdaptiveThreshold() if None, another of these classes, or a number, above which a
    cosine is local. decoupled: leave the positive out of the sum. epoch: for scheduled thresholds.
    Returns the mean loss (a scalar, in float32 or better) and its statistics (see statistics_of).
    ValueError: temperature <= 0, beta outside [0, 1e6], tau_plus outside [0, 1), a threshold that
    is not finite, N < 2, shapes that differ.
    """
    require(0 <= beta <= 1e6, f"beta = {beta} must be in [0, 1e6]")
    require(0 <= tau_plus < 1, f"tau_plus = {tau_plus} must be in [0, 1)")
    tau = temperature
    s, s_p, negative = similarities(a, b, tau)

    # Which negatives are local?
    eps, H = split(s, negative, threshold, epoch)
    size = H.sum(1).to(s.dtype)                             # |H(i)|

    # e^{s/tau} may overflow, so it is kept as e^{x - top}, with a top that is known.
    x, x_p, least = s / tau, s_p / tau, -1 / tau
    del s                                                   # it is large

    def exp(x, top):
        # What exceeds e^80 is not part of a sum: it only tells that a row is at its floor.
        return (x - top).clamp(max=80).exp()

    # The local term for each neighbor, a mean: the nearest weigh most, and a share is taken away.
    near, top_near = exponentials(x, H, least)
    Q = (near.detach() ** beta).masked_fill_(~H, 0)
    local = (Q * near).sum(1) / Q.sum(1).clamp(min=1)       # the sum of Q is 0, or at least 1
    local = (local - tau_plus * exp(x_p, top_near)) / (1 - tau_plus)
    clamped = local.detach() < exp(least, top_near)

    # The other negatives are global. All terms are brought to one top, the largest of the sum.
    far, top_far = exponentials(x, negative & ~H, least)
    top = torch.maximum(top_far, top_near.masked_fill(clamped, least))
    if not decoupled:
        top = torch.maximum(top, x_p.detach())
    total = far.sum(1) * exp(top_far, top)
    total = total + size * torch.maximum(local * exp(top_near, top), exp(least, top))
    if not decoupled:
        total = total + exp(x_p, top)

    loss = total.log() + top - x_p
    return loss.mean(), statistics_of(eps, size, clamped)


def exponentials(x, mask, least):
    """e^{x - top} where the mask is true, else (nearly) 0; and top (2N,), the largest x there.

    Elsewhere it is at most e^{-40}, which is below the rounding of the sum, and faster than 0.
    """
    e = x.where(mask, least - 40)
    top = e.detach().amax(1).clamp(min=least)
    e = e.sub_(top[:, None]).exp_()
    return e, top


def statistics_of(eps, size, clamped):
    """What the log says: detached scalars.

    threshold: eps. local: the mean |H|. empty: the share of anchors whose H is empty. clamped: of
    the other anchors, the share whose local term is at its floor.
    """
    some = (size > 0).to(size.dtype)
    at_floor = (some * clamped).sum() / some.sum().clamp(min=1)
    return dict(threshold=eps, local=size.mean(), empty=1 - some.mean(), clamped=at_floor)


@torch.no_grad()
def split(s, negative, threshold, epoch, count_all=False):
    """Returns eps (a scalar) and H (2N, 2N): which negatives are above it.

    count_all: eps is a quantile of all similarities, not of those with negatives alone.
    """
    if threshold is None:
        threshold = AdaptiveThreshold()
    if isinstance(threshold, (int, float)):
        require(abs(threshold) < math.inf, f"threshold = {threshold} must be finite")
        return s.new_full((), threshold), negative & (s > threshold)
    require(callable(threshold), f"threshold = {threshold!r} is neither a number nor a function")
    eps, above = threshold(s, None if count_all else negative, epoch)
    return eps, negative & above


@dataclass
class AdaptiveThreshold:
    """Local is what lies above the mean over all views of the quantile of a view's similarities.

    quantile: in (0, 1). It is an order statistic: of k sorted entries, the one at round(q (k - 1)).
    """
    quantile: float = 0.99

    def __post_init__(self):
        require(0 < self.quantile < 1, f"quantile = {self.quantile} must lie between 0 and 1")

    def __call__(self, s, counted, epoch=0):
        """s (2N, 2N). counted: the negatives, or None for all entries. Returns eps, s > eps."""
        k = len(s)
        if counted is not None:
            k = len(s) - 2
            s = s.where(counted, -2)
        from_top = k - round(self.quantile * (k - 1))
        eps = s.topk(from_top).values[:, -1].mean()
        return eps, s > eps


def local_mask(a, b, threshold=None, epoch=0):
    """Returns eps (a scalar) and H (2N, 2N) of the embeddings a, b: (N, D), as in hex_nce."""
    s, _, negative = similarities(a, b, 1)
    return split(s, negative, threshold, epoch)


# === Variants of the loss =========================================================================
# They are as pure as the loss, and take the same a, b and temperature.

def info_nce(a, b, temperature=0.1):
    """InfoNCE, or NT-Xent (Chen et al. 2020): all negatives are global. Returns a scalar."""
    s, s_p, _ = similarities(a, b, temperature)
    logits = (s / temperature).fill_diagonal_(-math.inf)
    return (logits.logsumexp(1) - s_p / temperature).mean()


def dcl(a, b, temperature=0.1):
    """The decoupled loss (Yeh et al. 2022): InfoNCE without the positive in the sum. A scalar."""
    s, s_p, negative = similarities(a, b, temperature)
    logits = (s / temperature).where(negative, -math.inf)
    return (logits.logsumexp(1) - s_p / temperature).mean()


def released(a, b, temperature=0.1, *, threshold=None, epoch=0):
    """What the authors' public code computes: DCL of the global negatives, and a constant.

    Its local term carries no gradient and stands outside of the logarithm, and its quantile counts
    the anchor itself and its positive, too. Returns a scalar and statistics.
    """
    s, s_p, negative = similarities(a, b, temperature)
    eps, H = split(s, negative, threshold, epoch, count_all=True)
    G = negative & ~H
    size = H.sum(1).to(s.dtype)

    # Where no negative is global, their sum is 1.
    logits = (s / temperature).where(G, -math.inf)
    log_sum = logits.logsumexp(1).where(G.any(1), 0)

    constant = (len(s) - 2) * math.e ** (-1 / temperature)
    loss = (log_sum - s_p / temperature).mean() + constant
    return loss, statistics_of(eps, size, size > 0)


class Schedule:
    """Local is what lies above at(epoch) when each row is rescaled to 0 for its least entry and 1
    for the anchor itself (the authors' code)."""

    def __call__(self, s, counted, epoch=0):
        eps = self.at(epoch)
        low, high = s.aminmax(dim=1, keepdim=True)
        return s.new_full((), eps), (s - low) / (high - low) > eps


@dataclass
class StepThreshold(Schedule):
    """`start`, falling by `drop` every `every` epochs, but not below 0."""
    start: float = 0.9
    drop: float = 0.1
    every: int = 10

    def at(self, epoch):
        return max(0.0, self.start - self.drop * (epoch // self.every))


@dataclass
class CosineThreshold(Schedule):
    """From `start` to `end` over `epochs`, by half a cosine."""
    start: float = 0.9
    end: float = 0.3
    epochs: int = 100

    def at(self, epoch):
        done = min(1, epoch / max(1, self.epochs))
        return self.end + (self.start - self.end) * half_cosine(done)


def half_cosine(done):
    """Falls from 1 to 0 as `done` rises from 0 to 1."""
    return (1 + math.cos(math.pi * done)) / 2


@dataclass
class OracleHierarchy:
    """Local is what has the anchor's super-class. It reads labels, so training with it is NOT
    self-supervised: it is a diagnostic. labels: (N,), of the images that share the loss."""
    labels: torch.Tensor

    def __call__(self, s, counted, epoch=0):
        label = self.labels.repeat(2)
        require(len(label) == len(s), f"labels: {len(label) // 2} for {len(s) // 2} images")
        return s.new_full((), math.nan), label[:, None] == label


# === Many processes ===============================================================================
# Only this section talks to other processes. Without torchrun all of it does nothing.

def environment(name, default):
    """A number that torchrun or Slurm has set, or the default."""
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default


RANK = environment("RANK", 0)                               # the number of this process
RANKS = environment("WORLD_SIZE", 1)                        # how many there are


def gather(x):
    """The rows of all ranks, in their order: (M, ...) on each rank gives (ranks M, ...).

    Only this rank's own rows carry a gradient. So where every rank computes the same loss of all
    rows, the sum over the ranks of their gradients is the gradient of that loss. (A wrapper that
    takes the mean instead, such as DistributedDataParallel, needs the loss times the ranks.)
    ValueError: the ranks have different shapes.
    """
    if not dist.is_initialized():
        return x
    check_shape(x.shape)
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x.detach())
    rows[dist.get_rank()] = x
    return torch.cat(rows)


def everywhere(content):
    """What each rank has given, in their order."""
    contents = [content]
    if dist.is_initialized():
        contents = [None] * dist.get_world_size()
        dist.all_gather_object(contents, content)
    return contents


@functools.cache                                            # each shape is checked once
def check_shape(shape):
    shapes = everywhere(shape)
    require(len({*shapes}) == 1, f"the ranks have rows of different shapes: {shapes}")


def add_over_ranks(tensors, divide_by=1):
    """Each of the tensors becomes its sum over the ranks, divided by a number, in one call."""
    if RANKS > 1 and tensors:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        parts = flat.div_(divide_by).split([x.numel() for x in tensors])
        for x, part in zip(tensors, parts):
            x.copy_(part.view_as(x))


def agree(content, what):
    """Waits for all ranks. CommandError: they do not hold the same content."""
    contents = everywhere(content)
    if any(each != contents[0] for each in contents):
        raise CommandError(f"the ranks see different {what}: give all the same")


def on_first_rank(task):
    """Rank 0 does the task. All ranks wait for it, and return its result or raise its error."""
    box = [None]
    if RANK == 0:
        try:
            box = [task()]
        except Exception as error:
            error.is_common = True
            box = [error]
    if RANKS > 1:
        dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


# === Methods and the wrapper ======================================================================
# A method changes its state in after_step alone. Its losses are pure functions of all N images.

class Method(nn.Module):
    """The base of all methods: a backbone and a projector, and where a method has them a predictor
    and a target.

    A method has these class attributes: `settings`, its hyperparameters with the values of its
    paper, of which others can be given; and the layers of its heads, in words (see mlp). It has
    forward, which is the heavy part, and loss(*embeddings), which gives its own loss and the
    row-aligned pairs [(a, b), ...] of embeddings (N, dim) that HEX can work on. alpha and scale are
    the weights of these pairs (see HEX).
    backbone: (B, 3, S, S) -> (B, width). norm: a function of the width, such as nn.BatchNorm1d.
    With the setting ema there is a target, a copy of backbone and projector that follows them, and
    whose momentum rises from ema to 1. Its BatchNorm statistics are its own.
    """
    alpha = 0.1
    scale = 1.0
    predictor_layers = ""

    def __init__(self, backbone, width, *, norm=nn.BatchNorm1d, **settings):
        super().__init__()
        require(settings.keys() <= self.settings.keys(), f"{settings}: not all of {self.settings}")
        self.settings = self.settings | settings
        self.backbone = backbone
        self.projector = mlp(self.projector_layers, width, norm, self.settings)
        self.predictor = mlp(self.predictor_layers, self.settings["dim"], norm, self.settings)
        self.temperature = self.settings.get("temperature")
        self.ema = self.settings.get("ema")
        self.target = None
        if self.ema is not None:
            self.target = copy.deepcopy(self.online()).requires_grad_(False)

    def online(self):
        return nn.Sequential(self.backbone, self.projector)

    def forward(self, x1, x2):
        """Two views (N, 3, S, S) -> [p1, p2,] z1, z2 [, t1, t2], each (N, dim)."""
        # Both views go through in one pass, so that they are one BatchNorm batch.
        x = torch.cat([x1, x2])
        z = self.projector(self.backbone(x))
        outputs = [z]
        if self.predictor_layers:
            outputs = [self.predictor(z), z]
        if self.target is not None:
            outputs.append(self.target(x))
        return tuple(half for output in outputs for half in output.chunk(2))

    def one_way_nce(self, a, b):
        """InfoNCE of each a_i against all b_j, and no other a_j."""
        logits = F.normalize(a) @ F.normalize(b).T / self.temperature
        return F.cross_entropy(logits, torch.arange(len(a), device=a.device))

    @torch.no_grad()
    def after_step(self, done, outputs):
        """To be called after each optimizer step. done: the share of the run, from 0 to 1.
        outputs: what forward gave for each loss of the step, with the rows of all ranks."""
        if self.target is not None:
            share = (1 - self.ema) * half_cosine(done)
            for old, new in zip(self.target.parameters(), self.online().parameters()):
                old.lerp_(new, share)


def mlp(layers, fan_in, norm, widths):
    """Layers in words: the name of a width for a Linear; norm; plain_norm, which has no weights;
    relu. A Linear before a norm has no bias."""
    words, modules = layers.split(), []
    for word, behind in zip(words, [*words[1:], ""]):
        if word == "relu":
            modules.append(nn.ReLU(inplace=True))
        elif "norm" in word:
            modules.append(norm(fan_in, affine=word == "norm"))
        else:
            modules.append(nn.Linear(fan_in, widths[word], bias="norm" not in behind))
            fan_in = widths[word]
    return nn.Sequential(*modules)


class SimCLR(Method):
    """Chen et al. 2020. The projector is that of HEX's authors: without BatchNorm."""
    alpha = 1.0
    settings = dict(hidden=2048, dim=128, temperature=0.1)
    projector_layers = "hidden relu dim"

    def loss(self, z1, z2):
        return info_nce(z1, z2, self.temperature), [(z1, z2)]


class NNCLR(Method):
    """Dwibedi et al. 2021: an anchor is its nearest neighbor in a queue of past embeddings."""
    alpha = 1.0
    settings = dict(hidden=2048, dim=256, predictor=4096, queue=98304, temperature=0.1)
    projector_layers = "hidden norm relu hidden norm relu dim norm"
    predictor_layers = "predictor norm relu dim"

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        noise = torch.randn(self.settings["queue"], self.settings["dim"])
        self.register_buffer("queue", F.normalize(noise))

    def nearest(self, z):
        similarity = F.normalize(z.detach()) @ self.queue.T
        return self.queue[similarity.argmax(1)]

    def loss(self, p1, p2, z1, z2):
        near1, near2 = self.nearest(z1), self.nearest(z2)
        own = self.one_way_nce(near1, p2) + self.one_way_nce(near2, p1)
        return own / 2, [(near1, p2), (near2, p1)]

    @torch.no_grad()
    def after_step(self, done, outputs):
        """The first views join the queue, and the oldest entries leave it."""
        newest = torch.cat([z1 for _, _, z1, _ in outputs]).to(self.queue.dtype)
        queue = torch.cat([self.queue, F.normalize(newest)])
        self.queue.copy_(queue[-len(self.queue):])


class MoCoV3(Method):
    """Chen et al. 2021. HEX on it is our extension."""
    alpha = 1.0
    settings = dict(hidden=4096, dim=256, predictor=4096, ema=0.99, temperature=1.0)
    projector_layers = "hidden norm relu dim plain_norm"
    predictor_layers = "predictor norm relu dim plain_norm"

    def loss(self, q1, q2, z1, z2, k1, k2):
        own = self.one_way_nce(q1, k2) + self.one_way_nce(q2, k1)
        return 2 * self.temperature * own, [(q1, k2), (q2, k1)]


class BYOL(Method):
    """Grill et al. 2020. HEX on it, between the online projections, is our extension."""
    settings = dict(hidden=4096, dim=256, predictor=4096, ema=0.99)
    projector_layers = "hidden norm relu dim"
    predictor_layers = "predictor norm relu dim"

    def loss(self, p1, p2, z1, z2, t1, t2):
        cosine = F.cosine_similarity(p1, t2) + F.cosine_similarity(p2, t1)
        return 4 - 2 * cosine.mean(), [(z1, z2)]


class SimSiam(Method):
    """Chen and He 2021. HEX on it, between the projections, is our extension."""
    settings = dict(hidden=2048, dim=2048, predictor=512)
    projector_layers = "hidden norm relu hidden norm relu dim plain_norm"
    predictor_layers = "predictor norm relu dim"

    def loss(self, p1, p2, z1, z2):
        t1, t2 = z1.detach(), z2.detach()
        cosine = F.cosine_similarity(p1, t2) + F.cosine_similarity(p2, t1)
        return -cosine.mean() / 2, [(z1, z2)]


def off_diagonal(c):
    """The sum of the squares of what is off the diagonal of c (dim, dim)."""
    return c.square().sum() - c.diagonal().square().sum()


class BarlowTwins(Method):
    """Zbontar et al. 2021. As in the code of HEX's authors, the whole loss is weighted by 0.1."""
    settings = dict(hidden=8192, dim=8192)
    projector_layers = "hidden norm relu hidden norm relu dim"

    def loss(self, z1, z2):
        a = F.batch_norm(z1, None, None, training=True)
        b = F.batch_norm(z2, None, None, training=True)
        c = a.T @ b / len(a)                                # (dim, dim)
        on_diagonal = (c.diagonal() - 1).square().sum()
        return 0.1 * (on_diagonal + 0.0051 * off_diagonal(c)), [(z1, z2)]


class VICReg(BarlowTwins):
    """Bardes et al. 2022, summed over both views (the official code halves the variance)."""
    scale = 5.0

    def loss(self, z1, z2):
        own = 25 * F.mse_loss(z1, z2)
        for z in (z1, z2):
            variance = F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
            centered = z - z.mean(0)
            c = centered.T @ centered / (len(z) - 1)        # (dim, dim)
            own = own + 25 * variance + off_diagonal(c) / len(c)
        return own, [(z1, z2)]


METHODS = dict(
    simclr=SimCLR, nnclr=NNCLR, mocov3=MoCoV3, byol=BYOL, simsiam=SimSiam, barlow=BarlowTwins,
    vicreg=VICReg)
LOSSES = dict(base=None, infonce=info_nce, dcl=dcl, hex=hex_nce, released=released)


class HEX(nn.Module):
    """The wrapper: loss = (1 - alpha) own + alpha scale (mean over the pairs of LOSSES[loss]).

    method: a Method, or any module with its forward and loss; after_step is optional. alpha and
    scale are by default the method's, or 0.1 and 1. With alpha = 1 the own loss has no part, and
    with the loss "base" it stands alone. For `warmup` epochs it stands alone, too, or if there is a
    warmup_threshold, H is what lies above that. of_hex: more options of hex_nce.
    ValueError: an unknown loss, a forward that gives a bare tensor, a method that gives no pairs.
    """
    def __init__(self, method, loss="hex", *, alpha=None, scale=None, temperature=0.1,
                 threshold=None, warmup=0, warmup_threshold=None, **of_hex):
        super().__init__()
        require(loss in LOSSES, f"loss = {loss!r} is not one of {', '.join(LOSSES)}")
        self.method = method
        self.name = loss
        self.pair_loss = LOSSES[loss]
        self.alpha = getattr(method, "alpha", 0.1) if alpha is None else alpha
        self.scale = getattr(method, "scale", 1.0) if scale is None else scale
        self.temperature = temperature
        self.threshold = threshold
        self.warmup = warmup
        self.warmup_threshold = warmup_threshold
        self.of_hex = of_hex

    def forward(self, x1, x2):
        embeddings = self.method(x1, x2)
        require(not torch.is_tensor(embeddings), "forward gave a bare tensor, not a tuple")
        return embeddings

    def loss(self, *embeddings, epoch=0, threshold=None):
        """The embeddings of all N images -> the loss (a scalar), statistics (detached scalars).

        epoch: from 0, for the warm-up and scheduled thresholds. threshold: of this batch alone.
        """
        is_early = epoch < self.warmup
        if is_early:
            threshold = self.warmup_threshold
        elif threshold is None:
            threshold = self.threshold
        own_alone = self.name == "base" or is_early and threshold is None

        options = {}
        if self.name in ("hex", "released"):
            options = dict(threshold=threshold, epoch=epoch)
        if self.name == "hex":
            options |= self.of_hex

        with torch.autocast(embeddings[0].device.type, enabled=False):
            embeddings = [e.to(torch.promote_types(e.dtype, torch.float32)) for e in embeddings]
            loss, pairs = self.method.loss(*embeddings)
            stats = dict(own=torch.as_tensor(loss).detach())
            if not own_alone:
                require(pairs, f"loss = {self.name!r} needs pairs (a, b); the method gave none")
                # With alpha = 1 the own loss is let go of, so that its graph is freed.
                loss = 0 if self.alpha == 1 else (1 - self.alpha) * loss
                terms = [self.pair_loss(a, b, self.temperature, **options) for a, b in pairs]
                if not options:
                    terms = [(term, {}) for term in terms]
                values, more = zip(*terms)
                mean = sum(values) / len(pairs)
                loss = loss + self.alpha * self.scale * mean
                for key in more[0]:
                    stats[key] = sum(each[key] for each in more) / len(pairs)
                stats[self.name] = mean.detach()

        # An embedding that is not part of the loss still gets a gradient, of 0: DDP waits for it.
        # Where its square overflows the loss becomes NaN, since a norm of it would not be sound.
        for e in embeddings:
            if e.requires_grad:
                loss = loss + 0 * e.square().sum()
        return loss, stats

    def after_step(self, done, outputs=()):
        """See Method. It does nothing where the method has no such function."""
        if hasattr(self.method, "after_step"):
            self.method.after_step(done, outputs)


# === Settings =====================================================================================
# Each field is an option: batch_size is --batch-size. Its type is its check, and the comment behind
# it is its help. Where the default is None, the recipe or the method has one.

class UserError(Exception):
    """What the user can mend. Its text is one line, which says how."""
    status = 1                                              # the exit status
    is_common = False                                       # whether all ranks raise it


class CommandError(UserError):
    """The command itself is wrong."""
    status = 2
    is_common = True


def within(low, high):
    """The type of a setting: a number from low to high, an integer if low is one."""
    def number(text):
        with contextlib.suppress(ValueError):
            value = type(low)(text)
            if low <= value <= high:
                return value
        kind = type(low).__name__
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind} from {low} to {high}; give one")
    return number


def path(text):
    if not text:
        raise argparse.ArgumentTypeError("is empty; leave it out")
    return os.path.abspath(text)


Count, Positive = within(0, 2**31), within(1, 2**31)
Share, Weight, Rate = within(0.0, 1.0), within(0.0, 1e6), within(1e-9, 1e6)


@dataclass(eq=False)
class Experiment:
    """The settings that a result depends on. With the data, they are what a run's folder is of."""
    data: Literal["shapes", "cifar10", "cifar100", "imagenet", "folder"] = "shapes"  # to train on
    method: Literal[tuple(METHODS)] = "simclr"  # the SSL method
    loss: Literal[tuple(LOSSES)] = "hex"  # base: the method's own, alone
    seed: Count = 0  # of weights, order and views

    # The loss.
    alpha: Share = None  # weight of the loss against the method's own
    temperature: within(1e-3, 1e6) = 0.1  # tau
    threshold: Literal["adaptive", "step", "cosine", "oracle"] = "adaptive"  # oracle: from LABELS
    quantile: within(1e-6, 1 - 1e-6) = 0.99  # q of the adaptive threshold
    drop: Share = 0.1  # what the step threshold falls by
    drop_every: Positive = None  # the epochs after which it falls
    beta: Weight = 1.0  # how much the nearest weigh in Q
    tau_plus: within(0.0, 1 - 1e-6) = 0.1  # assumed share of positives in H
    decoupled: bool = False  # HEX without the positive in the sum
    hex_warmup: Count = None  # first epochs, with the method's own loss
    warmup_threshold: Share = None  # in these epochs, HEX with this threshold instead

    # The network.
    backbone: str = None  # a torchvision classifier, resnet10_narrow, or pixels
    norm: Literal["batch", "group"] = "batch"  # normalization of backbone and heads
    hidden: Positive = None  # hidden width of the projector
    dim: Positive = None  # width of an embedding
    predictor: Positive = None  # hidden width of the predictor
    queue: Positive = None  # embeddings in NNCLR's queue
    ema: Share = None  # momentum of the target at the start

    # The views. Of two numbers, each is for one view.
    size: within(8, 4096) = 32  # side of a view in pixels
    crop_min: within(1e-3, 1.0) = 0.08  # least share of the picture in a view
    jitter: Share = (0.8, 0.8, 0.8, 0.2)  # most change of brightness, contrast, saturation, hue
    grayscale: Share = 0.2  # share of gray views
    blur: Share = (0.5, 0.5)  # share of blurred views
    solarize: Share = (0.0, 0.0)  # share of solarized views

    # The training.
    epochs: Count = None  # 0 evaluates a random backbone
    batch_size: within(2, 2**31) = 256  # images in one loss
    accumulate: Positive = 1  # losses in one step (adds no negatives)
    lr: Rate = 0.3  # base rate; the rate is lr * batch_size * accumulate / 256
    lr_warmup: Count = None  # epochs of linear rise
    weight_decay: Weight = 1e-4  # L2, not on biases and norms
    eta: Rate = 0.02  # trust coefficient of LARS
    clip: bool = True  # LARS only lowers rates
    amp: Literal["off", "bf16", "fp16"] = "fp16"  # autocast; off on a CPU


@dataclass(eq=False)
class Config(Experiment):
    """With the settings that only concern how it is run, and how it is evaluated."""
    recipe: Literal["shapes", "small", "cifar", "imagenet"] = None  # defaults of the above; by data
    root: path = None  # DIR/{train,val}/<class>/*, pictures anywhere below, or CIFAR's archive
    out: path = None  # where results go; runs/<data>-<method>-<loss>-s<seed>
    skip_bad_files: bool = False  # replace an unreadable file by the next, and say so
    probe: path = None  # evaluate this backbone.pt and do nothing else
    probe_epochs: Positive = 100  # epochs of the linear probe
    label_fraction: within(1e-6, 1.0) = 1.0  # share of the train labels it sees, class-balanced
    device: Literal["cpu", "cuda"] = None  # cuda where there is one
    workers: within(0, 256) = None  # loader processes a rank
    compile: bool = False  # torch.compile the method, the augmentation and the loss
    deterministic: bool = False  # on a GPU, the same bytes again; slower
    checkpoint_every: Positive = None  # steps between checkpoints, beside each epoch's
    log_every: Positive = 10  # steps between lines of metrics.jsonl


# A recipe is a line of options, for all methods; then come those in which a method differs. The
# README names the sources.
RECIPES = {
    "shapes": "--backbone resnet10_narrow --hidden 256 --dim 64 --predictor 256 --queue 2048 "
              "--epochs 12 --batch-size 128 --lr 1.0 --no-clip --amp off --temperature 0.2 "
              "--crop-min 0.5 --grayscale 1.0 --blur 0 0",
    "shapes byol": "--lr 0.3 --ema 0.97",

    "small": "--backbone resnet10_narrow --hidden 512 --dim 128 --predictor 512 --queue 4096 "
             "--epochs 15 --lr 0.2 --no-clip --amp off --temperature 0.2 --crop-min 0.2 --blur 0 0",
    "small byol": "--lr 0.15 --ema 0.97",

    "cifar": "--backbone resnet18 --epochs 400 --lr 0.4 --drop-every 100",
    "cifar nnclr": "--jitter 0.4 0.4 0.2 0.1 --blur 0 0 --solarize 0 0.2 --temperature 0.2 "
                   "--lr 1.0 --weight-decay 1e-5 --queue 65536 --warmup-threshold 0.9 --drop 0",
    "cifar mocov3": "--jitter 0.4 0.4 0.2 0.1 --blur 0 0 --solarize 0 0.2 --temperature 0.2 "
                    "--lr 0.3 --weight-decay 1e-6",
    "cifar byol": "--jitter 0.4 0.4 0.2 0.1 --blur 0 0 --solarize 0 0.2 --lr 1.0 "
                  "--weight-decay 1e-5",
    "cifar simsiam": "--jitter 0.4 0.4 0.4 0.1 --blur 0 0",
    "cifar barlow": "--jitter 0.4 0.4 0.2 0.1 --blur 0 0 --solarize 0 0.2 --lr 0.3 --hidden 2048 "
                    "--dim 2048 --hex-warmup 0",
    "cifar vicreg": "--jitter 0.4 0.4 0.2 0.1 --blur 0 0 --solarize 0 0.2 --hidden 2048 --dim 2048",

    "imagenet": "--backbone resnet50 --size 224 --epochs 100 --weight-decay 1e-6 --drop-every 20",
    "imagenet simclr": "--accumulate 16",
    "imagenet nnclr": "--jitter 0.4 0.4 0.2 0.1 --blur 1 0.1 --solarize 0 0.2 --weight-decay 1e-5 "
                      "--warmup-threshold 0.9 --drop-every 25",
    "imagenet mocov3": "--jitter 0.4 0.4 0.2 0.1 --blur 1 0.1 --solarize 0 0.2 --temperature 1.0 "
                       "--lr 0.6",
    "imagenet byol": "--jitter 0.4 0.4 0.2 0.1 --blur 1 0.1 --solarize 0 0.2 --lr 0.45",
    "imagenet simsiam": "--jitter 0.4 0.4 0.4 0.1 --lr 0.05 --weight-decay 1e-4",
    "imagenet barlow": "--jitter 0.4 0.4 0.2 0.1 --blur 1 0.1 --solarize 0 0.2",
    "imagenet vicreg": "--jitter 0.4 0.4 0.2 0.1 --blur 1 0.1 --solarize 0 0.2",
}


def flag(name):
    return "--" + name.replace("_", "-")


def make_parser():
    def fail(message):
        raise CommandError(message)

    parser = argparse.ArgumentParser("hex.py", "hex.py [options]", allow_abbrev=False)
    parser.error = fail
    source = inspect.getsource(Experiment) + inspect.getsource(Config)
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", source, re.MULTILINE))
    for field in fields(Config):
        how = dict(default=argparse.SUPPRESS, help=f"{comments[field.name]} [{field.default}]")
        choices = get_args(field.type)
        if field.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif choices:
            how["choices"] = choices
        else:
            how |= dict(type=field.type, metavar="X")
        if isinstance(field.default, tuple):
            how["nargs"] = len(field.default)
        parser.add_argument(flag(field.name), **how)
    return parser


def parse(argv):
    """Returns the Config of a command line. CommandError: it is wrong.

    Of each setting the last counts that is said: by the field above, the method's class, the
    recipe, the recipe for the method, the run whose backbone is probed, the command line.
    """
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    of_run = options_of_run(given) if "probe" in given else []
    said = parser.parse_args([*of_run, *argv], Config())
    recipe = dict(cifar10="cifar", cifar100="cifar", folder="imagenet").get(said.data, said.data)
    recipe = said.recipe or recipe
    of_recipe = RECIPES[recipe] + " " + RECIPES.get(f"{recipe} {said.method}", "")

    method = METHODS[said.method]
    cfg = Config(recipe=recipe, alpha=method.alpha)
    vars(cfg).update(method.settings, temperature=cfg.temperature)
    parser.parse_args([*of_recipe.split(), *of_run, *argv], cfg)
    for name in {"predictor", "queue", "ema"} - method.settings.keys():
        setattr(cfg, name, None)

    # In short runs, the warm-ups take a tenth of the epochs.
    tenth = math.ceil(cfg.epochs / 10)
    if cfg.hex_warmup is None:
        cfg.hex_warmup = min(10, round(cfg.epochs / 10))
    if cfg.lr_warmup is None:
        cfg.lr_warmup = max(0, min(10, tenth, cfg.epochs - 1))
    cfg.drop_every = cfg.drop_every or max(1, tenth)

    if cfg.device is None:
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.device == "cpu" and "amp" not in given:
        cfg.amp = "off"
    if cfg.workers is None:
        # On a CPU, pictures that are in memory are cropped fastest by the run itself.
        cores = len(os.sched_getaffinity(0)) // max(1, environment("LOCAL_WORLD_SIZE", 1))
        cfg.workers = min(12, cores // 2) if cfg.device == "cuda" or has_files(cfg) else 0
    check(cfg, given)
    return cfg


def has_files(cfg):
    return cfg.data in ("imagenet", "folder")


def options_of_run(given):
    """What the config.json beside a backbone says of it, as options of the command line."""
    names = ["recipe", "backbone", "norm", "size"]
    if "data" not in given:
        names += ["data", "root"]
    probe, remedy = given["probe"], "give --backbone, --size, --norm and --data"
    beside = os.path.join(os.path.dirname(probe), "config.json")
    if not os.path.exists(probe):
        raise CommandError(f"--probe {probe}: there is no such file; give another")
    if {"backbone", "norm", "size", "data"} <= given.keys():
        return []
    if not os.path.exists(beside):
        raise CommandError(f"--probe {probe}: there is no config.json beside it; {remedy}")

    def options(file):
        saved = json.load(file)["config"]
        return [f"{flag(name)}={saved[name]}" for name in names if saved[name] is not None]

    return read(beside, options, remedy)


# Where a setting is one of these, those options would have no effect, and are refused.
IDLE = """
loss base: alpha hex_warmup
loss base infonce dcl: threshold quantile drop drop_every warmup_threshold
loss base infonce dcl released: beta tau_plus decoupled
threshold step cosine oracle: quantile
threshold adaptive cosine oracle: drop drop_every
method simclr barlow vicreg: predictor
method simclr mocov3 byol simsiam barlow vicreg: queue
method simclr nnclr simsiam barlow vicreg: ema
data shapes: root
data shapes cifar10 cifar100: skip_bad_files
"""


def check(cfg, given):
    """CommandError: an option that would have no effect, or options that contradict each other."""
    for line in IDLE.strip().splitlines():
        where, _, names = line.partition(": ")
        setting, *values = where.split()
        value = getattr(cfg, setting)
        for name in names.split():
            if value in values and name in given:
                ignored = f"{flag(name)} {given[name]}: {flag(setting)} {value} ignores it"
                raise CommandError(f"{ignored}; leave it out")
    if cfg.probe:
        fitting = {"data", "backbone", "norm", "size", "seed", "amp"}
        for name in given.keys() & vars(Experiment()).keys() - fitting:
            raise CommandError(f"{flag(name)} {given[name]}: --probe ignores it; leave it out")

    wrong = {
        f"--root {cfg.root}: is no folder; --data {cfg.data} needs --root DIR":
            has_files(cfg) and not os.path.isdir(cfg.root or ""),
        f"--batch-size {cfg.batch_size}: give a multiple of {RANKS}, the ranks":
            cfg.accumulate % RANKS and cfg.batch_size % RANKS,
        f"--hex-warmup {cfg.hex_warmup}: leaves no epoch; give --hex-warmup {cfg.epochs - 1}":
            0 < cfg.epochs <= cfg.hex_warmup,
        f"--lr-warmup {cfg.lr_warmup}: leaves no epoch; give --lr-warmup {cfg.epochs - 1}":
            0 < cfg.epochs <= cfg.lr_warmup,
        f"--threshold oracle: {cfg.data} has no super-classes; give --data shapes or cifar100":
            cfg.threshold == "oracle" and cfg.data not in ("shapes", "cifar100"),
        "--device cuda: no GPU is visible; give --device cpu":
            cfg.device == "cuda" and not torch.cuda.is_available(),
        f"TMPDIR={tempfile.gettempdir()}: is too long for the loaders' sockets; give TMPDIR=/tmp":
            cfg.workers and len(tempfile.gettempdir()) > 70,
        "srun has started more than one task: let it start torchrun, as the README says":
            environment("SLURM_STEP_NUM_TASKS", 1) > 1 and "RANK" not in os.environ,
        "--backbone pixels: has no weights to train; add --epochs 0":
            cfg.backbone == "pixels" and cfg.epochs and not cfg.probe,
    }
    for message, is_so in wrong.items():
        if is_so:
            raise CommandError(message)


# === Backbones ====================================================================================
# They are torchvision's, on the CPU. Their weights are drawn in build_model, from the seed.

def group_norm(channels, affine=True):
    """GroupNorm with 16 channels a group, where they divide."""
    groups = math.gcd(channels, max(1, channels // 16))
    return nn.GroupNorm(groups, channels, affine=affine)


def resnet10_narrow(norm_layer=nn.BatchNorm2d):
    """A ResNet-10 of 16 to 128 channels, for a CPU.

    SiLU takes the place of ReLU: at a kink, rounding alone would tell two ranks from one process.
    """
    layers = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), norm_layer(16), nn.SiLU()]
    for fan_in, fan_out, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 128, 2)):
        skip = nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)
        skip = nn.Sequential(skip, norm_layer(fan_out))
        block = torchvision.models.resnet.BasicBlock(
            fan_in, fan_out, stride, skip, norm_layer=norm_layer)
        block.relu = nn.SiLU()
        layers.append(block)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1000))


def build_backbone(name, size=224, norm="batch"):
    """A torchvision classifier, or resnet10_narrow, without its last Linear. Returns it, and the
    width of its features: (B, 3, size, size) -> (B, width). CommandError: there is none such.

    "pixels" has no weights: its features are the pixels, to hold a probe against.
    """
    if name == "pixels":
        return nn.Flatten(), 3 * size * size

    options = {}
    if norm == "group":
        options["norm_layer"] = group_norm
    if name.startswith("vit_"):
        options["image_size"] = size
    try:
        if name == "resnet10_narrow":
            model = resnet10_narrow(**options)
        else:
            model = torchvision.models.get_model(name, **options)
        linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        model.set_submodule(linears[-1], nn.Identity())

        # Small pictures would vanish in the stem of a ResNet: it becomes 3x3, without max-pool.
        if isinstance(model, torchvision.models.ResNet) and size <= 64:
            model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")

        _, width = model.eval()(torch.zeros(1, 3, size, size)).shape
    except Exception as error:
        asked = f"--backbone {name}, --size {size}, --norm {norm}"
        raise CommandError(f"{asked}: {error or 'no Linear'}; give resnet18") from error
    return model.train(), width


# === Data and views ===============================================================================
# All that is random in the data is drawn here, from a generator that is seeded with what it is for.
# Labels stay with the data: a view carries none. They are read by the probe, by the figures of each
# epoch and by the oracle.

MEAN_STD = dict(
    cifar10=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    cifar100=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    imagenet=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))        # and for all other data


def rng_of(*key):
    """A random generator that depends on the key alone."""
    return random.Random(" ".join(map(str, key)))


def permutation(count, *key):
    """A random order of range(count) that depends on the key alone."""
    generator = torch.Generator().manual_seed(rng_of(*key).getrandbits(63))
    return torch.randperm(count, generator=generator)


def digest(*parts):
    """SHA-256 of some bytes."""
    return hashlib.sha256(b"".join(parts)).hexdigest()


@dataclass(eq=False)
class Pictures:
    """uint8 pictures (n, 3, H, W) in memory. Fine and coarse labels: (n,), or None."""
    pictures: torch.Tensor
    targets: torch.Tensor
    coarse: torch.Tensor = None

    def __len__(self):
        return len(self.pictures)

    def read(self, index):
        return self.pictures[index]

    def digest(self):
        return digest(self.pictures.numpy().tobytes(), self.targets.numpy().tobytes())


class Folder:
    """The files in ROOT/<class>/**, or without labels in ROOT/**. All are taken for pictures, but
    for those whose name, or whose folder's name, begins with a dot, and for runs."""
    coarse = targets = None

    def __init__(self, root, labelled=True, skip=()):
        self.root = root
        files = list(files_below(root, skip, {os.path.realpath(root)}))
        self.classes = []
        if labelled:
            files = [file for file in files if "/" in file]
            names = [file.partition("/")[0] for file in files]
            self.classes = sorted(set(names))
            label = {name: number for number, name in enumerate(self.classes)}
            self.targets = torch.tensor([label[name] for name in names], dtype=torch.long)
        # One buffer goes to a loader process at once, and a million strings would not.
        self.files = numpy.array([*map(os.fsencode, files)], dtype=bytes)

    def __len__(self):
        return len(self.files)

    def read(self, index):
        """(3, H, W) uint8, upright. UserError: it is no picture."""
        path = os.path.join(self.root, os.fsdecode(self.files[index]))
        try:
            require(os.path.isfile(path), "no regular file")
            with warnings.catch_warnings(action="ignore"):
                return decode(path)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            reason = f"{path}: not readable ({reason}); mend it, or --skip-bad-files"
            raise UserError(reason) from None

    def digest(self):
        return digest(repr((self.classes, self.files.dtype)).encode(), self.files.tobytes())


def files_below(folder, skip, seen):
    """The paths of all files but hidden ones, from the folder on: its own, then its folders'.

    Runs and the folders `skip` are no data. A link to a folder that was seen is not followed: it
    may lead up, and so for ever. skip, seen: sets of real paths.
    """
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    if {"config.json", "lock"} <= {entry.name for entry in entries}:
        return
    entries = [entry for entry in entries if entry.name[0] != "."]
    yield from (entry.name for entry in entries if not entry.is_dir())
    for entry in entries:
        real = os.path.realpath(entry.path)
        if not entry.is_dir() or real in skip or entry.is_symlink() and real in seen:
            continue
        seen.add(real)
        for name in files_below(entry.path, skip, seen):
            yield f"{entry.name}/{name}"


def decode(path):
    """(3, H, W) uint8. JPEG by torchvision, which is twice as fast; all else by Pillow, as
    torchvision's PNG decoder dies of a damaged file. ValueError: numbers of no known range."""
    picture = Image.open(path)                              # refuses what would fill the memory
    kind, mode = picture.format, picture.mode
    if kind in ("JPEG", "MPO"):
        data = torchvision.io.read_file(path)
        return torchvision.io.decode_jpeg(data, mode="RGB", apply_exif_orientation=True)

    with contextlib.suppress(Exception):                    # metadata may be broken
        picture = ImageOps.exif_transpose(picture)
    # Pillow would cut at 255 what has more than 8 bits. Of 16 bits, the full range is known.
    if mode.startswith("I;16") or (kind, mode) == ("PPM", "I"):
        gray = torch.from_numpy(numpy.asarray(picture) // 257).byte()
        return gray.expand(3, -1, -1)
    require(mode not in ("I", "F"), f"mode {mode}: numbers of no known range")
    return TF.pil_to_tensor(picture.convert("RGB"))


def draw_shapes(count, seed):
    """32x32 pictures of a polygon, star, flower or frame (the coarse label, of 4) with 3, 4 or 6
    corners (with it the fine label, of 12)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    fine = torch.arange(count) % 12
    coarse = fine // 3
    corners = torch.tensor([3.0, 4.0, 6.0])[fine % 3, None, None]

    # Polar coordinates around a random centre, of random size and direction, at 64x64 pixels.
    axis = torch.linspace(-1, 1, 64)
    x = axis - uniform(-0.2, 0.2, 1, 1)                     # (count, 1, 64)
    y = axis[:, None] - uniform(-0.2, 0.2, 1, 1)            # (count, 64, 1)
    radius = torch.hypot(x, y) / uniform(0.5, 0.8, 1, 1)
    angle = torch.atan2(y, x) + uniform(0, 2 * math.pi, 1, 1)

    # The outline is a radius for each angle. phi is the angle to the nearest line between two
    # corners, so it is 0 between them and `half` at one.
    half = math.pi / corners
    phi = (angle % (2 * half) - half).abs()
    polygon = half.cos() / phi.cos()
    star = 0.4 * half.sin() / (0.4 * phi.sin() + (half - phi).sin())
    flower = 0.65 - 0.35 * (corners * angle).cos()
    edge = torch.stack([polygon, star, flower, polygon])[coarse, torch.arange(count)]
    hole = (coarse == 3)[:, None, None] & (radius < 0.6 * edge)
    inside = (radius < edge) & ~hole
    inside = F.avg_pool2d(inside.float()[:, None], 2)       # (count, 1, 32, 32), with soft edges

    # Dark on bright or bright on dark, in random colors, with a gradient and noise.
    dark = uniform(0, 0.35, 3, 1, 1)
    bright = uniform(0.65, 1, 3, 1, 1)
    swap = uniform(0, 1, 1, 1, 1) < 0.5
    ramp = uniform(-0.2, 0.2, 3, 1, 1) * axis[::2] + uniform(-0.05, 0.05, 3, 32, 32)
    ground = torch.where(swap, dark, bright) + ramp
    picture = torch.lerp(ground, torch.where(swap, bright, dark), inside)
    return Pictures((255 * picture.clamp(0, 1)).byte(), fine, coarse)


def load_cifar(cfg):
    """CIFAR-10 or -100 from cfg.root, downloaded if it is not there."""
    kind = getattr(torchvision.datasets, cfg.data.upper())
    root = cfg.root or "data"
    os.makedirs(root, exist_ok=True)
    folder = os.open(root, os.O_RDONLY)
    with contextlib.suppress(OSError):                      # not every file system has locks
        fcntl.flock(folder, fcntl.LOCK_EX)                  # one process downloads, others wait
    try:
        splits = [kind(root, train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UserError(f"--data {cfg.data}: {error}; put {kind.filename} in {root}") from error
    finally:
        os.close(folder)

    # The super-class (Krizhevsky 2009) of each of CIFAR-100's classes, a digit of base 20 each.
    digits = ("41e80677i33e9i7b397b6b5a76df3f0b1aceg9b55j88fdehia"
              "g4h420h4iha32ccgc19j2a01gc9dfdgj246j558ji12f60h8ed")
    superclass = torch.tensor([int(digit, 20) for digit in digits])
    for split in splits:
        pictures = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
        targets = torch.tensor(split.targets)
        coarse = superclass[targets] if cfg.data == "cifar100" else None
        yield Pictures(pictures, targets, coarse)


def load_folder(cfg):
    """ROOT/{train,val}/<class>/**. With --data folder val/ may be missing, or labels altogether."""
    has_train, has_val = (os.path.isdir(f"{cfg.root}/{name}") for name in ("train", "val"))
    skip = {os.path.realpath(each) for each in ("runs", cfg.out or "runs")}
    if cfg.data == "folder" and not has_train:
        return Folder(cfg.root, labelled=False, skip=skip), None
    train = Folder(f"{cfg.root}/train", skip=skip)
    if cfg.data == "folder" and not has_val:
        return train, None
    val = Folder(f"{cfg.root}/val", skip=skip)
    differing = sorted({*train.classes} ^ {*val.classes})
    if differing or not train.classes:
        raise UserError(
            f"--root {cfg.root}: train/ and val/ need the same class folders with pictures "
            f"(valprep.sh sorts a flat val/); not so: {', '.join(differing[:5]) or 'all'}")
    return train, val


def load_data(cfg):
    """Returns train, and val or None. Each has len, read(index), targets, coarse and digest()."""
    if cfg.data == "shapes":
        return draw_shapes(4096, 0), draw_shapes(1024, 1)
    return load_folder(cfg) if has_files(cfg) else load_cifar(cfg)


class Changes(NamedTuple):
    """What is done to a crop after it is cut, in this order. The values here change nothing."""
    flip: float = 0.0                                       # 0 or 1
    brightness: float = 1.0                                 # these three are factors
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0                                        # in turns of the color circle
    gray: float = 0.0                                       # 0 or 1
    blur: float = 0.0                                       # sigma in pixels, 0 for none
    solarize: float = 0.0                                   # 0 or 1


class Batch(NamedTuple):
    """The views of B pictures: view 1 of each, then view 2 of each."""
    crops: torch.Tensor                                     # (views B, 3, S, S), uint8
    changes: torch.Tensor                                   # (views B, 8)
    pictures: torch.Tensor                                  # (B,), which were read


class Views(torch.utils.data.Dataset):
    """A list of keys (epoch, index) -> Batch. A view is a function of (seed, epoch, index, view).

    So it does not depend on the batch, on the number of loader processes or ranks, or on a resume.
    views: 2, 1, or 0 for a centre crop that is not changed.
    """
    def __init__(self, pictures, cfg, views=2, seed=None):
        self.pictures = pictures
        self.cfg = cfg
        self.views = views
        self.seed = cfg.seed if seed is None else seed

    def __getitem__(self, keys):
        found = [self.read(index) for _, index in keys]
        views = []
        for view in range(max(1, self.views)):
            for key, (picture, _) in zip(keys, found):
                views.append(self.draw(picture, view, rng_of(self.seed, *key, view)))
        crops, changes = zip(*views)
        read = torch.tensor([index for _, index in found])
        return Batch(torch.stack(crops), torch.tensor(changes), read)

    def read(self, index):
        """A picture and its index. With skip_bad_files, it may be the next that can be read."""
        count = len(self.pictures)
        for each in range(index, index + count):
            try:
                return self.pictures.read(each % count), each % count
            except UserError as error:
                if not self.cfg.skip_bad_files:
                    raise
                print(f"hex.py: skipped {one_line(error)}", file=sys.stderr)
        raise UserError("no file of the data can be read: give another --root")

    def draw(self, picture, view, rng):
        """The crop (3, S, S) and its Changes."""
        cfg = self.cfg
        box, changes = centre_box(*picture.shape[1:], cfg.size), Changes()
        if self.views > 0:
            box = random_box(rng, *picture.shape[1:], cfg.crop_min)
            flip, jitter, gray, blur, solarize = (rng.random() for _ in range(5))
            sigma = rng.uniform(0.1, 2.0)
            jitters = [(jitter < 0.8) * rng.uniform(-most, most) for most in cfg.jitter]
            brightness, contrast, saturation, hue = jitters
            changes = Changes(
                flip < 0.5, 1 + brightness, 1 + contrast, 1 + saturation, hue, gray < cfg.grayscale,
                sigma * (blur < cfg.blur[view]), solarize < cfg.solarize[view])
        crop = TF.crop(picture, *box)
        bicubic = TF.InterpolationMode.BICUBIC
        return TF.resize(crop, [cfg.size, cfg.size], bicubic, antialias=True), changes


def centre_box(height, width, size):
    """The usual 224 of 256 pixels, cut before they are resized. Of small pictures all."""
    side = min(height, width)
    if size > 64:
        side = max(1, round(side * 224 / 256))
    return round((height - side) / 2), round((width - side) / 2), side, side


def random_box(rng, height, width, smallest):
    """Inception's crop: top, left, height and width of a box in the picture, with a share of its
    area from `smallest` to 1, and a ratio of 3/4 to 4/3."""
    for _ in range(10):
        area = height * width * rng.uniform(smallest, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w

    # Of a long picture, as much as the ratio lets, from its middle.
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    return (height - h) // 2, (width - w) // 2, h, w


def shift_hue(x, shift):
    """x: (B, 3, H, W) in [0, 1]. shift: (B, 1, 1), in turns of the color circle."""
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    safe = torch.where(chroma == 0, 1, chroma)              # gray has no hue

    # The hue in sixths of the circle, by the largest of the three colors.
    hue = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = torch.where(value == red, (green - blue) / safe, hue)

    # And back: how far each color lies below the largest, by its distance on the circle.
    place = torch.stack([5 + hue, 3 + hue, 1 + hue], 1)
    place = (place + 6 * shift[:, None]) % 6
    below = torch.minimum(place, 4 - place).clamp(0, 1)
    return value[:, None] - chroma[:, None] * below


def gaussian_blur(x, sigma, kernel=13):
    """x: (B, C, H, W). sigma: (B,), in pixels, at most 2; 0 for none."""
    B, C, H, W = x.shape
    offset = torch.arange(kernel, device=x.device) - kernel // 2
    distance = offset / sigma.clamp_min(1e-4)[:, None]
    weight = (-distance.square() / 2).softmax(1)            # (B, kernel)
    weight = weight.repeat_interleave(C, 0)[:, None]        # (B C, 1, kernel)

    # Each channel of each picture is a group of its own, with its own kernel.
    x = F.pad(x.reshape(1, B * C, H, W), [kernel // 2] * 4, mode="reflect")
    x = F.conv2d(x, weight[..., None], groups=B * C)        # down
    x = F.conv2d(x, weight[:, :, None], groups=B * C)       # across
    return x.view(B, C, H, W)


def augment(batch, cfg, color=True):
    """A Batch -> normalized float views (views B, 3, S, S) on the device, all changed at once.

    color: without it, of the changes there is only the flip.
    """
    x = batch.crops.to(cfg.device, non_blocking=True)
    changes = batch.changes.to(cfg.device, non_blocking=True)
    change = Changes(*changes.T[..., None, None, None])     # each: (views B, 1, 1, 1)

    x = torch.where(change.flip > 0, x.flip(-1), x) / 255
    if color:
        x = (x * change.brightness).clamp(0, 1)
        mean = TF.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True)
        x = torch.lerp(mean, x, change.contrast).clamp(0, 1)
        x = torch.lerp(TF.rgb_to_grayscale(x), x, change.saturation).clamp(0, 1)
        x = shift_hue(x, change.hue[:, 0])
        x = torch.where(change.gray > 0, TF.rgb_to_grayscale(x), x)
        if max(cfg.blur) > 0:
            x = gaussian_blur(x, change.blur.flatten())
        x = torch.where((change.solarize > 0) & (x >= 0.5), 1 - x, x)

    # Constants for each channel: a tensor of them would be a copy that waits for the device.
    mean_std = MEAN_STD.get(cfg.data, MEAN_STD["imagenet"])
    channels = [(each - mean) / std for each, mean, std in zip(x.unbind(1), *mean_std)]
    return torch.stack(channels, 1).contiguous(memory_format=torch.channels_last)


def batches(indices, size, *key, epochs, start=0, group=1, whole=False):
    """This rank's batches of a run, from number `start` on: lists of (epoch, index).

    The order in an epoch depends on (key, epoch) alone. Batches have `size` pictures. What is
    beyond a multiple of `group` batches is left out. whole: this rank has every ranks-th batch;
    otherwise, a part of each.
    """
    per_epoch = len(indices) // size // group * group
    for number in range(start, epochs * per_epoch):
        epoch, k = divmod(number, per_epoch)
        if k == 0 or number == start:
            order = indices[permutation(len(indices), *key, epoch)].tolist()
        keys = [(epoch, index) for index in order[k * size:(k + 1) * size]]
        if not whole:
            yield keys[RANK * size // RANKS:(RANK + 1) * size // RANKS]
        elif k % RANKS == RANK:
            yield keys


def start_loader(_):
    """In a loader process."""
    sys.stderr = Quiet(sys.stderr)


def loader(views, lists, workers):
    """The batches of the lists, made by `workers` processes, whose parent is a server that has no
    threads: a fork beside the threads of gloo or autograd may never return."""
    server = multiprocessing.forkserver
    if workers > 0:
        # They inherit that signals are blocked: they must not stop before the run has ended a step.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        server.set_forkserver_preload(["torch", "torchvision"])
        server.ensure_running()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return torch.utils.data.DataLoader(
        views, batch_size=None, sampler=lists, num_workers=workers,
        pin_memory=views.cfg.device == "cuda", worker_init_fn=start_loader,
        multiprocessing_context="forkserver" if workers else None)


# === Optimizer ====================================================================================

class LARS(torch.optim.SGD):
    """SGD that gives each layer its own rate (You et al. 2017): lr times the factor
    f = eta |w| / (|g| + decay |w|), or with `clip` min(lr, f).

    params: parameters, or pairs of name and parameter. Biases, norms and what is not named a weight
    (a ViT's class token, a layer scale) have lr itself, and no decay.
    """
    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.02, clip=True):
        super().__init__(params, lr, momentum, foreach=True)
        self.decay = weight_decay
        self.eta = eta
        self.clip = clip

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            names = group.get("param_names", ["weight"] * len(group["params"]))
            weights = [
                p for name, p in zip(names, group["params"])
                if p.grad is not None and p.ndim > 1 and name.endswith("weight")]
            if weights:
                self.rescale(weights, group["lr"])
        super().step()
        return loss

    def rescale(self, weights, lr):
        """Scales the gradients, all at once. The rest is SGD's own step."""
        grads = [w.grad for w in weights]
        norm = torch.stack(torch._foreach_norm(weights))
        grad_norm = torch.stack(torch._foreach_norm(grads))
        factor = self.eta * norm / (grad_norm + self.decay * norm + 1e-8)
        if self.clip:
            factor = (factor / lr).clamp(max=1)
        factor = factor.where((norm > 0) & (grad_norm > 0), 1)
        torch._foreach_add_(grads, weights, alpha=self.decay)
        torch._foreach_mul_(grads, factor.unbind())


def learning_rate(step, total, warmup, peak):
    """The rate of a step, counted from 0: linear to `peak` over `warmup` steps, then half a cosine
    to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * half_cosine((step - warmup) / max(1, total - warmup))


# === Training =====================================================================================
# From here on, things are printed and files are written, most of them by rank 0.

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Quiet:
    """A terminal's stream, which may be closed or full: what it cannot take is dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        with contextlib.suppress(AttributeError):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:                                     # nothing more is kept for it, either
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except ValueError:                                  # it is closed
            pass

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Interrupted(UserError):
    """A signal has come, and what is needed to go on is written."""
    status = 75
    is_common = True

    def __init__(self):
        super().__init__("interrupted, run the same command again")


def one_line(text):
    """The text without anything that would not stay on one line of a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text).strip())


def announce(text):
    """A line for the terminal, from one of the ranks."""
    if RANK == 0:
        tqdm.write(one_line(text), file=sys.stderr)


def write(path, fill):
    """Rank 0 writes a file by fill(open file), and all wait for it. A reader finds the old file or
    the new one, whole."""
    def replace():
        aside = Path(f"{path}.tmp")
        aside.unlink(missing_ok=True)                       # a link of that name is not followed
        with open(aside, "xb") as file:
            try:
                fill(file)
            except RuntimeError as error:                   # torch.save's, if the disk is full
                raise UserError(f"{path}: cannot be written ({error}); make room") from error
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)

    on_first_rank(replace)


def write_json(path, content):
    write(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read(path, reader, remedy):
    """What reader(open file) returns. UserError: the file is malformed, with its remedy."""
    with open(path, "rb") as file:
        try:
            return reader(file)
        except Exception as error:
            # Memory that is too small is not the fault of the file.
            if isinstance(error, (UserError, MemoryError)) or "memory" in str(error):
                raise
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: cannot be read ({reason}); {remedy}") from error


def read_json(path, remedy):
    return read(path, lambda file: dict(json.load(file)), remedy)


def read_tensors(file):
    return torch.load(file, map_location="cpu", weights_only=True)      # runs no code in the file


def save_checkpoint(path, parts, **more):
    """parts: what has a state, by name."""
    state = {name: part.state_dict() for name, part in parts.items()}
    write(path, lambda file: torch.save(state | more, file))


def load_checkpoint(path, parts, experiment):
    """Restores the parts. Returns the number of steps that are done, 0 if there is no file."""
    def restore(file):
        state = read_tensors(file)
        if state["experiment"] != experiment:
            other = "is of another experiment, or of other data"
            raise UserError(f"{path}: {other}; give another --out")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["step"]

    step = read(path, restore, "delete it to start again") if path.exists() else 0
    agree(step, "checkpoints")
    return step


# The log is the least important file: what is wrong with it never stops a run.

def read_log(path):
    """The events of metrics.jsonl, without lines that are none."""
    events = []
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                event = json.loads(line)
                events.append({"event": event["event"], "step": event["step"]} | event)
    return events


def add_to_log(path, *events, mode="a"):
    """Rank 0 adds a line for each event. NaN, which is no JSON, becomes null."""
    try:
        if RANK == 0:
            with open(path, mode) as file:
                for event in events:
                    event = {key: None if value != value else value for key, value in event.items()}
                    print(json.dumps(event), file=file)
    except OSError as error:
        announce(f"warning: the log has a gap: {error}")


@contextlib.contextmanager
def signals_counted(restore):
    """Yields a list, to which each signal to stop adds its time, and nothing else happens.

    A second one ends the process, unless it comes within 3 s: then it is a copy of the first,
    which torchrun has passed on. restore: whether the process goes on afterwards.
    """
    came = []

    def add(*_):
        came.append(time.monotonic())
        if came[-1] > came[0] + 3:
            os._exit(Interrupted.status)

    before = {}
    for each in SIGNALS:
        if signal.getsignal(each) != signal.SIG_IGN:        # as SIGHUP is, under nohup
            before[each] = signal.signal(each, add)
    try:
        yield came
    finally:
        for each, handler in before.items():
            if restore:
                signal.signal(each, handler)


def build_model(cfg):
    """The wrapped method, on the CPU. Its weights are a function of the seed."""
    torch.manual_seed(cfg.seed)
    backbone, width = build_backbone(cfg.backbone, cfg.size, cfg.norm)
    norm = group_norm if cfg.norm == "group" else nn.BatchNorm1d
    kind = METHODS[cfg.method]
    settings = {name: getattr(cfg, name) for name in kind.settings}
    method = kind(backbone, width, norm=norm, **settings)
    thresholds = dict(
        adaptive=AdaptiveThreshold(cfg.quantile),
        step=StepThreshold(0.9, cfg.drop, cfg.drop_every),
        cosine=CosineThreshold(0.9, 0.3, cfg.epochs))
    names = "alpha temperature warmup_threshold beta tau_plus decoupled".split()
    return HEX(
        method, cfg.loss, threshold=thresholds.get(cfg.threshold), warmup=cfg.hex_warmup,
        **{name: getattr(cfg, name) for name in names})


def autocast(cfg):
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16).get(cfg.amp)
    return torch.autocast(cfg.device, dtype, enabled=dtype is not None)


def pretrain(model, cfg, train, val, out, experiment, signals):
    """Trains the model, or goes on from its checkpoint. Leaves checkpoint.pt, metrics.jsonl and two
    pictures in `out`. Interrupted: one of the signals has come."""
    # A step is the mean of `accumulate` losses. If the ranks divide their number, each computes
    # whole losses by itself. Else they share every loss: each has a part of its images, and all
    # embeddings are gathered.
    whole = cfg.accumulate % RANKS == 0
    losses = cfg.accumulate // RANKS if whole else cfg.accumulate     # of this rank in a step
    images = cfg.batch_size * cfg.accumulate                            # of all ranks in a step
    per_epoch = max(1, len(train) // images)
    total = cfg.epochs * per_epoch

    model.to(cfg.device, memory_format=torch.channels_last)
    if cfg.device == "cuda" and not whole:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    views_of = augment
    if cfg.compile:                                         # each shape by itself, so in any order
        model.method.compile(dynamic=False)
        model.pair_loss = torch.compile(model.pair_loss)
        views_of = torch.compile(augment, dynamic=False)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = [p for _, p in named]
    statistics = [x for name, x in model.named_buffers() if "running_" in name]
    peak = cfg.lr * images / 256
    optimizer = LARS(named, peak, weight_decay=cfg.weight_decay, eta=cfg.eta, clip=cfg.clip)
    scaler = torch.amp.GradScaler(cfg.device, enabled=cfg.amp == "fp16")

    # Go on from the checkpoint, if there is one. What was logged after it comes again.
    parts = dict(model=model, optimizer=optimizer, scaler=scaler)
    checkpoint, log = out / "checkpoint.pt", out / "metrics.jsonl"
    start = step = load_checkpoint(checkpoint, parts, experiment)
    if 0 < start == total:
        return announce(f"training was finished before; delete {out} to repeat")
    add_to_log(log, *(event for event in read_log(log) if event["step"] <= start), mode="w")

    lists = batches(
        torch.arange(len(train)), cfg.batch_size, cfg.seed, "order", epochs=cfg.epochs,
        start=start * cfg.accumulate, group=cfg.accumulate, whole=whole)
    source = iter(loader(Views(train, cfg), lists, cfg.workers))

    stop, std = False, 0.0
    logged, since, waited = step, time.perf_counter(), 0.0
    with tqdm(total=total, initial=start, disable=RANK > 0, unit="step") as bar:
        while True:
            # Before the first step and after each epoch: what has emerged?
            epoch = step // per_epoch
            ends_epoch = step % per_epoch == 0
            if ends_epoch and (step == 0 or step > start):
                found = emergence(model, cfg, train, val)
                add_to_log(log, dict(event="epoch", step=step, epoch=epoch, **found))
                figures = ", ".join(f"{key} {value:.3g}" for key, value in found.items())
                announce(f"epoch {epoch}/{cfg.epochs}: {figures}")
                if step and found["std"] < 0.1 and found["std"] <= std:     # low at the start, too
                    collapse = f"the embeddings collapse (std {found['std']:.3f} of 1)"
                    announce(f"warning: {collapse}: lower --lr")
                std = found["std"]
                if step in (0, total):
                    name = "neighbours.png" if step == total else "neighbours_early.png"
                    draw_neighbors(model, cfg, train, out / name)

            # Save a checkpoint. End if a signal has come, or if the work is done.
            is_due = ends_epoch or step % (cfg.checkpoint_every or per_epoch) == 0
            if step > start and (stop or is_due):
                save_checkpoint(checkpoint, parts, step=step, experiment=experiment)
            if stop:
                raise Interrupted
            if step == total:
                return

            # One step: the gradients of its losses add up.
            model.train()
            lr = learning_rate(step, total, cfg.lr_warmup * per_epoch, peak)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            logs, outputs = [], []
            for k in range(losses):
                asked = time.perf_counter()
                batch = next(source)
                waited += time.perf_counter() - asked
                x1, x2 = views_of(batch, cfg).chunk(2)

                # Dropout, where a backbone has it, depends on the loss and not on who computes it.
                rng = rng_of(cfg.seed, "step", step + 1, k * RANKS + RANK)
                torch.manual_seed(rng.getrandbits(63))
                with autocast(cfg):
                    embeddings = model(x1, x2)
                if not whole:
                    embeddings = [gather(e) for e in embeddings]
                outputs.append([e.detach() for e in embeddings])

                threshold = None
                if cfg.threshold == "oracle":
                    labels = train.coarse[batch.pictures].to(cfg.device)
                    threshold = OracleHierarchy(labels if whole else gather(labels))
                loss, stats = model.loss(*embeddings, epoch=epoch, threshold=threshold)
                scaler.scale(loss / cfg.accumulate).backward()
                logs.append(torch.stack([loss.detach(), *stats.values()]))

            # The gradient of the step is the sum over the ranks.
            grads = [p.grad for p in weights if p.grad is not None]
            add_over_ranks(grads)
            scaler.unscale_(optimizer)

            # Is all finite, and has a signal come, on any rank? Here the host waits for the device.
            logs = torch.stack(logs)                        # (losses, what is logged)
            finite = logs[:, 0].isfinite().all()
            fits = nn.utils.get_total_norm(grads).isfinite()
            flags = torch.stack([~finite, ~fits, torch.full_like(fits, bool(signals))]).float()
            add_over_ranks([flags])
            broken, overflow, stop = flags.tolist()
            skipped = overflow and cfg.amp == "fp16"        # by the scaler, which then scales less
            if broken or overflow and not skipped or skipped and scaler.get_scale() < 1e-9:
                raise UserError(
                    f"step {step + 1}: the loss or its gradient is not finite; checkpoint.pt is "
                    "intact: lower --lr and give another --out")

            scaler.step(optimizer)
            scaler.update()
            step += 1
            if not skipped:
                if whole and cfg.method == "nnclr":         # its queue takes those of all ranks
                    outputs = [[gather(e) for e in output] for output in outputs]
                model.after_step(step / total, outputs)
            # BatchNorm's running statistics are of each rank's batches: all go on with the mean.
            add_over_ranks(statistics, RANKS)

            if step % cfg.log_every == 0 or step == total:
                means = logs.mean(0)
                add_over_ranks([means], RANKS)
                means = dict(zip(["loss", *stats], means.tolist()))
                seconds = time.perf_counter() - since
                speed = (step - logged) * images / seconds
                add_to_log(log, dict(
                    event="step", step=step, epoch=epoch, **means, lr=lr, images_per_second=speed,
                    data_wait=waited / seconds))
                bar.set_postfix(loss=means["loss"], images_per_second=speed, refresh=False)
                logged, since, waited = step, time.perf_counter(), 0.0
            bar.update()


# === Evaluation ===================================================================================

def centre_batches(pictures, indices, cfg):
    """Batches of the centre crops of this rank's share of some pictures."""
    # Shares have the same length, so that in the last one the first pictures may come again.
    length = math.ceil(len(indices) / RANKS)
    share = indices[(torch.arange(length) + RANK * length) % len(indices)]
    lists = [[(0, index) for index in part.tolist()] for part in share.split(256)]
    workers = cfg.workers if len(lists) > 16 else 0         # for a few, to start them takes longer
    return loader(Views(pictures, cfg, views=0), lists, workers)


@torch.no_grad()
def features(backbone, centres, indices, cfg, signals=()):
    """The features (n, width), float32, of centre_batches(pictures, indices, cfg) of all ranks, and
    the indices (n,) of the pictures: without those that could not be read."""
    rows, read = [], []
    for batch in centres:
        if signals:
            raise Interrupted
        with autocast(cfg):
            rows.append(backbone(augment(batch, cfg, color=False)).float())
        read += batch.pictures.tolist()                     # a tensor would keep a file open
    rows = gather(torch.cat(rows))[:len(indices)]
    read = gather(torch.tensor(read, device=cfg.device))[:len(indices)].cpu()
    if not rows.norm(dim=1).isfinite().all():
        raise UserError("features are not finite: give another --probe, or lower --lr, a new --out")
    good = read == indices
    if not good.any():
        raise UserError(f"none of {len(good)} pictures of --root {cfg.root} can be read: mend them")
    return rows[good.to(cfg.device)], indices[good]


def nearest_neighbors(bank, labels, queries, truth, k=20, temperature=0.07):
    """k-NN with votes weighted by e^{s/0.07} (Wu et al. 2018). Returns which are right, (n,)."""
    bank = F.normalize(bank)
    labels = labels.to(bank.device)
    guesses = []
    for rows in F.normalize(queries).split(256):
        nearest, index = (rows @ bank.T).topk(min(k, len(bank)))
        votes = rows.new_zeros(len(rows), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[index], (nearest / temperature).exp())
        guesses.append(votes.argmax(1))
    return torch.cat(guesses) == truth.to(bank.device)


@functools.cache
def fixed_views(train, cfg):
    """The 256 pictures of which H is shown at each epoch, augmented as in training: a Batch that
    is made once."""
    chosen = permutation(len(train), "fixed")[:256]
    return Views(train, cfg, seed="fixed")[[(0, index) for index in chosen.tolist()]]


@functools.cache
def fixed_centres(pictures, cfg, count):
    """Pictures for the other figures of each epoch: centre_batches that are made once, indices."""
    chosen = permutation(len(pictures), "subset")[:count]
    return list(centre_batches(pictures, chosen, cfg)), chosen


@torch.no_grad()
def find_neighbors(model, cfg, train):
    """Returns the normalized embeddings (2N, dim) of fixed_views, the picture of each (2N,), eps
    and H (2N, 2N). It leaves the model in eval mode."""
    batch = fixed_views(train, cfg)
    model.eval()
    with autocast(cfg):
        embeddings = model(*augment(batch, cfg).chunk(2))
    _, pairs = model.method.loss(*(e.float() for e in embeddings))
    eps, H = local_mask(*pairs[0], AdaptiveThreshold(cfg.quantile))
    return F.normalize(torch.cat(pairs[0])), batch.pictures.repeat(2), eps, H.cpu()


def emergence(model, cfg, train, val):
    """What has emerged, in figures: a dict of floats."""
    z, picture, eps, H = find_neighbors(model, cfg, train)
    spread = z.std(0).mean() * math.sqrt(z.shape[1])        # 1 for points all over the sphere
    found = dict(threshold=eps, local=H.sum(1).float().mean(), std=spread)

    # Purity is the share of the pairs of H that have the same label; chance is that of all pairs.
    different = picture[:, None] != picture
    for name, labels in (("", train.targets), ("_coarse", train.coarse)):
        if labels is not None:
            label = labels[picture]
            same = (label[:, None] == label).double()
            found["purity" + name] = same[H].mean()
            found["chance" + name] = same[different].mean()

    # RankMe (Garrido et al. 2023): e to the entropy of the features' singular values.
    backbone = model.method.backbone
    x, index = features(backbone, *fixed_centres(train, cfg, 2048), cfg)
    values = torch.linalg.svdvals(x)
    found["rankme"] = torch.special.entr(values / values.sum() + 1e-7).sum().exp()

    if val and train.targets is not None:
        x_val, index_val = features(backbone, *fixed_centres(val, cfg, 512), cfg)
        right = nearest_neighbors(x, train.targets[index], x_val, val.targets[index_val])
        found["knn"] = 100 * right.double().mean()
    return {key: value.item() for key, value in found.items()}


def draw_neighbors(model, cfg, train, path):
    """A picture of eight rows: an anchor, then those of its H, nearest first."""
    z, picture, _, H = find_neighbors(model, cfg, train)
    order = (z @ z.T).argsort(descending=True).cpu()
    centres = Views(train, cfg, views=0)
    tiles = torch.ones(64, 3, cfg.size, cfg.size)           # white
    for anchor in range(min(8, len(z) // 2)):
        near = [j for j in order[anchor].tolist() if H[anchor, j]]
        shown = dict.fromkeys(picture[[anchor, *near]].tolist())
        for column, index in zip(range(8), shown):
            tiles[8 * anchor + column] = centres[[(0, index)]].crops[0] / 255
    tiles = F.interpolate(tiles, scale_factor=max(1, 64 // cfg.size))
    save = torchvision.utils.save_image
    write(path, lambda file: save(tiles, file, format="png", pad_value=1))


def place_in_class(labels):
    """For each entry: how many of its class stand before it."""
    seen, places = {}, []
    for label in labels.tolist():
        places.append(seen.get(label, 0))
        seen[label] = places[-1] + 1
    return torch.tensor(places)


def labelled_pictures(cfg, targets):
    """The pictures whose labels the probe may see: a share that is balanced over the classes."""
    classes, total = int(targets.max()) + 1, round(cfg.label_fraction * len(targets))
    if total < classes:
        asked = f"--label-fraction {cfg.label_fraction}"
        least = f"{classes / len(targets) + 5e-5:.4f}"
        raise CommandError(f"{asked}: fewer labels than classes; give {least} or more")

    # They are taken in turn, one of each class that has more.
    order = permutation(len(targets), "labels")
    labels = targets[order]
    turn = place_in_class(labels) * classes + permutation(classes, "labels")[labels]
    return order[turn.argsort()[:total]].sort().values


def split_labels(cfg, targets):
    """The pictures that heads are trained on, and a tenth of each class to choose a head by."""
    labelled = labelled_pictures(cfg, targets)
    labelled = labelled[permutation(len(labelled), cfg.seed, "holdout")]
    labels = targets[labelled]
    counts = labels.bincount()
    held = place_in_class(labels) < (counts // 10).clamp(min=1).minimum(counts - 1)[labels]
    return labelled[~held], labelled[held]


def live_stream(backbone, train, lists, cfg):
    """(features, labels) of each list, of random crops and flips."""
    for batch in loader(Views(train, cfg, views=1), lists, cfg.workers):
        with torch.no_grad(), autocast(cfg):
            x = backbone(augment(batch, cfg, color=False)).float()
        yield x, train.targets[batch.pictures].to(cfg.device)


RATES = [float(rate) for rate in "0.01 0.03 0.1 0.3 1 3 10 30 100".split()]


def linear_probe(backbone, cfg, train, val, checkpoint, asked, signals):
    """The linear probe and k-NN on a frozen backbone. Returns what probe.json holds, in percent.

    A linear head for each of RATES is trained (SGD, decay 1e-5, a tenth of the rate at 60 and at
    80 % of the epochs: the authors' probe) on stored features of centre crops, or for ImageNet on
    live crops and flips. The one that is best on a tenth of the labelled pictures, on which no head
    was trained, is run on val.
    """
    backbone.to(cfg.device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def stored(pictures, indices):
        centres = centre_batches(pictures, indices, cfg)
        x, used = features(backbone, centres, indices, cfg, signals)
        return x, pictures.targets[used].to(cfg.device)

    fit, hold = split_labels(cfg, train.targets)
    x_val, y_val = stored(val, torch.arange(len(val)))
    x_hold, y_hold = stored(train, hold if len(hold) else fit)
    x_fit, y_fit = stored(train, fit[:262144])              # what fits into the memory of a GPU

    torch.manual_seed(cfg.seed)
    classes = int(train.targets.max()) + 1
    heads = nn.ModuleList(nn.Linear(x_fit.shape[1], classes) for _ in RATES).to(cfg.device)
    groups = [dict(params=head.parameters()) for head in heads]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-5)
    parts = dict(heads=heads, optimizer=optimizer)
    step = load_checkpoint(checkpoint, parts, asked)

    is_live = cfg.data == "imagenet"
    rows = fit if is_live else torch.arange(len(x_fit))
    size = max(1, min(256, len(rows)) // RANKS) * RANKS
    per_epoch = len(rows) // size
    lists = batches(rows, size, cfg.seed, "probe", epochs=cfg.probe_epochs, start=step)
    stream = ((x_fit[i], y_fit[i]) for i in ([row for _, row in keys] for keys in lists))
    if is_live:
        stream = live_stream(backbone, train, lists, cfg)

    total = cfg.probe_epochs * per_epoch
    for x, y in tqdm(stream, "probe", total, initial=step, disable=RANK > 0, leave=False):
        epoch = step // per_epoch
        falls = sum(epoch >= max(1, cfg.probe_epochs * tenths // 10) for tenths in (6, 8))
        for group, rate in zip(optimizer.param_groups, RATES):
            group["lr"] = rate * 0.1 ** falls
        optimizer.zero_grad()
        loss = sum(F.cross_entropy(head(x), y) for head in heads)
        loss.backward()
        stop = loss.new_tensor(bool(signals))
        add_over_ranks([*(p.grad for p in heads.parameters()), stop], RANKS)
        optimizer.step()

        # Stored features are trained on in seconds: only a live probe is saved at each epoch.
        step += 1
        if stop or is_live and step % per_epoch == 0:
            save_checkpoint(checkpoint, parts, step=step, experiment=asked)
        if stop:
            raise Interrupted

    @torch.no_grad()
    def is_right(head, x, y):
        """Whether the truth is the k-th likeliest class: (n, k) bool, for the first five."""
        likeliest = head(x).topk(min(5, classes)).indices
        return likeliest == y[:, None]

    def percent(right):
        return 100 * right.double().mean().item()

    holdout = [percent(is_right(head, x_hold, y_hold)[:, 0]) for head in heads]
    best = holdout.index(max(holdout))
    right = is_right(heads[best], x_val, y_val)
    knn = nearest_neighbors(x_fit, y_fit, x_val, y_val)
    return dict(
        top1=percent(right[:, 0]), top5=percent(right.any(1)), knn=percent(knn), rate=RATES[best],
        holdout=dict(zip(map(str, RATES), holdout)), epochs=cfg.probe_epochs, train=len(rows),
        held_out=len(hold), val=len(y_val), knn_bank=len(y_fit),
        # Which pictures of val were right, a digit each.
        right="".join(map(str, right[:, 0].int().tolist())),
        knn_right="".join(map(str, knn.int().tolist())))


# === The command ==================================================================================

def load_backbone(path, cfg, remedy):
    """The backbone of a backbone.pt, or of another file with such a model, as torchvision's: in a
    "state_dict", behind a prefix, with a classifier, or, if a ViT, of another size."""
    backbone, _ = build_backbone(cfg.backbone, cfg.size, cfg.norm)
    mine = backbone.state_dict()
    first = next(iter(mine), "")

    def fill(file):
        state = read_tensors(file)
        state = state.get("state_dict", state)
        # The prefix, as "module.encoder.", is one with which all of mine are there.
        prefixes = [name.removesuffix(first) for name in state if name.endswith(first)]
        fits = [each for each in prefixes if all(each + name in state for name in mine)]
        prefix = min(fits, key=len, default="")
        for name in list(state):                            # in place: it keeps its _metadata
            value, inner = state.pop(name), name.removeprefix(prefix)
            is_classifier = re.match(r"(fc|classifier|heads?)\.", inner) and inner not in mine
            if name.startswith(prefix) and not is_classifier:
                state[inner] = value
        if cfg.backbone.startswith("vit_"):
            state = interpolate_embeddings(cfg.size, backbone.patch_size, state)
        backbone.load_state_dict(state)

    read(path, fill, remedy)
    return backbone


def take_folder(out, content):
    """Rank 0 makes the run's folder, or finds one of the same experiment. Returns its lock, which
    holds until it is closed or its owner dies."""
    config = out / "config.json"
    if config.exists():
        there = read(config, lambda file: dict(json.load(file)["experiment"]), "give another --out")
        differing = [
            f"{name} {there.get(name)} there, {value} here"
            for name, value in content["experiment"].items() if there.get(name) != value]
        if differing:
            differing = "; ".join(differing)
            other = f"holds another experiment ({differing})"
            raise UserError(f"--out {out}: {other}; give another --out")
    elif any((out / name).exists() for name in ("checkpoint.pt", "backbone.pt", "probe.json")):
        raise UserError(f"--out {out}: holds a run without its config.json; give another --out")

    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out}: cannot be written; give another --out")
    lock = open(out / "lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {out}: another run is at work there; give another --out") from None
    except OSError as error:
        announce(f"warning: {out}: no lock keeps other runs away ({error})")
    return lock


def evaluate(backbone, cfg, train, val, out, experiment, signals):
    """The results of the probe, which are in probe.json."""
    weights = digest(*(x.cpu().numpy().tobytes() for x in backbone.state_dict().values()))
    asked = experiment | dict(
        probe_epochs=cfg.probe_epochs, label_fraction=cfg.label_fraction, weights=weights)
    path = out / "probe.json"
    found = on_first_rank(lambda: read_json(path, "delete it") if path.exists() else {})
    if found.get("asked") == asked:
        announce(f"the probe was finished before; delete {path} to repeat")
        return found
    found = linear_probe(backbone, cfg, train, val, out / "probe.pt", asked, signals)
    found["asked"] = asked
    write_json(path, found)
    return found


def run(cfg, argv, signals):
    """From pictures to results, in a folder. What is there already is not done again."""

    # Whatever is wrong with the command shows before the folder is made.
    model, backbone = None, None
    if cfg.probe:
        fitting = f"give a file of --backbone {cfg.backbone} at --size {cfg.size}"
        backbone = load_backbone(cfg.probe, cfg, fitting)
    else:
        model = build_model(cfg)
    train, val = load_data(cfg)
    labelled = train.targets is not None and val is not None
    if labelled:
        labelled_pictures(cfg, train.targets)
    elif cfg.probe:
        raise CommandError(f"--root {cfg.root}: holds no train/ and val/ with labels; give another")
    needed = cfg.batch_size * cfg.accumulate if cfg.epochs and model else 2
    if len(train) < needed:
        fewer = max(1, len(train) // RANKS) * RANKS
        raise CommandError(
            f"{len(train)} pictures are less than the {needed} of a step; "
            f"give --accumulate 1 --batch-size {fewer}, or more pictures")

    # What the folder is of, as config.json will hold it.
    experiment = {field.name: getattr(cfg, field.name) for field in fields(Experiment)}
    experiment |= dict(probe=cfg.probe, pictures=[each and each.digest() for each in (train, val)])
    experiment = json.loads(json.dumps(experiment))
    about = "probe" if cfg.probe else f"{cfg.method}-{cfg.loss}"
    out = Path(cfg.out or f"runs/{cfg.data}-{about}-s{cfg.seed}")
    common = vars(cfg) | dict(root=None, workers=None, pictures=experiment["pictures"])
    agree(common, "data or options")
    versions = dict(
        python=sys.version, torch=torch.__version__, torchvision=torchvision.__version__)
    content = dict(
        config=vars(cfg), experiment=experiment, command=["hex.py", *argv], versions=versions,
        code=digest(Path(__file__).read_bytes()), ranks=RANKS, threads=torch.get_num_threads())

    with contextlib.ExitStack() as stack:
        on_first_rank(lambda: stack.enter_context(take_folder(out, content)) and None)
        if on_first_rank(lambda: not (out / "config.json").exists()):
            write_json(out / "config.json", content)
        counts = f"{len(train)} train, {len(val or ())} val pictures"
        no = "" if labelled else " without labels or val/: no probe or k-NN"
        announce(f"{out}: {counts}{no}; {RANKS} ranks; {cfg}")
        if cfg.device == "cuda" and cfg.accumulate % RANKS:
            announce(f"each loss is shared, and SyncBatchNorm waits: --accumulate {RANKS} avoids it")

        # Train, or take what is there. Who needs room may delete the checkpoint in the end.
        final, checkpoint = out / "backbone.pt", out / "checkpoint.pt"
        if model and on_first_rank(lambda: final.exists() and not checkpoint.exists()):
            backbone = load_backbone(final, cfg, "delete it")
        elif model:
            pretrain(model, cfg, train, val, out, experiment, signals)
            backbone = model.method.backbone.to("cpu", memory_format=torch.contiguous_format)
            write(final, lambda file: torch.save(backbone.state_dict(), file))
        result = ", ".join(sorted(os.listdir(out)))
        if labelled:
            found = evaluate(backbone, cfg, train, val, out, experiment, signals)
            names = dict(top1="top-1", top5="top-5", knn="k-NN")
            result = ", ".join(f"{word} {found[key]:.2f} %" for key, word in names.items())
            result += f" of {found['val']} val pictures"

        # Two lines: the result, and what has emerged from the first epoch to the last.
        if RANK == 0:
            print(f"{one_line(out)}: {result}")
            log = read_log(out / "metrics.jsonl")
            epochs = [event for event in log if event.pop("event") == "epoch"]
            for figures in epochs[:1] + epochs[-1:]:
                print(", ".join(f"{k} {v:.3g}" for k, v in figures.items() if v is not None))


def set_up(cfg):
    """Chooses the kernels, before CUDA starts."""
    torch.backends.cudnn.benchmark = not cfg.deterministic  # the sizes of a run are fixed
    torch.use_deterministic_algorithms(cfg.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if cfg.deterministic:                                   # NVLink SHARP's sums do not repeat
        os.environ |= dict(CUBLAS_WORKSPACE_CONFIG=":4096:8", NCCL_NVLS_ENABLE="0")


def join_ranks(cfg):
    """The process group that torchrun has prepared. It waits for a slow download, too."""
    backend, device = "gloo", None
    hours = datetime.timedelta(hours=6)
    try:
        if cfg.device == "cuda":
            backend, device = "nccl", torch.device("cuda", environment("LOCAL_RANK", 0))
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=hours, device_id=device)
    except Exception as error:
        raise UserError(f"the ranks cannot meet ({error}); start them by torchrun") from error


TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"}
# What these say of a machine is enough. Any other error is a fault of ours, and is shown whole.
KNOWN = (
    "memory|DataLoader worker|closed by peer|reset by peer|ompiler|open files|ancdata|"
    "deterministic implementation")


def main(argv=None):
    """The command line. Returns the exit status: 0, 1 for what it met, 2 for a wrong command, 75
    for a run that was interrupted."""
    in_process = argv is not None
    argv = list(argv) if in_process else sys.argv[1:]
    missing = [name for name in sorted(TORCHRUN) if environment(name, None) is None]
    joins = RANKS > 1 and not dist.is_initialized()
    status = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(Quiet(sys.stdout)))
        stack.enter_context(contextlib.redirect_stderr(Quiet(sys.stderr)))
        signals = stack.enter_context(signals_counted(in_process))
        try:
            if missing and os.environ.keys() & TORCHRUN:
                names = ", ".join(missing)
                raise CommandError(f"{names}: is no number; use torchrun, or unset its variables")
            cfg = parse(argv)
            set_up(cfg)
            if joins:
                join_ranks(cfg)
            run(cfg, argv, signals)
        except Exception as error:
            if signals and not isinstance(error, UserError):
                error = Interrupted()                       # it has hit a loader or a rank, too
            status = getattr(error, "status", 1)
            # A loader's error comes with a traceback.
            line = str(error).rpartition("UserError: ")[2]
            if not isinstance(error, UserError) and line == str(error):
                line = f"{type(error).__name__}: {error}".split("\n")[0]
                if not isinstance(error, (OSError, MemoryError)) and not re.search(KNOWN, line):
                    traceback.print_exc()
            if RANK == 0 or missing or not getattr(error, "is_common", False):
                kind = "" if status == Interrupted.status else "error: "
                print(f"hex.py: {kind}{one_line(line)}", file=sys.stderr, flush=True)
    if joins and status == 0:
        dist.destroy_process_group()                        # after an error it would wait for peers
    return status


if __name__ == "__main__":
    os._exit(main())                # at once: a signal while Python ends would change the status
