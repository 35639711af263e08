# SPDX-License-Identifier: MIT
"""Tests of hex.py.

The order: the loss against loops, closed forms and the authors' numbers; the methods; views and
backbones against torchvision; settings; the probe; operations; training against recorded numbers
and a plain loop; pictures; the life of a run; what goes wrong; several ranks, which have run in
the background meanwhile.
"""
import copy
import fcntl
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tarfile
import textwrap
from bisect import bisect
from contextlib import contextmanager
from functools import partial
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

# Of the drawn pictures the tests use few: 7 batches of 8 to train on, and 24.
DRAW, FEW = hx.draw_shapes, {4096: 56, 1024: 24}
hx.draw_shapes = lambda count, seed: DRAW(FEW[count], seed)


# --- Two of torchvision's models, made small ----------------------------------------------------
def vit_b_32(image_size=32):
    """A small ViT. It has dropout, and its activations are smooth."""
    return torchvision.models.VisionTransformer(image_size, 4, 2, 2, 16, 32, dropout=0.1)


def wide_resnet50_2(**options):
    """A small ResNet."""
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [1, 1, 1, 1], width_per_group=4, **options)


torchvision.models._api.BUILTIN_MODELS |= dict(
    vit_b_32=vit_b_32,
    wide_resnet50_2=wide_resnet50_2)


# --- Tables, and where tests work ---------------------------------------------------------------
def each_line(text):
    """Runs a test once for each line of a table."""
    return cases("line", text.strip().splitlines())


def by_name(words):
    """Of a name, a value, a name, a value and so on: the values by their names, as text."""
    words = words.split()
    return dict(zip(words[::2], words[1::2]))


def table(text):
    """A line for each thing, indented where it goes on: its values by their names."""
    lines = text.strip().replace("\n    ", " ").splitlines()
    parts = (line.partition(": ") for line in lines)
    return {thing: by_name(values) for thing, _, values in parts}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)


# --- The loss: helpers --------------------------------------------------------------------------
FORMS = ["info_nce", "dcl", "hex", "decoupled", "released"]
# How negatives become local: a kind and its value, as "quantile 0.99".
KINDS = dict(
    quantile=lambda value: hx.AdaptiveThreshold(float(value)),
    rescaled=lambda value: hx.StepThreshold(float(value), 0),
    above=float,
    labels=lambda digits: hx.OracleHierarchy(torch.tensor([*map(int, digits)])))


def two_views(N):
    """Two views of N images in float64: of the first image alike, of the last hardly related."""
    g = torch.Generator().manual_seed(N)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    image, noise, length = draw(N, 12), draw(N, 12), draw(2, N, 1)
    distance = torch.linspace(0.1, 2, N)[:, None]
    return torch.stack([image, image + distance * noise]) * length.exp()


def ours(form, a, b, t=0.1, H="quantile 0.99", **knobs):
    """A loss of hex.py, and its statistics."""
    if form in ("info_nce", "dcl"):
        return getattr(hx, form)(a, b, t), {}
    kind, value = H.split()
    threshold = KINDS[kind](value)
    if form == "released":
        return hx.released(a, b, t, threshold=threshold)
    decoupled = form == "decoupled"
    return hx.hex_nce(a, b, t, threshold=threshold, decoupled=decoupled, **knobs)


def naive(form, a, b, t=0.1, H="quantile 0.99", beta=1.0, tau_plus=0.1):
    """The same, written from the equations, an anchor and a negative at a time.

    What carries no gradient (eps, H, Q, the floor) is a Python float.
    """
    N, n = len(a), 2 * len(a)
    kind, value = H.split()
    z = [row / row.dot(row).sqrt() for row in (*a, *b)]
    z = torch.stack(z)
    s = [row.unbind() for row in (z @ z.T).unbind()]
    v = (z @ z.T).tolist()
    negatives = [[j for j in range(n) if j % N != i % N] for i in range(n)]

    eps = math.nan if kind == "labels" else float(value)
    if kind == "quantile":
        rows = [[v[i][j] for j in negatives[i]] for i in range(n)]
        if form == "released":
            rows = v
        place = round(eps * (len(rows[0]) - 1))
        eps = sum(sorted(row)[place] for row in rows) / n

    def is_local(i, j):
        if kind == "labels":
            return value[i % N] == value[j % N]
        if kind == "rescaled":
            low, high = min(v[i]), max(v[i])
            return (v[i][j] - low) / (high - low) > eps
        return v[i][j] > eps

    losses, sizes, clamped = [], [], 0
    for i in range(n):
        p = (i + N) % n
        e = [(x / t).exp() for x in s[i]]
        positive = e[p]
        everyone = sum(e[j] for j in negatives[i])
        H = [j for j in negatives[i] if is_local(i, j)]
        size = len(H)
        far = sum((e[j] for j in negatives[i] if j not in H), 0 * positive)

        w = [math.exp(beta * v[i][h] / t) for h in H]
        near = sum(wh * size / sum(w) * e[h] for wh, h in zip(w, H))
        near = (near - tau_plus * size * positive) / (1 - tau_plus)
        floor = size * math.exp(-1 / t)
        if size and near.item() < floor:
            near = floor
            clamped += 1

        constant = 0
        if form == "released":
            constant = (n - 2) * math.exp(-1 / t)
            if size == n - 2:
                far = 1 + 0 * positive
        total = dict(
            info_nce=positive + everyone,
            dcl=everyone,
            released=far,
            hex=positive + far + near,
            decoupled=far + near)
        losses.append(total[form].log() - s[i][p] / t + constant)
        sizes.append(size)

    some = sum(size > 0 for size in sizes)
    if form == "released":
        clamped = some
    stats = dict(
        threshold=eps,
        local=sum(sizes) / n,
        empty=1 - some / n,
        clamped=clamped / max(some, 1))
    return sum(losses) / n, stats


def graded(f, *embeddings):
    """The loss, its gradient in each of the embeddings, and the statistics as floats."""
    embeddings = [x.detach().clone().requires_grad_() for x in embeddings]
    loss, stats = f(*embeddings)
    grads = torch.autograd.grad(loss, embeddings, materialize_grads=True)
    stats = {key: float(value) for key, value in stats.items()}
    return loss.detach(), torch.stack(grads), stats


def assert_as_loops(form, a, b, **knobs):
    """The loss, gradient and statistics of ours are those of the loops. Returns the statistics.

    Both are sums of some hundred float64, which e^{1/t} may scale: 1e-10 leaves them much room.
    """
    *got, stats = graded(partial(ours, form, **knobs), a, b)
    *want, by_loops = graded(partial(naive, form, **knobs), a, b)
    assert_close(got, want, rtol=1e-10, atol=1e-10)
    for key, value in stats.items():
        assert value == approx(by_loops[key], abs=1e-10, nan_ok=True), key
    return stats


# --- The loss -----------------------------------------------------------------------------------
# The number of images, temperature, beta, tau_plus, and how negatives become local.
LOOPS = """
2 0.1  1.0 0.10 quantile 0.9
2 0.5  0.5 0.05 quantile 0.5
2 0.02 2.0 0.00 quantile 0.5
3 0.1  0.0 0.05 quantile 0.5
3 0.5  1.0 0.00 quantile 0.9
3 0.5  2.0 0.10 quantile 0.5
3 0.02 0.5 0.10 quantile 0.99
5 0.1  1.0 0.10 quantile 0.9
5 0.1  2.0 0.05 quantile 0.5
5 0.1  0.5 0.00 quantile 0.9
5 0.5  0.0 0.10 quantile 0.5
5 0.5  1.0 0.05 quantile 0.9
5 0.02 1.0 0.05 quantile 0.9
13 0.1 1.0 0.10 quantile 0.9
13 0.5 0.5 0.05 quantile 0.99
7 0.1  1.0 0.10 rescaled 0.0
7 0.1  1.0 0.10 rescaled 0.5
7 0.1  1.0 0.10 rescaled 0.9
7 0.1  1.0 0.10 above 0.1
7 0.1  1.0 0.10 above -2
7 0.1  1.0 0.10 labels 0012223
7 0.1  1.0 0.10 labels 0000000
"""


@cases("form", FORMS)
@each_line(LOOPS)
def test_loss_gradient_and_statistics_are_those_of_loops(form, line):
    N, t, beta, tau_plus, H = line.split(maxsplit=4)
    knobs = dict(t=float(t), beta=float(beta), tau_plus=float(tau_plus), H=H)
    assert_as_loops(form, *two_views(int(N)), **knobs)


