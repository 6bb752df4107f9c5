"""The fused CPU scan: compared with the float64 loop, on threads, in forked processes, and without numba."""

import functools
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from scan_errors import error_over_largest, relative_error

from mingru_hf import scan_numba
from mingru_hf.scan_reference import scan_reference

needs_numba = pytest.mark.skipif(
    not scan_numba.NUMBA_AVAILABLE, reason=f"no numba scan here: {scan_numba.unavailable_reason()}"
)

# Largest relative error of a state against float64, at any T: a few roundings, since errors decay.
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8 * 1.001, torch.float64: 1e-13}
# The terms of a gradient may cancel, so its error is relative to its largest element. In bfloat16 the gradient
# itself is rounded once more.
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float64: 1e-13}

VARIANTS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
]


@pytest.fixture
def threads():
    """Yield a function that sets the number of threads for this test only."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_inputs(batch, steps, channels, flags="", dtype=torch.float32, scale=2.0):
    x = (scale * torch.randn(batch, steps, 2 * channels)).to(dtype)
    h0 = torch.rand(batch, 1, channels) + 0.01 if "h0" in flags else None
    mask = torch.rand(batch, steps) > 0.3 if "mask" in flags else None
    reset = torch.rand(batch, steps) > 0.8 if "reset" in flags else None
    return x, h0, mask, reset


def run(x, h0, mask, reset, weight, dtype):
    """Return the states and the gradients of their weighted sum, computed by the kernels."""
    states, _ = scan_numba.numba_forward(x, h0, mask, reset, dtype)
    return states, *scan_numba.numba_backward(weight, None, x, h0, states, mask, reset)


def run_reference(x, h0, mask, reset, weight):
    """Return the same three tensors, computed in float64 by the loop."""
    x = x.double().requires_grad_()
    h0 = torch.full_like(x[:, :1, : x.shape[2] // 2], 0.5) if h0 is None else h0.double()
    h0 = h0.detach().requires_grad_()
    states = scan_reference(x, h0, mask, reset)
    return states.detach(), *torch.autograd.grad((states * weight).sum(), (x, h0))


def assert_equals_reference(x, h0, mask, reset, dtype, weight=None):
    weight = torch.randn(*x.shape[:2], x.shape[2] // 2).to(dtype) if weight is None else weight
    states, grad_x, grad_h0 = run(x, h0, mask, reset, weight, dtype)
    expected = run_reference(x, h0, mask, reset, weight.double())
    accumulate = torch.promote_types(x.dtype, torch.float32)
    assert (states.dtype, grad_x.dtype, grad_h0.dtype) == (dtype, x.dtype, accumulate)
    assert (states.shape, grad_x.shape, grad_h0.shape) == tuple(tensor.shape for tensor in expected)
    assert relative_error(states, expected[0]) <= RELATIVE[dtype]
    assert error_over_largest(grad_x, expected[1]) <= GRADIENT[x.dtype]
    assert error_over_largest(grad_h0, expected[2]) <= GRADIENT[dtype]


@needs_numba
@pytest.mark.parametrize("flags", ["", "h0", "h0 mask", "h0 reset", "mask reset", "h0 mask reset"])
@pytest.mark.parametrize("steps", [1, 2, 63, 1000])
@pytest.mark.parametrize(("dtype", "states_dtype"), VARIANTS)
def test_states_and_gradients_equal_the_float64_loop(dtype, states_dtype, steps, flags):
    assert_equals_reference(*make_inputs(3, steps, 7, flags, dtype), states_dtype)


@needs_numba
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels", [1, 3, 64, 257])
@pytest.mark.parametrize(("dtype", "states_dtype"), VARIANTS)
def test_any_number_of_channels(dtype, states_dtype, channels, batch):
    assert_equals_reference(*make_inputs(batch, 63, channels, "h0 mask reset", dtype), states_dtype)


@needs_numba
def test_gradcheck():
    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, h0, mask, reset):
            states, _ = scan_numba.numba_forward(x, h0, mask, reset, x.dtype)
            ctx.save_for_backward(x, h0, mask, reset, states)
            return states

        @staticmethod
        def backward(ctx, grad):
            x, h0, mask, reset, states = ctx.saved_tensors
            return *scan_numba.numba_backward(grad, None, x, h0, states, mask, reset), None, None

    x, h0, mask, reset = make_inputs(2, 5, 3, "h0 mask reset", torch.float64)
    torch.autograd.gradcheck(Scan.apply, (x.requires_grad_(), h0.double().requires_grad_(), mask, reset))


@needs_numba
def test_bfloat16_states_are_the_rounded_float32_states():
    """The state itself is never rounded; the kernel's exp is a little less accurate, which shows only near a tie."""
    x, h0, mask, reset = make_inputs(2, 500, 65, "h0 mask reset", torch.bfloat16)
    rounded, _ = scan_numba.numba_forward(x, h0, mask, reset, torch.bfloat16)
    exact = scan_reference(x.double(), h0.double(), mask, reset)
    assert relative_error(rounded, exact) <= 2.0**-8 * 1.001
    assert (rounded == exact.to(torch.bfloat16)).double().mean() > 0.99


