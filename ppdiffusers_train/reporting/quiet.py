"""What the libraries say while they work, kept from the screen: a run's own lines should be seen."""

import logging
import warnings


def quiet_libraries() -> None:
    """Leave paddlenlp its warnings, and drop one of ppdiffusers about how it calls itself."""
    from paddlenlp.utils.log import logger

    logger.logger.setLevel(logging.WARNING)
    # The combined pipeline passes a deprecated argument to its own decoder.
    warnings.filterwarnings("ignore", message=".*callback_steps.*", category=FutureWarning)
