"""Do to several ranks what people and machines do to them, and look at what they make of it.

    python -m tests.distributed.torture --cases signal=20 kill=10 flag=20 copy=10 slow=5 --seed 3

After each case the run has the bits of one that nobody has disturbed, resumed if it was stopped, or one true line says
what happened; this within a stated time; nothing is left running, and no token is in any file.

`signal` and `kill` start ranks with Paddle's launcher, or two of them, or with `ppdiffusers-train launch`. The other
kinds fork ranks that have imported everything (`kill_harness.py`). A case depends on the seed, its kind and its number.
"""

import ppdiffusers_train  # noqa: F401

import argparse
import contextlib
import ctypes
import io
import os
import random
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from ppdiffusers_train.arguments.parser import Flag
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.loop.identity import OWN_FLAGS, OWN_PLACES
from ppdiffusers_train.runtime.processes import is_alive
from tests.conftest import same, weights
from tests.distributed.copies import one_bit, remove_a_picture, replace
from tests.distributed.kill_harness import build_kandinsky, encoded_folder, end, free_port, make_flags, start
from tests.distributed.launching import children_of, launch_command, launched, ranks_of, runs_of, wait_for
from tests.distributed.slow_machine import slow_job

SLOW_MACHINE = Path(__file__).with_name("slow_machine.py")
STEPS = 12
SECONDS_PER_BATCH = 0.1  # two batches a step: a run lasts long enough to be met in its loop, and needs no processor
START_SECONDS = 15.0  # of which a signal meets a run that is not in its loop yet
BEGIN_SECONDS = 300.0  # in which a run has begun, so long as the machine has time for it
END_SECONDS = 90.0  # in which everything has ended after what was done to it, on a machine with other work to do
BOTH = "; expected the same on all ranks"
STOP_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")
PLAIN, WRAPPED, TWO_NODES = "launcher", "wrapper", "two launchers"


def of_two_nodes(ranks: int) -> list:
    return [PLAIN, WRAPPED, TWO_NODES] if ranks % 2 == 0 else [PLAIN, WRAPPED]


class Ground:
    """Models, data and encoded samples that all cases share, and what undisturbed runs have learned."""

    def __init__(self, root: Path):
        self.root, self.job, self._learned = root, slow_job(), {}
        flags = [*make_flags(root, build_kandinsky), *encoded_folder(root)]
        self.flags = [*flags, f"--max_train_steps={STEPS}", "--checkpointing_steps=5", "--stop_signal=USR1"]

    def learned(self, ranks: int) -> dict:
        """What a run on so many ranks learns."""
        if ranks not in self._learned:
            out, log = self.root / f"whole-{ranks}", self.root / f"whole-{ranks}.log"
            assert end(start(self.job, [*self.flags, f"--output_dir={out}"], ranks, log), 600), log.read_text()[-2000:]
            self._learned[ranks] = weights(out, "prior")
        return self._learned[ranks]


