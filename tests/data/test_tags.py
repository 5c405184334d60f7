import ppdiffusers_train  # noqa: F401

from collections import Counter

import pytest

from ppdiffusers_train.data.tags import draw_caption, vary_tags
from ppdiffusers_train.draws import RowDraws

CAPTION = "1girl, red hair,blue  sky ，smile,, "
TAGS = ["1girl", "red hair", "blue  sky", "smile"]


def varied(position, *settings):
    return vary_tags(RowDraws(3, position), CAPTION, *settings)


def test_without_a_flag_a_caption_stays_as_it_is_and_nothing_is_drawn():
    draws = RowDraws(0, 0)
    assert vary_tags(draws, CAPTION, False, 2, 0.0) == CAPTION and not draws.drawn


def test_every_order_is_as_likely_and_each_position_has_its_own():
    orders = Counter(varied(position, True, 1, 0.0) for position in range(600))
    assert len(orders) == 6 and min(orders.values()) > 70
    assert all(order.startswith("1girl, ") and sorted(order.split(", ")) == sorted(TAGS) for order in orders)
    assert len({varied(position, True, 0, 0.0) for position in range(600)}) == 24


def test_each_tag_is_left_out_with_its_probability_but_those_that_are_kept():
    captions = [varied(position, False, 2, 0.3).split(", ") for position in range(1000)]
    assert all(caption == [tag for tag in TAGS if tag in caption] for caption in captions), "in their order"
    counts = Counter(tag for caption in captions for tag in caption)
    assert [counts[tag] for tag in TAGS] == pytest.approx([1000, 1000, 700, 700], abs=50)
    assert varied(0, True, 9, 0.9) == ", ".join(TAGS), "there are fewer tags than are kept"


def test_the_order_does_not_depend_on_dropout():
    for position in range(30):
        whole, fewer = (varied(position, True, 0, dropout).split(", ") for dropout in (0.0, 0.5))
        assert [tag for tag in whole if tag in fewer] == [tag for tag in fewer if tag]


def test_wildcards_take_one_of_their_texts_each_time():
    texts = [vary_tags(RowDraws(3, n), "a {red|{dark |}blue} {cat|dog}, {x}", False, 0, 0.0, True) for n in range(400)]
    assert {text.replace("dark ", "") for text in texts} == {
        f"a {colour} {animal}, {{x}}" for colour in ("red", "blue") for animal in ("cat", "dog")
    }
    assert 150 < sum("red" in text for text in texts) < 250 and 50 < sum("dark blue" in text for text in texts) < 150
    assert texts[:9] == [draw_caption(RowDraws(3, n), "a {red|{dark |}blue} {cat|dog}, {x}", 0.0, False, 0, 0.0, True)
                         for n in range(9)]  # fmt: skip
    assert vary_tags(RowDraws(3, 0), "{a|b}", False, 0, 0.0) == "{a|b}"