@needs_numba
@pytest.mark.parametrize(("dtype", "states_dtype"), VARIANTS)
def test_saturated_gates_and_candidates(dtype, states_dtype):
    """At +-100, results are finite and close to float64, and non-zero gradients have the right sign."""
    x = torch.tensor([-100.0, -88.0, -30.0, 0.0, 30.0, 88.0, 100.0]).to(dtype)
    x = torch.cat(torch.broadcast_tensors(x[:, None, None], x[None, :, None]), dim=2).reshape(1, 49, 2)
    x = x[:, torch.randperm(49)]
    h0 = torch.full((1, 1, 1), 2.0)
    weight = torch.ones(1, 49, 1, dtype=states_dtype)
    states, grad_x, grad_h0 = run(x, h0, None, None, weight, states_dtype)
    expected = run_reference(x, h0, None, None, weight.double())
    assert relative_error(states, expected[0]) <= RELATIVE[states_dtype]
    for actual, reference in ((grad_x, expected[1]), (grad_h0, expected[2])):
        assert actual.isfinite().all()
        assert error_over_largest(actual, reference) <= GRADIENT[dtype]
    assert (grad_x[..., 1] >= 0).all()
    # A gate's gradient has the sign of g - h, which is arbitrary where the two differ by rounding only. (The sign that
    # the loop finds is no reference: its sigmoid'(100) is 0 and its sigmoid'(-100) is not.)
    candidate = x[..., 1:].double()
    g = torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid())
    previous = torch.cat([h0.double(), expected[0][:, :-1]], dim=1)
    differ = (g - previous).abs() > 2 * RELATIVE[states_dtype] * torch.maximum(g, previous)
    assert differ.sum() > 20
    assert ((grad_x[..., :1] == 0) | (grad_x[..., :1].sign() == (g - previous).sign()))[differ].all()


@needs_numba
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("half", ["gate", "candidate"])
@pytest.mark.parametrize(("dtype", "states_dtype"), VARIANTS)
def test_a_bad_number_reaches_only_what_depends_on_it(dtype, states_dtype, half, bad):
    x, h0, _, _ = make_inputs(2, 40, 33, "h0", dtype)
    weight = torch.randn(2, 40, 33).to(states_dtype)
    clean = run(x, h0, None, None, weight, states_dtype)
    column = 5 if half == "gate" else 33 + 5
    x[0, 20, column] = bad
    poisoned = run(x, h0, None, None, weight, states_dtype)
    others = torch.arange(33) != 5
    both = torch.cat([others, others])
    for actual, expected, rest in zip(poisoned, clean, (others, both, others), strict=True):
        torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=0)
        torch.testing.assert_close(actual[0][..., rest], expected[0][..., rest], rtol=0, atol=0)
    states, grad_x, grad_h0 = poisoned
    torch.testing.assert_close(states[0, :20], clean[0][0, :20], rtol=0, atol=0)
    torch.testing.assert_close(grad_x[0, 21:, 33:], clean[1][0, 21:, 33:], rtol=0, atol=0)  # z g' ignores h
    expected = run_reference(x, h0, None, None, weight.double())
    for actual, reference in zip(poisoned, expected, strict=True):
        assert torch.equal(actual.isfinite(), reference.isfinite())  # compensated sums turn Inf into NaN
    if half == "candidate":  # 1 - z, and so the gradient of earlier steps, ignores it
        torch.testing.assert_close(grad_h0, clean[2], rtol=0, atol=0)


