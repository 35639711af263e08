# SPDX-License-Identifier: MIT
"""Tests of hex.py.

The order: the loss against loops, closed forms and the authors' numbers; the methods; views and
backbones against torchvision; training against a plain loop and against recorded numbers; the
probe; pictures; the life of a run; what goes wrong; several ranks; a GPU that is not there.
"""
import copy
import dataclasses
import fcntl
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tarfile
import textwrap
import time
from contextlib import redirect_stderr
from functools import partial
from itertools import product
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from pytest import approx
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.transforms.v2 import functional as TF

import hex as hx

torch.set_num_threads(1)
cases = pytest.mark.parametrize

# Of the drawn pictures the tests use few: 7 batches of 16 to train on, and 48.
DRAW = hx.draw_shapes
hx.draw_shapes = lambda count, seed: DRAW({4096: 112, 1024: 48}[count], seed)


# --- Two of torchvision's models, made small ----------------------------------------------------
def vit_b_32(image_size=224):
    """A small ViT. It has dropout, and its activations are smooth."""
    return torchvision.models.VisionTransformer(image_size, 4, 2, 2, 16, 32, dropout=0.1)


def wide_resnet50_2(**options):
    """A small ResNet."""
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [1, 1, 1, 1], width_per_group=4, **options)


torchvision.models._api.BUILTIN_MODELS |= dict(
    vit_b_32=vit_b_32, wide_resnet50_2=wide_resnet50_2)


# --- The loss: helpers --------------------------------------------------------------------------
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
    image, noise, length = draw(N, D), draw(N, D), draw(2, N, 1)
    distance = torch.linspace(0.1, spread, N)[:, None]
    a, b = torch.stack([image, image + distance * noise]) * length.exp()
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
        if form == "released":
            rows = v
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
        H = [j for j in negatives[i] if is_local(i, j)]
        size, positive = len(H), e[p]
        everyone = sum(e[j] for j in negatives[i])
        far = sum((e[j] for j in negatives[i] if j not in H), 0 * positive)

        w = [math.exp(beta * v[i][h] / t) for h in H]
        near = sum(wh * size / sum(w) * e[h] for wh, h in zip(w, H))
        near = (near - tau_plus * size * positive) / (1 - tau_plus)
        floor = size * math.exp(-1 / t)
        if size and near.item() < floor:
            near, clamped = floor, clamped + 1

        constant = 0
        if form == "released":
            constant = (n - 2) * math.exp(-1 / t)
            if size == n - 2:
                far = 1 + 0 * positive
        total = dict(
            info_nce=positive + everyone, dcl=everyone, released=far,
            hex=positive + far + near, decoupled=far + near)[form]
        losses.append(total.log() - s[i][p] / t + constant)
        sizes.append(size)

    some = sum(size > 0 for size in sizes)
    stats = dict(local=sum(sizes) / n, empty=1 - some / n, threshold=eps)
    if kind == "labels":
        stats["threshold"] = math.nan
    if form != "released":
        stats["clamped"] = clamped / max(some, 1)
    return sum(losses) / n, stats


def graded(f, *embeddings):
    """The loss, its gradient in each of the embeddings, and the statistics as floats."""
    embeddings = [x.detach().clone().requires_grad_() for x in embeddings]
    loss, stats = f(*embeddings)
    grads = torch.autograd.grad(loss, embeddings, allow_unused=True, materialize_grads=True)
    return loss.detach(), torch.stack(grads), {key: float(value) for key, value in stats.items()}


def assert_same(got, want, tol=1e-10):
    """Loss and gradient, with their dtypes, and the statistics that both have."""
    assert_close(got[:2], want[:2], rtol=tol, atol=tol)
    for key in got[2].keys() & want[2].keys():
        assert got[2][key] == approx(want[2][key], abs=tol, nan_ok=True), key


# --- The loss -----------------------------------------------------------------------------------
TEMPERATURES, QUANTILES = [0.02, 0.1, 0.5], [0.5, 0.9, 0.99]
BETAS, PLUSES = [0.0, 0.5, 1.0, 2.0], [0.0, 0.05, 0.1]
GRID = [
    dict(t=t, H=("quantile", q), beta=beta, tau_plus=plus)
    for t, q, beta, plus in product(TEMPERATURES, QUANTILES, BETAS, PLUSES)]
FIXED = [
    dict(H=("rescaled", 0.0)), dict(H=("rescaled", 0.5)), dict(H=("rescaled", 0.9)),
    dict(H=("above", 0.1)), dict(H=("above", -2)),
    dict(H=("labels", [0, 0, 1, 2, 2, 2, 3])), dict(H=("labels", [0] * 7))]
CASES = {2: GRID[::5], 3: GRID[::5], 5: GRID[::7], 17: GRID[::17], 26: GRID[::37], 7: FIXED}


@cases("form", FORMS)
@cases("N", CASES)
def test_loss_gradient_and_statistics_are_those_of_loops(form, N):
    for knobs in CASES[N]:
        want = graded(partial(naive, form, **knobs), *two_views(N))
        assert_same(graded(partial(ours, form, **knobs), *two_views(N)), want)


def on_circle(angle):
    """Three images, of which one is at this angle."""
    a, b = torch.tensor([[0.0, 0.4 + angle, 3.0], [0.3, 1.6, 3.5]], dtype=torch.float64)
    return [torch.stack([x.cos(), x.sin()], 1) for x in (a, b)]


@cases("form", ["hex", "decoupled"])
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


