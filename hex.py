# SPDX-License-Identifier: MIT
"""HEX: Hierarchical Emergence Exploitation in Self-Supervised Algorithms, in one file.
Kokilepersaud, Kim, Prabhushankar, AlRegib; WACV 2025; arXiv 2410.23200. Not the authors' code.

InfoNCE pulls the two views of an image together and pushes every other image away, all alike. HEX
splits these negatives where their similarity passes eps: G(i), the global rest, stays as it is; of
H(i), the local ones, the nearest are pushed hardest (Q), less a share tau_plus taken for i's own
class (debiasing: m at p may be negative), down to a floor. Why: among neighbors fine semantics
emerge, and collapse if they are treated like all else (local collapse).
Known from abstract and figure: the split, a weighted local term, a falling threshold; from their
code: quantile, schedules, warm-up, beta, tau_plus, floor; by us: Q, |H|, the positive in the sum.

    x1, x2 (N, 3, S, S)  ->  z (2N, D), normalized  ->  s = z z^T (2N, 2N)  ->  H (2N, 2N)  ->  loss
    l_i = log( sum_j m_ij e^{s_ij/tau} + c_i ) - s_ip/tau         p: the other view of i; m_ii = 0

                      m at p                            m in G m in H                c
    InfoNCE           1                                 1      1                     0
    DCL               0                                 1      1                     0
    HEX               1 - |H| tau_plus / (1 - tau_plus) 1      Q_ij / (1 - tau_plus) 0
    HEX, at the floor 1                                 1      0                     |H| e^{-1/tau}
    HEX, decoupled    1 less                            as HEX as HEX                as HEX
    released by them  0                                 1      0                     0; G empty: 1
                      and (2N - 2) e^{-1/tau} outside the log; the quantile sees i and p, too

    eps   = mean over i of the q-quantile of s_ij, j in Neg(i)  Neg(i): all but i and p; no gradient
    H(i)  = { j in Neg(i) : s_ij > eps },   G(i) = Neg(i) \\ H(i)
    Q_ij  = e^{beta s_ij/tau} / mean over h in H(i) of e^{beta s_ih/tau}    no gradient
    floor: [ sum_H Q_ih e^{s_ih/tau} - tau_plus |H| e^{s_ip/tau} ] / (1 - tau_plus) < |H| e^{-1/tau}

Any method: (1 - alpha) own + alpha scale mean over its pairs (a, b) of F(a, b), F one of these.
    python hex.py                                                    minutes on a CPU
    python hex.py --data cifar10 --root DIR --recipe small           one GPU, or minutes on a CPU
    torchrun --nproc-per-node 8 hex.py --data imagenet --root DIR    paper scale
    python hex.py --data folder --root DIR --recipe small            your own unlabelled pictures
In order: the loss (can be copied out), methods, data, optimizer, evaluation, training, commands.
"""
import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import _functional_collectives as collectives

# --- The HEX loss ---------------------------------------------------------------------------------
def weighted_nce(cosine, s_p, weight, log_c, tau):
    """The formula: l_i of n anchors. cosine, weight: s and m, (n, columns); s_p, log_c: (n,)."""
    e = cosine / tau
    with torch.no_grad():                               # e^{1/tau} may overflow: the largest is out
        e.masked_fill_(weight == 0, -math.inf)
        top = torch.maximum(e.amax(1), log_c)
    e = e.sub_(top[:, None]).exp_()
    total = (weight * e).sum(1) + (log_c - top).exp()
    return top + total.log() - s_p / tau

def info_nce(a, b, temperature=0.1):
    """InfoNCE (NT-Xent, Chen et al. 2020). a, b, ValueError: as hex_nce. This rank's mean."""
    cosine, s_p, p, negative = similarities(a, b, temperature)
    weight = negative.to(cosine).scatter_(1, p[:, None], 1)
    return weighted_nce(cosine, s_p, weight, s_p.new_full((), -math.inf), temperature).mean()

def dcl(a, b, temperature=0.1):
    """Decoupled contrastive loss (Yeh et al. 2022): no positive in the denominator."""
    cosine, s_p, _, negative = similarities(a, b, temperature)
    return weighted_nce(cosine, s_p, negative.to(cosine), s_p.new_full((), -math.inf), temperature).mean()

def hex_nce(a, b, temperature=0.1, *, threshold=None, beta=1.0, tau_plus=0.1, decoupled=False, released=False,
            epoch=0):
    """The HEX loss. a, b: (N / ranks, D), row-aligned, any length. threshold: AdaptiveThreshold(),
    another of these, or a number: H is above that cosine. decoupled: no positive in the sum. released:
    the authors' public code. beta >= 0, tau_plus in [0, 1). Returns this rank's mean loss (float32 or
    better) and detached scalars over the ranks: threshold, local (mean |H|), empty (share of anchors
    with none), clamped (share of the others at the floor). ValueError: ranges, shapes, N < 2."""
    require(0 <= beta < math.inf, f"beta = {beta} must be at least 0, and finite")
    require(0 <= tau_plus < 1, f"tau_plus = {tau_plus} must be in [0, 1)")
    tau, outside = temperature, 0
    cosine, s_p, p, negative = similarities(a, b, tau)
    with torch.no_grad():
        eps, above = split(cosine, negative | released, threshold, epoch)       # released: i, p too
        local = above & negative                                                # H(i)
        rest = negative & ~local                                                # G(i)
        size = local.sum(1, dtype=torch.int32).to(cosine)                       # |H(i)|
        lowest = torch.finfo(cosine.dtype).min
        q = (cosine * (beta / tau)).masked_fill_(~local, lowest).softmax(1)     # Q_ij / |H(i)|
        e = cosine.masked_fill(~local, lowest)
        top = torch.maximum(e.amax(1), s_p)
        e = e.sub_(top[:, None]).div_(tau).exp_()                          # e^{(s - top)/tau} in H
        L = e.mul_(q).sum(1) - tau_plus * ((s_p - top) / tau).exp()         # floor's bracket / |H|
        clamped = (L / (1 - tau_plus) < ((-1 - top) / tau).exp()) & (size > 0)  # at the floor
        del e                                                                   # as large as s
        free = torch.where(clamped, 0, size / (1 - tau_plus))                   # 0 at the floor
        weight = q.mul_(free[:, None]).masked_fill_(rest, 1)                    # m in H(i), in G(i)
        weight.scatter_(1, p[:, None], (1 - decoupled - tau_plus * free)[:, None])        # and at p
    log_c = torch.where(clamped, size.log() - 1 / tau, -math.inf)
    if released:    # its local term is a constant, and stands outside the logarithm
        weight, clamped = rest.to(cosine), size > 0
        log_c = torch.where(rest.any(1), -math.inf, 0.0).to(cosine)             # c: 0; G empty: 1
        outside = (cosine.shape[1] - 2) * (s_p.new_full((), -1.0) / tau).exp()
    loss = (weighted_nce(cosine, s_p, weight, log_c, tau) + outside).mean()
    size, none, clamped = mean_over_ranks(torch.stack([x.to(s_p).mean() for x in (size, size == 0, clamped)]))
    return loss, dict(threshold=eps, local=size, empty=none, clamped=clamped / (1 - none).clamp_min(1e-9))

