"""One short run of every job on the pretrained pipelines of shapes: which script, which flags, how its result draws.

A job learns from pictures in a look that the pipeline does not draw. Kandinsky's decoder has learned to draw stripes,
too, and its prior learns to ask for them. Nothing heavy is imported here: the command line reads the jobs' names.
"""

from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RESOLUTION = 32

DRAWING = {"num_inference_steps": 25, "prior_num_inference_steps": 25, "guidance_scale": 2.0}


@dataclass(frozen=True)
class Job:
    """A training script, its flags, and what it learns from."""

    script: str
    flags: tuple
    look: str  # of the pictures that it learns from
    lora: bool  # whether the result is one

    def command(self, base: dict, data, result, *more: str) -> list:
        """The flags of a run on the folder `data` into the folder `result`."""
        return [
            *(f"--{flag}={folder}" for flag, folder in base.items()),
            f"--train_data_dir={data}",
            f"--output_dir={result}",
            f"--resolution={RESOLUTION}",
            "--seed=0",
            *self.flags,
            *more,
        ]


SHORT = ("--max_train_steps=300", "--train_batch_size=8", "--encoded_cache")
JOBS = {
    "prior": Job(
        "kandinsky2_2/train_text_to_image_prior.py", ("--learning_rate=5e-4", *SHORT), look="striped", lora=False
    ),
    "prior-lora": Job(
        "kandinsky2_2/train_text_to_image_prior_lora.py", ("--learning_rate=2e-3", *SHORT), look="striped", lora=True
    ),
}