@cases("form", FORMS)
def test_gradcheck_with_a_learnable_temperature(form):
    """Where H cannot flip, and Q is 1: elsewhere Q and eps are held still on purpose."""
    f = partial(ours, form, H=("rescaled", 0.3))
    if form in ("hex", "decoupled"):
        f = partial(f, beta=0.0)
    for t in (0.3, 0.1):
        inputs = [*two_views(4), torch.tensor(t, dtype=torch.float64)]
        inputs = [x.requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(lambda *e: f(*e)[0], inputs)


NOBODY = ("labels", [0, 1, 2, 3, 4, 5])


@cases("form", FORMS)
@cases("H", [("quantile", 0.99), ("rescaled", 0.5), ("labels", [0] * 6), NOBODY])
def test_equal_embeddings_and_zeros_give_a_finite_loss_and_gradient(form, H):
    ones = torch.ones(6, 4)
    half = ones.clone()
    half[0] = 0
    for data in (ones, 0 * ones, half):
        loss, grad, _ = graded(partial(ours, form, H=H), data, data)
        assert loss.isfinite() and grad.norm() < 1e3


@cases("form", ["info_nce", "hex"])
def test_the_loss_of_equal_embeddings_is_the_logarithm_of_their_number(form):
    loss, _ = ours(form, torch.ones(6, 4), torch.ones(6, 4), H=NOBODY)
    assert loss.item() == approx(math.log(11), abs=1e-5)


@cases("form", FORMS)
def test_a_length_beyond_float32_is_not_a_number(form):
    a, b = (x.float() for x in two_views(6))
    assert not ours(form, 1e20 * a, b)[0].isfinite()


# What github.com/olivesgatech/HEX @ c3002ed computes in float64, for SimCLR and NNCLR alike:
# form, shift, temperature, fixed threshold; loss, |da|, da[0, 0], db[5, 0].
AUTHORS = """
released 0.0 0.1 0    -0.209686502289 0.124583599879 -0.002105660922  0.002185973938
released 0.0 0.1 0.9   0.057173995355 0.123146161097 -0.000531205316  0.002199590476
info_nce 0.0 0.1 0     0.768578547087 0.071991750913 -0.000654980593  0.001015350352
released 0.5 0.2 0     3.774087621686 0.055683415691 -0.000110334815 -0.000175189849
released 0.5 0.2 0.7   3.138836540220 0.056886314000 -0.000140903878 -0.000069540890
"""


@cases("line", AUTHORS.strip().splitlines())
def test_the_authors_numbers(line):
    form, *numbers = line.split()
    shift, t, fixed, *want = map(float, numbers)
    i = torch.arange(128, dtype=torch.float64)[:, None]
    j = torch.arange(16, dtype=torch.float64)
    group = torch.sin((i % 10 + 1) * (j + 1) * 1.3 + shift)
    image = group + 0.8 * torch.sin(i * (j + 2) * 0.7 + 2 * shift)
    a = image + 0.3 * torch.sin(i * (j + 3) * 1.1 + 3 * shift)
    b = image + 0.3 * torch.cos(i * (j + 4) * 0.9 + 4 * shift)

    H = ("rescaled", fixed) if fixed else ("quantile", 0.99)
    loss, (da, db), _ = graded(partial(ours, form, t=t, H=H), a, b)
    got = [x.item() for x in (loss, da.norm(), da[0, 0], db[5, 0])]
    assert got == approx(want, rel=0, abs=1e-10)


@cases("form", FORMS)
def test_half_precision_costs_its_own_rounding_and_autocast_costs_nothing(form):
    a, b = (x.float() for x in two_views(17))
    f = partial(ours, form, t=0.3, H=("rescaled", 0.6))
    exact = graded(f, a, b)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    assert_same(graded(autocast(f), a, b), exact, 1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        loss, grad, _ = graded(f, a.to(dtype), b.to(dtype))
        assert loss.dtype == torch.float32 and grad.isfinite().all()
        assert abs(loss - exact[0]) < 1e-2


@cases("form", FORMS)
@cases("t", [0.02, 0.005])
def test_low_temperatures_in_float32(form, t):
    """e^(1/t) is beyond float32, and float32's rounding of s is divided by t."""
    f, (a, b) = partial(ours, form, t=t), two_views(17)
    loss, grad, _ = graded(f, a.float(), b.float())
    want, want_grad, _ = graded(f, a, b)
    assert loss.item() == approx(want.item(), rel=1e-4)
    assert (grad - want_grad).norm() < 1e-3 * want_grad.norm()


# A call, and what the ValueError says. x is (4, 3).
REFUSALS = """
hx.info_nce(x, x, 0.0): temperature = 0.0
hx.info_nce(x, x, math.nan): temperature = nan
hx.info_nce(x, x[:3]): (4, 3) and (3, 3)
hx.dcl(x[0], x[0]): (3,)
hx.hex_nce(x[:1], x[:1]): N = 1
hx.hex_nce(x, x, beta=-1): beta = -1
hx.hex_nce(x, x, beta=1e38): beta = 1e+38
hx.hex_nce(x, x, tau_plus=1): tau_plus = 1
hx.hex_nce(x, x, threshold="a"): threshold = 'a'
hx.hex_nce(x, x, threshold=math.nan): threshold = nan
hx.AdaptiveThreshold(1.0): quantile = 1.0
hx.HEX(nn.Identity(), "nce"): loss = 'nce'
hx.HEX(nn.Bilinear(3, 3, 2))(x, x): tensor
hx.METHODS["byol"](nn.Identity(), 3, depth=9): depth
"""


@cases("line", REFUSALS.strip().splitlines())
def test_a_refusal_names_argument_and_value(line):
    call, _, words = line.partition("): ")
    with pytest.raises(ValueError, match=re.escape(words)):
        eval(call + ")", globals(), dict(x=torch.ones(4, 3)))


@cases("threshold, want", [
    (hx.StepThreshold(0.9, 0.1, 10), {0: 0.9, 9: 0.9, 10: 0.8, 45: 0.5, 90: 0.0, 500: 0.0}),
    (hx.CosineThreshold(0.9, 0.3, 100), {0: 0.9, 25: 0.6 + 0.3 * 0.5 ** 0.5, 50: 0.6, 300: 0.3})])
def test_schedules_have_no_state(threshold, want):
    for epoch in [*want, *reversed(want)]:
        got = graded(partial(hx.hex_nce, threshold=threshold, epoch=epoch), *two_views(5))
        assert_same(got, graded(partial(naive, "hex", H=("rescaled", want[epoch])), *two_views(5)))


# --- Methods ------------------------------------------------------------------------------------
COUNT = dict(simclr=2, nnclr=4, mocov3=6, byol=6, simsiam=4, barlow=2, vicreg=2)


def method(name):
    """A small one in float64, with the same weights each time."""
    torch.manual_seed(0)
    kind = hx.METHODS[name]
    sizes = dict(hidden=8, dim=6, predictor=8, queue=10)
    sizes = {key: size for key, size in sizes.items() if key in kind.settings}
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh())
    return kind(backbone, 16, **sizes).double()


def embeddings(name, N=8):
    g = torch.Generator().manual_seed(1)
    return 0.8 * torch.randn(COUNT[name], N, 6, generator=g, dtype=torch.float64)


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


@cases("name", COUNT)
def test_the_own_loss_is_the_papers(name):
    made, e = method(name), embeddings(name)
    loss, grad, _ = graded(lambda *e: (made.loss(*e)[0], {}), *e)
    want = own_by_hand(name, e, made.state_dict().get("queue"))
    assert loss.item() == approx(want.item(), rel=1e-6)
    if name in ("simsiam", "nnclr"):
        assert not grad[2:].any()               # what is predicted is held still


@cases("name", COUNT)
def test_the_loss_reaches_every_parameter(name):
    model = hx.HEX(method(name), threshold=hx.AdaptiveThreshold(0.8))
    x1, x2 = torch.linspace(-2, 2, 192).sin().view(2, 8, 3, 2, 2).double()
    loss, stats = model.loss(*model(x1, x2 + x1.roll(1, 0) ** 2))
    loss.backward()
    for key, p in model.named_parameters():
        shifts_a_norm = (name, key) == ("nnclr", "method.projector.7.bias")
        assert not p.requires_grad or shifts_a_norm or p.grad.norm() > 1e-9, key
    assert {"own", "hex", "threshold", "local", "empty", "clamped"} == stats.keys()


@cases("loss", hx.LOSSES)
@cases("name, given, alpha, scale", [
    ("vicreg", None, 0.1, 5), ("vicreg", 0.7, 0.7, 5), ("mocov3", None, 1, 1)])
def test_alpha_and_scale_and_the_mean_over_pairs(loss, name, given, alpha, scale):
    made, e = method(name), embeddings(name)
    knobs = dict(beta=0.5, tau_plus=0.2)
    want, pairs = made.loss(*e)
    if loss != "base":
        form = {"infonce": "info_nce"}.get(loss, loss)
        terms = [naive(form, *pair, t=0.3, **knobs)[0] for pair in pairs]
        want = (1 - alpha) * want + alpha * scale * sum(terms) / len(terms)
    e = [x.requires_grad_() for x in e.clone().unbind()]
    got, _ = hx.HEX(made, loss, alpha=given, temperature=0.3, **knobs).loss(*e)
    assert got.item() == approx(float(want), rel=1e-9)
    torch.autograd.grad(got, e)                 # each has one, as DDP wants it


def test_the_warm_up_is_the_own_loss_or_a_fixed_threshold():
    made, e = method("vicreg"), embeddings("vicreg")
    own, _ = made.loss(*e)
    late, _ = hx.HEX(made, threshold=hx.StepThreshold(0.9, 0, 1)).loss(*e)
    fixed, _ = hx.HEX(made, threshold=0.2).loss(*e)
    falling = hx.StepThreshold(1.2, 0.1, 1)                     # 0.9 at epoch 3
    for threshold, early in ((None, own), (0.2, fixed)):
        model = hx.HEX(made, threshold=falling, warmup=3, warmup_threshold=threshold)
        for epoch, want in ((0, early), (2, early), (3, late)):
            assert_close(model.loss(*e, epoch=epoch)[0], want)


def test_wrapper_and_thresholds_can_be_pickled():
    model = hx.HEX(method("vicreg"), threshold=hx.CosineThreshold())
    again = pickle.loads(pickle.dumps(model))
    e = embeddings("vicreg")
    assert torch.equal(again.loss(*e)[0], model.loss(*e)[0])


def test_the_queue_takes_the_first_views_of_every_loss_and_the_oldest_leave_it():
    made = method("nnclr")                      # it has a queue of 10
    before = made.queue.clone()
    outputs = torch.arange(1.0, 145).sin().double().view(2, 4, 3, 6)
    made.after_step(0.5, outputs)
    assert_close(made.queue[-6:], F.normalize(outputs[:, 2].flatten(0, 1)))
    assert_close(made.queue[:4], before[-4:])


def test_the_module_of_the_readme_runs():
    text = Path(hx.__file__).with_name("README.md").read_text("utf-8")
    names = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    assert names["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in names["model"].parameters())


# --- Views --------------------------------------------------------------------------------------
def config(text=""):
    return hx.parse(f"--workers 0 --device cpu {text}".split())


def random_pictures(count, *shape, classes=None):
    """Pictures of noise, with labels in turn."""
    g = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (count, 3, *shape), generator=g).byte()
    return hx.Pictures(pictures, classes and torch.arange(count) % classes)


def resized(crop, size):
    return TF.resize(crop, [size, size], TF.InterpolationMode.BICUBIC, antialias=True)


def view_by_hand(crop, changes, mean_std):
    """One view, by torchvision's own operators."""
    flip, brightness, contrast, saturation, hue, gray, sigma, solarize = changes.tolist()
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
    return TF.normalize(x, *mean_std)


IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CIFAR10 = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]


