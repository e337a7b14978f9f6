"""Pretend that this machine has an accelerator: a backend of torch's whose tensors say `pretended:0`.

What is computed on it is computed on the CPU. Operations that mix devices are refused as CUDA refuses them,
memory is counted and can be limited, and whatever makes the host wait is counted too. A dry device computes
shapes alone for large tensors, so that a model of any size runs; its numbers mean nothing.
"""

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim.optimizer import _foreach_supported_types as of_optimizers
from torch.utils import backend_registration
from torch.utils._foreach_utils import _foreach_supported_types as of_utilities
from torch.utils._pytree import tree_flatten, tree_map_only

from mdl_toolkit.model.kernels.norms import FUSED_ON
from mdl_toolkit.model.mel import window_and_filters

NAME = "pretended"
DEVICE_TYPE = torch._C._autograd.DeviceType.PrivateUse1
ROUNDING = 512  # bytes, as CUDA's allocator
# Numbers of a float tensor that a dry device still computes.
SMALL = 4096
ATEN = torch.ops.aten
META, CPU = torch.device("meta"), torch.device("cpu")

# The host has to wait for what these return. With a Boolean index, `index` and `index_put_` do too.
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2",
    "aten::unique_consecutive", "aten::equal", "aten::is_nonzero", "aten::repeat_interleave",
    "aten::bincount",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
PRODUCTS = {
    "aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2),
    "aten::baddbmm": (1, 2),
}  # fmt: skip
# With the position of queries among their arguments, and operations for each query, channel and key.
ATTENTIONS = {
    "aten::_scaled_dot_product_fused_attention_overrideable": (0, 4),
    "aten::_scaled_dot_product_fused_attention_overrideable_backward": (1, 10),
}
# These move nothing, and those only what they return.
ALLOCATING = {"aten::new_empty", "aten::empty", "aten::empty_like", "aten::_unsafe_view", "aten::detach"}
SELECTING = {"aten::index_select", "aten::embedding", "aten::index", "aten::new_zeros"}
# CUDA's autocast computes these in the lower precision, and those in float32.
LOWER = (
    "linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "conv1d", "conv2d",
    "scaled_dot_product_attention",
)  # fmt: skip
HIGHER = (
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "exp",
    "log",
    "log10",
    "pow.Tensor_Scalar",
    "rsqrt",
    "logsumexp",
    "softmax.int",
    "log_softmax.int",
)


@dataclass
class Device:
    """What the pretended device is and has seen.

    Attributes:
        total: bytes of its memory.
        is_dry: whether it computes shapes alone.
        has_bfloat16: natively.
        has_float64: as some of Intel's GPUs have not.
        used: bytes that tensors take.
        peak: the most of these.
        operations: by name, views left out.
        waits: what the host had to wait for, by name.
        copied: bytes from the device to the host.
        products: multiplications and additions of matrix products, by dtype.
        work: floating-point operations in products, and bytes read and written, of each operation.
    """

    total: int = 24 * 10**9
    is_dry: bool = False
    has_bfloat16: bool = True
    has_float64: bool = True
    is_there: bool = False
    used: int = 0
    peak: int = 0
    copied: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    products: Counter[torch.dtype] = field(default_factory=Counter)
    work: list[tuple[int, int]] = field(default_factory=list)

    def forget(self) -> None:
        """Count anew; what tensors take stays."""
        self.peak, self.copied = self.used, 0
        for each in (self.operations, self.waits, self.products, self.work):
            each.clear()

    def least_seconds(self, peak: float, bandwidth: float) -> float:
        """Return the roofline of what was computed: operation by operation, products or memory."""
        return sum(max(operations / peak, moved / bandwidth) for operations, moved in self.work)


device = Device()
_storages: dict[int, Any] = {}
_lock = threading.RLock()


@contextmanager
def pretending(**settings: Any) -> Iterator[Device]:
    """Let torch find the device in the context; yields what is known of it."""
    _register()
    # What a dry device made has no numbers.
    window_and_filters.cache_clear()
    # Models have cycles of references: nothing that an earlier test left is to count.
    gc.collect()
    for name, value in vars(Device(**settings)).items():
        if name not in ("used", "is_there"):
            setattr(device, name, value)
    device.is_there = True
    device.forget()
    try:
        # The threads of autograd's engine are made at the first backward pass, for the devices known by then.
        with torch.autograd.set_multithreading_enabled(False):
            yield device
    finally:
        device.is_there = False


# --- memory ----------------------------------------------------------------------------------------------


