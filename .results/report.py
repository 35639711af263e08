# SPDX-License-Identifier: MIT
"""Every table and plot of the evidence, from the raw lines. From the top folder:

    python .results/report.py

Writes tables.md, the plots, and what stands between markers in README.md. The same lines give the
same bytes.
"""
import collections
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import re
import subprocess
from statistics import mean, median, stdev

import numpy as np
from plot import COLORS, GRAY, INK, PALE, Picture, axis, legend, panel, read_events, ticks
from study import (
    COMMITS,
    FORMER,
    GPU,
    HERE,
    MAIN,
    MECHANISM,
    PAIR,
    PERFORMANCE,
    RUNS,
    SETTINGS,
    SIX,
    STRONG,
    STUDY,
    TOP,
    TRAINED,
    key,
    of_study,
)

DRAWS, LEVEL, POWER = 40_000, 0.05, 0.8
WAYS = ("bootstrap", "seeds")               # of reckoning an interval; the report's spans both
OTHER = "-other"                            # behind the name of a data set: its other pictures
FEWEST = 3                                  # seeds of a comparison that is judged
README, TABLES = (os.path.join(HERE, name) for name in ("README.md", "tables.md"))
MEASURES = {"top1": ("top-1", "right"), "knn": ("k-NN", "knn_right")}

# --- Lines ----------------------------------------------------------------------------------------


def load():
    """The runs of the study; pairs of a run that was made again, (before, now); the lines of the
    mechanism; how they came, in words."""
    lines = read_events(RUNS)
    last = next((line["code"] for line in reversed(lines)), None)
    runs, left_out = of_study(lines, last)
    again = [line for line in lines if line["part"] == "again"]
    again = [line for line in again if line["code"] == again[-1]["code"]]
    before = {key(line): line for line in runs}
    pairs = [(before[key(line)], line) for line in again if key(line) in before]
    pairs = [(one, other) for one, other in pairs if one["code"] != other["code"]]

    mechanism = read_events(MECHANISM)
    known = {line["code"] for line in mechanism} & {FORMER} or {
        line["code"] for line in mechanism[-1:]}
    mechanism = [line for line in mechanism if line["code"] in known]
    return runs, pairs, mechanism, in_words(lines, runs, left_out, mechanism)


def history():
    """{digest: commit} of every hex.py in git's history, the first commit that has it. Empty where
    there is no git, or only a part of the history."""

    def git(*words):
        command = ["git", "-C", TOP, *words]
        return subprocess.run(command, capture_output=True, check=True).stdout

    found = {}
    try:
        if git("rev-parse", "--is-shallow-repository").split() == [b"false"]:
            for commit in git("log", "--format=%H", "--", "hex.py").decode().split():
                file = git("show", f"{commit}:./hex.py")
                found[hashlib.sha256(file).hexdigest()[:8]] = commit[:7]
    except (OSError, subprocess.CalledProcessError):
        return {}
    return found


@functools.cache
def commits():
    """{digest: commit} by git's history. Of a digest that this does not have, the commit stays that
    stands in tables.md."""
    known = {}
    if os.path.exists(TABLES):
        with open(TABLES) as file:
            known = dict(re.findall(r"`([0-9a-f]{8})` \(commit ([0-9a-f]{7})\)", file.read()))
    return known | history()


def name_of(code):
    """A hex.py as a reader can find it: the first digits of its digest, and its commit."""
    digits = code[:8]
    commit = COMMITS.get(code) or commits().get(digits)
    return f"`{digits}`" + (f" (commit {commit})" if commit else "")


def in_words(lines, runs, left_out, mechanism):
    if not runs:
        return "No runs yet."
    words = [f"{len(runs)} runs. Each line of runs.jsonl names the `hex.py` that made it, by a "
             "digest, `code`. Here stand its first digits."]
    of = {}                                                 # {code: {run: ...}}
    for line in lines:
        if line not in left_out and line["part"] != "again":
            of.setdefault(line["code"], {})[key(line)] = line
    for code in sorted(of, key=lambda code: (code != FORMER, code)):
        words.append(f"{name_of(code)} made {len(of[code])}.")
        both = of[code].keys() & of.get(FORMER, {}).keys()
        if code in COMMITS and code != FORMER:
            words.append(f"It is older. {len(both)} runs were made by both, with every figure "
                         "equal. Lines of an arm and recipe count only where that was so.")
    if FORMER in of:
        words.append("The file of commit f319ae1 is the former hex.py, before it was rewritten.")
    words += [f"{len(left_out)} runs of other versions are left out."] if left_out else []
    if mechanism:
        by = name_of(mechanism[0]["code"])
        words.append(f"{len(mechanism)} lines of the mechanism, by {by}.")
    return "\n".join(words)


def table_of(lines):
    """{(data, flags, arm): {seed: line}}."""
    groups = {}
    for line in lines:
        groups.setdefault(key(line)[:3], {})[line["seed"]] = line
    return groups


def references(arm):
    """What an arm is measured against: its baseline, and itself less each one of its flags."""
    if arm in ("infonce", "random", "pixels"):
        return ()
    if arm == "released":
        return "infonce", "dcl"
    name, *flags = arm.split(" --")
    less = [" --".join([name, *flags[:i], *flags[i + 1:]]) for i in range(len(flags))]
    return ("dcl" if "decoupled" in flags else "infonce"), *less


def planned(row, arm):
    """The most seeds that any part plans for this arm."""
    return max((each.seeds for each in STUDY if each[1:3] == row[1:3] and arm in each.arms),
               default=0)


def is_main(row, measure):
    return row.part in MAIN and measure == "top1"


def right(line, measure):
    """(pictures,) which val pictures were right, 0 or 1."""
    packed = np.frombuffer(bytes.fromhex(line["probe"][MEASURES[measure][1]]), np.uint8)
    return np.unpackbits(packed, count=line["probe"]["val"])


# --- Statistics -----------------------------------------------------------------------------------


@functools.lru_cache(8)
def student(df):
    """A grid of t >= 0, and the share of Student's distribution within +-t. Here t is sqrt(df)
    tan(angle)."""
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (df - 1)
    within = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.sqrt(df) * np.tan(angle), within / within[-1]


def t_within(share, df):
    """The t that holds this share of the distribution within +-t."""
    grid, within = student(df)
    return float(np.interp(share, within, grid))


def t_test_p(t, df):
    grid, within = student(df)
    return float(1 - np.interp(abs(t), grid, within))