@dataclass
class Case:
    """One thing that is done to a run: `folder` is for its files, `chance` draws whatever is drawn."""

    ground: Ground
    folder: Path
    ranks: int
    chance: random.Random
    what: str = ""

    def __post_init__(self):
        self.token = f"token-{secrets.token_hex(12)}"
        self.out, self.began = self.folder / "out", time.time()
        (self.folder / "tmp").mkdir(parents=True)

    @property
    def flags(self) -> list:
        return [*self.ground.flags, f"--output_dir={self.out}"]

    def fork(self, own=lambda rank: ([], {}), flags=(), name="rank", meanwhile=lambda: None) -> tuple:
        """Run on forked ranks, with (flags, variables) of their own; returns (statuses, logs) of all.

        Args:
            meanwhile: called once they have started.
        """
        log, statuses = self.folder / f"{name}-{{rank}}.log", {}
        variables = {"HF_TOKEN": self.token, "TMPDIR": str(self.folder / "tmp")}
        processes = start(
            self.ground.job, [*self.flags, *flags], self.ranks, log, lambda r: (own(r)[0], {**variables, **own(r)[1]})
        )
        try:
            meanwhile()
            wait_for(lambda: ended(processes, statuses), BEGIN_SECONDS + END_SECONDS)
        finally:
            for process in {*processes} - {*statuses}:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
        logs = [Path(str(log).format(rank=rank)).read_text() for rank in range(self.ranks)]
        return [statuses[process] for process in processes], logs

    def assert_same_bits(self) -> None:
        assert same(self.ground.learned(self.ranks), weights(self.out, "prior")), "other bits"

    def assert_resumes(self) -> None:
        log = self.folder / "resumed.log"
        flags = [*self.flags, "--resume_from_checkpoint=latest"]
        assert end(start(self.ground.job, flags, self.ranks, log), 300), log.read_text()[-2000:]
        self.assert_same_bits()

    def assert_nothing_is_left(self) -> None:
        """No process of the run, no file in its temporary folder, and its token nowhere."""
        try:
            wait_for(lambda: not descendants(), END_SECONDS)
        except AssertionError:
            raise AssertionError(f"still running: {[command_of(process) for process in descendants()]}") from None
        left = [str(path) for path in (self.folder / "tmp").iterdir()]
        assert not left, f"left in the temporary folder: {left}"
        written = [path for path in self.folder.rglob("*") if path.is_file()]
        with contextlib.suppress(OSError):
            common = [path for path in Path("/tmp").iterdir() if path.is_file() and path.stat().st_mtime > self.began]
            written += common
        for path in written:
            with contextlib.suppress(OSError):  # another program's
                assert self.token.encode() not in path.read_bytes(), f"the token is in {path}"


def ended(processes: list, statuses: dict) -> bool:
    """Whether all processes have ended; notes their exit statuses."""
    for process in {*processes} - {*statuses}:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            statuses[process] = os.waitstatus_to_exitcode(status)
    return len(statuses) == len(processes)


def descendants(process=None) -> list:
    """The processes below this one that are alive. Orphans are among them (`PR_SET_CHILD_SUBREAPER`)."""
    found = children_of(process or os.getpid())
    return [it for child in found for it in ([child] if is_alive(child) else []) + descendants(child)]


def command_of(process: int) -> str:
    with contextlib.suppress(OSError):
        return f"{process} {Path(f'/proc/{process}/cmdline').read_text()[:300]}".replace("\0", " ")
    return str(process)


# What is done to runs that a launcher has started.


