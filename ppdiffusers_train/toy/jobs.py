"""One short run of every job on the pretrained pipelines of shapes: which script, which flags, how its result draws.

A job learns from pictures in a look that the pipeline does not draw. Kandinsky's decoder has learned to draw stripes,
too, and its prior learns to ask for them. Nothing heavy is imported here: the command line reads the jobs' names.
"""

from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RESOLUTION = 32

KANDINSKY_DRAWING = {"num_inference_steps": 25, "prior_num_inference_steps": 25, "guidance_scale": 2.0}
SD3_DRAWING = {"num_inference_steps": 25, "guidance_scale": 3.0}


@dataclass(frozen=True)
class Job:
    """A training script, its flags, and how its result is used."""

    script: str
    flags: tuple
    drawing: dict  # arguments of a pipeline's call
    kind: str  # of the result: how a user loads it, see `running.USES`
    look: str  # of the pictures that it learns from

    @property
    def family(self) -> str:
        """Which pipeline it trains: kandinsky or sd3."""
        return "kandinsky" if "kandinsky" in self.script else "sd3"

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


FULL_RATE, LORA_RATE = "--learning_rate=5e-4", "--learning_rate=2e-3"


def _fine_tuning(script: str, kind: str, look: str = "outlined") -> Job:
    drawing = KANDINSKY_DRAWING if "kandinsky" in script else SD3_DRAWING
    rate = LORA_RATE if "lora" in kind else FULL_RATE
    flags = (rate, "--max_train_steps=300", "--train_batch_size=8", "--encoded_cache")
    return Job(script, flags, drawing, kind, look)


JOBS = {
    "prior": _fine_tuning("kandinsky2_2/train_text_to_image_prior.py", "prior", look="striped"),
    "prior-lora": _fine_tuning("kandinsky2_2/train_text_to_image_prior_lora.py", "prior lora", look="striped"),
    "sd3": _fine_tuning("sd3/train_text_to_image_sd3.py", "pipeline"),
    "sd3-lora": _fine_tuning("sd3/train_text_to_image_lora_sd3.py", "transformer lora"),
}