def similarities(a, b, temperature):
    """s of this rank's 2N / ranks anchors with all 2N, in [-1, 1] (columns: all ranks' a, then b);
    s_ip and p(i) of each anchor; the mask of Neg(i), of s's shape."""
    r, W = ranks()
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    require(a.ndim == 2 and a.shape == b.shape, f"a and b must be row-aligned (N, D), not {shapes}")
    require(len(a) * W > 1, "N = 1: a contrastive loss needs 2 images, or there are no negatives")
    require(temperature > 0, f"temperature = {temperature} must be above 0")
    with torch.autocast(a.device.type, enabled=False):
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        length = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (a, b)]
        a, b = (x / torch.where(n > 1e-12, n, 1) for x, n in zip((a, b), length))   # 0 stays 0
        cosine = torch.cat([a, b]) @ torch.cat([gather(a), gather(b)]).T
        s_p = (a * b).sum(1).repeat(2)
    column = torch.arange(cosine.shape[1], device=a.device)
    i = column[r * len(a):(r + 1) * len(a)]            # of this rank's a; those of its b: N further
    i, p = torch.cat([i, i + len(column) // 2]), torch.cat([i + len(column) // 2, i])
    return cosine, s_p, p, (i[:, None] != column) & (p[:, None] != column)

def require(condition, message):
    if not condition:
        raise ValueError(message)

def split(cosine, negative, threshold, epoch):          # -> eps and the mask of what lies above it
    threshold = AdaptiveThreshold() if threshold is None else threshold
    if isinstance(threshold, (int, float)):
        return cosine.new_full((), threshold), cosine > threshold
    require(callable(threshold), f"threshold = {threshold!r} is neither a number nor a function")
    return threshold(cosine, negative, epoch)

def local_mask(a, b, threshold=None, epoch=0):
    """eps (scalar) and H (bool, (2N / ranks, 2N)) of the embeddings a, b: (N / ranks, D)."""
    cosine, _, _, negative = similarities(a, b, 1)
    eps, above = split(cosine.detach(), negative, threshold, epoch)
    return eps, above & negative

def adaptive_threshold(cosine, quantile=0.99, entries=None):
    """eps: the mean over rows of each row's quantile, at round(q (k - 1)) of its k sorted entries.
    cosine: (rows, columns), -inf: no entry. entries: (rows,) each k, if known (a GPU needn't wait).
    Returns a scalar. ValueError: quantile outside (0, 1); a row of nothing but -inf."""
    require(0 < quantile < 1, f"quantile = {quantile} must lie between 0 and 1")
    if entries is None:
        entries = (cosine != -math.inf).sum(1)
        require((entries > 0).all(), "a row holds no entry but -inf: its quantile is not defined")
    cosine = cosine.detach().to(torch.promote_types(cosine.dtype, torch.float32))
    columns, k = cosine.shape[1], entries.double()
    largest = cosine.topk(columns - round(quantile * (columns - 1)), dim=1).values      # in order
    from_top = k - 1 - (quantile * (k - 1)).round()                                 # 0: the largest
    return largest.gather(1, from_top.long()[:, None]).mean()

def AdaptiveThreshold(quantile=0.99):
    """H: above the adaptive eps, of all ranks' anchors (authors' code). ValueError: quantile."""
    require(0 < quantile < 1, f"quantile = {quantile} must lie between 0 and 1")
    def threshold(cosine, negative, epoch=0):
        seen, entries = cosine.masked_fill(~negative, -math.inf), negative.sum(1, dtype=torch.int32)
        eps = mean_over_ranks(adaptive_threshold(seen, quantile, entries))
        return eps, cosine > eps
    return threshold

def schedule(at):   # H: above at(epoch), each row rescaled: 0 its minimum, 1 itself (their code)
    def threshold(cosine, negative, epoch=0):
        low, high = cosine.aminmax(dim=1, keepdim=True)
        return cosine.new_full((), at(epoch)), (cosine - low) / (high - low) > at(epoch)
    return threshold

def StepThreshold(start=0.9, drop=0.1, every=10):
    """`start`, falling by `drop` every `every` epochs, not below 0."""
    return schedule(lambda epoch: max(0.0, start - drop * (epoch // every)))
def CosineThreshold(start=0.9, end=0.3, epochs=100):
    """From `start` to `end` over `epochs` by half a cosine."""
    half = math.pi / max(1, epochs)
    return schedule(lambda epoch: end + (start - end) * (1 + math.cos(half * min(epoch, epochs))) / 2)

def OracleHierarchy(labels):
    """H: negatives of one super-class. NOT self-supervised: a diagnostic. labels: (N / ranks,)."""
    def threshold(cosine, negative, epoch=0):
        mine, everyone = labels.repeat(2), gather(labels).repeat(2)
        require(cosine.shape == (len(mine), len(everyone)), f"labels: {len(labels)}, not one an image")
        return cosine.new_full((), math.nan), mine[:, None] == everyone
    return threshold

def ranks():       # this process's number among the ranks that share a loss, and how many there are
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not alone.on else (0, 1)
class alone(contextlib.ContextDecorator):       # within, each rank computes whole losses: no gather
    on = False
    def __init__(self, wanted=True):
        self.wanted = wanted
    def __enter__(self):
        self.before, alone.on = alone.on, self.wanted
    def __exit__(self, *_):
        alone.on = self.before

def gather(x):
    """Rows of all ranks, in their order, with gradient. x: (M, ...) on each -> (ranks M, ...)."""
    if ranks()[1] == 1:
        return x
    return collectives.wait_tensor(collectives.all_gather_single(x.contiguous(), 0, dist.group.WORLD))
def mean_over_ranks(x):     # of a detached tensor
    if ranks()[1] > 1:
        dist.all_reduce(x := x / ranks()[1])
    return x

import argparse, copy, fcntl, hashlib, inspect, io, json, os, random, re, signal, sys, threading
import time, traceback, warnings
from functools import partial
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

# --- SSL methods and the wrapper ------------------------------------------------------------------
def mlp(*widths, norm=None, affine=None):
    """Linear - norm - ReLU blocks, a last Linear. affine: of the norm behind it; None: no norm."""
    layers, last = [], None if affine is None else partial(norm, affine=affine)
    for fan_in, fan_out, normalize in zip(widths, widths[1:], [norm] * (len(widths) - 2) + [last]):
        layers.append(nn.Linear(fan_in, fan_out, bias=normalize is None))
        layers += [normalize(fan_out)] if normalize else []
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers[:-1])

class Method(nn.Module):
    """Base of the methods: a projector z, and where a method has them a predictor p and a target t.
    Its loss(*embeddings), in float32, gives the own loss and row-aligned pairs [(a, b), ...].
    backbone: (B, 3, S, S) -> (B, width). ema: there is a target, its BatchNorm statistics its own,
    that follows backbone and projector; its momentum rises from ema to 1 by a cosine. alpha, scale:
    of HEX (alpha 1: no own loss). The loop sets steps (of a run), losses (of a rank in a step)."""
    alpha, scale, steps, losses = 0.1, 1.0, None, 1
    def __init__(self, backbone, projector, predictor=None, ema=None, temperature=None):
        super().__init__()
        self.backbone, self.projector, self.predictor = backbone, projector, predictor
        self.ema, self.temperature = ema, temperature
        online = nn.Sequential(backbone, projector)
        self.target = None if ema is None else copy.deepcopy(online).requires_grad_(False)

    def forward(self, x1, x2):
        """Two views (N, 3, S, S) -> [p1, p2,] z1, z2 [, t1, t2], each (N, dim)."""
        x = torch.cat([x1, x2])   # in one pass: one BatchNorm batch, one use of the weights for DDP
        z = self.projector(self.backbone(x))
        outputs = [z] if self.predictor is None else [self.predictor(z), z]
        outputs += [] if self.target is None else [self.target(x)]
        return tuple(half for output in outputs for half in output.chunk(2))

    def one_way_nce(self, a, b):  # InfoNCE of each a_i against every b_j alone; (N / ranks, D) each
        logits = F.normalize(a) @ F.normalize(gather(b)).T / self.temperature       # (N / ranks, N)
        return F.cross_entropy(logits, ranks()[0] * len(a) + torch.arange(len(a), device=a.device))

    @torch.no_grad()
    def after_step(self, step):     # EMA, queue: after a step that was taken; its number, from 1
        if self.target is not None:
            done = step / self.steps if self.steps else 0
            momentum = 1 - (1 - self.ema) * (math.cos(math.pi * done) + 1) / 2
            online = nn.Sequential(self.backbone, self.projector)
            torch._foreach_lerp_(list(self.target.parameters()), list(online.parameters()), 1 - momentum)

class SimCLR(Method):
    """Chen et al. 2020. The projector of HEX's authors: 2048-2048-128 without BatchNorm."""
    alpha = 1.0
    def __init__(self, backbone, width, *, hidden=2048, dim=128, norm=nn.BatchNorm1d, temperature=0.1):
        super().__init__(backbone, mlp(width, hidden, dim), temperature=temperature)
    def loss(self, z1, z2):
        return info_nce(z1, z2, self.temperature), [(z1, z2)]

class NNCLR(Method):
    """Dwibedi et al. 2021: an anchor is its nearest neighbor in a queue of past embeddings."""
    alpha, latest = 1.0, []
    def __init__(self, backbone, width, *, hidden=2048, dim=256, predictor=4096, queue=98304,
                 norm=nn.BatchNorm1d, temperature=0.1):
        super().__init__(backbone, mlp(width, hidden, hidden, dim, norm=norm, affine=True),
                         mlp(dim, predictor, dim, norm=norm), temperature=temperature)
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim)))
        self.register_buffer("head", torch.zeros((), dtype=torch.long))          # where the next go
    def loss(self, p1, p2, z1, z2):
        self.latest = [*self.latest, z1.detach()][-self.losses:] if self.training else self.latest
        near1, near2 = (self.queue[(F.normalize(z.detach()) @ self.queue.T).argmax(1)] for z in (z1, z2))
        pairs = [(near1, p2), (near2, p1)]
        return sum(self.one_way_nce(a, b) for a, b in pairs) / 2, pairs
    def after_step(self, step):     # pushes z1 of all losses and ranks: queues are equal
        z = gather(torch.stack(self.latest)).unflatten(0, (-1, len(self.latest)))   # (W, losses, B, dim)
        z = F.normalize(z.transpose(0, 1).flatten(0, 2)).to(self.queue.dtype)[-len(self.queue):]
        self.queue[(self.head + torch.arange(len(z), device=z.device)) % len(self.queue)] = z
        self.head.copy_((self.head + len(z)) % len(self.queue))

class MoCoV3(Method):
    """Chen et al. 2021. HEX on it is our extension."""
    alpha = 1.0
    def __init__(self, backbone, width, *, hidden=4096, dim=256, predictor=4096, ema=0.99,
                 norm=nn.BatchNorm1d, temperature=1.0):
        super().__init__(backbone, mlp(width, hidden, dim, norm=norm, affine=False),
                         mlp(dim, predictor, dim, norm=norm, affine=False), ema, temperature)
    def loss(self, q1, q2, z1, z2, k1, k2):
        t, pairs = self.temperature, [(q1, k2), (q2, k1)]
        return sum(2 * t * self.one_way_nce(q, k) for q, k in pairs), pairs

class BYOL(Method):
    """Grill et al. 2020. HEX on it, between the online projections, is our extension."""
    def __init__(self, backbone, width, *, hidden=4096, dim=256, predictor=4096, ema=0.99,
                 norm=nn.BatchNorm1d):
        heads = mlp(width, hidden, dim, norm=norm), mlp(dim, predictor, dim, norm=norm)
        super().__init__(backbone, *heads, ema)
    def loss(self, p1, p2, z1, z2, t1, t2):
        return 4 - 2 * sum(F.cosine_similarity(p, t).mean() for p, t in ((p1, t2), (p2, t1))), [(z1, z2)]

class SimSiam(Method):
    """Chen and He 2021. HEX on it, between the projections, is our extension."""
    def __init__(self, backbone, width, *, hidden=2048, dim=2048, predictor=512, norm=nn.BatchNorm1d):
        super().__init__(backbone, mlp(width, hidden, hidden, dim, norm=norm, affine=False),
                         mlp(dim, predictor, dim, norm=norm))
    def loss(self, p1, p2, z1, z2):
        pairs = ((p1, z2.detach()), (p2, z1.detach()))
        return -sum(F.cosine_similarity(p, z).mean() for p, z in pairs) / 2, [(z1, z2)]

class BarlowTwins(Method):
    """Zbontar et al. 2021, over all ranks; off-diagonal x 0.0051, in all x 0.1, as HEX's code."""
    def __init__(self, backbone, width, *, hidden=8192, dim=8192, norm=nn.BatchNorm1d):
        super().__init__(backbone, mlp(width, hidden, hidden, dim, norm=norm))
    def loss(self, z1, z2):
        a, b = (F.batch_norm(gather(z), None, None, training=True) for z in (z1, z2))   # (N, dim)
        c = a.T @ b / len(a)                                                            # (dim, dim)
        off_diagonal = c.square().sum() - c.diagonal().square().sum()
        return 0.1 * ((c.diagonal() - 1).square().sum() + 0.0051 * off_diagonal), [(z1, z2)]

class VICReg(BarlowTwins):
    """Bardes et al. 2022, over all ranks; summed over views (the official code halves variance)."""
    scale = 5.0
    def loss(self, z1, z2):
        a, b = gather(z1), gather(z2)                                                   # (N, dim)
        loss = 25 * F.mse_loss(a, b)
        for z in (a, b):
            variance = F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
            c = (z - z.mean(0)).T @ (z - z.mean(0)) / (len(z) - 1)                      # (dim, dim)
            loss = loss + 25 * variance + (c.square().sum() - c.diagonal().square().sum()) / len(c)
        return loss, [(z1, z2)]

METHODS = {"simclr": SimCLR, "nnclr": NNCLR, "mocov3": MoCoV3, "byol": BYOL, "simsiam": SimSiam,
           "barlow": BarlowTwins, "vicreg": VICReg}
LOSSES = ("base", "infonce", "dcl", "hex", "released")

class HEX(nn.Module):
    """The wrapper: loss = (1 - alpha) own + alpha scale mean over pairs of F(a, b), F by `loss`.
    method: a Method, or any module with its forward and loss (after_step optional). alpha, scale:
    the method's, else 0.1, 1. For `warmup` epochs the own loss is alone; with a warmup_threshold,
    F with H above it. of_hex: to hex_nce. ValueError: unknown loss; bare tensor; no pairs."""
    def __init__(self, method, loss="hex", *, alpha=None, scale=None, temperature=0.1, threshold=None,
                 warmup=0, warmup_threshold=None, **of_hex):
        super().__init__()
        require(loss in LOSSES, f"loss = {loss!r} is not one of {', '.join(LOSSES)}")
        self.method, self.name, self.temperature, self.threshold = method, loss, temperature, threshold
        self.warmup, self.warmup_threshold = warmup, warmup_threshold
        of_hex = partial(hex_nce, released=loss == "released", **of_hex)
        self.term = {"infonce": info_nce, "dcl": dcl}.get(loss, of_hex)                 # F
        self.alpha = getattr(method, "alpha", 0.1) if alpha is None else alpha
        self.scale = getattr(method, "scale", 1.0) if scale is None else scale
        self.after_step = getattr(method, "after_step", lambda step: None)
    def forward(self, x1, x2):
        embeddings = self.method(x1, x2)
        require(not isinstance(embeddings, torch.Tensor), "forward gave a bare tensor, not a tuple")
        return embeddings
    def loss(self, *embeddings, epoch=0, threshold=None):
        """-> loss (scalar), stats (detached scalars). threshold: of this batch (the oracle's)."""
        with torch.autocast(embeddings[0].device.type, enabled=False):
            embeddings = [e.float() if e.dtype in (torch.float16, torch.bfloat16) else e for e in embeddings]
            loss, pairs = self.method.loss(*embeddings)
            loss = torch.as_tensor(loss, device=embeddings[0].device)
            stats, early = {"own": loss.detach()}, epoch < self.warmup
            if self.name != "base" and not (early and self.warmup_threshold is None):
                require(pairs, f"loss = {self.name!r} needs pairs (a, b); the method gave none")
                loss = 0 if self.alpha == 1 else (1 - self.alpha) * loss    # 0 frees its graph
                above = self.warmup_threshold if early else self.threshold if threshold is None else threshold
                more = dict(threshold=above, epoch=epoch) if self.name in ("hex", "released") else {}
                terms = [self.term(a, b, self.temperature, **more) for a, b in pairs]
                values, each = zip(*(term if more else (term, {}) for term in terms))
                loss = loss + self.alpha * self.scale * sum(values) / len(pairs)
                stats |= {key: sum(one[key] for one in each) / len(pairs) for key in each[0]}
                stats[self.name] = sum(values).detach() / len(pairs)
            return loss + sum(0 * e.sum() for e in embeddings if e.requires_grad), stats  # DDP: all

class UserError(Exception):         # what a run met, and the user can mend: one line that says how
    status = 1                      # the exit status

def group_norm(channels, affine=True):          # 16 channels a group where they divide
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 16)), channels, affine=affine)

