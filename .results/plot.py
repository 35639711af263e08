# SPDX-License-Identifier: MIT
"""The curves of one or more runs, into curves.png in the first run's folder. From the top folder:

    python .results/plot.py RUN...

Drawn with Pillow alone. report.py draws with what is here.
"""
import argparse
import json
import math
import os

from PIL import Image, ImageDraw, ImageFont

INK, GRAY, PALE = "#222222", "#777777", "#dddddd"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
SCALE = 2                               # drawn at twice the size, then halved: smooth lines


class Picture:
    """A white picture; lengths in pixels of the final size."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x, y, text, size=12, color=INK, anchor="lm"):
        """anchor: l, m or r of the text at x, then t (top), m or s (baseline) at y."""
        font = ImageFont.load_default(size * SCALE)
        anchor = anchor.replace("t", "a")
        self.draw.text((x * SCALE, y * SCALE), text, font=font, fill=color, anchor=anchor)

    def line(self, points, color=INK, width=2, dashed=False):
        points = [(x * SCALE, y * SCALE) for x, y in points]
        if not dashed:
            self.draw.line(points, fill=color, width=round(width * SCALE), joint="curve")
            return
        passed, dash, gap = 0.0, 5 * SCALE, 4 * SCALE
        for (x0, y0), (x1, y1) in zip(points, points[1:]):
            length = math.dist((x0, y0), (x1, y1))
            at = 0.0
            while at < length:
                phase = (passed + at) % (dash + gap)
                step = min(length - at, (dash if phase < dash else dash + gap) - phase + 1e-6)
                if phase < dash:
                    shares = at / length, (at + step) / length
                    ends = [(x0 + (x1 - x0) * share, y0 + (y1 - y0) * share) for share in shares]
                    self.draw.line(ends, fill=color, width=round(width * SCALE))
                at += step
            passed += length

    def dot(self, x, y, color=INK, radius=3.5):
        box = [(each + sign * radius) * SCALE for sign in (-1, 1) for each in (x, y)]
        self.draw.ellipse(box, fill=color)

    def save(self, path):
        self.image.reduce(SCALE).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def ticks(low, high, most=5):
    """Round numbers in [low, high], at most `most`."""
    for power in range(math.floor(math.log10((high - low) / most)), 20):
        for unit in (1, 2, 5):
            step = unit * 10.0 ** power
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            if last - first < most:
                return [each * step for each in range(first, last + 1)]


def axis(low, high, start, end):
    """A function from values in [low, high] to places from start to end."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def panel(picture, box, title, series, x_label="epoch"):
    """A pair of axes in box (left, top, right, bottom). series: [(points, color, dashed), ...]."""
    series = [([point for point in points if point[1] is not None], *style)
              for points, *style in series]
    xs, ys = ([point[k] for points, *_ in series for point in points] for k in (0, 1))
    left, top, right, bottom = box[0] + 44, box[1] + 24, box[2] - 10, box[3] - 34
    picture.text(left, box[1] + 10, title, 13)
    if not xs:
        picture.text((left + right) / 2, (top + bottom) / 2, "none logged", 12, GRAY, "mm")
        return
    low, high = min(ys), max(ys)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1
    low, high, first, last = low - margin, high + margin, min(xs), max(max(xs), min(xs) + 1)
    to_x, to_y = axis(first, last, left, right), axis(low, high, bottom, top)
    for each in ticks(low, high):
        picture.line([(left, to_y(each)), (right, to_y(each))], PALE, 1)
        picture.text(left - 5, to_y(each), f"{round(each, 6):g}", 11, GRAY, "rm")
    for each in ticks(first, last, 7):
        picture.text(to_x(each), bottom + 10, f"{round(each, 6):g}", 11, GRAY, "mm")
    picture.line([(left, top), (left, bottom), (right, bottom)], GRAY, 1)
    picture.text((left + right) / 2, bottom + 24, x_label, 11, GRAY, "mm")
    for points, color, dashed in series:
        places = [(to_x(x), to_y(y)) for x, y in points]
        if len(places) > 1:
            picture.line(places, color, 1.5 if dashed else 2, dashed)
        elif places:
            picture.dot(*places[0], color)


def legend(picture, x, y, entries):
    """entries: [(label, color, dashed), ...], one below the other."""
    for i, (label, color, dashed) in enumerate(entries):
        picture.line([(x, y + 18 * i), (x + 24, y + 18 * i)], color, 2, dashed)
        picture.text(x + 32, y + 18 * i, label, 12)


def read_events(path):
    """The lines of a .jsonl, none if there is no file. A last one that a kill has cut off is left
    out."""
    events = []
    with open(path if os.path.exists(path) else os.devnull) as file:
        for line in file:
            if line.endswith("\n"):
                events.append(json.loads(line))
    return events


def main():
    parser = argparse.ArgumentParser(description="Draws the curves of runs into curves.png.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    runs = parser.parse_args().runs
    panels = {"threshold": ("threshold",), "purity of H (dashed: by chance)": ("purity", "chance"),
              "k-NN, %": ("knn",), "mean |H|": ("local",)}
    series = {title: [] for title in [*panels, "loss, mean over each epoch"]}
    for run, color in zip(runs, COLORS * len(runs)):
        events = read_events(os.path.join(run, "metrics.jsonl"))
        epochs = [each for each in events if each["event"] == "epoch"]
        for title, keys in panels.items():
            for dashed, key in enumerate(keys):
                points = [(each["epoch"], each.get(key)) for each in epochs]
                series[title].append((points, color, bool(dashed)))
        steps = {}
        for each in events:
            if each["event"] == "step" and each.get("loss") is not None:
                steps.setdefault(each["epoch"], []).append(each["loss"])
        loss = [(epoch + 1, sum(values) / len(values)) for epoch, values in steps.items()]
        series["loss, mean over each epoch"].append((loss, color, False))
    width, height = 320, 220
    picture = Picture(3 * width, max(2 * height, height + 50 + 18 * len(runs)))
    for i, (title, lines) in enumerate(series.items()):
        x, y = i % 3 * width, i // 3 * height
        panel(picture, (x, y, x + width, y + height), title, lines)
    names = [os.path.basename(os.path.abspath(run)) for run in runs]
    legend(picture, 2 * width + 30, height + 40, [(name[:36], color, False) for name, color in
                                                  zip(names, COLORS * len(runs))])
    path = os.path.join(runs[0], "curves.png")
    picture.save(path)
    print(path)


if __name__ == "__main__":
    main()
