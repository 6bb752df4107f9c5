"""The Triton kernels: under Triton's interpreter on CPU tensors, through the compiler, and on a GPU if there is one.

The interpreter must be selected before triton is imported, so its comparisons run in a process of their own. That
process runs this file as a script, which prints the error of each case.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scan_errors import error_over_largest, relative_error
from torch._subclasses import FakeTensorMode
from triton_interpreter import combine_rows_at_once

from mingru_hf import mingru_scan, scan, scan_triton
from mingru_hf.scan_reference import scan_reference
from mingru_hf.scan_torch import torch_backward, torch_forward
from mingru_hf.scan_triton import triton_backward, triton_forward

ROOT = Path(__file__).parent.parent

needs_triton = pytest.mark.skipif(
    scan_triton.unavailable_reason() is not None, reason=f"no Triton: {scan_triton.unavailable_reason()}"
)
needs_card = pytest.mark.skipif(
    not (scan_triton.unavailable_reason() is None and torch.cuda.is_available()), reason="no CUDA card with Triton"
)

# A few roundings: the state is a convex combination, so errors decay. A gradient's error is relative to its largest
# element.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2.0**-8}
# The interpreter truncates float32 to bfloat16 instead of rounding: an error of one unit in the last place, and one
# more in gradients, which also depend on the truncated states.
INTERPRETED_BFLOAT16 = 2.0**-7

# name: (batch, steps, channels), dtype, flags, (BLOCK_T, BLOCK_N, steps of a chunk)
CASES = {
    f"{'chunks' if chunk else 'one pass'} T={steps} D={channels} {str(dtype)[6:]} {flags}".strip(): (
        (2, steps, channels),
        dtype,
        flags,
        (1 if steps == 1 else 8 if steps < 100 else 16, 32, chunk or steps),
    )
    for steps, channels, dtype, flags, chunk in [
        (1, 1, torch.float32, "", 0),
        (1, 37, torch.float32, "h0 mask reset", 0),
        (2, 3, torch.float32, "h0", 0),
        (2, 3, torch.float64, "mask reset", 0),
        (63, 1, torch.float32, "mask", 0),
        (63, 1, torch.float32, "h0 mask reset", 16),
        (63, 3, torch.float32, "", 8),
        (63, 3, torch.float32, "h0", 16),
        (63, 3, torch.float32, "reset", 0),
        (63, 37, torch.bfloat16, "h0 mask reset", 0),
        (63, 37, torch.bfloat16, "", 24),
        (130, 3, torch.bfloat16, "h0 mask reset", 16),
        (130, 3, torch.float32, "h0 mask", 32),
        (130, 3, torch.float32, "mask reset", 48),
        (130, 3, torch.float16, "h0 reset", 64),
        (130, 37, torch.float64, "h0 mask reset", 48),
        (130, 37, torch.float64, "", 0),
        (130, 37, torch.float32, "h0 mask reset", 0),
        (130, 37, torch.float32, "h0 mask reset", 40),
        # 17 chunks, each shorter than a tile: the pass over their summaries takes several tiles.
        (130, 1, torch.float32, "h0 reset", 8),
        # Without compensated sums these two are off by 5e-5, the second because of its long chunks alone.
        (2000, 2, torch.float32, "slow", 0),
        (4000, 2, torch.float32, "h0 slow", 2000),
        # States that remember across 42 chunks, so that the contents of the chunk summaries matter.
        (2000, 2, torch.float32, "h0 slow", 48),
    ]
} | {
    # Narrow tiles, used for few programs and short sequences: no chunks.
    f"narrow T={steps} D={channels} {str(dtype)[6:]} {flags}".strip(): (
        (2, steps, channels),
        dtype,
        flags,
        (16, block_n, steps),
    )
    for steps, channels, dtype, flags, block_n in [
        (16, 9, torch.float32, "", 8),
        (63, 65, torch.float32, "h0 mask reset", 8),
        (63, 65, torch.bfloat16, "h0 mask reset", 16),
        (511, 17, torch.float32, "h0 slow", 16),
    ]
}
CHECKS = [
    "strides",
    "every element is written",
    "masked steps ignore NaN",
    "NaN and Inf stay where they are",
    "a reset stops NaN",
    "a masked reset leaves 0.5",
    "saturated gates",
]


def make_inputs(batch, steps, channels, flags="h0 mask reset", device=None):
    x = 2 * torch.randn(batch, steps, 2 * channels, device=device)
    if "slow" in flags:
        x[..., :channels] = -7.0
    h0 = torch.rand(batch, 1, channels, device=device) + 0.01 if "h0" in flags else None
    if "slow" in flags and h0 is not None:
        h0 *= 10.0
    mask = torch.rand(batch, steps, device=device) > 0.3 if "mask" in flags else None
    reset = torch.rand(batch, steps, device=device) > 0.9 if "reset" in flags else None
    return x, h0, mask, reset


def reference(x, h0, mask, reset, weight):
    """Return the states, the last state, and the gradients of a weighted sum of both, from the float64 loop."""
    x = x.double().requires_grad_()
    h0 = torch.full((x.shape[0], 1, x.shape[2] // 2), 0.5) if h0 is None else h0
    h0 = h0.double().requires_grad_()
    states = scan_reference(x, h0, mask, reset)
    (states * weight.double()).sum().add(states[:, -1:].sum()).backward()
    return states.detach(), states[:, -1:].detach(), x.grad, h0.grad


def run(x, h0, mask, reset, weight, dtype=None):
    """Return the same from the kernels."""
    states, last = triton_forward(x, h0, mask, reset, x.dtype if dtype is None else dtype)
    grads = weight.to(states.dtype), torch.ones_like(last[..., :1]).expand_as(last)
    return states, last, *triton_backward(*grads, x, h0, states, mask, reset)


# --- What runs under the interpreter.


def plan(*sizes):
    """Set the steps and channels of a tile and the steps of a chunk that the kernels use."""
    scan_triton._plan = lambda *_: sizes


def measure(shape, dtype, flags, sizes):
    """Return the errors of the states, of the states in float32 or wider, of the last state and of both gradients."""
    plan(*sizes)
    x, h0, mask, reset = make_inputs(*shape, flags)
    x, weight = x.to(dtype), torch.randn(shape).to(dtype)
    expected = reference(x, h0, mask, reset, weight)
    states, last, grad_x, grad_h0 = run(x, h0, mask, reset, weight)
    wide = dtype if dtype == torch.float64 else torch.float32
    assert states.dtype == grad_x.dtype == dtype
    assert last.dtype == grad_h0.dtype == wide
    wide_states = states if dtype == wide else triton_forward(x, h0, mask, reset, wide)[0]
    return {
        "states": relative_error(states, expected[0]),
        "wide states": relative_error(wide_states, expected[0]),
        "last": relative_error(last, expected[1]),
        "grad_x": error_over_largest(grad_x, expected[2]),
        "grad_h0": error_over_largest(grad_h0, expected[3]),
    }


def assert_same(actual, expected):
    for result, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=0, atol=0)


def check(name, chunk):
    """Run one of CHECKS on 20 steps, in a single pass (chunk 20) or in chunks."""
    plan(4, 4, chunk)
    x, h0, mask, reset = make_inputs(2, 20, 3)
    weight = torch.randn(2, 20, 3)
    if name == "strides":
        expected = run(x, h0, mask, reset, weight)
        wide = torch.randn(4, 40, 8)
        wide[::2, 5:25, 1:7] = x
        channels_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (x, h0, weight)]
        flags = torch.stack([mask, reset], dim=-1)
        time_first = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert_same(run(wide[::2, 5:25, 1:7], h0, mask.t().clone().t(), reset, weight), expected)
        assert_same(run(time_first, h0, flags[..., 0], flags[..., 1], weight), expected)
        assert_same(run(channels_first[0], channels_first[1], mask, reset, channels_first[2]), expected)
        expanded = x[:1].expand(2, -1, -1), h0[:1].expand(2, -1, -1), mask[:1].expand(2, -1), None
        ones = torch.ones(()).expand(2, 20, 3)
        assert_same(run(*expanded, ones), run(*(t if t is None else t.contiguous() for t in expanded), ones.clone()))
    elif name == "every element is written":
        expected = run(x, h0, mask, reset, weight)
        torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
        assert_same(run(x, h0, mask, reset, weight), expected)
        torch.use_deterministic_algorithms(False)
    elif name == "masked steps ignore NaN":
        mask[:, 6:11] = False
        clean = run(x, h0, mask, reset, weight)
        x[:, 6:11] = float("nan")
        dirty = run(x, h0, mask, reset, weight)
        assert_same(dirty, clean)
        assert not dirty[2][:, 6:11].any()
    elif name == "NaN and Inf stay where they are":
        clean = run(x, h0, None, None, weight)
        for bad in (float("nan"), float("inf")):
            spoilt = x.clone()
            spoilt[1, 9, 3] = bad  # the candidate of channel 0
            states, last, grad_x, grad_h0 = run(spoilt, h0, None, None, weight)
            assert not states[1, 9:, 0].isfinite().any()
            assert not last[1, 0, 0].isfinite()
            states[1, 9:, 0], last[1, 0, 0] = clean[0][1, 9:, 0], clean[1][1, 0, 0]
            grad_x[1, 9:, ::3] = clean[2][1, 9:, ::3]
            assert_same((states, last, grad_x, grad_h0), clean)
    elif name == "a reset stops NaN":
        reset[:, 7], reset[:, 13] = False, True
        mask[:, 7] = True
        clean = run(x, h0, mask, reset, weight)
        x[:, 7] = float("nan")
        states, last, grad_x, _ = run(x, h0, mask, reset, weight)
        assert states[:, 7].isnan().all()
        assert_same((states[:, 13:], last, grad_x[:, 13:]), (clean[0][:, 13:], clean[1], clean[2][:, 13:]))
        weight[:, 16] = float("nan")  # a NaN in the gradient does not flow back across the reset
        for step in (12, 13):  # the first step of a tile, and one inside it
            x, h0, _, _ = make_inputs(2, 20, 3)
            reset = (torch.arange(20) == step).expand(2, 20)
            clean = run(x, h0, None, reset, weight.nan_to_num())
            _, _, grad_x, grad_h0 = run(x, h0, None, reset, weight)
            assert grad_x[:, step:17].isnan().all()
            assert_same((grad_x[:, :step], grad_h0), (clean[2][:, :step], clean[3]))
    elif name == "a masked reset leaves 0.5":
        mask[:, 9], reset[:, 9] = False, True
        states, _, grad_x, _ = run(x, h0, mask, reset, weight)
        assert (states[:, 9] == 0.5).all()
        assert not grad_x[:, 9].any()
    elif name == "saturated gates":
        levels = torch.tensor([-100.0, -30.0, -1e-6, 0.0, 1e-6, 30.0, 100.0])
        pairs = torch.cartesian_prod(levels, levels)
        for x, h0 in (
            (pairs.reshape(49, 1, 2), torch.full((49, 1, 1), 0.3)),  # a row for each pair of gate and candidate
            (pairs.reshape(1, 49, 2), torch.full((1, 1, 1), 0.3)),  # all pairs in one sequence
        ):
            weight = torch.ones(*x.shape[:2], 1)
            # Not autograd's gradients: 1 - sigmoid loses the smallest ones, including their signs.
            wide = x.double(), h0.double(), scan_reference(x.double(), h0.double())
            ones = torch.ones_like(wide[-1][:, -1:])
            expected = wide[-1], wide[-1][:, -1:], *torch_backward(weight.double(), ones, *wide, None, None)
            for result, other in zip(run(x, h0, None, None, weight), expected, strict=True):
                assert result.isfinite().all()
                assert error_over_largest(result, other) <= TOLERANCE[torch.float32]
                if x.shape[1] == 1:  # otherwise state and g may differ by rounding only, with either sign
                    assert (result.double() * other >= 0).all()  # underflow is allowed, a wrong sign is not


def print_battery():
    assert scan_triton.unavailable_reason(torch.device("cpu")) is None
    scan_triton._SUMMARY_BLOCKS = ((4, 8), (8, 2))
    torch.manual_seed(0)
    results = {"elementwise scan": measure((1, 5, 2), torch.float32, "h0 mask reset", (4, 2, 4))}
    combine_rows_at_once()
    for name, case in CASES.items():
        results[name] = measure(*case)
    for name in CHECKS:
        for chunk in (20, 4):
            try:
                check(name, chunk)
                results[f"{name}, chunk {chunk}"] = "passed"
            except AssertionError as error:
                results[f"{name}, chunk {chunk}"] = f"failed: {error!r}"
    print(json.dumps(results))


# --- What pytest runs.


@pytest.fixture(scope="module")
def battery():
    """Return the errors and verdicts by case, from the process that runs the interpreter."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("name", ["elementwise scan", *CASES])
