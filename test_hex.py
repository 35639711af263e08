# SPDX-License-Identifier: MIT
"""Tests of hex.py. First the loss: the equations again as loops, closed forms, the authors' numbers, two ranks."""
import math
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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
    assert {k: got[2][k] for k in both} == pytest.approx({k: want[2][k] for k in both}, abs=tol)


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
    """H never holds self or positive, and holds about 1 % of the negatives at any batch size."""
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
