# SPDX-License-Identifier: MIT
"""Tests of hex.py: the loss against loops, closed forms, the authors' numbers, two ranks; the methods; then
from pictures to results, where the real command is held against a plain loop."""
import contextlib
import copy
import fcntl
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import tarfile
import time
import types
import weakref
from functools import partial
from itertools import product

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

import hex as hx

torch.set_num_threads(1)
DRAW = hx.draw_shapes
hx.draw_shapes = lambda count, seed: DRAW({4096: 112, 1024: 48}[count], seed)   # 7 batches of 16 to train on
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

# --- The loss -----------------------------------------------------------------------------------------------
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

@pytest.mark.parametrize("form, t", [*product(FORMS, [0.3, 0.1])])
def test_gradcheck_with_a_learnable_temperature(form, t):
    """Where H cannot flip and Q is 1 (elsewhere Q and eps are held still, on purpose)."""
    inputs = *views(4), torch.tensor(t, dtype=torch.float64)
    f = partial(ours, form, H=("rescaled", 0.3), **dict(beta=0.0) if form in FORMS[2:] else {})
    assert torch.autograd.gradcheck(lambda *e: f(*e)[0], [x.requires_grad_() for x in inputs])

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
    (lambda: hx.info_nce(x, x, 0.0), "temperature = 0.0"), (lambda: hx.dcl(x[0], x[0]), r"\(3,\)"),
    (lambda: hx.AdaptiveThreshold(1.0), "quantile = 1.0"), (lambda: hx.hex_nce(x, x, beta=-1), "beta = -1"),
    (lambda: hx.info_nce(x, x[:3]), r"\(4, 3\).*\(3, 3\)"), (lambda: hx.hex_nce(x[:1], x[:1]), "N = 1"),
    (lambda: hx.hex_nce(x, x, tau_plus=1), "plus = 1"), (lambda: hx.HEX(nn.Identity(), "nce"), "'nce'"),
    (lambda: hx.hex_nce(x, x, threshold=hx.OracleHierarchy(torch.ones(3))), "labels: 3"),
    (lambda: hx.hex_nce(x, x, threshold="a"), "'a'"), (lambda: hx.adaptive_threshold(x - math.inf), "-inf"),
    (lambda: hx.HEX(nn.Bilinear(3, 3, 2))(x, x), "tensor")])
def test_a_refusal_names_argument_and_value(call, words):
    with pytest.raises(ValueError, match=words):
        call()

@pytest.mark.parametrize("threshold, want", [
    (hx.StepThreshold(0.9, 0.1, 10), {0: 0.9, 9: 0.9, 10: 0.8, 45: 0.5, 90: 0.0, 500: 0.0}),
    (hx.CosineThreshold(0.9, 0.3, 100), {0: 0.9, 25: 0.6 + 0.3 * math.sqrt(0.5), 50: 0.6, 300: 0.3})])
def test_schedules_have_no_state(threshold, want):
    for epoch in [*want, *reversed(want)]:
        got = graded(partial(hx.hex_nce, threshold=threshold, epoch=epoch), *views(5))
        assert_same(got, graded(partial(naive, "hex", H=("rescaled", want[epoch])), *views(5)))

# --- Methods ------------------------------------------------------------------------------------------------
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

