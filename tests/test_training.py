"""What the loop does when something goes wrong: no number, no sample, no space."""

import ppdiffusers_train  # noqa: F401

import json
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest

from ppdiffusers_train.runtime.checkpoint import read_state
from tests.conftest import last_error, no_file_above, optimizer_state, same, scalars, tensors, weights


@pytest.fixture
def breaking(train, kandinsky_jobs, monkeypatch):
    """`breaking(steps, how, *flags)`: a prior run whose loss or gradient is no number at the calls in `steps`."""

    def run(steps, how, *flags, out="out"):
        job = kandinsky_jobs["prior"]
        forward, calls = job.KandinskyPriorTrainingModule.forward, []

        def broken(self, encoded, draws):
            calls.append(None)
            loss = forward(self, encoded, draws)
            if len(calls) not in steps:
                return loss
            if how == "loss":
                return loss * float("nan")
            return loss + (0 * self.prior.proj_in.bias).sqrt().sum()  # 0, and its gradient is not a number

        with monkeypatch.context() as patch:
            patch.setattr(job.KandinskyPriorTrainingModule, "forward", broken)
            return train("prior", "--max_train_steps=5", *flags, out=out)

    return run


@pytest.mark.parametrize("how, what", [("loss", "the loss is nan"), ("gradient", "the norm of the gradients is nan")])
def test_what_is_no_number_stops_the_run_and_is_named(breaking, capsys, tmp_path, how, what):
    with pytest.raises(SystemExit) as stopped:
        breaking({3}, how, "--checkpointing_steps=1")
    message = last_error(capsys)
    assert stopped.value.code == 1
    assert f"step 3, rank 0: {what} on " in message and ".jpg (row" in message and "(timesteps [" in message
    assert message.endswith("]); the last checkpoint is untouched")
    assert read_state(tmp_path / "out" / "checkpoint-2")["step"] == 2


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_counted_few_are_dropped_and_the_count_survives_a_resume(breaking, train, capsys, tmp_path, how):
    out = breaking({2}, how, "--skip_nonfinite=1", "--checkpointing_steps=1")
    assert "skipped step 2, 1 of at most 1: rank 0: " in capsys.readouterr().out
    assert all(np.isfinite(array).all() for array in weights(out, "prior").values())
    states = [optimizer_state(out / f"checkpoint-{step}") for step in (1, 2, 3)]
    assert same(states[0], states[1]) and not same(states[1], states[2]), "the dropped step left no trace"
    shutil.rmtree(out / "checkpoint-5")
    with pytest.raises(SystemExit):
        breaking({1}, how, "--skip_nonfinite=1", "--resume_from_checkpoint=latest")
    assert "step 5, rank 0" in last_error(capsys)


@pytest.mark.once
@pytest.mark.parametrize("use_8bit_adam", [[], ["--use_8bit_adam"]], ids=str)
def test_a_skipped_step_moves_the_position_but_neither_schedule_nor_average_and_is_counted(breaking, use_8bit_adam):
    flags = ["--skip_nonfinite=1", "--use_ema", "--lr_scheduler=linear", "--checkpointing_steps=1", *use_8bit_adam]
    skipping, other = breaking({2}, "gradient", *flags), breaking({}, "gradient", *flags, out="other")
    rates, usual = (scalars(out, "train/learning_rate") for out in (skipping, other))
    assert rates == [usual[0], usual[1], *usual[1:4]] and len(set(usual)) == 5
    assert scalars(skipping, "train/skipped_steps") == [0, 1, 1, 1, 1]
    states = [read_state(skipping / f"checkpoint-{step}") for step in (1, 2, 3)]
    assert [state["ema_updates"] for state in states] == [1, 1, 2]
    assert [state["position"] for state in states] == [2, 4, 6]
    averages = [tensors(skipping / f"checkpoint-{step}" / "ema.safetensors") for step in (1, 2, 3)]
    assert same(averages[0], averages[1]) and not same(averages[1], averages[2])


