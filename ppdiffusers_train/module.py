"""The contract between a job and the loop: what a job trains, and how it computes the loss of a batch."""

import contextlib
import gc
from fnmatch import fnmatchcase

import paddle
from paddle import nn

from ppdiffusers_train.batches import concat_padded, ragged_names
from ppdiffusers_train.errors import UserError

VERSION = 1  # raised when its functions change encoded samples


class DiffusionTrainingModule(nn.Layer):
    """One training job. A subclass loads its models, freezes what is not trained, and implements the methods below.

    A row is `{"image": RGB PIL image, "caption": str, …}` whatever the dataset's columns are called; a batch has the
    arrays of several rows stacked, as paddle tensors. All random numbers come from `draws` (see `draws.Draws`), so the
    same `encoded` and `draws` give the same loss on any number of GPUs.
    """

    title = "training"
    """What the job is called in messages."""

    encoders = ()
    """Names of the attributes that hold the frozen models of `encode`: a cache of encoded samples replaces them."""

    shared = ()
    """Names of methods that `encode` calls with one tensor [1, …], and that give one, as other jobs do in the same way.
    What the cache of such a job has of a sample is not computed again."""

    keep_float32 = ()
    """Names of the attributes that hold frozen models whose weights stay float32 in any precision. VAEs stay float32
    without being named."""

    keep_float32_in_fp16 = ()
    """Names of frozen models whose weights stay float32 under fp16, because their activations overflow float16."""

    quantized = {}
    """{name: "int8" or "nf4"} of the attributes that hold models whose frozen weights are kept in so many bits. Models
    that are saved must not be among them, and those that keep float32 are left out."""

    encode_batch_size = 1
    """Number of samples that `encode` gets at once."""

    can_compile_encode = False
    """Whether Paddle can trace `encode`. CPUs then run it faster, on data large enough to pay for the compilation."""

    buckets = ()
    """[(height, width)] of the aspect-ratio buckets; empty if all samples have the same size."""

    def load_later(self, name: str, stored) -> None:
        """Have a frozen model as attribute `name` that is loaded when it is first used.

        Where all samples are in the cache, it never is.

        Args:
            stored: a `pipeline_folder.StoredModel`.
        """
        vars(self).setdefault("_stored", {})[name] = stored

    def stored(self) -> dict:
        """`{name: StoredModel}` of all models that `load_later` got, whether they are loaded or not."""
        return vars(self).get("_stored", {})

    def not_loaded(self) -> list:
        """The names of the models of `load_later` that have not been used yet."""
        return [name for name in self.stored() if name not in self._sub_layers and name not in vars(self)]

    def load_rest(self) -> list:
        """Load the models of `load_later` that have not been used yet; returns their names."""
        names = self.not_loaded()
        for name in names:
            getattr(self, name)
        return names

    def unload(self, names) -> None:
        """Forget models of `load_later`; they are loaded again when they are used."""
        for name in names:
            self._sub_layers.pop(name, None)
            vars(self).pop(name, None)
        gc.collect()  # layers refer to each other

    def __getattr__(self, name):
        if name in vars(self).get("_stored", {}) and name not in self._sub_layers:
            setattr(self, name, freeze(self._stored[name].load()))
        return super().__getattr__(name)

    def free_encoders(self) -> None:
        """Free the memory of the encoders; those that are not loaded never will be."""
        for name in self.encoders:
            setattr(self, name, None)

    def encoding_settings(self):
        """Settings that `preprocess` and `encode` depend on besides the sample and the encoders' weights, as JSON."""
        return {}

    def preprocess(self, row, draws):
        """One row -> `{name: numpy array}`. Runs in loader workers: no paddle tensors here."""
        raise NotImplementedError

    def encode(self, batch):
        """`{name: [B, …]} -> {name: [B, …]}` through the frozen models, without gradients: what a cache can store."""
        raise NotImplementedError

    def forward(self, encoded, draws):
        """The loss of a batch, a scalar: the mean over its samples, through the trained models."""
        raise NotImplementedError

    def inspect_dataset(self, dataset):
        """Called once before training, to print what is unusual about the data. Does nothing by default."""

    def initialize(self, log):
        """Called once before training, when it is known what is trained: sets initial values that flags ask for. A
        checkpoint that the run resumes from replaces them.

        Args:
            log: prints a line.
        Returns:
            {flag: hash of the file that it names}.
        """
        return {}

    def after_step(self):
        """Called once after each optimizer step."""

    def rate_factor(self, name: str) -> float:
        """The learning rate of a trainable parameter, as a multiple of the run's; 1 by default."""
        return 1.0

    def generate(self, prompts, seeds):
        """One PIL image per pair of prompt and seed, generated the way a user would run inference.

        A job whose images can have settings of their own takes `options=None` as well: for each image a dictionary of
        arguments of the pipeline, such as `{"guidance_scale": 4.0}`.
        """
        raise NotImplementedError

    def generation_settings(self):
        """Settings that `generate` depends on besides prompt, seed and the base's files: `{flag: value}`, as JSON."""
        return {}

    def generation_files(self):
        """`{part: its files}` of the base that `generate` uses. Their contents identify what has generated an image."""
        return {name: stored.files for name, stored in self.stored().items()}

    def changed_process(self):
        """The flag by which `generate` follows another process than that of the untrained base; empty without one."""
        return ""

    def save_weights(self, directory):
        """Write the trained weights below `directory`, for a checkpoint."""
        raise NotImplementedError

    def load_weights(self, directory):
        """Read what `save_weights` wrote into the existing parameters, to which the optimizer refers."""
        raise NotImplementedError

    def save_pretrained(self, directory):
        """Write the final result into `directory`, loadable by a pipeline."""
        raise NotImplementedError

    def copied_bytes(self, directory) -> int:
        """Bytes of the result in `directory` besides the trained weights; what is hard links takes none."""
        return 0

    def card_data(self):
        """Metadata of a model card, as the hub reads it (`base_model`, `tags`, …)."""
        return {}

    def trainable_parameters(self):
        """The trainable parameters: all that are not frozen."""
        return [parameter for parameter in self.parameters() if not parameter.stop_gradient]


