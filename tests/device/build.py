"""Builds the plugin that gives Paddle a device in software, once per Paddle and source, for all processes of a user.

python -m tests.device.build        # prints the folder for CUSTOM_DEVICE_ROOT
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

PLUGIN = Path(__file__).parent / "plugin"
LIBRARY = "libsoft_device.so"
FLAGS = ("-std=c++17", "-O2", "-ftree-vectorize", "-mavx2", "-mf16c", "-fPIC", "-shared", "-DPADDLE_WITH_CUSTOM_DEVICE")
# Paddle 2.6 hands over a reference to a tensor that is not there: the compiler must not take it for one that is.
PADDLE26_FLAGS = ("-fno-delete-null-pointer-checks", "-include", str(PLUGIN / "paddle26" / "before.h"))


class CannotBuild(Exception):
    """Why there is no such device here, in one line."""


def build() -> Path:
    """The folder that holds the plugin and nothing else; raises `CannotBuild`."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise CannotBuild(f"it needs Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    if missing := {"avx2", "f16c"} - set(Path("/proc/cpuinfo").read_text().split()):
        raise CannotBuild(f"the processor has no {' and no '.join(sorted(missing))}")
    compiler = shutil.which("g++")
    if not compiler:
        raise CannotBuild("there is no g++")
    folder = cache() / fingerprint(compiler)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not (folder / LIBRARY).exists():
            compile_into(folder, compiler)
    return folder


def cache() -> Path:
    """Where builds are kept, outside the tree."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppdiffusers_train" / "soft_device"


def sources() -> list:
    """What the plugin is made of."""
    return sorted(path for path in PLUGIN.rglob("*") if path.is_file())


def fingerprint(compiler) -> str:
    """Names a build by all that it depends on."""
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True).stdout
    paddle = importlib.metadata.version("paddlepaddle")
    known = hashlib.sha256(" ".join([paddle, version, str(paddle_folder()), *FLAGS, *PADDLE26_FLAGS]).encode())
    for source in sources():
        known.update(source.read_bytes())
    return f"paddle-{paddle}-{known.hexdigest()[:16]}"


def paddle_folder() -> Path:
    """Where Paddle is installed; it is not imported."""
    return Path(importlib.util.find_spec("paddle").submodule_search_locations[0])


@contextlib.contextmanager
def locked(file: Path):
    """One process at a time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def compile_into(folder: Path, compiler) -> None:
    """Compile, and put the library into its place when it is whole."""
    paddle = paddle_folder()
    includes, core, flags = [paddle / "include", paddle / "include" / "third_party"], "libs/libphi_core.so", FLAGS
    if not (paddle / core).exists():  # Paddle 2.6: its kernels are in the module that Python imports
        includes, core, flags = [PLUGIN / "paddle26", *includes], "base/libpaddle.so", (*FLAGS, *PADDLE26_FLAGS)
    folder.mkdir(exist_ok=True)
    unfinished = folder.parent / f"{folder.name}-{os.getpid()}.so"
    command = [compiler, *flags]
    for include in includes:
        command += ["-isystem", include]
    command += [source for source in sources() if source.suffix == ".cc"]
    command += ["-o", unfinished, paddle / core, paddle / "libs" / "libcommon.so"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode:
        first = next((line for line in result.stderr.splitlines() if "error" in line), "g++ failed")
        raise CannotBuild(f"it does not compile against this Paddle: {first}")
    unfinished.rename(folder / LIBRARY)


if __name__ == "__main__":
    print(build())
