# SPDX-License-Identifier: MIT
"""HEX: Hierarchical Emergence Exploitation in Self-Supervised Algorithms, in one file.

The paper is by Kokilepersaud, Kim, Prabhushankar and AlRegib (WACV 2025, arXiv 2410.23200). This
is not the authors' code. It is a reconstruction, as the full text of the paper was not available.

InfoNCE pulls the two views of an image together, and pushes all other images of the batch away by
one rule. But training makes some of them look like the anchor, and they often share its meaning.
HEX therefore splits the other images, the anchor's negatives, at a threshold eps on similarity:

    G(i) has the global negatives, with s_ij <= eps. They are treated as in InfoNCE.
    H(i) has the local negatives (the neighbors), with s_ij > eps. They have weights Q: the nearest
    are pushed harder than by InfoNCE, and the others less hard.

For N images with two views each there are 2N normalized embeddings z. Below, i and j run over
these 2N embeddings, p is the other view of the image of i, s_ij = z_i . z_j is the cosine
similarity, and tau is the temperature. The loss is the mean of loss_i over all i:

    eps      = mean over i of the q-quantile of s_ij over all negatives j of i         (q = 0.99)
    loss_i   = log(positive + global + max(local, floor)) - s_ip/tau
    positive = e^{s_ip/tau}
    global   = sum over G(i) of e^{s_ij/tau}
    local    = (sum over H(i) of Q_ij e^{s_ij/tau} - tau_plus |H(i)| e^{s_ip/tau}) / (1 - tau_plus)
    floor    = |H(i)| e^{-1/tau}, the least that |H(i)| negatives can add up to
    Q_ij     = e^{beta s_ij/tau} / mean over h in H(i) of e^{beta s_ih/tau}            (beta = 1)

The subtraction in `local` assumes that a share tau_plus of the neighbors has the anchor's own
class (debiasing). No gradient passes through eps, H, Q or the floor. Limiting cases: with
beta = tau_plus = 0, or where H(i) is empty, loss_i is that of InfoNCE. Where the floor is reached,
the neighbors get no gradient. With N = 256 and q = 0.99, |H(i)| is about 5 of 510 negatives.

How each part is known:

    From the paper's abstract and its overview figure: the split; a local term that is weighted; a
    threshold that falls in training. (The adaptive one follows the similarities, wherever they go.)
    From the authors' code alone: the mean of quantiles, the fixed schedules, the warm-up, beta,
    tau_plus, the floor, the recipes.
    Inferred here: that Q is the weighting of Robinson et al. (ICLR 2021), that |H(i)| takes the
    place of their number of negatives, that the quantile runs over the negatives alone, and that
    the positive is part of the sum (--decoupled leaves it out).

The authors' public code does not train on its local term: there it is a constant outside of the
logarithm. The function `released` reproduces that. The formula above is what we believe is meant.

HEX can be added to any self-supervised method that gives pairs of embeddings (a, b):
    loss = (1 - alpha) own + alpha scale (mean over the pairs of the loss above)

    python hex.py                                                   minutes on a CPU
    python hex.py --data cifar10 --root DIR --recipe small          one GPU, or minutes on a CPU
    torchrun --nproc-per-node 8 hex.py --data imagenet --root DIR   paper scale
    python hex.py --data folder --root DIR --recipe small           your own unlabeled pictures

It needs Linux and Python 3.11 or later. Its sections, of which each mostly uses those before it:
the loss, its variants, many processes, methods, settings, backbones, data and views, optimizer,
training, evaluation, the command.
"""
import argparse
import copy
import fcntl
import hashlib
import inspect
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import cache, partial
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision import models
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

# === The loss =====================================================================================
# This section needs only math, dataclasses and torch, and can be copied into another project. Its
# functions are pure. They get all images that share a loss, and use no other process and no file.

def require(condition, message):
    """Raises a ValueError with the message if the condition is not true."""
    if not condition:
        raise ValueError(message)


def similarities(a, b, temperature):
    """Compares the views of N images with each other. a, b: (N, D), row i is a view of image i.

    Returns s (2N, 2N), the cosines of all views, in the order of cat([a, b]); s_p (2N,), the cosine
    of each view and the other view of its image; and negative (2N, 2N), bool, true where two views
    are of different images. temperature is only checked.
    ValueError: shapes that differ, N < 2, a temperature that is not above 0 and finite.
    """
    require(
        a.ndim == 2 and a.shape == b.shape,
        f"a and b must be row-aligned (N, D), not {tuple(a.shape)} and {tuple(b.shape)}")
    N = len(a)
    require(N > 1, f"N = {N}: a contrastive loss needs 2 images, or there are no negatives")
    require(0 < temperature < math.inf, f"temperature = {temperature} must be above 0, and finite")

    # Scale the embeddings to length 1, in float32 or better. One that is shorter than 1e-12 stays
    # as it is. If a length overflows to infinity, z / length would be 0, and the loss would look
    # sound: adding 0 * length makes it NaN instead.
    z = torch.cat([a, b])
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    length = z.norm(dim=1, keepdim=True)
    length = length.masked_fill(length < 1e-12, 1)
    z = z / (length + 0 * length)

    with torch.autocast(z.device.type, enabled=False):
        s = z @ z.T
    s_p = (z * z.roll(N, 0)).sum(1)
    image = torch.arange(N, device=z.device).repeat(2)
    return s, s_p, image[:, None] != image


def hex_nce(a, b, temperature=0.1, *, threshold=None, beta=1.0, tau_plus=0.1,
            decoupled=False, epoch=0):
    """The HEX loss of N images. a, b: (N, D), the embeddings of their two views. Row i of each is
    of image i. They need not be normalized.

    temperature: tau, above 0. threshold: an AdaptiveThreshold (the default), StepThreshold,
    CosineThreshold or OracleHierarchy, or a number: a negative is local if its cosine is above it.
    beta: from 0 to 1e6. tau_plus: at least 0 and below 1. decoupled: leave the positive out of the
    sum. epoch: from 0, for thresholds that follow a schedule.
    Returns the mean loss (a scalar, in float32 or better) and its statistics (see statistics_of).
    ValueError: an argument outside its range, a threshold that is neither a finite number nor a
    function, N < 2, shapes that differ.
    """
    require(0 <= beta <= 1e6, f"beta = {beta} must be in [0, 1e6]")
    require(0 <= tau_plus < 1, f"tau_plus = {tau_plus} must be in [0, 1)")
    tau = temperature
    s, s_p, negative = similarities(a, b, tau)

    # Which negatives are local?
    eps, H = split(s, negative, threshold, epoch)
    size = H.sum(1).to(s.dtype)                             # |H(i)|

    # e^{s/tau} may overflow. So a sum of such terms is kept as a pair: the sum of e^{x - top}, and
    # its largest exponent, top.
    x, x_p, least = s / tau, s_p / tau, -1 / tau
    del s                                                   # the matrix is large

    def exp(x, top):
        # x - top may exceed 60 in two cases. In a row that is at its floor, or has an empty H, the
        # floor is taken in place of the local term. If tau_plus is 0, the result is multiplied by
        # 0. The limit is needed in both, as 0 times infinity would be NaN.
        return (x - top).clamp(max=60).exp()

    # Here `local` is the formula's local term divided by |H(i)|, in units of e^top_near: a weighted
    # mean over H(i), less the share tau_plus of the positive. The formula's Q is this Q times a
    # constant for each row, which cancels, as the weighted mean divides by the sum of Q. The
    # largest Q of a row is 1, so that the sum is at least 1, or 0 if H(i) is empty.
    near, top_near = exponentials(x, H, least)
    Q = (near.detach() ** beta).masked_fill_(~H, 0)
    local = (Q * near).sum(1) / Q.sum(1).clamp(min=1)
    local = (local - tau_plus * exp(x_p, top_near)) / (1 - tau_plus)
    clamped = local.detach() < exp(least, top_near)

    # The other negatives are global. From here on, all is in units of e^top, where top is the
    # largest exponent of the whole sum. In a row that is at its floor, H(i) adds |H(i)| e^least, so
    # that its exponent is `least` instead of top_near.
    far, top_far = exponentials(x, negative & ~H, least)
    top = torch.maximum(top_far, top_near.masked_fill(clamped, least))
    if not decoupled:
        top = torch.maximum(top, x_p.detach())

    # The whole sum: global + |H| max(local, floor) + positive.
    total = far.sum(1) * exp(top_far, top)
    total = total + size * torch.maximum(local * exp(top_near, top), exp(least, top))
    if not decoupled:
        total = total + exp(x_p, top)
    return (total.log() + top - x_p).mean(), statistics_of(eps, size, clamped)


def exponentials(x, mask, least):
    """Returns e^{x - top} (2N, 2N), and top (2N,): the largest x of a row where the mask is true,
    or `least`, a lower bound of x, if it is true nowhere.

    Where the mask is false, the result is at most e^{-40}, which is too small to change a sum. An
    exact 0 would take longer, as e^{-infinity} is slow on a CPU.
    """
    e = x.where(mask, least - 40)
    top = e.detach().amax(1).clamp(min=least)
    return e.sub_(top[:, None]).exp_(), top


def statistics_of(eps, size, clamped):
    """The statistics of a loss, for the log. size: |H|, (2N,). clamped: (2N,), bool.

    Returns detached scalars. threshold: eps. local: the mean |H|. empty: the share of anchors whose
    H is empty. clamped: of the other anchors, the share whose local term is at its floor.
    """
    some = size.sign()                                      # 1 where H is not empty, else 0
    return dict(
        threshold=eps, local=size.mean(), empty=1 - some.mean(),
        clamped=(some * clamped).sum() / some.sum().clamp(min=1))


@torch.no_grad
def split(s, negative, threshold, epoch, count_all=False):
    """Returns eps (a scalar, for the log), and H (2N, 2N), bool: the negatives that the threshold
    calls local. s, negative: (2N, 2N), from `similarities`. threshold, epoch: as in hex_nce.

    count_all: eps is a quantile of all similarities, not of those with negatives alone.
    ValueError: the threshold is neither a finite number nor a function (see AdaptiveThreshold).
    """
    if threshold is None:
        threshold = AdaptiveThreshold()
    if callable(threshold):
        eps, above = threshold(s, None if count_all else negative, epoch)
    else:
        is_number = isinstance(threshold, int | float) and math.isfinite(threshold)
        require(is_number, f"threshold = {threshold!r} is neither a finite number nor a function")
        eps, above = threshold, s > threshold
    return s.new_zeros(()) + eps, negative & above          # eps may be a float: make it a tensor


@dataclass
class AdaptiveThreshold:
    """A negative is local if its similarity is above eps, which is the mean over all views of the
    quantile of a view's similarities.

    quantile: q, between 0 and 1. It is not interpolated: of k sorted entries, it is the one at
    round(q (k - 1)), counted from 0. ValueError: q is not between 0 and 1.
    """
    quantile: float = 0.99

    def __post_init__(self):
        require(0 < self.quantile < 1, f"quantile = {self.quantile} must lie between 0 and 1")

    def __call__(self, s, counted, epoch):
        """s: (2N, 2N). counted: the entries that the quantile runs over, which are the negatives,
        or None for all. Returns eps, and where s is above it."""
        k = len(s)
        if counted is not None:
            k -= 2                                          # without the view and its positive
            s = s.where(counted, -2)                        # below all cosines: they come last
        from_top = k - round(self.quantile * (k - 1))       # 1 means the largest
        eps = s.topk(from_top).values[:, -1].mean()
        return eps, s > eps


def local_mask(a, b, threshold=None, epoch=0):
    """Returns eps (a scalar) and H (2N, 2N), bool, of the embeddings a, b: (N, D). Arguments and
    ValueErrors are those of hex_nce. No gradient passes."""
    s, _, negative = similarities(a, b, 1)                  # they do not depend on a temperature
    return split(s, negative, threshold, epoch)


# === Variants of the loss =========================================================================
# These functions are pure, too. a, b, temperature, threshold and epoch are those of hex_nce, and so
# are the ValueErrors.

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
    """What the authors' public code computes: DCL over the global negatives, plus a constant.

    Its local term is always at its floor, for all 2N - 2 negatives, and outside of the logarithm.
    So it carries no gradient. Its quantile counts the anchor itself and its positive, too. Returns
    a scalar and statistics, as hex_nce. Of them, `clamped` is 1 where there is an H.
    """
    s, s_p, negative = similarities(a, b, temperature)
    eps, H = split(s, negative, threshold, epoch, count_all=True)
    G = negative & ~H
    size = H.sum(1).to(s.dtype)

    # In a row without global negatives, the sum is taken as 1, whose logarithm is 0.
    log_sum = (s / temperature).where(G, -math.inf).logsumexp(1).where(G.any(1), 0)

    return (
        (log_sum - s_p / temperature).mean() + (len(s) - 2) * math.e ** (-1 / temperature),
        statistics_of(eps, size, size > 0))