def resnet10_narrow(norm_layer=nn.BatchNorm2d):
    """ResNet-10, 16 to 128 channels, for a CPU. SiLU: at a kink rounding would tell ranks apart."""
    layers = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), norm_layer(16), nn.SiLU()]
    for fan_in, fan_out, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 128, 2)):
        skip = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), norm_layer(fan_out))
        block = torchvision.models.resnet.BasicBlock(fan_in, fan_out, stride, skip, norm_layer=norm_layer)
        block.relu = nn.SiLU()
        layers.append(block)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1000))

def build_backbone(name, size=224, norm="batch"):
    """-> a torchvision model (or resnet10_narrow) without last Linear, its features. UserError."""
    if name == "pixels":                                   # the raw pixels, to hold a probe against
        return nn.Flatten(), 3 * size * size
    known = ["resnet10_narrow", *torchvision.models.list_models(module=torchvision.models)]
    if name not in known:
        fail(f"--backbone {name}: unknown; give one of {', '.join(known)}")
    build = resnet10_narrow if name == known[0] else torchvision.models.get_model_builder(name)
    kind = dict(image_size=size) if name.startswith("vit_") else {}
    kind |= dict(aux_logits=False, init_weights=True) if name in ("googlenet", "inception_v3") else {}
    try:
        model = build(norm_layer=group_norm, **kind) if norm == "group" else build(**kind)
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        require(linear, "it has no Linear classifier to remove")
        width = model.get_submodule(linear[-1]).in_features
        model.set_submodule(linear[-1], nn.Identity())
        if isinstance(model, torchvision.models.ResNet) and size <= 64:     # 3x3 stem, no max-pool
            model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        shape = copy.deepcopy(model).eval()(torch.zeros(2, 3, size, size)).shape
        require(shape == (2, width), f"it gives {tuple(shape[1:])} features, not {width}")
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        fail(f"--backbone {name}, --size {size}, --norm {norm}: {str(error).splitlines()[0]}; give resnet18")
    return model, width

# --- Data and augmentation ------------------------------------------------------------------------
MEAN_STD = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
            "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}     # and for all other data

def rng_of(*key):       # a random generator that depends on the key alone
    return random.Random(" ".join(map(str, key)))
def permutation(count, *key):
    return torch.randperm(count, generator=torch.Generator().manual_seed(rng_of(*key).getrandbits(63)))

class Pictures:
    """uint8 pictures (n, 3, H, W) in memory, with fine labels (n,) and coarse ones, or None."""
    def __init__(self, pictures, targets, coarse=None):
        self.pictures, self.targets, self.coarse, self.read = pictures, targets, coarse, pictures.__getitem__
    def __len__(self):
        return len(self.pictures)
    def identity(self):
        return self.pictures.numpy().tobytes() + self.targets.numpy().tobytes()

class Folder:
    """ROOT/<class>/**, or unlabelled ROOT/**: no hidden files (.name, .folder/). only: classes."""
    def __init__(self, root, labelled=True, only=None):
        def unreadable(error):
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); mend that") from error
        self.root, self.files, self.classes, self.targets, self.coarse = root, [], [], None, None
        for folder, inside, names in os.walk(root, onerror=unreadable, followlinks=True):
            inside[:], names = (sorted(name for name in each if name[0] != ".") for each in (inside, names))
            self.files += [os.path.relpath(os.path.join(folder, name), root) for name in names]
        if labelled:
            class_of = {file: file.split(os.sep)[0] for file in self.files if os.sep in file}
            self.classes = sorted(only or set(class_of.values()))
            label = {name: i for i, name in enumerate(self.classes)}
            self.files = [file for file, name in class_of.items() if name in label]
            self.targets = torch.tensor([label[class_of[file]] for file in self.files], dtype=torch.long)
            for name in set(self.classes) - set(class_of.values()):
                raise UserError(f"--classes: {root} has no folder {name} with pictures; take it off the list")
    def __len__(self):
        return len(self.files)
    def read(self, index):
        """(3, H, W) uint8, upright. JPEG by torchvision, whose PNG decoder may crash. UserError."""
        path = os.path.join(self.root, self.files[index])
        try:
            require(os.path.isfile(path), "no regular file")
            with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
                data = file.read()
                picture = Image.open(io.BytesIO(data))          # refuses what would fill the memory
                if data[:2] == b"\xff\xd8":
                    data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    return torchvision.io.decode_jpeg(data, mode="RGB", apply_exif_orientation=True)
                picture = ImageOps.exif_transpose(picture)
                if picture.mode.startswith("I;16"):
                    return (TF.pil_to_tensor(picture).int() % 65536 // 257).byte().expand(3, -1, -1)
                return TF.pil_to_tensor(picture.convert("RGB"))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{clean(path)}: not readable ({reason}); mend it, or --skip-bad-files") from None
    def identity(self):
        return os.fsencode("\0".join([*self.classes, "", *self.files]))

def draw_shapes(count, seed):
    """Polygon, star, flower, frame (coarse label) of 3, 4, 6 corners (fine label), 32x32 pixels."""
    g, kind = torch.Generator().manual_seed(seed), torch.arange(count) % 12
    family, corners = kind // 3, torch.tensor([3.0, 4.0, 6.0])[kind % 3, None, None]
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=g)
    axis = torch.linspace(-1, 1, 64)                              # drawn at 64 pixels, halved below
    x, y = (axis.view(shape) - uniform(-0.2, 0.2, 1, 1) for shape in ((1, 1, -1), (1, -1, 1)))
    radius = torch.hypot(x, y) / uniform(0.5, 0.8, 1, 1)
    angle = torch.atan2(y, x) + uniform(0, 2 * math.pi, 1, 1)
    half = math.pi / corners                                            # half the angle of a sector
    phi = (angle % (2 * half) - half).abs()                       # 0 between corners, `half` at one
    polygon, flower = half.cos() / phi.cos(), 0.65 - 0.35 * (corners * angle).cos()
    star = 0.4 * half.sin() / (0.4 * phi.sin() + (half - phi).sin())        # from corner to notch
    edge = torch.stack([polygon, star, flower, polygon])[family, torch.arange(count)]
    hole = (family == 3)[:, None, None] & (radius < 0.6 * edge)
    inside = F.avg_pool2d(((radius < edge) & ~hole).float()[:, None], 2)    # (count, 1, 32, 32)
    dark, bright = uniform(0, 0.35, 3, 1, 1), uniform(0.65, 1, 3, 1, 1)    # seen without color, too
    swap = uniform(0, 1, 1, 1, 1) < 0.5
    back, ink = torch.where(swap, dark, bright), torch.where(swap, bright, dark)
    ramp = uniform(-0.2, 0.2, 3, 1, 1) * axis[::2] + uniform(-0.05, 0.05, 3, 32, 32)
    return Pictures((255 * torch.lerp(back + ramp, ink, inside).clamp(0, 1)).byte(), kind, family)

