"""The contract between a job and the loop: what one job learns, and how a batch becomes a loss."""

from fnmatch import fnmatchcase

import paddle
from paddle import nn

from ppdiffusers_train.errors import UserError


class DiffusionTrainingModule(nn.Layer):
    """One training job. A subclass loads its models, freezes what does not learn, and fills in the methods below.

    A row is `{"image": RGB PIL image, "caption": str, …}` whatever the dataset's columns are called; a batch is the
    arrays of several rows stacked, as paddle tensors. `draws` gives every random number (see `draws.Draws`), so the
    same `encoded` and `draws` give the same loss on any number of cards.
    """

    encoders = ()
    """Names of the attributes that hold the frozen models of `encode`: a cache of encoded samples replaces them."""

    keep_float32 = ()
    """Names of the attributes that hold frozen models whose weights stay float32 whatever the run's precision. VAEs do
    so by themselves."""

    keep_float32_in_fp16 = ()
    """The same, of models whose activations outgrow float16."""

    encode_batch_size = 1
    """How many samples `encode` gets at once."""

    can_compile_encode = False
    """Whether Paddle can trace `encode`: a CPU then runs it faster, on data large enough to be worth it."""

    buckets = ()
    """[(height, width)] of the sizes that samples are brought to; empty where all samples fit into one batch."""

    def encoding_settings(self):
        """What `preprocess` and `encode` depend on besides the sample and the encoders' weights, as JSON."""
        return {}

    def preprocess(self, row, draws):
        """One row -> `{name: numpy array}`. Runs in loader workers: no paddle tensors here."""
        raise NotImplementedError

    def encode(self, batch):
        """`{name: [B, …]} -> {name: [B, …]}` through the frozen models, without gradient: what a cache can store."""
        raise NotImplementedError

    def forward(self, encoded, draws):
        """The loss of a batch, a scalar: the mean over its samples, through the models that learn."""
        raise NotImplementedError

    def inspect_dataset(self, dataset):
        """Called once before training: print here what is unusual about the data. Nothing, by default."""

    def after_step(self):
        """Called once after each optimizer step."""

    def generate(self, prompts, seeds):
        """One PIL image per pair of prompt and seed, drawn the way a user would run inference."""
        raise NotImplementedError

    def save_weights(self, directory):
        """Write the weights that learn below `directory`: what a checkpoint holds."""
        raise NotImplementedError

    def load_weights(self, directory):
        """Read what `save_weights` wrote into the parameters in place: the optimizer keeps its objects."""
        raise NotImplementedError

    def save_pretrained(self, directory):
        """Write the final result into `directory`, loadable by a pipeline."""
        raise NotImplementedError

    def card_data(self):
        """Metadata of a model card, as the hub reads it (`base_model`, `tags`, …)."""
        return {}

    def trainable_parameters(self):
        """The parameters that learn: whatever is not frozen."""
        return [parameter for parameter in self.parameters() if not parameter.stop_gradient]


@paddle.no_grad()
def encode_batch(module, batch: dict) -> dict:
    """A batch through `module.encode`: `{name: [B, …]} -> {name: [B, …]}`, floats as float32.

    One sample at a time unless the module says otherwise, because how a product of matrices is rounded depends on their
    sizes: a sample's encoding must not depend on which others share its batch, or a cache could not hold the same bits.
    """
    size, together = len(next(iter(batch.values()))), module.encode_batch_size
    parts = [
        module.encode({name: value[start : start + together] for name, value in batch.items()})
        for start in range(0, size, together)
    ]
    stacked = {name: paddle.concat([part[name] for part in parts]) for name in parts[0]}
    return {name: value.astype("float32") if value.is_floating_point() else value for name, value in stacked.items()}


def freeze(model: nn.Layer) -> nn.Layer:
    """Take a model out of training: no gradients, evaluation mode. Returns the model."""
    model.eval()
    for parameter in model.parameters():
        parameter.stop_gradient = True
    return model


def trained_models(module) -> list:
    """Those of its models in which something learns."""
    return [model for model in module.children() if any(not weights.stop_gradient for weights in model.parameters())]


def keep_frozen(*parameters) -> None:
    """Take parameters out of training for good: statistics, or what the published model does not have.

    They also keep their float32 values whatever the run's precision.
    """
    for parameter in parameters:
        parameter.stop_gradient = parameter.stays_frozen = True


def choose_trainable(module, patterns) -> dict:
    """Of the models in which something is trained, train these parts in full, and nothing else but LoRA layers.

    What a job has frozen stays frozen; of a LoRA's frozen base any part may be chosen but what `keep_frozen` got.

    Args:
        patterns: names of layers or parameters in such a model, with its own name before them or without, separated by
            commas; `*` is anything. None: what is trained stays as it is.
    Returns:
        {pattern: size of what fits it}.
    Raises:
        UserError: a pattern fits nothing in these models.
    """
    if patterns is None:
        return {}
    sizes = {pattern.strip(): 0 for pattern in patterns.split(",")}
    trained = {
        name: model
        for name, model in module.named_children()
        if any(not parameter.stop_gradient for parameter in model.parameters())
    }
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
            raise UserError(f"--trainable_modules: {pattern!r} fits nothing that can learn; there are {known}")
    return sizes


def is_lora(name: str) -> bool:
    """Whether a parameter of this name belongs to a LoRA layer."""
    return ".lora_layer." in name