@needs_numba
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masked_steps_and_resets_stop_bad_numbers(bad):
    x, h0, _, _ = make_inputs(1, 30, 17, "h0")
    weight = torch.randn(1, 30, 17)
    mask, reset = torch.ones(1, 30, dtype=torch.bool), torch.zeros(1, 30, dtype=torch.bool)
    mask[0, 10], reset[0, 20] = False, True
    clean = run(x, h0, mask, reset, weight, torch.float32)
    x[0, 10] = bad
    for actual, expected in zip(run(x, h0, mask, reset, weight, torch.float32), clean, strict=True):
        assert torch.equal(actual, expected)
    good, x[0, 15, 17 + 3] = x[0, 15, 17 + 3].clone(), bad
    states, grad_x, _ = run(x, h0, mask, reset, weight, torch.float32)
    assert not states[0, 15:20, 3].isfinite().any()
    assert torch.equal(states[0, 20:], clean[0][0, 20:])
    assert torch.equal(grad_x[0, 20:], clean[1][0, 20:])
    x[0, 15, 17 + 3] = good
    weight[0, 25] = bad  # a bad gradient stops at the reset, too
    _, grad_x, grad_h0 = run(x, h0, mask, reset, weight, torch.float32)
    assert torch.equal(grad_h0, clean[2])
    assert not grad_x[0, 20:26].isfinite().all()
    assert grad_x[0, :15].isfinite().all()


@needs_numba
def test_strided_and_expanded_tensors():
    wide = 2 * torch.randn(3, 2, 50, 40)
    x = wide.transpose(0, 1)[:, 0, 3:43, 4:34:1]  # (2, 40, 30) with gaps between rows
    assert not x.is_contiguous()
    h0 = torch.rand(1, 1, 15).expand(2, 1, 15)
    flags = torch.rand(40, 2) > 0.3
    for weight in (torch.ones(()).expand(2, 40, 15), torch.randn(2, 15, 40).transpose(1, 2)):
        assert_equals_reference(x, h0, flags.t(), ~flags.t(), torch.float32, weight)
    assert_equals_reference(x[:, :, ::3].repeat(1, 1, 2)[:, :, ::2], None, None, None, torch.float32)


@needs_numba
def test_preallocated_and_poisoned_outputs():
    x, h0, mask, reset = make_inputs(2, 40, 19, "h0 mask reset")
    weight = torch.randn(2, 40, 19)
    expected = run(x, h0, mask, reset, weight, torch.float32)
    room = torch.full((2, 41, 20), float("nan"))
    out, grad_out = room[:, :40, :19], torch.full((2, 40, 38), float("nan"))
    states, _ = scan_numba.numba_forward(x, h0, mask, reset, torch.float32, out)
    assert states is out
    grad_x, grad_h0 = scan_numba.numba_backward(weight, None, x, h0, states, mask, reset, grad_out)
    assert grad_x is grad_out
    for actual, reference in zip((states, grad_x, grad_h0), expected, strict=True):
        assert torch.equal(actual, reference)
    assert room[:, 40].isnan().all()
    assert room[:, :, 19].isnan().all()


@needs_numba
def test_impossible_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"no kernel for torch\.float16"):
        scan_numba.numba_forward(torch.zeros(1, 2, 4, dtype=torch.float16), None, None, None, torch.float16)
    assert not scan_numba.numba_supports(torch.float32, torch.bfloat16)


@needs_numba
@pytest.mark.parametrize(("real", "bound"), [(torch.float32, 3e-7), (torch.float64, 4e-15)])
def test_error_of_exp(real, bound):
    """After one step with gate 200 and candidate -x <= 0, h is sigmoid(-x), which is as accurate as e^-x."""
    x = torch.cat([torch.linspace(0, 87, 200_001, dtype=real), torch.logspace(-30, 0, 1001, dtype=real)])
    pre = torch.stack([torch.full_like(x, 200.0), -x]).reshape(1, 1, -1)  # z = 1: h = sigmoid(-x) = e^-x / (1 + e^-x)
    actual = scan_numba.numba_forward(pre, None, None, None, real)[0][0, 0]
    expected = torch.sigmoid(-x.double()) if real == torch.float32 else torch.exp(-x) / (1 + torch.exp(-x))
    error = (actual.double() - expected).abs() / expected
    # exp multiplies by a rounded 1 / ln(2), which costs 2e-8 for each unit of x (next to nothing in float64).
    assert (error / (1 + 0.1 * x.double())).max() <= bound
    far = torch.full((1, 1, 2), -1000.0, dtype=real)
    far[..., 0] = 1000.0
    assert scan_numba.numba_forward(far, None, None, None, real)[0].item() == 0


