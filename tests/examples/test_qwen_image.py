"""Qwen-Image's job, through its script."""

import ppdiffusers_train  # noqa: F401
from ppdiffusers_train import QwenImagePipeline

import json
import shutil

import numpy as np
import paddle
import pytest

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.loader import stack
from ppdiffusers_train.draws import Draws, RowDraws
from ppdiffusers_train.models.lora import lora_layers, lora_parameters
from ppdiffusers_train.models.qwen_image.loading import QwenImageFolder
from ppdiffusers_train.models.weights import load_unread, load_values
from ppdiffusers_train.module import encode_batch
from ppdiffusers_train.runtime.quantized import quantize_models
from tests.conftest import encoded_samples, kept_for_backward, optimizer_state, same, tensors

JOB, FILE = "lora_qwen", "pytorch_lora_weights.safetensors"
CAPTIONS = ["a cat", "a photo of a tabby cat that looks to the left"]


def draw(folder, lora=None):
    pipeline = QwenImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora)
    paddle.seed(1)
    return pipeline("a cat", " ", 32, 64, num_inference_steps=2, output_type="np").images


def encoded_batch(module, captions):
    """The first rows of the data with these captions, encoded together."""
    rows = build_dataset(module.args)
    samples = [{**rows[index], "caption": caption} for index, caption in enumerate(captions)]
    return encode_batch(module, stack([module.preprocess(row, RowDraws(0, n)) for n, row in enumerate(samples)])[0])


def test_the_result_is_loaded_and_a_resumed_run_ends_in_the_same_bits(train_qwen, qwen):
    flags = ["--max_train_steps=4", "--checkpointing_steps=2", "--gradient_accumulation_steps=2"]
    whole = train_qwen(JOB, *flags, "--validation_prompt=a cat", "--validation_inference_steps=1", out="whole")
    parts = train_qwen(JOB, *flags, f"--resume_from_checkpoint={whole / 'checkpoint-2'}", out="parts")
    assert same(tensors(whole / FILE), tensors(parts / FILE))
    assert same(optimizer_state(whole / "checkpoint-4"), optimizer_state(parts / "checkpoint-4"))
    with_lora = draw(qwen, whole)
    assert with_lora.shape == (1, 32, 64, 3) and np.abs(with_lora - draw(qwen)).max() > 1e-4
    assert all(name.startswith("transformer.transformer_blocks.") for name in tensors(whole / FILE))


def test_online_and_cached_runs_agree_and_the_cache_holds_no_padding(train_qwen, photos, tmp_path):
    data = shutil.copytree(photos, tmp_path / "data")
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["text"] = "a cat" + number * " meows"
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = [f"--train_data_dir={data}", "--center_crop"]
    cached = train_qwen(JOB, *flags, out="cached")
    online = train_qwen(JOB, *flags, "--no_encoded_cache", out="online")
    assert same(tensors(cached / FILE), tensors(online / FILE))
    samples = encoded_samples(cached / "encoded").values()
    lengths = {len(sample["prompt_embeds"]) for sample in samples}
    assert len(lengths) == len(lines) and max(lengths) - min(lengths) == (len(lines) - 1) * len(" meows")
    assert all(sample["prompt_embeds_mask"].all() for sample in samples)


def test_a_sample_in_a_padded_batch_has_the_loss_that_it_has_alone(build_qwen_module):
    module, losses = build_qwen_module(JOB), []
    module.eval()
    both = encoded_batch(module, CAPTIONS)
    lengths = both["prompt_embeds_mask"].sum(1).tolist()
    assert both["prompt_embeds"].shape[1] == lengths[1] > lengths[0]
    with paddle.no_grad():
        for n, length in enumerate(lengths):
            alone = {name: value[n : n + 1] for name, value in both.items()}
            alone = {name: value[:, :length] if name != "latents" else value for name, value in alone.items()}
            losses.append(module(alone, Draws(0, [n])).item())
        assert module(both, Draws(0, [0, 1])).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_dynamic_shift_follows_the_size_of_the_images(build_qwen_module):
    module = build_qwen_module(JOB, "--dynamic_shift")
    sigmas = [module.table(tokens)[0].numpy() for tokens in (256, 1024)]
    shifts = [module.folder.schedule.shift_of(tokens) for tokens in (256, 1024)]
    assert shifts[0] == pytest.approx(np.exp(0.5)) and shifts[1] > shifts[0]
    assert (sigmas[1][1:-1] > sigmas[0][1:-1]).all() and sigmas[0][-1] == pytest.approx(0.02)
    fixed = build_qwen_module(JOB)
    assert fixed.table(256)[0] is fixed.table(1024)[0]


