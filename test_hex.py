# SPDX-License-Identifier: MIT
"""Tests of hex.py. First the loss: the equations again as loops, closed forms, the authors' numbers, two ranks."""
import copy
import hashlib
import io
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
import types
from itertools import product

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as tv

import hex as hx

FORMS = ["info_nce", "dcl", "hex", "released"]


def views(N, D=12, spread=2.0):
    """Two views of N images in float64, the first's nearly equal, the last's nearly unrelated; rows of any length."""
    g = torch.Generator().manual_seed(N)
    a, noise, length = (torch.randn(N, d, generator=g, dtype=torch.float64) for d in (D, D, 2))
    b = a + torch.linspace(0.1, spread, N, dtype=torch.float64)[:, None] * noise
    return a * length[:, :1].exp(), b * length[:, 1:].exp()


def of(form):
    """A loss of hex.py, under the knobs of `naive`."""
    def loss(a, b, t=0.1, quantile=0.99, fixed=None, labels=None, beta=1.0, tau_plus=0.1):
        if form in ("info_nce", "dcl"):
            return getattr(hx, form)(a, b, t)
        threshold = hx.AdaptiveThreshold(quantile) if fixed is None else hx.StepThreshold(fixed, 0.0, 1)
        threshold = threshold if labels is None else hx.OracleHierarchy(torch.tensor(labels))
        return hx.hex_nce(a, b, t, threshold=threshold, beta=beta, tau_plus=tau_plus, released=form == "released")
    return loss


def naive(form):
    """The equations, scalar by scalar: autograd differentiates scalars; what carries no gradient is a plain float."""
    def loss(a, b, t=0.1, quantile=0.99, fixed=None, labels=None, beta=1.0, tau_plus=0.1):
        N, n, exp, mean = len(a), 2 * len(a), math.exp, lambda x: sum(x) / len(x)
        z = torch.stack([row / row.dot(row).sqrt() for row in (*a, *b)])
        s, v = [row.unbind() for row in (z @ z.T).unbind()], (z @ z.T).tolist()  # scalars with a gradient; floats
        other = [(i + N) % n for i in range(n)]
        negatives = [[j for j in range(n) if j not in (i, other[i])] for i in range(n)]
        rows = v if form == "released" else [[v[i][j] for j in negatives[i]] for i in range(n)]
        eps = mean([sorted(row)[round(quantile * (len(row) - 1))] for row in rows]) if fixed is None else fixed

        def local(i, j):
            if labels is not None:
                return labels[i % N] == labels[j % N]
            low, high = (0, 1) if fixed is None else (min(v[i]), max(v[i]))
            return (v[i][j] - low) / (high - low) > eps

        losses, sizes, at_floor = [], [], []
        for i in range(n):
            H = [j for j in negatives[i] if local(i, j)]
            e = [(x / t).exp() for x in s[i]]
            positive, everyone = e[other[i]], sum(e[j] for j in negatives[i])
            rest = sum((e[j] for j in negatives[i] if j not in H), 0 * positive)
            if form in ("info_nce", "dcl"):
                row = -(positive / (everyone if form == "dcl" else positive + everyone)).log()
            elif form == "released":
                row = -s[i][other[i]] / t + (rest.log() if len(H) < n - 2 else 0) + (n - 2) * exp(-1 / t)
            else:
                w = {h: exp(beta * v[i][h] / t) for h in H}
                L = sum(w[h] / mean(w.values()) * e[h] for h in H) - tau_plus * len(H) * positive
                L, floor = L / (1 - tau_plus), len(H) * exp(-1 / t)
                at_floor += [i] if H and L.item() < floor else []
                row = -(positive / (positive + rest + (floor if i in at_floor else L))).log()
            losses.append(row)
            sizes.append(len(H))
        filled = sum(size > 0 for size in sizes)
        stats = {"local": mean(sizes), "empty": 1 - filled / n} | ({"threshold": eps} if labels is None else {})
        return mean(losses), stats | ({"clamped": len(at_floor) / max(filled, 1)} if form == "hex" else {})
    return loss


def graded(f, a, b, **knobs):
    """-> loss, its gradient in [a; b], stats as floats."""
    a, b = (x.detach().clone().requires_grad_() for x in (a, b))
    loss, stats = out if isinstance(out := f(a, b, **knobs), tuple) else (out, {})
    loss.backward()
    return loss.detach(), torch.cat([a.grad, b.grad]), {k: float(v) for k, v in stats.items()}


def agree(got, want, tol=1e-10):
    """Loss and gradient (dtypes too), and the stats that both have."""
    torch.testing.assert_close(got[:2], want[:2], rtol=tol, atol=tol)
    both = got[2].keys() & want[2].keys()
    assert {k: got[2][k] for k in both} == pytest.approx({k: want[2][k] for k in both}, abs=tol, nan_ok=True)


# ------------------------------------------------------------------------------------------------ the loss: the loops
GRID = [dict(t=t, quantile=q, beta=beta, tau_plus=tau_plus) for t, q, beta, tau_plus in
        product([0.02, 0.1, 0.5], [0.5, 0.9, 0.99], [0.0, 0.5, 1.0, 2.0], [0.0, 0.05, 0.1])]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("N, stride", [(2, 1), (3, 1), (5, 1), (17, 7), (33, 23)])
def test_loss_gradient_and_stats_are_the_loops(form, N, stride):
    """To 1e-10, over every knob. (The strides share no factor with the grid: every value of every knob is met.)"""
    for knobs in GRID[::stride]:
        agree(graded(of(form), *views(N), **knobs), graded(naive(form), *views(N), **knobs))


@pytest.mark.parametrize("form", ["hex", "released"])
@pytest.mark.parametrize("knobs", [dict(fixed=0.0), dict(fixed=0.5), dict(fixed=0.9), dict(labels=[0, 0, 1, 2, 2, 2, 3]),
                                   dict(labels=[0, 0, 0, 0, 0, 0, 0])], ids=str)
def test_fixed_thresholds_and_the_oracle_are_the_loops(form, knobs):
    """A fixed threshold sees each row's similarities rescaled to minimum 0 and maximum 1; the oracle sees labels."""
    agree(graded(of(form), *views(7), **knobs), graded(naive(form), *views(7), **knobs))


def test_the_loops_meet_every_kind_of_anchor():
    """At the floor, above it and without neighbours, in one batch of those above."""
    stats = naive("hex")(*views(17), quantile=0.9)[1]
    assert 0.01 < stats["empty"] < 0.5 and 0.2 < stats["clamped"] < 0.8


@pytest.mark.parametrize("form, tau_plus", [("info_nce", 0), ("dcl", 0), ("hex", 0.1), ("hex", 0), ("released", 0.1)])
def test_gradcheck(form, tau_plus):
    """Against finite differences, where H cannot flip and Q is 1 (elsewhere Q and eps are held still, on purpose)."""
    def loss(a, b):
        out = of(form)(a, b, t=0.3, fixed=0.6, beta=0.0, tau_plus=tau_plus)
        return out[0] if isinstance(out, tuple) else out
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in views(4)])


# --------------------------------------------------------------------------------------------- the loss: closed forms
EVERYONE, NOBODY = [0] * 6, [0, 1, 2, 3, 4, 5]  # labels of 6 images: for the oracle, all negatives are local, or none


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("knobs", [{}, dict(fixed=0.5), dict(labels=EVERYONE), dict(labels=NOBODY)], ids=str)
def test_equal_embeddings(form, knobs):
    """A collapsed batch: log(2N - 1) where the loss is NT-Xent, and finite everywhere."""
    loss, grad, _ = graded(of(form), torch.ones(6, 4), torch.ones(6, 4), **knobs)
    assert loss.isfinite() and grad.isfinite().all()
    if form == "info_nce" or form == "hex" and knobs == dict(labels=NOBODY):
        assert loss.item() == pytest.approx(math.log(11), abs=1e-5)