class Schedule:
    """A threshold that depends on the epoch alone (the authors' code).

    Each row of similarities is rescaled, so that its smallest entry is 0, and the anchor itself 1.
    Negatives are local if they are above self.at(epoch) on this scale. So the eps in the log is not
    a cosine here, unlike a threshold that is a number.
    """

    def __call__(self, s, counted, epoch):
        eps = self.at(epoch)
        low, high = s.aminmax(dim=1, keepdim=True)
        return eps, s > torch.lerp(low, high, eps)


@dataclass
class StepThreshold(Schedule):
    """Starts at `start`, and falls by `drop` every `every` epochs (at least 1), but not below 0."""
    start: float = 0.9
    drop: float = 0.1
    every: int = 10

    def at(self, epoch):
        return max(0.0, self.start - self.drop * (epoch // self.every))


@dataclass
class CosineThreshold(Schedule):
    """Falls from `start` to `end` over `epochs` epochs (at least 1), along half a cosine."""
    start: float = 0.9
    end: float = 0.3
    epochs: int = 100

    def at(self, epoch):
        return self.end + (self.start - self.end) * half_cosine(min(1, epoch / self.epochs))


def half_cosine(done):
    """Returns a float that falls from 1 to 0 along half a cosine as `done` rises from 0 to 1."""
    return (1 + math.cos(math.pi * done)) / 2


@dataclass
class OracleHierarchy:
    """Negatives are local if they have the anchor's super-class. There is no eps: it is NaN.

    It reads labels, so that training with it is NOT self-supervised. It is a diagnostic. labels:
    (N,), of the images that share the loss, in their order, on the device of the embeddings.
    """
    labels: torch.Tensor

    def __call__(self, s, counted, epoch):
        label = self.labels.repeat(2)
        return math.nan, label[:, None] == label


# === Many processes ===============================================================================
# The functions through which the ranks talk to each other. All of them work in one process, too.

def environment(name, default):
    """A number that torchrun or Slurm has set, or the default."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


RANK = environment("RANK", 0)                               # the number of this process
RANKS = environment("WORLD_SIZE", 1)                        # how many there are


def gather(x):
    """The rows of all ranks, in their order: (M, ...) on each rank gives (ranks M, ...).

    Only this rank's own rows carry a gradient. So where every rank computes the same loss of all
    rows, the sum over the ranks of their gradients is the gradient of that loss. (A wrapper that
    takes the mean instead, such as DistributedDataParallel, needs the loss times the ranks.)
    All ranks must call it with contiguous tensors of the same shape and dtype. ValueError: the
    shapes differ. To save time, a rank takes part in this check only when a shape is new to it. If
    the shape is new to some ranks and known to others, they hang or fail without this error.
    """
    if not dist.is_initialized():
        return x
    check_shape(x.shape)
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x.detach())
    rows[dist.get_rank()] = x
    return torch.cat(rows)


def everywhere(content):
    """Returns a list of what each rank has given, in the order of the ranks."""
    contents = [content]
    if dist.is_initialized():
        contents *= dist.get_world_size()
        dist.all_gather_object(contents, content)
    return contents


@cache                                                      # each shape is checked once
def check_shape(shape):
    shapes = everywhere(shape)
    require(len({*shapes}) == 1, f"the ranks have rows of different shapes: {shapes}")


def add_over_ranks(tensors, divide_by=1):
    """Replaces each tensor by its sum over the ranks, divided by a number, with one all_reduce."""
    if RANKS > 1 and tensors:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(total.view_as(x) / divide_by)


def agree(content, what):
    """Waits for all ranks. CommandError, on all ranks: they have not given the same content."""
    contents = everywhere(content)
    if contents != [content] * len(contents):
        raise CommandError(f"the ranks see different {what}: give all the same")


def on_first_rank(task):
    """Rank 0 does the task. All ranks wait for it, and return its result. If it fails, rank 0
    raises its error, and the others raise a CommandError, about which they stay silent (see
    main)."""
    outcome = None
    if RANK == 0:
        try:
            outcome = task()
        except Exception as error:
            outcome = error
    first = everywhere(outcome)[0]
    if isinstance(first, Exception):
        raise outcome or CommandError("rank 0 has met an error")
    return first


# === Methods and the wrapper ======================================================================
# Apart from BatchNorm's statistics, a method changes its state in after_step alone. Its loss is a
# pure function of the embeddings of all N images.

class Method(nn.Module):
    """The base of all methods: a backbone and a projector, and where a method has them a predictor
    and a target.

    A method has these class attributes: `settings`, its hyperparameters with the values of its
    paper, which the constructor can override; projector_layers and predictor_layers, the layers of
    its heads (see mlp); and alpha, and scale if there is one, the weights of HEX (see HEX).
    It has forward, which is the heavy part, and loss(*embeddings), which returns its own loss (a
    scalar) and the pairs [(a, b), ...] of embeddings (N, dim) that HEX can work on.
    backbone: (B, 3, S, S) -> (B, width). norm: a function of a width and of affine=True or False
    that returns a layer (B, width) -> (B, width), such as nn.BatchNorm1d.
    With the setting ema there is a target, a copy of backbone and projector that follows them, and
    whose momentum rises from ema to 1. Its BatchNorm statistics are its own. With the setting queue
    there is a queue of that many embeddings. ValueError: a setting that the method does not have.
    """
    alpha = 0.1
    predictor_layers = ""

    def __init__(self, backbone, width, *, norm=nn.BatchNorm1d, **settings):
        super().__init__()
        require(settings.keys() <= self.settings.keys(), f"{settings}: not all of {self.settings}")
        self.settings = settings = self.settings | settings
        self.backbone = backbone
        self.projector = mlp(self.projector_layers, width, norm, settings)
        self.predictor = mlp(self.predictor_layers, settings["dim"], norm, settings)
        if "ema" in settings:
            self.target = copy.deepcopy(
                nn.Sequential(backbone, self.projector)).requires_grad_(False)
        if "queue" in settings:
            queue = torch.randn(settings["queue"], settings["dim"])
            self.register_buffer("queue", F.normalize(queue))

    def forward(self, x1, x2):
        """Two views (N, 3, S, S) -> the tuple [p1, p2,] z1, z2 [, t1, t2], each (N, dim).

        z1, z2: the projections. p1, p2: the predictions, if there is a predictor. t1, t2: the
        projections of the target, if there is one. They carry no gradient.
        """
        # Both views go through in one pass, so that they are one BatchNorm batch.
        x = torch.cat([x1, x2])
        z = self.projector(self.backbone(x))
        outputs = [z]
        if self.predictor_layers:
            outputs = [self.predictor(z), z]
        if "ema" in self.settings:
            outputs += [self.target(x)]
        return tuple(half for output in outputs for half in output.chunk(2))

    @torch.no_grad
    def after_step(self, done, outputs):
        """To be called after each optimizer step. done: the share of the run, from 0 to 1.
        outputs: what forward returned for each loss of the step, detached. Where it matters, as for
        a queue, they have the rows of all ranks."""
        if "ema" in self.settings:
            share = (1 - self.settings["ema"]) * half_cosine(done)
            # Both begin with the backbone and the projector, and zip ends with the target's.
            for old, new in zip(self.target.parameters(), self.parameters()):
                old.lerp_(new, share)


def mlp(layers, fan_in, norm, widths):
    """A head (B, fan_in) -> (B, widths[last word]), with a ReLU between its layers. layers: for
    example "hidden+norm dim". Each word is a Linear, whose output width is widths[word]. "+norm"
    puts a norm behind it, "+plain_norm" a norm without weights. A Linear before a norm has no bias.
    widths: a dict. norm: as in Method."""
    modules = []                                            # ends with a ReLU, which is cut off
    for layer in layers.split():
        name, _, kind = layer.partition("+")
        fan_out = widths[name]
        modules += [nn.Linear(fan_in, fan_out, bias=not kind)]
        if kind:
            modules += [norm(fan_out, affine=kind == "norm")]
        modules += [nn.ReLU()]
        fan_in = fan_out
    return nn.Sequential(*modules[:-1])


def one_way_nce(pairs, temperature):
    """InfoNCE from a to b, summed over the pairs (a, b). The positive of a_i is b_i, and its
    negatives are the other b_j, but no a_j. a, b: (N, dim). Returns a scalar."""
    total = 0
    for a, b in pairs:
        logits = F.normalize(a) @ F.normalize(b).T / temperature
        total += (logits.logsumexp(1) - logits.diagonal()).mean()
    return total


def cosine(p, t):
    """The mean cosine of the predictions p and the targets t, (N, dim). t gets no gradient."""
    return F.cosine_similarity(p, t.detach()).mean()


class SimCLR(Method):
    """Chen et al. 2020. The projector is that of HEX's authors, which has no BatchNorm."""
    alpha = 1.0
    settings = dict(hidden=2048, dim=128, temperature=0.1)
    projector_layers = "hidden dim"

    def loss(self, z1, z2):
        return info_nce(z1, z2, self.settings["temperature"]), [(z1, z2)]


class NNCLR(Method):
    """Dwibedi et al. 2021. In place of an anchor stands its nearest neighbor in a queue of earlier
    embeddings."""
    alpha = 1.0
    settings = dict(hidden=2048, dim=256, predictor=4096, queue=98304, temperature=0.1)
    projector_layers = "hidden+norm hidden+norm dim+norm"
    predictor_layers = "predictor+norm dim"

    def nearest(self, z):
        """The entry of the queue that is most similar to each row of z, (N, dim) of any length."""
        return self.queue[(z @ self.queue.T).argmax(1)]

    def loss(self, p1, p2, z1, z2):
        pairs = [(self.nearest(z1), p2), (self.nearest(z2), p1)]
        return one_way_nce(pairs, self.settings["temperature"]) / 2, pairs

    @torch.no_grad
    def after_step(self, done, outputs):
        """The first views join the queue, and the oldest entries leave it."""
        newest = torch.cat([z1 for _, _, z1, _ in outputs]).to(self.queue)
        queue = torch.cat([self.queue, F.normalize(newest)])
        self.queue.copy_(queue[len(newest):])


class MoCoV3(Method):
    """Chen et al. 2021, whose own loss has the factor 2 tau. HEX, between predictions and targets,
    is our extension."""
    alpha = 1.0
    settings = dict(hidden=4096, dim=256, predictor=4096, ema=0.99, temperature=1.0)
    projector_layers = "hidden+norm dim+plain_norm"
    predictor_layers = "predictor+norm dim+plain_norm"

    def loss(self, q1, q2, z1, z2, k1, k2):
        tau, pairs = self.settings["temperature"], [(q1, k2), (q2, k1)]
        return 2 * tau * one_way_nce(pairs, tau), pairs


class BYOL(Method):
    """Grill et al. 2020. HEX, between the online projections, is our extension."""
    settings = dict(hidden=4096, dim=256, predictor=4096, ema=0.99)
    projector_layers = "hidden+norm dim"
    predictor_layers = "predictor+norm dim"

    def loss(self, p1, p2, z1, z2, t1, t2):
        return 4 - 2 * (cosine(p1, t2) + cosine(p2, t1)), [(z1, z2)]


class SimSiam(Method):
    """Chen and He 2021. HEX, between the projections, is our extension."""
    settings = dict(hidden=2048, dim=2048, predictor=512)
    projector_layers = "hidden+norm hidden+norm dim+plain_norm"
    predictor_layers = "predictor+norm dim"

    def loss(self, p1, p2, z1, z2):
        return -(cosine(p1, z2) + cosine(p2, z1)) / 2, [(z1, z2)]


class BarlowTwins(Method):
    """Zbontar et al. 2021. As in the code of HEX's authors, the whole loss is weighted by 0.1."""
    settings = dict(hidden=8192, dim=8192)
    projector_layers = "hidden+norm hidden+norm dim"

    def loss(self, z1, z2):
        a, b = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
        c = a.T @ b / len(a)                                # (dim, dim)
        on_diagonal = (c.diagonal() - 1).square().sum()
        off_diagonal = c.fill_diagonal_(0)
        return 0.1 * (on_diagonal + 0.0051 * off_diagonal.square().sum()), [(z1, z2)]


class VICReg(BarlowTwins):
    """Bardes et al. 2022, with the heads of Barlow Twins. The terms of both views are added up (the
    official code halves that of the variance). scale: as in the code of HEX's authors."""
    scale = 5.0

    def loss(self, z1, z2):
        own = 25 * F.mse_loss(z1, z2)
        for z in (z1, z2):
            std = (z.var(0) + 1e-4).sqrt()
            centered = z - z.mean(0)
            c = centered.T @ centered / (len(z) - 1)        # (dim, dim)
            off_diagonal = c.fill_diagonal_(0)
            own += 25 * F.relu(1 - std).mean() + off_diagonal.square().sum() / len(c)
        return own, [(z1, z2)]


METHODS = dict(
    simclr=SimCLR, nnclr=NNCLR, mocov3=MoCoV3, byol=BYOL, simsiam=SimSiam, barlow=BarlowTwins,
    vicreg=VICReg)
LOSSES = dict(base=None, infonce=info_nce, dcl=dcl, hex=hex_nce, released=released)


class HEX(nn.Module):
    """The wrapper: loss = (1 - alpha) own + alpha scale (mean over the pairs of LOSSES[loss]).

    method: a Method, or any module with its forward and loss. alpha and scale are by default the
    method's, or 0.1 and 1. The own loss is used alone if the loss is "base", and in the first
    `warmup` epochs. But if a warmup_threshold is given, these epochs have the whole loss, with that
    threshold. After the warm-up, the own loss is not used if alpha = 1. temperature: that of
    LOSSES[loss]; the method's own loss has another. threshold: as in hex_nce, for "hex" and
    "released". of_hex: beta, tau_plus and decoupled, which only "hex" uses. ValueError: an unknown
    loss, a forward that returns a bare tensor, a method that gives no pairs.
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

    def loss(self, *embeddings, epoch=0):
        """The embeddings of all N images, each (N, dim) -> the loss (a scalar) and statistics.

        It is computed in float32 or better, even under autocast. epoch: from 0, for the warm-up and
        scheduled thresholds. The statistics are a dict of detached scalars: "own", the method's own
        loss; those of hex_nce; and under the name of the loss, its mean over the pairs.
        """
        threshold, pair_loss = self.threshold, self.pair_loss
        if epoch < self.warmup:
            threshold = self.warmup_threshold
            if threshold is None:
                pair_loss = None                            # the own loss stands alone

        options = {}
        if self.name in ("hex", "released"):
            options = dict(threshold=threshold, epoch=epoch)
        if self.name == "hex":
            options |= self.of_hex

        with torch.autocast(embeddings[0].device.type, enabled=False):
            embeddings = [e.to(torch.promote_types(e.dtype, torch.float32)) for e in embeddings]
            loss, pairs = self.method.loss(*embeddings)
            stats = dict(own=loss.detach())
            if pair_loss:
                require(pairs, f"loss = {self.name!r} needs pairs (a, b); the method gave none")
                if self.alpha == 1:
                    loss = 0                                # not used; this frees its graph
                values = [pair_loss(a, b, self.temperature, **options) for a, b in pairs]
                more = [{}]
                if options:
                    values, more = zip(*values)
                mean = sum(values) / len(pairs)
                loss = (1 - self.alpha) * loss + self.alpha * self.scale * mean
                for key in more[0]:
                    stats[key] = sum(each[key] for each in more) / len(pairs)
                stats[self.name] = mean.detach()

        # This adds 0, for two reasons. DistributedDataParallel waits for the gradients of all
        # parameters, so that an embedding which has no part in the loss needs a gradient of 0. And
        # if a square overflows, 0 times infinity is NaN: the loss shows that this embedding is too
        # large for its length to be computed.
        for e in embeddings:
            loss = loss + 0 * e.square().sum()
        return loss, stats


# === Settings =====================================================================================
# Each field is an option: batch_size is --batch-size. The comment behind it is its help. Its type
# is a function that reads and checks the text, a list of such functions, one for each number, a
# string of choices, or bool for an option without a value. A default of None is replaced in
# `parse`, or means that nothing is given.
# ruff: noqa: F722

class UserError(Exception):
    """An error that the user can mend. Its text is one line, which says how."""
    status = 1                                              # the exit status


class CommandError(UserError):
    """The command itself is wrong. All ranks find that, and rank 0 says so."""
    status = 2


def within(low, high):
    """The type of a setting: a number from low to high, an integer if low is one."""
    def number(text):
        value = type(low)(text)
        if low <= value <= high:
            return value
        raise ValueError

    # argparse puts this name into its error: invalid int (give one from 0 to 9) value: 'ten'.
    number.__name__ = f"{type(low).__name__} (give one from {low} to {high})"
    return number


def path(text):
    """The type of a setting: a path, which becomes absolute."""
    if text:
        return os.path.abspath(text)
    raise argparse.ArgumentTypeError("is empty; leave it out")


Count, Positive = within(0, 2**31), within(1, 2**31)
Share, Weight, Rate = within(0.0, 1.0), within(0.0, 1e6), within(1e-9, 1e6)


# eq=False keeps these objects hashable, so that functions with @cache can take them.
@dataclass(eq=False)
class Experiment:
    """The settings that a result depends on. Together with the data they identify an experiment, of
    which a run's folder holds one."""
    data: "shapes cifar10 cifar100 imagenet folder" = "shapes"  # the data to train on
    method: " ".join(METHODS) = "simclr"  # the self-supervised method
    loss: " ".join(LOSSES) = "hex"  # the loss on the pairs; base: none, but the method's own alone
    seed: Count = 0  # seed of the weights, the order and the views
    probe: path = None  # do not train, but evaluate this backbone.pt

    # The loss.
    alpha: Share = None  # weight of the loss; the method's own has 1 - alpha
    temperature: Rate = 0.1  # tau of the loss, and of the method's own loss if it has one
    threshold: "adaptive step cosine oracle" = "adaptive"  # what decides on H; oracle reads LABELS
    quantile: within(1e-6, 1 - 1e-6) = 0.99  # q of the adaptive threshold
    drop: Share = 0.1  # what the step threshold falls by
    drop_every: Positive = None  # epochs between two falls of the step threshold
    beta: Weight = 1.0  # how much more the nearest weigh in Q; with 0 all weigh the same
    tau_plus: within(0.0, 1 - 1e-6) = 0.1  # assumed share of positives in H
    decoupled: bool = False  # HEX without the positive in the sum
    hex_warmup: Count = None  # number of first epochs with the method's own loss alone
    warmup_threshold: Share = None  # use HEX in these epochs, and this cosine as its eps

    # The network.
    backbone: str = None  # a torchvision classifier, resnet10_narrow, or pixels
    norm: "batch group" = "batch"  # normalization of backbone and heads
    hidden: Positive = None  # hidden width of the projector
    dim: Positive = None  # width of an embedding
    predictor: Positive = None  # hidden width of the predictor
    queue: Positive = None  # embeddings in NNCLR's queue
    ema: Share = None  # momentum of the target at the start

    # The views. Where an option has two numbers, they are for view 1 and for view 2.
    size: within(8, 4096) = 32  # side of a view in pixels
    crop_min: Share = 0.08  # least share of the picture in a view
    jitter: [Share] * 4 = None  # largest change of brightness, contrast, saturation and hue
    grayscale: Share = 0.2  # share of gray views
    blur: [Share] * 2 = None  # share of blurred views
    solarize: [Share] * 2 = None  # share of solarized views

    # The training.
    epochs: Count = None  # epochs of training; 0 evaluates a random backbone
    batch_size: within(2, 2**31) = 256  # images in one loss
    accumulate: Positive = 1  # losses in one step (adds no negatives)
    lr: Rate = 0.3  # base rate; the rate is lr * batch_size * accumulate / 256
    lr_warmup: Count = None  # epochs of linear rise
    weight_decay: Weight = 1e-4  # L2 decay, but not of biases and norms
    eta: Rate = 0.02  # trust coefficient of LARS
    clip: bool = True  # LARS lowers the rate of a layer, but never raises it
    amp: "off bf16 fp16" = None  # autocast; by default off on a CPU and fp16 on a GPU


@dataclass(eq=False)
class Config(Experiment):
    """All settings: those of an Experiment, and those of how it is run and evaluated."""
    recipe: "shapes small cifar imagenet" = None  # source of defaults; chosen by the data
    root: path = None  # folder with {train,val}/<class>/*, or any pictures, or CIFAR's archive
    out: path = None  # folder for results; by default runs/<data>-<method>-<loss>-s<seed>
    skip_bad_files: bool = False  # take the next file in place of an unreadable one, and say so
    probe_epochs: Positive = 100  # epochs of the linear probe
    label_fraction: Share = 1.0  # share of the train labels the probe sees, balanced over classes
    device: "cpu cuda" = None  # by default cuda if a GPU is visible
    workers: within(0, 256) = None  # loader processes for each rank
    compile: bool = False  # torch.compile the method, the augmentation and the loss
    deterministic: bool = False  # a run on a GPU can be repeated bit by bit; cost not known
    checkpoint_every: Positive = None  # steps between checkpoints, besides one after each epoch
    log_every: Positive = 10  # steps between lines of metrics.jsonl


# A recipe is some lines of options, for all methods or for one. If an option stands in two lines,
# the later one counts. The README names the sources.
RECIPES = """
shapes: --backbone resnet10_narrow --epochs 12 --batch-size 128 --lr 1.0 --no-clip --amp off
shapes: --hidden 256 --dim 64 --temperature 0.2
shapes: --crop-min 0.5 --jitter 0.8 0.8 0.8 0.2 --grayscale 1.0 --blur 0 0 --solarize 0 0
shapes nnclr: --predictor 256 --queue 2048
shapes mocov3: --predictor 256
shapes byol: --predictor 256 --lr 0.3 --ema 0.97
shapes simsiam: --predictor 256

small: --backbone resnet10_narrow --epochs 15 --lr 0.2 --no-clip --amp off
small: --hidden 512 --dim 128 --temperature 0.2
small: --crop-min 0.2 --jitter 0.8 0.8 0.8 0.2 --blur 0 0 --solarize 0 0
small nnclr: --predictor 512 --queue 4096
small mocov3: --predictor 512
small byol: --predictor 512 --lr 0.15 --ema 0.97
small simsiam: --predictor 512

cifar: --backbone resnet18 --epochs 400 --lr 0.4 --drop-every 100
cifar: --jitter 0.8 0.8 0.8 0.2 --blur 0.5 0.5 --solarize 0 0
cifar nnclr: --jitter 0.4 0.4 0.2 0.1 --blur 0 0 --solarize 0 0.2 --temperature 0.2
cifar nnclr: --lr 1.0 --weight-decay 1e-5 --queue 65536 --warmup-threshold 0.9 --drop 0
cifar mocov3: --jitter 0.4 0.4 0.2 0.1 --blur 0 0 --solarize 0 0.2 --temperature 0.2
cifar mocov3: --lr 0.3 --weight-decay 1e-6
cifar byol: --jitter 0.4 0.4 0.2 0.1 --blur 0 0 --solarize 0 0.2 --lr 1.0 --weight-decay 1e-5
cifar simsiam: --jitter 0.4 0.4 0.4 0.1 --blur 0 0
cifar barlow: --jitter 0.4 0.4 0.2 0.1 --blur 0 0 --solarize 0 0.2
cifar barlow: --lr 0.3 --hidden 2048 --dim 2048 --hex-warmup 0
cifar vicreg: --jitter 0.4 0.4 0.2 0.1 --blur 0 0 --solarize 0 0.2 --hidden 2048 --dim 2048

imagenet: --backbone resnet50 --size 224 --epochs 100 --weight-decay 1e-6 --drop-every 20
imagenet: --jitter 0.8 0.8 0.8 0.2 --blur 0.5 0.5 --solarize 0 0
imagenet simclr: --accumulate 16
imagenet nnclr: --jitter 0.4 0.4 0.2 0.1 --blur 1 0.1 --solarize 0 0.2
imagenet nnclr: --weight-decay 1e-5 --warmup-threshold 0.9 --drop-every 25
imagenet mocov3: --jitter 0.4 0.4 0.2 0.1 --blur 1 0.1 --solarize 0 0.2
imagenet mocov3: --temperature 1.0 --lr 0.6
imagenet byol: --jitter 0.4 0.4 0.2 0.1 --blur 1 0.1 --solarize 0 0.2 --lr 0.45
imagenet simsiam: --jitter 0.4 0.4 0.4 0.1 --lr 0.05 --weight-decay 1e-4
imagenet barlow: --jitter 0.4 0.4 0.2 0.1 --blur 1 0.1 --solarize 0 0.2
imagenet vicreg: --jitter 0.4 0.4 0.2 0.1 --blur 1 0.1 --solarize 0 0.2
"""


def flag(name):
    """The option of a setting: "--batch-size" of "batch_size"."""
    return "--" + name.replace("_", "-")


@cache                                                      # reading the source takes time
def make_parser():
    """The argparse parser of all options. What is not given does not appear in its result."""
    def fail(message):
        raise CommandError(message)

    parser = argparse.ArgumentParser("hex.py", "hex.py [options]", allow_abbrev=False)
    parser.error = fail
    source = inspect.getsource(Experiment) + inspect.getsource(Config)
    comments = dict(re.findall(r"(\w+): .*  # (.*)", source))
    for field in fields(Config):
        # With SUPPRESS, an option that is not given sets nothing. So parse_args(argv, cfg) changes
        # only those fields of cfg whose options stand in argv.
        how = dict(default=argparse.SUPPRESS, help=f"{comments[field.name]} [{field.default}]")
        if field.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif isinstance(field.type, str):
            how["choices"] = field.type.split()
        elif isinstance(field.type, list):
            how |= dict(type=field.type[0], nargs=len(field.type))
        else:
            how["type"] = field.type
        parser.add_argument(flag(field.name), **how)
    return parser


def parse(argv):
    """Returns the Config of a command line. CommandError: it is wrong.

    A setting can come from several places, of which the later overrides the earlier: the default of
    its field; the method's class, or what is computed below; the recipe; the recipe's lines for the
    method; the run whose backbone is probed; the command line.
    """
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    argv = [*options_of_run(given), *argv]

    # The command line gives the data and the method, and they choose the recipe's lines.
    cfg = Config(device="cuda" if torch.cuda.is_available() else "cpu")
    parser.parse_args(argv, cfg)
    by_data = dict(cifar10="cifar", cifar100="cifar", folder="imagenet")
    cfg.recipe = cfg.recipe or by_data.get(cfg.data, cfg.data)
    lines = re.findall(rf"\n{cfg.recipe}(?: {cfg.method})?: (.*)", RECIPES)
    argv = [*" ".join(lines).split(), *argv]
    parser.parse_args(argv, cfg)

    # Now the defaults that depend on the method, the epochs or the machine. In short runs, a
    # warm-up takes a tenth of the epochs. On a CPU, pictures in memory are cropped fastest by this
    # process.
    method = METHODS[cfg.method]
    tenth = math.ceil(cfg.epochs / 10)
    on_gpu = cfg.device == "cuda"
    cores = len(os.sched_getaffinity(0)) // max(1, environment("LOCAL_WORLD_SIZE", 1))
    vars(cfg).update(
        method.settings, alpha=method.alpha, drop_every=max(1, tenth),
        hex_warmup=min(10, round(cfg.epochs / 10)),
        lr_warmup=max(0, min(10, tenth, cfg.epochs - 1)),
        amp="fp16" if on_gpu else "off",
        workers=min(12, cores // 2) if on_gpu or has_files(cfg) else 0)
    parser.parse_args(argv, cfg)                            # what is given overrides them
    check(cfg, given)
    return cfg


def has_files(cfg):
    """Whether the pictures are read from files, and are not in memory."""
    return cfg.data in ("imagenet", "folder")


def options_of_run(given):
    """Returns options that describe the backbone of --probe, from the config.json beside it.

    given: a dict of the options of the command line. CommandError: it needs the file, and there is
    none.
    """
    needed = {"backbone", "norm", "size", "data"}
    if "probe" not in given or given.keys() >= needed:
        return []
    names = ["recipe", *needed]
    if "data" not in given:
        names.append("root")
    try:
        saved = json.loads(Path(given["probe"]).with_name("config.json").read_bytes())["config"]
        return [f"{flag(name)}={saved[name]}" for name in names if saved[name] is not None]
    except Exception as error:
        raise CommandError(
            f"--probe {given['probe']}: no config.json beside it says what it is ({error!r}); "
            "give --backbone, --size, --norm and --data") from error


# A line is: setting value|value: options. If the setting has one of these values, the options would
# have no effect, and are refused. The value /.* stands for any path.
IDLE = """
loss base: alpha hex_warmup
hex_warmup 0: warmup_threshold
loss base|infonce|dcl: threshold quantile drop drop_every warmup_threshold
loss base|infonce|dcl|released: beta tau_plus decoupled
threshold step|cosine|oracle: quantile
threshold adaptive|cosine|oracle: drop drop_every
method simclr|barlow|vicreg: predictor
method simclr|mocov3|byol|simsiam|barlow|vicreg: queue
method simclr|nnclr|simsiam|barlow|vicreg: ema
data shapes: root
data shapes|cifar10|cifar100: skip_bad_files
probe /.*: method loss alpha temperature threshold quantile drop drop_every beta tau_plus decoupled
probe /.*: hex_warmup warmup_threshold hidden dim predictor queue ema crop_min jitter grayscale
probe /.*: blur solarize epochs batch_size accumulate lr lr_warmup weight_decay eta clip
"""


def check(cfg, given):
    """Looks at a Config as a whole. given: a dict of the options of the command line. CommandError:
    an option would have no effect, or settings do not go together."""
    for setting, values, names in re.findall(r"(\w+) (.*): (.*)", IDLE):
        value = getattr(cfg, setting)
        for name in names.split():
            if name in given and re.fullmatch(values, str(value)):
                raise CommandError(
                    f"{flag(name)} {given[name]}: {flag(setting)} {value} ignores it; leave it out")

    ranks = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    wrong = {
        f"--root {cfg.root}: is no folder; --data {cfg.data} needs --root DIR":
            has_files(cfg) and not os.path.isdir(cfg.root or ""),
        f"--batch-size {cfg.batch_size}: give a multiple of {RANKS}, the ranks":
            cfg.accumulate % RANKS and cfg.batch_size % RANKS and not cfg.probe,
        f"--hex-warmup {cfg.hex_warmup}: leaves no epoch; give --hex-warmup {cfg.epochs - 1}":
            0 < cfg.epochs <= cfg.hex_warmup,
        f"--threshold oracle: {cfg.data} has no super-classes; give --data shapes or cifar100":
            cfg.threshold == "oracle" and cfg.data not in ("shapes", "cifar100"),
        "--device cuda: no GPU is visible; give --device cpu":
            cfg.device == "cuda" and not torch.cuda.is_available(),
        f"RANK and WORLD_SIZE are {ranks}: let torchrun set both, or unset both":
            any(ranks) and not all(map(str.isdecimal, ranks)),
        "srun has started more than one task: let it start torchrun, as the README says":
            environment("SLURM_STEP_NUM_TASKS", 1) > 1 and "RANK" not in os.environ,
    }
    for message, is_so in wrong.items():
        if is_so:
            raise CommandError(message)


# === Backbones ====================================================================================
# All but two of them are torchvision's. Their weights are drawn in build_model, from the seed.

def group_norm(channels, affine=True):
    """GroupNorm for (B, channels, ...). A group has 16 channels if 16 divides their number. If not,
    there are as many groups as divide it, and with fewer than 16 channels one."""
    groups = math.gcd(channels, channels // 16 or 1)
    return nn.GroupNorm(groups, channels, affine=affine)


def resnet10_narrow(norm_layer=nn.BatchNorm2d):
    """A ResNet-10 of 16 to 128 channels, for a CPU: (B, 3, S, S) -> (B, 1000).

    SiLU takes the place of ReLU. It has no kink, at which a rounding error would make the gradients
    of two ranks differ from those of one process.
    """
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), norm_layer(16), nn.SiLU())
    fan_in = 16
    for fan_out in (16, 32, 64, 128):
        stride = fan_out // fan_in
        skip = nn.Sequential(
            nn.Conv2d(fan_in, fan_out, 1, stride, bias=False),
            norm_layer(fan_out))
        block = models.resnet.BasicBlock(
            fan_in, fan_out, stride, skip, norm_layer=norm_layer)
        block.relu = nn.SiLU()
        model.append(block)
        fan_in = fan_out
    # As torchvision's models it ends in a classifier, which build_backbone removes.
    return model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1000)])


