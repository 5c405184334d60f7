"""The world of shapes: what is rendered, how often, and the folder that `ppdiffusers-train toy-data` writes."""

import ppdiffusers_train  # noqa: F401
from ppdiffusers_train import cli

import hashlib
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppdiffusers_train.arguments import ArgumentParser, add_data_arguments
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.errors import WriteError
from ppdiffusers_train.toy.world import shapes_dataset, shapes_folder
from ppdiffusers_train.toy.world.looks import SIZES
from ppdiffusers_train.toy.world.shapes import (
    ARM,
    BACKGROUNDS,
    BANDS,
    COLOURS,
    CONTENTS,
    CONTRAST,
    HELD_OUT,
    LOOKS,
    MARGIN,
    NAMELESS,
    PALE,
    RADIUS,
    SEEN,
    SHAPES,
    STROKE,
    WORDINGS,
    caption,
    coverage,
    sample,
)
from ppdiffusers_train.toy.world.shapes_dataset import ShapesDataset

pytestmark = pytest.mark.once  # no Paddle in it

SEEDS, INDICES = st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1)
LOOK, SIZE = st.sampled_from(LOOKS), st.sampled_from(SIZES)


@settings(max_examples=50, deadline=None)
@given(SEEDS, INDICES, SIZE, LOOK, st.booleans())
def test_a_sample_depends_on_its_seed_and_index_alone(seed, index, size, look, held_out):
    one, other = (sample(seed, index, size, look, held_out) for _ in range(2))
    assert one.scene == other.scene and one.caption == other.caption
    assert one.image.mode == "RGB" and one.image.size == (size, size)
    assert one.image.tobytes() == other.image.tobytes()


def test_the_data_of_a_seed_stay_the_same_for_good():
    """Figures that were measured on them stay comparable: change what is rendered, and measure again."""
    digest = hashlib.blake2b(digest_size=8)
    for index, size, look in itertools.product(range(16), SIZES, LOOKS):
        one = sample(0, index, size, look)
        digest.update(one.image.tobytes() + one.caption.encode())
    assert digest.hexdigest() == "3f6d7e2a1078fdf8"


@settings(max_examples=50, deadline=None)
@given(SEEDS, INDICES)
def test_size_and_look_change_the_image_and_nothing_else(seed, index):
    samples = [sample(seed, index, size, look) for size, look in itertools.product(SIZES, LOOKS)]
    assert len({one.caption for one in samples}) == 1
    assert len({one.scene._replace(look=None) for one in samples}) == 1
    assert len({one.image.tobytes() for one in samples}) == len(samples)


@settings(max_examples=50, deadline=None)
@given(SEEDS, INDICES, LOOK)
def test_nameless_colours_change_the_paints_of_a_scene_and_empty_its_caption(seed, index, look):
    named, nameless = sample(seed, index, look=look), sample(seed, index, look=look, nameless=True)
    assert nameless.caption == "" and nameless.image.tobytes() != named.image.tobytes()
    content = nameless.scene.content
    assert content == named.scene.content._replace(colour=None, background=None)
    assert nameless.scene._replace(content=named.scene.content, paints=None) == named.scene
    assert tuple(np.asarray(nameless.image)[0, 0]) == nameless.scene.paints.background


def test_nameless_colours_are_far_from_those_with_names_and_from_one_another():
    named = np.array([*COLOURS.values(), *BACKGROUNDS.values()])
    least = min(np.linalg.norm(np.subtract(one, other)) for one in COLOURS.values() for other in BACKGROUNDS.values())
    paints = np.array([sample(0, index, nameless=True).scene.paints for index in range(500)])
    apart = np.linalg.norm(paints[:, 0] - paints[:, 1], axis=-1)
    assert np.linalg.norm(paints.reshape(-1, 1, 3) - named, axis=-1).min() >= NAMELESS
    assert least > CONTRAST and CONTRAST <= apart.min() < CONTRAST + 10
    assert len({tuple(paint) for paint in paints.reshape(-1, 3)}) > 990


def test_every_second_row_may_be_in_nameless_colours():
    rows = ShapesDataset(0, 12, looks=("plain", "striped"), nameless_looks=LOOKS, name_looks=True)
    scenes = [rows.sample(index).scene for index in range(12)]
    assert [scene.look for scene in scenes[::2]] == ["plain", "striped"] * 3
    assert [scene.look for scene in scenes[1::2]] == [*LOOKS, *LOOKS]
    assert all(rows[index]["caption"] for index in range(0, 12, 2))
    assert not any(rows[index]["caption"] for index in range(1, 12, 2))
    assert rows.digest() != ShapesDataset(0, 12, looks=("plain", "striped"), name_looks=True).digest()


