"""Settings of a pipeline's parts that a run reads late, looked at before it begins."""

import math

import ppdiffusers
from paddlenlp.transformers import PretrainedTokenizer
from ppdiffusers import transformers

from ppdiffusers_train.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # those that there are losses for


def named_class(entry: list):
    """The class of a part, from its entry [library, class] in a model_index.json of either library; None if ppdiffusers
    has no such class."""
    library, name = entry
    # Tokenizers of transformers that are written in Rust have a name of their own.
    return getattr(transformers if "transformers" in library else ppdiffusers, name.removesuffix("Fast"), None)


def check_settings(folder, parts) -> None:
    """Raise a `UserError` for a scheduler or a VAE among `parts` of a `PipelineFolder` that cannot be used: its class
    is none of ppdiffusers, or a setting has an unknown value."""
    for found in filter(None, (wrong_setting(folder, part) for part in parts)):
        raise folder._error(found)


def wrong_setting(folder, part) -> str | None:
    """What is wrong with the settings of a part, or None."""
    if part == "scheduler":
        folder.scheduler_class(part)
        kind = folder.config(part).get("prediction_type", PREDICTION_TYPES[0])
        if kind not in PREDICTION_TYPES:
            return f"has a {part} of prediction_type {kind!r}; expected one of {', '.join(PREDICTION_TYPES)}"
    if part == "vae":
        scale, shift = map(folder.config(part).get, ("scaling_factor", "shift_factor"))
        if not (scale is None or (is_finite(scale) and scale > 0)):
            return f"has a {part} of scaling_factor {scale!r}; expected a number above 0"
        if not (shift is None or is_finite(shift)):
            return f"has a {part} of shift_factor {shift!r}; expected a number"
    return None


def is_finite(value) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def require_tokens(part):
    """A part that was loaded; a `UserError` if it is a tokenizer without numbers for the tokens that it begins, ends
    and pads captions with."""
    if isinstance(part, PretrainedTokenizer):
        tokens = {name: token for name, token in part.special_tokens_map.items() if isinstance(token, str)}
        for name, token in tokens.items():
            if part.convert_tokens_to_ids(token) is None:
                raise UserError(f"its vocabulary lacks {token!r}, its {name}")
    return part
