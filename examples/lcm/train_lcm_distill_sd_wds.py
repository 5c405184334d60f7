"""Distill Stable Diffusion into a latent consistency model: a UNet that draws in one to eight steps.

    python -u train_lcm_distill_sd_wds.py --pretrained_teacher_model sd --train_data_dir photos --output_dir lcm

The results are the student, `lcm/unet`, and its average, `lcm/unet_target`, each for a pipeline with `LCMScheduler`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)

import paddle
from ppdiffusers import DDPMScheduler, LCMScheduler

from ppdiffusers_train.arguments import (
    ArgumentParser,
    add_data_arguments,
    add_distillation_arguments,
    add_output_arguments,
    add_reporting_arguments,
    add_training_arguments,
    add_validation_arguments,
    positive_int,
    unit_float,
)
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.transforms import fit, normalize_pixels
from ppdiffusers_train.errors import UserError, one_line_errors
from ppdiffusers_train.models.attention import enable_memory_efficient_attention
from ppdiffusers_train.models.consistency import build_student
from ppdiffusers_train.models.drawing import draw
from ppdiffusers_train.models.recompute import enable_recompute
from ppdiffusers_train.models.stable_diffusion import StableDiffusionFolder, encode_images, encode_prompt
from ppdiffusers_train.models.text import tokenize
from ppdiffusers_train.models.weights import load_in_place, save_model
from ppdiffusers_train.module import DiffusionTrainingModule, freeze
from ppdiffusers_train.objectives.consistency import (
    consistency_function,
    ddim_step,
    ddim_timesteps,
    guidance_embedding,
    guided,
    sample_and_noise,
)
from ppdiffusers_train.objectives.losses import mse_loss, pseudo_huber_loss
from ppdiffusers_train.objectives.noise_schedule import add_noise
from ppdiffusers_train.reporting.images import beside
from ppdiffusers_train.runtime.ema import move_average
from ppdiffusers_train.training import check_run, launch_training_task

STEPS_SHOWN, TEACHER_SCALE = (1, 2, 4, 8), 7.5


def build_parser(doc=__doc__):
    parser = build_distillation_parser(doc)
    group = parser.add_argument_group("student and target")
    group.add_argument(
        "--unet_time_cond_proj_dim", type=positive_int, default=256, help="channels that tell the student its guidance"
    )
    group.add_argument("--ema_decay", type=unit_float, default=0.95, help="of the target network, each step")
    return parser


def build_distillation_parser(doc):
    """What the LoRA's script has, too."""
    parser = ArgumentParser(description=doc.splitlines()[0])
    add_distillation_arguments(parser)
    add_data_arguments(parser)
    add_training_arguments(parser)
    add_output_arguments(parser, output_dir="lcm-xl-distilled")
    add_validation_arguments(parser)
    add_reporting_arguments(parser)
    parser.set_defaults(validation_steps=200, validation_inference_steps=50)
    return parser


