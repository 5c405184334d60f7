"""What LoRA saves: peak memory of a full run and of a LoRA run on the same decoder, each in a process of its own.

    python benchmarks/lora_memory.py

Expected from the parameter counts: a full run holds 4 numbers per parameter (weight, gradient, two moments), a LoRA run
1, so the ratio of what is above the process's own base goes towards 1 / 4 as the model outgrows its activations.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import ppdiffusers_train, sys, json, runpy
import paddle
from paddle.base import core
sys.path.insert(0, sys.argv[1].rpartition("/")[0])  # where a script finds the one that it extends
job = runpy.run_path(sys.argv[1])
job["main"](sys.argv[2:])
print(json.dumps(core.host_memory_stat_peak_value("Allocated", 0)))
"""


def peak_bytes(script: str, flags: list) -> int:
    """Peak of Paddle's own allocations, in bytes, of a run in a new process."""
    path = ROOT / "examples" / "kandinsky2_2" / script
    done = subprocess.run([sys.executable, "-c", RUN, str(path), *flags], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256, help="channels of the UNet's first level; the next has twice")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    import ppdiffusers_train  # noqa: F401

    from ppdiffusers_train.reporting.quiet import quiet_libraries
    from ppdiffusers_train.toy.models.kandinsky2_2 import build_kandinsky

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        prior, decoder = build_kandinsky(Path(folder) / "base", channels=(args.width, 2 * args.width))
        size = (decoder / "unet" / "diffusion_paddle_model.safetensors").stat().st_size
        common = [
            f"--pretrained_prior_model_name_or_path={prior}",
            f"--pretrained_decoder_model_name_or_path={decoder}",
            f"--train_data_dir={ROOT / 'examples' / 'data' / 'photos'}",
            f"--encoded_cache_dir={Path(folder) / 'cache'}",
            *["--resolution=64", "--max_train_steps=3", "--train_batch_size=1", "--report_to=none", "--seed=0"],
        ]
        peaks = {}
        for name in ("train_text_to_image_decoder.py", "train_text_to_image_decoder_lora.py"):
            peaks[name] = peak_bytes(name, [*common, f"--output_dir={Path(folder) / name}"])
            print(
                f"{name}: peak {peaks[name] / 1e6:.0f} MB, {peaks[name] / size:.2f} times the UNet's weights",
                flush=True,
            )
    full, lora = peaks.values()
    print(f"UNet of {size / 1e6:.0f} MB: LoRA takes {lora / full:.2f} times the memory of the full run")


if __name__ == "__main__":
    main()
