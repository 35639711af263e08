# SPDX-License-Identifier: MIT
"""Times against what users would pick instead, in turns within one run. From the top folder:

    python .results/peers.py loss --solo DIR --lightly DIR --authors DIR
    python .results/peers.py memory
    python .results/peers.py lars
    python .results/peers.py data --root DIR

loss: clones of github.com/vturrisi/solo-learn, lightly-ai/lightly and olivesgatech/HEX. lightly
needs its own requirements; for its loss torch and torchvision do. data: any folder of class folders
of JPEG files, named by a digest in the line. Each run appends lines to performance.jsonl, with the
milliseconds of every turn. report.py makes the table.
"""
import argparse
import hashlib
import os
import random
import sys
import time
import types
from statistics import median

import torch
import torchvision
from PIL import Image, ImageFilter
from study import PERFORMANCE, append, code_now, cpu, hex_module
from torchvision import transforms

hx = hex_module()
torch.set_num_threads(1)


def keep(part, of, **figures):
    """A line of performance.jsonl, and on the screen."""
    append(PERFORMANCE, [dict(part=part, of=of, **figures, code=code_now(), cpu=cpu(),
                              threads=torch.get_num_threads(), torch=torch.__version__)])
    short = {name: round(median(each), 2)
             for values in figures.values() for name, each in values.items()}
    print(f"{part}, {of}:", short, flush=True)


def race(part, of, repeats, **runners):
    """Keeps the milliseconds of each in every turn but the first. In a turn, one runs after the
    other."""
    spent = {name: [] for name in runners}
    for turn in range(repeats + 1):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner()
            if turn:
                spent[name].append(round(1e3 * (time.perf_counter() - start), 3))
    keep(part, of, ms=spent)


def peer(clone):
    """The losses of a clone of solo-learn, on their own, for one process on a CPU."""
    path = os.path.join(clone, "solo/losses/simclr.py")
    with open(path) as file:
        text = file.read()
    text = text.replace("from solo.utils.misc import gather, get_rank\n", "")
    text = text.replace("'cuda:0'", "z.device")
    made = types.ModuleType("peer")
    made.gather, made.get_rank = lambda x: x, lambda: 0
    exec(compile(text, path, "exec"), made.__dict__)
    return made


def pairs(n, width=128):
    """Two views' embeddings, n in all, that are alike."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n // 2, width, generator=generator)
    views = [base + 0.7 * torch.randn(n // 2, width, generator=generator) for _ in "ab"]
    return [each.requires_grad_() for each in views]


def loss(args):
    sys.path.insert(0, args.lightly)
    from lightly.loss.ntx_ent_loss import NTXentLoss
    solo = peer(args.solo).simclr_loss_func
    authors = peer(args.authors).simclr_loss_func_hex_adaptive

    def compare(n, repeats):
        (a, b), index = pairs(n), torch.arange(n // 2).repeat(2)
        race("loss", f"n = {n}", repeats, hex_nce=lambda: hx.hex_nce(a, b)[0].backward(),
             info_nce=lambda: hx.info_nce(a, b).backward(),
             solo_learn=lambda: solo(torch.cat([a, b]), index, 0.1).backward(),
             lightly=lambda: NTXentLoss(0.1)(a, b).backward(),
             authors=lambda: authors(torch.cat([a, b]), index, 0.1, 1, 0.1).backward())

    compare(512, 25)
    compare(4096, 9)


def memory(args):
    for n in (512, 4096):
        (a, b), peaks = pairs(n), {}
        losses = dict(hex_nce=lambda a, b: hx.hex_nce(a, b)[0], info_nce=hx.info_nce)
        for name, run in losses.items():
            with torch.profiler.profile(profile_memory=True) as profile:
                run(a, b).backward()
            live = peak = 0
            # Allocations and releases, in time.
            for event in profile.profiler.kineto_results.events():
                if event.name() == "[memory]":
                    live += event.nbytes()
                    peak = max(peak, live)
            peaks[name] = [round(peak / 4 / n ** 2, 3)]
        keep("memory", f"n = {n}", floats=peaks)                    # in n^2 float32


def lars(args):
    for name in ("resnet18", "resnet50"):
        model = torchvision.models.get_model(name)
        params = [torch.nn.Parameter(p.detach()) for p in model.parameters()]
        for p in params:
            p.grad = torch.randn_like(p)
        sgd = torch.optim.SGD(params, 1e-4, momentum=0.9, weight_decay=1e-4, foreach=True)
        lars = hx.LARS(params, 1e-4, weight_decay=1e-4)
        race("lars", name, 25, sgd=sgd.step, lars=lars.step)


def data(args):
    """Decoding alone; two views of the ImageNet recipe for SimCLR, ours (bicubic crops: the rest
    waits for the device), and by Pillow as the peers do it."""
    cfg = hx.parse(["--data", "folder", "--root", args.root, "--device", "cpu"])
    files = hx.Folder(args.root)
    views, mean_std = hx.Views(files, cfg), hx.MEAN_STD["imagenet"]
    bicubic = transforms.InterpolationMode.BICUBIC

    def blur(picture):
        return picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))

    pil = transforms.Compose([
        transforms.RandomResizedCrop(224, (0.08, 1), interpolation=bicubic),
        transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomApply([blur], 0.5),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(*mean_std)])
    paths = [os.path.join(files.root, os.fsdecode(name)) for name in files.files]

    def in_pil(i):
        picture = Image.open(paths[i]).convert("RGB")
        return pil(picture), pil(picture)

    def all_files(read):                                        # one by one, as a loader does it
        return lambda: [read(i) for i in range(len(files))]

    named = hashlib.sha256()                                    # as the former hex.py named bytes
    for path in paths:
        with open(path, "rb") as file:
            content = file.read()
        named.update(len(content).to_bytes(8, "big") + content)
    of = f"{len(files)} JPEG files ({named.hexdigest()[:16]})"
    race("data", of, 5, decode=all_files(files.read), ours=all_files(lambda i: views[[(0, i)]]),
         pil=all_files(in_pil))


PARTS = dict(loss=loss, memory=memory, lars=lars, data=data)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=PARTS)
    for name in ("solo", "lightly", "authors", "root"):
        parser.add_argument(f"--{name}", metavar="DIR")
    args = parser.parse_args()
    PARTS[args.what](args)