def drawn_pictures(differences, pictures):
    """differences (rows, pictures) -> (DRAWS, rows): sums over pictures drawn with replacement."""
    generator, out = np.random.default_rng(0), []
    transposed = np.ascontiguousarray(differences.T, np.float32)            # integers: exact
    for _ in range(DRAWS // 500):
        drawn = generator.integers(pictures, size=(500, pictures))
        drawn += pictures * np.arange(500)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=500 * pictures).reshape(500, pictures)
        out.append(counts.astype(np.float32) @ transposed)
    return np.concatenate(out)


@dataclasses.dataclass
class Way:
    """What one way of reckoning says of a difference."""
    interval: tuple
    p: float
    error: float
    df: float
    least: float = 0.0                                  # error that this way never goes below


class Comparison:
    """An arm less its reference in one measure, in percent, paired by seed and by picture."""

    def __init__(self, row, arm, reference, measure, pairs):
        self.row, self.arm, self.reference, self.measure = row, arm, reference, measure
        signs = [right(ours, measure).astype(np.int8) - right(theirs, measure)
                 for ours, theirs in pairs]
        self.signs = np.stack(signs).astype(np.int8)        # (seeds, pictures): -1, 0 or 1
        self.n, self.pictures = self.signs.shape
        self.difference = 100 * float(self.signs.mean())
        self.p = self.holm = self.level = None
        self.main = is_main(row, measure)

    def judge(self, sums):
        """Intervals and p, both ways. sums: (DRAWS, n), over drawn pictures."""
        self.ways = dict(zip(WAYS, (self.by_bootstrap(sums), self.by_seeds())))
        lows, highs = zip(*(way.interval for way in self.ways.values()))
        self.interval = min(lows), max(highs)
        self.p = max(way.p for way in self.ways.values())

    def observed_power(self, level):
        """The smallest true difference that both ways' tests at this level find in a share POWER of
        studies like this one: simulated, the larger error taken for the true one."""
        generator, needed = np.random.default_rng(2), 0.0
        chance = max(way.error for way in self.ways.values()) * generator.standard_normal(200_000)
        for way in self.ways.values():
            estimates = way.error * np.sqrt(generator.chisquare(way.df, 200_000) / way.df)
            estimates = np.maximum(estimates, way.least)
            needed = np.maximum(needed, t_within(1 - level, way.df) * estimates)
        return float(np.quantile(needed - chance, POWER))

    def by_bootstrap(self, sums):
        drawn = np.random.default_rng(1).integers(self.n, size=(DRAWS, self.n))
        draws = 100 * np.take_along_axis(sums, drawn, 1).mean(1, dtype=np.float64) / self.pictures
        ends = np.percentile(draws, [100 * LEVEL / 2, 100 - 100 * LEVEL / 2]).tolist()
        tail = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
        return Way(tuple(ends), min(1.0, 2 * (tail + 1) / (DRAWS + 1)), float(draws.std()), 1000)

    def by_seeds(self):
        """t over the seeds; their error is not below that which single answers alone would make."""
        values = self.signs.astype(np.float32)
        rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
        of_answers = float(np.square(rest).sum()) / ((self.n - 1) * (self.pictures - 1))
        of_answers /= self.pictures
        of_seeds = float(self.signs.mean(1).var(ddof=1))
        least = 100 * (of_answers / self.n) ** 0.5
        error = max(100 * (of_seeds / self.n) ** 0.5, least)
        df = self.n - 1
        half = t_within(1 - LEVEL, df) * error
        p = t_test_p(self.difference / error, df) if error else float(self.difference == 0)
        return Way((self.difference - half, self.difference + half), p, error, df, least)

    def __str__(self):
        return f"`{self.arm}` - `{self.reference}`"


def compare(groups):
    """All comparisons for which there are pairs; those of them that are judged; how many are
    planned, {main: count}. Holm's correction is over all that are planned, so it does not depend on
    where the study stops."""
    made, plans = {}, {}
    for row in STUDY:
        for arm in row.arms:
            for reference in references(arm):
                ours, theirs = (groups.get((row.data, row.flags, each), {})
                                for each in (arm, reference))
                seeds = sorted(ours.keys() & theirs.keys())
                pairs = [(ours[seed], theirs[seed]) for seed in seeds]
                for measure in MEASURES:
                    name = row.data, row.flags, arm, reference, measure
                    if pairs and name not in made:
                        made[name] = Comparison(row, arm, reference, measure, pairs)
                    if min(planned(row, arm), planned(row, reference)) >= FEWEST:
                        plans.setdefault(name, is_main(row, measure))
    plans = collections.Counter(plans.values())
    judged = [each for each in made.values() if each.n >= FEWEST]
    for pictures in sorted({each.pictures for each in judged}):
        same = [each for each in judged if each.pictures == pictures]
        sums = drawn_pictures(np.concatenate([each.signs for each in same]), pictures)
        ends = np.cumsum([each.n for each in same])
        for each, part in zip(same, np.split(sums, ends[:-1], axis=1)):
            each.judge(part)
    for main, size in plans.items():
        running, family = 0.0, [each for each in judged if each.main is main]
        for place, each in enumerate(sorted(family, key=lambda each: each.p)):
            running = max(running, min(1.0, (size - place) * each.p))
            each.holm, each.level = running, LEVEL / size
    return list(made.values()), judged, plans


# --- Tables ---------------------------------------------------------------------------------------


def table(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
                     + ["| " + " | ".join(row) + " |" for row in rows])


def spread(values, digits=1):
    values = [value for value in values if value is not None]
    if not values:
        return ""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def where(data, flags):
    return f"{data} `{flags}`" if flags else data


def probability(p):
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


