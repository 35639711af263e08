# SPDX-License-Identifier: MIT
"""The whole study: every run of the table below, then the mechanism. From the top folder:

    python .results/study.py --cifar10 DIR --cifar100 DIR --cifar10-other DIR --cifar100-other DIR
                             [--only PART ...] [--list] [--jobs N] [--views DIR]

DIR holds train/<class>/* and val/<class>/*, made by pictures.py. Two runs are made side by side,
with one thread each. Those of the part `gpu` need a GPU, and more of them fit (--jobs 10). Stop it
at any time: the same command goes on. Each finished run is a line of runs.jsonl, and is not made
again. The mechanism is in mechanism.jsonl. report.py makes tables and plots from the two. --views
keeps augmented batches in a folder, for all losses of a seed (kept_views.py): the same figures in
less time, for 7 GB a seed on CIFAR.

A line names the hex.py that made it, by a digest (`code`). All runs of the study were made by the
former hex.py, and count for any later one. `--only again` makes four of them again by the hex.py
that is there now. report.py shows both beside each other, and counts the four in no other table.
"""
import argparse
import ctypes
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from unittest import mock

from plot import read_events

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
RUNS, MECHANISM, PERFORMANCE = (os.path.join(HERE, f"{name}.jsonl")
                                for name in ("runs", "mechanism", "performance"))

# --- The runs -------------------------------------------------------------------------------------
# An arm is a loss with its flags. In a part seeds are outermost: wherever the study stops, what is
# there is paired. A run that two rows ask for is made once: the first parts are the pair that
# matters most.

SIX = ("infonce", "dcl", "hex", "hex --decoupled", "hex --tau-plus 0", "released")
THREE = ("base", "infonce", "hex")
PAIR = ("infonce", "hex")
# Is H(i) spared where the debiasing term exceeds the local one? Without that term, and with
# tau_plus at about H's same-class share at the end: 0.7 on shapes, 0.2 on CIFAR-10. On CIFAR-100
# that share is near the default.
SPARED_70 = ("infonce", "hex --tau-plus 0", "hex --tau-plus 0.7", "released")
SPARED_20 = ("infonce", "hex --tau-plus 0.2")
SPARED = ("infonce", "hex --tau-plus 0", "released")
RANDOM, PIXELS = ("random",), ("pixels",)
STRONG = ("infonce", "hex --quantile 0.9 --beta 4")
# STRONG hurts on shapes: by which of its two settings, and does debiasing undo it? H's same-class
# share there is 0.33.
KNOBS = (*STRONG, "hex --quantile 0.9", "hex --beta 4",
         *(f"{STRONG[1]} --tau-plus {tau_plus}" for tau_plus in (0, 0.3)))
GPU = "--recipe cifar --epochs 25 --probe-epochs 40 --device cuda"     # resnet18, fp16

