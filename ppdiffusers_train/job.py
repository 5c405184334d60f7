"""What training scripts share: `main`, and base classes for jobs that train one model, in full or with LoRA."""

import ppdiffusers_train  # noqa: F401  (before paddle)

import contextlib

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.errors import UserError, one_line_errors
from ppdiffusers_train.loop.optimizers import change_before_loading
from ppdiffusers_train.loop.run import resolve_run
from ppdiffusers_train.models.lora import add_lora, initialize_lora, load_lora_weights, save_lora, save_lora_weights
from ppdiffusers_train.models.unet import save_memory
from ppdiffusers_train.models.unloaded import changed_before_loading, loading_on_host
from ppdiffusers_train.models.weights import load_in_place, save_model
from ppdiffusers_train.module import DiffusionTrainingModule
from ppdiffusers_train.objectives.denoising import (
    check_multires,
    denoising_loss,
    draw_noise,
    huber_settings,
    perturb_noise,
    snr_weighting,
)
from ppdiffusers_train.objectives.noise_schedule import add_noise
from ppdiffusers_train.training import index_dataset, train_job


def job_main(build_parser, module_class, build_dataset=build_dataset):
    """Make the `main(argv=None)` of a training script: flags, data, models, training. A mistake gets one line and exit
    status 2.

    Args:
        build_parser: returns the parser of the script's flags.
        module_class: the script's `DiffusionTrainingModule`, which is built from the flags.
        build_dataset: returns the dataset that the flags name.
    """

    @one_line_errors
    def main(argv):
        run = resolve_run(build_parser().parse_args(argv))
        with run.lock:
            dataset = build_dataset(run.args)
            index_dataset(dataset, run)
            change = change_before_loading(run.args, module_class)
            with changed_before_loading(module_class.trained, change) if change else contextlib.nullcontext():
                module = module_class(run.args)
            module.inspect_dataset(dataset)
            train_job(module, dataset, run)

    return main


@contextlib.contextmanager
def named_by_flags():
    """A context that turns a formula's `ValueError` about its parameter `x` into a `UserError` about the flag `--x`."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"--{error}") from error


class FullTraining(DiffusionTrainingModule):
    """Trains all of a model: a checkpoint holds the model's folder; so does the result, unless a job writes more."""

    trained = "unet"
    """Name of the model's attribute and of its folder."""

    averages = ()
    """The same names of its moving averages, which are saved beside it."""

    def save_memory(self, model):
        """Let a UNet or a VAE recompute its activations, and use other attention, where flags ask for it."""
        args = self.args
        attention = args.enable_xformers_memory_efficient_attention, args.attention_slices
        save_memory(model, args.gradient_checkpointing, *attention)

    def save_weights(self, directory):
        library = "diffusers" if self.args.save_format == "diffusers" else "ppdiffusers"  # a single file is a pipeline
        for name in (self.trained, *self.averages):
            save_model(getattr(self, name), f"{directory}/{name}", library)

    def load_weights(self, directory):
        for name in (self.trained, *self.averages):
            load_in_place(getattr(self, name), f"{directory}/{name}")

    def save_pretrained(self, directory):
        for name in (self.trained, *self.averages):
            save_model(getattr(self, name), f"{directory}/{name}", self.args.save_format)

    @property
    def _base_folder(self):
        """The folder of the base's pipeline, or None."""
        return getattr(self, "folder", None) or getattr(self, "folders", None)

    def generation_settings(self):
        names = ("resolution", "validation_inference_steps", "clip_skip")
        return {name: getattr(self.args, name) for name in names if hasattr(self.args, name)}

    def generation_files(self):
        return self._base_folder.files() if hasattr(self._base_folder, "files") else super().generation_files()

    def changed_process(self):
        scheduler = getattr(self, "scheduler", None)
        has_own = scheduler is not None and hasattr(self._base_folder, "changed_process")
        return self._base_folder.changed_process(scheduler) if has_own else ""

    def copied_bytes(self, directory):
        source = self._base_folder
        is_pipeline = type(self).save_pretrained is not FullTraining.save_pretrained
        if not is_pipeline or not hasattr(source, "exported_bytes"):
            return 0
        return source.exported_bytes(self.trained, directory, self.args.save_format, self.args.save_dtype)