@cases("form", ["hex", "decoupled"])
def test_the_floor_just_above_and_just_below_and_an_empty_neighborhood(form):
    """The local terms fall as tau_plus rises, and 1e-8 more of it carries the first to its floor.

    Such a step changes a term by some 1e-8, which is far above the rounding of float64.
    """
    views, knobs = two_views(5), dict(t=0.5, H="above 0.4")

    def clamped(steps):
        _, stats = naive(form, *views, tau_plus=steps / 1e8, **knobs)
        return stats["clamped"]

    first = bisect(range(100_000_000), 0, key=clamped)
    above = assert_as_loops(form, *views, tau_plus=(first - 1) / 1e8, **knobs)
    below = assert_as_loops(form, *views, tau_plus=first / 1e8, **knobs)
    assert above["clamped"] == 0 < below["clamped"] < 1
    assert 0 < below["empty"] < 1


@cases("form", FORMS)
def test_gradcheck_with_a_learnable_temperature(form):
    """Where H cannot flip, and Q is 1: elsewhere Q and eps are held still on purpose."""
    f = partial(ours, form, H="rescaled 0.3", beta=0.0)
    t = torch.tensor(0.2, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (*two_views(4), t)]
    assert torch.autograd.gradcheck(lambda *e: f(*e)[0], inputs)


@cases("form", FORMS)
@cases("H", ["quantile 0.99", "rescaled 0.5", "labels 000000", "labels 012345"])
def test_equal_embeddings_and_zeros_give_a_finite_loss_and_gradient(form, H):
    ones = torch.ones(6, 4)
    for data in (ones, 0 * ones, ones.triu()):              # the last has rows of both kinds
        loss, grad, _ = graded(partial(ours, form, H=H), data, data)
        assert loss.isfinite() and grad.norm() < 1e3


@cases("form", ["info_nce", "hex"])
def test_the_loss_of_equal_embeddings_is_the_logarithm_of_their_number(form):
    """Where H is empty. Of 12 views, all but the anchor are part of the sum."""
    loss, _ = ours(form, torch.ones(6, 4), torch.ones(6, 4), H="labels 012345")
    assert loss.item() == approx(math.log(11), abs=1e-5)


@cases("form", FORMS)
def test_a_length_beyond_float32_is_not_a_number(form):
    a, b = two_views(6).float()
    loss, _ = ours(form, 1e20 * a, b)
    assert not loss.isfinite()


# What github.com/olivesgatech/HEX @ c3002ed computes in float64, for SimCLR and NNCLR alike:
# form, shift, temperature, what is local; loss, |da|, da[0, 0], db[5, 0].
AUTHORS = """
released 0.0 0.1 quantile 0.99 -0.209686502289 0.124583599879 -0.002105660922  0.002185973938
released 0.0 0.1 rescaled 0.9   0.057173995355 0.123146161097 -0.000531205316  0.002199590476
info_nce 0.0 0.1 quantile 0.99  0.768578547087 0.071991750913 -0.000654980593  0.001015350352
released 0.5 0.2 quantile 0.99  3.774087621686 0.055683415691 -0.000110334815 -0.000175189849
released 0.5 0.2 rescaled 0.7   3.138836540220 0.056886314000 -0.000140903878 -0.000069540890
"""


@each_line(AUTHORS)
def test_the_authors_numbers(line):
    form, shift, t, kind, value, *want = line.split()
    shift = float(shift)
    i = torch.arange(128, dtype=torch.float64)[:, None]
    j = torch.arange(16, dtype=torch.float64)
    group = torch.sin((i % 10 + 1) * (j + 1) * 1.3 + shift)
    image = group + 0.8 * torch.sin(i * (j + 2) * 0.7 + 2 * shift)
    a = image + 0.3 * torch.sin(i * (j + 3) * 1.1 + 3 * shift)
    b = image + 0.3 * torch.cos(i * (j + 4) * 0.9 + 4 * shift)

    loss = partial(ours, form, t=float(t), H=f"{kind} {value}")
    loss, (da, db), _ = graded(loss, a, b)
    got = torch.stack([loss, da.norm(), da[0, 0], db[5, 0]])
    assert got.tolist() == approx([*map(float, want)], rel=0, abs=1e-10)


@cases("form", FORMS)
def test_half_precision_costs_its_own_rounding_and_autocast_costs_nothing(form):
    """Lengths do not matter, so of cosines below 1 bfloat16 rounds some 2^-9, over t = 0.3."""
    a, b = two_views(17).float()
    f = partial(ours, form, t=0.3, H="rescaled 0.6")
    *exact, _ = graded(f, a, b)
    *same, _ = graded(torch.autocast("cpu", dtype=torch.bfloat16)(f), a, b)
    assert_close(same, exact, rtol=1e-6, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        loss, grad, _ = graded(f, a.to(dtype), b.to(dtype))
        assert loss.dtype == torch.float32 and grad.isfinite().all()
        assert abs(loss - exact[0]) < 1e-2


@cases("form", FORMS)
@cases("t", [0.02, 0.005])
def test_low_temperatures_in_float32(form, t):
    """e^(1/t) is beyond float32, and float32's rounding of s, some 1e-7, is divided by t."""
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


@each_line(REFUSALS)
def test_a_refusal_names_argument_and_value(line):
    call, _, words = line.partition("): ")
    with pytest.raises(ValueError, match=re.escape(words)):
        eval(call + ")", globals(), dict(x=torch.ones(4, 3)))


# The threshold at some epochs.
SCHEDULES = """
hx.StepThreshold(0.9, 0.1, 10): 0 0.9 9 0.9 10 0.8 45 0.5 90 0 500 0
hx.CosineThreshold(0.9, 0.3, 100): 0 0.9 25 0.8121320344 50 0.6 100 0.3 300 0.3
"""


@each_line(SCHEDULES)
def test_scheduled_thresholds_fall_by_the_epoch_to_their_end(line):
    call, _, numbers = line.partition(": ")
    for epoch, eps in by_name(numbers).items():
        assert eval(call).at(int(epoch)) == approx(float(eps))


# --- Methods ------------------------------------------------------------------------------------
# How many embeddings the forward of each method gives.
COUNT = by_name("simclr 2 nnclr 4 mocov3 6 byol 6 simsiam 4 barlow 2 vicreg 2")


def method(name):
    """A small one in float64, with the same weights each time."""
    torch.manual_seed(0)
    kind = hx.METHODS[name]
    sizes = dict(hidden=8, dim=6, predictor=8, queue=10)
    sizes = {key: size for key, size in sizes.items() if key in kind.settings}
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh())
    return kind(backbone, 16, **sizes).double()


def embeddings(name):
    """What the forward of a method might give of 8 images."""
    g = torch.Generator().manual_seed(1)
    count = int(COUNT[name])
    return 0.8 * torch.randn(count, 8, 6, generator=g, dtype=torch.float64)


def own_by_hand(name, e, made):
    """The loss of each method's paper, of its embeddings e (count, N, 6)."""
    u = F.normalize(e, dim=2)
    off = 1 - torch.eye(6)

    def nce(a, b, t):
        positive = (a * b).sum(1) / t
        return ((a @ b.T / t).logsumexp(1) - positive).mean()

    def nearest(z):
        return made.queue[(z @ made.queue.T).argmax(1)]

    def cosine(i, j):
        return (u[i] * u[j]).sum(1).mean()

    def standard(x):
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()

    if name == "simclr":
        return naive("info_nce", *e)[0]
    if name == "nnclr":
        one = nce(nearest(u[2]), u[1], 0.1)
        return (one + nce(nearest(u[3]), u[0], 0.1)) / 2
    if name == "mocov3":
        one = nce(u[0], u[5], 1.0)
        return 2 * (one + nce(u[1], u[4], 1.0))
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
        std = (c.diagonal() + 1e-4).sqrt()
        loss += 25 * (1 - std).clamp(min=0).mean()
        loss += (off * c).square().sum() / 6
    return loss


@cases("name", COUNT)
def test_the_own_loss_is_the_papers(name):
    made, e = method(name), embeddings(name)
    own_alone = hx.HEX(made, "base")
    loss, grad, _ = graded(own_alone.loss, *e)
    assert loss.item() == approx(own_by_hand(name, e, made).item(), rel=1e-6)
    if name in ("simsiam", "nnclr"):
        assert not grad[2:].any()               # what is predicted is held still


@cases("name", COUNT)
def test_the_loss_reaches_every_parameter(name):
    model = hx.HEX(method(name), threshold=hx.AdaptiveThreshold(0.8))
    views = torch.linspace(-2, 2, 192).sin().double()
    x1, x2 = views.view(2, 8, 3, 2, 2)
    x2 = x2 + x1.roll(1, 0) ** 2
    loss, stats = model.loss(*model(x1, x2))
    assert {"own", "hex", "threshold", "local", "empty", "clamped"} == stats.keys()
    loss.backward()
    for key, p in model.named_parameters():
        shifts_a_norm = (name, key) == ("nnclr", "method.projector.7.bias")
        assert not p.requires_grad or shifts_a_norm or p.grad.norm() > 1e-9, key