Row = namedtuple("Row", "part data flags arms seeds")
STUDY = [Row(*row) for row in (
    # part        data               flags of all arms                   arms          seeds
    ("pair",      "shapes",          "",                                 PAIR,         10),
    ("pair-many", "cifar100",        "--temperature 0.1",                PAIR,         5),
    ("pair-many", "cifar10",         "--temperature 0.1",                PAIR,         5),
    ("other",     "cifar100-other",  "--temperature 0.1",                PAIR,         3),
    ("other",     "cifar10-other",   "--temperature 0.1",                PAIR,         3),
    ("strong",    "cifar100",        "--temperature 0.1",                STRONG,       3),
    ("strong",    "cifar10",         "--temperature 0.1",                STRONG,       3),
    ("strong",    "shapes",          "",                                 STRONG,       10),
    ("spared",    "cifar100",        "--temperature 0.1",                SPARED,       3),
    ("spared",    "cifar10",         "--temperature 0.1",                SPARED,       3),
    ("spared",    "shapes",          "",                                 SPARED_70,    10),
    ("knobs",     "shapes",          "",                                 KNOBS,        10),
    ("floor",     "shapes",          "",                                 RANDOM,       3),
    ("floor",     "cifar10",         "",                                 RANDOM,       3),
    ("floor",     "cifar100",        "",                                 RANDOM,       3),
    ("steps",     "shapes",          "--probe-epochs 1000",              RANDOM,       3),
    ("steps",     "cifar10",         "--probe-epochs 1000",              RANDOM,       3),
    ("steps",     "cifar100",        "--probe-epochs 1000",              RANDOM,       3),
    ("pixels",    "shapes",          "",                                 PIXELS,       1),
    ("pixels",    "cifar10",         "",                                 PIXELS,       1),
    ("pixels",    "cifar100",        "",                                 PIXELS,       1),
    ("shapes",    "shapes",          "",                                 SIX,          10),
    ("cifar10",   "cifar10",         "--temperature 0.1",                SIX,          5),
    ("cifar10",   "cifar10",         "--temperature 0.1",                SPARED_20,    3),
    ("cifar100",  "cifar100",        "--temperature 0.1",                SIX,          5),
    ("pair-warm", "cifar10",         "--temperature 0.2",                PAIR,         3),
    ("pair-warm", "cifar100",        "--temperature 0.2",                PAIR,         3),
    ("warm",      "cifar10",         "--temperature 0.2",                SIX,          3),
    ("warm",      "cifar100",        "--temperature 0.2",                SIX,          3),
    ("methods",   "shapes",          "--method vicreg",                  THREE,        3),
    ("methods",   "shapes",          "--method barlow",                  THREE,        3),
    ("methods",   "shapes",          "--method nnclr",                   THREE,        3),
    ("methods",   "shapes",          "--method mocov3",                  THREE,        3),
    ("methods",   "shapes",          "--method byol",                    THREE,        3),
    ("methods",   "shapes",          "--method simsiam",                 THREE,        3),
    ("long",      "cifar100",        "--temperature 0.1 --epochs 60",    PAIR,         3),
    ("sharp",     "cifar100",        "--temperature 0.05",               PAIR,         3),
    ("gpu",       "cifar100",        GPU,                                PAIR,         5),
)]
MAIN = ("pair", "pair-many")                # the main question is asked of these: hex less infonce
PARTS = [*dict.fromkeys(row.part for row in STUDY), "mechanism"]

Run = namedtuple("Run", "part data flags arm seed")

# Made again by the hex.py that is there now, if they are asked for.
AGAIN = [Run("again", *each) for each in (
    ("shapes", "", "infonce", 0),
    ("shapes", "", "hex", 0),
    ("cifar10", "--temperature 0.1", "hex", 0),
    ("cifar100", "--temperature 0.1", "infonce", 0),
)]

# The hex.py of the runs, by the `code` in their lines, and its commit. The former hex.py wrote the
# SHA-256 of its length, in eight bytes, and of its bytes. Later ones write that of the bytes alone:
# report.py finds their commits in git's history.
FORMER = "ed0f34e02401a56b8ecca1ccee0e39c7087ef24df9ff65b7171b798103e763b4"
COMMITS = {
    FORMER: "f319ae1",                      # the file is the same from commit 6da068d to 3e9d890
    "11aa95e285e9a6a71750d91927ba9edc9a95f58a24e9a2edf28974aac863fae7": "9f30e00"}

# The mechanism: HEX against InfoNCE in all these settings, on models that were trained so (both of
# PAIR, seed 0).
TRAINED = (("shapes", ""), ("cifar10", "--temperature 0.1"), ("cifar100", "--temperature 0.1"))
SETTINGS = dict(temperature=(0.05, 0.1, 0.2), quantile=(0.9, 0.99), beta=(0, 1, 4),
                tau_plus=(0, 0.01, 0.1))
DIMENSIONS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