# --- Threads and processes.


@needs_numba
@pytest.mark.parametrize("bias", [0.0, -20.0])  # with -20 the state never forgets the start of a piece
@pytest.mark.parametrize("shape", [(1, 8192, 32), (3, 100, 520), (2, 1500, 64), (1, 600, 500)])
@pytest.mark.parametrize("forked", [False, True], ids=["openmp", "pool"])
def test_any_number_of_threads_gives_the_same_bits(threads, monkeypatch, forked, shape, bias):
    monkeypatch.setattr(scan_numba, "_SERIAL_ELEMENTS", 0)
    monkeypatch.setattr(scan_numba, "_forked", forked)
    x, h0, mask, reset = make_inputs(*shape, "h0 mask" if bias else "h0 mask reset")
    x[..., : shape[2]] += bias
    weight = torch.randn(shape)
    threads(1)
    expected = run(x, h0, mask, reset, weight, torch.float32)
    for count in (2, 5):
        threads(count)
        for actual, reference in zip(run(x, h0, mask, reset, weight, torch.float32), expected, strict=True):
            assert torch.equal(actual, reference)


@needs_numba
def test_a_helper_outlives_a_call_that_is_interrupted(threads, monkeypatch):
    tasks = []

    class Pool:
        def submit(self, function, *args):
            if tasks:
                raise KeyboardInterrupt
            tasks.append((function, args))

    inputs = make_inputs(3, 100, 520, "h0 mask reset")
    expected, out = scan_numba.numba_forward(*inputs, torch.float32)[0], torch.zeros(3, 100, 520)
    monkeypatch.setattr(scan_numba, "_SERIAL_ELEMENTS", 0)
    monkeypatch.setattr(scan_numba, "_forked", True)  # no OpenMP
    monkeypatch.setattr(scan_numba, "_pool", Pool())
    threads(3)
    with pytest.raises(KeyboardInterrupt):
        scan_numba.numba_forward(*(tensor.clone() for tensor in inputs), torch.float32, out)
    gc.collect()
    (function, args), *_ = tasks
    function(*args)  # a thread that starts late: all memory that it reads and writes still exists
    assert torch.equal(out, expected)


@needs_numba
def test_at_the_interpreters_exit_there_are_no_helpers(threads, monkeypatch):
    class Pool:
        def submit(self, *task):
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    inputs = make_inputs(3, 100, 520, "h0 mask reset")
    expected, _ = scan_numba.numba_forward(*inputs, torch.float32)
    monkeypatch.setattr(scan_numba, "_SERIAL_ELEMENTS", 0)
    monkeypatch.setattr(scan_numba, "_forked", True)
    monkeypatch.setattr(scan_numba, "_pool", Pool())
    threads(3)
    assert torch.equal(scan_numba.numba_forward(*inputs, torch.float32)[0], expected)


@needs_numba
@pytest.mark.parametrize("count", [1, 2])
def test_the_gradient_of_the_state_has_memory_of_its_own(threads, count):
    threads(count)
    x, h0 = torch.randn(1, 8192, 64), torch.rand(1, 1, 32)
    _, _, grad = run(x, h0, None, None, torch.ones(1, 8192, 32), torch.float32)
    assert grad.untyped_storage().nbytes() == 4 * 32


@needs_numba
@pytest.mark.parametrize("forked", [False, True], ids=["openmp", "pool"])
def test_calls_from_several_python_threads(threads, monkeypatch, forked):
    monkeypatch.setattr(scan_numba, "_SERIAL_ELEMENTS", 0)
    monkeypatch.setattr(scan_numba, "_forked", forked)
    threads(2)
    inputs = [make_inputs(2, 200, 70, "h0 mask reset") for _ in range(4)]
    weight = torch.randn(2, 200, 70)
    expected = [run(*args, weight, torch.float32) for args in inputs]
    failures = []

    def work(index):
        for _ in range(20):
            for actual, reference in zip(run(*inputs[index], weight, torch.float32), expected[index], strict=True):
                if not torch.equal(actual, reference):
                    failures.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()
    assert not failures