def all_of(checkpoint):
    """Every tensor of a checkpoint, and what else changes during training."""
    record = {name: value for name, value in read_state(checkpoint).items() if name not in ("run", "command", "files")}
    record.pop("arguments")
    files = {str(file.relative_to(checkpoint)): file for file in checkpoint.rglob("*.safetensors")}
    return {f"{name} {key}": array for name, file in files.items() for key, array in tensors(file).items()}, record


@pytest.mark.parametrize("how, more", [("loss", []), ("gradient", ["--use_8bit_adam"])], ids=str)
def test_a_step_that_is_no_number_leaves_a_checkpoint_of_the_state_before_it(breaking, capsys, tmp_path, how, more):
    flags = ["--use_ema", "--lr_scheduler=linear", "--lr_warmup_steps=1", "--gradient_accumulation_steps=2", *more]
    whole = breaking({}, how, *flags, "--checkpointing_steps=2", out="whole")
    with pytest.raises(SystemExit):
        breaking({6}, how, *flags)
    message, out = last_error(capsys), tmp_path / "out"
    assert "step 3, rank 0: " in message and "; wrote checkpoint-2 before it; the last checkpoint is" in message
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    (before, record), (expected, expected_record) = (all_of(run / "checkpoint-2") for run in (out, whole))
    assert same(before, expected) and record == expected_record and len(before) > 100
    with pytest.raises(SystemExit):  # the same step again
        breaking({2}, how, *flags, "--resume_from_checkpoint=latest")
    assert "step 3, rank 0: " in last_error(capsys)
    breaking({}, how, *flags, "--resume_from_checkpoint=latest")
    assert same(all_of(out / "checkpoint-5")[0], all_of(whole / "checkpoint-5")[0])


@pytest.mark.once
def test_no_final_checkpoint_means_none_before_a_step_that_is_no_number_either(breaking, capsys, tmp_path):
    for steps, flags in (({2}, ["--no_final_checkpoint"]), ({1}, [])):
        with pytest.raises(SystemExit):
            breaking(steps, "gradient", *flags, out=str(steps))
        message = last_error(capsys)
        assert f"step {max(steps)}, rank 0: the norm of the gradients is nan" in message and "wrote" not in message
        assert not list((tmp_path / str(steps)).glob("checkpoint-*"))


@pytest.fixture
def data(photos, tmp_path):
    """Photographs of which two are broken."""
    folder = shutil.copytree(photos, tmp_path / "data")
    for file in sorted(folder.glob("*.jpg"))[1:3]:
        file.write_bytes(b"no picture")
    return folder


def with_text_files(folder, target):
    """A copy of a folder with a text file beside each image instead of the metadata."""
    shutil.copytree(folder, target)
    for row in map(json.loads, (target / "metadata.jsonl").read_text().splitlines()):
        (target / row["file_name"]).with_suffix(".txt").write_text(f"{row['text']}\n")
    (target / "metadata.jsonl").unlink()
    return target


@pytest.mark.once
def test_bad_samples_are_named_once_counted_and_skipped_alike_with_any_number_of_workers_and_any_kind_of_captions(
    train, data, tmp_path, capsys
):
    flags = ["--max_train_steps=8", "--max_bad_samples=2", "--checkpointing_steps=8"]
    folders = {0: data, 3: with_text_files(data, tmp_path / "texts")}
    runs = [
        train("prior", *flags, f"--train_data_dir={folder}", f"--dataloader_num_workers={count}", out=str(count))
        for count, folder in folders.items()
    ]
    said = capsys.readouterr().out
    for folder, origin in zip(folders.values(), ("metadata", "text files")):
        unused = f"not used: 2 unreadable, for example {sorted(folder.glob('*.jpg'))[1]}"
        assert f"{folder}: 7 images; captions: 7 of {origin}; {unused}\n" in said
    assert said.count("skipped, 1 of at most 2 bad samples: ") == said.count("skipped, 2 of at most 2") == 2
    assert "the image cannot be read" in said
    assert same(*(weights(run, "prior") for run in runs))
    assert read_state(runs[0] / "checkpoint-8")["bad_rows"] == [1, 2]
    with pytest.raises(SystemExit):
        train("prior", *flags, f"--train_data_dir={data}", "--repeats=2", "--resume_from_checkpoint=latest", out="0")
    assert "another run: its --repeats is not given, here it is for 14 samples per epoch" in last_error(capsys)
    resumed = ["--max_train_steps=9", "--resume_from_checkpoint=latest", "--checkpointing_steps=9"]
    train("prior", *flags, f"--train_data_dir={data}", *resumed, out="0")
    assert "skipped, " not in capsys.readouterr().out
    assert read_state(runs[0] / "checkpoint-9")["bad_rows"] == [1, 2]


