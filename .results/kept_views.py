# SPDX-License-Identifier: MIT
"""hex.py on a CPU with the augmented batches of pre-training kept in a folder, for other losses on the same
pictures: a batch is a function of pictures, seed, epoch and augmentation alone. The weights are the same, to
the last bit; the disk holds 25 kB an image and epoch, at 32 pixels.

    python .results/kept_views.py FOLDER [options of hex.py] --device cpu

FOLDER: of one set of pictures, since of class folders only the names are compared. No --skip-bad-files.
"""
import hashlib
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import hex as hx  # noqa: E402

OF_VIEWS = ("seed", "size", "data", "crop_min", "grayscale", "jitter", "blur", "solarize")
load, prepare = hx.loader, hx.prepare


def kept(views, batches, folder):
    """What hx.loader gives, but the views are ready: of the folder, or made and put there."""
    cfg = views.cfg
    about = [hx.fingerprint(open(hx.__file__, "rb").read(), views.pictures.identity()), torch.__version__,
             torch.get_num_threads(), *(getattr(cfg, name) for name in OF_VIEWS)]
    for keys in batches:
        path = os.path.join(folder, hashlib.sha256(repr((about, keys)).encode()).hexdigest() + ".npy")
        index = torch.tensor([i for _, i in keys])
        if not os.path.exists(path):
            crops, parameters, _, used = next(iter(load(views, [keys], 0)))
            if cfg.device != "cpu" or not used.equal(index):
                raise hx.UserError("kept_views.py: needs --device cpu and files that can be read")
            mine = f"{path}.{os.getpid()}"
            with open(mine, "wb") as file:                              # as it lies in memory: channels last
                np.save(file, prepare(crops, parameters, cfg).permute(0, 2, 3, 1).numpy())
                file.flush()
                os.fsync(file.fileno())
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
    sys.exit(hx.main(sys.argv[2:]))
