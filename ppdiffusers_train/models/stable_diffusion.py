"""Stable Diffusion on disk, and how its text encoder and VAE encode a sample."""

import inspect
from pathlib import Path

from ppdiffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel, schedulers
from ppdiffusers.transformers import CLIPTextModel, CLIPTokenizer

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.exported_size import exported_bytes
from ppdiffusers_train.models.part_settings import check_settings
from ppdiffusers_train.models.pipeline_folder import ModelFolder, PipelineFolder, export_pipeline
from ppdiffusers_train.models.single_file.reading import FILE, SingleFile, SingleFileVAE, find_single_file
from ppdiffusers_train.models.single_file.writing import export_single_file
from ppdiffusers_train.models.text import as_computed, join_chunks, split_chunks

VERSION = 2  # raised when its functions change encoded samples
# Settings of schedulers that flags of the same names change, with their defaults.
PROCESS = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "shift": 1.0}
FAMILIES = ("StableDiffusionXL", "StableDiffusion3", "StableDiffusion", "Kandinsky")  # how classes of pipelines begin


class StableDiffusionFolder:
    """The folder of a Stable Diffusion pipeline, with a VAE from elsewhere where one is given.

    Args:
        name_or_path, vae: folders, single files, or names on the hub; `vae` may be None.
        flag: the flag that named the pipeline, for messages.
        cache_dir, revision, variant, weights: see `PipelineFolder`.
        single_file_config: the `config` of a `SingleFile`.
    """

    pipeline_class = StableDiffusionPipeline
    parts = {
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
        "unet": UNet2DConditionModel,
        "scheduler": None,  # its class is the one that the pipeline's model_index.json names
    }
    # Arguments of the pipeline besides its parts. Validation images need no safety checker.
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    kept_settings = ("requires_safety_checker",)
    unused_layers = 0  # of text encoders, at their end

    def __init__(
        self, name_or_path, vae, flag, cache_dir=None, revision=None, variant=None, weights=True,
        single_file_config=None,
    ):  # fmt: skip
        options, parts = {"cache_dir": cache_dir, "weights": weights}, list(self.parts)
        if file := find_single_file(name_or_path):
            kind = self.pipeline_class.__name__
            self.base = SingleFile(file, flag, parts, kind, single_file_config, **options)
        else:
            self.base = PipelineFolder(name_or_path, flag, parts, revision=revision, variant=variant, **options)
            if single_file_config:
                print(f"--single_file_config has no effect: {flag} {str(name_or_path)!r} is not a single file")
        vae_flag, options = "--pretrained_vae_model_name_or_path", {**options, "variant": variant}
        if vae and (file := find_single_file(vae)):
            self.vae = SingleFileVAE(file, vae_flag, self.base)
        else:
            self.vae = ModelFolder(vae, vae_flag, "vae", "AutoencoderKL", **options) if vae else self.base
        self._check_kind()
        check_settings(self.base, [part for part in self.parts if part != "vae"])
        check_settings(self.vae, ["vae"])

    def _check_kind(self):
        """Raise a `UserError` for a pipeline of another family, or one whose model and VAE do not fit together."""
        found, expected = str(self.base.index().get("_class_name")), self.pipeline_class.__name__
        if family_of(found) not in (None, family_of(expected)):
            raise UserError(f"{self.base.flag}: {self.base.name_or_path!r} is a {found}; expected a {expected}")
        trained = "transformer" if "transformer" in self.parts else "unet"
        scheduler, is_flow = self.base.scheduler_class("scheduler").__name__, trained == "transformer"
        if scheduler.startswith("FlowMatch") != is_flow:
            kind = "one whose name begins with FlowMatch" if is_flow else "one of diffusion"
            raise UserError(f"{self.base.flag}: {self.base.name_or_path!r} has a {scheduler}; expected {kind}")
        taken = self.base.config(trained).get("in_channels")
        given = self.vae.config("vae").get("latent_channels", 4)
        if taken not in (None, given):
            raise UserError(
                f"{self.base.flag}: {self.base.name_or_path!r} has a {trained} that takes {taken} channels, and the "
                f"VAE gives {given}; expected equal numbers (models for inpainting take more, and are not trained here)"
            )

    def folder(self, part: str) -> PipelineFolder:
        """The folder that holds a part."""
        return self.vae if part == "vae" else self.base

    def load(self, part: str, part_class=None):
        """A part, as the pipeline's class or as `part_class`."""
        return self.folder(part).load(part, part_class or self.part_class(part))

    def load_scheduler(self, prediction_type=None, zero_snr=False, scheduler_class=None):
        """The scheduler, the pipeline's own or of another class, with another prediction type where one is given.

        Args:
            zero_snr: whether its last timestep is to be pure noise.
        Raises:
            UserError: it is, but the model predicts that noise.
        """
        scheduler = self.load("scheduler", scheduler_class)
        if prediction_type:
            scheduler.register_to_config(prediction_type=prediction_type)
        return with_zero_snr(scheduler) if zero_snr else scheduler

    def changed_process(self, scheduler) -> str:
        """The flag by which a scheduler of `load_scheduler` has another process than the pipeline's own, or nothing."""
        own = self.base.config("scheduler")
        for name, default in PROCESS.items():
            value = scheduler.config.get(name)
            if value not in (None, own.get(name, default)):
                return f"--{name}" if value is True else f"--{name} {value}"
        return ""

    def files(self) -> dict:
        """`{part: its files}` of the pipeline."""
        return {part: self.folder(part).files(part) for part in self.parts}

    def later(self, part: str):
        """A model of the pipeline that is loaded when it is used."""
        return self.folder(part).later(part, self.part_class(part))

    def part_class(self, part: str):
        """The class of a part in the pipeline."""
        return self.parts[part] or self.base.scheduler_class(part)

    def check_resolution(self, resolution: int) -> None:
        """Raise a `UserError` unless images of `resolution` fit the models."""
        factor = self.pixels_per_token()
        if resolution % factor:
            raise UserError(f"--resolution: {resolution} does not fit this VAE; expected a multiple of {factor}")

    def check_clip_skip(self, clip_skip: int) -> None:
        """Raise a `UserError` unless each text encoder has a layer left to use."""
        encoders = [part for part in self.parts if part.startswith("text_encoder")]
        layers = min(self.base.config(part)["num_hidden_layers"] for part in encoders) - self.unused_layers
        if clip_skip >= layers:
            raise UserError(f"--clip_skip: {clip_skip} of {layers} layers; expected less than {layers}")

    def pixels_per_token(self) -> int:
        """Side, in pixels, of the square that becomes one position of the model's input."""
        return 2 ** (len(self.vae.config("vae")["block_out_channels"]) - 1)

    def pipeline(self, **own):
        """The pipeline for inference. Parts given by name are used; missing ones and those that are None are loaded."""
        parts = {name: self.load(name) if own.get(name) is None else own[name] for name in self.parts}
        return self.pipeline_class(**parts, **{**self.options, **self.settings()})

    def export(self, directory, own: dict, save_format: str) -> None:
        """Write a folder for the pipeline's `from_pretrained`: `own` parts saved, the others unchanged. As a
        "single_file", the folder holds one file, `model.safetensors`."""
        parts = {name: (self.folder(name), name, self.part_class(name)) for name in self.parts}
        if "scheduler" in own:
            parts["scheduler"] = (self.base, "scheduler", type(own["scheduler"]))
        kind = self.pipeline_class.__name__
        if save_format == "single_file":
            for words in export_single_file(Path(directory) / FILE, kind, parts, own):
                print(f"{FILE}: {words}")
        else:
            export_pipeline(directory, kind, parts, own, save_format, {**self.settings(), **self.absent()})

    def exported_bytes(self, own: str, *where) -> int:
        """Bytes of all parts but `own` in an export; `where`: the last arguments of `exported_size.exported_bytes`."""
        return sum(exported_bytes(self.folder(name).weights(name), *where) for name in self.parts if name != own)

    def settings(self) -> dict:
        """Settings in the pipeline's model_index.json besides the parts that it has."""
        index = self.base.index()
        return {name: index[name] for name in self.kept_settings if name in index}

    def absent(self) -> dict:
        """What model_index.json says of parts that the pipeline is without, as both libraries write and expect it."""
        return {name: [None, None] for name, part in self.options.items() if part is None}