def build_backbone(name, size=224, norm="batch"):
    """A torchvision classifier or resnet10_narrow without its last Linear. Returns it (in training
    mode) and the width of its features: (B, 3, size, size) -> (B, width). norm: "batch", which is
    the model's own normalization, or "group". CommandError: it cannot be built.

    "pixels" has no weights: its features are the pixels, as a baseline for the probe.
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
            model = models.get_model(name, **options)
        linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        model.set_submodule(linears[-1], nn.Identity())

        # Small pictures would vanish in the stem of a ResNet: it becomes 3x3, without max-pool.
        if isinstance(model, models.ResNet) and size <= 64:
            model.maxpool = nn.Identity()
            model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out")

        _, width = model.eval()(torch.zeros(1, 3, size, size)).shape
    except Exception as error:
        raise CommandError(
            f"--backbone {name}, --size {size}, --norm {norm}: {error}; give resnet18") from error
    return model.train(), width


# === Data and views ===============================================================================
# All that is random in the views and their order is drawn here, by generators that are seeded with
# a key, such as (seed, epoch, index, view). Labels stay with the data: no view carries one. They
# are read by the probe, for the figures that are logged after each epoch, by the oracle, and by
# digest.

# The mean of each channel and its standard deviation. All other data take those of ImageNet.
MEAN_STD = dict(
    cifar10=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    cifar100=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    imagenet=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def rng_of(*key):
    """A random.Random whose numbers depend on the key alone. key: numbers and strings."""
    return random.Random(" ".join(map(str, key)))


def permutation(count, *key):
    """A random order of range(count), int64 (count,), that depends on count and the key alone."""
    generator = torch.Generator().manual_seed(rng_of(*key).getrandbits(63))
    return torch.randperm(count, generator=generator)


def digest(*parts):
    """The SHA-256, in hexadecimal, of bytes or contiguous arrays, one after the other."""
    return hashlib.sha256(b"".join(parts)).hexdigest()


@dataclass(eq=False)
class Pictures:
    """Pictures in memory, uint8 (n, 3, H, W), and their labels, int64 (n,), from 0. coarse: the
    labels of super-classes, int64 (n,), or None."""
    pictures: torch.Tensor
    targets: torch.Tensor
    coarse: torch.Tensor = None

    def __len__(self):
        return len(self.pictures)

    def read(self, index):
        return self.pictures[index]

    def digest(self):
        return digest(self.pictures.numpy(), self.targets.numpy())


class Folder:
    """The files in ROOT/<class>/**, or without labels in ROOT/** (see files_below). All of them are
    taken for pictures. Its digest is of their names, as reading a million files would take long."""
    coarse = targets = None
    classes = ()

    def __init__(self, root, skip=(), labeled=True):
        self.root = root
        files = list(files_below(root, skip, {os.path.realpath(root)}))
        if labeled:
            files = [file for file in files if "/" in file]
            classes, targets = numpy.unique(
                [file.partition("/")[0] for file in files], return_inverse=True)
            self.classes = classes.tolist()
            self.targets = torch.from_numpy(targets)
        # One buffer is sent to a loader process quickly, and a million strings would not be.
        self.files = numpy.array([*map(os.fsencode, files)], dtype=bytes)

    def __len__(self):
        return len(self.files)

    def read(self, index):
        """Returns the picture at an index, uint8 (3, H, W), turned upright. UserError: the file is
        no picture."""
        path = f"{self.root}/{os.fsdecode(self.files[index])}"
        try:
            require(os.path.isfile(path), "no regular file")
            with warnings.catch_warnings(action="ignore"):
                return decode(path)
        except Exception as error:
            raise UserError(
                f"{path}: not readable ({type(error).__name__}: {error}); "
                "mend it, or --skip-bad-files") from None

    def digest(self):
        return digest(f"({self.classes}, {self.files.dtype!r})".encode(), self.files)


def files_below(folder, skip, seen):
    """The paths of all files below a folder, except hidden ones: first its own files, then those of
    its folders.

    The folders in `skip` and folders of runs, which hold config.json and lock, are left out. So is
    a link to a folder that was visited before, since it may lead upward, and the walk would never
    end. skip, seen: sets of real paths.
    """
    entries = [entry for entry in os.scandir(folder) if entry.name[0] != "."]
    if {"config.json", "lock"} <= {entry.name for entry in entries}:
        return
    for entry in sorted(entries, key=lambda entry: (entry.is_dir(), entry.name)):
        if not entry.is_dir():
            yield entry.name
            continue
        real = os.path.realpath(entry)
        if real in skip or entry.is_symlink() and real in seen:
            continue
        seen.add(real)
        for name in files_below(entry, skip, seen):
            yield f"{entry.name}/{name}"


def decode(path):
    """Returns uint8 (3, H, W). JPEG is decoded by torchvision, which is twice as fast. All else is
    decoded by Pillow, since torchvision's PNG decoder crashes the process on a damaged file.
    ValueError: the range of the pixel values is not known."""
    picture = Image.open(path)                              # refuses what would fill the memory
    kind, mode = picture.format, picture.mode
    if kind in ("JPEG", "MPO"):
        return torchvision.io.decode_image(
            torch.from_numpy(numpy.fromfile(path, "u1")), "RGB", apply_exif_orientation=True)

    with suppress(Exception):                    # metadata may be broken
        picture = ImageOps.exif_transpose(picture)
    # Pillow would clip at 255 what has more than 8 bits. The full range is known for 16 bits only,
    # and for a PGM file, whose values Pillow scales to 16 bits, though it calls their mode "I".
    if "I;16" in mode or (kind == "PPM" and mode == "I"):
        gray = numpy.asarray(picture) // 257
        picture = Image.fromarray(numpy.uint8(gray))
    require(picture.mode not in ("I", "F"), f"mode {mode}: numbers of no known range")
    return TF.pil_to_tensor(picture.convert("RGB"))


def draw_shapes(count, seed):
    """Returns Pictures of 32x32 pixels. Each shows a polygon, star, flower or frame, which is its
    coarse label (0 to 3), with 3, 4 or 6 corners, which gives its fine label (0 to 11)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, channels=1, side=1):
        return low + (high - low) * torch.rand(count, channels, side, side, generator=generator)

    index = torch.arange(count)
    fine = index % 12
    coarse = fine // 3
    corners = torch.tensor([3.0, 4.0, 6.0])[fine % 3, None, None, None]

    # Polar coordinates around a random center, of random size and direction, at 64x64 pixels.
    axis = torch.linspace(-1, 1, 64)
    x = axis - uniform(-0.2, 0.2)                           # (count, 1, 1, 64)
    y = axis[:, None] - uniform(-0.2, 0.2)                  # (count, 1, 64, 1)
    radius = torch.hypot(x, y) / uniform(0.5, 0.8)
    angle = torch.atan2(y, x) + uniform(0, 2 * math.pi)

    # An outline gives the radius at each angle. phi is the angle to the nearest middle between two
    # corners: it is 0 there, and `half` at a corner. The star's radius is 0.4 where phi is 0, and 1
    # at a corner, and its edges are straight. The flower does not use phi.
    half = math.pi / corners
    phi = (angle % (2 * half) - half).abs()
    polygon = half.cos() / phi.cos()
    star = 0.4 * half.sin() / (0.4 * phi.sin() + (half - phi).sin())
    flower = 0.65 - 0.35 * (corners * angle).cos()
    frame = (radius < polygon) & (radius >= 0.6 * polygon)
    inside = torch.stack([radius < polygon, radius < star, radius < flower, frame])
    inside = F.avg_pool2d(inside[coarse, index].float(), 2)             # at 32x32, with soft edges

    # Dark on bright or bright on dark, in random colors. The ground has a gradient and noise.
    dark = uniform(0, 0.35, 3)
    bright = uniform(0.65, 1, 3)
    swap = uniform(0, 1) < 0.5
    ramp = uniform(-0.2, 0.2, 3) * axis[::2] + uniform(-0.05, 0.05, 3, 32)
    ground = dark.where(swap, bright) + ramp
    picture = torch.lerp(ground, bright.where(swap, dark), inside)
    return Pictures((255 * picture.clamp(0, 1)).byte(), fine, coarse)


def load_cifar(cfg):
    """Yields the Pictures of the train and the test split of CIFAR-10 or -100. Their files are in
    cfg.root or "data", to which they are downloaded if they are missing. UserError: this fails."""
    kind = getattr(torchvision.datasets, cfg.data.upper())
    root = cfg.root or "data"
    os.makedirs(root, exist_ok=True)
    folder = os.open(root, os.O_RDONLY)
    with suppress(OSError):                      # not every file system has locks
        fcntl.flock(folder, fcntl.LOCK_EX)                  # one process downloads, others wait
    try:
        splits = [kind(root, train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UserError(f"--data {cfg.data}: {error}; put {kind.filename} in {root}") from error
    finally:
        os.close(folder)

    # The super-class (Krizhevsky 2009) of each of CIFAR-100's classes, one of the letters a to t.
    superclass = torch.tensor([
        *b"eboiaghhsddojshldjhlglfkhgnpdpalbkmoqjlfftiipnorsk"
        b"qerecaresrkdcmmqmbjtckabqmjnpnqtcegtffitsbcpgarion"]) - ord("a")
    for split in splits:
        # split.data, (n, 32, 32, 3), is a transposed view of (n, 3, 32, 32). Here it is transposed
        # back, so that the tensor is contiguous, as `digest` needs it.
        pictures = torch.tensor(split.data.transpose(0, 3, 1, 2))
        targets = torch.tensor(split.targets)
        coarse = superclass[targets] if cfg.data == "cifar100" else None
        yield Pictures(pictures, targets, coarse)


def load_folder(cfg):
    """Returns the Folders ROOT/train and ROOT/val, which must have the same class folders. With
    --data folder, val/ may be missing, and is then None. If train/ is missing, too, all files below
    ROOT are train pictures without labels. UserError: the class folders differ."""
    skip = {os.path.realpath(each) for each in ("runs", cfg.out or "runs")}
    if cfg.data == "folder" and not os.path.isdir(f"{cfg.root}/train"):
        return Folder(cfg.root, skip, labeled=False), None
    train = Folder(f"{cfg.root}/train", skip)
    if cfg.data == "folder" and not os.path.isdir(f"{cfg.root}/val"):
        return train, None
    val = Folder(f"{cfg.root}/val", skip)
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


class Batch(NamedTuple):
    """The views of B pictures: view 1 of each, then view 2 of each.

    changes: what is done to each crop after it is cut, in this order. flip: 0 or 1. brightness,
    contrast, saturation: factors, where 1 changes nothing. hue: a shift, in turns of the color
    circle. gray: 0 or 1. blur: a sigma in pixels, 0 for none. solarize: 0 or 1.
    """
    crops: torch.Tensor                                     # uint8 (views B, 3, S, S)
    changes: torch.Tensor                                   # float32 (views B, 8)
    pictures: torch.Tensor                                  # (B,), the indices that were read


@dataclass(eq=False)
class Views:
    """A list of keys (epoch, index) -> Batch. A view is a function of (seed, epoch, index, view).

    So it does not depend on the batch, on the number of loader processes or ranks, or on a resume.
    pictures: Pictures or a Folder. views: 2, 1, or 0 for one view, the unchanged center crop.
    """
    pictures: Pictures
    cfg: Config
    views: int = 2

    def __getitem__(self, keys):
        pictures, found = zip(*(self.read(index) for _, index in keys))
        crops, changes = zip(*(
            self.draw(picture, key, view)
            for view in range(self.views or 1)
            for picture, key in zip(pictures, keys)))
        return Batch(torch.stack(crops), torch.tensor(changes), torch.tensor(found))

    def read(self, index):
        """A picture and its index. With skip_bad_files, it may be the next that can be read."""
        count = len(self.pictures)
        for each in range(index, index + count):
            try:
                return self.pictures.read(each % count), each % count
            except UserError as error:
                if not self.cfg.skip_bad_files:
                    raise
                print(f"hex.py: skipped {one_line(error)}", file=Quiet(sys.stderr))
        raise UserError("no file of the data can be read: give another --root")

    def draw(self, picture, key, view):
        """One view of a picture, uint8 (3, H, W). Returns its crop, uint8 (3, S, S), and the eight
        numbers of its changes (see Batch). view: 0 or 1."""
        cfg = self.cfg
        rng = rng_of(cfg.seed, *key, view)
        if self.views > 0:
            crop = TF.crop(picture, *random_box(rng, *picture.shape[1:], cfg.crop_min))
            shares = 0.5, 0.8, cfg.grayscale, cfg.blur[view], cfg.solarize[view]
        else:
            # The usual 224 of 256 pixels, cut before the resize. Small pictures are kept whole.
            side = min(picture.shape[1:])
            if cfg.size > 64:
                side = round(side * 224 / 256)
            crop = TF.center_crop(picture, side)
            shares = [0] * 5                                # change nothing

        flip, jitter, gray, blur, solarize = (rng.random() < share for share in shares)
        sigma = rng.uniform(0.1, 2.0)
        brightness, contrast, saturation, hue = (
            jitter * rng.uniform(-most, most) for most in cfg.jitter)
        changes = (
            flip, 1 + brightness, 1 + contrast, 1 + saturation, hue, gray, blur * sigma, solarize)
        return TF.resize(crop, [cfg.size, cfg.size], "bicubic"), changes


def random_box(rng, height, width, smallest):
    """The random crop of Inception (Szegedy et al. 2015). Returns the top, left, height and width
    of a box in the picture, in pixels. Its share of the area is from `smallest` to 1, and its
    width / height from 3/4 to 4/3."""
    for _ in range(10):
        area = height * width * rng.uniform(smallest, 1)
        ratio = (4 / 3) ** rng.uniform(-1, 1)
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w

    # Of a long picture, take as much of its middle as the ratio allows.
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def shift_hue(x, shift):
    """Turns the hue of RGB pictures, and keeps their value and saturation (of HSV). x and the
    result: (B, 3, H, W) in [0, 1]. shift: (B, 1, 1, 1), in turns of the color circle."""
    high, largest = x.max(1, keepdim=True)
    chroma = high - x.amin(1, keepdim=True)

    # The hue in sixths of the circle: red lies at 0, green at 2 and blue at 4. The hue is the place
    # of the largest channel plus a lean, from -1 to 1, toward the larger of the two others. Gray
    # gets a lean of 0.
    lean = x.roll(2, 1) - x.roll(1, 1)                      # green - blue, blue - red, red - green
    hue = 2 * largest + lean.gather(1, largest) / chroma.clamp_min(1e-30)
    hue = hue + 6 * shift                                   # (B, 1, H, W)

    # And back: each channel lies below the largest by a share of the chroma. The share is 0 where
    # the channel's place is at most 1 away from the hue, 1 where it is 2 or more away, and linear
    # between.
    distance = torch.cat([hue + 3, hue + 1, hue - 1], 1) % 6 - 3
    below = (distance.abs() - 1).clamp(0, 1)                # (B, 3, H, W)
    return high - chroma * below


def gaussian_blur(x, sigma):
    """Blurs each picture by its own sigma. x and the result: (B, 3, H, W), with H and W above 6.
    sigma: (B, 1, 1, 1), in pixels, from 0 (no blur) to 2."""
    distance = torch.arange(-6, 7, device=x.device) / sigma.clamp_min(1e-4)
    weight = (-distance.square() / 2).softmax(-1)           # (B, 1, 1, 13)

    # Each channel of each picture is a group of its own, with its own weights.
    weight = weight.repeat_interleave(3, 0)                 # (3 B, 1, 1, 13)
    blurred = F.pad(x.flatten(0, 1)[None], [6] * 4, mode="reflect")
    for each in (weight.mT, weight):                        # down, then across
        blurred = F.conv2d(blurred, each, groups=len(each))
    return blurred.view_as(x)                               # from (1, 3 B, H, W)


def augment(batch, cfg, color=True):
    """A Batch -> normalized float views (views B, 3, S, S) on the device, all changed at once.

    color: if False, of all changes only the flip is made.
    """
    x = batch.crops.to(cfg.device, non_blocking=True)
    changes = batch.changes.to(cfg.device, non_blocking=True)
    flip, brightness, contrast, saturation, hue, gray, sigma, solarize = (
        changes.T[..., None, None, None])                   # each: (views B, 1, 1, 1)

    x = x.flip(-1).where(flip > 0, x) / 255
    if color:
        x = (x * brightness).clamp(0, 1)
        mean = TF.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True)
        x = torch.lerp(mean, x, contrast).clamp(0, 1)
        x = torch.lerp(TF.rgb_to_grayscale(x), x, saturation).clamp(0, 1)
        x = shift_hue(x, hue)
        x = TF.rgb_to_grayscale(x).where(gray > 0, x)
        if any(cfg.blur):
            x = gaussian_blur(x, sigma)
        x = (1 - x).where(solarize * x >= 0.5, x)           # inverts what is 0.5 or brighter

    # Each channel is normalized with plain numbers. A tensor of them would have to be copied to the
    # GPU, and the CPU would wait for that.
    mean_std = MEAN_STD.get(cfg.data, MEAN_STD["imagenet"])
    for channel, mean, std in zip(x.unbind(1), *mean_std):
        channel.sub_(mean).div_(std)
    return x.contiguous(memory_format=torch.channels_last)


def batches(indices, size, *key, epochs, start=0, group=1, whole=False):
    """This rank's batches of a run: lists of (epoch, index).

    A batch has `size` pictures. Their order in an epoch depends on (key, epoch) alone. The number
    of batches in an epoch is the largest multiple of `group` that the pictures suffice for, and the
    rest is left out. start: the number of the first batch, counted over all epochs. whole: the
    ranks take whole batches in turn. Otherwise, each rank has its part of every batch.
    """
    per_epoch = len(indices) // size // group * group
    for number in range(start, epochs * per_epoch):
        epoch, k = divmod(number, per_epoch)
        if k == 0 or number == start:
            order = indices[permutation(len(indices), *key, epoch)].split(size)
        batch = order[k]
        if not whole:
            batch = batch.chunk(RANKS)[RANK]
        if not whole or k % RANKS == RANK:
            yield [(epoch, index) for index in batch.tolist()]


def start_server():
    """Starts the process that forks all loader processes. It has no threads. A fork of this one,
    which has those of gloo and autograd, could deadlock. It imports the libraries while the run
    prepares itself."""
    tempfile.tempdir = "/tmp"                               # the path of a socket must be short
    # The resource tracker must run before signals are blocked, as its start in Python 3.11 unblocks
    # SIGTERM and SIGINT.
    resource_tracker.ensure_running()
    # The server and the loaders inherit blocked signals. They must go on until the run, which gets
    # the same signals, has ended its step.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    forkserver.set_forkserver_preload(["torch", "torchvision"])
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def let_go(_):
    """In a loader process. The server lives as long as any process holds the writing end of a pipe.
    Each loader inherits that end, and closes it here, so that the run alone holds it. If the run is
    killed, the server ends. It is the loaders' parent, and PyTorch ends a loader without one."""
    os.close(forkserver._forkserver._forkserver_alive_fd)


def loader(views, lists):
    """A DataLoader that makes a Batch of each of the lists of keys, in cfg.workers processes, or in
    this one if there are 0. views: a Views. lists: an iterable, as from `batches`."""
    cfg = views.cfg
    return torch.utils.data.DataLoader(
        views, batch_size=None, sampler=lists, num_workers=cfg.workers,
        pin_memory=cfg.device == "cuda", worker_init_fn=let_go,
        multiprocessing_context="forkserver" if cfg.workers else None)


# === Optimizer ====================================================================================

class LARS(torch.optim.SGD):
    """SGD that gives each layer its own rate (You et al. 2017): lr f, or with `clip` min(lr, f),
    where f = eta |w| / (|g| + decay |w|).

    |w|, |g|: the norms of a weight tensor and of its gradient. decay: weight_decay, an L2 penalty.
    eta: a factor without a unit. params: parameters, or pairs of name and parameter. Biases, norms
    and what is not named a weight (a ViT's class token, a layer scale) have the rate lr, and no
    decay. A weight with |w| or |g| of 0 also has the rate lr.
    """
    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.02, clip=True):
        super().__init__(params, lr, momentum, foreach=True)
        self.decay = weight_decay
        self.eta = eta
        self.clip = clip

    @torch.no_grad
    def step(self):
        """Decays and scales the gradients of the weights, in place. The rest is SGD's own step."""
        for group in self.param_groups:
            names = group.get("param_names", ["weight"] * len(group["params"]))
            weights = [
                p for name, p in zip(names, group["params"])
                if p.grad is not None and p.ndim > 1 and name.endswith("weight")]
            if not weights:
                continue
            grads = [w.grad for w in weights]
            norm = torch.stack(torch._foreach_norm(weights))
            grad_norm = torch.stack(torch._foreach_norm(grads))
            factor = self.eta * norm / (grad_norm + self.decay * norm + 1e-8)
            if self.clip:
                factor = (factor / group["lr"]).clamp(max=1)
            factor = factor.where(norm * grad_norm > 0, 1)      # 1 where a norm is 0
            torch._foreach_add_(grads, weights, alpha=self.decay)
            torch._foreach_mul_(grads, factor.unbind())
        super().step()


def learning_rate(step, total, warmup, peak):
    """Returns the rate of a step, from 0 to total - 1. It rises to `peak` in a line over `warmup`
    steps, and then falls to 0 along half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * half_cosine((step - warmup) / (total - warmup))


# === Training =====================================================================================
# From here on, text is printed and files are written, most of them by rank 0 alone.

# At one of these signals, a run ends its step, saves a checkpoint and exits with status 75.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Quiet:
    """A terminal's stream, which may be closed, full or None. What it does not take is dropped, so
    that a run does not end with its terminal."""

    def __init__(self, stream):
        self.stream = stream
        with suppress(Exception):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        with suppress(Exception):
            self.stream.write(text)
            self.stream.flush()

    def flush(self):
        pass                                                # write has done it

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Interrupted(UserError):
    """A signal has come. The same command goes on from the last checkpoint."""
    status = 75

    def __str__(self):
        return "interrupted, run the same command again"


def one_line(text):
    """The text, with escapes for what a terminal would not print on one line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text).strip())


def announce(text):
    """Rank 0 prints a line on stderr, without breaking the progress bar."""
    if RANK == 0:
        tqdm.write(one_line(text), file=sys.stderr)


def write(path, fill):
    """Rank 0 writes a file by fill(binary file), and all ranks wait for it. A reader finds the old
    file or the new one, and never a part. UserError or OSError: it cannot be written."""
    def write_aside():
        aside = Path(f"{path}.tmp")
        aside.unlink(missing_ok=True)                       # a link of that name is not followed
        with open(aside, "xb") as file:
            try:
                fill(file)
            except RuntimeError as error:                   # torch.save's, if the disk is full
                raise UserError(f"{path}: cannot be written ({error}); make room") from error
            file.flush()
            os.fsync(file)
        aside.replace(path)

    on_first_rank(write_aside)


def read(path, reader, remedy):
    """Returns reader(binary file). UserError: the file is malformed; its text ends with `remedy`,
    which says what the user can do."""
    with open(path, "rb") as file:
        try:
            return reader(file)
        except Exception as error:
            # If there is too little memory, the file is not to blame.
            if isinstance(error, UserError) or "emory" in repr(error):
                raise
            raise UserError(f"{path}: cannot be read ({error!r}); {remedy}") from error


def read_tensors(file):
    """What torch.save has written to a file, on the CPU."""
    return torch.load(file, map_location="cpu", weights_only=True)      # runs no code in the file


def resume(path, experiment, **parts):
    """Restores the parts (a model, an optimizer) from a checkpoint, if there is one. experiment: a
    dict of what the checkpoint belongs to.

    Returns the number of steps that are done, and save(step), which writes the next checkpoint.
    UserError: the checkpoint is of another experiment, or damaged.
    """
    def restore(file):
        state = read_tensors(file)
        if state["experiment"] != experiment:
            raise UserError(
                f"{path}: is of another experiment or other data; delete it, or give another --out")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["step"]

    def save(step):
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"step": step, "experiment": experiment}
        write(path, lambda file: torch.save(state, file))

    step = read(path, restore, "delete it to start again") if path.exists() else 0
    agree(step, "checkpoints")
    return step, save


# The log is the least important file. Nothing that is wrong with it stops a run.

def read_log(path, last=math.inf):
    """The events of metrics.jsonl up to a step. A line that is damaged is left out."""
    events = []
    with suppress(OSError), open(path, "rb") as file:
        for line in file:
            with suppress(ValueError, TypeError, KeyError):
                event = json.loads(line)
                if event["event"] and event["step"] <= last:
                    events.append(event)
    return events


def in_words(figures):
    """The numbers of a dict, as text of one line: integers whole, others with three digits."""
    return ", ".join(
        f"{name} {value:.{9 if isinstance(value, int) else 3}g}" for name, value in figures.items()
        if isinstance(value, int | float))


def add_to_log(path, *events, mode="a"):
    """Rank 0 adds a line for each event. NaN, which is no JSON, becomes null."""
    if RANK > 0:
        return
    try:
        with open(path, mode) as file:
            for event in events:
                print(re.sub("NaN|-?Infinity", "null", json.dumps(event)), file=file)
    except OSError as error:
        announce(f"warning: the log has a gap: {error}")


@contextmanager
def signals_counted(restore):
    """Yields a list, to which each signal to stop adds its time, so that the run can end a step
    first.

    A signal that comes more than 3 s after the first ends the process at once. One that comes
    sooner is taken for a copy of the first, which torchrun has passed on. restore: whether the
    process goes on afterwards.
    """
    came, before = [], {}

    def add(*_):
        came.append(time.monotonic())
        if came[-1] > came[0] + 3:
            os._exit(Interrupted.status)

    for each in SIGNALS:
        if signal.getsignal(each) != signal.SIG_IGN:        # under nohup, SIGHUP stays ignored
            before[each] = signal.signal(each, add)
    try:
        yield came
    finally:
        if restore:
            for pair in before.items():
                signal.signal(*pair)


def build_model(cfg):
    """Returns the HEX module of a Config, on the CPU. Its weights depend on the Config alone."""
    torch.manual_seed(cfg.seed)
    backbone, width = build_backbone(cfg.backbone, cfg.size, cfg.norm)
    norm = group_norm if cfg.norm == "group" else nn.BatchNorm1d
    kind = METHODS[cfg.method]
    settings = {name: getattr(cfg, name) for name in kind.settings}
    method = kind(backbone, width, norm=norm, **settings)
    # The oracle is not here, since it needs the labels of each batch: `pretrain` sets it.
    thresholds = dict(
        adaptive=AdaptiveThreshold(cfg.quantile),
        step=StepThreshold(0.9, cfg.drop, cfg.drop_every),
        cosine=CosineThreshold(0.9, 0.3, cfg.epochs))
    names = "alpha temperature warmup_threshold beta tau_plus decoupled".split()
    return HEX(
        method, cfg.loss, threshold=thresholds.get(cfg.threshold), warmup=cfg.hex_warmup,
        **{name: getattr(cfg, name) for name in names})


def autocast(cfg):
    """The context of mixed precision, by --amp."""
    dtype = torch.bfloat16 if cfg.amp == "bf16" else torch.float16
    return torch.autocast(cfg.device, dtype, enabled=cfg.amp != "off")


def pretrain(model, cfg, train, val, out, experiment, signals):
    """Trains the model, or goes on from its checkpoint. Leaves checkpoint.pt, metrics.jsonl and two
    pictures in `out`. model: from build_model. train, val: from load_data. out: a Path. experiment:
    a dict, for `resume`. signals: from signals_counted. Interrupted: a signal has come. UserError:
    the loss is not finite."""
    # The loss of a step is the mean of `accumulate` losses. If the number of ranks divides
    # `accumulate`, each rank computes whole losses by itself. Otherwise the ranks share every loss:
    # each rank embeds a part of its images, and all ranks gather all embeddings.
    whole = cfg.accumulate % RANKS == 0
    losses = cfg.accumulate // RANKS if whole else cfg.accumulate       # of this rank in a step
    images = cfg.batch_size * cfg.accumulate                            # of all ranks in a step
    per_epoch = max(1, len(train) // images)
    total = cfg.epochs * per_epoch

    model.to(cfg.device, memory_format=torch.channels_last)
    # Where ranks share a loss, all of its images should be one BatchNorm batch. SyncBatchNorm does
    # that, but only on GPUs. On CPUs each rank normalizes its own part, so that the result depends
    # on the number of ranks (--norm group avoids this).
    if cfg.device == "cuda" and not whole:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    views_of = augment
    if cfg.compile:
        # Method and augmentation are not dynamic: what is compiled for a shape depends on no shape
        # that came before, so that a resumed run computes the same. The pair loss meets one shape.
        model.method.compile(dynamic=False)
        if model.pair_loss:
            model.pair_loss = torch.compile(model.pair_loss)
        views_of = torch.compile(augment, dynamic=False)
    statistics = [x for name, x in model.named_buffers() if "running_" in name]

    # The optimizer leaves alone what has no gradient, such as a target.
    peak = cfg.lr * images / 256
    optimizer = LARS(
        model.named_parameters(), peak, weight_decay=cfg.weight_decay, eta=cfg.eta, clip=cfg.clip)
    scaler = torch.amp.GradScaler(cfg.device, enabled=cfg.amp == "fp16")

    # Go on from the checkpoint, if there is one. What was logged after it is dropped, and will be
    # logged again. Without a checkpoint, this includes step 0.
    start, save = resume(
        out / "checkpoint.pt", experiment, model=model, optimizer=optimizer, scaler=scaler)
    if 0 < start == total:
        return announce(f"training was finished before; delete {out} to repeat")
    log = out / "metrics.jsonl"
    add_to_log(log, *read_log(log, start or -1), mode="w")

    lists = batches(
        torch.arange(len(train)), cfg.batch_size, cfg.seed, "order", epochs=cfg.epochs,
        start=start * cfg.accumulate, group=cfg.accumulate, whole=whole)
    source = iter(loader(Views(train, cfg), lists))

    now = time.perf_counter
    step, stop, std = start, False, math.inf
    logged, since, waited = start, now(), 0.0
    with tqdm(total=total, initial=start, disable=RANK > 0, unit="step") as bar:
        while True:
            # Before the first step and after each epoch, measure what has emerged. The epoch that a
            # run resumes from was measured before.
            epoch = step // per_epoch
            ends_epoch = step % per_epoch == 0
            if ends_epoch and (step == 0 or step > start):
                found = emergence(model, cfg, train, val)
                add_to_log(log, dict(event="epoch", step=step, epoch=epoch, **found))
                announce(f"epoch {epoch}/{cfg.epochs}: {in_words(found)}")
                before, std = std, found["std"]
                # Warn if it is low and has not risen. Before the first step it may be low.
                if step and std <= min(before, 0.1):
                    announce(f"warning: the embeddings collapse (std {std:.3f} of 1): lower --lr")
                if step in (0, total):
                    name = "neighbours.png" if step == total else "neighbours_early.png"
                    draw_neighbors(model, cfg, train, out / name)

            # Save a checkpoint. End if a signal has come, or if the work is done.
            if step > start and (
                    stop or ends_epoch or step % (cfg.checkpoint_every or per_epoch) == 0):
                save(step)
            if stop:
                raise Interrupted
            if step == total:
                return

            # One step: the gradients of its losses add up.
            model.train()
            lr = learning_rate(step, total, cfg.lr_warmup * per_epoch, peak)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            sums, outputs = 0, []
            for k in range(losses):
                waited -= now()                             # adds up how long next takes
                batch = next(source)
                waited += now()
                x1, x2 = views_of(batch, cfg).chunk(2)      # each (N, 3, S, S)

                # Dropout, where a backbone has it, depends on the step (here from 1 on) and on the
                # loss. Where ranks share a loss, each has dropout of its own.
                rng = rng_of(cfg.seed, "step", step + 1, k * RANKS + RANK)
                torch.manual_seed(rng.getrandbits(63))
                with autocast(cfg):
                    embeddings = model(x1, x2)              # each (N, dim)
                if not whole:
                    embeddings = [gather(e) for e in embeddings]        # each (ranks N, dim)
                outputs.append([e.detach() for e in embeddings])

                if cfg.threshold == "oracle":
                    labels = train.coarse[batch.pictures].to(cfg.device)
                    model.threshold = OracleHierarchy(labels if whole else gather(labels))
                loss, stats = model.loss(*embeddings, epoch=epoch)
                scaler.scale(loss / cfg.accumulate).backward()
                sums += torch.stack([loss.detach(), *stats.values()])

            # The gradient of the step is the sum over the ranks.
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            add_over_ranks(grads)
            scaler.unscale_(optimizer)

            # Mean over all losses and ranks: what is logged, the norm of the gradient, and the
            # number of signals that came. If any rank has got one, all see a number above 0, and
            # stop. Here the host waits for the device.
            norm = nn.utils.get_total_norm(grads)
            means = torch.stack([*sums / losses, norm, torch.full_like(norm, len(signals))])
            add_over_ranks([means], RANKS)
            *means, norm, stop = means.tolist()
            means = dict(zip(["loss", *stats], means))

            # If the gradient overflows in fp16, the weights stay as they are, and the scaler lowers
            # its scale. In all other cases, what is not finite ends the run.
            fits = math.isfinite(norm)
            may_go_on = fits or cfg.amp == "fp16" and scaler.get_scale() > 1e-9
            if not (may_go_on and math.isfinite(means["loss"])):
                raise UserError(
                    f"step {step + 1}: the loss or its gradient is not finite, and nothing of this "
                    "step is saved: lower --lr and give another --out")
            step += 1
            if fits:
                optimizer.step()
                if whole and cfg.method == "nnclr":         # the queue is the same on all ranks
                    outputs = [[gather(e) for e in output] for output in outputs]
                model.method.after_step(step / total, outputs)
            scaler.update()
            # Each rank has updated BatchNorm's running statistics with its own batches. All go on
            # with the mean, so that any of them can be saved and evaluated. A step counts as
            # accumulate / RANKS updates, so that more ranks make the statistics move more slowly.
            # Only eval mode reads them, and the weights do not depend on them.
            add_over_ranks(statistics, RANKS)

            if step % cfg.log_every == 0 or step == total:
                seconds = now() - since
                add_to_log(log, dict(
                    event="step", step=step, epoch=epoch, **means, lr=lr,
                    images_per_second=(step - logged) * images / seconds,
                    data_wait=waited / seconds))
                bar.set_postfix(loss=means["loss"], refresh=False)
                logged, since, waited = step, now(), 0.0
            bar.update()


# === Evaluation ===================================================================================

@torch.no_grad
def embed(backbone, cfg, batch):
    """The features (B, width), float32, of a Batch with one view of each picture."""
    with autocast(cfg):
        return backbone(augment(batch, cfg, color=False)).float()


def center_batches(pictures, indices, cfg):
    """A loader of Batches of the center crops of this rank's share of some pictures. indices: (n,),
    into `pictures`."""
    # All shares must have the same length. The last ones are filled up with the first pictures.
    share = indices.repeat(RANKS).split(math.ceil(len(indices) / RANKS))[RANK]
    lists = [[(0, index) for index in part.tolist()] for part in share.split(256)]
    return loader(Views(pictures, cfg, views=0), lists)


@cache
def fixed_centers(pictures, cfg, count):
    """Pictures for the figures of each epoch, their indices, and center_batches, made once."""
    chosen = permutation(len(pictures), "subset")[:count]
    return pictures, chosen, list(center_batches(pictures, chosen, cfg))


def features(backbone, cfg, pictures, indices, centers=None, signals=()):
    """The features (n, width) and labels (n,) of the pictures at some indices. Each rank computes a
    share, and all get all, on the device. The backbone must be in eval mode. Pictures that cannot
    be read are left out. Without targets, the labels are the indices. centers: the center_batches,
    if there are some. Interrupted: a signal has come. UserError: none can be read, or a feature is
    not finite."""
    rows, read_indices = [], []
    for batch in centers or center_batches(pictures, indices, cfg):
        if signals:
            raise Interrupted
        rows.append(embed(backbone, cfg, batch))
        read_indices += batch.pictures.tolist()             # a loader's tensor keeps a file open
    x = gather(torch.cat(rows))[:len(indices)]
    found = gather(torch.tensor(read_indices, device=cfg.device))[:len(indices)]
    if not x.norm(dim=1).isfinite().all():
        raise UserError("features are not finite: give another --probe, or lower --lr, a new --out")
    good = found.cpu() == indices
    if not good.any():
        raise UserError(f"none of {len(good)} pictures of --root {cfg.root} can be read: mend them")
    # Data without labels get the indices in their place, which nothing reads.
    labels = indices if pictures.targets is None else pictures.targets[indices]
    return x[good], labels[good].to(cfg.device)


def nearest_neighbors(bank, labels, queries, truth):
    """k-NN with k = 20 and votes weighted by e^{s/0.07}, where s is a cosine (Wu et al. 2018).
    bank: (m, width), with labels (m,). queries: (n, width), with truth (n,). Returns (n,), bool:
    which queries are classified right."""
    bank = F.normalize(bank)
    guesses = []
    for rows in F.normalize(queries).split(256):
        nearest, index = (rows @ bank.T).topk(min(20, len(bank)))
        weights = (nearest / 0.07).exp()                    # (256, 20)
        votes = F.one_hot(labels[index]) * weights[..., None]
        guesses.append(votes.sum(1).argmax(1))
    return torch.cat(guesses) == truth


def percent(right):
    """The share of true entries in a bool tensor, in percent."""
    return 100 * right.double().mean().item()


@cache
def fixed_views(train, cfg):
    """The Batch of two views of 256 pictures, augmented as in training, on which H is computed
    after each epoch. It is made once. Its seed is a word, so that it is the same for every
    --seed."""
    keys = [(0, index) for index in permutation(len(train), "fixed")[:256].tolist()]
    return Views(train, replace(cfg, seed="fixed"))[keys]


@torch.no_grad
def find_neighbors(model, cfg, train):
    """Returns the normalized embeddings (2N, dim) of fixed_views, the picture of each (2N,), eps
    and H (2N, 2N). H is that of the adaptive threshold for every --threshold and --loss, so that
    runs can be compared. It leaves the model in eval mode."""
    batch = fixed_views(train, cfg)
    model.eval()
    views = augment(batch, cfg).chunk(2)
    with autocast(cfg):
        embeddings = model(*views)
    _, pairs = model.method.loss(*(e.float() for e in embeddings))
    a, b = (e.cpu() for e in pairs[0])
    eps, H = local_mask(a, b, AdaptiveThreshold(cfg.quantile))
    return F.normalize(torch.cat([a, b])), batch.pictures.repeat(2), eps, H


def emergence(model, cfg, train, val):
    """Measures what has emerged. Returns a dict of floats, the figures of an epoch.

    threshold, local: eps and the mean |H| of find_neighbors. std: the spread of the embeddings,
    from 0, if all are the same, to about 1. purity, chance: see below. rankme: from 1 to the
    width of the features. knn: the accuracy on 512 pictures of val, in percent.
    """
    z, picture, eps, H = find_neighbors(model, cfg, train)
    std = z.std(0).mean() * math.sqrt(z.shape[1])           # 1 for points all over the sphere
    found = dict(threshold=eps, local=H.sum() / len(H), std=std)

    # Purity is the share of the pairs in H whose labels are the same. Chance is this share of all
    # pairs of different pictures. "_coarse" is of super-classes.
    different = picture[:, None] != picture
    for name, labels in (("", train.targets), ("_coarse", train.coarse)):
        if labels is not None:
            label = labels[picture]
            same = (label[:, None] == label).double()
            found[f"purity{name}"] = same[H].mean()
            found[f"chance{name}"] = same[different].mean()

    # RankMe (Garrido et al. 2023) is e to the power of the entropy of the singular values of the
    # features, divided by their sum. It is about the number of dimensions in use.
    backbone = model.method.backbone
    x, y = features(backbone, cfg, *fixed_centers(train, cfg, 2048))
    values = torch.linalg.svdvals(x)
    found["rankme"] = torch.special.entr(values / values.sum() + 1e-7).sum().exp()

    if val:
        queries = features(backbone, cfg, *fixed_centers(val, cfg, 512))
        found["knn"] = percent(nearest_neighbors(x, y, *queries))
    return {key: float(value) for key, value in found.items()}


def draw_neighbors(model, cfg, train, path):
    """Writes a PNG of eight rows: an anchor, then up to 7 pictures of its H, nearest first."""
    z, picture, _, H = find_neighbors(model, cfg, train)
    s = (z @ z.T).masked_fill(~H, -2).fill_diagonal_(2)     # so that the anchor comes first
    tiles = torch.ones(8, 8, 3, cfg.size, cfg.size)         # white
    for row, tile in zip(s, tiles):
        value, order = row.sort(descending=True)
        shown = dict.fromkeys(picture[order[value > -2]].tolist())
        keys = [(0, index) for index in shown][:8]
        tile[:len(keys)] = Views(train, cfg, views=0)[keys].crops / 255
    tiles = F.interpolate(tiles.flatten(0, 1), scale_factor=64 // cfg.size or 1)
    write(path, lambda file: torchvision.utils.save_image(tiles, file, format="png", pad_value=1))


def place_in_class(labels):
    """For each of the labels (n,), how many equal ones stand before it. Returns int64 (n,)."""
    counts = labels.bincount()
    before = counts.cumsum(0) - counts                      # how many labels are lower
    # argsort twice: the place of each entry, if they are sorted by class.
    return labels.argsort(stable=True).argsort() - before[labels]


def labeled_pictures(cfg, targets):
    """Returns the sorted indices of the pictures whose labels the probe may see: a share of all
    that is balanced over the classes, and the same for every --seed. CommandError: it is less than
    one picture for each class."""
    classes = len(targets.bincount())
    total = round(cfg.label_fraction * len(targets))
    if total < classes:
        raise CommandError(
            f"--label-fraction {cfg.label_fraction}: fewer labels than classes; "
            f"give {classes / len(targets) + 5e-5:.4f} or more")

    # Take the shuffled pictures in rounds. Each round takes one picture of each class that has one
    # left, and the classes have a random order. `turn` numbers the pictures in this way.
    order = permutation(len(targets), "labels")
    labels = targets[order]
    turn = place_in_class(labels) * classes + permutation(classes, "labels")[labels]
    return order[turn.argsort()[:total]].sort().values


def split_labels(cfg, targets):
    """Splits labeled_pictures. Returns the indices of those that heads are trained on, and of those
    that a head is chosen by: a tenth of each class, at least one, but none of a class of one."""
    labeled = labeled_pictures(cfg, targets)
    labeled = labeled[permutation(len(labeled), cfg.seed, "holdout")]
    labels = targets[labeled]
    counts = labels.bincount()
    held = place_in_class(labels) < (counts // 10).clamp(min=1).minimum(counts - 1)[labels]
    return labeled[~held], labeled[held]


RATES = "0.01 0.03 0.1 0.3 1.0 3.0 10.0 30.0 100.0".split()


def linear_probe(backbone, cfg, train, val, checkpoint, asked, signals):
    """The linear probe and k-NN on a frozen backbone. Returns what probe.json will hold: accuracies
    in percent, counts of pictures, and for each picture of val whether it was right.

    A linear head for each of RATES is trained (SGD, decay 1e-5, a tenth of the rate at 60 and at
    80 % of the epochs: the authors' probe) on stored features of center crops, or for ImageNet on
    live crops and flips. The one that is best on a tenth of the labeled pictures is run on val. No
    head was trained on this tenth. If each class has one labeled picture, there is none, and all
    are used for both. Of the pictures to train on, features of at most 262,144 are stored, which
    fit into the memory of a GPU: k-NN, and a probe on stored features, use no more.
    """
    backbone.to(cfg.device, memory_format=torch.channels_last).eval()
    stored = partial(features, backbone, cfg, signals=signals)
    fit, hold = split_labels(cfg, train.targets)
    x_val, y_val = stored(val, torch.arange(len(val)))
    x_hold, y_hold = stored(train, hold if len(hold) else fit)
    x_fit, y_fit = stored(train, fit[:262144])

    torch.manual_seed(cfg.seed)
    classes = len(train.targets.bincount())
    heads = nn.ModuleList(nn.Linear(x_fit.shape[1], classes) for _ in RATES).to(cfg.device)
    optimizer = torch.optim.SGD(
        [dict(params=head.parameters()) for head in heads], momentum=0.9, weight_decay=1e-5)
    step, save = resume(checkpoint, asked, heads=heads, optimizer=optimizer)

    is_live = cfg.data == "imagenet"
    rows = fit if is_live else torch.arange(len(x_fit))
    # A batch has 256 rows, or all if they are fewer, rounded down to a multiple of RANKS.
    size = max(1, min(256, len(rows)) // RANKS) * RANKS
    per_epoch = len(rows) // size
    stream = batches(rows, size, cfg.seed, "probe", epochs=cfg.probe_epochs, start=step)
    if is_live:
        stream = loader(Views(train, cfg, views=1), stream)

    for batch in tqdm(
        stream, "probe", cfg.probe_epochs * per_epoch, initial=step, disable=RANK > 0, leave=False
    ):
        if is_live:
            x = embed(backbone, cfg, batch)
            y = train.targets[batch.pictures].to(cfg.device)
        else:
            index = [row for _, row in batch]
            x, y = x_fit[index], y_fit[index]

        # How often the rate has fallen. It does not fall in the first epoch, even if there is one.
        epoch = step // per_epoch
        falls = sum(epoch >= max(1, cfg.probe_epochs * tenths // 10) for tenths in (6, 8))
        for group, rate in zip(optimizer.param_groups, RATES):
            group["lr"] = float(rate) * 0.1 ** falls
        optimizer.zero_grad()
        loss = sum(F.cross_entropy(head(x), y) for head in heads)
        loss.backward()
        stop = loss.new_tensor(len(signals))
        add_over_ranks([*(p.grad for p in heads.parameters()), stop], RANKS)
        optimizer.step()

        # To train on stored features takes seconds. Only a live probe is saved after each epoch.
        step += 1
        if stop or is_live and step % per_epoch == 0:
            save(step)
        if stop:
            raise Interrupted

    holdout = [percent(head(x_hold).argmax(1) == y_hold) for head in heads]
    best = holdout.index(max(holdout))
    # Whether the truth is the k-th likeliest class, for the first five: (n, 5).
    right = heads[best](x_val).topk(min(5, classes)).indices == y_val[:, None]
    top1 = right[:, 0]
    knn = nearest_neighbors(x_fit, y_fit, x_val, y_val)
    return dict(
        top1=percent(top1), top5=percent(right.any(1)), knn=percent(knn), rate=float(RATES[best]),
        holdout=dict(zip(RATES, holdout)), train=len(rows), held_out=len(hold), val=len(y_val),
        # Which pictures of val were right, a digit each.
        right="".join(map(str, top1.int().tolist())),
        knn_right="".join(map(str, knn.int().tolist())))


# === The command ==================================================================================

def load_backbone(path, cfg, remedy):
    """The backbone from a backbone.pt, or from another file with a model of this architecture. The
    tensors may lie in a "state_dict", and their names may have a prefix. A classifier is dropped.
    The position embeddings of a ViT are interpolated to --size. UserError: it does not fit."""
    backbone, _ = build_backbone(cfg.backbone, cfg.size, cfg.norm)
    first = next(iter(backbone.state_dict()), "")           # pixels have no tensors
    removed = tuple(
        f"{name}." for name, module in backbone.named_modules() if isinstance(module, nn.Identity))

    def fill(file):
        state = read_tensors(file)
        state = state.get("state_dict", state)
        # A prefix such as "module.encoder." stands before the name of the first tensor. Of all
        # names that end like it ("conv1.weight", "layer1.0.conv1.weight"), the shortest is its own.
        names = [name for name in state if name.endswith(first)]
        prefix = min(names, key=len, default=first).removesuffix(first)
        for name in list(state):                            # in place: it keeps its _metadata
            value, inner = state.pop(name), name.removeprefix(prefix)
            if name.startswith(prefix) and not inner.startswith(removed):
                state[inner] = value
        if cfg.backbone.startswith("vit_"):
            state = models.vision_transformer.interpolate_embeddings(
                cfg.size, backbone.patch_size, state)
        backbone.load_state_dict(state)

    read(path, fill, remedy)
    return backbone


def take_folder(out, experiment, stack):
    """Makes the run's folder, or finds one of the same experiment. Returns whether it is new. It is
    locked until the stack, an ExitStack, is closed, or the process dies. Rank 0 alone calls it.
    UserError: it holds another experiment, is in use, or cannot be written."""
    config = out / "config.json"
    is_new = not config.exists()
    if not is_new:
        there = read(config, lambda file: dict(json.load(file)["experiment"]), "give another --out")
        differing = "; ".join(
            f"{name} {there.get(name)} there, {value} here" for name, value in experiment.items()
            if there.get(name) != value)
        if differing:
            raise UserError(
                f"--out {out}: holds another experiment ({differing}); give another --out")
    elif any(out.glob("*.pt")):
        raise UserError(f"--out {out}: holds a run without its config.json; give another --out")

    os.makedirs(out, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out}: cannot be written; give another --out")
    lock = stack.enter_context(open(out / "lock", "a"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {out}: another run is at work there; give another --out") from None
    except OSError as error:
        announce(f"warning: {out}: no lock keeps other runs away ({error})")
    return is_new


def run(cfg, argv, signals):
    """Trains, evaluates and prints the results. What is in the folder already is not done again."""
    # Errors in the command should be found before the folder is made.
    if cfg.probe:
        fitting = f"give a file of --backbone {cfg.backbone} at --size {cfg.size}"
        backbone = load_backbone(cfg.probe, cfg, fitting)
    else:
        model = build_model(cfg)
    train, val = load_data(cfg)                             # val is None if it has no labels
    if val:
        labeled_pictures(cfg, train.targets)                # raises: --label-fraction is too small
    elif cfg.probe:
        raise CommandError(f"--root {cfg.root}: holds no train/ and val/ with labels; give another")
    needed = cfg.batch_size * cfg.accumulate if cfg.epochs and not cfg.probe else 2
    if len(train) < needed:
        raise CommandError(
            f"{len(train)} pictures are less than the {needed} of a step; give --accumulate 1 "
            f"--batch-size {max(2, len(train) // RANKS * RANKS)}, or more pictures")

    # What identifies the experiment, in the form in which config.json will hold it. All ranks must
    # agree on it, and on all else but where the data lie and how many processes read them.
    experiment = {name: getattr(cfg, name) for name in Experiment.__annotations__}
    experiment["pictures"] = [each and each.digest() for each in (train, val)]
    agree(vars(cfg) | experiment | dict(root=None, workers=None), "data or options")
    content = json.dumps(dict(
        config=vars(cfg), experiment=experiment, command=["hex.py", *argv], ranks=RANKS,
        code=digest(Path(__file__).read_bytes()), threads=torch.get_num_threads(),
        python=sys.version, torch=torch.__version__, torchvision=torchvision.__version__), indent=1)
    experiment = json.loads(content)["experiment"]
    about = "probe" if cfg.probe else f"{cfg.method}-{cfg.loss}"
    out = Path(cfg.out or f"runs/{cfg.data}-{about}-s{cfg.seed}")

    with ExitStack() as stack:
        if on_first_rank(lambda: take_folder(out, experiment, stack)):
            write(out / "config.json", lambda file: file.write(content.encode()))
        announce(
            f"{out}: {len(train)} train, {len(val or ())} val pictures; {RANKS} ranks; {cfg}")
        if cfg.device == "cuda" and cfg.accumulate % RANKS:
            announce(f"ranks share each loss; SyncBatchNorm's waits end with --accumulate {RANKS}")

        # Train, or take the backbone that is there. A user who needs room may delete the checkpoint
        # of a run that has ended.
        final, checkpoint = out / "backbone.pt", out / "checkpoint.pt"
        if cfg.probe is None:
            if on_first_rank(lambda: final.exists() and not checkpoint.exists()):
                backbone = load_backbone(final, cfg, "delete it")
            else:
                pretrain(model, cfg, train, val, out, experiment, signals)
                # The file is to have plain CPU tensors, which can be loaded anywhere.
                backbone = model.method.backbone.to("cpu", memory_format=torch.contiguous_format)
                write(final, lambda file: torch.save(backbone.state_dict(), file))

        # Probe, or take the result that is there, if it is of the same file and the same options.
        result = "no probe and no k-NN, which need labels in train/ and val/"
        if val:
            weights = on_first_rank(lambda: digest(Path(cfg.probe or final).read_bytes()))
            asked = dict(
                probe_epochs=cfg.probe_epochs, label_fraction=cfg.label_fraction, weights=weights)
            path, found = out / "probe.json", {}
            if on_first_rank(path.exists):
                found = read(path, lambda file: dict(json.load(file)), "delete it")
            if found.get("asked") == asked:
                announce(f"the probe was finished before; delete {path} to repeat")
            else:
                found = linear_probe(
                    backbone, cfg, train, val, out / "probe.pt", asked, signals)
                text = json.dumps(found | dict(asked=asked), indent=1)
                write(path, lambda file: file.write(text.encode()))
                # The probe's checkpoint would stand in the way of another probe.
                (out / "probe.pt").unlink(missing_ok=True)
            result = (
                "top-1 {top1:.2f} %, top-5 {top5:.2f} %, k-NN {knn:.2f} % of {val} pictures"
            ).format(**found)

        # The result, the figures from before the first step, and those from after the last epoch.
        if RANK == 0:
            print(f"{one_line(out)}: {result}")
            epochs = [
                event for event in read_log(out / "metrics.jsonl") if event["event"] == "epoch"]
            for figures in epochs[:1] + epochs[1:][-1:]:
                print(in_words(figures))


def set_up(cfg):
    """Starts the loaders' server and sets global options, while CUDA has not started yet. Then
    joins the process group that torchrun has prepared. Returns whether it has joined one."""
    if cfg.workers > 0:
        start_server()
    torch.backends.cudnn.benchmark = not cfg.deterministic  # it pays, as all batches have one shape
    torch.use_deterministic_algorithms(cfg.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if cfg.deterministic:                                   # NVLink SHARP adds in varying order
        os.environ |= dict(CUBLAS_WORKSPACE_CONFIG=":4096:8", NCCL_NVLS_ENABLE="0")

    if RANKS == 1 or dist.is_initialized():
        return False
    backend, device = "gloo", None
    try:
        if cfg.device == "cuda":
            backend, device = "nccl", environment("LOCAL_RANK", 0)
            torch.cuda.set_device(device)
        # Ranks wait up to 6 hours for each other, since a download may be slow.
        dist.init_process_group(backend, timeout=timedelta(hours=6), device_id=device)
    except Exception as error:
        raise UserError(f"the ranks cannot meet ({error}); start them by torchrun") from error
    return True


# Errors, by a part of their text, that say enough in their first line. "emory" is of too little
# memory, EOFError of a loader that has died, "ompiler" of a missing compiler, and "ancdata" of too
# many open files. Any other error is a fault of this program, and is shown with its traceback.
KNOWN = (
    "emory|EOFError|DataLoader worker|closed by peer|reset by peer|ompiler|open files|ancdata|"
    "deterministic implementation")


def main(argv=None):
    """Runs a command. argv: a list of words, or None for those of this process.

    Returns the exit status: 0 for success, 1 for an error, 2 for a wrong command, 75 for a run that
    was interrupted and can go on.
    """
    with (
        redirect_stdout(Quiet(sys.stdout)), redirect_stderr(Quiet(sys.stderr)),
        signals_counted(restore=argv is not None) as signals
    ):
        try:
            argv = sys.argv[1:] if argv is None else argv
            cfg = parse(argv)
            has_joined = set_up(cfg)
            run(cfg, argv, signals)
            if has_joined:
                dist.destroy_process_group()                # not after an error: it could hang
            return 0
        except Exception as error:
            # After a signal, any error counts as an interruption, as the signal may have ended a
            # loader or another rank.
            cause = Interrupted() if signals else error
            # A loader's error begins with a traceback. That of a loader that died may have no text.
            line = (str(cause) or repr(cause)).rpartition("UserError: ")[2]
            if not isinstance(cause, UserError):
                line = line.split("\n")[0]
                if not isinstance(cause, OSError) and not re.search(KNOWN, repr(cause)):
                    traceback.print_exc()
            # All ranks raise a CommandError, and a signal reaches all of them, so that rank 0 alone
            # prints these. An error of status 1 may be that of one rank, which prints it.
            status = getattr(cause, "status", 1)
            if RANK == 0 or RANKS == 1 or status == 1:
                print("hex.py: error:", one_line(line), file=sys.stderr)
            return status


if __name__ == "__main__":
    os._exit(main())                # at once, so that a late signal cannot change the status
