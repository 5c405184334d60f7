"""`--quantize_base`: codes, the products of quantized layers, and runs on quantized base models."""

import ppdiffusers_train  # noqa: F401

from statistics import NormalDist

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import nn
from ppdiffusers.models.lora import LoRACompatibleConv, LoRACompatibleLinear

from ppdiffusers_train.loop.dry_run import inventory_of, options_of
from ppdiffusers_train.loop.memory_estimate import allocated
from ppdiffusers_train.module import choose_trainable, is_lora
from ppdiffusers_train.runtime.adamw_8bit import dynamic_tree_map
from ppdiffusers_train.runtime.flops import FlopCounter
from ppdiffusers_train.runtime.quantized import (
    KINDS,
    NF4_LEVELS,
    quantize_layer,
    quantize_models,
    quantized_layers,
    quantized_size,
)
from tests.conftest import kept_for_backward, last_error, same, scalars, tensors
from tests.loop.test_dry_run import ROW

BOTH = pytest.mark.parametrize("kind", list(KINDS))
LAYERS = {
    "linear": (lambda: nn.Linear(70, 33), [4, 5, 70]),
    "linear that carries LoRA": (lambda: LoRACompatibleLinear(64, 32, bias_attr=False), [3, 64]),
    "stride": (lambda: nn.Conv2D(8, 12, 3, stride=2, padding=1), [2, 8, 11, 10]),
    "groups": (lambda: LoRACompatibleConv(8, 12, 3, padding=1, groups=2), [2, 8, 9, 9]),
    "two sides": (lambda: nn.Conv2D(8, 6, [3, 1], stride=[2, 1], padding=[0, 1]), [2, 8, 10, 9]),
    "dilation": (lambda: nn.Conv2D(8, 6, 3, padding="same", dilation=2, bias_attr=False), [2, 8, 10, 9]),
}


def round_trip(kind, array, axis=0):
    """A weight after it was quantized."""
    weight = paddle.to_tensor(np.float32(array))
    packed = KINDS[kind].pack(weight, axis)
    assert {name: (tensor.shape, str(tensor.dtype).removeprefix("paddle.")) for name, tensor in packed.items()} == (
        KINDS[kind].layout(weight.shape, axis)
    )
    return KINDS[kind].unpack(packed, weight.shape).numpy()


def test_the_levels_of_nf4_are_quantiles_of_the_normal_distribution():
    """Appendix E: 7 below zero and 8 above it; at their ends, half a step of 1/15 or 1/16 is left, on average."""
    end = (1 - 1 / 30 + 1 - 1 / 32) / 2
    below, above = ([NormalDist().inv_cdf(p) for p in np.linspace(0.5, end, count)] for count in (8, 9))
    levels = np.sort([*(-np.float64(below) / below[-1]), *(np.float64(above[1:]) / above[-1])])
    assert np.allclose(levels, NF4_LEVELS, atol=1e-6) and np.float32(NF4_LEVELS).dtype == np.float32


def test_nf4_takes_the_nearest_level_of_each_block_of_64():
    weight = np.zeros([3, 64])
    weight[0, :4], weight[1, :3], weight[2, 5] = [-2, 0.5, 1.6, 0.04], [0.3, 0.04, -0.3], 1e-20
    scales = np.float64([2, 0.3, 1e-20])
    mean = scales.mean()
    values = np.float64(dynamic_tree_map(signed=True))
    distance = np.abs(scales - mean).max()
    nearest = values[np.abs((scales - mean)[:, None] / distance - values).argmin(axis=1)]
    decoded = nearest * distance + mean
    expected = np.zeros_like(weight)
    # 0.5 / 2 is nearest to 0.2461, 1.6 / 2 to 0.7230, 0.04 / 2 to 0, and 0.04 / 0.3 to 0.1609.
    expected[0, :4] = np.float64([-1, 0.24611230, 0.72295684, 0]) * decoded[0]
    expected[1, :3] = np.float64([1, 0.16093020, -1]) * decoded[1]
    expected[2, 5] = decoded[2]
    assert np.allclose(round_trip("nf4", weight.reshape([16, 12])).reshape([3, 64]), expected, rtol=1e-6, atol=3e-7)


