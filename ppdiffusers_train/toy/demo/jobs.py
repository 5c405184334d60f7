"""One short run of every job on the pretrained pipelines of shapes: script, flags, and how to use its result.

A fine-tuning job trains on pictures in a look that the pipeline generates only if a caption names it; their captions do
not. In Kandinsky, embeddings of striped and plain shapes differ, so the prior can be trained to produce striped ones.
Embeddings of outlined and plain shapes are alike, so the decoder can be trained to generate outlined ones. Distillation
trains on pictures that the pipeline generates already, and needs fewer steps for them.

Nothing heavy is imported here, because the command line reads the jobs' names.
"""

from dataclasses import dataclass

RESOLUTION = 32

KANDINSKY_SAMPLING = {
    "num_inference_steps": 25,
    "prior_num_inference_steps": 25,
    "guidance_scale": 2.0,
    "prior_guidance_scale": 2.0,
}
SAMPLING = {"num_inference_steps": 25, "guidance_scale": 3.0}
FEW_STEPS = 4
FEW, SOME, MANY = 24, 480, 2000  # pictures


@dataclass(frozen=True)
class Job:
    """A training script, its flags, and how its result is used."""

    script: str
    flags: tuple
    sampling: dict  # arguments of the pipeline's call
    kind: str  # of the result: how a user loads it, see `running.USES`
    look: str  # of the training pictures
    pictures: int = SOME  # number of training pictures
    sampling_before: dict = None  # arguments before training, where they differ

    @property
    def family(self) -> str:
        """Which pipeline it trains: kandinsky, sdxl, sd3 or sd."""
        return next((family for family in ("kandinsky", "sdxl", "sd3") if family in self.script), "sd")

    @property
    def distils(self) -> bool:
        """Whether it trains for fewer inference steps, not for a look."""
        return self.kind.startswith("student")

    @property
    def model_flags(self) -> tuple:
        """The flags that name the pipelines it starts from."""
        if self.family == "kandinsky":
            return "pretrained_prior_model_name_or_path", "pretrained_decoder_model_name_or_path"
        return ("pretrained_teacher_model" if self.distils else "pretrained_model_name_or_path",)

    def command(self, base: dict, data, result, *more: str) -> list:
        """The flags of a run on the folder `data` into the folder `result`."""
        return [
            *(f"--{flag}={folder}" for flag, folder in base.items()),
            f"--train_data_dir={data}",
            f"--output_dir={result}",
            "--overwrite_output_dir",
            f"--resolution={RESOLUTION}",
            "--seed=0",
            *self.flags,
            *more,
        ]


FULL_RATE = "--learning_rate=5e-4"
COSINE = ("--lr_scheduler=cosine", "--lr_warmup_steps=20")
DROPOUT = "--proportion_empty_prompts=0.1"
LONG = ("--max_train_steps=900", "--train_batch_size=16")
LONGEST = ("--max_train_steps=1200", "--train_batch_size=16", DROPOUT)


def _fine_tuning(script: str, kind: str, *more: str, look: str = "outlined", pictures: int = SOME) -> Job:
    sampling = KANDINSKY_SAMPLING if "kandinsky" in script else SAMPLING
    flags = ("--max_train_steps=600", "--train_batch_size=8", *COSINE, "--encoded_cache", *more)
    return Job(script, flags, sampling, kind, look, pictures)


def _distillation(script: str, kind: str) -> Job:
    flags = ("--max_train_steps=300", "--train_batch_size=16", "--encoded_cache", "--loss_type=huber")
    before = {**SAMPLING, "num_inference_steps": FEW_STEPS}
    if "lora" in kind:  # no conditioning on guidance, so one scale is trained; it is its own target and must not drift
        flags += ("--learning_rate=2e-4", *COSINE, "--num_ddim_timesteps=20", "--w_min=0.5", "--w_max=0.5")
        return Job(script, flags, {**before, "guidance_scale": 1.0}, kind, "plain", MANY, before)
    return Job(script, (*flags, FULL_RATE, "--w_min=1", "--w_max=4"), before, kind, "plain", SOME, before)


JOBS = {
    "decoder": _fine_tuning(
        "kandinsky2_2/train_text_to_image_decoder.py",
        "decoder",
        FULL_RATE,
        *LONGEST,
        pictures=MANY,
    ),
    "decoder-lora": _fine_tuning(
        "kandinsky2_2/train_text_to_image_decoder_lora.py",
        "decoder lora",
        "--rank=16",
        "--learning_rate=1e-3",
        "--max_train_steps=300",
        pictures=FEW,
    ),
    "prior": _fine_tuning("kandinsky2_2/train_text_to_image_prior.py", "prior", FULL_RATE, look="striped"),
    "prior-lora": _fine_tuning(
        "kandinsky2_2/train_text_to_image_prior_lora.py",
        "prior lora",
        # With as many parameters on attention only, 86 % of images are striped.
        "--lora_target_modules=to_q,to_k,to_v,to_out.0,ff.net.2",
        "--rank=3",
        "--learning_rate=3e-3",
        *LONG,
        look="striped",
        pictures=MANY,
    ),
    "sd": _fine_tuning("stable_diffusion/train_text_to_image.py", "pipeline", FULL_RATE, *LONG, DROPOUT, pictures=MANY),
    "sd-lora": _fine_tuning(
        "stable_diffusion/train_text_to_image_lora.py", "lora", "--rank=12", "--learning_rate=2e-3", *LONG
    ),
    "sdxl": _fine_tuning(
        "sdxl/train_text_to_image_sdxl.py",
        "pipeline",
        FULL_RATE,
        *LONG,
        DROPOUT,
        pictures=MANY,
    ),
    "sdxl-lora": _fine_tuning(
        "sdxl/train_text_to_image_lora_sdxl.py", "lora", "--rank=12", "--learning_rate=2e-3", *LONG
    ),
    "sd3": _fine_tuning("sd3/train_text_to_image_sd3.py", "pipeline", FULL_RATE, *LONG, pictures=MANY),
    "sd3-lora": _fine_tuning(
        "sd3/train_text_to_image_lora_sd3.py", "transformer lora", "--rank=14", "--learning_rate=2e-3", *LONG
    ),
    "lcm": _distillation("lcm/train_lcm_distill_sd_wds.py", "student"),
    "lcm-lora": _distillation("lcm/train_lcm_distill_lora_sd_wds.py", "student lora"),
    "lcm-sdxl": _distillation("lcm/train_lcm_distill_sdxl_wds.py", "student"),
    "lcm-sdxl-lora": _distillation("lcm/train_lcm_distill_lora_sdxl_wds.py", "student lora"),
}
