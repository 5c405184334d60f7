"""Patches that make Paddle faster on CPUs with the same results up to rounding. On GPUs nothing is patched.

    PPDIFFUSERS_TRAIN_CPU_LEVERS=conv_bias,linear_bias    apply these two; without the variable, the default ones
    PPDIFFUSERS_TRAIN_CPU_LEVERS=none                     apply none

docs/performance.md has the gain of each.
"""

import contextlib
import os
from pathlib import Path

import paddle
from paddle import matmul, nn  # imported by name, because `flops` must not count the products in here
from paddle.autograd import PyLayer
from paddle.nn import functional

from ppdiffusers_train.cpu import onednn
from ppdiffusers_train.cpu.environment import configured_threads, cpu_vendor
from ppdiffusers_train.cpu.free_memory import return_free_memory
from ppdiffusers_train.cpu.subnormals import flush_subnormals
from ppdiffusers_train.errors import UserError, scratch_folder, writing

VARIABLE = "PPDIFFUSERS_TRAIN_CPU_LEVERS"
PATCHES = (
    "no_subnormals", "no_views", "no_same_casts", "onednn_convolutions", "conv_bias", "linear_bias", "image_padding",
    "compiled_encoders",
)  # fmt: skip
# Compiling the encoders takes as long as encoding some dozens of samples. The rule depends on the data alone, so that a
# resumed run, or one with another number of GPUs, encodes in the same way.
COMPILE_FROM_ROWS = 1000


def enabled_patches() -> tuple:
    """The names of the patches to apply: none on a GPU, else those of the environment variable.

    Raises:
        UserError: the variable names an unknown patch.
    """
    if not paddle.get_device().startswith("cpu"):
        return ()
    useless = {"compiled_encoders"} if cpu_vendor() == "AuthenticAMD" else ()  # not faster there
    default = [name for name in PATCHES if name not in useless]
    names = [name.strip() for name in os.environ.get(VARIABLE, ",".join(default)).split(",")]
    unknown = set(names) - {*PATCHES, "none", ""}
    if unknown:
        raise UserError(f"{VARIABLE}: there is no {min(unknown)!r}; expected some of {', '.join(PATCHES)}, or none")
    return tuple(name for name in PATCHES if name in names)


def apply_patches() -> None:
    """Replace functions of Paddle by the enabled patches. Further calls change nothing."""
    on = enabled_patches()
    flush_subnormals("no_subnormals" in on)
    for which, owner, name, replacement_for in replacements():
        original = getattr(owner, name)
        if set(which) & set(on) and not hasattr(original, "replaced"):
            replacement = replacement_for(original, on)
            replacement.replaced = original
            setattr(owner, name, replacement)


def remove_patches() -> None:
    """Restore Paddle's own functions."""
    flush_subnormals(False)
    for _, owner, name, _ in replacements():
        function = getattr(owner, name)
        setattr(owner, name, getattr(function, "replaced", function))


@contextlib.contextmanager
def patched_paddle():
    """A context in which the patches are applied; they are removed at the end, after an error, too."""
    apply_patches()
    try:
        yield
    finally:
        remove_patches()


@contextlib.contextmanager
def no_views():
    """A context in which, if the patch is enabled, a transposed tensor is a contiguous copy and not a view.

    Attention transposes tensors, and where a product needs them contiguous, Paddle's generic kernel copies a view
    element by element: 7 ms for what its transpose kernel does in 0.35 ms. Not for a whole run: without views, Paddle
    has no kernel for `Tensor.view` to another dtype, with which safetensors reads files. Inside, Paddle 3 refuses a
    view from outside; Paddle 2.6 would read it as contiguous, and gains nothing anyway.
    """
    flag = "FLAGS_use_stride_kernel"
    if "no_views" not in enabled_patches() or not paddle.framework.use_pir_api() or not paddle.get_flags(flag)[flag]:
        yield
        return
    paddle.set_flags({flag: False})
    try:
        yield
    finally:
        paddle.set_flags({flag: True})


