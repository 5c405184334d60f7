"""Run several jobs one after another, as one rank of a launch: `worker.py jobs.json`, a list of [script, flags].

`{rank}` in a flag is the rank's number.
"""

import ppdiffusers_train  # noqa: F401

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.conftest import load_script  # noqa: E402

BEGINS = "--- next job ---"


def main():
    import datasets

    rank = os.environ.get("PADDLE_TRAINER_ID", "0")
    datasets.config.HF_DATASETS_CACHE = Path(sys.argv[1]).parent / "caches" / rank
    datasets.disable_progress_bars()
    for script, flags in json.loads(Path(sys.argv[1]).read_text()):
        print(BEGINS, flush=True)
        try:
            load_script(Path(script)).main([flag.replace("{rank}", rank) for flag in flags])
        except SystemExit as stopped:
            print(f"{Path(script).stem} ended with status {stopped.code}", flush=True)


if __name__ == "__main__":
    main()