# Of the folders' files: other pictures would be another study. `contents` is of what is in the
# files alone; `places` is of their paths, too, so of split, class and name. In a shell, in DIR:
#   find train val -type f -print0 | xargs -0 sha256sum | cut -d' ' -f1 | sort | sha256sum
#   find train val -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
Digests = namedtuple("Digests", "contents places")
DIGESTS = {name: Digests(*each) for name, each in {
    "cifar10": (
        "73e09c0ca812e1e11c88120b912821751144c84fc3eff5b022df1342f9b97e88",
        "239b1d5b82c53dc45bbed46e5b98cb6336810c8dc3ac7b80443a44db8725fbb5"),
    "cifar100": (
        "3cad1578c4c0697b51a4353728f788bb1c61838221c65a4640880828f861cd26",
        "82c7b07871aaed301e8acdc751254190a58f5542e6af7d8aa10268e98a2836f0"),
    "cifar10-other": (
        "dc05ed8ab5e4564a6642d7bb3c85b36c8d5a5a26bc51a2990841383f93981739",
        "00c93b8489fa40dc5eb8102354b40c7d7fae78a7b7ad00a0063f971d33d9508a"),
    "cifar100-other": (
        "a709406f8237cffb84a85b7c2c2340934f278d0a3c7a93357eacad0544dc8cf3",
        "33642261e422046fbe71e54bf76c557384de9fa51893298bd3162192e0c889f7"),
}.items()}


def listed(rows):
    """The runs of these rows, each once: part by part, in a part seed by seed."""
    runs = {}
    for _, part in itertools.groupby(rows, key=lambda row: row.part):
        part = list(part)
        for seed in range(max(row.seeds for row in part)):
            for row in part:
                for arm in row.arms if seed < row.seeds else ():
                    run = Run(row.part, row.data, row.flags, arm, seed)
                    runs.setdefault(run[1:], run)
    return list(runs.values())


def digests(root):
    """Of all files below train/ and val/, as DIGESTS says."""
    found = {}
    for split in ("train", "val"):
        for where, _, names in os.walk(os.path.join(root, split)):
            for path in (os.path.join(where, name) for name in names):
                with open(path, "rb") as file:
                    found[os.path.relpath(path, root)] = hashlib.sha256(file.read()).hexdigest()
    contents = "".join(f"{each}\n" for each in sorted(found.values()))
    places = "".join(f"{found[name]}  {name}\n" for name in sorted(found))
    return Digests(*(hashlib.sha256(text.encode()).hexdigest() for text in (contents, places)))


def needed_by_mechanism():
    runs = listed(row for row in STUDY if (row.data, row.flags) in TRAINED)
    return [run for run in runs if run.arm in PAIR and run.seed == 0]


def arguments(run, roots):
    """What hex.py is told, without --out."""
    data = ["--data", "shapes"]
    if run.data != "shapes":
        small = [] if run.flags == GPU else ["--recipe", "small"]
        data = ["--data", "folder", *small, "--root", roots[run.data]]
    alone = {"random": "--epochs 0", "pixels": "--epochs 0 --backbone pixels"}
    arm = alone.get(run.arm, "--loss " + run.arm)
    device = ["--workers", "0", "--device", "cpu"]
    if run.flags == GPU:
        device = ["--workers", "2"]
    return [*data, *run.flags.split(), *arm.split(), "--seed", str(run.seed), *device]


def folder(run, workdir):
    part = "again" if run in AGAIN else ""
    name = " ".join([part, run.data, run.flags, run.arm]).replace("--", "").split()
    return os.path.join(workdir, "-".join([*name, f"s{run.seed}"]))


# --- Lines ----------------------------------------------------------------------------------------


def append(path, lines):
    """Adds lines to a .jsonl, to the disk at once; what a kill left of a last line is cut off."""
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def key(line):
    return line["data"], line["flags"], line["arm"], line["seed"]


def recipe_of(line):
    return "shapes" if line["data"] == "shapes" else "cifar" if line["flags"] == GPU else "small"


def kind_of(line):
    return line["code"], recipe_of(line), line["arm"]


def same_numbers(lines, code):
    """{(code, recipe, arm)} that count with this code: both made such a run, with equal figures."""
    figures = {}
    for line in lines:
        group = figures.setdefault(kind_of(line), {})
        made = line["config"], line["probe"], line["epochs"]
        if group.setdefault(key(line), made) != made:
            name = " ".join(map(str, key(line)))
            raise SystemExit(f"runs.jsonl: two lines of {name} by one code differ; take one out")
    same = set()
    for (other, *kind), theirs in figures.items():
        mine = figures.get((code, *kind), {})
        both = mine.keys() & theirs.keys()
        if both and all(mine[each] == theirs[each] for each in both):
            same.add((other, *kind))
    return same