# Load scan_numba.py without the rest of the package, which halves the start-up time.
ALONE = f"""
import importlib.util, sys
from importlib.machinery import ModuleSpec
spec = ModuleSpec("kernels", None, is_package=True)
spec.submodule_search_locations.append({str(Path(scan_numba.__file__).parent)!r})
sys.modules["kernels"] = importlib.util.module_from_spec(spec)
scan_numba = importlib.import_module("kernels.scan_numba")
"""


def run_python(code, *arguments, timeout=60, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONWARNINGS": "error"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


FORK = '''
import os, torch

torch.set_num_threads(2)
torch.manual_seed(0)
x, weight = torch.randn(4, 300, 512), torch.ones(4, 300, 256)

def scan():
    """A checksum, by NumPy: torch's own operators hang on two threads of a forked process."""
    states, _ = scan_numba.numba_forward(x, None, None, None, torch.float32)
    return float(scan_numba.numba_backward(weight, None, x, None, states, None, None)[0].numpy().sum())

expected = scan()

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        torch.set_num_threads(1 + index % 2)  # more than a worker's one thread, too
        return scan()

loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork", batch_size=1)
assert [value.item() for value in loader] == [expected] * 4
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    os._exit(0 if scan() == expected else 1)
assert os.waitpid(child, 0)[1] == 0
assert scan() == expected
'''


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_forked_workers_of_a_process_that_used_it():
    run_python(ALONE + FORK)


@needs_numba
@pytest.mark.parametrize("environment", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0"}], ids=["UTF-8", "C"])
def test_files_of_any_name_may_be_in_the_memory(environment, tmp_path):
    """The scan looks for OpenMP among the mapped files, which may have names that the locale cannot decode."""
    code = r"""
import mmap, os, sys, torch

path = os.path.join(os.fsencode(sys.argv[1]), b"mod\xe8le")
with open(path, "wb") as file:
    file.write(bytes(10))
file = open(path, "rb")
memory = mmap.mmap(file.fileno(), 10, access=mmap.ACCESS_READ)
torch.set_num_threads(2)
states, _ = scan_numba.numba_forward(torch.zeros(4, 300, 512), None, None, None, torch.float32)
assert (states == 0.5).all()
"""
    run_python(ALONE + code, str(tmp_path), **environment)


@needs_numba
def test_plain_processor_and_no_folder_for_the_cache():
    """Run without AVX, FMA and the instruction that rounds to bfloat16, and without a writable cache folder."""
    code = """
import torch
from numba.core import caching
caching.CacheImpl._locator_classes = []
from mingru_hf import scan_numba
from mingru_hf.scan_reference import scan_reference
x = 2 * torch.randn(2, 50, 66).bfloat16()
x[0, 30, 40] = float("nan")
states, _ = scan_numba.numba_forward(x, None, None, None, torch.bfloat16)
expected = scan_reference(x.double())
error = ((states.double() - expected).abs() / expected).nan_to_num()
assert error.max() <= 2.0**-8 * 1.001, error.max()
assert torch.equal(states.isnan(), expected.isnan()) and states.isnan().any()
"""
    run_python(code, NUMBA_CPU_NAME="generic")


@needs_numba
def test_second_process_takes_the_kernels_from_disk(tmp_path):
    code = """
import torch
scan_numba.numba_forward(torch.zeros(1, 2, 4), None, None, None, torch.float32)
print(scan_numba._compiled_entry(scan_numba._VARIANTS[torch.float32, torch.float32, False][0]).compiled.cache_hits)
"""
    outputs = [run_python(ALONE + code, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert [int(output) for output in outputs] == [0, 1]


@needs_numba
@pytest.mark.slow
def test_a_damaged_cache_or_a_full_disk_costs_the_compilation_alone(tmp_path):
    code = """
import sys
import torch
if sys.argv[1:]:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
x = torch.randn(1, 6, 4)
states, _ = scan_numba.numba_forward(x, None, None, None, torch.float32)
torch.testing.assert_close(scan_numba.numba_step(x[:, :1], None, None, torch.float32), states[:, :1])
"""

    def run(*arguments, cache=tmp_path / "cache"):
        run_python(ALONE + code, *arguments, NUMBA_CACHE_DIR=str(cache))

    run()
    for suffix in (".nbc", ".nbi"):
        [path] = (tmp_path / "cache").rglob(f"*{suffix}")
        os.truncate(path, 0)
        run()
        if suffix == ".nbc":
            run()  # compiles and writes again what the previous run has discarded
        assert path.stat().st_size > 0
    if sys.platform == "linux":
        run("full disk", cache=tmp_path / "other")


@needs_numba
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer on this platform")
def test_a_signal_that_runs_the_kernel_while_it_runs(tmp_path):
    """The handler may interrupt the kernel's Python code anywhere, including the compilation in the first call."""
    code = """
import signal, time
import torch
x, inside = torch.randn(2, 8, 16), []
def check():
    states, _ = scan_numba.numba_forward(x, None, None, None, torch.float32)
    torch.testing.assert_close(scan_numba.numba_step(x[:, :1].contiguous(), None, None, torch.float32), states[:, :1])
def handler(*args):
    if not inside:
        inside.append(True)
        check()
        inside.clear()
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.0005)
end = time.monotonic() + 3
while time.monotonic() < end:
    check()
signal.setitimer(signal.ITIMER_REAL, 0)
"""
    run_python(ALONE + code, NUMBA_CACHE_DIR=str(tmp_path))


@needs_numba
def test_an_interrupt_leaves_no_address_of_freed_memory():
    small, large = torch.randn(1, 1, 128), torch.randn(1, 1, 8192)
    step = functools.partial(scan_numba.numba_step, h0=None, bias=None, dtype=torch.float32)
    expected = step(small)

    def interrupt(frame, event, argument):
        if frame.f_code is not scan_numba._Scratch.at_least.__code__:
            return None

        def at_each_line(frame, event, argument):
            if isinstance(frame.f_locals.get("memory"), torch.Tensor):
                raise KeyboardInterrupt
            return at_each_line

        return at_each_line

    scan_numba._scratch.__dict__.clear()
    step(small)
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            step(large)
    finally:
        sys.settrace(before)
    size, address, owner = scan_numba._scratch.kept
    assert (size, address) == (owner.numel(), owner.data_ptr())
    torch.testing.assert_close(step(small), expected)


@pytest.mark.parametrize("broken", ["broken", "old"])
def test_import_with_a_numba_that_does_not_work(broken, tmp_path):
    packages = {"broken": "raise SystemError('bad build')", "old": "version_info = (0, 5, 0)\n__version__ = '0.5'"}
    for name in ("core", "extending"):
        (tmp_path / "numba" / name).mkdir(parents=True)
        (tmp_path / "numba" / name / "__init__.py").write_text("types = intrinsic = None")
    (tmp_path / "numba" / "__init__.py").write_text(packages[broken])
    (tmp_path / "llvmlite").mkdir()
    (tmp_path / "llvmlite" / "__init__.py").write_text("binding = ir = None")
    (tmp_path / "llvmlite" / "binding.py").write_text("")
    code = """
import torch
assert not scan_numba.NUMBA_AVAILABLE
assert "numba" in scan_numba.unavailable_reason()
try:
    scan_numba.numba_forward(torch.zeros(1, 2, 4), None, None, None, torch.float32)
except ValueError as error:
    assert "numba" in str(error)
else:
    raise AssertionError
"""
    reason = {"broken": "bad build", "old": "older than"}[broken]
    run_python(ALONE + code + f"assert {reason!r} in scan_numba.unavailable_reason()", PYTHONPATH=str(tmp_path))


def test_package_works_without_numba():
    run_python("""
import sys
sys.modules["numba"] = None
import torch, mingru_hf
assert not mingru_hf.scan_numba.NUMBA_AVAILABLE
out, _ = mingru_hf.MinGRU(4, [4])(torch.zeros(1, 2, 4))
assert out.shape == (1, 2, 4)
""")


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16, torch.float32])
def test_a_token_takes_the_short_way_whatever_its_bias(dtype, bias_dtype):
    """A bfloat16 model has bfloat16 biases and float32 states."""
    x, h0 = torch.randn(3, 1, 14).to(dtype), torch.rand(3, 1, 7)
    bias = None if bias_dtype is None else torch.randn(14).to(bias_dtype)
    wide = torch.promote_types(dtype, torch.float32)
    state = scan_numba.numba_step(x, h0.to(wide), bias, wide)
    biased = x.double() if bias is None else x.double() + bias.double()
    torch.testing.assert_close(state.double(), scan_reference(biased, h0.double()), rtol=1e-6, atol=1e-7)
