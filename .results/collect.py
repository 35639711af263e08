# SPDX-License-Identifier: MIT
"""python .results/collect.py RUN... > FILE.jsonl: a line of JSON a finished run: command, probe, figures of each epoch."""
import json
import os
import sys

for folder in sys.argv[1:]:
    config, probe = (json.load(open(os.path.join(folder, name))) for name in ("config.json", "probe.json"))
    events = [json.loads(line) for line in open(os.path.join(folder, "metrics.jsonl"))] \
        if os.path.exists(os.path.join(folder, "metrics.jsonl")) else []
    command = config["command"]
    while "--root" in command:                                                  # a path of one machine means nothing elsewhere
        del command[command.index("--root"):command.index("--root") + 2]
    c = config["config"]
    epochs = [{k: round(v, 4) if isinstance(v, float) else v for k, v in e.items() if k != "event"}
              for e in events if e["event"] == "epoch"]
    for each in epochs:                                                         # and the loss's own figures in that epoch
        steps = [e for e in events if e["event"] == "step" and e["epoch"] == each["epoch"] - 1]
        for key in ("loss", "clamped", "empty"):
            values = [e[key] for e in steps if e.get(key) is not None]
            if values:
                each["step_" + key] = round(sum(values) / len(values), 4)
    print(json.dumps(dict(command=command, data=c["data"], method=c["method"], loss=c["loss"], seed=c["seed"],
                          versions=config["versions"],
                          probe={k: probe[k] for k in ("top1", "top5", "knn", "rate", "val")}, epochs=epochs)))
