import json
import os

import pytest

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.runtime.checkpoint import find_checkpoint, write_checkpoint
from ppdiffusers_train.runtime.run_folder import (
    refuse_used_folder,
    remove_earlier_checkpoints,
    replace_result,
    run_of_folder,
    set_aside_later,
    set_aside_unlisted_result,
)

pytestmark = pytest.mark.once  # files only


def write(folder):
    (folder / "weights").write_bytes(b"12345")


def checkpoint(folder, step, run="a", **options):
    return write_checkpoint(folder, step, write, {"run": run}, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(folder):
    (folder / "weights").unlink()


def test_the_limit_counts_only_complete_checkpoints_of_the_own_run(tmp_path):
    checkpoint(tmp_path, 2, run="b")
    damage(checkpoint(tmp_path, 3))
    for step in (5, 6, 7):
        checkpoint(tmp_path, step, total_limit=2)
    checkpoint(tmp_path, 9)
    damage(tmp_path / "checkpoint-9")
    checkpoint(tmp_path, 8, total_limit=1)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (2, 3, 8, 9)]


def test_latest_is_of_the_run_that_used_the_folder_last(tmp_path):
    for step, run in ((2, "a"), (3, "a"), (8, "b")):
        checkpoint(tmp_path, step, run)
    for arguments, expected in (({"run": "a"}, 3), ({"run": "b"}, 8), ("no JSON", 8), (None, 8)):
        file = tmp_path / "training_args.json"
        file.unlink(missing_ok=True)
        if arguments:
            file.write_text(json.dumps(arguments))
        log = []
        found, _ = find_checkpoint("latest", tmp_path, run_of_folder(tmp_path), log.append)
        assert found.name == f"checkpoint-{expected}"
        assert ("is of another run" in "".join(log)) == (expected == 3)


def test_checkpoints_of_versions_without_an_id_belong_together(tmp_path):
    write_checkpoint(tmp_path, 4, write, {})
    (tmp_path / "training_args.json").write_text('{"seed": 0}')
    assert find_checkpoint("latest", tmp_path, run_of_folder(tmp_path))[0].name == "checkpoint-4"


def test_a_run_that_goes_back_sets_its_later_checkpoints_aside_and_no_others(tmp_path):
    for step, run in ((2, "a"), (4, "a"), (6, "a"), (8, "b")):
        checkpoint(tmp_path, step, run)
    (tmp_path / "abandoned-checkpoint-4").mkdir()
    log = []
    set_aside_later(tmp_path, "a", 2, log.append)
    expected = ["abandoned-checkpoint-4", "abandoned-checkpoint-4-2", "abandoned-checkpoint-6", "checkpoint-2"]
    assert names(tmp_path) == [*expected, "checkpoint-8"]
    assert log == [
        "checkpoint-4 to checkpoint-6: set aside as abandoned-checkpoint-…, because the run resumes at step 2"
    ]
    set_aside_later(tmp_path, "a", 2, log.append)
    assert len(log) == 1


def result(folder, run, *files):
    def write_files(inside):
        for file in files:
            os.makedirs(os.path.dirname(f"{inside}/{file}"), exist_ok=True)
            with open(f"{inside}/{file}", "w") as opened:
                opened.write(run)

    replace_result(folder, run, 5, write_files)


def test_a_result_replaces_exactly_the_one_before(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result(tmp_path, "a", "unet/one", "unet/two", "lora.safetensors", "vae/x")
    result(tmp_path, "b", "unet/one", "other.pdparams")
    assert names(tmp_path) == ["notes.txt", "other.pdparams", "result.json", "unet"]
    assert names(tmp_path / "unet") == ["one"]
    listed = json.loads((tmp_path / "result.json").read_text())
    assert listed == {"run": "b", "step": 5, "files": {"other.pdparams": 1, "unet/one": 1}}


@pytest.mark.parametrize(
    "files, overwrites, message",
    [
        ([], False, None),
        (["logs/x", "validation/step-1.png", "notes.txt", "encoded/a.safetensors"], False, None),
        (["checkpoint-7/x"], False, "holds checkpoints up to checkpoint-7 of an earlier run; expected --resume_from_"),
        (["checkpoint-7/x"], True, None),
        (["unet/model.safetensors"], False, "holds weights that no result.json lists, such as unet/model.safetensors"),
        (["unet/model.safetensors"], True, "holds weights that no result.json lists, such as unet/model.safetensors"),
        (["lora.pdparams"], True, "holds weights that no result.json lists, such as lora.pdparams; expected another"),
    ],
)
def test_a_new_run_does_not_start_in_the_folder_of_another(tmp_path, files, overwrites, message):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("x")
    if message is None:
        refuse_used_folder(tmp_path, overwrites)
        return
    with pytest.raises(UserError) as refused:
        refuse_used_folder(tmp_path, overwrites)
    assert message in str(refused.value)


def test_a_result_of_an_older_version_is_set_aside_whole(tmp_path):
    files = ["training_args.json", "model_index.json", "unet/config.json", "unet/model.safetensors", "notes.txt"]
    files += ["scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "lora.safetensors", "mine/notes"]
    files += ["checkpoint-4/weights", "encoded/a.safetensors", "encoded/config.json", "validation/step-1.png"]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match="holds checkpoints up to checkpoint-4 and a result of an earlier run; expect"):
        refuse_used_folder(tmp_path, False)
    refuse_used_folder(tmp_path, True)
    (tmp_path / "earlier-result").mkdir()
    log = []
    set_aside_unlisted_result(tmp_path, log.append)
    moved = ["lora.safetensors", "model_index.json", "scheduler", "tokenizer", "unet"]
    assert names(tmp_path / "earlier-result-2") == moved and names(tmp_path / "earlier-result-2" / "unet")
    kept = ["checkpoint-4", "earlier-result", "earlier-result-2", "encoded", "mine", "notes.txt", "training_args.json"]
    assert names(tmp_path) == [*kept, "validation"]
    assert log == [f"{tmp_path}: the result of an older version is set aside as earlier-result-2"]
    set_aside_unlisted_result(tmp_path, log.append)
    result(tmp_path, "a", "lora.safetensors")
    set_aside_unlisted_result(tmp_path, log.append)
    assert len(log) == 1 and (tmp_path / "lora.safetensors").exists()
    refuse_used_folder(tmp_path, True)


def test_what_an_earlier_run_wrote_is_overwritten_only_on_demand(tmp_path):
    checkpoint(tmp_path, 3)
    result(tmp_path, "a", "lora.safetensors")
    with pytest.raises(UserError, match="holds checkpoints up to checkpoint-3 and a result of an earlier run"):
        refuse_used_folder(tmp_path, False)
    refuse_used_folder(tmp_path, True)
    remove_earlier_checkpoints(tmp_path, "a")
    assert "checkpoint-3" in names(tmp_path)
    remove_earlier_checkpoints(tmp_path, "b")
    assert names(tmp_path) == ["lora.safetensors", "result.json"]