def replacements() -> tuple:
    """(the patches that need it, the owner of a function of Paddle, its name, a function that builds the
    replacement)."""
    of_convolution = ("onednn_convolutions", "conv_bias")
    return (
        (of_convolution, functional.conv, "_conv_nd", replacement_for_conv_nd),  # of nn.Conv2D
        (of_convolution, functional, "conv2d", replacement_for_conv2d),  # of ppdiffusers' residual blocks
        (("linear_bias",), functional, "linear", replacement_for_linear),
        (("image_padding",), functional, "pad", replacement_for_pad),
        (("no_same_casts",), paddle.Tensor, "cast", replacement_for_cast),
    )


def convolution(on, original, x, weight, bias, stride, *options):
    """One of Paddle's functions for 2-D convolutions, with the patches of `on`.

    Paddle adds the bias as [1, C, 1, 1], for which its CPU kernels, of the sum and of the bias' gradient, compute the
    index of each element; with fewer dimensions they process whole planes. The bits are the same.
    """
    by_onednn = "onednn_convolutions" in on and paddle.framework.use_pir_api() and onednn.pays(x, weight, stride)
    if by_onednn:
        y = onednn.Convolution.apply(x, weight, original, stride, *options)
    elif bias is None or "conv_bias" not in on:
        return original(x, weight, bias, stride, *options)
    else:
        y = original(x, weight, None, stride, *options)
    return y if bias is None else y + bias.reshape([-1, 1, 1])


def replacement_for_conv_nd(original, on):
    """Paddle's function behind its convolution layers, through `convolution`."""

    def conv_nd(
        x, weight, bias=None, stride=1, padding=0, padding_algorithm=None, dilation=1, groups=1, data_format="NCHW",
        channel_dim=1, op_type="conv2d", use_cudnn=True, *arguments,
    ):  # fmt: skip
        rest = (stride, padding, padding_algorithm, dilation, groups, data_format, channel_dim, op_type, use_cudnn)
        if op_type != "conv2d" or data_format != "NCHW" or not paddle.in_dynamic_mode():
            return original(x, weight, bias, *rest, *arguments)
        return convolution(on, original, x, weight, bias, *rest, *arguments)

    return conv_nd


def replacement_for_conv2d(original, on):
    """Paddle's function for convolutions without a layer, through `convolution`."""

    def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, data_format="NCHW", name=None):
        rest = (stride, padding, dilation, groups, data_format, name)
        if data_format != "NCHW" or not paddle.in_dynamic_mode():
            return original(x, weight, bias, *rest)
        return convolution(on, original, x, weight, bias, *rest)

    return conv2d


class AddBias(PyLayer):
    """[…, N] + [N]; the gradient of the bias is the product of ones [1, M] with the gradient [M, N].

    Paddle sums over the first axes, which its kernel does element by element with one thread. The order of the sum
    differs, so the result is the same up to rounding.
    """

    @staticmethod
    def forward(ctx, x, bias):
        ctx.frozen = x.stop_gradient
        return x + bias

    @staticmethod
    def backward(ctx, gradient):
        rows = gradient.reshape([-1, gradient.shape[-1]])
        ones = paddle.ones([1, rows.shape[0]], dtype=rows.dtype)
        return None if ctx.frozen else gradient, matmul(ones, rows).reshape([-1])


def replacement_for_linear(original, _):
    """A linear layer that adds its bias with `AddBias` if the bias needs a gradient."""

    def linear(x, weight, bias=None, name=None):
        is_trained = bias is not None and not bias.stop_gradient and paddle.is_grad_enabled()
        if not is_trained or not paddle.in_dynamic_mode():
            return original(x, weight, bias, name)
        return AddBias.apply(original(x, weight, None), bias)

    return linear


def replacement_for_pad(original, _):
    """Padding of images by Paddle's kernel for any axes; that for images takes 40 times as long. The same bits."""

    def padded(x, pad, mode="constant", value=0.0, data_format="NCHW", *arguments, **options):
        if mode == "constant" and data_format == "NCHW" and isinstance(pad, (list, tuple)) and x.ndim == len(pad) == 4:
            pad = [0, 0, 0, 0, *pad[2:], *pad[:2]]  # (before, after) of each axis, from the first axis to the last
        return original(x, pad, mode, value, data_format, *arguments, **options)

    return padded


