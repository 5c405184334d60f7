"""The sides of `speed.py` that compute with Paddle, as processes that it starts.

    python benchmarks/speed_paddle.py loop|cache|plain|profile --script SCRIPT [--compile] [--samples FILE] -- FLAGS

loop: the script's own run. cache: fills its cache and prints how long that took; with `--samples`, it also writes what
`preprocess` makes of each. plain: a bare loop over the same module, online, encoding the batch together: on Paddle as
it comes and without patches a model of PaddleMIX's script as a user runs it. profile: the loop's step, by kernel.
"""

import sys

if "plain" in sys.argv[1:2]:
    # First, as PaddleMIX's scripts do: one thread, and on AMD processors MKL's slow path.
    import paddle  # noqa: F401
import ppdiffusers_train  # noqa: F401  (before paddle)
from ppdiffusers_train import training

import argparse
import time
from pathlib import Path

import numpy as np
import paddle

from ppdiffusers_train.data import encoded_cache
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import Draws, RowDraws

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from speed_gate import Gate, answer, peak_mb  # noqa: E402

from tests.conftest import load_script, module_class  # noqa: E402

PROFILED_STEPS = 3


def loop(module, dataset, args) -> None:
    """The script's run, a few steps at a time."""
    gate, after_step = Gate(), module.after_step

    def step():
        after_step()
        gate.after_step()

    module.after_step = step
    gate.wait()
    training.launch_training_task(module, dataset, args)


def cache(module, dataset, args, samples) -> None:
    """Fill the cache, and answer with the seconds that it took."""
    if samples:
        rows = [module.preprocess(dataset[row], RowDraws(0, row)) for row in range(len(dataset))]
        np.savez(samples, **{name: np.stack([row[name] for row in rows]) for name in rows[0]})
    encode = training.encode_dataset

    def timed(*arguments):
        start = time.perf_counter()
        encoded = encode(*arguments)
        answer(seconds=time.perf_counter() - start, samples=len(dataset), peak_mb=peak_mb())
        return encoded

    training.encode_dataset = timed
    training.launch_training_task(module, dataset, args)


def plain(module, args, samples) -> None:
    """What any script does: encode, loss, backward, clip, AdamW, one batch after the other."""
    arrays = dict(np.load(samples))
    count = len(next(iter(arrays.values())))
    parameters = module.trainable_parameters()
    clip = paddle.nn.ClipGradByGlobalNorm(args.max_grad_norm)
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=parameters, weight_decay=0.0, grad_clip=clip)
    gate, step = Gate(), 0
    gate.wait()
    while True:
        rows = (np.arange(args.train_batch_size) + step * args.train_batch_size) % count
        with paddle.no_grad():
            encoded = module.encode({name: paddle.to_tensor(array[rows]) for name, array in arrays.items()})
        loss = module(encoded, Draws(0, rows.tolist()))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        loss.item()
        step += 1
        gate.after_step()


def profile(module, dataset, args) -> None:
    """Answer with the milliseconds of a step that each kernel takes, forward and backward together."""
    from paddle.profiler import Profiler, ProfilerTarget

    # Left to itself, it writes its trace into the folder it was started in.
    profiler = Profiler(targets=[ProfilerTarget.CPU], on_trace_ready=lambda profiler: None)
    after_step, taken = module.after_step, []

    def step():
        after_step()
        taken.append(None)
        if len(taken) == 2:  # the first steps allocate
            profiler.start()
        if len(taken) == 2 + PROFILED_STEPS:
            profiler.stop()

    module.after_step = step
    args.max_train_steps = 2 + PROFILED_STEPS
    training.launch_training_task(module, dataset, args)
    times = {}
    for root in profiler.profiler_result.get_data().values():
        for part in root.children_node:
            add_own_times(part, times)
    answer(milliseconds={kind: nanoseconds / 1e6 / PROFILED_STEPS for kind, nanoseconds in times.items()})


def add_own_times(node, times: dict) -> None:
    """Add the nanoseconds that an event and those inside it took by themselves, without what they contain."""
    inside = node.children_node
    own = node.end_ns - node.start_ns - sum(part.end_ns - part.start_ns for part in inside)
    kind = kind_of(node.name)
    times[kind] = times.get(kind, 0) + own
    for part in inside:
        add_own_times(part, times)


def kind_of(name: str) -> str:
    """`conv2d_grad kernel launch`, `onednn_op.conv2d` -> "conv2d"; what is no kernel leads to one."""
    if not name.endswith(" kernel launch") and not name.startswith(("onednn_op.", "pd_op.")):
        return "Python and calls"
    return name.split()[0].split(".")[-1].removesuffix("_grad")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("loop", "cache", "plain", "profile"))
    parser.add_argument("--script", required=True)
    parser.add_argument("--compile", action="store_true", help="encoders, however little the data")
    parser.add_argument("--samples", help="file of preprocessed samples")
    split = sys.argv.index("--")
    own, flags = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    for part in (training, encoded_cache):
        part.COMPILE_FROM_ROWS = 0 if own.compile else float("inf")
    job = load_script(Path(own.script))
    args = job.build_parser().parse_args(flags)
    training.check_run(args)
    dataset, module = build_dataset(args), module_class(job)(args)
    if own.what == "loop":
        loop(module, dataset, args)
    elif own.what == "cache":
        cache(module, dataset, args, own.samples)
    elif own.what == "plain":
        plain(module, args, own.samples)
    else:
        profile(module, dataset, args)


if __name__ == "__main__":
    main()
