# SPDX-License-Identifier: MIT
"""Every table and plot of .results/README.md, from runs.jsonl and mechanism.jsonl. From the top folder:

    python .results/report.py

Writes what stands between the markers in README.md, and the plots; the same lines give the same bytes.
"""
import collections
import dataclasses
import functools
import itertools
import math
import os
from statistics import mean, median, stdev

import numpy as np
from plot import COLORS, GRAY, INK, PALE, Picture, axis, legend, panel, read_events, ticks
from study import (
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
    TRAINED,
    key,
    kind_of,
    same_numbers,
)

DRAWS, LEVEL, POWER = 40_000, 0.05, 0.8
WAYS = ("bootstrap", "seeds")                           # of reckoning an interval; the report's spans both
OTHER = "-other"                                        # behind the name of a data set: its other pictures
FEWEST = 3                                              # seeds of a comparison that is judged
README, BEGIN, END = os.path.join(HERE, "README.md"), "<!-- tables -->", "<!-- /tables -->"
MEASURES = {"top1": ("top-1", "right"), "knn": ("k-NN", "knn_right")}

# --- Lines --------------------------------------------------------------------------------------------------


def load():
    """The runs of the hex.py that made the last line, and of others with the same numbers; the mechanism's
    lines by the last, too; how they came, in words."""
    lines = read_events(RUNS)
    code = lines[-1]["code"] if lines else None
    same = same_numbers(lines, code)
    counted = sorted((line for line in lines if kind_of(line) in same), key=lambda line: line["code"] == code)
    runs = {key(line): line for line in counted}                            # its own come last, and stay
    mechanism = read_events(MECHANISM)
    mechanism = [line for line in mechanism if line["code"] == mechanism[-1]["code"]]
    own = sum(line["code"] == code for line in counted)
    words = [f"{len(runs)} runs. The `hex.py` of code `{str(code)[:16]}` (`code` in config.json) made {own}."]
    for other in sorted({line["code"] for line in counted} - {code}):
        theirs = {key(line) for line in counted if line["code"] == other}
        both = {key(line) for line in counted if line["code"] == code} & theirs
        words.append(f"`{other[:16]}`, older, made {len(theirs)}; {len(both)} were made by both, with every "
                     "figure equal (lines of an arm and recipe count only where that was so).")
    left = len(lines) - len(counted)
    words += [f"{left} runs of other versions are left out."] if left else []
    if mechanism:
        words.append(f"{len(mechanism)} lines of the mechanism, by `{mechanism[0]['code'][:16]}`.")
    return [*runs.values()], mechanism, " ".join(words)


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
    return max((each.seeds for each in STUDY if each[1:3] == row[1:3] and arm in each.arms), default=0)


def is_main(row, measure):
    return row.part in MAIN and measure == "top1"


def right(line, measure):
    """(pictures,) which val pictures were right, 0 or 1."""
    packed = np.frombuffer(bytes.fromhex(line["probe"][MEASURES[measure][1]]), np.uint8)
    return np.unpackbits(packed, count=line["probe"]["val"])


# --- Statistics ---------------------------------------------------------------------------------------------