def test_scenes_and_captions_vary_in_everything():
    samples = [sample(0, index) for index in range(1000)]
    assert {one.scene.content for one in samples} == set(SEEN)
    wordings = {wording for language in WORDINGS.values() for wording in language}
    assert len({one.caption for one in samples}) > 0.5 * len(SEEN) * len(wordings)
    radii = [one.scene.radius for one in samples]
    assert RADIUS[0] <= min(radii) < RADIUS[0] + 0.01 and RADIUS[1] - 0.01 < max(radii) <= RADIUS[1]
    assert [one.caption for one in samples[:10]] != [sample(1, index).caption for index in range(10)]


def test_a_sixth_of_the_combinations_is_held_out_evenly():
    assert len(HELD_OUT) == len(CONTENTS) / 6 and not set(HELD_OUT) & set(SEEN)
    for shape, background in itertools.product(SHAPES, BACKGROUNDS):
        assert sum(content.shape == shape and content.background == background for content in HELD_OUT) == 1
    colours = [content.colour for content in HELD_OUT]
    assert all(3 <= colours.count(colour) <= 4 for colour in COLOURS)


def test_every_two_properties_are_seen_together():
    for one, other in itertools.combinations(("shape", "colour", "background"), 2):
        pairs = [{(getattr(content, one), getattr(content, other)) for content in part} for part in (SEEN, CONTENTS)]
        assert pairs[0] == pairs[1]


@settings(max_examples=50, deadline=None)
@given(SEEDS, INDICES)
def test_held_out_combinations_are_sampled_only_on_demand(seed, index):
    assert sample(seed, index).scene.content in SEEN
    assert sample(seed, index, held_out=True).scene.content in HELD_OUT


@settings(max_examples=50, deadline=None)
@given(SEEDS, INDICES, SIZE, LOOK)
def test_a_margin_of_plain_background_is_left(seed, index, size, look):
    one = sample(seed, index, size, look)
    pixels, margin = np.asarray(one.image), int(MARGIN * size) - 1  # an edge reaches half a pixel outwards
    rim = np.ones((size, size), bool)
    rim[margin:-margin, margin:-margin] = False
    assert (pixels[rim] == BACKGROUNDS[one.scene.content.background]).all()


AREAS = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "cross": 4 * (1 - (1 - ARM) ** 2)}
FILLED = (BANDS + 1) // 2 / BANDS
SQUARES = {"plain": 4.0, "outlined": 4 * (1 - (1 - STROKE) ** 2), "striped": 4 * (FILLED + PALE * (1 - FILLED))}
PLACE = st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), st.floats(8, 12)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(SHAPES), *PLACE)
def test_a_shape_covers_its_area_and_not_more_than_its_box(shape, x, y, radius):
    covered = coverage(shape, "plain", 16 + x, 16 + y, radius, 32)
    assert 0 <= covered.min() and covered.max() == 1
    assert abs(covered.sum() - AREAS[shape] * radius**2) < 0.02 * AREAS[shape] * radius**2
    inside = np.nonzero(covered > 0.5)
    for axis, middle in zip(inside, (16 + y, 16 + x)):
        assert abs(axis.min() - (middle - radius)) <= 2 and abs(axis.max() + 1 - (middle + radius)) <= 2


@settings(max_examples=50, deadline=None)
@given(LOOK, *PLACE)
def test_looks_cover_a_part_of_a_square(look, x, y, radius):
    covered = coverage("square", look, 16 + x, 16 + y, radius, 32)
    assert abs(covered.sum() - SQUARES[look] * radius**2) < 0.01 * SQUARES[look] * radius**2


@pytest.mark.parametrize("arguments", [("star", "plain"), ("circle", "dotted")])
def test_an_unknown_shape_or_look_is_an_error(arguments):
    with pytest.raises(ValueError, match=f"'{'star' if 'star' in arguments else 'dotted'}' is not one of "):
        coverage(*arguments, 16, 16, 8, 32)


def test_all_colours_are_far_from_each_other():
    palette = [np.array(rgb) for rgb in (*COLOURS.values(), *BACKGROUNDS.values())]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(palette, 2)) > 90


def test_captions_are_unlike_and_short_enough_for_77_tokens_of_a_byte():
    texts = [caption(content, wording) for content in CONTENTS for wording in WORDINGS["en"] + WORDINGS["zh"]]
    assert len(set(texts)) == len(texts) and max(len(text.encode()) for text in texts) <= 75


def test_captions_are_grammatical():
    orange = next(content for content in CONTENTS if content == ("circle", "orange", "gray"))
    assert caption(orange) == "an orange circle on a gray background"
    assert caption(orange._replace(colour="red")) == "a red circle on a gray background"
    assert caption(orange, WORDINGS["zh"][0]) == "灰色背景上的橙色圆形"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_holds_the_samples_and_training_reads_it(tmp_path, capsys):
    folder = tmp_path / "new" / "shapes"
    cli.main(["toy-data", str(folder), "--count=5", "--size=64", "--look=striped", "--seed=3", "--held_out"])
    assert capsys.readouterr().out == f"{folder}: 5 pictures of 64 x 64 pixels, with captions\n"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["file_name"] for row in rows] == [f"00000{index}.png" for index in range(5)]
    samples = [sample(3, index, 64, "striped", held_out=True) for index in range(5)]
    assert [row["text"] for row in rows] == [one.caption for one in samples]

    texts = tmp_path / "texts"
    cli.main(
        ["toy-data", str(texts), "--count=5", "--size=64", "--look=striped", "--seed=3", "--held_out", "--text_files"]
    )
    assert sorted(file.suffix for file in texts.iterdir()) == [".png"] * 5 + [".txt"] * 5
    parser = ArgumentParser()
    add_data_arguments(parser)
    for data in (folder, texts):
        dataset = build_dataset(parser.parse_args([f"--train_data_dir={data}", f"--cache_dir={tmp_path / 'cache'}"]))
        for index, one in enumerate(samples):
            assert dataset[index]["caption"] == one.caption
            assert dataset[index]["image"].tobytes() == one.image.tobytes()


