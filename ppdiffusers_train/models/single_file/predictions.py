"""What a single file says that its model predicts: in its metadata and, for SDXL, by empty tensors."""

import numpy as np

METADATA = "modelspec.prediction_type"
NAMES = {"epsilon": "epsilon", "v_prediction": "v"}  # of a scheduler, and in the metadata
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # tensors by which programs know such a model of SDXL


def prediction_of(tensors: dict, metadata: dict):
    """The prediction type that a single file names, in a scheduler's words; None if it names none."""
    named = metadata.get(METADATA) or ("v" if V_PREDICTION in tensors else None)
    return next((kind for kind, name in NAMES.items() if name == named), None)


def marks(scheduler, is_sdxl: bool) -> tuple:
    """`(tensors, metadata)` that name the prediction type of a scheduler's configuration in a single file."""
    kind = scheduler.get("prediction_type")
    names = []
    if is_sdxl and kind == "v_prediction":
        names = [V_PREDICTION, *([ZERO_SNR] if scheduler.get("rescale_betas_zero_snr") else [])]
    return {name: np.zeros(0, np.float32) for name in names}, {METADATA: NAMES[kind]} if kind in NAMES else {}