def test_recompute_keeps_less_for_the_backward_pass(build_qwen_module):
    (kept, gradients), (kept_less, same_gradients) = (
        kept_for_backward(build_qwen_module(JOB, flag))
        for flag in ("--no_gradient_checkpointing", "--gradient_checkpointing")
    )
    assert kept_less < kept
    for one, other in zip(gradients, same_gradients, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)


def test_a_quantized_base_changes_the_loss_little_and_all_blocks_are_quantized(build_qwen_module):
    losses = []
    for kind in ("no", "int8", "nf4"):
        module = build_qwen_module(JOB, f"--quantize_base={kind}")
        module.eval()
        weights = module.transformer.parameters()
        unread = [hasattr(weight, "load_value") for weight in weights if not weight.stop_gradient or kind != "no"]
        assert kind == "no" or sum(unread) == len(weights) - 2 * len(lora_layers(module.transformer))
        quantize_models(module)
        assert not any(hasattr(weight, "load_value") for weight in module.parameters())
        with paddle.no_grad():
            losses.append(module(encoded_batch(module, CAPTIONS), Draws(0, [0, 1])).item())
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[2] != losses[0] and losses[2] == pytest.approx(losses[0], rel=0.2)


def test_buckets_a_first_lora_and_class_images(train_qwen, build_qwen_module, photos, tmp_path, capsys):
    classes = ["--with_prior_preservation", "--class_prompt=a cat", "--num_class_images=1"]
    small = ["--validation_inference_steps=1", f"--class_data_dir={tmp_path / 'classes'}"]
    first = train_qwen(JOB, "--aspect_ratio_buckets", "--resolution=128", *classes, *small, out="first")
    assert "sizes are used" in capsys.readouterr().out
    module = build_qwen_module(JOB, f"--init_lora={first}")
    module.initialize(print)
    found, saved = lora_parameters(module.transformer), tensors(first / FILE)
    name = "transformer_blocks.1.attn.add_v_proj"
    np.testing.assert_array_equal(found[f"{name}.lora.up.weight"].numpy().T, saved[f"transformer.{name}.lora_B.weight"])


def test_a_dry_run_counts_the_three_models(train_qwen, capsys):
    train_qwen(JOB, "--dry_run")
    said = capsys.readouterr().out
    assert all(name in said for name in ("transformer", "text_encoder", "vae"))


@pytest.mark.parametrize(
    "change, flags, message",
    [
        (("model_index.json", "_class_name", "FluxPipeline"), [], "is a FluxPipeline; expected a QwenImagePipeline"),
        (("transformer/config.json", "in_channels", 64), [], "takes 64 channels; expected 16"),
        (("transformer/config.json", "guidance_embeds", True), [], "guidance_embeds: true; expected"),
        (("scheduler/scheduler_config.json", "use_karras_sigmas", True), [], "use_karras_sigmas: True; expected False"),
        (("text_encoder/config.json", "use_sliding_window", True), [], "use_sliding_window is true"),
        (("text_encoder/config.json", "hidden_size", 36), [], "does not fit"),
        (("tokenizer/added_tokens.json", "<|im_end|>", 300), [], "<|im_end|> is to be number 300"),
        (("vae/config.json", "latents_std", [1]), [], "expected 4 numbers each"),
        (None, ["--resolution=60"], "--resolution: 60 does not fit this model; expected a multiple of 8"),
        (None, ["--logit_std=0", "--weighting_scheme=logit-normal"], "--logit_std: 0 is not above 0"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line(train_qwen, qwen, tmp_path, capsys, change, flags, message):
    if change:
        file, name, value = change
        folder = shutil.copytree(qwen, tmp_path / "changed")
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, name: value}))
        flags = [f"--pretrained_model_name_or_path={folder}"]
    with pytest.raises(SystemExit) as exit_:
        train_qwen(JOB, *flags)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_weights_are_read_one_by_one_into_a_narrow_type(qwen):
    folder = QwenImageFolder(qwen)
    wide = folder.load("transformer").state_dict()
    narrow = load_unread(lambda: folder.load("transformer"))
    assert not np.isclose(narrow.img_in.weight.abs().sum().item(), wide["img_in.weight"].abs().sum().item())
    load_values(narrow, "bfloat16")
    for name, tensor in narrow.state_dict().items():
        assert tensor.dtype == paddle.bfloat16
        expected = wide[name].astype("bfloat16").astype("float32").numpy()
        np.testing.assert_array_equal(tensor.astype("float32").numpy(), expected)