def of_study(lines, code):
    """The lines that count, each run once, and those that do not. Those of the part again are in
    neither. The former hex.py's count, older ones with its figures, and of the runs that these do
    not have, those by this code."""
    lines = [line for line in lines if line["part"] != "again"]
    same = same_numbers(lines, FORMER)

    def rank(line):
        if line["code"] == FORMER:
            return 3
        return 2 if kind_of(line) in same else int(line["code"] == code)

    runs = {}
    for line in sorted(lines, key=rank):                    # the last one of a run stays
        if rank(line):
            runs[key(line)] = line
    return [*runs.values()], [line for line in lines if not rank(line)]


def cpu():
    if os.path.exists("/proc/cpuinfo"):
        for line in open("/proc/cpuinfo"):
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return "unknown"


def machine(config, threads):
    device, about = config.get("device"), dict(cpu=cpu(), threads=threads)
    if device == "cuda":
        import torch
        about["card"] = torch.cuda.get_device_name()
    return dict(device=device, **about)


def rounded(values):
    return {name: round(value, 4) if isinstance(value, float) else value
            for name, value in values.items()}


def packed(right, percent, pictures):
    """Which val pictures were right: a digit each, or bits in hexadecimal -> these bits, checked.
    """
    if len(right) != pictures:
        right = "".join(f"{byte:08b}" for byte in bytes.fromhex(right))[:pictures]
    if right.count("1") != round(percent * pictures / 100):
        raise SystemExit(f"study.py: {right.count('1')} of {pictures} right, but {percent} %")
    size = (pictures + 7) // 8
    return int(right.ljust(8 * size, "0"), 2).to_bytes(size, "big").hex()


def read_json(out, name):
    with open(os.path.join(out, name)) as file:
        return json.load(file)


def collect(run, out, seconds, views=False):
    """A finished run as one line: its settings from config.json, but for what is of this machine
    alone."""
    about, probe = read_json(out, "config.json"), read_json(out, "probe.json")
    local = {"root", "out", "probe", "device", "workers"}
    config = {name: value for name, value in about["config"].items()
              if name not in local and not (isinstance(value, str) and os.sep in value)}
    metrics = os.path.join(out, "metrics.jsonl")
    events, epochs = read_events(metrics), []
    for each in events:
        if each["event"] != "epoch":
            continue
        figures = {name: value for name, value in each.items() if name != "event"}
        steps = [step for step in events
                 if step["event"] == "step" and step["epoch"] == each["epoch"] - 1]
        for name in ("loss", "clamped", "empty"):           # the loss's own figures in that epoch
            values = [step[name] for step in steps if step.get(name) is not None]
            if values:
                figures["step_" + name] = sum(values) / len(values)
        epochs.append(rounded(figures))
    for name, percent in (("right", "top1"), ("knn_right", "knn")):
        probe[name] = packed(probe[name], probe[percent], probe["val"])
    probe["epochs"] = probe["asked"]["probe_epochs"]
    kept = ("top1", "top5", "knn", "rate", "holdout", "epochs", "train", "val", "right",
            "knn_right")
    versions = {name: about[name] for name in ("python", "torch", "torchvision")}
    return dict(run._asdict(), config=config, code=about["code"], versions=versions,
                machine=machine(about["config"], about["threads"]), kept_views=views,
                seconds=seconds and round(seconds), probe={name: probe[name] for name in kept},
                epochs=epochs)


# --- Making the runs ------------------------------------------------------------------------------


def hex_module():
    if TOP not in sys.path:
        sys.path.insert(0, TOP)
    import hex as hx
    return hx


def code_now():
    """What hex.py, as it is now, writes into its config.json as `code`."""
    hx = hex_module()
    with open(hx.__file__, "rb") as file:
        return hx.digest(file.read())


def start(run, out, roots, views=None):
    """Begins or resumes a run; returns its process."""
    script = [os.path.join(TOP, "hex.py")]
    if views and run.flags != GPU:
        script = [os.path.join(HERE, "kept_views.py"), os.path.join(views, run.data)]
    command = [sys.executable, *script, *arguments(run, roots), "--out", out]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    tie = None
    if sys.platform == "linux":                 # the run stops, too, if this process is killed
        tie = functools.partial(ctypes.CDLL(None).prctl, 1, signal.SIGTERM)
    with open(out + ".log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=TOP, env=environment,
                                preexec_fn=tie, start_new_session=True)


