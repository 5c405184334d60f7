"""The patches leave the results as they are, and can be disabled. benchmarks/speed.py measures their gain."""

import ppdiffusers_train  # noqa: F401

import contextlib
import platform
import sys

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.distributed.fleet.utils import recompute
from paddle.nn import functional

from ppdiffusers_train.cpu import patches
from ppdiffusers_train.cpu.onednn import PROGRAMS
from ppdiffusers_train.cpu.patches import (
    PATCHES,
    VARIABLE,
    CompiledEncode,
    apply_patches,
    can_compile,
    enabled_patches,
    no_views,
    patched_paddle,
    remove_patches,
)
from ppdiffusers_train.data.encoders_key import encoders_folder
from ppdiffusers_train.errors import UserError, WriteError
from ppdiffusers_train.module import encode_batch
from tests.conftest import encode, no_file_above, weights

needs_pir = pytest.mark.skipif(not paddle.framework.use_pir_api(), reason="this Paddle's engine fails on the encoders")
EPSILON = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def unpatched(monkeypatch):
    """No patch before or after the test; all are enabled in it, on every CPU."""
    monkeypatch.setenv(VARIABLE, ",".join(PATCHES))
    remove_patches()
    yield
    remove_patches()


def results(model, x):
    """The output, and the gradients of its square for the input and for the trainable parameters."""
    x = paddle.to_tensor(x)
    x.stop_gradient = False
    y = model(x)
    (y * y).sum().backward()
    trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    found = [y.numpy(), x.grad.numpy(), *(parameter.grad.numpy() for parameter in trained)]
    model.clear_gradients()
    return found


def with_and_without(patch, model, x, monkeypatch):
    plain = results(model, x)
    monkeypatch.setenv(VARIABLE, patch)
    apply_patches()
    return plain, results(model, x)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2}, {"bias_attr": False}], ids=str)
def test_the_bias_of_a_convolution_gives_the_same_bits(options, monkeypatch):
    paddle.seed(0)
    model = nn.Conv2D(4, 6, 3, **options)
    if model.bias is not None:
        model.bias.set_value(normal(6))
    plain, patched = with_and_without("conv_bias", model, normal(2, 4, 9, 9), monkeypatch)
    assert functional.conv._conv_nd.replaced and len(plain) == (3 if model.bias is None else 4)
    assert all(np.array_equal(one, other) for one, other in zip(plain, patched, strict=True))


@pytest.mark.parametrize("padding", [1, "SAME"])
def test_so_does_that_of_a_convolution_without_a_layer(padding, monkeypatch):
    class Convolution(nn.Conv2D):
        def forward(self, x):
            return functional.conv2d(x, self.weight, self.bias, 1, padding)

    paddle.seed(0)
    model = Convolution(4, 6, 3)
    model.bias.set_value(normal(6))
    plain, patched = with_and_without("conv_bias", model, normal(2, 4, 9, 9), monkeypatch)
    assert functional.conv2d.replaced
    assert all(np.array_equal(one, other) for one, other in zip(plain, patched, strict=True))


def operations_of_onednn(program) -> list:
    names = [operation.name() for operation in program.program.forward_program.global_block().ops]
    return [name.removeprefix("onednn_op.") for name in names if "conv2d" in name]


