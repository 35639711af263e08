# SPDX-License-Identifier: MIT
"""What only a GPU can tell, in ten minutes of one. From the top folder:

    python .results/gpu_check.py [nccl same values overflow resume repeat syncs pieces two whole
                                  bench]
    DEV=cpu python .results/gpu_check.py           what of it a CPU can run, with small sizes

Each part prints its figures, with the card, the version of PyTorch and the date. Status 1: a part
has failed.
"""
import collections
import datetime
import io
import json
import linecache
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import redirect_stdout
from functools import partial
from statistics import mean, median
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, os.getcwd())
import hex as hx  # noqa: E402

DEV = os.environ.get("DEV", "cuda")
GPU = DEV == "cuda"
SHORT = "--batch-size 64 --workers 0 --epochs 1 --probe-epochs 1 --log-every 1".split()
hx.announce = lambda text: None                             # no lines and no bars of the runs
hx.tqdm = lambda *args, **more: tqdm(*args, **more | dict(disable=True))


def folder():
    return tempfile.mkdtemp(dir=TEMPORARY)


def train(argv, pictures=256, *, device=DEV, scale=256.0, out=None, ends=0):
    """A whole run, on so many pictures -> its folder. scale: fp16's first. ends: its status."""
    out, draw = out or os.path.join(folder(), "run"), hx.draw_shapes
    counts = {4096: pictures, 1024: 48}
    scaler = partial(torch.amp.GradScaler, init_scale=scale)
    with redirect_stdout(io.StringIO()), \
            mock.patch.object(hx, "draw_shapes", lambda count, seed: draw(counts[count], seed)), \
            mock.patch.object(torch.amp, "GradScaler", scaler):
        status = hx.main([*argv, "--device", device, "--out", out])
    assert status == ends, f"status {status} of {' '.join(argv)}"
    return out


def steps(out):
    with open(os.path.join(out, "metrics.jsonl")) as file:
        return [event for event in map(json.loads, file) if event["event"] == "step"]


def losses(out):
    return [step["loss"] for step in steps(out)]


def apart(one, two):
    """The largest difference of two lists of losses: absolute, or relative to a loss above 1."""
    return max(abs(a - b) / max(1, abs(b)) for a, b in zip(one, two, strict=True))


def milliseconds(run, repeats=10 if GPU else 3):
    spent = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        run()
        if GPU:
            torch.cuda.synchronize()
        spent.append(1e3 * (time.perf_counter() - start))
    return median(spent[3:])


def peak_memory():
    """-> a function that says how many bytes more than now have been taken at the most."""
    if not GPU:
        return lambda: 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return lambda: torch.cuda.max_memory_allocated() - before


def nccl():
    """What hex.py asks of NCCL, in a group of one rank (DEV=cpu: of gloo)."""
    store = f"file://{folder()}/store"
    device = torch.device("cuda", 0) if GPU else None
    dist.init_process_group("nccl" if GPU else "gloo", init_method=store, rank=0, world_size=1,
                            device_id=device)
    for kind in (torch.int64, torch.float16, torch.float32):
        x = torch.ones(4, 3, device=DEV).to(kind).requires_grad_(kind.is_floating_point)
        y = hx.gather(x)
        if kind.is_floating_point:
            (2 * y).sum().backward()
        assert y.equal(x) and (x.grad is None or (x.grad == 2).all())
        print(f"  gather of {kind}: equal{', and its gradient' * kind.is_floating_point}")
    with mock.patch.object(hx, "RANKS", 2):                 # or nothing would be sent
        x, y = torch.ones(4, 3, device=DEV), torch.ones(2, device=DEV)
        hx.add_over_ranks([x, y], 2)
        assert (x == 0.5).all() and (y == 0.5).all()
        hx.agree("the same", "data")
        assert hx.on_first_rank(lambda: "done") == "done"
    dist.destroy_process_group()
    print("  add_over_ranks, agree, on_first_rank: fine")


