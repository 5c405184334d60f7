import ppdiffusers_train  # noqa: F401

import pytest

from ppdiffusers_train.loop.resume_rules import APPLIED, FREE, REFUSED
from tests.conftest import load_script
from tests.test_architecture import SCRIPTS


@pytest.mark.once
def test_each_flag_of_each_script_has_one_rule_and_each_rule_is_of_a_flag():
    flags = {action.dest for script in SCRIPTS for action in load_script(script).build_parser()._actions} - {"help"}
    assert flags == REFUSED | APPLIED | FREE
    assert len(flags) == len(REFUSED) + len(APPLIED) + len(FREE)