@contextlib.contextmanager
def started(case: Case, form: str):
    """A run that has just been started: (its launchers, what the user has started)."""
    variables = {
        "SECONDS_PER_BATCH": str(SECONDS_PER_BATCH), "HF_TOKEN": case.token, "TMPDIR": str(case.folder / "tmp"),
        "MKL_NUM_THREADS": os.environ["MKL_NUM_THREADS"],  # as in forked ranks: other threads, other bits
    }  # fmt: skip
    with contextlib.ExitStack() as stack:

        def enter(command, node):
            return stack.enter_context(launched(command, case.folder / node, **variables))

        def command(node, *shape):
            return launch_command(SLOW_MACHINE, *case.flags, form=shape, log_dir=case.folder / node / "log")

        if form == TWO_NODES:
            shape = ("--master", f"127.0.0.1:{free_port()}", "--nnodes", "2", "--nproc_per_node", str(case.ranks // 2))
            users = [enter(command(node, *shape, "--rank", node), node) for node in "01"]
            yield [user.pid for user in users], users
            return
        words = command("0", "--nproc_per_node", str(case.ranks))
        if form == WRAPPED:
            place = words.index("paddle.distributed.launch")
            words[place - 1 : place + 1] = ["-m", "ppdiffusers_train.cli", "launch"]
        user = enter(words, "0")
        wait_for(lambda: form == PLAIN or children_of(user.pid) or user.poll() is not None, BEGIN_SECONDS)
        launchers = [user.pid] if form == PLAIN else children_of(user.pid)
        try:
            yield launchers, [user]
        finally:
            for process in launchers:  # the wrapper's, if the wrapper was killed
                for below in [*descendants(process), process]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(below, signal.SIGKILL)


def logs_of(case: Case) -> list:
    """What each rank has logged."""
    return [path.read_text(errors="replace") for path in sorted(case.folder.glob("[01]/log/workerlog.*"))]


def screens_of(case: Case) -> list:
    return [(case.folder / node / "said").read_text(errors="replace") for node in "01" if (case.folder / node).exists()]


def step_shown(case: Case) -> int:
    """The last step on the progress lines, which do not show each."""
    return max((int(step) for log in logs_of(case) for step in re.findall(rf"(\d+)/{STEPS}\b", log)), default=0)


def wait_for_moment(case: Case, launchers: list, phases: list) -> str:
    """Wait for a random moment of a run."""
    phase, share = case.chance.choice(phases), case.chance.random()
    wait_for(lambda: sum(len(ranks_of(launcher)) for launcher in launchers) == case.ranks, BEGIN_SECONDS)
    if phase == "start":
        time.sleep(share * START_SECONDS)
        return f"{share * START_SECONDS:.1f} s after the start"
    step = STEPS if phase == "end" else case.chance.randrange(1, STEPS - 1)
    wait_for(lambda: step_shown(case) >= step or (case.out / "prior").exists(), BEGIN_SECONDS)
    time.sleep(share * SECONDS_PER_BATCH * 4)
    return f"at step {step}"


def signal_case(case: Case) -> str:
    """A signal that asks to stop, to the launcher, a rank, all, or one node of two."""
    form, name = case.chance.choice(of_two_nodes(case.ranks)), case.chance.choice(STOP_NAMES)
    targets = ["rank", "run", "all"] + ([] if name == "SIGUSR1" and form != WRAPPED else ["user"])
    target = case.chance.choice(targets)
    with started(case, form) as (launchers, users):
        # Paddle's launcher writes tokens to files, where a rank masks them: not if it is stopped in that moment.
        phases = ["start", "loop", "loop", "loop", "end"] if form == WRAPPED and name != "SIGUSR1" else ["loop", "end"]
        when = wait_for_moment(case, launchers, phases)
        case.what = f"{form}: {name} to {target} {when}"
        ranks, runs = ([it for launcher in launchers for it in of(launcher)] for of in (ranks_of, runs_of))
        everything = [process for process in descendants() if process not in ([] if name != "SIGUSR1" else launchers)]
        chosen = {
            "rank": lambda: [case.chance.choice(ranks)], "run": lambda: [case.chance.choice(runs)],
            "all": lambda: everything, "user": lambda: [users[-1].pid],
        }[target]()  # fmt: skip
        send(chosen, signal.Signals[name])
        statuses = [user.wait(END_SECONDS) for user in users]
        case.assert_nothing_is_left()
    outcome = read_stop(case, name, form)
    case.assert_resumes()
    return f"{outcome}, status {statuses}; resumed: same bits"


def send(processes: list, number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def read_stop(case: Case, name: str, form: str) -> str:
    """What ranks and screens say of a stop; asserts that it is true, and said as often as it should be."""
    logs, screens = logs_of(case), screens_of(case)
    assert "Traceback" not in "".join(logs + screens), "a traceback"
    told = [[line for line in log.splitlines() if re.search(r"SIG|the end of the launcher", line)] for log in logs]
    lines = {line for lines in told for line in lines}
    stops = [line for line in lines if ": wrote " in line or "without a checkpoint" in line]
    if stops:
        assert len(lines) == 1 and all(len(lines) == 1 for lines in told), f"not one line, once on each rank: {told}"
        step = int(re.search(r"after step (\d+)", stops[0])[1])
        assert stops[0].startswith(f"{name}: wrote {case.out}/checkpoint-{step} after step {step} of {STEPS}; "), stops
        assert (case.out / f"checkpoint-{step}" / "state.json").exists(), f"no checkpoint-{step}"
        counts = [screen.splitlines().count(stops[0]) for screen in screens]
        assert counts == [1] if form == WRAPPED else all(counts), f"on the screens: {counts} times"
        assert all(screen.splitlines()[-1] == stops[0] for screen in screens), "not the last line"
        return f"stopped after step {step}"
    if "wrote the result" in "".join(logs):
        assert all("received after the last step" in line for line in lines), lines
        return "came to its end"
    by_name = {line for line in lines if line.endswith(f"ended by {name}")}
    # The launcher ends the others when one has ended.
    assert by_name and all(line.endswith("ended by SIGTERM") for line in lines - by_name), f"no true line: {told}"
    assert form != WRAPPED or f"ended by {name}" in screens[0].splitlines()[-1], f"not on the screen: {screens}"
    return "ended before the first step"


def kill_case(case: Case) -> str:
    """SIGKILL to a rank's process or its supervisor, to the launcher, the wrapper, or all."""
    form = case.chance.choice(of_two_nodes(case.ranks))
    target = case.chance.choice(["rank", "run", "launcher", "all"] + (["user"] if form == WRAPPED else []))
    with started(case, form) as (launchers, users):
        when = wait_for_moment(case, launchers, ["start", "loop", "loop"] if form == WRAPPED else ["loop"])
        node = case.chance.randrange(len(launchers))
        launcher, rank = launchers[node], case.chance.randrange(case.ranks // len(launchers))
        number = rank + node * case.ranks // len(launchers)
        case.what = f"{form}: SIGKILL to {target} {number if target in ('rank', 'run') else ''} {when}"
        processes = {
            "rank": lambda: [ranks_of(launcher)[rank]], "run": lambda: children_of(ranks_of(launcher)[rank])[:1],
            "launcher": lambda: [launcher], "all": descendants, "user": lambda: [users[0].pid],
        }[target]()  # fmt: skip
        send(processes, signal.SIGKILL)
        for user in users:
            user.wait(END_SECONDS)
        case.assert_nothing_is_left()
    logs, screen = "".join(logs_of(case)), screens_of(case)[node].splitlines()
    assert "Traceback" not in logs + "\n".join(screen), "a traceback"
    if target in ("rank", "run"):
        assert screen[-1].startswith(f"rank {number} was killed by SIGKILL (9)"), screen[-3:]
    elif target != "all" and "wrote the result" not in logs:
        cause = "the end of the launcher" if target == "launcher" else "SIGTERM"
        line = rf"^(.*: )?(ended by {cause}|{cause}: wrote {case.out}/checkpoint-\d+ after step .*)$"
        assert re.search(line, logs, re.MULTILINE), f"no line of {cause}"
        assert target == "user" or re.fullmatch(line, screen[-1]), screen[-3:]
    case.assert_resumes()
    return "ended, and told; resumed: same bits"


# What is done to forked ranks.


def flag_case(case: Case) -> str:
    """A flag of the parser that one rank has otherwise."""
    parser, rank = case.ground.job.build_parser(), case.chance.randrange(case.ranks)
    given = parser.parse_args(case.flags)
    skipped = {"help", "config", *OWN_PLACES}
    actions = [action for action in parser._actions if action.dest not in skipped]
    found = None
    while not found:
        action = case.chance.choice(actions)
        found = another_value(parser, case.flags, action, getattr(given, action.dest), case)
    flag, value = f"--{action.dest}", found[-1]
    case.what = f"rank {rank} has {' '.join(found)}"
    statuses, logs = case.fork(lambda r: (found if r == rank else [], {}))
    case.assert_nothing_is_left()
    if action.dest in OWN_FLAGS and statuses[rank] == 2:
        assert f"error: {flag}" in logs[rank], "its own mistake, not told"
        assert 0 not in statuses and all(" has ended" in log or log == logs[rank] for log in logs), "others do not tell"
        return "a mistake of that rank, told; the others ended"
    if action.dest in OWN_FLAGS and (action.dest != "output_dir" or rank):
        assert statuses == [0] * case.ranks, f"statuses {statuses}"
        case.assert_same_bits()
        assert action.dest != "output_dir" or "; rank 0 alone writes" in logs[0], "not told"
        return "allowed: same bits"
    if action.dest == "output_dir":
        assert statuses == [0] * case.ranks and "; rank 0 alone writes" in logs[0], f"statuses {statuses}"
        case.out = Path(value.partition("=")[2])
        case.assert_same_bits()
        return "allowed: same bits"
    assert_refused(case, statuses, logs, f"error: {flag}: rank {max(rank, 1)} has ")
    return "refused"


def another_value(parser, flags: list, action, now, case: Case):
    """Flags that give another value to a flag, or None if none of the values tried is one."""
    name = action.option_strings[0]
    if isinstance(action, Flag):
        return [name.replace("--", "--no_", 1) if now else name]
    values = [*action.choices] if action.choices else ["2", "3", "0.25", "64", "other"]
    if action.dest.endswith("_dir"):
        values = [case.folder / "other"]
    for value in case.chance.sample(values, len(values)):
        more = [name, *[str(value)] * action.nargs] if isinstance(action.nargs, int) else [f"{name}={value}"]
        with contextlib.suppress(SystemExit, UserError), contextlib.redirect_stderr(io.StringIO()):
            if getattr(parser.parse_args([*flags, *more]), action.dest) != now:
                return more
    return None


def assert_refused(case: Case, statuses: list, logs: list, begins: str) -> None:
    """That all ranks end with status 2 and one line, the same one, and nothing was trained."""
    lines = [[line for line in log.splitlines() if "error: " in line or "Traceback" in line] for log in logs]
    assert statuses == [2] * case.ranks, f"statuses {statuses}: {lines}"
    assert all(len(of_rank) == 1 for of_rank in lines) and len({line for [line] in lines}) == 1, lines
    assert begins in lines[0][0] and lines[0][0].endswith(BOTH), lines[0]
    assert not [*case.out.glob("checkpoint-*")] and not (case.out / "prior").exists(), "something was trained"


def copy_case(case: Case) -> str:
    """Another copy of an input on one rank."""
    prior, file = case.ground.root / "base" / "prior", "photos-{}"
    weight = prior.joinpath("prior", "diffusion_paddle_model.safetensors").relative_to(prior)
    copies = {
        "one picture missing": ("photos", remove_a_picture, "number of samples: "),
        "another caption": ("photos", replace("metadata.jsonl", "tabby cat", "tabby dog"), "caption of "),
        "another picture": ("photos", one_bit("chelsea.jpg"), "content of "),
        "other weights": (prior, one_bit(weight), "weights of prior: "),
        "other frozen weights": (prior, one_bit("text_encoder/model.safetensors"), "weights of text_encoder: "),
        "the same": (case.chance.choice(["photos", prior]), lambda folder: None, ""),
    }
    kind, rank = case.chance.choice([*copies]), case.chance.randrange(case.ranks)
    source, change, begins = copies[kind]
    case.what = f"rank {rank} has a copy of {Path(source).name}: {kind}"
    copy = shutil.copytree(case.ground.root / source, case.folder / file.format(rank))
    change(copy)
    name = "--train_data_dir" if source == "photos" else "--pretrained_prior_model_name_or_path"
    statuses, logs = case.fork(lambda r: ([f"{name}={copy}"] if r == rank else [], {}))
    case.assert_nothing_is_left()
    if not begins:
        assert statuses == [0] * case.ranks, f"statuses {statuses}"
        case.assert_same_bits()
        return "allowed: same bits"
    assert_refused(case, statuses, logs, f"error: {begins.removesuffix(': ')}")
    assert f"rank {max(rank, 1)} has " in logs[0], logs[0][-500:]
    return "refused"


def slow_case(case: Case) -> str:
    """A rank whose batches take many times as long, and another one whose disk does."""
    rank, factor = case.chance.randrange(case.ranks), case.chance.choice([5, 20, 50])
    shard = case.chance.choice([["--sharding_degree=2"], []]) if case.ranks % 2 == 0 else []
    case.what = f"rank {rank} takes {factor} x 0.02 s more for a batch and a file; {' '.join(shard)}"
    seconds = {"SECONDS_PER_BATCH": str(0.02 * factor), "SECONDS_PER_FILE": str(0.02 * factor)}
    statuses, logs = case.fork(lambda r: ([], seconds if r == rank else {}), [*shard, "--collective_timeout=30"])
    case.assert_nothing_is_left()
    assert statuses == [0] * case.ranks and "rror" not in "".join(logs), f"statuses {statuses}"
    case.assert_same_bits()
    return "waited for: same bits"


def twice_case(case: Case) -> str:
    """A second run in the folder of one that is at work."""
    resumes, second = case.chance.random() < 0.5, []
    case.what = f"a second run in its folder, which {'resumes' if resumes else 'begins anew'}"

    def start_second():
        wait_for((case.out / "training_args.json").exists, BEGIN_SECONDS)
        second.extend(case.fork(flags=["--resume_from_checkpoint=latest"] if resumes else [], name="second"))

    # The first one sleeps while the second one starts.
    statuses, _ = case.fork(lambda rank: ([], {"SECONDS_PER_BATCH": "0.4"}), meanwhile=start_second)
    case.assert_nothing_is_left()
    case.assert_same_bits()
    assert statuses == [0] * case.ranks and second[0] == [2] * case.ranks, (statuses, second[0])
    assert all(log.count(": another run is at work there (process ") == 1 for log in second[1]), second[1]
    return "refused, the first one undisturbed: same bits"


KINDS = {"signal": signal_case, "kill": kill_case, "flag": flag_case, "copy": copy_case, "slow": slow_case}
KINDS["twice"] = twice_case


def run(kind: str, number: int, seed: int, ranks: list, ground: Ground) -> bool:
    """Run one case, print its line, and what is needed to look into it if it fails."""
    chance = random.Random(f"{seed} {kind} {number}")
    folder = ground.root / f"{kind}-{number}"
    case, began = Case(ground, folder, chance.choice(ranks), chance), time.monotonic()
    ground.learned(case.ranks)
    try:
        outcome = KINDS[kind](case)
    except Exception as error:
        outcome = f"FAILED: {error or traceback.format_exc()}"
        for process in descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    seconds = time.monotonic() - began
    print(f"| {kind} {number} | {case.ranks} ranks | {case.what} | {outcome} | {seconds:.0f} s |", flush=True)
    if is_good := not outcome.startswith("FAILED"):
        shutil.rmtree(folder)
        return is_good
    print(f"--seed {seed} --cases {kind}={number}:{number + 1}", flush=True)
    for path in sorted([*folder.glob("*.log"), *folder.glob("[01]/said"), *folder.glob("[01]/log/workerlog.*")]):
        print(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}", flush=True)
    return is_good


def numbers(text: str) -> tuple:
    """("kind", cases) of "kind=5" or "kind=3:5"."""
    kind, _, many = text.partition("=")
    first, _, last = many.rpartition(":")
    if kind not in KINDS:
        raise argparse.ArgumentTypeError(f"{kind!r} is none of {', '.join(KINDS)}")
    return kind, range(int(first or 0), int(last))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=numbers, nargs="+", required=True, help="such as flag=20, or flag=7:8 for one")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no further case begins")
    args = parser.parse_args(argv)
    set_child_subreaper = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h
    ctypes.CDLL(None).prctl(set_child_subreaper, 1)
    began, good, bad = time.monotonic(), 0, 0
    print("| case | ranks | what was done | outcome | time |\n| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as root:
        os.environ["HF_HOME"] = str(Path(root, "hub"))
        ground = Ground(Path(root))
        for kind, cases in args.cases:
            for number in cases:
                if time.monotonic() - began < args.seconds:
                    is_good = run(kind, number, args.seed, args.ranks, ground)
                    good, bad = good + is_good, bad + (not is_good)
    print(f"{good} of {good + bad} cases as they should be", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
