# SPDX-License-Identifier: MIT
"""Tests of hex.py: the loss against loops, closed forms, the authors' numbers, two ranks; the methods; then from
pictures to results, where the real command is held against a plain loop."""
import copy
import fcntl
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import weakref
from functools import partial
from itertools import product

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

import hex as hx

FORMS = ["info_nce", "dcl", "hex", "decoupled", "released"]
NOBODY, THRESHOLD = ("labels", [0, 1, 2, 3, 4, 5]), dict(
    quantile=hx.AdaptiveThreshold, rescaled=lambda x: hx.StepThreshold(x, 0, 1), above=float,
    labels=lambda x: hx.OracleHierarchy(torch.as_tensor(x)))

def views(N, D=12, spread=2.0):
    """Two views of N images in float64: the first's nearly equal, the last's nearly unrelated."""
    g = torch.Generator().manual_seed(N)
    a, noise, length = (torch.randn(N, d, generator=g, dtype=torch.float64) for d in (D, D, 2))
    b = a + torch.linspace(0.1, spread, N, dtype=torch.float64)[:, None] * noise
    return a * length[:, :1].exp(), b * length[:, 1:].exp()

def ours(form, a, b, t=0.1, H=("quantile", 0.99), **knobs):
    """A loss of hex.py -> loss, stats. H: what makes a negative local, a kind of threshold and its value."""
    if form in ("info_nce", "dcl"):
        return getattr(hx, form)(a, b, t), {}
    return hx.hex_nce(a, b, t, threshold=THRESHOLD[H[0]](H[1]), released=form == "released",
                      decoupled=form == "decoupled", **knobs)

def naive(form, a, b, t=0.1, H=("quantile", 0.99), beta=1.0, tau_plus=0.1):
    """The same by its equations, scalar by scalar, with autograd; what has no gradient is a plain float."""
    N, n, exp, (kind, value) = len(a), 2 * len(a), math.exp, H
    z = torch.stack([row / row.dot(row).sqrt() for row in (*a, *b)])
    s, v = [row.unbind() for row in (z @ z.T).unbind()], (z @ z.T).tolist()
    negatives = [[j for j in range(n) if j % N != i % N] for i in range(n)]
    rows = v if form == "released" else [[v[i][j] for j in negatives[i]] for i in range(n)]
    eps = sum(sorted(row)[round(value * (len(row) - 1))] for row in rows) / n if kind == "quantile" else value

    def is_local(i, j):
        if kind == "labels":
            return value[i % N] == value[j % N]
        low, high = (min(v[i]), max(v[i])) if kind == "rescaled" else (0, 1)
        return (v[i][j] - low) / (high - low) > eps

    losses, sizes, at_floor = [], [], 0
    for i in range(n):
        local, other = [j for j in negatives[i] if is_local(i, j)], (i + N) % n
        e = [(x / t).exp() for x in s[i]]
        p, everyone = e[other], sum(e[j] for j in negatives[i])
        rest = sum((e[j] for j in negatives[i] if j not in local), 0 * p)
        w = {h: exp(beta * v[i][h] / t) for h in local}
        mean = sum(w.values()) / max(len(w), 1)
        L = (sum(w[h] / mean * e[h] for h in local) - tau_plus * len(local) * p) / (1 - tau_plus)
        if local and L.item() < len(local) * exp(-1 / t):
            L, at_floor = len(local) * exp(-1 / t), at_floor + 1
        total = dict(info_nce=p + everyone, dcl=everyone, hex=p + rest + L, decoupled=rest + L,
                     released=rest if len(local) < n - 2 else 1 + 0 * rest)[form]
        losses.append(total.log() - s[i][other] / t + (form == "released") * (n - 2) * exp(-1 / t))
        sizes.append(len(local))
    some = sum(size > 0 for size in sizes)
    stats = dict(local=sum(sizes) / n, empty=1 - some / n, threshold=math.nan if kind == "labels" else eps)
    return sum(losses) / n, stats | ({} if form == "released" else dict(clamped=at_floor / max(some, 1)))

def graded(f, *embeddings):
    """-> loss, its gradient in each tensor of embeddings, stats as floats."""
    embeddings = [x.detach().clone().requires_grad_() for x in embeddings]
    loss, stats = f(*embeddings)
    loss.backward()
    grads = torch.stack([torch.zeros_like(x) if x.grad is None else x.grad for x in embeddings])
    return loss.detach(), grads, {k: float(v) for k, v in stats.items()}

def assert_same(got, want, tol=1e-10):
    """Loss and gradient (dtypes too), and the stats that both have."""
    torch.testing.assert_close(got[:2], want[:2], rtol=tol, atol=tol)
    both = got[2].keys() & want[2].keys()
    assert {k: got[2][k] for k in both} == pytest.approx({k: want[2][k] for k in both}, abs=tol, nan_ok=True)

# --- The loss -------------------------------------------------------------------------------------
GRID = [dict(t=t, H=("quantile", q), beta=beta, tau_plus=tau_plus) for t, q, beta, tau_plus in
        product([0.02, 0.1, 0.5], [0.5, 0.9, 0.99], [0.0, 0.5, 1.0, 2.0], [0.0, 0.05, 0.1])]
FIXED = [dict(H=H) for H in (("rescaled", 0.0), ("rescaled", 0.5), ("rescaled", 0.9), ("above", 0.1),
                             ("above", -2), ("labels", [0, 0, 1, 2, 2, 2, 3]), ("labels", [0] * 7))]

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("N, some", [
    (2, GRID[::5]), (3, GRID[::5]), (5, GRID[::7]), (17, GRID[::17]), (26, GRID[::37]), (7, FIXED)])
def test_loss_gradient_and_stats_are_the_loops(form, N, some):
    for knobs in some:
        want = graded(partial(naive, form, **knobs), *views(N))
        assert_same(graded(partial(ours, form, **knobs), *views(N)), want)

def test_the_loops_meet_every_kind_of_anchor():
    stats = naive("hex", *views(17), H=("quantile", 0.9))[1]    # at the floor, above it and without neighbors
    assert 0.01 < stats["empty"] < 0.5 and 0.2 < stats["clamped"] < 0.8

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("t, tau_plus", [(0.3, 0.0), (0.3, 0.1), (0.1, 0.1)])
def test_gradcheck_with_a_learnable_temperature(form, t, tau_plus):
    """Where H cannot flip and Q is 1 (elsewhere Q and eps are held still, on purpose)."""
    def loss(a, b, temperature):
        return ours(form, a, b, temperature, H=("rescaled", 0.3), beta=0.0, tau_plus=tau_plus)[0]
    inputs = *views(4), torch.tensor(t, dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs])

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("H", [("quantile", 0.99), ("rescaled", 0.5), ("labels", [0] * 6), NOBODY], ids=str)
@pytest.mark.parametrize("value, zeros", [(1.0, 0), (1.0, 6), (None, 1)])
def test_equal_embeddings_and_zeros(form, H, value, zeros):
    """Finite, with a bounded gradient; log(2N - 1) where all are equal and the loss is NT-Xent."""
    data = [torch.full((6, 4), value) if value else x.float() for x in views(6)]
    loss, grad, _ = graded(partial(ours, form, H=H), *(x * (torch.arange(6) >= zeros)[:, None] for x in data))
    assert loss.isfinite() and grad.isfinite().all() and grad.norm() < 1e3
    if value and (form == "info_nce" or form == "hex" and H == NOBODY):
        assert loss.item() == pytest.approx(math.log(11), abs=1e-5)

@pytest.mark.parametrize("t, floor", [(0.1, True), (0.5, False)])
def test_two_orthogonal_images(t, floor):
    """Positives at 1, negatives at 0 and all of them local: by hand, with HEX at its floor and above it."""
    z, x = torch.eye(2, dtype=torch.float64), math.exp(-1 / t)
    L = 2 * x if floor else (2 - 0.2 / x) / 0.9
    want = dict(info_nce=1 + 2 * x, dcl=2 * x, hex=1 + x * L, decoupled=x * L, released=x * math.exp(2 * x))
    for form in FORMS:
        loss, stats = ours(form, z, z, t, ("labels", [0, 0]))
        assert loss.item() == pytest.approx(math.log(want[form]), abs=1e-12)
        assert form != "hex" or (stats["local"], stats["empty"], stats["clamped"]) == (2, 0, floor)