class Queue:
    """Makes runs, `jobs` at a time, and calls finished(run, out, seconds) after each."""

    def __init__(self, workdir, roots, jobs, code, views):
        self.workdir, self.roots, self.jobs = workdir, roots, jobs
        self.code, self.views = code, views
        self.stopped = False
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, self.stop)

    def stop(self, *_):
        if not self.stopped:
            self.stopped = True
            print("study.py: stopping; the same command goes on", file=sys.stderr, flush=True)

    def begin(self, run):
        out = folder(run, self.workdir)
        begun = os.path.exists(os.path.join(out, "config.json"))
        if begun and read_json(out, "config.json")["code"] != self.code:
            shutil.rmtree(out)                                  # begun by another hex.py
        resumed = os.path.exists(out)
        views = None if run in AGAIN else self.views
        timed = not resumed and (not views or run.flags == GPU)
        return run, out, time.time() if timed else None, start(run, out, self.roots, views)

    def __call__(self, runs, finished):
        """Returns the runs that failed three times."""
        waiting, active, failed = list(runs), [], []
        told, tries, count = set(), {}, 0
        while active or waiting and not self.stopped:
            while waiting and len(active) < self.jobs and not self.stopped:
                active.append(self.begin(waiting.pop(0)))
            time.sleep(0.2)
            if self.stopped:
                for *_, process in active:
                    if process.poll() is None and process not in told:
                        process.terminate()             # once: at a second signal it saves nothing
                        told.add(process)
            for item in [item for item in active if item[3].poll() is not None]:
                active.remove(item)
                run, out, began, process = item
                if process.returncode == 0:
                    count += 1
                    line = finished(run, out, began and time.time() - began)
                    probe, name = line["probe"], " ".join(filter(None, run[1:4]))
                    took = f" ({line['seconds']} s)" if line["seconds"] else ""
                    print(f"{count}/{len(runs)} {name}, seed {run.seed}: "
                          f"top-1 {probe['top1']:.2f}, k-NN {probe['knn']:.2f}{took}", flush=True)
                elif not self.stopped:
                    tries[run] = tries.get(run, 0) + 1
                    (waiting if tries[run] < 3 else failed).append(run)
                    with open(out + ".log") as log:
                        end = "".join(log.readlines()[-3:])
                    print(f"study.py: status {process.returncode}: {out}.log ends with\n{end}",
                          file=sys.stderr, flush=True)
        return failed


# --- The mechanism --------------------------------------------------------------------------------


def embed_fixed_batch(hx, run, roots, out):
    """Embeddings and labels of the batch of which hex.py logs H at each epoch, by its function
    `emergence`."""
    import torch
    cfg = hx.parse(arguments(run, roots))
    train, val = hx.load_data(cfg)
    model = hx.build_model(cfg)
    path = os.path.join(out, "checkpoint.pt")
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    watched = mock.Mock(wraps=hx.local_mask)
    with mock.patch.object(hx, "local_mask", watched) as split, torch.no_grad():
        hx.emergence(model.to(cfg.device), cfg, train, val)
    a, b = (each.double().cpu() for each in split.call_args.args[:2])
    return a, b, train.targets[hx.permutation(len(train), "fixed")[:len(a)]]


