"""The distribution from which training draws timesteps."""

import numpy as np


def draw_timesteps(draws, count: int, weights=None):
    """Timesteps [B] int64 below `count`, uniform or with the probabilities `weights` [count]."""
    if weights is None:
        return draws.integers("timesteps", 0, count)
    return draws.categorical("timesteps", weights)


def timestep_weights(strategy: str, count: int, multiplier: float, portion: float, begin: int, end: int):
    """The probability of each timestep, [count] float64, some of them `multiplier` times as likely as the others; None
    for the uniform distribution.

    Args:
        strategy: which ones: the first ("earlier") or last ("later") `portion` of all, those in [begin, end) ("range"),
            or "none".
        count: number of timesteps.
    Raises:
        ValueError: a parameter is invalid; the message names it, its value and what is expected.
    """
    if strategy == "none":
        return None
    if multiplier <= 0:
        raise ValueError(f"timestep_bias_multiplier: {multiplier:g} is not above 0; to leave steps out, use a range")
    weights = np.ones(count)
    if strategy == "range":
        if not 0 <= begin < end <= count:
            raise ValueError(
                f"timestep_bias_begin, timestep_bias_end: {begin} and {end} are no range; expected 0 <= begin < end "
                f"<= {count}, the model's number of timesteps"
            )
        weights[begin:end] *= multiplier
    else:
        biased = int(portion * count)
        if not 0 < biased <= count:
            raise ValueError(
                f"timestep_bias_portion: {portion:g} of {count} timesteps are {biased}; expected a number above 0, up "
                "to 1"
            )
        weights[slice(0, biased) if strategy == "earlier" else slice(count - biased, count)] *= multiplier
    return weights / weights.sum()
