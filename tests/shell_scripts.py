"""What a run.sh would start: it is run by bash, with another `python` that prints what it is given."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

VARIABLES = ("MODEL_NAME", "PRIOR_NAME", "DATASET_NAME", "OUTPUT_DIR")
SHOW = f"""#!{sys.executable}
import json, os, sys
print(json.dumps([["python", *sys.argv[1:]], {{name: os.environ.get(name) for name in {VARIABLES}}}]))
"""


def python_command(folder, *flags, **variables):
    """The words of the command that `bash run.sh` ends with, in a folder, and the variables that it exports."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {name: str(value) for name, value in variables.items()}
    with tempfile.TemporaryDirectory() as programs:
        python = Path(programs, "python")
        python.write_text(SHOW)
        python.chmod(0o755)
        environment["PATH"] = os.pathsep.join([programs, environment["PATH"]])
        done = subprocess.run(["bash", "run.sh", *flags], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