def compare(hx, a, b, labels, temperature, quantile, beta, tau_plus):
    """What HEX does to InfoNCE on these embeddings, in one setting: by autograd, through hex.py's
    losses."""
    import torch
    import torch.nn.functional as F
    threshold = hx.AdaptiveThreshold(quantile)
    hex_nce = functools.partial(hx.hex_nce, threshold=threshold, beta=beta, tau_plus=tau_plus)
    losses = dict(infonce=lambda x, y: hx.info_nce(x, y, temperature),
                  hex=lambda x, y: hex_nce(x, y, temperature)[0])
    _, local = hx.local_mask(a, b, threshold)
    _, stats = hex_nce(a, b, temperature)
    cosine, *rest = hx.similarities(a, b, temperature)
    image, labels = torch.arange(len(a)).repeat(2), labels.repeat(2)
    same, negative = labels[:, None] == labels, image[:, None] != image
    out = dict(stats, purity=same[local].double().mean(), chance=same[negative].double().mean(),
               dimension=1 / cosine[negative].square().mean())          # of uniform points: D
    gradients = {}
    for name, loss in losses.items():
        x, y = (each.clone().requires_grad_() for each in (a, b))
        gradients[name] = torch.cat(torch.autograd.grad(loss(x, y), (x, y))).flatten()
        # tau dl_i / ds_ij is j's share of the anchor's denominator: the cosine matrix stands in as
        # a leaf.
        leaf = cosine.clone().requires_grad_()
        with mock.patch.object(hx, "similarities", lambda *_, leaf=leaf: (leaf, *rest)):
            share = temperature * len(leaf) * torch.autograd.grad(loss(a, b), leaf)[0]
        out["share_" + name] = (share * local).sum(1).mean()
        out["same_" + name] = (share * (local & same)).sum() / (share * local).sum()
    out["gradient_cosine"] = F.cosine_similarity(gradients["infonce"], gradients["hex"], 0)
    out["gradient_ratio"] = gradients["hex"].norm() / gradients["infonce"].norm()
    return {name: round(float(value), 5) for name, value in out.items()}