STATISTICS = """\
Differences are in points of percent, paired by seed and by val picture. They speak of other seeds
and other val pictures like these, for this recipe and this one set of train pictures. *n* is the
number of seeds made, of those planned. Comparisons of fewer than {fewest} pairs are shown and not
judged.

HEX is at work only after its warm-up. The first epoch of 12 on shapes is InfoNCE in both arms. So
are the first two of 15 on CIFAR, the first two of 25 on the GPU, and the first six of 60.

The 95 % interval spans two:

- *bootstrap*: {draws} draws of seeds and, crossed with them, of val pictures; percentiles. Of few
  seeds it takes too little variance, of single answers' up to three times too much.
- *seeds*: t over the seeds' differences, with n - 1 degrees of freedom. Their error is not taken
  below that of single answers (of seed and picture together). This way does not know that the val
  pictures are a sample.

Each is an interval by itself, not all of them together. The wider of two is no proof of 95 %,
where the errors of seeds and of val pictures are alike. *p* is the larger one of the same two
tests (two-sided). The tests over ten seeds lean on the normal distribution of their differences:
signs alone could not pass Holm's correction. Three things were decided when runs were known: the
wider of the two ways, then the least error of *seeds*, then the correction over all planned
comparisons. Each of them made intervals wider or p larger.

The main question is `hex` less `infonce` in top-1 on three data sets: {main} comparisons, with
Holm's correction among them. It was fixed when the runs on shapes were known and, of CIFAR, one
earlier pair. CIFAR's runs were looked at after three, four and five seeds. No seed was left out or
added.

All else is exploratory: {planned} comparisons are planned, and {rest} are judged so far. Holm's
correction is among all that are planned, wherever the study stops. Each row was planned before its
own runs. `strong` on shapes was planned when CIFAR's runs were known, and `knobs` because of what
that showed, so the `strong` runs that it is held against were known. Which runs were made first
was chosen as results came in. Comparisons that share an arm share its runs.

*Observed power* is the smallest true difference that both tests would find in {power:.0f} % of
such studies, at the 5 % level / at the first step of Holm's correction. It takes this study's own
errors for the true ones, and an error from three seeds is a rough estimate. So it is no power
analysis made beforehand, and it adds little to the interval. That a difference is not significant
is no evidence that it is 0: the interval says what it may be.
"""


def overview_table(judged):
    """The six arms against each other, a column for each setting in which all six are planned."""
    settings = [(row.data, row.flags) for row in STUDY if row.arms == SIX]
    rows = {}
    for each in judged:
        if each.arm in SIX and each.reference in SIX and each.row[1:3] in settings:
            name = str(each), MEASURES[each.measure][0]
            row = rows.setdefault(name, dict.fromkeys(settings, ""))
            row[each.row[1:3]] = with_interval(each.difference, *each.interval)
    head = "comparison", "", *(where(*each) for each in settings)
    rows = [[*name, *row.values()] for name, row in rows.items()]
    return table(head, rows) + "\n" if rows else ""


def comparison_tables(made, judged, plans):
    families = {word: [each for each in judged if each.main is main]
                for word, main in (("main", True), ("exploratory", False))}
    out = [STATISTICS.format(
        draws=f"{DRAWS:,}", main=len(families["main"]), fewest=FEWEST,
        rest=len(families["exploratory"]), planned=plans[False], power=100 * POWER)]
    for word, family in families.items():
        found = [f"- {each}, {where(*each.row[1:3])}, {MEASURES[each.measure][0]}: "
                 f"{each.difference:+.2f}" for each in family if each.holm < LEVEL]
        out.append("\n".join([f"**{len(found)} of {len(family)} {word} comparisons are significant "
                              "after the correction.**\n", *found, ""]))
    head = ("data", "comparison", "", "n", "difference", "95 % interval", *WAYS, "p", "Holm",
            "observed power")
    for part in dict.fromkeys(each.row.part for each in made):
        rows = []
        for each in made:
            if each.row.part == part:
                measure = MEASURES[each.measure][0] + " (main)" * each.main
                row = [where(*each.row[1:3]), str(each), measure,
                       f"{each.n} / {planned(each.row, each.arm)}", f"{each.difference:+.2f}"]
                if each.holm is not None:
                    row += [f"**{each.interval[0]:+.2f} to {each.interval[1]:+.2f}**"]
                    row += ["{:+.2f} to {:+.2f}".format(*each.ways[name].interval) for name in WAYS]
                    row += [probability(each.p), probability(each.holm),
                            " / ".join(f"{each.observed_power(level):.2f}"
                                       for level in (LEVEL, each.level))]
                rows.append(row + [""] * (len(head) - len(row)))
        out.append(f"#### {part}\n\n{table(head, rows)}\n")
    return "\n".join(out)


def half_width(one, other):
    """Of the 95 % interval of the sum or difference of two independent ones: by Welch, the wider
    way's."""
    halves = []
    for name in WAYS:
        ways = one.ways[name], other.ways[name]
        squares = [way.error ** 2 for way in ways]
        df = sum(squares) ** 2 / sum(each ** 2 / way.df for each, way in zip(squares, ways))
        halves.append(t_within(1 - LEVEL, df) * math.sqrt(sum(squares)))
    return max(halves)


def with_interval(value, low, high):
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def repetition_table(judged):
    """The main comparisons beside the same on other pictures: do the two agree?"""
    first = {(each.row.data, each.measure): each for each in judged if each.row.part in MAIN}
    rows = []
    for other in judged:
        one = first.get((other.row.data.removesuffix(OTHER), other.measure))
        if other.row.data.endswith(OTHER) and one:
            row = [where(*one.row[1:3]), MEASURES[one.measure][0], f"{one.n}, {other.n}"]
            row += [with_interval(each.difference, *each.interval) for each in (one, other)]
            half = half_width(one, other)
            for value, width in ((other.difference - one.difference, half),
                                 ((one.difference + other.difference) / 2, half / 2)):
                row.append(with_interval(value, value - width, value + width))
            rows.append(row)
    head = ("data", "", "n", "first pictures", "other pictures", "gap", "mean of the two")
    return table(head, rows) + "\n" if rows else ""


def classes_table(judged):
    """Against infonce: where H holds the anchor's class beside where it holds others."""
    index = {(*each.row[1:3], each.arm, each.measure): each
             for each in judged if each.reference == "infonce"}
    rows = []
    for arm, measure in itertools.product((PAIR[1], STRONG[1]), MEASURES):
        of = [index.get((*each, arm, measure)) for each in TRAINED]
        if None not in of:
            own, *others = of
            row = [f"`{arm}`", MEASURES[measure][0], ", ".join(str(each.n) for each in of)]
            row += [with_interval(each.difference, *each.interval) for each in of]
            for other in others:
                gap, half = other.difference - own.difference, half_width(own, other)
                row.append(with_interval(gap, gap - half, gap + half))
            rows.append(row)
    names = [data for data, _ in TRAINED]
    head = ("arm", "", "n", *names, *(f"{name} less {names[0]}" for name in names[1:]))
    return table(head, rows) + "\n" if rows else ""