def _take(inner: torch.Tensor) -> None:
    """Count a tensor's memory until it is freed.

    Raises:
        torch.OutOfMemoryError: the device does not have it.
    """
    storage = inner.untyped_storage()
    key = storage._cdata
    with _lock:
        if key in _storages:
            return
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        if device.used + size > device.total:
            free = device.total - device.used
            raise torch.OutOfMemoryError(f"pretended memory: {size} bytes wanted, {free} are free")
        device.used += size
        device.peak = max(device.peak, device.used)
        _storages[key] = weakref.finalize(storage, _give_back, key, size)


def _give_back(key: int, size: int) -> None:
    with _lock:
        device.used -= size
        del _storages[key]


# --- tensors ---------------------------------------------------------------------------------------------


class PretendedTensor(torch.Tensor):
    """A tensor on the device; `inner` has its numbers on the CPU, or its shape on the meta device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "PretendedTensor":
        if inner.dtype == torch.float64 and not device.has_float64:
            raise RuntimeError("Required aspect fp64 is not supported on the device")
        made: PretendedTensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=f"{NAME}:0",
        )  # fmt: skip
        made.inner = inner
        return made

    def __init__(self, inner: torch.Tensor) -> None:
        _take(inner)

    def __repr__(self) -> str:
        return f"PretendedTensor({self.inner})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(function, args, kwargs or {})


def _dispatch(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if function is ATEN.scaled_dot_product_attention.default:
        return _fused_attention(*args, **kwargs)
    # In inference mode these come here whole.
    if function not in REAL and _is_composite(function):
        return function.decompose(*args, **kwargs)
    name = function._schema.name
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    _note(function, name, args, tensors)
    if name == "aten::copy_":
        return _copy(*args, **kwargs)
    if name == "aten::_to_copy" and kwargs.get("device", args[0].device).type == "cpu":
        return _to_host(args[0].inner).to(kwargs.get("dtype") or args[0].dtype, copy=True)
    if name == "aten::_local_scalar_dense":
        return _to_host(args[0].inner).item()
    _refuse_mixing(name, tensors)
    is_meta = any(isinstance(each, PretendedTensor) and each.inner.is_meta for each in tensors)
    where = META if is_meta else CPU

    def unwrap(each: torch.Tensor) -> torch.Tensor:
        each = each.inner if isinstance(each, PretendedTensor) else each
        return (
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=META)
            if is_meta and each.device != META
            else each
        )

    inner_args, inner_kwargs = tree_map_only(torch.Tensor, unwrap, (args, kwargs))
    if "device" in inner_kwargs:
        inner_kwargs["device"] = where
    if is_meta and function in DRY:
        result = DRY[function](*inner_args, **inner_kwargs)
    else:
        result = REAL.get(function, function)(*inner_args, **inner_kwargs)
    if not (function.is_view or name in ALLOCATING):
        outputs = [each for each in tree_flatten(result)[0] if isinstance(each, torch.Tensor)]
        device.work.append(_work_of(name, args, tensors, outputs))
    return _wrap(function, args, kwargs, result)


@cache
def _is_composite(function: Any) -> bool:
    """Tell whether an operation is made of others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")


