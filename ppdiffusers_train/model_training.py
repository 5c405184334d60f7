"""Jobs that train one model: the whole of it, or LoRA layers on it."""

import ppdiffusers_train  # noqa: F401  (before paddle)

from ppdiffusers_train.models.lora import add_lora, load_lora_weights, save_lora, save_lora_weights
from ppdiffusers_train.models.weights import load_in_place, save_model
from ppdiffusers_train.module import DiffusionTrainingModule


class FullTraining(DiffusionTrainingModule):
    """Trains a model as a whole: a checkpoint holds its folder, and so does the result, unless a job writes more."""

    trained = "unet"
    """Name of the attribute that holds the model, and of its folder."""

    averages = ()
    """The same of moving averages of it, which are kept beside it."""

    def save_weights(self, directory):
        for name in (self.trained, *self.averages):
            save_model(getattr(self, name), f"{directory}/{name}")

    def load_weights(self, directory):
        for name in (self.trained, *self.averages):
            load_in_place(getattr(self, name), f"{directory}/{name}")

    def save_pretrained(self, directory):
        for name in (self.trained, *self.averages):
            save_model(getattr(self, name), f"{directory}/{name}", self.args.save_format)


class LoRATraining:
    """Makes a job train LoRA layers on its model instead of the model: `class MyLoRAJob(LoRATraining, MyJob)`.

    The job's `trained` names the model. The flags are those of `arguments.add_lora_arguments`. A checkpoint and the
    result hold the LoRA layers, and the parts of the model that `--trainable_modules` names.
    """

    adapted = {}
    """{name: text encoder} of those that have LoRA layers, too."""

    lora_formats = ()
    """The libraries that the result is written for; empty: that of `--save_format`."""

    def __init__(self, args):
        super().__init__(args)
        self.add_lora(getattr(self, self.trained), args.lora_target_modules)

    def add_lora(self, model, targets: str) -> None:
        """Freeze a model and set LoRA layers on the layers that `targets` names, as the flags say."""
        args = self.args
        add_lora(model, targets, args.lora_rank, args.lora_alpha, args.lora_dropout, args.seed or 0)

    def save_weights(self, directory):
        save_lora_weights(getattr(self, self.trained), directory, **self.adapted)

    def load_weights(self, directory):
        load_lora_weights(getattr(self, self.trained), directory, **self.adapted)

    def save_pretrained(self, directory):
        for library in self.lora_formats or (self.args.save_format,):
            save_lora(getattr(self, self.trained), directory, library, **self.adapted)

    def card_data(self):
        card = super().card_data()
        return {**card, "tags": [*card["tags"], "lora"]}