@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_who_is_repelled(beta):
    """Above the floor all of H(i), the nearest most; at the floor, and in `released`, nobody. Image 0's views
    lie apart, which keeps its anchors above the floor; the others' nearly coincide."""
    image, noise = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = image + image.norm() / 12
    z = nn.functional.normalize(torch.cat([a, a + torch.tensor([4.0] + 5 * [0.03])[:, None] * noise]))
    above, floor = [0, 6], [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    negative = (torch.arange(12)[:, None] - torch.arange(12)) % 6 != 0
    for form in ("hex", "released"):
        grad = graded(partial(ours, form, H=("labels", [0] * 6), beta=beta), *z.chunk(2))[1].flatten(0, 1)
        push = torch.linalg.solve(z.T, grad.T).T                # z is a basis: [i, j] is dl/ds_ij + dl/ds_ji
        assert push[floor][:, floor][negative[floor][:, floor]].abs().max() < 1e-12
        assert form == "hex" or push[above][:, floor].abs().max() < 1e-12
        for row, cosine in zip(push[above][:, floor], (z @ z.T)[above][:, floor]) if form == "hex" else ():
            assert row.min() > 1e-10 and row.argsort().equal(cosine.argsort())

@pytest.mark.parametrize("form, shift, t, fixed, loss, norm_a, grad_a, grad_b", [
    ("released", 0.0, 0.1, None, -0.209686502289, 0.124583599879, -0.002105660922, 0.002185973938),
    ("released", 0.0, 0.1, 0.9, 0.057173995355, 0.123146161097, -0.000531205316, 0.002199590476),
    ("info_nce", 0.0, 0.1, None, 0.768578547087, 0.071991750913, -0.000654980593, 0.001015350352),
    ("released", 0.5, 0.2, None, 3.774087621686, 0.055683415691, -0.000110334815, -0.000175189849),
    ("released", 0.5, 0.2, 0.7, 3.138836540220, 0.056886314000, -0.000140903878, -0.000069540890)])
def test_authors_numbers(form, shift, t, fixed, loss, norm_a, grad_a, grad_b):
    """What github.com/olivesgatech/HEX @ c3002ed computes in float64, for SimCLR and NNCLR alike."""
    i, j = torch.arange(128, dtype=torch.float64)[:, None], torch.arange(16, dtype=torch.float64)
    image = torch.sin((i % 10 + 1) * (j + 1) * 1.3 + shift) + 0.8 * torch.sin(i * (j + 2) * 0.7 + 2 * shift)
    a = image + 0.3 * torch.sin(i * (j + 3) * 1.1 + 3 * shift)
    b = image + 0.3 * torch.cos(i * (j + 4) * 0.9 + 4 * shift)
    H = ("rescaled", fixed) if fixed else ("quantile", 0.99)
    value, (da, db), _ = graded(partial(ours, form, t=t, H=H), a, b)
    got = [x.item() for x in (value, da.norm(), da[0, 0], db[5, 0])]
    assert got == pytest.approx([loss, norm_a, grad_a, grad_b], rel=0, abs=1e-10)

@pytest.mark.parametrize("form", FORMS)
def test_symmetries(form):
    """The order of the images, which view is which, and the rows' lengths mean nothing."""
    (a, b), order = views(17), torch.randperm(17, generator=torch.Generator().manual_seed(0))
    f = partial(ours, form, H=("quantile", 0.9))
    loss, grad, stats = graded(f, a, b)
    assert_same(graded(f, a[order], b[order]), (loss, grad[:, order], stats))
    assert_same(graded(f, b, a), (loss, grad.flip(0), stats))
    assert_same(graded(f, 3 * a, b / 7), (loss, torch.stack([grad[0] / 3, grad[1] * 7]), stats))

@pytest.mark.parametrize("form", FORMS)
def test_half_precision(form):
    """Half inputs cost their own rounding and no more, autocast costs nothing: it is computed in float32."""
    (a, b), f = (x.float() for x in views(17)), partial(ours, form, t=0.3, H=("rescaled", 0.6))
    exact = graded(f, a, b)
    assert_same(graded(torch.autocast("cpu", dtype=torch.bfloat16)(f), a, b), exact, 1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        loss, grad, _ = graded(f, a.to(dtype), b.to(dtype))
        assert loss.dtype == torch.float32 and abs(loss - exact[0]) < 1e-2 and grad.isfinite().all()

@pytest.mark.parametrize("form, t", [*product(FORMS, [0.02, 0.005])])
def test_low_temperatures_in_float32(form, t):
    """e^(1/t) is beyond float32: inf or nan, unless each row's maximum is taken out first."""
    f, (a, b) = partial(ours, form, t=t), views(17)
    (loss, grad, _), (want, want_grad, _) = graded(f, a.float(), b.float()), graded(f, a, b)
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    assert (grad - want_grad).norm() < 1e-3 * want_grad.norm()

x = torch.randn(4, 3)

@pytest.mark.parametrize("call, words", [
    (lambda: hx.info_nce(x, x, 0.0), "temperature = 0.0"), (lambda: hx.dcl(x, x, -1), "temperature = -1"),
    (lambda: hx.hex_nce(x, x, math.nan), "temperature = nan"), (lambda: hx.dcl(x[0], x[0]), r"\(3,\)"),
    (lambda: hx.AdaptiveThreshold(1.0), "quantile = 1.0"), (lambda: hx.hex_nce(x, x, beta=-1), "beta = -1"),
    (lambda: hx.adaptive_threshold(x, 0), "quantile = 0"), (lambda: hx.hex_nce(x, x, tau_plus=1), "plus = 1"),
    (lambda: hx.info_nce(x, x[:3]), r"a and b .*\(4, 3\) and \(3, 3\)"),
    (lambda: hx.hex_nce(x[:1], x[:1]), "N = 1"), (lambda: hx.local_mask(x[:1], x[:1]), "N = 1"),
    (lambda: hx.hex_nce(x, x, threshold="0.9"), "threshold = '0.9'"),
    (lambda: hx.hex_nce(x, x, threshold=hx.OracleHierarchy(torch.ones(3))), "labels: 3"),
    (lambda: hx.adaptive_threshold(torch.tensor([[0.1], [-math.inf]])), "-inf"),
    (lambda: hx.HEX(nn.Identity(), "nce"), "loss = 'nce'"),
    (lambda: hx.HEX(nn.Bilinear(3, 3, 2))(x, x), "bare tensor")])
def test_a_refusal_names_argument_and_value(call, words):
    with pytest.raises(ValueError, match=words):
        call()

# --- Thresholds and H(i) --------------------------------------------------------------------------
@pytest.mark.parametrize("q, k, left_out", [*product([0.01, 0.5, 0.9, 0.99], [1, 2, 4, 51, 300], [0, 0.4])])
def test_adaptive_threshold_is_an_order_statistic(q, k, left_out):
    """The mean over rows of entry round(q (k - 1)), half to even, of their k finite entries; no gradient."""
    g = torch.Generator().manual_seed(k)
    cosine, out = torch.randn(8, k, generator=g).double(), torch.rand(8, k, generator=g) < left_out
    out[:, 0] = False
    rows = [sorted(x for x in row if x > -math.inf) for row in cosine.masked_fill(out, -math.inf).tolist()]
    got = hx.adaptive_threshold(cosine.requires_grad_().masked_fill(out, -math.inf), q)
    assert got.item() == pytest.approx(sum(row[round(q * (len(row) - 1))] for row in rows) / 8, abs=1e-14)
    assert got.ndim == 0 and not got.requires_grad

@pytest.mark.parametrize("threshold, want", [
    (hx.StepThreshold(0.9, 0.1, 10), {0: 0.9, 9: 0.9, 10: 0.8, 45: 0.5, 90: 0.0, 500: 0.0}),
    (hx.CosineThreshold(0.9, 0.3, 100), {0: 0.9, 25: 0.6 + 0.3 * math.sqrt(0.5), 50: 0.6, 300: 0.3})])
def test_schedules_have_no_state(threshold, want):
    for epoch in [*want, *reversed(want)]:
        got = graded(partial(hx.hex_nce, threshold=threshold, epoch=epoch), *views(5))
        assert_same(got, graded(partial(naive, "hex", H=("rescaled", want[epoch])), *views(5)))

@pytest.mark.parametrize("N", [16, 128])
def test_local_mask_is_about_1_percent_of_the_negatives(N):
    a, noise = torch.randn(2, N, 32, generator=torch.Generator().manual_seed(N))
    eps, H = hx.local_mask(a, a + 0.5 * noise)
    assert H.shape == (2 * N, 2 * N) and H.dtype == torch.bool and eps.ndim == 0
    assert not (H.diagonal().any() or H.diagonal(N).any() or H.diagonal(-N).any())
    assert H.any() and H.sum(1).double().mean() == pytest.approx(0.01 * (2 * N - 2), rel=0.5, abs=0.5)

# --- Methods --------------------------------------------------------------------------------------
HEADS = dict(simclr={}, nnclr=dict(predictor=8, queue=10), mocov3=dict(predictor=8), byol=dict(predictor=8),
             simsiam=dict(predictor=8), barlow={}, vicreg={})
COUNT = dict(simclr=2, nnclr=4, mocov3=6, byol=6, simsiam=4, barlow=2, vicreg=2)    # of embeddings

def method(name, **more):
    """A small one in float64, of the same weights each time."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 16))
    return hx.METHODS[name](backbone, 16, hidden=8, dim=6, **HEADS[name], **more).double()

def embeddings(name, N=8):
    return 0.8 * torch.randn(COUNT[name], N, 6, generator=torch.Generator().manual_seed(1)).double()

def naive_own(name, e, queue):
    """Each paper's loss, in loops over rows or columns."""
    def cross_entropy(a, b, t):
        logits = [[float(u @ v) / t for v in b] for u in a]
        return sum(math.log(sum(map(math.exp, row))) - row[i] for i, row in enumerate(logits)) / len(a)

    def cos(a, b):
        return sum(float(x @ y) for x, y in zip(a, b)) / N
    u, (N, D) = [x / x.norm(dim=1, keepdim=True) for x in e], e[0].shape
    if name == "simclr":
        return float(naive("info_nce", *e)[0])
    if name == "nnclr":
        near = [torch.stack([max(queue, key=lambda q, z=z: float(q @ z)) for z in u[i]]) for i in (2, 3)]
        return (cross_entropy(near[0], u[1], 0.1) + cross_entropy(near[1], u[0], 0.1)) / 2
    if name == "mocov3":
        return 2 * (cross_entropy(u[0], u[5], 1.0) + cross_entropy(u[1], u[4], 1.0))
    if name == "byol":
        return 4 - 2 * cos(u[0], u[5]) - 2 * cos(u[1], u[4])
    if name == "simsiam":
        return -(cos(u[0], u[3]) + cos(u[1], u[2])) / 2
    if name == "barlow":
        a, b = ((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() for x in e)
        c = {(i, j): float((a[:, i] * b[:, j]).mean()) for i in range(D) for j in range(D)}
        return 0.1 * sum((c[i, j] - 1) ** 2 if i == j else 0.0051 * c[i, j] ** 2 for i, j in c)
    variance = sum(max(0.0, 1 - math.sqrt(float(z[:, d].var()) + 1e-4)) for z in e for d in range(D)) / D
    covariance = sum(float(((z[:, i] - z[:, i].mean()) * (z[:, j] - z[:, j].mean())).sum() / (N - 1)) ** 2
                     for z in e for i in range(D) for j in range(D) if i != j) / D
    return 25 * float((e[0] - e[1]).square().mean()) + 25 * variance + covariance

@pytest.mark.parametrize("name", HEADS)
def test_own_loss_is_its_papers(name):
    made, e = method(name), embeddings(name)
    loss, grad, _ = graded(lambda *e: (made.loss(*e)[0], {}), *e)
    assert float(loss) == pytest.approx(naive_own(name, e, made.state_dict().get("queue")), rel=1e-6)
    assert not (name in ("simsiam", "nnclr") and grad[2:].any())        # what is predicted is held still

@pytest.mark.parametrize("name, loss, alpha", [*product(HEADS, hx.LOSSES, [None, 1.0])])
def test_every_method_with_every_loss_reaches_every_parameter(name, loss, alpha):
    """DDP waits for each parameter's gradient, even where alpha = 1 leaves the predictor out of the loss."""
    model = hx.HEX(method(name), loss, threshold=hx.AdaptiveThreshold(0.8), alpha=alpha)
    value, stats = model.loss(*model(*torch.randn(2, 8, 3, 2, 2).double()))
    value.backward()
    assert value.isfinite() and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert "own" in stats and ("clamped" in stats) == (loss in ("hex", "released"))

@pytest.mark.parametrize("loss", hx.LOSSES)
@pytest.mark.parametrize("name, given, alpha, scale", [
    ("vicreg", None, 0.1, 5), ("vicreg", 0.7, 0.7, 5), ("mocov3", None, 1, 1)])
def test_alpha_scale_and_the_mean_over_pairs(loss, name, given, alpha, scale):
    made, e, knobs = method(name), embeddings(name), dict(beta=0.5, tau_plus=0.2)
    want, pairs = made.loss(*e)
    if loss != "base":
        F = [naive({"infonce": "info_nce"}.get(loss, loss), *pair, t=0.3, **knobs)[0] for pair in pairs]
        want = (1 - alpha) * want + alpha * scale * sum(F) / len(F)
    got = hx.HEX(made, loss, alpha=given, temperature=0.3, **knobs).loss(*e)[0]
    assert float(got) == pytest.approx(float(want), rel=1e-9)

def test_warmup_is_the_own_loss_or_a_fixed_threshold():
    made, e, oracle = method("vicreg"), embeddings("vicreg"), hx.OracleHierarchy(torch.arange(8) // 3)
    late, fixed, of_batch = (hx.HEX(made, threshold=threshold).loss(*e)[0]
                             for threshold in (hx.StepThreshold(0.9, 0, 1), 0.2, oracle))
    for more, early in (({}, made.loss(*e)[0]), (dict(warmup_threshold=0.2), fixed)):
        model = hx.HEX(made, threshold=hx.StepThreshold(1.2, 0.1, 1), warmup=3, **more)
        assert all(torch.equal(model.loss(*e, epoch=epoch)[0], early) for epoch in (0, 2))
        torch.testing.assert_close(model.loss(*e, epoch=3)[0], late)
        assert torch.equal(model.loss(*e, epoch=3, threshold=oracle)[0], of_batch)

class Foreign(nn.Linear):
    """The protocol without hx.Method: no alpha, no scale, no after_step; two pairs."""

    def forward(self, x1, x2):
        return super().forward(x1), super().forward(x2)

    def loss(self, a, b):
        difference = a - b                                      # squaring keeps it until the backward
        self.kept = weakref.ref(difference)
        return difference.square().mean(), [(a, b), (b, a)]

def test_a_foreign_module_trains_a_step():
    model = hx.HEX(Foreign(12, 6).double(), temperature=0.2)
    optimizer, (a, b) = torch.optim.SGD(model.parameters(), lr=0.01), model(*views(8))
    loss = model.loss(a, b)[0]
    want = 0.9 * (a - b).square().mean() + 0.1 * naive("hex", a, b, t=0.2)[0]
    assert loss.item() == pytest.approx(want.item(), abs=1e-10)
    loss.backward()
    optimizer.step()
    model.after_step(1)
    assert model.loss(*model(*views(8)))[0] < loss

@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_where_alpha_is_1_the_own_loss_frees_its_graph_before_hex_is_made(alpha):
    def threshold(*of_batch):
        assert (made.kept() is not None) == (alpha < 1)
        return hx.AdaptiveThreshold()(*of_batch)
    made = Foreign(12, 6).double()
    model = hx.HEX(made, alpha=alpha, threshold=threshold)
    model.loss(*model(*views(4)))

def test_the_queue_takes_every_loss_of_a_step_and_wraps_around():
    made = method("nnclr")                                      # a queue of 10
    made.losses = 2
    for turn in range(4):
        z = torch.randn(2, 3, 6).double()
        for each in z:
            made.train().loss(each, each, each, each)
        made.eval().loss(*torch.randn(4, 3, 6).double())        # leaves no trace
        made.after_step(0)
        where = [(6 * turn + i) % 10 for i in range(6)]
        torch.testing.assert_close(made.queue[where], nn.functional.normalize(z.flatten(0, 1), dim=1))

@pytest.mark.parametrize("name", ["byol", "mocov3"])
def test_the_target_follows_the_online_network(name):
    """Its momentum rises from 0.9 to 1 by a cosine; its BatchNorm statistics are those of its own passes."""
    made = method(name, ema=0.9)
    made.steps, target, online = 2, made.target[1][0].weight, made.projector[0].weight
    with torch.no_grad():
        online += 1
        made.projector[1].running_mean += 1
    for step, momentum in ((0, 0.9), (1, 0.95), (2, 1.0)):
        old, still = target.clone(), online.clone()
        made.after_step(step)
        torch.testing.assert_close(target, momentum * old + (1 - momentum) * still)
        assert torch.equal(online, still) and not made.target[1][1].running_mean.any()

def test_the_last_batch_norm_has_no_weights():
    for head in (method("simsiam").projector, method("mocov3").projector, method("mocov3").predictor):
        assert list(head[-1].state_dict()) == ["running_mean", "running_var", "num_batches_tracked"]

# --- Two ranks and one ----------------------------------------------------------------------------
LOPSIDED = [torch.cat([x[:1] + 0.1 * x[:4], x[4:]]) for x in views(8, 16, 1.0)]  # rank 0's lie close together
CASES = [*((form, LOPSIDED, {}) for form in FORMS), ("hex", views(6), dict(H=("quantile", 0.8), beta=2.0)),
         ("hex", LOPSIDED, dict(H=("rescaled", 0.6))), ("released", LOPSIDED, dict(H=("above", 0.6))),
         ("released", views(6), dict(H=("labels", [0] * 6))),
         ("hex", views(6), dict(H=("labels", [0, 0, 0, 1, 2, 3]))),
         *((name, embeddings(name), {}) for name in ("nnclr", "mocov3", "barlow", "vicreg")),
         ("hex", views(2), {})]                                 # one image a rank

def of_rank(case, part):
    """Loss, gradient and stats of a case's images: those of rank 0 or 1, or all (None)."""
    name, data, knobs = case
    half = len(data[0]) // 2
    rows = slice(None) if part is None else slice(part * half, (part + 1) * half)
    if "labels" in knobs.get("H", ()):
        knobs = dict(H=("labels", knobs["H"][1][rows]))
    own = method(name) if name in HEADS else None
    f = (lambda *e: (own.loss(*e)[0], {})) if own else partial(ours, name, **knobs)
    return graded(f, *(x[rows] for x in data))

def queue_after(losses, mine):
    """The queue after a step in which this rank computed the losses `mine` alone."""
    made, z = method("nnclr"), torch.arange(1.0, 193).sin().double().view(4, 4, 2, 6)
    made.losses = losses
    with hx.alone():
        for k in mine:
            made.loss(*z[k])
    made.after_step(1)
    return made.queue

def on_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    together = [of_rank(case, rank) for case in CASES]
    with hx.alone():
        alone = [of_rank(case, rank) for case in CASES[:-1]]
    torch.save((together, alone, queue_after(2, [rank, rank + 2])), f"{folder}/{rank}.pt")
    dist.destroy_process_group()

@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]

def test_two_ranks_are_one(two_ranks):
    """DDP averages: the ranks' mean loss, and their gradients over the world size, are one process's."""
    for case, *both in zip(CASES, *(each[0] for each in two_ranks)):
        (loss0, grad0, stats0), (loss1, grad1, stats1) = both
        got, want = ((loss0 + loss1) / 2, torch.cat([grad0, grad1], 1) / 2), of_rank(case, None)
        assert_same((*got, stats0), want, 1e-12)
        assert_same((*got, stats1), want, 1e-12)

def test_alone_a_rank_computes_the_loss_of_its_own_rows(two_ranks):
    for rank in (0, 1):
        for case, got in zip(CASES[:-1], two_ranks[rank][1]):
            assert_same(got, of_rank(case, rank), 1e-12)

def test_the_queue_takes_the_losses_of_all_ranks_in_order(two_ranks):
    for each in two_ranks:
        torch.testing.assert_close(each[2], queue_after(4, range(4)))

# --- The optimizer --------------------------------------------------------------------------------
@pytest.mark.parametrize("clip", [True, False])
def test_lars_is_the_step_by_hand(clip):
    """Two steps, two groups, each with its rate; tensors of one dimension are neither decayed nor adapted."""
    params = [torch.tensor(x, requires_grad=True) for x in ([[3.0, 4.0]], [1.0, 2.0], [[0.6, 0.8]])]
    groups = [dict(params=params[:2]), dict(params=params[2:], lr=0.05)]
    optimizer = hx.LARS(groups, 0.5, momentum=0.9, weight_decay=0.1, eta=0.02, clip=clip)
    hand, velocity = [p.detach().double() for p in params], [0.0, 0.0, 0.0]
    for grad in ([0.6, 0.8], [0.0, 0.001]):
        for k, (p, rate) in enumerate(zip(params, (0.5, 0.5, 0.05))):
            p.grad, w = torch.tensor(grad).expand_as(p).clone(), hand[k]
            factor = 0.02 * w.norm() / (math.hypot(*grad) + 0.1 * w.norm() + 1e-8)
            factor = min(factor / rate, 1) if clip else factor
            velocity[k] = 0.9 * velocity[k] + (factor * (p.grad + 0.1 * w) if w.ndim > 1 else p.grad)
            hand[k] = w - rate * velocity[k]
        assert optimizer.step(torch.is_grad_enabled) is True    # a closure: gradients on, loss returned
        torch.testing.assert_close([p.detach().double() for p in params], hand, rtol=1e-6, atol=1e-7)

def test_the_rate_rises_linearly_then_falls_by_half_a_cosine():
    want = [2, 4, 4, 2 + math.sqrt(2), 2, 0]
    assert [hx.learning_rate(s, 10, 2, 4.0) for s in (0, 1, 2, 4, 6, 10)] == pytest.approx(want)

# --- The CUDA path, without a CUDA GPU ------------------------------------------------------------
@pytest.fixture
def fake_cuda(monkeypatch):
    """Tensors on device cuda that hold no values, and 8 ranks that do not exist: devices and dtypes alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.testing._internal.distributed.fake_pg import FakeStore
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    with FakeTensorMode(shape_env=ShapeEnv()), torch.device("cuda"):
        yield
    dist.destroy_process_group()

@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", HEADS)
def test_methods_and_losses_on_cuda(fake_cuda, name):
    crops = torch.zeros(8, 3, 64, 64, dtype=torch.uint8)
    x1, x2 = hx.augment(crops, torch.rand(8, 8), blur=True, solarize=True).chunk(2)
    assert x1.device.type == "cuda" and x1.is_contiguous(memory_format=torch.channels_last)
    made = hx.METHODS[name](*hx.build_backbone("resnet10_narrow", 64), hidden=64, dim=32, **HEADS[name])
    with torch.autocast("cuda", dtype=torch.float16):
        outputs = made(x1, x2)
        assert outputs[0].dtype == torch.float16 and all(each.device.type == "cuda" for each in outputs)
        for loss in hx.LOSSES:
            value, stats = hx.HEX(made, loss, threshold=hx.AdaptiveThreshold(0.9)).loss(*outputs)
            assert value.dtype == torch.float32 and value.device.type == "cuda"
            assert all(each.device.type == "cuda" for each in stats.values())
    made.after_step(1)
    for p in made.parameters():
        p.grad = torch.zeros_like(p)
    for clip in (True, False):
        hx.LARS(made.parameters(), 0.1, weight_decay=1e-4, clip=clip).step()

torch.set_num_threads(1)
SMALL = ("--epochs 2 --batch-size 16 --hidden 32 --dim 16 --probe-epochs 2 --workers 0 --log-every 1 "
         "--device cpu --lr-warmup 1 --hex-warmup 0").split()
DRAW = hx.draw_shapes

@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """7 batches of 16 to train on, instead of 4,096 pictures."""
    monkeypatch.setattr(hx, "draw_shapes", lambda count, seed: DRAW({4096: 112, 1024: 48}[count], seed))

def config(text="", *more, **without_a_flag):
    cfg = hx.parse([*f"--workers 0 --device cpu {text}".split(), *more])[0]
    vars(cfg).update(without_a_flag)
    return cfg

def run(*argv):
    return hx.main([str(each) for each in argv])

def refused(capsys, *argv):
    """-> status and the one line of a command that must fail."""
    capsys.readouterr()
    status, (out, err) = run(*argv), capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("hex.py: ")]
    assert status and len(errors) == 1 and "Traceback" not in err and out == ""
    return status, errors[0]

def journal(out):
    """metrics.jsonl, without what a clock says."""
    events, clock = map(json.loads, open(out / "metrics.jsonl")), {"images_per_second", "data_wait"}
    return [{key: event[key] for key in event if key not in clock} for event in events]

def losses(out):
    return [event["loss"] for event in journal(out) if event["event"] == "step"]

# --- views ----------------------------------------------------------------------------------------
def random_pictures(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)

def resized(crop, size):
    return tv.resize(crop, [size, size], tv.InterpolationMode.BICUBIC, antialias=True)

def in_memory(*pictures):
    return hx.Pictures(torch.stack(pictures), torch.zeros(len(pictures)))

def view_by_hand(crop, parameters, mean_std=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
    flip, brightness, contrast, saturation, hue, gray, sigma, solarize = parameters.tolist()
    x = tv.horizontal_flip(crop.float() / 255) if flip else crop.float() / 255
    x = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(x, brightness), contrast), saturation)
    x = tv.rgb_to_grayscale(tv.adjust_hue(x, hue), 3) if gray else tv.adjust_hue(x, hue)
    x = tv.gaussian_blur(x, [13, 13], [sigma, sigma]) if sigma else x
    return tv.normalize(tv.solarize(x, 0.5) if solarize else x, *map(list, mean_std))

@pytest.mark.parametrize("data, mean_std", [("shapes", hx.MEAN_STD["imagenet"]), (
    "cifar10", ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))])
def test_a_batch_is_augmented_as_torchvision_does_it_picture_by_picture(data, mean_std):
    crops = random_pictures(3, 2, 3, 40, 40)
    parameters = torch.tensor([[1, 1.5, 0.4, 1.7, 0.15, 0, 1.3, 1], [0, 0.3, 1.8, 0.2, -0.2, 1, 0, 0],
                               [1, 1, 1, 1, 0, 0, 0.1, 0], [0, 1.8, 1.2, 0.9, 0.05, 0, 2.0, 1],
                               [0, 1, 1, 1, 0, 0, 0, 0], [1, 0.7, 0.6, 0.5, -0.1, 1, 0.7, 1]]).view(3, 2, 8)
    got = hx.prepare(crops, parameters, config(f"--data {data}", blur=[0, 1], solarize=[1, 0]))
    want = [view_by_hand(crops[i, view], parameters[i, view], mean_std) for view in (0, 1) for i in range(3)]
    torch.testing.assert_close(got.contiguous(), torch.stack(want), rtol=0, atol=2e-5)

def drawn(monkeypatch, cfg, pictures, epochs=1):
    """-> the boxes that were cropped, the crops, the parameters (draws, views, 8)."""
    boxes, draw = [], hx.random_crop
    monkeypatch.setattr(hx, "random_crop", lambda *a: boxes.append(draw(*a)) or boxes[-1])
    items = [hx.Views(pictures, cfg)[epoch, i] for epoch in range(epochs) for i in range(len(pictures))]
    return boxes, torch.cat([item[0] for item in items]), torch.stack([item[1] for item in items])

def test_a_crop_is_cut_out_and_then_resized_bicubically(monkeypatch):
    pictures = in_memory(*random_pictures(6, 3, 90, 70))
    boxes, crops, _ = drawn(monkeypatch, config("--size 24"), pictures)
    for i, (box, crop) in enumerate(zip(boxes, crops, strict=True)):
        assert torch.equal(crop, resized(tv.crop(pictures.read(i // 2), *box), 24))

def test_what_is_drawn_for_a_view_is_what_the_options_say(monkeypatch):
    cfg = config("--size 8", crop_min=0.3, jitter=[0.4, 0.3, 0.2, 0.1], grayscale=0.25, blur=[1, 0.1],
                 solarize=[0, 0.2])
    boxes, _, parameters = drawn(monkeypatch, cfg, in_memory(*random_pictures(50, 3, 300, 300)), epochs=12)
    shares, ratios = zip(*((h * w / 300 ** 2, w / h) for _, _, h, w in boxes), strict=True)
    assert 0.295 < min(shares) < 0.32 and max(shares) > 0.9 and sum(shares) / len(shares) < 0.65
    assert 0.745 < min(ratios) < 0.77 and 1.3 < max(ratios) < 1.34
    assert min(box[0] for box in boxes) < 5 and max(box[0] + box[2] for box in boxes) > 295
    flip, gray, (blur1, blur2), (invert1, invert2) = (
        parameters[..., 0].mean(), parameters[..., 5].mean(), (parameters[..., 6] > 0).float().mean(0),
        parameters[..., 7].mean(0))
    assert abs(flip - 0.5) < 0.05 and abs(gray - 0.25) < 0.05
    assert blur1 == 1 and abs(blur2 - 0.1) < 0.04 and invert1 == 0 and abs(invert2 - 0.2) < 0.05
    assert 0.1 <= parameters[:, 0, 6].min() < 0.15 and 1.9 < parameters[:, 0, 6].max() <= 2
    change = parameters[..., 1:5] - torch.tensor([1.0, 1, 1, 0])
    assert abs((change != 0).all(-1).float().mean() - 0.8) < 0.04 and ((change != 0).sum(-1) % 4 == 0).all()
    for each, strength in zip(change.unbind(-1), (0.4, 0.3, 0.2, 0.1), strict=True):
        for most in (each.max(), -each.min()):
            assert 0.95 * strength < most <= strength + 1e-6

def test_a_view_is_a_function_of_seed_epoch_index_and_view_alone():
    views, keys = hx.Views(DRAW(6, 3), config("--seed 5")), [(2, i) for i in range(6)]
    items = [views[key] for key in keys]
    want = [torch.stack([torch.as_tensor(part) for part in parts]) for parts in zip(*items)]
    loaders = [iter(hx.loader(views, [keys[i:i + size] for i in range(0, 6, size)], workers))
               for workers, size in ((0, 6), (1, 4), (2, 2))]                  # at once: each takes seconds
    for loader in loaders:
        assert all(map(torch.equal, map(torch.cat, zip(*loader)), want))
    first = want[1][0]
    other_seed = hx.Views(DRAW(6, 3), config("--seed 6"))
    others = [first[1], views[3, 0][1][0], views[2, 1][1][0], other_seed[2, 0][1][0]]
    assert all((first[0][1:5] != other[1:5]).all() for other in others)         # (all of them are jittered)

@pytest.mark.parametrize("height, width", [(1, 20000), (20000, 1)])
def test_a_picture_that_is_a_line_costs_no_more_than_its_crop(height, width):
    began, picture = time.perf_counter(), torch.zeros(3, height, width, dtype=torch.uint8)
    views = hx.Views(in_memory(picture), config("--size 224"))
    assert views[0, 0][0].shape == (2, 3, 224, 224) and time.perf_counter() - began < 1

@pytest.mark.parametrize("size, side", [(32, 128), (224, 112)])
def test_the_centre_crop_is_224_of_256_and_small_pictures_whole(size, side):
    picture = random_pictures(3, 128, 160)
    crop, parameters, *_ = hx.Views(in_memory(picture), config(f"--size {size}"), views=0)[0, 0]
    assert torch.equal(crop[0], resized(tv.center_crop(picture, [side] * 2), size)) and parameters[0, 0] == 0

def test_batches_are_the_same_for_any_ranks_and_resume():
    def cut(**more):
        return list(hx.batches(torch.arange(100, 150), 8, 7, "order", epochs=2, group=4, **more))
    alone, ranks = cut(), [dict(part=(r, 2)) for r in (0, 1)]
    parts, whole = [cut(**each) for each in ranks], [cut(**each, whole=True) for each in ranks]
    assert len(alone) == 8 and all(len(batch) == 8 for batch in alone)          # of 6 an epoch, 4
    assert [a + b for a, b in zip(*parts, strict=True)] == alone
    assert [alone[0::2], alone[1::2]] == whole and cut(start=5) == alone[5:]
    order = (100 + hx.permutation(50, 7, "order", epoch) for epoch in (0, 1))
    assert sum(alone, []) == [(epoch, i) for epoch, each in enumerate(order) for i in each.tolist()[:32]]
    assert {i for _, i in sum(alone[:4], [])} != {i for _, i in sum(alone[4:], [])}

# --- the command against a plain loop -------------------------------------------------------------
def hex_by_hand(a, b, cfg, labels=None, empty=False):
    """-> loss, threshold, mean |H|. labels: H is those of the same; empty: no H, which is NT-Xent."""
    N, z = len(a), F.normalize(torch.cat([a, b]).double())
    s, i = z @ z.T, torch.arange(2 * N) % N
    negative = i[:, None] != i
    rows = s.detach()[negative].view(2 * N, -1).sort(1).values
    eps = rows[:, round(cfg.quantile * (2 * N - 3))].mean().item()
    local = negative & (s > eps if labels is None else labels[i][:, None] == labels[i]) & (not empty)
    e, size = (s / cfg.temperature).exp(), local.sum(1)
    q = (cfg.beta * s.detach() / cfg.temperature).exp() * local
    q = q / (q.sum(1) / size.clamp(min=1)).clamp(min=1e-30)[:, None]            # its mean over H is 1
    positive = e[torch.arange(2 * N), torch.arange(2 * N).roll(N)]
    L = ((q * e).sum(1) - cfg.tau_plus * size * positive) / (1 - cfg.tau_plus)
    L = torch.maximum(L, size * math.exp(-1 / cfg.temperature))
    loss = -(positive / (positive + (e * (negative & ~local)).sum(1) + L)).log().mean()
    return loss, eps, size.double().mean().item()

def lars_by_hand(weights, velocity, lr, cfg):
    with torch.no_grad():
        for p, v in zip(weights, velocity, strict=True):
            if p.ndim > 1:                                                      # not biases and norms
                factor = cfg.eta * p.norm() / (p.grad.norm() + cfg.weight_decay * p.norm() + 1e-8)
                factor = min(factor / lr, 1) if cfg.clip else factor
                p.grad = factor * (p.grad + cfg.weight_decay * p)
            v.mul_(0.9).add_(p.grad)
            p.sub_(lr * v)
            p.grad = None

def loss_by_hand(cfg, method, target, views, labels, keys):
    items = [views[key] for key in keys]
    x = torch.stack([view_by_hand(item[0][v], item[1][v]) for v in (0, 1) for item in items])
    z = method.projector(method.backbone(x))
    if cfg.method == "byol":
        with torch.no_grad():
            t1, t2 = target(x).chunk(2)
        p1, p2 = method.predictor(z).chunk(2)
        own = 4 - 2 * F.cosine_similarity(p1, t2).mean() - 2 * F.cosine_similarity(p2, t1).mean()
    else:
        own = hex_by_hand(*z.chunk(2), cfg, empty=True)[0]
    if keys[0][0] < cfg.hex_warmup:
        return own, None, None
    labels = labels[[i for _, i in keys]] if cfg.threshold == "oracle" else None
    value, eps, size = hex_by_hand(*z.chunk(2), cfg, labels)
    return (1 - cfg.alpha) * own + cfg.alpha * value, eps if labels is None else None, size

def plain_loop(cfg, train):
    """-> backbone, and for each step what the log should say."""
    method, views, log = hx.build_model(cfg).train().method, hx.Views(train, cfg), []
    target = copy.deepcopy(nn.Sequential(method.backbone, method.projector))
    online = nn.Sequential(method.backbone, method.projector)
    weights = [p for name, p in method.named_parameters() if not name.startswith("target")]
    velocity, size = [torch.zeros_like(p) for p in weights], cfg.batch_size
    per_epoch = len(train) // (size * cfg.accumulate)
    total, warm = cfg.epochs * per_epoch, cfg.lr_warmup * per_epoch
    peak = cfg.lr * size * cfg.accumulate / 256
    for step in range(total):
        epoch, parts = step // per_epoch, []
        falling = peak * (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
        lr = peak * (step + 1) / warm if step < warm else falling
        order = hx.permutation(len(train), cfg.seed, "order", epoch).tolist()
        for k in range(cfg.accumulate):
            first = (step % per_epoch * cfg.accumulate + k) * size
            keys = [(epoch, i) for i in order[first:first + size]]
            loss, eps, local = loss_by_hand(cfg, method, target, views, train.coarse, keys)
            (loss / cfg.accumulate).backward()
            parts.append((loss.item(), eps, local))
        lars_by_hand(weights, velocity, lr, cfg)
        momentum = 1 - (1 - (cfg.ema or 0)) * (math.cos(math.pi * (step + 1) / total) + 1) / 2
        for old, new in zip(target.parameters(), online.parameters(), strict=True):
            old.data = momentum * old.data + (1 - momentum) * new.data
        loss, eps, local = (None if None in each else sum(each) / len(each) for each in zip(*parts))
        log.append(dict(step=step + 1, epoch=epoch, lr=lr, loss=loss, local=local, threshold=eps))
    return method.backbone, log

LOOP = ("--size 16 --accumulate 2 --lr 2 --weight-decay 0.03 --eta 0.04 --alpha 0.3 --temperature 0.3 "
        "--beta 0.5 --tau-plus 0.05 --seed 3")

@pytest.mark.parametrize("more", ["--method byol --quantile 0.8 --ema 0.7 --predictor 32 --clip --norm group",
                                  "--quantile 0.8 --hex-warmup 1", "--threshold oracle"])
def test_the_command_is_a_plain_loop(more, tmp_path, monkeypatch):
    """Order, views, loss, accumulation, schedule, LARS, momentum, log: all that training is, in six steps."""
    monkeypatch.setitem(hx.RECIPES["shapes"], "any", hx.RECIPES["shapes"]["any"] | dict(
        blur=[0.5, 0.3], solarize=[0.0, 0.5]))
    argv = [*SMALL, *f"{LOOP} {more}".split()]
    assert run(*argv, "--out", tmp_path / "o") == 0
    backbone, log = plain_loop(config("", *argv), DRAW(112, 0))
    got = torch.load(tmp_path / "o" / "backbone.pt")
    for name, value in backbone.named_parameters():
        torch.testing.assert_close(got[name], value.data, rtol=0, atol=1e-5)
    events = [event for event in journal(tmp_path / "o") if event["event"] == "step"]
    assert len(events) == len(log) == 6
    for event, want in zip(events, log, strict=True):
        local = want.pop("local")                                               # a pair may lie at eps: rounding
        assert local is None or event["local"] == pytest.approx(local, abs=0.1)
        got = {key: event[key] for key in want if event.get(key) is not None}
        assert got == pytest.approx({k: v for k, v in want.items() if v is not None}, rel=1e-5, abs=1e-6)

def test_the_seed_decides_the_weights():
    first, again, other = (next(hx.build_model(config(f"--seed {seed}")).parameters()) for seed in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, other)

def test_the_queue_takes_every_loss_of_a_step(tmp_path):
    argv = [*SMALL, *"--method nnclr --predictor 32 --queue 70 --accumulate 2".split()]
    assert run(*argv, "--out", tmp_path) == 0
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["model"]["method.head"] == 6 * 2 * 16 % 70                     # 6 steps of 2 losses of 16

# --- recipes --------------------------------------------------------------------------------------
OTHER = dict(jitter=[0.4, 0.4, 0.2, 0.1], solarize=[0.0, 0.2])                  # BYOL's views
SIAM = dict(jitter=[0.4, 0.4, 0.4, 0.1])
ALL = dict(accumulate=1, batch_size=256, eta=0.02, grayscale=0.2, drop=0.1, hex_warmup=10, lr_warmup=10,
           jitter=[0.8, 0.8, 0.8, 0.2], solarize=[0.0, 0.0])
PAPER = ALL | dict(clip=True, crop_min=0.08, temperature=0.1, amp="fp16")
TOY = ALL | dict(backbone="resnet10_narrow", size=32, weight_decay=1e-4, clip=False, temperature=0.2,
                 amp="off", lr_warmup=2, blur=[0.0, 0.0], drop_every=2)
BASE = dict(
    imagenet=PAPER | dict(backbone="resnet50", size=224, epochs=100, lr=0.3, weight_decay=1e-6, drop_every=20,
                          blur=[0.5, 0.5]),
    cifar=PAPER | dict(backbone="resnet18", size=32, epochs=400, lr=0.4, weight_decay=1e-4, drop_every=100,
                       blur=[0.0, 0.0]),
    shapes=TOY | dict(epochs=12, lr=0.5, crop_min=0.5, grayscale=1.0, hex_warmup=1),
    small=TOY | dict(epochs=15, lr=0.2, crop_min=0.2, hex_warmup=2))
OWN = dict(simclr=dict(alpha=1.0, hidden=2048, dim=128),
           nnclr=dict(alpha=1.0, hidden=2048, dim=256, predictor=4096, queue=98304),
           mocov3=dict(alpha=1.0, hidden=4096, dim=256, predictor=4096, ema=0.99),
           byol=dict(alpha=0.1, hidden=4096, dim=256, predictor=4096, ema=0.99),
           simsiam=dict(alpha=0.1, hidden=2048, dim=2048, predictor=512),
           barlow=dict(alpha=0.1, hidden=8192, dim=8192), vicreg=dict(alpha=0.1, hidden=8192, dim=8192))
WIDTHS = dict(shapes=dict(hidden=256, dim=64, predictor=256, queue=2048),
              small=dict(hidden=512, dim=128, predictor=512, queue=4096))
TWO_BLURS = OTHER | dict(blur=[1.0, 0.1])
DIFFERENT = {
    ("imagenet", "simclr"): dict(accumulate=16), ("imagenet", "byol"): TWO_BLURS | dict(lr=0.45),
    ("imagenet", "nnclr"): TWO_BLURS | dict(weight_decay=1e-5, warmup_threshold=0.9, drop_every=25),
    ("imagenet", "mocov3"): TWO_BLURS | dict(temperature=1.0, lr=0.6), ("imagenet", "barlow"): TWO_BLURS,
    ("imagenet", "simsiam"): SIAM | dict(lr=0.05, weight_decay=1e-4), ("imagenet", "vicreg"): TWO_BLURS,
    ("cifar", "simclr"): dict(blur=[0.5, 0.5]), ("cifar", "byol"): OTHER | dict(lr=1.0, weight_decay=1e-5),
    ("cifar", "nnclr"): OTHER | dict(temperature=0.2, weight_decay=1e-5, queue=65536, lr=1.0, drop=0.0,
                                     warmup_threshold=0.9),
    ("cifar", "mocov3"): OTHER | dict(temperature=0.2, lr=0.3, weight_decay=1e-6), ("cifar", "simsiam"): SIAM,
    ("cifar", "barlow"): OTHER | dict(lr=0.3, hidden=2048, dim=2048, hex_warmup=0),
    ("cifar", "vicreg"): OTHER | dict(hidden=2048, dim=2048),
    ("shapes", "byol"): dict(lr=0.15, ema=0.97), ("small", "byol"): dict(lr=0.15, ema=0.97)}

@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("recipe", BASE)
def test_resolved_recipes(recipe, method):
    heads = {name: value for name, value in WIDTHS.get(recipe, {}).items() if name in OWN[method]}
    want = BASE[recipe] | OWN[method] | heads | DIFFERENT.get((recipe, method), {})
    settings = hx.resolve(recipe, method, {})
    assert {name: settings[name] for name in want} == want

@pytest.mark.parametrize("argv, recipe", [
    ("--data folder --root .", "imagenet"), ("--data cifar100", "cifar"), ("--size 64", "shapes"),
    ("--data cifar10 --recipe small", "small")])
def test_the_data_choose_the_recipe_and_nothing_else_does(argv, recipe):
    cfg = config(argv + " --method byol")
    assert cfg.recipe == recipe and cfg.lr == hx.resolve(recipe, "byol", {})["lr"]

# --- the probe ------------------------------------------------------------------------------------
class Spy(torch.optim.SGD):
    steps = []

    def step(self, *args):
        Spy.steps.append([(each["lr"], each["weight_decay"], each["momentum"]) for each in self.param_groups])
        return super().step(*args)

def probe(count, targets, val_targets=None, text="", noise=255):
    """The linear probe on raw pixels: a random picture for each class, and noise."""
    cfg = config(f"--epochs 0 --backbone pixels --size 8 {text}")
    g = torch.Generator().manual_seed(0)
    kinds, *noises = (torch.randint(0, 256, (each, 3, 8, 8), generator=g) for each in (10, count, count))
    pictures = [((255 - noise) * kinds[targets] + noise * each) // 255 for each in noises]
    train, val = (hx.Pictures(x.byte(), y) for x, y in zip(pictures, (
        targets, targets if val_targets is None else val_targets), strict=True))
    return hx.linear_probe(hx.build_backbone("pixels", 8)[0], cfg, train, val)

def test_separable_features_give_all():
    result = probe(240, torch.arange(240) % 6, text="--probe-epochs 10", noise=60)
    assert result["top1"] == result["top5"] == result["knn"] == 100
    assert result["right"] == result["knn_right"] == "1" * 240 and result["val"] == 240

def test_the_rate_is_chosen_on_the_holdout_not_on_val():
    """Every label of val is wrong: what is best on the holdout is worst there."""
    truth = torch.arange(240) % 6
    result = probe(240, truth, (truth + 1) % 6, text="--probe-epochs 1", noise=180)
    holdout = result["holdout"]
    assert min(holdout.values()) < 80 and holdout[str(result["rate"])] == max(holdout.values()) > 95
    assert result["top1"] < 5 and result["right"].count("1") < 12 and result["top5"] > 50

def test_no_head_has_seen_its_holdout():
    """Labels that mean nothing, which a head can learn by heart but not guess."""
    result = probe(150, torch.arange(150) % 10, text="--probe-epochs 60")
    assert result["held_out"] == 10 and result["train"] == 140 == result["knn_bank"]
    assert max(result["holdout"].values()) < 70 and result["top1"] < 30

def test_the_heads_rates_and_decay(monkeypatch):
    monkeypatch.setattr(torch.optim, "SGD", Spy)
    Spy.steps.clear()
    probe(100, torch.arange(100) % 4, text="--probe-epochs 10")
    rates = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
    want = [[(rate * fall, 1e-5, 0.9) for rate in rates] for fall in [1] * 6 + [0.1] * 2 + [0.01] * 2]
    assert numpy.array(Spy.steps) == pytest.approx(numpy.array(want))

def test_a_share_of_the_labels_is_balanced_and_is_all_that_trains():
    targets = torch.arange(400) % 4
    result = probe(400, targets, text="--probe-epochs 2 --label-fraction 0.2")
    assert result["train"] + result["held_out"] == 80 and result["held_out"] == 8 and result["knn_bank"] == 72
    chosen = hx.labelled_pictures(config("--label-fraction 0.2"), targets)
    assert targets[chosen].bincount().tolist() == [20] * 4 and len(chosen.unique()) == 80
    uneven = torch.arange(3).repeat_interleave(torch.tensor([5, 50, 500]))
    counts = uneven[hx.labelled_pictures(config("--label-fraction 0.1"), uneven)].bincount().tolist()
    assert counts[0] == 5 and sorted(counts) == [5, 25, 26]

def test_nearest_neighbors_are_what_loops_find():
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(2, 60, 4, generator=g)
    labels, truth = torch.randint(0, 5, (2, 60), generator=g)
    right = []
    for query, answer in zip(queries, truth.tolist(), strict=True):
        cosine = [float(F.cosine_similarity(query, row, 0)) for row in bank]
        votes = [0.0] * 5
        for j in sorted(range(60), key=lambda j: -cosine[j])[:20]:
            votes[labels[j]] += math.exp(cosine[j] / 0.07)
        right.append(votes.index(max(votes)) == answer)
    assert hx.nearest_neighbors(bank, labels, queries, truth).tolist() == right and 0 < sum(right) < 60

def test_emergence_is_what_loops_count():
    train, val, cfg = DRAW(60, 0), DRAW(24, 1), config("--hidden 16 --dim 8 --quantile 0.9")
    model = hx.build_model(cfg)
    for _ in range(20):
        model(*(torch.stack([hx.Views(train, cfg)[0, i][0][v] for i in range(60)]) / 255 for v in (0, 1)))
    with hx.alone():
        got = hx.emergence(model, cfg, train, val)
    model.eval()
    index, views = hx.permutation(60, "fixed").tolist(), hx.Views(train, cfg, seed="fixed")
    items = [views[0, i] for i in index]
    with torch.no_grad():
        a, b = model(*(torch.stack([view_by_hand(item[0][v], item[1][v]) for item in items]) for v in (0, 1)))
        x = tv.normalize(train.pictures / 255, *map(list, hx.MEAN_STD["imagenet"]))
        p = torch.linalg.svdvals(model.method.backbone(x).double())
    z = F.normalize(torch.cat([a, b]).double())
    rows = [{j: float(z[i] @ z[j]) for j in range(120) if j % 60 != i % 60} for i in range(120)]
    eps = sum(sorted(row.values())[round(0.9 * 117)] for row in rows) / 120
    near = [(i, j) for i, row in enumerate(rows) for j, s in row.items() if s > eps]
    want = dict(threshold=eps, local=len(near) / 120, std=float(z.std(0).mean()) * math.sqrt(8))
    for labels, name in ((train.targets, ""), (train.coarse, "_coarse")):
        for pairs, key in ((near, "purity"), ([(i, j) for i, row in enumerate(rows) for j in row], "chance")):
            same = [labels[index[i % 60]] == labels[index[j % 60]] for i, j in pairs]
            want[key + name] = float(sum(same)) / len(same)
    want["rankme"] = math.exp(-sum(q * math.log(q) for q in (p / p.sum()).tolist() if q > 0))
    assert {key: got[key] for key in want} == pytest.approx(want, rel=1e-3) and 0 <= got["knn"] <= 100

# --- pictures -------------------------------------------------------------------------------------
def noise(path, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((40, 30), 99).convert(mode).save(path)

def flat(folder):
    return hx.Folder(str(folder), labelled=False)

def test_every_kind_of_picture_is_decoded_upright(tmp_path):
    gray = numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)[:8]
    ramp = Image.fromarray(gray)
    ramp.getexif()[0x0112] = 6                                                  # stored lying on its side
    exif, upright = ramp.getexif().tobytes(), numpy.rot90(gray, -1)
    fine, turned = dict(quality=100), dict(quality=100, exif=exif)
    for name, mode, want, more in [
            ("1.jpg", "RGB", gray, fine), ("2.jpg", "L", gray, fine), ("3.jpg", "CMYK", gray, fine),
            ("4.png", "P", gray, {}), ("5.png", "RGBA", gray, {}), ("6.bmp", "RGB", gray, {}),
            ("7.tiff", "RGB", gray, {}), ("8.webp", "RGB", gray, dict(lossless=True)),
            ("9.gif", "L", gray, {}), ("A.jpg", "L", upright, turned),
            ("B.png", "L", upright, dict(exif=exif)), ("C.JPEG", "L", gray, dict(format="png"))]:
        ramp.convert(mode).save(tmp_path / name, **more)
        got = flat(tmp_path).read(flat(tmp_path).files.index(name))
        assert got.shape == (3, *want.shape) and got.dtype == torch.uint8, name
        assert abs(got.numpy().astype(int) - want).max() <= (4 if "jpg" in name else 0), name
    Image.fromarray(gray.astype(numpy.uint16) * 257 + 100).save(tmp_path / "D.png")     # 16 bits
    assert (flat(tmp_path).read(-1).numpy() == gray).all()

def test_a_damaged_png_is_an_error_never_a_crash(tmp_path):
    noise(tmp_path / "a.png", "P")
    whole, folder, draw = (tmp_path / "a.png").read_bytes(), flat(tmp_path), random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        (tmp_path / "a.png").write_bytes(damaged)
        try:
            assert folder.read(0).shape[0] == 3
        except hx.UserError as error:
            assert "--skip-bad-files" in str(error)

FOLDER = [*SMALL, *"--size 16 --backbone resnet10_narrow --epochs 1 --lr-warmup 0 --accumulate 1".split()]

def test_pictures_without_labels_are_trained_on_and_hidden_ones_are_not(tmp_path, capsys):
    hidden = [".a.png", ".b/c.png", "b/.ipynb_checkpoints/0.png"]
    for name in ["a.png", "b/c.jpg", "b/d/e.png"] + [f"b/{i}.png" for i in range(20)] + hidden:
        noise(tmp_path / "data" / name)
    assert len(flat(tmp_path / "data")) == 23 and hx.Folder(str(tmp_path / "data")).classes == ["b"]
    assert run(*FOLDER, "--data", "folder", "--root", tmp_path / "data", "--out", tmp_path / "o") == 0
    assert "no labels" in capsys.readouterr().err
    assert {"backbone.pt", "neighbours.png"} <= {*os.listdir(tmp_path / "o")}
    figures = journal(tmp_path / "o")[0]
    assert {"threshold", "local", "rankme"} <= figures.keys() and not {"purity", "knn"} & figures.keys()
    assert not (tmp_path / "o" / "probe.json").exists()

def test_labelled_pictures_without_val_then_with_then_a_bad_one(tmp_path, capsys):
    root = tmp_path / "data"
    for i in range(24):
        noise(root / "train" / "ab"[i % 2] / f"{i}.jpg", ["RGB", "L", "CMYK"][i % 3])
    assert run(*FOLDER, "--data", "folder", "--root", root, "--out", tmp_path / "1") == 0
    assert "purity" in journal(tmp_path / "1")[0] and not (tmp_path / "1" / "probe.json").exists()
    shutil.copytree(root / "train", root / "val")
    imagenet = [*FOLDER, "--data", "imagenet", "--root", root, "--out", tmp_path / "2"]
    assert run(*imagenet) == 0                                                  # probed on crops and flips
    result = json.load(open(tmp_path / "2" / "probe.json"))
    assert result["train"] == 22 and result["held_out"] == 2 and result["val"] == len(result["right"]) == 24
    (root / "train" / "a" / "0.jpg").write_text("no picture")
    shutil.rmtree(tmp_path / "2")
    assert "0.jpg: not readable" in refused(capsys, *imagenet)[1]
    assert run(*imagenet, "--skip-bad-files") == 0 and "skipped" in capsys.readouterr().err

def test_cifar_from_an_archive_in_its_own_format(tmp_path, monkeypatch):
    folder, sums, draw = tmp_path / "cifar-10-batches-py", {}, numpy.random.default_rng(0)
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        content = {"label_names": list("abcdefghij")} if name == "batches.meta" else {
            "data": draw.integers(0, 256, (20, 3072), dtype=numpy.uint8), "labels": [*range(10)] * 2}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    shutil.rmtree(folder)
    kind, archive = torchvision.datasets.CIFAR10, (tmp_path / "cifar-10-python.tar.gz").read_bytes()
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(kind, "train_list", [[n, sums[n]] for n in sums if n.startswith("data")])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums["batches.meta"]})
    argv = [*SMALL, "--data", "cifar10", "--recipe", "small", "--root", tmp_path]
    assert run(*argv, "--out", tmp_path / "o") == 0
    train, val = hx.load_data(hx.parse(list(map(str, argv)))[0])
    test = pickle.loads((folder / "test_batch").read_bytes())
    assert len(train) == 100 and (val.read(3).numpy() == test["data"][3].reshape(3, 32, 32)).all()
    assert val.targets.tolist() == test["labels"]
    assert torch.tensor(hx.CIFAR100_SUPER).bincount().tolist() == [5] * 20

# --- a run's life ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 14 steps that nothing interrupted; tests copy it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hx, "draw_shapes", lambda count, seed: DRAW({4096: 112, 1024: 48}[count], seed))
        assert run(*SMALL, "--out", out := tmp_path_factory.mktemp("finished") / "run") == 0
    return out

@pytest.fixture
def done(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "done")

def at_step(monkeypatch, step, action):
    """When the rate of this step, from 0, is asked for, do this."""
    def patched(now, *rest, rate=hx.learning_rate):
        if now == step:
            action()
        return rate(now, *rest)
    monkeypatch.setattr(hx, "learning_rate", patched)

def same(one, other):
    one_backbone, other_backbone = ((each / "backbone.pt").read_bytes() for each in (one, other))
    return one_backbone == other_backbone and journal(one) == journal(other)

def test_what_a_run_leaves(finished):
    assert {*os.listdir(finished)} == {"backbone.pt", "checkpoint.pt", "config.json", "lock", "metrics.jsonl",
                                       "neighbours.png", "neighbours_early.png", "probe.json"}
    events, result = journal(finished), json.load(open(finished / "probe.json"))
    assert [event["step"] for event in events if event["event"] == "step"] == [*range(1, 15)]
    assert [event["epoch"] for event in events if event["event"] == "epoch"] == [0, 1, 2]
    assert {"loss", "hex", "threshold", "local", "empty", "clamped", "lr"} <= events[1].keys()
    for digits, share in (("right", "top1"), ("knn_right", "knn")):
        assert len(result[digits]) == 48
        assert result[digits].count("1") / 48 * 100 == pytest.approx(result[share])
    saved = json.load(open(finished / "config.json"))
    assert saved["config"]["batch_size"] == 16 and saved["versions"]["torch"] == torch.__version__

def test_a_run_that_is_stopped_or_crashes_ends_as_one_that_was_not(finished, tmp_path, monkeypatch, capsys):
    command = [*SMALL, "--checkpoint-every", 4, "--out", tmp_path / "o"]
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))         # in mid-epoch
        assert run(*command) == 75 and "run the same command again" in capsys.readouterr().err
    assert 5 <= len(losses(tmp_path / "o")) <= 6
    with monkeypatch.context() as patch:
        at_step(patch, 10, lambda: 1 / 0)                                       # 8 are in the checkpoint
        assert run(*command) == 1 and "ZeroDivisionError" in capsys.readouterr().err
    assert torch.load(tmp_path / "o" / "checkpoint.pt")["step"] == 8 and len(losses(tmp_path / "o")) == 10
    assert run(*command) == 0 and same(tmp_path / "o", finished)

def test_a_finished_run_says_so_and_evaluation_options_evaluate_again(done, capsys, monkeypatch):
    before, result = (done / "metrics.jsonl").read_bytes(), json.load(open(done / "probe.json"))
    assert run(*SMALL, "--out", done) == 0
    assert "finished before, nothing was run; delete" in capsys.readouterr().err
    monkeypatch.setattr(hx, "pretrain", lambda *_: 1 / 0)                       # it does not train again
    assert run(*SMALL, "--probe-epochs", 3, "--label-fraction", 0.5, "--out", done) == 0
    again = json.load(open(done / "probe.json"))
    assert again["epochs"] == 3 and again["train"] + again["held_out"] == 56
    assert result["train"] + result["held_out"] == 112
    assert (done / "metrics.jsonl").read_bytes() == before
    (done.parent / "edited.py").write_text("# another hex.py")
    monkeypatch.setattr(hx, "__file__", str(done.parent / "edited.py"))
    assert run(*SMALL, "--out", done) == 0 and "warning: hex.py has changed" in capsys.readouterr().err

def test_another_experiment_another_runs_checkpoint_or_a_lock_is_refused(done, tmp_path, capsys):
    line = refused(capsys, *SMALL, "--beta", 0.5, "--out", done)[1]
    assert "--beta 1.0 there, 0.5 here" in line and "--out" in line
    with open(done / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, line = refused(capsys, *SMALL, "--out", done)
        assert status == 1 and "another run is at work" in line
    other = [*SMALL, "--seed", 1, "--epochs", 2, "--out", tmp_path / "other"]
    assert run(*other) == 0
    (tmp_path / "other" / "backbone.pt").unlink()
    shutil.copy(done / "checkpoint.pt", tmp_path / "other")
    status, line = refused(capsys, *other)
    assert status == 1 and "checkpoint.pt: is of another experiment" in line

def test_moved_data_go_on_and_other_data_are_refused(tmp_path, capsys):
    for i in range(20):
        noise(tmp_path / "here" / f"{i}.png")
    command = [*FOLDER, "--data", "folder", "--out", tmp_path / "o", "--root"]
    assert run(*command, tmp_path / "here") == 0
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert run(*command, tmp_path / "there") == 0 and "finished before" in capsys.readouterr().err
    noise(tmp_path / "there" / "one more.png")
    status, line = refused(capsys, *command, tmp_path / "there")
    assert status == 1 and "of other data" in line

def test_a_backbone_is_probed_as_in_its_run_and_a_broken_one_is_refused(done, tmp_path, capsys):
    options = [*"--probe-epochs 2 --workers 0 --device cpu".split(), "--probe", done / "backbone.pt",
               "--out", tmp_path / "p"]
    assert run(*options) == 0
    first, again = (json.load(open(path / "probe.json")) for path in (done, tmp_path / "p"))
    assert first["right"] == again["right"] and first["identity"] == again["identity"]
    state = torch.load(done / "backbone.pt")
    torch.save(state | {"0.weight": state["0.weight"] * math.nan}, done / "backbone.pt")
    status, line = refused(capsys, *options)
    assert status == 1 and "not finite" in line                                 # not the old result

@pytest.mark.parametrize("broken", [
    lambda loss, e: loss * math.nan, lambda loss, e: loss + (0 * e.sum()).sqrt()], ids=["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_and_leaves_the_checkpoint(broken, tmp_path, monkeypatch, capsys):
    loss, calls = hx.HEX.loss, iter(range(99))
    monkeypatch.setattr(hx.HEX, "loss", lambda self, *e, **k: (lambda value, stats: (
        broken(value, e[0]) if next(calls) == 3 else value, stats))(*loss(self, *e, **k)))
    status, line = refused(capsys, *SMALL, "--checkpoint-every", 2, "--out", tmp_path / "o")
    state = torch.load(tmp_path / "o" / "checkpoint.pt", weights_only=True)
    assert status == 1 and "step 4: the loss or its gradient is not finite" in line and state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())

def test_a_default_spelled_out_is_no_other_run():
    plain = hx.default_out(config())
    assert plain == hx.default_out(config("--beta 1.0 --lr 0.5 --label-fraction 0.5 --probe-epochs 7"))
    assert plain == "runs/shapes-simclr-hex-s0" and "lr_0.7" in hx.default_out(config("--lr 0.7"))

# --- two ranks ------------------------------------------------------------------------------------
RANKS = """
import json, os, sys, torch.distributed as dist, hex as hx
draw, rank = hx.draw_shapes, int(os.environ["RANK"])
hx.draw_shapes = lambda count, seed: draw({4096: 272, 1024: 24}[count], seed)
*runs, last = json.loads(sys.argv[1])
dist.destroy_process_group = lambda: None        # the group of the first serves all
assert [hx.main(argv) for argv in runs] == [0] * len(runs)
hx.draw_shapes = lambda count, seed: draw(272, seed + rank)                     # other pictures on each rank
there, dist.is_initialized = dist.is_initialized, lambda: False
dist.init_process_group = lambda *_: setattr(dist, "is_initialized", there)
hx.main(last)
"""

def test_two_ranks_train_as_one_process_and_notice_other_data(tmp_path, monkeypatch):
    """Whole losses: to the last bit, BatchNorm and all. Shared ones: to rounding."""
    whole, shared = ["--accumulate", "2"], ["--norm", "group", "--lr", "0.005"]
    nnclr, byol = ([*whole, "--method", name, "--predictor", "32"] for name in ("nnclr", "byol"))
    cases = dict(simclr=(whole, 0), nnclr=(nnclr, 1e-5), byol=(byol, 1e-5), shared=(shared, 1e-4))
    command = [*SMALL, "--batch-size", "64", "--probe-epochs", "1"]
    runs = [[*command, *more, "--out", str(tmp_path / f"two {name}")] for name, (more, _) in cases.items()]
    (tmp_path / "ranks.py").write_text(RANKS)
    argv = json.dumps([*runs, [*command, "--out", str(tmp_path / "bad")]])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(hx.__file__)}
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    torchrun = subprocess.Popen([*torchrun, tmp_path / "ranks.py", argv], stderr=subprocess.PIPE, text=True,
                                stdout=subprocess.DEVNULL, cwd=tmp_path, env=environment)
    monkeypatch.setattr(hx, "draw_shapes", lambda count, seed: DRAW({4096: 272, 1024: 24}[count], seed))
    for name, (more, _) in cases.items():
        assert run(*command, *more, "--out", tmp_path / f"one {name}") == 0
    told = torchrun.communicate(timeout=120)[1]
    for name, (_, tolerance) in cases.items():
        one, two = (losses(tmp_path / f"{count} {name}") for count in ("one", "two"))
        assert len(one) == (8 if name == "shared" else 4), told
        assert two == pytest.approx(one, rel=0, abs=tolerance), name
    assert told.count("hex.py: error: the ranks see different data") == 2 and torchrun.returncode == 1
    assert not (tmp_path / "bad").exists()

# --- bad flags ------------------------------------------------------------------------------------
@pytest.mark.parametrize("argv, option, remedy", [
    ("--bogus", "--bogus", ""), ("--method moco", "--method", "mocov3"), ("--seed 1.5", "--seed", ""),
    ("--quantile 1", "--quantile", "(1e-06"),
    ("--out ", "--out", "leave it out"), ("--loss infonce --beta 2", "--beta 2", "leave it out"),
    ("--loss base --alpha 0.5", "--alpha", "leave it out"), ("--queue 8", "--queue", "leave it out"),
    ("--data folder", "--root", "needs --root DIR"), ("--recipe big", "--recipe", "imagenet"),
    ("--hex-warmup 3 --epochs 3", "--hex-warmup", "--hex-warmup 2"), ("--probe no.pt", "no.pt", "--backbone"),
    ("--batch-size 999", "than the 999", "--batch-size 112"), ("--backbone pixels", "pixels", "--epochs 0"),
    ("--data cifar10 --threshold oracle", "oracle", "cifar100"), ("--backbone r19", "--backbone", "resnet18"),
    ("--label-fraction 0.01", "--label-fraction", "give 0.1072")])
def test_a_bad_flag_is_one_line_with_its_remedy(argv, option, remedy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, line = refused(capsys, *argv.split(" "))
    assert status == 2 and option in line and remedy in line and os.listdir() == []

def test_a_rank_without_its_world_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    status, line = refused(capsys)
    assert status == 2 and "WORLD_SIZE" in line and "torchrun" in line
