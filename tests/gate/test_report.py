import ppdiffusers_train  # noqa: F401

from tests.gate.report import verdict


def test_two_runs_differ_where_chance_does_not_explain_it():
    # 2 √((0.6 · 0.4 + 0.4 · 0.6) / 67) = 0.169, and 2 √((0.5 · 0.5 + 0.4 · 0.6) / 67) = 0.171
    assert verdict(0.6, 0.4, 67) == "an effect is seen: 20.0 points, where chance alone explains up to 16.9."
    assert verdict(0.4, 0.5, 67) == "no effect is seen: 10.0 points, where chance alone explains up to 17.1."
