# SPDX-License-Identifier: MIT
"""Other pictures of the same data set, for the study's repetition. From the top folder:

    python .results/pictures.py --all DIR --used DIR --out DIR

--all holds the whole data set, {train,test}/<class>/*, --used the first study's, {train,val}/<class>/*. Takes
for --out/train and --out/val as many a class from train and test as --used has, or all that are left, but
none of its pictures: none whose mean squared difference from a used one of the class (8-bit RGB) is 20 or
less, which compression alone may make. In the order of the SHA-256 of their pixels; files are copied as they
are.
"""
import argparse
import hashlib
import os
import shutil

import numpy as np
from PIL import Image

ALIKE = 20                                                  # mean squared difference


def read(folder):
    """Files of the folder, and their pixels: (files, pixels of a picture), 8 bits."""
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    return paths, np.stack([np.asarray(Image.open(path).convert("RGB")).ravel() for path in paths])


def unlike(pixels, used):
    """(files,) whether none of the used pictures is like this one."""
    a, b = pixels.astype(np.float32), used.astype(np.float32)
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return squared.min(1) / a.shape[1] > ALIKE


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("--all", "--used", "--out"):
        parser.add_argument(name, required=True, metavar="DIR")
    args = parser.parse_args()
    count = dict(train=0, val=0)
    for name in sorted(os.listdir(os.path.join(args.used, "train"))):
        used = {split: read(os.path.join(args.used, split, name))[1] for split in ("train", "val")}
        for split, source in (("train", "train"), ("val", "test")):
            paths, pixels = read(os.path.join(args.all, source, name))
            free = unlike(pixels, np.concatenate([*used.values()]))
            free = sorted((hashlib.sha256(each.tobytes()).hexdigest(), path)
                          for path, each, other in zip(paths, pixels, free) if other)
            target = os.path.join(args.out, split, name)
            os.makedirs(target)
            for _, path in free[:len(used[split])]:
                shutil.copy(path, target)
                count[split] += 1
    print(count)


if __name__ == "__main__":
    main()