def _wrap(function: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Any:
    """Give back the arguments that were written to, and new tensors for what is new."""
    if not function._schema.returns:
        return None
    if written := _written(function):
        given = [args[number] if number < len(args) else kwargs[name] for number, name in written]
        return given[0] if len(given) == 1 else tuple(given)
    # In inference mode too, a view is of the kind of what it is a view of.
    is_inference = args[0].is_inference() if function.is_view else torch.is_inference_mode_enabled()
    with (
        torch.inference_mode(is_inference)
        if is_inference != torch.is_inference_mode_enabled()
        else nullcontext()
    ):
        return tree_map_only(torch.Tensor, PretendedTensor, result)


@cache
def _written(function: Any) -> list[tuple[int, str]]:
    """Return the positions and names of the arguments that an operation writes to."""
    return [
        (number, each.name)
        for number, each in enumerate(function._schema.arguments)
        if each.alias_info is not None and each.alias_info.is_write
    ]


def _note(function: Any, name: str, args: Any, tensors: list[torch.Tensor]) -> None:
    """Count an operation."""
    with _lock:
        if not (function.is_view or name == "aten::detach"):
            device.operations[name] += 1
        if name in WAITING:
            device.waits[name] += 1
        if name in INDEXING and any(each is not None and each.dtype == torch.bool for each in args[1]):
            device.waits[f"{name} with a Boolean mask"] += 1
        if name in PRODUCTS:
            left, right = (args[number] for number in PRODUCTS[name])
            if left.dtype != right.dtype:
                raise RuntimeError(
                    f"expected the same dtype, but got {left.dtype} and {right.dtype} ({name})"
                )
            device.products[left.dtype] += left.numel() * right.shape[-1]


def _work_of(name: str, args: Any, inputs: list[Any], outputs: list[Any]) -> tuple[int, int]:
    """Return an operation's floating-point operations, if it is a product, and the bytes that it moves."""
    written = sum(each.nbytes for each in outputs)
    moved = 2 * written if name in SELECTING else written + sum(each.nbytes for each in inputs)
    operations = 0
    if name in PRODUCTS:
        left, right = (args[number] for number in PRODUCTS[name])
        operations = 2 * left.numel() * right.shape[-1]
    elif name in ATTENTIONS:
        first, share = ATTENTIONS[name]
        operations = share * args[first].numel() * args[first + 1].shape[2]
    return operations, moved


def _refuse_mixing(name: str, tensors: list[torch.Tensor]) -> None:
    """Raise what CUDA raises where a tensor of the host, more than a number, is computed with."""
    others = [each for each in tensors if not isinstance(each, PretendedTensor) and each.ndim]
    if others and not (name in INDEXING and isinstance(tensors[0], PretendedTensor)):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {NAME}:0 and {others[0].device} "
            f"({name}, {list(others[0].shape)})"
        )


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copy between devices or on one."""
    if not isinstance(target, PretendedTensor):
        target.copy_(_to_host(source.inner))
        return target
    if not isinstance(source, PretendedTensor):
        with _lock:
            if not non_blocking and source.ndim:
                device.waits["copy from the host"] += 1
        if not target.inner.is_meta:
            target.inner.copy_(source)
        return target
    if not (target.inner.is_meta or source.inner.is_meta):
        target.inner.copy_(source.inner)
    elif not target.inner.is_meta:
        target.inner.fill_(1)
    return target


def _to_host(inner: torch.Tensor) -> torch.Tensor:
    """Return what the host sees of a tensor; of one without numbers, ones."""
    with _lock:
        device.copied += inner.nbytes
        device.waits["copy to the host"] += 1
    return torch.ones(inner.shape, dtype=inner.dtype) if inner.is_meta else inner


def _place(size: Any, dtype: torch.dtype | None) -> torch.device:
    """Choose where a new tensor's numbers are."""
    numbers = torch.Size(size).numel()
    return (
        META
        if device.is_dry and numbers > SMALL and (dtype or torch.get_default_dtype()).is_floating_point
        else CPU
    )