@functools.lru_cache(8)
def student(df):
    """A grid of t >= 0 and the share of Student's distribution within +-t (t = sqrt(df) tan(angle))."""
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
    transposed = np.ascontiguousarray(differences.T, np.float32)                # small integers: exact
    for _ in range(DRAWS // 500):
        drawn = generator.integers(pictures, size=(500, pictures)) + pictures * np.arange(500)[:, None]
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
        signs = [right(ours, measure).astype(np.int8) - right(theirs, measure) for ours, theirs in pairs]
        self.signs = np.stack(signs).astype(np.int8)                        # (seeds, pictures): -1, 0 or 1
        self.n, self.pictures = self.signs.shape
        self.difference = 100 * float(self.signs.mean())
        self.p = self.holm = self.level = None
        self.main = is_main(row, measure)

    def judge(self, sums):
        """Intervals, p and what could have been seen, both ways. sums: (DRAWS, n), over drawn pictures."""
        self.ways = dict(zip(WAYS, (self.by_bootstrap(sums), self.by_seeds())))
        lows, highs = zip(*(way.interval for way in self.ways.values()))
        self.interval = min(lows), max(highs)
        self.p = max(way.p for way in self.ways.values())

    def visible(self, level):
        """The smallest true difference that both ways' tests at this level find in a share POWER of studies
        like this one: simulated, the larger error taken for the true one."""
        generator, needed = np.random.default_rng(2), 0.0
        chance = max(way.error for way in self.ways.values()) * generator.standard_normal(200_000)
        for way in self.ways.values():
            estimates = way.error * np.sqrt(generator.chisquare(way.df, 200_000) / way.df)
            needed = np.maximum(needed, t_within(1 - level, way.df) * np.maximum(estimates, way.least))
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
        of_answers = float(np.square(rest).sum()) / ((self.n - 1) * (self.pictures - 1)) / self.pictures
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
    """All comparisons for which there are pairs; those of them that are judged; how many are planned, {main:
    count}. Holm's correction is over all that are planned, so it does not depend on where the study stops."""
    made, plans = {}, {}
    for row in STUDY:
        for arm in row.arms:
            for reference in references(arm):
                ours, theirs = (groups.get((row.data, row.flags, each), {}) for each in (arm, reference))
                pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
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


# --- Tables -------------------------------------------------------------------------------------------------


def table(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
                     + ["| " + " | ".join(row) + " |" for row in rows])


def spread(values, digits=1):
    values = [value for value in values if value is not None]
    if not values:
        return ""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def where(data, flags):
    return f"{data} `{flags}`" if flags else data


def probability(p):
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


STATISTICS = """\
Differences in points of percent, paired by seed and by val picture. They speak of other seeds and other val
pictures like these, for this recipe and this one set of train pictures. n: seeds made of seeds planned.
Fewer than {fewest} pairs are shown and not judged. HEX is at work only after its warm-up: the first epoch
of 12 on shapes, the first two of 15 on CIFAR (on the GPU of 25; of 60, the first six) are InfoNCE in both
arms. The 95 % interval spans two:

- *bootstrap*: {draws} draws of seeds and, crossed with them, of val pictures; percentiles. Of few seeds it
  takes too little variance, of single answers' up to three times too much.
- *seeds*: t over the seeds' differences, n - 1 degrees of freedom; their error is not taken below that of
  single answers (of seed and picture together). It does not know that the val pictures are a sample.

Each is an interval by itself, not all of them together. p is the larger of the same two tests' (two-sided).
The wider of two is no proof of 95 %, where the errors of seeds and of val pictures are alike. Ten seeds'
tests lean on the normal distribution of their differences: signs alone could not pass Holm's correction. To
take the wider of two ways, then the least error of *seeds*, then all planned comparisons was decided when
runs were known; each made intervals wider or p larger.

The main question is `hex` against `infonce` in top-1 on three data sets ({main}, Holm's correction among
them). It was fixed when shapes' runs were known and, of CIFAR, one earlier pair; CIFAR's was looked at after
three, four and five seeds, and no seed was left out or added. All else is exploratory: {planned} comparisons
are planned, {rest} judged so far, and Holm's correction is among all that are planned, wherever the study
stops. Each row was planned before its own runs: `strong` on shapes when CIFAR's were known, `knobs` because
of what that showed, so the `strong` runs that it is held against were known. Comparisons that share an arm
share its runs. Which were made first was chosen as results came in. *Could have seen*: roughly the
smallest true difference that both tests find in {power:.0f} % of such studies, at the 5 % level / at the
first step of Holm's, if the true errors are those estimated here, and an error from three seeds is a rough
estimate. That a difference is not significant is no evidence that it is 0: the interval says what it may be.
"""


def overview_table(judged):
    """The six arms against each other, a column for each setting in which all six are planned."""
    settings = [(row.data, row.flags) for row in STUDY if row.arms == SIX]
    rows = {}
    for each in judged:
        if each.arm in SIX and each.reference in SIX and each.row[1:3] in settings:
            row = rows.setdefault((str(each), MEASURES[each.measure][0]), dict.fromkeys(settings, ""))
            row[each.row[1:3]] = with_interval(each.difference, *each.interval)
    head = "comparison", "", *(where(*each) for each in settings)
    return table(head, [[*name, *row.values()] for name, row in rows.items()]) + "\n" if rows else ""


def comparison_tables(made, judged, plans):
    families = {word: [each for each in judged if each.main is main]
                for word, main in (("main", True), ("exploratory", False))}
    out = [STATISTICS.format(draws=f"{DRAWS:,}", main=len(families["main"]), fewest=FEWEST,
                             rest=len(families["exploratory"]), planned=plans[False], power=100 * POWER)]
    for word, family in families.items():
        found = [f"- {each}, {where(*each.row[1:3])}, {MEASURES[each.measure][0]}: {each.difference:+.2f}"
                 for each in family if each.holm < LEVEL]
        out.append("\n".join([f"**{len(found)} of {len(family)} {word} comparisons are significant after "
                              "the correction.**\n", *found, ""]))
    head = ("data", "comparison", "", "n", "difference", "95 % interval", *WAYS, "p", "Holm",
            "could have seen")
    for part in dict.fromkeys(each.row.part for each in made):
        rows = []
        for each in made:
            if each.row.part == part:
                row = [where(*each.row[1:3]), str(each), MEASURES[each.measure][0] + " (main)" * each.main,
                       f"{each.n} / {planned(each.row, each.arm)}", f"{each.difference:+.2f}"]
                if each.holm is not None:
                    row += [f"**{each.interval[0]:+.2f} to {each.interval[1]:+.2f}**"]
                    row += ["{:+.2f} to {:+.2f}".format(*each.ways[name].interval) for name in WAYS]
                    row += [probability(each.p), probability(each.holm),
                            f"{each.visible(LEVEL):.2f} / {each.visible(each.level):.2f}"]
                rows.append(row + [""] * (len(head) - len(row)))
        out.append(f"#### {part}\n\n{table(head, rows)}\n")
    return "\n".join(out)


def half_width(one, other):
    """Of the 95 % interval of the sum or difference of two independent ones: by Welch, the wider way's."""
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
    index = {(*each.row[1:3], each.arm, each.measure): each for each in judged if each.reference == "infonce"}
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
    """Arms of hex, the nearest to infonce first: what the mechanism's batch says of each, and what it did."""
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
    head = ("data", "arm", "cosine", "H's share", "same class, by share", "same class, by number", "n",
            *(name for name, _ in MEASURES.values()))
    rows = [row for _, row in sorted(rows.items(), key=lambda item: (order.index(item[0][0]), item[0]))]
    return table(head, rows) + "\n" if rows else ""


def run_table(groups, gpu=False):
    rows, shown = [], [row for row in STUDY if (row.flags == GPU) is gpu]
    for data, flags, arm in dict.fromkeys((row.data, row.flags, arm) for row in shown for arm in row.arms):
        lines = [line for _, line in sorted(groups.get((data, flags, arm), {}).items())]
        if not lines:
            continue
        last = [line["epochs"][-1] for line in lines if line["epochs"]]
        row = [where(data, flags), f"`{arm}`", str(len(lines))]
        row += [spread(line["probe"][name] for line in lines) for name in ("top1", "knn")]
        row.append(spread(max(line["probe"]["holdout"].values()) for line in lines))
        if arm == "pixels":
            last = []
        for name, digits in (("rankme", 1), ("threshold", 3), ("local", 1), ("purity", 2), ("chance", 2),
                             ("step_empty", 2), ("step_clamped", 2)):
            values = [each[name] for each in last if each.get(name) is not None]
            row.append(f"{mean(values):.{digits}f}" if values else "")
        rows.append([*row, spread((line["seconds"] for line in lines), 0)])
    head = ("data", "arm", "n", "top-1", "k-NN", "holdout", "RankMe", "eps", "mean H", "same class", "chance",
            "empty", "floor", "seconds")
    return table(head, rows) + "\n" if rows else ""


def at_epochs(groups, data, flags, arm, name, seeds):
    """[[of each seed], after each epoch]; None where one has none."""
    runs = [groups[data, flags, arm][seed]["epochs"] for seed in seeds]
    values = [[run[i].get(name) for run in runs] for i in range(min(map(len, runs)))]
    return [None if None in each else each for each in values]


def common_seeds(groups, data, flags, arms):
    return sorted(set.intersection(*(set(groups.get((data, flags, arm), {})) for arm in arms)))


class Uniform:
    """The threshold of points spread uniformly on the sphere in D dimensions; interpolated in log D."""

    def __init__(self, mechanism, quantile):
        self.quantile = quantile
        found = [line for line in mechanism if line["kind"] == "uniform" and line["quantile"] == quantile]
        self.known = bool(found)
        if found:
            points = sorted((int(d), eps) for d, eps in found[0]["thresholds"].items())
            self.log_d, self.eps = np.log([d for d, _ in points]), np.array([eps for _, eps in points])

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
    """Against infonce, at the end: how far the features and embeddings are spread, whose H's members are."""
    rows = []
    for (data, flags), arm in itertools.product(dict.fromkeys((row.data, row.flags) for row in STUDY),
                                                (PAIR[1], STRONG[1])):
        seeds = common_seeds(groups, data, flags, (PAIR[0], arm))
        if len(seeds) < FEWEST:
            continue
        row = [data + " on a GPU" if flags == GPU else where(data, flags), f"`{arm}`", str(len(seeds))]
        for name, digits in (("rankme", 1), ("std", 3), ("purity", 3)):
            theirs, ours = (at_epochs(groups, data, flags, each, name, seeds)[-1] for each in (PAIR[0], arm))
            if name == "purity" and arm != PAIR[1]:                     # at another quantile: another H
                row += ["", ""]
            else:
                row += [f"{mean(theirs):.{digits}f}", paired_over_seeds(ours, theirs, max(2, digits))]
        rows.append(row)
    head = ("data", "arm", "n", "RankMe, infonce", "difference", "std, infonce", "difference",
            "same class, infonce", "difference")
    return table(head, rows) + "\n" if rows else ""


def threshold_table(groups, uniform):
    rows = []
    for data, flags in TRAINED:
        if not (seeds := common_seeds(groups, data, flags, PAIR)):
            continue
        infonce, ours = (at_epochs(groups, data, flags, arm, "threshold", seeds) for arm in PAIR)
        last = min(len(infonce), len(ours)) - 1
        for epoch in sorted({0, round(last / 4), round(last / 2), last}):
            if infonce[epoch] and ours[epoch]:
                rows.append([where(data, flags), str(len(seeds)), str(epoch), f"{mean(infonce[epoch]):.3f}",
                             f"{mean(ours[epoch]):.3f}", paired_over_seeds(ours[epoch], infonce[epoch], 4),
                             uniform.dimension(mean(infonce[epoch]))])
    head = ("data", "n", "epoch", "eps, infonce", "eps, hex", "difference, 95 %", "D of eps")
    return table(head, rows) + "\n" if rows else ""


def uniformity_table(mechanism, uniform):
    rows, seen = [], set()
    for line in mechanism:
        if line["kind"] == "batch" and line["quantile"] == uniform.quantile and key(line) not in seen:
            seen.add(key(line))
            alone = uniform.threshold(line["dimension"])
            rows.append([where(line["data"], line["flags"]), f"`{line['arm']}`", f"{line['dimension']:.1f}",
                         f"{alone:.3f}", f"{line['threshold']:.3f}"])
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
                row = [f"{lines[0][name]:.3f}" for name in ("threshold", "local", "purity", "chance")]
                row += [f"{line['share_infonce']:.3f}" for line in lines]
                rows.append([where(*group[:2]), f"`{group[2]}`", f"{quantile}", *row])
    if not rows:
        return ""
    shares = [f"its share, tau {tau}" for tau in SETTINGS["temperature"]]
    out.append("What H(i) is, and which share of InfoNCE's denominator it has, by temperature:\n\n" + table(
        ("data", "trained by", "q", "eps", "mean H", "same class", "chance", *shares), rows) + "\n")
    for line in batch:
        r, cosine = line["gradient_ratio"], line["gradient_cosine"]
        line["apart"] = math.sqrt(max(0, 1 + r * r - 2 * r * cosine))
    figures = dict(share_hex=3, same_hex=2, clamped=2, gradient_cosine=4, gradient_ratio=2, apart=3)  # digits
    head = ("tau", "q", "tau_plus", "share, InfoNCE", "share, HEX", "same class", "floor", "cosine", "ratio",
            "apart")
    outer = [SETTINGS[name] for name in ("temperature", "quantile", "tau_plus")]
    betas = " / ".join(map(str, SETTINGS["beta"]))
    for group in trained:
        rows = []
        for tau, quantile, tau_plus in itertools.product(*outer) if group[2] == "infonce" else ():
            lines = [index.get((*group, tau, quantile, beta, tau_plus)) for beta in SETTINGS["beta"]]
            if None not in lines:
                rows.append([f"{tau}", f"{quantile}", f"{tau_plus}", f"{lines[0]['share_infonce']:.3f}"]
                            + [" / ".join(f"{line[name]:.{digits}f}" for line in lines)
                               for name, digits in figures.items()])
        if rows:
            lines = [line for line in batch if key(line)[:3] == group]
            least = min(lines, key=lambda line: line["gradient_cosine"])
            out.append(f"{where(*group[:2])}, trained by `{group[2]}`; in a cell: beta {betas}\n\n"
                       f"{table(head, rows)}\n\nThe least cosine: {least['gradient_cosine']:.4f}, at "
                       + ", ".join(f"{name} {least[name]}" for name in SETTINGS) + ".\n")
    return "\n".join(out)


# What of performance.jsonl is shown: part, figures, and which is held against which.
RATIOS = (("loss", "ms", "hex_nce", "lightly"), ("loss", "ms", "info_nce", "lightly"),
          ("loss", "ms", "hex_nce", "solo_learn"), ("loss", "ms", "hex_nce", "authors"),
          ("memory", "floats", "hex_nce", "info_nce"), ("lars", "ms", "lars", "sgd"),
          ("data", "ms", "ours", "decode"), ("data", "ms", "pil", "ours"))


def performance_table(lines):
    rows = []
    for part, unit, one, other in RATIOS:
        for of in dict.fromkeys(line["of"] for line in lines if line["part"] == part):
            runs = [line[unit] for line in lines if line["part"] == part and line["of"] == of]
            ratios = sorted(median(run[one]) / median(run[other]) for run in runs)
            shown = f"{ratios[0]:.2f}" + (f" to {ratios[-1]:.2f}" if len(ratios) > 1 else "")
            both = " / ".join(f"{median(median(run[name]) for run in runs):.4g}" for name in (one, other))
            rows.append([part, of, f"{one} / {other}", f"**{shown}**", both, str(len(runs)),
                         str(len(runs[0][one]))])
    head = ("", "of", "ratio", "of medians", "medians", "runs", "turns")
    return table(head, rows) + "\n" if rows else ""


# --- Plots --------------------------------------------------------------------------------------------------


def color_of(arm):
    return COLORS[SIX.index(arm) if arm in SIX else -1]


def draw_differences(judged):
    """Top-1 against infonce: the difference and its interval, of every row of the study but base's."""
    chosen = [each for each in judged
              if each.measure == "top1" and each.reference == "infonce" and each.arm != "base"]
    if not chosen:
        return None
    picture, left, right_end, top = Picture(900, 70 + 20 * len(chosen)), 480, 880, 34
    bottom = top + 20 * len(chosen)
    reach = min(12.0, 1.05 * max(abs(end) for each in chosen for end in each.interval)) or 1.0
    to_x = axis(-reach, reach, left, right_end)
    picture.text(10, 14, "top-1 less that of infonce, points; 95 % intervals, cut off at the edge", 13)
    for each in ticks(-reach, reach, 9):
        picture.line([(to_x(each), top), (to_x(each), bottom)], INK if abs(each) < 1e-9 else PALE, 1)
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
        values = {arm: [groups[data, flags, arm][seed]["probe"]["top1"] for seed in seeds] for arm in SIX}
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
                picture.dot(x + 16 * (turn / max(1, len(each) - 1) - 0.5), to_y(value), color_of(arm), 2)
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
        titles = f"{data}, n {len(seeds)}: threshold", "same-class share of H", "k-NN on a subset, %"
        for column, (title, lines) in enumerate(zip(titles, series.values())):
            x, y = column * width, i * height
            panel(picture, (x, y, x + width, y + height), title, lines)
    legend(picture, 44, height * len(shown) + 16, [
        *((arm, color_of(arm), False) for arm in PAIR),
        ("by chance", GRAY, True)])
    picture.save(os.path.join(HERE, "curves.png"))
    return "curves.png"


# --- The command --------------------------------------------------------------------------------------------


def provenance(lines, words):
    if not lines:
        return "No runs yet.\n"
    counts = collections.Counter()
    for line in lines:
        machine = {"card": "CPU"} | line["machine"]
        counts["on {card}: {cpu}, {threads} thread".format(**machine)] += 1
        counts["with " + ", ".join(f"{name} {version}" for name, version in line["versions"].items())] += 1
    return "\n".join([words, "", *(f"- {count} {name}" for name, count in sorted(counts.items())), ""])


OVERVIEW_TEXT = """\
Differences in points with 95 % intervals; seeds, p, Holm's correction, and what they mean: under Differences.
Empty: fewer than {fewest} seeds.
"""
REPETITION_TEXT = """\
`hex` - `infonce` once more, on other pictures of the same data sets (`pictures.py`): none is among the first,
train or val; near-duplicates may be. PNG instead of JPEG, {counts}; all else as before. In
brackets 95 % intervals, as above; those of the gap between the two differences and of their mean take the two
for independent (they share the seeds, so the first weights and the order): t, degrees of freedom by Welch,
the wider of the two ways.
"""
CLASSES_TEXT = """\
A hypothesis of the study, put to this table when CIFAR's results were known: HEX helps where the members of
H(i) are of other classes, as hard negatives do, and does not, or hurts, where most are of the anchor's. Then
the gaps to `shapes` would be above 0; they are, too, where HEX hurts on `shapes` and does nothing elsewhere.
Differences to `infonce` in points, 95 % intervals; those of the gaps as for other pictures, without Holm's
correction, and not independent of each other: one row's share the runs on `shapes`, the two arms `infonce`'s.
Whose the members are: *same class* under Runs; the second arm's H is larger, and less of it is of the
anchor's class. The data sets differ in more than that (temperature, level, recipe), and a point is not the
same on each.
"""
DOSES_TEXT = """\
Arms of `hex` less `infonce`, in points, with 95 % intervals as above. Beside them what the arm's settings do
on the batch of The mechanism, which another model, that `infonce` trained at seed 0, embeds: the cosine
between HEX's and InfoNCE's gradient; H's share of the anchor's denominator (above 1 where debiasing makes the
positive's weight negative); which part of H is of the anchor's class, weighted by that share, and counted.
Put together when all was known, so it suggests and does not test.
"""
SPREAD_TEXT = """\
Does HEX keep the representation from collapsing? Against `infonce`, after the last epoch, on pictures of the
train split: RankMe of the backbone's features (the effective number of dimensions), standard deviation of the
embeddings (1: spread over all dimensions alike), same-class share of H(i). ±: 95 % t intervals over seeds,
paired; not among the comparisons above, looked at when all was known, not corrected.
"""
RUN_TEXT = """\
Linear probe and k-NN on val, and the probe on its holdout of train (the best of nine rates, so a little too
high), in percent: mean ± standard deviation over n seeds. The rest: means after the last epoch, on pictures
of the train split; eps, mean H and the same-class share of H at the arm's own quantile, so not comparable
where that differs. *Empty* (share of anchors without H) and *floor* (of those with one): over the logged
steps of the last epoch. Seconds: of the whole run, two side by side; of resumed runs none, nor where
augmented batches were kept (`kept_views.py`).
`random`: an untrained backbone; `pixels`: no backbone.
"""
GPU_TEXT = """\
resnet18 at the cifar recipe's rate (0.4, a linear rise in the first three epochs; HEX from the third on),
fp16, on the same 20,000 pictures, the ten runs side by side (`PYTHONPATH=.results/torch_2_11 python
.results/study.py --only gpu --jobs 10 --cifar100 DIR`). Columns as above; the comparison is under
Differences, gpu. On a GPU runs do not repeat: two arms of a seed are InfoNCE in the first two epochs, and
differ already; so pairing takes away little variance. Not to be held against the small recipe's runs: another
backbone, other views, more epochs, fewer of the probe.
"""
MECHANISM_TEXT = """\
On one fixed batch of 256 train pictures (512 embeddings), seed 0, after training. Shares by autograd: tau
dl_i / ds_ij, summed over H(i), is its share of the anchor's denominator (0 at the floor; it may pass 1, where
the positive's weight is negative); *same class*, under HEX: which part of that is of the anchor's class, so
meets it instead of others. HEX's gradient in the embeddings against InfoNCE's: cosine, ratio of the norms,
and *apart*, the norm of their difference over that of InfoNCE's. On the models that `hex` trained: in
the raw lines.
"""
THRESHOLD_TEXT = """\
On one fixed batch, mean over seeds; the difference, `hex` less `infonce`, with its t interval over seeds.
*D of eps*: the dimension in which 512 points, spread uniformly on the sphere, have `infonce`'s threshold
(simulated: normal deviates, normalized, mean of 20 draws; interpolated in log D).
"""
UNIFORM_TEXT = """\
The mechanism's batch. D is 1 over the mean squared cosine of its negatives: of points spread uniformly on the
sphere, the dimension. If their spread were all, eps would be that of uniform points in D dimensions; what is
above it is a longer tail, of pictures that lie closer together than the spread makes them.
"""
PERFORMANCE_TEXT = """\
By `peers.py`, one thread, on {cpus}, torch {versions}; `hex.py` of code {codes}. Medians over
the turns of a run; in a turn all take their turn, so a ratio means more than a time. Several runs: their
least and largest ratio. *loss*: forward and backward, D = 128, milliseconds. *memory*: the peak, in n^2
float32. *lars*: a step. *data*: decoding alone; two views of 224 pixels; Pillow's with torchvision's
transforms, which do the colour, too, while ours wait for the device. Milliseconds for all files.
"""


def main():
    lines, mechanism, words = load()
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
    add("How far a setting goes, and what it did", DOSES_TEXT, doses_table(judged, groups, mechanism))
    add("Spread", SPREAD_TEXT, spread_table(groups))
    add("Runs", RUN_TEXT, run_table(groups))
    add_plot(draw_arms(groups), "top-1 of each seed, the same seeds for all arms")
    add("Runs on a GPU", GPU_TEXT, run_table(groups, gpu=True))
    add("The mechanism", MECHANISM_TEXT, mechanism_tables(mechanism))
    if uniform.known:
        add("Threshold over epochs", THRESHOLD_TEXT, threshold_table(groups, uniform))
        add("Is it uniformity alone?", UNIFORM_TEXT, uniformity_table(mechanism, uniform))
    add_plot(draw_curves(groups), "threshold, same-class share and k-NN over epochs")
    timed = read_events(PERFORMANCE)
    names = {name: ", ".join(dict.fromkeys(line[key][:16] for line in timed))
             for name, key in (("cpus", "cpu"), ("versions", "torch"), ("codes", "code"))}
    add("Performance", PERFORMANCE_TEXT.format(**names), performance_table(timed))
    readme = open(README).read() if os.path.exists(README) else "# Evidence\n"
    if BEGIN not in readme or END not in readme:
        readme += f"\n{BEGIN}\n{END}\n"
    before, rest = readme.split(BEGIN, 1)
    with open(README, "w") as file:
        file.write(before + "\n".join([BEGIN, *parts]) + END + rest.split(END, 1)[1])
    print(f"README.md: {len(lines)} runs, {len(judged)} comparisons")


if __name__ == "__main__":
    main()
