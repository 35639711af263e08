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

    python hex.py                                                            embedded pictures, 3 minutes on 2 cores
    python hex.py --data cifar10 --root DIR --method vicreg --loss hex       one GPU
    torchrun --nproc-per-node 8 hex.py --data imagenet --root DIR            paper scale
    python hex.py --probe runs/.../backbone.pt --data folder --root DIR      evaluate, or transfer

The file reads from the top: config, the HEX loss, SSL methods and the wrapper, data and augmentation, optimiser and
schedule, pre-training, evaluation, command line. Who stops after the HEX loss has got the paper.
"""
import argparse
import contextlib
import copy
import difflib
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields

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


class Interrupted(Exception):
    """A signal asked the run to stop; the checkpoint is written."""


INTERRUPTED = 75  # the exit status of a run that was interrupted and goes on when the same command is given again


def number(kind, low, high=math.inf, open_low=False, open_high=False):
    """An argparse type: `kind` (int or float) within an interval whose ends may be open."""
    def parse(text):
        value = kind(text)
        if not (low < value if open_low else low <= value) or not (value < high if open_high else value <= high):
            raise argparse.ArgumentTypeError(
                f"{text} is not in {'(' if open_low else '['}{low}, {high}{')' if open_high or high == math.inf else ']'}")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def option(group, default, text, **argument):
    return field(default=default, metadata=dict(group=group, text=text, argument=argument))


COUNT, POSITIVE = number(int, 0), number(int, 1)
PROBABILITY, POSITIVE_REAL, REAL = number(float, 0, 1), number(float, 0, open_low=True), number(float, 0)
DATA, IMAGE_FOLDERS = ("shapes", "cifar10", "cifar100", "imagenet", "folder"), ("imagenet", "folder")
LOSSES, THRESHOLDS = ("base", "infonce", "dcl", "hex", "released"), ("adaptive", "step", "cosine", "oracle")


@dataclass
class Config:
    """The documented command line. None: the recipe of the data and the method decides (RECIPES, below)."""
    data: str = option("data", "shapes", "what to train on", choices=DATA)
    root: str = option("data", None, "folder of the data: ROOT/{train,val}/<class>/*, or CIFAR's archive (default data)")
    classes: str = option("data", None, "file with the class folders to use, one a line (ImageNet-100)", metavar="FILE")
    size: int = option("data", None, "side of a view in pixels", type=number(int, 8))
    crop_min: float = option("data", None, "smallest share of the picture that a crop keeps",
                             type=number(float, 0, 1, open_low=True))
    blur: float = option("data", None, "share of views that are blurred", type=PROBABILITY)
    solarise: float = option("data", 0.0, "share of views that are solarised", type=PROBABILITY)
    skip_bad_files: bool = option("data", False, "replace an unreadable file by the next, and list it in bad_files.txt")

    method: str = option("method", "simclr", "the SSL method", choices=None)
    loss: str = option("method", "hex", "base: the method's own; or what takes its place or joins it", choices=LOSSES)
    threshold: str = option("method", "adaptive", "what splits H from G; oracle uses LABELS", choices=THRESHOLDS)
    temperature: float = option("method", None, "tau", type=POSITIVE_REAL)
    quantile: float = option("method", 0.99, "q", type=number(float, 0, 1, open_low=True, open_high=True))
    beta: float = option("method", 1.0, "how much the nearest weigh in Q", type=REAL)
    tau_plus: float = option("method", 0.1, "assumed share of positives in H", type=number(float, 0, 1, open_high=True))
    alpha: float = option("method", None, "weight of the loss against the method's own", type=PROBABILITY)
    hex_warmup: int = option("method", None, "first epochs with the method's own loss (default a tenth)", type=COUNT)
    hidden: int = option("method", None, "hidden width of the projector", type=POSITIVE)
    dim: int = option("method", None, "dimensions of an embedding", type=POSITIVE)
    predictor: int = option("method", None, "hidden width of the predictor", type=POSITIVE)
    queue: int = option("method", None, "embeddings in the queue", type=POSITIVE)
    ema: float = option("method", None, "momentum of the target at the start", type=PROBABILITY)

    backbone: str = option("training", None, "a torchvision classification model, or resnet10_narrow")
    norm: str = option("training", "batch", "normalisation of ResNets and heads", choices=("batch", "group"))
    epochs: int = option("training", None, "epochs; 0 evaluates a random backbone", type=COUNT)
    batch_size: int = option("training", None, "images in one loss, over all ranks", type=number(int, 2))
    accumulate: int = option("training", None, "losses in one step (adds no negatives)", type=POSITIVE)
    micro_batch: int = option("training", None, "images (all ranks) with activations at once; exact", type=POSITIVE)
    lr: float = option("training", None, "base rate; the rate is lr * batch * accumulate / 256", type=POSITIVE_REAL)
    lr_warmup: int = option("training", None, "epochs of linear warm-up (default a tenth)", type=COUNT)
    weight_decay: float = option("training", None, "L2, not on biases and norms", type=REAL)
    eta: float = option("training", 0.02, "trust coefficient of LARS", type=POSITIVE_REAL)
    clip: bool = option("training", True, "LARS only ever lowers a rate (the authors' setting)",
                        action=argparse.BooleanOptionalAction)
    amp: str = option("training", None, "autocast", choices=("off", "bf16", "fp16"))
    seed: int = option("training", 0, "of weights, order and views", type=COUNT)

    probe: str = option("evaluation", None, "evaluate this backbone.pt and do nothing else", metavar="FILE")
    probe_epochs: int = option("evaluation", 100, "epochs of the linear probe", type=POSITIVE)
    label_fraction: float = option("evaluation", None, "share of train labels that the probe sees, class-balanced",
                                   type=number(float, 0, 1, open_low=True))
    label_list: str = option("evaluation", None, "file that names the labelled pictures, one a line", metavar="FILE")

    out: str = option("running", None, "where results go (default runs/<data>-<method>-<loss>-s<seed>...)")
    device: str = option("running", None, "cpu or cuda (default cuda where there is one)", choices=("cpu", "cuda"))
    workers: int = option("running", None, "loader processes a rank", type=COUNT)
    compile: bool = option("running", False, "torch.compile the method")
    checkpoint_every: int = option("running", None, "steps between checkpoints, beside each epoch's", type=POSITIVE)
    log_every: int = option("running", 10, "steps between lines of metrics.jsonl", type=POSITIVE)
    bench: int = option("running", None, "time N steps, print a table, write nothing", type=POSITIVE, metavar="N")


# What does not change the experiment: neither the name of the run's folder nor a resume asks for it.
NOT_THE_EXPERIMENT = {"out", "workers", "device", "compile", "checkpoint_every", "micro_batch", "bench"}

# ImageNet and CIFAR: the authors' hyper-parameters (LARS eta 0.02 with clipping); what the authors lack is the usual.
RECIPES = {
    "imagenet": dict(backbone="resnet50", size=224, epochs=100, lr_warmup=10, batch_size=256, accumulate=1, lr=0.3,
                     weight_decay=1e-6, crop_min=0.08, temperature=0.1, amp="fp16"),
    "cifar10": dict(backbone="resnet18", size=32, epochs=400, lr_warmup=10, batch_size=256, accumulate=1, lr=0.4,
                    weight_decay=1e-4, crop_min=0.08, temperature=0.1, amp="fp16"),
    "shapes": dict(backbone="resnet10_narrow", size=32, epochs=20, batch_size=256, accumulate=1, lr=1.0,
                   weight_decay=1e-4, crop_min=0.3, temperature=0.1, amp="off", hidden=256, dim=64, predictor=256,
                   queue=2048),
}
RECIPES["folder"] = RECIPES["imagenet"]
RECIPES["cifar100"] = RECIPES["cifar10"]
METHOD_RECIPES = {  # where a method's differs from its data's
    ("imagenet", "simclr"): dict(accumulate=16),
    ("imagenet", "nnclr"): dict(weight_decay=1e-5),
    ("imagenet", "mocov3"): dict(temperature=1.0, lr=0.6),
    ("imagenet", "byol"): dict(lr=0.45),
    ("imagenet", "simsiam"): dict(lr=0.05, weight_decay=1e-4),
    ("cifar10", "mocov3"): dict(temperature=0.2),
    ("cifar100", "mocov3"): dict(temperature=0.2),
    ("shapes", "mocov3"): dict(temperature=0.2),
    ("shapes", "byol"): dict(ema=0.97),
}


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


# --- The HEX loss -----------------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """All ranks' rows; the backward sums over ranks what each of them wants of this rank's rows."""

    @staticmethod
    def forward(ctx, x):  # (M, ...) -> (world M, ...)
        out = x.new_empty(world() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
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
    """Cosine of this rank's n/W anchors with all n = 2N embeddings (columns: every rank's a, then every rank's b).

    Returns cosine (n/W, n), its masks of self and of positives (bool, same shape), and s_ip (n/W,).
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"a and b must be row-aligned (N, D) tensors, not {tuple(a.shape)} and {tuple(b.shape)}")
    if len(a) * world() < 2:
        raise ValueError("a contrastive loss needs at least 2 images: N = 1 leaves an anchor without negatives")
    with torch.autocast(a.device.type, enabled=False):
        a, b = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1) for x in (a, b))
        cosine = torch.cat([a, b]) @ torch.cat([gather(a), gather(b)]).T                        # (n/W, n)
        s_p = (a * b).sum(1).repeat(2)                                                          # (n/W,)
    column = torch.arange(cosine.shape[1], device=a.device)
    i = rank() * len(a) + column[:len(a)]
    first, second = i[:, None] == column, i[:, None] + len(column) // 2 == column
    return cosine, torch.cat([first, second]), torch.cat([second, first]), s_p