def replacement_for_cast(original, _):
    """`Tensor.cast` that returns the tensor itself if it has the dtype, as torch's `to` does; Paddle makes a copy.

    ppdiffusers' layers, above all those of LoRA, cast where those of diffusers call `to`.
    """

    def cast(self, dtype):
        same = dtype_name(self) == str(dtype).removeprefix("paddle.")
        # Under `no_grad`, the copy also has no gradient, so it is needed.
        return self if same and (self.stop_gradient or paddle.is_grad_enabled()) else original(self, dtype)

    return cast


def can_compile(module) -> bool:
    """Whether `module.encode` may be compiled: its job allows it, and all samples have the same shape.

    This needs PIR, Paddle's newer graph: the engine of 2.6 fails on CLIP ("could not create a primitive descriptor").
    """
    return (
        "compiled_encoders" in enabled_patches()
        and paddle.framework.use_pir_api()
        and module.can_compile_encode
        and module.encode_batch_size == 1
        and not module.buckets
    )


class CompiledEncode:
    """Replaces `module.encode`: the encoders' graph, run by Paddle's inference engine with oneDNN's kernels.

    oneDNN's convolutions and products are faster than those of Paddle's dynamic graph, and the engine fuses operations
    that follow them. The result is the same up to rounding, 3e-6 of the largest value. The graph is compiled at the
    first batch, whose shapes all others must have. The engine has its own weights, so the module's encoders are freed.
    """

    def __init__(self, module):
        self.module, self.predictor, self.names = module, None, []

    def __call__(self, batch: dict) -> dict:
        if self.predictor is None:
            self.compile(batch)
        for name in self.predictor.get_input_names():
            self.predictor.get_input_handle(name).copy_from_cpu(batch[name].numpy())
        self.predictor.run()
        outputs = map(self.predictor.get_output_handle, self.predictor.get_output_names())
        return {name: paddle.to_tensor(output.copy_to_cpu()) for name, output in zip(self.names, outputs, strict=True)}

    def compile(self, batch: dict) -> None:
        """Trace `encode` for the shapes of a batch, and load the graph into the engine."""
        spec = {name: paddle.static.InputSpec(x.shape, dtype_name(x), name) for name, x in batch.items()}
        graph = EncodeGraph(self.module)
        remove_patches()  # the patches are for the dynamic graph
        with scratch_folder("compiled encoders") as folder, paddle.no_grad():
            file = folder / "encode"
            with writing("TMPDIR: compiled encoders", folder):
                require_room(file, sum(tensor.size * tensor.element_size() for tensor in graph.state_dict().values()))
                paddle.jit.save(paddle.jit.to_static(graph, input_spec=[spec], full_graph=True), str(file))
            self.names = graph.output_names
            for name in self.module.encoders:
                setattr(self.module, name, None)
            del graph
            return_free_memory()  # the engine loads its own copy
            self.predictor = create_predictor(file)
        apply_patches()


class EncodeGraph(nn.Layer):
    """`module.encode` as a layer that has only the encoders' parameters, from named tensors to a list."""

    def __init__(self, module):
        super().__init__()
        self.encoders = nn.LayerList([getattr(module, name) for name in module.encoders])
        self.encode, self.output_names = type(module).encode.__get__(module), None
        self.eval()

    def forward(self, batch):
        encoded = self.encode(batch)
        self.output_names = list(encoded)
        return [paddle.assign(encoded[name]) for name in encoded]  # Paddle would drop an output that is also an input


def require_room(file: Path, size: int) -> None:
    """Raise an `OSError` if so many bytes have no room: `paddle.jit.save` (3.3.1) silently writes a part."""
    with open(file, "wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, size + 2**24)
    file.unlink()


def create_predictor(file: Path):
    """Paddle's inference engine for the graph that `paddle.jit.save` wrote; `file` has no suffix."""
    config = paddle.inference.Config(str(file.with_suffix(".json")), str(file.with_suffix(".pdiparams")))
    config.disable_gpu()
    config.disable_glog_info()
    config.enable_mkldnn()
    config.set_cpu_math_library_num_threads(configured_threads())
    return paddle.inference.create_predictor(config)


def dtype_name(tensor) -> str:
    """`paddle.float32` -> "float32", in any Paddle."""
    return str(tensor.dtype).removeprefix("paddle.")