@pytest.mark.parametrize("t, floor", [(0.1, True), (0.5, False)])
def test_two_orthogonal_images(t, floor):
    """Positives at 1, negatives at 0 and all of them local: by hand, with HEX at its floor and above it."""
    z, x = torch.eye(2, dtype=torch.float64), math.exp(-1 / t)
    local = 2 * x if floor else (2 - 0.2 / x) / 0.9
    want = dict(info_nce=math.log(1 + 2 * x), dcl=math.log(2 * x), hex=math.log(1 + x * local), released=2 * x - 1 / t)
    for form in FORMS:
        loss, _, stats = graded(of(form), z, z, t=t, labels=[0, 0])
        assert loss.item() == pytest.approx(want[form], abs=1e-12)
        assert form != "hex" or (stats["local"], stats["empty"], stats["clamped"]) == (2, 0, floor)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_two_images_that_swap_places(beta):
    """Positives at 0, one local negative at 1 and one at 0: the weighted term by hand."""
    z, x, w = torch.eye(2, dtype=torch.float64), math.exp(1 / 0.5), math.exp(beta / 0.5)
    local = ((1 + w * x) / ((1 + w) / 2) - 2 * 0.1) / (1 - 0.1)
    loss = graded(of("hex"), z, z.flip(0), t=0.5, labels=[0, 0], beta=beta, tau_plus=0.1)[0]
    assert loss.item() == pytest.approx(math.log(1 + local), abs=1e-12)