def info_nce(a, b, temperature=0.1):
    """InfoNCE (NT-Xent, Chen et al. 2020). a, b: (N / world, D), row-aligned, any scale; scalar, this rank's mean."""
    cosine, self_, _, s_p = similarities(a, b)
    return ((cosine / temperature).masked_fill(self_, -math.inf).logsumexp(1) - s_p / temperature).mean()


def dcl(a, b, temperature=0.1):
    """Decoupled contrastive loss (Yeh et al. 2022): InfoNCE without the positive in the denominator."""
    cosine, self_, positive, s_p = similarities(a, b)
    return ((cosine / temperature).masked_fill(self_ | positive, -math.inf).logsumexp(1) - s_p / temperature).mean()


@torch.no_grad()
def adaptive_threshold(cosine, quantile=0.99, *, kept=None):
    """eps: the mean over rows of each row's quantile, the order statistic at round(quantile (k - 1)) of its k entries.

    cosine: (rows, columns); -inf entries are left out of a row. kept: (rows,) k, if the caller knows that it is not 0
    (it spares the check, for which a GPU would have to wait). Returns a scalar. ValueError: a row of nothing but -inf.
    """
    cosine = cosine.to(torch.promote_types(cosine.dtype, torch.float32))
    if kept is None:
        kept = (cosine != -math.inf).sum(1)
        if (kept == 0).any():
            raise ValueError("a row holds no entry but -inf: its quantile is not defined")
    columns = cosine.shape[1]
    largest = cosine.topk(columns - round(quantile * (columns - 1)), dim=1).values  # a partial sort is enough
    from_top = kept.double() - 1 - (quantile * (kept.double() - 1)).round()
    return largest.gather(1, from_top.long()[:, None]).mean()


