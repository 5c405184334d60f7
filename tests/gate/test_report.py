import ppdiffusers_train  # noqa: F401

from tests.gate.report import verdict


def test_two_runs_differ_where_chance_does_not_explain_it():
    # 2 √((0.6 · 0.4 + 0.4 · 0.6) / 67) = 0.169, and 2 √((0.5 · 0.5 + 0.4 · 0.6) / 67) = 0.171
    seen = "An effect is seen at the best scale: 20.0 points, where chance alone explains up to 16.9."
    assert verdict([0.1, 0.6, 0.2], [0.3, 0.4, 0.2], pictures=67) == seen
    none = "No effect is seen at the best scale: 10.0 points, where chance alone explains up to 17.1."
    assert verdict([0.4, 0.0], [0.5, 0.3], pictures=67) == none