@needs_pir
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": 1, "stride": 2}, {"padding": 2, "dilation": 2}, {"groups": 2}], ids=str
)
@pytest.mark.parametrize("is_trained", [True, False])
def test_convolutions_of_onednn_are_the_same_up_to_rounding(options, is_trained, monkeypatch):
    paddle.seed(0)
    model, x = nn.Conv2D(64, 96, 3, **options), normal(4, 64, 34, 34)
    model.weight.stop_gradient = not is_trained
    PROGRAMS.clear()
    plain, patched = with_and_without("onednn_convolutions", model, x, monkeypatch)
    assert [operations_of_onednn(program) for program in PROGRAMS.values()] == [["conv2d"], ["conv2d_grad"]]
    with paddle.no_grad():  # the same program
        y = model(paddle.to_tensor(x))
    assert len(PROGRAMS) == 2 and np.array_equal(y.numpy(), patched[0])
    assert len(plain) == 3 + is_trained
    for one, other in zip(plain, patched, strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


@needs_pir
def test_convolutions_of_one_shape_share_programs_and_follow_their_weights(monkeypatch):
    """As a teacher's, which has no gradients, and its student's. Tensors without gradients stay without."""
    PROGRAMS.clear()
    model, x = nn.Sequential(*[nn.Conv2D(64, 64, 3, padding=1) for _ in range(3)]), normal(4, 64, 32, 32)
    before = results(model, x)
    changed = [parameter.numpy() * 0.5 + 0.01 for parameter in model.parameters()]
    originals = [parameter.numpy() for parameter in model.parameters()]
    set_values(model, changed)
    after = results(model, x)
    monkeypatch.setenv(VARIABLE, "onednn_convolutions")
    apply_patches()
    with paddle.no_grad():
        assert model(paddle.to_tensor(x, stop_gradient=False)).stop_gradient
    for values, plain in ((originals, before), (changed, after)):
        set_values(model, values)
        for one, other in zip(plain, results(model, x), strict=True):
            assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()
    # A forward and a backward one, and never two runs of one at a time: the buffers are there once.
    assert [len(scopes) for program in PROGRAMS.values() for scopes in program._scope_cache.values()] == [1, 1]
    model(paddle.to_tensor(x)).sum().backward()  # the first layer need not find out the gradient of what goes in
    gradient = model[0].weight.grad.numpy()
    remove_patches()
    model.clear_gradients()
    model(paddle.to_tensor(x)).sum().backward()
    plain = model[0].weight.grad.numpy()
    assert len(PROGRAMS) == 3 and np.abs(gradient - plain).max() <= 1e-5 * np.abs(plain).max()
    for parameter in model.parameters():
        parameter.stop_gradient = True
    apply_patches()
    assert model(paddle.to_tensor(x)).stop_gradient


@needs_pir
@pytest.mark.parametrize("is_trained", [True, False])
def test_convolutions_can_be_recomputed(is_trained, monkeypatch):
    class Recomputed(nn.Sequential):
        def forward(self, x):
            return recompute(super().forward, x, use_reentrant=False)  # as ppdiffusers' blocks do

    paddle.seed(0)
    model, x = Recomputed(nn.Conv2D(64, 64, 3, padding=1), nn.Silu(), nn.Conv2D(64, 96, 3)), normal(4, 64, 32, 32)
    for parameter in model.parameters():
        parameter.stop_gradient = not is_trained
    plain, patched = with_and_without("onednn_convolutions", model, x, monkeypatch)
    assert len(plain) == (6 if is_trained else 2)
    for one, other in zip(plain, patched, strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


def set_values(model, values):
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.set_value(value)


@needs_pir
def test_small_and_single_convolutions_and_views_are_left_to_paddle(monkeypatch):
    PROGRAMS.clear()
    for model, shape in ((nn.Conv2D(32, 48, 3), (2, 32, 8, 8)), (nn.Conv2D(128, 128, 1), (2, 128, 64, 64))):
        plain, patched = with_and_without("onednn_convolutions", model, normal(*shape), monkeypatch)
        assert all(np.array_equal(one, other) for one, other in zip(plain, patched, strict=True))
    nn.Conv2D(32, 48, 3)(paddle.to_tensor(normal(2, 34, 34, 32)).transpose([0, 3, 1, 2]))
    assert not PROGRAMS


def test_convolutions_of_other_layouts_are_left_to_paddle(monkeypatch):
    model = nn.Conv1D(4, 6, 3)
    plain, patched = with_and_without("conv_bias", model, normal(2, 4, 9), monkeypatch)
    assert all(np.array_equal(one, other) for one, other in zip(plain, patched, strict=True))


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (2, 1, 3, 8)], ids=str)
def test_the_bias_of_a_linear_layer_is_the_same_up_to_rounding_of_its_gradient(shape, monkeypatch):
    paddle.seed(0)
    model = nn.Linear(8, 6)
    model.bias.set_value(normal(6))
    plain, patched = with_and_without("linear_bias", model, normal(*shape), monkeypatch)
    assert functional.linear.replaced
    *same, bias = zip(plain, patched, strict=True)
    assert all(np.allclose(one, other, rtol=4 * EPSILON, atol=4 * EPSILON) for one, other in same)
    terms = int(np.prod(shape[:-1]))
    assert np.abs(bias[0] - bias[1]).max() <= 2 * terms * EPSILON * np.abs(bias[0]).max()


def test_a_linear_layer_whose_bias_is_frozen_is_left_to_paddle(monkeypatch):
    model = nn.Linear(8, 6)
    model.bias.stop_gradient = True
    plain, patched = with_and_without("linear_bias", model, normal(5, 8), monkeypatch)
    assert len(plain) == 3 and all(np.array_equal(one, other) for one, other in zip(plain, patched, strict=True))


@pytest.mark.parametrize("pad", [(0, 1, 0, 1), [1, 2, 3, 4]], ids=str)
def test_what_is_put_around_images_is_the_same_bits(pad, monkeypatch):
    class Padding(nn.Layer):
        def forward(self, x):
            return functional.pad(x, pad, mode="constant", value=0.5)

    seen, kernel = [], functional.pad

    def pad_and_see(x, pad, *arguments, **options):
        seen.append(len(pad))
        return kernel(x, pad, *arguments, **options)

    monkeypatch.setattr(functional, "pad", pad_and_see)
    plain, patched = with_and_without("image_padding", Padding(), normal(2, 3, 5, 6), monkeypatch)
    assert plain[0].shape == (2, 3, 5 + sum(pad[2:]), 6 + sum(pad[:2]))
    assert all(np.array_equal(one, other) for one, other in zip(plain, patched, strict=True))
    remove_patches()
    assert seen == [4, 8]  # as they are, and for all axes


