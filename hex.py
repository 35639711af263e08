# SPDX-License-Identifier: MIT
"""HEX: Hierarchical Emergence Exploitation in Self-Supervised Algorithms, in one file.

Kokilepersaud, Kim, Prabhushankar, AlRegib (WACV 2025, arXiv 2410.23200). DOCSTRING
"""
import contextlib
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

# --- The HEX loss ---------------------------------------------------------------------------------

_alone = False


def rank():
    """This process among the ranks that share a loss."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def world():
    """The number of ranks that share a loss."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


@contextlib.contextmanager
def alone(on=True):
    """Within, a loss is this rank's own: nothing is gathered."""
    global _alone
    before, _alone = _alone, on
    try:
        yield
    finally:
        _alone = before


class _Gather(torch.autograd.Function):
    """All ranks' rows; the backward sums over ranks what each of them wants of this rank's rows."""

    @staticmethod
    def forward(ctx, x):  # (M, ...) -> (world M, ...)
        out = x.new_empty(world() * len(x), *x.shape[1:])
        dist.all_gather_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(world())[rank()]


def gather(x):
    """Rows of all ranks, in rank order, with gradient. x: (M, ...) on each rank, equal M; returns (world M, ...)."""
    return _Gather.apply(x) if world() > 1 else x


def mean_over_ranks(x):
    """Mean of a detached tensor over ranks."""
    if world() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x / world()


def similarities(a, b):
    """Cosine of this rank's 2N / world anchors with all 2N embeddings (columns: every rank's a, then every rank's b).

    Returns cosine (2N / world, 2N) in [-1, 1], its masks of self and of positives (bool, same shape), s_ip and p(i), both
    (2N / world,). ValueError: shapes differ, or N < 2.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"a and b must be row-aligned (N, D) tensors, not {tuple(a.shape)} and {tuple(b.shape)}")
    if len(a) * world() < 2:
        raise ValueError("a contrastive loss needs at least 2 images: N = 1 leaves an anchor without negatives")
    with torch.autocast(a.device.type, enabled=False):
        a, b = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1) for x in (a, b))
        cosine = torch.cat([a, b]) @ torch.cat([gather(a), gather(b)]).T                        # (2N / world, 2N)
        s_p = (a * b).sum(1).repeat(2)                                                          # (2N / world,)
    column = torch.arange(cosine.shape[1], device=a.device)
    first = rank() * len(a) + column[:len(a)]
    second = first + len(column) // 2
    i, p = torch.cat([first, second]), torch.cat([second, first])
    return cosine, i[:, None] == column, p[:, None] == column, s_p, p


def without(logits, mask):
    """logits, in place, with -inf where mask is set. No autograd: a softmax gives those entries the gradient 0."""
    with torch.no_grad():
        return logits.masked_fill_(mask, -math.inf)


def info_nce(a, b, temperature=0.1):
    """InfoNCE (NT-Xent, Chen et al. 2020). a, b: (N / world, D), row-aligned, any scale; scalar, this rank's mean."""
    cosine, self_, _, _, p = similarities(a, b)
    return F.cross_entropy(without(cosine / temperature, self_), p)


def dcl(a, b, temperature=0.1):
    """Decoupled contrastive loss (Yeh et al. 2022): InfoNCE without the positive in the denominator."""
    cosine, self_, positive, s_p, _ = similarities(a, b)
    return (without(cosine / temperature, self_ | positive).logsumexp(1) - s_p / temperature).mean()


@torch.no_grad()
def adaptive_threshold(cosine, quantile=0.99, *, kept=None):
    """eps: the mean over rows of each row's quantile, the order statistic at round(quantile (k - 1)) of its k entries.

    cosine: (rows, columns); -inf entries are left out of a row. kept: (rows,) k, if the caller knows that it is not 0
    (it spares the check, for which a GPU would have to wait). Returns a scalar. ValueError: a row of nothing but -inf.
    """
    cosine = cosine.to(torch.promote_types(cosine.dtype, torch.float32))
    if kept is None:
        kept = count(cosine != -math.inf)
        if (kept == 0).any():
            raise ValueError("a row holds no entry but -inf: its quantile is not defined")
    columns = cosine.shape[1]
    largest = cosine.topk(columns - round(quantile * (columns - 1)), dim=1).values  # a partial sort is enough
    from_top = kept.double() - 1 - (quantile * (kept.double() - 1)).round()
    return largest.gather(1, from_top.long()[:, None]).mean()


def count(mask):
    """True entries of each row. (A plain sum(1) would copy the mask to int64, the largest tensor of the loss.)"""
    return mask.sum(1, dtype=torch.int32)


@dataclass(frozen=True)
class AdaptiveThreshold:
    """H: above the adaptive eps, which is taken over the entries `seen` and averaged over ranks (paper)."""
    quantile: float = 0.99

    def __call__(self, cosine, seen, epoch=0):
        eps = mean_over_ranks(adaptive_threshold(cosine.masked_fill(~seen, -math.inf), self.quantile, kept=count(seen)))
        return eps, cosine > eps


class _Schedule:
    """H: above a fixed schedule, where each row is rescaled from its minimum (0) to its maximum, the self (1)."""

    def __call__(self, cosine, seen, epoch=0):
        low, high = cosine.aminmax(dim=1, keepdim=True)
        return cosine.new_tensor(self.at(epoch)), (cosine - low) / (high - low) > self.at(epoch)


@dataclass(frozen=True)
class StepThreshold(_Schedule):
    """`start`, falling by `drop` every `every` epochs, not below 0 (paper)."""
    start: float = 0.9
    drop: float = 0.1
    every: int = 10

    def at(self, epoch):
        return max(0.0, self.start - self.drop * (epoch // self.every))


@dataclass(frozen=True)
class CosineThreshold(_Schedule):
    """From `start` to `end` over `epochs` by half a cosine (paper)."""
    start: float = 0.9
    end: float = 0.3
    epochs: int = 100

    def at(self, epoch):
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(epoch / max(1, self.epochs), 1))) / 2


@dataclass(frozen=True, eq=False)
class OracleHierarchy:
    """H: negatives of the same super-class. A diagnostic that is NOT self-supervised (ours). labels: (N / world,)."""
    labels: torch.Tensor

    def __call__(self, cosine, seen, epoch=0):
        mine, everyone = self.labels.repeat(2), gather(self.labels).repeat(2)
        if cosine.shape != (len(mine), len(everyone)):
            raise ValueError(f"{len(self.labels)} labels for a batch of {len(cosine) // 2} images: one an image")
        return cosine.new_tensor(math.nan), mine[:, None] == everyone


ADAPTIVE = AdaptiveThreshold(0.99)


@torch.no_grad()
def local_mask(a, b, threshold=ADAPTIVE, epoch=0):
    """eps (scalar) and H (bool, (2N / world, 2N)) of the embeddings a, b: (N / world, D)."""
    cosine, self_, positive, *_ = similarities(a, b)
    negative = ~(self_ | positive)
    eps, local = threshold(cosine, negative, epoch)
    return eps, local & negative


def hex_nce(a, b, temperature=0.1, *, threshold=ADAPTIVE, beta=1.0, tau_plus=0.1, released=False, epoch=0):
    """The HEX loss (equations: top of the file). a, b: (N / world, D), row-aligned, any scale.

    released: what the authors' public code computes instead (README). Returns this rank's mean loss (float32 or
    better), and detached scalars over all ranks: threshold, local (mean |H|), empty (share of anchors with none),
    clamped (share of the non-empty at the floor). ValueError: shapes differ, N < 2, beta < 0, tau_plus not in [0, 1).
    """
    if beta < 0 or not 0 <= tau_plus < 1:
        raise ValueError(f"beta = {beta} must be >= 0 and tau_plus = {tau_plus} in [0, 1)")
    tau = temperature
    cosine, self_, positive, s_p, p = similarities(a, b)
    negative = ~(self_ | positive)
    with torch.no_grad():
        eps, local = threshold(cosine, negative | released, epoch)     # the released quantile sees self and positive
        local = local & negative                                       # H(i); G(i) = negative & ~local
        size = count(local).to(cosine.dtype)                           # |H(i)|
    if released:
        loss, clamped = _released(cosine, negative & ~local, s_p, tau), size > 0
    else:
        pair = local.flatten().nonzero()[:, 0]                         # the K pairs in H, a few per cent of all: sparse
        row = pair // local.shape[1]                                   # (K,) their anchors
        s_h = cosine.flatten().index_select(0, pair) / tau             # (K,) their logits
        # the logarithm of e^{s_ip/tau} + sum over G: the positive's cross-entropy among positive and G, and s_ip/tau again
        rest = F.cross_entropy(without(cosine / tau, self_ | local), p, reduction="none") + s_p / tau
        with torch.no_grad():
            top = s_h.new_full(size.shape, -math.inf).scatter_reduce(0, row, s_h, "amax")
            scale = torch.maximum(rest, top)                           # e^{1/tau} overflows float32 at tau = 0.02
            q = (beta * (s_h - top[row])).exp()
            q *= (size / q.new_zeros(size.shape).index_add(0, row, q))[row]          # Q_ih: mean 1 over H(i)
        repel = s_h.new_zeros(size.shape).index_add(0, row, q * (s_h - scale[row]).exp())
        debiased = (repel - tau_plus * size * (s_p / tau - scale).exp()) / (1 - tau_plus)
        floor = size * (-1 / tau - scale).exp()
        clamped = debiased < floor
        L = torch.where(clamped, floor, debiased)                      # not maximum: at the floor no gradient at all
        loss = scale + ((rest - scale).exp() + L).log() - s_p / tau
    share = mean_over_ranks(torch.stack([x.to(cosine.dtype).mean() for x in (size, size == 0, clamped & (size > 0))]))
    stats = dict(threshold=eps, local=share[0], empty=share[1], clamped=share[2] / (1 - share[1]).clamp_min(1e-9))
    return loss.mean(), stats


def _released(cosine, rest, s_p, tau):
    """The authors' code: the local term is a constant outside the logarithm, the positive leaves the denominator."""
    no_rest = ~rest.any(1)
    logits = (cosine / tau).masked_fill_(~rest, torch.finfo(cosine.dtype).min / 2)    # finite: no NaN if G is empty
    return logits.logsumexp(1).masked_fill(no_rest, 0) - s_p / tau + (cosine.shape[1] - 2) * math.exp(-1 / tau)


import argparse
import copy
import difflib
import fcntl
import hashlib
import inspect
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import namedtuple
from dataclasses import asdict, field, fields

import numpy
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

# --- SSL methods and the wrapper ------------------------------------------------------------------


