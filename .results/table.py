# SPDX-License-Identifier: MIT
"""python .results/table.py FILE.jsonl: the README's tables from the raw lines; paired differences against infonce."""
import json
import sys
from statistics import mean, stdev

groups = {}
for line in map(json.loads, open(sys.argv[1])):
    words, label = line["command"][1:], []
    for flag, value in zip(words, words[1:] + [""]):
        if flag.startswith("--") and flag not in ("--seed", "--out", "--workers", "--log-every", "--method", "--loss", "--data"):
            label.append(f"{flag} {value}" if not value.startswith("--") else flag)
    groups.setdefault((line["data"], line["method"], line["loss"], " ".join(label)), {})[line["seed"]] = line


def spread(values):
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


print("| data | method | loss | further flags | n | top-1 | k-NN | top-1 - infonce | RankMe | eps | mean H | purity | chance |")
print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
for (data, method, loss, label), runs in sorted(groups.items()):
    last = [run["epochs"][-1] for run in runs.values() if run["epochs"]]
    base = groups.get((data, method, "infonce", label), {})
    both = [runs[seed]["probe"]["top1"] - base[seed]["probe"]["top1"] for seed in runs if seed in base and loss != "infonce"]
    row = [data, method, loss, label, str(len(runs)), spread([run["probe"]["top1"] for run in runs.values()]),
           spread([run["probe"]["knn"] for run in runs.values()]),
           f"{mean(both):+.1f} ± {stdev(both):.1f}" if len(both) > 1 else ""]
    for key, digits in (("rankme", 1), ("threshold", 3), ("local", 1), ("purity", 2), ("chance", 2)):
        row.append(f"{mean(e[key] for e in last):.{digits}f}" if last else "")
    print("|", " | ".join(row), "|")