def doses_table(judged, groups, mechanism):
    """Arms of hex, the nearest to infonce first: what the mechanism's batch says of each, and what
    it did."""
    batch = {(*key(line)[:3], *(line[name] for name in SETTINGS)): line
             for line in mechanism if line["kind"] == "batch"}
    rows = {}
    for each in judged:
        data, flags = each.row[1:3]
        if each.reference == "infonce" and each.arm.startswith("hex") and (data, flags) in TRAINED:
            config = next(iter(groups[data, flags, each.arm].values()))["config"]
            line = batch.get((data, flags, "infonce", *(config[name] for name in SETTINGS)))
            if line:
                row = rows.setdefault((data, -line["gradient_cosine"], each.arm), [
                    where(data, flags), f"`{each.arm}`", f"{line['gradient_cosine']:.4f}",
                    f"{line['share_hex']:.2f}", f"{line['same_hex']:.2f}", f"{line['purity']:.2f}",
                    str(each.n)])
                row.append(with_interval(each.difference, *each.interval))
    order = [data for data, _ in TRAINED]
    head = ("data", "arm", "cosine", "H's share", "same class, by share", "same class, by number",
            "n", *(name for name, _ in MEASURES.values()))
    rows = [rows[name] for name in sorted(rows, key=lambda name: (order.index(name[0]), name))]
    return table(head, rows) + "\n" if rows else ""


def run_table(groups, gpu=False):
    rows, shown = [], [row for row in STUDY if (row.flags == GPU) is gpu]
    names = dict.fromkeys((row.data, row.flags, arm) for row in shown for arm in row.arms)
    for data, flags, arm in names:
        lines = [line for _, line in sorted(groups.get((data, flags, arm), {}).items())]
        if not lines:
            continue
        last = [line["epochs"][-1] for line in lines if line["epochs"]]
        row = [where(data, flags), f"`{arm}`", str(len(lines))]
        row += [spread(line["probe"][name] for line in lines) for name in ("top1", "knn")]
        row.append(spread(max(line["probe"]["holdout"].values()) for line in lines))
        if arm == "pixels":
            last = []
        for name, digits in (("rankme", 1), ("threshold", 3), ("local", 1), ("purity", 2),
                             ("chance", 2), ("step_empty", 2), ("step_clamped", 2)):
            values = [each[name] for each in last if each.get(name) is not None]
            row.append(f"{mean(values):.{digits}f}" if values else "")
        rows.append([*row, spread((line["seconds"] for line in lines), 0)])
    head = ("data", "arm", "n", "top-1", "k-NN", "holdout", "RankMe", "eps", "mean H", "same class",
            "chance", "empty", "floor", "seconds")
    return table(head, rows) + "\n" if rows else ""


def at_epochs(groups, data, flags, arm, name, seeds):
    """[[of each seed], after each epoch]; None where one has none."""
    runs = [groups[data, flags, arm][seed]["epochs"] for seed in seeds]
    values = [[run[i].get(name) for run in runs] for i in range(min(map(len, runs)))]
    return [None if None in each else each for each in values]


def common_seeds(groups, data, flags, arms):
    return sorted(set.intersection(*(set(groups.get((data, flags, arm), {})) for arm in arms)))


class Uniform:
    """The threshold of points spread uniformly on the sphere in D dimensions, interpolated in
    log D."""

    def __init__(self, mechanism, quantile):
        self.quantile = quantile
        found = [line for line in mechanism
                 if line["kind"] == "uniform" and line["quantile"] == quantile]
        self.known = bool(found)
        if found:
            points = sorted((int(d), eps) for d, eps in found[0]["thresholds"].items())
            self.log_d = np.log([d for d, _ in points])
            self.eps = np.array([eps for _, eps in points])

    def threshold(self, dimension):
        return float(np.interp(np.log(max(dimension, 1)), self.log_d, self.eps))

    def dimension(self, threshold):
        if not self.eps[-1] <= threshold <= self.eps[0]:
            return "beyond the simulated"
        return f"{np.exp(np.interp(threshold, self.eps[::-1], self.log_d[::-1])):.1f}"


def paired_over_seeds(ours, theirs, digits):
    """Mean difference, and the half width of its t interval over seeds where there are enough."""
    gaps = [one - other for one, other in zip(ours, theirs)]
    if len(gaps) < FEWEST:
        return f"{mean(gaps):+.{digits}f}"
    half = t_within(1 - LEVEL, len(gaps) - 1) * stdev(gaps) / math.sqrt(len(gaps))
    return f"{mean(gaps):+.{digits}f} ± {half:.{digits}f}"


def spread_table(groups):
    """Against infonce, at the end: how far the features and embeddings are spread, whose H's
    members are."""
    rows, settings = [], dict.fromkeys((row.data, row.flags) for row in STUDY)
    for (data, flags), arm in itertools.product(settings, (PAIR[1], STRONG[1])):
        seeds = common_seeds(groups, data, flags, (PAIR[0], arm))
        if len(seeds) < FEWEST:
            continue
        name = data + " on a GPU" if flags == GPU else where(data, flags)
        row = [name, f"`{arm}`", str(len(seeds))]
        for name, digits in (("rankme", 1), ("std", 3), ("purity", 3)):
            theirs, ours = (at_epochs(groups, data, flags, each, name, seeds)[-1]
                            for each in (PAIR[0], arm))
            if name == "purity" and arm != PAIR[1]:         # at another quantile: another H
                row += ["", ""]
            else:
                row += [f"{mean(theirs):.{digits}f}",
                        paired_over_seeds(ours, theirs, max(2, digits))]
        rows.append(row)
    head = ("data", "arm", "n", "RankMe, infonce", "difference", "std, infonce", "difference",
            "same class, infonce", "difference")
    return table(head, rows) + "\n" if rows else ""


def threshold_table(groups, uniform):
    rows = []
    for data, flags in TRAINED:
        if not (seeds := common_seeds(groups, data, flags, PAIR)):
            continue
        infonce, ours = (at_epochs(groups, data, flags, arm, "threshold", seeds)
                         for arm in PAIR)
        last = min(len(infonce), len(ours)) - 1
        for epoch in sorted({0, round(last / 4), round(last / 2), last}):
            if infonce[epoch] and ours[epoch]:
                rows.append([where(data, flags), str(len(seeds)), str(epoch),
                             f"{mean(infonce[epoch]):.3f}", f"{mean(ours[epoch]):.3f}",
                             paired_over_seeds(ours[epoch], infonce[epoch], 4),
                             uniform.dimension(mean(infonce[epoch]))])
    head = ("data", "n", "epoch", "eps, infonce", "eps, hex", "difference, 95 %", "D of eps")
    return table(head, rows) + "\n" if rows else ""


def uniformity_table(mechanism, uniform):
    rows, seen = [], set()
    for line in mechanism:
        fits = line["kind"] == "batch" and line["quantile"] == uniform.quantile
        if fits and key(line) not in seen:
            seen.add(key(line))
            alone = uniform.threshold(line["dimension"])
            rows.append([where(line["data"], line["flags"]), f"`{line['arm']}`",
                         f"{line['dimension']:.1f}", f"{alone:.3f}", f"{line['threshold']:.3f}"])
    head = ("data", "trained by", "D", "eps of uniform points in D", "eps")
    return table(head, rows) + "\n" if rows else ""