@cases("loss", hx.LOSSES)
@cases("name, given, alpha, scale", [
    ("vicreg", None, 0.1, 5),
    ("vicreg", 0.7, 0.7, 5),
    ("mocov3", None, 1, 1)])
def test_alpha_and_scale_and_the_mean_over_pairs(loss, name, given, alpha, scale):
    made, e = method(name), embeddings(name)
    knobs = dict(beta=0.5, tau_plus=0.2)
    want, pairs = made.loss(*e)
    if loss != "base":
        form = loss.replace("infonce", "info_nce")
        terms = [naive(form, *pair, t=0.3, **knobs)[0] for pair in pairs]
        want = (1 - alpha) * want + alpha * scale * sum(terms) / len(terms)

    e = [x.requires_grad_() for x in e]
    got, _ = hx.HEX(made, loss, alpha=given, temperature=0.3, **knobs).loss(*e)
    assert got.item() == approx(float(want), rel=1e-9)
    torch.autograd.grad(got, e)                 # each has one, as DDP wants it


def test_the_warm_up_is_the_own_loss_or_a_fixed_threshold():
    made, e = method("vicreg"), embeddings("vicreg")
    own, _ = made.loss(*e)
    late, _ = hx.HEX(made, threshold=hx.StepThreshold(0.9, 0)).loss(*e)
    fixed, _ = hx.HEX(made, threshold=0.2).loss(*e)
    falling = hx.StepThreshold(1.2, 0.1, 1)     # 0.9 at epoch 3
    for threshold, early in ((None, own), (0.2, fixed)):
        model = hx.HEX(made, threshold=falling, warmup=3, warmup_threshold=threshold)
        got = [model.loss(*e, epoch=epoch)[0] for epoch in (0, 2, 3)]
        assert_close(got, [early, early, late])


def test_the_wrapper_can_be_pickled():
    model, e = hx.HEX(method("vicreg")), embeddings("vicreg")
    again = pickle.loads(pickle.dumps(model))
    assert_close(again.loss(*e), model.loss(*e))


def test_the_queue_takes_the_first_views_of_every_loss_and_the_oldest_leave_it():
    made = method("nnclr")                      # it has a queue of 10
    before = made.queue.clone()
    outputs = torch.arange(1.0, 145).sin().double().view(2, 4, 3, 6)
    made.after_step(0.5, outputs)
    assert_close(made.queue[:4], before[-4:])
    assert_close(made.queue[4:], F.normalize(outputs[:, 2].flatten(0, 1)))


def test_the_module_of_the_readme_runs():
    text = Path(hx.__file__).with_name("README.md").read_text("utf-8")
    code, names = re.search("(?s)```python\n(.*?)```", text)[1], {}
    exec(code, names)
    assert names["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in names["model"].parameters())


# --- Views --------------------------------------------------------------------------------------
def config(text=""):
    return hx.parse(f"--workers 0 --device cpu {text}".split())


def random_pictures(count, *shape):
    """Pictures of noise, with the labels 0 to 4 in turn."""
    g = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (count, 3, *shape), generator=g)
    return hx.Pictures(pictures.byte(), torch.arange(count) % 5)


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