@pytest.mark.parametrize("knobs", [dict(beta=0.0, tau_plus=0.0, quantile=0.5), dict(labels=NOBODY)], ids=str)
def test_hex_without_weights_or_without_neighbours_is_nt_xent(knobs):
    agree(graded(of("hex"), *views(6), **knobs), graded(of("info_nce"), *views(6)), 1e-12)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_who_is_repelled(beta):
    """Every member of an H(i) above the floor is, the nearest most; none at the floor; none at all in `released`.
    Image 0's views lie apart, which keeps its two anchors above the floor; the others' nearly coincide: at the floor."""
    g = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(6, 12, generator=g, dtype=torch.float64) for _ in "ab")
    a = image + image.norm() / 12
    z = torch.nn.functional.normalize(torch.cat([a, a + torch.tensor([4.0] + 5 * [0.03])[:, None] * noise]))
    above, floor = [0, 6], [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    negative = (torch.arange(12)[:, None] - torch.arange(12)) % 6 != 0
    for form in ("hex", "released"):
        _, grad, stats = graded(of(form), *z.chunk(2), labels=EVERYONE, beta=beta)
        push = torch.linalg.solve(z.T, grad.T).T  # 12 rows, a basis: [i, j] is d loss/d s_ij + d loss/d s_ji
        assert push[floor][:, floor][negative[floor][:, floor]].abs().max() < 1e-12
        if form == "released":
            assert push[above][:, floor].abs().max() < 1e-12
            continue
        assert stats["clamped"] == pytest.approx(10 / 12)
        for i in above:
            assert push[i, floor].min() > 1e-10 and push[i, floor].argsort().equal((z @ z[i])[floor].argsort())


@pytest.mark.parametrize("knob", [dict(t=0.2), dict(beta=0.0), dict(beta=2.0), dict(tau_plus=0.0), dict(tau_plus=0.05),
                                  dict(quantile=0.9), dict(fixed=0.6)], ids=str)
def test_every_knob_changes_loss_and_gradient(knob):
    (loss, grad, _), (other, other_grad, _) = graded(of("hex"), *views(17)), graded(of("hex"), *views(17), **knob)
    assert abs(loss - other) > 1e-4 and (grad - other_grad).norm() > 1e-4 * grad.norm()


# -------------------------------------------------------------------------------------- the loss: the authors' numbers
GOLDEN = [  # form, shift, temperature, fixed threshold or adaptive, loss, |grad a|, |grad b|, grad_a[0, 0], grad_b[5, 0]
    ("released", 0.0, 0.1, None, -0.209686502289, 0.124583599879, 0.114063545042, -0.002105660922, 0.002185973938),
    ("released", 0.0, 0.1, 0.9, 0.057173995355, 0.123146161097, 0.112887103998, -0.000531205316, 0.002199590476),
    ("released", 0.0, 0.1, 0.7, -1.731573921837, 0.106493386567, 0.100227593369, -0.002788062039, 0.000857481755),
    ("info_nce", 0.0, 0.1, None, 0.768578547087, 0.071991750913, 0.062275016294, -0.000654980593, 0.001015350352),
    ("released", 0.5, 0.2, None, 3.774087621686, 0.055683415691, 0.054846263581, -0.000110334815, -0.000175189849),
    ("released", 0.5, 0.2, 0.9, 3.820448075501, 0.055434495269, 0.054729714941, -0.000126925628, -0.000138290231),
    ("released", 0.5, 0.2, 0.7, 3.138836540220, 0.056886314000, 0.056472391800, -0.000140903878, -0.000069540890),
    ("info_nce", 0.5, 0.2, None, 2.265785870669, 0.049685751901, 0.048814410074, -0.000117329705, -0.000105758818),
]


@pytest.mark.parametrize("form, shift, t, fixed, loss, norm_a, norm_b, grad_a, grad_b", GOLDEN)
def test_authors_numbers(form, shift, t, fixed, loss, norm_a, norm_b, grad_a, grad_b):
    """What github.com/olivesgatech/HEX @ c3002ed computes in float64 (beta 1, tau_plus 0.1), SimCLR and NNCLR alike."""
    i, j = torch.arange(128, dtype=torch.float64)[:, None], torch.arange(16, dtype=torch.float64)
    image = torch.sin((i % 10 + 1) * (j + 1) * 1.3 + shift) + 0.8 * torch.sin(i * (j + 2) * 0.7 + 2 * shift)
    a = image + 0.3 * torch.sin(i * (j + 3) * 1.1 + 3 * shift)
    b = image + 0.3 * torch.cos(i * (j + 4) * 0.9 + 4 * shift)
    value, grad, _ = graded(of(form), a, b, t=t, fixed=fixed)
    got = [value, grad[:128].norm(), grad[128:].norm(), grad[0, 0], grad[128 + 5, 0]]
    assert [x.item() for x in got] == pytest.approx([loss, norm_a, norm_b, grad_a, grad_b], rel=0, abs=1e-10)


# ------------------------------------------------------------------------------ the loss: symmetry, precision, refusals
@pytest.mark.parametrize("form", FORMS)
def test_symmetries(form):
    """The order of the images, which view is which, and the rows' lengths mean nothing."""
    (a, b), order = views(17), torch.randperm(17, generator=torch.Generator().manual_seed(0))
    loss, grad, stats = graded(of(form), a, b, quantile=0.9)
    agree(graded(of(form), a[order], b[order], quantile=0.9), (loss, grad[torch.cat([order, order + 17])], stats))
    agree(graded(of(form), b, a, quantile=0.9), (loss, grad.roll(17, 0), stats))
    agree(graded(of(form), 3 * a, b / 7, quantile=0.9), (loss, torch.cat([grad[:17] / 3, grad[17:] * 7]), stats))


@pytest.mark.parametrize("form", FORMS)
def test_half_precision(form):
    """Half inputs cost their own rounding and no more, and autocast costs nothing: the loss is computed in float32."""
    a, b = (x.float() for x in views(17))
    exact = graded(of(form), a, b, fixed=0.6)
    agree(graded(torch.autocast("cpu", dtype=torch.bfloat16)(of(form)), a, b, fixed=0.6), exact, 1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        loss, grad, _ = graded(of(form), a.to(dtype), b.to(dtype), fixed=0.6)
        assert loss.dtype == torch.float32 and abs(loss - exact[0]) < 1e-2 and grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_temperature_of_a_fiftieth_in_float32(form):
    """e^(1/t) squared is beyond float32: inf or nan, unless each row's maximum is taken out first."""
    want, got = (graded(of(form), *(x.to(d) for x in views(17)), t=0.02, beta=2.0) for d in (torch.double, torch.float))
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-4)
    assert (got[1] - want[1]).norm() < 1e-3 * want[1].norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("a, b", [((1, 4), (1, 4)), ((4, 4), (5, 4)), ((4, 4), (4, 5))], ids=str)
def test_refused_batches(form, a, b):
    """One image has no negatives; rows that are not aligned have no positives."""
    with pytest.raises(ValueError):
        of(form)(torch.randn(a), torch.randn(b))


# ----------------------------------------------------------------------------------------------- thresholds and H(i)
@pytest.mark.parametrize("q", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("k", [1, 2, 4, 6, 51, 300])
@pytest.mark.parametrize("left_out", [0.0, 0.4])
def test_adaptive_threshold_is_an_order_statistic(q, k, left_out):
    """The mean over rows of entry round(q (k - 1)), half to even, of a row's k finite entries in order; no gradient."""
    g = torch.Generator().manual_seed(k)
    cosine, out = torch.randn(8, k, generator=g, dtype=torch.float64), torch.rand(8, k, generator=g) < left_out
    out[:, 0] = False
    rows = [sorted(x for x in row if x > -math.inf) for row in cosine.masked_fill(out, -math.inf).tolist()]
    got = hx.adaptive_threshold(cosine.requires_grad_().masked_fill(out, -math.inf), q)
    assert got.item() == pytest.approx(sum(row[round(q * (len(row) - 1))] for row in rows) / 8, abs=1e-14)
    assert got.ndim == 0 and not got.requires_grad


def test_a_row_without_entries_has_no_threshold():
    with pytest.raises(ValueError):
        hx.adaptive_threshold(torch.tensor([[0.1, 0.2], [-math.inf, -math.inf]]))


@pytest.mark.parametrize("kind, args, want", [
    ("StepThreshold", (0.9, 0.1, 10), {0: 0.9, 9: 0.9, 10: 0.8, 45: 0.5, 89: 0.1, 90: 0.0, 500: 0.0}),
    ("CosineThreshold", (0.9, 0.3, 100), {0: 0.9, 25: 0.6 + 0.3 * math.sqrt(0.5), 50: 0.6, 100: 0.3})])
def test_fixed_schedules(kind, args, want):
    """Stateless: asked twice and in any order, an epoch has one threshold."""
    threshold = getattr(hx, kind)(*args)
    for epoch in [*want, *reversed(want)]:
        stats = hx.hex_nce(*views(5), threshold=threshold, epoch=epoch)[1]
        assert float(stats["threshold"]) == pytest.approx(want[epoch], abs=1e-9)


@pytest.mark.parametrize("N", [16, 64, 128, 512])
def test_local_mask(N):
    """H never holds self or positive, and, where rows are alike, holds about 1 % of the negatives at any batch size."""
    g = torch.Generator().manual_seed(N)
    a = torch.randn(N, 32, generator=g)
    eps, H = hx.local_mask(a, a + 0.5 * torch.randn(N, 32, generator=g))
    assert H.shape == (2 * N, 2 * N) and H.dtype == torch.bool and eps.ndim == 0
    assert not (H.diagonal().any() or H.diagonal(N).any() or H.diagonal(-N).any())
    assert H.any() and H.sum(1).double().mean().item() == pytest.approx(0.01 * (2 * N - 2), rel=0.5, abs=0.5)


# ------------------------------------------------------------------------------------------------ the loss: two ranks
def lopsided():
    """8 images, of which rank 0 gets 4 that lie close together and rank 1 gets 4 that lie apart."""
    a, b = views(8, 16, spread=1.0)
    a[:4], b[:4] = a[0] + 0.1 * a[:4], a[0] + 0.1 * b[:4]
    return a, b


TWO_RANKS = [  # in views(2) a rank has one image, in the last two rank 1 has no neighbours
    *((form, views(6), {}) for form in FORMS), ("info_nce", views(2), {}), ("hex", views(2), {}),
    ("hex", views(6), dict(quantile=0.8, beta=2.0)), ("hex", views(6), dict(fixed=0.6)),
    ("released", views(6), dict(fixed=0.6)), ("released", views(6), dict(labels=EVERYONE)),
    ("hex", views(6), dict(labels=[0, 0, 0, 1, 2, 3])), ("hex", lopsided(), {})]


def on_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for form, data, knobs in TWO_RANKS:
        rows = slice(rank * len(data[0]) // 2, (rank + 1) * len(data[0]) // 2)
        mine = {k: v[rows] if k == "labels" else v for k, v in knobs.items()}
        results.append(graded(of(form), *(x[rows] for x in data), **mine))
    eps, H = hx.local_mask(*(x.chunk(2)[rank] for x in lopsided()))
    torch.save((results, eps, H.sum(1)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    """DDP averages gradients: the ranks' mean loss, and their gradients over the world size, are those of one process.
    Guards a gather that cuts the gradient, one that scales it by the world size, and a threshold of each rank's own."""
    mp.spawn(on_rank, (str(tmp_path),), nprocs=2)
    (r0, eps0, H0), (r1, eps1, H1) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for (form, data, knobs), (loss0, grad0, stats0), (loss1, grad1, stats1) in zip(TWO_RANKS, r0, r1, strict=True):
        (a0, b0), (a1, b1), one = grad0.chunk(2), grad1.chunk(2), graded(of(form), *data, **knobs)
        for stats in (stats0, stats1):
            agree(((loss0 + loss1) / 2, torch.cat([a0, a1, b0, b1]) / 2, stats), one)
    eps, H = hx.local_mask(*lopsided())
    torch.testing.assert_close([eps0, eps1], [eps, eps])
    assert torch.cat([H0[:4], H1[:4], H0[4:], H1[4:]]).equal(H.sum(1)) and H0.sum() > 0 == H1.sum()


# ------------------------------------------------------------------------------- augmentation, views, optimiser, data
def test_augmentation_is_torchvisions_picture_by_picture():
    crops = torch.randint(0, 256, (6, 3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    parameters = torch.tensor([[1, 1.5, 0.4, 1.7, 0.15, 0, 1.3, 1], [0, 0.3, 1.8, 0.2, -0.2, 1, 0, 0],
                               [1, 1, 1, 1, 0, 0, 0.1, 0], [0, 1.8, 1.2, 0.9, 0.05, 0, 2.0, 1],
                               [0, 1, 1, 1, 0, 0, 0, 0], [1, 0.7, 0.6, 0.5, -0.1, 1, 0.7, 1]])
    got = hx.augment(crops, parameters, blur=True, solarise=True)
    for crop, (flip, brightness, contrast, saturation, hue, grey, sigma, solarise), view in zip(
            crops, parameters.tolist(), got, strict=True):
        x = crop.float() / 255
        x = tv.horizontal_flip(x) if flip else x
        x = tv.adjust_contrast(tv.adjust_brightness(x, brightness), contrast)
        x = tv.adjust_hue(tv.adjust_saturation(x, saturation), hue)
        x = tv.rgb_to_grayscale(x, 3) if grey else x
        x = tv.gaussian_blur(x, [5, 5], [sigma, sigma]) if sigma else x
        x = tv.solarize(x, 0.5) if solarise else x
        torch.testing.assert_close(view, tv.normalize(x, hx.MEAN, hx.STD), rtol=0, atol=1e-5)


def test_a_view_depends_on_seed_epoch_index_and_view_alone():
    pictures = hx.draw_shapes(24, 3)
    views = hx.Views(pictures, 32, seed=5, blur=0.5, solarise=0.3)
    keys = [(2, i) for i in range(24)]
    alone = [views[key] for key in keys]
    for workers, batch in ((0, 8), (1, 6), (2, 4)):
        batches = tuple(keys[i:i + batch] for i in range(0, 24, batch))
        loader = hx.loader(views, batches, types.SimpleNamespace(workers=workers, device="cpu"))
        for got, want in zip((torch.cat(each) for each in zip(*loader, strict=True)), zip(*alone, strict=True),
                             strict=True):
            assert torch.equal(got, torch.stack([torch.as_tensor(w) for w in want]))
    assert not torch.equal(alone[0][0][0], alone[0][0][1])                  # the two views
    assert not torch.equal(views[3, 0][0], alone[0][0])                     # another epoch
    assert not torch.equal(hx.Views(pictures, 32, seed=6)[2, 0][0], alone[0][0])


@pytest.mark.parametrize("clip", [True, False])
def test_lars_is_the_step_by_hand(clip):
    w, bias = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0])
    w, bias = w.requires_grad_(), bias.requires_grad_()
    optimizer = hx.LARS([w, bias], 0.5, momentum=0.9, weight_decay=0.1, eta=0.02, clip=clip)
    x, m, b, mb = [3.0, 4.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0]
    for grad in ([0.6, 0.8], [0.0, 0.001]):
        w.grad, bias.grad = torch.tensor([grad]), torch.tensor(grad)
        optimizer.step()
        ratio = 0.02 * math.hypot(*x) / (math.hypot(*grad) + 0.1 * math.hypot(*x) + 1e-8)
        ratio = min(ratio / 0.5, 1) if clip else ratio
        m = [0.9 * mi + ratio * (g + 0.1 * xi) for mi, g, xi in zip(m, grad, x, strict=True)]
        x = [xi - 0.5 * mi for xi, mi in zip(x, m, strict=True)]
        mb = [0.9 * mi + g for mi, g in zip(mb, grad, strict=True)]
        b = [bi - 0.5 * mi for bi, mi in zip(b, mb, strict=True)]
        torch.testing.assert_close(w.detach(), torch.tensor([x]))
        torch.testing.assert_close(bias.detach(), torch.tensor(b))


def test_the_rate_is_a_pure_function_of_the_step():
    assert [hx.learning_rate(s, 10, 2, 4.0) for s in (0, 1, 2, 6)] == pytest.approx([2, 4, 4, 2])
    assert hx.learning_rate(10, 10, 2, 4.0) == pytest.approx(0)


def test_batches_are_the_same_for_every_world_and_resume(monkeypatch):
    def of_rank(r, w, start=0):
        monkeypatch.setattr(hx, "rank", lambda: r)
        monkeypatch.setattr(hx, "world", lambda: w)
        batches = hx.Batches(torch.arange(50), 8, 0, "order", groups=2)
        batches.start, batches.epoch = start, 1
        return list(batches)
    whole = of_rank(0, 1)
    assert len(whole) == 6 and len({i for batch in whole for i in batch}) == 48
    assert [a + b for a, b in zip(of_rank(0, 2), of_rank(1, 2), strict=True)] == whole
    assert of_rank(0, 1, start=4) == whole[4:]


# ---------------------------------------------------------------------------------------------------------- the methods
HEADS = {"simclr": {}, "nnclr": dict(predictor=8, queue=10), "mocov3": dict(predictor=8), "byol": dict(predictor=8),
         "simsiam": dict(predictor=8), "barlow": {}, "vicreg": {}}


def method(name, **further):
    torch.manual_seed(0)
    return hx.METHODS[name](torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 16)), 16, hidden=8, dim=6,
                            **HEADS[name], **further)


def naive_own(name, e, made):
    """Each paper's loss, in float64 loops over rows or columns."""
    e = [x.double() for x in e]
    unit = [x / x.norm(dim=1, keepdim=True) for x in e]

    def cos(i, j):
        return sum(float(u @ v) for u, v in zip(unit[i], unit[j], strict=True)) / len(e[0])

    def cross_entropy(a, b, t):
        logits = [[float(u @ v) / t for v in b] for u in a]
        return sum(math.log(sum(map(math.exp, row))) - row[i] for i, row in enumerate(logits)) / len(a)

    if name == "simclr":
        return float(naive("info_nce")(*e, t=0.1)[0])
    if name == "nnclr":
        queue = made.queue.double()
        near = [torch.stack([max(queue, key=lambda q, z=z: float(q @ z)) for z in unit[i]]) for i in (2, 3)]
        return (cross_entropy(near[0], unit[1], 0.1) + cross_entropy(near[1], unit[0], 0.1)) / 2
    if name == "mocov3":
        return 2 * (cross_entropy(unit[0], unit[5], 1.0) + cross_entropy(unit[1], unit[4], 1.0))
    if name == "byol":
        return 4 - 2 * cos(0, 5) - 2 * cos(1, 4)
    if name == "simsiam":
        return -(cos(0, 3) + cos(1, 2)) / 2
    N, D = e[0].shape
    if name == "barlow":
        a, b = ((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() for x in e)
        c = [[float((a[:, i] * b[:, j]).mean()) for j in range(D)] for i in range(D)]
        return 0.024 * sum((c[i][i] - 1) ** 2 if i == j else 0.0051 * c[i][j] ** 2 for i in range(D) for j in range(D))
    variance = sum(max(0.0, 1 - math.sqrt(float(z[:, d].var()) + 1e-4)) for z in e for d in range(D)) / D
    covariance = sum(float(((z[:, i] - z[:, i].mean()) * (z[:, j] - z[:, j].mean())).sum() / (N - 1)) ** 2
                     for z in e for i in range(D) for j in range(D) if i != j) / D
    return 25 * float((e[0] - e[1]).square().mean()) + 25 * variance + covariance


@pytest.mark.parametrize("name", HEADS)
def test_own_loss_is_its_papers(name):
    made, g = method(name), torch.Generator().manual_seed(1)
    count = len(made(*torch.randn(2, 4, 3, 2, 2, generator=g)))
    e = [torch.randn(9, 6, generator=g) for _ in range(count)]
    assert float(made.loss(*e)[0]) == pytest.approx(naive_own(name, e, made), rel=1e-5)


@pytest.mark.parametrize("loss", hx.LOSSES)
@pytest.mark.parametrize("name", HEADS)
def test_every_method_with_every_loss_reaches_every_parameter(name, loss):
    model = hx.HEX(method(name), loss, threshold=hx.AdaptiveThreshold(0.8))
    value, stats = model.loss(*model(*torch.randn(2, 8, 3, 2, 2)))
    value.backward()
    assert value.isfinite() and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert {"hex": "clamped", "released": "clamped"}.get(loss, "own") in stats
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.after_step(1)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
    assert changed == {"nnclr": {"method.queue", "method.head"}}.get(name, set())  # a target equals its model at the start


def test_alpha_and_scale_mix_the_losses():
    made = method("vicreg")
    e = torch.randn(2, 8, 6)
    own, want = made.loss(*e)[0], hx.info_nce(*e, 0.1)
    assert float(hx.HEX(made, "infonce").loss(*e)[0]) == pytest.approx(float(0.9 * own + 0.1 * 5 * want), rel=1e-5)
    assert torch.equal(hx.HEX(made, "infonce", warmup=1).loss(*e, epoch=0)[0], own)


def test_the_readmes_foreign_module_runs():
    text = open(os.path.join(os.path.dirname(hx.__file__), "README.md"), encoding="utf-8").read()
    snippet = text.split("```python\n")[1].split("```")[0]
    scope = {}
    exec(snippet, scope)
    assert all(p.grad.isfinite().all() for p in scope["model"].parameters())


class Foreign(torch.nn.Module):
    """The protocol without hx.Method: no alpha, no scale, no after_step, float64, two pairs."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(12, 6, dtype=torch.float64)

    def forward(self, x1, x2):
        return self.net(x1.flatten(1)), self.net(x2.flatten(1))

    def loss(self, a, b):
        return (a - b).square().mean(), [(a, b), (b, a)]


def test_a_foreign_module_trains_a_step():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 2, 2, dtype=torch.float64)
    model = hx.HEX(Foreign(), temperature=0.2)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.01), copy.deepcopy(model.state_dict())
    a, b = model(*x)
    loss, stats = model.loss(a, b)
    want = 0.9 * (a - b).square().mean() + 0.1 * naive("hex")(a, b, t=0.2)[0]
    assert loss.item() == pytest.approx(want.item(), abs=1e-10) and stats.keys() >= {"own", "hex", "threshold", "local"}
    loss.backward()
    optimizer.step()
    model.after_step(1)
    assert model.loss(*model(*x))[0] < loss and not torch.equal(before["method.net.weight"], model.method.net.weight)


def test_the_queue_wraps_around_and_the_target_follows():
    made = method("nnclr")                                                   # a queue of 10
    for turn in range(7):
        z = torch.randn(4, 6)
        made.loss(z, z, z, z)
        made.after_step(0)
        where = [(4 * turn + i) % 10 for i in range(4)]
        torch.testing.assert_close(made.queue[where], torch.nn.functional.normalize(z))
    made = method("byol")
    old, online = made.target[0][1].weight.clone(), made.backbone[1].weight
    with torch.no_grad():
        online += 1
    statistics = [buffer.clone() for buffer in made.target.buffers()]
    for buffer in made.projector.buffers():
        buffer += 1                                                          # the target's stay those of its own passes
    made.steps = 2
    made.after_step(1)                                                       # halfway: 1 - (1 - 0.99) / 2
    torch.testing.assert_close(made.target[0][1].weight, 0.995 * old + 0.005 * online)
    before = made.target[0][1].weight.clone()
    made.after_step(2)                                                       # at the end: 1
    assert torch.equal(made.target[0][1].weight, before)
    assert statistics and all(torch.equal(*pair) for pair in zip(made.target.buffers(), statistics, strict=True))


# ------------------------------------------------------------------------------------ the CUDA path, without a CUDA GPU
@pytest.fixture
def fake_cuda(monkeypatch):
    """Tensors on device cuda that hold no values, and 8 ranks that do not exist: devices and dtypes alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.testing._internal.distributed.fake_pg import FakeStore
    monkeypatch.setattr(torch.amp.autocast_mode.torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    with FakeTensorMode(shape_env=ShapeEnv()), torch.device("cuda"):
        yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cuda_path_walked_with_fake_tensors(fake_cuda, dtype):
    crops, parameters = torch.zeros(8, 3, 64, 64, dtype=torch.uint8), torch.rand(8, 8)
    x1, x2 = hx.augment(crops, parameters, blur=True, solarise=True).chunk(2)
    assert x1.device.type == "cuda" and x1.is_contiguous(memory_format=torch.channels_last)
    for name, kind in hx.METHODS.items():
        backbone, width = hx.build_backbone("resnet18" if name == "simclr" else "resnet10_narrow", 64)
        made = kind(backbone, width, hidden=64, dim=32, **HEADS[name])
        with torch.autocast("cuda", dtype=dtype):
            outputs = made(x1, x2)
            assert outputs[0].dtype == dtype and all(each.device.type == "cuda" for each in outputs)
            for loss in hx.LOSSES:       # torch.cov asks for a value, which there is none of
                value, stats = hx.HEX(made, loss, threshold=hx.AdaptiveThreshold(0.9)).loss(*outputs)
                assert value.dtype == torch.float32 and value.device.type == "cuda"
                assert all(each.device.type == "cuda" for each in stats.values())
        made.after_step(1)
    z1, z2 = (torch.randn(4, 32, dtype=dtype) for _ in "ab")
    for threshold in (hx.StepThreshold(), hx.CosineThreshold(), hx.OracleHierarchy(torch.zeros(4, dtype=torch.long))):
        for released in (False, True):
            assert hx.hex_nce(z1, z2, threshold=threshold, released=released)[0].device.type == "cuda"
    params = list(made.parameters())
    for p in params:
        p.grad = torch.zeros_like(p)
    for clip in (True, False):
        hx.LARS(params, 0.1, weight_decay=1e-4, clip=clip).step()
    for left_behind in (lambda: hx.augment(crops, parameters.cpu()), lambda: hx.info_nce(z1, z2.cpu()),
                        lambda: hx.hex_nce(z1, z2.cpu()), lambda: made(x1, x2.cpu()),
                        lambda: hx.hex_nce(z1, z2, threshold=hx.OracleHierarchy(torch.zeros(4, device="cpu")))):
        with pytest.raises(Exception, match="device|cpu"):
            left_behind()


# -------------------------------------------------------------------------------------------------- the real command
SMALL = ["--epochs", "2", "--batch-size", "64", "--probe-epochs", "2", "--workers", "0", "--log-every", "1", "--device", "cpu"]


@pytest.fixture
def small_shapes(monkeypatch):
    draw = hx.draw_shapes
    monkeypatch.setattr(hx, "draw_shapes", lambda count, seed: draw(count // 16, seed))


def events(out):
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def told(capsys, *argv):
    """-> status, lines on stderr that are an error."""
    status = hx.main([str(each) for each in argv])
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    return status, [line for line in captured.splitlines() if "hex.py: error" in line]


def test_a_run_its_files_its_resume_and_its_probe(tmp_path, small_shapes, capsys, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert hx.main([*SMALL, "--out", str(whole)]) == 0
    assert {p.name for p in whole.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt", "backbone.pt", "probe.json",
                                                 "neighbours.png", "neighbours_early.png"}
    probe, config = (json.load(open(whole / name)) for name in ("probe.json", "config.json"))
    assert {"top1", "top5", "knn"} <= probe.keys() and all(0 <= probe[k] <= 100 for k in ("top1", "top5", "knn"))
    assert config["command"] == ["hex.py", *SMALL, "--out", str(whole)] and config["versions"]["torch"] == torch.__version__
    steps = [e for e in events(whole) if e["event"] == "step"]
    assert [e["step"] for e in steps] == [*range(1, 9)]
    assert {"loss", "threshold", "local", "empty", "clamped", "lr", "images_per_second"} <= steps[0].keys()
    assert {"purity", "chance", "purity_coarse", "rankme", "knn", "std"} <= events(whole)[0].keys()
    assert hx.main([*SMALL, "--out", str(whole)]) == 0 and "top-1" in capsys.readouterr().out
    status, lines = told(capsys, *SMALL, "--beta", "0.5", "--out", whole)
    assert status == 1 and len(lines) == 1 and "--beta 1.0 there, 0.5 here" in lines[0]

    step, stops = hx.Trainer.step, iter([False, True, False, False, True, False, False, True])
    monkeypatch.setattr(hx.Trainer, "step", lambda self, *a: (step(self, *a), setattr(self, "stop", next(stops)))[0])
    statuses = [hx.main([*SMALL, "--out", str(killed)]) for _ in range(4)]      # mid-epoch, twice; at the end
    crashed, calls = tmp_path / "crashed", iter(range(1, 99))
    monkeypatch.setattr(hx.Trainer, "step", lambda self, *a: step(self, *a) if next(calls) != 8 else 1 / 0)
    with pytest.raises(ZeroDivisionError):                                      # in step 8, after the checkpoint of 6
        hx.main([*SMALL, "--checkpoint-every", "3", "--out", str(crashed)])
    assert torch.load(crashed / "checkpoint.pt", weights_only=True)["steps"] == 6
    assert hx.main([*SMALL, "--out", str(crashed)]) == 0
    assert statuses == [hx.INTERRUPTED] * 3 + [0]
    timing = {"images_per_second", "data_wait"}
    for other in (killed, crashed):
        assert (whole / "backbone.pt").read_bytes() == (other / "backbone.pt").read_bytes()
        assert [{k: v for k, v in e.items() if k not in timing} for e in events(whole)] == \
            [{k: v for k, v in e.items() if k not in timing} for e in events(other)]
    (crashed / "probe.json").unlink()
    checkpoint = (crashed / "checkpoint.pt").read_bytes()
    flipped = checkpoint[:99999] + bytes([checkpoint[99999] ^ 1]) + checkpoint[100000:]
    state, other = torch.load(crashed / "checkpoint.pt", weights_only=True), io.BytesIO()
    state["optimizer"]["state"][0]["momentum"] = torch.zeros(3)
    torch.save(state, other)
    config, stopped = (crashed / "config.json").read_bytes(), hx.Interrupted()
    for name, content, word in (("checkpoint.pt", flipped, "damaged"), ("checkpoint.pt", checkpoint[:100], "damaged"),
                                ("checkpoint.pt", other.getvalue(), "optimizer.state.0.momentum differs"),
                                ("config.json", config[:100], "readable"), ("config.json", b"[5]", "readable")):
        (crashed / name).write_bytes(content)                                   # said, not trained over
        status, lines = told(capsys, *SMALL, "--out", crashed)
        assert status == 1 and len(lines) == 1 and name in lines[0] and word in lines[0]
    (crashed / "config.json").write_bytes(config)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *a, **k: (_ for _ in ()).throw(stopped))
        assert hx.main([*SMALL, "--out", str(crashed)]) == hx.INTERRUPTED       # not: a damaged file

    backbone, quick = whole / "backbone.pt", ["--probe-epochs", "2", "--workers", "0"]
    assert hx.main(["--probe", str(backbone), *quick, "--out", str(tmp_path / "p")]) == 0
    assert json.load(open(tmp_path / "p" / "probe.json"))["top1"] == json.load(open(whole / "probe.json"))["top1"]
    state = torch.load(backbone, weights_only=True)
    for name, bad in (("foreign", state | {"head.weight": torch.ones(2)}), ("other", {**state, "conv1.weight": torch.ones(2)})):
        torch.save(bad, whole / f"{name}.pt")
        status, lines = told(capsys, "--probe", whole / f"{name}.pt", *quick, "--out", tmp_path / name)
        assert status == 1 and len(lines) == 1 and ("head.weight" in lines[0] or "conv1.weight" in lines[0])


class Bomb:
    def __reduce__(self):
        return (open, (str(Bomb.path), "w"))


def test_files_are_read_without_running_code(tmp_path, capsys):
    Bomb.path = tmp_path / "went off"
    torch.save({"conv1.weight": Bomb()}, tmp_path / "bomb.pt")
    status, lines = told(capsys, "--probe", tmp_path / "bomb.pt", "--backbone", "resnet10_narrow", "--out", tmp_path / "o")
    assert status == 1 and "bomb.pt" in lines[0] and not Bomb.path.exists()


def picture_folder(root, count=40):
    rng = random.Random(0)
    for split, each in (("train", count), ("val", 6)):
        for name in ("a b", "ü"):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                mode, suffix = [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"),
                                ("I;16", "png")][i % 6]
                size = (1, 1) if i == 7 else (rng.randint(20, 60), rng.randint(20, 60))
                Image.effect_noise(size, 99).convert("L").convert(mode if mode != "I;16" else "I").convert(mode).save(
                    root / split / name / f"{i}.{suffix}")
            (root / split / name / "3.png").rename(root / split / name / "3.JPEG")


def test_pictures_are_decoded_whatever_their_kind_and_name(tmp_path):
    (tmp_path / "a").mkdir()
    grey = numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "a/0.png")
    Image.fromarray(grey.astype(numpy.uint16) * 257).save(tmp_path / "a/1.png")
    (tmp_path / "a/0.png").rename(tmp_path / "a/0.JPEG")
    smooth = Image.merge("CMYK", [Image.linear_gradient("L").resize((16, 16))] * 4)
    smooth.save(tmp_path / "a/2.jpg", quality=100)
    turned = Image.fromarray(grey[:8])
    turned.getexif()[0x0112] = 6                                              # stored lying on its side
    turned.save(tmp_path / "a/3.jpg", quality=100, exif=turned.getexif())
    (tmp_path / "a/.hidden").write_text("")
    folder = hx.Folder(str(tmp_path))
    assert len(folder) == 4
    for i in (0, 1):
        assert torch.equal(folder.read(i), torch.from_numpy(grey).expand(3, 16, 16))
    want = torch.from_numpy(numpy.asarray(Image.open(tmp_path / "a/2.jpg").convert("RGB"))).permute(2, 0, 1)
    assert (folder.read(2).int() - want.int()).abs().max() <= 3
    upright = torch.from_numpy(numpy.rot90(grey[:8], -1).copy())
    assert folder.read(3).shape == (3, 16, 8) and (folder.read(3)[0].int() - upright.int()).abs().max() <= 3


FOLDER = ["--data", "folder", "--size", "32", "--backbone", "resnet10_narrow", "--hidden", "32", "--dim", "16", "--batch-size",
          "16", "--epochs", "1", "--probe-epochs", "1", "--lr", "1", "--device", "cpu"]


def test_a_folder_of_odd_pictures_then_bad_ones(tmp_path, capsys):
    root = tmp_path / "data"
    picture_folder(root)
    assert hx.main([*FOLDER, "--root", str(root), "--out", str(tmp_path / "good"), "--workers", "0"]) == 0
    bad = [root / "train/a b/zero.jpg", root / "train/a b/text.JPEG", root / "train/ü/cut.jpg", root / "train/ü/dangling.png"]
    bad[0].write_bytes(b"")
    bad[1].write_text("no picture")
    bad[2].write_bytes((root / "train/ü/0.jpg").read_bytes()[:200])
    bad[3].symlink_to(root / "nowhere.png")
    bad.append(root / "train/a b/UserError: two\nlines.jpg")
    bad[4].write_text("no picture")
    shutil.copy(root / "train/ü/3.JPEG", os.fsencode(root / "train/ü") + b"/\xff\xfe.png")    # good, if oddly named
    for workers in (0, 1):
        status, lines = told(capsys, *FOLDER, "--root", root, "--workers", workers, "--out", tmp_path / f"bad{workers}")
        assert status == 1 and len(lines) == 1 and any(str(path).replace("\n", "\\n") in lines[0] for path in bad)
        assert "--skip-bad-files" in lines[0]
    out = tmp_path / "skip"
    assert hx.main([*FOLDER, "--root", str(root), "--workers", "1", "--skip-bad-files", "--out", str(out)]) == 0
    assert (out / "bad_files.txt").read_text().splitlines() == sorted(str(path).replace("\n", "\\n") for path in bad)


def test_cifar_from_an_archive_in_its_own_format(tmp_path, monkeypatch):
    folder, sums = tmp_path / "cifar-10-batches-py", {}
    folder.mkdir()
    draw = random.Random(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        content = {"label_names": list("abcdefghij")} if name == "batches.meta" else {
            "data": numpy.frombuffer(draw.randbytes(40 * 3072), dtype=numpy.uint8).reshape(40, 3072), "labels": [*range(10)] * 4}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    shutil.rmtree(folder)
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((tmp_path / "cifar-10-python.tar.gz").read_bytes()).hexdigest())
    monkeypatch.setattr(kind, "train_list", [[n, sums[n]] for n in sums if n.startswith("data")])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]})
    assert hx.main(["--data", "cifar10", "--root", str(tmp_path), "--backbone", "resnet10_narrow", "--hidden", "32", "--epochs",
                    "1", "--batch-size", "64", "--probe-epochs", "1", "--workers", "0", "--out", str(tmp_path / "o"),
                    "--device", "cpu"]) == 0


def test_the_probe_of_separable_features_is_perfect_and_leaves_the_backbone_alone():
    g = torch.Generator().manual_seed(0)
    targets = torch.arange(200) % 4
    pictures = (torch.eye(4)[targets][:, :, None, None] * 200 + torch.rand(200, 4, 8, 8, generator=g) * 20)[:, :3].byte()
    data = hx.Pictures(pictures, targets)
    cfg, _ = hx.parse(["--epochs", "0", "--backbone", "pixels", "--size", "8", "--workers", "0", "--probe-epochs", "20",
                       "--device", "cpu"])
    result = hx.evaluate(hx.build_backbone("pixels", 8)[0], cfg, data, data)
    assert result["top1"] == result["top5"] == result["knn"] == 100


def test_a_probe_with_one_picture_a_class_warns_that_it_holds_none_out(capsys):
    data = hx.draw_shapes(12, 0)                                                # 12 kinds
    cfg, _ = hx.parse(["--epochs", "0", "--backbone", "pixels", "--workers", "0", "--probe-epochs", "2", "--device", "cpu"])
    result = hx.evaluate(hx.build_backbone("pixels", 32)[0], cfg, data, data)
    assert result["held_out"] == 0 and result["train"] == 12
    assert "warning: no class has two labelled pictures" in capsys.readouterr().err


def test_emergence_is_what_loops_count():
    train, val = hx.draw_shapes(60, 0), hx.draw_shapes(24, 1)
    cfg, _ = hx.parse("--workers 0 --device cpu --hidden 16 --dim 8 --quantile 0.9".split())
    model = hx.build_model(cfg)
    got = {key: float(value) for key, value in hx.emergence(model, cfg, train, val).items()}
    model.eval()
    index, views = hx.permutation(60, "fixed").tolist(), hx.Views(train, 32, seed="fixed", crop_min=cfg.crop_min, grey=cfg.grey)
    crops, parameters, *_ = zip(*(views[0, i] for i in index), strict=True)
    with torch.no_grad():
        pair = model(*(hx.augment(torch.stack(crops)[:, v], torch.stack(parameters)[:, v]) for v in (0, 1)))
    z = torch.nn.functional.normalize(torch.cat(pair).double()).tolist()
    rows = [{j: sum(x * y for x, y in zip(z[i], z[j], strict=True)) for j in range(120) if j not in (i, (i + 60) % 120)}
            for i in range(120)]
    eps = sum(sorted(row.values())[round(0.9 * 117)] for row in rows) / 120
    kept = [(i, j) for i, row in enumerate(rows) for j, s in row.items() if s > eps]
    everyone = [(i, j) for i, row in enumerate(rows) for j in row]
    want = dict(threshold=eps, local=len(kept) / 120)
    for labels, name in ((train.targets, ""), (train.coarse, "_coarse")):
        mine = [int(labels[i]) for i in index] * 2
        for pairs, key in ((kept, "purity"), (everyone, "chance")):
            want[key + name] = sum(mine[i] == mine[j] for i, j in pairs) / len(pairs)
    bank = hx.permutation(60, "subset")
    x = torch.stack([hx.Views(train, 32, views=0)[0, int(i)][0][0] for i in bank])
    with torch.no_grad():
        features = model.method.backbone(hx.augment(x, torch.tensor([[0.0, 1, 1, 1, 0, 0, 0, 0]] * 60), colour=False)).double()
    p = numpy.linalg.svd(features.numpy(), compute_uv=False)
    p = p / p.sum()
    want["rankme"] = math.exp(-sum(value * math.log(value) for value in p if value > 0))
    columns = list(zip(*z, strict=True))
    want["std"] = sum(numpy.std(each, ddof=1) for each in columns) / 8 * math.sqrt(8)
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-3), key


def test_label_fractions_are_balanced_and_deterministic():
    cfg, _ = hx.parse(["--label-fraction", "0.1"])
    data = hx.Pictures(torch.zeros(1003, 1), torch.arange(1003) % 7)
    chosen = hx.labelled_pictures(cfg, data)
    assert len(chosen) == 100 and set(data.targets[chosen].bincount().tolist()) == {14, 15}
    assert torch.equal(chosen, hx.labelled_pictures(cfg, data))


def test_labels_of_unequal_classes_and_of_a_list(tmp_path):
    for sizes, fraction, want in (((10, 90), 1.0, [10, 90]), ((10, 90), 0.5, [10, 40]), ((5, 50, 500), 0.1, [5, 25, 26])):
        data = hx.Pictures(torch.zeros(sum(sizes), 1), torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)))
        chosen = hx.labelled_pictures(hx.parse(["--label-fraction", str(fraction)])[0], data)
        assert sorted(data.targets[chosen].bincount().tolist()) == want
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/3.png"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_text("")
    (tmp_path / "val").mkdir()
    folder, listed = hx.Folder(str(tmp_path / "train")), tmp_path / "list"
    cfg, _ = hx.parse(["--data", "folder", "--root", str(tmp_path), "--label-list", str(listed)])
    listed.write_text("b/1.png\r\n2.png\n\n2.png\n")
    assert hx.labelled_pictures(cfg, folder).tolist() == [1, 2]
    for bad in ("1.png", "4.png", ""):                                          # of two pictures, of none, no name at all
        listed.write_text(bad)
        with pytest.raises(hx.UserError, match="--label-list"):
            hx.labelled_pictures(cfg, folder)