def mechanism_tables(mechanism):
    batch = [line for line in mechanism if line["kind"] == "batch"]
    index = {(*key(line)[:3], *(line[name] for name in SETTINGS)): line for line in batch}
    trained, rows, out = list(dict.fromkeys(key(line)[:3] for line in batch)), [], []
    for group in trained:
        for quantile in SETTINGS["quantile"]:
            lines = [index.get((*group, tau, quantile, 1, 0.1)) for tau in SETTINGS["temperature"]]
            if None not in lines:
                row = [f"{lines[0][name]:.3f}"
                       for name in ("threshold", "local", "purity", "chance")]
                row += [f"{line['share_infonce']:.3f}" for line in lines]
                rows.append([where(*group[:2]), f"`{group[2]}`", f"{quantile}", *row])
    if not rows:
        return ""
    shares = [f"its share, tau {tau}" for tau in SETTINGS["temperature"]]
    head = ("data", "trained by", "q", "eps", "mean H", "same class", "chance", *shares)
    out.append("What H(i) is, and which share of InfoNCE's denominator it has, by temperature:\n\n"
               f"{table(head, rows)}\n")
    for line in batch:
        r, cosine = line["gradient_ratio"], line["gradient_cosine"]
        line["apart"] = math.sqrt(max(0, 1 + r * r - 2 * r * cosine))
    figures = dict(share_hex=3, same_hex=2, clamped=2,      # with so many digits
                   gradient_cosine=4, gradient_ratio=2, apart=3)
    head = ("tau", "q", "tau_plus", "share, InfoNCE", "share, HEX", "same class", "floor", "cosine",
            "ratio", "apart")
    outer = [SETTINGS[name] for name in ("temperature", "quantile", "tau_plus")]
    betas = " / ".join(map(str, SETTINGS["beta"]))
    for group in trained:
        rows = []
        for tau, quantile, tau_plus in itertools.product(*outer) if group[2] == "infonce" else ():
            lines = [index.get((*group, tau, quantile, beta, tau_plus))
                     for beta in SETTINGS["beta"]]
            if None not in lines:
                rows.append([f"{tau}", f"{quantile}", f"{tau_plus}",
                             f"{lines[0]['share_infonce']:.3f}"]
                            + [" / ".join(f"{line[name]:.{digits}f}" for line in lines)
                               for name, digits in figures.items()])
        if rows:
            lines = [line for line in batch if key(line)[:3] == group]
            least = min(lines, key=lambda line: line["gradient_cosine"])
            out.append(f"{where(*group[:2])}, trained by `{group[2]}`; in a cell: beta {betas}\n\n"
                       f"{table(head, rows)}\n\n"
                       f"The least cosine: {least['gradient_cosine']:.4f}, at "
                       + ", ".join(f"{name} {least[name]}" for name in SETTINGS) + ".\n")
    return "\n".join(out)


# What of performance.jsonl is shown: part, figures, and which is held against which.
RATIOS = (("loss", "ms", "hex_nce", "lightly"), ("loss", "ms", "info_nce", "lightly"),
          ("loss", "ms", "hex_nce", "solo_learn"), ("loss", "ms", "hex_nce", "authors"),
          ("memory", "floats", "hex_nce", "info_nce"), ("lars", "ms", "lars", "sgd"),
          ("data", "ms", "ours", "decode"), ("data", "ms", "pil", "ours"))


def performance_table(lines):
    """A row for each thing and each hex.py that was timed."""
    rows = []
    for part, unit, one, other in RATIOS:
        for of, code in dict.fromkeys((line["of"], line["code"]) for line in lines
                                      if line["part"] == part):
            runs = [line[unit] for line in lines
                    if (line["part"], line["of"], line["code"]) == (part, of, code)]
            ratios = sorted(median(run[one]) / median(run[other]) for run in runs)
            shown = f"{ratios[0]:.2f}" + (f" to {ratios[-1]:.2f}" if len(ratios) > 1 else "")
            both = " / ".join(f"{median(median(run[name]) for run in runs):.4g}"
                              for name in (one, other))
            rows.append([part, of, f"{one} / {other}", f"**{shown}**", both, str(len(runs)),
                         str(len(runs[0][one])), f"`{code[:8]}`"])
    head = ("", "of", "ratio", "of medians", "medians", "runs", "turns", "`hex.py`")
    return table(head, rows) + "\n" if rows else ""


# What is shown of a run that was made again: title, digits, and how a line has it.
AGAIN_FIGURES = (("top-1, %", 2, lambda line: line["probe"]["top1"]),
                 ("k-NN, %", 2, lambda line: line["probe"]["knn"]),
                 ("last loss", 4, lambda line: line["epochs"][-1]["step_loss"]),
                 ("threshold", 4, lambda line: line["epochs"][-1]["threshold"]))


def again_table(pairs):
    """Runs of the former hex.py beside the same runs by the new one."""
    rows = []
    for before, now in pairs:
        row = [where(now["data"], now["flags"]), f"`{now['arm']}`", str(now["seed"]),
               name_of(before["code"])]
        for _, digits, figure in AGAIN_FIGURES:
            one, other = figure(before), figure(now)
            row.append(f"{one:.{digits}f} / {other:.{digits}f} ({other - one:+.{digits}f})")
        unlike = int((right(before, "top1") != right(now, "top1")).sum())
        rows.append([*row, f"{unlike} of {now['probe']['val']}"])
    head = ("data", "arm", "seed", "former `hex.py`", *(title for title, *_ in AGAIN_FIGURES),
            "answers that differ")
    return table(head, rows) + "\n" if rows else ""


# --- What README.md shows -------------------------------------------------------------------------


def setting(data, flags):
    """A setting in few words."""
    data = data.replace("cifar", "CIFAR-").replace(OTHER, ", other pictures")
    if flags == GPU:
        return f"{data}, resnet18, 25 epochs on a GPU"
    return ", ".join([data, *(flag.strip() for flag in flags.split("--")[1:])])