def same():
    """Losses and gradients, in float64 and float32, against the CPU's in float64; views against
    the CPU's."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 256, 64, dtype=torch.float64, generator=generator)
    z[1] = z[0] + 0.5 * z[1]                                # positives that are alike
    z[:, 128:] = z[:, :128] + 0.3 * z[:, 128:]              # and neighbors
    losses = dict(info_nce=hx.info_nce, dcl=hx.dcl, released=lambda a, b: hx.released(a, b)[0])
    options = dict(
        hex_nce={}, floor=dict(tau_plus=0.7, beta=0), decoupled=dict(decoupled=True),
        none=dict(threshold=1.1), cosine=dict(threshold=hx.CosineThreshold()))
    for name, more in options.items():
        losses[name] = lambda a, b, more=more: hx.hex_nce(a, b, **more)[0]
    assert 0 < hx.hex_nce(*z, **options["floor"])[1]["clamped"] < 1, "no anchor is at the floor"
    for name, loss in losses.items():
        found = []
        precisions = ("cpu", torch.float64), (DEV, torch.float64), (DEV, torch.float32)
        for device, dtype in precisions:
            x = z.clone().to(device, dtype).detach().requires_grad_()
            value = loss(*x)
            value.backward()
            found.append((value.detach().cpu().double(), x.grad.cpu().double()))
        truth, *others = found
        off = [((a - b).norm() / b.norm()).item() for other in others for a, b in zip(other, truth)]
        print(f"  {name:10}value, gradient apart: float64 {off[0]:.0e}, {off[1]:.0e}; "
              f"float32 {off[-2]:.0e}, {off[-1]:.0e}")
        assert max(off[:2]) < 1e-12 and max(off[-2:]) < 1e-3, "too far from the CPU's"

    here, there = (hx.parse(["--device", device, "--blur", "0.5", "0.5"])
                   for device in ("cpu", DEV))
    crops = torch.randint(0, 256, (64, 3, 224, 224), dtype=torch.uint8, generator=generator)
    batch = hx.Views(hx.draw_shapes(32, 0), here)[[(0, i) for i in range(32)]]
    flip, *color, _, _, _ = batch.changes.unbind(1)         # then gray, blur and solarize
    gray, sigma = torch.arange(64) % 2, 2 * torch.rand(64, generator=generator)
    changes = torch.stack([flip, *color, gray, sigma, flip], 1)
    batch = batch._replace(crops=crops, changes=changes)
    one, two = (hx.augment(batch, cfg).cpu() for cfg in (here, there))
    off = (one - two).abs()
    share = (off > 0.01).double().mean()                    # solarize has an edge
    print(f"  views, all changes: at most {off.max():.0e} apart, {share:.0e} of values over 0.01")
    assert share < 1e-4, "too far from the CPU's"


def values():
    """The first four losses of each method in each precision, against the CPU's without
    autocast."""
    for method in hx.METHODS:
        base = None
        cases = ("cpu", "off"), (DEV, "off"), (DEV, "bf16"), (DEV, "fp16")
        for device, amp in dict.fromkeys(cases):
            argv = [*SHORT, "--method", method, "--amp", amp, "--lr", "0.01"]
            four = losses(train(argv, device=device))
            base = base or four
            off = apart(four, base)
            shown = "".join(f"{x:10.4f}" for x in four)
            print(f"  {method:8}{device:5}{amp:5}{shown}  apart {off:.0e}")
            assert off < (0.02 if amp == "off" else 0.1), "too far from the CPU's"


def overflow():
    """A step whose fp16 gradient overflows is left out; at a lower scale it is taken."""
    made, called, build = [], [], hx.build_model

    def build_and_keep(cfg):
        made.append(model := build(cfg))
        model.start = {name: p.detach().clone() for name, p in model.named_parameters()}
        return model

    for scale, skipped in ((2.0 ** 60, True), (2.0 ** 8, False)):
        called.clear()
        with mock.patch.object(hx, "build_model", build_and_keep), \
                mock.patch.object(hx.BYOL, "after_step", lambda self, *more: called.append(more)):
            out = train([*SHORT, "--method", "byol", "--amp", "fp16"], 64, scale=scale)
        path = os.path.join(out, "checkpoint.pt")
        state = torch.load(path, map_location="cpu", weights_only=True)
        as_before = all(state["model"][name].equal(p) for name, p in made[-1].start.items())
        after, momenta = state["scaler"]["scale"], len(state["optimizer"]["state"])
        print(f"  scale {scale:.2g} -> {after:.2g}; calls of after_step: {len(called)}; "
              f"weights as before: {as_before}; tensors with momentum: {momenta}")
        assert (after < scale, not called, as_before, not momenta) == (skipped,) * 4


def resume():
    """Ended by SIGTERM in step 3 and begun again, in one process, against a run without an end."""
    for amp in ("off", "fp16"):
        argv, rate = [*SHORT, "--amp", amp, "--lr", "0.01"], hx.learning_rate
        straight, out = train(argv, 512), os.path.join(folder(), "run")

        def ended(step, *more, rate=rate):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return rate(step, *more)

        with mock.patch.object(hx, "learning_rate", ended):
            train(argv, 512, out=out, ends=75)
        before = len(steps(out))
        train(argv, 512, out=out)
        one, two = (torch.load(os.path.join(each, "backbone.pt")) for each in (straight, out))
        off = max(((one[name] - two[name]).abs().max().item() for name in one), default=0)
        print(f"  amp {amp}: {before} steps, then {len(steps(out))}; weights at most {off:.0e} "
              f"apart, last loss {apart(losses(out)[-1:], losses(straight)[-1:]):.0e}")
        assert before == 3 and len(steps(out)) == len(steps(straight)) and off < 1e-2, "not resumed"


def once(_, out, argv, pictures):
    """A run in a process of its own, whose libraries start as hex.py sets them."""
    torch.set_num_threads(1)
    train(argv, pictures, out=out)


def repeat():
    """The same 30 steps twice, with --deterministic and without: are the bytes of backbone.pt the
    same, and how long does a step take? The median of the last 20 steps of both runs."""
    size, more, precisions = 64, [], ("off",)
    if GPU:
        size, more, precisions = 256, "--recipe cifar --batch-size 256".split(), ("off", "fp16")
    kinds = "--deterministic", "--no-deterministic"
    for amp in precisions:
        contents, spent = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}
        for kind in 2 * kinds:                              # in turns
            out = os.path.join(folder(), "run")
            argv = [*SHORT, *more, "--amp", amp, kind]
            mp.spawn(once, (out, argv, 30 * size), nprocs=1)
            with open(os.path.join(out, "backbone.pt"), "rb") as file:
                contents[kind].append(file.read())
            made = steps(out)
            spent[kind] += [1e3 * size / step["images_per_second"] for step in made[10:]]
            assert len(made) == 30
        for kind in kinds:
            one, two = contents[kind]
            word = "the same bytes" if one == two else "other bytes"
            print(f"  {kind}, amp {amp}: 30 steps twice, {word} in backbone.pt; "
                  f"{median(spent[kind]):.2f} ms a step", flush=True)
        slow, fast = (median(spent[kind]) for kind in kinds)
        print(f"  amp {amp}: a step takes {slow / fast:.2f} times as long with --deterministic")
        one, two = contents[kinds[0]]
        assert one == two, "it does not repeat"


def syncs():
    """Where the host waits for the GPU in a step that logs nothing, by line: the mean of steps 5 to
    8."""
    if not GPU:
        return print("  needs CUDA")
    rate, seen = hx.learning_rate, collections.Counter()

    def watched(step, *more):                               # called as a step begins
        torch.cuda.set_sync_debug_mode("warn" if 4 <= step < 8 else "default")
        return rate(step, *more)

    def note(message, category, file, line, *_):
        if "synchronizing" in str(message):
            text = linecache.getline(file, line).strip()
            seen[f"{os.path.basename(file)}:{line}  {text}"] += 1

    for amp in ("bf16", "fp16"):
        seen.clear()
        with mock.patch.object(hx, "learning_rate", watched), warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            train([*SHORT, "--amp", amp, "--log-every", "1000"], 1024)
        print(f"  {amp}: {sum(seen.values()) / 4:g} a step")
        for line, count in seen.items():
            print(f"    {count / 4:g}  {line}")


def pieces():
    """Augmentation and losses alone: milliseconds, and the peak memory of a loss."""
    for count in (64, 512) if GPU else (16,):
        crops = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8, device=DEV)
        batch = hx.Batch(crops, torch.rand(count, 8, device=DEV), None)
        plain, blurred = (
            milliseconds(partial(hx.augment, batch, hx.parse(["--device", DEV, "--blur", *both])))
            for both in (("0", "0"), ("0.5", "0.5")))
        print(f"  augment {count} views: {plain:.2f} ms, with blur {blurred:.2f} ms", flush=True)
    for n in (512, 8192, 32768) if GPU else (512,):
        a, b = (torch.randn(n // 2, 128, device=DEV, requires_grad=True) for _ in "ab")
        losses = dict(info_nce=hx.info_nce, hex_nce=lambda a, b: hx.hex_nce(a, b)[0])
        for name, loss in losses.items():
            loss(a, b).backward()                           # CUDA takes its own work space once
            peak = peak_memory()
            ms = milliseconds(lambda loss=loss, a=a, b=b: loss(a, b).backward())
            memory = f", peak {peak() / 4 / n ** 2:.2f} n^2 floats" if GPU else ""
            print(f"  {name}, n = {n}: {ms:.2f} ms{memory}", flush=True)


def on_rank(rank, out, argv):
    """One of two ranks. NCCL wants a card for each; so it is gloo, which gathers on the CPU."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost",
                      MASTER_PORT="0")                      # not used: the ranks meet in a file
    hx.RANK, hx.RANKS = rank, 2
    torch.set_num_threads(1)
    gather, join = hx.gather, dist.init_process_group
    group = dict(init_method=f"file://{out}.store", rank=rank, world_size=2)
    hx.gather = lambda x: gather(x.cpu()).to(x.device)
    dist.init_process_group = lambda *_, **more: join("gloo", **group)
    train(argv, 512, out=out)


