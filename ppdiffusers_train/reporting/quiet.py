"""What the libraries say while they work, kept from the screen: a run's own lines should be seen."""

import logging
import warnings


def quiet_libraries() -> None:
    """Leave paddlenlp and fleet their warnings, and drop those that concern nobody."""
    from paddle.distributed.fleet.utils import log_util as fleet_log
    from paddlenlp.utils.log import logger

    logger.logger.setLevel(logging.WARNING)
    fleet_log.set_log_level("WARNING")  # else it says what it sets up, in twenty lines a rank
    warnings.filterwarnings("ignore", message="Current global rank", category=UserWarning)
    # The combined pipeline passes a deprecated argument to its own decoder.
    warnings.filterwarnings("ignore", message=".*callback_steps.*", category=FutureWarning)
