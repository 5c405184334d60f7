"""Keeps messages of libraries from the screen, so that a run's own lines can be seen."""

import logging
import warnings


def quiet_libraries() -> None:
    """Show only warnings of paddlenlp and fleet, and hide those that concern no user."""
    from paddle.distributed.fleet.utils import log_util as fleet_log
    from paddlenlp.utils.log import logger

    logger.logger.setLevel(logging.WARNING)
    fleet_log.set_log_level("WARNING")  # else it logs its setup in twenty lines per rank
    warnings.filterwarnings("ignore", message="Current global rank", category=UserWarning)
    # The combined pipeline passes a deprecated argument to its own decoder.
    warnings.filterwarnings("ignore", message=".*callback_steps.*", category=FutureWarning)
