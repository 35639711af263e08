# SPDX-License-Identifier: MIT
"""Runs every command of README.md and .docs/ that needs neither a GPU nor a cluster, on toy data
and with small networks. Of the others each option is parsed. From the top folder, with torchrun in
the PATH: python .ci/readme.py"""
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torchvision
from torch.distributed.run import get_args_parser

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))
import hex as hx  # noqa: E402

# What makes a run small enough for CI. The commands' own options stand before, and these count.
SMALL = shlex.split(
    "--device cpu --workers 0 --epochs 1 --accumulate 1 --size 32 --hidden 16 --dim 8 --amp off "
    "--backbone resnet10_narrow")


def make_pictures(root):
    """Noise in train/ and val/, two classes each."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("val", 8)):
        for name in "ab":
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (3, 40, 48), generator=generator).byte()
                torchvision.io.write_png(pixels, str(folder / f"{i}.png"))


def commands(text):
    """The lines of bash blocks, and the code in tables and sentences that calls hex.py."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(r"`((?:python|torchrun|docker) [^`]*)`", rest)
    return [line for line in lines + inline if line.strip()]


def check(line, root, work, done):
    """Runs one command, or parses it. Returns which. done: the options that have been run."""
    _, found, options = line.partition(" hex.py")
    if not found:
        return "run by .ci/run or not of hex.py"
    options = options.replace("DIR", str(root)).replace("/data", str(root)).rstrip("'")
    words = [word for word in shlex.split(options, comments=True) if word != "--help"]
    hx.make_parser().parse_args(words)

    before = re.search(r"torchrun (.*)hex\.py", line)
    if before:
        # What Slurm would put in, and then torchrun's own parser.
        plain = re.sub(r"\$\(scontrol[^)]*\)", "HOST", before[1])
        plain = plain.replace("$SLURM_NNODES", "2")
        get_args_parser().parse_args([*shlex.split(plain), "hex.py"])
    needs_more = re.search("--nnodes|docker|--data cifar|--help", line)
    if needs_more or words in done:
        return "parsed"
    done.append(list(words))

    small = ["--probe-epochs", "2", "--out", str(work / f"run{len(os.listdir(work))}")]
    if "--probe" in words:
        words[words.index("--probe") + 1] = str(work / "run0" / "backbone.pt")
        small += ["--device", "cpu", "--workers", "0"]
    else:
        small += [*SMALL, "--batch-size", "16" if "--root" in words else "1024"]
    start = [sys.executable]
    if before:
        start = ["torchrun", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*start, str(TOP / "hex.py"), *words, *small], cwd=work.parent, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return "run"


def main():
    with tempfile.TemporaryDirectory() as folder:
        root, work = Path(folder) / "pictures", Path(folder) / "work"
        make_pictures(root)
        work.mkdir()
        done = []
        for path in [TOP / "README.md", *sorted((TOP / ".docs").glob("*.md"))]:
            text = path.read_text("utf-8")
            for line in dict.fromkeys(commands(text)):
                print(f"{path.name}: {check(line, root, work, done)}: {line}", flush=True)
            for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
                exec(code, {})
                print(f"{path.name}: run: a block of Python", flush=True)


if __name__ == "__main__":
    main()