def batch_by_hand(batch, mean_std=IMAGENET):
    views = [view_by_hand(*each, mean_std) for each in zip(batch.crops, batch.changes)]
    return torch.stack(views)


# flip, brightness, contrast, saturation, hue, gray, sigma, solarize
CHANGES = """
1 1.5 0.4 1.7  0.15 0 1.3 1
0 0.3 1.8 0.2 -0.20 1 0.0 0
1 1.0 1.0 1.0  0.00 0 0.1 0
0 1.8 1.2 0.9  0.05 0 2.0 1
0 1.0 1.0 1.0  0.00 0 0.0 0
1 0.7 0.6 0.5 -0.10 1 0.7 1
"""


@cases("data, mean_std", [("shapes", IMAGENET), ("cifar10", CIFAR10)])
def test_a_batch_is_augmented_as_torchvision_does_it_picture_by_picture(data, mean_std):
    changes = torch.tensor([float(number) for number in CHANGES.split()]).view(6, 8)
    batch = hx.Batch(random_pictures(6, 40, 40).pictures, changes, None)
    got = hx.augment(batch, config(f"--data {data} --blur 0 1 --solarize 1 0"))
    # A hue near the border of two sixths of the circle may lose a few units in its last place.
    want = batch_by_hand(batch, mean_std)
    assert_close(got.contiguous(), want, rtol=0, atol=2e-5)


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

    blur1, blur2 = (sigma > 0).float().mean(0)
    shares = torch.stack([flip.mean(), gray.mean(), blur1, blur2, *solarize.mean(0)])
    assert shares.tolist() == approx([0.5, 0.25, 1, 0.1, 0, 0.2], abs=0.05)
    assert 0.1 <= sigma[:, 0].min() < 0.15 and 1.9 < sigma[:, 0].max() <= 2

    jittered = jitter[0] != 1
    assert jittered.float().mean().item() == approx(0.8, abs=0.04)
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


@cases("shape", [(1, 20000), (20000, 1)])
def test_a_picture_that_is_a_line_is_cropped_too(shape):
    views = hx.Views(random_pictures(1, *shape), config("--size 224"))
    assert views[[(0, 0)]].crops.shape == (2, 3, 224, 224)


@cases("size, side", [(32, 128), (224, 112)])
def test_the_centre_crop_is_224_of_256_and_small_pictures_are_whole(size, side):
    pictures = random_pictures(1, 128, 160)
    batch = hx.Views(pictures, config(f"--size {size}"), views=0)[[(0, 0)]]
    want = resized(TF.center_crop(pictures.read(0), [side, side]), size)
    assert torch.equal(batch.crops, want[None])
    assert batch.changes.tolist() == [[0, 1, 1, 1, 0, 0, 0, 0]]


# --- Backbones ----------------------------------------------------------------------------------
def wave(size):
    return torch.linspace(-1, 1, 6 * size * size).sin().view(2, 3, size, size)


def features_of(model, x):
    """What the last Linear of one of torchvision's classifiers sees."""
    *_, last = (each for each in model.modules() if isinstance(each, nn.Linear))
    seen = []
    last.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        model.eval()(x)
    return seen[0]


@cases("name, size", [
    ("resnet18", 96), ("resnet18", 64), ("vit_b_32", 32), ("mobilenet_v3_small", 64)])
def test_a_backbone_is_torchvisions_model_up_to_its_last_linear(name, size):
    options = {}
    if name.startswith("vit"):
        options["image_size"] = size
    torch.manual_seed(0)
    mine, width = hx.build_backbone(name, size)
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, **options)
    if (name, size) == ("resnet18", 64):                    # a 3x3 stem, and no max-pool
        theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        theirs.maxpool = nn.Identity()
        theirs.conv1.load_state_dict(mine.conv1.state_dict())
        spread = (2 / (64 * 9)) ** 0.5                      # Kaiming's, of the fan out
        assert mine.conv1.weight.std().item() == approx(spread, rel=0.1)
    got, want = mine.eval()(wave(size)), features_of(theirs, wave(size))
    assert_close(got, want)
    assert got.shape == (2, width)


@cases("channels, groups", [(8, 1), (48, 3), (128, 8), (20, 1)])
def test_group_norm_has_16_channels_a_group_where_they_divide(channels, groups):
    assert hx.group_norm(channels).num_groups == groups


@cases("wrap", [
    lambda state: state,
    lambda state: dict(state_dict=state),
    lambda state: {f"module.encoder.{key}": value for key, value in state.items()}])
def test_a_file_of_others_is_loaded_without_its_classifier(wrap, tmp_path):
    theirs = torchvision.models.get_model("wide_resnet50_2")
    torch.save(wrap(theirs.state_dict()), tmp_path / "a.pt")
    command = "--data shapes --backbone wide_resnet50_2 --norm batch --size 96 --probe"
    cfg = config(f"{command} {tmp_path}/a.pt")
    mine = hx.load_backbone(cfg.probe, cfg, "").eval()
    assert_close(mine(wave(96)), features_of(theirs, wave(96)))


def test_a_vit_is_loaded_at_another_size_and_another_model_is_refused(tmp_path):
    torch.save(vit_b_32(32).state_dict(), tmp_path / "a.pt")
    command = f"--data shapes --norm batch --size 16 --probe {tmp_path}/a.pt --backbone"
    cfg = config(f"{command} vit_b_32")
    assert hx.load_backbone(cfg.probe, cfg, "")(wave(16)).shape == (2, 16)
    cfg = config(f"{command} wide_resnet50_2")
    with pytest.raises(hx.UserError, match="(?s)conv1.*another remedy"):
        hx.load_backbone(cfg.probe, cfg, "another remedy")


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


def probe_of(out):
    return json.load(open(out / "probe.json"))


def losses(out):
    return [event["loss"] for event in events(out, "step")]


def lars_by_hand(named, velocity, lr, cfg):
    for (_, p), v in zip(named, velocity, strict=True):
        if p.ndim > 1:                                      # not for biases and norms
            norm = p.norm()
            factor = cfg.eta * norm / (p.grad.norm() + cfg.weight_decay * norm + 1e-8)
            if cfg.clip:
                factor = min(factor / lr, 1)
            p.grad = factor * (p.grad + cfg.weight_decay * p)
        v.mul_(0.9).add_(p.grad)
        p.sub_(lr * v)
        p.grad = None