def encode_batch(module, batch: dict) -> dict:
    """Encode a batch: `{name: [B, …]} -> {name: [B, …]}`, floats as float32."""
    return as_float32(encode_alone(module, batch))


def as_float32(encoded: dict) -> dict:
    """An encoded batch with its floats as float32, which `forward` takes."""
    return {name: value.astype("float32") if value.is_floating_point() else value for name, value in encoded.items()}


@paddle.no_grad()
def encode_alone(module, batch: dict) -> dict:
    """Encode a batch with `module.encode`: `{name: [B, …]} -> {name: [B, …]}`, in the types that it computes.

    One sample at a time unless the module says otherwise: the rounding of a matrix product depends on its sizes, and a
    sample's encoding must not depend on the other samples of its batch, or a cache could not hold the same bits.
    """
    size, together = len(next(iter(batch.values()))), module.encode_batch_size
    parts = [
        module.encode({name: value[start : start + together] for name, value in batch.items()})
        for start in range(0, size, together)
    ]
    padded = ragged_names(parts[0])
    return {
        name: (concat_padded if name in padded else paddle.concat)([part[name] for part in parts]) for name in parts[0]
    }


def freeze(model: nn.Layer) -> nn.Layer:
    """Freeze a model: no gradients, evaluation mode. Returns the model."""
    model.eval()
    for parameter in model.parameters():
        parameter.stop_gradient = True
    return model


@contextlib.contextmanager
def evaluation(module):
    """A context in which all of `module` is in evaluation mode and no gradients are recorded."""
    modes = [(layer, layer.training) for layer in module.sublayers(include_self=True)]
    module.eval()
    try:
        with paddle.no_grad():
            yield
    finally:
        for layer, training in modes:
            layer.training = training


def trained_models(module) -> list:
    """The models of a module that have trainable parameters."""
    return [model for model in module.children() if any(not weights.stop_gradient for weights in model.parameters())]


def keep_frozen(*parameters) -> None:
    """Freeze parameters for good, such as statistics, or parameters that the published model does not have.

    They also stay float32 in any precision.
    """
    for parameter in parameters:
        parameter.stop_gradient = parameter.stays_frozen = True


def choose_trainable(module, patterns) -> dict:
    """In the models that are trained, train only these parts in full, and LoRA layers.

    Parameters that a job has frozen stay frozen; of a LoRA's frozen base any part may be chosen, except parameters that
    were passed to `keep_frozen`.

    Args:
        patterns: names of layers or parameters in such a model, with or without the model's name before them,
            separated by commas; `*` matches anything. With None, nothing changes.
    Returns:
        {pattern: number of elements of the parameters that match it}.
    Raises:
        UserError: a pattern matches nothing in these models.
    """
    if patterns is None:
        return {}
    sizes = {pattern.strip(): 0 for pattern in patterns.split(",")}
    trained = {name: model for name, model in module.named_children() if model in trained_models(module)}
    for model_name, model in trained.items():
        parameters = dict(model.named_parameters())
        has_lora = any(map(is_lora, parameters))
        for name, parameter in parameters.items():
            frozen_by_job = parameter.stop_gradient and not has_lora
            if is_lora(name) or frozen_by_job or getattr(parameter, "stays_frozen", False):
                continue
            names = (name, f"{model_name}.{name}")
            fits = [p for p in sizes if any(fnmatchcase(n, p) or fnmatchcase(n, f"{p}.*") for n in names)]
            parameter.stop_gradient = not fits
            for pattern in fits:
                sizes[pattern] += parameter.size
    for pattern, size in sizes.items():
        if not size:
            known = ", ".join(
                f"{name}.{child}" for name, model in trained.items() for child, _ in model.named_children()
            )
            raise UserError(f"--trainable_modules: {pattern!r} matches nothing that can be trained; there are {known}")
    return sizes


def is_lora(name: str) -> bool:
    """Whether a parameter of this name belongs to a LoRA layer."""
    return ".lora_layer." in name