def test_micro_batches_give_the_whole_gradient(tmp_path):
    argv = ["--batch-size", "32", "--norm", "group", "--workers", "0", "--device", "cpu"]
    grads = []
    views = hx.Views(hx.draw_shapes(32, 0), 32)
    crops, parameters, *_ = zip(*(views[0, i] for i in range(32)), strict=True)
    for further in ([], ["--micro-batch", "8"]):
        trainer = hx.Trainer(hx.parse(argv + further)[0], views.pictures)
        trainer.gradients(torch.stack(crops), torch.stack(parameters), 5, None, True)
        grads.append([p.grad for p in trainer.model.parameters()])
    for one, many in zip(*grads, strict=True):
        assert (one - many).norm() <= 1e-5 * one.norm() + 1e-8
    assert hx.main(["--micro-batch", "32", "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "o")]) == 2


def test_a_loss_that_is_not_finite_is_skipped_then_stops_the_run(tmp_path, small_shapes, monkeypatch, capsys):
    loss = hx.HEX.loss
    monkeypatch.setattr(hx.HEX, "loss", lambda self, *e, **k: (loss(self, *e, **k)[0] * math.nan, {}))
    data = hx.draw_shapes(1024, 0)
    trainer = hx.Trainer(hx.parse([*SMALL, "--method", "byol"])[0], data)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}      # BatchNorm's statistics among them
    trainer.step(iter(hx.loader(hx.train_views(data, trainer.cfg), trainer.batches, trainer.cfg)))
    assert trainer.skipped == 1 and all(torch.equal(v, trainer.model.state_dict()[k]) for k, v in before.items())
    status, lines = told(capsys, *SMALL, "--epochs", "4", "--out", tmp_path / "o")
    assert status == 1 and "not finite" in lines[0] and not (tmp_path / "o" / "checkpoint.pt").exists()   # of two epochs


def test_two_processes_train_as_one_and_a_stop_and_a_change_of_ranks_change_nothing(tmp_path):
    """The real command, at the recipe's rate: 1 process; 2 ranks; 2 ranks, stopped by a signal and finished by 1."""
    command, two = ["hex.py", *SMALL, "--batch-size", "256", "--norm", "group"], ["-m", "torch.distributed.run",
                                                                                  "--nproc-per-node", "2", "--standalone"]

    def start(out, *launcher):
        return subprocess.Popen([sys.executable, *launcher, *command, "--out", tmp_path / out], stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                cwd=os.path.dirname(hx.__file__))

    def losses(out):
        return [e["loss"] for e in events(tmp_path / out) if e["event"] == "step"]

    for out, launcher in (("one", []), ("two", two)):
        run = start(out, *launcher)
        assert run.communicate()[0] is not None and run.returncode == 0
    run, metrics = start("stopped", *two), tmp_path / "stopped" / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and '"step": 6' in metrics.read_text()):
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    told = run.communicate()[0]
    assert told.count("interrupted, run the same command again") == 1 and 6 <= len(losses("stopped")) < 32
    run = start("stopped")
    assert run.communicate()[0] is not None and run.returncode == 0
    one = losses("one")
    assert len(one) == 32 and one[0] - one[19] > 0.1
    for other in ("two", "stopped"):
        assert losses(other)[:20] == pytest.approx(one[:20], abs=1e-4) and len(losses(other)) == 32


