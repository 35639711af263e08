# SPDX-License-Identifier: MIT
"""HEX: Hierarchical Emergence Exploitation in Self-Supervised Algorithms, in one file.

Kokilepersaud, Kim, Prabhushankar, AlRegib (WACV 2025, arXiv 2410.23200). N images over all ranks give n = 2N
normalised embeddings z; s_ij = z_i . z_j; p(i) is the other view of i; Neg(i) is everything but i and p(i).
HEX splits the InfoNCE denominator at an adaptive threshold eps, and weights the local part:

    eps  = mean over anchors of the q-quantile of s_ij, j in Neg(i)          anew for each batch, no gradient
    H(i) = { j in Neg(i) : s_ij > eps }        G(i) = Neg(i) \\ H(i)         local neighbours, global rest
    l_i  = -log [ e^{s_ip/tau} / ( e^{s_ip/tau} + sum_{j in G} e^{s_ij/tau} + L_i ) ]
    L_i  = max( [ sum_{h in H} Q_ih e^{s_ih/tau} - tau_plus |H| e^{s_ip/tau} ] / (1 - tau_plus), |H| e^{-1/tau} )
    Q_ih = e^{beta s_ih/tau} / mean_{h' in H} e^{beta s_ih'/tau}             a weight, no gradient

    python hex.py                                                            pictures it draws; under 3 minutes on 2 cores
    python hex.py --data cifar10 --root DIR --method vicreg --loss hex       one GPU
    torchrun --nproc-per-node 8 hex.py --data imagenet --root DIR            paper scale
    python hex.py --probe runs/.../backbone.pt --data folder --root DIR      evaluate, or transfer

The file reads from the top: config, the HEX loss, SSL methods and the wrapper, data and augmentation, optimiser and
schedule, pre-training, evaluation, command line. Who stops after the HEX loss has got the paper; that section, with the
imports, can be copied out alone.
"""
import argparse
import contextlib
import copy
import difflib
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing.resource_tracker
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

# --- Config and recipes -----------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend: one line, and the exit status (2: the command line, 1: what it met)."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


class Interrupted(BaseException):              # not an Exception: what reads files catches those
    """A signal asked the run to stop. Whatever it did is in the checkpoint, or will be done again."""


INTERRUPTED = 75  # the exit status of a run that was interrupted and goes on when the same command is given again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def number(kind, low, high=math.inf, open_low=False, open_high=False):
    """An argparse type: `kind` (int or float) within an interval whose ends may be open."""
    def parse(text):
        value = kind(text)
        closed = not open_high and high < math.inf
        if not (low < value if open_low else low <= value) or not (value <= high if closed else value < high):
            raise argparse.ArgumentTypeError(f"{text} is not in {'(' if open_low else '['}{low}, {high}{']' if closed else ')'}")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def option(group, default, text, **argument):
    return field(default=default, metadata=dict(group=group, text=text, argument=argument))


COUNT, POSITIVE = number(int, 0, 2**31), number(int, 1, 2**31)
PROBABILITY, POSITIVE_REAL, REAL = number(float, 0, 1), number(float, 0, 1e6, open_low=True), number(float, 0, 1e6)
DATA, IMAGE_FOLDERS = ("shapes", "cifar10", "cifar100", "imagenet", "folder"), ("imagenet", "folder")
LOSSES, THRESHOLDS = ("base", "infonce", "dcl", "hex", "released"), ("adaptive", "step", "cosine", "oracle")


@dataclass
class Config:
    """The documented command line. None: the recipe of the data and the method decides (RECIPES, below)."""
    data: str = option("data", "shapes", "what to train on", choices=DATA)
    root: str = option("data", None, "folder of the data: DIR/{train,val}/<class>/*, or CIFAR's archive (default data)",
                       metavar="DIR")
    classes: str = option("data", None, "file with the class folders to use, one a line (default all)", metavar="FILE")
    size: int = option("data", None, "side of a view in pixels", type=number(int, 8))
    crop_min: float = option("data", None, "smallest share of the picture that a crop keeps",
                             type=number(float, 0, 1, open_low=True))
    blur: float = option("data", None, "share of views that are blurred (default 0.5 above 64 pixels, else 0)", type=PROBABILITY)
    grey: float = option("data", None, "share of views without colour", type=PROBABILITY)
    solarise: float = option("data", 0.0, "share of views that are solarised", type=PROBABILITY)
    skip_bad_files: bool = option("data", False, "replace an unreadable file by the next, and list it in bad_files.txt")

    method: str = option("method", "simclr", "the SSL method", choices=None)
    loss: str = option("method", "hex", "base: the method's own; or what takes its place or joins it", choices=LOSSES)
    threshold: str = option("method", "adaptive", "what splits H from G; oracle uses LABELS", choices=THRESHOLDS)
    temperature: float = option("method", None, "tau", type=number(float, 0.001, 1e6))
    quantile: float = option("method", 0.99, "q", type=number(float, 0, 1, open_low=True, open_high=True))
    beta: float = option("method", 1.0, "how much the nearest weigh in Q", type=REAL)
    tau_plus: float = option("method", 0.1, "assumed share of positives in H", type=number(float, 0, 1, open_high=True))
    alpha: float = option("method", None, "weight of the loss against the method's own (default the method's)", type=PROBABILITY)
    hex_warmup: int = option("method", None, "first epochs with the method's own loss (default a tenth)", type=COUNT)
    hidden: int = option("method", None, "hidden width of the projector", type=POSITIVE)
    dim: int = option("method", None, "dimensions of an embedding", type=POSITIVE)
    predictor: int = option("method", None, "hidden width of the predictor", type=POSITIVE)
    queue: int = option("method", None, "embeddings in the queue", type=POSITIVE)
    ema: float = option("method", None, "momentum of the target at the start (default the method's)", type=PROBABILITY)

    backbone: str = option("training", None, "a torchvision classification model, or resnet10_narrow", metavar="NAME")
    norm: str = option("training", "batch", "normalisation of ResNets and heads", choices=("batch", "group"))
    epochs: int = option("training", None, "epochs; 0 evaluates a random backbone", type=COUNT)
    batch_size: int = option("training", None, "images in one loss, over all ranks", type=number(int, 2))
    accumulate: int = option("training", None, "losses in one step (adds no negatives)", type=POSITIVE)
    micro_batch: int = option("training", None, "images (all ranks) with activations at once; exact (default all)", type=POSITIVE)
    lr: float = option("training", None, "base rate; the rate is lr * batch * accumulate / 256", type=POSITIVE_REAL)
    lr_warmup: int = option("training", None, "epochs of linear warm-up (default a tenth, 10 at most)", type=COUNT)
    weight_decay: float = option("training", None, "L2, not on biases and norms", type=REAL)
    eta: float = option("training", None, "trust coefficient of LARS", type=POSITIVE_REAL)
    clip: bool = option("training", None, "LARS only ever lowers a rate (the authors' setting)",
                        action=argparse.BooleanOptionalAction)
    amp: str = option("training", None, "autocast", choices=("off", "bf16", "fp16"))
    seed: int = option("training", 0, "of weights, order and views", type=COUNT)

    probe: str = option("evaluation", None, "evaluate this backbone.pt and do nothing else (default --data: its own)",
                        metavar="FILE")
    probe_epochs: int = option("evaluation", 100, "epochs of the linear probe", type=POSITIVE)
    label_fraction: float = option("evaluation", None, "share of train labels that the probe sees, class-balanced",
                                   type=number(float, 0, 1, open_low=True))
    label_list: str = option("evaluation", None, "file that names the labelled pictures, one a line", metavar="FILE")

    out: str = option("running", None, "where results go (default runs/<data>-<method>-<loss>-s<seed>...)", metavar="DIR")
    device: str = option("running", None, "cpu or cuda (default cuda where there is one)", choices=("cpu", "cuda"))
    workers: int = option("running", None, "loader processes a rank (default: by the machine and the data)", type=COUNT)
    compile: bool = option("running", False, "torch.compile the method")
    checkpoint_every: int = option("running", None, "steps between checkpoints, beside each epoch's", type=POSITIVE)
    log_every: int = option("running", 10, "steps between lines of metrics.jsonl", type=POSITIVE)
    bench: int = option("running", None, "time N steps, print a table, write nothing", type=POSITIVE)


# What does not change the experiment: neither the name of the run's folder nor a resume asks for it.
NOT_THE_EXPERIMENT = {"out", "workers", "device", "compile", "checkpoint_every", "log_every", "micro_batch", "bench"}

# ImageNet and CIFAR: the authors' hyper-parameters (LARS eta 0.02 with clipping); what the authors lack is the usual.
# shapes and small (a folder at --size 64 or less): minutes on two cores, chosen by us (README).
RECIPES = {
    "imagenet": dict(backbone="resnet50", size=224, epochs=100, batch_size=256, accumulate=1, lr=0.3,
                     weight_decay=1e-6, eta=0.02, clip=True, crop_min=0.08, grey=0.2, temperature=0.1, amp="fp16"),
    "cifar10": dict(backbone="resnet18", size=32, epochs=400, batch_size=256, accumulate=1, lr=0.4,
                    weight_decay=1e-4, eta=0.02, clip=True, crop_min=0.08, grey=0.2, temperature=0.1, amp="fp16"),
    "shapes": dict(backbone="resnet10_narrow", size=32, epochs=12, batch_size=256, accumulate=1, lr=0.5,
                   weight_decay=1e-4, eta=0.02, clip=False, crop_min=0.5, grey=1.0, temperature=0.2, amp="off",
                   hidden=256, dim=64, predictor=256, queue=2048),
}
RECIPES["folder"] = RECIPES["imagenet"]
RECIPES["cifar100"] = RECIPES["cifar10"]
RECIPES["small"] = RECIPES["shapes"] | dict(epochs=15, lr=0.2, crop_min=0.2, grey=0.2, hidden=512, dim=128, predictor=512,
                                            queue=4096)
METHOD_RECIPES = {  # where a method's differs from its data's
    ("imagenet", "simclr"): dict(accumulate=16),
    ("imagenet", "nnclr"): dict(weight_decay=1e-5),
    ("imagenet", "mocov3"): dict(temperature=1.0, lr=0.6),
    ("imagenet", "byol"): dict(lr=0.45),
    ("imagenet", "simsiam"): dict(lr=0.05, weight_decay=1e-4),
    ("cifar10", "nnclr"): dict(temperature=0.2, weight_decay=1e-5, queue=65536),
    ("cifar10", "barlow"): dict(lr=0.3, hidden=2048, dim=2048),
    ("cifar10", "mocov3"): dict(temperature=0.2),
    ("shapes", "byol"): dict(lr=0.15, ema=0.97),
}
METHOD_RECIPES |= {("cifar100", method): recipe for (data, method), recipe in METHOD_RECIPES.items() if data == "cifar10"}


# --- The HEX loss -----------------------------------------------------------------------------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


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


# --- SSL methods and the wrapper --------------------------------------------------------------------------------------


