"""What `import ppdiffusers_train` gains on a CPU: the time of a training step with and without it, in turns.

    python benchmarks/cpu_setup.py

Each measurement is a process of its own, because Paddle reads the settings once. It prints the ratio of each pair of
neighbouring processes, and their median: single times mean little on a shared machine.
"""

import argparse
import os
import statistics
import subprocess
import sys

from ppdiffusers_train.cpu.environment import SETTINGS

STEP = """
import time
{prepare}
import paddle
layer = paddle.nn.Sequential(*[paddle.nn.Conv2D(128, 128, 3, padding=1) for _ in range(4)])
linear = paddle.nn.Linear(1024, 1024)
pixels, rows = paddle.randn([4, 128, 32, 32]), paddle.randn([1024, 1024])
def step():
    (layer(pixels).square().mean() + linear(rows).square().mean()).backward()
for _ in range(2): step()
start = time.perf_counter()
for _ in range(8): step()
print(time.perf_counter() - start)
"""


def seconds(prepare: str) -> float:
    """Time of eight steps in a new process that runs `prepare` first."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", STEP.format(prepare=prepare)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="pairs of processes")
    args = parser.parse_args(argv)
    ratios = []
    for _ in range(args.pairs):
        plain, prepared = seconds(""), seconds("import ppdiffusers_train")
        ratios.append(plain / prepared)
        print(
            f"Paddle as it comes {plain:.2f} s, prepared {prepared:.2f} s: {ratios[-1]:.2f} times as fast", flush=True
        )
    print(f"median {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