def test_lars_leaves_alone_what_is_no_weight():
    """A ViT's class token and position embeddings have more than one dimension, too."""
    model = vit_b_32(16)
    for p in model.parameters():
        p.data.add_(0.01)
        p.grad = torch.zeros_like(p)
        p.grad.view(-1)[0] = 1
    before = copy.deepcopy(model.state_dict())
    hx.LARS(model.named_parameters(), 0.5, weight_decay=0.1, clip=False).step()
    for name, p in model.named_parameters():
        step = (p.detach() - before[name]).view(-1)
        is_plain = step[0].isclose(torch.tensor(-0.5)) and not step[1:].any()
        assert is_plain != (p.ndim > 1 and name.endswith("weight")), name


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
    named = [(name, p) for name, p in method.named_parameters() if "target" not in name]
    velocity = [torch.zeros_like(p) for _, p in named]
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
            lars_by_hand(named, velocity, lr, cfg)
            done = (step + 1) / total
            share = (1 - (cfg.ema or 0)) * (math.cos(math.pi * done) + 1) / 2
            for old, new in zip(target.parameters(), online.parameters()):
                old.copy_((1 - share) * old + share * new)
        means = {key: sum(part[key] for part in parts) / count for key in parts[0]}
        log.append(dict(step=step + 1, epoch=epoch, lr=lr) | means)
    return method.backbone, log


LOOP = (
    "--size 16 --accumulate 2 --lr 0.05 --weight-decay 0.03 --eta 0.04 --alpha 0.3 --seed 3 "
    "--temperature 0.3 --beta 0.5 --tau-plus 0.05 --blur 0.5 0.3 --solarize 0 0.5")


@cases("more", [
    "--method byol --quantile 0.8 --ema 0.7 --predictor 32 --clip --norm group",
    "--hex-warmup 1 --threshold oracle"])
def test_the_command_is_a_plain_loop(more, tmp_path):
    """Order, views, loss, accumulation, schedule, LARS, momentum and log, in six steps."""
    argv = [*SMALL, *f"{LOOP} {more}".split()]
    assert run(*argv, "--out", tmp_path / "o") == 0
    backbone, log = plain_loop(config(" ".join(argv)), DRAW(112, 0))

    got = torch.load(tmp_path / "o" / "backbone.pt")
    for name, value in backbone.named_parameters():
        assert_close(got[name], value.data, rtol=0, atol=1e-5)
    assert len(log) == 6
    for event, want in zip(events(tmp_path / "o", "step"), log, strict=True):
        want = {key: value for key, value in want.items() if value == value}
        assert {key: event[key] for key in want} == approx(want, rel=1e-5, abs=1e-6)


# --- The golden trajectory ----------------------------------------------------------------------
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


def by_name(words):
    words = words.split()
    return dict(zip(words[::2], words[1::2]))


def table(text):
    """A line for each thing, indented where it goes on: its numbers by name."""
    lines = text.strip().replace("\n    ", " ").splitlines()
    return {line.partition(": ")[0]: by_name(line.partition(": ")[2]) for line in lines}


def trajectory(argv, out):
    """What a run has left, as a line for each thing, with its numbers by name."""
    cfg = config(" ".join(argv))
    batch = hx.Views(DRAW(112, 0), cfg)[[(1, i) for i in range(4)]]
    crops = batch.crops.double().unflatten(0, (2, 4)).mean((0, 2, 3, 4))
    yield "crops", {str(i): mean for i, mean in enumerate(crops.tolist())}
    views = hx.augment(batch, cfg).double().square().mean((1, 2, 3))
    yield "views", {str(i): mean for i, mean in enumerate(views.tolist())}

    for event in events(out):
        yield f"{event.pop('event')} {event.pop('step')}", event

    norms = {}
    for key, value in torch.load(out / "checkpoint.pt")["model"].items():
        part = key.split(".")[1]
        norms[part] = norms.get(part, 0) + value.double().norm().item()
    yield "norms", norms

    probe = probe_of(out)
    yield "probe", {key: probe[key] for key in "top1 top5 knn train held_out".split()}


@cases("name", GOLDEN_RUNS)
def test_golden_trajectory(name, tmp_path):
    argv = (GOLDEN_OPTIONS + GOLDEN_RUNS[name]).split()
    assert run(*argv, "--out", tmp_path / "o") == 0
    got = {f"{name} {key}": each for key, each in trajectory(argv, tmp_path / "o")}
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
            close = approx(float(number), rel=2e-3, abs=SLACK.get(word, 1e-4))
            assert got[key][word] == close, (key, word)


# --- Recipes ------------------------------------------------------------------------------------
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
PAPERS = """
simclr: alpha 1.0 hidden 2048 dim 128
nnclr: alpha 1.0 hidden 2048 dim 256 predictor 4096 queue 98304
mocov3: alpha 1.0 hidden 4096 dim 256 predictor 4096 ema 0.99
byol: alpha 0.1 hidden 4096 dim 256 predictor 4096 ema 0.99
simsiam: alpha 0.1 hidden 2048 dim 2048 predictor 512
barlow: alpha 0.1 hidden 8192 dim 8192
vicreg: alpha 0.1 hidden 8192 dim 8192
"""


@cases("recipe", ["imagenet", "cifar", "shapes", "small"])
def test_recipes_give_the_settings_of_their_sources(recipe):
    sources = table(RECIPES)
    for name, heads in table(PAPERS).items():
        want = heads | sources[recipe] | sources.get(f"{recipe} {name}", {})
        cfg = config(f"--recipe {recipe} --method {name} --amp {want['amp']}")
        if cfg.predictor is None:
            want.pop("predictor", None)
        got = {key: re.sub("[] ()[]", "", str(getattr(cfg, key))) for key in want}
        assert got == want, name


@cases("argv, recipe, lr", [
    ("folder --root .", "imagenet", 0.3), ("cifar100", "cifar", 0.4),
    ("cifar10 --recipe small", "small", 0.2)])
def test_the_data_choose_the_recipe(argv, recipe, lr):
    cfg = config("--data " + argv)
    assert (cfg.recipe, cfg.lr) == (recipe, lr)