def group_norm(channels):
    """GroupNorm, 16 channels a group where they divide: for runs that must not depend on how a batch is split."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 16)), channels)


def mlp(*widths, norm=None, last_norm=False):
    """Linear - norm - ReLU blocks and a last Linear (then a norm, if last_norm). norm: channels -> module."""
    layers = []
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False)):
        last = i == len(widths) - 2
        use_norm = norm is not None and (last_norm or not last)
        layers += [nn.Linear(fan_in, fan_out, bias=not use_norm)]
        layers += [norm(fan_out)] if use_norm else []
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Method(nn.Module):
    """Base of the methods here. HEX itself asks for forward(x1, x2) -> embeddings and loss; after_step is optional.

    The loop below also needs `backbone`, and the class in METHODS.
    alpha, scale: HEX's weight and factor beside the method's own loss (alpha 1: it takes its place).
    steps: of the whole run, for schedules; the loop sets it.
    """
    alpha, scale, steps = 0.1, 1.0, None

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def features(self, x1, x2):
        """Both views in one pass: one BatchNorm batch, and one use of the parameters for DDP."""
        return self.backbone(torch.cat([x1, x2]))

    def loss(self, *embeddings):
        """float32 embeddings -> the method's own loss (scalar), and the row-aligned pairs [(a, b), ...] for HEX."""
        raise NotImplementedError

    def after_step(self, step):
        """EMA, queue: after an optimiser step that was really taken. step: its number, from 1."""


class SimCLR(Method):
    """Chen et al. 2020. The authors' projector: 2048-2048-128 without BatchNorm."""
    alpha = 1.0

    def __init__(self, backbone, width, *, hidden=2048, dim=128, norm=nn.BatchNorm1d, temperature=0.1):
        super().__init__(backbone)
        self.projector = mlp(width, hidden, dim)
        self.temperature = temperature

    def forward(self, x1, x2):
        return self.projector(self.features(x1, x2)).chunk(2)

    def loss(self, z1, z2):
        return info_nce(z1, z2, self.temperature), [(z1, z2)]


class NNCLR(Method):
    """Dwibedi et al. 2021: the anchor is the nearest neighbour, in a queue of past embeddings, of the other view."""
    alpha = 1.0

    def __init__(self, backbone, width, *, hidden=2048, dim=256, predictor=4096, queue=98304, norm=nn.BatchNorm1d,
                 temperature=0.1):
        super().__init__(backbone)
        self.projector = mlp(width, hidden, hidden, dim, norm=norm, last_norm=True)
        self.predictor = mlp(dim, predictor, dim, norm=norm)
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim)))
        self.register_buffer("head", torch.zeros((), dtype=torch.long))       # where the next embeddings go
        self.temperature, self.latest = temperature, None

    def forward(self, x1, x2):
        z = self.projector(self.features(x1, x2))
        return *self.predictor(z).chunk(2), *z.detach().chunk(2)

    def nearest(self, z):
        return self.queue.index_select(0, (F.normalize(z) @ self.queue.T).argmax(1))

    def loss(self, p1, p2, z1, z2):
        self.latest = z1
        pairs = [(self.nearest(z1), p2), (self.nearest(z2), p1)]
        return sum(cross_entropy_of_pairs(nn_, p, self.temperature) for nn_, p in pairs) / 2, pairs

    @torch.no_grad()
    def after_step(self, step):
        """Pushes the last loss's embeddings of all ranks, so that the queue is the same everywhere."""
        z = F.normalize(gather(self.latest)).to(self.queue.dtype)[-len(self.queue):]
        slots = (self.head + torch.arange(len(z), device=z.device)) % len(self.queue)
        self.queue.index_copy_(0, slots, z)
        self.head.copy_((self.head + len(z)) % len(self.queue))


def cross_entropy_of_pairs(a, b, temperature):
    """InfoNCE with the negatives of the other view alone: a_i against every rank's b_j."""
    logits = F.normalize(a) @ F.normalize(gather(b)).T / temperature                            # (N / world, N)
    return F.cross_entropy(logits, rank() * len(a) + torch.arange(len(a), device=a.device))


class Momentum(Method):
    """Shared by MoCo v3 and BYOL: a target that follows the online network, its momentum rising to 1 by a cosine.

    The target's BatchNorm statistics are those of its own forward passes, not copies: its weights lag behind.
    """

    def __init__(self, backbone, projector, predictor, ema):
        super().__init__(backbone)
        self.projector, self.predictor, self.ema = projector, predictor, ema
        self.target = copy.deepcopy(nn.Sequential(backbone, projector)).requires_grad_(False)

    def forward(self, x1, x2):
        z = self.projector(self.features(x1, x2))
        with torch.no_grad():
            target = self.target(torch.cat([x1, x2]))
        return *self.predictor(z).chunk(2), *z.chunk(2), *target.chunk(2)

    @torch.no_grad()
    def after_step(self, step):
        share = step / self.steps if self.steps else 0
        momentum = 1 - (1 - self.ema) * (math.cos(math.pi * share) + 1) / 2
        online = nn.Sequential(self.backbone, self.projector)
        torch._foreach_lerp_(list(self.target.parameters()), list(online.parameters()), 1 - momentum)


class MoCoV3(Momentum):
    """Chen et al. 2021. HEX on it is our extension."""
    alpha = 1.0

    def __init__(self, backbone, width, *, hidden=4096, dim=256, predictor=4096, ema=0.99, norm=nn.BatchNorm1d,
                 temperature=1.0):
        super().__init__(backbone, mlp(width, hidden, dim, norm=norm, last_norm=True),
                         mlp(dim, predictor, dim, norm=norm, last_norm=True), ema)
        self.temperature = temperature

    def loss(self, q1, q2, z1, z2, k1, k2):
        pairs = [(q1, k2), (q2, k1)]
        return sum(2 * self.temperature * cross_entropy_of_pairs(q, k, self.temperature) for q, k in pairs), pairs


class BYOL(Momentum):
    """Grill et al. 2020. HEX on it, between the online projections, is our extension."""

    def __init__(self, backbone, width, *, hidden=4096, dim=256, predictor=4096, ema=0.99, norm=nn.BatchNorm1d):
        super().__init__(backbone, mlp(width, hidden, dim, norm=norm), mlp(dim, predictor, dim, norm=norm), ema)

    def loss(self, p1, p2, z1, z2, t1, t2):
        own = 4 - 2 * F.cosine_similarity(p1, t2).mean() - 2 * F.cosine_similarity(p2, t1).mean()
        return own, [(z1, z2)]


class SimSiam(Method):
    """Chen and He 2021. HEX on it, between the projections, is our extension."""

    def __init__(self, backbone, width, *, hidden=2048, dim=2048, predictor=512, norm=nn.BatchNorm1d):
        super().__init__(backbone)
        self.projector = mlp(width, hidden, hidden, dim, norm=norm, last_norm=True)
        self.predictor = mlp(dim, predictor, dim, norm=norm)

    def forward(self, x1, x2):
        z = self.projector(self.features(x1, x2))
        return *self.predictor(z).chunk(2), *z.chunk(2)

    def loss(self, p1, p2, z1, z2):
        own = -(F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()) / 2
        return own, [(z1, z2)]


class BarlowTwins(Method):
    """Zbontar et al. 2021: the cross-correlation of the views, over all ranks, is the identity.

    lambda_ and factor as in the code the authors of HEX built on (lambda 0.0051, loss times 0.024).
    """
    lambda_, factor = 0.0051, 0.024

    def __init__(self, backbone, width, *, hidden=8192, dim=8192, norm=nn.BatchNorm1d):
        super().__init__(backbone)
        self.projector = mlp(width, hidden, hidden, dim, norm=norm)

    def forward(self, x1, x2):
        return self.projector(self.features(x1, x2)).chunk(2)

    def loss(self, z1, z2):
        a, b = (F.batch_norm(gather(z), None, None, training=True) for z in (z1, z2))           # (N, dim)
        c = a.T @ b / len(a)                                                                    # (dim, dim)
        on_diagonal = (c.diagonal() - 1).square().sum()
        off_diagonal = c.square().sum() - c.diagonal().square().sum()
        return self.factor * (on_diagonal + self.lambda_ * off_diagonal), [(z1, z2)]


class VICReg(Method):
    """Bardes et al. 2022: invariance, variance and covariance; the last two over all ranks."""
    scale = 5.0

    def __init__(self, backbone, width, *, hidden=8192, dim=8192, norm=nn.BatchNorm1d):
        super().__init__(backbone)
        self.projector = mlp(width, hidden, hidden, dim, norm=norm)

    forward = BarlowTwins.forward

    def loss(self, z1, z2):
        a, b = gather(z1), gather(z2)
        invariance = F.mse_loss(a, b)
        variance = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (a, b))
        covariance = 0.0
        for z in (a - a.mean(0), b - b.mean(0)):
            c = z.T @ z / (len(z) - 1)                                                          # (dim, dim)
            covariance = covariance + (c.square().sum() - c.diagonal().square().sum()) / len(c)
        return 25 * invariance + 25 * variance + covariance, [(z1, z2)]


class HEX(nn.Module):
    """The wrapper: loss = (1 - alpha) own + alpha scale mean over pairs of F(a, b), F one of LOSSES.

    method: a Method, or any module with its forward, loss and (optional) after_step. alpha, scale: the method's by
    default, else 0.1 and 1. The first `warmup` epochs use the method's own loss. ValueError: an unknown loss.
    """

    def __init__(self, method, loss="hex", *, alpha=None, scale=None, temperature=0.1, threshold=ADAPTIVE, beta=1.0,
                 tau_plus=0.1, warmup=0):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss = {loss!r} is not one of {', '.join(LOSSES)}")
        self.method, self.name, self.threshold, self.warmup = method, loss, threshold, warmup
        self.alpha = getattr(method, "alpha", 0.1) if alpha is None else alpha
        self.scale = getattr(method, "scale", 1.0) if scale is None else scale
        self.temperature, self.beta, self.tau_plus = temperature, beta, tau_plus

    def forward(self, x1, x2):
        return self.method(x1, x2)

    def loss(self, *embeddings, epoch=0, threshold=None):
        """-> loss (scalar), stats (detached scalars). threshold: for this batch (the oracle's needs its labels)."""
        with torch.autocast(embeddings[0].device.type, enabled=False):
            embeddings = [e.to(torch.promote_types(e.dtype, torch.float32)) if e.is_floating_point() else e for e in embeddings]
            own, pairs = self.method.loss(*embeddings)
            own = torch.as_tensor(own, device=embeddings[0].device)
            stats = {"own": own.detach()}
            if self.name == "base" or epoch < self.warmup:
                loss = own
            elif not pairs:
                raise ValueError(f"loss = {self.name!r} needs pairs (a, b), and the method's loss returned none")
            else:
                terms = [self.term(a, b, epoch, threshold or self.threshold) for a, b in pairs]
                term = sum(value for value, _ in terms) / len(terms)
                for key in terms[0][1]:
                    stats[key] = sum(each[key] for _, each in terms) / len(terms)
                stats[self.name] = term.detach()
                loss = self.alpha * self.scale * term + ((1 - self.alpha) * own if self.alpha < 1 else 0)
            # Every output takes part, with weight 0 where the loss does not use it: DDP waits for each parameter.
            return loss + sum(0 * e.sum() for e in embeddings if e.requires_grad), stats

    def term(self, a, b, epoch, threshold):
        if self.name in ("infonce", "dcl"):
            return {"infonce": info_nce, "dcl": dcl}[self.name](a, b, self.temperature), {}
        return hex_nce(a, b, self.temperature, threshold=threshold, beta=self.beta, tau_plus=self.tau_plus,
                       released=self.name == "released", epoch=epoch)

    def after_step(self, step):
        getattr(self.method, "after_step", lambda step: None)(step)