def main_table(judged, groups):
    """hex, and hex far from its defaults, less infonce: SimCLR in all settings."""
    index = {(*each.row[1:3], each.arm, each.measure): each
             for each in judged if each.reference == "infonce"}
    rows, settings = [], dict.fromkeys([*TRAINED, *((row.data, row.flags) for row in STUDY)])
    for arm, (data, flags) in itertools.product((PAIR[1], STRONG[1]), settings):
        both = [index.get((data, flags, arm, measure)) for measure in MEASURES]
        if None in both or "--method" in flags:
            continue
        top1, knn = both
        seeds = common_seeds(groups, data, flags, (PAIR[0], arm))
        levels = [spread([groups[data, flags, each][seed]["probe"]["top1"] for seed in seeds])
                  for each in (arm, PAIR[0])]
        found = [with_interval(each.difference, *each.interval) for each in (top1, knn)]
        if top1.main:
            found[0] = f"**{found[0]}**"
        rows.append([setting(data, flags), f"`{arm}`", str(top1.n), *levels, *found])
    head = ("setting", "arm", "n", "top-1", "of `infonce`", "difference in top-1",
            "difference in k-NN")
    return table(head, rows) if rows else "No runs yet."


def again_words(pairs):
    if not pairs:
        return ""
    most = [max(abs(figure(before) - figure(now)) for before, now in pairs)
            for _, _, figure in AGAIN_FIGURES]
    return (f"{len(pairs)} of the runs were made again by the new hex.py, "
            f"{name_of(pairs[0][1]['code'])}. From the former's they differ by at most "
            f"{most[0]:.2f} points in top-1, {most[1]:.2f} in k-NN, {most[2]:.4f} in the last loss "
            f"and {most[3]:.4f} in the threshold "
            "([table](tables.md#made-again-by-the-new-hexpy)).")


def at_full_length(lines):
    """The seconds of all these runs. One without a time takes an epoch's mean of the timed runs of
    the same data and method; where there are none, None."""

    def alike(line):
        config = line["config"]
        return line["data"], config["method"], config["probe_epochs"], config["epochs"] > 0

    def epochs(line):
        return max(1, line["config"]["epochs"])

    paces, total = {}, 0.0
    for line in lines:
        if line["seconds"]:
            paces.setdefault(alike(line), []).append(line["seconds"] / epochs(line))
    for line in lines:
        if not line["seconds"] and alike(line) not in paces:
            return None
        total += line["seconds"] or epochs(line) * mean(paces[alike(line)])
    return total


def cost_words(lines):
    """The time of all raw lines that have one, and of all."""
    words = []
    for name, is_on in (("CPU", lambda device: device != "cuda"),
                        ("GPU", lambda device: device == "cuda")):
        of_kind = [line for line in lines if is_on(line["machine"]["device"])]
        seconds = [line["seconds"] for line in of_kind]
        timed = [each for each in seconds if each]
        if not seconds:
            continue
        words.append(f"{len(seconds)} lines of runs.jsonl are of runs on a {name}.")
        total = f"{sum(timed):,} seconds: {sum(timed) / 3600:.1f}"
        if name == "CPU":
            words.append(f"{len(timed)} of them have a time, in all {total} hours of one thread.")
        else:
            words.append(f"{len(timed)} have a time, in all {total} hours. Ten ran side by side, "
                         "so the GPU was in use for about a tenth of that.")
        if len(timed) < len(seconds):
            words.append(f"{len(seconds) - len(timed)} have none, since a run was resumed or read "
                         "its augmented batches from a disk.")
            total = at_full_length(of_kind)
            if total:
                words.append("At the pace of the timed runs of the same data and method, all would "
                             f"take {total / 3600:.0f} hours.")
    return "\n".join(words) or "No runs yet."


# --- Plots ----------------------------------------------------------------------------------------


def color_of(arm):
    return COLORS[SIX.index(arm) if arm in SIX else -1]


def draw_differences(judged):
    """Top-1 against infonce: the difference and its interval, of every row of the study but those
    of base."""
    chosen = [each for each in judged
              if each.measure == "top1" and each.reference == "infonce" and each.arm != "base"]
    if not chosen:
        return None
    picture, left, right_end, top = Picture(900, 70 + 20 * len(chosen)), 480, 880, 34
    bottom = top + 20 * len(chosen)
    reach = min(12.0, 1.05 * max(abs(end) for each in chosen for end in each.interval)) or 1.0
    to_x = axis(-reach, reach, left, right_end)
    title = "top-1 less that of infonce, points; 95 % intervals, cut off at the edge"
    picture.text(10, 14, title, 13)
    for each in ticks(-reach, reach, 9):
        color = INK if abs(each) < 1e-9 else PALE
        picture.line([(to_x(each), top), (to_x(each), bottom)], color, 1)
        number = f"{round(each, 6):+g}" if abs(each) > 1e-9 else "0"
        picture.text(to_x(each), bottom + 12, number, 11, GRAY, "mm")
    for i, each in enumerate(chosen):
        y, color = top + 10 + 20 * i, color_of(each.arm)
        picture.text(10, y, f"{each.row.data} {each.row.flags}".strip(), 11, GRAY)
        picture.text(left - 40, y, each.arm, 11, color, "rm")
        picture.text(left - 8, y, f"n {each.n}", 11, GRAY, "rm")
        low, high = (min(max(end, -reach), reach) for end in each.interval)
        picture.line([(to_x(low), y), (to_x(high), y)], color, 2)
        if abs(each.difference) <= reach:
            picture.dot(to_x(each.difference), y, color)
    picture.save(os.path.join(HERE, "differences.png"))
    return "differences.png"


def draw_arms(groups):
    """Top-1 of each seed, the same seeds for all arms of a panel; a bar at their mean."""
    panels = [(*each, seeds) for each in TRAINED if (seeds := common_seeds(groups, *each, SIX))]
    if not panels:
        return None
    width, height = 350, 260
    picture = Picture(width * len(panels), height)
    for place, (data, flags, seeds) in enumerate(panels):
        left, right_end, top, bottom = place * width + 44, (place + 1) * width - 10, 30, height - 46
        values = {arm: [groups[data, flags, arm][seed]["probe"]["top1"] for seed in seeds]
                  for arm in SIX}
        flat = [value for each in values.values() for value in each]
        margin = 0.1 * (max(flat) - min(flat)) or 1
        to_y = axis(min(flat) - margin, max(flat) + margin, bottom, top)
        picture.text(left, 14, f"{data} {flags}, top-1, n {len(seeds)}", 12)
        for each in ticks(min(flat) - margin, max(flat) + margin):
            picture.line([(left, to_y(each)), (right_end, to_y(each))], PALE, 1)
            picture.text(left - 5, to_y(each), f"{round(each, 6):g}", 11, GRAY, "rm")
        for i, (arm, each) in enumerate(values.items()):
            x = left + (i + 0.5) * (right_end - left) / len(SIX)
            picture.line([(x - 14, to_y(mean(each))), (x + 14, to_y(mean(each)))], color_of(arm), 3)
            for turn, value in enumerate(each):
                at = x + 16 * (turn / max(1, len(each) - 1) - 0.5)
                picture.dot(at, to_y(value), color_of(arm), 2)
            for line, words in enumerate(arm.split(" --")):
                picture.text(x, bottom + 12 + 13 * line, words, 9, color_of(arm), "mm")
    picture.save(os.path.join(HERE, "arms.png"))
    return "arms.png"