BAD = [
    ("--bogus", 2, "--bogus"), ("--loss nce", 2, "--loss"), ("--method mocov2", 2, "--method"), ("--data mnist", 2, "--data"),
    ("--quantile 0", 2, "--quantile"), ("--quantile 1", 2, "--quantile"), ("--quantile x", 2, "--quantile"),
    ("--tau-plus 1", 2, "--tau-plus"), ("--beta -1", 2, "--beta"), ("--temperature 0", 2, "--temperature"),
    ("--alpha 2", 2, "--alpha"), ("--epochs -1", 2, "--epochs"), ("--batch-size 1", 2, "--batch-size"),
    ("--lr 0", 2, "--lr"), ("--amp fp8", 2, "--amp"), ("--seed 1.5", 2, "--seed"), ("--workers -1", 2, "--workers"),
    ("--loss infonce --beta 2", 2, "--loss infonce"), ("--loss base --alpha 0.5", 2, "--loss base"),
    ("--loss released --tau-plus 0.2", 2, "released"), ("--threshold step --quantile 0.9", 2, "--threshold step"),
    ("--queue 8", 2, "--method simclr"), ("--loss base --method byol --temperature 1", 2, "--temperature"),
    ("--root x", 2, "--root"), ("--skip-bad-files", 2, "--skip-bad-files"), ("--data folder", 2, "--root"),
    ("--data folder --root nowhere", 2, "nowhere"), ("--data folder --root flat", 2, "train"),
    ("--data folder --root odd", 1, "different classes"), ("--data folder --root flatval", 1, "val"),
    ("--data cifar10 --threshold oracle", 2, "oracle"), ("--hex-warmup 3 --epochs 3", 2, "--hex-warmup"),
    ("--batch-size 100000", 2, "--batch-size"),
    ("--lr-warmup 3 --epochs 3", 2, "--lr-warmup"), ("--lr 1e39", 2, "--lr"), ("--seed 99999999999999999999", 2, "--seed"),
    ("--dim 2000000000 --hidden 2000000000", 2, "--hidden"), ("--backbone vit_b_16 --size 33", 2, "--size 33"),
    ("--blur 0.5 --size 16", 2, "--blur"), ("--data folder --root spaces --classes text", 1, "not a file of tensors"),
    ("--data folder --root spaces", 1, "val/"), ("--micro-batch 128", 2, "BatchNorm"),
    ("--backbone resnet19", 2, "resnet18"), ("--backbone squeezenet1_0", 2, "Linear"),
    ("--backbone vgg11 --norm group", 2, "--norm group"), ("--probe nowhere.pt", 2, "nowhere.pt"),
    ("--probe text --backbone resnet18", 1, "text"), ("--label-fraction 0.0001", 2, "--label-fraction"),
    ("--label-fraction 2", 2, "--label-fraction"), ("--out text", 1, "text"), ("--out flat", 1, "flat"),
    ("--micro-batch 7", 2, "--micro-batch"), ("--device cuda", 2, "--device cuda"),
    ("--probe text --backbone resnet18 --loss hex", 2, "--probe"), ("--backbone pixels", 2, "--epochs 0"),
]


