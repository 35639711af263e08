# SPDX-License-Identifier: MIT
"""hex.py on a CPU, with the augmented batches of pre-training kept in a folder for other losses.

A batch depends on pictures, seed, epoch and augmentation alone, so the weights are the same, to the
last bit. The disk holds 25 kB for each image and epoch, at 32 pixels.

    python .results/kept_views.py FOLDER [options of hex.py] --device cpu

FOLDER: of one set of pictures, since of class folders only the names are compared. There must be no
--skip-bad-files, and no --compile.
"""
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import hex as hx  # noqa: E402

OF_VIEWS = ("seed", "size", "data", "crop_min", "grayscale", "jitter", "blur", "solarize")
load, augment = hx.loader, hx.augment


def kept(views, lists, folder):
    """What hx.loader gives, but the crops are augmented views, and there are no changes. They are
    of the folder, or made and put there."""
    cfg = views.cfg
    with open(hx.__file__, "rb") as file:
        code = hx.digest(file.read())
    about = [code, views.pictures.digest(), torch.__version__, torch.get_num_threads(),
             *(getattr(cfg, name) for name in OF_VIEWS)]
    for keys in lists:
        path = os.path.join(folder, hx.digest(repr((about, keys)).encode()) + ".npy")
        pictures = torch.tensor([index for _, index in keys])
        if not os.path.exists(path):
            batch = views[keys]
            if cfg.device != "cpu" or not batch.pictures.equal(pictures):
                raise hx.UserError("kept_views.py: needs --device cpu, and files that can be read")
            mine = f"{path}.{os.getpid()}"
            with open(mine, "wb") as file:                  # as it lies in memory: channels last
                np.save(file, augment(batch, cfg).permute(0, 2, 3, 1).numpy())
                file.flush()
                os.fsync(file.fileno())
            os.replace(mine, path)
        x = torch.from_numpy(np.load(path)).permute(0, 3, 1, 2)
        yield hx.Batch(x, None, pictures)


def loader(views, lists):
    if views.views == 2:                                    # of pre-training
        return kept(views, lists, FOLDER)
    return load(views, lists)


def ready(batch, cfg, color=True):
    return batch.crops if batch.changes is None else augment(batch, cfg, color)


if __name__ == "__main__":
    FOLDER = sys.argv[1]
    os.makedirs(FOLDER, exist_ok=True)
    hx.loader, hx.augment = loader, ready
    sys.exit(hx.main(sys.argv[2:]))
