"""Faster linear maps for CPUs on which the library that torch uses for them leaves much of the processor idle.

On x86 torch multiplies float32 matrices with MKL, which is efficient on Intel processors. On AMD processors:

- Many rows, in training: MKL uses only 256 of the 512 vector bits of Zen 5 (2024). For convolutions torch uses oneDNN,
  which uses all 512 bits and is a tenth faster on Zen 4 as well. So the linear map is computed as a convolution with a
  1 x 1 kernel.
- Few rows, in a decoding step: the time should be that of reading the weights. For up to four rows MKL takes two to
  seven times as long as that, and the kernel in scan_numba.py 1.1 to 2.1 times; with bfloat16 oneDNN takes two to four
  times as long, and the kernel 1.3 to 2.9 times. For sixteen rows the kernel also takes two to five times as long.

The results agree up to rounding. LOG.md lists all speeds, as measured by `scripts/benchmark_lm.py` and
`scripts/benchmark_linear.py`. torch's profiler does not see the kernel.
"""

import os
import platform
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .observers import in_transform, is_observed
from .scan_numba import NUMBA_AVAILABLE, numba_linear

# CPU families, as the processor reports them; 25 without AVX-512 is Zen 3.
_ZEN_4, _ZEN_5 = 25, 26

# With more weights per row, converting the weights costs more than the convolution saves.
_MAX_WEIGHTS_PER_ROW = 2048
# With a single thread torch uses oneDNN for convolutions from this batch size on.
_BATCH = 16


def amd_family(processor: str) -> int:
    """Return the family of an AMD processor, 0 for any other.

    Args:
        processor: contents of /proc/cpuinfo on Linux, or the description that Windows gives, such as "AMD64 Family 26
            Model 68 Stepping 0, AuthenticAMD".
    """
    family = re.search(r"^cpu family\s*: (\d+)", processor, re.MULTILINE) or re.search(r"Family (\d+)", processor)
    return int(family[1]) if family and "AuthenticAMD" in processor else 0


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()


_FAMILY = amd_family(_processor()) if torch.backends.cpu.get_cpu_capability() == "AVX512" else 0
_USES_MKL = torch.backends.mkl.is_available()
# Whether oneDNN multiplies many rows faster than MKL on this machine.
CONVOLUTION_IS_FASTER = _FAMILY >= _ZEN_4 and _USES_MKL and torch.backends.mkldnn.is_available()
# With fewer rows or smaller products the conversion does not pay either; on Zen 4 there is less to gain.
_MIN_ROWS, _MIN_PRODUCTS = (256, 1 << 24) if _FAMILY >= _ZEN_5 else (2048, 1 << 28)
# Whether our kernel multiplies few rows faster than torch; measured on Zen 4. If MINGRU_SCAN selects a scan without
# numba, linear maps do not use numba either.
FEW_ROWS_ARE_FASTER = (
    _FAMILY >= _ZEN_4
    and _USES_MKL
    and NUMBA_AVAILABLE
    and os.environ.get("MINGRU_SCAN") in (None, "", "auto", "numba")
)
HAS_FASTER_WAY = CONVOLUTION_IS_FASTER or FEW_ROWS_ARE_FASTER
_LINEAR = F.linear  # if F.linear is replaced later, the replacement is called


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute F.linear, by a faster implementation where there is one.

    Args:
        x: (*, E) of any dtype, on any device.
        weight: (F, E).
        bias: (F,), or None.

    Returns:
        (*, F) x weight^T + bias.

    Raises:
        RuntimeError: as F.linear, if the shapes, types or devices do not fit.
    """
    if CONVOLUTION_IS_FASTER and not torch.compiler.is_compiling() and _suits_a_convolution(x, weight, bias):
        batch = 1 if torch.get_num_threads() > 1 else _BATCH
        rows = x.contiguous().reshape(batch, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (batch, E, rows, 1)
        out = F.conv2d(rows, weight[:, :, None, None], None if bias is None else bias.detach())
        # Like the output of F.linear, this is not a view, so it can be modified in place.
        out = torch.ops.aten._unsafe_view(out.permute(0, 2, 3, 1), (*x.shape[:-1], weight.shape[0]))
        return out if bias is None or not bias.requires_grad else _BiasGradient.apply(out, bias)
    if FEW_ROWS_ARE_FASTER and not torch.is_grad_enabled() and not is_observed():
        return linear_unobserved(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_unobserved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute F.linear, by our kernel where it is faster; only for use without autograd and if not `is_observed`."""
    if (
        FEW_ROWS_ARE_FASTER
        and F.linear is _LINEAR
        and not torch.compiler.is_compiling()  # a module may be compiled while the model that calls it is not
        and not torch.is_autocast_enabled("cpu")
        and _is_array(x)
        and _is_array(weight)
        and (bias is None or _is_array(bias))
    ):
        out = numba_linear(x, weight, bias)
        if out is not None:
            return out
    return F.linear(x, weight, bias)


class _BiasGradient(torch.autograd.Function):
    """Gradient of an already added bias, computed by torch's sum: oneDNN's loses a digit or two over many rows."""

    @staticmethod
    def forward(ctx, out: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.aten._unsafe_view(out, out.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return grad, grad.sum(tuple(range(grad.dim() - 1))) if ctx.needs_input_grad[1] else None


def _suits_a_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if F.linear is not _LINEAR or torch.jit.is_tracing() or weight.dim() != 2:  # under a tracer, sizes are tensors
        return False
    size, (outputs, inputs) = x.numel(), weight.shape
    rows = size // inputs if inputs else 0
    return (
        rows >= _MIN_ROWS
        and size * outputs >= _MIN_PRODUCTS
        and outputs * inputs <= _MAX_WEIGHTS_PER_ROW * rows
        and (rows % _BATCH == 0 or torch.get_num_threads() > 1)
        and all(_is_array(t) and t.dtype == torch.float32 for t in (x, weight, bias) if t is not None)
        and x.shape[-1] == inputs
        and (bias is None or bias.shape == (outputs,))
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.conv.fp32_precision in ("none", "ieee")
        and torch.backends.mkldnn.matmul.fp32_precision != "bf16"
        and not torch.is_autocast_enabled("cpu")
        and not in_transform()
    )


def _is_array(tensor: Tensor) -> bool:
    """Whether this is a plain strided CPU tensor: no subclass (fake, quantised, DTensor), not sparse, not nested."""
    kind = type(tensor)
    return (
        (kind is Tensor or kind is nn.Parameter)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_neg()
    )


__all__ = ["FEW_ROWS_ARE_FASTER", "HAS_FASTER_WAY", "linear", "linear_unobserved"]