def test_int8_divides_each_channel_by_its_largest_value():
    weight = [[127, -63.4, 1.6], [0, 0, 0], [0.254, 0.0009, -0.1266]]
    expected = [[127, -63, 2], [0, 0, 0], [0.254, 0, -0.126]]
    assert np.allclose(round_trip("int8", weight), expected, rtol=1e-6)
    assert np.allclose(round_trip("int8", np.transpose(weight), axis=1), np.transpose(expected), rtol=1e-6)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**32 - 1), st.lists(st.integers(1, 40), min_size=2, max_size=3), st.sampled_from([1e-6, 0.02, 30.0])
)
def test_errors_are_at_most_half_a_step(seed, shape, spread):
    random = np.random.default_rng(seed)
    weight = np.float32(random.standard_normal(shape) * spread * np.exp(random.standard_normal([shape[0], 1])[0]))
    step = np.abs(weight).reshape([shape[0], -1]).max(axis=1) / 127
    error = np.abs(round_trip("int8", weight) - weight).reshape([shape[0], -1])
    assert (error <= 0.5001 * step[:, None]).all()
    flat = np.pad(weight.ravel(), (0, -weight.size % 64)).reshape([-1, 64])
    scales = np.abs(flat).max(axis=1, keepdims=True)
    # Two halves of the widest gaps: between levels, and between the values of a scale's byte.
    groups = np.pad(np.abs(scales - scales.mean()).ravel(), (0, -len(scales) % 256)).reshape([-1, 256]).max(axis=1)
    of_scales = np.diff(dynamic_tree_map(signed=True)).max() / 2 * np.repeat(groups, 256)[: len(scales), None]
    bound = np.diff(NF4_LEVELS).max() / 2 * scales + of_scales
    error = np.pad(np.abs(round_trip("nf4", weight) - weight).ravel(), (0, -weight.size % 64)).reshape([-1, 64])
    assert (error <= 1.0001 * bound).all()


@BOTH
@pytest.mark.parametrize("name", LAYERS)
def test_a_quantized_layer_computes_as_one_with_the_dequantized_weight(name, kind):
    make, shape = LAYERS[name]
    ours, plain = make(), make()
    for layer in (ours, plain):
        for parameter in layer.parameters():
            parameter.stop_gradient = True
    if ours.bias is not None:
        plain.bias.set_value(paddle.rand(ours.bias.shape))
        ours.bias.set_value(plain.bias)
    quantize_layer(ours, kind)
    plain.weight.set_value(ours.weight)
    assert isinstance(ours, type(plain)) and list(ours.state_dict()) == [
        key for key in plain.state_dict() if "b" in key[:1]
    ]
    results = []
    for layer in (ours, plain):
        x = paddle.to_tensor(np.random.default_rng(0).standard_normal(shape, dtype=np.float32), stop_gradient=False)
        with FlopCounter() as counter:
            y = layer(x)
            (y * y).sum().backward()
        results.append((y.numpy(), x.grad.numpy(), counter.total))
    (y, gradient, count), (expected, expected_gradient, expected_count) = results
    assert np.allclose(y, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert np.allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-6 * np.abs(expected_gradient).max())
    assert count == expected_count


@pytest.fixture
def builders(build, build_sdxl_module, build_sd3_module):
    """{job: (what builds its module, the model that it trains)}."""
    return {
        "decoder_lora": (build, "unet"),
        "prior_lora": (build, "prior"),
        "lora_sdxl": (build_sdxl_module, "unet"),
        "lora_sd3": (build_sd3_module, "transformer"),
    }


def quantized_and_plain(builders, name, *flags):
    """Modules of a job whose frozen weights are the same: dequantized in each pass, and as ordinary parameters."""
    make, _ = builders[name]
    ours, plain = make(name, "--quantize_base=nf4", *flags), make(name, *flags)
    for module in (ours, plain):
        choose_trainable(module, module.args.trainable_modules)
        quantize_models(module)
        module.load_rest()
    for model_name in ours.quantized:
        found = dict(getattr(plain, model_name).named_sublayers())
        for layer_name, layer in getattr(ours, model_name).named_sublayers():
            if layer in quantized_layers(layer):
                found[layer_name].weight.set_value(layer.weight)
    for module in (ours, plain):
        for parameter_name, parameter in module.named_parameters():
            if is_lora(parameter_name) and ".up." in parameter_name:  # else nothing reaches the other matrices
                parameter.set_value(paddle.full_like(parameter, 0.01))
    return ours, plain


@pytest.mark.parametrize(
    "name, flags",
    [
        pytest.param(
            "lora_sdxl", ["--train_text_encoder", "--trainable_modules=unet.mid_block,conv_in"], marks=pytest.mark.once
        ),
        pytest.param("lora_sdxl", ["--gradient_checkpointing"], marks=pytest.mark.once),
        ("decoder_lora", ["--lora_target_modules=to_q,add_v_proj,conv1"]),
        pytest.param("prior_lora", [], marks=pytest.mark.once),
        pytest.param("lora_sd3", ["--gradient_checkpointing"], marks=pytest.mark.once),
    ],
)
def test_gradients_are_those_over_the_dequantized_weights_and_nothing_dequantized_is_kept(builders, name, flags):
    ours, plain = quantized_and_plain(builders, name, *flags)
    assert len(ours.quantized) == (3 if "--train_text_encoder" in flags else 1)
    for model_name in ours.quantized:
        model = getattr(ours, model_name)
        layers = [layer for name, layer in model.named_sublayers() if not is_lora(f"{name}.")]
        products = [layer for layer in layers if isinstance(layer, (nn.Linear, nn.Conv2D))]
        frozen = [layer for layer in products if layer.weight.stop_gradient]
        assert frozen and quantized_layers(model) == frozen
    (kept, gradients), (kept_plain, expected) = map(kept_for_backward, (ours, plain))
    assert kept <= kept_plain
    assert len(gradients) == len(expected) > 0
    for one, other in zip(gradients, expected):
        assert np.abs(one - other).max() <= 1e-6 * np.abs(other).max()


