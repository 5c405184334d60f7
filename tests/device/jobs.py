"""The training scripts as jobs of the runner: all of them, on tiny models, with the settings that precision meets."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.launching import script

FULL = ("decoder", "prior", "sdxl", "sd3", "sd", "vae_decoder", "lcm_distill_sd", "lcm_distill_sdxl")
LORA = (
    *("decoder_lora", "prior_lora", "lora_sd", "lora_sdxl", "lora_sd3", "lora_qwen"),
    *("lcm_distill_lora_sd", "lcm_distill_lora_sdxl"),
)
FAMILIES = {
    "kandinsky": ("decoder", "decoder_lora", "prior", "prior_lora"),
    "stable_diffusion": ("sdxl", "lora_sdxl", "sd", "lora_sd", "vae_decoder"),
    "sd3": ("sd3", "lora_sd3"),
    "qwen": ("lora_qwen",),
    "lcm": ("lcm_distill_sd", "lcm_distill_sdxl", "lcm_distill_lora_sd", "lcm_distill_lora_sdxl"),
}


@dataclass(frozen=True)
class Setting:
    """What a run is asked for beside its model and data."""

    dtype: str = "fp16"
    level: str = "O1"
    ema: bool = True
    accumulates: bool = False
    recomputes: bool = False
    cached: bool = False
    eight_bits: bool = False

    @property
    def precision_flags(self) -> list:
        return [f"--mixed_precision={self.dtype}", f"--amp_level={self.level}"]

    @property
    def other_flags(self) -> list:
        """Those that a run in float32 has, too."""
        switches = {
            "--use_ema": self.ema,
            "--gradient_checkpointing": self.recomputes,
            "--use_8bit_adam": self.eight_bits,
        }
        flags = [flag for flag, wanted in switches.items() if wanted]
        flags += ["--encoded_cache"] if self.cached else ["--no_encoded_cache"]
        batch, batches = (1, 2) if self.accumulates else (2, 1)
        return [*flags, f"--train_batch_size={batch}", f"--gradient_accumulation_steps={batches}"]

    def __str__(self):
        also = [name for name in ("ema", "accumulates", "recomputes", "cached", "eight_bits") if getattr(self, name)]
        return f"{self.dtype} {self.level} {' '.join(also)}"


# One of each script, so that every two settings occur together where they may.
COVERING = {
    "decoder": Setting("fp16", "O2", ema=False, recomputes=True),
    "decoder_lora": Setting("bf16", "O1", accumulates=True, eight_bits=True),
    "prior": Setting("fp16", "O1", ema=False, accumulates=True, cached=True),
    "prior_lora": Setting("bf16", "O2", ema=False, cached=True),
    "sdxl": Setting("fp16", "O1", recomputes=True, cached=True, eight_bits=True),
    "lora_sdxl": Setting("fp16", "O2", cached=True),
    "sd3": Setting("bf16", "O2", ema=False, accumulates=True, recomputes=True, cached=True),
    "lora_sd3": Setting("fp16", "O1", ema=False, cached=True, eight_bits=True),
    "sd": Setting("bf16", "O1", accumulates=True, recomputes=True),
    "lora_sd": Setting("bf16", "O2", cached=True),
    "vae_decoder": Setting("fp16", "O2", cached=True),
    "lora_qwen": Setting("bf16", "O1", recomputes=True, cached=True),
    "lcm_distill_sd": Setting("fp16", "O1", ema=False, accumulates=True),
    "lcm_distill_sdxl": Setting("fp16", "O2", accumulates=True),
    "lcm_distill_lora_sd": Setting("fp16", "O2", recomputes=True),
    "lcm_distill_lora_sdxl": Setting("bf16", "O2"),
}
QUANTIZED = {"prior_lora": "int8", "lcm_distill_lora_sd": "nf4"}  # the others keep their base in 16 bits
EVERYTHING = [
    (name, Setting(dtype, level)) for name in (*FULL, *LORA) for dtype in ("fp16", "bf16") for level in ("O1", "O2")
]


def pairs(setting) -> set:
    """Every two values that a setting has."""
    return set(itertools.combinations(sorted(vars(setting).items()), 2))


class Jobs:
    """Jobs of the runner, below a folder.

    Args:
        models: {"kandinsky": (prior, decoder), "sdxl": folder, "sd3": folder, "sd": folder,
            "qwen": folder} of tiny pipelines.
        photos: the folder of images.
    """

    def __init__(self, models, photos, folder):
        self.models, self.photos, self.folder, self.list = models, photos, Path(folder), []

    def base(self, name):
        """The folder of the pipeline that a job starts from: the part of it that the job trains, for a full one."""
        if name in FAMILIES["kandinsky"]:
            return self.models["kandinsky"]["decoder" in name]
        return self.models[next((family for family in ("sdxl", "sd3", "qwen") if family in name), "sd")]

    def flags(self, name):
        """What a job has to be told in any case."""
        if name in FAMILIES["kandinsky"]:
            prior, decoder = self.models["kandinsky"]
            model = [
                f"--pretrained_prior_model_name_or_path={prior}", f"--pretrained_decoder_model_name_or_path={decoder}",
            ]  # fmt: skip
        else:
            what = "teacher_model" if "lcm" in name else "model_name_or_path"
            model = [f"--pretrained_{what}={self.base(name)}"]
        size = ["--resolution=32", "--learning_rate=1e-3", "--seed=0", f"--train_data_dir={self.photos}"]
        quantized = [f"--quantize_base={QUANTIZED[name]}"] if name in QUANTIZED else []
        return [*model, *size, *quantized, "--report_to=visualdl"]

    def add(self, name, out, *flags) -> Path:
        """Append a run of a job; returns its output folder."""
        output_dir = self.folder / out
        everything = [*self.flags(name), *map(str, flags), f"--output_dir={output_dir}"]
        self.list.append({"script": str(script(name)), "flags": everything})
        return output_dir