def load_data(cfg):
    """-> train, val or None. Each has len, read(index), targets or None, coarse, identity().
    CIFAR: a machine's first process downloads it. UserError: pictures or classes are missing."""
    if cfg.data == "shapes":
        return draw_shapes(4096, 0), draw_shapes(1024, 1)
    if cfg.data in ("cifar10", "cifar100"):
        kind, root = getattr(torchvision.datasets, cfg.data.upper()), cfg.root or "data"
        try:
            if process()[2] == 0:
                kind(root, download=True)
            agree("downloaded", cfg, "data")                    # waits for all
            splits = [kind(root, train=train) for train in (True, False)]
        except (OSError, RuntimeError) as error:
            raise UserError(f"--data {cfg.data}: {error}; put {kind.filename} in {root}") from error
        targets = [torch.tensor(split.targets) for split in splits]
        pictures = [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in splits]
        # The super-class (Krizhevsky 2009) of each of CIFAR-100's classes, a digit of base 20 each.
        digits = ("41e80677i33e9i7b397b6b5a76df3f0b1aceg9b55j88fdehia"
                  "g4h420h4iha32ccgc19j2a01gc9dfdgj246j558ji12f60h8ed")
        above = torch.tensor([int(digit, 20) for digit in digits])
        coarse = [above[y] if cfg.data == "cifar100" else None for y in targets]
        return [*map(Pictures, pictures, targets, coarse)]
    folders = [os.path.join(cfg.root, name) for name in ("train", "val")]
    if cfg.data == "folder" and not os.path.isdir(folders[0]) and not cfg.classes:
        train, val = Folder(cfg.root, labelled=False), None
    else:
        lines = cfg.classes and read(cfg.classes, lambda file: file.read().decode("utf-8-sig"), "give a text")
        only = set(lines.splitlines()) - {""} if cfg.classes else None
        if only == set():
            fail(f"--classes {cfg.classes}: names no class; leave it out")
        if not os.path.isdir(folders[0]):
            raise UserError(f"--root {cfg.root}: there is no train/<class>/* in it; make it, or give another")
        train = Folder(folders[0], only=only)
        val = Folder(folders[1], only=only) if cfg.data == "imagenet" or os.path.isdir(folders[1]) else None
        differing = sorted(set(train.classes) ^ set(val.classes)) if val else []
        if differing or not train.classes:
            raise UserError(f"--root {cfg.root}: train/ and val/ need the same class folders with pictures "
                            f"(valprep.sh sorts a flat val/); not so: {', '.join(differing[:5]) or 'all'}")
    if len(train) < 2:
        raise UserError(f"--root {cfg.root}: {len(train)} pictures are too few; add some")
    return train, val

class Views(torch.utils.data.Dataset):
    """(epoch, index) -> crops (views, 3, S, S) uint8, parameters (views, 8), index, the one
    read: a function of (seed, epoch, index, view). views=0: a centre crop. color: jitter, gray."""
    def __init__(self, pictures, cfg, *, views=2, seed=None, color=True):
        self.pictures, self.cfg, self.views, self.color = pictures, cfg, views, color
        self.seed = cfg.seed if seed is None else seed
    def read(self, index):
        skip = self.cfg.skip_bad_files
        for used in [*range(index, len(self.pictures)), *range(index)] if skip else [index]:
            try:
                return self.pictures.read(used), used
            except UserError as error:
                if not skip:
                    raise
                print(f"hex.py: skipped {clean(error)}", file=sys.stderr, flush=True)
        raise UserError("no file of the data can be read: give another --root")
    def __getitem__(self, key):
        picture, used = self.read(key[1])
        views = [self.view(picture, rng_of(self.seed, *key, number), number) for number in range(self.views)]
        crops, parameters = zip(*views or [self.centre(picture)])
        size = [self.cfg.size] * 2
        crops = [TF.resize(crop, size, TF.InterpolationMode.BICUBIC, antialias=True) for crop in crops]
        return torch.stack(crops), torch.tensor(parameters, dtype=torch.float32), key[1], used
    def centre(self, picture):      # the usual 224 of 256, cut before resizing; small: whole
        side = max(1, round(min(picture.shape[1:]) * (1 if self.cfg.size <= 64 else 224 / 256)))
        return TF.center_crop(picture, [side, side]), [0, 1, 1, 1, 0, 0, 0, 0]
    @staticmethod
    def random_crop(rng, height, width, smallest):
        """Inception's crop -> top, left, height, width: share to 1, ratio 3/4 to 4/3, 10 tries."""
        for _ in range(10):
            area = height * width * rng.uniform(smallest, 1)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, height - h), rng.randint(0, width - w), h, w
        h, w = min(height, max(1, round(width * 4 / 3))), min(width, max(1, round(height * 4 / 3)))
        return (height - h) // 2, (width - w) // 2, h, w
    def view(self, picture, rng, number):
        cfg, box = self.cfg, self.random_crop(rng, *picture.shape[1:], self.cfg.crop_min)
        flip, jitter, gray, blur, solarize = (rng.random() for _ in range(5))
        sigma, on = rng.uniform(0.1, 2.0), self.color and jitter < 0.8
        brightness, contrast, saturation, hue = (on * rng.uniform(-most, most) for most in cfg.jitter)
        gray, sigma = self.color and gray < cfg.grayscale, sigma * (blur < cfg.blur[number])
        factors = [1 + brightness, 1 + contrast, 1 + saturation, hue]
        return TF.crop(picture, *box), [flip < 0.5, *factors, gray, sigma, solarize < cfg.solarize[number]]

