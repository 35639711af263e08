# SPDX-License-Identifier: MIT
"""hex.py on a CPU with the augmented batches of pre-training kept in a folder, for other losses on the same
pictures: a batch is a function of pictures, seed, epoch and augmentation alone. The figures are the same, to
the last bit; a run on 32 pixels takes some 40 % less time, and 25 kB an image and epoch on the disk.

    python .results/kept_views.py FOLDER [options of hex.py]          FOLDER: of one set of pictures
"""
import hashlib
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import hex as hx  # noqa: E402

OF_VIEWS = ("seed", "size", "data", "crop_min", "grayscale", "jitter", "blur", "solarize", "skip_bad_files")
load, prepare = hx.loader, hx.prepare


def kept(views, batches, folder):
    """What hx.loader gives, but the views are ready: of the folder, or made and put there."""
    cfg = views.cfg
    about = [getattr(cfg, name) for name in OF_VIEWS]
    for keys in batches:
        path = os.path.join(folder, hashlib.sha256(repr((about, keys)).encode()).hexdigest() + ".npy")
        index = torch.tensor([i for _, i in keys])
        if not os.path.exists(path):
            crops, parameters, _, used = next(iter(load(views, [keys], 0)))
            assert used.equal(index), "a file that cannot be read"
            mine = f"{path}.{os.getpid()}"
            with open(mine, "wb") as file:                              # as it lies in memory: channels last
                np.save(file, prepare(crops, parameters, cfg).permute(0, 2, 3, 1).numpy())
            os.replace(mine, path)
        yield torch.from_numpy(np.load(path)).permute(0, 3, 1, 2), None, index, index


def loader(views, batches, workers):
    if views.views == 2 and views.seed == views.cfg.seed:               # of pre-training
        return kept(views, batches, FOLDER)
    return load(views, batches, workers)


def ready(crops, parameters, cfg, color=True):
    return crops if parameters is None else prepare(crops, parameters, cfg, color)


if __name__ == "__main__":
    FOLDER = sys.argv[1]
    os.makedirs(FOLDER, exist_ok=True)
    hx.loader, hx.prepare = loader, ready
    sys.exit(hx.main([*sys.argv[2:], "--device", "cpu"]))
