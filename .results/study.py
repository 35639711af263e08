# SPDX-License-Identifier: MIT
"""The whole study: every run of the table below, then the mechanism. From the top folder:

    python .results/study.py --cifar10 DIR --cifar100 DIR --cifar10-other DIR --cifar100-other DIR
                             [--only PART ...] [--list] [--again N] [--views DIR]

DIR holds train/<class>/* and val/<class>/*; pictures.py makes the other ones. Two runs side by side, one
thread each; those of the part gpu need one, and more of them fit (--only gpu --jobs 10). Stop it at any time:
the same command goes on. Each finished run is a line of runs.jsonl, and is not made again by the same hex.py.
The mechanism is in mechanism.jsonl. report.py makes tables and plots from the two. --views keeps augmented
batches there, for all losses of a seed (kept_views.py): the same figures in less time, and 7 GB a seed on
CIFAR.

Where hex.py has changed since, but should compute the same, `--again N` makes the first N runs of each recipe
again: if all figures are those of the older lines, that recipe's lines of these arms count on; else all is to
be made anew (so are the part gpu's: on a GPU no run repeats to the last bit).
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

# --- The runs -----------------------------------------------------------------------------------------------
# An arm is a loss with its flags. In a part seeds are outermost: wherever the study stops, what is there is
# paired. A run that two rows ask for is made once: the first parts are the pair that matters most.

SIX = ("infonce", "dcl", "hex", "hex --decoupled", "hex --tau-plus 0", "released")
THREE = ("base", "infonce", "hex")
PAIR = ("infonce", "hex")
# Is H(i) spared where the debiasing term exceeds the local one? Without that term, and with tau_plus at about
# H's same-class share at the end: 0.7 on shapes, 0.2 on CIFAR-10; CIFAR-100's is near the default.
SPARED_70 = ("infonce", "hex --tau-plus 0", "hex --tau-plus 0.7", "released")
SPARED_20 = ("infonce", "hex --tau-plus 0.2")
SPARED = ("infonce", "hex --tau-plus 0", "released")
RANDOM, PIXELS = ("random",), ("pixels",)
STRONG = ("infonce", "hex --quantile 0.9 --beta 4")
# STRONG hurts on shapes: by which of its two settings, and does debiasing undo it? H's same-class share there
# is 0.33.
KNOBS = (*STRONG, "hex --quantile 0.9", "hex --beta 4",
         *(f"{STRONG[1]} --tau-plus {tau_plus}" for tau_plus in (0, 0.3)))
GPU = "--recipe cifar --epochs 25 --probe-epochs 40 --device cuda"      # resnet18, autocast with fp16

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
MAIN = ("pair", "pair-many")                # the main question, hex against infonce, is asked of these
PARTS = [*dict.fromkeys(row.part for row in STUDY), "mechanism"]

# The mechanism: HEX against InfoNCE in all these settings, on models trained so (both of PAIR, seed 0).
TRAINED = (("shapes", ""), ("cifar10", "--temperature 0.1"), ("cifar100", "--temperature 0.1"))
SETTINGS = dict(temperature=(0.05, 0.1, 0.2), quantile=(0.9, 0.99), beta=(0, 1, 4), tau_plus=(0, 0.01, 0.1))
DIMENSIONS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

# Of the folders' files, as README.md says: other pictures would be another study.
DIGESTS = {
    "cifar10": "73e09c0ca812e1e11c88120b912821751144c84fc3eff5b022df1342f9b97e88",
    "cifar100": "3cad1578c4c0697b51a4353728f788bb1c61838221c65a4640880828f861cd26",
    "cifar10-other": "dc05ed8ab5e4564a6642d7bb3c85b36c8d5a5a26bc51a2990841383f93981739",
    "cifar100-other": "a709406f8237cffb84a85b7c2c2340934f278d0a3c7a93357eacad0544dc8cf3"}

Run = namedtuple("Run", "part data flags arm seed")


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


def digest(root):
    """SHA-256 of the sorted SHA-256 of all files, a line each."""
    found = [os.path.join(folder, name) for split in ("train", "val")
             for folder, _, names in os.walk(os.path.join(root, split)) for name in names]
    each = sorted(hashlib.sha256(open(path, "rb").read()).hexdigest() + "\n" for path in found)
    return hashlib.sha256("".join(each).encode()).hexdigest()


def needed_by_mechanism():
    runs = listed(row for row in STUDY if (row.data, row.flags) in TRAINED)
    return [run for run in runs if run.arm in PAIR and run.seed == 0]


def arguments(run, roots):
    """What hex.py is told, without --out."""
    data = ["--data", "shapes"]
    if run.data != "shapes":
        small = [] if run.flags == GPU else ["--recipe", "small"]
        data = ["--data", "folder", *small, "--root", roots[run.data]]
    arm = {"random": "--epochs 0", "pixels": "--epochs 0 --backbone pixels"}.get(run.arm, "--loss " + run.arm)
    device = ["--workers", "2"] if run.flags == GPU else ["--workers", "0", "--device", "cpu"]
    return [*data, *run.flags.split(), *arm.split(), "--seed", str(run.seed), *device]


def folder(run, workdir):
    name = " ".join([run.data, run.flags, run.arm]).replace("--", "").split()
    return os.path.join(workdir, "-".join([*name, f"s{run.seed}"]))


# --- Lines --------------------------------------------------------------------------------------------------


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
    """{(code, recipe, arm)} that count with this code: both made such a run, with every figure equal."""
    figures = {}
    for line in lines:
        group = figures.setdefault(kind_of(line), {})
        made = line["config"], line["probe"], line["epochs"]
        if group.setdefault(key(line), made) != made:
            raise SystemExit(f"runs.jsonl: two lines of {key(line)} by one code differ; take one out")
    same = set()
    for (other, *kind), theirs in figures.items():
        mine = figures.get((code, *kind), {})
        both = mine.keys() & theirs.keys()
        if both and all(mine[each] == theirs[each] for each in both):
            same.add((other, *kind))
    return same


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
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


def packed(right, percent, pictures):
    """Which val pictures were right, a digit each or bits in hexadecimal -> the latter, checked."""
    if len(right) != pictures:
        right = "".join(f"{byte:08b}" for byte in bytes.fromhex(right))[:pictures]
    if right.count("1") != round(percent * pictures / 100):
        raise SystemExit(f"study.py: {right.count('1')} of {pictures} right, but {percent} %")
    size = (pictures + 7) // 8
    return int(right.ljust(8 * size, "0"), 2).to_bytes(size, "big").hex()


def collect(run, out, seconds, views=False):
    """A finished run as one line: its settings from config.json, without what is of this machine alone."""
    about, probe = (json.load(open(os.path.join(out, name))) for name in ("config.json", "probe.json"))
    local = {"root", "out", "probe", "classes", "label_list", "device", "workers"}
    config = {name: value for name, value in about["config"].items()
              if name not in local and not (isinstance(value, str) and os.sep in value)}
    metrics = os.path.join(out, "metrics.jsonl")
    events, epochs = read_events(metrics), []
    for each in events:
        if each["event"] != "epoch":
            continue
        figures = {name: value for name, value in each.items() if name != "event"}
        steps = [step for step in events if step["event"] == "step" and step["epoch"] == each["epoch"] - 1]
        for name in ("loss", "clamped", "empty"):               # the loss's own figures in that epoch
            values = [step[name] for step in steps if step.get(name) is not None]
            if values:
                figures["step_" + name] = sum(values) / len(values)
        epochs.append(rounded(figures))
    for name, percent in (("right", "top1"), ("knn_right", "knn")):
        probe[name] = packed(probe[name], probe[percent], probe["val"])
    kept = ("top1", "top5", "knn", "rate", "holdout", "epochs", "train", "val", "right", "knn_right")
    return dict(run._asdict(), config=config, code=about["code"], versions=about["versions"],
                machine=machine(about["config"], about["threads"]),
                kept_views=views, seconds=seconds and round(seconds),
                probe={name: probe[name] for name in kept}, epochs=epochs)


# --- Making the runs ----------------------------------------------------------------------------------------


def hex_module():
    if TOP not in sys.path:
        sys.path.insert(0, TOP)
    import hex as hx
    return hx


def code_now():
    """What hex.py, as it is now, writes into its config.json as `code`."""
    hx = hex_module()
    return hx.fingerprint(open(hx.__file__, "rb").read())


def start(run, out, roots, views=None):
    """Begins or resumes a run; returns its process."""
    script = [os.path.join(TOP, "hex.py")]
    if views and run.flags != GPU:
        script = [os.path.join(HERE, "kept_views.py"), os.path.join(views, run.data)]
    command = [sys.executable, *script, *arguments(run, roots), "--out", out]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    tie = None
    if sys.platform == "linux":                             # the run stops, too, if this process is killed
        tie = functools.partial(ctypes.CDLL(None).prctl, 1, signal.SIGTERM)
    with open(out + ".log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=TOP, env=environment, preexec_fn=tie,
                                start_new_session=True)


class Queue:
    """Makes runs, `jobs` at a time, and calls finished(run, out, seconds) after each."""

    def __init__(self, workdir, roots, jobs, code, views):
        self.workdir, self.roots, self.jobs, self.code, self.views = workdir, roots, jobs, code, views
        self.stopped = False
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, self.stop)

    def stop(self, *_):
        if not self.stopped:
            self.stopped = True
            print("study.py: stopping; the same command goes on", file=sys.stderr, flush=True)

    def begin(self, run):
        out = folder(run, self.workdir)
        about = os.path.join(out, "config.json")
        if os.path.exists(about) and json.load(open(about))["code"] != self.code:
            shutil.rmtree(out)                                  # begun by another hex.py
        resumed = os.path.exists(out)
        timed = not resumed and (not self.views or run.flags == GPU)
        return run, out, time.time() if timed else None, start(run, out, self.roots, self.views)

    def __call__(self, runs, finished):
        """Returns the runs that failed three times."""
        waiting, active, failed, told, tries, count = list(runs), [], [], set(), {}, 0
        while active or waiting and not self.stopped:
            while waiting and len(active) < self.jobs and not self.stopped:
                active.append(self.begin(waiting.pop(0)))
            time.sleep(0.2)
            if self.stopped:
                for *_, process in active:
                    if process.poll() is None and process not in told:
                        process.terminate()                     # once: at a second signal it saves nothing
                        told.add(process)
            for item in [item for item in active if item[3].poll() is not None]:
                active.remove(item)
                run, out, began, process = item
                if process.returncode == 0:
                    count += 1
                    line = finished(run, out, began and time.time() - began)
                    probe, took = line["probe"], f" ({line['seconds']} s)" if line["seconds"] else ""
                    print(f"{count}/{len(runs)} {' '.join(filter(None, run[1:4]))}, seed {run.seed}: "
                          f"top-1 {probe['top1']:.2f}, k-NN {probe['knn']:.2f}{took}", flush=True)
                elif not self.stopped:
                    tries[run] = tries.get(run, 0) + 1
                    (waiting if tries[run] < 3 else failed).append(run)
                    print(f"study.py: status {process.returncode}: {out}.log ends with\n"
                          + "".join(open(out + ".log").readlines()[-3:]), file=sys.stderr, flush=True)
        return failed


# --- The mechanism ------------------------------------------------------------------------------------------


def embed_fixed_batch(hx, run, roots, out):
    """Embeddings and labels of the batch that hex.py logs each epoch's figures of, by its `emergence`."""
    import torch
    cfg, _ = hx.parse(arguments(run, roots))
    train, val = hx.load_data(cfg)
    model = hx.build_model(cfg)
    state = torch.load(os.path.join(out, "checkpoint.pt"), map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    with mock.patch.object(hx, "local_mask", mock.Mock(wraps=hx.local_mask)) as split, torch.no_grad():
        hx.emergence(model.to(cfg.device), cfg, train, val)
    a, b = (each.double().cpu() for each in split.call_args.args[:2])
    return a, b, train.targets[hx.permutation(len(train), "fixed")[:len(a)]]


def compare(hx, a, b, labels, temperature, quantile, beta, tau_plus):
    """What HEX does to InfoNCE on these embeddings, in one setting: by autograd, through hex.py's losses."""
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
        # tau dl_i / ds_ij is j's share of the anchor's denominator: the cosine matrix stands in as a leaf
        leaf = cosine.clone().requires_grad_()
        with mock.patch.object(hx, "similarities", lambda *_, leaf=leaf: (leaf, *rest)):
            share = temperature * len(leaf) * torch.autograd.grad(loss(a, b), leaf)[0]
        out["share_" + name] = (share * local).sum(1).mean()
        out["same_" + name] = (share * (local & same)).sum() / (share * local).sum()
    out["gradient_cosine"] = F.cosine_similarity(gradients["infonce"], gradients["hex"], 0)
    out["gradient_ratio"] = gradients["hex"].norm() / gradients["infonce"].norm()
    return {name: round(float(value), 5) for name, value in out.items()}


def uniform_thresholds(hx, quantile, points=512, draws=20):
    """{dimension: threshold of points spread uniformly on the sphere}: normal deviates, mean of 20 draws."""
    import torch
    generator, threshold, out = torch.Generator().manual_seed(0), hx.AdaptiveThreshold(quantile), {}
    for dimension in DIMENSIONS:
        clouds = torch.randn(draws, 2, points // 2, dimension, generator=generator)
        eps = [float(hx.local_mask(*cloud, threshold)[0]) for cloud in clouds]
        out[str(dimension)] = round(sum(eps) / draws, 5)
    return out


def settings_left(code):
    """{run: settings in which mechanism.jsonl does not have it yet}."""
    there = {(*key(line), *(line[name] for name in SETTINGS)) for line in read_events(MECHANISM)
             if line["kind"] == "batch" and line["code"] == code}
    left = {run: [each for each in itertools.product(*SETTINGS.values()) if (*run[1:], *each) not in there]
            for run in needed_by_mechanism()}
    return {run: settings for run, settings in left.items() if settings}


def mechanism(roots, workdir, code, queue):
    """Appends what mechanism.jsonl lacks and can be had; ends early if the queue is told to stop."""
    import torch
    torch.set_num_threads(1)
    hx, lines = hex_module(), read_events(MECHANISM)
    for quantile in SETTINGS["quantile"]:
        if not any(line["kind"] == "uniform" and line["quantile"] == quantile and line["code"] == code
                   for line in lines):
            append(MECHANISM, [dict(kind="uniform", code=code, quantile=quantile, points=512,
                                    thresholds=uniform_thresholds(hx, quantile))])
    for run, settings in settings_left(code).items():
        out = folder(run, workdir)
        if queue.stopped or run.data not in roots or not os.path.exists(os.path.join(out, "checkpoint.pt")):
            continue
        a, b, labels = embed_fixed_batch(hx, run, roots, out)
        about = dict(kind="batch", code=code, data=run.data, flags=run.flags, arm=run.arm, seed=run.seed)
        lines = []
        for each in settings:
            setting = dict(zip(SETTINGS, each))
            lines.append(dict(about, **setting, **compare(hx, a, b, labels, **setting)))
        append(MECHANISM, lines)
        print(f"mechanism: {' '.join(filter(None, run[1:4]))}, {len(lines)} settings", flush=True)


# --- The command --------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="Makes the runs of the study that are not there yet.")
    for name in DIGESTS:
        parser.add_argument("--" + name, metavar="DIR", help="DIR/{train,val}/<class>/*")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--workdir", default="runs/study", metavar="DIR", help="for the runs [runs/study]")
    parser.add_argument("--views", metavar="DIR", help="for batches that several runs need [none is kept]")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs side by side [2]")
    parser.add_argument("--again", type=int, default=0, metavar="N", help="make N again of each recipe")
    parser.add_argument("--list", action="store_true", help="print the runs and which are there; do nothing")
    args = parser.parse_args()
    if args.again and args.views:
        parser.error("--again makes runs as hex.py makes them: leave --views out")
    parts, workdir, code = args.only or PARTS, os.path.abspath(args.workdir), code_now()
    runs = listed(row for row in STUDY if row.part in parts)
    given = {name: getattr(args, name.replace("-", "_")) for name in DIGESTS}
    roots = {"shapes": None} | {name: os.path.abspath(root) for name, root in given.items() if root}
    lines = read_events(RUNS)
    same = same_numbers(lines, code)
    there = {key(line) for line in lines if kind_of(line) in same}
    again = [run for each in ("shapes", "small", "cifar")
             for run in [run for run in runs if recipe_of(run._asdict()) == each][:args.again]]
    there -= {run[1:] for run in again} - {key(line) for line in lines if line["code"] == code}
    if args.list:
        for run in runs:
            print("there" if run[1:] in there else "     ", *arguments(run, {run.data: run.data}))
        return 0
    for name, root in roots.items():
        if root and any(run.data == name for run in runs) and digest(root) != DIGESTS[name]:
            parser.error(f"--{name} {root}: other files than README.md's; give those, or put "
                         "their digest into DIGESTS and begin a runs.jsonl of your own")
    os.makedirs(workdir, exist_ok=True)
    lock = open(RUNS, "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        parser.error("another study is at work")
    if any(run.flags == GPU for run in runs) and not hex_module().torch.cuda.is_available():
        print("study.py: left out, for want of a GPU: the part gpu", file=sys.stderr)
        runs = [run for run in runs if run.flags != GPU]
    absent = {run.data for run in runs} - roots.keys()
    if absent:
        print(f"study.py: left out, for want of its folder: {', '.join(sorted(absent))}", file=sys.stderr)
    paths = [TOP, workdir, *filter(None, roots.values())]
    keep = {run[1:] for run in needed_by_mechanism()}

    def finished(run, out, seconds):
        line = collect(run, out, seconds, bool(args.views) and run.flags != GPU)
        if line["code"] != code:
            raise SystemExit("study.py: hex.py has changed since the study began; give the command again")
        if any(path in json.dumps(line) for path in paths):
            raise SystemExit(f"study.py: a path of this machine would be in the line of {out}")
        if run[1:] not in there:
            append(RUNS, [line])
            there.add(run[1:])
        tidy(run, out)
        return line

    def tidy(run, out):
        checkpoint = os.path.join(out, "checkpoint.pt")
        if run[1:] not in keep and os.path.exists(checkpoint):
            os.remove(checkpoint)

    for run in runs:
        if run[1:] in there:
            tidy(run, folder(run, workdir))
    queue = Queue(workdir, roots, args.jobs, code, args.views and os.path.abspath(args.views))
    failed = queue([run for run in again or runs if run.data in roots and run[1:] not in there], finished)
    if again:
        same = same_numbers(read_events(RUNS), code)
        for each, *kind in sorted(same):
            print("study.py: the same figures:", each[:16], *kind)
        return 75 if queue.stopped else 1 if failed else 0
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