MEAN_STD = dict(
    shapes=([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),              # those of ImageNet
    cifar10=([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    cifar100=([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]))


def batch_by_hand(batch, data="shapes"):
    pairs = zip(batch.crops, batch.changes)
    return torch.stack([view_by_hand(*pair, MEAN_STD[data]) for pair in pairs])


# flip, brightness, contrast, saturation, hue, gray, sigma, solarize
CHANGES = """
1 1.5 0.4 1.7  0.15 0 1.3 1
0 0.3 1.8 0.2 -0.20 1 0.0 0
1 1.0 1.0 1.0  0.00 0 0.1 0
0 1.8 1.2 0.9  0.05 0 2.0 1
0 1.0 1.0 1.0  0.00 0 0.0 0
1 0.7 0.6 0.5 -0.10 1 0.7 1
"""


@cases("data", MEAN_STD)
def test_a_batch_is_augmented_as_torchvision_does_it_picture_by_picture(data):
    """A hue near the border of two sixths of the circle may lose a few units in its last place."""
    changes = torch.tensor([*map(float, CHANGES.split())])
    batch = hx.Batch(random_pictures(6, 24, 24).pictures, changes.view(6, 8), None)
    got = hx.augment(batch, config(f"--data {data} --blur 0 1 --solarize 1 0"))
    assert_close(got.contiguous(), batch_by_hand(batch, data), rtol=0, atol=2e-5)


@cases("shape", [(120, 100), (20, 9000), (9000, 20)])
def test_crops_lie_in_the_picture(shape):
    """Of a white picture, whatever its shape. What is beyond its border would be black."""
    white = torch.full((1, 3, *shape), 255).byte()
    views = hx.Views(hx.Pictures(white, None), config("--size 32 --crop-min 0.3"))
    crops = views[[(epoch, 0) for epoch in range(50)]].crops
    assert crops.shape == (100, 3, 32, 32) and (crops == 255).all()


def test_boxes_have_the_areas_and_ratios_of_the_options_and_reach_all_borders():
    boxes = [hx.random_box(hx.rng_of(seed), 120, 100, 0.3) for seed in range(600)]
    top, left, h, w = torch.tensor(boxes).T
    assert top.min() == 0 == left.min()
    assert (top + h).max() == 120 and (left + w).max() == 100
    share, ratio = h * w / 12000, w / h
    assert 0.29 < share.min() < 0.32
    assert share.max() > 0.9 and share.mean() < 0.65
    assert 0.73 < ratio.min() < 0.78 and 1.25 < ratio.max() < 1.36


def test_the_changes_that_are_drawn_have_the_shares_and_ranges_of_the_options():
    """Of 600 draws of a share of a half, the standard deviation is 0.02."""
    options = (
        "--size 8 --jitter 0.4 0.3 0.2 0.1 --grayscale 0.25 --blur 1 0.1 --solarize 0 0.2")
    views = hx.Views(random_pictures(50, 9, 9), config(options))
    keys = [(epoch, i) for epoch in range(12) for i in range(50)]
    drawn = torch.stack(views[keys].changes.chunk(2), 1)
    flip, *jitter, gray, sigma, solarize = drawn.unbind(-1)     # (600, 2): of view 1 and 2

    wanted = [0.5, 0.5], [0.25, 0.25], [1, 0.1], [0, 0.2]
    for each, shares in zip((flip, gray, sigma > 0, solarize), wanted):
        assert each.double().mean(0).tolist() == approx(shares, abs=0.06)
    blurs = sigma[:, 0]
    assert 0.1 <= blurs.min() < 0.15 and 1.9 < blurs.max() <= 2

    jittered = jitter[0] != 1
    assert jittered.double().mean().item() == approx(0.8, abs=0.04)
    most_changes = 0.4, 0.3, 0.2, 0.1
    for each, none, most in zip(jitter, (1, 1, 1, 0), most_changes):
        assert torch.equal(each != none, jittered)
        change = (each - none) / most
        assert 0.95 < change.max() < 1.001 and -1.001 < change.min() < -0.95


def test_a_view_is_a_function_of_seed_epoch_index_and_view_alone():
    def jitter(seed, epoch, index, view, *before):
        """Of the last picture of a batch."""
        views = hx.Views(DRAW(6, 3), config(f"--seed {seed}"))
        changes = views[[*before, (epoch, index)]].changes
        return changes.chunk(2)[view][-1, 1:5]

    first = jitter(5, 2, 0, 0)
    assert torch.equal(jitter(5, 2, 0, 0, (1, 4)), first)
    others = [
        jitter(6, 2, 0, 0),
        jitter(5, 3, 0, 0),
        jitter(5, 2, 1, 0),
        jitter(5, 2, 0, 1)]
    for other in others:
        assert (other != first).all()                       # all of them are jittered


@cases("size, side", [(32, 128), (224, 112)])
def test_the_centre_crop_is_224_of_256_and_small_pictures_are_whole(size, side):
    pictures = random_pictures(1, 128, 160)
    batch = hx.Views(pictures, config(f"--size {size}"), views=0)[[(0, 0)]]
    crop = TF.center_crop(pictures.read(0), [side, side])
    want = TF.resize(crop, [size, size], "bicubic", antialias=True)
    assert torch.equal(batch.crops, want[None])
    assert batch.changes.tolist() == [[0, 1, 1, 1, 0, 0, 0, 0]]


# --- Backbones ----------------------------------------------------------------------------------
def assert_is_torchvisions(mine, theirs, size):
    """Their last Linear, on top of mine, gives what they give. Returns the width between them."""
    x = torch.linspace(-1, 1, 6 * size * size).sin()
    x = x.view(2, 3, size, size)
    *_, last = (each for each in theirs.modules() if isinstance(each, nn.Linear))
    with torch.no_grad():
        assert_close(last(mine.eval()(x)), theirs.eval()(x))
    return last.in_features


@cases("name, size", [
    ("resnet18", 96),
    ("resnet18", 64),
    ("vit_b_32", 32),
    ("mobilenet_v3_small", 64)])
def test_a_backbone_is_torchvisions_model_up_to_its_last_linear(name, size):
    torch.manual_seed(0)
    mine, width = hx.build_backbone(name, size)
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name)
    if (name, size) == ("resnet18", 64):                    # a 3x3 stem, and no max-pool
        theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        theirs.maxpool = nn.Identity()
        theirs.conv1.load_state_dict(mine.conv1.state_dict())
        spread = (2 / (64 * 9)) ** 0.5                      # Kaiming's, of the fan out
        assert mine.conv1.weight.std().item() == approx(spread, rel=0.1)
    assert assert_is_torchvisions(mine, theirs, size) == width


def test_group_norm_has_16_channels_a_group_where_they_divide():
    groups = {channels: hx.group_norm(channels).num_groups for channels in (8, 48, 128, 20)}
    assert groups == {8: 1, 48: 3, 128: 8, 20: 1}


def loaded(backbone, size):
    """What the command makes of the file a.pt."""
    options = f"--data shapes --norm batch --probe a.pt --backbone {backbone} --size {size}"
    cfg = config(options)
    return hx.load_backbone(cfg.probe, cfg, "another remedy")


@cases("wrap", [
    lambda state: state,
    lambda state: dict(state_dict=state),
    lambda state: {f"module.encoder.{key}": value for key, value in state.items()}])
def test_a_file_of_others_is_loaded_without_its_classifier(wrap):
    theirs = wide_resnet50_2()
    torch.save(wrap(theirs.state_dict()), "a.pt")
    assert_is_torchvisions(loaded("wide_resnet50_2", 96), theirs, 96)


def test_a_vit_is_loaded_at_another_size_and_another_model_is_refused():
    torch.save(vit_b_32(32).state_dict(), "a.pt")
    backbone = loaded("vit_b_32", 16)
    assert backbone(torch.zeros(2, 3, 16, 16)).shape == (2, 16)
    with pytest.raises(hx.UserError, match="(?s)conv1.*another remedy"):
        loaded("wide_resnet50_2", 16)


# --- Settings -----------------------------------------------------------------------------------
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


@cases("options, recipe, lr", [
    ("--data folder --root .", "imagenet", 0.3),
    ("--data cifar100", "cifar", 0.4),
    ("--data cifar10 --recipe small", "small", 0.2)])
def test_the_data_choose_the_recipe(options, recipe, lr):
    cfg = config(options)
    assert (cfg.recipe, cfg.lr) == (recipe, lr)


def run(*texts, out="o"):
    """The command, in this process. Its exit status."""
    return hx.main(["--out", str(out), *" ".join(texts).split()])


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail with this status. Returns the one line that says why."""
    def line_of(*texts, status=1, **out):
        capsys.readouterr()
        assert run(*texts, **out) == status
        stdout, stderr = capsys.readouterr()
        line, = (line for line in stderr.splitlines() if line.startswith("hex.py: error: "))
        assert "Traceback" not in stderr and stdout == ""
        return line

    return line_of


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
--probe any.pt --lr 1 --backbone resnet18 --norm batch --size 32 --data shapes | --lr --probe
--hex-warmup 3 --epochs 3 | --hex-warmup 2
--backbone r19 | r19 resnet18
--backbone squeezenet1_0 | squeezenet1_0 resnet18
--batch-size 999 | 999 --batch-size 56
--data cifar10 --threshold oracle | oracle cifar100
--label-fraction 0.01 | --label-fraction 0.2143
--device cuda | --device cpu
RANK=1 | WORLD_SIZE torchrun
RANK=x WORLD_SIZE=1 LOCAL_RANK=0 MASTER_PORT=1 | RANK torchrun
SLURM_STEP_NUM_TASKS=8 | srun torchrun
"""


@each_line(COMMANDS)
def test_a_wrong_command_is_one_line_with_its_remedy(line, monkeypatch, refused):
    command, _, words = line.partition(" | ")
    variable = r"\b([A-Z_]+)=(\S+)"
    for name, value in re.findall(variable, command):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = refused("--workers 2", re.sub(variable, "", command), status=2)
    assert all(word in line for word in words.split())
    assert not os.path.exists("o")


# --- The probe and the figures of each epoch ----------------------------------------------------
def probe(count, classes, options, shift=0, noise=255):
    """The linear probe on raw pixels: of each class a picture, with noise, of 255 parts.

    shift: how far the labels of val are turned.
    """
    g = torch.Generator().manual_seed(0)
    draw = partial(torch.randint, 0, 256, generator=g)
    targets = torch.arange(count) % classes
    kinds = (255 - noise) * draw((classes, 3, 8, 8))[targets]
    train, val = (kinds + noise * draw((count, 3, 8, 8)) for _ in range(2))
    train = hx.Pictures((train // 255).byte(), targets)
    val = hx.Pictures((val // 255).byte(), (targets + shift) % classes)
    cfg = config(f"--epochs 0 --backbone pixels --size 8 --probe-epochs {options}")
    return hx.linear_probe(nn.Flatten(), cfg, train, val, Path("none"), {}, [])


def test_the_rate_is_chosen_on_the_holdout_and_not_on_val():
    """Every label of val is wrong: what is best on the holdout is worst there."""
    result = probe(240, 6, "1", shift=1, noise=180)
    holdout = result["holdout"]
    assert min(holdout.values()) < 80
    assert holdout[str(result["rate"])] == max(holdout.values()) > 95
    assert result["top1"] < 5 and result["top5"] > 50


def test_no_head_has_seen_its_holdout():
    """The labels mean nothing, so a head can learn them by heart but not guess them."""
    result = probe(150, 10, "60")
    assert result["train"] == 140 and result["held_out"] == 10
    assert max(result["holdout"].values()) < 70 and result["top1"] < 30


def test_the_rates_momentum_decay_and_batch_size_of_the_heads(monkeypatch):
    step, groups = torch.optim.SGD.step, []
    cross_entropy, sizes = F.cross_entropy, set()

    def recorded(self):
        groups.extend(map(dict, self.param_groups))
        step(self)

    def measured(logits, labels):
        sizes.add(len(labels))
        return cross_entropy(logits, labels)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    monkeypatch.setattr(F, "cross_entropy", measured)
    probe(300, 4, "10")                                     # of one step an epoch
    assert sizes == {256}
    rates = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
    falls = [1] * 6 + [0.1] * 2 + [0.01] * 2
    want = [rate * fall for fall in falls for rate in rates]
    assert [group["lr"] for group in groups] == approx(want)
    others = {(group["momentum"], group["weight_decay"]) for group in groups}
    assert others == {(0.9, 1e-5)}


def test_a_share_of_the_labels_is_balanced_and_is_all_that_trains():
    result = probe(400, 4, "2 --label-fraction 0.2")
    assert result["train"] == 72 and result["held_out"] == 8
    uneven = torch.tensor([0] * 5 + [1] * 50 + [2] * 500)
    chosen = hx.labeled_pictures(config("--label-fraction 0.1"), uneven)
    counts = uneven[chosen.unique()].bincount().tolist()
    assert counts[0] == 5 and sorted(counts) == [5, 25, 26]


def test_nearest_neighbors_are_what_loops_find():
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(2, 60, 4, generator=g)
    labels, truth = torch.randint(0, 5, (2, 60), generator=g)
    right = []
    for query, answer in zip(queries, truth):
        cosine = F.cosine_similarity(query, bank)
        votes = torch.zeros(5)
        for j in cosine.argsort(descending=True)[:20]:
            votes[labels[j]] += math.exp(cosine[j] / 0.07)
        right.append(votes.argmax() == answer)
    assert hx.nearest_neighbors(bank, labels, queries, truth).tolist() == right
    assert 0 < sum(right) < 60


def test_what_emerges_is_counted_by_hand():
    train, val = DRAW(60, 0), DRAW(24, 1)
    cfg = config("--hidden 16 --dim 8 --quantile 0.9 --norm group")
    model, index = hx.build_model(cfg), hx.permutation(60, "fixed")
    got = hx.emergence(model, cfg, train, val)
    assert 0 < got["knn"] < 100

    views = hx.Views(train, copy.copy(cfg))
    views.cfg.seed = "fixed"
    batch = views[[(0, i) for i in index.tolist()]]
    with torch.no_grad():
        z = torch.cat(model(*batch_by_hand(batch).chunk(2)))
        x = TF.normalize(train.pictures / 255, *MEAN_STD["shapes"])
        x = model.method.backbone(x)
    z = F.normalize(z.double())
    s, image = z @ z.T, torch.arange(60).repeat(2)
    negative = image[:, None] != image
    ranked = s[negative].view(120, 118).sort(1).values
    eps = ranked[:, round(0.9 * 117)].mean()
    near = negative & (s > eps)
    want = dict(
        threshold=eps,
        local=near.sum() / 120,
        std=z.std(0).mean() * math.sqrt(8))
    for labels, name in ((train.targets, ""), (train.coarse, "_coarse")):
        label = labels[index].repeat(2)
        same = (label[:, None] == label).double()
        want[f"purity{name}"] = same[near].mean()
        want[f"chance{name}"] = same[negative].mean()
    values = torch.linalg.svdvals(x.double())
    shares = values / values.sum()
    want["rankme"] = torch.special.entr(shares).sum().exp()
    for key, value in want.items():
        assert got[key] == approx(value.item(), rel=1e-3), key


def test_256_and_2048_and_512_pictures_are_read_once_for_the_figures_of_all_epochs(monkeypatch):
    read, item = [], hx.Views.__getitem__

    def counted(self, keys):
        read.extend([self.views] * len(keys))
        return item(self, keys)

    monkeypatch.setattr(hx.Views, "__getitem__", counted)
    train, val = random_pictures(2100, 8, 8), random_pictures(600, 8, 8)
    cfg = config("--size 8 --hidden 8 --dim 8")
    model = hx.build_model(cfg)
    for _ in range(2):
        hx.emergence(model, cfg, train, val)
    assert read.count(2) == 256 and read.count(0) == 2048 + 512


# --- The CUDA path, without a CUDA GPU, and what operations there are ---------------------------
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
    options = "--blur 1 1 --hidden 64 --dim 32 --backbone pixels --epochs 0"
    cfg = config(f"--method {name} {options}")
    cfg.device = "cuda"
    crops = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    batch = hx.Batch(crops, torch.rand(8, 8), None)
    x1, x2 = hx.augment(batch, cfg).chunk(2)
    assert x1.is_contiguous(memory_format=torch.channels_last)

    model = hx.build_model(cfg)
    with torch.autocast("cuda", dtype=torch.float16):
        outputs = model(x1, x2)
        shared = [hx.gather(each) for each in outputs]
        assert outputs[0].dtype == torch.float16
        for loss in hx.LOSSES:
            value, stats = hx.HEX(model.method, loss).loss(*shared)
            assert value.dtype == torch.float32
            for each in (value, *stats.values()):
                assert each.device.type == "cuda"

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


def first_views(cfg, count):
    """Of the first drawn pictures, the views of epoch 1."""
    return hx.Views(DRAW(112, 0), cfg)[[(1, i) for i in range(count)]]


@cases("name", COUNT)
def test_a_step_has_no_operation_without_a_deterministic_form(name):
    cfg = config(f"--method {name} --blur 1 1 --hidden 16 --dim 8")
    model = hx.build_model(cfg)
    batch = first_views(cfg, 16)
    with Operations() as seen:
        outputs = model(*hx.augment(batch, cfg).chunk(2))
        loss, _ = model.loss(*outputs, epoch=9)
        loss.backward()
        hx.LARS(model.named_parameters(), 0.1).step()
        model.method.after_step(0.5, [[each.detach() for each in outputs]])
    assert len(seen.names) > 100
    assert not {*seen.names} & {*NOT_DETERMINISTIC.split()}


compiled = partial(torch.compile, backend="eager", fullgraph=True)


@cases("form", FORMS)
def test_the_losses_compile_as_one_graph(form):
    loss = partial(ours, form, H="quantile 0.9")
    views = two_views(8)
    assert_close(compiled(loss)(*views), loss(*views))


def test_the_augmentation_compiles_as_one_graph():
    cfg = config("--blur 1 1 --solarize 0 1")
    batch = first_views(cfg, 4)
    assert_close(compiled(hx.augment)(batch, cfg), hx.augment(batch, cfg))


# --- The command against recorded numbers: helpers ----------------------------------------------
def trained(*texts, out="o"):
    """Runs a command that must succeed. Returns its folder."""
    assert run(*texts, out=out) == 0
    return Path(out)


def events(out="o", kind=""):
    """What metrics.jsonl holds, of one kind or all, but for what a clock says."""
    found = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
    for event in found:
        event.pop("images_per_second", None)
        event.pop("data_wait", None)
    return [event for event in found if kind in event["event"]]


def losses(out="o"):
    return [event["loss"] for event in events(out, "step")]


def probe_of(out="o"):
    return json.load(open(f"{out}/probe.json"))


# --- The golden trajectory ----------------------------------------------------------------------
# Two runs of the real command, which between them touch everything that trains. The plain loop
# above says what is right; these numbers say what has changed. To record them again, run
#     python -m pytest -s -q test_hex.py -k golden
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


def trajectory(argv):
    """What a run has left, as a line for each thing, with its numbers by name."""
    cfg = config(argv)
    batch = first_views(cfg, 4)
    first, second = batch.crops.double().mean((1, 2, 3)).chunk(2)
    crops = (first + second) / 2
    yield "crops", dict(zip("0123", crops.tolist()))
    views = hx.augment(batch, cfg).double().square().mean((1, 2, 3))
    yield "views", dict(zip("01234567", views.tolist()))

    for event in events():
        yield f"{event.pop('event')} {event.pop('step')}", event

    norms = {}
    for key, value in torch.load("o/checkpoint.pt")["model"].items():
        part = key.split(".")[1]
        norms[part] = norms.get(part, 0) + value.double().norm().item()
    yield "norms", norms

    probe = probe_of()
    yield "probe", {key: probe[key] for key in "top1 top5 knn train held_out".split()}


@cases("name", GOLDEN_RUNS)
def test_golden_trajectory(name, monkeypatch):
    monkeypatch.setattr(hx, "draw_shapes", lambda count, seed: DRAW(2 * FEW[count], seed))
    argv = GOLDEN_OPTIONS + GOLDEN_RUNS[name]
    trained(argv)
    got = {f"{name} {thing}": numbers for thing, numbers in trajectory(argv)}
    for thing, numbers in got.items():
        words = " ".join(f"{word} {number:.6g}" for word, number in numbers.items())
        print(textwrap.fill(f"{thing}: {words}", 98, subsequent_indent="    "))

    want = {thing: each for thing, each in table(GOLDEN).items() if thing.startswith(name)}
    assert got.keys() == want.keys()
    for thing, numbers in want.items():
        assert got[thing].keys() == numbers.keys()
        for word, number in numbers.items():
            close = approx(float(number), rel=2e-3, abs=SLACK.get(word, 1e-4))
            assert got[thing][word] == close, (thing, word)


# --- The command against a plain loop -----------------------------------------------------------
def lars_by_hand(params, velocity, lr, cfg):
    for p, v in zip(params, velocity):
        if p.ndim > 1:                                      # not for biases and norms
            norm, decay = p.norm(), cfg.weight_decay
            factor = cfg.eta * norm / (p.grad.norm() + decay * norm + 1e-8)
            if cfg.clip:
                factor = min(factor / lr, 1)
            p.grad = factor * (p.grad + decay * p)
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
        first, *others = (before[name] - p.detach()).view(-1).tolist()
        is_plain = first == approx(0.5) and not any(others)
        assert is_plain != (p.ndim > 1 and name.endswith("weight")), name


def loss_by_hand(cfg, method, target, x, epoch, labels):
    z = method.projector(method.backbone(x))
    z1, z2 = z.double().chunk(2)
    if cfg.method == "byol":
        with torch.no_grad():
            t1, t2 = target(x).chunk(2)
        p1, p2 = method.predictor(z).chunk(2)
        cosine = F.cosine_similarity(p1, t2) + F.cosine_similarity(p2, t1)
        own = 4 - 2 * cosine.mean()
    else:
        own, _ = naive("info_nce", z1, z2, cfg.temperature)
    if epoch < cfg.hex_warmup:
        return own, {}

    H = f"quantile {cfg.quantile}"
    if cfg.threshold == "oracle":
        H = "labels " + "".join(map(str, labels))
    value, stats = naive("hex", z1, z2, cfg.temperature, H, cfg.beta, cfg.tau_plus)
    return (1 - cfg.alpha) * own + cfg.alpha * value, stats


def learning_rates(peak, total, warm):
    for step in range(total):
        done = (step - warm) / (total - warm)
        if step < warm:
            yield peak * (step + 1) / warm
        else:
            yield peak * (1 + math.cos(math.pi * done)) / 2


def plain_loop(cfg, train):
    """The backbone, and for each step what the log should say."""
    method = hx.build_model(cfg).train().method
    views, log = hx.Views(train, cfg), []
    online = nn.Sequential(method.backbone, method.projector)
    target = copy.deepcopy(online)
    params = [*online.parameters()]
    if cfg.method == "byol":
        params += method.predictor.parameters()
    velocity = [torch.zeros_like(p) for p in params]
    size, count = cfg.batch_size, cfg.accumulate
    per_epoch = len(train) // (size * count)
    total = cfg.epochs * per_epoch
    rates = learning_rates(cfg.lr * size * count / 256, total, cfg.lr_warmup * per_epoch)

    for step, lr in enumerate(rates):
        epoch, k = divmod(step, per_epoch)
        order = hx.permutation(len(train), cfg.seed, "order", epoch)
        parts = []
        for row in order.split(size)[k * count:][:count]:
            x = batch_by_hand(views[[(epoch, i) for i in row.tolist()]])
            labels = train.coarse[row].tolist()
            loss, stats = loss_by_hand(cfg, method, target, x, epoch, labels)
            (loss / count).backward()
            parts.append(dict(loss=loss.item()) | stats)

        with torch.no_grad():
            lars_by_hand(params, velocity, lr, cfg)
            done = (step + 1) / total
            share = (1 - (cfg.ema or 0)) * (math.cos(math.pi * done) + 1) / 2
            for old, new in zip(target.parameters(), online.parameters()):
                old.copy_((1 - share) * old + share * new)
        means = {key: sum(part[key] for part in parts) / count for key in parts[0]}
        log.append(dict(step=step + 1, epoch=epoch, lr=lr) | means)
    return method.backbone, log


LOOP = (
    "--epochs 2 --lr-warmup 1 --size 16 --batch-size 8 --accumulate 2 --hidden 32 --dim 16 "
    "--lr 0.05 --weight-decay 0.03 --eta 0.04 --alpha 0.3 --temperature 0.3 --beta 0.5 "
    "--tau-plus 0.05 --blur 0.5 0.3 --solarize 0 0.5 --seed 3 --probe-epochs 2 --log-every 1 "
    "--workers 0 --device cpu ")


@cases("more", [
    "--hex-warmup 0 --method byol --quantile 0.8 --ema 0.7 --predictor 32 --clip --norm group",
    "--hex-warmup 1 --threshold oracle"])
def test_the_command_is_a_plain_loop(more):
    """Order, views, loss, accumulation, schedule, LARS, momentum and log, in six steps.

    Both use float32, but the views and the losses are computed otherwise: that is some 1e-6.
    """
    trained(LOOP, more)
    backbone, log = plain_loop(config(LOOP + more), DRAW(56, 0))

    got = torch.load("o/backbone.pt")
    for name, value in backbone.named_parameters():
        assert_close(got[name], value.data, rtol=0, atol=1e-5)
    assert len(log) == 6
    for event, want in zip(events(kind="step"), log, strict=True):
        want = {key: value for key, value in want.items() if value == value}
        assert {key: event[key] for key in want} == approx(want, rel=1e-5, abs=1e-6)


# --- Pictures -----------------------------------------------------------------------------------
SMALL = (
    "--epochs 2 --batch-size 8 --size 16 --hidden 32 --dim 16 --lr 0.5 --lr-warmup 1 "
    "--hex-warmup 0 --probe-epochs 2 --log-every 1 --workers 0 --device cpu")
SHORT = f"{SMALL} --epochs 1 --lr-warmup 0 --probe-epochs 1"
FOLDER = f"{SHORT} --backbone resnet10_narrow --accumulate 1 --data folder --root"


def noise(path, mode="RGB"):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((40, 30), 99).convert(mode).save(path)


def first_of(root):
    """The first picture of a folder without labels."""
    return hx.Folder(root, labeled=False).read(0)


RAMP = numpy.arange(128, dtype=numpy.uint8).reshape(8, 16) * 2 + 1
LYING = Image.Exif()
LYING[0x0112] = 6                                   # the picture is stored lying on its side
METADATA = dict(
    none={},
    lying=dict(exif=LYING.tobytes()),
    broken=dict(exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"))
# A file, its mode and its metadata.
FILES = """
a.jpg RGB none
a.jpg L none
a.jpg CMYK none
a.png P none
a.png RGBA none
a.tiff RGB none
a.webp RGB none
a.jpg L lying
a.png L lying
a.png L broken
"""


@each_line(FILES)
def test_every_kind_of_picture_is_decoded_upright(line):
    """JPEG at its best quality may be wrong by a few of 255 steps, and no other kind at all."""
    name, mode, metadata = line.split()
    picture = Image.fromarray(RAMP).convert(mode)
    picture.save(name, quality=100, lossless=True, **METADATA[metadata])
    want = RAMP
    if metadata == "lying":
        want = numpy.rot90(RAMP, -1)
    got = first_of(".")
    assert got.shape == (3, *want.shape) and got.dtype == torch.uint8
    most = 4 if "jpg" in name else 0
    assert abs(got.numpy().astype(int) - want).max() <= most


@each_line("a.png <u2\na.tiff <u2\na.tiff >u2\na.pgm <u2")
def test_16_bits_of_either_byte_order_are_scaled_to_8(line):
    name, dtype = line.split()
    gray = RAMP.astype(int) * 257 + 100 * (RAMP < 255)
    Image.fromarray(gray.astype(dtype)).save(name)
    assert (first_of(".").numpy() == RAMP).all()


@cases("dtype", ["i2", "i4", "f4"])
def test_numbers_without_a_known_range_are_refused(dtype):
    Image.fromarray(RAMP.astype(dtype)).save("a.tiff")
    with pytest.raises(hx.UserError, match="a.tiff: not readable .*no known range"):
        first_of(".")


# Files, and the folders that links lead to.
TREE = """
z.png a/c.png b/d/e.png .a.png .b/c.png b/.x/0.png r/lock r/config.json out/1
a/up=. b/d/up=. link=b
"""


def test_hidden_files_runs_and_links_that_lead_up_are_no_pictures(tmp_path):
    for name in TREE.split():
        name, _, target = name.partition("=")
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(tmp_path / target)
        else:
            path.touch()
    folder = hx.Folder(tmp_path, labeled=False, skip={str(tmp_path / "out")})
    assert folder.files.tolist() == [b"z.png", b"a/c.png", b"b/d/e.png"]
    assert hx.Folder(tmp_path).classes == ["a", "b", "out"]
    Path("a/0.png").symlink_to(os.devnull)          # as a pipe, but it never waits
    with pytest.raises(hx.UserError, match="no regular file"):
        hx.Folder(tmp_path).read(0)


def test_pictures_without_labels_are_trained_on_and_own_output_is_not(capsys):
    for i in range(20):
        noise(f"{i}.png")
    noise("runs/0.png")
    run_folder = Path("runs/folder-simclr-hex-s0")
    for out in ("", "", "--out other"):
        assert hx.main(f"{FOLDER} . {out}".split()) == 0
        assert "20 train, 0 val" in capsys.readouterr().err
    left = os.listdir(run_folder)
    assert "backbone.pt" in left and "probe.json" not in left
    figures = events(run_folder)[0].keys()
    assert {"threshold", "local", "rankme", "std"} == figures - {"event", "step", "epoch"}


@pytest.fixture
def labelled():
    """24 pictures of two classes in data/train/, the same in data/val/."""
    for i in range(24):
        mode = ["RGB", "L", "CMYK"][i % 3]
        noise(f"data/train/{'ab'[i % 2]}/{i}.jpg", mode)
    shutil.copytree("data/train", "data/val")


def test_labels_without_val_are_used_for_purity_alone(labelled):
    shutil.rmtree("data/val")
    trained(FOLDER, "data")
    assert "purity" in events()[0]
    assert not os.path.exists("o/probe.json")


def test_imagenet_is_probed_on_live_crops_and_goes_on_after_a_signal(labelled, monkeypatch):
    command = f"{FOLDER} data --data imagenet --probe-epochs 5"
    trained(command, out="whole")
    whole = probe_of("whole")
    assert whole["train"] == 22 and whole["held_out"] == 2
    assert whole["val"] == len(whole["right"]) == 24

    step, steps = torch.optim.SGD.step, []

    def stopped(self):
        if type(self) is torch.optim.SGD:           # LARS, which trains, is a kind of it
            steps.append(step)
        if len(steps) == 2:
            stop()
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", stopped)
        assert run(command) == 75
    assert not os.path.exists("o/probe.json")
    assert torch.load("o/probe.pt")["step"] == 3
    trained(command)
    assert probe_of() == whole
    trained(command, "--label-fraction 0.5")                # another probe in the same folder
    assert probe_of()["train"] == 10


def test_bad_files_are_named_or_skipped_and_results_say_of_how_many_pictures(
        labelled, capsys, refused):
    command = f"{FOLDER} data"
    Path("data/train/a/0.jpg").write_text("no picture")
    assert "0.jpg: not readable" in refused(command)
    bad = [*Path("data/val").rglob("*.jpg")]
    for path in bad:
        path.write_text("no picture")
    assert "can be read" in refused(command, "--skip-bad-files")
    noise(bad[0])
    trained(command, "--skip-bad-files")
    stdout, stderr = capsys.readouterr()
    assert "of 1 pictures" in stdout and "skipped" in stderr


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


PARTS = "data_batch_1 data_batch_2 data_batch_3 data_batch_4 data_batch_5 test_batch"


@cases("data, folder, files", [
    ("cifar10", "cifar-10-batches-py", PARTS.split()),
    ("cifar100", "cifar-100-python", ["train", "test"])])
def test_cifar_from_an_archive_in_its_own_format(data, folder, files, monkeypatch):
    rows = enumerate(CIFAR100.strip().splitlines())
    above = {name: number for number, row in rows for name in row.split()}
    coarse = [above[name] for name in sorted(above)]
    fine = [*range(100)]
    if data == "cifar10":
        fine = [*range(10)] * 10
    pictures = numpy.random.default_rng(0).integers(0, 256, (100, 3072), numpy.uint8)
    content = dict(
        data=pictures, labels=fine, fine_labels=fine, coarse_labels=coarse,
        label_names=[], fine_label_names=[])

    archive = folder.replace("-batches-py", "-python") + ".tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        for name in (*files, "meta", "batches.meta"):
            Path("part").write_bytes(pickle.dumps(content))
            file.add("part", f"{folder}/{name}")
    # The checksums that torchvision knows are of other pictures.
    for name in ("cifar", "utils"):
        check = f"torchvision.datasets.{name}.check_integrity"
        monkeypatch.setattr(check, lambda path, *_: os.path.exists(path))

    train, val = hx.load_data(config(f"--data {data} --root ."))
    assert len(train) == 100 * (len(files) - 1)
    assert val.read(3).flatten().tolist() == pictures[3].tolist()
    assert val.targets.tolist() == fine
    assert data == "cifar10" or train.coarse.tolist() == coarse


# --- The life of a run --------------------------------------------------------------------------
@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of 14 steps that nothing has interrupted. Tests copy it."""
    return trained(SMALL, out=tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def done(finished, own_folder):
    shutil.copytree(finished, "o")


@contextmanager
def at_step(step, action):
    """When the rate of this step, counted from 0, is asked for, do this."""
    rate = hx.learning_rate

    def patched(now, *rest):
        if now == step:
            action()
        return rate(now, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hx, "learning_rate", patched)
        yield


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def stopped(*texts, step=1, out="o"):
    """Runs a command, to which a signal comes in this step. Its exit status."""
    with at_step(step, stop):
        return run(*texts, out=out)


def weights(out="o"):
    return Path(out, "backbone.pt").read_bytes()


def test_what_a_run_leaves(finished):
    assert sorted(os.listdir(finished)) == (
        "backbone.pt checkpoint.pt config.json lock metrics.jsonl neighbours.png "
        "neighbours_early.png probe.json").split()
    result = probe_of(finished)
    for digits, share in (("right", "top1"), ("knn_right", "knn")):
        right = result[digits]
        assert 100 * right.count("1") / len(right) == approx(result[share])
    state = torch.load(finished / "backbone.pt")
    assert all(value.is_contiguous() for value in state.values())
    width, height = Image.open(finished / "neighbours.png").size
    assert width == height >= 8 * 64


def test_a_run_with_loader_processes_is_one_without(finished, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "too long a folder for a socket, or none")
    command = f"{SHORT} --workers 1"
    assert weights(trained(command)) == weights(trained(SHORT, out="alone"))


@cases("threshold, eps", [("step", [0.9, 0.8]), ("cosine", [0.9, 0.6])])
def test_a_scheduled_threshold_by_command(threshold, eps):
    trained(SMALL, "--batch-size 28 --threshold", threshold)
    assert [event["threshold"] for event in events(kind="step")][::2] == approx(eps)


def test_a_collapse_is_warned_of_where_the_spread_is_small_and_does_not_grow(
        monkeypatch, capsys):
    stds = iter([0.0, 0.0, 0.2, 0.15, 0.05, 0.07])
    monkeypatch.setattr(hx, "emergence", lambda *_: dict(std=next(stds), purity=math.nan))
    trained(SMALL, "--epochs 5 --batch-size 56")
    stdout, stderr = capsys.readouterr()
    assert re.findall(r"warning.*\(std (.*) of", stderr) == ["0.000", "0.050"]
    assert events()[0]["purity"] is None and "purity" not in stdout


def test_a_run_that_is_stopped_and_crashes_ends_as_one_that_was_not(finished, capsys):
    command = f"{SMALL} --checkpoint-every 4"
    assert stopped(command, step=4) == 75           # in the middle of an epoch
    assert "run the same command again" in capsys.readouterr().err
    assert 5 <= len(losses()) <= 6
    with at_step(10, lambda: 1 / 0):                # the checkpoint has 8 steps
        assert run(command) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert torch.load("o/checkpoint.pt")["step"] == 8 and len(losses()) == 10
    trained(command)
    assert events() == events(finished)
    assert weights() == weights(finished)


def test_dropout_is_the_same_after_a_resume():
    command = f"{SHORT} --backbone vit_b_32"
    assert stopped(command, step=3) == 75
    assert losses(trained(command)) == losses(trained(command, out="whole"))


@cases("epochs", [0, 1])
def test_a_signal_in_the_last_figures_is_not_lost(epochs, monkeypatch):
    emergence = hx.emergence

    def interrupted(*args):
        stop()
        return emergence(*args)

    monkeypatch.setattr(hx, "emergence", interrupted)
    assert run(SHORT, f"--epochs {epochs}") == 75
    assert not os.path.exists("o/probe.json")


def test_a_second_signal_after_3_seconds_ends_at_once(monkeypatch):
    ended, times = [], iter([10.0, 12.0, 14.0])
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    with hx.signals_counted(restore=True) as came:
        stop()
        stop()
        assert (came, ended) == ([10.0, 12.0], [])
        stop()
        assert ended == [75]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_finished_run_says_so_and_evaluation_options_evaluate_again(
        done, capsys, monkeypatch):
    before = events()
    trained(SMALL)
    assert capsys.readouterr().err.count("was finished before") == 2
    monkeypatch.setattr(hx, "learning_rate", lambda *_: 1 / 0)      # it does not train again
    trained(SMALL, "--probe-epochs 3 --label-fraction 0.5")
    again = probe_of()
    assert again["asked"]["probe_epochs"] == 3
    assert again["train"] + again["held_out"] == 28
    assert events() == before
    os.remove("o/checkpoint.pt")
    os.remove("o/metrics.jsonl")
    trained(SMALL)


def test_moved_data_go_on_and_other_data_are_refused(capsys, refused):
    for i in range(20):
        noise(f"here/{i}.png")
    trained(FOLDER, "here")
    os.rename("here", "there")
    trained(FOLDER, "there")
    assert "was finished before" in capsys.readouterr().err
    noise("there/one more.png")
    assert "pictures" in refused(FOLDER, "there")


PROBE = "--probe-epochs 2 --workers 0 --device cpu --probe o/backbone.pt"


def test_a_backbone_is_probed_as_in_its_run(done, refused):
    again = probe_of(trained(PROBE, out="p"))
    assert again["right"] == probe_of()["right"]
    state = torch.load("o/backbone.pt")
    state["0.weight"] *= math.nan
    torch.save(state, "o/backbone.pt")
    assert "not finite" in refused(PROBE, out="q")


# --- What goes wrong ----------------------------------------------------------------------------
HUGE = """{"config": {
    "backbone": "resnet18", "norm": "batch", "size": 9999, "data": "shapes",
    "recipe": null, "root": null}}"""


@cases("saved, words", [
    ('{"config": {"backbone": "resnet18", "size": 32}}', "--backbone"),
    (HUGE, "--size")])
def test_a_config_beside_a_backbone_is_checked_like_a_command(saved, words, done, refused):
    Path("o/config.json").write_text(saved)
    assert words in refused(PROBE, status=2)


def test_another_experiment_is_refused_with_the_settings_that_differ(done, refused):
    assert "beta 1.0 there, 0.5 here" in refused(SMALL, "--beta 0.5")


def test_a_run_at_work_and_a_folder_that_cannot_be_written_are_refused(
        done, monkeypatch, refused):
    with open("o/lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is at work" in refused(SMALL)
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "cannot be written" in refused(SMALL)


def test_a_file_system_without_locks_and_a_folder_with_other_files_are_used(
        done, monkeypatch, capsys, refused):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    trained(SMALL)
    assert "No locks" in capsys.readouterr().err
    os.makedirs("other/lost+found")
    trained(SHORT, "--epochs 0", out="other")
    os.remove("other/config.json")
    assert "without its config.json" in refused(SHORT, out="other")


@cases("damage, words", [
    (lambda state: dict(state, experiment="another's"), "of another experiment"),
    (lambda state: [], "delete it to start again")])
def test_a_checkpoint_of_another_run_or_none_is_refused(damage, words, done, refused):
    state = torch.load("o/checkpoint.pt")
    torch.save(damage(state), "o/checkpoint.pt")
    assert words in refused(SMALL)


def test_a_foreign_backbone_is_not_taken_for_the_runs_own(done):
    state = torch.load("o/backbone.pt")
    torch.save({key: 0 * value for key, value in state.items()}, "o/backbone.pt")
    own = probe_of()
    os.remove("o/probe.json")
    assert probe_of(trained(SMALL)) == own


@cases("damage", [Path.mkdir, lambda log: log.write_bytes(b"\0\0{}\n[3]\n{\n")])
def test_the_log_never_stops_a_run(damage):
    os.mkdir("o")
    damage(Path("o/metrics.jsonl"))
    trained(SHORT)


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


@cases("stream", [Broken(), None])
def test_the_terminal_never_stops_a_run(stream, monkeypatch):
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("sys.stderr", stream)
    trained(SHORT)
    assert os.path.exists("o/probe.json")


def test_a_loader_process_blocks_signals_and_if_it_dies_the_run_ends_in_one_line(refused):
    before, masks = {*multiprocessing.active_children()}, []

    def kill():
        worker, = {*multiprocessing.active_children()} - before
        status = Path(f"/proc/{worker.pid}/status").read_text()
        masks.append(int(re.search(r"SigBlk:\s*(\w+)", status)[1], 16))
        worker.kill()
        worker.join()                               # only now the loader knows for sure

    with at_step(2, kill):
        assert "DataLoader worker" in refused(SMALL, "--workers 1")
    assert masks[0] >> signal.SIGTERM - 1 & 1                   # it is blocked


@cases("broken", [
    lambda loss, e: loss * math.nan,
    lambda loss, e: loss + (0 * e.sum()).sqrt(),
    lambda loss, e: loss + 0 * (1e20 * e).square().sum()])
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_and_leaves_the_checkpoint(
        broken, monkeypatch, refused):
    loss, calls = hx.HEX.loss, iter(range(99))

    def patched(self, *embeddings, **options):
        value, stats = loss(self, *embeddings, **options)
        if next(calls) == 3:
            value = broken(value, embeddings[0])
        return value, stats

    monkeypatch.setattr(hx.HEX, "loss", patched)
    line = refused(SMALL, "--checkpoint-every 2")
    assert "step 4: " in line and "not finite" in line
    assert torch.load("o/checkpoint.pt")["step"] == 2


# --- Several ranks and one ----------------------------------------------------------------------
# Each is trained by that many ranks, and by one process.
RUNS = {
    "2 simclr": "--accumulate 2",
    "2 nnclr": "--accumulate 2 --method nnclr --predictor 32 --queue 40",
    "2 byol": "--accumulate 2 --method byol --predictor 32 --backbone vit_b_32",
    "2 shared": "--norm group --lr 0.005 --batch-size 16",
    "3 apart": "--accumulate 3",
    "3 joint": "--norm group --lr 0.005 --batch-size 24"}


def train_all(rank, ranks):
    """Returns the running means of BatchNorm that this rank ends with, by the run."""
    models, build, means = [], hx.build_model, {}

    def built(cfg):
        models.append(build(cfg))
        return models[-1]

    hx.build_model = built
    for name, options in RUNS.items():
        if ranks in (1, int(name[0])):
            trained(SHORT, options, out=f"{name} by {ranks}")
            state = models[-1].state_dict()
            means[name] = [state[key] for key in state if key.endswith("running_mean")]
    return means


def gather_rows(rank, ranks):
    """The gradient of a loss of all rows in this rank's own, and an error where rows differ."""
    own = torch.arange(6.0).view(3, 2)[[rank]].requires_grad_()
    rows = hx.gather(own)
    rows.sum(0).square().sum().backward()
    with pytest.raises(ValueError, match="different shapes"):
        hx.gather(torch.ones(rank + 1))
    return dict(rows=rows.tolist(), gradient=own.grad.tolist())


def stop_and_resume(rank, ranks):
    for name, options in RUNS.items():
        if name.startswith("3"):
            assert stopped(SHORT, options, out=f"{name} again") == 75
            trained(SHORT, options, out=f"{name} again")


def stop_the_last(rank, ranks):
    """Rank 0 is not told."""
    command = SHORT, RUNS["2 simclr"]
    first = (run, stopped)[rank](*command, out="2 stopped")
    written = os.path.exists("2 stopped/checkpoint.pt")
    return dict(first=first, written=written, second=run(*command, out="2 stopped"))


def differ(rank, ranks):
    """In an option that is not part of the experiment, and in their data."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", said)
        option = run(SHORT, f"--log-every {rank + 1}", out="other")
        patch.setattr(hx, "draw_shapes", lambda count, seed: DRAW(56, seed + rank))
        data = run(SHORT, out="other")
    return dict(option=option, data=data, said=said.getvalue())


SCENARIOS = {
    1: [train_all],
    2: [train_all, stop_the_last, differ],
    3: [gather_rows, train_all, stop_and_resume]}


def on_rank(rank, ranks, folder):
    """One of so many processes goes through their scenarios, and leaves what it has found."""
    os.nice(9)                                      # other tests go first
    os.chdir(folder)
    sys.stdout = sys.stderr = open(f"log of {rank} of {ranks}", "w")
    hx.RANK, hx.RANKS = rank, ranks
    if ranks > 1:
        store = f"file://{folder}/store{ranks}"
        dist.init_process_group("gloo", store, rank=rank, world_size=ranks)
    found = {scenario.__name__: scenario(rank, ranks) for scenario in SCENARIOS[ranks]}
    torch.save(found, f"found by {rank} of {ranks}")


@pytest.fixture(scope="session", autouse=True)
def processes(request, tmp_path_factory):
    """Those of 1, of 2 and of 3 ranks, and their folder. They run while other tests do.

    They are forked before anything has started threads, and only if a test needs them.
    """
    folder, started = tmp_path_factory.mktemp("ranks"), []
    if any("ranks" in item.fixturenames for item in request.session.items):
        fork = multiprocessing.get_context("fork").Process
        for ranks in SCENARIOS:
            started += [fork(target=on_rank, args=(rank, ranks, folder)) for rank in range(ranks)]
    for process in started:
        process.start()
    yield folder, started
    for process in started:
        process.kill()


@pytest.fixture
def ranks(processes, monkeypatch):
    """When all ranks have ended well, this works in their folder."""
    folder, started = processes
    for process in started:
        process.join(900)
        process.kill()                              # it hangs, if it is still there
        assert process.exitcode == 0, f"see the logs in {folder}"
    monkeypatch.chdir(folder)


def found_by(ranks, scenario):
    return [torch.load(f"found by {rank} of {ranks}")[scenario] for rank in range(ranks)]


def test_a_rank_has_the_gradient_in_its_own_rows(ranks):
    rows = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    want = dict(rows=rows, gradient=[[12.0, 18.0]])
    assert found_by(3, "gather_rows") == [want] * 3


@cases("name, slack", [
    ("2 simclr", 0),
    ("2 nnclr", 1e-5),
    ("2 byol", 1e-5),
    ("2 shared", 1e-4),
    ("3 apart", 1e-4),
    ("3 joint", 1e-4)])
def test_ranks_train_as_one_process(ranks, name, slack):
    """Whole losses of two ranks: to the last bit, as a sum of two. Else to rounding."""
    one, many = (losses(f"{name} by {count}") for count in (1, name[0]))
    assert len(one) >= 2 and many == approx(one, rel=0, abs=slack)


@cases("name", ["3 apart", "3 joint"])
def test_three_ranks_that_are_stopped_end_with_the_same_bytes(ranks, name):
    assert weights(f"{name} by 3") == weights(f"{name} again")


def test_the_statistics_of_batch_norm_are_the_mean_over_ranks(ranks):
    one, = found_by(1, "train_all")
    first, second = found_by(2, "train_all")
    for alone, mean, same in zip(one["2 simclr"], first["2 simclr"], second["2 simclr"]):
        assert_close(mean, same)
        # One process saw twice as many batches, so it is further from the start, 0.
        assert 0.5 < mean.norm() / alone.norm() < 0.75


def test_a_signal_to_one_rank_stops_all_when_the_checkpoint_is_written(ranks):
    want = dict(first=75, written=True, second=0)
    assert found_by(2, "stop_the_last") == [want] * 2
    assert weights("2 simclr by 2") == weights("2 stopped")


def test_ranks_that_differ_say_so_once(ranks):
    first, second = found_by(2, "differ")
    assert first["said"].count("hex.py: error: the ranks see different data or options") == 2
    assert second["said"] == ""
    for found in (first, second):
        assert (found["option"], found["data"]) == (2, 2)
    assert not os.path.exists("other")