@dataclass(frozen=True)
class AdaptiveThreshold:
    """H: above the adaptive eps, which is taken over the entries `seen` and averaged over ranks (paper)."""
    quantile: float = 0.99

    def __call__(self, cosine, seen, epoch=0):
        eps = mean_over_ranks(adaptive_threshold(cosine.masked_fill(~seen, -math.inf), self.quantile, kept=seen.sum(1)))
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
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(epoch / self.epochs, 1))) / 2


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
    cosine, self_, positive, _ = similarities(a, b)
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
    tau, (cosine, self_, positive, s_p) = temperature, similarities(a, b)
    negative = ~(self_ | positive)
    with torch.no_grad():
        eps, local = threshold(cosine, negative | released, epoch)     # the released quantile sees self and positive
        local = local & negative                                       # H(i); G(i) = negative & ~local
        size = local.sum(1).to(cosine.dtype)                           # |H(i)|
    if released:
        loss, clamped = _released(cosine, negative & ~local, s_p, tau), size > 0
    else:
        row = local.nonzero()[:, 0]                                    # the anchor of each of the K pairs in H
        s_h = cosine[local] / tau                                      # (K,)
        rest = (cosine / tau).masked_fill(self_ | local, -math.inf).logsumexp(1)     # log[ e^{s_ip/tau} + sum_G ]
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
    logits = (cosine / tau).masked_fill(~rest, torch.finfo(cosine.dtype).min / 2)    # finite: no NaN if G is empty
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
    """What HEX asks of a method. Any nn.Module with these three can be wrapped.

    alpha, scale: HEX's weight and factor beside the method's own loss (alpha 1: it takes its place).
    """
    alpha, scale = 0.1, 1.0

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
        """After an optimiser step that was really taken. step: (number of steps taken so far) / (all steps)."""


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
            embeddings = [e.to(torch.promote_types(e.dtype, torch.float32)) for e in embeddings]
            own, pairs = self.method.loss(*embeddings)
            stats = {"own": own.detach()}
            if self.name == "base" or epoch < self.warmup:
                loss = own
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


METHODS = {"simclr": SimCLR}
