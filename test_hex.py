# SPDX-License-Identifier: MIT
"""Tests of hex.py.

The order: the loss against loops, closed forms and the authors' numbers; the methods; views and
backbones against torchvision; training against a plain loop and against recorded numbers; the
probe; pictures; the life of a run; several ranks; a GPU that is not there.
"""
import contextlib
import copy
import fcntl
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import tarfile
import textwrap
import time
import types
from functools import partial
from itertools import product
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

import hex as hx

torch.set_num_threads(1)

# The drawn pictures, of which the tests use fewer: 7 batches of 16 to train on, and 48.
DRAW = hx.draw_shapes
hx.draw_shapes = lambda count, seed: DRAW({4096: 112, 1024: 48}[count], seed)


# --- Two of torchvision's models, made small --------------------------------------------------
def vit_b_32(image_size=224):
    """A small ViT. It has dropout, and its activations are smooth."""
    return torchvision.models.VisionTransformer(image_size, 4, 2, 2, 16, 32, dropout=0.1)


def wide_resnet50_2(**options):
    """A small ResNet, with BatchNorm."""
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [1, 1, 1, 1], width_per_group=4, **options)


for builder in (vit_b_32, wide_resnet50_2):
    original = torchvision.models.get_model_builder(builder.__name__)
    builder.__module__ = original.__module__
    torchvision.models._api.BUILTIN_MODELS[builder.__name__] = builder


# --- The loss: helpers ------------------------------------------------------------------------
FORMS = ["info_nce", "dcl", "hex", "decoupled", "released"]
THRESHOLDS = dict(
    quantile=hx.AdaptiveThreshold,
    rescaled=lambda value: hx.StepThreshold(value, 0, 1),
    above=float,
    labels=lambda labels: hx.OracleHierarchy(torch.as_tensor(labels)),
)


def two_views(N, D=12, spread=2.0):
    """Two views of N images in float64: of the first image alike, of the last hardly related."""
    g = torch.Generator().manual_seed(N)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    image, noise, length = draw(N, D), draw(N, D), draw(N, 2)
    distance = torch.linspace(0.1, spread, N, dtype=torch.float64)[:, None]
    a = image * length[:, :1].exp()
    b = (image + distance * noise) * length[:, 1:].exp()
    return a, b


def ours(form, a, b, t=0.1, H=("quantile", 0.99), **knobs):
    """A loss of hex.py, and its statistics. H: how negatives become local."""
    kind, value = H
    threshold = THRESHOLDS[kind](value)
    if form in ("info_nce", "dcl"):
        return getattr(hx, form)(a, b, t), {}
    if form == "released":
        return hx.released(a, b, t, threshold=threshold)
    return hx.hex_nce(a, b, t, threshold=threshold, decoupled=form == "decoupled", **knobs)


def naive(form, a, b, t=0.1, H=("quantile", 0.99), beta=1.0, tau_plus=0.1):
    """The same, written from the equations, an anchor and a negative at a time.

    What carries no gradient (eps, H, Q, the floor) is a Python float.
    """
    N, n = len(a), 2 * len(a)
    kind, value = H
    z = torch.stack([row / row.dot(row).sqrt() for row in (*a, *b)])
    s = [row.unbind() for row in (z @ z.T).unbind()]
    v = (z @ z.T).tolist()
    negatives = [[j for j in range(n) if j % N != i % N] for i in range(n)]

    eps = value
    if kind == "quantile":
        rows = [[v[i][j] for j in negatives[i]] for i in range(n)]
        rows = v if form == "released" else rows
        eps = sum(sorted(row)[round(value * (len(row) - 1))] for row in rows) / n

    def is_local(i, j):
        if kind == "labels":
            return value[i % N] == value[j % N]
        if kind == "rescaled":
            return (v[i][j] - min(v[i])) / (max(v[i]) - min(v[i])) > eps
        return v[i][j] > eps

    losses, sizes, clamped = [], [], 0
    for i in range(n):
        e = [(x / t).exp() for x in s[i]]
        p = (i + N) % n
        local = [j for j in negatives[i] if is_local(i, j)]
        positive, size = e[p], len(local)
        far = sum((e[j] for j in negatives[i] if j not in local), 0 * positive)

        w = [math.exp(beta * v[i][h] / t) for h in local]
        near = sum(wh * size / sum(w) * e[h] for wh, h in zip(w, local))
        near = (near - tau_plus * size * positive) / (1 - tau_plus)
        floor = size * math.exp(-1 / t)
        if size and near.item() < floor:
            near, clamped = floor, clamped + 1

        constant = 0
        if form == "info_nce":
            total = positive + sum(e[j] for j in negatives[i])
        elif form == "dcl":
            total = sum(e[j] for j in negatives[i])
        elif form == "released":
            total = far if size < n - 2 else 1 + 0 * far
            constant = (n - 2) * math.exp(-1 / t)
        else:
            total = far + near + (form == "hex") * positive
        losses.append(total.log() - s[i][p] / t + constant)
        sizes.append(size)

    some = sum(size > 0 for size in sizes)
    stats = dict(local=sum(sizes) / n, empty=1 - some / n)
    stats["threshold"] = math.nan if kind == "labels" else eps
    if form != "released":
        stats["clamped"] = clamped / max(some, 1)
    return sum(losses) / n, stats


def graded(f, *embeddings):
    """The loss, its gradient in each of the embeddings, and the statistics as floats."""
    embeddings = [x.detach().clone().requires_grad_() for x in embeddings]
    loss, stats = f(*embeddings)
    loss.backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in embeddings]
    return loss.detach(), torch.stack(grads), {k: float(v) for k, v in stats.items()}


def assert_same(got, want, tol=1e-10):
    """Loss and gradient, with their dtypes, and the statistics that both have."""
    torch.testing.assert_close(got[:2], want[:2], rtol=tol, atol=tol)
    both = got[2].keys() & want[2].keys()
    mine, theirs = ({k: stats[k] for k in both} for stats in (got[2], want[2]))
    assert mine == pytest.approx(theirs, abs=tol, nan_ok=True)


# --- The loss ---------------------------------------------------------------------------------
KNOBS = list(product([0.02, 0.1, 0.5], [0.5, 0.9, 0.99], [0.0, 0.5, 1.0, 2.0], [0.0, 0.05, 0.1]))
GRID = [dict(t=t, H=("quantile", q), beta=beta, tau_plus=plus) for t, q, beta, plus in KNOBS]
FIXED = [
    dict(H=("rescaled", 0.0)), dict(H=("rescaled", 0.5)), dict(H=("rescaled", 0.9)),
    dict(H=("above", 0.1)), dict(H=("above", -2)),
    dict(H=("labels", [0, 0, 1, 2, 2, 2, 3])), dict(H=("labels", [0] * 7)),
]
CASES = {2: GRID[::5], 3: GRID[::5], 5: GRID[::7], 17: GRID[::17], 26: GRID[::37], 7: FIXED}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("N", CASES)
def test_loss_gradient_and_statistics_are_those_of_loops(form, N):
    for knobs in CASES[N]:
        want = graded(partial(naive, form, **knobs), *two_views(N))
        got = graded(partial(ours, form, **knobs), *two_views(N))
        assert_same(got, want)


def on_circle(angle):
    """Three images, of which one is at this angle."""
    a, b = torch.tensor([[0.0, 0.4 + angle, 3.0], [0.3, 1.6, 3.5]], dtype=torch.float64)
    return [torch.stack([x.cos(), x.sin()], 1) for x in (a, b)]