# --- The probe ----------------------------------------------------------------------------------
def probe(count, classes, shift=0, text="", noise=255):
    """The linear probe on raw pixels: of each class a random picture, and noise.

    shift: how far the labels of val are turned.
    """
    g = torch.Generator().manual_seed(0)
    draw = partial(torch.randint, 0, 256, generator=g)
    targets = torch.arange(count) % classes
    kinds = draw((10, 3, 8, 8))[targets]
    train, val = (
        ((255 - noise) * kinds + noise * draw((count, 3, 8, 8))) // 255 for _ in range(2))
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
    assert result["held_out"] == 10 and result["train"] == 140
    assert max(result["holdout"].values()) < 70 and result["top1"] < 30


def test_the_rates_momentum_decay_and_batch_size_of_the_heads(monkeypatch):
    step, seen = torch.optim.SGD.step, []
    cross_entropy, sizes = F.cross_entropy, set()

    def recorded(self):
        seen.append([[g["lr"], g["weight_decay"], g["momentum"]] for g in self.param_groups])
        step(self)

    def measured(logits, labels):
        sizes.add(len(labels))
        return cross_entropy(logits, labels)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    monkeypatch.setattr(F, "cross_entropy", measured)
    probe(300, 4, text="--probe-epochs 10")
    rates = numpy.array([0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0])
    falls = numpy.array([1] * 6 + [0.1] * 2 + [0.01] * 2)[:, None]
    rate, decay, momentum = numpy.array(seen).transpose(2, 0, 1)
    assert rate == approx(falls * rates) and sizes == {256}
    assert (decay == 1e-5).all() and (momentum == 0.9).all()


def test_a_share_of_the_labels_is_balanced_and_is_all_that_trains():
    result = probe(400, 4, text="--probe-epochs 2 --label-fraction 0.2")
    assert result["train"] == 72 and result["held_out"] == 8
    uneven = torch.arange(3).repeat_interleave(torch.tensor([5, 50, 500]))
    chosen = hx.labeled_pictures(config("--label-fraction 0.1"), uneven)
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
    fixed = hx.Views(train, dataclasses.replace(cfg, seed="fixed"))
    batch = fixed[[(0, i) for i in index.tolist()]]
    views = batch_by_hand(batch).chunk(2)
    for _ in range(20):
        model(*views)                               # for BatchNorm's statistics
    got = hx.emergence(model, cfg, train, val)

    model.eval()
    with torch.no_grad():
        z = F.normalize(torch.cat(model(*views)).double())
        x = model.method.backbone(TF.normalize(train.pictures / 255, *IMAGENET)).double()
    s, image = z @ z.T, torch.arange(60).repeat(2)
    negative = image[:, None] != image
    ranked = s[negative].view(120, 118).sort(1).values
    eps = ranked[:, round(0.9 * 117)].mean()
    near = negative & (s > eps)
    want = dict(threshold=eps, local=near.sum() / 120, std=z.std(0).mean() * math.sqrt(8))
    for labels, name in ((train.targets, ""), (train.coarse, "_coarse")):
        label = labels[index].repeat(2)
        same = (label[:, None] == label).double()
        want |= {f"purity{name}": same[near].mean(), f"chance{name}": same[negative].mean()}
    values = torch.linalg.svdvals(x)
    shares = values / values.sum()
    want["rankme"] = (-(shares * shares.clamp(min=1e-20).log()).sum()).exp()
    for key, value in want.items():
        assert got[key] == approx(value.item(), rel=1e-3), key
    assert 0 <= got["knn"] <= 100


def test_256_and_2048_and_512_pictures_are_read_once_for_the_figures_of_all_epochs(monkeypatch):
    asked, item = [], hx.Views.__getitem__

    def counted(self, keys):
        asked.extend([self.views] * len(keys))
        return item(self, keys)

    monkeypatch.setattr(hx.Views, "__getitem__", counted)
    train, val = random_pictures(2100, 8, 8, classes=5), random_pictures(600, 8, 8, classes=5)
    cfg = config("--size 8 --hidden 8 --dim 8")
    for _ in range(2):
        hx.emergence(hx.build_model(cfg), cfg, train, val)
    assert asked.count(2) == 256 and asked.count(0) == 2048 + 512


# --- Pictures -----------------------------------------------------------------------------------
FOLDER = [
    *SHORT, *"--size 16 --backbone resnet10_narrow --accumulate 1 --data folder --root".split()]


def noise(path, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((40, 30), 99).convert(mode).save(path)


def flat(root):
    return hx.Folder(root, labeled=False)


def files_of(folder):
    return [os.fsdecode(file) for file in folder.files]


def refused(capsys, *argv):
    """The status and the one line of a command that must fail."""
    capsys.readouterr()
    status = run(*argv)
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("hex.py: error: ")]
    assert status and len(errors) == 1 and "Traceback" not in err and out == "", err
    return status, errors[0]


RAMP = numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)[:8]
LYING = Image.Exif()
LYING[0x0112] = 6                                   # the picture is stored lying on its side
BROKEN = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"


@cases("name, mode, exif", [
    ("a.jpg", "RGB", None), ("a.jpg", "L", None), ("a.jpg", "CMYK", None), ("a.png", "P", None),
    ("a.png", "RGBA", None), ("a.tiff", "RGB", None), ("a.webp", "RGB", None),
    ("a.jpg", "L", LYING.tobytes()), ("a.png", "L", LYING.tobytes()), ("a.png", "L", BROKEN)])
def test_every_kind_of_picture_is_decoded_upright(name, mode, exif, tmp_path):
    options = dict(exif=exif) if exif else {}
    Image.fromarray(RAMP).convert(mode).save(
        tmp_path / name, quality=100, lossless=True, **options)
    want = RAMP
    if exif == LYING.tobytes():
        want = numpy.rot90(RAMP, -1)
    got = flat(tmp_path).read(0)
    assert got.shape == (3, *want.shape) and got.dtype == torch.uint8
    assert abs(got.numpy().astype(int) - want).max() <= (4 if "jpg" in name else 0)


@cases("name, dtype", [
    ("a.png", "<u2"), ("a.tiff", "<u2"), ("a.tiff", ">u2"), ("a.pgm", "<u2")])
def test_16_bits_of_either_byte_order_are_scaled_to_8(name, dtype, tmp_path):
    Image.fromarray((RAMP.astype(int) * 257 + 100 * (RAMP < 255)).astype(dtype)).save(
        tmp_path / name)
    assert (flat(tmp_path).read(0).numpy() == RAMP).all()


@cases("dtype", ["i2", "i4", "f4"])
def test_numbers_without_a_known_range_are_refused(dtype, tmp_path):
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(hx.UserError, match="a.tiff: not readable .*no known range"):
        flat(tmp_path).read(0)


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


def test_hidden_files_runs_and_links_that_lead_up_are_no_pictures(tmp_path):
    wanted = ["z.png", "a/c.png", "b/d/e.png"]
    for name in [*wanted, ".a.png", ".b/c.png", "b/.x/0.png", "r/lock", "r/config.json", "o/1"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("a/up", "b/d/up"):
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "b")
    folder = hx.Folder(tmp_path, labeled=False, skip={str(tmp_path / "o")})
    assert files_of(folder) == wanted
    assert hx.Folder(tmp_path).classes == ["a", "b", "o"]
    (tmp_path / "a" / "0.png").symlink_to(os.devnull)           # as a pipe, but it never waits
    with pytest.raises(hx.UserError, match="no regular file"):
        hx.Folder(tmp_path).read(0)