def group_norm(channels):
    """GroupNorm, 16 channels a group where they divide: independent of how a batch is split."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 16)), channels)


def mlp(*widths, norm=None, last_norm=None):
    """Linear - norm - ReLU blocks and a last Linear, then last_norm. norm: channels -> module."""
    layers = []
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:])):
        last = i == len(widths) - 2
        normalize = last_norm if last else norm
        layers.append(nn.Linear(fan_in, fan_out, bias=normalize is None))
        if normalize is not None:
            layers.append(normalize(fan_out))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class Method(nn.Module):
    """Base of the methods: a projector z, and where a method has them a predictor p and a target t.

    backbone: (B, 3, S, S) -> (B, width). alpha, scale: the weight and the factor of HEX beside the
    method's own loss (alpha 1: HEX takes its place). steps, losses: of the whole run, and of this
    rank in a step; the training loop sets them.
    """
    alpha, scale, steps, losses = 0.1, 1.0, None, 1

    def __init__(self, backbone, projector, predictor=None, momentum=False):
        super().__init__()
        self.backbone, self.projector, self.predictor = backbone, projector, predictor
        self.target = None
        if momentum:
            self.target = copy.deepcopy(nn.Sequential(backbone, projector)).requires_grad_(False)

    def forward(self, x1, x2):
        """Two views (N, 3, S, S) -> [p1, p2,] z1, z2 [, t1, t2], each (N, dim).

        Both views go through in one pass: one BatchNorm batch, one use of the weights for DDP.
        """
        x = torch.cat([x1, x2])
        z = self.projector(self.backbone(x))
        outputs = [z] if self.predictor is None else [self.predictor(z), z]
        if self.target is not None:
            with torch.no_grad():
                outputs.append(self.target(x))
        return tuple(half for output in outputs for half in output.chunk(2))

    def loss(self, *embeddings):
        """float32 embeddings -> own loss (scalar), row-aligned pairs [(a, b), ...] for HEX."""
        raise NotImplementedError

    def after_step(self, step):
        """EMA, queue: after an optimizer step that was really taken. step: its number, from 1."""


class SimCLR(Method):
    """Chen et al. 2020. The projector of HEX's authors: 2048-2048-128 without BatchNorm."""
    alpha = 1.0

    def __init__(self, backbone, width, *, hidden=2048, dim=128, norm=nn.BatchNorm1d, temperature=0.1):
        super().__init__(backbone, mlp(width, hidden, dim))
        self.temperature = temperature

    def loss(self, z1, z2):
        return info_nce(z1, z2, self.temperature), [(z1, z2)]


def one_way_nce(a, b, temperature):
    """InfoNCE with the other view's negatives alone: a_i against every b_j. (N / world, D) each."""
    logits = F.normalize(a) @ F.normalize(gather(b)).T / temperature        # (N / world, N)
    return F.cross_entropy(logits, rank() * len(a) + torch.arange(len(a), device=a.device))


class NNCLR(Method):
    """Dwibedi et al. 2021: an anchor is its nearest neighbor in a queue of past embeddings."""
    alpha = 1.0

    def __init__(self, backbone, width, *, hidden=2048, dim=256, predictor=4096, queue=98304,
                 norm=nn.BatchNorm1d, temperature=0.1):
        super().__init__(backbone, mlp(width, hidden, hidden, dim, norm=norm, last_norm=norm),
                         mlp(dim, predictor, dim, norm=norm))
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim)))
        self.register_buffer("head", torch.zeros((), dtype=torch.long))     # where the next ones go
        self.temperature, self.latest = temperature, []

    def nearest(self, z):
        return self.queue.index_select(0, (F.normalize(z.detach()) @ self.queue.T).argmax(1))

    def loss(self, p1, p2, z1, z2):
        self.latest = [z1.detach()]
        pairs = [(self.nearest(z1), p2), (self.nearest(z2), p1)]
        return sum(one_way_nce(a, b, self.temperature) for a, b in pairs) / 2, pairs

    @torch.no_grad()
    def after_step(self, step):
        """Pushes the embeddings of all ranks, so that the queue is the same everywhere."""
        z = F.normalize(gather(self.latest[0])).to(self.queue.dtype)[-len(self.queue):]
        slots = (self.head + torch.arange(len(z), device=z.device)) % len(self.queue)
        self.queue.index_copy_(0, slots, z)
        self.head.copy_((self.head + len(z)) % len(self.queue))


class Momentum(Method):
    """A target that follows backbone and projector; its momentum rises from `ema` to 1 (a cosine).

    Its BatchNorm statistics are those of its own passes, not copies: its weights lag behind.
    """

    def __init__(self, backbone, projector, predictor, ema):
        super().__init__(backbone, projector, predictor, momentum=True)
        self.ema = ema

    @torch.no_grad()
    def after_step(self, step):
        done = step / self.steps if self.steps else 0
        momentum = 1 - (1 - self.ema) * (math.cos(math.pi * done) + 1) / 2
        online = nn.Sequential(self.backbone, self.projector)
        torch._foreach_lerp_(list(self.target.parameters()), list(online.parameters()), 1 - momentum)


class MoCoV3(Momentum):
    """Chen et al. 2021. HEX on it is our extension."""
    alpha = 1.0

    def __init__(self, backbone, width, *, hidden=4096, dim=256, predictor=4096, ema=0.99,
                 norm=nn.BatchNorm1d, temperature=1.0):
        super().__init__(backbone, mlp(width, hidden, dim, norm=norm, last_norm=norm),
                         mlp(dim, predictor, dim, norm=norm, last_norm=norm), ema)
        self.temperature = temperature

    def loss(self, q1, q2, z1, z2, k1, k2):
        t, pairs = self.temperature, [(q1, k2), (q2, k1)]
        return sum(2 * t * one_way_nce(q, k, t) for q, k in pairs), pairs


class BYOL(Momentum):
    """Grill et al. 2020. HEX on it, between the online projections, is our extension."""

    def __init__(self, backbone, width, *, hidden=4096, dim=256, predictor=4096, ema=0.99,
                 norm=nn.BatchNorm1d):
        super().__init__(backbone, mlp(width, hidden, dim, norm=norm),
                         mlp(dim, predictor, dim, norm=norm), ema)

    def loss(self, p1, p2, z1, z2, t1, t2):
        similarity = F.cosine_similarity(p1, t2).mean(), F.cosine_similarity(p2, t1).mean()
        return 4 - 2 * similarity[0] - 2 * similarity[1], [(z1, z2)]


class SimSiam(Method):
    """Chen and He 2021. HEX on it, between the projections, is our extension."""

    def __init__(self, backbone, width, *, hidden=2048, dim=2048, predictor=512, norm=nn.BatchNorm1d):
        super().__init__(backbone, mlp(width, hidden, hidden, dim, norm=norm, last_norm=norm),
                         mlp(dim, predictor, dim, norm=norm))

    def loss(self, p1, p2, z1, z2):
        t1, t2 = z1.detach(), z2.detach()
        own = -(F.cosine_similarity(p1, t2).mean() + F.cosine_similarity(p2, t1).mean()) / 2
        return own, [(z1, z2)]


class BarlowTwins(Method):
    """Zbontar et al. 2021: the cross-correlation of the views, over all ranks, is the identity.

    off_weight and factor as in the code that HEX's authors built on.
    """
    off_weight, factor = 0.0051, 0.024

    def __init__(self, backbone, width, *, hidden=8192, dim=8192, norm=nn.BatchNorm1d):
        super().__init__(backbone, mlp(width, hidden, hidden, dim, norm=norm))

    def loss(self, z1, z2):
        a, b = (F.batch_norm(gather(z), None, None, training=True) for z in (z1, z2))   # (N, dim)
        c = a.T @ b / len(a)                                                            # (dim, dim)
        on_diagonal = (c.diagonal() - 1).square().sum()
        off_diagonal = c.square().sum() - c.diagonal().square().sum()
        return self.factor * (on_diagonal + self.off_weight * off_diagonal), [(z1, z2)]


class VICReg(Method):
    """Bardes et al. 2022: invariance, variance, covariance; the last two over all ranks."""
    scale = 5.0

    def __init__(self, backbone, width, *, hidden=8192, dim=8192, norm=nn.BatchNorm1d):
        super().__init__(backbone, mlp(width, hidden, hidden, dim, norm=norm))

    def loss(self, z1, z2):
        a, b = gather(z1), gather(z2)                                                   # (N, dim)
        invariance = F.mse_loss(a, b)
        variance = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (a, b))
        covariance = 0.0
        for z in (a - a.mean(0), b - b.mean(0)):
            c = z.T @ z / (len(z) - 1)                                                  # (dim, dim)
            covariance = covariance + (c.square().sum() - c.diagonal().square().sum()) / len(c)
        return 25 * invariance + 25 * variance + covariance, [(z1, z2)]


METHODS = {"simclr": SimCLR, "nnclr": NNCLR, "mocov3": MoCoV3, "byol": BYOL, "simsiam": SimSiam,
           "barlow": BarlowTwins, "vicreg": VICReg}
LOSSES = ("base", "infonce", "dcl", "hex", "released")


class HEX(nn.Module):
    """The wrapper: loss = (1 - alpha) own + alpha scale mean over pairs of F(a, b), F by `loss`.

    method: a Method, or any module with its forward and loss (after_step is optional). alpha, scale:
    the method's by default, else 0.1 and 1. The first `warmup` epochs use the method's own loss.
    ValueError: an unknown loss; a forward that returns a bare tensor; a loss without pairs.
    """

    def __init__(self, method, loss="hex", *, alpha=None, scale=None, temperature=0.1,
                 threshold=ADAPTIVE, beta=1.0, tau_plus=0.1, warmup=0):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss = {loss!r} is not one of {', '.join(LOSSES)}")
        self.method, self.name, self.threshold, self.warmup = method, loss, threshold, warmup
        self.alpha = getattr(method, "alpha", 0.1) if alpha is None else alpha
        self.scale = getattr(method, "scale", 1.0) if scale is None else scale
        self.temperature, self.beta, self.tau_plus = temperature, beta, tau_plus

    def forward(self, x1, x2):
        embeddings = self.method(x1, x2)
        if isinstance(embeddings, torch.Tensor):
            raise ValueError("the method's forward returned a bare tensor: return a tuple of embeddings")
        return embeddings

    def loss(self, *embeddings, epoch=0, threshold=None):
        """-> loss (scalar), stats (detached scalars). threshold: this batch's (the oracle's labels)."""
        with torch.autocast(embeddings[0].device.type, enabled=False):
            embeddings = [e.to(torch.promote_types(e.dtype, torch.float32)) if e.is_floating_point() else e
                          for e in embeddings]
            own, pairs = self.method.loss(*embeddings)
            own = torch.as_tensor(own, device=embeddings[0].device)
            stats = {"own": own.detach()}
            if self.name == "base" or epoch < self.warmup:
                loss = own
            elif not pairs:
                raise ValueError(f"loss = {self.name!r} needs pairs (a, b): the method's loss gave none")
            else:
                own = own.detach() if self.alpha == 1 else own      # frees its graph before the next
                terms = [self.term(a, b, epoch, threshold or self.threshold) for a, b in pairs]
                term = sum(value for value, _ in terms) / len(terms)
                for key in terms[0][1]:
                    stats[key] = sum(more[key] for _, more in terms) / len(terms)
                stats[self.name] = term.detach()
                loss = self.alpha * self.scale * term + (1 - self.alpha) * own
            # Every output takes part, if with weight 0: DDP waits for each parameter's gradient.
            return loss + sum(0 * e.sum() for e in embeddings if e.requires_grad), stats

    def term(self, a, b, epoch, threshold):
        """F(a, b) -> (scalar, stats)."""
        if self.name in ("infonce", "dcl"):
            return {"infonce": info_nce, "dcl": dcl}[self.name](a, b, self.temperature), {}
        return hex_nce(a, b, self.temperature, threshold=threshold, beta=self.beta, tau_plus=self.tau_plus,
                       released=self.name == "released", epoch=epoch)

    def after_step(self, step):
        getattr(self.method, "after_step", lambda step: None)(step)


