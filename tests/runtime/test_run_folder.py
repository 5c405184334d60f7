import json
import os
from contextlib import nullcontext

import pytest

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.runtime.checkpoint import find_checkpoint, write_checkpoint
from ppdiffusers_train.runtime.run_folder import (
    refuse_used_folder,
    remove_earlier_checkpoints,
    replace_result,
    require_result,
    run_of_folder,
    set_aside_other_branches,
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
    set_aside_other_branches(tmp_path, "a", tmp_path / "checkpoint-2", 2, log.append)
    expected = ["abandoned-checkpoint-4", "abandoned-checkpoint-4-2", "abandoned-checkpoint-6", "checkpoint-2"]
    assert names(tmp_path) == [*expected, "checkpoint-8"]
    assert log == [
        "checkpoint-4 to checkpoint-6: set aside as abandoned-checkpoint-…, because the run resumes at step 2"
    ]
    set_aside_other_branches(tmp_path, "a", tmp_path / "checkpoint-2", 2, log.append)
    assert len(log) == 1


def test_a_run_that_goes_back_to_an_abandoned_checkpoint_makes_it_the_latest(tmp_path):
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    set_aside_other_branches(tmp_path, "a", tmp_path / "checkpoint-2", 2, print)
    for step in (3, 4, 6):
        checkpoint(tmp_path, step)
    (tmp_path / "abandoned-checkpoint-4" / "weights").write_bytes(b"first")
    (tmp_path / "abandoned-checkpoint-4-2").symlink_to("nothing")
    log = []
    set_aside_other_branches(tmp_path, "a", tmp_path / "abandoned-checkpoint-4", 4, log.append)
    assert log[1] == "abandoned-checkpoint-4: is checkpoint-4 again"
    latest, _ = find_checkpoint("latest", tmp_path, "a")
    assert latest.name == "checkpoint-4" and (latest / "weights").read_bytes() == b"first"
    assert {"checkpoint-2", "checkpoint-3", "abandoned-checkpoint-4-3", "abandoned-checkpoint-6-2"} < {*names(tmp_path)}


def test_the_limit_deletes_the_link_to_a_checkpoint_elsewhere_but_not_the_checkpoint(tmp_path):
    elsewhere = checkpoint(tmp_path, 1).rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-1").symlink_to(elsewhere)
    checkpoint(tmp_path, 2, total_limit=1)
    assert names(tmp_path) == ["checkpoint-2", "elsewhere"] and names(elsewhere)


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


def test_files_of_others_in_a_folder_of_a_result_are_kept(tmp_path):
    for file in ("unet/notes/mine.md", "unet/two"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("mine")
    (tmp_path / "unet" / "link").symlink_to("nothing")
    (tmp_path / "result.json").write_text('{"files": {"lora.safetensors": 1}}')
    for run in "ab":
        result(tmp_path, run, "unet/one", "vae/x")
    (tmp_path / "vae" / "mine.safetensors").write_text("mine")
    result(tmp_path, "c", "lora.safetensors")
    assert names(tmp_path) == ["lora.safetensors", "result.json", "unet", "vae"]
    assert names(tmp_path / "unet") == ["link", "notes", "two"] and names(tmp_path / "vae") == ["mine.safetensors"]
    assert (tmp_path / "unet" / "notes" / "mine.md").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["../mine/x", "{root}/mine/x", "..", "/", ".", "link/x", "unet/../../mine/x", "x" * 300]
)
def test_a_damaged_list_deletes_nothing_beyond_the_folder(tmp_path, name):
    out = tmp_path / "out"
    for folder in (out / "unet", tmp_path / "mine"):
        folder.mkdir(parents=True)
        (folder / "x").write_text("mine")
    (out / "link").symlink_to(tmp_path / "mine")
    (out / "result.json").write_text(json.dumps({"files": {name.format(root=tmp_path): 4}}))
    result(out, "a", "lora.safetensors")
    assert names(tmp_path) == ["mine", "out"] and names(tmp_path / "mine") == ["x"]
    assert names(out) == ["link", "lora.safetensors", "result.json", "unet"] and names(out / "unet") == ["x"]


@pytest.mark.parametrize("name", ["training_args.json", "checkpoint-2/state.json", "logs/x", "validation-over-steps/x"])
def test_a_damaged_list_deletes_nothing_of_what_is_no_result(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    (tmp_path / "result.json").write_text(json.dumps({"files": {name: 2}}))
    result(tmp_path, "a", "lora.safetensors")
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("files", [None, [], "x", 3, {"x": None}])
def test_a_damaged_list_is_as_none(tmp_path, files):
    (tmp_path / "lora.safetensors").write_text("mine")
    (tmp_path / "result.json").write_text(json.dumps({"run": "a", "files": files}))
    with pytest.raises(UserError, match="has no result.json with its files"):
        require_result(tmp_path)
    result(tmp_path, "b", "other.safetensors")
    assert names(tmp_path) == ["lora.safetensors", "other.safetensors", "result.json"]


def test_a_replacement_that_was_interrupted_is_no_result_and_the_next_one_clears_up(tmp_path, monkeypatch):
    result(tmp_path, "a", "model_index.json", "unet/one", "vae/x")
    require_result(tmp_path)
    before, renamed = os.rename, []

    def rename(source, target):
        renamed.append(target)
        if len(renamed) == 4:  # of six
            raise KeyboardInterrupt
        before(source, target)

    monkeypatch.setattr("os.rename", rename)
    with pytest.raises(KeyboardInterrupt):
        result(tmp_path, "b", "model_index.json", "unet/one", "new/x")
    monkeypatch.undo()
    with pytest.raises(UserError, match="its run was ended while it replaced another one"):
        require_result(tmp_path)
    result(tmp_path, "c", "unet/one")
    require_result(tmp_path)
    assert names(tmp_path) == ["result.json", "unet"]


@pytest.mark.parametrize("has_result", [True, False])
def test_only_a_complete_checkpoint_is_one_to_continue(tmp_path, has_result):
    if has_result:
        result(tmp_path, "a", "lora.safetensors")
    with pytest.raises(UserError) if has_result else nullcontext() as refused:
        refuse_used_folder(tmp_path, False)
    assert not has_result or str(refused.value).endswith(
        "holds a result of an earlier run; expected --overwrite_output_dir to replace it, or another folder"
    )
    damage(checkpoint(tmp_path, 5))
    with pytest.raises(UserError) as refused:
        refuse_used_folder(tmp_path, False)
    assert "holds checkpoints up to checkpoint-5, none of them complete," in str(refused.value)
    assert "--resume_from_checkpoint" not in str(refused.value)
    checkpoint(tmp_path, 3)
    with pytest.raises(UserError, match="expected --resume_from_checkpoint latest to continue it, --overwrite"):
        refuse_used_folder(tmp_path, False)


@pytest.mark.parametrize(
    "files, overwrites, message",
    [
        ([], False, None),
        (["logs/x", "validation/step-1.png", "notes.txt", "encoded/a.safetensors"], False, None),
        (["checkpoint-7/x"], False, "holds checkpoints up to checkpoint-7, none of them complete, of an earlier run"),
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
    with pytest.raises(
        UserError, match="holds checkpoints up to checkpoint-4, none of them complete, and a result of an earlier run"
    ):
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
