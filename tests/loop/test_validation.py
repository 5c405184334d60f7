"""Validation images: prompts of a file with settings of their own, grids over steps, and the CLIP score."""

import json

import numpy as np
import pytest
from PIL import Image

from ppdiffusers_train.loop.prompts import as_prompt
from ppdiffusers_train.loop.validation import STEPS_SHOWN, over_steps, write_first
from tests.conftest import last_error, scalars


def write(file, *rows):
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def test_each_prompt_of_a_file_has_its_settings(train, tmp_path):
    """The prior has both towers of CLIP, so it reports a score, also where the cache has freed them."""
    small = {"prompt": "a cat", "seed": 5, "width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 1.5}
    file = write(tmp_path / "p.jsonl", small, {**small, "negative_prompt": "a dog", "guidance_scale": 8}, small)
    flags = [f"--validation_prompts_file={file}", "--validation_prompts=a hat", "--validation_inference_steps=2"]
    out = train("prior_lora", *flags, "--validation_steps=1", "--num_validation_images=1", "--encoded_cache")
    first = out / "validation-over-steps"
    images = [np.asarray(Image.open(first / "step-2" / f"{number}.png")) for number in range(4)]
    assert np.array_equal(images[1], images[3]) and not np.array_equal(images[1], images[2])
    assert {path.name for path in first.iterdir()} == {"step-1", "step-2", "over-steps.png"}
    assert sorted(path.name for path in (out / "validation").iterdir()) == ["step-1.png", "step-2.png"]
    scores = scalars(out, "validation/clip_score")
    assert len(scores) == 2 and all(0 <= score <= 100 for score in scores)


def test_jobs_without_settings_refuse_them_before_the_first_step(lcm_jobs, sd, photos, tmp_path, capsys):
    file = write(tmp_path / "p.jsonl", {"prompt": "a", "width": 64})
    with pytest.raises(SystemExit) as end:
        lcm_jobs["lora_sd"].main([
            f"--pretrained_teacher_model={sd}", f"--train_data_dir={photos}", "--resolution=32", "--max_train_steps=1",
            f"--output_dir={tmp_path / 'out'}", f"--validation_prompts_file={file}", "--train_batch_size=1",
        ])  # fmt: skip
    assert end.value.code == 2 and "the images of this job have no settings" in last_error(capsys)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("{", "x is not JSON"),
        ("[1]", "x has list; expected an object with prompt, negative_prompt, seed"),
        ('{"prompt": "a", "sed": 1}', "x has sed; expected"),
        ('{"seed": 1}', "x has no prompt"),
        ('{"prompt": 3}', "x: prompt is 3; expected a text"),
        ('{"prompt": "a", "seed": true}', "x: seed is True; expected a whole number from 0"),
        ('{"prompt": "a", "width": 0}', "x: width is 0; expected a multiple of 8 from 8"),
        ('{"prompt": "a", "guidance_scale": NaN}', "x: guidance_scale is nan"),
    ],
)
def test_a_wrong_line_is_named(line, expected):
    with pytest.raises(Exception, match="^x") as error:
        as_prompt(line, "x")
    assert str(error.value).startswith(expected)


def test_a_grid_over_many_steps_has_the_first_and_the_last(tmp_path):
    for step in range(100, 2100, 100):
        write_first(tmp_path / f"step-{step}", [[Image.new("RGB", (300, 300), (step // 10, 0, 0))]])
    prompt = as_prompt('{"prompt": "a cat"}', "x")
    colours = {colour[0] for _, colour in over_steps(tmp_path, [prompt]).getcolors(1 << 20) if colour[1:] == (0, 0)}
    shown = colours & set(range(10, 210, 10))
    assert {10, 200} <= shown and len(shown) == STEPS_SHOWN