class NarrowResNet(torchvision.models.ResNet):
    """ResNet-10 with `width` channels where ResNets have 64, and SiLU: a backbone for a CPU.

    SiLU, since the kinks of ReLU turn rounding (1e-7) into differences of 1e-2 between one and two ranks in 20 steps.
    """

    def __init__(self, width=16, norm_layer=nn.BatchNorm2d):
        self.share = 64 // width
        super().__init__(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), norm_layer(width)
        self.fc = nn.Linear(8 * width, 1000)
        for module in self.modules():
            if hasattr(module, "relu"):
                module.relu = nn.SiLU()

    def _make_layer(self, block, planes, *arguments, **named):
        self.inplanes = self.inplanes if planes > 64 else 64 // self.share
        return super()._make_layer(block, planes // self.share, *arguments, **named)


class UserError(Exception):
    """Something the user can mend: one line that says how. status: 1 what the run met, 2 the command."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def build_backbone(name, size=224, norm="batch"):
    """A torchvision classifier by name without its last Linear -> (module, number of features).

    ResNets get a 3x3 stem without max-pool for views of 64 pixels or less. UserError: unusable.
    """
    if name == "pixels":                                    # the raw pixels, to hold a probe against
        return nn.Flatten(), 3 * size * size
    models = {m: torchvision.models.get_model_builder(m)
              for m in torchvision.models.list_models(module=torchvision.models)}
    models["resnet10_narrow"] = NarrowResNet
    if name not in models:
        near = difflib.get_close_matches(name, models, 4, 0.4) or ["resnet18", "resnet50"]
        raise UserError(f"--backbone {name}: unknown; near matches: {', '.join(near)}", 2)
    resnet = name == "resnet10_narrow" or models[name].__module__.endswith("resnet")
    kind = {}
    if norm == "group":
        if not resnet:
            raise UserError(f"--norm group: only ResNets take it, not {name}; use --norm batch", 2)
        kind["norm_layer"] = group_norm
    if name.startswith("vit_"):
        kind["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        kind.update(aux_logits=False, init_weights=True)
    try:
        model = models[name](**kind)
        linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linears:
            raise ValueError("it has no Linear classifier to remove")
        width = model.get_submodule(linears[-1]).in_features
        model.set_submodule(linears[-1], nn.Identity())
        if resnet and size <= 64:
            stride = 2 if isinstance(model, NarrowResNet) else 1
            model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, stride, 1, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
            model.maxpool = nn.Identity()
        with torch.no_grad():
            shape = copy.deepcopy(model).eval()(torch.zeros(2, 3, size, size)).shape
        if shape != (2, width):
            raise ValueError(f"it gives features of shape {tuple(shape[1:])}, not {width}")
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        raise UserError(f"--backbone {name}: cannot work at --size {size} ({str(error).splitlines()[0]}); "
                        "use resnet18", 2) from error
    return model, width


# --- Data and augmentation ------------------------------------------------------------------------

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                        # mean and deviation
CIFAR100_SUPER = [  # super-class of each of CIFAR-100's classes (Krizhevsky 2009)
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7,
    6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10,
    16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16,
    12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13]


def rng_of(*key):
    """A random generator that depends on the key alone."""
    return random.Random(" ".join(map(str, key)))


def permutation(count, *key):
    return torch.randperm(count, generator=torch.Generator().manual_seed(rng_of(*key).getrandbits(63)))


class Pictures:
    """uint8 pictures (n, 3, H, W) in memory, with fine labels (n,) and coarse ones, or None."""

    def __init__(self, pictures, targets, coarse=None):
        self.pictures, self.targets, self.coarse = pictures, targets, coarse

    def __len__(self):
        return len(self.pictures)

    def read(self, index):
        return self.pictures[index]

    def identity(self):
        """What tells these data from others: the bytes."""
        return self.pictures.numpy().tobytes() + self.targets.numpy().tobytes()


class Folder:
    """ROOT/<class>/**: every file is a picture. Hidden files and folders (.name) are left out.

    labelled=False: ROOT/**, targets None. only: names of the classes to use.
    """
    coarse = None

    def __init__(self, root, labelled=True, only=None):
        def unreadable(error):
            raise UserError(f"{error.filename}: the folder cannot be read ({error.strerror})") from error

        self.root, self.files, self.classes, self.targets = root, [], [], None
        for folder, inside, names in os.walk(root, onerror=unreadable, followlinks=True):
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            prefix = os.path.relpath(folder, root)
            self.files += [os.path.normpath(os.path.join(prefix, name)) for name in sorted(names)
                           if not name.startswith(".")]
        if labelled:
            class_of = {file: file.split(os.sep)[0] for file in self.files if os.sep in file}
            found = set(class_of.values())
            for name in only or []:
                if name not in found:
                    raise UserError(f"--classes: {root} has no folder {name} with pictures")
            self.classes = sorted(only or found)
            label = {name: i for i, name in enumerate(self.classes)}
            self.files = [file for file, name in class_of.items() if name in label]
            self.targets = torch.tensor([label[class_of[file]] for file in self.files], dtype=torch.long)

    def __len__(self):
        return len(self.files)

    def read(self, index):
        """(3, H, W) uint8, upright. UserError: it cannot be read.

        JPEG by torchvision, twice as fast as Pillow; all else by Pillow: torchvision's PNG decoder
        ends the process on some damaged files.
        """
        path = os.path.join(self.root, self.files[index])
        try:
            with open(path, "rb") as file:
                data = file.read()
            if data[:2] == b"\xff\xd8":
                with warnings.catch_warnings(action="ignore"):              # they will move to TorchCodec
                    return torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8),
                                                      mode="RGB", apply_exif_orientation=True)
            picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            if picture.mode.startswith("I;16"):
                picture = Image.fromarray((numpy.asarray(picture) // 257).astype(numpy.uint8))
            return torch.from_numpy(numpy.array(picture.convert("RGB"))).permute(2, 0, 1)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{path}: not a readable picture ({reason}): mend the file, or give "
                            "--skip-bad-files") from None

    def identity(self):
        """What tells these data from others: the names, wherever ROOT lies."""
        return os.fsencode("\0".join([*self.classes, "", *self.files]))


def draw_shapes(count, seed):
    """The embedded data set: `count` 32x32 pictures of 12 kinds: polygon, star, flower, frame of 3, 4, 6 corners.

    Colors, place, size, angle and background are random: only shape tells. Fine label: kind; coarse: family.
    """
    g = torch.Generator().manual_seed(seed)
    kind = torch.arange(count) % 12
    family, corners = kind // 3, torch.tensor([3.0, 4.0, 6.0])[kind % 3, None, None]

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=g)

    axis = torch.linspace(-1, 1, 64)                                        # drawn at 64 pixels, halved below
    x, y = (axis.view(shape) - uniform(-0.2, 0.2, 1, 1) for shape in ((1, 1, -1), (1, -1, 1)))
    radius = torch.hypot(x, y) / uniform(0.5, 0.8, 1, 1)
    angle = torch.atan2(y, x) + uniform(0, 2 * math.pi, 1, 1)
    half = math.pi / corners                                                # half the angle of a sector
    phi = (angle % (2 * half) - half).abs()                                 # 0 between corners, `half` at one
    polygon = half.cos() / phi.cos()
    star = 0.4 * half.sin() / (0.4 * phi.sin() + (half - phi).sin())        # straight from corner to notch
    flower = 0.65 - 0.35 * (corners * angle).cos()
    edge = torch.stack([polygon, star, flower, polygon])[family, torch.arange(count)]
    hole = (family == 3)[:, None, None] & (radius < 0.6 * edge)
    inside = F.avg_pool2d(((radius < edge) & ~hole).float()[:, None], 2)    # (count, 1, 32, 32)
    dark, bright = uniform(0, 0.35, 3, 1, 1), uniform(0.65, 1, 3, 1, 1)     # seen without color, too
    swap = uniform(0, 1, 1, 1, 1) < 0.5
    back, ink = torch.where(swap, dark, bright), torch.where(swap, bright, dark)
    ramp = uniform(-0.2, 0.2, 3, 1, 1) * axis[::2] + uniform(-0.05, 0.05, 3, 32, 32)
    pictures = torch.lerp(back + ramp, ink, inside).clamp(0, 1)
    return Pictures((255 * pictures).byte(), kind, family)


def load_cifar(cfg):
    """CIFAR-10 or -100 from its archive; the first process of a machine downloads it."""
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[cfg.data]
    coarse, splits = torch.tensor(CIFAR100_SUPER) if cfg.data == "cifar100" else None, []
    root, first = cfg.root or "data", process().local_rank == 0
    for download in (True, False):
        if download == first:
            try:
                splits = [kind(root, train=train, download=download) for train in (True, False)]
            except (OSError, RuntimeError) as error:
                raise UserError(f"--data {cfg.data} --root {root}: cannot get it ({error}); put its archive, "
                                f"{kind.filename}, into {root}") from error
        if process().ranks > 1:
            dist.barrier()
    return [Pictures(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets),
                     None if coarse is None else coarse[split.targets]) for split in splits]


def load_data(cfg):
    """-> train, val: each with len, read(index), targets (tensor or None), coarse, identity()."""
    if cfg.data == "shapes":
        return draw_shapes(4096, 0), draw_shapes(1024, 1)
    if cfg.data in ("cifar10", "cifar100"):
        return load_cifar(cfg)
    try:
        only = cfg.classes and set(open(cfg.classes, encoding="utf-8-sig").read().splitlines()) - {""}
    except (OSError, ValueError) as error:
        raise UserError(f"--classes {cfg.classes}: cannot be read ({error})", 2) from error
    for split in ("train", "val"):
        if not os.path.isdir(os.path.join(cfg.root, split)):
            raise UserError(f"--root {cfg.root}: there is no folder {split}/ in it: expected "
                            "ROOT/train/<class>/* and ROOT/val/<class>/*", 2)
    train, val = (Folder(os.path.join(cfg.root, split), only=only) for split in ("train", "val"))
    differing = sorted(set(train.classes) ^ set(val.classes))
    if differing or not train.classes:
        raise UserError(f"--root {cfg.root}: train/ and val/ must hold the same class folders, with pictures "
                        f"(a flat val/ is sorted by valprep.sh); not so: {', '.join(differing[:5]) or 'none at all'}")
    return train, val


def random_crop(rng, height, width, smallest):
    """Inception's crop -> top, left, height, width: share in [smallest, 1], ratio in [3/4, 4/3], 10 tries."""
    for _ in range(10):
        area = height * width * rng.uniform(smallest, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    h, w = min(height, max(1, round(width * 4 / 3))), min(width, max(1, round(height * 4 / 3)))
    return (height - h) // 2, (width - w) // 2, h, w


class Views(torch.utils.data.Dataset):
    """(epoch, index) -> crops (views, 3, size, size) uint8, parameters (views, 8), index, index that was read.

    A pure function of (seed, epoch, index, view): worker, rank, batch size and resume do not enter. The
    device applies the parameters (`augment`). views=0: one centre crop. skip: an unreadable picture is
    replaced by the next that can be read, with a line on stderr.
    """

    def __init__(self, pictures, size, *, views=2, seed=0, crop_min=0.08, blur=0.0, solarize=0.0, grayscale=0.2,
                 color=True, skip=False):
        self.pictures, self.size, self.views, self.seed, self.crop_min = pictures, size, views, seed, crop_min
        self.blur, self.solarize, self.grayscale, self.color, self.skip = blur, solarize, grayscale, color, skip

    def __len__(self):
        return len(self.pictures)

    def read(self, index):
        for used in [*range(index, len(self)), *range(index)] if self.skip else [index]:
            try:
                return self.pictures.read(used), used
            except UserError as error:
                if not self.skip:
                    raise
                print(f"hex.py: skipped {clean(error)}", file=sys.stderr, flush=True)
        raise UserError("no file of the data can be read")

    def __getitem__(self, key):
        epoch, index = key
        picture, used = self.read(index)
        if not self.views:
            side = self.size if self.size <= 64 else self.size * 256 // 224
            crop = TF.center_crop(TF.resize(picture, [side], antialias=True), [self.size, self.size])
            return crop[None], torch.tensor([[0.0, 1, 1, 1, 0, 0, 0, 0]]), index, used
        crops, parameters = zip(*(self.view(picture, rng_of(self.seed, epoch, index, view))
                                  for view in range(self.views)))
        return torch.stack(crops), torch.tensor(parameters, dtype=torch.float32), index, used

    def view(self, picture, rng):
        top, left, height, width = random_crop(rng, *picture.shape[1:], self.crop_min)
        crop = TF.resized_crop(picture, top, left, height, width, [self.size, self.size], antialias=True)
        flip, jitter, gray, blur, solarize = (rng.random() for _ in range(5))
        factors = [rng.uniform(0.2, 1.8) for _ in range(3)] + [rng.uniform(-0.2, 0.2)]
        sigma = rng.uniform(0.1, 2.0)
        return crop, [flip < 0.5, *(factors if self.color and jitter < 0.8 else (1, 1, 1, 0)),
                      self.color and gray < self.grayscale, sigma if blur < self.blur else 0,
                      solarize < self.solarize]


def luminance(x):
    """(B, 3, H, W) -> (B, 1, H, W)."""
    return (x * x.new_tensor((0.2989, 0.587, 0.114)).view(3, 1, 1)).sum(-3, keepdim=True)


def shift_hue(x, shift):
    """x: (B, 3, H, W) in [0, 1]; shift: (B, 1, 1), in turns of the color circle."""
    value, chroma, (r, g, b) = x.amax(1), x.amax(1) - x.amin(1), x.unbind(1)
    safe = torch.where(chroma == 0, 1, chroma)
    sixth = torch.where(value == r, (g - b) / safe,
                        torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    k = (torch.stack([5 + sixth, 3 + sixth, 1 + sixth], 1) + 6 * shift[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma, kernel):
    """Each picture of x (B, C, H, W) with its own sigma (B,), 0 for none; reflected at the border."""
    B, C, H, W = x.shape
    offset = torch.arange(kernel, device=x.device) - kernel // 2
    weight = (-(offset / sigma.clamp_min(1e-4)[:, None]).square() / 2).softmax(1).repeat_interleave(C, 0)  # (B C, k)
    x = F.pad(x.reshape(1, B * C, H, W), [kernel // 2] * 4, mode="reflect")
    x = F.conv2d(x, weight[:, None, :, None], groups=B * C)
    return F.conv2d(x, weight[:, None, None, :], groups=B * C).view(B, C, H, W)


@torch.no_grad()
def augment(crops, parameters, *, color=True, blur=False, solarize=False):
    """Crops (B, 3, S, S) uint8 and their parameters (B, 8) -> normalized float views, the whole batch at once."""
    flip, brightness, contrast, saturation, hue, gray, sigma, inverse = parameters.T[..., None, None, None]
    x = crops.float() / 255
    x = torch.where(flip > 0, x.flip(-1), x)
    if color:
        x = (x * brightness).clamp(0, 1)
        x = torch.lerp(luminance(x).mean((-3, -2, -1), keepdim=True), x, contrast).clamp(0, 1)
        x = torch.lerp(luminance(x), x, saturation).clamp(0, 1)
        x = shift_hue(x, hue[:, 0])
        x = torch.where(gray > 0, luminance(x), x)
    if blur:
        x = gaussian_blur(x, sigma.flatten(), min(23, crops.shape[-1] // 10 | 1))
    if solarize:
        x = torch.where((inverse > 0) & (x >= 0.5), 1 - x, x)
    mean, deviation = IMAGENET
    x = (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(deviation).view(3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def batches(indices, size, *key, epochs, start=0, group=1, part=(0, 1), every=(0, 1)):
    """This rank's batches, lists of (epoch, index), from batch `start` of the run to the end of `epochs`.

    Batch k of an epoch is order[k size : (k + 1) size]; the order is of (key, epoch) alone. group: an epoch
    has a multiple of it, the rest is dropped. part: (r, W), this rank's W-th of each batch. every: (r, W),
    only the batches k with k mod W = r.
    """
    count, (r, W) = len(indices) // size // group * group, part
    for number in range(start, epochs * count):
        epoch, k = divmod(number, count)
        if k == 0 or number == start:
            order = indices[permutation(len(indices), *key, epoch)].tolist()
        if k % every[1] == every[0]:
            first = k * size + r * size // W
            yield [(epoch, i) for i in order[first:first + size // W]]


def detach_worker(_):
    """A loader process leaves signals to the run: what stops the run must not stop it before the step ends."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def loader(views, batches, cfg, workers=None):
    """Yields what Views gives, stacked.

    Loader processes are spawned: a fork beside running threads (autograd's, gloo's, CUDA's) now and then
    never returns.
    """
    workers = cfg.workers if workers is None else workers
    return torch.utils.data.DataLoader(
        views, batch_sampler=batches, num_workers=workers, pin_memory=cfg.device == "cuda",
        worker_init_fn=detach_worker, multiprocessing_context="spawn" if workers else None)


def train_views(pictures, cfg, seed):
    """The two views of each picture, as the configuration asks for them."""
    return Views(pictures, cfg.size, seed=seed, crop_min=cfg.crop_min, blur=cfg.blur, solarize=cfg.solarize,
                 grayscale=cfg.grayscale, skip=cfg.skip_bad_files)


# --- Optimizer and schedule -----------------------------------------------------------------------


class LARS(torch.optim.Optimizer):
    """You et al. 2017: SGD with momentum whose rate is scaled, tensor by tensor, by eta |w| / (|g| + decay |w|).

    Tensors of one dimension (biases, norms) are neither decayed nor scaled. clip: the factor is at most
    1 / lr (the authors' setting, with eta 0.02; common for ImageNet is eta 0.001 without).
    """

    def __init__(self, params, lr, *, momentum=0.9, weight_decay=0.0, eta=0.02, clip=True):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta, clip=clip))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            for adapt in (True, False):
                params = [p for p in group["params"] if p.grad is not None and (p.ndim > 1) == adapt]
                if not params:
                    continue
                grads = [p.grad for p in params]
                if adapt:
                    w, g = (torch.stack(torch._foreach_norm(each)) for each in (params, grads))
                    factor = group["eta"] * w / (g + decay * w + 1e-8)
                    factor = (factor / lr).clamp(max=1) if group["clip"] else factor
                    factor = torch.where((w > 0) & (g > 0), factor, 1)
                    grads = torch._foreach_add(grads, params, alpha=decay)
                    torch._foreach_mul_(grads, list(factor.unbind()))
                velocity = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                torch._foreach_mul_(velocity, group["momentum"])
                torch._foreach_add_(velocity, grads)
                torch._foreach_add_(params, velocity, alpha=-lr)
        return loss


def learning_rate(step, total, warmup, peak):
    """Linear over `warmup` steps to `peak`, then half a cosine to 0 at `total`. step: from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


# --- Evaluation -----------------------------------------------------------------------------------

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)     # of the probe's heads, trained side by side


def autocast(cfg):
    kind = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.amp]
    return torch.autocast(cfg.device, dtype=kind, enabled=cfg.amp != "off")


@torch.no_grad()
def features(backbone, pictures, indices, cfg):
    """Features of centre crops, on every rank: (n, width) float32; and kept (n,) bool, False: the file was bad.

    Each rank reads a run of the indices, the last padded to the same length. UserError: not finite.
    """
    share = math.ceil(len(indices) / world())
    mine = indices[(rank() * share + torch.arange(share)).clamp(max=len(indices) - 1)]
    views, rows, kept = Views(pictures, cfg.size, views=0, skip=cfg.skip_bad_files), [], []
    parts = [[(0, i) for i in part.tolist()] for part in mine.split(256)]
    for crops, parameters, index, used in loader(views, parts, cfg, workers=0 if len(parts) <= 16 else None):
        with autocast(cfg):
            x = augment(crops[:, 0].to(cfg.device), parameters[:, 0].to(cfg.device), color=False)
            rows.append(backbone(x).float())
        kept.append(index == used)
    rows, kept = gather(torch.cat(rows))[:len(indices)], gather(torch.cat(kept).to(cfg.device))[:len(indices)]
    if not kept.any():
        raise UserError(f"none of {len(indices)} pictures could be read: mend the files")
    if not rows.isfinite().all():
        raise UserError("the backbone's features are not finite: its numbers would mean nothing")
    return rows[kept], kept.cpu()


def nearest_neighbors(bank, labels, queries, truth, k=20, temperature=0.07):
    """k-NN by cosine, votes weighted by e^{s/0.07} (Wu et al. 2018) -> (n,) bool: which queries are right."""
    bank, labels, right = F.normalize(bank), labels.to(bank.device), []
    for rows, answers in zip(F.normalize(queries).split(256), truth.to(bank.device).split(256)):
        near, index = (rows @ bank.T).topk(min(k, len(bank)))
        votes = near.new_zeros(len(rows), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[index], (near / temperature).exp())
        right.append(votes.argmax(1) == answers)
    return torch.cat(right)


def place_in_class(targets):
    """For each entry: how many of its class stand before it."""
    order, counts = targets.argsort(stable=True), targets.bincount()
    place = torch.empty_like(targets)
    place[order] = torch.arange(len(targets)) - (counts.cumsum(0) - counts)[targets[order]]
    return place


def labelled_pictures(cfg, train):
    """Indices of the train pictures whose labels the probe may see: all, or a class-balanced share."""
    if not cfg.label_fraction:
        return torch.arange(len(train))
    classes, total = int(train.targets.max()) + 1, round(cfg.label_fraction * len(train))
    if total < classes:
        raise UserError(f"--label-fraction {cfg.label_fraction}: {total} labels for {classes} classes leave a "
                        f"class empty; give at least {math.ceil(1e6 * classes / len(train)) / 1e6}", 2)
    order = permutation(len(train), "labels")
    targets = train.targets[order]                              # in turn, one of each class that has more
    turn = place_in_class(targets) * classes + permutation(classes, "labels")[targets]
    return order[turn.argsort()[:total]].sort().values


def digest(state):
    """SHA-256 of tensors."""
    parts = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous().view(-1)
        parts.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    return parts.hexdigest()


def linear_probe(backbone, cfg, train, val):
    """The linear probe and k-NN on a frozen backbone -> what probe.json holds; accuracies in percent.

    Heads of every rate of RATES are trained side by side (SGD, batch 256, a tenth at 60 % and 80 %, decay
    1e-5: the authors' probe), on cached features of centre crops, or for ImageNet on crops and flips. The
    head that is best on a tenth of the labelled train pictures, which none was trained on, is run on val.
    """
    started, before = time.time(), digest(backbone.state_dict())
    backbone.to(cfg.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    labelled = labelled_pictures(cfg, train)
    mark = hashlib.sha256(labelled.numpy().tobytes()).hexdigest()[:16]
    labelled = labelled[permutation(len(labelled), cfg.seed, "holdout")]
    targets = train.targets[labelled]
    of_class = targets.bincount()
    held = place_in_class(targets) < (of_class // 10).clamp_min(1).minimum(of_class - 1)[targets]
    fit, hold = labelled[~held], labelled[held]
    if not len(hold):
        announce("warning: no class has two labelled pictures, one to hold out: "
                 "the probe's rate is chosen on pictures it saw")
        hold = fit
    x_val, kept = features(backbone, val, torch.arange(len(val)), cfg)
    y_val = val.targets[kept].to(cfg.device)
    bank = fit[:262144]                                         # of k-NN: what fits into a GPU's memory
    x_fit, kept = features(backbone, train, bank, cfg)
    y_fit = train.targets[bank[kept]].to(cfg.device)
    x_hold, kept = features(backbone, train, hold, cfg)
    y_hold = train.targets[hold[kept]].to(cfg.device)

    cached = cfg.data != "imagenet"
    rows = torch.arange(len(x_fit)) if cached else fit
    size = max(1, min(256, len(rows)) // world()) * world()
    source = batches(rows, size, cfg.seed, "probe", epochs=cfg.probe_epochs, part=(rank(), world()))
    views = Views(train, cfg.size, views=1, seed=cfg.seed, color=False, skip=cfg.skip_bad_files)
    torch.manual_seed(cfg.seed)
    classes = int(train.targets.max()) + 1
    heads = nn.ModuleList(nn.Linear(x_fit.shape[1], classes) for _ in RATES).to(cfg.device)
    optimizer = torch.optim.SGD([dict(params=head.parameters(), lr=rate) for head, rate in zip(heads, RATES)],
                                momentum=0.9, weight_decay=1e-5)
    falls = [max(1, cfg.probe_epochs * tenths // 10) for tenths in (6, 8)]
    total = cfg.probe_epochs * (len(rows) // size)
    for item in tqdm(source if cached else loader(views, source, cfg), total=total, desc="probe",
                     disable=process().rank > 0, leave=False):
        if cached:
            epoch, index = item[0][0], torch.tensor([i for _, i in item], device=cfg.device)
            x, y = x_fit.index_select(0, index), y_fit.index_select(0, index)
        else:
            crops, parameters, _, used = item
            with torch.no_grad(), autocast(cfg):
                x = augment(crops[:, 0].to(cfg.device), parameters[:, 0].to(cfg.device), color=False)
                x = backbone(x).float()
            y = train.targets[used].to(cfg.device)
        optimizer.zero_grad(set_to_none=True)
        sum(F.cross_entropy(head(x), y) for head in heads).backward()
        for p in heads.parameters():
            p.grad = mean_over_ranks(p.grad)
        for group, rate in zip(optimizer.param_groups, RATES):
            group["lr"] = rate * 0.1 ** sum(epoch >= fall for fall in falls)
        optimizer.step()

    @torch.no_grad()
    def right(head, x, y, k=1):
        """(n,) bool: is the truth among the k largest logits?"""
        return torch.cat([(head(part).topk(min(k, classes)).indices == truth[:, None]).any(1)
                          for part, truth in zip(x.split(4096), y.split(4096))])

    def percent(right):
        return 100 * right.double().mean().item()

    def bits(right):                                            # which val pictures were right, as hexadecimal
        return numpy.packbits(right.cpu().numpy()).tobytes().hex()

    holdout = [percent(right(head, x_hold, y_hold)) for head in heads]
    best = max(range(len(RATES)), key=holdout.__getitem__)
    if best in (0, len(RATES) - 1):
        announce(f"warning: the probe's best rate, {RATES[best]}, is at the edge of its grid {RATES}")
    if digest(backbone.state_dict()) != before:
        raise RuntimeError("the frozen backbone changed during the probe: its accuracy means nothing")
    top1, knn = right(heads[best], x_val, y_val), nearest_neighbors(x_fit, y_fit, x_val, y_val)
    return dict(top1=percent(top1), top5=percent(right(heads[best], x_val, y_val, 5)), knn=percent(knn),
                rate=RATES[best], holdout=dict(zip(map(str, RATES), holdout)), epochs=cfg.probe_epochs,
                features="centre crops, cached" if cached else "crops and flips", train=len(y_fit) if cached else len(fit),
                held_out=int(held.sum()), val=len(y_val), knn_bank=len(y_fit), labels_sha256=mark,
                backbone_sha256=before, seconds=round(time.time() - started, 1), right=bits(top1), knn_right=bits(knn))


@torch.no_grad()
def emergence(model, cfg, train, val, picture=None):
    """Once an epoch, for every --loss: what H(i) is on one fixed batch, how the features fare on fixed subsets.

    Labels are used for logging alone. Every rank computes the same. picture: path of neighbours.png.
    """
    model.eval()
    fixed = permutation(len(train), "fixed")[:256]
    views = train_views(train, cfg, "fixed")
    crops, parameters, _, used = next(iter(loader(views, [[(0, i) for i in fixed.tolist()]], cfg, workers=0)))
    x1, x2 = (augment(crops[:, v].to(cfg.device), parameters[:, v].to(cfg.device),
                      blur=cfg.blur > 0, solarize=cfg.solarize > 0) for v in (0, 1))
    with alone():
        with autocast(cfg):
            embeddings = model(x1, x2)
        a, b = model.method.loss(*(e.float() for e in embeddings))[1][0]
        eps, local = local_mask(a, b, AdaptiveThreshold(cfg.quantile))                  # (2N, 2N)
    out = dict(threshold=eps, local=local.sum(1).float().mean())
    negative = used.repeat(2)[:, None] != used.repeat(2)
    for labels, name in ((train.targets, ""), (train.coarse, "_coarse")):
        if labels is not None:
            same = labels[used].repeat(2)[:, None] == labels[used].repeat(2)
            out["purity" + name] = same[local.cpu()].double().mean()
            out["chance" + name] = same[negative].double().mean()
    z = F.normalize(torch.cat([a, b]))
    out["std"] = z.std(0).mean() * math.sqrt(z.shape[1])                                # 1: spread out; 0: collapsed
    bank, query = (permutation(len(split), "subset")[:count] for split, count in ((train, 2048), (val, 512)))
    x_bank, kept = features(model.method.backbone, train, bank, cfg)
    singular = torch.linalg.svdvals(x_bank)
    p = singular / singular.sum() + 1e-7
    out["rankme"] = (-p * p.log()).sum().exp()                                          # Garrido et al. 2023
    x_query, seen = features(model.method.backbone, val, query, cfg)
    right = nearest_neighbors(x_bank, train.targets[bank[kept]], x_query, val.targets[query[seen]])
    out["knn"] = 100 * right.double().mean()
    if picture and process().rank == 0:
        draw_neighbors(picture, Views(train, cfg.size, views=0, skip=cfg.skip_bad_files), used.repeat(2).tolist(),
                       local.cpu(), (z @ z.T).cpu())
    model.train()
    return {key: value.item() for key, value in out.items()}


def draw_neighbors(path, views, index, local, cosine, rows=8, columns=8):
    """A row: an anchor, then the pictures in its H(i), the nearest first; blank where H(i) has no more.

    The anchors are the first of the fixed batch (which is in random order).
    """
    grid, zoom = [], max(1, 64 // views.size)
    for anchor in range(min(rows, len(index))):
        members = [j for j in cosine[anchor].argsort(descending=True).tolist() if local[anchor, j]]
        chosen = list(dict.fromkeys(index[j] for j in [anchor, *members]))[:columns]
        strip = [(views[0, i][0][0] / 255).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2) for i in chosen]
        strip += [torch.ones_like(strip[0])] * (columns - len(strip))
        grid += [F.pad(x, [3] * 4, value=float(place > 0)) for place, x in enumerate(strip)]   # the anchor in a frame
    file = io.BytesIO()
    torchvision.utils.save_image(torchvision.utils.make_grid(grid, nrow=columns, pad_value=1), file, format="png")
    write(path, file.getvalue())


# --- Pre-training ---------------------------------------------------------------------------------

INTERRUPTED = 75        # the exit status of a run that goes on when the same command is given again
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


def write(path, data):
    """Atomically: a reader, or a run that resumes, finds the old file or the new one. data: bytes or str."""
    aside = path + ".tmp"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(aside)
        with open(aside, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); what was there before is intact; "
                        "make room, then give the same command again") from error


def write_tensors(path, tree):
    file = io.BytesIO()
    torch.save(tree, file)
    write(path, file.getvalue())


def read_tensors(path):
    """torch.load that runs no code from the file. UserError: unreadable, or not a file of tensors."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:
        raise UserError(f"{path}: damaged, or not made of plain tensors ({type(error).__name__})") from error


def build_model(cfg):
    """The wrapped method on the CPU; its weights are a function of the seed."""
    torch.manual_seed(cfg.seed)
    backbone, width = build_backbone(cfg.backbone, cfg.size, cfg.norm)
    kind = METHODS[cfg.method]
    heads = {name: getattr(cfg, name) for name in (*HEADS, "temperature")
             if name in inspect.signature(kind).parameters}
    try:
        method = kind(backbone, width, norm=group_norm if cfg.norm == "group" else nn.BatchNorm1d, **heads)
    except RuntimeError as error:
        raise UserError(f"--method {cfg.method}: its heads cannot be made ({str(error).splitlines()[0]}): lower "
                        "--hidden, --dim, --predictor or --queue", 2) from error
    threshold = {"adaptive": AdaptiveThreshold(cfg.quantile), "oracle": None,
                 "step": StepThreshold(0.9, 0.1, max(1, math.ceil(cfg.epochs / 10))),
                 "cosine": CosineThreshold(0.9, 0.3, cfg.epochs)}[cfg.threshold]
    return HEX(method, cfg.loss, alpha=cfg.alpha, temperature=cfg.temperature, threshold=threshold,
               beta=cfg.beta, tau_plus=cfg.tau_plus, warmup=cfg.hex_warmup)


class Log:
    """metrics.jsonl: a line of JSON an event, in rank 0. keep: the steps that a resumed run has behind it."""

    def __init__(self, path, keep):
        self.file, end = None, 0
        if process().rank == 0:
            self.file = open(path, "a+b")
            self.file.seek(0)
            for line in self.file:
                try:
                    if json.loads(line)["step"] > keep:
                        break
                except ValueError:                              # the last line of a killed run
                    break
                end += len(line)
            self.file.truncate(end)

    def __call__(self, **event):
        if self.file:
            self.file.write(json.dumps(event).replace("NaN", "null").encode() + b"\n")
            self.file.flush()


@contextlib.contextmanager
def signals_counted():
    """Yields a list of the signals that came; before and after, they do what they did. The second ends at once.

    A thread hears them, since Python's own handlers wait while the main thread is inside a blocking call.
    """
    came = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    end, start = os.pipe()
    os.set_blocking(start, False)

    def listen():
        while number := os.read(end, 1):
            came.append(number[0])
            if len(came) == 2:
                os._exit(INTERRUPTED)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    former = signal.set_wakeup_fd(start, warn_on_full_buffer=False)
    before = {each: signal.signal(each, lambda *_: None) for each in SIGNALS}
    try:
        yield came
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        signal.set_wakeup_fd(former)
        os.close(start)
        thread.join()
        os.close(end)


def in_words(figures):
    """A line for the terminal: what has emerged."""
    labels = f", purity {figures['purity']:.2f} (chance {figures['chance']:.2f}), k-NN {figures['knn']:.1f} %" \
        if "purity" in figures else ""
    return f"threshold {figures['threshold']:.3f}, mean |H| {figures['local']:.1f}{labels}"


class Interrupted(Exception):
    """A signal asked the run to stop. Whatever it did is in the checkpoint."""


def pretrain(model, cfg, train, val, out, identity):
    """Trains, resumes, logs; leaves checkpoint.pt, backbone.pt and pictures in `out`. Returns the backbone."""
    r, W, _ = process()
    whole = cfg.accumulate % W == 0             # each rank computes whole losses by itself, or its part of each
    losses, part = (cfg.accumulate // W, (0, 1)) if whole else (cfg.accumulate, (r, W))
    per_epoch = len(train) // (cfg.batch_size * cfg.accumulate)                 # steps
    total, peak = cfg.epochs * per_epoch, cfg.lr * cfg.batch_size * cfg.accumulate / 256
    model.to(cfg.device, memory_format=torch.channels_last).train()
    if W > 1 and not whole and cfg.device == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ddp = DistributedDataParallel(model, forward_sync_buffers=False) if W > 1 else model
    if cfg.compile:
        model.method.compile()
    model.method.steps, model.method.losses = total, losses
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = LARS(weights, peak, weight_decay=cfg.weight_decay, eta=cfg.eta, clip=cfg.clip)
    scaler = torch.amp.GradScaler(cfg.device, enabled=cfg.amp == "fp16")
    statistics = [buffer for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
                  for buffer in (module.running_mean, module.running_var)]

    done, checkpoint = 0, os.path.join(out, "checkpoint.pt")
    if os.path.exists(checkpoint):
        state = read_tensors(checkpoint)
        try:
            if state["identity"] != identity:
                raise UserError(f"{checkpoint}: is of another experiment or of other data; give another --out")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            done = state["step"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{checkpoint}: not a checkpoint of hex.py ({type(error).__name__}); delete it to start "
                            "again") from error
    agree(f"{identity} {done}", cfg, "checkpoints")
    log = Log(os.path.join(out, "metrics.jsonl"), keep=done or -1)             # step 0 is logged again
    source = iter(loader(train_views(train, cfg, cfg.seed), batches(
        torch.arange(len(train)), cfg.batch_size, cfg.seed, "order", epochs=cfg.epochs, group=cfg.accumulate,
        start=done * cfg.accumulate, part=part, every=(r, W) if whole else (0, 1)), cfg))
    figures, since, waited = {}, time.perf_counter(), 0.0

    def describe(step):
        """Logs and prints what has emerged; at the start and at the end also as a picture."""
        picture = {total: "neighbours.png", 0: "neighbours_early.png"}.get(step)
        figures.update(emergence(model, cfg, train, val, picture and os.path.join(out, picture)))
        log(event="epoch", step=step, epoch=step // max(1, per_epoch), **figures)
        if r == 0:
            tqdm.write(f"epoch {step // max(1, per_epoch)}/{cfg.epochs}: {in_words(figures)}", file=sys.stderr)

    with signals_counted() as signals, tqdm(total=total, initial=done, disable=r > 0, unit="step") as bar:
        if done == 0:
            describe(0)
        for step in range(done + 1, total + 1):
            epoch, lr = (step - 1) // per_epoch, learning_rate(step - 1, total, cfg.lr_warmup * per_epoch, peak)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            history = []                                                        # loss and stats of each loss
            for k in range(losses):
                asked = time.perf_counter()
                crops, parameters, _, used = next(source)                       # (B, 2, 3, S, S), (B, 2, 8)
                waited += time.perf_counter() - asked
                torch.manual_seed(rng_of(cfg.seed, "step", step, k, r).getrandbits(63))     # dropout
                crops, parameters = (x.to(cfg.device, non_blocking=True).transpose(0, 1).flatten(0, 1)
                                     for x in (crops, parameters))              # (2 B, ...), first all of view 1
                x1, x2 = augment(crops, parameters, blur=cfg.blur > 0, solarize=cfg.solarize > 0).chunk(2)
                oracle = OracleHierarchy(train.coarse[used].to(cfg.device)) if cfg.threshold == "oracle" else None
                last = k == losses - 1                                          # DDP averages gradients then
                with alone(whole), contextlib.nullcontext() if last or W == 1 else ddp.no_sync():
                    with autocast(cfg):
                        embeddings = ddp(x1, x2)
                    loss, stats = model.loss(*embeddings, epoch=epoch, threshold=oracle)
                    scaler.scale(loss / losses).backward()
                history.append(dict(loss=loss.detach(), **stats))

            finite = torch.stack([values["loss"] for values in history]).isfinite().all()
            if cfg.amp != "fp16":                                               # there, the scaler skips the step
                finite &= nn.utils.get_total_norm([p.grad for p in weights]).isfinite()
            flags = mean_over_ranks(torch.stack([~finite, torch.full_like(finite, bool(signals))]).float())
            broken, stop = (flag > 0 for flag in flags.tolist())                # the one host wait of a step
            if broken or scaler.get_scale() < 1e-9:
                raise UserError(f"step {step}: the loss or its gradient is not finite; the last checkpoint is intact: "
                                "lower --lr and give another --out")
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= scale:                                     # a scale that fell: a skipped step
                model.after_step(step)
            if W > 1 and statistics:                                            # one model, whatever the rank
                mean = mean_over_ranks(torch.cat(statistics))
                torch._foreach_copy_(statistics, list(mean.split([len(each) for each in statistics])))

            if step % cfg.log_every == 0 or step == total:
                stats = {key: mean_over_ranks(torch.stack([values[key] for values in history]).mean()).item()
                         for key in history[0]}
                seconds = time.perf_counter() - since
                steps = (step - done - 1) % cfg.log_every + 1
                speed = cfg.batch_size * cfg.accumulate * steps / seconds
                log(event="step", step=step, epoch=epoch, **stats, lr=lr, images_per_second=speed,
                    data_wait=waited / seconds)
                shown = {key: f"{(figures | stats)[key]:.3g}" for key in ("loss", "threshold", "local")}
                bar.set_postfix(shown | {"img/s": f"{speed:.0f}", "wait": f"{waited / seconds:.0%}"}, refresh=False)
                since, waited = time.perf_counter(), 0.0
            bar.update()
            if step % per_epoch == 0:
                describe(step)
                if figures["std"] < 0.1:
                    announce(f"warning: the embeddings have collapsed (std {figures['std']:.3f} of 1): lower --lr")
            if step % per_epoch == 0 or stop or cfg.checkpoint_every and step % cfg.checkpoint_every == 0:
                if r == 0:
                    write_tensors(checkpoint, dict(model=model.state_dict(), optimizer=optimizer.state_dict(),
                                                   scaler=scaler.state_dict(), step=step, identity=identity))
            if stop:
                raise Interrupted
    return model.method.backbone


# --- Config and recipes ---------------------------------------------------------------------------


def option(group, default, text, **argument):
    """A field of Config that is a flag, too. within: the least and the largest value that is accepted."""
    return field(default=default, metadata=dict(group=group, text=text, within=argument.pop("within", None),
                                                argument=argument))


DATA, IMAGE_FOLDERS = ("shapes", "cifar10", "cifar100", "imagenet", "folder"), ("imagenet", "folder")
THRESHOLDS = ("adaptive", "step", "cosine", "oracle")
COUNT, POSITIVE, SHARE, REAL, ABOVE_0 = (0, 2**31 - 1), (1, 2**31 - 1), (0, 1), (0, 1e6), (1e-9, 1e6)


@dataclass
class Config:
    """The documented command line. None: the recipe decides (RECIPES, below)."""
    data: str = option("data", "shapes", "what to train on", choices=DATA)
    root: str = option("data", None, "folder of the data: DIR/{train,val}/<class>/*, or CIFAR's archive",
                       metavar="DIR")
    classes: str = option("data", None, "file with the class folders to use, one a line", metavar="FILE")
    skip_bad_files: bool = option("data", False, "replace an unreadable file by the next, and say so")

    size: int = option("views", None, "side of a view in pixels", within=(8, 4096))
    crop_min: float = option("views", None, "smallest share of the picture that a crop keeps", within=(1e-3, 1))
    blur: float = option("views", None, "share of views that are blurred", within=SHARE)
    grayscale: float = option("views", None, "share of views without color", within=SHARE)
    solarize: float = option("views", None, "share of views that are solarized", within=SHARE)

    method: str = option("method", "simclr", "the SSL method", choices=tuple(METHODS))
    loss: str = option("method", "hex", "base: the method's own; or what takes its place or joins it", choices=LOSSES)
    threshold: str = option("method", "adaptive", "what splits H from G; oracle uses LABELS", choices=THRESHOLDS)
    temperature: float = option("method", None, "tau", within=(1e-3, 1e6))
    quantile: float = option("method", 0.99, "q", within=(1e-6, 1 - 1e-6))
    beta: float = option("method", 1.0, "how much the nearest weigh in Q", within=REAL)
    tau_plus: float = option("method", 0.1, "assumed share of positives in H", within=(0, 1 - 1e-6))
    alpha: float = option("method", None, "weight of the loss against the method's own", within=SHARE)
    hex_warmup: int = option("method", None, "first epochs with the method's own loss", within=COUNT)
    hidden: int = option("method", None, "hidden width of the projector", within=POSITIVE)
    dim: int = option("method", None, "dimensions of an embedding", within=POSITIVE)
    predictor: int = option("method", None, "hidden width of the predictor", within=POSITIVE)
    queue: int = option("method", None, "embeddings in the queue", within=POSITIVE)
    ema: float = option("method", None, "momentum of the target at the start", within=SHARE)

    backbone: str = option("training", None, "a torchvision classifier, or resnet10_narrow", metavar="NAME")
    norm: str = option("training", "batch", "normalization of ResNets and heads", choices=("batch", "group"))
    epochs: int = option("training", None, "epochs; 0 evaluates a random backbone", within=COUNT)
    batch_size: int = option("training", None, "images in one loss", within=(2, 2**31 - 1))
    accumulate: int = option("training", None, "losses in one step (adds no negatives)", within=POSITIVE)
    lr: float = option("training", None, "base rate; the rate is lr * batch * accumulate / 256", within=ABOVE_0)
    lr_warmup: int = option("training", None, "epochs of linear warm-up", within=COUNT)
    weight_decay: float = option("training", None, "L2, not on biases and norms", within=REAL)
    eta: float = option("training", None, "trust coefficient of LARS", within=ABOVE_0)
    clip: bool = option("training", None, "LARS only ever lowers a rate (the authors' setting)",
                        action=argparse.BooleanOptionalAction)
    amp: str = option("training", None, "autocast", choices=("off", "bf16", "fp16"))
    seed: int = option("training", 0, "of weights, order and views", within=COUNT)

    probe: str = option("evaluation", None, "evaluate this backbone.pt and do nothing else", metavar="FILE")
    probe_epochs: int = option("evaluation", 100, "epochs of the linear probe", within=POSITIVE)
    label_fraction: float = option("evaluation", None, "share of train labels that the probe sees, class-balanced",
                                   within=(1e-6, 1))

    out: str = option("running", None, "where results go [runs/<data>-<method>-<loss>-s<seed>...]", metavar="DIR")
    device: str = option("running", None, "cpu or cuda [cuda where there is one]", choices=("cpu", "cuda"))
    workers: int = option("running", None, "loader processes a rank [by the machine and the data]", within=COUNT)
    compile: bool = option("running", False, "torch.compile the method")
    checkpoint_every: int = option("running", None, "steps between checkpoints, beside each epoch's", within=POSITIVE)
    log_every: int = option("running", 10, "steps between lines of metrics.jsonl", within=POSITIVE)


HEADS = ("hidden", "dim", "predictor", "queue", "ema")                          # where a method has them
NOT_THE_EXPERIMENT = {each.name for each in fields(Config) if each.metadata["group"] in ("evaluation", "running")} \
    | {"root", "classes", "skip_bad_files"}

# Each recipe: what holds for any method, then where a method differs. Heads that are not named here are those of
# the method's class. shapes, small: minutes on two cores, chosen by us. Sources of the others: README.
SMALL = dict(backbone="resnet10_narrow", size=32, batch_size=256, accumulate=1, weight_decay=1e-4, eta=0.02,
             clip=False, temperature=0.2, amp="off", blur=0.0, solarize=0.0)
RECIPES = {
    "imagenet": {
        "any": dict(backbone="resnet50", size=224, epochs=100, batch_size=256, accumulate=1, lr=0.3,
                    weight_decay=1e-6, eta=0.02, clip=True, crop_min=0.08, grayscale=0.2, blur=0.5, solarize=0.0,
                    temperature=0.1, amp="fp16"),
        "simclr": dict(accumulate=16),
        "nnclr": dict(weight_decay=1e-5),
        "mocov3": dict(temperature=1.0, lr=0.6),
        "byol": dict(lr=0.45),
        "simsiam": dict(lr=0.05, weight_decay=1e-4)},
    "cifar": {
        "any": dict(backbone="resnet18", size=32, epochs=400, batch_size=256, accumulate=1, lr=0.4,
                    weight_decay=1e-4, eta=0.02, clip=True, crop_min=0.08, grayscale=0.2, blur=0.0, solarize=0.0,
                    temperature=0.1, amp="fp16"),
        "nnclr": dict(temperature=0.2, weight_decay=1e-5, queue=65536),
        "barlow": dict(lr=0.3, hidden=2048, dim=2048),
        "mocov3": dict(temperature=0.2)},
    "shapes": {
        "any": SMALL | dict(epochs=12, lr=0.5, crop_min=0.5, grayscale=1.0, hidden=256, dim=64, predictor=256,
                            queue=2048),
        "byol": dict(lr=0.15, ema=0.97)},
    "small": {
        "any": SMALL | dict(epochs=15, lr=0.2, crop_min=0.2, grayscale=0.2, hidden=512, dim=128, predictor=512,
                            queue=4096),
        "byol": dict(lr=0.15, ema=0.97)},
}
RECIPE_OF = {"shapes": "shapes", "cifar10": "cifar", "cifar100": "cifar", "imagenet": "imagenet", "folder": "imagenet"}


def resolve(recipe, method, given):
    """Every setting of an experiment: what was given, else the recipe's, else the method's."""
    heads = {name: each.default for name, each in inspect.signature(METHODS[method]).parameters.items()
             if name in HEADS}
    settings = RECIPES[recipe]["any"] | RECIPES[recipe].get(method, {})
    settings = heads | {name: value for name, value in settings.items() if name in heads or name not in HEADS}
    settings = {"alpha": METHODS[method].alpha} | settings | given
    epochs = settings["epochs"]
    settings.setdefault("hex_warmup", round(0.1 * epochs))
    settings.setdefault("lr_warmup", max(0, min(10, math.ceil(0.1 * epochs), epochs - 1)))
    return settings


# --- Command line ---------------------------------------------------------------------------------

Process = namedtuple("Process", "rank ranks local_rank")


def process():
    """This process among those of the run, as torchrun says it; the one place where its variables are read."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    missing = [name for name in names if name not in os.environ]
    if len(missing) == len(names):
        return Process(0, 1, 0)
    if missing:
        raise UserError(f"{', '.join(sorted(set(names) - set(missing)))} is set, but not {', '.join(missing)}: start "
                        "with torchrun, which sets all, or unset all", 2)
    return Process(*(int(os.environ[name]) for name in names[:3]))


def clean(text):
    """One line of a terminal, whatever is in names of files."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text).strip())[:2000]


def announce(text):
    if process().rank == 0:
        tqdm.write(text, file=sys.stderr)


def flag(name):
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message, 2)


def parse(argv):
    """-> Config with every recipe filled in, and a dict of what was given."""
    parser = Parser("hex.py", description="HEX (WACV 2025). Defaults in brackets; [recipe]: set by --recipe.",
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
                    usage="hex.py [options]", allow_abbrev=False)
    groups = {}
    for each in fields(Config):
        group, text, within, argument = each.metadata.values()
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        argument = dict(argument)
        if each.type is bool:
            argument.setdefault("action", "store_true")
        elif "choices" not in argument and each.type is not str:
            argument |= dict(type=each.type, metavar={int: "N", float: "X"}[each.type])
        default = {None: "recipe" if within or each.type is bool else None, False: None}.get(each.default, each.default)
        groups[group].add_argument(flag(each.name), default=argparse.SUPPRESS, **argument,
                                   help=text + (f" [{default}]" if default is not None else ""))
    given = vars(parser.parse_args(argv))
    for each in fields(Config):
        value, within = given.get(each.name), each.metadata["within"]
        if value == "":
            raise UserError(f"{flag(each.name)}: is empty; name something, or leave it out", 2)
        if within and value is not None and not within[0] <= value <= within[1]:
            raise UserError(f"{flag(each.name)} {value}: must lie in [{within[0]}, {within[1]}]", 2)
    inherited = inherit(given) if "probe" in given else {}
    chosen = inherited | given
    data, method = chosen.get("data", "shapes"), chosen.get("method", "simclr")
    settings = resolve(RECIPE_OF[data], method, chosen)
    cfg = Config(**settings)
    cfg.device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if cfg.device == "cpu" and "amp" not in given:
        cfg.amp = "off"
    if cfg.workers is None:                         # on a CPU, pictures in memory are cropped fastest by the run itself
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cfg.workers = 0 if cfg.device == "cpu" and cfg.data not in IMAGE_FOLDERS else min(12, cores // 2)
    for name in ("root", "classes", "probe"):
        if getattr(cfg, name):
            setattr(cfg, name, os.path.abspath(getattr(cfg, name)))
    check(cfg, given)
    return cfg, given


def inherit(given):
    """What --probe FILE takes from the config.json beside it: the architecture and, if not given, the data."""
    beside = os.path.join(os.path.dirname(given["probe"]), "config.json")
    if not os.path.isfile(given["probe"]):
        raise UserError(f"--probe {given['probe']}: there is no such file", 2)
    if {"backbone", "data"} <= given.keys():
        return {}
    if not os.path.exists(beside):
        if "backbone" in given:
            return {}
        raise UserError(f"--probe {given['probe']}: there is no config.json beside it; name its --backbone and --data", 2)
    saved = read_json(beside)["config"]
    names = ("backbone", "norm", "size") + (() if "data" in given else ("data", "root", "classes"))
    return {name: saved[name] for name in names if saved.get(name) is not None}


def check(cfg, given):
    """UserError for a flag that has no effect, or flags that contradict each other."""
    takes = inspect.signature(METHODS[cfg.method]).parameters
    evaluation = {"probe", "data", "root", "classes", "skip_bad_files", "size", "backbone", "norm", "amp", "seed",
                  "probe_epochs", "label_fraction", "out", "device", "workers"}
    no_effect = [                                                   # (if, these flags have none, because of)
        (cfg.probe, {each.name for each in fields(Config)} - evaluation, "--probe"),
        (cfg.loss == "base", {"threshold", "quantile", "beta", "tau_plus", "alpha", "hex_warmup"}, "--loss base"),
        (cfg.loss == "base" and "temperature" not in takes, {"temperature"}, f"--loss base --method {cfg.method}"),
        (cfg.loss in ("infonce", "dcl"), {"threshold", "quantile", "beta", "tau_plus"}, f"--loss {cfg.loss}"),
        (cfg.loss == "released", {"beta", "tau_plus"}, "--loss released"),
        (cfg.threshold != "adaptive", {"quantile"}, f"--threshold {cfg.threshold}"),
        (True, set(HEADS) - set(takes), f"--method {cfg.method}"),
        (cfg.data == "shapes", {"root"}, "--data shapes"),
        (cfg.data not in IMAGE_FOLDERS, {"classes", "skip_bad_files"}, f"--data {cfg.data}")]
    for condition, names, reason in no_effect:
        for name in sorted(names & given.keys()) if condition else ():
            raise UserError(f"{flag(name)} {given[name]}: has no effect with {reason}; leave it out", 2)
    ranks = process().ranks
    rules = [                                                       # (broken, what to do)
        (cfg.data in IMAGE_FOLDERS and not cfg.root, f"--data {cfg.data}: needs --root DIR"),
        (cfg.data in IMAGE_FOLDERS and cfg.root and not os.path.isdir(cfg.root), f"--root {cfg.root}: no such folder"),
        (cfg.accumulate % ranks and cfg.batch_size % ranks, f"--batch-size {cfg.batch_size}: does not divide over "
         f"{ranks} ranks; give a multiple of {ranks}"),
        (cfg.epochs and cfg.hex_warmup >= cfg.epochs, f"--hex-warmup {cfg.hex_warmup}: leaves none of the --epochs "
         f"{cfg.epochs} to the loss; give less"),
        (cfg.epochs and cfg.lr_warmup >= cfg.epochs, f"--lr-warmup {cfg.lr_warmup}: leaves none of the --epochs "
         f"{cfg.epochs} to a falling rate; give less"),
        (cfg.blur and cfg.size < 20, f"--blur {cfg.blur}: at --size {cfg.size} its kernel is one pixel; leave it out"),
        (cfg.threshold == "oracle" and cfg.data not in ("shapes", "cifar100"), f"--threshold oracle: --data {cfg.data} "
         "has no super-classes; use --data shapes or cifar100"),
        (cfg.device == "cuda" and not torch.cuda.is_available(), "--device cuda: no GPU is visible; use --device cpu"),
        (cfg.compile and not shutil.which(os.environ.get("CXX", "g++").split()[0]),
         "--compile: needs a C++ compiler, and there is no g++ (or $CXX) on the PATH; leave it out"),
        (cfg.backbone == "pixels" and cfg.epochs and not cfg.probe, "--backbone pixels: add --epochs 0")]
    for broken, message in rules:
        if broken:
            raise UserError(message, 2)


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); give another --out") from error


def load_backbone(cfg):
    """The backbone in --probe FILE: plain torchvision keys, with or without those of its classifier."""
    state = read_tensors(cfg.probe)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"--probe {cfg.probe}: not a state dict of tensors; give a run's backbone.pt")
    backbone, _ = build_backbone(cfg.backbone, cfg.size, cfg.norm)
    mine = backbone.state_dict()
    for name in [name for name in state if name.startswith(("fc.", "classifier.", "heads.")) and name not in mine]:
        del state[name]
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"--probe {cfg.probe}: is not of --backbone {cfg.backbone} at --size {cfg.size}: "
                        f"{' '.join(str(error).split()[:40])}") from error
    return backbone


def fingerprint(*parts):
    """SHA-256 of what parts say: bytes, or anything that JSON can hold."""
    whole = hashlib.sha256()
    for part in parts:
        part = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        whole.update(len(part).to_bytes(8) + part)
    return whole.hexdigest()


def agree(text, cfg, what):
    """UserError unless all ranks hold the same text."""
    if process().ranks > 1:
        mine = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8).to(cfg.device)
        if (gather(mine[None]) != mine).any():
            raise UserError(f"the ranks see different {what}: every rank must see the same --root and --out")


@contextlib.contextmanager
def open_run(cfg, given, argv, identity):
    """The run's folder: made, or found to be of the same experiment and data, and locked. Yields its path."""
    about = f"probe-{os.path.basename(os.path.dirname(cfg.probe))}" if cfg.probe else f"{cfg.method}-{cfg.loss}"
    plain = resolve(RECIPE_OF[cfg.data], cfg.method, {})
    mine = {name: value for name, value in asdict(cfg).items() if name not in NOT_THE_EXPERIMENT}
    further = "".join(f"-{name}_{mine[name]}" for name in sorted(given.keys() & mine.keys())
                      if name not in ("data", "method", "loss", "seed") and mine[name] != plain.get(name))
    name = re.sub(r"[^\w.+-]", "_", f"{cfg.data}-{about}-s{cfg.seed}{further}")
    out = cfg.out or os.path.join("runs", name if len(name) < 200 else name[:180] + fingerprint(name)[:16])
    path, code = os.path.join(out, "config.json"), fingerprint(open(__file__, "rb").read())
    if os.path.exists(path):
        saved = read_json(path)
        differing = [f"{flag(key)} {saved['config'].get(key)} there, {mine[key]} here" for key in mine
                     if saved["config"].get(key) != mine[key]]
        if saved["identity"] != identity:
            raise UserError(f"--out {out}: holds another experiment ({'; '.join(differing) or 'other data'}); give another "
                            "--out")
        if saved["code"] != code:
            announce(f"warning: hex.py has changed since {out} was begun")
    elif os.path.exists(out) and (not os.path.isdir(out) or set(os.listdir(out)) - {"config.json.tmp", "lock"}):
        raise UserError(f"--out {out}: exists and is no folder of a run; give another --out")
    if process().rank == 0:
        try:
            os.makedirs(out, exist_ok=True)
            lock = open(os.path.join(out, "lock"), "a")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)                    # its owner's death releases it
        except BlockingIOError as error:
            raise UserError(f"--out {out}: another run is at work there; wait for it, or give another --out") from error
        except OSError as error:
            raise UserError(f"--out {out}: cannot be made ({error.strerror}); give another --out") from error
        if not os.path.exists(path):
            versions = dict(python=sys.version.split()[0], torch=torch.__version__, torchvision=torchvision.__version__)
            write(path, json.dumps(dict(config=asdict(cfg), identity=identity, code=code, command=["hex.py", *argv],
                                        versions=versions, ranks=world(), threads=torch.get_num_threads()), indent=1))
    if process().ranks > 1:
        dist.barrier()
    try:
        yield out
    finally:
        if process().rank == 0:
            lock.close()


def run(cfg, given, argv):
    torch.backends.cudnn.benchmark = True                                       # the sizes of a run are fixed
    # Whatever is wrong with the command shows before the run's folder is made.
    backbone = load_backbone(cfg) if cfg.probe else None
    train, val = load_data(cfg)
    labelled_pictures(cfg, train)
    model = None if cfg.probe else build_model(cfg)
    least = cfg.batch_size * cfg.accumulate
    if model and cfg.epochs and len(train) < least:
        raise UserError(f"--batch-size {cfg.batch_size} --accumulate {cfg.accumulate}: more than the {len(train)} train "
                        "pictures; lower them", 2)
    data = fingerprint(train.identity(), val.identity())
    settings = {name: value for name, value in asdict(cfg).items() if name not in NOT_THE_EXPERIMENT}
    identity = fingerprint(settings, data)
    agree(identity, cfg, "data or options")
    with open_run(cfg, given, argv, identity) as out:
        results = os.path.join(out, "probe.json")
        if model:
            backbone = pretrain(model, cfg, train, val, out, identity)
            if process().rank == 0:
                write_tensors(os.path.join(out, "backbone.pt"), backbone.state_dict())
        if not os.path.exists(results):
            result = linear_probe(backbone, cfg, train, val)
            if process().rank == 0:
                write(results, json.dumps(result, indent=1))
        if process().ranks > 1:
            dist.barrier()
        if process().rank == 0:
            result = read_json(results)
            print(f"{out}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, k-NN {result['knn']:.2f} %")


def main(argv=None):
    """The command line. Returns the exit status: 0, 1 (what it met), 2 (the command), 75 (interrupted)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    own = False
    try:
        cfg, given = parse(argv)
        own = process().ranks > 1 and not dist.is_initialized()
        if own:
            if cfg.device == "cuda":
                torch.cuda.set_device(process().local_rank)
            dist.init_process_group({"cuda": "nccl", "cpu": "gloo"}[cfg.device])
        run(cfg, given, argv)
        status = 0
    except UserError as error:
        print(f"hex.py: error: {clean(error)}", file=sys.stderr, flush=True)
        status = error.status
    except Interrupted:
        print("hex.py: interrupted, run the same command again", file=sys.stderr, flush=True)
        status = INTERRUPTED
    if own:
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
