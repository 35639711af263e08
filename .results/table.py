# SPDX-License-Identifier: MIT
"""python .results/table.py FILE.jsonl: the README's tables of one data set, from the raw lines.

First all methods at their recipe; then SimCLR alone, by loss and further flags, with the figures of the last epoch.
Mean ± standard deviation over seeds; differences are paired by seed.
"""
import json
import re
import sys
from statistics import mean, stdev

groups, aside = {}, ("--seed", "--out", "--workers", "--log-every", "--method", "--loss", "--data", "--size")
for line in map(json.loads, open(sys.argv[1])):
    words, label = line["command"][1:], []
    for flag, value in zip(words, words[1:] + [""]):
        if flag.startswith("--") and flag not in aside:
            label.append(f"{flag} {value}" if not value.startswith("--") else flag)
    label = "`" + " ".join(label) + "`" if label else ""
    groups.setdefault((line["method"], line["loss"], label), {})[line["seed"]] = line


def spread(values, sign=""):
    values = list(values)
    return f"{mean(values):{sign}.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:{sign}.1f}" if values else ""


def probe(group, key):
    return spread(run["probe"][key] for run in groups.get(group, {}).values())


def against_infonce(method, loss, label):
    shared = re.sub(r"`?--(beta|tau-plus|quantile|threshold) \S+`?", "", label)     # InfoNCE has not these flags
    runs, base = groups.get((method, loss, label), {}), groups.get((method, "infonce", shared), {})
    return spread((runs[s]["probe"]["top1"] - base[s]["probe"]["top1"] for s in runs if s in base), "+")


print("| | `base` top-1 | `infonce` top-1 | `hex` top-1 | `hex` - `infonce` | `base` k-NN | `infonce` k-NN | `hex` k-NN |")
print("|---|---|---|---|---|---|---|---|")
for method, loss, label in sorted(groups):
    if "--epochs 0" in label:
        print(f"| {label} | {probe((method, loss, label), 'top1')} | | | | {probe((method, loss, label), 'knn')} | | |")
for method in dict.fromkeys(method for method, loss, label in sorted(groups) if (method, "infonce", "") in groups):
    top1, knn = ([probe((method, loss, ""), key) for loss in ("base", "infonce", "hex")] for key in ("top1", "knn"))
    if method == "simclr":                                                      # its own loss is InfoNCE
        top1[0] = knn[0] = "same as `infonce`"
    print(f"| `{method}` |", " | ".join([*top1, against_infonce(method, "hex", ""), *knn]), "|")
print("\n| SimCLR | further flags | n | top-1 | top-1 - `infonce` | k-NN | RankMe | eps | mean H | purity | chance | clamped |")
print("|---|---|---|---|---|---|---|---|---|---|---|---|")
for (method, loss, label), runs in sorted(groups.items(), key=lambda each: (each[0][2], each[0][1])):
    if method == "simclr" and "--epochs 0" not in label and loss != "base":
        last = [run["epochs"][-1] for run in runs.values()]
        row = [f"`{loss}`", label, str(len(runs)), probe((method, loss, label), "top1"),
               against_infonce(method, loss, label) if loss != "infonce" else "", probe((method, loss, label), "knn")]
        for key, digits in (("rankme", 1), ("threshold", 3), ("local", 1), ("purity", 2), ("chance", 2), ("step_clamped", 2)):
            values = [e[key] for e in last if e.get(key) is not None]
            row.append(f"{mean(values):.{digits}f}" if values else "")
        print("|", " | ".join(row), "|")