def test_pictures_without_labels_are_trained_on_and_own_output_is_not(
        tmp_path, monkeypatch, capsys):
    for i in range(20):
        noise(tmp_path / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    for out in ([], [], ["--out", "other"]):
        assert run(*FOLDER, ".", *out) == 0
        err = capsys.readouterr().err
        assert "20 train, 0 val" in err
    run_folder = tmp_path / "runs" / "folder-simclr-hex-s0"
    assert {"backbone.pt", "neighbours.png"} <= {*os.listdir(run_folder)} - {"probe.json"}
    figures = events(run_folder)[0].keys()
    assert {"threshold", "local", "rankme", "std"} == figures - {"event", "step", "epoch"}


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


def test_imagenet_is_probed_on_live_crops_and_goes_on_after_a_signal(
        labelled, tmp_path, monkeypatch):
    command = [*FOLDER, labelled, "--data", "imagenet", "--probe-epochs", 5, "--out"]
    assert run(*command, tmp_path / "whole") == 0
    result = probe_of(tmp_path / "whole")
    assert result["train"] == 22 and result["held_out"] == 2
    assert result["val"] == len(result["right"]) == 24

    step, count = torch.optim.SGD.step, []

    def stopped(self):
        count.append(type(self))
        if count.count(torch.optim.SGD) == 2:
            stop()
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", stopped)
        assert run(*command, tmp_path / "stopped") == 75
    assert not (tmp_path / "stopped" / "probe.json").exists()
    assert torch.load(tmp_path / "stopped" / "probe.pt")["step"] == 3
    assert run(*command, tmp_path / "stopped") == 0
    again = probe_of(tmp_path / "stopped")
    assert {**result, "asked": 0} == {**again, "asked": 0}


def test_bad_files_are_named_or_skipped_and_results_say_of_how_many_pictures(
        labelled, tmp_path, capsys):
    command = [*FOLDER, labelled, "--out", tmp_path / "o"]
    (labelled / "train" / "a" / "0.jpg").write_text("no picture")
    assert "0.jpg: not readable" in refused(capsys, *command)[1]
    bad = [*(labelled / "val").rglob("*.jpg")]
    for path in bad:
        path.write_text("no picture")
    assert "can be read" in refused(capsys, *command, "--skip-bad-files")[1]
    noise(bad[0])
    assert run(*command, "--skip-bad-files") == 0
    out, err = capsys.readouterr()
    assert "of 1 pictures" in out and "skipped" in err


# Krizhevsky's table. In the archive classes are numbered by the alphabet, and so are super-classes.
CIFAR100 = """
beaver dolphin otter seal whale
aquarium_fish flatfish ray shark trout
orchid poppy rose sunflower tulip
bottle bowl can cup plate
apple mushroom orange pear sweet_pepper
clock keyboard lamp telephone television
bed chair couch table wardrobe
bee beetle butterfly caterpillar cockroach
bear leopard lion tiger wolf
bridge castle house road skyscraper
cloud forest mountain plain sea
camel cattle chimpanzee elephant kangaroo
fox porcupine possum raccoon skunk
crab lobster snail spider worm
baby boy girl man woman
crocodile dinosaur lizard snake turtle
hamster mouse rabbit shrew squirrel
maple_tree oak_tree palm_tree pine_tree willow_tree
bicycle bus motorcycle pickup_truck train
lawn_mower rocket streetcar tank tractor
"""


@cases("data, folder, files", [
    ("cifar10", "cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]),
    ("cifar100", "cifar-100-python", ["train", "test"])])
def test_cifar_from_an_archive_in_its_own_format(data, folder, files, tmp_path, monkeypatch):
    rows = [row.split() for row in CIFAR100.strip().splitlines()]
    above = dict(sorted((name, number) for number, row in enumerate(rows) for name in row))
    coarse = [*above.values()]
    path, fine = tmp_path / folder, [*range(10)] * 10
    if data == "cifar100":
        fine = [*range(100)]
    (path / "meta").parent.mkdir()
    for name in [*files, "meta", "batches.meta"]:
        pictures = numpy.random.default_rng(0).integers(0, 256, (100, 3072), numpy.uint8)
        content = dict(data=pictures, labels=fine, fine_labels=fine, coarse_labels=coarse)
        content |= dict(label_names=[], fine_label_names=[])
        (path / name).write_bytes(pickle.dumps(content))
    archive = folder.replace("-batches-py", "-python") + ".tar.gz"
    with tarfile.open(tmp_path / archive, "w:gz") as file:
        file.add(path, folder)
    shutil.rmtree(path)

    # The checksums that torchvision knows are of other pictures.
    for name in ("cifar", "utils"):
        monkeypatch.setattr(
            f"torchvision.datasets.{name}.check_integrity", lambda path, *_: os.path.exists(path))
    train, val = hx.load_data(config(f"--data {data} --root {tmp_path}"))
    assert len(train) == 100 * (len(files) - 1)
    assert (val.read(3).numpy() == pictures[3].reshape(3, 32, 32)).all()
    assert val.targets.tolist() == fine
    assert data == "cifar10" or train.coarse.tolist() == coarse


# --- The life of a run --------------------------------------------------------------------------
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


def same_bytes(first, second):
    return (first / "backbone.pt").read_bytes() == (second / "backbone.pt").read_bytes()


def test_what_a_run_leaves(finished):
    assert {*os.listdir(finished)} == set(
        "backbone.pt checkpoint.pt config.json lock metrics.jsonl neighbours.png "
        "neighbours_early.png probe.json".split())
    assert [event["step"] for event in events(finished, "step")] == [*range(1, 15)]
    assert [event["epoch"] for event in events(finished, "epoch")] == [0, 1, 2]
    result = probe_of(finished)
    for digits, share in (("right", "top1"), ("knn_right", "knn")):
        right = result[digits]
        assert 100 * right.count("1") / len(right) == approx(result[share])
    saved = json.load(open(finished / "config.json"))
    assert saved["config"]["batch_size"] == 16 and saved["torch"] == torch.__version__
    state = torch.load(finished / "backbone.pt")
    assert all(value.is_contiguous() for value in state.values())
    width, height = Image.open(finished / "neighbours.png").size
    assert width == height >= 8 * 64


def test_a_run_with_loader_processes_is_one_without(finished, tmp_path):
    assert run(*SMALL, "--workers", 2, "--out", tmp_path / "o") == 0
    assert same_bytes(tmp_path / "o", finished)


@cases("threshold, eps", [("step", [0.9, 0.8]), ("cosine", [0.9, 0.6])])
def test_a_scheduled_threshold_by_command(threshold, eps, tmp_path):
    assert run(*SMALL, "--threshold", threshold, "--out", tmp_path / "o") == 0
    seen = {event["epoch"]: event["threshold"] for event in events(tmp_path / "o", "step")}
    assert [*seen.values()] == approx(eps)


@cases("stds, warned", [
    ([0.02, 0.005, 0.03], "std 0.005"), ([0.0, 0.0, 0.2], "std 0.000")])
def test_a_collapse_is_warned_of_and_all_settings_are_said(
        stds, warned, tmp_path, monkeypatch, capsys):
    found = iter(stds)
    monkeypatch.setattr(hx, "emergence", lambda *_: dict(std=next(found), purity=math.nan))
    assert run(*SMALL, "--tau-plus", 0, "--out", tmp_path / "o") == 0
    out, err = capsys.readouterr()
    assert err.count("warning") == 1 and warned in err
    assert events(tmp_path / "o")[0]["purity"] is None and "purity" not in out
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
    assert same_bytes(out, finished)


def test_dropout_is_the_same_after_a_resume(tmp_path, monkeypatch):
    command = [*SHORT, "--backbone", "vit_b_32", "--size", 16, "--out"]
    assert run(*command, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        at_step(patch, 3, stop)
        assert run(*command, tmp_path / "stopped") == 75
    assert run(*command, tmp_path / "stopped") == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


@cases("epochs", [0, 1])
def test_a_signal_in_the_last_figures_is_not_lost(epochs, tmp_path, monkeypatch):
    emergence = hx.emergence
    monkeypatch.setattr(hx, "emergence", lambda *args: [stop(), emergence(*args)][1])
    assert run(*SHORT, "--lr", 0, "--epochs", epochs, "--out", tmp_path / "o") in (2, 75)
    argv = [*SHORT, "--epochs", epochs, "--out", tmp_path / "o"]
    assert run(*argv) == 75 and not (tmp_path / "o" / "probe.json").exists()


def test_a_second_signal_after_3_seconds_ends_at_once(monkeypatch):
    ended, now = [], [10.0]
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with hx.signals_counted(restore=True) as came:
        for now[0], count, exits in ((10.0, 1, []), (12.0, 2, []), (14.0, 3, [75])):
            stop()
            assert (len(came), ended) == (count, exits)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_finished_run_says_so_and_evaluation_options_evaluate_again(done, capsys, monkeypatch):
    before = (done / "metrics.jsonl").read_bytes()
    assert run(*SMALL, "--out", done) == 0
    assert capsys.readouterr().err.count("was finished before") == 2
    monkeypatch.setattr(hx, "learning_rate", lambda *_: 1 / 0)      # it does not train again
    assert run(*SMALL, "--probe-epochs", 3, "--label-fraction", 0.5, "--out", done) == 0
    again = probe_of(done)
    assert again["asked"]["probe_epochs"] == 3 and again["train"] + again["held_out"] == 56
    assert (done / "metrics.jsonl").read_bytes() == before
    (done / "checkpoint.pt").unlink()
    assert run(*SMALL, "--out", done) == 0


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


PROBE = "--probe-epochs 2 --workers 0 --device cpu --probe".split()


def test_a_backbone_is_probed_as_in_its_run(done, tmp_path, capsys):
    assert run(*PROBE, done / "backbone.pt", "--out", tmp_path / "p") == 0
    first, again = (probe_of(out) for out in (done, tmp_path / "p"))
    assert first["right"] == again["right"]
    state = torch.load(done / "backbone.pt")
    state["0.weight"] *= math.nan
    torch.save(state, done / "backbone.pt")
    line = refused(capsys, *PROBE, done / "backbone.pt", "--out", tmp_path / "q")[1]
    assert "not finite" in line


# --- What goes wrong ----------------------------------------------------------------------------
@cases("config, words", [
    ([], "--backbone"), (dict(backbone="resnet18", size="big"), "--backbone"),
    (dict(recipe=None, backbone="resnet18", norm="batch", size="big", data="shapes", root=None),
     "--size")])
def test_a_config_beside_a_backbone_is_checked_like_a_command(config, words, done, capsys):
    (done / "config.json").write_text(json.dumps(dict(config=config)))
    assert words in refused(capsys, *PROBE, done / "backbone.pt")[1]


def test_another_experiment_is_refused_with_the_settings_that_differ(done, capsys):
    line = refused(capsys, *SMALL, "--beta", 0.5, "--out", done)[1]
    assert "beta 1.0 there, 0.5 here" in line and "--out" in line


def test_a_run_at_work_and_a_folder_that_cannot_be_written_are_refused(
        done, monkeypatch, capsys):
    with open(done / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is at work" in refused(capsys, *SMALL, "--out", done)[1]
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be written" in refused(capsys, *SMALL, "--out", done)[1]


def test_a_file_system_without_locks_and_a_folder_with_other_files_are_used(
        done, tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert run(*SMALL, "--out", done) == 0 and "No locks" in capsys.readouterr().err
    (tmp_path / "o" / "lost+found").mkdir(parents=True)
    assert run(*SHORT, "--epochs", 0, "--out", tmp_path / "o") == 0
    (tmp_path / "o" / "config.json").unlink()
    assert "without its config.json" in refused(capsys, *SHORT, "--out", tmp_path / "o")[1]


@cases("damage, words", [
    (lambda state: dict(state, experiment="another's"), "of another experiment"),
    (lambda state: [], "delete it to start again")])
def test_a_checkpoint_of_another_run_or_none_is_refused(damage, words, done, capsys):
    state = torch.load(done / "checkpoint.pt")
    torch.save(damage(state), done / "checkpoint.pt")
    assert words in refused(capsys, *SMALL, "--out", done)[1]


def test_a_foreign_backbone_is_not_taken_for_the_runs_own(done, finished):
    state = torch.load(done / "backbone.pt")
    torch.save({key: 0 * value for key, value in state.items()}, done / "backbone.pt")
    (done / "probe.json").unlink()
    assert run(*SMALL, "--out", done) == 0
    assert (done / "probe.json").read_bytes() == (finished / "probe.json").read_bytes()


@cases("damage", [
    Path.unlink, lambda log: log.write_bytes(b"\0\0{}\n[3]\n{\n"),
    lambda log: [log.unlink(), log.mkdir()]])
def test_the_log_never_stops_a_run(damage, done, monkeypatch):
    (done / "backbone.pt").unlink()
    damage(done / "metrics.jsonl")
    assert run(*SMALL, "--out", done) == 0
    shutil.copy(done / "config.json", done.parent)
    command = [*SMALL, "--epochs", 1, "--lr-warmup", 0, "--out", done.parent / "new"]
    if (done / "metrics.jsonl").is_dir():
        (done.parent / "new" / "metrics.jsonl").mkdir(parents=True)
    assert run(*command) == 0


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


@cases("stream", [Broken(), None])
def test_the_terminal_never_stops_a_run(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    assert run(*SHORT, "--out", tmp_path / "o") == 0
    assert (tmp_path / "o" / "probe.json").exists()


def test_a_loader_process_that_dies_ends_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    workers = multiprocessing.active_children
    at_step(monkeypatch, 2, lambda: workers()[0].kill())
    line = refused(capsys, *SMALL, "--workers", 1, "--out", tmp_path / "o")[1]
    assert "DataLoader worker" in line or "reset by peer" in line


@cases("broken", [
    lambda loss, e: loss * math.nan, lambda loss, e: loss + (0 * e.sum()).sqrt(),
    lambda loss, e: loss + 0 * (1e20 * e).square().sum()])
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_and_leaves_the_checkpoint(
        broken, tmp_path, monkeypatch, capsys):
    loss, calls = hx.HEX.loss, iter(range(99))

    def patched(self, *embeddings, **options):
        value, stats = loss(self, *embeddings, **options)
        if next(calls) == 3:
            value = broken(value, embeddings[0])
        return value, stats

    monkeypatch.setattr(hx.HEX, "loss", patched)
    line = refused(capsys, *SMALL, "--checkpoint-every", 2, "--out", tmp_path / "o")[1]
    assert "step 4: " in line and "not finite" in line
    state = torch.load(tmp_path / "o" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


# Variables and options of a command that is wrong; what its line holds.
COMMANDS = """
--bogus | --bogus
--method moco | --method mocov3
--out= | --out
--quantile 1 | --quantile 1e-06
--workers 2147483648 | --workers 256
--lr nan | --lr nan
--loss infonce --beta 2 | --beta 2 leave it out
--loss base --alpha 0.5 | --alpha leave it out
--threshold step --quantile 0.9 | --quantile leave it out
--queue 8 | --queue leave it out
--data folder | --root needs --root DIR
--probe no.pt | no.pt
--probe test_hex.py --lr 1 --backbone resnet18 --norm batch --size 32 --data shapes | --lr --probe
--hex-warmup 3 --epochs 3 | --hex-warmup 2
--backbone r19 | r19 resnet18
--backbone squeezenet1_0 | squeezenet1_0 resnet18
--batch-size 999 | 999 --batch-size 112
--data cifar10 --threshold oracle | oracle cifar100
--label-fraction 0.01 | --label-fraction 0.1072
--device cuda | --device cpu
TMPDIR=/tmp/{long} --workers 2 | TMPDIR TMPDIR=/tmp
RANK=1 | WORLD_SIZE torchrun
RANK=x WORLD_SIZE=1 LOCAL_RANK=0 MASTER_PORT=1 | RANK torchrun
SLURM_STEP_NUM_TASKS=8 | srun torchrun
"""


@cases("line", COMMANDS.strip().splitlines())
def test_a_wrong_command_is_one_line_with_its_remedy(line, tmp_path, monkeypatch, capsys):
    command, _, words = line.partition(" | ")
    (tmp_path / "test_hex.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hx.tempfile, "tempdir", None)
    argv = command.replace("{long}", 80 * "x").split()
    variables = [word for word in argv if word[0] != "-" and "=" in word]
    for variable in variables:
        name, _, value = variable.partition("=")
        if name == "TMPDIR":
            monkeypatch.setattr(hx.tempfile, "tempdir", value)
        monkeypatch.setenv(name, value)
    status, said = refused(capsys, *argv[len(variables):])
    assert status == 2 and all(word in said for word in words.split())
    assert os.listdir() == ["test_hex.py"]


# --- Several ranks and one ----------------------------------------------------------------------
RUNS = dict(
    simclr="--accumulate 2",
    nnclr="--accumulate 2 --method nnclr --predictor 32 --queue 40",
    byol="--accumulate 2 --method byol --predictor 32 --backbone vit_b_32 --size 16",
    shared="--norm group --lr 0.005 --batch-size 32")
THREE_RUNS = dict(
    apart="--accumulate 3",
    joint="--norm group --lr 0.005 --batch-size 24")


def gathered(rank, folder):
    """The gradient of a loss of all rows in this rank's own, and an error where rows differ."""
    x = torch.arange(6.0).view(3, 2)[[rank]].requires_grad_()
    rows = hx.gather(x)
    (rows.sum(0).square().sum()).backward()
    with pytest.raises(ValueError, match="different shapes"):
        hx.gather(torch.ones(rank + 1))
    return rows.tolist(), x.grad.tolist()


def two_ranks_train(rank, folder):
    return [run(*SHORT, *options.split(), "--out", f"{folder}/two {name}")
            for name, options in RUNS.items()]


def stop_rank_1(rank, folder):
    """Rank 0, which is not told, writes late."""
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


def differ(rank, folder):
    """In their data, then in an option that is not part of the experiment."""
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:
        options = run(*SHORT, "--log-every", rank + 1, "--out", f"{folder}/other")
        patch.setattr(hx, "draw_shapes", lambda count, seed: DRAW(112, seed + rank))
        return options, run(*SHORT, "--out", f"{folder}/other"), said.getvalue()


def three_ranks_train(rank, folder):
    """Each run as a whole, and another time stopped and resumed."""
    statuses = []
    for name, options in THREE_RUNS.items():
        command = [*SHORT, *options.split(), "--out"]
        statuses.append(run(*command, f"{folder}/three {name}"))
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 1, stop)
            statuses.append(run(*command, f"{folder}/three {name} again"))
        statuses.append(run(*command, f"{folder}/three {name} again"))
    return statuses


def on_rank(rank, ports, folder):
    """The scenarios of three ranks, then those of two, as torchrun starts them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, hx.SIGNALS)
    end, found = dist.destroy_process_group, {}
    for count, port, scenarios in (
            (3, ports[0], [gathered, three_ranks_train]),
            (2, ports[1], [two_ranks_train, stop_rank_1, differ])):
        if rank >= count:
            continue
        hx.RANK, hx.RANKS = rank, count
        os.environ |= dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="localhost",
            MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
        dist.init_process_group("gloo")
        for scenario in scenarios:
            found[scenario.__name__] = scenario(rank, folder)
        end()
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder of the runs, and what each rank found, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    stores = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in "32"]
    ports = [str(store.port) for store in stores]
    hx.start_server()
    start = torch.multiprocessing.get_context("forkserver").Process
    processes = [start(target=on_rank, args=(rank, ports, str(folder))) for rank in range(3)]
    for process in processes:
        process.start()
    for name, options in [*RUNS.items(), *THREE_RUNS.items()]:     # meanwhile, in one process
        assert run(*SHORT, *options.split(), "--out", folder / f"one {name}") == 0
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(3)]


def test_a_rank_has_the_gradient_in_its_own_rows(ranks):
    rows = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert [found["gathered"] for found in ranks[1]] == [(rows, [[12.0, 18.0]])] * 3


@cases("name, slack", [
    ("two simclr", 0), ("two nnclr", 1e-5), ("two byol", 1e-5), ("two shared", 1e-4),
    ("three apart", 1e-4), ("three joint", 1e-4)])
def test_ranks_train_as_one_process(ranks, name, slack):
    """Whole losses of two ranks: to the last bit, BatchNorm, dropout and all. Else to rounding."""
    one = losses(ranks[0] / f"one {name.split()[1]}")
    assert len(one) >= 2 and losses(ranks[0] / name) == approx(one, rel=0, abs=slack)


@cases("kind", THREE_RUNS)
def test_three_ranks_that_are_stopped_end_with_the_same_bytes(ranks, kind):
    assert [found["three_ranks_train"] for found in ranks[1]] == [[0, 75, 0] * 2] * 3
    assert same_bytes(ranks[0] / f"three {kind}", ranks[0] / f"three {kind} again")


def test_the_statistics_of_batch_norm_are_the_mean_over_ranks(ranks):
    one, two = (
        torch.load(ranks[0] / f"{count} simclr" / "backbone.pt") for count in ("one", "two"))
    for key in one:
        if key.endswith("running_mean"):
            # One process saw twice as many batches, so it is further from the start, 0.
            ratio = two[key].norm() / one[key].norm()
            assert 0.5 < ratio < 0.75, key


def test_a_signal_to_one_rank_stops_all_when_the_checkpoint_is_written(ranks):
    assert [found["stop_rank_1"] for found in ranks[1][:2]] == [(75, True, 0)] * 2
    assert same_bytes(ranks[0] / "two simclr", ranks[0] / "stopped")


def test_ranks_that_differ_say_so_once(ranks):
    first, second = (found["differ"] for found in ranks[1][:2])
    assert first[2].count("hex.py: error: the ranks see different data or options") == 2
    assert first[:2] == (2, 2) and second == (2, 2, "")
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
    monkeypatch.setattr(hx, "check_shape", lambda shape: None)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    with FakeTensorMode(shape_env=ShapeEnv()), torch.device("cuda"):
        yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@cases("name", COUNT)
def test_methods_and_losses_on_cuda(fake_cuda, name):
    cfg = config(f"--method {name} --blur 1 1 --hidden 64 --dim 32")
    cfg.device = "cuda"
    batch = hx.Batch(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.rand(8, 8), None)
    x1, x2 = hx.augment(batch, cfg).chunk(2)
    assert x1.device.type == "cuda" and x1.is_contiguous(memory_format=torch.channels_last)

    model = hx.build_model(cfg)
    with torch.autocast("cuda", dtype=torch.float16):
        outputs = model(x1, x2)
        assert outputs[0].dtype == torch.float16
        assert all(each.device.type == "cuda" for each in outputs)
        shared = [hx.gather(each) for each in outputs]
        assert len(shared[0]) == 8 * len(outputs[0])
        for loss in hx.LOSSES:
            value, stats = hx.HEX(model.method, loss).loss(*shared)
            assert value.dtype == torch.float32
            assert all(each.device.type == "cuda" for each in [value, *stats.values()])

    model.method.after_step(0.5, [shared])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    hx.LARS(model.named_parameters(), 0.1, weight_decay=1e-4, clip=True).step()


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of all operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **kwargs or {})


def test_lars_has_few_operations():
    params = [nn.Parameter(torch.ones(3, 3)) for _ in range(54)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = hx.LARS(params, 0.1)
    optimizer.step()
    with Operations() as seen:
        optimizer.step()
    assert len(seen.names) < 40


# Operations of torch.use_deterministic_algorithms's list that raise an error on CUDA.
NOT_DETERMINISTIC = """
_adaptive_avg_pool2d_backward adaptive_max_pool2d_backward avg_pool3d_backward
fractional_max_pool2d_backward max_pool3d_with_indices_backward max_unpool2d
upsample_linear1d_backward upsample_bilinear2d_backward upsample_bicubic2d_backward
upsample_nearest2d_backward reflection_pad1d_backward reflection_pad2d_backward
replication_pad2d_backward nll_loss2d_forward _ctc_loss_backward _embedding_bag_backward
put_ histc bincount kthvalue median grid_sampler_2d_backward cumsum scatter_reduce resize_
"""


@cases("name", COUNT)
def test_a_step_has_no_operation_without_a_deterministic_form(name):
    cfg = config(f"--method {name} --blur 1 1 --hidden 16 --dim 8")
    model = hx.build_model(cfg)
    batch = hx.Views(DRAW(16, 0), cfg)[[(0, i) for i in range(16)]]
    with Operations() as seen:
        outputs = model(*hx.augment(batch, cfg).chunk(2))
        model.loss(*outputs, epoch=9)[0].backward()
        hx.LARS(model.named_parameters(), 0.1).step()
        model.method.after_step(0.5, [[each.detach() for each in outputs]])
    assert len(seen.names) > 100 and not {*seen.names} & {*NOT_DETERMINISTIC.split()}


@cases("name", FORMS)
def test_losses_and_augmentation_compile_as_one_graph(name):
    compiled = partial(torch.compile, backend="eager", fullgraph=True)
    loss = getattr(hx, name, hx.hex_nce)
    a, b = two_views(8)
    assert_close(compiled(loss)(a, b), loss(a, b))
    if name == "hex":
        cfg = config("--blur 1 1 --solarize 0 1")
        batch = hx.Views(DRAW(4, 0), cfg)[[(0, i) for i in range(4)]]
        assert_close(compiled(hx.augment)(batch, cfg), hx.augment(batch, cfg))
