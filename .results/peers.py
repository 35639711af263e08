# SPDX-License-Identifier: MIT
"""Ratios against what users would pick instead, each pair interleaved in one run. From the top folder:

    OMP_NUM_THREADS=1 python .results/peers.py loss --solo DIR --lightly DIR --authors DIR
    OMP_NUM_THREADS=1 python .results/peers.py memory
    OMP_NUM_THREADS=1 python .results/peers.py lars
    OMP_NUM_THREADS=1 python .results/peers.py data --root DIR

loss: clones of github.com/vturrisi/solo-learn, lightly-ai/lightly and olivesgatech/HEX; lightly needs its own
requirements. data: any folder of class folders of JPEGs.
"""
import argparse
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


def peer(clone):
    """The losses of a clone of solo-learn, on their own, for one process on a CPU."""
    path = os.path.join(clone, "solo/losses/simclr.py")
    with open(path) as file:
        text = file.read()
    text = text.replace("from solo.utils.misc import gather, get_rank\n", "").replace("'cuda:0'", "z.device")
    made = types.ModuleType("peer")
    made.gather, made.get_rank = lambda x: x, lambda: 0
    exec(compile(text, path, "exec"), made.__dict__)
    return made


def pairs(n, width=128):
    """Two views' embeddings, n in all, that are alike."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n // 2, width, generator=generator)
    return [(base + 0.7 * torch.randn(n // 2, width, generator=generator)).requires_grad_() for _ in "ab"]


def loss(args):
    sys.path.insert(0, args.lightly)
    from lightly.loss.ntx_ent_loss import NTXentLoss
    solo, authors = peer(args.solo).simclr_loss_func, peer(args.authors).simclr_loss_func_hex_adaptive

    def compare(n, repeats):
        (a, b), index = pairs(n), torch.arange(n // 2).repeat(2)
        return race(repeats, hex_nce=lambda: hx.hex_nce(a, b)[0].backward(),
                    info_nce=lambda: hx.info_nce(a, b).backward(),
                    solo_learn=lambda: solo(torch.cat([a, b]), index, 0.1).backward(),
                    lightly=lambda: NTXentLoss(0.1)(a, b).backward(),
                    authors=lambda: authors(torch.cat([a, b]), index, 0.1, 1, 0.1).backward())

    for n, repeats in ((512, 15), (4096, 5), (8192, 3)):
        ms = compare(n, repeats)
        fastest = min(ms["solo_learn"], ms["lightly"])
        print(f"n {n}, ms:", {name: round(each, 1) for name, each in ms.items()},
              f"hex_nce / lightly {ms['hex_nce'] / ms['lightly']:.2f},",
              f"/ faster peer {ms['hex_nce'] / fastest:.2f}, / authors {ms['hex_nce'] / ms['authors']:.2f};",
              f"info_nce / faster peer {ms['info_nce'] / fastest:.2f}", flush=True)


def memory(args):
    for n in (512, 4096):
        a, b = pairs(n)
        for name, run in (("hex_nce", lambda a, b: hx.hex_nce(a, b)[0]), ("info_nce", hx.info_nce)):
            with torch.profiler.profile(profile_memory=True) as profile:
                run(a, b).backward()
            live = peak = 0
            for event in profile.profiler.kineto_results.events():  # allocations and releases, in time
                if event.name() == "[memory]":
                    live += event.nbytes()
                    peak = max(peak, live)
            print(f"n {n} {name}: peak {peak / 4 / n ** 2:.2f} n^2 floats", flush=True)


def lars(args):
    for name in ("resnet18", "resnet50"):
        params = [torch.nn.Parameter(p.detach()) for p in torchvision.models.get_model(name).parameters()]
        for p in params:
            p.grad = torch.randn_like(p)
        sgd = torch.optim.SGD(params, 1e-4, momentum=0.9, weight_decay=1e-4, foreach=True)
        ms = race(25, sgd=sgd.step, lars=hx.LARS(params, 1e-4, weight_decay=1e-4).step)
        print(f"{name}, ms:", {each: round(value, 2) for each, value in ms.items()},
              f"lars / sgd {ms['lars'] / ms['sgd']:.2f}", flush=True)


def data(args):
    """Decoding alone; two views of the ImageNet recipe for SimCLR, ours (bicubic crops; the rest waits for
    the device, here this CPU, where blur has 13 taps), and by Pillow as the peers do it."""
    cfg, _ = hx.parse(["--data", "folder", "--root", args.root, "--device", "cpu"])
    files = hx.Folder(args.root)
    views, mean_std = hx.Views(files, cfg), hx.MEAN_STD["imagenet"]
    pil = transforms.Compose([
        transforms.RandomResizedCrop(224, (0.08, 1), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomApply([lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))], 0.5),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(*mean_std)])

    def in_pil(i):
        picture = Image.open(os.path.join(files.root, files.files[i])).convert("RGB")
        return pil(picture), pil(picture)

    def all_files(read):                                        # one by one, as a loader process does it
        return lambda: [read(i) for i in range(len(files))]

    ms = race(5, decode=all_files(files.read), ours=all_files(lambda i: views[0, i]), pil=all_files(in_pil))
    crops, parameters, *_ = zip(*(views[0, i] for i in range(min(32, len(files)))), strict=True)
    crops, parameters = torch.stack(crops).flatten(0, 1), torch.stack(parameters).flatten(0, 1)
    device = race(5, plain=lambda: hx.augment(crops, parameters, mean_std),
                  blurred=lambda: hx.augment(crops, parameters, mean_std, blur=True))
    device = {name: round(spent / (len(crops) / 2), 2) for name, spent in device.items()}
    each = {name: round(spent / len(files), 2) for name, spent in ms.items()}
    print(f"{len(files)} files, ms an image:", each,
          f"ours / decode {ms['ours'] / ms['decode']:.2f}, pil / ours {ms['pil'] / ms['ours']:.2f};",
          f"augment of two views on this CPU: {device}")


PARTS = dict(loss=loss, memory=memory, lars=lars, data=data)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=PARTS)
    for name in ("solo", "lightly", "authors", "root"):
        parser.add_argument(f"--{name}", metavar="DIR")
    args = parser.parse_args()
    PARTS[args.what](args)