@pytest.mark.parametrize("argv, status, word", BAD, ids=[each[0] for each in BAD])
def test_bad_input_is_one_clear_line(argv, status, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "text").write_text("not a file of tensors")
    for path in ("flat/x", "odd/train/a", "odd/train/b", "odd/val/a", "odd/val/c", "flatval/train/a", "flatval/val",
                 "spaces/train/a b", "spaces/val/a b"):
        (tmp_path / path).mkdir(parents=True)
    for path in ("odd/train/a/1.jpg", "odd/train/b/1.jpg", "odd/val/a/1.jpg", "odd/val/c/1.jpg", "flatval/train/a/1.jpg",
                 "flatval/val/1.jpg", "spaces/train/a b/1.jpg"):
        (tmp_path / path).write_text("")
    monkeypatch.setattr(hx, "draw_shapes", lambda count, seed, draw=hx.draw_shapes: draw(count // 16, seed))
    got = hx.main(argv.split())
    out, err = capsys.readouterr()
    *notes, line = (each for each in err.splitlines() if each and "step [" not in each)   # not the bar
    assert got == status and line.startswith("hex.py: error: ") and word in line and out == ""
    assert all(each.startswith(("note: ", "probe: ", "runs/")) for each in notes) and "Traceback" not in err
    assert (tmp_path / "text").read_text() == "not a file of tensors" and os.listdir(tmp_path / "flat") == ["x"]
    assert not os.path.exists("runs")                                           # nothing that the mended command would meet


@pytest.mark.parametrize("argv, word", [("--batch-size 256", "--batch-size 256"),
                                        ("--batch-size 30 --micro-batch 10", "--micro-batch 10")])
def test_a_batch_that_does_not_divide_over_ranks(argv, word, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    status, lines = told(capsys, *argv.split())
    assert status == 2 and len(lines) == 1 and word in lines[0] and "3 ranks" in lines[0]