def shift_hue(x, shift):    # x: (B, 3, H, W) in [0, 1]; shift: (B, 1, 1), in turns
    value, chroma, (r, g, b) = x.amax(1), x.amax(1) - x.amin(1), x.unbind(1)
    safe = torch.where(chroma == 0, 1, chroma)
    sixth = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    sixth = torch.where(value == r, (g - b) / safe, sixth)
    k = (torch.stack([5 + sixth, 3 + sixth, 1 + sixth], 1) + 6 * shift[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)

def gaussian_blur(x, sigma, kernel=13):     # x: (B, C, H, W); sigma: (B,), at most 2, 0 for none
    B, C, H, W = x.shape
    offset = torch.arange(kernel, device=x.device) - kernel // 2
    weight = (-(offset / sigma.clamp_min(1e-4)[:, None]).square() / 2).softmax(1).repeat_interleave(C, 0)
    x = F.pad(x.reshape(1, B * C, H, W), [kernel // 2] * 4, mode="reflect")
    x = F.conv2d(x, weight[:, None, :, None], groups=B * C)                  # weight: (B C, kernel)
    return F.conv2d(x, weight[:, None, None, :], groups=B * C).view(B, C, H, W)

def augment(crops, parameters, mean_std=MEAN_STD["imagenet"], *, color=True, blur=False, solarize=False):
    """Crops (B, 3, S, S) uint8, parameters (B, 8) -> normalized float views, all at once."""
    flip, brightness, contrast, saturation, hue, gray, sigma, invert = parameters.T[..., None, None, None]
    x = torch.where(flip > 0, crops.flip(-1), crops).float() / 255
    if color:
        x = (x * brightness).clamp(0, 1)
        x = torch.lerp(TF.rgb_to_grayscale(x).mean((-3, -2, -1), keepdim=True), x, contrast).clamp(0, 1)
        x = torch.lerp(TF.rgb_to_grayscale(x), x, saturation).clamp(0, 1)
        x = shift_hue(x, hue[:, 0])
        x = torch.where(gray > 0, TF.rgb_to_grayscale(x), x)
    x = gaussian_blur(x, sigma.flatten()) if blur else x
    x = torch.where((invert > 0) & (x >= 0.5), 1 - x, x) if solarize else x
    x = torch.stack([(channel - mean) / std for channel, mean, std in zip(x.unbind(1), *mean_std)], 1)
    return x.contiguous(memory_format=torch.channels_last)

def prepare(crops, parameters, cfg, color=True):    # -> (views B, 3, S, S), view 1 first
    both = (torch.cat(x.to(cfg.device, non_blocking=True).unbind(1)) for x in (crops, parameters))
    return augment(*both, MEAN_STD.get(cfg.data, MEAN_STD["imagenet"]), color=color,
                   blur=color and max(cfg.blur) > 0, solarize=color and max(cfg.solarize) > 0)

def batches(indices, size, *key, epochs, start=0, group=1, part=(0, 1), whole=False):
    """This rank's batches, lists of (epoch, index), from batch `start` of the run to its end. Batch
    k of an epoch: order[k size : (k + 1) size]; the order is of (key, epoch) alone; what is beyond a
    multiple of `group` is dropped. part: (r, W): rank r of W has its share; whole: k mod W = r."""
    count, (r, W) = len(indices) // size // group * group, part
    low, high = (0, size) if whole else (r * size // W, (r + 1) * size // W)
    for number in range(start, epochs * count):
        epoch, k = divmod(number, count)
        if k == 0 or number == start:
            order = indices[permutation(len(indices), *key, epoch)].tolist()
        if not whole or k % W == r:
            yield [(epoch, i) for i in order[k * size + low:k * size + high]]

def leave_signals_to_the_run(_):        # in a loader, which must not stop before a step ends
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
def loader(views, batches, workers):    # spawned: a fork beside threads (gloo's) may never return
    return torch.utils.data.DataLoader(
        views, batch_sampler=batches, num_workers=workers, pin_memory=views.cfg.device == "cuda",
        worker_init_fn=leave_signals_to_the_run, multiprocessing_context="spawn" if workers else None)

# --- Optimizer and schedule -----------------------------------------------------------------------
class LARS(torch.optim.Optimizer):
    """You et al. 2017: lr f, clip: min(lr, f), f = eta |w| / (|g| + decay |w|); 1-d weights: lr."""
    def __init__(self, params, lr, *, momentum=0.9, weight_decay=0.0, eta=0.02, clip=True):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta, clip=clip)
        super().__init__(params, defaults)
    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            for p in (p for p in group["params"] if p.grad is not None):
                grad = p.grad
                if p.ndim > 1:
                    w, g = p.norm(), grad.norm()
                    factor = group["eta"] * w / (g + decay * w + 1e-8)
                    factor = (factor / lr).clamp(max=1) if group["clip"] else factor
                    grad = (grad + decay * p) * torch.where((w > 0) & (g > 0), factor, 1)
                self.state[p] = self.state[p] or dict(momentum=torch.zeros_like(p))
                p.sub_(lr * self.state[p]["momentum"].mul_(group["momentum"]).add_(grad))
        return loss

def learning_rate(step, total, warmup, peak):   # step: from 0; linear to peak, half a cosine to 0
    falling = (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2
    return peak * ((step + 1) / warmup if step < warmup else falling)

# --- Evaluation -----------------------------------------------------------------------------------
def autocast(cfg):
    kind = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.amp]
    return torch.autocast(cfg.device, dtype=kind, enabled=cfg.amp != "off")

@torch.no_grad()
def features(backbone, pictures, indices, cfg):
    """Of centre crops -> (n, width) float32, their indices; no bad files. UserError: not finite."""
    parts, rows, read = [[(0, i) for i in part.tolist()] for part in indices.split(256)], [], []
    for *batch, _, used in loader(Views(pictures, cfg, views=0), parts, cfg.workers * (len(parts) > 16)):
        with autocast(cfg):
            rows.append(backbone(prepare(*batch, cfg, color=False)).float())
        read.append(used)
    rows, good = torch.cat(rows), torch.cat(read) == indices
    if not rows.isfinite().all():
        raise UserError("features are not finite: give another --probe, or a lower --lr and new --out")
    return rows[good.to(rows.device)], indices[good]

def nearest_neighbors(bank, labels, queries, truth, k=20, temperature=0.07):
    """k-NN, votes weighted by e^{s/0.07} (Wu et al. 2018) -> (n,) bool: which are right."""
    bank, labels, right = F.normalize(bank), labels.to(bank.device), []
    for rows, answers in zip(F.normalize(queries).split(256), truth.to(bank.device).split(256)):
        near, index = (rows @ bank.T).topk(min(k, len(bank)))
        votes = near.new_zeros(len(rows), int(labels.max()) + 1)
        right.append(votes.scatter_add_(1, labels[index], (near / temperature).exp()).argmax(1) == answers)
    return torch.cat(right)

def place_in_class(targets):    # for each entry: how many of its class stand before it
    order, counts = targets.argsort(stable=True), targets.bincount()
    place = torch.arange(len(targets)) - (counts.cumsum(0) - counts)[targets[order]]
    return torch.empty_like(targets).scatter_(0, order, place)
def labelled_pictures(cfg, targets):    # whose labels the probe may see: indices, a balanced share
    classes, total = int(targets.max()) + 1, round(cfg.label_fraction * len(targets))
    if total < classes:
        least = math.ceil(1e4 * classes / len(targets)) / 1e4
        fail(f"--label-fraction {cfg.label_fraction}: fewer labels than classes; give {least} or more")
    order = permutation(len(targets), "labels")
    turn = place_in_class(targets[order]) * classes + permutation(classes, "labels")[targets[order]]
    return order[turn.argsort()[:total]].sort().values    # in turn, one of each class that has more

def linear_probe(backbone, cfg, train, val):
    """The linear probe and k-NN on a frozen backbone -> what probe.json holds; in percent.
    Heads of nine rates are trained (SGD, batch 256, decay 1e-5, a tenth at 60, 80 %: their probe) on
    stored features of centre crops, for ImageNet on crops and flips. The best on a tenth of the train
    pictures that have labels, which none was trained on, is run on val."""
    (r, W), epochs, classes = ranks(), cfg.probe_epochs, int(train.targets.max()) + 1
    backbone.to(cfg.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    labelled = labelled_pictures(cfg, train.targets)
    labelled = labelled[permutation(len(labelled), cfg.seed, "holdout")]
    targets, of_class = train.targets[labelled], train.targets[labelled].bincount()
    held = place_in_class(targets) < (of_class // 10).clamp_min(1).minimum(of_class - 1)[targets]
    fit, hold = labelled[~held], labelled[held] if held.any() else labelled
    x_val, i_val = features(backbone, val, torch.arange(len(val)), cfg)
    x_hold, i_hold = features(backbone, train, hold, cfg)
    x_fit, i_fit = features(backbone, train, fit[:262144], cfg)      # what fits into a GPU's memory
    y_val = val.targets[i_val].to(cfg.device)
    y_hold, y_fit = train.targets[i_hold].to(cfg.device), train.targets[i_fit].to(cfg.device)
    cached = cfg.data != "imagenet"
    rows = torch.arange(len(x_fit)) if cached else fit
    size = max(1, min(256, len(rows)) // W) * W
    lists = partial(batches, rows, size, cfg.seed, "probe", epochs=epochs, part=(r, W))
    source = None if cached else iter(loader(Views(train, cfg, views=1, color=False), lists(), cfg.workers))
    torch.manual_seed(cfg.seed)
    rates = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)     # of heads side by side
    heads = nn.ModuleList(nn.Linear(x_fit.shape[1], classes) for _ in rates).to(cfg.device)
    optimizer = torch.optim.SGD([dict(params=h.parameters()) for h in heads], momentum=0.9, weight_decay=1e-5)
    for keys in tqdm(lists(), "probe", epochs * (len(rows) // size), disable=process()[0] > 0, leave=False):
        if cached:
            i = torch.tensor([i for epoch, i in keys], device=cfg.device)
            x, y = x_fit[i], y_fit[i]
        else:
            crops, parameters, _, i = next(source)
            with torch.no_grad(), autocast(cfg):
                x = backbone(prepare(crops, parameters, cfg, color=False)).float()
            y = train.targets[i].to(cfg.device)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * 0.1 ** sum(keys[0][0] >= max(1, epochs * tenths // 10) for tenths in (6, 8))
        optimizer.zero_grad(set_to_none=True)
        sum(F.cross_entropy(head(x), y) for head in heads).backward()
        for p in heads.parameters():
            p.grad = mean_over_ranks(p.grad)
        optimizer.step()
    @torch.no_grad()
    def right(head, x, y, k=1):                        # (n,) bool: the truth is among the k largest
        parts = zip(x.split(4096), y.split(4096))
        return torch.cat([(head(x).topk(min(k, classes)).indices == y[:, None]).any(1) for x, y in parts])
    def percent(right):
        return 100 * right.double().mean().item()
    holdout = [percent(right(head, x_hold, y_hold)) for head in heads]
    best = max(range(len(rates)), key=holdout.__getitem__)
    top1, knn = right(heads[best], x_val, y_val), nearest_neighbors(x_fit, y_fit, x_val, y_val)
    digits = ["".join(map(str, which.int().tolist())) for which in (top1, knn)]
    return dict(top1=percent(top1), top5=percent(right(heads[best], x_val, y_val, 5)), knn=percent(knn),
                rate=rates[best], holdout=dict(zip(map(str, rates), holdout)), epochs=epochs,
                train=len(rows), held_out=int(held.sum()), val=len(y_val), knn_bank=len(y_fit),
                right=digits[0], knn_right=digits[1])  # which val pictures were right, a digit each

@torch.no_grad()
def emergence(model, cfg, train, val, picture=None):    # -> scalars, of fixed pictures
    model.eval()
    fixed = [(0, i) for i in permutation(len(train), "fixed")[:256].tolist()]
    crops, parameters, _, i = next(iter(loader(Views(train, cfg, seed="fixed"), [fixed], 0)))
    with autocast(cfg):
        embeddings = model(*prepare(crops, parameters, cfg).chunk(2))
    a, b = model.method.loss(*(e.float() for e in embeddings))[1][0]
    eps, local = local_mask(a, b, AdaptiveThreshold(cfg.quantile))                      # (2N, 2N)
    z, i = F.normalize(torch.cat([a, b])), i.repeat(2)
    out = dict(threshold=eps, local=local.sum(1).float().mean(), std=z.std(0).mean() * math.sqrt(z.shape[1]))
    for labels, name in ((train.targets, ""), (train.coarse, "_coarse")):
        if labels is not None:
            same = labels[i][:, None] == labels[i]
            out["purity" + name] = same[local.cpu()].double().mean()
            out["chance" + name] = same[i[:, None] != i].double().mean()
    x, i_train = features(model.method.backbone, train, permutation(len(train), "subset")[:2048], cfg)
    p = torch.linalg.svdvals(x)
    out["rankme"] = torch.special.entr(p / p.sum() + 1e-7).sum().exp()         # Garrido et al. 2023
    if val and train.targets is not None:
        x_val, i_val = features(model.method.backbone, val, permutation(len(val), "subset")[:512], cfg)
        right = nearest_neighbors(x, train.targets[i_train], x_val, val.targets[i_val])
        out["knn"] = 100 * right.double().mean()
    if picture and process()[0] == 0:       # a row: a picture, framed, then its H(i), nearest first
        views, cosine, grid, zoom = Views(train, cfg, views=0), (z @ z.T).cpu(), [], max(1, 64 // cfg.size)
        for anchor in range(min(8, len(i) // 2)):
            order = [j for j in cosine[anchor].argsort(descending=True).tolist() if local[anchor, j]]
            chosen = list(dict.fromkeys(i[[anchor, *order]].tolist()))[:8]
            strip = [torch.kron(views[0, j][0][0] / 255, torch.ones(zoom, zoom)) for j in chosen]
            strip += [torch.ones_like(strip[0])] * (8 - len(strip))
            grid += [F.pad(x, [4] * 4, value=float(place > 0)) for place, x in enumerate(strip)]
        write(picture, partial(torchvision.utils.save_image, grid, format="png", nrow=8, pad_value=1))
    model.train()
    return {key: value.item() for key, value in out.items()}

# --- Pre-training ---------------------------------------------------------------------------------
def write(path, fill):   # atomically: a reader, or a resumed run, finds the old file or the new one
    aside = path + ".tmp"
    try:
        if os.path.lexists(aside):
            os.remove(aside)                                   # a link of that name is not followed
        with open(aside, "xb") as file:
            fill(file)
            os.fsync(file.flush() or file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:            # RuntimeError: torch.save's, on a full disk
        if os.path.isfile(aside):
            os.remove(aside)
        raise UserError(f"{path}: cannot be written ({error}): make room, then repeat") from error

def read(path, reader, remedy):     # -> reader(open file); UserError: unreadable, malformed
    try:
        with open(path, "rb") as file:
            return reader(file)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        lost = isinstance(error, (OSError, MemoryError)) or "memory" in reason      # not its fault
        raise UserError(f"{path}: cannot be read ({reason}); {'mend that' if lost else remedy}") from error

def fingerprint(*parts):    # SHA-256 of bytes, of the tensors of a module, or of what JSON can hold
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            state = {k: v.detach().cpu().contiguous().view(-1) for k, v in part.state_dict().items()}
            part = b"".join(k.encode() + state[k].view(torch.uint8).numpy().tobytes() for k in sorted(state))
        part = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()

def agree(content, cfg, what):      # UserError unless all ranks hold the same content
    mine = torch.tensor(list(fingerprint(content).encode()), dtype=torch.uint8, device=cfg.device)[None]
    if (gather(mine) != mine).any():
        raise UserError(f"the ranks see different {what}: let all see the same --root and --out")

@contextlib.contextmanager
def signals_counted():
    """Yields when they came; another ends all. A thread: Python's handlers await system calls."""
    came, (end, start) = [], os.pipe()
    signals = [each for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
               if signal.getsignal(each) != signal.SIG_IGN]              # as SIGHUP is, under nohup
    def listen():
        while number := os.read(end, 1):
            came.extend([time.monotonic()] * (number[0] in signals))      # not the loader's SIGCHLD
            if came and came[-1] > came[0] + 3:     # sooner: torchrun's copy of the first
                os._exit(75)
    os.set_blocking(start, False)
    threading.Thread(target=listen, daemon=True).start()
    signal.set_wakeup_fd(start)
    before = [(each, signal.signal(each, lambda *_: None)) for each in signals]
    try:
        yield came
    except (RuntimeError, EOFError, OSError) as error:
        raise (KeyboardInterrupt if came else error) from error  # it hit a loader or rank, too
    finally:
        for each, handler in before:
            signal.signal(each, handler)
        signal.set_wakeup_fd(-1)
        os.close(start)

def build_model(cfg):       # the wrapped method on the CPU; its weights are a function of the seed
    torch.manual_seed(cfg.seed)
    backbone, width = build_backbone(cfg.backbone, cfg.size, cfg.norm)
    kind, norm = METHODS[cfg.method], group_norm if cfg.norm == "group" else nn.BatchNorm1d
    takes = {*HEADS, "temperature"} & inspect.signature(kind).parameters.keys()
    heads = {name: getattr(cfg, name) for name in takes}
    try:
        method = kind(backbone, width, norm=norm, **heads)
    except RuntimeError:
        fail(f"--method {cfg.method}: no room for its heads; lower --hidden, --dim, --predictor, --queue")
    threshold = {"adaptive": AdaptiveThreshold(cfg.quantile), "cosine": CosineThreshold(0.9, 0.3, cfg.epochs),
                 "step": StepThreshold(0.9, cfg.drop, cfg.drop_every), "oracle": None}[cfg.threshold]
    names = ("alpha", "temperature", "warmup_threshold", "beta", "tau_plus", "decoupled")
    of_hex = {name: getattr(cfg, name) for name in names}
    return HEX(method, cfg.loss, threshold=threshold, warmup=cfg.hex_warmup, **of_hex)

def pretrain(model, cfg, train, val, out, identity):
    """Trains, resumes, logs; leaves checkpoint.pt, metrics.jsonl, pictures. -> the backbone."""
    r, W, _ = process()
    whole = cfg.accumulate % W == 0           # each rank computes whole losses; or its part of each
    losses = cfg.accumulate // W if whole else cfg.accumulate              # of this rank, in a step
    images = cfg.batch_size * cfg.accumulate                               # in a step, of all ranks
    per_epoch, total, peak = len(train) // images, cfg.epochs * (len(train) // images), cfg.lr * images / 256
    model.to(cfg.device, memory_format=torch.channels_last).train()
    if W > 1 and not whole and cfg.device == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ddp = nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False) if W > 1 else model
    if cfg.compile:
        model.method.compile()
    model.method.steps, model.method.losses = total, losses
    weights = [p for p in model.parameters() if p.requires_grad]
    statistics = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    optimizer = LARS(weights, peak, weight_decay=cfg.weight_decay, eta=cfg.eta, clip=cfg.clip)
    scaler = torch.amp.GradScaler(cfg.device, enabled=cfg.amp == "fp16")
    parts = dict(model=model, optimizer=optimizer, scaler=scaler)               # of a checkpoint
    def restore(file):
        state = torch.load(file, map_location="cpu", weights_only=True)         # runs no code in it
        if state["identity"] != identity:
            raise UserError(f"{checkpoint}: is of another experiment, or of other data; give another --out")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["step"], state["logged"]
    checkpoint, again = os.path.join(out, "checkpoint.pt"), "delete it to start again"
    done, logged = read(checkpoint, restore, again) if os.path.exists(checkpoint) else (0, 0)
    agree(done, cfg, "checkpoints")
    log = open(os.path.join(out, "metrics.jsonl"), "ab") if r == 0 else io.BytesIO()
    log.seek(log.truncate(logged))                      # what came after the checkpoint comes again
    order = batches(torch.arange(len(train)), cfg.batch_size, cfg.seed, "order", epochs=cfg.epochs,
                    start=done * cfg.accumulate, group=cfg.accumulate, part=(r, W), whole=whole)
    source = iter(loader(Views(train, cfg), order, cfg.workers))
    def note(**event):
        event = {k: None if v != v else v for k, v in event.items()}        # NaN is no JSON
        log.write(json.dumps(event).encode() + b"\n")
        log.flush()
    def describe(step):     # what has emerged, to log and screen; first and last a picture, too
        epoch, names = step // max(1, per_epoch), {0: "neighbours_early.png", total: "neighbours.png"}
        with alone():
            found = emergence(model, cfg, train, val, step in names and os.path.join(out, names[step]))
        note(event="epoch", step=step, epoch=epoch, **found)
        announce(f"epoch {epoch}/{cfg.epochs}: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items()))
        if found["std"] < min(0.1, figures.get("std", 0)):          # at the start it is low, too
            announce(f"warning: the embeddings collapse (std {found['std']:.3f} of 1): lower --lr")
        return found
    since, first, waited, scale, figures = time.perf_counter(), done, 0.0, scaler.get_scale(), {}
    with signals_counted() as signals, tqdm(total=total, initial=done, disable=r > 0, unit="step") as bar:
        figures = figures if done else describe(0)
        for step in range(done + 1, total + 1):
            epoch, logs = (step - 1) // per_epoch, []                  # loss and stats of each loss
            lr = learning_rate(step - 1, total, cfg.lr_warmup * per_epoch, peak)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            for k in range(losses):
                asked = time.perf_counter()
                crops, parameters, _, used = next(source)               # (B, 2, 3, S, S), (B, 2, 8)
                waited += time.perf_counter() - asked
                x1, x2 = prepare(crops, parameters, cfg).chunk(2)
                torch.manual_seed(rng_of(cfg.seed, "step", step, k * W + r).getrandbits(63))  # dropout
                oracle = cfg.threshold == "oracle" and OracleHierarchy(train.coarse[used].to(cfg.device))
                alike = k == losses - 1 or W == 1                           # DDP averages gradients
                with alone(whole), contextlib.nullcontext() if alike else ddp.no_sync():
                    with autocast(cfg):
                        embeddings = ddp(x1, x2)
                    loss, stats = model.loss(*embeddings, epoch=epoch, threshold=oracle or None)
                    scaler.scale(loss / losses).backward()
                logs.append(dict(loss=loss.detach(), **stats))
            finite = torch.stack([values["loss"] for values in logs]).isfinite().all()
            if cfg.amp != "fp16":                                 # there, the scaler skips the step
                finite &= nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None]).isfinite()
            flags = mean_over_ranks(torch.stack([~finite, torch.full_like(finite, bool(signals))]).float())
            broken, stop = (flag > 0 for flag in flags.tolist())  # the host waits here, once a step
            if broken or scale < 1e-9:
                raise UserError(f"step {step}: the loss or its gradient is not finite; checkpoint.pt is "
                                "intact: lower --lr and give another --out")
            scaler.step(optimizer)
            scaler.update()
            before, scale = scale, scaler.get_scale()
            if scale >= before:                                      # one that fell: a skipped step
                model.after_step(step)
            if W > 1 and statistics:       # BatchNorm's running ones: the ranks' mean, alike on all
                mean = mean_over_ranks(torch.cat(statistics))
                torch._foreach_copy_(statistics, list(mean.split([len(each) for each in statistics])))
            if step % cfg.log_every == 0 or step == total:
                stats = {k: mean_over_ranks(torch.stack([v[k] for v in logs]).mean()).item() for k in logs[0]}
                dt = time.perf_counter() - since
                stats |= dict(lr=lr, images_per_second=(step - first) * images / dt, data_wait=waited / dt)
                note(event="step", step=step, epoch=epoch, **stats)
                names = ("loss", "threshold", "local", "images_per_second", "data_wait")
                bar.set_postfix({k: v for k, v in (figures | stats).items() if k in names}, refresh=False)
                since, first, waited = time.perf_counter(), step, 0.0
            bar.update()
            if step % per_epoch == 0:
                figures = describe(step)
            if r == 0 and (stop or step % per_epoch == 0 or step % (cfg.checkpoint_every or per_epoch) == 0):
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= dict(step=step, logged=log.tell(), identity=identity)
                write(checkpoint, partial(torch.save, state))
            if stop:
                agree(step, cfg, "steps")     # waits for the checkpoint: torchrun ends all with one
                raise KeyboardInterrupt
    log.close()
    return model.method.backbone

# --- Config and recipes ---------------------------------------------------------------------------
HEADS = ("hidden", "dim", "predictor", "queue", "ema")                       # arguments of a Method
COUNT, POSITIVE, SHARE, REAL = (int, 0, 2**31), (int, 1, 2**31), (float, 0, 1), (float, 0, 1e6)
OPTIONS = dict(  # name: default (None: the recipe's or the machine's), what is accepted, what it is
    data=("shapes", ["shapes", "cifar10", "cifar100", "imagenet", "folder"], "what to train on"),
    size=(None, (int, 8, 4096), "side of a view in pixels"), method=("simclr", [*METHODS], "the SSL method"),
    loss=("hex", [*LOSSES], "base: the method's own; or what takes its place or joins it"),
    decoupled=(False, bool, "HEX without the positive in the denominator"),
    threshold=("adaptive", ["adaptive", "step", "cosine", "oracle"], "what splits H from G; oracle: LABELS"),
    temperature=(None, (float, 1e-3, 1e6), "tau"), quantile=(0.99, (float, 1e-6, 1 - 1e-6), "q"),
    beta=(1.0, REAL, "how much the nearest weigh in Q"),
    tau_plus=(0.1, (float, 0, 1 - 1e-6), "assumed share of positives in H"),
    alpha=(None, SHARE, "weight of the loss against the method's own"),
    hex_warmup=(None, COUNT, "first epochs, with the method's own loss"),
    hidden=(None, POSITIVE, "hidden width of the projector"), dim=(None, POSITIVE, "width of an embedding"),
    predictor=(None, POSITIVE, "hidden width of the predictor"), queue=(None, POSITIVE, "embeddings in it"),
    ema=(None, SHARE, "momentum of the target at the start"),
    backbone=(None, "NAME", "a torchvision classifier, resnet10_narrow, or pixels"),
    norm=("batch", ["batch", "group"], "normalization of ResNets and heads"),
    epochs=(None, COUNT, "epochs; 0 evaluates a random backbone"),
    batch_size=(None, (int, 2, 2**31), "images in one loss"),
    accumulate=(None, POSITIVE, "losses in one step (adds no negatives)"),
    lr=(None, (float, 1e-9, 1e6), "base rate; the rate is lr * batch * accumulate / 256"),
    lr_warmup=(None, COUNT, "epochs of linear rise"), weight_decay=(None, REAL, "L2, not on biases, norms"),
    eta=(None, (float, 1e-9, 1e6), "trust coefficient of LARS"), clip=(None, bool, "LARS only lowers rates"),
    amp=(None, ["off", "bf16", "fp16"], "autocast; off on a CPU"),
    seed=(0, COUNT, "of weights, order and views"),             # the experiment ends here
    root=(None, "DIR", "DIR/{train,val}/<class>/*, pictures anywhere below, or CIFAR's archive"),
    classes=(None, "FILE", "file with the class folders to use, one a line"),
    skip_bad_files=(False, bool, "replace an unreadable file by the next, and say so"),
    recipe=(None, ["shapes", "small", "cifar", "imagenet"], "the defaults of the above; by --data"),
    probe=(None, "FILE", "evaluate this backbone.pt and do nothing else"),
    probe_epochs=(100, POSITIVE, "epochs of the linear probe"),
    label_fraction=(1.0, (float, 1e-6, 1), "share of train labels it sees, class-balanced"),
    out=(None, "DIR", "where results go; runs/<data>-<method>-<loss>-s<seed>..."),
    device=(None, ["cpu", "cuda"], "cuda where there is one"),
    workers=(None, COUNT, "loader processes a rank"), compile=(False, bool, "torch.compile the method"),
    checkpoint_every=(None, POSITIVE, "steps between checkpoints, beside each epoch's"),
    log_every=(10, POSITIVE, "steps between lines of metrics.jsonl"))
# Without a flag: jitter, of brightness, contrast, saturation, hue; blur, solarize: shares of either
# view; warmup_threshold: H is above it in the epochs of hex_warmup; drop: of the step threshold.
COMMON = dict(batch_size=256, accumulate=1, eta=0.02, clip=True, temperature=0.1, amp="fp16", hex_warmup=10,
              lr=0.3, weight_decay=1e-4, warmup_threshold=None, drop=0.1, crop_min=0.08, size=32,
              grayscale=0.2, jitter=[0.8, 0.8, 0.8, 0.2], blur=[0.5, 0.5], solarize=[0.0, 0.0])
ASYMMETRIC, SHARP = (dict(jitter=[0.4, 0.4, 0.2, 0.1], blur=blur, solarize=[0.0, 0.2])    # BYOL's
                     for blur in ([1.0, 0.1], [0.0, 0.0]))                       # at 224, 32 pixels
TINY = COMMON | dict(backbone="resnet10_narrow", clip=False, temperature=0.2, amp="off", blur=[0.0, 0.0])
RECIPES = {     # any: all methods; then where one differs; other heads: its class's. See README
    "imagenet": {"simclr": dict(accumulate=16), "barlow": ASYMMETRIC, "vicreg": ASYMMETRIC,
        "any": COMMON | dict(backbone="resnet50", size=224, epochs=100, weight_decay=1e-6, drop_every=20),
        "nnclr": ASYMMETRIC | dict(weight_decay=1e-5, warmup_threshold=0.9, drop_every=25),
        "mocov3": ASYMMETRIC | dict(temperature=1.0, lr=0.6), "byol": ASYMMETRIC | dict(lr=0.45),
        "simsiam": dict(jitter=[0.4, 0.4, 0.4, 0.1], lr=0.05, weight_decay=1e-4)},
    "cifar": {"any": COMMON | dict(backbone="resnet18", epochs=400, lr=0.4, drop_every=100),
        "nnclr": SHARP | dict(temperature=0.2, weight_decay=1e-5, queue=65536, lr=1.0, warmup_threshold=0.9,
                              drop=0.0),
        "barlow": SHARP | dict(lr=0.3, hidden=2048, dim=2048, hex_warmup=0),
        "mocov3": SHARP | dict(temperature=0.2, lr=0.3, weight_decay=1e-6),
        "byol": SHARP | dict(lr=1.0, weight_decay=1e-5), "vicreg": SHARP | dict(hidden=2048, dim=2048),
        "simsiam": dict(jitter=[0.4, 0.4, 0.4, 0.1], blur=[0.0, 0.0])},
    "shapes": {"byol": dict(lr=0.3, ema=0.97), "any": TINY | dict(batch_size=128, epochs=12, lr=1.0,
        crop_min=0.5, grayscale=1.0, hidden=256, dim=64, predictor=256, queue=2048)},
    "small": {"byol": dict(lr=0.15, ema=0.97), "any": TINY | dict(
        epochs=15, lr=0.2, crop_min=0.2, hidden=512, dim=128, predictor=512, queue=4096)}}
EXPERIMENT = [*OPTIONS][:[*OPTIONS].index("seed") + 1] + [
    "warmup_threshold", "drop", "drop_every", "crop_min", "grayscale", "jitter", "blur", "solarize"]

def resolve(recipe, method, given):     # -> all settings: given, the recipe's, the method's own
    takes, chosen = inspect.signature(METHODS[method]).parameters, RECIPES[recipe]["any"]
    chosen = {"alpha": METHODS[method].alpha} | chosen | RECIPES[recipe].get(method, {})
    chosen = {name: value for name, value in chosen.items() if name not in HEADS or name in takes}
    own = {name: takes[name].default for name in (*HEADS, "temperature") if name in takes}
    settings = {name: default for name, (default, *_) in OPTIONS.items()} | own | chosen | given
    epochs, tenth = settings["epochs"], math.ceil(settings["epochs"] / 10)
    settings["hex_warmup"] = given.get("hex_warmup", min(settings["hex_warmup"], round(epochs / 10)))
    settings["lr_warmup"] = given.get("lr_warmup", max(0, min(10, tenth, epochs - 1)))
    return {"drop_every": max(1, tenth)} | settings

# --- Command line ---------------------------------------------------------------------------------
def fail(message):          # what is wrong with the command itself
    error = UserError(message)
    error.status = 2
    raise error
def process():      # (rank, ranks, rank on this machine): torchrun's variables are read here alone
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
    missing = [name for name in names if not os.environ.get(name, "").isdigit() and name != "MASTER_ADDR"
               or name not in os.environ]
    if 0 < len(missing) < len(names):
        fail(f"{', '.join(missing)}: not set, but others are: use torchrun, or unset all")
    return (0, 1, 0) if missing else tuple(int(os.environ[name]) for name in names[:3])

def clean(text):        # one line for a terminal, whatever is in the names of files
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text).strip())[:1000]
def announce(text):
    if process()[0] == 0:
        tqdm.write(clean(text), file=sys.stderr)
def flag(name):
    return "--" + name.replace("_", "-")

def parse(argv):        # -> cfg, with every setting, and a dict of what was given
    parser = argparse.ArgumentParser("hex.py", "hex.py [options]", "HEX (WACV 2025)", allow_abbrev=False)
    parser.error = fail
    for name, (default, kind, text) in OPTIONS.items():
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else \
            dict(choices=kind) if isinstance(kind, list) else \
            dict(metavar=kind) if isinstance(kind, str) else dict(type=kind[0], metavar=kind[0].__name__)
        text += f" [{default}]" if default else ""
        parser.add_argument(flag(name), default=argparse.SUPPRESS, help=text, **how)
    given, chosen = vars(parser.parse_args(argv)), {}
    for name, value in given.items():
        kind = OPTIONS[name][1]
        if value == "" or isinstance(kind, tuple) and not kind[1] <= value <= kind[2]:
            wrong = "is empty; leave it out" if value == "" else f"must lie in {kind[1:]}"
            fail(f"{flag(name)} {value!r}: {wrong}")
    if "probe" in given and not {"backbone", "data"} <= given.keys():  # else as in the run it is of
        beside = os.path.join(os.path.dirname(given["probe"]), "config.json")
        remedy, there = "name --backbone, --size, --norm and --data", os.path.exists(given["probe"])
        if not os.path.exists(beside):
            what = f"config.json beside it; {remedy}" if there else "such file; give another"
            fail(f"--probe {given['probe']}: there is no {what}")
        saved = read(beside, lambda file: dict(json.load(file)["config"]), remedy)
        names = ("recipe", "backbone", "norm", "size") + ("data", "root", "classes") * ("data" not in given)
        chosen = {name: saved[name] for name in names if saved.get(name) is not None}
    chosen |= given
    data = chosen.get("data", "shapes")
    recipes = dict(cifar10="cifar", cifar100="cifar", folder="imagenet")
    chosen.setdefault("recipe", recipes.get(data, data))
    cfg = argparse.Namespace(**resolve(chosen["recipe"], chosen.get("method", "simclr"), chosen))
    cfg.device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cfg.amp = "off" if cfg.device == "cpu" and "amp" not in given else cfg.amp
    if cfg.workers is None:     # on a CPU, pictures in memory are cropped fastest by the run itself
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cfg.workers = min(12, cores // 2) if cfg.device == "cuda" or cfg.data in ("imagenet", "folder") else 0
    for name in ("root", "classes", "probe"):
        setattr(cfg, name, getattr(cfg, name) and os.path.abspath(getattr(cfg, name)))
    check(cfg, given)
    return cfg, given

def check(cfg, given):      # UserError: flags without effect, or that contradict each other
    takes, folder = inspect.signature(METHODS[cfg.method]).parameters, cfg.data in ("imagenet", "folder")
    training = {*EXPERIMENT, "compile", "log_every", "checkpoint_every"}
    for condition, names, reason in (                # (if, these flags have no effect, beside this)
            (cfg.probe, training - {"data", "size", "backbone", "norm", "amp", "seed"}, "--probe"),
            (cfg.loss != "hex", {"beta", "tau_plus", "decoupled"}, f"--loss {cfg.loss}"),
            (cfg.loss in ("base", "infonce", "dcl"), {"threshold", "quantile"}, f"--loss {cfg.loss}"),
            (cfg.loss == "base", {"alpha", "hex_warmup"} | {"temperature"} - takes.keys(), "--loss base"),
            (cfg.threshold != "adaptive", {"quantile"}, f"--threshold {cfg.threshold}"),
            (True, {*HEADS} - takes.keys(), f"--method {cfg.method}"),
            (cfg.data == "shapes", {"root"}, "--data shapes"),
            (not folder, {"classes", "skip_bad_files"}, f"--data {cfg.data}")):
        for name in sorted(names & given.keys()) if condition else ():
            fail(f"{flag(name)} {given[name]}: has no effect beside {reason}; leave it out")
    if folder and not os.path.isdir(cfg.root or ""):
        fail(f"--root {cfg.root}: is no folder; --data {cfg.data} needs --root DIR")
    if cfg.accumulate % process()[1] and cfg.batch_size % process()[1]:
        fail(f"--batch-size {cfg.batch_size}: give a multiple of the {process()[1]} ranks")
    for name in ("hex_warmup", "lr_warmup"):
        if cfg.epochs and getattr(cfg, name) >= cfg.epochs:
            fail(f"{flag(name)} {getattr(cfg, name)}: leaves no epoch; give {flag(name)} {cfg.epochs - 1}")
    if cfg.threshold == "oracle" and cfg.data not in ("shapes", "cifar100"):
        fail(f"--threshold oracle: --data {cfg.data} has no super-classes; give --data shapes or cifar100")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no GPU is visible; give --device cpu")
    if cfg.backbone == "pixels" and cfg.epochs and not cfg.probe:
        fail("--backbone pixels: has no weights to train; add --epochs 0")

def load_backbone(path, cfg, remedy):  # a backbone.pt, or torchvision's file without its classifier
    backbone, _ = build_backbone(cfg.backbone, cfg.size, cfg.norm)
    mine = backbone.state_dict()
    def fill(file):
        state = torch.load(file, map_location="cpu", weights_only=True)         # runs no code in it
        for name in [k for k in state if re.match(r"(fc|classifier|heads?)\.", k) and k not in mine]:
            del state[name]                                           # in place: it keeps _metadata
        require(all(state[k].dtype == mine[k].dtype for k in state.keys() & mine.keys()), "another dtype")
        backbone.load_state_dict(state)
    read(path, fill, remedy)
    return backbone

@contextlib.contextmanager
def open_run(out, cfg, argv, identity):     # its folder: made, or of the same experiment; locked
    path, code, lock = os.path.join(out, "config.json"), fingerprint(open(__file__, "rb").read()), None
    saved = read(path, lambda f: dict(json.load(f)), "give another --out") if os.path.exists(path) else {}
    there, here = saved.get("config", {}), vars(cfg)
    foreign = not cfg.probe and saved.get("identity") != identity
    if saved and (foreign or bool(cfg.probe) != bool(there.get("probe"))):
        other = [f"{flag(name)} {there.get(name)} there, {here[name]} here" for name in EXPERIMENT
                 if there.get(name) != here[name]] or ["of other data"]
        raise UserError(f"--out {out}: holds another experiment ({'; '.join(other)}); give another --out")
    if saved and saved.get("code") != code:
        announce(f"warning: hex.py has changed since {out} was begun")
    if process()[0] == 0:
        known = {"lock", "config.json.tmp"}
        if os.path.lexists(out) and not (saved or os.path.isdir(out) and known.issuperset(os.listdir(out))):
            raise UserError(f"--out {out}: exists and is no folder of a run; give another --out")
        try:
            os.makedirs(out, exist_ok=True)
            lock = open(os.path.join(out, "lock"), "a")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)         # its owner's death releases it
        except OSError as error:
            reason = "another run is at work there" if lock else error.strerror
            raise UserError(f"--out {out}: cannot be used ({reason}); give another --out") from error
        if cfg.probe or not saved:
            versions = dict(python=sys.version, torch=torch.__version__, torchvision=torchvision.__version__)
            content = dict(config=vars(cfg), identity=identity, code=code, command=["hex.py", *argv],
                           versions=versions, ranks=process()[1], threads=torch.get_num_threads())
            write(path, lambda file: file.write(json.dumps(content, indent=1).encode()))
    agree(out, cfg, "--out")                                    # waits for all
    with lock or contextlib.nullcontext():
        yield

def run(cfg, argv):       # whatever is wrong with the command shows before the run's folder is made
    torch.backends.cudnn.benchmark = True                             # the sizes of a run are fixed
    remedy = f"give a file of --backbone {cfg.backbone} at --size {cfg.size}"
    backbone, model = (load_backbone(cfg.probe, cfg, remedy), None) if cfg.probe else (None, build_model(cfg))
    train, val = load_data(cfg)
    labelled, step = val is not None and train.targets is not None, cfg.batch_size * cfg.accumulate
    if labelled:
        labelled_pictures(cfg, train.targets)
    elif cfg.probe:
        fail(f"--root {cfg.root}: holds no train/ and val/ with labels to probe; give another")
    if model and cfg.epochs and len(train) < step:
        cure = f"--accumulate 1 --batch-size {min(cfg.batch_size, len(train)) // process()[1] * process()[1]}"
        fail(f"{len(train)} pictures are less than the {step} of a step; give {cure}")
    data = fingerprint(train.identity(), val.identity() if val else b"")
    identity = fingerprint({name: getattr(cfg, name) for name in EXPERIMENT}, data)
    named = {name: getattr(cfg, name) for name in ("data", "method", "loss", "seed", "epochs")}
    plain = resolve(cfg.recipe, cfg.method, named | ({} if cfg.device == "cuda" else {"amp": "off"}))
    plain["epochs"] = RECIPES[cfg.recipe]["any"]["epochs"]
    other = [f"-{key}_{getattr(cfg, key)}" for key in EXPERIMENT if getattr(cfg, key) != plain[key]]
    about = f"{cfg.method}-{cfg.loss}-s{cfg.seed}{''.join(other)}"
    about = f"probe-{os.path.basename(os.path.dirname(cfg.probe))}-s{cfg.seed}" if cfg.probe else about
    name = re.sub(r"[^\w.+-]+", "_", f"{cfg.data}-{about}")
    name = name if len(name) < 200 else name[:180] + "-" + fingerprint(name)[:12]
    out = cfg.out or os.path.join("runs", name)
    final, results = os.path.join(out, "backbone.pt"), os.path.join(out, "probe.json")
    agree([identity, os.path.exists(final)], cfg, "data, options or --out")
    with open_run(out, cfg, argv, identity):
        how = " ".join(f"{key}={value}" for key, value in vars(cfg).items() if value is not None)
        no = "" if labelled else f" without {'labels' if train.targets is None else 'val/'}: no probe or k-NN"
        announce(f"{out}: {len(train)} train, {len(val or ())} val pictures{no}; {process()[1]} ranks; {how}")
        if cfg.recipe in ("cifar", "imagenet") and torch.version.cuda and not torch.cuda.is_available():
            announce(f"warning: no GPU is visible, and the recipe {cfg.recipe} is for one")
        new, found = not cfg.probe and not os.path.exists(final), None
        if new:
            backbone = pretrain(model, cfg, train, val, out, identity).to("cpu")
            if process()[0] == 0:
                write(final, partial(torch.save, backbone.state_dict()))
        elif not cfg.probe:
            backbone = load_backbone(final, cfg, "delete it")
        if labelled:
            names = ("probe_epochs", "label_fraction", "seed", "amp", "backbone", "size", "norm", "data")
            about = fingerprint({name: getattr(cfg, name) for name in names}, data, backbone)
            if os.path.exists(results):
                found = read(results, lambda file: dict(json.load(file)), "delete it")
            if not found or found.get("identity") != about:
                found, new = linear_probe(backbone, cfg, train, val) | dict(identity=about), True
                if process()[0] == 0:
                    write(results, lambda file: file.write(json.dumps(found, indent=1).encode()))
        agree(out, cfg, "--out")                                    # waits for all
        if process()[0] == 0:                           # the result, what has emerged, what is left
            names = dict(top1="top-1", top5="top-5", knn="k-NN")
            result = ", ".join(f"{word} {found[key]:.2f} %" for key, word in names.items() if found)
            print(f"{clean(out)}: {result or ', '.join(sorted(os.listdir(out)))}")
            log, events = os.path.join(out, "metrics.jsonl"), []
            if os.path.exists(log):
                events = read(log, lambda file: [*map(json.loads, file)], "delete it")
            epochs = [event for event in events if event.pop("event") == "epoch"]
            for figures in epochs[:1] + epochs[-1:]:
                print(", ".join(f"{k} {v:.3g}" for k, v in figures.items() if v is not None))
        if not new:
            announce(f"finished before, nothing was run; delete {out} to repeat")

def main(argv=None):
    """The command line -> exit status: 0, 1 (what it met), 2 (the command), 75 (interrupted)."""
    argv, own, status, rank = sys.argv[1:] if argv is None else list(argv), False, 0, 0
    try:
        rank = process()[0]
        cfg, _ = parse(argv)
        own = process()[1] > 1 and not dist.is_initialized()
        if own:
            if cfg.device == "cuda":
                torch.cuda.set_device(process()[2])
            signal.signal(signal.SIGINT, signal.SIG_DFL)        # Python's would wait for a rank
            dist.init_process_group({"cuda": "nccl", "cpu": "gloo"}[cfg.device])
        run(cfg, argv)
    except KeyboardInterrupt:
        line, status = "interrupted, run the same command again", 75
    except UserError as error:                                   # a loader's comes with a traceback
        line, status = str(error), error.status
        line = "error: " + (line.rpartition("UserError: ")[2] if "DataLoader worker" in line else line)
    except Exception as error:
        line, status = "error: " + str(error).strip().split("\n")[0], 1
        known = "out of memory|shared memory|DataLoader worker|already in use|closed by peer|reset by peer"
        if not re.search(known, line):              # these say enough; any other is a fault of ours
            traceback.print_exc()
    if status and (rank == 0 or dist.is_initialized() and status != 75):    # what all say, one says
        print(f"hex.py: {clean(line)}", file=sys.stderr, flush=True)
    if own and status:
        os._exit(status)                                      # to destroy the group waits for peers
    if own:
        dist.destroy_process_group()
    return status

if __name__ == "__main__":
    sys.exit(main())