def own_by_hand(name, e, queue):
    """Each paper's loss."""
    def nce(a, b, t):
        return ((a @ b.T / t).logsumexp(1) - (a * b).sum(1) / t).mean()
    u, off = F.normalize(e, dim=2), 1 - torch.eye(6)
    cos = [[(a * b).sum(1).mean() for b in u] for a in u]
    if name == "simclr":
        return naive("info_nce", *e)[0]
    if name == "nnclr":
        near = [queue[(z @ queue.T).argmax(1)] for z in u[2:]]
        return (nce(near[0], u[1], 0.1) + nce(near[1], u[0], 0.1)) / 2
    if name == "mocov3":
        return 2 * (nce(u[0], u[5], 1.0) + nce(u[1], u[4], 1.0))
    if name in ("byol", "simsiam"):
        return 4 - 2 * cos[0][5] - 2 * cos[1][4] if name == "byol" else -(cos[0][3] + cos[1][2]) / 2
    if name == "barlow":
        a, b = ((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() for x in e)
        c = a.T @ b / len(a)
        return 0.1 * ((1 - c.diagonal()).square().sum() + 0.0051 * (off * c).square().sum())
    c = [z.T.cov() for z in e]
    variance = sum((1 - (each.diagonal() + 1e-4).sqrt()).clamp(min=0).mean() for each in c)
    covariance = sum((off * each).square().sum() for each in c) / 6
    return 25 * (e[0] - e[1]).square().mean() + 25 * variance + covariance

@pytest.mark.parametrize("name", HEADS)
def test_own_loss_is_its_papers(name):
    made, e = method(name), embeddings(name)
    loss, grad, _ = graded(lambda *e: (made.loss(*e)[0], {}), *e)
    want = own_by_hand(name, e, made.state_dict().get("queue")).item()
    assert loss.item() == pytest.approx(want, rel=1e-6)
    assert not (name in ("simsiam", "nnclr") and grad[2:].any())            # what is predicted is held still

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

@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_where_alpha_is_1_the_own_loss_frees_its_graph_before_hex_is_made(alpha):
    class Foreign(nn.Module):
        def loss(self, a, b):
            difference = a - b      # squaring keeps it until the backward
            self.kept = weakref.ref(difference)
            return difference.square().mean(), [(a, b), (b, a)]
    def threshold(*of_batch):
        assert (model.method.kept() is not None) == (alpha < 1)
        return hx.AdaptiveThreshold()(*of_batch)
    model = hx.HEX(Foreign(), alpha=alpha, threshold=threshold)
    model.loss(*(x.requires_grad_() for x in views(4)))

def test_the_readmes_module_runs():
    readme = open(os.path.join(os.path.dirname(hx.__file__), "README.md"), encoding="utf-8").read()
    names = {}
    exec(readme.partition("```python\n")[2].partition("```")[0], names)
    model = names["model"]
    model.after_step(1)                                                     # it has none of its own
    assert names["loss"].isfinite() and all(p.grad.isfinite().all() for p in model.parameters())

def test_the_queue_takes_every_loss_of_a_step_and_wraps_around():
    made = method("nnclr")                                                  # a queue of 10
    made.losses = 2
    for turn in range(4):
        z = torch.randn(2, 3, 6).double()
        for each in z:
            made.train().loss(each, each, each, each)
        made.eval().loss(*torch.randn(4, 3, 6).double())                    # leaves no trace
        made.after_step(0)
        where = [(6 * turn + i) % 10 for i in range(6)]
        torch.testing.assert_close(made.queue[where], F.normalize(z.flatten(0, 1), dim=1))

def test_the_last_batch_norm_has_no_weights():
    for head in (method("simsiam").projector, method("mocov3").projector, method("mocov3").predictor):
        assert list(head[-1].state_dict()) == ["running_mean", "running_var", "num_batches_tracked"]

# --- Two ranks and one --------------------------------------------------------------------------------------
LOPSIDED = [torch.cat([x[:1] + 0.1 * x[:4], x[4:]]) for x in views(8, 16, 1.0)]  # rank 0's lie close together
CASES = [*((form, LOPSIDED, {}) for form in FORMS), ("hex", views(6), dict(H=("quantile", 0.8), beta=2.0)),
         ("hex", LOPSIDED, dict(H=("rescaled", 0.6))), ("released", LOPSIDED, dict(H=("above", 0.6))),
         ("released", views(6), dict(H=("labels", [0] * 6))),
         ("hex", views(6), dict(H=("labels", [0, 0, 0, 1, 2, 3]))),
         *((name, embeddings(name), {}) for name in ("nnclr", "mocov3", "barlow", "vicreg")),
         ("hex", views(2), {})]                                             # one image a rank
SMALL = ("--epochs 2 --batch-size 16 --hidden 32 --dim 16 --probe-epochs 2 --workers 0 --log-every 1 "
         "--device cpu --lr 0.5 --lr-warmup 1 --hex-warmup 0").split()
SHORT = [*SMALL, *"--epochs 1 --lr-warmup 0 --probe-epochs 1".split()]
RUNS = dict(simclr=("--accumulate 2", 0),
            nnclr=("--accumulate 2 --method nnclr --predictor 32 --queue 40", 1e-5),
            byol=("--accumulate 2 --method byol --predictor 32", 1e-5),
            shared=("--norm group --lr 0.005 --batch-size 32", 1e-4))       # name: options, tolerance

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

def on_rank(rank, port, folder):
    """As torchrun starts it: the runs, then in the same group the cases, and a run on other data a rank."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                       MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    dist.destroy_process_group = lambda: None
    for name, (options, _) in RUNS.items():
        assert hx.main([*SHORT, *options.split(), "--out", f"{folder}/two {name}"]) == 0
    together = [of_rank(case, rank) for case in CASES]
    command = [*SHORT, *RUNS["simclr"][0].split(), "--out", f"{folder}/stopped"]
    with pytest.MonkeyPatch.context() as patch:     # one rank is told, and looks late; the other writes late
        if rank == 1:
            at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
            patch.setattr(os.path, "lexists", lambda path, look=os.path.lexists: time.sleep(1) or look(path))
        patch.setattr(hx, "write", lambda path, fill, write=hx.write: time.sleep(0.3) or write(path, fill))
        stopped = hx.main(command), os.path.exists(f"{folder}/stopped/checkpoint.pt"), hx.main(command)
    hx.draw_shapes = lambda count, seed: DRAW(112, seed + rank)
    with contextlib.redirect_stderr(io.StringIO()) as told:
        status = hx.main([*SHORT, "--out", f"{folder}/bad"])
    queue = queue_after(2, [rank, rank + 2])
    torch.save((together, status, told.getvalue(), queue, stopped), f"{folder}/{rank}.pt")

@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """-> the folder of the runs, and of each rank what it saved."""
    folder = tmp_path_factory.mktemp("ranks")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    started = mp.spawn(on_rank, (str(store.port), str(folder)), nprocs=2, join=False)
    for name, (options, _) in RUNS.items():                             # meanwhile, the same in one process
        assert run(*SHORT, *options.split(), "--out", folder / f"one {name}") == 0
    while not started.join():
        pass
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]

def test_two_ranks_are_one(two_ranks):
    """DDP averages: the ranks' mean loss, and their gradients over the world size, are one process's."""
    for case, *both in zip(CASES, *(each[0] for each in two_ranks[1])):
        (loss0, grad0, stats0), (loss1, grad1, stats1) = both
        got, want = ((loss0 + loss1) / 2, torch.cat([grad0, grad1], 1) / 2), of_rank(case, None)
        assert_same((*got, stats0), want, 1e-12)
        assert_same((*got, stats1), want, 1e-12)

def test_the_queue_takes_the_losses_of_all_ranks_in_order(two_ranks):
    for each in two_ranks[1]:
        torch.testing.assert_close(each[3], queue_after(4, range(4)))

@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one_process(two_ranks, name):
    """Whole losses: to the last bit, BatchNorm and all. Shared ones: to rounding."""
    one, two = (losses(two_ranks[0] / f"{count} {name}") for count in ("one", "two"))
    assert len(one) == 3 and two == pytest.approx(one, rel=0, abs=RUNS[name][1])

def test_a_signal_to_one_rank_stops_all_when_the_checkpoint_is_written(two_ranks):
    assert [each[4] for each in two_ranks[1]] == [(75, True, 0)] * 2
    first, again = (two_ranks[0] / name / "backbone.pt" for name in ("two simclr", "stopped"))
    assert first.read_bytes() == again.read_bytes()

def test_ranks_that_see_different_data_say_so(two_ranks):
    for _, status, told, *_ in two_ranks[1]:
        assert status == 1 and told.count("hex.py: error: the ranks see different data") == 1
    assert not (two_ranks[0] / "bad").exists()

# --- The CUDA path, without a CUDA GPU ----------------------------------------------------------------------
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

# --- Views --------------------------------------------------------------------------------------------------
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

def journal(out, kind=""):
    """The events of metrics.jsonl, of a kind or all, without what a clock says."""
    events, clock = map(json.loads, open(out / "metrics.jsonl")), {"images_per_second", "data_wait"}
    return [{k: v for k, v in event.items() if k not in clock} for event in events if kind in event["event"]]

def losses(out):
    return [event["loss"] for event in journal(out, "step")]

def resized(crop, size):
    return tv.resize(crop, [size, size], tv.InterpolationMode.BICUBIC, antialias=True)

def view_by_hand(crop, parameters, mean_std=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
    flip, brightness, contrast, saturation, hue, gray, sigma, solarize = parameters.tolist()
    x = tv.horizontal_flip(crop.float() / 255) if flip else crop.float() / 255
    x = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(x, brightness), contrast), saturation)
    x = tv.rgb_to_grayscale(tv.adjust_hue(x, hue), 3) if gray else tv.adjust_hue(x, hue)
    x = tv.gaussian_blur(x, [13, 13], [sigma, sigma]) if sigma else x
    return tv.normalize(tv.solarize(x, 0.5) if solarize else x, *map(list, mean_std))

def by_hand(views, keys):
    return torch.stack([view_by_hand(*(part[v] for part in views[key][:2])) for v in (0, 1) for key in keys])

@pytest.mark.parametrize("data, mean_std", [("shapes", hx.MEAN_STD["imagenet"]), (
    "cifar10", ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))])
def test_a_batch_is_augmented_as_torchvision_does_it_picture_by_picture(data, mean_std):
    crops = torch.randint(256, (3, 2, 3, 40, 40)).byte()
    parameters = torch.tensor([[1, 1.5, 0.4, 1.7, 0.15, 0, 1.3, 1], [0, 0.3, 1.8, 0.2, -0.2, 1, 0, 0],
                               [1, 1, 1, 1, 0, 0, 0.1, 0], [0, 1.8, 1.2, 0.9, 0.05, 0, 2.0, 1],
                               [0, 1, 1, 1, 0, 0, 0, 0], [1, 0.7, 0.6, 0.5, -0.1, 1, 0.7, 1]]).view(3, 2, 8)
    got = hx.prepare(crops, parameters, config(f"--data {data}", blur=[0, 1], solarize=[1, 0]))
    want = [view_by_hand(crops[i, view], parameters[i, view], mean_std) for view in (0, 1) for i in range(3)]
    torch.testing.assert_close(got.contiguous(), torch.stack(want), rtol=0, atol=2e-5)

def test_what_is_drawn_for_a_view_is_what_the_options_say(monkeypatch):
    """The boxes that are cut out and resized, and the parameters, of 600 draws."""
    cfg = config("--size 8", crop_min=0.3, jitter=[0.4, 0.3, 0.2, 0.1], grayscale=0.25, blur=[1, 0.1],
                 solarize=[0, 0.2])
    draw, boxes = hx.Views.random_crop, []
    pictures = hx.Pictures(torch.randint(256, (50, 3, 300, 300)).byte(), None)
    crop = staticmethod(lambda *a: boxes.append(draw(*a)) or boxes[-1])
    monkeypatch.setattr(hx.Views, "random_crop", crop)
    items = [hx.Views(pictures, cfg)[epoch, i] for epoch in range(12) for i in range(50)]
    for i, crop in enumerate(torch.cat([item[0] for item in items[:50]])):
        assert torch.equal(crop, resized(tv.crop(pictures.read(i // 2), *boxes[i]), 8))
    shares, ratios = zip(*((h * w / 300 ** 2, w / h) for _, _, h, w in boxes), strict=True)
    assert 0.295 < min(shares) < 0.32 and max(shares) > 0.9 and sum(shares) / len(shares) < 0.65
    assert 0.745 < min(ratios) < 0.77 and 1.3 < max(ratios) < 1.34
    assert min(box[0] for box in boxes) < 5 and max(box[0] + box[2] for box in boxes) > 295
    parameters = torch.stack([item[1] for item in items])                   # (draws, views, 8)
    got = [parameters[..., 0].mean(), parameters[..., 5].mean(), *(parameters[..., 6] > 0).float().mean(0),
           *parameters[..., 7].mean(0)]                               # flip, gray, blur twice, solarize twice
    assert [float(each) for each in got] == pytest.approx([0.5, 0.25, 1, 0.1, 0, 0.2], abs=0.05)
    assert 0.1 <= parameters[:, 0, 6].min() < 0.15 and 1.9 < parameters[:, 0, 6].max() <= 2
    change = parameters[..., 1:5] - torch.tensor([1.0, 1, 1, 0])
    assert abs((change != 0).all(-1).float().mean() - 0.8) < 0.04 and ((change != 0).sum(-1) % 4 == 0).all()
    for each, strength in zip(change.unbind(-1), (0.4, 0.3, 0.2, 0.1), strict=True):
        assert all(0.95 * strength < most <= strength + 1e-6 for most in (each.max(), -each.min()))

def test_a_view_is_a_function_of_seed_epoch_index_and_view_alone():
    views, keys = hx.Views(DRAW(6, 3), config("--seed 5")), [(2, i) for i in range(6)]
    want = [torch.stack([*map(torch.as_tensor, parts)]) for parts in zip(*(views[key] for key in keys))]
    for workers, size in ((0, 6), (2, 2)):
        loaded = zip(*hx.loader(views, [keys[i:i + size] for i in range(0, 6, size)], workers))
        assert all(map(torch.equal, map(torch.cat, loaded), want))
    first, reseeded = want[1][0], hx.Views(DRAW(6, 3), config("--seed 6"))
    others = [first[1], views[3, 0][1][0], views[2, 1][1][0], reseeded[2, 0][1][0]]
    assert all((first[0][1:5] != other[1:5]).all() for other in others)     # (all of them are jittered)

def test_a_picture_that_is_a_line_is_cropped_too():
    for shape in ((1, 3, 1, 20000), (1, 3, 20000, 1)):
        crops = hx.Views(hx.Pictures(torch.zeros(shape).byte(), None), config("--size 224"))[0, 0][0]
        assert crops.shape == (2, 3, 224, 224)

@pytest.mark.parametrize("size, side", [(32, 128), (224, 112)])
def test_the_centre_crop_is_224_of_256_and_small_pictures_whole(size, side):
    picture = torch.randint(256, (3, 128, 160)).byte()
    crop, parameters, *_ = hx.Views(hx.Pictures(picture[None], None), config(f"--size {size}"), views=0)[0, 0]
    assert torch.equal(crop[0], resized(tv.center_crop(picture, [side] * 2), size)) and parameters[0, 0] == 0

# --- The command against a plain loop -----------------------------------------------------------------------
def lars_by_hand(weights, velocity, lr, cfg):
    with torch.no_grad():
        for p, v in zip(weights, velocity, strict=True):
            if p.ndim > 1:                                                  # not biases and norms
                factor = cfg.eta * p.norm() / (p.grad.norm() + cfg.weight_decay * p.norm() + 1e-8)
                factor = min(factor / lr, 1) if cfg.clip else factor
                p.grad = factor * (p.grad + cfg.weight_decay * p)
            v.mul_(0.9).add_(p.grad)
            p.sub_(lr * v)
            p.grad = None

def loss_by_hand(cfg, method, target, views, labels, keys):
    x = by_hand(views, keys)
    z = method.projector(method.backbone(x))
    if cfg.method == "byol":
        with torch.no_grad():
            t1, t2 = target(x).chunk(2)
        p1, p2 = method.predictor(z).chunk(2)
        own = 4 - 2 * F.cosine_similarity(p1, t2).mean() - 2 * F.cosine_similarity(p2, t1).mean()
    else:
        own = naive("info_nce", *z.double().chunk(2), cfg.temperature)[0]
    if keys[0][0] < cfg.hex_warmup:
        return own, dict(threshold=None, local=None)
    of_batch = ("labels", labels[[i for _, i in keys]].tolist())
    H = of_batch if cfg.threshold == "oracle" else ("quantile", cfg.quantile)
    value, stats = naive("hex", *z.double().chunk(2), cfg.temperature, H, cfg.beta, cfg.tau_plus)
    return (1 - cfg.alpha) * own + cfg.alpha * value, stats

def plain_loop(cfg, train):
    """-> backbone, and for each step what the log should say."""
    method, views, log = hx.build_model(cfg).train().method, hx.Views(train, cfg), []
    online = nn.Sequential(method.backbone, method.projector)
    target = copy.deepcopy(online)
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
            loss, stats = loss_by_hand(cfg, method, target, views, train.coarse, keys)
            (loss / cfg.accumulate).backward()
            parts.append((loss.item(), stats["local"], stats["threshold"]))
        lars_by_hand(weights, velocity, lr, cfg)
        momentum = 1 - (1 - (cfg.ema or 0)) * (math.cos(math.pi * (step + 1) / total) + 1) / 2
        for old, new in zip(target.parameters(), online.parameters(), strict=True):
            old.data = momentum * old.data + (1 - momentum) * new.data
        loss, local, eps = (None if None in each else sum(each) / len(each) for each in zip(*parts))
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
    assert len(log) == 6
    for event, want in zip(journal(tmp_path / "o", "step"), log, strict=True):
        local = want.pop("local")                                           # a pair may lie at eps: rounding
        assert local is None or event["local"] == pytest.approx(local, abs=0.1)
        want = {key: value for key, value in want.items() if value == value and value is not None}
        assert {key: event[key] for key in want} == pytest.approx(want, rel=1e-5, abs=1e-6)

def test_the_seed_decides_the_weights():
    first, again, other = (next(hx.build_model(config(f"--seed {seed}")).parameters()) for seed in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, other)

# --- Recipes ------------------------------------------------------------------------------------------------
OTHER = dict(jitter=[0.4, 0.4, 0.2, 0.1], solarize=[0.0, 0.2])              # BYOL's views
SIAM, TWO_BLURS = dict(jitter=[0.4, 0.4, 0.4, 0.1]), OTHER | dict(blur=[1.0, 0.1])
PAPER = dict(accumulate=1, batch_size=256, eta=0.02, grayscale=0.2, drop=0.1, hex_warmup=10, lr_warmup=10,
             clip=True, jitter=[0.8, 0.8, 0.8, 0.2], solarize=[0.0, 0.0], blur=[0.0, 0.0], crop_min=0.08,
             size=32, weight_decay=1e-4, temperature=0.1, amp="fp16")
TOY = PAPER | dict(backbone="resnet10_narrow", clip=False, temperature=0.2, amp="off", lr_warmup=2,
                   drop_every=2)
BASE = dict(
    imagenet=PAPER | dict(backbone="resnet50", size=224, epochs=100, lr=0.3, weight_decay=1e-6, drop_every=20,
                          blur=[0.5, 0.5]),
    cifar=PAPER | dict(backbone="resnet18", epochs=400, lr=0.4, drop_every=100),
    shapes=TOY | dict(batch_size=128, epochs=12, lr=1.0, crop_min=0.5, grayscale=1.0, hex_warmup=1),
    small=TOY | dict(epochs=15, lr=0.2, crop_min=0.2, hex_warmup=2))
KEYS = "alpha", "hidden", "dim", "predictor", "ema", "queue"               # what a method has of its own
OWN = {name: dict(zip(KEYS, values)) for name, values in dict(
    simclr=(1, 2048, 128), nnclr=(1, 2048, 256, 4096, None, 98304), mocov3=(1, 4096, 256, 4096, 0.99),
    byol=(0.1, 4096, 256, 4096, 0.99), simsiam=(0.1, 2048, 2048, 512), barlow=(0.1, 8192, 8192),
    vicreg=(0.1, 8192, 8192)).items()}
WIDTHS = dict(shapes=dict(hidden=256, dim=64, predictor=256, queue=2048),
              small=dict(hidden=512, dim=128, predictor=512, queue=4096))
DIFFERENT = {"shapes byol": dict(lr=0.3, ema=0.97), "small byol": dict(lr=0.15, ema=0.97),
    "imagenet simclr": dict(accumulate=16), "imagenet simsiam": SIAM | dict(lr=0.05, weight_decay=1e-4),
    "imagenet nnclr": TWO_BLURS | dict(weight_decay=1e-5, warmup_threshold=0.9, drop_every=25),
    "imagenet mocov3": TWO_BLURS | dict(temperature=1.0, lr=0.6), "imagenet byol": TWO_BLURS | dict(lr=0.45),
    "imagenet barlow": TWO_BLURS, "imagenet vicreg": TWO_BLURS, "cifar simclr": dict(blur=[0.5, 0.5]),
    "cifar nnclr": OTHER | dict(temperature=0.2, weight_decay=1e-5, queue=65536, lr=1.0, drop=0.0,
                                warmup_threshold=0.9),
    "cifar mocov3": OTHER | dict(temperature=0.2, lr=0.3, weight_decay=1e-6), "cifar simsiam": SIAM,
    "cifar vicreg": OTHER | dict(hidden=2048, dim=2048),
    "cifar byol": OTHER | dict(lr=1.0, weight_decay=1e-5),
    "cifar barlow": OTHER | dict(lr=0.3, hidden=2048, dim=2048, hex_warmup=0)}

@pytest.mark.parametrize("recipe, method", [*product(BASE, OWN)])
def test_resolved_recipes(recipe, method):
    heads = {name: value for name, value in WIDTHS.get(recipe, {}).items() if name in OWN[method]}
    want = BASE[recipe] | OWN[method] | heads | DIFFERENT.get(f"{recipe} {method}", {})
    settings = hx.resolve(recipe, method, {})
    assert {name: settings[name] for name in want} == want

def test_the_data_choose_the_recipe():
    some = [config("--data " + argv) for argv in ("folder --root .", "cifar100", "cifar10 --recipe small")]
    assert [(cfg.recipe, cfg.lr) for cfg in some] == [("imagenet", 0.3), ("cifar", 0.4), ("small", 0.2)]

# --- The probe ----------------------------------------------------------------------------------------------
def probe(count, classes, shift=0, text="", noise=255):
    """The linear probe on raw pixels: a random picture for each class, and noise. shift: of val's labels."""
    cfg, targets = config(f"--epochs 0 --backbone pixels --size 8 {text}"), torch.arange(count) % classes
    g = torch.Generator().manual_seed(0)
    kinds, *noises = (torch.randint(0, 256, (each, 3, 8, 8), generator=g) for each in (10, count, count))
    train, val = (hx.Pictures((((255 - noise) * kinds[targets] + noise * each) // 255).byte(), labels)
                  for each, labels in zip(noises, (targets, (targets + shift) % classes), strict=True))
    return hx.linear_probe(hx.build_backbone("pixels", 8)[0], cfg, train, val)

def test_the_rate_is_chosen_on_the_holdout_not_on_val():
    """Every label of val is wrong: what is best on the holdout is worst there."""
    result = probe(240, 6, 1, text="--probe-epochs 1", noise=180)
    holdout = result["holdout"]
    assert min(holdout.values()) < 80 and holdout[str(result["rate"])] == max(holdout.values()) > 95
    assert result["top1"] < 5 and result["right"].count("1") < 12 and result["top5"] > 50

def test_no_head_has_seen_its_holdout():
    """Labels that mean nothing, which a head can learn by heart but not guess."""
    result = probe(150, 10, text="--probe-epochs 60")
    assert result["held_out"] == 10 and result["train"] == 140 == result["knn_bank"]
    assert max(result["holdout"].values()) < 70 and result["top1"] < 30

def test_the_heads_rates_and_decay(monkeypatch):
    step, got = torch.optim.SGD.step, []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: step(self, got.append(
        [(group["lr"], group["weight_decay"], group["momentum"]) for group in self.param_groups])))
    probe(100, 4, text="--probe-epochs 10")
    rates = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
    want = [[(rate * fall, 1e-5, 0.9) for rate in rates] for fall in [1] * 6 + [0.1] * 2 + [0.01] * 2]
    assert numpy.array(got) == pytest.approx(numpy.array(want))

def test_a_share_of_the_labels_is_balanced_and_is_all_that_trains():
    result = probe(400, 4, text="--probe-epochs 2 --label-fraction 0.2")
    assert result["train"] == result["knn_bank"] == 72 and result["held_out"] == 8
    uneven = torch.arange(3).repeat_interleave(torch.tensor([5, 50, 500]))
    counts = uneven[hx.labelled_pictures(config("--label-fraction 0.1"), uneven).unique()].bincount().tolist()
    assert counts[0] == 5 and sorted(counts) == [5, 25, 26]

def test_nearest_neighbors_are_what_loops_find():
    (bank, queries), (labels, truth), right = torch.randn(2, 60, 4), torch.randint(0, 5, (2, 60)), []
    for query, answer in zip(queries, truth.tolist(), strict=True):
        cosine, votes = F.cosine_similarity(query, bank).tolist(), [0.0] * 5
        for j in sorted(range(60), key=lambda j: -cosine[j])[:20]:
            votes[labels[j]] += math.exp(cosine[j] / 0.07)
        right.append(votes.index(max(votes)) == answer)
    assert hx.nearest_neighbors(bank, labels, queries, truth).tolist() == right and 0 < sum(right) < 60

def test_emergence_is_counted_by_hand():
    train, val, cfg = DRAW(60, 0), DRAW(24, 1), config("--hidden 16 --dim 8 --quantile 0.9")
    model, index = hx.build_model(cfg), hx.permutation(60, "fixed").tolist()
    views = by_hand(hx.Views(train, cfg, seed="fixed"), [(0, i) for i in index]).chunk(2)
    for _ in range(20):
        model(*views)                                                       # for BatchNorm's statistics
    got = hx.emergence(model, cfg, train, val)
    model.eval()
    with torch.no_grad():
        z = F.normalize(torch.cat(model(*views)).double())
        x = tv.normalize(train.pictures / 255, *map(list, hx.MEAN_STD["imagenet"]))
        p = torch.linalg.svdvals(model.method.backbone(x).double())
    s, i = z @ z.T, torch.arange(120) % 60
    negative, off = i[:, None] != i, torch.tensor(index)[i]
    eps = s[negative].view(120, 118).sort(1).values[:, round(0.9 * 117)].mean()
    near = negative & (s > eps)
    want = dict(threshold=eps, local=near.sum() / 120, std=z.std(0).mean() * math.sqrt(8))
    for labels, name in ((train.targets[off], ""), (train.coarse[off], "_coarse")):
        same = (labels[:, None] == labels).double()
        want |= {"purity" + name: same[near].mean(), "chance" + name: same[negative].mean()}
    want = {key: value.item() for key, value in want.items()}
    want["rankme"] = math.exp(-sum(q * math.log(q) for q in (p / p.sum()).tolist() if q > 0))
    assert {key: got[key] for key in want} == pytest.approx(want, rel=1e-3) and 0 <= got["knn"] <= 100

# --- Pictures -----------------------------------------------------------------------------------------------
FOLDER = [*SHORT, *"--size 16 --backbone resnet10_narrow --accumulate 1 --data folder --root".split()]

def noise(path, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((40, 30), 99).convert(mode).save(path)

flat = partial(hx.Folder, labelled=False)

def test_every_kind_of_picture_is_decoded_upright(tmp_path):
    gray = numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)[:8]
    ramp = Image.fromarray(gray)
    ramp.getexif()[0x0112] = 6                                              # stored lying on its side
    exif, upright, fine = ramp.getexif().tobytes(), numpy.rot90(gray, -1), dict(quality=100)
    for name, mode, want, more in [
            ("1.jpg", "RGB", gray, fine), ("2.jpg", "L", gray, fine), ("3.jpg", "CMYK", gray, fine),
            ("4.png", "P", gray, {}), ("5.png", "RGBA", gray, {}), ("6.tiff", "RGB", gray, {}),
            ("7.webp", "RGB", gray, dict(lossless=True)), ("8.jpg", "L", upright, fine | dict(exif=exif)),
            ("9.png", "L", upright, dict(exif=exif)), ("A.JPEG", "L", gray, dict(format="png"))]:
        ramp.convert(mode).save(tmp_path / name, **more)
        got = flat(tmp_path).read(-1)
        assert got.shape == (3, *want.shape) and got.dtype == torch.uint8, name
        assert abs(got.numpy().astype(int) - want).max() <= (4 if "jpg" in name else 0), name
    Image.fromarray(gray.astype(numpy.uint16) * 257 + 100).save(tmp_path / "B.png")     # 16 bits
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

def test_pictures_without_labels_are_trained_on_and_hidden_ones_are_not(tmp_path, capsys):
    hidden = [".a.png", ".b/c.png", "b/.ipynb_checkpoints/0.png"]
    for name in ["a.png", "b/c.jpg", "b/d/e.png"] + [f"b/{i}.png" for i in range(20)] + hidden:
        noise(tmp_path / "data" / name)
    assert len(flat(tmp_path / "data")) == 23 and hx.Folder(str(tmp_path / "data")).classes == ["b"]
    assert run(*FOLDER, tmp_path / "data", "--out", tmp_path / "o") == 0
    assert "without labels" in capsys.readouterr().err and not (tmp_path / "o" / "probe.json").exists()
    assert {"backbone.pt", "neighbours.png"} <= {*os.listdir(tmp_path / "o")}
    figures = journal(tmp_path / "o")[0]
    assert {"threshold", "local", "rankme"} <= figures.keys() and not {"purity", "knn"} & figures.keys()

def test_labelled_pictures_without_val_then_with_then_a_bad_one(tmp_path, capsys):
    root = tmp_path / "data"
    for i in range(24):
        noise(root / "train" / "ab"[i % 2] / f"{i}.jpg", ["RGB", "L", "CMYK"][i % 3])
    assert run(*FOLDER, root, "--out", tmp_path / "1") == 0
    assert "purity" in journal(tmp_path / "1")[0] and not (tmp_path / "1" / "probe.json").exists()
    shutil.copytree(root / "train", root / "val")
    imagenet = [*FOLDER, root, "--data", "imagenet", "--out", tmp_path / "2"]
    assert run(*imagenet) == 0                                              # probed on crops and flips
    result = json.load(open(tmp_path / "2" / "probe.json"))
    assert result["train"] == 22 and result["held_out"] == 2 and result["val"] == len(result["right"]) == 24
    (root / "train" / "a" / "0.jpg").write_text("no picture")
    shutil.rmtree(tmp_path / "2")
    assert "0.jpg: not readable" in refused(capsys, *imagenet)[1]
    assert run(*imagenet, "--skip-bad-files") == 0 and "skipped" in capsys.readouterr().err

def test_cifar_from_an_archive_in_its_own_format(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        test = dict(data=numpy.random.randint(0, 256, (20, 3072), numpy.uint8), labels=[*range(10)] * 2)
        (folder / name).write_bytes(pickle.dumps(test | dict(label_names=[*"abcdefghij"])))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    shutil.rmtree(folder)
    for name in ("cifar", "utils"):                                 # the checksums are of other pictures
        monkeypatch.setattr(f"torchvision.datasets.{name}.check_integrity", lambda at, *_: os.path.exists(at))
    argv = [*SHORT, "--data", "cifar10", "--recipe", "small", "--root", str(tmp_path)]
    assert run(*argv, "--out", tmp_path / "o") == 0
    train, val = hx.load_data(hx.parse(argv)[0])
    test = pickle.loads((folder / "test_batch").read_bytes())
    assert len(train) == 100 and (val.read(3).numpy() == test["data"][3].reshape(3, 32, 32)).all()
    assert val.targets.tolist() == test["labels"]

# --- A run's life -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 14 steps that nothing interrupted; tests copy it."""
    assert run(*SMALL, "--out", out := tmp_path_factory.mktemp("finished") / "run") == 0
    return out

@pytest.fixture
def done(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "done")

def at_step(monkeypatch, step, action):
    """When the rate of this step, from 0, is asked for, do this."""
    def patched(now, *rest, rate=hx.learning_rate):
        return (now == step and action(), rate(now, *rest))[1]
    monkeypatch.setattr(hx, "learning_rate", patched)

def test_what_a_run_leaves(finished):
    assert {*os.listdir(finished)} == {"backbone.pt", "checkpoint.pt", "config.json", "lock", "metrics.jsonl",
                                       "neighbours.png", "neighbours_early.png", "probe.json"}
    result, saved = (json.load(open(finished / f"{name}.json")) for name in ("probe", "config"))
    steps = journal(finished, "step")
    assert [each["step"] for each in steps] == [*range(1, 15)]
    assert [each["epoch"] for each in journal(finished, "epoch")] == [0, 1, 2]
    assert {"loss", "hex", "threshold", "local", "empty", "clamped", "lr"} <= steps[0].keys()
    for digits, share in (("right", "top1"), ("knn_right", "knn")):
        assert result[digits].count("1") / len(result[digits]) * 100 == pytest.approx(result[share])
    assert saved["config"]["batch_size"] == 16 and saved["versions"]["torch"] == torch.__version__

def test_a_purity_that_is_not_defined_is_null_and_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hx, "local_mask", lambda a, *_: (a.new_ones(()), a.new_zeros([2 * len(a)] * 2) > 0))
    assert run(*SHORT, "--out", tmp_path / "o") == 0 and ", purity" not in capsys.readouterr().out
    assert [each["purity"] for each in journal(tmp_path / "o", "epoch")] == [None, None]

def test_the_first_line_says_what_was_chosen_and_a_collapse_is_warned_of(tmp_path, monkeypatch, capsys):
    found = iter([0.02, 0.005, 0.03])                                       # falls, then rises
    monkeypatch.setattr(hx, "emergence", lambda *_: dict(std=next(found)))
    assert run(*SMALL, "--tau-plus", 0, "--out", tmp_path / "o") == 0
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and "std 0.005 of 1" in err
    chosen = json.load(open(tmp_path / "o" / "config.json"))["config"]      # and the first line says it all
    assert all(f" {key}={value}" in err for key, value in chosen.items() if value is not None)

def test_a_run_that_is_stopped_or_crashes_ends_as_one_that_was_not(finished, tmp_path, monkeypatch, capsys):
    command, out = [*SMALL, "--checkpoint-every", 4, "--out", tmp_path / "o"], tmp_path / "o"
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))     # in mid-epoch
        assert run(*command) == 75 and "run the same command again" in capsys.readouterr().err
    assert 5 <= len(losses(out)) <= 6
    with monkeypatch.context() as patch:
        at_step(patch, 10, lambda: 1 / 0)                                   # 8 are in the checkpoint
        assert run(*command) == 1 and "ZeroDivisionError" in capsys.readouterr().err
    assert torch.load(out / "checkpoint.pt")["step"] == 8 and len(losses(out)) == 10
    assert run(*command) == 0 and journal(out) == journal(finished)
    assert (out / "backbone.pt").read_bytes() == (finished / "backbone.pt").read_bytes()

