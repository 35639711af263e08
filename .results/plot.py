# SPDX-License-Identifier: MIT
"""python .results/plot.py FILE.jsonl DATA: the README's two plots, as text that GitHub draws, of SimCLR at the recipe."""
import json
import sys
from statistics import mean

runs = [run for run in map(json.loads, open(sys.argv[1])) if run["data"] == sys.argv[2] and run["method"] == "simclr"]
plain = [run for run in runs if not set(run["command"]) & {"--beta", "--tau-plus", "--quantile", "--temperature", "--batch-size",
                                                            "--threshold", "--norm", "--epochs"}]


def curve(loss, key):
    chosen = [run["epochs"] for run in plain if run["loss"] == loss]
    return [round(mean(epochs[i][key] for epochs in chosen), 3) for i in range(min(map(len, chosen)))]


print("```mermaid\nxychart-beta\n    title \"threshold (upper two) and purity of H (lower two): hex, then infonce\"")
print(f"    x-axis \"epoch\" 0 --> {len(curve('hex', 'purity')) - 1}\n    y-axis \"\" 0 --> 1")
for key in ("threshold", "purity"):
    for loss in ("hex", "infonce"):
        print(f"    line {curve(loss, key)}")
losses = [loss for loss in ("infonce", "dcl", "hex", "released") if any(run["loss"] == loss for run in plain)]
top = [round(mean(run["probe"]["top1"] for run in plain if run["loss"] == loss), 1) for loss in losses]
print("```\n\n```mermaid\nxychart-beta\n    title \"top-1 of the probe, %, mean over seeds\"")
print(f"    x-axis {json.dumps(losses)}\n    y-axis \"\" 0 --> 100\n    bar {top}\n```")