METHODS = {"simclr": SimCLR, "nnclr": NNCLR, "mocov3": MoCoV3, "byol": BYOL, "simsiam": SimSiam, "barlow": BarlowTwins,
           "vicreg": VICReg}


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


def build_backbone(name, size=224, norm="batch"):
    """A torchvision classification model by name, its last Linear an Identity: (module, its number of features).

    ResNets get a 3x3 stem without max-pool for views of 64 pixels or less. UserError: unknown or unusable.
    """
    models = torchvision.models.list_models(module=torchvision.models)
    if name == "pixels":                                                        # the raw pixels, to hold a probe against
        return nn.Flatten(), 3 * size * size
    named = {"resnet10_narrow": NarrowResNet} | {m: torchvision.models.get_model_builder(m) for m in models}
    if name not in named:
        near = difflib.get_close_matches(name, named, 4, 0.4)
        raise UserError(f"--backbone {name}: unknown; near matches: {', '.join(near) or 'resnet18, resnet50'}", 2)
    accepted, kind = inspect.signature(named[name]).parameters, {}
    resnet = "norm_layer" in accepted or named[name].__module__.endswith("resnet")
    if norm == "group":
        if not resnet:
            raise UserError(f"--norm group: only ResNets take it, not {name}; use --norm batch or a ResNet", 2)
        kind["norm_layer"] = group_norm
    if name.startswith("vit_"):
        kind["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        kind.update(aux_logits=False, init_weights=True)
    try:
        model = named[name](**kind)
        linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linears:
            raise ValueError("it has no Linear classifier to remove")
        parent, _, leaf = linears[-1].rpartition(".")
        width = model.get_submodule(linears[-1]).in_features
        setattr(model.get_submodule(parent), leaf, nn.Identity())
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
        raise UserError(f"--backbone {name}: cannot work at --size {size}: {str(error).splitlines()[0]}", 2) from error
    return model, width


# --- Data and augmentation --------------------------------------------------------------------------------------------

FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, SIGMA, SOLARISE = range(8)   # the columns of a view's parameters
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                       # ImageNet's, for all data
GREY_WEIGHTS = (0.2989, 0.587, 0.114)

CIFAR100_SUPER = [  # super-class of each of CIFAR-100's classes (Krizhevsky 2009)
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10,
    12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16,
    12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13]


def generator(*key):
    """A random generator that depends on the key alone."""
    return random.Random(" ".join(map(str, key)))


def permutation(count, *key):
    return torch.randperm(count, generator=torch.Generator().manual_seed(generator(*key).getrandbits(63)))


class Pictures:
    """uint8 pictures (n, 3, H, W) in memory, with fine labels and, where the data have them, coarse ones (or None)."""

    def __init__(self, pictures, targets, coarse=None):
        self.pictures, self.targets, self.coarse, self.bad = pictures, targets, coarse, set()

    def __len__(self):
        return len(self.targets)

    def read(self, index):
        return self.pictures[index]

    def name(self, index):
        return f"picture {index}"


class Folder(torchvision.datasets.ImageFolder):
    """ROOT/<class>/*: every file but dot-files is a picture, whatever its name."""
    coarse = None

    def __init__(self, root, classes=None, allow_empty=False):
        self.only, self.bad = classes, set()
        try:
            super().__init__(root, is_valid_file=lambda path: not os.path.basename(path).startswith("."),
                             allow_empty=True)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"{root}: no class folders with pictures there: expected {root}/<class>/<picture> "
                            f"(a flat ImageNet val/ is sorted into classes by valprep.sh); {error}") from error
        empty = set(self.classes) - {self.classes[target] for target in self.targets}
        if empty and not allow_empty:
            raise UserError(f"{os.path.join(root, min(empty))}: the class folder is empty: "
                            "fill it, remove it, or give --skip-bad-files")
        self.targets = torch.tensor(self.targets, dtype=torch.long)
        paths = [b"", *(os.fsencode(path) for path, _ in self.samples)]
        self.ends = torch.tensor(list(itertools.accumulate(map(len, paths))))   # one tensor for all names: loader processes
        self.paths = torch.frombuffer(bytearray(b"".join(paths) + b" "), dtype=torch.uint8)     # share it, however many
        del self.samples, self.imgs

    def __len__(self):
        return len(self.targets)

    def find_classes(self, directory):
        classes = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        if not classes:
            raise FileNotFoundError("only hidden folders")
        missing = sorted(set(self.only or []) - set(classes))
        if missing:
            raise UserError(f"--classes: {missing[0]} is no folder of {directory}")
        classes = sorted(self.only) if self.only else classes
        return classes, {name: index for index, name in enumerate(classes)}

    def path(self, index):
        """The file's path as it is, bytes that are not UTF-8 included."""
        return os.fsdecode(self.paths[self.ends[index]:self.ends[index + 1]].numpy().tobytes())

    def name(self, index):
        """The file, in one line of text: a line feed in its name is written as \\n."""
        return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda odd: repr(odd[0])[1:-1], self.path(index))

    def read(self, index):
        """(3, H, W) uint8, upright: JPEG (grey and CMYK too), PNG (16 bits too), WebP or GIF, whatever the suffix."""
        try:
            with open(self.path(index), "rb") as file:                    # (torchvision's own wants UTF-8 names)
                data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
            picture = torchvision.io.decode_image(data, mode="RGB", apply_exif_orientation=True)
        except Exception as error:
            reason = re.sub(r".*\.cpp:\d+, ", "", (str(error).strip() or type(error).__name__).splitlines()[0])
            raise UserError(f"{self.name(index)}: not a readable picture ({reason}): "
                            "mend or remove the file, or give --skip-bad-files") from None
        picture = picture[0] if picture.ndim == 4 else picture                  # an animated GIF's first frame
        return (picture.to(torch.int32) // 257).to(torch.uint8) if picture.dtype == torch.uint16 else picture


def draw_shapes(count, seed):
    """The embedded data set: `count` 32x32 pictures of 12 kinds: polygon, star, flower, frame of 3, 4, 6 corners.

    Colours, place, size, angle and background are random: only shape tells. Fine label: kind; coarse: family.
    """
    g = torch.Generator().manual_seed(seed)
    kind = torch.arange(count) % 12
    family, corners = kind // 3, torch.tensor([3.0, 4.0, 6.0])[kind % 3, None, None]

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=g)

    axis = torch.linspace(-1, 1, 64)                                            # drawn at 64 pixels, halved below
    x, y = (axis.view(shape) - uniform(-0.2, 0.2, 1, 1) for shape in ((1, 1, -1), (1, -1, 1)))
    radius, angle = torch.hypot(x, y) / uniform(0.5, 0.8, 1, 1), torch.atan2(y, x) + uniform(0, 2 * math.pi, 1, 1)
    half = math.pi / corners                                                    # half the angle of a sector
    phi = (angle % (2 * half) - half).abs()                                     # 0 between corners, `half` at a corner
    polygon = half.cos() / phi.cos()
    star = 0.4 * half.sin() / (0.4 * phi.sin() + (half - phi).sin())            # straight from corner to notch
    flower = 0.65 - 0.35 * (corners * angle).cos()
    edge = torch.stack([polygon, star, flower, polygon])[family, torch.arange(count)]
    hole = ((family == 3)[:, None, None] & (radius < 0.6 * edge))
    inside = F.avg_pool2d(((radius < edge) & ~hole).float()[:, None], 2)        # (count, 1, 32, 32)
    dark, bright, swap = uniform(0, 0.35, 3, 1, 1), uniform(0.65, 1, 3, 1, 1), uniform(0, 1, 1, 1, 1) < 0.5
    back, ink = torch.where(swap, dark, bright), torch.where(swap, bright, dark)    # seen without colour, too
    ramp = uniform(-0.2, 0.2, 3, 1, 1) * axis[::2] + uniform(-0.05, 0.05, 3, 32, 32)
    pictures = torch.lerp(back + ramp, ink, inside).clamp(0, 1)
    return Pictures((255 * pictures).byte(), kind, family)


def read_lines(path):
    """The lines of a text file, without blank ones and doubles. ValueError: there are none, or it is not text."""
    with open(path, encoding="utf-8-sig") as file:
        lines = list(dict.fromkeys(line.strip() for line in file if line.strip()))
    if not lines:
        raise ValueError("the file is empty")
    return lines


def load_data(cfg):
    """-> train, val: something with len, read(index), name(index), targets (tensor) and coarse (tensor or None)."""
    if cfg.data == "shapes":
        return draw_shapes(4096, 0), draw_shapes(1024, 1)
    if cfg.data in ("cifar10", "cifar100"):
        kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[cfg.data]
        root = cfg.root or "data"
        for turn in (True, False):                                              # the first rank of a node downloads
            if turn == (int(os.environ.get("LOCAL_RANK", 0)) == 0):
                try:
                    splits = [kind(root, train=train, download=turn) for train in (True, False)]
                except (OSError, RuntimeError) as error:
                    raise UserError(f"--data {cfg.data} --root {root}: cannot get it ({error}); put its archive, "
                                    f"{kind.filename}, into {root}") from error
            if world() > 1:
                dist.barrier()
        lookup = torch.tensor(CIFAR100_SUPER) if cfg.data == "cifar100" else None
        return [Pictures(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets),
                         None if lookup is None else lookup[split.targets]) for split in splits]
    for split in ("train", "val"):
        if not os.path.isdir(os.path.join(cfg.root, split)):
            raise UserError(f"--root {cfg.root}: there is no folder {split}/ in it: expected "
                            "ROOT/train/<class>/* and ROOT/val/<class>/*", 2)
    try:
        only = read_lines(cfg.classes) if cfg.classes else None
    except (OSError, ValueError) as error:
        raise UserError(f"--classes {cfg.classes}: cannot be read: {error}", 2) from error
    train, val = (Folder(os.path.join(cfg.root, split), only, cfg.skip_bad_files) for split in ("train", "val"))
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(f"--root {cfg.root}: train/ and val/ hold different classes: {', '.join(odd[:5])}")
    for split, pictures, least in (("train", train, max(2, world())), ("val", val, 1)):
        if len(pictures) < least:
            raise UserError(f"--root {cfg.root}: {len(pictures)} pictures in {split}/ are too few; fill it")
    return train, val


