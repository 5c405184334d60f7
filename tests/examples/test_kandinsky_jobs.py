"""What all jobs of Kandinsky 2.2 have in common, besides the decoder's tests of the loop."""

import ppdiffusers_train  # noqa: F401

import json

import numpy as np
import paddle
import pytest
from ppdiffusers import KandinskyV22PriorPipeline
from ppdiffusers.transformers import CLIPVisionModelWithProjection

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import RowDraws
from ppdiffusers_train.models.text import tokenize
from tests.conftest import (
    check_recompute,
    encode,
    encoded_samples,
    guide_on_toys,
    optimizer_state,
    same,
    scalars,
    tensors,
    weights,
)

JOBS = ["prior", "decoder_lora", "prior_lora"]  # the decoder has tests of its own
LORA_FILE = "paddle_lora_weights.safetensors"


def trained_weights(name, folder):
    """The trained weights that a job has written, in a result or a checkpoint."""
    return tensors(folder / LORA_FILE) if name.endswith("lora") else weights(folder, name)


@pytest.mark.parametrize("name", JOBS)
def test_twelve_steps_equal_five_and_seven_more_bit_for_bit(train, name):
    flags = ["--use_ema", "--gradient_accumulation_steps=2", "--lr_scheduler=constant_with_warmup"]
    flags += ["--lr_warmup_steps=7", *(["--lora_alpha=3"] if name.endswith("lora") else [])]
    whole = train(name, *flags, "--max_train_steps=12", "--checkpointing_steps=12", out="whole")
    train(name, *flags, "--max_train_steps=5", "--checkpointing_steps=5", out="parts")
    resume = ["--max_train_steps=12", "--checkpointing_steps=12", "--resume_from_checkpoint=latest"]
    parts = train(name, *flags, *resume, out="parts")
    assert scalars(whole) == scalars(parts) and len(scalars(parts)) == 12
    checkpoints = [folder / "checkpoint-12" for folder in (whole, parts)]
    assert same(*(optimizer_state(folder) for folder in checkpoints))
    assert same(*(trained_weights(name, folder) for folder in checkpoints))
    assert same(*(tensors(folder / "ema.safetensors") for folder in checkpoints))
    assert same(trained_weights(name, whole), trained_weights(name, parts))
    assert not same(trained_weights(name, checkpoints[0]), trained_weights(name, whole)), "the result is the average"


@pytest.mark.once
@pytest.mark.parametrize("name", JOBS)
def test_validation_and_the_cache_change_no_number(train, name, tmp_path):
    plain = train(name, "--max_train_steps=4", out="plain")
    validated = train(
        name, "--max_train_steps=4", "--validation_prompt=a cat", "--validation_steps=2",
        "--validation_inference_steps=2", "--num_validation_images=1", f"--encoded_cache_dir={tmp_path / 'cache'}",
        out="validated",
    )  # fmt: skip
    assert scalars(plain) == scalars(validated) and same(trained_weights(name, plain), trained_weights(name, validated))
    assert sorted(path.name for path in (validated / "validation").iterdir()) == ["step-2.png", "step-4.png"]
    assert len(encoded_samples(tmp_path / "cache")) == 7


@paddle.no_grad()
def test_a_dropped_caption_is_what_guidance_knows_as_none(build, photos, kandinsky):
    pipeline = KandinskyV22PriorPipeline.from_pretrained(str(kandinsky[0]))
    for share, dropped in ((0.999, True), (0.0, False)):
        flag = f"--proportion_empty_prompts={share}"
        decoder, prior = build("decoder", flag), build("prior", flag)
        rows = build_dataset(prior.args)
        embeds = encode(decoder, rows, [0])["image_embeds"].numpy()
        assert np.allclose(embeds, pipeline.get_zero_embed().numpy(), atol=1e-6) == dropped
        caption = "" if dropped else rows[0]["caption"]
        assert np.array_equal(
            prior.preprocess(rows[0], RowDraws(0, 0))["input_ids"], tokenize(prior.tokenizer, caption)[0]
        )


@pytest.mark.once
def test_full_job_and_lora_share_one_cache(train, tmp_path):
    for name in ("prior", "prior_lora"):
        train(name, f"--encoded_cache_dir={tmp_path / 'cache'}", out=name)
    assert len(encoded_samples(tmp_path / "cache")) == 7