class LCMTrainingModule(DiffusionTrainingModule):
    """The student learns that wherever on the teacher's path it starts, it must end at the same image."""

    encoders = ("vae", "text_encoder")
    can_compile_encode = True
    keep_float32 = ("teacher", "target_unet")

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.encode_batch_size = args.vae_encode_batch_size
        self.open_folder()
        self.folder.check_resolution(args.resolution)
        if args.w_min > args.w_max:
            raise UserError(f"--w_min: {args.w_min:g} is above --w_max, which is {args.w_max:g}")
        self.scheduler = self.folder.load("scheduler", DDPMScheduler)
        total = self.scheduler.config.num_train_timesteps
        if args.num_ddim_timesteps > total:
            raise UserError(
                f"--num_ddim_timesteps: {args.num_ddim_timesteps} is more than the {total} timesteps of the teacher"
            )
        self.steps = paddle.to_tensor(ddim_timesteps(total, args.num_ddim_timesteps))
        self.stride = total // args.num_ddim_timesteps
        self.vae = freeze(self.folder.load("vae"))
        self.build_networks()
        if args.gradient_checkpointing:
            enable_recompute(self.unet)
        if args.enable_xformers_memory_efficient_attention:
            enable_memory_efficient_attention(self.unet)

    def open_folder(self):
        """The teacher's parts that prepare samples."""
        args = self.args
        self.folder = StableDiffusionFolder(
            args.pretrained_teacher_model, args.pretrained_vae_model_name_or_path, "--pretrained_teacher_model",
            args.cache_dir, args.teacher_revision or args.revision, weights=not args.dry_run,
        )  # fmt: skip
        self.tokenizer = self.folder.load("tokenizer")
        self.text_encoder = freeze(self.folder.load("text_encoder"))
        ids = paddle.to_tensor(tokenize(self.tokenizer, "")[0]).unsqueeze(0)
        with paddle.no_grad():
            self.empty_prompt = encode_prompt(self.text_encoder, ids)

    def build_networks(self):
        """Teacher, student, and the student's average, which is the target."""
        args = self.args
        self.teacher = freeze(self.folder.load("unet"))
        if args.cast_teacher_unet:
            self.keep_float32 = ("target_unet",)
        self.unet = build_student(self.teacher, args.unet_time_cond_proj_dim, args.seed or 0)
        self.target_unet = freeze(build_student(self.teacher, args.unet_time_cond_proj_dim, args.seed or 0))

    def preprocess(self, row, draws):
        """pixel_values [3, R, R]; input_ids [L]."""
        args, caption = self.args, row["caption"]
        image, *_ = fit(
            row["image"], args.resolution, args.resolution, draws, args.interpolation_type, args.center_crop,
            args.random_flip,
        )  # fmt: skip
        if draws.happens("drop_caption", args.proportion_empty_prompts):
            caption = ""
        return {"pixel_values": normalize_pixels(image), "input_ids": tokenize(self.tokenizer, caption)[0]}

    def encoding_settings(self):
        names = ["resolution", "interpolation_type", "center_crop", "random_flip", "proportion_empty_prompts"]
        return {
            **{name: getattr(self.args, name) for name in names},
            "scaling_factor": self.vae.config.scaling_factor,
            "tokenizer": self.tokenizer.get_vocab(),
        }

    def encode(self, batch):
        """latents [B, 4, r, r], scaled; prompt_embeds [B, L, D]."""
        return {
            "latents": encode_images(self.vae, batch["pixel_values"]),
            "prompt_embeds": encode_prompt(self.text_encoder, batch["input_ids"]),
        }

    def conditions(self, encoded):
        """What the UNets are told: the caption, and nothing."""
        prompt = encoded["prompt_embeds"]
        return {"encoder_hidden_states": prompt}, {"encoder_hidden_states": self.empty_prompt.expand(prompt.shape)}

    def forward(self, encoded, draws):
        args, schedule, latents = self.args, self.scheduler.alphas_cumprod, encoded["latents"]
        noise = draws.normal("noise", latents.shape[1:])
        index = draws.integers("timesteps", 0, args.num_ddim_timesteps)
        guidance = draws.uniform("guidance_scale", args.w_min, args.w_max)
        start = self.steps[index]
        end = paddle.clip(start - self.stride, min=0)
        noisy = add_noise(schedule, latents, noise, start)
        caption, nothing = self.conditions(encoded)

        student = self.consistency(self.student_predicts, noisy, start, caption, guidance)
        with paddle.no_grad():
            pairs = [self.teacher_predicts(noisy, start, condition) for condition in (caption, nothing)]
            (sample, noise), (empty_sample, empty_noise) = (self.sample_and_noise(p, noisy, start) for p in pairs)
            sample, noise = guided(sample, empty_sample, guidance), guided(noise, empty_noise, guidance)
            earlier = ddim_step(schedule, self.steps, index, sample, noise)
            target = self.consistency(self.target_predicts, earlier, end, caption, guidance)
        if args.loss_type == "huber":
            return pseudo_huber_loss(student, target, args.huber_c)
        return mse_loss(student, target)

    def consistency(self, predicts, noisy, timesteps, condition, guidance):
        """f(x, t) of a network."""
        sample, _ = self.sample_and_noise(predicts(noisy, timesteps, condition, guidance), noisy, timesteps)
        return consistency_function(noisy, sample, timesteps, self.args.timestep_scaling_factor)

    def sample_and_noise(self, prediction, noisy, timesteps):
        """What a prediction stands for, in float32."""
        kind, schedule = self.scheduler.config.prediction_type, self.scheduler.alphas_cumprod
        return sample_and_noise(kind, schedule, prediction.astype("float32"), noisy, timesteps)

    def student_predicts(self, noisy, timesteps, condition, guidance):
        return self.with_guidance(self.unet, noisy, timesteps, condition, guidance)

    def target_predicts(self, noisy, timesteps, condition, guidance):
        return self.with_guidance(self.target_unet, noisy, timesteps, condition, guidance)

    def with_guidance(self, unet, noisy, timesteps, condition, guidance):
        embedding = guidance_embedding(guidance, unet.config.time_cond_proj_dim)
        return unet(noisy, timesteps, timestep_cond=embedding, **condition).sample

    def teacher_predicts(self, noisy, timesteps, condition):
        return self.teacher(noisy, timesteps, **condition).sample

    def after_step(self):
        move_average(self.target_unet.parameters(), self.unet.parameters(), self.args.ema_decay)

    def generate(self, prompts, seeds):
        """For each prompt and seed the student's pictures of 1, 2, 4 and 8 steps beside the teacher's of many."""
        columns = [self.draw_student(prompts, seeds, steps) for steps in STEPS_SHOWN]
        return [beside(strip) for strip in zip(*columns, self.draw_teacher(prompts, seeds))]

    def draw_student(self, prompts, seeds, steps):
        """As a user would: the pipeline with the student's average and its scheduler, at a guidance it has seen."""
        scheduler = LCMScheduler.from_config(self.scheduler.config)
        pipeline = self.folder.pipeline(vae=self.vae, unet=self.target_unet, scheduler=scheduler, **self.text_parts())
        scale = 1 + (self.args.w_min + self.args.w_max) / 2
        return draw(pipeline, prompts, seeds, self.args.resolution, steps, guidance_scale=scale)

    def draw_teacher(self, prompts, seeds):
        args = self.args
        pipeline = self.folder.pipeline(vae=self.vae, unet=self.teacher_unet(), **self.text_parts())
        return draw(
            pipeline, prompts, seeds, args.resolution, args.validation_inference_steps, guidance_scale=TEACHER_SCALE
        )

    def text_parts(self):
        return {"text_encoder": self.text_encoder}

    def teacher_unet(self):
        return self.teacher

    def save_weights(self, directory):
        save_model(self.unet, f"{directory}/unet")
        save_model(self.target_unet, f"{directory}/unet_target")

    def load_weights(self, directory):
        load_in_place(self.unet, f"{directory}/unet")
        load_in_place(self.target_unet, f"{directory}/unet_target")

    def save_pretrained(self, directory):
        save_model(self.unet, f"{directory}/unet", self.args.save_format)
        save_model(self.target_unet, f"{directory}/unet_target", self.args.save_format)

    def card_data(self):
        return {
            "base_model": self.args.pretrained_teacher_model,
            "tags": ["latent-consistency-model", "stable-diffusion", "text-to-image", "ppdiffusers"],
        }


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    check_run(args)
    dataset = build_dataset(args)
    launch_training_task(LCMTrainingModule(args), dataset, args)


if __name__ == "__main__":
    main()