def two():
    """Two ranks on one card against one: losses that they share (by SyncBatchNorm), and whole."""
    shared = "--lr 0.01" if GPU else "--lr 0.01 --norm group"
    cases = {"shared": shared, "whole": "--lr 0.01 --accumulate 2",
             "whole, byol": "--lr 0.01 --accumulate 2 --method byol"}
    for amp in ("off", "fp16") if GPU else ("off",):
        for name, more in cases.items():
            argv, out = [*SHORT, *more.split(), "--amp", amp], os.path.join(folder(), "run")
            mp.spawn(on_rank, (out, argv), nprocs=2)
            both, one = losses(out), losses(train(argv, 512))
            print(f"  {name}, amp {amp}: {len(one)} steps; one rank {one[0]:.6f} ... "
                  f"{one[-1]:.6f}, two {both[0]:.6f} ... {both[-1]:.6f}, "
                  f"apart {apart(both, one):.0e}", flush=True)
            most = 0.1 if amp == "fp16" else 0.02 if GPU else 1e-4
            assert apart(both, one) < most, "too far apart"


def whole():
    """The command as a user gives it, twice: the second finds that all is done."""
    more = "--amp fp16 --epochs 3" if GPU else "--epochs 1"
    argv = ["hex.py", "--device", DEV, *more.split()]
    for again in (False, True):
        start = time.time()
        done = subprocess.run([sys.executable, *argv, "--out", os.path.join(TEMPORARY, "whole")],
                              capture_output=True, text=True)
        took = f"{time.time() - start:.0f} s"
        print(f"  {' '.join(argv)}: status {done.returncode}, {took}", flush=True)
        is_as_it_should = done.returncode == 0 and ("finished before" in done.stderr) == again
        assert is_as_it_should, done.stderr[-2000:]
    print("   ", done.stdout.strip().replace("\n", "\n    "))


