"""Distill Stable Diffusion into a latent consistency model: a UNet that generates images in one to eight steps.

    python -u train_lcm_distill_sd_wds.py --pretrained_teacher_model sd --train_data_dir photos --output_dir lcm

The results are the student, `lcm/unet`, and its average, `lcm/unet_target`, each for a pipeline with `LCMScheduler`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

import paddle
from ppdiffusers import DDPMScheduler

from ppdiffusers_train.data.tags import draw_caption
from ppdiffusers_train.data.transforms import fit, normalize_pixels
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.job import FullTraining, job_main, named_by_flags
from ppdiffusers_train.models.consistency import TeacherAndStudent, build_student
from ppdiffusers_train.models.stable_diffusion import StableDiffusionFolder, encode_images, encode_prompt
from ppdiffusers_train.models.text import tokenize
from ppdiffusers_train.module import freeze
from ppdiffusers_train.objectives.consistency import consistency_output, ddim_timesteps, guided_ddim_step, step_before
from ppdiffusers_train.objectives.losses import mse_loss, pseudo_huber_loss
from ppdiffusers_train.objectives.noise_schedule import add_noise
from ppdiffusers_train.runtime.ema import move_average


def build_parser(doc=__doc__, has_student=True):
    """The flags. The LoRA script, which has no separate student, shares those without `has_student`."""
    parser = arguments.ArgumentParser(description=doc.splitlines()[0])
    arguments.add_distillation_arguments(parser)
    if has_student:
        arguments.add_student_arguments(parser)
    defaults = {"validation_steps": 200, "validation_inference_steps": 50}
    arguments.add_run_arguments(parser, "lcm-xl-distilled", class_images=False, **defaults)
    return parser


class LCMTrainingModule(TeacherAndStudent, FullTraining):
    """Trains the student to predict the same image from every point of the teacher's sampling path."""

    title = "LCM of Stable Diffusion"
    averages = ("unet_target",)
    folder_class = StableDiffusionFolder
    encoders = ("vae", "text_encoder")
    can_compile_encode = True
    keep_float32 = ("teacher", "unet_target")

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.encode_batch_size = args.vae_encode_batch_size
        self.folder = self.folder_class(
            args.pretrained_teacher_model, args.pretrained_vae_model_name_or_path, "--pretrained_teacher_model",
            args.cache_dir, args.teacher_revision or args.revision, args.variant, not args.dry_run,
            args.single_file_config,
        )  # fmt: skip
        self.load_text_encoders()
        self.folder.check_resolution(args.resolution)
        if args.w_min > args.w_max:
            raise UserError(f"--w_min: {args.w_min:g} is above --w_max, which is {args.w_max:g}")
        self.scheduler = self.folder.load("scheduler", DDPMScheduler)
        with named_by_flags():
            steps = ddim_timesteps(self.scheduler.config.num_train_timesteps, args.num_ddim_timesteps)
        self.steps = paddle.to_tensor(steps)
        self.load_later("vae", self.folder.later("vae"))
        self.build_networks()
        self.save_memory(self.unet)

    def load_text_encoders(self):
        """The text encoder, and its embedding of an empty caption."""
        self.tokenizer = self.folder.load("tokenizer")
        self.text_encoder = freeze(self.folder.load("text_encoder"))
        ids = paddle.to_tensor(tokenize(self.tokenizer, "")[0][None])
        self.empty_prompt = encode_prompt(self.text_encoder, ids)

    def build_networks(self):
        """Teacher, student, and the student's average, which is the target."""
        channels, seed = self.args.unet_time_cond_proj_dim, self.args.seed or 0
        self.teacher = freeze(self.folder.load("unet"))
        self.unet = build_student(self.teacher, channels, seed)
        self.unet_target = freeze(build_student(self.teacher, channels, seed))
        if self.args.cast_teacher_unet:
            self.keep_float32 = ("unet_target",)
        self.student_scale = 1 + (self.args.w_min + self.args.w_max) / 2  # the middle of its training range

    def preprocess(self, row, draws):
        """pixel_values [3, R, R]; input_ids [L]."""
        args, image, size = self.args, row["image"], self.args.resolution
        image, *_ = fit(image, size, size, draws, args.interpolation_type, args.center_crop, args.random_flip)
        how = args.proportion_empty_prompts, args.shuffle_tags, args.keep_tags, args.tag_dropout, args.wildcards
        caption = draw_caption(draws, row["caption"], *how)
        return {"pixel_values": normalize_pixels(image), "input_ids": tokenize(self.tokenizer, caption)[0]}

    def encoding_settings(self):
        names = ["resolution", "interpolation_type", "center_crop", "random_flip", "proportion_empty_prompts"]
        names += ["shuffle_tags", "keep_tags", "tag_dropout", "wildcards"]
        settings = {name: getattr(self.args, name) for name in names}
        settings["scaling_factor"] = self.folder.vae.config("vae").get("scaling_factor")
        return {**settings, "tokenizer": self.tokenizer.get_vocab()}

    def encode(self, batch):
        """latents [B, 4, r, r], scaled; prompt_embeds [B, L, D]."""
        latents = encode_images(self.vae, batch["pixel_values"])
        return {"latents": latents, "prompt_embeds": encode_prompt(self.text_encoder, batch["input_ids"])}

    def conditions(self, encoded):
        """The UNets' conditioning with the caption and without."""
        prompt = encoded["prompt_embeds"]
        return {"encoder_hidden_states": prompt}, {"encoder_hidden_states": self.empty_prompt.expand(prompt.shape)}

    def forward(self, encoded, draws):
        args, schedule, latents = self.args, self.scheduler.alphas_cumprod, encoded["latents"]
        noise = draws.normal("noise", latents.shape[1:])
        index = draws.integers("timesteps", 0, args.num_ddim_timesteps)
        guidance = draws.uniform("guidance_scale", args.w_min, args.w_max)
        start, end = self.steps[index], step_before(self.steps, index)
        noisy = add_noise(schedule, latents, noise, start)
        caption, empty = self.conditions(encoded)

        process = self.scheduler.config.prediction_type, schedule
        prediction = self.predict_with_student(self.unet, noisy, start, caption, guidance)
        student = consistency_output(*process, prediction, noisy, start, args.timestep_scaling_factor)
        with paddle.no_grad():
            predictions = [self.predict_with_teacher(noisy, start, condition) for condition in (caption, empty)]
            earlier = guided_ddim_step(*process, self.steps, index, noisy, *predictions, guidance)
            prediction = self.predict_with_student(self.unet_target, earlier, end, caption, guidance)
            target = consistency_output(*process, prediction, earlier, end, args.timestep_scaling_factor)
        if args.loss_type == "huber":
            return pseudo_huber_loss(student, target, args.huber_c)
        return mse_loss(student, target)

    def after_step(self):
        move_average(self.unet_target.parameters(), self.unet.parameters(), self.args.ema_decay)

    def generate(self, prompts, seeds):
        return self.generate_strips(prompts, seeds, self.args.resolution, self.args.validation_inference_steps)

    def card_data(self):
        tags = ["latent-consistency-model", "stable-diffusion", "text-to-image", "ppdiffusers"]
        return {"base_model": self.args.pretrained_teacher_model, "tags": tags}


main = job_main(build_parser, LCMTrainingModule)

if __name__ == "__main__":
    main()