def test_other_padding_is_left_to_paddle(monkeypatch):
    x = paddle.to_tensor(normal(2, 3, 4, 4))

    def padded():
        flat, mask = x.reshape([2, 3, 16]), x[:, 0, 0]
        yield functional.pad(flat, (0, 2), value=1.0, data_format="NCL")
        yield functional.pad(x, [1, 1, 2, 2], mode="reflect")
        yield functional.pad(x, [1, 0, 0, 1], data_format="NHWC")
        yield functional.pad(x, [0, 0, 1, 1, 0, 1, 1, 0])
        yield functional.pad(mask, [0, 0, 0, 2])

    plain = [found.numpy() for found in padded()]
    monkeypatch.setenv(VARIABLE, "image_padding")
    apply_patches()
    assert all(np.array_equal(one, other.numpy()) for one, other in zip(plain, padded(), strict=True))


def test_a_cast_to_the_type_that_is_there_copies_nothing(monkeypatch):
    x = paddle.to_tensor(normal(2, 3), stop_gradient=False)
    assert x.cast("float32") is not x
    monkeypatch.setenv(VARIABLE, "no_same_casts")
    apply_patches()
    assert x.cast("float32") is x and x.cast(paddle.float32) is x
    double = x.cast("float64")
    assert double.dtype == paddle.float64 and np.array_equal(double.numpy(), x.numpy().astype("float64"))
    (x.cast("float32") * double.cast(paddle.float32)).sum().backward()
    assert np.array_equal(x.grad.numpy(), 2 * x.numpy())
    with paddle.no_grad():
        assert x.cast("float32").stop_gradient and not x.stop_gradient
        assert x.detach().cast("float32").stop_gradient


def attention(x):
    """What is transposed in a model: [B, L, C], for products by heads and back."""
    query, key, value = ((x * k).reshape([*x.shape[:2], 3, -1]).transpose([0, 2, 1, 3]) for k in (1, 2, 3))
    weights = functional.softmax(paddle.matmul(query, key, transpose_y=True))
    return paddle.matmul(weights, value).transpose([0, 2, 1, 3]).reshape(x.shape), query


def test_attention_gives_the_same_bits_without_views():
    found = {}
    for name, context in (("views", contextlib.nullcontext()), ("none", no_views())):
        x = paddle.to_tensor(normal(2, 7, 12), stop_gradient=False)
        with context:
            y, query = attention(x)
            (y * y).sum().backward()
        assert query.is_contiguous() == (name == "none" and paddle.framework.use_pir_api())
        found[name] = y.numpy(), x.grad.numpy()
    assert all(np.array_equal(one, other) for one, other in zip(*found.values(), strict=True))
    assert not attention(x)[1].is_contiguous()


@needs_pir
def test_a_run_computes_its_batches_without_views_and_the_rest_with_them(train, kandinsky_jobs, monkeypatch):
    job, seen = kandinsky_jobs["prior"].KandinskyPriorTrainingModule, {}

    def look_in(name):
        original = getattr(job, name)

        def looking(self, *arguments):
            seen[name] = attention(paddle.ones([2, 7, 12]))[1].is_contiguous()
            return original(self, *arguments)

        monkeypatch.setattr(job, name, looking)

    look_in("forward")
    look_in("after_step")
    train("prior", "--max_train_steps=1")
    assert seen == {"forward": True, "after_step": False}


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="it sets a register of x86-64")
def test_numbers_too_small_for_full_precision_are_zero_while_patches_are_applied():
    tiny = float(np.float32(1e-38))

    def products():
        alone = paddle.to_tensor(tiny) * 0.5
        many = paddle.matmul(paddle.full([300, 300], tiny), paddle.eye(300) * 0.5)  # in several threads
        return alone.item(), many.numpy().max().item(), np.count_nonzero(many.numpy())

    assert products() == (pytest.approx(tiny / 2), pytest.approx(tiny / 2), 300 * 300)
    with patched_paddle():
        assert products() == (0, 0, 0)
    assert products()[0] == pytest.approx(tiny / 2)