def draw_curves(groups):
    """Threshold, purity, k-NN over epochs, infonce and hex: means over the seeds that both have."""
    shown = [(*each, seeds) for each in TRAINED if (seeds := common_seeds(groups, *each, PAIR))]
    if not shown:
        return None
    width, height = 300, 200
    picture = Picture(3 * width, height * len(shown) + 80)
    for i, (data, flags, seeds) in enumerate(shown):
        curve = {(arm, name): [(epoch, each and mean(each)) for epoch, each in enumerate(
                     at_epochs(groups, data, flags, arm, name, seeds))]
                 for arm in PAIR for name in ("threshold", "purity", "chance", "knn")}
        series = {name: [(curve[arm, name], color_of(arm), False) for arm in PAIR]
                  for name in ("threshold", "purity", "knn")}
        series["purity"].append((curve["infonce", "chance"], GRAY, True))
        titles = (f"{data}, n {len(seeds)}: threshold", "same-class share of H",
                  "k-NN on a subset, %")
        for column, (title, lines) in enumerate(zip(titles, series.values())):
            x, y = column * width, i * height
            panel(picture, (x, y, x + width, y + height), title, lines)
    legend(picture, 44, height * len(shown) + 16, [
        *((arm, color_of(arm), False) for arm in PAIR),
        ("by chance", GRAY, True)])
    picture.save(os.path.join(HERE, "curves.png"))
    return "curves.png"


# --- The command ----------------------------------------------------------------------------------


def provenance(lines, words):
    if not lines:
        return "No runs yet.\n"
    counts = collections.Counter()
    for line in lines:
        machine = {"card": "CPU"} | line["machine"]
        counts["on {card}: {cpu}, {threads} thread".format(**machine)] += 1
        versions = (f"{name} {version}" for name, version in line["versions"].items())
        counts["with " + ", ".join(versions)] += 1
    counted = (f"- {count} {name}" for name, count in sorted(counts.items()))
    return "\n".join([words, "", *counted, ""])


OVERVIEW_TEXT = """\
Differences are in points, with 95 % intervals. Seeds, p, Holm's correction, and what they mean
stand under Differences. A cell is empty where there are fewer than {fewest} seeds.
"""
REPETITION_TEXT = """\
`hex` less `infonce` once more, on other pictures of the same data sets (`pictures.py`). None of
them is among the first, train or val; near-duplicates may be. They are PNG instead of JPEG files,
with {counts}. All else is as before. In brackets are 95 % intervals. Those of the gap between the
two differences, and of their mean, take the two for independent, but they share the seeds, and so
the first weights and the order. They are by t, with degrees of freedom by Welch, the wider of two
ways.
"""
CLASSES_TEXT = """\
This is a hypothesis of the study, put to this table when CIFAR's results were known. HEX helps
where the members of H(i) are of other classes, as hard negatives do, and does not help, or hurts,
where most are of the anchor's. Then the gaps to `shapes` would be above 0. But they are above 0,
too, where HEX hurts on `shapes` and does nothing elsewhere.

Differences are to `infonce`, in points, with 95 % intervals. Those of the gaps are made as for
other pictures. They are not corrected, and not independent of each other: those of one row share
the runs on `shapes`, and the two arms share `infonce`'s. Whose the members are stands under Runs,
as *same class*. The second arm's H is larger, and less of it is of the anchor's class. The data
sets differ in more than that (temperature, level, recipe), and a point is not the same on each.
"""
DOSES_TEXT = """\
Arms of `hex` less `infonce`, in points, with 95 % intervals. Beside them stands what the arm's
settings do on the batch of The mechanism, which another model embeds (trained by `infonce`, seed
0):

- *cosine*: between HEX's and InfoNCE's gradient.
- *H's share*: of the anchor's denominator. It is above 1 where debiasing makes the positive's
  weight negative.
- *same class*: which part of H is of the anchor's class, weighted by that share, and counted.

This was put together when all was known, so it suggests and does not test.
"""
SPREAD_TEXT = """\
Does HEX keep the representation from collapsing? The differences are to `infonce`, after the last
epoch, on pictures of the train split. RankMe is the effective number of dimensions of the
backbone's features. *std* is the standard deviation of the embeddings; 1 is spread over all
dimensions alike. *same class* is of H(i). ± is the half of a 95 % t interval over seeds, paired.
These are not among the comparisons above. They were looked at when all was known, and are not
corrected.
"""
RUN_TEXT = """\
Linear probe and k-NN are on val, and *holdout* is the probe's on its part of train (the best of
nine rates, so a little too high). They are in percent: mean ± standard deviation over n seeds. The
rest are means after the last epoch, on pictures of the train split. eps, mean H and *same class*
are at the arm's own quantile, so they cannot be compared where that differs. *empty* is the share
of anchors without H, and *floor* that of the others whose local term is at its floor, over the
logged steps of the last epoch. Seconds are of the whole run, two side by side. Runs that were
resumed have none, nor those whose augmented batches were kept (`kept_views.py`).

`random` is an untrained backbone, and `pixels` is no backbone.
"""
GPU_TEXT = """\
resnet18 at the cifar recipe's rate (0.4, a linear rise in the first three epochs; HEX from the
third on), fp16, on the same 20,000 pictures, the ten runs side by side. The command, with the
former hex.py: `PYTHONPATH=.results/torch_2_11 python .results/study.py --only gpu --jobs 10
--cifar100 DIR`. Columns are as above, and the comparison is under Differences, gpu.

These runs do not repeat. Two arms of a seed are InfoNCE in the first two epochs, and differ
already, so pairing takes away little variance. They are not to be held against the small recipe's
runs, which have another backbone, other views, fewer epochs and more of the probe.
"""
MECHANISM_TEXT = """\
On one fixed batch of 256 train pictures (512 embeddings), seed 0, after training. Shares are by
autograd: tau dl_i / ds_ij, summed over H(i), is its share of the anchor's denominator. It is 0 at
the floor, and may pass 1 where the positive's weight is negative. *same class*, under HEX, is
which part of that share is of the anchor's class. HEX's gradient in the embeddings is held against
InfoNCE's: *cosine*, *ratio* of the norms, and *apart*, the norm of their difference over that of
InfoNCE's. The models that `hex` trained are in the raw lines.
"""
THRESHOLD_TEXT = """\
On one fixed batch, mean over seeds. The difference is `hex` less `infonce`, with its t interval
over seeds. *D of eps* is the dimension in which 512 points that are spread uniformly on the sphere
have `infonce`'s threshold (simulated: normal deviates, normalized, mean of 20 draws; interpolated
in log D).
"""
UNIFORM_TEXT = """\
On the batch of The mechanism. D is 1 over the mean squared cosine of its negatives; for points
that are spread uniformly on the sphere, that is the dimension. If the spread were all, eps would
be that of uniform points in D dimensions. What is above it is a longer tail: pictures that lie
closer together than the spread makes them.
"""
PERFORMANCE_TEXT = """\
By `peers.py`, one thread, on {cpus}, torch {versions}. The last column is the `code` of hex.py.
The figures are medians over the turns of a run. In a turn all take their turn, so a ratio means
more than a time. Where there are several runs, their least and largest ratio is shown.

- *loss*: forward and backward, D = 128, in milliseconds.
- *memory*: the peak, in n^2 float32.
- *lars*: a step, in milliseconds.
- *data*: milliseconds for all files. *decode* is decoding alone, *ours* two views of 224 pixels,
  and *pil* the same by Pillow with torchvision's transforms. These do the color, too, while ours
  wait for the device.

The peers: solo-learn at 9187ea3, lightly at e8d317f, the authors' HEX at c3002ed. The files are
100 ImageNet photographs, one a class, at their own size.
"""
AGAIN_TEXT = """\
The same commands, by the former hex.py / by the new one. In brackets is the new one's figure less
the former's. *last loss* is the mean over the logged steps of the last epoch, and *threshold* is
eps after it. The last column counts the val pictures that one probe got right and the other did
not. These runs count in no other table.

The new hex.py is {code}.
"""
CHOICE_TEXT = """\
`shapes` shows the mechanism. Its pictures and recipe (temperature, crop, gray, epochs) were chosen
before any loss was compared, by the probe of about two dozen runs, most with `base`, so that a
method learns within minutes. These runs are not in the raw lines.

Batch and rate were chosen last, to lower the spread over seeds, by the probe's holdout of the
train split, for `hex` (seed 1) and `infonce` (seed 2) alike, one run each: `python hex.py
--workers 0 --loss hex --seed 1 --batch-size 128 --lr 1`, one thread, the best `holdout` of
probe.json. In percent:

| batch | rate | `hex` | `infonce` |
|---|---|---|---|
| 256 | 0.5, as before | 74.5 | not run (82.4 and 81.6 at seeds 0 and 1) |
| 256 | 1.0 | 75.7 | 82.8 |
| 128 | 0.5 | 79.2 | 86.5 |
| 128 | 1.0, as it is now | 85.8 | 85.0 |

The small recipe's rate and epochs were looked for with fourteen runs of `hex` at seed 0, by the
tenth of the train split that the probe holds out. val was seen, too. No two losses were compared
in that choice.
"""