def family_of(class_name: str):
    """The family of models that a pipeline's class belongs to, or None."""
    return next((family for family in FAMILIES if class_name.startswith(family)), None)


def with_zero_snr(scheduler):
    """A scheduler whose betas are rescaled to zero terminal SNR (Lin et al. 2023, arXiv 2305.08891, algorithm 1), and
    which begins to generate at the last timestep (section 3.3 there). A DDIM scheduler where its class cannot do that.

    Raises:
        UserError: the model predicts epsilon.
    """
    if scheduler.config.prediction_type == "epsilon":
        raise UserError(
            "--rescale_betas_zero_snr: this model predicts epsilon, which is its input where that is pure noise; "
            "expected --prediction_type v_prediction"
        )
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    kind = type(scheduler)
    if "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters:
        kind, settings["clip_sample"] = schedulers.DDIMScheduler, False  # latents have no limits
    return kind.from_config(scheduler.config, **settings)


def encode_prompt(text_encoder, input_ids, clip_skip: int = 0, chunks: int = 1):
    """Token ids of `text.tokenize_chunks` [B, L] -> prompt embeddings [B, L, D]: the last hidden states, or those
    `clip_skip` layers before."""
    input_ids = split_chunks(input_ids, chunks)
    if not clip_skip:
        return join_chunks(as_computed(text_encoder, text_encoder(input_ids)[0]), chunks)
    states = text_encoder(input_ids, output_hidden_states=True).hidden_states[-1 - clip_skip]
    return join_chunks(as_computed(text_encoder, text_encoder.text_model.final_layer_norm(states)), chunks)


def encode_images(vae, pixels):
    """Pixels [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]: the mode of the VAE's distribution, shifted and scaled as
    its configuration says.

    The mode, not a random sample: the distribution's deviation is far below the noise that training adds, and a cached
    sample must be a function of the image.
    """
    latents = vae.encode(pixels).latent_dist.mode()
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