def test_prior_and_decoder_embed_an_image_once(train, tmp_path, monkeypatch, capsys):
    embedded, forward = [], CLIPVisionModelWithProjection.forward
    monkeypatch.setattr(
        CLIPVisionModelWithProjection, "forward", lambda *args, **more: embedded.append(1) or forward(*args, **more)
    )
    online, cache = train("decoder", out="online"), f"--encoded_cache_dir={tmp_path / 'cache'}"
    embedded.clear()
    train("prior", cache, out="prior")
    assert len(embedded) == 7 and "another job" not in capsys.readouterr().out
    assert same(weights(train("decoder", cache, out="decoder")), weights(online))
    assert len(embedded) == 7 and capsys.readouterr().out.count("another job has encoded parts") == 1
    train("decoder", cache, "--proportion_empty_prompts=0.7", out="dropped")
    assert 7 < len(embedded) < 14, "an image that is dropped has another embedding"


def test_a_traced_model_learns_the_same(train, monkeypatch, capsys):
    traced = []
    to_static = paddle.jit.to_static
    monkeypatch.setattr(
        paddle.jit, "to_static", lambda forward, **options: traced.append(forward) or to_static(forward, **options)
    )
    states = []
    for flag in ([], ["--to_static", "--gradient_checkpointing"]):
        flags = ["--max_train_steps=2", "--checkpointing_steps=2", *flag]
        states.append(optimizer_state(train("prior", *flags, out=f"prior{len(flag)}") / "checkpoint-2"))
    if paddle.framework.use_pir_api():
        assert type(traced[0].__self__).__name__ == "PriorTransformer"
    else:
        assert not traced and "--to_static: no effect, it needs Paddle 3" in capsys.readouterr().out
    for key, moment in states[0].items():
        assert abs(states[1][key] - moment).max() <= 1e-6 + 1e-4 * abs(moment).max()


@pytest.mark.parametrize("name", ["decoder", *JOBS])
def test_gradient_checkpointing_keeps_a_quarter_and_gives_the_same_gradients(build, name):
    check_recompute(build, name, *["--quantize_base=nf4", "--lora_dropout=0.3"][: 2 * name.endswith("lora")])


@pytest.mark.once
@pytest.mark.parametrize("name", ["prior", "prior_lora", "decoder_lora"])
def test_the_guides_command_runs(kandinsky_jobs, train, name):
    words = """--dataset_name=lambdalabs/pokemon-blip-captions --resolution=768 --train_batch_size=1
        --gradient_accumulation_steps=4 --max_train_steps=15000 --learning_rate=1e-05 --max_grad_norm=1
        --checkpoints_total_limit=3 --lr_scheduler=constant --lr_warmup_steps=0 --seed=42 --output_dir=x
        --report_to=wandb --push_to_hub --mixed_precision=fp16 --snr_gamma=5.0""".split()
    words += ["--lora_rank=4", "--validation_prompt=cute dragon creature"] if name.endswith("lora") else []
    args = kandinsky_jobs[name].build_parser().parse_args(words)
    assert (args.max_train_steps, args.adam_weight_decay, args.train_batch_size) == (15000, 0.0, 1)
    assert len(scalars(train(name, *guide_on_toys(kandinsky_jobs[name], words)))) == 1


@pytest.mark.once
@pytest.mark.parametrize(
    "name, flag",
    [("prior", "decoder"), ("decoder_lora", "prior")],
)
def test_a_folder_of_the_other_pipeline_is_refused(train, kandinsky, capsys, name, flag):
    prior, decoder = kandinsky
    other = {"decoder": prior, "prior": decoder}[flag]
    with pytest.raises(SystemExit) as stopped:
        train(name, f"--pretrained_{flag}_model_name_or_path={other}", "--validation_prompt=x")
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and f"--pretrained_{flag}_model_name_or_path: {str(other)!r} has no part" in last


@pytest.mark.once
def test_lora_and_full_checkpoints_are_not_mixed_up(train, capsys):
    checkpoint = train("prior", "--checkpointing_steps=2", out="full") / "checkpoint-2"
    with pytest.raises(SystemExit) as stopped:
        train("prior_lora", f"--resume_from_checkpoint={checkpoint}", out="lora")
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "its job is KandinskyPriorTrainingModule, here it is KandinskyPriorLoRATrainingModule" in said


@pytest.mark.once
def test_a_seed_that_was_drawn_is_the_one_that_a_resumed_run_has(train, decoder_flags):
    decoder_flags.remove("--seed=0")
    out = train("decoder_lora", "--max_train_steps=1", "--checkpointing_steps=1")
    seed = json.loads((out / "training_args.json").read_text())["seed"]
    train("decoder_lora", "--max_train_steps=2", "--resume_from_checkpoint=latest")
    assert json.loads((out / "training_args.json").read_text())["seed"] == seed
