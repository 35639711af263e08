# SPDX-License-Identifier: MIT
"""Ratios against what users would pick instead, each pair interleaved in one run: README, Performance. From the top folder:

OMP_NUM_THREADS=1 python .results/peers.py loss --solo DIR --lightly DIR --authors DIR     clones of the three repositories
OMP_NUM_THREADS=1 python .results/peers.py memory
OMP_NUM_THREADS=1 python .results/peers.py lars
OMP_NUM_THREADS=1 python .results/peers.py data --root DIR                                 any folder of class folders of JPEGs
"""
import argparse
import glob
import os
import random
import sys
import time
import types
from statistics import median

import torch
import torchvision
from PIL import Image, ImageFilter
from torchvision import transforms

sys.path.insert(0, os.getcwd())
import hex as hx  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("what", choices=("loss", "memory", "lars", "data"))
for name in ("solo", "lightly", "authors", "root"):
    parser.add_argument(f"--{name}", metavar="DIR")
args = parser.parse_args()


def race(repeats, **runners):
    """Median milliseconds of each, interleaved; the first turn is left out."""
    spent = {name: [] for name in runners}
    for turn in range(repeats + 1):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner()
            if turn:
                spent[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(each) for name, each in spent.items()}


def module(path):
    """A file of a peer, on its own, for one process on a CPU."""
    text = open(path).read().replace("from solo.utils.misc import gather, get_rank", "gather = lambda x: x\nget_rank = lambda: 0")
    made = types.ModuleType("peer")
    exec(compile(text.replace("'cuda:0'", "z.device"), path, "exec"), made.__dict__)
    return made


def pairs(n, width=128):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n // 2, width, generator=generator)
    return [(base + 0.7 * torch.randn(n // 2, width, generator=generator)).requires_grad_() for _ in range(2)]


if args.what == "loss":
    sys.path.insert(0, args.lightly)
    from lightly.loss.ntx_ent_loss import NTXentLoss
    solo = module(os.path.join(args.solo, "solo/losses/simclr.py")).simclr_loss_func
    authors = module(os.path.join(args.authors, "solo/losses/simclr.py")).simclr_loss_func_hex_adaptive
    for n, repeats in ((512, 15), (4096, 5), (8192, 3)):
        a, b = pairs(n)
        index = torch.arange(n // 2).repeat(2)
        ms = race(repeats, hex=lambda: hx.hex_nce(a, b)[0].backward(), info_nce=lambda: hx.info_nce(a, b).backward(),
                  solo_learn=lambda: solo(torch.cat([a, b]), index, 0.1).backward(),
                  lightly=lambda: NTXentLoss(0.1)(a, b).backward(),
                  authors=lambda: authors(torch.cat([a, b]), index, 0.1, 1, 0.1).backward())
        fastest = min(ms["solo_learn"], ms["lightly"])
        print(n, {name: round(each, 1) for name, each in ms.items()}, f"hex / fastest peer {ms['hex'] / fastest:.2f}, hex / authors "
              f"{ms['hex'] / ms['authors']:.2f}, info_nce / fastest peer {ms['info_nce'] / fastest:.2f}", flush=True)
if args.what == "memory":
    for n in (512, 4096):
        a, b = pairs(n)
        for name, loss in (("hex", lambda: hx.hex_nce(a, b)[0]), ("infonce", lambda: hx.info_nce(a, b))):
            with torch.profiler.profile(profile_memory=True) as profile:
                loss().backward()
            live = peak = 0
            for event in profile.profiler.kineto_results.events():              # allocations and releases, in time
                if event.name() == "[memory]":
                    live += event.nbytes()
                    peak = max(peak, live)
            print(n, name, f"peak {peak / 4 / n ** 2:.2f} n^2 floats", flush=True)
if args.what == "lars":
    for name in ("resnet18", "resnet50"):
        params = [torch.nn.Parameter(p.detach().clone()) for p in torchvision.models.get_model(name).parameters()]
        for p in params:
            p.grad = torch.randn_like(p)
        sgd = torch.optim.SGD(params, 1e-4, momentum=0.9, weight_decay=1e-4, foreach=True)
        ms = race(25, sgd=sgd.step, lars=hx.LARS(params, 1e-4, weight_decay=1e-4).step)
        print(name, {each: round(value, 2) for each, value in ms.items()}, f"lars / sgd {ms['lars'] / ms['sgd']:.2f}")
if args.what == "data":
    files = hx.Folder(args.root)
    views = hx.Views(files, 224, blur=0.5)
    jitter = transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8)
    blur = transforms.RandomApply([lambda picture: picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))], 0.5)
    pil = transforms.Compose([transforms.RandomResizedCrop(224, (0.08, 1), interpolation=Image.BICUBIC), jitter,
                              transforms.RandomGrayscale(0.2), blur, transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                              transforms.Normalize(hx.MEAN, hx.STD)])

    def in_pil(i):
        picture = Image.open(files.path(i)).convert("RGB")
        return pil(picture), pil(picture)

    def one_pass(read):                                                         # over all files, as a loader process does it
        return lambda: [read(i) for i in range(len(files))]

    ms = race(5, decode=one_pass(files.read), ours=one_pass(lambda i: views[0, i]), pil=one_pass(in_pil))
    ms = {name: each / len(files) for name, each in ms.items()}
    crops, parameters, *_ = zip(*(views[0, i] for i in range(32)), strict=True)
    moved = race(5, augment=lambda: [hx.augment(torch.stack(crops)[:, v], torch.stack(parameters)[:, v], blur=True) for v in (0, 1)])
    print(len(glob.glob(os.path.join(args.root, "*/*"))), "files, ms an image:", {name: round(each, 2) for name, each in ms.items()},
          f"ours / decode {ms['ours'] / ms['decode']:.2f}, pil / ours {ms['pil'] / ms['ours']:.2f}; moved to the device "
          f"{moved['augment'] / 32:.2f} ms on this CPU")