def random_crop(rng, height, width, smallest):
    """top, left, height, width of Inception's crop: area in [smallest, 1], aspect ratio in [3/4, 4/3], 10 tries."""
    for _ in range(10):
        area, ratio = height * width * rng.uniform(smallest, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    h, w = min(height, max(1, round(width * 4 / 3))), min(width, max(1, round(height * 4 / 3)))
    return (height - h) // 2, (width - w) // 2, h, w


class Views(torch.utils.data.Dataset):
    """(epoch, index) -> crops (views, 3, size, size) uint8, their parameters (views, 8), index, the index that was read.

    A pure function of (seed, epoch, index, view): worker, rank, batch size and resume do not enter. The device applies
    the parameters (`augment`). views=0: one centre crop. skip: an unreadable picture is replaced by the next readable.
    """

    def __init__(self, pictures, size, *, views=2, seed=0, crop_min=0.08, blur=0.0, solarise=0.0, grey=0.2,
                 colour=True, skip=False):
        self.pictures, self.size, self.views, self.seed, self.crop_min = pictures, size, views, seed, crop_min
        self.blur, self.solarise, self.grey, self.colour, self.skip = blur, solarise, grey, colour, skip

    def __len__(self):
        return len(self.pictures)

    def read(self, index):
        for tried in range(len(self) if self.skip else 1):
            try:
                return self.pictures.read((index + tried) % len(self)), (index + tried) % len(self)
            except UserError:
                if not self.skip:
                    raise
        raise UserError("no file of the data can be read")

    def __getitem__(self, key):
        epoch, index = key
        picture, used = self.read(index)
        if not self.views:
            side = self.size if self.size <= 64 else self.size * 256 // 224
            crop = TF.center_crop(TF.resize(picture, [side], antialias=True), [self.size, self.size])
            return crop[None], torch.tensor([[0.0, 1, 1, 1, 0, 0, 0, 0]]), index, used
        crops, parameters = zip(*(self.view(picture, generator(self.seed, epoch, index, view))
                                  for view in range(self.views)), strict=True)
        return torch.stack(crops), torch.tensor(parameters, dtype=torch.float32), index, used

    def view(self, picture, rng):
        top, left, height, width = random_crop(rng, *picture.shape[1:], self.crop_min)
        crop = TF.resized_crop(picture, top, left, height, width, [self.size, self.size], antialias=True)
        flip, jitter, grey, blur, solarise = (rng.random() for _ in range(5))
        factors = [rng.uniform(0.2, 1.8) for _ in range(3)] + [rng.uniform(-0.2, 0.2)]
        sigma = rng.uniform(0.1, 2.0)
        return crop, [flip < 0.5, *(factors if self.colour and jitter < 0.8 else (1, 1, 1, 0)),
                      self.colour and grey < self.grey, sigma if blur < self.blur else 0, solarise < self.solarise]


def luminance(x):
    return (x * x.new_tensor(GREY_WEIGHTS).view(3, 1, 1)).sum(-3, keepdim=True)


def shift_hue(x, shift):
    """x: (B, 3, H, W) in [0, 1]; shift: (B, 1, 1), in turns of the colour circle."""
    value, chroma, (r, g, b) = x.amax(1), x.amax(1) - x.amin(1), x.unbind(1)
    safe = torch.where(chroma == 0, 1, chroma)
    sixth = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
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
def augment(crops, parameters, *, colour=True, blur=False, solarise=False):
    """Crops (B, 3, S, S) uint8 and their parameters (B, 8) -> normalised float views, the whole batch at once."""
    parameters = parameters[:, :, None, None, None]                             # each (B, 1, 1, 1)
    x = crops.float() / 255
    x = torch.where(parameters[:, FLIP] > 0, x.flip(-1), x)
    if colour:
        x = (x * parameters[:, BRIGHTNESS]).clamp(0, 1)
        x = torch.lerp(luminance(x).mean((-3, -2, -1), keepdim=True), x, parameters[:, CONTRAST]).clamp(0, 1)
        x = torch.lerp(luminance(x), x, parameters[:, SATURATION]).clamp(0, 1)
        x = shift_hue(x, parameters[:, HUE, 0])
        x = torch.where(parameters[:, GREY] > 0, luminance(x), x)
    if blur:
        x = gaussian_blur(x, parameters[:, SIGMA].flatten(), min(23, crops.shape[-1] // 10 | 1))
    if solarise:
        x = torch.where((parameters[:, SOLARISE] > 0) & (x >= 0.5), 1 - x, x)
    x = (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


class Batches(torch.utils.data.Sampler):
    """This rank's part of global batch k = order[k B : (k + 1) B], as (epoch, index); the order is of (key, epoch).

    groups: the number of batches is a multiple of it, a trailing part of a group is dropped.
    """

    def __init__(self, indices, batch, *key, groups=1):
        self.indices, self.batch, self.key = torch.as_tensor(indices), batch, key
        self.count = len(indices) // batch // groups * groups
        self.epoch = self.start = 0                                             # start: the first batch, for a resume

    def __len__(self):
        return self.count - self.start

    def __iter__(self):
        order = self.indices[permutation(len(self.indices), *self.key, self.epoch)].tolist()
        share = self.batch // world()
        for k in range(self.start, self.count):
            first = k * self.batch + rank() * share
            yield [(self.epoch, i) for i in order[first:first + share]]


def start(source):
    """iter(source). Signals wait meanwhile, in its new processes until those have left the group (detach_worker)."""
    if source.num_workers:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        multiprocessing.resource_tracker.ensure_running()                       # a helper of spawn; it unblocks some
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(source)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def detach_worker(_):
    """A loader process leaves the run's process group: what stops the group must not stop it before the step ends."""
    os.setsid()
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)                                     # drops those that wait
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)


def loader(views, batches, cfg):
    """batches: lists of (epoch, index). Yields what Views gives, stacked.

    Loader processes are spawned: a fork beside running threads (autograd's, gloo's, CUDA's) now and then never returns.
    That takes them seconds, so a short list of batches is read without them.
    """
    workers = 0 if isinstance(batches, list) and len(batches) <= 16 else cfg.workers
    return torch.utils.data.DataLoader(
        views, batch_sampler=batches, num_workers=workers, pin_memory=cfg.device == "cuda", persistent_workers=workers > 0,
        worker_init_fn=detach_worker if workers else None, multiprocessing_context="spawn" if workers else None)


def note_bad_files(pictures, index, used):
    """Remembers the files that --skip-bad-files passed over: from the one asked for to the one before that read."""
    for first, last in zip(index.tolist(), used.tolist(), strict=True):
        pictures.bad.update(pictures.name(i % len(pictures)) for i in range(first, last + len(pictures) * (last < first)))


# --- Optimiser and schedule -------------------------------------------------------------------------------------------


class LARS(torch.optim.Optimizer):
    """You et al. 2017: SGD with momentum whose rate is scaled, tensor by tensor, by eta |w| / (|g| + decay |w|).

    Tensors of one dimension (biases, norms) are neither decayed nor scaled. clip: the factor is at most 1 / lr
    (the authors' setting, with eta 0.02; common for ImageNet is eta 0.001 without).
    """

    def __init__(self, params, lr, *, momentum=0.9, weight_decay=0.0, eta=0.02, clip=True):
        params = list(params)
        groups = [dict(params=[p for p in params if p.ndim > 1], weight_decay=weight_decay, adapt=True),
                  dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0, adapt=False)]
        super().__init__([group for group in groups if group["params"]],
                         dict(lr=lr, momentum=momentum, eta=eta, clip=clip))

    def add_param_group(self, group):
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads, lr, decay = [p.grad for p in params], group["lr"], group["weight_decay"]
            if not params:
                continue
            if group["adapt"]:
                w, g = (torch.stack(torch._foreach_norm(each)) for each in (params, grads))
                factor = group["eta"] * w / (g + decay * w + 1e-8)
                factor = (factor / lr).clamp(max=1) if group["clip"] else factor
                factor = torch.where((w > 0) & (g > 0), factor, 1)
                grads = torch._foreach_add(grads, params, alpha=decay)
                torch._foreach_mul_(grads, list(factor.unbind()))
            buffers = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            torch._foreach_add_(params, buffers, alpha=-lr)


def learning_rate(step, total, warmup, peak):
    """Linear over `warmup` steps to `peak`, then half a cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


# --- Pre-training -----------------------------------------------------------------------------------------------------


def build_model(cfg):
    """The wrapped method on the CPU; its weights are a function of the seed."""
    torch.manual_seed(cfg.seed)
    backbone, width = build_backbone(cfg.backbone, cfg.size, cfg.norm)
    kind = METHODS[cfg.method]
    accepted = inspect.signature(kind).parameters
    heads = {name: getattr(cfg, name) for name in ("hidden", "dim", "predictor", "queue", "ema", "temperature")
             if name in accepted and getattr(cfg, name) is not None}
    try:
        method = kind(backbone, width, norm=group_norm if cfg.norm == "group" else nn.BatchNorm1d, **heads)
    except RuntimeError as error:
        raise UserError(f"--method {cfg.method}: its heads cannot be made ({str(error).splitlines()[0]}): lower --hidden, "
                        "--dim, --predictor or --queue", 2) from error
    threshold = {"adaptive": AdaptiveThreshold(cfg.quantile), "oracle": None,
                 "step": StepThreshold(0.9, 0.1, max(1, math.ceil(cfg.epochs / 10))),
                 "cosine": CosineThreshold(0.9, 0.3, cfg.epochs)}[cfg.threshold]
    return HEX(method, cfg.loss, alpha=cfg.alpha, temperature=cfg.temperature, threshold=threshold, beta=cfg.beta,
               tau_plus=cfg.tau_plus, warmup=cfg.hex_warmup)


def train_views(train, cfg):
    """The two views of each picture, as the configuration asks for them."""
    return Views(train, cfg.size, seed=cfg.seed, crop_min=cfg.crop_min, blur=cfg.blur, solarise=cfg.solarise,
                 grey=cfg.grey, skip=cfg.skip_bad_files)


class Stopwatch:
    """Milliseconds a stage. On CUDA, exact=True takes events; else the host's clock (all that the data wait needs)."""

    def __init__(self, exact=False):
        self.exact, self.marks = exact, []

    def __call__(self, stage):
        """The stage that ends now."""
        moment = time.perf_counter()
        if self.exact and torch.cuda.is_available():
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.marks.append((stage, moment))

    def spans(self):
        """[(stage, ms), ...] since the last call."""
        marks, self.marks = self.marks, self.marks[-1:]
        if self.exact and torch.cuda.is_available():
            torch.cuda.synchronize()
            return [(b[0], a[1].elapsed_time(b[1])) for a, b in zip(marks, marks[1:], strict=False)]
        return [(b[0], 1e3 * (b[1] - a[1])) for a, b in zip(marks, marks[1:], strict=False)]


def layout(tree, path=""):
    """{place in a nest of dicts and lists: shape and dtype of a tensor, or type}: what checkpoints of a run have in common."""
    if isinstance(tree, (dict, list)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, each in items for k, v in layout(each, f"{path}{'.' if path else ''}{key}").items()}
    return {path: (tree.shape, tree.dtype, tree.layout) if isinstance(tree, torch.Tensor) else type(tree)}


class Trainer:
    """The model, its optimiser and scaler, and one step of them: all that a checkpoint holds."""

    def __init__(self, cfg, train):
        self.cfg, self.train, self.steps, self.skipped = cfg, train, 0, 0       # steps done; skipped in a row
        self.asked, self.stop = False, False                                    # a signal on this rank; agreed by all
        self.lap = Stopwatch(cfg.bench is not None)
        self.batches = Batches(torch.arange(len(train)), cfg.batch_size, cfg.seed, "order", groups=cfg.accumulate)
        self.per_epoch = len(self.batches) // cfg.accumulate
        self.total = cfg.epochs * self.per_epoch
        if not self.per_epoch and cfg.epochs:
            raise UserError(f"--batch-size {cfg.batch_size} --accumulate {cfg.accumulate}: more than the {len(train)} train "
                            "pictures; lower them", 2)
        self.model = build_model(cfg)
        if cfg.micro_batch and cfg.micro_batch < cfg.batch_size:
            for path, module in self.model.named_modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "p", 0):
                    raise UserError(f"--micro-batch {cfg.micro_batch}: {path} ({type(module).__name__}) makes it "
                                    "inexact; use --norm group and a backbone without dropout", 2)
        self.model.to(cfg.device, memory_format=torch.channels_last)
        self.ddp = self.model
        if world() > 1:
            if cfg.device == "cuda":
                self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            self.ddp = DistributedDataParallel(self.model, forward_sync_buffers=False)
        if cfg.compile:
            self.model.method.compile()
        self.peak = cfg.lr * cfg.batch_size * cfg.accumulate / 256
        self.optimizer = LARS((p for p in self.model.parameters() if p.requires_grad), self.peak, eta=cfg.eta,
                              weight_decay=cfg.weight_decay, clip=cfg.clip)
        self.scaler = torch.amp.GradScaler(cfg.device, enabled=cfg.amp == "fp16")
        # A step that is skipped leaves these as they were, too: a forward pass has already changed them.
        self.running = [buffer for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
                        for buffer in module.buffers()]

    def state(self):
        return dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                    scaler=self.scaler.state_dict(), steps=self.steps)

    def save(self, path):
        """In rank 0. Not after a skipped step, or with weights that are not finite: the last good one stays."""
        if rank() == 0 and not self.skipped and all(p.isfinite().all() for p in self.model.parameters()):
            write_tensors(path, self.state())

    def load(self, path):
        state = read_tensors(path, "checkpoint")
        mine, theirs = layout(self.state()), layout(state)
        odd = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if odd or not 0 <= state["steps"] <= self.total:
            raise UserError(f"{path}: not a checkpoint of this run: {', '.join(odd[:5]) or 'its step'} "
                            f"{'differ' if len(odd) > 1 else 'differs'}; delete it to start again, or give another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps = state["steps"]

    def embed(self, crops, parameters):
        """(m, 2, 3, S, S) uint8 and (m, 2, 8) -> the method's embeddings, each (m, ...)."""
        cfg = self.cfg
        x1, x2 = augment(crops.transpose(0, 1).flatten(0, 1), parameters.transpose(0, 1).flatten(0, 1),
                         blur=cfg.blur > 0, solarise=cfg.solarise > 0).chunk(2)
        self.lap("augment")
        with autocast(cfg):
            return self.ddp(x1, x2)

    def gradients(self, crops, parameters, epoch, labels, last):
        """Adds one loss's gradient to .grad. Returns loss, stats, and the flags (2,): not finite, asked to stop; on any rank.

        With --micro-batch: embeddings of all without gradient, the loss's gradient in the embeddings, then the
        embeddings of m images at a time once more, with gradient (Gao et al. 2021). last: DDP reduces here.
        """
        cfg, ddp = self.cfg, self.ddp
        held = contextlib.nullcontext if world() == 1 else ddp.no_sync
        m = (cfg.micro_batch or cfg.batch_size) // world()
        chunks = list(zip(crops.split(m), parameters.split(m), strict=True))
        with contextlib.nullcontext() if last and len(chunks) == 1 else held(), torch.set_grad_enabled(len(chunks) == 1):
            parts = [self.embed(*chunk) for chunk in chunks]
        embeddings = parts[0] if len(parts) == 1 else \
            [torch.cat(each).float().requires_grad_() for each in zip(*parts, strict=True)]
        self.lap("forward")
        loss, stats = self.model.loss(*embeddings, epoch=epoch,
                                      threshold=None if labels is None else OracleHierarchy(labels))
        flags = torch.stack([~loss.detach().isfinite(), torch.full_like(loss, self.asked, dtype=torch.bool)]).float()
        if world() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self.lap("loss")
        with contextlib.nullcontext() if last and len(chunks) == 1 else held():
            self.scaler.scale(loss / cfg.accumulate).backward()
        for i, chunk in enumerate(chunks if len(chunks) > 1 else []):
            rows = slice(i * m, (i + 1) * m)
            with contextlib.nullcontext() if last and i == len(chunks) - 1 else held():
                outputs = [(out, e.grad[rows].to(out.dtype)) for out, e in
                           zip(self.embed(*chunk), embeddings, strict=True) if out.requires_grad and e.grad is not None]
                torch.autograd.backward(*zip(*outputs, strict=True))
        self.lap("backward")
        return loss.detach(), stats, flags

    def step(self, source):
        """One optimiser step over `accumulate` losses. source: an iterator of the loader. Returns loss, stats, lr."""
        cfg, step = self.cfg, self.steps
        torch.manual_seed(generator(cfg.seed, "step", step, rank()).getrandbits(63))  # dropout, stochastic depth
        lr = learning_rate(step, self.total, cfg.lr_warmup * self.per_epoch, self.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        running = [buffer.clone() for buffer in self.running]
        flags, oracle = 0, cfg.threshold == "oracle" and cfg.loss in ("hex", "released")
        for part in range(cfg.accumulate):
            crops, parameters, index, used = next(source)
            note_bad_files(self.train, index, used)
            crops, parameters = (each.to(cfg.device, non_blocking=True) for each in (crops, parameters))
            labels = self.train.coarse[used].to(cfg.device) if oracle else None  # the one place where labels touch a loss
            self.lap("load")
            loss, stats, flag = self.gradients(crops, parameters, step // self.per_epoch, labels, part == cfg.accumulate - 1)
            flags = flags + flag
        # Read once a step, when the backward is queued: a GPU has work while the host waits for the loss.
        broken, self.stop = (flag > 0 for flag in flags.tolist())
        scale = self.scaler.get_scale() if cfg.amp == "fp16" else 0
        if not broken:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            broken = cfg.amp == "fp16" and self.scaler.get_scale() < scale      # fp16: a scale that fell is a skip
        if broken:
            for buffer, before in zip(self.running, running, strict=True):
                buffer.copy_(before)
        else:
            self.model.method.steps = self.total
            self.model.after_step(step + 1)
        self.steps, self.skipped = step + 1, self.skipped + 1 if broken else 0
        self.lap("optimiser")
        return loss, stats, lr


def autocast(cfg):
    kind = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.amp]
    return torch.autocast(cfg.device, dtype=kind, enabled=cfg.amp != "off")


def write(path, data):
    """Atomically: a reader, or a run that resumes, finds the old file or the new one. data: bytes or str."""
    data = data.encode() if isinstance(data, str) else data
    try:
        with open(path + ".tmp", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        raise UserError(f"{path}: cannot be written ({error.strerror}); what was there before is intact; "
                        "make room or give another --out, then run the same command again") from error


def write_tensors(path, tree):
    """Tensors in dicts and lists, atomically; read_tensors reads them."""
    file = io.BytesIO()
    torch.save(tree, file)
    write(path, file.getvalue())


def read_tensors(path, what):
    """torch.load that runs no code from the file. UserError: missing, damaged, or not a file of tensors."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                if parts.testzip():                                             # torch.load does not look at the checksums
                    raise ValueError("checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: not a readable {what} ({type(error).__name__}): "
                        "damaged, or not made of plain tensors; delete it or give another") from None


def list_bad_files(out, *splits):
    """bad_files.txt: what --skip-bad-files passed over, on any rank, now or before a resume. Every rank calls it."""
    path, found = os.path.join(out, "bad_files.txt"), [None] * world()
    mine = sorted(set().union(*(split.bad for split in splits)))
    if world() > 1:
        dist.all_gather_object(found, mine)
    found = set(mine).union(*filter(None, found))
    if found and rank() == 0:
        if os.path.exists(path):
            found |= set(open(path, encoding="utf-8", errors="surrogateescape").read().split("\n")[:-1])
        write(path, "".join(f"{name}\n" for name in sorted(found)).encode(errors="surrogateescape"))


def plain(value):
    value = value.item() if isinstance(value, torch.Tensor) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Metrics:
    """metrics.jsonl: a line of JSON an event, in rank 0. keep: the steps that a resumed run has behind it."""

    def __init__(self, out, keep):
        self.path, lines = os.path.join(out, "metrics.jsonl"), []
        if rank() == 0:
            if os.path.exists(self.path):
                for line in open(self.path, encoding="utf-8", errors="replace"):
                    with contextlib.suppress(ValueError, TypeError, KeyError):  # the last line of a killed run
                        if json.loads(line)["step"] <= keep:
                            lines.append(line)
            write(self.path, "".join(lines))

    def __call__(self, **event):
        if rank() == 0:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({key: plain(value) for key, value in event.items()}) + "\n")
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written ({error.strerror}); make room") from error


@torch.no_grad()
def emergence(model, cfg, train, val, picture=None):
    """Once an epoch, for every --loss: what H(i) is on one fixed batch, and how the features fare on fixed subsets.

    Labels are used for logging alone. picture: path of neighbours.png. Returns scalars.
    """
    model.eval()
    if world() > 1:
        for buffer in model.buffers():                                          # BatchNorm without SyncBatchNorm
            dist.broadcast(buffer, 0)
    share = min(256, len(train)) // world()
    fixed = permutation(len(train), "fixed")[:share * world()]
    mine = fixed[rank() * share:(rank() + 1) * share]
    views = Views(train, cfg.size, seed="fixed", crop_min=cfg.crop_min, grey=cfg.grey, skip=cfg.skip_bad_files)
    crops, parameters, _, used = next(start(loader(views, [[(0, i) for i in mine.tolist()]], cfg)))
    x1, x2 = (augment(crops[:, v].to(cfg.device), parameters[:, v].to(cfg.device)) for v in (0, 1))
    with autocast(cfg):
        embeddings = model(x1, x2)
    a, b = model.method.loss(*(e.float() for e in embeddings))[1][0]
    eps, local = local_mask(a, b, AdaptiveThreshold(cfg.quantile))              # (2 share, 2N)
    out = dict(threshold=eps, local=mean_over_ranks(local.sum(1).float().mean()))
    used = used.to(cfg.device)
    everyone = gather(used).repeat(2)
    negative = used.repeat(2)[:, None] != everyone
    for labels, name in ((train.targets, ""), (train.coarse, "_coarse")):
        if labels is not None:
            same = labels.to(cfg.device)[used].repeat(2)[:, None] == labels.to(cfg.device)[everyone]
            counts = torch.stack([(same & local).sum(), local.sum(), (same & negative).sum(), negative.sum()]).float()
            counts = mean_over_ranks(counts)
            out["purity" + name], out["chance" + name] = counts[0] / counts[1], counts[2] / counts[3]
    z = F.normalize(torch.cat([gather(a), gather(b)]))
    out["std"] = z.std(0).mean() * math.sqrt(z.shape[1])                        # 1: spread out; 0: collapsed
    bank, query = (permutation(len(split), "subset")[:count] for split, count in ((train, 2048), (val, 512)))
    features, kept = extract(model.method.backbone, train, bank, cfg)
    tests, tested = extract(model.method.backbone, val, query, cfg)
    singular = torch.linalg.svdvals(features) if features.isfinite().all() else features.new_full((1,), math.nan)
    p = singular / singular.sum() + 1e-7
    out["rankme"] = (-p * p.log()).sum().exp()                                  # Garrido et al. 2023
    out["knn"] = nearest_neighbours(features, train.targets[bank[kept]], tests, val.targets[query[tested]])
    if picture and rank() == 0:
        draw_neighbours(picture, Views(train, cfg.size, views=0, skip=cfg.skip_bad_files), everyone.tolist(),
                        local.cpu(), (F.normalize(torch.cat([a, b])) @ z.T).cpu())
    model.train()
    return out


def draw_neighbours(path, views, index, local, cosine, rows=8, columns=8):
    """A row: an anchor, then the pictures in its H(i), the nearest first; blank where H(i) has no more.

    The anchors are the first of the fixed batch (which is in random order) whose H(i) is not empty.
    """
    grid = []
    for anchor in [i for i in range(len(local) // 2) if local[i].any()][:rows] or [0]:
        members = [j for j in cosine[anchor].argsort(descending=True).tolist() if local[anchor, j]]
        chosen = list(dict.fromkeys([index[anchor], *(index[j] for j in members)]))[:columns]
        strip = [views[0, i][0][0].float() / 255 for i in chosen]
        grid += strip + [torch.ones_like(strip[0])] * (columns - len(strip))
    file = io.BytesIO()
    torchvision.utils.save_image(torchvision.utils.make_grid(grid, nrow=columns, pad_value=1), file, format="png")
    write(path, file.getvalue())


@contextlib.contextmanager
def handled(handler):
    """Signals go to `handler`; before and after, to whatever they went to. (Python lets only its main thread set this.)"""
    main_thread = threading.current_thread() is threading.main_thread()
    before = {each: signal.signal(each, handler) for each in SIGNALS} if main_thread else {}
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)


def pretrain(trainer, val, out):
    """Trains, resumes, logs; leaves checkpoint.pt and backbone.pt. Returns the model."""
    cfg, train, batches, checkpoint = trainer.cfg, trainer.train, trainer.batches, os.path.join(out, "checkpoint.pt")
    if os.path.exists(checkpoint):
        trainer.load(checkpoint)
    note = Metrics(out, trainer.steps or -1)                                    # step 0 is noted again
    source, warned = loader(train_views(train, cfg), batches, cfg), False
    bar = tqdm(total=trainer.total, initial=trainer.steps, disable=rank() > 0, unit="step")

    def finish_the_step(*_):
        trainer.asked = True

    with handled(finish_the_step), bar:
        if trainer.steps == 0:
            early = os.path.join(out, "neighbours_early.png")
            note(event="epoch", step=0, epoch=0, **emergence(trainer.model, cfg, train, val, early))
        while trainer.steps < trainer.total:
            epoch, done = divmod(trainer.steps, trainer.per_epoch)
            batches.epoch, batches.start = epoch, done * cfg.accumulate
            iterator = start(source)
            trainer.lap("start")
            for step in range(trainer.steps + 1, (epoch + 1) * trainer.per_epoch + 1):
                loss, stats, lr = trainer.step(iterator)
                if trainer.skipped:
                    note(event="skipped", step=step, in_a_row=trainer.skipped)
                if trainer.skipped >= (50 if cfg.amp == "fp16" else 10):        # a scaler needs some to find its scale
                    raise UserError(f"the loss is not finite, {trainer.skipped} steps in a row, at step {step}: lower "
                                    "--lr, or use --amp bf16 or off; the last checkpoint is intact")
                if step % cfg.log_every == 0 or step == trainer.total:
                    spans = trainer.lap.spans()
                    spent = sum(ms for _, ms in spans) or 1e-9
                    speed = dict(images_per_second=cfg.batch_size * cfg.accumulate * 1e3 / spent
                                 * sum(stage == "optimiser" for stage, _ in spans),
                                 data_wait=sum(ms for stage, ms in spans if stage == "load") / spent)
                    stats = {key: mean_over_ranks(value).item() for key, value in (("loss", loss), *stats.items())}
                    note(event="step", step=step, epoch=epoch, **stats, lr=lr, **speed)
                    shown = {key: f"{stats[key]:.3g}" for key in ("loss", "threshold", "local") if key in stats}
                    bar.set_postfix(shown | {"img/s": f"{speed['images_per_second']:.0f}",
                                             "wait": f"{speed['data_wait']:.0%}"}, refresh=False)
                bar.update()
                ends = step % trainer.per_epoch == 0
                if ends:
                    figures = emergence(trainer.model, cfg, train, val)
                    note(event="epoch", step=step, epoch=epoch + 1, **figures)
                    if figures["std"] < 0.1 and not warned:
                        warned = True
                        announce(f"warning: the embeddings have collapsed (std {figures['std']:.3f} of 1 at epoch "
                                 f"{epoch + 1}): lower --lr, or check the augmentation")
                if ends or trainer.stop or cfg.checkpoint_every and step % cfg.checkpoint_every == 0:
                    trainer.save(checkpoint)
                    list_bad_files(out, train, val)
                if trainer.stop:
                    raise Interrupted
                trainer.lap("log")
            trainer.lap.marks.clear()
    backbone = {key: value.cpu() for key, value in trainer.model.method.backbone.state_dict().items()}
    if not all(value.isfinite().all() for value in backbone.values()):
        raise UserError("the weights are not finite: lower --lr, and give another --out")
    if rank() == 0:
        write_tensors(os.path.join(out, "backbone.pt"), backbone)
    if mean_over_ranks(torch.tensor(float(trainer.asked), device=cfg.device)) > 0:  # while the last epoch was described
        raise Interrupted
    return trainer.model


def bench(cfg, train):
    """Times --bench N steps after a warm-up; prints milliseconds and share a stage, and HEX's overhead over InfoNCE."""
    trainer, warm, steps = Trainer(cfg, train), 3, []
    source = loader(train_views(train, cfg), trainer.batches, cfg)

    def forever():
        while True:
            yield from start(source)
            trainer.batches.epoch += 1

    iterator = forever()
    for step in range(warm + cfg.bench):
        trainer.lap("start")
        trainer.steps = cfg.hex_warmup * trainer.per_epoch + min(step, trainer.per_epoch - 1)
        trainer.step(iterator)
        spans = trainer.lap.spans()
        if step >= warm:
            steps.append({stage: sum(ms for name, ms in spans if name == stage) for stage, _ in spans})
    whole = median(sum(each.values()) for each in steps)
    announce(f"{cfg.data} {cfg.method} {cfg.loss} {cfg.backbone} batch {cfg.batch_size} x {cfg.accumulate} on "
             f"{cfg.device} x {world()}, {torch.get_num_threads()} threads, {cfg.workers} workers: "
             f"median of {cfg.bench} steps")
    for stage in ("load", "augment", "forward", "loss", "backward", "optimiser"):
        middle = median(each.get(stage, 0) for each in steps)
        announce(f"{stage:10} {middle:9.2f} ms {middle / whole:6.1%}")
    covered = sum(v for each in steps for k, v in each.items() if k != "start") / sum(sum(e.values()) for e in steps)
    announce(f"{'step':10} {whole:9.2f} ms; in no stage {1 - covered:.1%}; "
             f"{cfg.batch_size * cfg.accumulate * 1e3 / whole:.0f} images/s")
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak, what = (torch.cuda.max_memory_allocated(), "GPU") if cfg.device == "cuda" else (resident, "process")
    announce(f"peak memory of the {what} {peak / 2**30:.2f} GiB")
    share = cfg.batch_size // world()
    width = cfg.dim or 128
    a, b = (torch.randn(share, width, device=cfg.device, requires_grad=True) for _ in range(2))
    watch, spent = Stopwatch(exact=True), {}
    for turn in range(8):
        for name, function in (("infonce", lambda: info_nce(a, b)), ("hex", lambda: hex_nce(a, b)[0])):
            watch("start")
            function().backward()
            watch(name)
            if turn:
                spent.setdefault(name, []).append(watch.spans()[-1][1])
            watch.marks.clear()
    ms = {name: median(each) for name, each in spent.items()}
    announce(f"loss forward + backward, {width} dimensions: infonce {ms['infonce']:.2f} ms, hex {ms['hex']:.2f} ms; "
             f"HEX's overhead over infonce: {(ms['hex'] - ms['infonce']) / whole:.1%} of a step")


# --- Evaluation -------------------------------------------------------------------------------------------------------

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)      # of the probe's heads, trained side by side


@torch.no_grad()
def extract(backbone, pictures, indices, cfg):
    """Features of centre crops, on every rank: (n, width) float32; and kept (n,) bool, False: the file was bad.

    Each rank reads a run of the indices, the last padded to the same length.
    """
    share = math.ceil(len(indices) / world())
    mine = indices[(rank() * share + torch.arange(share)).clamp(max=len(indices) - 1)]
    views, rows, kept = Views(pictures, cfg.size, views=0, skip=cfg.skip_bad_files), [], []
    batches = [[(0, i) for i in part.tolist()] for part in mine.split(256)]
    for crops, parameters, index, used in start(loader(views, batches, cfg)):
        note_bad_files(pictures, index, used)
        with autocast(cfg):
            x = augment(crops[:, 0].to(cfg.device), parameters[:, 0].to(cfg.device), colour=False)
            rows.append(backbone(x).float())
        kept.append(index == used)
    rows, kept = gather(torch.cat(rows))[:len(indices)], gather(torch.cat(kept).to(cfg.device))[:len(indices)].cpu()
    if not kept.any():
        raise UserError(f"none of {len(indices)} pictures could be read, the first: {pictures.name(int(indices[0]))}")
    return rows[kept.to(rows.device)], kept


def nearest_neighbours(bank, labels, queries, answers, k=20, temperature=0.07):
    """k-NN accuracy in percent: cosine, votes weighted by e^{s/0.07} (Wu et al. 2018)."""
    bank, labels, answers = F.normalize(bank), labels.to(bank.device), answers.to(bank.device)
    votes, right = int(max(labels.max(), answers.max())) + 1, 0
    for rows, truth in zip(F.normalize(queries).split(256), answers.split(256), strict=True):
        near, index = (rows @ bank.T).topk(min(k, len(bank)))
        tally = near.new_zeros(len(rows), votes).scatter_add_(1, labels[index], (near / temperature).exp())
        right += (tally.argmax(1) == truth).sum().item()
    return 100 * right / len(answers)


def place_in_class(targets):
    """For each entry: how many of its class stand before it."""
    order, counts = targets.argsort(stable=True), targets.bincount()
    place = torch.empty_like(targets)
    place[order] = torch.arange(len(targets)) - (counts.cumsum(0) - counts)[targets[order]]
    return place


def labelled_pictures(cfg, train):
    """Indices of the train pictures whose labels the probe may see: all, a balanced share, or a published list."""
    classes = int(train.targets.max()) + 1
    if cfg.label_list:
        try:
            wanted, where = read_lines(cfg.label_list), {}
        except (OSError, ValueError) as error:
            raise UserError(f"--label-list {cfg.label_list}: cannot be read: {error}", 2) from error
        for i in range(len(train)):                                             # a picture goes by file or by class/file
            parts = train.name(i).split(os.sep)
            for key in (parts[-1], os.sep.join(parts[-2:])):
                where[key] = i if key not in where else None                    # None: of several pictures
        odd = [line for line in wanted if where.get(line) is None]
        if odd:
            raise UserError(f"--label-list {cfg.label_list}: {len(odd)} of {len(wanted)} names are of no train picture, or "
                            f"of several (then write class/file), the first: {odd[0]}")
        return torch.tensor(sorted({where[line] for line in wanted}))
    if not cfg.label_fraction:
        return torch.arange(len(train))
    total = round(cfg.label_fraction * len(train))
    if total < classes:
        raise UserError(f"--label-fraction {cfg.label_fraction}: {total} labels for {classes} classes leaves a class "
                        "empty; raise it", 2)
    order = permutation(len(train), "labels")
    targets = train.targets[order]                                              # in turn, one of each class that has more
    turn = place_in_class(targets) * classes + permutation(classes, "labels")[targets]
    return order[turn.argsort()[:total]].sort().values


def digest(state):
    """SHA-256 of tensors."""
    parts = hashlib.sha256()
    for name in sorted(state):
        parts.update(name.encode() + state[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return parts.hexdigest()


def evaluate(backbone, cfg, train, val):
    """The linear probe and k-NN on a frozen backbone. Returns what probe.json holds; accuracies in percent.

    Heads of every rate of RATES are trained together (SGD, batch 256, / 10 at 60 % and 80 %, decay 1e-5: the authors'
    probe), on cached features of centre crops, or for ImageNet on crops and flips. The best on a tenth of the labelled
    train pictures, which no head was trained on, is the one that is run on val.
    """
    started, before = time.time(), digest(backbone.state_dict())
    backbone.to(cfg.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    labelled = labelled_pictures(cfg, train)
    mark = hashlib.sha256(labelled.numpy().tobytes()).hexdigest()[:16]
    announce(f"probe: {len(labelled)} labelled pictures, sha256 of their indices {mark}")
    labelled = labelled[permutation(len(labelled), cfg.seed, "holdout")]
    targets = train.targets[labelled]
    held = place_in_class(targets) < (targets.bincount() // 10).clamp_min(1).minimum(targets.bincount() - 1)[targets]
    fit, hold = labelled[~held], labelled[held]
    if not len(hold):
        announce("warning: no class has two labelled pictures, one to hold out: the probe's rate is chosen on pictures it saw")
        hold = fit
    test_features, kept = extract(backbone, val, torch.arange(len(val)), cfg)
    test_targets = val.targets[kept].to(cfg.device)
    bank = fit[:262144]                                                         # of k-NN: what fits into a GPU's memory
    features, kept = extract(backbone, train, bank, cfg)
    bank_targets = train.targets[bank[kept]]
    knn = nearest_neighbours(features, bank_targets, test_features, test_targets)
    hold_features, kept = extract(backbone, train, hold, cfg)
    hold_targets = train.targets[hold[kept]].to(cfg.device)

    classes, batch = int(train.targets.max()) + 1, max(1, min(256, len(fit)) // world()) * world()
    torch.manual_seed(cfg.seed)
    heads = nn.Linear(features.shape[1], len(RATES) * classes).to(cfg.device)   # a head: `classes` rows, and their rate
    rates = torch.tensor(RATES, device=cfg.device).repeat_interleave(classes)
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, cfg.probe_epochs * share // 10) for share in (6, 8)])
    cached = cfg.data != "imagenet"
    batches = Batches(torch.arange(len(features)) if cached else fit, min(batch, max(1, len(features) // world()) * world()),
                      cfg.seed, "probe")
    views = Views(train, cfg.size, views=1, seed=cfg.seed, colour=False, skip=cfg.skip_bad_files)
    source = None if cached else loader(views, batches, cfg)
    for epoch in tqdm(range(cfg.probe_epochs), disable=rank() > 0, desc="probe", leave=False):
        batches.epoch = epoch
        for item in batches if cached else start(source):
            if cached:
                rows = torch.tensor([i for _, i in item])
                x, y = features.index_select(0, rows.to(cfg.device)), bank_targets[rows].to(cfg.device)
            else:
                with torch.no_grad(), autocast(cfg):
                    x = backbone(augment(item[0][:, 0].to(cfg.device), item[1][:, 0].to(cfg.device), colour=False)).float()
                y = train.targets[item[3]].to(cfg.device)
            optimizer.zero_grad(set_to_none=True)
            logits = heads(x).view(-1, classes)                                 # (B rates, classes)
            (len(RATES) * F.cross_entropy(logits, y.repeat_interleave(len(RATES)))).backward()
            for p in heads.parameters():
                p.grad = (mean_over_ranks(p.grad) + 1e-5 * p.detach()) * rates.view(-1, *[1] * (p.ndim - 1))
            optimizer.step()
        schedule.step()

    @torch.no_grad()
    def top(k, x, y):
        """Accuracy in percent of each head, the truth among its k largest logits."""
        near = heads(x).view(len(x), -1, classes).topk(min(k, classes)).indices                # (n, rates, k)
        return (100 * (near == y[:, None, None]).any(2).double().mean(0)).tolist()

    chosen = top(1, hold_features, hold_targets)
    best = max(range(len(RATES)), key=chosen.__getitem__)
    result = dict(top1=top(1, test_features, test_targets)[best], top5=top(5, test_features, test_targets)[best], knn=knn)
    if best in (0, len(RATES) - 1):
        announce(f"warning: the probe's best rate, {RATES[best]}, is at the edge of its grid {RATES}")
    if digest(backbone.state_dict()) != before:
        raise RuntimeError("the frozen backbone changed during the probe: its accuracy means nothing")
    return result | dict(rate=RATES[best], holdout=dict(zip(map(str, RATES), chosen, strict=True)), epochs=cfg.probe_epochs,
                         features="centre crops, cached" if cached else "crops and flips", train=len(fit),
                         held_out=int(held.sum()), val=len(test_targets), knn_bank=len(bank_targets),
                         labels_sha256=mark, backbone_sha256=before, seconds=round(time.time() - started, 1))


def load_backbone(cfg):
    """The backbone in --probe FILE: plain torchvision keys; fc.* is ignored, any other foreign key refused."""
    state = read_tensors(cfg.probe, "backbone")
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) and isinstance(v, torch.Tensor)
                                                           for k, v in state.items()):
        raise UserError(f"--probe {cfg.probe}: not a state dict of tensors; give a run's backbone.pt")
    backbone, _ = build_backbone(cfg.backbone, cfg.size, cfg.norm)
    mine, state = backbone.state_dict(), {k: v for k, v in state.items() if not k.startswith("fc.")}
    for odd, what in (([k for k in state if k not in mine], "holds keys that are not"),
                      ([k for k in mine if k not in state], "lacks keys"),
                      ([k for k in mine if k in state and mine[k].shape != state[k].shape], "has other shapes for keys")):
        if odd:
            raise UserError(f"--probe {cfg.probe}: {what} of --backbone {cfg.backbone} at --size {cfg.size}: "
                            f"{', '.join(odd[:4])}{' ...' if len(odd) > 4 else ''}")
    backbone.load_state_dict(state)
    return backbone


# --- Command line -----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message, 2)


def flag(name):
    return "--" + name.replace("_", "-")


def announce(text):
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


def parse(argv):
    """-> Config with every recipe filled in, and the set of fields that were given."""
    parser = Parser("hex.py", description="HEX (WACV 2025). Defaults in brackets; [recipe]: set by --data and --method.",
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
                    usage="hex.py [options]", allow_abbrev=False)
    groups = {}
    for each in fields(Config):
        meta = each.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        argument = dict(meta["argument"])
        if "choices" in argument:
            argument["choices"] = argument["choices"] or tuple(METHODS)
        elif each.type is bool:
            argument.setdefault("action", "store_true")
        if "type" in argument:
            argument["metavar"] = {int: "N", float: "X"}[each.type]
        default = "recipe" if any(each.name in recipe for recipe in RECIPES.values()) else each.default
        groups[meta["group"]].add_argument(flag(each.name), default=argparse.SUPPRESS, **argument, help=meta["text"] + (
            f" [{default}]" if default is not None and default is not False else ""))
    given = vars(parser.parse_args(argv))
    if "probe" in given and not os.path.isfile(given["probe"]):
        raise UserError(f"--probe {given['probe']}: there is no such file", 2)
    inherited, beside = {}, os.path.join(os.path.dirname(given.get("probe", "")), "config.json")
    if "probe" in given and not os.path.exists(beside):
        if "backbone" not in given:
            raise UserError(f"--probe {given['probe']}: there is no config.json beside it; name its --backbone and --data", 2)
    elif "probe" in given and not {"backbone", "data"} <= given.keys():         # architecture and data from beside the file
        saved = read_config(beside)
        inherited = {k: saved[k] for k in ("backbone", "norm", "size") if k not in given and k in saved}
        if "data" not in given and saved.get("data") in DATA:                   # evaluated on what it was trained on
            given = {k: saved[k] for k in ("data", "root", "classes") if saved.get(k) is not None} | given
    cfg = Config(**given)
    name = "small" if cfg.data == "folder" and (cfg.size or inherited.get("size", 224)) <= 64 else cfg.data
    recipe = RECIPES[name] | METHOD_RECIPES.get((name, cfg.method), {}) | inherited
    if cfg.norm == "group" and name in ("shapes", "small"):                     # so slow that rounding stays below 1e-4 over
        recipe["lr"] = 0.005                                                    # 20 steps: runs to compare 1 and 2 ranks by
    for name, value in recipe.items():
        if name not in given:
            setattr(cfg, name, value)
    cfg.device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if cfg.device == "cpu" and "amp" not in given:
        cfg.amp = "off"
    if cfg.workers is None:                        # on a CPU, pictures in memory are cropped fastest by the run itself
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cfg.workers = 0 if cfg.device == "cpu" and cfg.data not in IMAGE_FOLDERS else min(12, cores // 2)
    cfg.blur = (0.5 if cfg.size > 64 else 0.0) if cfg.blur is None else cfg.blur
    cfg.hex_warmup = round(0.1 * cfg.epochs) if cfg.hex_warmup is None else cfg.hex_warmup
    cfg.lr_warmup = max(0, min(10, math.ceil(0.1 * cfg.epochs), cfg.epochs - 1)) if cfg.lr_warmup is None else cfg.lr_warmup
    cfg.alpha = METHODS[cfg.method].alpha if cfg.alpha is None else cfg.alpha
    for name in ("root", "classes", "probe", "label_list"):
        if getattr(cfg, name):
            setattr(cfg, name, os.path.abspath(getattr(cfg, name)))
    check(cfg, set(given))
    return cfg, given


def check(cfg, given):
    """UserError for flags that contradict each other, or that something given makes meaningless."""
    heads = {"hidden", "dim", "predictor", "queue", "ema"} - set(inspect.signature(METHODS[cfg.method]).parameters)
    no_temperature = "temperature" not in inspect.signature(METHODS[cfg.method]).parameters
    threshold, weights = {"threshold", "quantile"}, {"beta", "tau_plus"}
    evaluation = {"probe", "data", "root", "classes", "size", "backbone", "norm", "amp", "seed", "probe_epochs",
                  "label_fraction", "label_list", "out", "device", "workers", "skip_bad_files"}
    ignored = [
        (cfg.probe is not None, {each.name for each in fields(Config)} - evaluation, "--probe"),
        (cfg.loss == "base", threshold | weights | {"alpha", "hex_warmup"}, "--loss base"),
        (cfg.loss == "base" and no_temperature, {"temperature"}, f"--loss base --method {cfg.method}"),
        (cfg.loss in ("infonce", "dcl"), threshold | weights, f"--loss {cfg.loss}"),
        (cfg.loss == "released", weights, "--loss released (its local term is a constant)"),
        (cfg.threshold != "adaptive", {"quantile"}, f"--threshold {cfg.threshold}"),
        (cfg.threshold == "oracle" and cfg.loss in ("infonce", "dcl", "base"), {"threshold"}, f"--loss {cfg.loss}"),
        (True, heads, f"--method {cfg.method}"),
        (cfg.data == "shapes", {"root"}, "--data shapes"),
        (cfg.data not in IMAGE_FOLDERS, {"classes", "skip_bad_files", "label_list"}, f"--data {cfg.data}"),
        (cfg.label_list is not None, {"label_fraction"}, "--label-list"),
        (cfg.bench is not None, {"out", "checkpoint_every", "log_every", "probe_epochs", "label_fraction", "label_list"},
         "--bench"),
    ]
    for condition, names, by in ignored:
        if condition and names & given:
            name = min(names & given)
            raise UserError(f"{flag(name)} {getattr(cfg, name)}: ignored by {by}; leave it out", 2)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    rules = [
        (cfg.data in IMAGE_FOLDERS and not cfg.root, f"--data {cfg.data}: needs --root DIR with train/ and val/"),
        (cfg.data in IMAGE_FOLDERS and cfg.root and not os.path.isdir(cfg.root), f"--root {cfg.root}: no such folder"),
        (cfg.batch_size % ranks, f"--batch-size {cfg.batch_size}: does not divide over {ranks} ranks; give a multiple"),
        (cfg.micro_batch and (cfg.batch_size % cfg.micro_batch or cfg.micro_batch % ranks), f"--micro-batch "
         f"{cfg.micro_batch}: must divide --batch-size {cfg.batch_size} and be a multiple of the {ranks} ranks"),
        (cfg.epochs and cfg.hex_warmup >= cfg.epochs, f"--hex-warmup {cfg.hex_warmup}: as long as --epochs "
         f"{cfg.epochs}: the loss would never be used; lower it"),
        (cfg.epochs and cfg.lr_warmup >= cfg.epochs, f"--lr-warmup {cfg.lr_warmup}: as long as --epochs {cfg.epochs}: the "
         "rate would never fall; lower it"),
        (cfg.blur and cfg.size < 20, f"--blur {cfg.blur}: at --size {cfg.size} its kernel is one pixel; leave it out"),
        (cfg.threshold == "oracle" and cfg.data not in ("shapes", "cifar100"), f"--threshold oracle: --data {cfg.data} "
         "has no super-classes; use shapes or cifar100"),
        (cfg.device == "cuda" and not torch.cuda.is_available(), "--device cuda: no CUDA GPU is visible; use --device cpu"),
        (cfg.compile and not shutil.which(os.environ.get("CXX", "g++").split()[0]), "--compile: torch.compile needs a C++ "
         "compiler, and there is no g++ (or $CXX) on the PATH; install one, or leave --compile out"),
        (cfg.bench and not cfg.epochs, "--bench: --epochs 0 has no step to time"),
        (cfg.backbone == "pixels" and cfg.epochs and not cfg.probe, "--backbone pixels: nothing to train; add --epochs 0"),
    ]
    for broken, message in rules:
        if broken:
            raise UserError(message, 2)
    if cfg.threshold == "oracle":
        announce("note: --threshold oracle takes H(i) from LABELS: a diagnostic, not self-supervised learning")


def read_json(path, key, kind):
    """A JSON file whose `key` is a `kind`. UserError: it is not."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if not isinstance(found[key], kind):
            raise ValueError(f"its {key} is {found[key]!r}")
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a readable {os.path.basename(path)} ({type(error).__name__}: {error}); delete it, or give "
                        "another --out") from error


def read_config(path):
    config = read_json(path, "config", dict)["config"]
    if not isinstance(config.get("backbone"), str) or not isinstance(config.get("size"), int):
        raise UserError(f"{path}: its config names no backbone and size; delete it, or give another --out")
    return config


def prepare_out(cfg, given, argv):
    """The run's folder: made, or found to be of the same experiment."""
    named = {"data", "method", "loss", "seed", "probe"} | NOT_THE_EXPERIMENT
    about = f"probe-{os.path.basename(os.path.dirname(cfg.probe))}" if cfg.probe else f"{cfg.method}-{cfg.loss}"
    further = "".join(f"-{name}_{os.path.basename(str(given[name]).rstrip('/'))}" for name in sorted(set(given) - named))
    out = cfg.out or os.path.join("runs", re.sub(r"[^\w.+-]", "_", f"{cfg.data}-{about}-s{cfg.seed}{further}"))
    path = os.path.join(out, "config.json")
    mine = {key: value for key, value in asdict(cfg).items() if key not in NOT_THE_EXPERIMENT}
    if os.path.exists(path):
        saved = read_config(path)
        odd = [f"{flag(key)} {saved.get(key)} there, {mine[key]} here" for key in mine if saved.get(key) != mine[key]]
        if odd:
            raise UserError(f"--out {out}: holds another experiment ({'; '.join(odd)}); give another --out")
    elif os.path.exists(out) and (not os.path.isdir(out) or set(os.listdir(out)) - {"config.json", "config.json.tmp"}):
        raise UserError(f"--out {out}: exists and is no folder of a run; give another --out")
    elif rank() == 0:                       # (another rank may see the temporary file of this)
        try:
            os.makedirs(out, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be made ({error.strerror})") from error
        versions = dict(python=sys.version.split()[0], torch=torch.__version__, torchvision=torchvision.__version__)
        write(path, json.dumps(dict(config=asdict(cfg), command=["hex.py", *argv], versions=versions, ranks=world(),
                                    threads=torch.get_num_threads()), indent=1))
    if world() > 1:
        dist.barrier()
    return out


@contextlib.contextmanager
def process_group(cfg):
    """Under torchrun, one process a device: NCCL for CUDA, gloo for the CPU."""
    own = "RANK" in os.environ and "MASTER_ADDR" in os.environ and not dist.is_initialized()
    if own:
        if cfg.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group({"cuda": "nccl", "cpu": "gloo"}[cfg.device])
    try:
        yield
    finally:
        if own:
            dist.destroy_process_group()


def run(cfg, given, argv):
    torch.backends.cudnn.benchmark = True                                       # the sizes of a run are fixed
    if cfg.bench:
        return bench(cfg, load_data(cfg)[0])
    # Whatever is wrong with the command shows before the run's folder is made.
    backbone = load_backbone(cfg) if cfg.probe else None
    train, val = load_data(cfg)
    labelled_pictures(cfg, train)
    trainer = None if cfg.probe else Trainer(cfg, train)
    out = prepare_out(cfg, given, argv)
    results = os.path.join(out, "probe.json")
    if not os.path.exists(results):
        announce(f"{out}: {len(train)} train and {len(val)} val pictures"
                 + ("" if cfg.probe else f"; {cfg.batch_size} images give {2 * cfg.batch_size - 2} negatives an anchor"))
        if trainer:
            try:
                model = pretrain(trainer, val, out)
            except (RuntimeError, EOFError, OSError):
                if trainer.asked:                  # the signal went to the loader processes as well, or to another rank
                    raise Interrupted from None
                raise
            backbone = model.method.backbone
            emergence(model, cfg, train, val, os.path.join(out, "neighbours.png"))
        result = evaluate(backbone, cfg, train, val)
        list_bad_files(out, train, val)
        if rank() == 0:
            write(results, json.dumps(result, indent=1))
    if world() > 1:
        dist.barrier()
    if rank() == 0:
        result = read_json(results, "top1", float)
        print(f"{out}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, k-NN {result['knn']:.2f} %")


def interrupt(*_):
    raise Interrupted


def main(argv=None):
    """The command line. Returns the exit status: 0, 1 (what it met), 2 (the command), 75 (interrupted)."""
    argv, first = sys.argv[1:] if argv is None else list(argv), os.environ.get("RANK", "0") == "0"
    try:
        with handled(interrupt):                   # pre-training has a gentler handler of its own
            cfg, given = parse(argv)
            with process_group(cfg):
                run(cfg, given, argv)
        return 0
    except UserError as error:
        text = str(error).strip()
        if "in DataLoader worker process" in text:                              # its text comes at the end of a traceback
            text = text.splitlines()[-1].partition("UserError: ")[2]
        if first or error.status != 2:             # every rank sees that the command is wrong: one line is enough
            print(f"hex.py: error: {text}", file=sys.stderr, flush=True)
        return error.status
    except OSError as error:
        print(f"hex.py: error: {error}: mend that, and run the same command again", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error) and "Connection reset by peer" not in str(error):
            raise
        print("hex.py: another rank has ended: see what it says", file=sys.stderr, flush=True)
        return 1
    except Interrupted:
        if first:
            print("hex.py: interrupted, run the same command again", file=sys.stderr, flush=True)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