class DenoisingTraining(FullTraining):
    """Trains a model to denoise, as the flags of `arguments.add_diffusion_arguments` say.

    A job calls `use_scheduler` when it loads its parts, and the other methods in `forward`.
    """

    def use_scheduler(self, scheduler) -> None:
        """Train for the process and the prediction type of a scheduler.

        Raises:
            UserError: a flag does not fit it, or another flag.
        """
        self.scheduler, args = scheduler, self.args
        with named_by_flags():
            self.weighting = snr_weighting(
                args.snr_gamma, args.debiased_loss, args.scale_v_pred_loss_like_noise_pred,
                scheduler.config.prediction_type,
            )  # fmt: skip
            self.huber = huber_settings(args.loss_type, args.huber_c, args.huber_schedule)

    def add_noise(self, draws, sample, noise, timesteps):
        """The model's input: a sample with noise, perturbed if asked for. [B, …] -> [B, …]."""
        noise = perturb_noise(draws, noise, self.args.input_perturbation)
        return add_noise(self.scheduler.alphas_cumprod, sample, noise, timesteps)

    def denoising_loss(self, prediction, sample, noise, timesteps, area=None):
        """The loss of the model's prediction. [B, …] -> a scalar. `area` is a weight map of `losses.area_weights`."""
        kind, schedule = self.scheduler.config.prediction_type, self.scheduler.alphas_cumprod
        return denoising_loss(prediction, kind, schedule, sample, noise, timesteps, self.weighting, self.huber, area)


class LatentDenoisingTraining(DenoisingTraining):
    """The same for latents of images, whose noise may have offsets and coarse parts."""

    def use_scheduler(self, scheduler):
        super().use_scheduler(scheduler)
        with named_by_flags():
            check_multires(self.args.multires_noise_discount, self.args.multires_noise_iterations)

    def draw_noise(self, draws, latents):
        """Noise of the shape of latents [B, C, h, w]."""
        args, shape = self.args, latents.shape[1:]
        return draw_noise(draws, shape, args.noise_offset, args.multires_noise_discount, args.multires_noise_iterations)


class LoRATraining:
    """Makes a job train LoRA layers on its model instead of the model: `class MyLoRAJob(LoRATraining, MyJob)`.

    `trained` of the job names the model. The flags are those of `arguments.add_lora_arguments`. A checkpoint and the
    result hold the LoRA layers, and the parts of the model that `--trainable_modules` names.
    """

    adapted = {}
    """{name: text encoder} of text encoders that have LoRA layers, too."""

    lora_formats = ()
    """The libraries that the result is written for; if empty, the one of `--save_format`."""

    def __init__(self, args):
        if args.quantize_base != "no" and args.to_static:
            raise UserError("--quantize_base: traced graphs may keep whole weights; expected it without --to_static")
        # A device need not have room for the weights before they are quantized, one after the other.
        with loading_on_host() if args.quantize_base != "no" else contextlib.nullcontext():
            super().__init__(args)
        self.title = f"{self.title}, LoRA"
        self.add_lora(getattr(self, self.trained), args.lora_target_modules)

    def rate_factor(self, name):
        # LoRA+ (Hayou et al. 2024, arXiv 2402.12354): the matrix that begins as zeros has a higher rate.
        factor = self.args.lora_plus_ratio if name.endswith(".lora_layer.up.weight") else 1.0
        if name.split(".")[0] in self.adapted and self.args.text_encoder_lr is not None:
            factor *= self.args.text_encoder_lr / self.args.learning_rate
        return factor

    def add_lora(self, model, targets: str) -> None:
        """Freeze a model and add LoRA to the layers that `targets` names, as the flags say."""
        args = self.args
        add_lora(model, targets, args.lora_rank, args.lora_alpha, args.lora_dropout, args.seed or 0, args.use_rslora)

    @property
    def quantized(self):
        models, kind = (self.trained, *self.adapted), self.args.quantize_base
        return {} if kind == "no" else dict.fromkeys(models, kind)

    @property
    def save_formats(self):
        return self.lora_formats or (self.args.save_format,)

    def initialize(self, log):
        if not self.args.init_lora:
            return super().initialize(log)
        args, model = self.args, getattr(self, self.trained)
        return {"--init_lora": initialize_lora(args.init_lora, model, args.lora_target_modules, log, **self.adapted)}

    def save_weights(self, directory):
        save_lora_weights(getattr(self, self.trained), directory, self.save_formats, **self.adapted)

    def load_weights(self, directory):
        load_lora_weights(getattr(self, self.trained), directory, **self.adapted)

    def save_pretrained(self, directory):
        for library in self.save_formats:
            save_lora(getattr(self, self.trained), directory, library, **self.adapted)

    def copied_bytes(self, directory):
        return 0

    def card_data(self):
        card = super().card_data()
        return {**card, "tags": [*card["tags"], "lora"]}