def test_mixed_looks_come_in_turn_and_shards_hold_what_a_folder_holds(tmp_path, capsys):
    for name, flags in (("folder", []), ("shards", ["--shard_size=10kB"])):
        cli.main(["toy-data", str(tmp_path / name), "--count=6", "--look=mixed", *flags])
    parser = ArgumentParser()
    add_data_arguments(parser)
    cache = f"--cache_dir={tmp_path / 'cache'}"
    folder, shards = (
        build_dataset(parser.parse_args([f"--{flag}={tmp_path / name}", cache]))
        for flag, name in (("train_data_dir", "folder"), ("train_shards_path_or_url", "shards"))
    )
    samples = [sample(0, index, 32, LOOKS[index % 3]) for index in range(6)]
    assert len(folder) == len(shards) == 6 and len(list((tmp_path / "shards").glob("*.tar"))) > 1
    for index, one in enumerate(samples):
        for rows in (folder, shards):
            assert rows[index]["caption"] == one.caption and rows[index]["image"].tobytes() == one.image.tobytes()


def test_the_same_flags_write_the_same_bytes(tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        (tmp_path / name).mkdir()  # an empty folder is as good as none
        cli.main(["toy-data", str(tmp_path / name), "--count=4", f"--seed={seed}"])
    assert files(tmp_path / "one") == files(tmp_path / "two") != files(tmp_path / "other")


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("my own file")
    for output in (tmp_path, tmp_path / "mine", tmp_path / "mine" / "below"):
        with pytest.raises(SystemExit) as end:
            cli.main(["toy-data", str(output), "--count=4"])
        said = capsys.readouterr().err
        assert end.value.code == 2 and len(said.splitlines()) == 1 and repr(str(output)) in said
    assert files(tmp_path) == {"mine": b"my own file"}


def test_an_interrupted_command_leaves_no_folder(tmp_path, monkeypatch):
    def full_disk(seed, index, *options):
        if index == 2:
            raise OSError(28, "No space left on device")
        return sample(seed, index, *options)

    monkeypatch.setattr(shapes_dataset, "sample", full_disk)
    with pytest.raises(WriteError, match="pictures cannot be written to '.*shapes': No space left on device"):
        shapes_folder.write_shapes_folder(tmp_path / "shapes", ShapesDataset(0, 4))
    assert not list(tmp_path.iterdir())


def test_the_dataset_has_the_samples_of_its_seed_with_looks_in_turn():
    rows = ShapesDataset(3, 7, 64, ("plain", "striped"), held_out=True)
    assert len(rows) == 7
    for index in range(7):
        one, row = sample(3, index, 64, ("plain", "striped")[index % 2], held_out=True), rows[index]
        assert row["image"].tobytes() == one.image.tobytes() and row["caption"] == one.caption
        assert row["name"] == rows.name(index) == f"shape {index} of seed 3"
    with pytest.raises(IndexError):
        rows[7]


def test_the_datasets_digest_tells_its_data_from_others():
    others = (ShapesDataset(1, 7), ShapesDataset(0, 7, 64), ShapesDataset(0, 7, looks=("plain",)))
    others += (ShapesDataset(0, 7, held_out=True), ShapesDataset(0, 7, name_looks=True))
    digests = {rows.digest() for rows in (ShapesDataset(0, 7), *others)}
    assert len(digests) == 6 and ShapesDataset(0, 7).digest() in digests


def test_captions_name_the_look_if_asked_to_and_a_plain_shape_has_none():
    rows, named = (ShapesDataset(0, 60, name_looks=choice) for choice in (False, True))
    words = set()
    for index, look in zip(range(60), itertools.cycle(LOOKS)):
        own, other = rows[index]["caption"], named[index]["caption"]
        assert other.startswith(own) and rows[index]["image"].tobytes() == named[index]["image"].tobytes()
        words.add((look, other.removeprefix(own)))
    assert words == {("plain", "")} | {
        (look, word)
        for look, *both in [("outlined", ", outlined", "，空心"), ("striped", ", striped", "，条纹")]
        for word in both
    }


def test_rendering_and_judging_need_no_paddle():
    code = "import sys; from ppdiffusers_train.toy.world import judge, shapes_folder; print('paddle' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