@pytest.mark.parametrize("form", ["hex", "decoupled"])
def test_the_floor_just_above_and_just_below_and_an_empty_neighborhood(form):
    knobs = dict(t=0.5, H=("above", 0.2), tau_plus=0.3)

    def clamped(angle):
        return naive(form, *on_circle(angle), **knobs)[1]["clamped"]

    low, high = 0.3, 0.7
    assert clamped(low) != clamped(high)
    while high - low > 1e-9:
        middle = (low + high) / 2
        if clamped(middle) == clamped(low):
            low = middle
        else:
            high = middle

    for angle in (low - 1e-7, high + 1e-7):
        got = graded(partial(ours, form, **knobs), *on_circle(angle))
        assert_same(got, graded(partial(naive, form, **knobs), *on_circle(angle)))
        assert 0 < got[2]["empty"] < 1


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_with_a_learnable_temperature(form):
    """Where H cannot flip, and Q is 1: elsewhere Q and eps are held still on purpose."""
    knobs = dict(beta=0.0) if form in ("hex", "decoupled") else {}
    f = partial(ours, form, H=("rescaled", 0.3), **knobs)
    for t in (0.3, 0.1):
        inputs = *two_views(4), torch.tensor(t, dtype=torch.float64)
        inputs = [x.requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(lambda *e: f(*e)[0], inputs)


NOBODY = ("labels", [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("H", [("quantile", 0.99), ("rescaled", 0.5), ("labels", [0] * 6), NOBODY])
def test_equal_embeddings_and_zeros_give_a_finite_loss_and_gradient(form, H):
    ones = torch.ones(6, 4)
    spread, _ = two_views(6)
    half = ones.clone()
    half[0] = 0
    for data in (ones, 0 * ones, half, spread.float()):
        loss, grad, _ = graded(partial(ours, form, H=H), data, data)
        assert loss.isfinite() and grad.isfinite().all() and grad.norm() < 1e3


@pytest.mark.parametrize("form", ["info_nce", "hex"])
def test_the_loss_of_equal_embeddings_is_the_logarithm_of_their_number(form):
    loss, _ = ours(form, torch.ones(6, 4), torch.ones(6, 4), H=NOBODY)
    assert loss.item() == pytest.approx(math.log(11), abs=1e-5)


@pytest.mark.parametrize("form, shift, t, fixed, loss, norm_a, grad_a, grad_b", [
    ("released", 0, 0.1, None, -0.209686502289, 0.124583599879, -0.002105660922, 0.002185973938),
    ("released", 0, 0.1, 0.9, 0.057173995355, 0.123146161097, -0.000531205316, 0.002199590476),
    ("info_nce", 0, 0.1, None, 0.768578547087, 0.071991750913, -0.000654980593, 0.001015350352),
    ("released", .5, 0.2, None, 3.774087621686, 0.055683415691, -0.000110334815, -0.000175189849),
    ("released", .5, 0.2, 0.7, 3.138836540220, 0.056886314000, -0.000140903878, -0.000069540890)])
def test_the_authors_numbers(form, shift, t, fixed, loss, norm_a, grad_a, grad_b):
    """What github.com/olivesgatech/HEX @ c3002ed computes in float64, for SimCLR and NNCLR."""
    i = torch.arange(128, dtype=torch.float64)[:, None]
    j = torch.arange(16, dtype=torch.float64)
    group = torch.sin((i % 10 + 1) * (j + 1) * 1.3 + shift)
    image = group + 0.8 * torch.sin(i * (j + 2) * 0.7 + 2 * shift)
    a = image + 0.3 * torch.sin(i * (j + 3) * 1.1 + 3 * shift)
    b = image + 0.3 * torch.cos(i * (j + 4) * 0.9 + 4 * shift)

    H = ("rescaled", fixed) if fixed else ("quantile", 0.99)
    value, (da, db), _ = graded(partial(ours, form, t=t, H=H), a, b)
    got = [x.item() for x in (value, da.norm(), da[0, 0], db[5, 0])]
    assert got == pytest.approx([loss, norm_a, grad_a, grad_b], rel=0, abs=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_costs_its_own_rounding_and_autocast_costs_nothing(form):
    a, b = (x.float() for x in two_views(17))
    f = partial(ours, form, t=0.3, H=("rescaled", 0.6))
    exact = graded(f, a, b)
    assert_same(graded(torch.autocast("cpu", dtype=torch.bfloat16)(f), a, b), exact, 1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        loss, grad, _ = graded(f, a.to(dtype), b.to(dtype))
        assert loss.dtype == torch.float32 and grad.isfinite().all()
        assert abs(loss - exact[0]) < 1e-2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("t", [0.02, 0.005])
def test_low_temperatures_in_float32(form, t):
    """e^(1/t) is beyond float32, and float32's rounding of s is divided by t."""
    f, (a, b) = partial(ours, form, t=t), two_views(17)
    loss, grad, _ = graded(f, a.float(), b.float())
    want, want_grad, _ = graded(f, a, b)
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    assert (grad - want_grad).norm() < 1e-3 * want_grad.norm()


x = torch.ones(4, 3)


@pytest.mark.parametrize("call, words", [
    (lambda: hx.info_nce(x, x, 0.0), "temperature = 0.0"),
    (lambda: hx.info_nce(x, x[:3]), r"\(4, 3\).*\(3, 3\)"),
    (lambda: hx.dcl(x[0], x[0]), r"\(3,\)"),
    (lambda: hx.hex_nce(x[:1], x[:1]), "N = 1"),
    (lambda: hx.hex_nce(x, x, beta=-1), "beta = -1"),
    (lambda: hx.hex_nce(x, x, tau_plus=1), "plus = 1"),
    (lambda: hx.hex_nce(x, x, threshold="a"), "'a'"),
    (lambda: hx.hex_nce(x, x, threshold=hx.OracleHierarchy(x[:3, 0])), "labels"),
    (lambda: hx.AdaptiveThreshold(1.0), "quantile = 1.0"),
    (lambda: hx.HEX(nn.Identity(), "nce"), "'nce'"),
    (lambda: hx.HEX(nn.Bilinear(3, 3, 2))(x, x), "tensor")])
def test_a_refusal_names_argument_and_value(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("threshold, want", [
    (hx.StepThreshold(0.9, 0.1, 10), {0: 0.9, 9: 0.9, 10: 0.8, 45: 0.5, 90: 0.0, 500: 0.0}),
    (hx.CosineThreshold(0.9, 0.3, 100), {0: 0.9, 25: 0.6 + 0.3 * 0.5 ** 0.5, 50: 0.6, 300: 0.3})])
def test_schedules_have_no_state(threshold, want):
    for epoch in [*want, *reversed(want)]:
        got = graded(partial(hx.hex_nce, threshold=threshold, epoch=epoch), *two_views(5))
        assert_same(got, graded(partial(naive, "hex", H=("rescaled", want[epoch])), *two_views(5)))


# --- Methods ----------------------------------------------------------------------------------
HEADS = dict(
    simclr={}, nnclr=dict(predictor=8, queue=10), mocov3=dict(predictor=8),
    byol=dict(predictor=8), simsiam=dict(predictor=8), barlow={}, vicreg={})
COUNT = dict(simclr=2, nnclr=4, mocov3=6, byol=6, simsiam=4, barlow=2, vicreg=2)


def method(name, **more):
    """A small one in float64, with the same weights each time."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh())
    return hx.METHODS[name](backbone, 16, hidden=8, dim=6, **HEADS[name], **more).double()


def embeddings(name, N=8):
    g = torch.Generator().manual_seed(1)
    return 0.8 * torch.randn(COUNT[name], N, 6, generator=g).double()


def own_by_hand(name, e, queue):
    """The loss of each method's paper, of its embeddings e (count, N, 6)."""
    u = F.normalize(e, dim=2)
    off = 1 - torch.eye(6)

    def nce(a, b, t):
        return ((a @ b.T / t).logsumexp(1) - (a * b).sum(1) / t).mean()

    def cosine(i, j):
        return (u[i] * u[j]).sum(1).mean()

    def standard(x):
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()

    if name == "simclr":
        return naive("info_nce", *e)[0]
    if name == "nnclr":
        near1, near2 = (queue[(z @ queue.T).argmax(1)] for z in u[2:])
        return (nce(near1, u[1], 0.1) + nce(near2, u[0], 0.1)) / 2
    if name == "mocov3":
        return 2 * (nce(u[0], u[5], 1.0) + nce(u[1], u[4], 1.0))
    if name == "byol":
        return 4 - 2 * cosine(0, 5) - 2 * cosine(1, 4)
    if name == "simsiam":
        return -(cosine(0, 3) + cosine(1, 2)) / 2
    if name == "barlow":
        c = standard(e[0]).T @ standard(e[1]) / e.shape[1]
        on_diagonal = (1 - c.diagonal()).square().sum()
        return 0.1 * (on_diagonal + 0.0051 * (off * c).square().sum())
    loss = 25 * (e[0] - e[1]).square().mean()
    for z in e:
        c = z.T.cov()
        loss += 25 * (1 - (c.diagonal() + 1e-4).sqrt()).clamp(min=0).mean()
        loss += (off * c).square().sum() / 6
    return loss


@pytest.mark.parametrize("name", HEADS)
def test_the_own_loss_is_the_papers(name):
    made, e = method(name), embeddings(name)
    loss, grad, _ = graded(lambda *e: (made.loss(*e)[0], {}), *e)
    want = own_by_hand(name, e, made.state_dict().get("queue")).item()
    assert loss.item() == pytest.approx(want, rel=1e-6)
    if name in ("simsiam", "nnclr"):
        assert not grad[2:].any()               # what is predicted is held still


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_reaches_every_parameter(name):
    model = hx.HEX(method(name), threshold=hx.AdaptiveThreshold(0.8))
    x1, x2 = torch.linspace(-2, 2, 192).sin().view(2, 8, 3, 2, 2).double()
    loss, stats = model.loss(*model(x1, x2 + x1.roll(1, 0) ** 2))
    loss.backward()
    for key, p in model.named_parameters():
        shifts_a_norm = (name, key) == ("nnclr", "method.projector.7.bias")
        assert not p.requires_grad or shifts_a_norm or p.grad.norm() > 1e-9, key
    assert {"own", "hex", "threshold", "local", "empty", "clamped"} == stats.keys()


@pytest.mark.parametrize("name, alpha", [*product(HEADS, [None, 1.0])])
def test_every_loss_gives_every_parameter_a_gradient(name, alpha):
    """DDP waits for one, even where alpha = 1 leaves the predictor out of the loss."""
    for loss in hx.LOSSES:
        model = hx.HEX(method(name), loss, alpha=alpha)
        x1, x2 = torch.linspace(-2, 2, 192).view(2, 8, 3, 2, 2).double()
        value, _ = model.loss(*model(x1, x2))
        value.backward()
        assert value.isfinite()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("loss", hx.LOSSES)
@pytest.mark.parametrize("name, given, alpha, scale", [
    ("vicreg", None, 0.1, 5), ("vicreg", 0.7, 0.7, 5), ("mocov3", None, 1, 1)])
def test_alpha_and_scale_and_the_mean_over_pairs(loss, name, given, alpha, scale):
    made, e = method(name), embeddings(name)
    knobs = dict(beta=0.5, tau_plus=0.2)
    want, pairs = made.loss(*e)
    if loss != "base":
        form = {"infonce": "info_nce"}.get(loss, loss)
        terms = [naive(form, *pair, t=0.3, **knobs)[0] for pair in pairs]
        want = (1 - alpha) * want + alpha * scale * sum(terms) / len(terms)
    got, _ = hx.HEX(made, loss, alpha=given, temperature=0.3, **knobs).loss(*e)
    assert float(got) == pytest.approx(float(want), rel=1e-9)


def test_the_warm_up_is_the_own_loss_or_a_fixed_threshold():
    made, e = method("vicreg"), embeddings("vicreg")
    own, _ = made.loss(*e)
    falling = hx.StepThreshold(1.2, 0.1, 1)                     # 0.9 at epoch 3
    late, _ = hx.HEX(made, threshold=hx.StepThreshold(0.9, 0, 1)).loss(*e)
    fixed, _ = hx.HEX(made, threshold=0.2).loss(*e)
    for more, early in (({}, own), (dict(warmup_threshold=0.2), fixed)):
        model = hx.HEX(made, threshold=falling, warmup=3, **more)
        for epoch, want in ((0, early), (2, early), (3, late)):
            torch.testing.assert_close(model.loss(*e, epoch=epoch)[0], want)


def test_a_threshold_can_be_of_one_batch_alone():
    e, oracle = embeddings("vicreg"), hx.OracleHierarchy(torch.arange(8) // 3)
    want, _ = hx.HEX(method("vicreg"), threshold=oracle).loss(*e)
    got, _ = hx.HEX(method("vicreg"), threshold=0.5).loss(*e, threshold=oracle)
    assert torch.equal(got, want)


def test_the_queue_takes_the_first_views_of_every_loss_and_the_oldest_leave_it():
    made = method("nnclr")                          # it has a queue of 10
    before = made.queue.clone()
    outputs = torch.arange(1.0, 145).sin().double().view(2, 4, 3, 6)
    made.after_step(0.5, outputs)
    torch.testing.assert_close(made.queue[-6:], F.normalize(outputs[:, 2].flatten(0, 1)))
    torch.testing.assert_close(made.queue[:4], before[-4:])


def test_the_last_batch_norm_has_no_weights():
    for head in (
            method("simsiam").projector, method("mocov3").projector, method("mocov3").predictor):
        assert [*head[-1].state_dict()] == ["running_mean", "running_var", "num_batches_tracked"]


def test_the_module_of_the_readme_runs():
    folder = os.path.dirname(hx.__file__)
    with open(os.path.join(folder, "README.md"), encoding="utf-8") as file:
        code = file.read().partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code, names)
    assert names["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in names["model"].parameters())


# --- Views ------------------------------------------------------------------------------------
def config(text=""):
    return hx.parse(f"--workers 0 --device cpu {text}".split())


def random_pictures(count, *shape, classes=None):
    """Pictures of noise, with labels in turn."""
    g = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (count, 3, *shape), generator=g).byte()
    return hx.Pictures(pictures, classes and torch.arange(count) % classes)


def resized(crop, size):
    return TF.resize(crop, [size, size], TF.InterpolationMode.BICUBIC, antialias=True)


def normalized(x, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    return TF.normalize(x, list(mean), list(std))


def view_by_hand(crop, parameters):
    """One view by torchvision's own operators, before it is normalized."""
    flip, brightness, contrast, saturation, hue, gray, sigma, solarize = parameters.tolist()
    x = crop.float() / 255
    if flip:
        x = TF.horizontal_flip(x)
    x = TF.adjust_brightness(x, brightness)
    x = TF.adjust_contrast(x, contrast)
    x = TF.adjust_saturation(x, saturation)
    x = TF.adjust_hue(x, hue)
    if gray:
        x = TF.rgb_to_grayscale(x, 3)
    if sigma:
        x = TF.gaussian_blur(x, [13, 13], [sigma, sigma])
    if solarize:
        x = TF.solarize(x, 0.5)
    return x


def batch_by_hand(batch, *mean_std):
    views = [view_by_hand(*each) for each in zip(batch.crops, batch.changes)]
    return normalized(torch.stack(views), *mean_std)


PARAMETERS = [
    # flip, brightness, contrast, saturation, hue, gray, sigma, solarize
    [1, 1.5, 0.4, 1.7, 0.15, 0, 1.3, 1],
    [0, 0.3, 1.8, 0.2, -0.2, 1, 0.0, 0],
    [1, 1.0, 1.0, 1.0, 0.00, 0, 0.1, 0],
    [0, 1.8, 1.2, 0.9, 0.05, 0, 2.0, 1],
    [0, 1.0, 1.0, 1.0, 0.00, 0, 0.0, 0],
    [1, 0.7, 0.6, 0.5, -0.1, 1, 0.7, 1],
]


@pytest.mark.parametrize("data, mean_std", [
    ("shapes", ()),
    ("cifar10", ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))])
def test_a_batch_is_augmented_as_torchvision_does_it_picture_by_picture(data, mean_std):
    crops = random_pictures(6, 40, 40).pictures
    batch = hx.Batch(crops, torch.tensor(PARAMETERS), torch.arange(3))
    got = hx.augment(batch, config(f"--data {data} --blur 0 1 --solarize 1 0"))
    # A hue near the border of two sixths of the circle may lose a few units in its last place.
    want = batch_by_hand(batch, *mean_std)
    torch.testing.assert_close(got.contiguous(), want, rtol=0, atol=2e-5)


DRAWS = (
    "--size 8 --crop-min 0.3 --jitter 0.4 0.3 0.2 0.1 --grayscale 0.25 --blur 1 0.1 "
    "--solarize 0 0.2")


def test_crops_lie_in_the_picture_and_have_the_areas_and_ratios_of_the_options(monkeypatch):
    draw, boxes = hx.random_box, []

    def recorded(*args):
        boxes.append(draw(*args))
        return boxes[-1]

    monkeypatch.setattr(hx, "random_box", recorded)
    pictures = random_pictures(300, 120, 100)
    views = hx.Views(pictures, config(DRAWS))
    for i in range(300):
        crops = views[[(0, i)]].crops
        assert torch.equal(crops[1], resized(TF.crop(pictures.read(i), *boxes[-1]), 8))

    top, left, h, w = torch.tensor(boxes).T
    assert top.min() == 0 == left.min()
    assert (top + h).max() == 120 and (left + w).max() == 100
    share, ratio = h * w / 12000, w / h
    assert 0.29 < share.min() < 0.32 and share.max() > 0.9 and share.mean() < 0.65
    assert 0.73 < ratio.min() < 0.78 and 1.25 < ratio.max() < 1.36


def test_the_changes_that_are_drawn_have_the_shares_and_ranges_of_the_options():
    views = hx.Views(random_pictures(50, 9, 9), config(DRAWS))
    keys = [(epoch, i) for epoch in range(12) for i in range(50)]
    drawn = torch.stack(views[keys].changes.chunk(2), 1)
    flip, *jitter, gray, sigma, solarize = drawn.unbind(-1)     # (600, 2): of view 1 and 2

    shares = [flip.mean(), gray.mean(), *(sigma > 0).float().mean(0), *solarize.mean(0)]
    assert torch.stack(shares).tolist() == pytest.approx([0.5, 0.25, 1, 0.1, 0, 0.2], abs=0.05)
    assert 0.1 <= sigma[:, 0].min() < 0.15 and 1.9 < sigma[:, 0].max() <= 2

    jittered = jitter[0] != 1
    assert jittered.float().mean().item() == pytest.approx(0.8, abs=0.04)
    for each, none, most in zip(jitter, (1, 1, 1, 0), (0.4, 0.3, 0.2, 0.1)):
        assert torch.equal(each != none, jittered)
        change = each - none
        assert 0.95 * most < change.max() < 1.001 * most
        assert 0.95 * most < -change.min() < 1.001 * most


def test_a_view_is_a_function_of_seed_epoch_index_and_view_alone():
    pictures = DRAW(6, 3)
    views = hx.Views(pictures, config("--seed 5"))
    reseeded = hx.Views(pictures, config("--seed 6"))
    first, second = views[[(2, 0)]].changes
    assert torch.equal(views[[(1, 4), (2, 0)]].changes[1], first)
    others = [second, views[[(3, 0)]].changes[0], views[[(2, 1)]].changes[0]]
    for other in [*others, reseeded[[(2, 0)]].changes[0]]:
        assert (first[1:5] != other[1:5]).all()             # all of them are jittered


@pytest.mark.parametrize("shape", [(1, 20000), (20000, 1)])
def test_a_picture_that_is_a_line_is_cropped_too(shape):
    pictures = hx.Pictures(torch.zeros(1, 3, *shape).byte(), None)
    assert hx.Views(pictures, config("--size 224"))[[(0, 0)]].crops.shape == (2, 3, 224, 224)


@pytest.mark.parametrize("size, side", [(32, 128), (224, 112)])
def test_the_centre_crop_is_224_of_256_and_small_pictures_are_whole(size, side):
    pictures = random_pictures(1, 128, 160)
    batch = hx.Views(pictures, config(f"--size {size}"), views=0)[[(0, 0)]]
    want = resized(TF.center_crop(pictures.read(0), [side, side]), size)
    assert torch.equal(batch.crops, want[None])
    assert batch.changes.tolist() == [[0, 1, 1, 1, 0, 0, 0, 0]]


# --- Backbones --------------------------------------------------------------------------------
def same_weights(build):
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize("name, size", [
    ("resnet18", 96), ("vit_b_32", 32), ("mobilenet_v3_small", 64)])
def test_a_backbone_is_torchvisions_model_up_to_its_last_linear(name, size):
    options = dict(image_size=size) if name.startswith("vit") else {}
    theirs = same_weights(lambda: torchvision.models.get_model(name, **options))
    mine = same_weights(lambda: hx.build_backbone(name, size)[0])
    *_, last = (each for each in theirs.modules() if isinstance(each, nn.Linear))
    seen = []
    last.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.linspace(-1, 1, 2 * 3 * size * size).sin().view(2, 3, size, size)
    with torch.no_grad():
        theirs(x)
        torch.testing.assert_close(mine(x), seen[0])


def test_a_resnet_of_small_pictures_has_a_3x3_stem_and_no_max_pool():
    model, width = hx.build_backbone("resnet18", 64)
    theirs = torchvision.models.resnet18()
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = theirs.fc = nn.Identity()
    theirs.load_state_dict(model.state_dict())
    x = torch.linspace(-1, 1, 3 * 64 * 64).sin().view(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), theirs.eval()(x))
    assert width == 512
    spread = (2 / (64 * 9)) ** 0.5                          # Kaiming's, of the fan out
    assert model.conv1.weight.std().item() == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("channels, groups", [(8, 1), (48, 3), (128, 8), (20, 1)])
def test_group_norm_has_16_channels_a_group_where_they_divide(channels, groups):
    assert hx.group_norm(channels).num_groups == groups


# --- The command against a plain loop -----------------------------------------------------------
SMALL = (
    "--epochs 2 --batch-size 16 --hidden 32 --dim 16 --probe-epochs 2 --workers 0 --log-every 1 "
    "--device cpu --lr 0.5 --lr-warmup 1 --hex-warmup 0").split()
SHORT = [*SMALL, *"--epochs 1 --lr-warmup 0 --probe-epochs 1".split()]


def run(*argv):
    """The command, in this process. Its exit status."""
    return hx.main([str(each) for each in argv])


def events(out, kind=""):
    """What metrics.jsonl holds, of one kind or all, but for what a clock says."""
    found = [json.loads(line) for line in open(out / "metrics.jsonl")]
    for event in found:
        event.pop("images_per_second", None)
        event.pop("data_wait", None)
    return [event for event in found if kind in event["event"]]


def losses(out):
    return [event["loss"] for event in events(out, "step")]


def lars_by_hand(weights, velocity, lr, cfg):
    for p, v in zip(weights, velocity, strict=True):
        if p.ndim > 1:                                      # not for biases and norms
            norm = p.norm()
            factor = cfg.eta * norm / (p.grad.norm() + cfg.weight_decay * norm + 1e-8)
            if cfg.clip:
                factor = min(factor / lr, 1)
            p.grad = factor * (p.grad + cfg.weight_decay * p)
        v.mul_(0.9).add_(p.grad)
        p.sub_(lr * v)
        p.grad = None


def loss_by_hand(cfg, method, target, x, epoch, labels):
    z = method.projector(method.backbone(x))
    if cfg.method == "byol":
        with torch.no_grad():
            t1, t2 = target(x).chunk(2)
        p1, p2 = method.predictor(z).chunk(2)
        cosine = F.cosine_similarity(p1, t2) + F.cosine_similarity(p2, t1)
        own = 4 - 2 * cosine.mean()
    else:
        own, _ = naive("info_nce", *z.double().chunk(2), cfg.temperature)
    if epoch < cfg.hex_warmup:
        return own, {}

    H = ("labels", labels) if cfg.threshold == "oracle" else ("quantile", cfg.quantile)
    z1, z2 = z.double().chunk(2)
    value, stats = naive("hex", z1, z2, cfg.temperature, H, cfg.beta, cfg.tau_plus)
    return (1 - cfg.alpha) * own + cfg.alpha * value, stats


def learning_rates(peak, total, warm):
    for step in range(total):
        if step < warm:
            yield peak * (step + 1) / warm
        else:
            yield peak * (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2


def plain_loop(cfg, train):
    """The backbone, and for each step what the log should say."""
    method = hx.build_model(cfg).train().method
    views, log = hx.Views(train, cfg), []
    online = nn.Sequential(method.backbone, method.projector)
    target = copy.deepcopy(online)
    weights = [p for name, p in method.named_parameters() if "target" not in name]
    velocity = [torch.zeros_like(p) for p in weights]
    size, count = cfg.batch_size, cfg.accumulate
    per_epoch = len(train) // (size * count)
    total = cfg.epochs * per_epoch
    rates = learning_rates(cfg.lr * size * count / 256, total, cfg.lr_warmup * per_epoch)

    for step, lr in enumerate(rates):
        epoch = step // per_epoch
        order = hx.permutation(len(train), cfg.seed, "order", epoch)
        rows = order.split(size)[step % per_epoch * count:][:count]
        parts = []
        for row in rows:
            x = batch_by_hand(views[[(epoch, i) for i in row.tolist()]])
            labels = train.coarse[row].tolist()
            loss, stats = loss_by_hand(cfg, method, target, x, epoch, labels)
            (loss / count).backward()
            parts.append(dict(loss=loss.item()) | stats)

        with torch.no_grad():
            lars_by_hand(weights, velocity, lr, cfg)
            done = (step + 1) / total
            share = (1 - (cfg.ema or 0)) * (math.cos(math.pi * done) + 1) / 2
            for old, new in zip(target.parameters(), online.parameters()):
                old.copy_((1 - share) * old + share * new)
        means = {key: sum(part[key] for part in parts) / count for key in parts[0]}
        log.append(dict(step=step + 1, epoch=epoch, lr=lr) | means)
    return method.backbone, log


LOOP = (
    "--size 16 --accumulate 2 --lr 0.05 --weight-decay 0.03 --eta 0.04 --alpha 0.3 "
    "--temperature 0.3 --beta 0.5 --tau-plus 0.05 --seed 3 --blur 0.5 0.3 --solarize 0 0.5")


@pytest.mark.parametrize("more", [
    "--method byol --quantile 0.8 --ema 0.7 --predictor 32 --clip --norm group",
    "--hex-warmup 1 --threshold oracle"])
def test_the_command_is_a_plain_loop(more, tmp_path):
    """Order, views, loss, accumulation, schedule, LARS, momentum and log, in six steps."""
    argv = [*SMALL, *f"{LOOP} {more}".split()]
    assert run(*argv, "--out", tmp_path / "o") == 0
    backbone, log = plain_loop(config(" ".join(argv)), DRAW(112, 0))

    got = torch.load(tmp_path / "o" / "backbone.pt")
    for name, value in backbone.named_parameters():
        torch.testing.assert_close(got[name], value.data, rtol=0, atol=1e-5)
    assert len(log) == 6
    for event, want in zip(events(tmp_path / "o", "step"), log, strict=True):
        want = {key: value for key, value in want.items() if value == value}
        assert {key: event[key] for key in want} == pytest.approx(want, rel=1e-5, abs=1e-6)


# --- The golden trajectory --------------------------------------------------------------------
# Two runs of the real command, which between them touch everything that trains. The plain loop
# above says what is right; these numbers say what has changed. To record them again, run
#     RECORD=1 python -m pytest -s -q test_hex.py -k golden
# and put here what it prints. The commit that does so must say why they changed.
GOLDEN_OPTIONS = (
    "--epochs 2 --batch-size 16 --hidden 32 --dim 16 --lr 0.02 --lr-warmup 1 --hex-warmup 1 "
    "--quantile 0.9 --weight-decay 0.01 --label-fraction 0.8 --probe-epochs 10 --log-every 1 "
    "--workers 0 --device cpu --seed 7 --predictor 24 --blur 1 0.1 --solarize 0 0.2 --method ")
GOLDEN_RUNS = dict(
    nnclr="nnclr --backbone wide_resnet50_2 --norm group --size 8 --queue 40 --accumulate 2",
    byol="byol --backbone vit_b_32 --size 16 --ema 0.8 --alpha 0.5 --decoupled")
# Sums of float32 differ by some 1e-5 after these steps. On top of that, rounding may carry a few
# pairs past eps, and one of the 48 pictures of val past another.
SLACK = dict(local=0.5, purity=1e-3, purity_coarse=1e-3, knn=2.1, top1=2.1, top5=2.1)
GOLDEN = """
nnclr crops: 0 61.5859 1 125.333 2 89.6589 3 180.141
nnclr views: 0 2.74531 1 0.811431 2 0.564123 3 2.03922 4 2.26376 5 1.98281 6 2.18226 7 0.82406
nnclr epoch 0: epoch 0 threshold 0.978439 local 64.4643 std 0.719654 purity 0.0752078 chance
    0.0752896 purity_coarse 0.245014 chance_coarse 0.243726 rankme 51.4564 knn 16.6667
nnclr step 1: epoch 0 loss 2.80907 own 2.80907 lr 0.000833333
nnclr step 2: epoch 0 loss 2.83265 own 2.83265 lr 0.00166667
nnclr step 3: epoch 0 loss 2.82385 own 2.82385 lr 0.0025
nnclr epoch 3: epoch 1 threshold 0.972901 local 34.2143 std 0.699987 purity 0.0735908 chance
    0.0752896 purity_coarse 0.240605 chance_coarse 0.243726 rankme 51.2667 knn 14.5833
nnclr step 4: epoch 1 loss 8.0213 own 2.78624 threshold 0.973772 local 5.34375 empty 0.09375
    clamped 0 hex 8.0213 lr 0.0025
nnclr step 5: epoch 1 loss 7.97816 own 2.78988 threshold 0.973613 local 4.84375 empty 0.0859375
    clamped 0 hex 7.97816 lr 0.001875
nnclr step 6: epoch 1 loss 7.96425 own 2.78113 threshold 0.976433 local 4.89062 empty 0.078125
    clamped 0 hex 7.96425 lr 0.000625
nnclr epoch 6: epoch 2 threshold 0.973413 local 31.9643 std 0.686743 purity 0.0756983 chance
    0.0752896 purity_coarse 0.239665 chance_coarse 0.243726 rankme 51.3376 knn 14.5833
nnclr norms: queue 6.32456 backbone 534.362 projector 24.0698 predictor 10.2086
nnclr probe: top1 10.4167 top5 41.6667 knn 12.5 train 78 held_out 12
byol crops: 0 61.5306 1 125.176 2 89.5371 3 180.18
byol views: 0 2.75429 1 0.819736 2 0.845082 3 2.18524 4 2.28564 5 1.93149 6 2.15053 7 0.894815
byol epoch 0: epoch 0 threshold 0.962882 local 35.8036 std 0.513653 purity 0.0780549 chance
    0.0752896 purity_coarse 0.24788 chance_coarse 0.243726 rankme 8.82196 knn 16.6667
byol step 1: epoch 0 loss 3.77222 own 3.77222 lr 0.000178571
byol step 2: epoch 0 loss 3.82666 own 3.82666 lr 0.000357143
byol step 3: epoch 0 loss 3.76901 own 3.76901 lr 0.000535714
byol step 4: epoch 0 loss 3.6023 own 3.6023 lr 0.000714286
byol step 5: epoch 0 loss 3.60932 own 3.60932 lr 0.000892857
byol step 6: epoch 0 loss 3.81219 own 3.81219 lr 0.00107143
byol step 7: epoch 0 loss 3.75592 own 3.75592 lr 0.00125
byol epoch 7: epoch 1 threshold 0.936375 local 34.5893 std 0.579345 purity 0.0774393 chance
    0.0752896 purity_coarse 0.249097 chance_coarse 0.243726 rankme 8.64192 knn 8.33333
byol step 8: epoch 1 loss 3.85172 own 3.72341 threshold 0.717763 local 3.5625 empty 0.09375
    clamped 0 hex 3.98003 lr 0.00125
byol step 9: epoch 1 loss 3.98001 own 3.71483 threshold 0.683516 local 3.5 empty 0.15625 clamped 0
    hex 4.24519 lr 0.00118811
byol step 10: epoch 1 loss 3.64405 own 3.56598 threshold 0.692382 local 3.3125 empty 0.0625
    clamped 0 hex 3.72212 lr 0.00101468
byol step 11: epoch 1 loss 3.59793 own 3.75232 threshold 0.741782 local 4.5625 empty 0.125 clamped
    0 hex 3.44354 lr 0.000764076
byol step 12: epoch 1 loss 3.87118 own 3.49509 threshold 0.730681 local 3.6875 empty 0.125 clamped
    0 hex 4.24727 lr 0.000485924
byol step 13: epoch 1 loss 3.75334 own 3.48299 threshold 0.718719 local 3.25 empty 0.15625 clamped
    0 hex 4.02369 lr 0.000235319
byol step 14: epoch 1 loss 3.2903 own 3.68297 threshold 0.737362 local 4.0625 empty 0.1875 clamped
    0 hex 2.89764 lr 6.18945e-05
byol epoch 14: epoch 2 threshold 0.929223 local 37.0804 std 0.600155 purity 0.0751264 chance
    0.0752896 purity_coarse 0.247291 chance_coarse 0.243726 rankme 8.31169 knn 8.33333
byol norms: backbone 57.5502 projector 28.9585 predictor 26.489 target 86.3184
byol probe: top1 8.33333 top5 37.5 knn 8.33333 train 78 held_out 12
"""


def table(text):
    """A line for each thing, indented where it goes on: its numbers by name."""
    found = {}
    for line in text.strip().replace("\n    ", " ").splitlines():
        key, _, words = line.partition(": ")
        found[key] = by_name(words)
    return found


def by_name(words):
    words = words.split()
    return dict(zip(words[::2], words[1::2]))


def trajectory(name, argv, out):
    """What a run has left, as a line for each thing, with its numbers by name."""
    cfg = config(" ".join(argv))
    batch = hx.Views(DRAW(112, 0), cfg)[[(1, i) for i in range(4)]]
    means = batch.crops.double().unflatten(0, (2, 4)).mean((0, 2, 3, 4))
    yield "crops", {str(i): mean for i, mean in enumerate(means.tolist())}
    means = hx.augment(batch, cfg).double().square().mean((1, 2, 3))
    yield "views", {str(i): mean for i, mean in enumerate(means.tolist())}

    for event in events(out):
        yield f"{event.pop('event')} {event.pop('step')}", event

    model = torch.load(out / "checkpoint.pt")["model"]
    norms = {}
    for key, value in model.items():
        part = key.split(".")[1]
        norms[part] = norms.get(part, 0) + value.double().norm().item()
    yield "norms", norms

    probe = json.load(open(out / "probe.json"))
    yield "probe", {key: probe[key] for key in ("top1", "top5", "knn", "train", "held_out")}


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_golden_trajectory(name, tmp_path):
    argv = (GOLDEN_OPTIONS + GOLDEN_RUNS[name]).split()
    assert run(*argv, "--out", tmp_path / "o") == 0
    got = {f"{name} {key}": each for key, each in trajectory(name, argv, tmp_path / "o")}

    if "RECORD" in os.environ:
        for key, numbers in got.items():
            line = f"{key}: " + " ".join(f"{word} {each:.6g}" for word, each in numbers.items())
            print(textwrap.fill(line, 98, subsequent_indent="    "))
        return
    want = {key: numbers for key, numbers in table(GOLDEN).items() if key.startswith(name)}
    assert got.keys() == want.keys()
    for key, numbers in want.items():
        assert {*got[key]} == {*numbers}
        for word, number in numbers.items():
            close = pytest.approx(float(number), rel=2e-3, abs=SLACK.get(word, 1e-4))
            assert got[key][word] == close, (key, word)


# --- Recipes ----------------------------------------------------------------------------------
# The settings of each recipe, then what differs for one of the methods.
RECIPES = """
imagenet: accumulate 1 amp fp16 backbone resnet50 batch_size 256 blur 0.5,0.5 clip True
    crop_min 0.08 drop 0.1 drop_every 20 epochs 100 eta 0.02 grayscale 0.2 hex_warmup 10
    jitter 0.8,0.8,0.8,0.2 lr 0.3 lr_warmup 10 size 224 solarize 0.0,0.0 temperature 0.1
    warmup_threshold None weight_decay 1e-06
imagenet simclr: accumulate 16
imagenet nnclr: jitter 0.4,0.4,0.2,0.1 blur 1.0,0.1 solarize 0.0,0.2 weight_decay 1e-05
    warmup_threshold 0.9 drop_every 25
imagenet mocov3: jitter 0.4,0.4,0.2,0.1 blur 1.0,0.1 solarize 0.0,0.2 temperature 1.0 lr 0.6
imagenet byol: jitter 0.4,0.4,0.2,0.1 blur 1.0,0.1 solarize 0.0,0.2 lr 0.45
imagenet simsiam: jitter 0.4,0.4,0.4,0.1 lr 0.05 weight_decay 0.0001
imagenet barlow: jitter 0.4,0.4,0.2,0.1 blur 1.0,0.1 solarize 0.0,0.2
imagenet vicreg: jitter 0.4,0.4,0.2,0.1 blur 1.0,0.1 solarize 0.0,0.2
cifar: accumulate 1 amp fp16 backbone resnet18 batch_size 256 blur 0.5,0.5 clip True
    crop_min 0.08 drop 0.1 drop_every 100 epochs 400 eta 0.02 grayscale 0.2 hex_warmup 10
    jitter 0.8,0.8,0.8,0.2 lr 0.4 lr_warmup 10 size 32 solarize 0.0,0.0 temperature 0.1
    warmup_threshold None weight_decay 0.0001
cifar nnclr: jitter 0.4,0.4,0.2,0.1 blur 0.0,0.0 solarize 0.0,0.2 temperature 0.2
    weight_decay 1e-05 queue 65536 lr 1.0 drop 0.0 warmup_threshold 0.9
cifar mocov3: jitter 0.4,0.4,0.2,0.1 blur 0.0,0.0 solarize 0.0,0.2 temperature 0.2 lr 0.3
    weight_decay 1e-06
cifar byol: jitter 0.4,0.4,0.2,0.1 blur 0.0,0.0 solarize 0.0,0.2 lr 1.0 weight_decay 1e-05
cifar simsiam: jitter 0.4,0.4,0.4,0.1 blur 0.0,0.0
cifar barlow: jitter 0.4,0.4,0.2,0.1 blur 0.0,0.0 solarize 0.0,0.2 lr 0.3 hidden 2048
    dim 2048 hex_warmup 0
cifar vicreg: jitter 0.4,0.4,0.2,0.1 blur 0.0,0.0 solarize 0.0,0.2 hidden 2048 dim 2048
shapes: accumulate 1 amp off backbone resnet10_narrow batch_size 128 blur 0.0,0.0 clip False
    crop_min 0.5 dim 64 drop 0.1 drop_every 2 epochs 12 eta 0.02 grayscale 1.0 hex_warmup 1
    hidden 256 predictor 256 jitter 0.8,0.8,0.8,0.2 lr 1.0 lr_warmup 2 size 32 solarize 0.0,0.0
    temperature 0.2 warmup_threshold None weight_decay 0.0001
shapes byol: lr 0.3 ema 0.97
shapes nnclr: queue 2048
small: accumulate 1 amp off backbone resnet10_narrow batch_size 256 blur 0.0,0.0 clip False
    crop_min 0.2 dim 128 drop 0.1 drop_every 2 epochs 15 eta 0.02 grayscale 0.2 hex_warmup 2
    hidden 512 predictor 512 jitter 0.8,0.8,0.8,0.2 lr 0.2 lr_warmup 2 size 32 solarize 0.0,0.0
    temperature 0.2 warmup_threshold None weight_decay 0.0001
small byol: lr 0.15 ema 0.97
small nnclr: queue 4096
"""
# The heads of the methods' papers and code; simclr's, barlow's and nnclr's are the authors'.
PAPERS = dict(
    simclr="alpha 1.0 hidden 2048 dim 128",
    nnclr="alpha 1.0 hidden 2048 dim 256 predictor 4096 queue 98304",
    mocov3="alpha 1.0 hidden 4096 dim 256 predictor 4096 ema 0.99",
    byol="alpha 0.1 hidden 4096 dim 256 predictor 4096 ema 0.99",
    simsiam="alpha 0.1 hidden 2048 dim 2048 predictor 512",
    barlow="alpha 0.1 hidden 8192 dim 8192",
    vicreg="alpha 0.1 hidden 8192 dim 8192")


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_give_the_settings_of_their_sources(name):
    sources = table(RECIPES)
    for recipe in ("imagenet", "cifar", "shapes", "small"):
        want = by_name(PAPERS[name]) | sources[recipe] | sources.get(f"{recipe} {name}", {})
        cfg = config(f"--recipe {recipe} --method {name} --amp {want['amp']}")
        if cfg.predictor is None:
            want.pop("predictor", None)
        got = {key: str(getattr(cfg, key)) for key in want}
        assert {key: re.sub("[ ()[\\]]", "", each) for key, each in got.items()} == want


def test_the_data_choose_the_recipe():
    for argv, recipe, lr in (
            ("folder --root .", "imagenet", 0.3), ("cifar100", "cifar", 0.4),
            ("cifar10 --recipe small", "small", 0.2)):
        cfg = config("--data " + argv)
        assert (cfg.recipe, cfg.lr) == (recipe, lr)


# --- The probe --------------------------------------------------------------------------------
def probe(count, classes, shift=0, text="", noise=255):
    """The linear probe on raw pixels: of each class a random picture, and noise.

    shift: how far the labels of val are turned.
    """
    g = torch.Generator().manual_seed(0)

    def draw(number):
        return torch.randint(0, 256, (number, 3, 8, 8), generator=g)

    targets = torch.arange(count) % classes
    kinds = draw(10)
    train, val = (((255 - noise) * kinds[targets] + noise * draw(count)) // 255 for _ in range(2))
    train = hx.Pictures(train.byte(), targets)
    val = hx.Pictures(val.byte(), (targets + shift) % classes)
    cfg = config(f"--epochs 0 --backbone pixels --size 8 {text}")
    backbone, _ = hx.build_backbone("pixels", 8)
    return hx.linear_probe(backbone, cfg, train, val, Path("none"), {}, [])


def test_the_rate_is_chosen_on_the_holdout_and_not_on_val():
    """Every label of val is wrong: what is best on the holdout is worst there."""
    result = probe(240, 6, 1, text="--probe-epochs 1", noise=180)
    holdout = result["holdout"]
    assert min(holdout.values()) < 80
    assert holdout[str(result["rate"])] == max(holdout.values()) > 95
    assert result["top1"] < 5 and result["right"].count("1") < 12 and result["top5"] > 50


def test_no_head_has_seen_its_holdout():
    """The labels mean nothing, so a head can learn them by heart but not guess them."""
    result = probe(150, 10, text="--probe-epochs 60")
    assert result["held_out"] == 10 and result["train"] == 140 == result["knn_bank"]
    assert max(result["holdout"].values()) < 70 and result["top1"] < 30


def test_the_rates_momentum_decay_and_batch_size_of_the_heads(monkeypatch):
    step, seen = torch.optim.SGD.step, []
    cross_entropy, sizes = F.cross_entropy, set()

    def recorded(self):
        seen.append([(g["lr"], g["weight_decay"], g["momentum"]) for g in self.param_groups])
        step(self)

    def measured(logits, labels):
        sizes.add(len(labels))
        return cross_entropy(logits, labels)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    monkeypatch.setattr(F, "cross_entropy", measured)
    probe(300, 4, text="--probe-epochs 10")
    rates = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    falls = [1] * 6 + [0.1] * 2 + [0.01] * 2
    want = [[(rate * fall, 1e-5, 0.9) for rate in rates] for fall in falls]
    assert numpy.array(seen) == pytest.approx(numpy.array(want)) and sizes == {256}


def test_a_share_of_the_labels_is_balanced_and_is_all_that_trains():
    result = probe(400, 4, text="--probe-epochs 2 --label-fraction 0.2")
    assert result["train"] == result["knn_bank"] == 72 and result["held_out"] == 8
    uneven = torch.arange(3).repeat_interleave(torch.tensor([5, 50, 500]))
    chosen = hx.labelled_pictures(config("--label-fraction 0.1"), uneven)
    counts = uneven[chosen.unique()].bincount().tolist()
    assert counts[0] == 5 and sorted(counts) == [5, 25, 26]


def test_nearest_neighbors_are_what_loops_find():
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(2, 60, 4, generator=g)
    labels, truth = torch.randint(0, 5, (2, 60), generator=g)
    want = []
    for query, answer in zip(queries, truth.tolist()):
        cosine, votes = F.cosine_similarity(query, bank).tolist(), [0.0] * 5
        for j in sorted(range(60), key=lambda j: -cosine[j])[:20]:
            votes[labels[j]] += math.exp(cosine[j] / 0.07)
        want.append(votes.index(max(votes)) == answer)
    assert hx.nearest_neighbors(bank, labels, queries, truth).tolist() == want
    assert 0 < sum(want) < 60


def test_what_emerges_is_counted_by_hand():
    train, val, cfg = DRAW(60, 0), DRAW(24, 1), config("--hidden 16 --dim 8 --quantile 0.9")
    model, index = hx.build_model(cfg), hx.permutation(60, "fixed")
    batch = hx.Views(train, cfg, seed="fixed")[[(0, i) for i in index.tolist()]]
    views = batch_by_hand(batch).chunk(2)
    for _ in range(20):
        model(*views)                               # for BatchNorm's statistics
    got = hx.emergence(model, cfg, train, val)

    model.eval()
    with torch.no_grad():
        z = F.normalize(torch.cat(model(*views)).double())
        x = model.method.backbone(normalized(train.pictures / 255)).double()
    shares = torch.linalg.svdvals(x)
    shares = (shares / shares.sum()).tolist()
    s, image = z @ z.T, torch.arange(120) % 60
    negative = image[:, None] != image
    ranked = s[negative].view(120, 118).sort(1).values
    eps = ranked[:, round(0.9 * 117)].mean()
    near = negative & (s > eps)
    want = dict(threshold=eps, local=near.sum() / 120, std=z.std(0).mean() * math.sqrt(8))
    for labels, name in ((train.targets, ""), (train.coarse, "_coarse")):
        label = labels[index[image]]
        same = (label[:, None] == label).double()
        want |= {f"purity{name}": same[near].mean(), f"chance{name}": same[negative].mean()}
    want = {key: value.item() for key, value in want.items()}
    want["rankme"] = math.exp(-sum(share * math.log(share) for share in shares if share > 0))
    assert {key: got[key] for key in want} == pytest.approx(want, rel=1e-3)
    assert 0 <= got["knn"] <= 100


def test_256_and_2048_and_512_pictures_are_read_once_for_the_figures_of_all_epochs(monkeypatch):
    asked = []
    item = hx.Views.__getitem__

    def counted(self, keys):
        asked.extend([self.views] * len(keys))
        return item(self, keys)

    monkeypatch.setattr(hx.Views, "__getitem__", counted)
    train, val = random_pictures(2100, 8, 8, classes=5), random_pictures(600, 8, 8, classes=5)
    cfg = config("--size 8 --hidden 8 --dim 8")
    for _ in range(2):
        hx.emergence(hx.build_model(cfg), cfg, train, val)
    assert asked.count(2) == 256 and asked.count(0) == 2048 + 512


# --- Pictures ---------------------------------------------------------------------------------
FOLDER = [
    *SHORT, *"--size 16 --backbone resnet10_narrow --accumulate 1 --data folder --root".split()]


def noise(path, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((40, 30), 99).convert(mode).save(path)


def flat(root):
    return hx.Folder(root, labelled=False)


def refused(capsys, *argv):
    """The status and the one line of a command that must fail."""
    capsys.readouterr()
    status = run(*argv)
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("hex.py: ")]
    assert status and len(errors) == 1 and "Traceback" not in err and out == ""
    return status, errors[0]


RAMP = numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)[:8]
LYING = Image.Exif()
LYING[0x0112] = 6                                   # the picture is stored lying on its side
FINE, TURNED = dict(quality=100), dict(exif=LYING.tobytes())


@pytest.mark.parametrize("name, mode, options", [
    ("a.jpg", "RGB", FINE), ("a.jpg", "L", FINE), ("a.jpg", "CMYK", FINE),
    ("a.png", "P", {}), ("a.png", "RGBA", {}), ("a.tiff", "RGB", {}),
    ("a.webp", "RGB", dict(lossless=True)), ("a.jpg", "L", FINE | TURNED),
    ("a.png", "L", TURNED), ("a.JPEG", "L", dict(format="png"))])
def test_every_kind_of_picture_is_decoded_upright(name, mode, options, tmp_path):
    Image.fromarray(RAMP).convert(mode).save(tmp_path / name, **options)
    want = numpy.rot90(RAMP, -1) if "exif" in options else RAMP
    got = flat(tmp_path).read(0)
    assert got.shape == (3, *want.shape) and got.dtype == torch.uint8
    assert abs(got.numpy().astype(int) - want).max() <= (4 if "jpg" in name else 0)


def test_16_bits_are_scaled_to_8(tmp_path):
    Image.fromarray(RAMP.astype(numpy.uint16) * 257 + 100).save(tmp_path / "a.png")
    assert (flat(tmp_path).read(0).numpy() == RAMP).all()


def test_a_damaged_png_is_an_error_and_never_a_crash(tmp_path):
    noise(tmp_path / "a.png", "P")
    whole, draw = (tmp_path / "a.png").read_bytes(), random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        (tmp_path / "a.png").write_bytes(damaged)
        try:
            assert flat(tmp_path).read(0).shape[0] == 3
        except hx.UserError as error:
            assert "--skip-bad-files" in str(error)


def test_pictures_without_labels_are_trained_on_and_hidden_ones_are_not(tmp_path, capsys):
    root, out = tmp_path / "data", tmp_path / "o"
    for name in ["a.png", "b/c.jpg", "b/d/e.png"] + [f"b/{i}.png" for i in range(20)]:
        noise(root / name)
    for name in [".a.png", ".b/c.png", "b/.ipynb_checkpoints/0.png"]:
        noise(root / name)
    assert len(flat(root)) == 23 and hx.Folder(root).classes == ["b"]
    assert run(*FOLDER, root, "--out", out) == 0
    assert "without labels" in capsys.readouterr().err
    assert {"backbone.pt", "neighbours.png"} <= {*os.listdir(out)} - {"probe.json"}
    assert {"threshold", "local", "rankme", "std"} == events(out)[0].keys() - {
        "event", "step", "epoch"}


@pytest.fixture
def labelled(tmp_path):
    """24 pictures of two classes in train/, the same in val/."""
    root = tmp_path / "data"
    for i in range(24):
        noise(root / "train" / "ab"[i % 2] / f"{i}.jpg", ["RGB", "L", "CMYK"][i % 3])
    shutil.copytree(root / "train", root / "val")
    return root


def test_labels_without_val_are_used_for_purity_alone(labelled, tmp_path):
    shutil.rmtree(labelled / "val")
    assert run(*FOLDER, labelled, "--out", tmp_path / "o") == 0
    assert "purity" in events(tmp_path / "o")[0]
    assert not (tmp_path / "o" / "probe.json").exists()


def test_imagenet_is_probed_on_live_crops_and_a_bad_file_is_named_or_skipped(
        labelled, tmp_path, capsys):
    command = [*FOLDER, labelled, "--data", "imagenet", "--out", tmp_path / "o"]
    assert run(*command) == 0
    result = json.load(open(tmp_path / "o" / "probe.json"))
    assert result["train"] == 22 and result["held_out"] == 2
    assert result["val"] == len(result["right"]) == 24
    (labelled / "train" / "a" / "0.jpg").write_text("no picture")
    shutil.rmtree(tmp_path / "o")
    assert "0.jpg: not readable" in refused(capsys, *command)[1]
    assert run(*command, "--skip-bad-files") == 0
    assert "skipped" in capsys.readouterr().err


def write_cifar(folder, archive, files, label_keys):
    """An archive in CIFAR's own format, with 20 pictures in each file."""
    folder.mkdir()
    g = numpy.random.default_rng(0)
    for name, count in files.items():
        data = g.integers(0, 256, (count, 3072), numpy.uint8)
        content = dict(data=data, label_names=[], fine_label_names=[])
        content |= {key: [label(i) for i in range(count)] for key, label in label_keys.items()}
        (folder / name).write_bytes(pickle.dumps(content))
    with tarfile.open(folder.parent / archive, "w:gz") as file:
        file.add(folder, folder.name)
    content["data"] = content["data"].reshape(-1, 3, 32, 32)
    shutil.rmtree(folder)
    return content


@pytest.fixture
def any_checksum(monkeypatch):
    """The checksums that torchvision knows are of other pictures."""
    for name in ("cifar", "utils"):
        monkeypatch.setattr(
            f"torchvision.datasets.{name}.check_integrity", lambda path, *_: os.path.exists(path))


def test_cifar10_from_an_archive_in_its_own_format(tmp_path, any_checksum):
    files = {f"data_batch_{i}": 20 for i in range(1, 6)} | {"batches.meta": 0, "test_batch": 20}
    test = write_cifar(
        tmp_path / "cifar-10-batches-py", "cifar-10-python.tar.gz", files,
        dict(labels=lambda i: i % 10))
    argv = [*SHORT, "--data", "cifar10", "--recipe", "small", "--root", str(tmp_path)]
    assert run(*argv, "--out", tmp_path / "o") == 0
    train, val = hx.load_data(config(" ".join(argv)))
    assert len(train) == 100 and (val.read(3).numpy() == test["data"][3]).all()
    assert val.targets.tolist() == test["labels"]


# Krizhevsky's table. In the archive classes are numbered by the alphabet, and so are super-classes.
CIFAR100 = """
aquatic_mammals: beaver dolphin otter seal whale
fish: aquarium_fish flatfish ray shark trout
flowers: orchid poppy rose sunflower tulip
food_containers: bottle bowl can cup plate
fruit_and_vegetables: apple mushroom orange pear sweet_pepper
household_electrical_devices: clock keyboard lamp telephone television
household_furniture: bed chair couch table wardrobe
insects: bee beetle butterfly caterpillar cockroach
large_carnivores: bear leopard lion tiger wolf
large_man-made_outdoor_things: bridge castle house road skyscraper
large_natural_outdoor_scenes: cloud forest mountain plain sea
large_omnivores_and_herbivores: camel cattle chimpanzee elephant kangaroo
medium_mammals: fox porcupine possum raccoon skunk
non-insect_invertebrates: crab lobster snail spider worm
people: baby boy girl man woman
reptiles: crocodile dinosaur lizard snake turtle
small_mammals: hamster mouse rabbit shrew squirrel
trees: maple_tree oak_tree palm_tree pine_tree willow_tree
vehicles_1: bicycle bus motorcycle pickup_truck train
vehicles_2: lawn_mower rocket streetcar tank tractor
"""


def test_cifar100_has_the_super_classes_of_its_archive(tmp_path, any_checksum):
    rows = [line.split(": ")[1].split() for line in CIFAR100.strip().splitlines()]
    above = dict(sorted((name, number) for number, row in enumerate(rows) for name in row))
    coarse = list(above.values())
    write_cifar(
        tmp_path / "cifar-100-python", "cifar-100-python.tar.gz",
        dict(train=100, meta=0, test=100),
        dict(fine_labels=lambda i: i, coarse_labels=lambda i: coarse[i]))
    for pictures in hx.load_data(config(f"--data cifar100 --root {tmp_path}")):
        assert pictures.targets.tolist() == [*range(100)]
        assert pictures.coarse.tolist() == coarse


# --- The life of a run ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 14 steps that nothing has interrupted. Tests copy it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(*SMALL, "--out", out) == 0
    return out


@pytest.fixture
def done(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "done")


def at_step(monkeypatch, step, action):
    """When the rate of this step, counted from 0, is asked for, do this."""
    rate = hx.learning_rate

    def patched(now, *rest):
        if now == step:
            action()
        return rate(now, *rest)

    monkeypatch.setattr(hx, "learning_rate", patched)


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def test_what_a_run_leaves(finished):
    assert {*os.listdir(finished)} == {
        "backbone.pt", "checkpoint.pt", "config.json", "lock", "metrics.jsonl",
        "neighbours.png", "neighbours_early.png", "probe.json"}
    steps = events(finished, "step")
    assert [event["step"] for event in steps] == [*range(1, 15)]
    assert [event["epoch"] for event in events(finished, "epoch")] == [0, 1, 2]

    result = json.load(open(finished / "probe.json"))
    for digits, share in (("right", "top1"), ("knn_right", "knn")):
        right = result[digits]
        assert right.count("1") / len(right) * 100 == pytest.approx(result[share])
    saved = json.load(open(finished / "config.json"))
    assert saved["config"]["batch_size"] == 16
    assert saved["versions"]["torch"] == torch.__version__


def test_the_picture_shows_an_anchor_and_its_neighbors(finished):
    width, height = Image.open(finished / "neighbours.png").size
    assert width == height >= 8 * 64


def test_a_run_with_loader_processes_is_one_without(finished, tmp_path):
    assert run(*SMALL, "--workers", 2, "--out", tmp_path / "o") == 0
    assert (tmp_path / "o" / "backbone.pt").read_bytes() == (
        finished / "backbone.pt").read_bytes()


@pytest.mark.parametrize("threshold, eps", [("step", [0.9, 0.8]), ("cosine", [0.9, 0.6])])
def test_a_scheduled_threshold_by_command(threshold, eps, tmp_path):
    assert run(*SMALL, "--threshold", threshold, "--out", tmp_path / "o") == 0
    seen = {event["epoch"]: event["threshold"] for event in events(tmp_path / "o", "step")}
    assert [*seen.values()] == pytest.approx(eps)


def test_a_purity_that_is_not_defined_is_null_and_does_not_end_the_run(
        tmp_path, monkeypatch, capsys):
    def nobody(a, *_):
        return a.new_ones(()), torch.zeros(2 * len(a), 2 * len(a)).bool()

    monkeypatch.setattr(hx, "local_mask", nobody)
    assert run(*SHORT, "--out", tmp_path / "o") == 0
    assert ", purity" not in capsys.readouterr().out
    assert [event["purity"] for event in events(tmp_path / "o", "epoch")] == [None, None]


def test_a_collapse_is_warned_of(tmp_path, monkeypatch, capsys):
    found = iter([0.02, 0.005, 0.03])               # it falls, then it rises
    monkeypatch.setattr(hx, "emergence", lambda *_: dict(std=next(found)))
    assert run(*SMALL, "--out", tmp_path / "o") == 0
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and "std 0.005 of 1" in err


def test_the_first_line_says_every_setting(finished, tmp_path, capsys):
    assert run(*SHORT, "--tau-plus", 0, "--out", tmp_path / "o") == 0
    err = capsys.readouterr().err
    chosen = json.load(open(tmp_path / "o" / "config.json"))["config"]
    for key, value in chosen.items():
        assert isinstance(value, list) or f"{key}={value!r}" in err


def test_a_run_that_is_stopped_and_crashes_ends_as_one_that_was_not(
        finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "o"
    command = [*SMALL, "--checkpoint-every", 4, "--out", out]
    with monkeypatch.context() as patch:
        at_step(patch, 4, stop)                     # in the middle of an epoch
        assert run(*command) == 75
        assert "run the same command again" in capsys.readouterr().err
    assert 5 <= len(losses(out)) <= 6
    with monkeypatch.context() as patch:
        at_step(patch, 10, lambda: 1 / 0)           # the checkpoint has 8 steps
        assert run(*command) == 1
        assert "ZeroDivisionError" in capsys.readouterr().err
    assert torch.load(out / "checkpoint.pt")["step"] == 8 and len(losses(out)) == 10
    assert run(*command) == 0 and events(out) == events(finished)
    assert (out / "backbone.pt").read_bytes() == (finished / "backbone.pt").read_bytes()


def test_dropout_is_the_same_after_a_resume(tmp_path, monkeypatch):
    command = [*SHORT, "--backbone", "vit_b_32", "--size", 16, "--out"]
    assert run(*command, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        at_step(patch, 3, stop)
        assert run(*command, tmp_path / "stopped") == 75
    assert run(*command, tmp_path / "stopped") == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_finished_run_says_so_and_evaluation_options_evaluate_again(done, capsys, monkeypatch):
    before = (done / "metrics.jsonl").read_bytes()
    assert run(*SMALL, "--out", done) == 0
    assert capsys.readouterr().err.count("was finished before") == 2
    monkeypatch.setattr(hx, "learning_rate", lambda *_: 1 / 0)      # it does not train again
    assert run(*SMALL, "--probe-epochs", 3, "--label-fraction", 0.5, "--out", done) == 0
    again = json.load(open(done / "probe.json"))
    assert again["epochs"] == 3 and again["train"] + again["held_out"] == 56
    assert (done / "metrics.jsonl").read_bytes() == before


def test_another_experiment_is_refused_with_the_settings_that_differ(done, capsys):
    line = refused(capsys, *SMALL, "--beta", 0.5, "--out", done)[1]
    assert "beta 1.0 there, 0.5 here" in line and "--out" in line


def test_a_run_at_work_is_refused(done, capsys):
    with open(done / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is at work" in refused(capsys, *SMALL, "--out", done)[1]


def test_the_checkpoint_of_another_run_is_refused(done, capsys):
    checkpoint = torch.load(done / "checkpoint.pt") | dict(experiment="another's")
    torch.save(checkpoint, done / "checkpoint.pt")
    (done / "backbone.pt").unlink()
    status, line = refused(capsys, *SMALL, "--out", done)
    assert status == 1 and "of another experiment" in line


def test_moved_data_go_on_and_other_data_are_refused(tmp_path, capsys):
    for i in range(20):
        noise(tmp_path / "here" / f"{i}.png")
    command = ["--out", tmp_path / "o", *FOLDER]
    assert run(*command, tmp_path / "here") == 0
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert run(*command, tmp_path / "there") == 0
    assert "was finished before" in capsys.readouterr().err
    noise(tmp_path / "there" / "one more.png")
    assert "pictures" in refused(capsys, *command, tmp_path / "there")[1]


def test_a_backbone_is_probed_as_in_its_run(done, tmp_path, capsys):
    command = "--probe-epochs 2 --workers 0 --device cpu --probe".split()
    assert run(*command, done / "backbone.pt", "--out", tmp_path / "p") == 0
    first, again = (json.load(open(out / "probe.json")) for out in (done, tmp_path / "p"))
    assert first["right"] == again["right"]

    shutil.copy(done / "backbone.pt", tmp_path / "alone.pt")
    assert "--backbone" in refused(capsys, *command, tmp_path / "alone.pt")[1]
    state = torch.load(done / "backbone.pt")
    state["0.weight"] *= math.nan
    torch.save(state, done / "backbone.pt")
    line = refused(capsys, *command, done / "backbone.pt", "--out", tmp_path / "p")[1]
    assert "not finite" in line                     # and not the old result


def test_a_file_of_torchvision_is_probed_without_its_classifier(tmp_path):
    theirs = same_weights(lambda: torchvision.models.get_model("wide_resnet50_2"))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    command = "--data shapes --backbone wide_resnet50_2 --norm batch --size 96 --probe"
    cfg = config(f"{command} {tmp_path}/theirs.pt")
    mine = hx.load_backbone(cfg.probe, cfg, "")
    theirs.fc = nn.Identity()
    x = torch.linspace(-1, 1, 3 * 96 * 96).sin().view(1, 3, 96, 96)
    torch.testing.assert_close(mine.eval()(x), theirs(x))


@pytest.mark.parametrize("broken", [
    lambda loss, e: loss * math.nan, lambda loss, e: loss + (0 * e.sum()).sqrt()])
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_and_leaves_the_checkpoint(
        broken, tmp_path, monkeypatch, capsys):
    loss, calls = hx.HEX.loss, iter(range(99))

    def patched(self, *embeddings, **options):
        value, stats = loss(self, *embeddings, **options)
        if next(calls) == 3:
            value = broken(value, embeddings[0])
        return value, stats

    monkeypatch.setattr(hx.HEX, "loss", patched)
    status, line = refused(capsys, *SMALL, "--checkpoint-every", 2, "--out", tmp_path / "o")
    assert status == 1 and "step 4: " in line and "not finite" in line
    state = torch.load(tmp_path / "o" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("argv, option, remedy", [
    ("--bogus", "--bogus", ""),
    ("--method moco", "--method", "mocov3"),
    ("--out ", "--out", "leave it out"),
    ("--quantile 1", "--quantile", "1e-06"),
    ("--loss infonce --beta 2", "--beta", "leave it out"),
    ("--loss base --alpha 0.5", "--alpha", "leave it out"),
    ("--queue 8", "--queue", "leave it out"),
    ("--data folder", "--root", "needs --root DIR"),
    ("--probe no.pt", "no.pt", "such file; give another"),
    ("--hex-warmup 3 --epochs 3", "hex", "2"),
    ("--backbone r19", "r19", "resnet18"),
    ("--batch-size 999", "999", "--batch-size 112"),
    ("--backbone pixels", "pixels", "--epochs 0"),
    ("--data cifar10 --threshold oracle", "ora", "cifar100"),
    ("--label-fraction 0.01", "label", "0.1072")])
def test_a_bad_flag_is_one_line_with_its_remedy(
        argv, option, remedy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, line = refused(capsys, *argv.split(" "))
    assert status == 2 and option in line and remedy in line and os.listdir() == []


def test_a_rank_without_its_world_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    status, line = refused(capsys)
    assert status == 2 and "WORLD_SIZE" in line and "torchrun" in line


def test_a_device_file_is_no_picture(tmp_path):
    os.symlink(os.devnull, tmp_path / "a.png")      # as a pipe, but it never waits
    with pytest.raises(hx.UserError, match="no regular file"):
        flat(tmp_path).read(0)


# --- Several ranks and one --------------------------------------------------------------------
LOPSIDED = [torch.cat([x[:1] + 0.1 * x[:4], x[4:]]) for x in two_views(8, 16, 1.0)]
SHARED_LOSSES = [
    *((form, LOPSIDED, {}) for form in FORMS),
    ("hex", two_views(6), dict(H=("quantile", 0.8), beta=2.0)),
    ("hex", LOPSIDED, dict(H=("rescaled", 0.6))),
    ("released", LOPSIDED, dict(H=("above", 0.6))),
    ("released", two_views(6), dict(H=("labels", [0] * 6))),
    ("hex", two_views(6), dict(H=("labels", [0, 0, 0, 1, 2, 3]))),
    ("hex", two_views(2), {}),                      # one image a rank
    *((name, embeddings(name), {}) for name in ("nnclr", "mocov3", "barlow", "vicreg")),
]
RUNS = dict(
    simclr="--accumulate 2",
    nnclr="--accumulate 2 --method nnclr --predictor 32 --queue 40",
    byol="--accumulate 2 --method byol --predictor 32 --backbone vit_b_32 --size 16",
    shared="--norm group --lr 0.005 --batch-size 32")


def loss_of_part(case, rank=None):
    """The loss of all images, statistics, and the gradient in those of rank 0 or 1, or in all."""
    name, data, knobs = case
    half = len(data[0]) // 2
    rows = slice(None) if rank is None else slice(rank * half, (rank + 1) * half)
    f = partial(ours, name, **knobs)
    if name in HEADS:
        made = method(name)
        f = lambda *e: (made.loss(*e)[0], {})       # noqa: E731
    return graded(lambda *e: f(*map(hx.gather, e)), *(x[rows] for x in data))


def train_in_two_ranks(rank, folder):
    return [run(*SHORT, *options.split(), "--out", f"{folder}/two {name}")
            for name, options in RUNS.items()]


def share_losses(rank, folder):
    return [loss_of_part(case, rank) for case in SHARED_LOSSES]


def stop_one_rank(rank, folder):
    """Rank 1 alone is told, and rank 0 writes late."""
    command = [*SHORT, *RUNS["simclr"].split(), "--out", f"{folder}/stopped"]
    fsync = os.fsync

    def slow_fsync(file):
        time.sleep(0.3)
        fsync(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", slow_fsync)
        if rank == 1:
            at_step(patch, 1, stop)
        first = run(*command)
        return first, os.path.exists(f"{folder}/stopped/checkpoint.pt"), run(*command)


def see_other_data(rank, folder):
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setattr(hx, "draw_shapes", lambda count, seed: DRAW(112, seed + rank))
        return run(*SHORT, "--out", f"{folder}/other"), said.getvalue()


def train_in_three_ranks(rank, folder):
    """Whole losses with BatchNorm, then shared ones."""
    whole = run(*SHORT, "--accumulate", 3, "--out", f"{folder}/three whole")
    options = "--norm group --lr 0.005 --batch-size 24".split()
    return whole, run(*SHORT, *options, "--out", f"{folder}/three shared")


TWO = [train_in_two_ranks, share_losses, stop_one_rank, see_other_data]
THREE = [train_in_three_ranks]


def on_rank(rank, ports, folder):
    """The scenarios of three ranks, then those of two, as torchrun starts them."""
    end, found = dist.destroy_process_group, {}
    for port, scenarios in zip(ports, (THREE, TWO)):
        count = len(ports) + 1 if scenarios is THREE else 2
        if rank >= count:
            continue
        os.environ |= dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="localhost",
            MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
        hx.RANK, hx.RANKS = rank, count
        dist.destroy_process_group = lambda: None
        for scenario in scenarios:
            found[scenario.__name__] = scenario(rank, folder)
        end()
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder of the runs, and what each rank found, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    stores = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in "23"]
    ports = [str(store.port) for store in stores]
    started = mp.spawn(on_rank, (ports, str(folder)), nprocs=3, join=False)
    for name, options in RUNS.items():              # meanwhile, the same in one process
        assert run(*SHORT, *options.split(), "--out", folder / f"one {name}") == 0
    while not started.join():
        pass
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(3)]


def test_two_ranks_that_share_a_loss_are_one(ranks):
    """Each has the loss of all images, and its gradient in its own."""
    first, second = (found["share_losses"] for found in ranks[1][:2])
    for case, (loss0, grad0, stats0), (loss1, grad1, stats1) in zip(SHARED_LOSSES, first, second):
        grad = torch.cat([grad0, grad1], 1)
        assert_same((loss0, grad, stats0), loss_of_part(case), 1e-12)
        assert_same((loss1, grad, stats1), loss_of_part(case), 1e-12)


@pytest.mark.parametrize("name, slack", [
    ("simclr", 0), ("nnclr", 1e-5), ("byol", 1e-5), ("shared", 1e-4)])
def test_two_ranks_train_as_one_process(ranks, name, slack):
    """Whole losses: to the last bit, BatchNorm, dropout and all. Shared ones: to rounding."""
    one, two = (losses(ranks[0] / f"{count} {name}") for count in ("one", "two"))
    assert len(one) == 3 and two == pytest.approx(one, rel=0, abs=slack)


@pytest.mark.parametrize("name, options", [
    ("whole", "--accumulate 3"), ("shared", "--norm group --lr 0.005 --batch-size 24")])
def test_three_ranks_train_as_one_process(ranks, tmp_path, name, options):
    assert run(*SHORT, *options.split(), "--out", tmp_path / "one") == 0
    one, three = losses(tmp_path / "one"), losses(ranks[0] / f"three {name}")
    assert three == pytest.approx(one, rel=0, abs=1e-4)


def test_the_statistics_of_batch_norm_are_the_mean_over_ranks(ranks):
    one, two = (
        torch.load(ranks[0] / f"{count} simclr" / "backbone.pt") for count in ("one", "two"))
    for key in one:
        if key.endswith("running_mean"):
            # One process saw twice as many batches, so it is further from the start, 0.
            ratio = two[key].norm() / one[key].norm()
            assert 0.5 < ratio < 0.75, key


def test_a_signal_to_one_rank_stops_all_when_the_checkpoint_is_written(ranks):
    assert [found["stop_one_rank"] for found in ranks[1][:2]] == [(75, True, 0)] * 2
    first, again = (ranks[0] / name / "backbone.pt" for name in ("two simclr", "stopped"))
    assert first.read_bytes() == again.read_bytes()


def test_ranks_that_see_different_data_say_so(ranks):
    (status, said), other = (found["see_other_data"] for found in ranks[1][:2])
    assert status == 2 and said.count("hex.py: error: the ranks see different data") == 1
    assert other == (2, "")                         # one says it
    assert not (ranks[0] / "other").exists()


# --- The CUDA path, without a CUDA GPU ----------------------------------------------------------
@pytest.fixture
def fake_cuda(monkeypatch):
    """Tensors on device cuda without values, and 8 ranks that do not exist.

    They prove devices and dtypes alone.
    """
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
    cfg = types.SimpleNamespace(device="cuda", data="shapes", blur=(0.5, 0.5))
    x1, x2 = hx.augment(hx.Batch(crops, torch.rand(8, 8), None), cfg).chunk(2)
    assert x1.device.type == "cuda" and x1.is_contiguous(memory_format=torch.channels_last)

    backbone, width = hx.build_backbone("resnet10_narrow", 64)
    made = hx.METHODS[name](backbone, width, hidden=64, dim=32, **HEADS[name])
    with torch.autocast("cuda", dtype=torch.float16):
        outputs = made(x1, x2)
        assert outputs[0].dtype == torch.float16
        assert all(each.device.type == "cuda" for each in outputs)
        for loss in hx.LOSSES:
            model = hx.HEX(made, loss, threshold=hx.AdaptiveThreshold(0.9))
            value, stats = model.loss(*outputs)
            assert value.dtype == torch.float32 and value.device.type == "cuda"
            assert all(each.device.type == "cuda" for each in stats.values())

    made.after_step(1, [outputs])
    for p in made.parameters():
        p.grad = torch.zeros_like(p)
    hx.LARS(made.parameters(), 0.1, weight_decay=1e-4, clip=True).step()