def _empty(
    size: Any,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Any:
    return PretendedTensor(torch.empty(size, dtype=dtype, device=_place(size, dtype)))


def _empty_strided(
    size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Any:
    return PretendedTensor(torch.empty_strided(size, stride, dtype=dtype, device=_place(size, dtype)))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return _copy(target, source, non_blocking)


# --- attention -------------------------------------------------------------------------------------------

# What a fused kernel gives back: out, logsumexp, cumulated lengths of queries and keys, the longest of both,
# and seed, offset and mask of dropout, which is not used here.


def _fused_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Choose the fused kernel, as CUDA does for 16 bits; it takes fewer heads of keys as they are."""
    fused = ATEN._scaled_dot_product_fused_attention_overrideable
    return fused(query, key, value, mask, dropout_p, is_causal, scale=scale)[0]


def _attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    debug: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    assert dropout == 0.0
    if query.is_meta:
        out = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
    else:
        kernel, groups = ATEN._scaled_dot_product_flash_attention_for_cpu, query.shape[1] // key.shape[1]
        wide = (each.repeat_interleave(groups, 1) for each in (key, value))
        mask = (
            bias
            if bias is None or bias.dtype != torch.bool
            else torch.zeros(bias.shape, dtype=query.dtype).masked_fill_(~bias, -torch.inf)
        )
        out, sums = kernel(query, *wide, 0.0, is_causal, attn_mask=mask, scale=scale)
    nothing = torch.zeros((), dtype=torch.int64)
    return out, sums, nothing, nothing, query.shape[2], key.shape[2], nothing, nothing, nothing


def _attention_backward(
    gradient: Any,
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    wants: Any,
    out: Any,
    sums: Any,
    cum_q: Any,
    cum_k: Any,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    seed: Any,
    offset: Any,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    if query.is_meta:
        return *(torch.empty_like(each) for each in (query, key, value)), None
    kernel, groups = ATEN._scaled_dot_product_flash_attention_for_cpu_backward, query.shape[1] // key.shape[1]
    mask = None
    if bias is not None and bias.numel():
        mask = (
            torch.zeros(bias.shape, dtype=query.dtype).masked_fill_(~bias, -torch.inf)
            if bias.dtype == torch.bool
            else bias
        )
    wide = (each.repeat_interleave(groups, 1) for each in (key, value))
    to_q, *others = kernel(gradient, query, *wide, out, sums, 0.0, is_causal, attn_mask=mask, scale=scale)
    return to_q, *(each.unflatten(1, (-1, groups)).sum(2) for each in others), None


# --- norms -----------------------------------------------------------------------------------------------


def _rms_norm(x: Any, shape: Any, weight: Any, eps: float) -> tuple[Any, Any]:
    """Compute what CUDA's kernel does: in float32, rounded once; gives back the scales too."""
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale * weight).to(x.dtype), scale


def _rms_norm_backward(
    gradient: Any, x: Any, shape: Any, scale: Any, weight: Any, wants: Any
) -> tuple[Any, None]:
    wide, normed = gradient.float() * weight, x.float() * scale
    return (scale * (wide - normed * (wide * normed).mean(-1, keepdim=True))).to(x.dtype), None


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing: a dry optimizer's step."""


REAL: dict[Any, Any] = {
    ATEN._scaled_dot_product_fused_attention_overrideable.default: _attention,
    ATEN._scaled_dot_product_fused_attention_overrideable_backward.default: _attention_backward,
    ATEN._fused_rms_norm.default: _rms_norm,
    ATEN._fused_rms_norm_backward.default: _rms_norm_backward,
}
DRY: dict[Any, Any] = {ATEN._fused_adamw_.default: _nothing}


# --- what torch is told ----------------------------------------------------------------------------------


class _Module(backend_registration._DummyBackendModule):
    """`torch.pretended`, with the names that `torch.cuda` has too."""

    device = staticmethod(lambda _: nullcontext())

    def is_available(self) -> bool:
        return device.is_there

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self) -> bool:
        return device.has_bfloat16

    def get_device_properties(self, _: Any = None) -> SimpleNamespace:
        return SimpleNamespace(has_fp64=device.has_float64)

    def get_device_name(self, _: Any = None) -> str:
        return "Pretended"

    def mem_get_info(self, _: Any = None) -> tuple[int, int]:
        return device.total - device.used, device.total

    def max_memory_allocated(self, _: Any = None) -> int:
        return device.peak

    def reset_peak_memory_stats(self, _: Any = None) -> None:
        device.peak = device.used

    def empty_cache(self) -> None:
        pass

    def synchronize(self, _: Any = None) -> None:
        pass

    def set_device(self, _: Any) -> None:
        pass

    def get_rng_state(self, _: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, _: Any = None) -> None:
        torch.set_rng_state(state)


class _Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return device.is_there

    def has_primary_context(self, _: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


def _cast(operation: Any, wanted: torch.dtype | None, *args: Any, **kwargs: Any) -> Any:
    """Compute an operation as autocast does; without a dtype, in the lower precision that is set."""
    dtype = wanted or torch.get_autocast_dtype(NAME)
    halves = (torch.float32, torch.bfloat16, torch.float16)

    def cast(each: torch.Tensor) -> torch.Tensor:
        return each.to(dtype) if isinstance(each, PretendedTensor) and each.dtype in halves else each

    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    args, kwargs = tree_map_only(torch.Tensor, cast, (args, kwargs))
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return operation(*args, **kwargs)


@cache
def _register() -> list[torch.library.Library]:
    """Make the backend known to torch, once and for all; it is there only while it is pretended."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), _Hook(), None)
    for types in (of_optimizers, of_utilities):
        types.append(PretendedTensor)
    library = torch.library.Library("aten", "IMPL", "PrivateUse1")
    library.impl("empty.memory_format", _empty)
    library.impl("empty_strided", _empty_strided)
    library.impl("_copy_from", _copy_from)
    # Tensors come to `_dispatch` before.
    library.impl("_fused_rms_norm", _rms_norm)
    FUSED_ON.add(NAME)
    rest = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel)
    autocast = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for names, dtype in ((LOWER, None), (HIGHER, torch.float32)):
        for name in names:
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(ATEN, packet), overload or "default")
            autocast.impl(name, partial(_cast, operation, dtype))
    # Left to itself, torch would compute attention by plain operations.
    attention = torch.library.Library("aten", "IMPL", "AutogradPrivateUse1")
    attention.impl("scaled_dot_product_attention", _fused_attention)
    return [library, rest, autocast, attention]