def draw_jpegs(names, distinct):
    """`distinct` random pictures, 500 x 375, rough at all scales, under so many names -> their
    folder."""
    where, rng = folder(), np.random.default_rng(0)
    for i in range(distinct):
        layers = [rng.integers(0, 256, (3 * k, 4 * k, 3), "uint8")
                  for k in (2, 4, 8, 16, 32, 64, 125)]
        layers = [Image.fromarray(layer).resize((500, 375)) for layer in layers]
        x = np.average(layers, axis=0, weights=[64, 32, 16, 8, 4, 2, 1])
        Image.fromarray(x.astype("uint8")).save(f"{where}/{i}.jpg", quality=90)
    for i in range(distinct, names):
        os.link(f"{where}/{i % distinct}.jpg", f"{where}/{i}.jpg")
    return where


def bench():
    """Images a second of the ImageNet recipe (ResNet-50, two views of 224 pixels), one loss a step,
    over the last third of the steps. JPEGs are drawn and in the page cache, and no figures of
    epochs are made. What the loader read ahead, two batches a process, may hide that it is a little
    slower. Memory is that of tensors."""
    small, failed = ("" if GPU else "--recipe shapes --workers 1"), []
    cases = [(8, 60, ""), (8, 60, "--workers 0"), (8, 60, "--amp bf16")]
    if GPU:
        cases = [(256, 100, ""), (256, 60, "--amp bf16"), (256, 60, "--compile"), (32, 90, ""),
                 (32, 30, "--workers 0")]
    for batch, count, case in cases:
        root = draw_jpegs(count * batch, min(batch, 128))
        argv = f"--data folder --root {root} --batch-size {batch} --epochs 1 --accumulate 1"
        argv = f"{argv} --lr 0.01 --log-every 1 {small} {case}".split()
        start, peak = time.time(), peak_memory()
        try:
            with mock.patch.object(hx, "emergence", lambda *_: dict(std=1.0)):
                made = steps(train(argv, scale=2.0 ** 16))
        except AssertionError as error:                     # as out of memory: the others may fit
            failed.append(str(error))
            continue
        last = made[-len(made) // 3:]
        speed = len(last) * batch / sum(batch / each["images_per_second"] for each in last)
        wait = mean(each["data_wait"] for each in last)
        least = min((1 - each["data_wait"]) * batch / each["images_per_second"] for each in made)
        memory = f", peak {peak() / 2 ** 30:.1f} GiB" if GPU else ""
        print(f"  {batch} images {case}: {speed:.0f} a second, {wait:.0%} of the time waiting for "
              f"data; a step without it {1e3 * least:.0f} ms{memory} ({len(made)} steps, "
              f"{time.time() - start:.0f} s in all)", flush=True)
    assert not failed, failed


PARTS = dict(nccl=nccl, same=same, values=values, overflow=overflow, resume=resume, repeat=repeat,
             syncs=syncs, pieces=pieces, two=two, whole=whole, bench=bench)

if __name__ == "__main__":
    if GPU and not torch.cuda.is_available():
        sys.exit("no GPU is visible; DEV=cpu runs what a CPU can")
    card, failed = torch.cuda.get_device_name() if GPU else "CPU", []
    with tempfile.TemporaryDirectory() as TEMPORARY:
        for part in sys.argv[1:] or PARTS:
            start = time.time()
            print(f"{part}: {card}, torch {torch.__version__}, {datetime.date.today()}", flush=True)
            try:
                PARTS[part]()
            except Exception:
                traceback.print_exc()
                failed.append(part)
            word = "FAILED" if part in failed else "done"
            print(f"{part}: {word}, {time.time() - start:.0f} s", flush=True)
    sys.exit(bool(failed))