def test_kernels_equal_the_float64_loop(battery, name):
    dtype = CASES[name][1] if name in CASES else torch.float32
    errors = battery[name]
    wide = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
    narrow = {torch.bfloat16: INTERPRETED_BFLOAT16, torch.float16: 2.0**-10}.get(dtype, wide)
    assert errors["states"] <= narrow
    assert max(errors["wide states"], errors["last"]) <= wide
    assert errors["grad_x"] <= (2 * narrow if dtype.itemsize == 2 else wide)
    assert errors["grad_h0"] <= wide


@needs_triton
@pytest.mark.parametrize("chunk", [20, 4])
@pytest.mark.parametrize("name", CHECKS)
def test_behaviour(battery, name, chunk):
    assert battery[f"{name}, chunk {chunk}"] == "passed"


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "accumulate", "flags", "shape"),
    [
        ("fp32", "fp32", True, (8, 1024, 512)),
        ("bf16", "fp32", False, (8, 1024, 512)),
        ("bf16", "fp32", True, (8, 1024, 37)),
        ("fp16", "fp32", True, (8, 1024, 1)),
        ("fp64", "fp64", True, (8, 1024, 64)),
        ("fp32", "fp32", True, (16, 256, 384)),  # narrow tiles, and the narrowest
        ("bf16", "fp32", False, (2, 256, 384)),
    ],
)
def test_kernels_compile_without_a_card(architecture, dtype, accumulate, flags, shape, tmp_path, monkeypatch):
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block_t, block_n, _ = scan_triton._plan(*shape, 132, getattr(torch, f"float{accumulate[2:]}"))
    channels = shape[-1]
    pointers = dict.fromkeys(("x", "states", "grad", "grad_x"), f"*{dtype}")
    wide = "h0", "last", "start", "boundaries", "decays", "lesses", "drives", "grad_last", "grad_h0"
    pointers |= dict.fromkeys(wide, f"*{accumulate}")
    pointers |= dict.fromkeys(("mask", "reset"), "*u8")
    switches = "HAS_H0", "HAS_START", "HAS_GRAD_LAST", "HAS_MASK", "HAS_RESET", "CHUNKED", "REVERSE"
    values = dict.fromkeys(switches, flags)
    values |= {"ACCUMULATE": getattr(tl, f"float{accumulate[2:]}"), "BLOCK_T": block_t, "BLOCK_N": block_n}
    values |= {"STAGES": scan_triton._STAGES}
    values["BLOCK_C"], summary_block_n = scan_triton._summary_blocks(
        1000 if flags else 20, channels, values["ACCUMULATE"]
    )
    aligned = channels % 16 == 0
    if channels == 1:
        values["num_channels"] = 1  # the launcher also makes an argument of 1 a constant
    for name in ("forward", "forward_summary", "boundary", "backward", "backward_summary"):
        kernel = getattr(scan_triton, f"_{name}_kernel")
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.arg_names):
            signature[parameter] = "constexpr" if parameter in values else pointers.get(parameter, "i32")
            if parameter in values:
                constants[parameter] = values[parameter]
                if name == "boundary" and parameter == "BLOCK_N":
                    constants[parameter] = summary_block_n
            elif parameter in pointers or (
                aligned and (parameter == "num_channels" or parameter.endswith(("stride_b", "stride_t")))
            ):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        options = {"num_warps": 4 if name == "boundary" else 1, **scan_triton._OPTIONS}
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        assert compiled.asm["cubin"]
        if aligned and name != "boundary":
            assert "cp.async" in compiled.asm["ptx"]  # the next tiles are loaded while one is processed