def uniform_thresholds(hx, quantile, points=512, draws=20):
    """{dimension: threshold of points spread uniformly on the sphere}: normal deviates, mean of 20
    draws."""
    import torch
    generator, out = torch.Generator().manual_seed(0), {}
    threshold = hx.AdaptiveThreshold(quantile)
    for dimension in DIMENSIONS:
        clouds = torch.randn(draws, 2, points // 2, dimension, generator=generator)
        eps = [float(hx.local_mask(*cloud, threshold)[0]) for cloud in clouds]
        out[str(dimension)] = round(sum(eps) / draws, 5)
    return out


def settings_left(code):
    """{run: settings in which mechanism.jsonl does not have it yet}."""
    there = {(*key(line), *(line[name] for name in SETTINGS)) for line in read_events(MECHANISM)
             if line["kind"] == "batch" and line["code"] in (FORMER, code)}
    settings = [*itertools.product(*SETTINGS.values())]
    left = {run: [each for each in settings if (*run[1:], *each) not in there]
            for run in needed_by_mechanism()}
    return {run: settings for run, settings in left.items() if settings}


def mechanism(roots, workdir, code, queue):
    """Appends what mechanism.jsonl lacks and can be had. It ends early if the queue is told to
    stop."""
    import torch
    torch.set_num_threads(1)
    hx, lines = hex_module(), read_events(MECHANISM)
    known = {line["quantile"] for line in lines
             if line["kind"] == "uniform" and line["code"] in (FORMER, code)}
    for quantile in SETTINGS["quantile"]:
        if quantile not in known:
            append(MECHANISM, [dict(kind="uniform", code=code, quantile=quantile, points=512,
                                    thresholds=uniform_thresholds(hx, quantile))])
    for run, settings in settings_left(code).items():
        out = folder(run, workdir)
        trained = os.path.exists(os.path.join(out, "checkpoint.pt"))
        if queue.stopped or run.data not in roots or not trained:
            continue
        a, b, labels = embed_fixed_batch(hx, run, roots, out)
        about = dict(kind="batch", code=code, data=run.data, flags=run.flags, arm=run.arm,
                     seed=run.seed)
        lines = []
        for each in settings:
            setting = dict(zip(SETTINGS, each))
            lines.append(dict(about, **setting, **compare(hx, a, b, labels, **setting)))
        append(MECHANISM, lines)
        print(f"mechanism: {' '.join(filter(None, run[1:4]))}, {len(lines)} settings", flush=True)


# --- The command ----------------------------------------------------------------------------------


def name_of(run):
    """What a run is known by; one that is made again has a name of its own."""
    return run.part == "again", *run[1:]


def runs_there(code):
    """The names of the runs that need not be made: the study's, and by this code those again."""
    lines = read_events(RUNS)
    counted, _ = of_study(lines, code)
    again = [line for line in lines if line["part"] == "again" and line["code"] == code]
    return {(line["part"] == "again", *key(line)) for line in [*counted, *again]}


def check_folders(roots, runs, fail):
    for name, root in roots.items():
        if root and any(run.data == name for run in runs):
            found = digests(root)
            if found.contents != DIGESTS[name].contents:
                fail(f"--{name} {root}: other files than the study's; make them by pictures.py, or "
                     "put their digests into DIGESTS and begin a runs.jsonl of your own")
            if found != DIGESTS[name]:
                fail(f"--{name} {root}: the study's files, but under other names or in other "
                     "classes; make the folder by pictures.py")


def main():
    parser = argparse.ArgumentParser(description="Makes the runs of the study that are not there.")
    for name in DIGESTS:
        parser.add_argument("--" + name, metavar="DIR", help="DIR/{train,val}/<class>/*")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "again"], metavar="PART",
                        help=", ".join(PARTS) + "; again, which is made only if it is named")
    parser.add_argument("--workdir", default="runs/study", metavar="DIR",
                        help="for the runs [runs/study]")
    parser.add_argument("--views", metavar="DIR",
                        help="for batches that several runs need [none is kept]")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs side by side [2]")
    parser.add_argument("--list", action="store_true",
                        help="print the runs and which are there; do nothing")
    args = parser.parse_args()
    parts, workdir, code = args.only or PARTS, os.path.abspath(args.workdir), code_now()
    runs = listed(row for row in STUDY if row.part in parts)
    runs += AGAIN if "again" in parts else []
    given = {name: getattr(args, name.replace("-", "_")) for name in DIGESTS}
    roots = {"shapes": None}
    roots |= {name: os.path.abspath(root) for name, root in given.items() if root}
    there = runs_there(code)
    if args.list:
        for run in runs:
            word = "there" if name_of(run) in there else "     "
            print(word, *arguments(run, {run.data: run.data}))
        return 0
    check_folders(roots, runs, parser.error)
    os.makedirs(workdir, exist_ok=True)
    lock = open(RUNS, "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        parser.error("another study is at work")
    if any(run.flags == GPU for run in runs) and not hex_module().torch.cuda.is_available():
        print("study.py: left out, for want of a GPU: the part gpu", file=sys.stderr)
        runs = [run for run in runs if run.flags != GPU]
    absent = ", ".join(sorted({run.data for run in runs} - roots.keys()))
    if absent:
        print(f"study.py: left out, for want of its folder: {absent}", file=sys.stderr)
    paths = [TOP, workdir, *filter(None, roots.values())]
    keep = {name_of(run) for run in needed_by_mechanism()}

    def finished(run, out, seconds):
        kept = bool(args.views) and run.flags != GPU and run not in AGAIN
        line = collect(run, out, seconds, kept)
        if line["code"] != code:
            raise SystemExit("study.py: hex.py has changed since the study began; give the command "
                             "again")
        if any(path in json.dumps(line) for path in paths):
            raise SystemExit(f"study.py: a path of this machine would be in the line of {out}")
        if name_of(run) not in there:
            append(RUNS, [line])
            there.add(name_of(run))
        tidy(run, out)
        return line

    def tidy(run, out):
        checkpoint = os.path.join(out, "checkpoint.pt")
        if name_of(run) not in keep and os.path.exists(checkpoint):
            os.remove(checkpoint)

    for run in runs:
        if name_of(run) in there:
            tidy(run, folder(run, workdir))
    views = args.views and os.path.abspath(args.views)
    queue = Queue(workdir, roots, args.jobs, code, views)
    left = [run for run in runs if run.data in roots and name_of(run) not in there]
    failed = queue(left, finished)
    if "mechanism" in parts and not queue.stopped:
        lost = [run for run in settings_left(code) if run.data in roots
                and not os.path.exists(os.path.join(folder(run, workdir), "checkpoint.pt"))]
        for run in lost:
            shutil.rmtree(folder(run, workdir), ignore_errors=True)
        failed += queue(lost, finished)
        if not queue.stopped:
            mechanism(roots, workdir, code, queue)
    return 75 if queue.stopped else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