def test_one_signal_that_comes_twice_is_one_and_a_later_one_ends_all(monkeypatch):
    ended, now = [], [0.0]
    monkeypatch.setattr(hx.os, "_exit", lambda status: ended.append(status))
    monkeypatch.setattr(hx, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    before = signal.signal(signal.SIGCHLD, lambda *_: None)                 # as the DataLoader's
    with hx.signals_counted() as came:
        os.kill(os.getpid(), signal.SIGCHLD)
        for now[0], count, exits in ((10, 1, []), (12, 2, []), (14, 3, [75])):
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 10
            while (len(came), ended) != (count, exits) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert (len(came), ended) == (count, exits)
    signal.signal(signal.SIGCHLD, before)

def test_a_finished_run_says_so_and_evaluation_options_evaluate_again(done, capsys, monkeypatch):
    before = (done / "metrics.jsonl").read_bytes()
    assert run(*SMALL, "--out", done) == 0 and "finished before, nothing was run" in capsys.readouterr().err
    monkeypatch.setattr(hx, "pretrain", lambda *_: 1 / 0)                   # it does not train again
    assert run(*SMALL, "--probe-epochs", 3, "--label-fraction", 0.5, "--out", done) == 0
    again = json.load(open(done / "probe.json"))
    assert again["epochs"] == 3 and again["train"] + again["held_out"] == 56
    assert (done / "metrics.jsonl").read_bytes() == before

def test_another_experiment_another_runs_checkpoint_or_a_lock_is_refused(done, capsys):
    line = refused(capsys, *SMALL, "--beta", 0.5, "--out", done)[1]
    assert "--beta 1.0 there, 0.5 here" in line and "--out" in line
    with open(done / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is at work" in refused(capsys, *SMALL, "--out", done)[1]
    torch.save(torch.load(done / "checkpoint.pt") | dict(identity="another's"), done / "checkpoint.pt")
    (done / "backbone.pt").unlink()
    status, line = refused(capsys, *SMALL, "--out", done)
    assert status == 1 and "of another experiment" in line

def test_moved_data_go_on_and_other_data_are_refused(tmp_path, capsys):
    for i in range(20):
        noise(tmp_path / "here" / f"{i}.png")
    command = ["--out", tmp_path / "o", *FOLDER]
    assert run(*command, tmp_path / "here") == 0
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert run(*command, tmp_path / "there") == 0 and "finished before" in capsys.readouterr().err
    noise(tmp_path / "there" / "one more.png")
    assert "of other data" in refused(capsys, *command, tmp_path / "there")[1]

def test_a_backbone_is_probed_as_in_its_run_and_a_broken_one_is_refused(done, tmp_path, capsys):
    options = [*"--probe-epochs 2 --workers 0 --device cpu --probe".split(), done / "backbone.pt",
               "--out", tmp_path / "p"]
    assert run(*options) == 0
    (tmp_path / "alone.pt").write_bytes((done / "backbone.pt").read_bytes())
    assert "--backbone, --size, --norm and --data" in refused(capsys, "--probe", tmp_path / "alone.pt")[1]
    first, again = (json.load(open(path / "probe.json")) for path in (done, tmp_path / "p"))
    assert first["right"] == again["right"] and first["identity"] == again["identity"]
    state = torch.load(done / "backbone.pt")
    torch.save(state | {"0.weight": state["0.weight"] * math.nan}, done / "backbone.pt")
    assert "not finite" in refused(capsys, *options)[1]                     # not the old result

@pytest.mark.parametrize("broken", [
    lambda loss, e: loss * math.nan, lambda loss, e: loss + (0 * e.sum()).sqrt()], ids=["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_and_leaves_the_checkpoint(broken, tmp_path, monkeypatch, capsys):
    loss, calls = hx.HEX.loss, iter(range(99))
    monkeypatch.setattr(hx.HEX, "loss", lambda self, *e, **k: (lambda value, stats: (
        broken(value, e[0]) if next(calls) == 3 else value, stats))(*loss(self, *e, **k)))
    status, line = refused(capsys, *SMALL, "--checkpoint-every", 2, "--out", tmp_path / "o")
    state = torch.load(tmp_path / "o" / "checkpoint.pt", weights_only=True)
    assert status == 1 and "step 4: " in line and "not finite" in line and state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())

@pytest.mark.parametrize("argv, option, remedy", [
    ("--bogus", "--bogus", ""), ("--method moco", "--method", "mocov3"), ("--out ", "--out", "leave it out"),
    ("--quantile 1", "--quantile", "(1e-06"), ("--loss infonce --beta 2", "--beta 2", "leave it out"),
    ("--loss base --alpha 0.5", "--alpha", "leave it out"), ("--queue 8", "--queue", "leave it out"),
    ("--data folder", "--root", "needs --root DIR"), ("--probe no.pt", "no.pt", "such file; give another"),
    ("--hex-warmup 3 --epochs 3", "hex", "--hex-warmup 2"), ("--backbone r19", "r19", "resnet18"),
    ("--batch-size 999", "than the 999", "--batch-size 112"), ("--backbone pixels", "pixels", "--epochs 0"),
    ("--data cifar10 --threshold oracle", "ora", "cifar100"), ("--label-fraction 0.01", "label", "0.1072")])
def test_a_bad_flag_is_one_line_with_its_remedy(argv, option, remedy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, line = refused(capsys, *argv.split(" "))
    assert status == 2 and option in line and remedy in line and os.listdir() == []

def test_a_rank_without_its_world_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    status, line = refused(capsys)
    assert status == 2 and "WORLD_SIZE" in line and "torchrun" in line

def test_files_that_are_no_pictures_or_no_classes_are_named(tmp_path, capsys):
    noise(tmp_path / "data" / "train" / "a" / "0.png")
    os.symlink(os.devnull, tmp_path / "data" / "train" / "a" / "1.png")     # as a pipe, but never waits
    folder = hx.Folder(str(tmp_path / "data" / "train"))
    with pytest.raises(hx.UserError, match="no regular file"):
        folder.read(1)
    for text in ("", "\n", "\r\n"):
        (tmp_path / "list").write_bytes(text.encode())
        status, line = refused(capsys, *FOLDER, tmp_path / "data", "--classes", tmp_path / "list")
        assert status == 2 and "--classes" in line and "leave it out" in line

@pytest.mark.parametrize("error, advice", [(MemoryError(), "mend that"), (PermissionError("no"), "mend that"),
                                           (ValueError("odd"), "delete it")])
def test_a_file_is_called_bad_only_where_it_is(tmp_path, error, advice):
    def reader(file):
        raise error
    (tmp_path / "f").write_text("")
    with pytest.raises(hx.UserError, match=advice):
        hx.read(tmp_path / "f", reader, "delete it")