@needs_triton
def test_plan_fills_the_card_and_no_more():
    tile_t, tile_n, chunk = scan_triton._plan(64, 1024, 4096, 132, torch.float32)
    assert (tile_t, tile_n, chunk) == (8, 64, 1024)  # rows x channels give enough programs: a single pass
    assert scan_triton._plan(1, 256, 64, 132, torch.float32)[2] == 256  # too short to cut into chunks
    assert scan_triton._plan(2, 521, 64, 132, torch.float32)[2] < 521  # the size that scan._trial tries
    assert scan_triton._plan(16, 1, 384, 132, torch.float32) == (1, 64, 1)  # decoding: no padding steps in a tile
    # Few programs, and no chunks: narrow tiles, and the narrowest if the GPU can run all of them at once.
    assert scan_triton._plan(16, 256, 384, 132, torch.float32) == (16, 16, 256)
    assert scan_triton._plan(2, 256, 768, 132, torch.float32) == (16, 8, 256)
    assert scan_triton._plan(2, 20, 64, 132, torch.float32) == (16, 8, 20)  # scan._trial tries these, too
    assert scan_triton._plan(1, 256, 3, 132, torch.float32) == (64, 4, 256)  # narrower still
    assert scan_triton._plan(22, 256, 768, 132, torch.float32) == (8, 64, 256)  # 264 programs are enough
    assert scan_triton._plan(16, 15, 384, 132, torch.float32) == (8, 64, 15)  # fewer steps than a narrow tile has
    assert scan_triton._plan(16, 256, 384, 132, torch.float64) == (8, 16, 256)  # already narrow
    for shape in [(8, 1024, 512), (1, 65536, 64), (2, 100_000, 257), (1, 1_000_000, 1)]:
        for accumulate in (torch.float32, torch.float64):
            batch, steps, channels = shape
            tile_t, tile_n, chunk = scan_triton._plan(*shape, 132, accumulate)
            assert chunk < steps
            assert chunk % tile_t == 0
            assert tile_t * tile_n <= 512
            assert batch * -(-channels // tile_n) * (steps // chunk) <= 132 * 12


def test_a_missing_or_broken_triton_breaks_nothing(tmp_path):
    (tmp_path / "triton.py").write_text("raise OSError('libtriton.so: bad magic')")
    for path, prepare, message in (
        ("", "sys.modules['triton'] = None", "triton is not installed"),
        (tmp_path, "", "cannot be imported (OSError: libtriton.so: bad magic)"),
    ):
        code = f"""
import sys, torch
{prepare}
sys.path.insert(0, {str(path)!r})
import importlib.util
from importlib.machinery import ModuleSpec
spec = ModuleSpec("kernels", None, is_package=True)
spec.submodule_search_locations.append({str(Path(scan_triton.__file__).parent)!r})
sys.modules["kernels"] = importlib.util.module_from_spec(spec)
reason = importlib.import_module("kernels.scan_triton").unavailable_reason()
assert reason and {message!r} in reason, reason
"""
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


TRIAL = """
import sys, warnings, torch
from mingru_hf import mingru_scan, scan

fault, x = sys.argv[1], torch.randn(2, 5, 6)
forward, backward = scan.KERNELS["triton"]

def does_not_compile(*args):
    raise RuntimeError("Failed to find C compiler.")

def one_off(*args):
    grad_x, grad_h0 = backward(*args)
    grad_x[-1, -1, -1] += 0.1
    return grad_x, grad_h0

def nothing_written(*args):
    states, last = forward(*args)
    return torch.full_like(states, torch.nan), last

scan.KERNELS["triton"] = {
    "none": (forward, backward),
    "compiler": (does_not_compile, backward),
    "gradient": (forward, one_off),
    "states": (nothing_written, backward),
}[fault]

before = torch.get_rng_state()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", UserWarning)  # not what an old interpreter does with a new NumPy
    for _ in range(2):
        try:
            states = mingru_scan(x, backend="triton")
            torch.testing.assert_close(states, scan.scan_reference(x))
            print("ran")
        except ValueError as error:
            print(error)
assert torch.equal(torch.get_rng_state(), before)
for warning in caught:
    print("warned:", warning.message)
if fault == "none":
    scan._trial.cache_clear()  # the first use may be while the compiler traces, with tensors that hold nothing
    compiled = torch.compile(lambda x: mingru_scan(x, backend="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), states)
    assert scan._trial.cache_info().misses == 1
"""


@needs_triton
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("none", None),
        ("compiler", "its kernels fail on cpu (RuntimeError: Failed to find C compiler.)"),
        ("gradient", "its kernels give wrong numbers on cpu (off by "),
        ("states", "its kernels give wrong numbers on cpu (off by nan times what rounding explains)"),
    ],
)
def test_kernels_are_tried_at_first_use(fault, message):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment.pop("MINGRU_SCAN", None)
    code = [sys.executable, "-c", TRIAL, fault]
    process = subprocess.run(code, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    if message is None:
        assert lines == ["ran", "ran"]
    else:
        assert len(lines) == 3  # both calls are refused, with a single warning
        assert all(message in line for line in lines)
        assert all(line.startswith("The scan backend 'triton' cannot be used here: ") for line in lines[:2])
        assert lines[2].startswith("warned: MinGRU runs without its fused Triton scan: ")


@needs_triton
def test_auto_goes_on_without_kernels_that_fail(monkeypatch):
    """PyTorch reports a GPU. If there is none, its first use fails; on a real one the patched kernels fail."""

    def fail(*args):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.delenv("MINGRU_SCAN", raising=False)
    monkeypatch.setitem(scan.KERNELS, "triton", (fail, fail))
    monkeypatch.setattr(scan, "_trial", functools.cache(scan._trial.__wrapped__))
    with FakeTensorMode():
        x = torch.randn(2, 5, 6, device="cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert mingru_scan(x).shape == (2, 5, 3)  # no GPU, and nothing is run
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        with pytest.warns(UserWarning, match="without its fused Triton scan: its kernels fail on cuda:0") as caught:
            states = [mingru_scan(x) for _ in range(2)]
        assert len(caught) == 1
        assert all(state.shape == (2, 5, 3) and state.device.type == "cuda" for state in states)
        with pytest.raises(ValueError, match="'triton' cannot be used here: its kernels fail on cuda:0"):
            mingru_scan(x, backend="triton")


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels take CPU tensors")
def test_reason_on_a_cpu():
    assert scan_triton.unavailable_reason() is None
    assert scan_triton.unavailable_reason(torch.device("cuda", 0)) is None
    assert "need CUDA tensors, got cpu" in scan_triton.unavailable_reason(torch.device("cpu"))


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flags", ["", "h0 mask reset", "slow"])
@pytest.mark.parametrize(
    "shape",
    [
        (8, 1024, 512),
        (1, 16384, 64),
        (128, 256, 2048),
        (3, 1000, 257),
        (2, 63, 1),
        (16, 1, 384),
        (16, 256, 384),
        (2, 63, 65),
    ],
)
def test_on_a_card(shape, flags, dtype):
    x, h0, mask, reset = make_inputs(*shape, flags, device="cuda")
    x, weight = x.to(dtype), torch.randn(shape, device="cuda").to(dtype)
    states, last, grad_x, grad_h0 = run(x, h0, mask, reset, weight)
    expected, expected_last = torch_forward(x.double(), h0, mask, reset, torch.float64)
    grads = weight.double(), torch.ones_like(expected_last)
    expected_x, expected_h0 = torch_backward(*grads, x.double(), h0, expected, mask, reset)
    narrow = {torch.float16: 2.0**-11}.get(dtype, TOLERANCE[dtype]) * 1.01
    wide = TOLERANCE[torch.float32]
    assert relative_error(states, expected) <= narrow
    assert relative_error(last, expected_last) <= wide
    assert relative_error(triton_forward(x, h0, mask, reset, torch.float32)[0], expected) <= wide
    assert error_over_largest(grad_x, expected_x) <= 2 * narrow
    assert error_over_largest(grad_h0, expected_h0) <= wide


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("chunk", [20, 4])
def test_behaviour_on_a_card(name, chunk, monkeypatch):
    monkeypatch.setattr(scan_triton, "_plan", scan_triton._plan)  # restored afterwards: the checks replace it
    with torch.device("cuda"):
        check(name, chunk)


@pytest.mark.gpu
@needs_card
def test_views_that_are_not_aligned_on_a_card():
    x, h0, mask, reset = make_inputs(3, 200, 64, device="cuda")
    weight = torch.randn(3, 200, 64, device="cuda")
    wide = torch.empty(3, 200, 131, device="cuda")
    wide[..., 1:129] = x
    assert_same(run(wide[..., 1:129], h0, mask, reset, weight), run(x, h0, mask, reset, weight))


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("steps", [64, 2000])
def test_in_a_graph_on_a_card(steps):
    x, h0, mask, reset = make_inputs(2, steps, 64, device="cuda")
    expected = mingru_scan(x, h0, mask, reset, backend="triton")  # compiles the kernels, too
    fixed, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        states = mingru_scan(fixed, h0, mask, reset, backend="triton")
    fixed.copy_(x)
    graph.replay()
    torch.testing.assert_close(states, expected, rtol=0, atol=0)


@pytest.mark.gpu
@needs_card
def test_on_a_card_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    x, h0, mask, reset = make_inputs(2, 700, 64, device="cuda:1")
    states, _ = triton_forward(x, h0, mask, reset, torch.float32)
    assert relative_error(states, torch_forward(x.double(), h0, mask, reset, torch.float64)[0]) <= 1e-5


@pytest.mark.gpu
@needs_card
def test_more_than_31_bits_of_elements_on_a_card():
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB on the card")
    x = torch.randn(1, 1 << 20, 2 * 1088, device="cuda", dtype=torch.bfloat16)
    states, _ = triton_forward(x, None, None, None, torch.bfloat16)
    tail, _ = triton_forward(x[:, -64:].contiguous(), states[:, -65:-64], None, None, torch.float32)
    assert relative_error(states[:, -64:], tail.double()) <= 3 * TOLERANCE[torch.bfloat16]
    grad_x, _ = triton_backward(torch.ones_like(states), None, x, None, states, None, None)
    ones = torch.ones_like(states[:, -64:])
    expected, _ = triton_backward(
        ones, None, x[:, -64:].contiguous(), states[:, -65:-64], states[:, -64:].contiguous(), None, None
    )
    assert error_over_largest(grad_x[:, -64:], expected.double()) <= 2 * TOLERANCE[torch.bfloat16]


if __name__ == "__main__":
    print_battery()
