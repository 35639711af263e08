# SPDX-License-Identifier: MIT
"""python .results/share.py RUN: how much HEX changes InfoNCE, for a finished run of SimCLR; from the top folder.

On one batch of 256 train pictures: the share of the denominators that falls to H(i), under InfoNCE and under HEX, and the
cosine and the ratio of norms between the two gradients in the embeddings. A line for each setting of HEX.
"""
import json
import os
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, os.getcwd())
import hex as hx  # noqa: E402

cfg = hx.Config(**json.load(open(os.path.join(sys.argv[1], "config.json")))["config"])
train, _ = hx.load_data(cfg)
trainer = hx.Trainer(cfg, train)
trainer.load(os.path.join(sys.argv[1], "checkpoint.pt"))
batch = [[(0, i) for i in hx.permutation(len(train), "share")[:256].tolist()]]
crops, parameters, *_ = next(iter(hx.loader(hx.train_views(train, cfg), batch, cfg)))
with torch.no_grad():
    z1, z2 = trainer.embed(crops, parameters)


def gradient(loss):
    a, b = (z.clone().requires_grad_() for z in (z1, z2))
    return torch.cat(torch.autograd.grad(loss(a, b), (a, b))).flatten()


tau = cfg.temperature
print("| tau | beta | tau_plus | q | mean H | local share, InfoNCE | local share, HEX | cosine of gradients | ratio of norms |")
print("|---|---|---|---|---|---|---|---|---|")
for tau, beta, tau_plus, q in ((tau, 1, 0.1, 0.99), (tau, 1, 0, 0.99), (tau, 4, 0.1, 0.99), (tau, 1, 0.1, 0.9), (tau / 2, 1, 0.1, 0.99)):
    threshold = hx.AdaptiveThreshold(q)
    cosine, self_, positive, s_p, _ = hx.similarities(z1, z2)
    local, e = hx.local_mask(z1, z2, threshold)[1], (cosine / tau).exp().masked_fill(self_, 0)
    size, mass, rest = local.sum(1), (e * local).sum(1), (e * ~local).sum(1)
    weight = (beta * cosine / tau).exp() * local
    weight = weight * (size / weight.sum(1).clamp_min(1e-9))[:, None]
    weighted = ((weight * e).sum(1) - tau_plus * size * (s_p / tau).exp()) / (1 - tau_plus)
    weighted = torch.maximum(weighted, size * torch.tensor(-1 / tau).exp())
    plain = gradient(lambda a, b: hx.info_nce(a, b, tau))
    ours = gradient(lambda a, b: hx.hex_nce(a, b, tau, threshold=threshold, beta=beta, tau_plus=tau_plus)[0])
    print(f"| {tau} | {beta} | {tau_plus} | {q} | {size.float().mean():.1f} | {(mass / (mass + rest)).mean():.3f} | "
          f"{(weighted / (weighted + rest)).mean():.3f} | {F.cosine_similarity(plain, ours, 0):.4f} | "
          f"{ours.norm() / plain.norm():.3f} |")