@pytest.mark.parametrize(
    "vendor, usual",
    [("GenuineIntel", PATCHES), ("AuthenticAMD", tuple(n for n in PATCHES if n != "compiled_encoders"))],
)
def test_all_patches_are_enabled_by_default_but_those_without_gain_on_a_cpu(vendor, usual, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(patches, "cpu_vendor", lambda: vendor)
    assert enabled_patches() == usual


def test_the_environment_names_the_patches_to_apply(monkeypatch):
    monkeypatch.setenv(VARIABLE, "linear_bias, conv_bias")
    assert enabled_patches() == ("conv_bias", "linear_bias")
    monkeypatch.setenv(VARIABLE, "none")
    assert enabled_patches() == ()
    apply_patches()
    assert not hasattr(functional.linear, "replaced") and not hasattr(functional.conv._conv_nd, "replaced")
    monkeypatch.setenv(VARIABLE, "conv_bais")
    with pytest.raises(UserError, match="conv_bais"):
        enabled_patches()


def test_patches_are_applied_once_and_removed():
    originals = functional.linear, functional.conv._conv_nd
    apply_patches()
    applied = functional.linear, functional.conv._conv_nd
    apply_patches()
    assert (functional.linear, functional.conv._conv_nd) == applied != originals
    remove_patches()
    assert (functional.linear, functional.conv._conv_nd) == originals


@needs_pir
@pytest.mark.engine
@pytest.mark.parametrize("job", ["decoder", "prior"])
def test_compiled_encoders_give_the_same_up_to_rounding(build, job):
    assert_compiled_encodes_alike(build(job))


@needs_pir
@pytest.mark.engine
def test_those_of_sdxl_too(build_sdxl_module):
    assert_compiled_encodes_alike(build_sdxl_module("sdxl"))


@needs_pir
@pytest.mark.engine
def test_a_full_disk_of_temporary_files_is_told(build):
    """`paddle.jit.save` would write a part of the weights, and the engine compute with what is not there."""
    from ppdiffusers_train.data.dataset import build_dataset

    module = build("prior")
    module.encode = CompiledEncode(module)
    with (
        no_file_above(100_000),
        pytest.raises(WriteError, match="TMPDIR: compiled encoders cannot be .*: File too large"),
    ):
        encode(module, build_dataset(module.args), [0])
    apply_patches()


def assert_compiled_encodes_alike(module):
    from ppdiffusers_train.data.dataset import build_dataset

    rows = build_dataset(module.args)
    plain = encode(module, rows, [0, 1, 2])
    assert can_compile(module)
    module.encode = CompiledEncode(module)
    compiled = encode(module, rows, [0, 1, 2])
    assert all(getattr(module, name) is None for name in module.encoders), "the engine has them"
    assert list(compiled) == list(plain)
    for name, tensor in plain.items():
        ours, theirs = compiled[name].numpy(), tensor.numpy()
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= 5e-6 * np.abs(theirs).max(), name


@needs_pir
def test_a_cache_goes_on_the_way_it_was_begun(build, tmp_path, monkeypatch):
    module = build("decoder")
    few, many = patches.COMPILE_FROM_ROWS - 1, patches.COMPILE_FROM_ROWS
    plain, is_compiled = encoders_folder(tmp_path, "digest", module, few)
    assert not is_compiled
    compiled, is_compiled = encoders_folder(tmp_path, "digest", module, many)
    assert is_compiled and compiled != plain
    compiled.mkdir()
    assert encoders_folder(tmp_path, "digest", module, few) == (compiled, True)
    plain.mkdir()
    assert encoders_folder(tmp_path, "digest", module, many) == (plain, False)
    monkeypatch.setenv(VARIABLE, "none")
    assert encoders_folder(tmp_path / "other", "digest", module, many)[1] is False


def test_samples_of_several_shapes_or_together_are_not_compiled(build_sdxl_module, build):
    assert not can_compile(build_sdxl_module("sdxl", "--aspect_ratio_buckets"))
    module = build("decoder")
    module.encode_batch_size = 2
    assert not can_compile(module)


@needs_pir
@pytest.mark.engine
def test_runs_on_much_data_compile_online_and_for_the_cache_alike(train_decoder, tmp_path, monkeypatch):
    from ppdiffusers_train import training

    from ppdiffusers_train.data import encoders_key

    plain = weights(train_decoder(out="plain"))
    for module in (training, encoders_key):
        monkeypatch.setattr(module, "COMPILE_FROM_ROWS", 7)
    online = weights(train_decoder(out="online"))
    cached = weights(train_decoder(f"--encoded_cache_dir={tmp_path / 'cache'}", out="cached"))
    assert [path.name[-9:] for path in (tmp_path / "cache").iterdir()] == ["-compiled"]
    assert all(np.array_equal(online[name], cached[name]) for name in online)
    assert any(not np.array_equal(online[name], plain[name]) for name in online), "they were compiled"


def test_encode_batch_takes_the_compiled_one(build):
    module = build("decoder")
    seen = []
    module.encode = lambda batch: seen.append(batch) or {"x": batch["x"]}
    encode_batch(module, {"x": paddle.zeros([2, 1])})
    assert len(seen) == 2