def test_the_loss_is_the_mean_over_the_samples_that_came_and_the_order_of_the_others_stays(train, data):
    """With a learning rate of 0 and a batch size of 1, one epoch gives the loss of every sample; 0 if it is skipped."""
    flags = [f"--train_data_dir={data}", "--max_bad_samples=2", "--learning_rate=0"]
    alone = scalars(train("prior", *flags, "--train_batch_size=1", "--max_train_steps=7", out="alone"))
    assert alone.count(0) == 2
    windows = [[loss for loss in alone[start : start + 3] if loss] for start in (0, 3, 6)]
    for batch, accumulation in ((3, 1), (1, 3)):
        flags = [*flags, f"--train_batch_size={batch}", f"--gradient_accumulation_steps={accumulation}"]
        losses = scalars(train("prior", *flags, "--max_train_steps=3", out=str(batch)))
        assert losses == pytest.approx([np.mean(window) if window else 0 for window in windows], rel=1e-5)


def test_gradients_are_those_of_the_mean_too(train, data):
    flags = [f"--train_data_dir={data}", "--max_train_steps=4", "--max_bad_samples=2", "--checkpointing_steps=4"]
    both = train("prior", *flags, "--train_batch_size=2", out="both")
    single = train("prior", *flags, "--train_batch_size=1", "--gradient_accumulation_steps=2", out="single")
    moments = [optimizer_state(run / "checkpoint-4") for run in (both, single)]
    assert all(np.allclose(moments[0][n], moments[1][n], atol=1e-5) for n in moments[0] if "moment1" in n)


@pytest.mark.once
def test_one_bad_sample_too_many_ends_the_run_with_its_name(train, data, capsys):
    with pytest.raises(SystemExit) as stopped:
        train("prior", f"--train_data_dir={data}", "--max_train_steps=8", "--max_bad_samples=1")
    message = last_error(capsys)
    assert stopped.value.code == 2
    assert ".jpg (row" in message and "(2 bad samples, --max_bad_samples is 1)" in message


@pytest.mark.once
def test_bad_samples_are_found_while_encoding_too(train, data, tmp_path, capsys):
    flags = [f"--train_data_dir={data}", "--max_train_steps=8", "--max_bad_samples=2", "--repeats=3"]
    online = train("prior", *flags, out="online")
    assert "21 samples; 8 steps of 2 samples, 11 per epoch" in capsys.readouterr().out
    cached = train("prior", *flags, f"--encoded_cache_dir={tmp_path / 'cache'}", out="cached")
    assert same(weights(online, "prior"), weights(cached, "prior"))
    assert ": 7 of 7 samples are still to be encoded" in capsys.readouterr().out, "a repeated sample is encoded once"
    with pytest.raises(SystemExit) as stopped:
        train("prior", *flags[:2], f"--encoded_cache_dir={tmp_path / 'cache'}", out="strict")
    assert stopped.value.code == 2 and "the image cannot be read" in last_error(capsys)


# The prior's weights take 0.5 MB, its optimizer's state 1 MB.
BETWEEN = 800_000