RUN = ["--max_train_steps=4", "--checkpointing_steps=2", "--learning_rate=1e-2", "--use_ema", "--encoded_cache"]
LORA_FILE = "paddle_lora_weights.safetensors"


@pytest.mark.once
def test_a_run_resumes_to_the_bit_and_writes_files_as_without(train_sdxl, sdxl, capsys):
    validation = ["--validation_prompt=a cat", "--validation_steps=2", "--validation_inference_steps=1"]
    flags = [*RUN, "--train_text_encoder", "--gradient_checkpointing", *validation, "--num_validation_images=1"]
    whole = train_sdxl("lora_sdxl", *flags, "--quantize_base=nf4", out="whole")
    said = capsys.readouterr().out
    for model in ("unet", "text_encoder", "text_encoder_2"):
        assert f" weights of {model}\n" in said
    assert len(list((whole / "validation").glob("**/*.png"))) > 0
    parts = tensors(whole / LORA_FILE)
    resume = f"--resume_from_checkpoint={whole / 'checkpoint-2'}"
    resumed = train_sdxl("lora_sdxl", *flags, "--quantize_base=nf4", resume, out="resumed")
    assert same(parts, tensors(resumed / LORA_FILE))
    plain = train_sdxl("lora_sdxl", *flags, "--max_train_steps=2", out="plain")
    without = tensors(plain / LORA_FILE)
    assert parts.keys() == without.keys() and all(parts[key].dtype == without[key].dtype for key in parts)
    files = [sorted(str(path.relative_to(out)) for path in (out / "checkpoint-2").rglob("*")) for out in (whole, plain)]
    assert files[0] == files[1]
    losses = [np.float64(scalars(out)[:2]) for out in (whole, plain)]
    assert 1e-6 < np.abs(losses[0] - losses[1]).max() < 0.05 * losses[1].max()
    with pytest.raises(SystemExit) as stopped:
        train_sdxl("lora_sdxl", *flags, "--quantize_base=int8", resume, out="resumed")
    assert stopped.value.code == 2
    assert "--quantize_base: " in (line := last_error(capsys)) and "nf4, now it is int8" in line


@pytest.mark.once
@BOTH
def test_codes_and_scales_are_counted_to_the_byte_with_and_without_weights(build_sdxl_module, kind, monkeypatch):
    module = build_sdxl_module("lora_sdxl", f"--quantize_base={kind}", "--trainable_modules=conv_in")
    before = allocated()
    choose_trainable(module, "conv_in")
    weights = sum(p.size for name, p in module.unet.named_parameters() if p.stop_gradient and name.endswith("weight"))
    quantize_models(module)
    freed = before - allocated()
    memory = inventory_of(module, ROW, module.args).memory(options_of(module.args))
    frozen = [tensor for tensor in module.unet.parameters() if tensor.stop_gradient] + module.unet.buffers()
    assert memory["frozen weights"] == sum(tensor.numpy().nbytes for tensor in frozen)
    size = quantized_size(module.unet)
    codes = sum(tensor.numpy().nbytes for layer in quantized_layers(module.unet) for tensor in layer.buffers())
    assert 0.9 * weights < size <= weights and freed == pytest.approx(4 * size - codes, rel=0.01)
    assert codes < {"int8": 1.1, "nf4": 0.8}[kind] * size  # tiny layers round up to whole blocks
    empty = build_sdxl_module("lora_sdxl", f"--quantize_base={kind}", "--trainable_modules=conv_in")
    choose_trainable(empty, "conv_in")
    monkeypatch.delattr(KINDS[kind], "pack")  # a dry run computes no codes
    quantize_models(empty, has_values=False)
    shapes = [[(name, tensor.shape, tensor.dtype) for name, tensor in m.unet.named_buffers()] for m in (module, empty)]
    assert shapes[0] == shapes[1]


@pytest.mark.once
@pytest.mark.parametrize("job, more", [("sdxl", []), ("lora_sdxl", ["--to_static"])])
def test_jobs_without_lora_and_traced_ones_are_refused_in_one_line(train_sdxl, capsys, job, more):
    with pytest.raises(SystemExit) as stopped:
        train_sdxl(job, "--quantize_base=nf4", *more)
    assert stopped.value.code == 2 and "--quantize_base" in last_error(capsys)
