"""One short run of every job on the pretrained pipelines of shapes: which script, which flags, how its result draws.

A fine-tuning job learns from pictures in another look, outlined, than the pipelines draw in. Distillation learns from
pictures as they are drawn anyway, and shows in how few steps they come out. Nothing heavy is imported here: the command
line reads the jobs' names.
"""

from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RESOLUTION = 32

KANDINSKY_DRAWING = {"num_inference_steps": 25, "prior_num_inference_steps": 25}
SD_DRAWING = {"num_inference_steps": 25, "guidance_scale": 3.0}
FEW_STEPS = 4
DISTILLATION = ("--max_train_steps=400", "--train_batch_size=16", "--loss_type=huber", "--w_min=1", "--w_max=4")


@dataclass(frozen=True)
class Job:
    """A training script, its flags, and how its result is used."""

    script: str
    flags: tuple
    drawing: dict
    kind: str  # of the result: how a user loads it, see `running.USES`
    drawing_before: dict = None  # of the pipeline as it was, where that differs

    @property
    def family(self) -> str:
        """Which pipeline it trains: kandinsky, sdxl, sd3 or sd."""
        return next((family for family in ("kandinsky", "sdxl", "sd3") if family in self.script), "sd")

    @property
    def distils(self) -> bool:
        """Whether the aim is to need fewer steps, not to learn a look."""
        return self.kind.startswith("student")

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


def _fine_tuning(script: str, kind: str, drawing: dict, *flags: str) -> Job:
    return Job(script, ("--train_batch_size=8", "--encoded_cache", *flags), drawing, kind)


def _distillation(script: str, kind: str, guidance: float, *flags: str) -> Job:
    drawing = {"num_inference_steps": FEW_STEPS, "guidance_scale": guidance}
    before = {**SD_DRAWING, "num_inference_steps": FEW_STEPS}
    return Job(script, (*DISTILLATION, "--encoded_cache", *flags), drawing, kind, before)


FULL_RATE, LORA_RATE = "--learning_rate=5e-4", "--learning_rate=2e-3"
JOBS = {
    "decoder": _fine_tuning(
        "kandinsky2_2/train_text_to_image_decoder.py", "decoder", KANDINSKY_DRAWING, FULL_RATE, "--max_train_steps=300"
    ),
    "decoder-lora": _fine_tuning(
        "kandinsky2_2/train_text_to_image_decoder_lora.py",
        "decoder lora",
        KANDINSKY_DRAWING,
        LORA_RATE,
        "--max_train_steps=300",
    ),
    "prior": _fine_tuning(
        "kandinsky2_2/train_text_to_image_prior.py", "prior", KANDINSKY_DRAWING, FULL_RATE, "--max_train_steps=300"
    ),
    "prior-lora": _fine_tuning(
        "kandinsky2_2/train_text_to_image_prior_lora.py",
        "prior lora",
        KANDINSKY_DRAWING,
        LORA_RATE,
        "--max_train_steps=300",
    ),
    "sdxl": _fine_tuning(
        "sdxl/train_text_to_image_sdxl.py", "pipeline", SD_DRAWING, FULL_RATE, "--max_train_steps=300"
    ),
    "sdxl-lora": _fine_tuning(
        "sdxl/train_text_to_image_lora_sdxl.py", "lora", SD_DRAWING, LORA_RATE, "--max_train_steps=300"
    ),
    "sd3": _fine_tuning("sd3/train_text_to_image_sd3.py", "pipeline", SD_DRAWING, FULL_RATE, "--max_train_steps=300"),
    "sd3-lora": _fine_tuning(
        "sd3/train_text_to_image_lora_sd3.py", "transformer lora", SD_DRAWING, LORA_RATE, "--max_train_steps=300"
    ),
    "lcm": _distillation("lcm/train_lcm_distill_sd_wds.py", "student", 3.0, FULL_RATE),
    "lcm-lora": _distillation("lcm/train_lcm_distill_lora_sd_wds.py", "student lora", 1.0, LORA_RATE),
    "lcm-sdxl": _distillation("lcm/train_lcm_distill_sdxl_wds.py", "student", 3.0, FULL_RATE),
    "lcm-sdxl-lora": _distillation("lcm/train_lcm_distill_lora_sdxl_wds.py", "student lora", 1.0, LORA_RATE),
}