@pytest.mark.once
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_harms_no_other(train, capsys):
    train("prior", "--max_train_steps=1", "--checkpointing_steps=1")
    flags = ["--max_train_steps=3", "--checkpointing_steps=1", "--resume_from_checkpoint=latest", "--report_to=none"]
    with no_file_above(BETWEEN), pytest.raises(SystemExit) as stopped:
        out = train("prior", *flags)
    message = last_error(capsys)
    assert stopped.value.code == 1 and "checkpoint-2 cannot be written to" in message
    assert "earlier checkpoints are untouched" in message
    out = train("prior", *flags)
    assert same(weights(out, "prior"), weights(train("prior", "--max_train_steps=3", out="whole"), "prior"))


@pytest.mark.once
def test_on_save_error_continue_goes_on_to_the_result(train, capsys):
    with no_file_above(BETWEEN):
        out = train("prior", "--checkpointing_steps=1", "--on_save_error=continue", "--report_to=none")
    assert capsys.readouterr().out.count("; continuing") == 2
    assert not list(out.glob("checkpoint-*")) and not list(out.glob(".*")), "no half-written folder is left"
    assert weights(out, "prior")


@pytest.mark.once
def test_a_result_that_cannot_be_written_is_told_and_the_checkpoint_is_there_to_go_on_from(train, capsys, tmp_path):
    flags = ["--max_train_steps=1", "--checkpointing_steps=1", "--report_to=none"]
    with no_file_above(400_000), pytest.raises(SystemExit) as stopped:
        train("prior", *flags, "--on_save_error=continue")
    message = last_error(capsys)
    assert stopped.value.code == 1 and "the result cannot be written to" in message


@pytest.fixture
def interrupting(kandinsky_jobs, monkeypatch):
    """`interrupting(method)`: SIGTERM arrives whenever that method of the prior's job is called."""
    job = kandinsky_jobs["prior"].KandinskyPriorTrainingModule

    def interrupt(name):
        method = getattr(job, name)
        monkeypatch.setattr(job, name, lambda *args: os.kill(os.getpid(), signal.SIGTERM) or method(*args))

    return interrupt


@pytest.mark.once
def test_a_signal_after_the_last_step_costs_no_result(train, interrupting, capsys):
    interrupting("save_pretrained")
    out = train("prior", "--max_train_steps=1", "--report_to=none")
    assert (
        "SIGTERM: received after the last step; the run has ended and its result is written" in capsys.readouterr().out
    )
    assert weights(out, "prior") and read_state(out / "checkpoint-1")["step"] == 1


@pytest.mark.once
def test_a_stop_without_a_checkpoint_does_not_claim_one(train, interrupting, capsys):
    interrupting("forward")
    with no_file_above(BETWEEN), pytest.raises(SystemExit) as stopped:
        train("prior", "--on_save_error=continue", "--report_to=none")
    said = capsys.readouterr().out
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "SIGTERM: ended after step 1 of 2, without a checkpoint" in said and "SIGTERM: wrote" not in said


