"""Keeps messages of libraries from the screen, so that a run's own lines can be seen."""

import logging
import sys
import warnings

NOISE = {
    "ppdiffusers.configuration_utils": "The config attributes",  # a newer library's; unknown settings change nothing
    "PaddleNLP": "datasets module was imported before paddlenlp",  # which matters to its own `datasets` alone
    "matplotlib.font_manager": "font",  # it builds its cache of fonts, the first time
}
"""{logger: text of messages that concern no user}"""


def is_wanted(record) -> bool:
    """Whether a message of one of these loggers is to be shown."""
    return NOISE[record.name] not in record.getMessage()


def quiet_libraries() -> None:
    """Show only warnings of paddlenlp and fleet, and hide those that concern no user."""
    for name in NOISE:
        logging.getLogger(name).addFilter(is_wanted)
    import datasets
    import ppdiffusers
    from paddle.distributed.fleet.utils import log_util as fleet_log
    from paddlenlp.utils.log import logger

    logger.logger.setLevel(logging.WARNING)
    ppdiffusers.utils.logging.disable_progress_bar()  # for the parts of a pipeline, which are read in seconds
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # they would write ten lines a second into a log file
    fleet_log.set_log_level("WARNING")  # else it logs its setup in twenty lines per rank
    warnings.filterwarnings("ignore", message="Current global rank", category=UserWarning)
    # Paddle traces code that asks for a tensor's place or layout, and does not need the answer.
    warnings.filterwarnings("ignore", message="Tensor do not have .* interface for", category=UserWarning)
    # The combined pipeline passes a deprecated argument to its own decoder.
    warnings.filterwarnings("ignore", message=".*callback_steps.*", category=FutureWarning)