def between(text, name, content):
    """The text with this content between the markers of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text or end not in text:
        text += f"\n{begin}\n{end}\n"
    before, rest = text.split(begin, 1)
    content = content and content.rstrip("\n") + "\n"
    return f"{before}{begin}\n{content}{end}{rest.split(end, 1)[1]}"


def main():
    lines, pairs, mechanism, words = load()
    groups, uniform = table_of(lines), Uniform(mechanism, 0.99)
    made, judged, plans = compare(groups)
    parts = ["_Made by `python .results/report.py`; do not edit between the markers._\n",
             provenance(lines, words)]

    def add(title, *texts):
        if texts[-1]:
            parts.extend([f"### {title}\n", *texts])

    def add_plot(name, text):
        if name:
            parts.append(f"![{text}]({name})\n")

    add("The six arms", OVERVIEW_TEXT.format(fewest=FEWEST), overview_table(judged))
    add("Differences", comparison_tables(made, judged, plans) if made else "")
    add_plot(draw_differences(judged), "differences in top-1 with their intervals")
    counts = {line["probe"]["val"] for line in lines if line["data"].endswith(OTHER)}
    counts = " and ".join(f"{count:,}" for count in sorted(counts, reverse=True)) + " val pictures"
    add("On other pictures", REPETITION_TEXT.format(counts=counts), repetition_table(judged))
    add("Where H is of other classes", CLASSES_TEXT, classes_table(judged))
    doses = doses_table(judged, groups, mechanism)
    add("How far a setting goes, and what it did", DOSES_TEXT, doses)
    add("Spread", SPREAD_TEXT, spread_table(groups))
    add("Runs", RUN_TEXT, run_table(groups))
    add_plot(draw_arms(groups), "top-1 of each seed, the same seeds for all arms")
    add("Runs on a GPU", GPU_TEXT, run_table(groups, gpu=True))
    code = name_of(pairs[0][1]["code"]) if pairs else ""
    add("Made again by the new hex.py", AGAIN_TEXT.format(code=code), again_table(pairs))
    add("The mechanism", MECHANISM_TEXT, mechanism_tables(mechanism))
    if uniform.known:
        add("Threshold over epochs", THRESHOLD_TEXT, threshold_table(groups, uniform))
        add("Is it uniformity alone?", UNIFORM_TEXT, uniformity_table(mechanism, uniform))
    add_plot(draw_curves(groups), "threshold, same-class share and k-NN over epochs")
    timed = read_events(PERFORMANCE)
    names = {name: ", ".join(dict.fromkeys(line[key] for line in timed))
             for name, key in (("cpus", "cpu"), ("versions", "torch"))}
    add("Performance", PERFORMANCE_TEXT.format(**names), performance_table(timed))
    add("How the recipes were chosen", CHOICE_TEXT)

    head = "<!-- SPDX-License-Identifier: MIT -->\n# Tables\n\n[The evidence](README.md) in full.\n"
    tables = between(head, "tables", "\n".join(parts))
    with open(README) as file:
        readme = file.read()
    readme = between(readme, "results", main_table(judged, groups))
    readme = between(readme, "again", again_words(pairs))
    readme = between(readme, "cost", cost_words(read_events(RUNS)))
    for path, text in ((TABLES, tables), (README, readme)):
        with open(path, "w") as file:
            file.write(text)
    print(f"tables.md, README.md: {len(lines)} runs, {len(judged)} comparisons")


if __name__ == "__main__":
    main()