@pytest.mark.once
def test_a_finished_run_goes_on_with_more_steps_and_to_the_same_bits(train):
    whole = train("prior", "--max_train_steps=4", out="whole")
    flags = ["--checkpointing_steps=100", "--resume_from_checkpoint=latest"]
    parts = train("prior", *flags, "--max_train_steps=2", out="parts")
    assert [path.name for path in parts.glob("checkpoint-*")] == ["checkpoint-2"]
    train("prior", *flags, "--max_train_steps=4", "--no_final_checkpoint", out="parts")
    assert same(weights(whole, "prior"), weights(parts, "prior"))
    assert [path.name for path in parts.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.once
@pytest.mark.parametrize("job, part", [("prior", "prior"), ("decoder", "unet")])
def test_checkpoints_have_the_layout_of_the_result_and_resume_to_the_same_bits_in_any(train, job, part):
    flags = ["--max_train_steps=3", "--use_ema", "--checkpointing_steps=1"]
    whole = train(job, *flags, "--save_format=diffusers", out="whole")
    for folder in (whole / "checkpoint-2" / part, whole / "checkpoint-2" / "ema" / part):
        assert (folder / "diffusion_pytorch_model.safetensors").is_file()
    resume = f"--resume_from_checkpoint={whole / 'checkpoint-2'}"
    resumed = train(job, *flags, "--save_format=diffusers", resume)
    assert same(*(tensors(out / part / "diffusion_pytorch_model.safetensors") for out in (whole, resumed)))
    plain = train(job, *flags, "--save_format=ppdiffusers", resume, out="plain")
    direct = train(job, *flags, "--save_format=ppdiffusers", out="direct")
    assert same(weights(plain, part), weights(direct, part))


@pytest.mark.once
def test_a_changed_learning_rate_or_length_holds_from_the_first_step_after_a_resume(train):
    cosine = ["--lr_scheduler=cosine", "--lr_warmup_steps=0", "--resume_from_checkpoint=latest"]
    out = train("prior", *cosine, "--max_train_steps=2")
    train("prior", *cosine, "--max_train_steps=4", "--learning_rate=2e-3")
    rates = scalars(out, "train/learning_rate")
    assert rates == pytest.approx([1e-3, 5e-4, 1e-3, 2.929e-4], rel=1e-3)


@pytest.mark.once
def test_epochs_are_counted_in_samples_when_the_batch_changes_at_a_resume(
    kandinsky_jobs, decoder_flags, tmp_path, capsys
):
    """One epoch of seven samples in steps of two, then two in steps of seven."""
    flags = [flag for flag in decoder_flags if not flag.startswith("--max_train_steps")]
    flags += [f"--output_dir={tmp_path / 'out'}", "--resume_from_checkpoint=latest"]
    kandinsky_jobs["prior"].main([*flags, "--num_train_epochs=1", "--train_batch_size=2"])
    kandinsky_jobs["prior"].main([*flags, "--num_train_epochs=3", "--train_batch_size=7"])
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    assert steps == [4, 6] and read_state(tmp_path / "out" / "checkpoint-6")["position"] == 21
    kandinsky_jobs["prior"].main([*flags, "--num_train_epochs=3", "--train_batch_size=2"])
    with pytest.raises(SystemExit) as stopped:
        kandinsky_jobs["prior"].main([*flags, "--num_train_epochs=2", "--train_batch_size=2"])
    expected = "checkpoint-6 is of epoch 3, but the run has 2 epochs; expected more epochs, or an earlier checkpoint"
    assert stopped.value.code == 2 and expected in last_error(capsys)


@pytest.mark.once
def test_a_change_that_would_mix_two_runs_is_refused_and_others_are_announced(train, kandinsky, tmp_path, capsys):
    out = train("prior_lora", "--max_train_steps=1", "--lora_alpha=4")
    other = shutil.copytree(kandinsky[0], tmp_path / "other")
    file = next((other / "prior").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    words = shutil.copytree(kandinsky[0], tmp_path / "words")
    vocabulary = json.loads((words / "tokenizer" / "vocab.json").read_text())
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (words / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    flags = ["--lora_alpha=4", "--max_train_steps=2", "--resume_from_checkpoint=latest"]
    cases = {
        "--lora_alpha=8": "--lora_alpha: .*checkpoint-1 was trained with 4.*, now it is 8.*, which would mix two runs",
        "--snr_gamma=5": "--snr_gamma: .* was trained with None, now it is 5.0.*; expected no --snr_gamma, or",
        "--lora_rank=8": "--lora_rank: .* was trained with 4, now it is 8",
        f"--pretrained_prior_model_name_or_path={other}": "was trained from other weights of prior; expected the same",
        f"--pretrained_prior_model_name_or_path={words}": "was trained from other settings of tokenizer; expected",
    }
    for flag, message in cases.items():
        with pytest.raises(SystemExit) as stopped:
            train("prior_lora", *flags, flag)
        error = last_error(capsys)
        assert stopped.value.code == 2 and re.search(message, error), error
    train("prior_lora", *flags, "--learning_rate=1e-5")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed since checkpoint-1, ")]
    assert "--learning_rate 0.001 -> 1e-05" in line and "--max_train_steps 1 -> 2" in line
    assert (out / "checkpoint-2").is_dir()


@pytest.mark.once
def test_averages_begin_or_end_and_moments_are_converted_at_a_resume(train, tmp_path, capsys):
    flags = ["--max_train_steps=4", "--checkpointing_steps=3", "--resume_from_checkpoint=latest"]
    plain = train("prior", "--max_train_steps=3", out="plain")
    eight = train("prior", "--max_train_steps=3", "--use_8bit_adam", "--use_ema", out="eight")
    start = {"plain": weights(plain / "checkpoint-3", "prior"), "eight": weights(eight / "checkpoint-3", "prior")}
    for name in ("plain", "eight"):
        for copy in ("same", "other"):
            shutil.copytree(tmp_path / name, tmp_path / f"{name}-{copy}")
    train("prior", *flags, out="plain-same")
    train("prior", *flags, "--use_8bit_adam", "--use_ema", out="eight-same")
    capsys.readouterr()
    train("prior", *flags, "--use_8bit_adam", "--use_ema", "--validation_steps=4", out="plain-other")
    said = capsys.readouterr().out
    assert "--use_8bit_adam: the moments of checkpoint-3 become 8 bits\n" in said
    assert "--use_ema: checkpoint-3 has no averages; they begin with the weights of now\n" in said
    assert "--use_8bit_adam False -> True" in said and "--use_ema False -> True" in said
    train("prior", *flags, out="eight-other")
    said = capsys.readouterr().out
    assert "--use_8bit_adam: the moments of checkpoint-3 become float32\n" in said
    assert "--no_use_ema: the averages of checkpoint-3 are dropped; the result will have the weights" in said
    for name, first in start.items():
        kept, other = (weights(tmp_path / f"{name}-{copy}" / "checkpoint-4", "prior") for copy in ("same", "other"))
        moved = np.concatenate([(kept[key] - first[key]).ravel() for key in kept])
        differs = np.concatenate([(kept[key] - other[key]).ravel() for key in kept])
        assert 0 < np.abs(differs).mean() < 0.05 * np.abs(moved).mean(), "as if nothing had been converted, nearly"
    assert not (tmp_path / "eight-other" / "checkpoint-4" / "ema.safetensors").exists()
    averages = tensors(tmp_path / "plain-other" / "checkpoint-4" / "ema.safetensors")
    assert read_state(tmp_path / "plain-other" / "checkpoint-4")["ema_updates"] == 1
    assert all(np.array_equal(averages[f"prior.{key}"], other) for key, other in weights(
        tmp_path / "plain-other" / "checkpoint-4", "prior").items() if f"prior.{key}" in averages)  # fmt: skip


@pytest.mark.once
def test_averages_that_begin_at_a_resume_are_the_weights_of_the_checkpoint(breaking, train, tmp_path):
    """Not those of the base: a step that is skipped leaves them as they began."""
    train("prior", "--max_train_steps=2", out="out")
    breaking({1}, "loss", "--resume_from_checkpoint=latest", "--use_ema", "--skip_nonfinite=1", "--max_train_steps=3")
    averages = tensors(tmp_path / "out" / "checkpoint-3" / "ema.safetensors")
    trained = weights(tmp_path / "out" / "checkpoint-2", "prior")
    assert averages and all(np.array_equal(array, trained[name[6:]]) for name, array in averages.items())


@pytest.mark.once
def test_other_data_is_accepted_on_demand_and_the_run_goes_on_by_samples_seen(train, photos, tmp_path, capsys):
    fewer = shutil.copytree(photos, tmp_path / "fewer")
    (fewer / "coffee.jpg").write_bytes(b"no picture")
    flags = ["--num_train_epochs=2", "--train_batch_size=2", "--max_bad_samples=1"]
    train("prior", *flags[1:], f"--train_data_dir={fewer}", "--max_train_steps=3")
    state = read_state(tmp_path / "out" / "checkpoint-3")
    assert (state["position"], state["bad_rows"]) == (6, [3])
    lines = (photos / "metadata.jsonl").read_text().splitlines(keepends=True)
    other = shutil.copytree(photos, tmp_path / "other")
    (other / "metadata.jsonl").write_text("".join(lines[:5]))
    for line in lines[5:]:
        (other / json.loads(line)["file_name"]).unlink()
    flags = [*flags, f"--train_data_dir={other}", "--resume_from_checkpoint=latest"]
    with pytest.raises(SystemExit) as stopped:
        train("prior", *flags, "--max_train_steps=6")
    assert stopped.value.code == 2 and "or --accept_changed_data to go on with other data" in last_error(capsys)
    jobs = [*flags, "--accept_changed_data", "--checkpointing_steps=1"]
    train("prior", *jobs, "--max_train_steps=6")
    said = capsys.readouterr().out
    assert "--accept_changed_data: other data than the checkpoint's (number of samples, data" in said
    assert "the run goes on by samples seen: 6, which is 1.20 epochs of this data" in said
    states = [read_state(tmp_path / "out" / f"checkpoint-{step}") for step in (4, 5, 6)]
    assert [state["position"] for state in states] == [8, 10, 12], "the second epoch ends at 10"
    assert states[-1]["bad_rows"] == [], "they were rows of the other data"
    train("prior", *flags, "--max_train_steps=7")  # from now on, it is this run's data


@pytest.mark.once
def test_the_rate_is_scaled_by_the_samples_that_a_step_has(train):
    flags = ["--scale_lr", "--max_train_steps=1", "--train_batch_size=2", "--gradient_accumulation_steps=2"]
    for samples, scale in ((7, 4), (3, 3)):  # of 7 and of 3, steps of at most 4
        out = train("prior", *flags, f"--max_train_samples={samples}", out=str(samples))
        assert scalars(out, "train/learning_rate") == pytest.approx([1e-3 * scale])


@pytest.mark.once
def test_a_bad_sample_that_ends_a_run_leaves_the_steps_before_it(train, photos, tmp_path, capsys):
    """Its header can be read, so it is found when its turn comes."""
    data = shutil.copytree(photos, tmp_path / "data")
    file = data / "coffee.jpg"
    good = file.read_bytes()
    file.write_bytes(good[:3000])
    flags = [f"--train_data_dir={data}", "--max_train_steps=7", "--train_batch_size=1"]
    with pytest.raises(SystemExit) as stopped:
        train("prior", *flags)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    message = last_error(capsys)
    assert stopped.value.code == 2 and f"; wrote {checkpoint.name} before it" in message and "coffee.jpg" in message
    with pytest.raises(SystemExit) as stopped:  # the same command again, as a scheduler starts it
        train("prior", *flags, "--resume_from_checkpoint=latest")
    again = last_error(capsys)
    assert stopped.value.code == 2 and "coffee.jpg (row 3): the image cannot be read" in again
    train("prior", *flags, "--resume_from_checkpoint=latest", "--max_bad_samples=1")
    assert "skipped, 1 of at most 1 bad samples: " in capsys.readouterr().out
    more = [flags[0], "--max_train_steps=8", "--train_batch_size=1", "--resume_from_checkpoint=latest"]
    train("prior", *more)  # what was skipped before is no new bad sample
    losses = scalars(train("prior", *flags, "--max_bad_samples=1", out="whole"))
    assert scalars(tmp_path / "out")[:7] == losses and losses.count(0) == 1


@pytest.mark.once
def test_a_new_run_in_the_folder_of_another_is_refused_until_it_may_overwrite(train, capsys, tmp_path):
    out = train("prior_lora", "--max_train_steps=2", "--trainable_modules=proj_in")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit) as stopped:
        train("prior_lora", "--max_train_steps=1")
    message = last_error(capsys)
    assert stopped.value.code == 2 and "holds checkpoints up to checkpoint-2 and a result of an earlier run" in message
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert list(out.glob("trainable_modules*"))
    train("prior_lora", "--max_train_steps=1", "--overwrite_output_dir")
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not list(out.glob("trainable_modules*")), "it would be taken for a part of the new result"


@pytest.mark.once
def test_a_run_that_goes_back_sets_its_later_checkpoints_aside(train, tmp_path, capsys):
    flags = ["--checkpointing_steps=1", "--max_train_steps=3"]
    out = train("prior", *flags)
    train("prior", *flags, "--resume_from_checkpoint=checkpoint-1", "--checkpoints_total_limit=1")
    assert "checkpoint-2 to checkpoint-3: set aside" in capsys.readouterr().out
    assert sorted(path.name for path in out.glob("*checkpoint-*")) == [
        "abandoned-checkpoint-2",
        "abandoned-checkpoint-3",
        "checkpoint-3",
    ]
    assert same(weights(out / "checkpoint-3", "prior"), weights(out / "abandoned-checkpoint-3", "prior"))


@pytest.mark.once
def test_validation_images_that_fail_cost_neither_the_run_nor_its_result(train, kandinsky_jobs, monkeypatch, capsys):
    def fail(self, prompts, seeds):
        raise MemoryError("out of\nmemory")

    whole = train("prior", "--max_train_steps=2", out="whole")
    monkeypatch.setattr(kandinsky_jobs["prior"].KandinskyPriorTrainingModule, "generate", fail)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train("prior", "--max_train_steps=2", "--validation_prompt=x", "--validation_steps=1")
    output = capsys.readouterr()
    assert stopped.value.code == 3 and output.out.count("no validation images, MemoryError: out of memory") == 2
    message = output.err.splitlines()[-1]
    assert "the result is complete, but validation images are missing: after step 1: MemoryError" in message
    assert same(weights(whole, "prior"), weights(whole.parent / "out", "prior"))
    assert (whole.parent / "out" / "checkpoint-2").is_dir()


@pytest.mark.once
def test_an_output_folder_that_vanishes_is_made_again(train, kandinsky_jobs, monkeypatch, tmp_path):
    job = kandinsky_jobs["prior"]
    monkeypatch.setattr(
        job.KandinskyPriorTrainingModule, "after_step", lambda self: shutil.rmtree(tmp_path / "out", ignore_errors=True)
    )
    out = train("prior", "--checkpointing_steps=1", "--report_to=none")
    assert weights(out, "prior")


@pytest.mark.once
def test_the_command_is_kept_and_no_token(train, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--hub_token", "hf_secret", "--seed", "0"])
    out = train("prior", "--hub_token=hf_secret", "--max_train_steps=1", "--checkpointing_steps=1")
    for file in (out / "training_args.json", out / "checkpoint-1" / "state.json"):
        assert json.loads(file.read_text())["command"] == "script.py --hub_token *** --seed 0"
    assert not [f for f in out.rglob("*") if f.is_file() and b"hf_secret" in f.read_bytes()]


def test_the_norm_of_the_gradients_is_reported_before_it_is_clipped(train):
    norms = [
        scalars(
            train("prior", f"--max_grad_norm={limit}", "--max_train_steps=1", out=str(limit)), "train/gradient_norm"
        )
        for limit in (1.0, 1e-3)
    ]
    assert norms[0] == norms[1] and norms[0][0] > 0.01


def test_a_parameter_that_a_step_does_not_use_stays_as_it_is(train, kandinsky_jobs, monkeypatch):
    """As with torch's optimizers: neither its moments nor weight decay move it."""
    job, calls = kandinsky_jobs["prior"].KandinskyPriorTrainingModule, []
    forward = job.forward

    def later_of_one_parameter(self, encoded, draws):
        calls.append(None)
        return forward(self, encoded, draws) if len(calls) == 1 else self.prior.proj_in.bias.square().sum()

    monkeypatch.setattr(job, "forward", later_of_one_parameter)
    out = train("prior", "--adam_weight_decay=0.1", "--max_train_steps=2", "--checkpointing_steps=1")
    first, second = (weights(out / f"checkpoint-{step}", "prior") for step in (1, 2))
    assert [name for name in first if not np.array_equal(first[name], second[name])] == ["proj_in.bias"]
