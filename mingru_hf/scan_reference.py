"""The definition of the MinGRU recurrence, against which all kernels are tested, and other slow implementations.

    z_t = sigmoid(gate_t)
    g_t = candidate_t + 0.5 where candidate_t >= 0, sigmoid(candidate_t) elsewhere
    h_t = (1 - z_t) h_{t-1} + z_t g_t

Source: Feng et al. 2024, "Were RNNs All We Needed?", arXiv:2410.01201, section 3.1 and appendix B.
`scan_reference` is the definition, a loop over time. `scan_log` is the algorithm that other packages use,
`scan_exported` serves torch.export, and `scan_doubling` serves derivatives under torch.compile. All consist of torch's
own operators, so autograd and compilers can see into them.

Legend: B batch, T time steps, D channels, * any trailing axes (the H x W of a frame).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# h_0 = g(0): the state before the first step when no other is given.
INITIAL_STATE = 0.5


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which the state is kept and accumulated: float64 for float64 inputs, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def first_state(x: Tensor, h0: Tensor | None) -> Tensor:
    """Return the state (B, 1, D, *) before the first step of x (B, T, 2D, *), in the accumulation dtype."""
    if h0 is None:
        shape = [x.shape[0], 1, x.shape[2] // 2, *x.shape[3:]]
        return x.new_full(shape, INITIAL_STATE, dtype=accumulation_dtype(x))
    return h0.to(accumulation_dtype(x))


def initial_state(like: Tensor, shape: list[int], value: float = INITIAL_STATE) -> Tensor:
    """Return g(0) = 0.5 everywhere, in the dtype and on the device of `like`.

    The value is a default argument because TorchScript functions cannot read a global.
    """
    return like.new_full(shape, value)


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias (2D,) to x (B, T, 2D, *), in the dtype of x."""
    return x + bias.to(x.dtype).reshape(-1, *[1] * (x.dim() - 3))


def scan_reference(
    gate_and_candidate: Tensor,
    h0: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> Tensor:
    """Run the recurrence as a loop over time: the definition that all other implementations are compared with.

    Autograd differentiates the loop. TorchScript uses it as well, so a scripted layer contains only torch's own
    operators.

    Args:
        gate_and_candidate, h0, mask, reset: as in `mingru_scan`.

    Returns:
        (B, T, D, *) states in the accumulation dtype: float32 for 16-bit inputs, else the inputs' dtype.
    """
    return torch.stack(reference_states(gate_and_candidate, h0, mask, reset), dim=1)


def _zero_padding(x: Tensor, mask: Tensor) -> Tensor:
    """Set x (B, T, *) to 0 where the mask (B, T) is False: a NaN there would reach the gradients as 0 times NaN."""
    return torch.where(mask.reshape(list(mask.shape) + [1] * (x.dim() - 2)), x, torch.zeros_like(x))


def reference_states(x: Tensor, h0: Tensor | None, mask: Tensor | None, reset: Tensor | None) -> list[Tensor]:
    """Return the states (B, D, *) of `scan_reference`, one per step."""
    if x.dtype == torch.bfloat16 or x.dtype == torch.float16:
        x = x.float()
    if mask is not None:
        x = _zero_padding(x, mask)
    gate, candidate = x.chunk(2, dim=2)  # (B, T, D, *) each
    z = torch.sigmoid(gate)
    one_minus_z = torch.sigmoid(-gate)  # not a subtraction, which loses all digits of a small 1 - z
    g = torch.where(candidate >= 0, candidate + 0.5, torch.sigmoid(candidate))
    zg = z * g

    if h0 is None:
        h = initial_state(x, gate[:, 0].shape)  # (B, D, *)
    else:
        h = h0[:, 0].to(x.dtype)
    row = [x.shape[0]] + [1] * (x.dim() - 2)  # (B, 1, ...): one flag per row

    states: list[Tensor] = []
    # Unbind once: if each step indexed the whole tensor, its backward pass would fill a tensor of all steps each time.
    decays, drives = one_minus_z.unbind(1), zg.unbind(1)
    for t in range(x.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t].reshape(row), initial_state(h, h.shape), h)
        h_next = decays[t] * h + drives[t]
        if mask is not None:
            h_next = torch.where(mask[:, t].reshape(row), h_next, h)
        h = h_next
        states.append(h)
    return states


def decay_and_drive(gate_and_candidate: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 - z and z g, the terms of h_t = decay_t h_{t-1} + drive_t, for scans that do not compute the gates.

    Args:
        gate_and_candidate: (B, T, 2D, *) pre-activations.

    Returns:
        Decay and drive, (B, T, D, *) each.
    """
    gate, candidate = gate_and_candidate.chunk(2, dim=2)
    return torch.sigmoid(-gate), torch.sigmoid(gate) * torch.maximum(candidate + 0.5, torch.sigmoid(candidate))


def _decay_and_drive(
    x: Tensor, h0: Tensor | None, mask: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return decay and drive (B, T, D, *) with mask and reset applied, and the first state (B, 1, D, *)."""
    x = x.to(accumulation_dtype(x))
    if mask is not None:
        x = _zero_padding(x, mask)
    decay, drive = decay_and_drive(x)
    shape = [*x.shape[:2]] + [1] * (x.dim() - 2)
    if mask is not None:
        keep = mask.reshape(shape)
        drive = torch.where(keep, drive, 0.0)
        decay = torch.where(keep, decay, 1.0)
    if reset is not None:
        cut = reset.reshape(shape)
        drive = torch.where(cut, drive + INITIAL_STATE * decay, drive)
        decay = torch.where(cut, 0.0, decay)
    return decay, drive, initial_state(x, decay[:, :1].shape) if h0 is None else h0.to(x.dtype)


def scan_doubling(x: Tensor, h0: Tensor | None, mask: Tensor | None, reset: Tensor | None) -> Tensor:
    """Run the recurrence in log2(T) rounds over all steps, each of which joins spans to spans of twice the length.

    For compilers: a loop over time would give them a graph with separate nodes for each of the T steps.
    """
    decay, drive, h0 = _decay_and_drive(x, h0, mask, reset)
    drive = torch.cat([drive[:, :1] + decay[:, :1] * h0, drive[:, 1:]], dim=1)
    span = 1
    while span < x.shape[1]:
        later = decay[:, span:]
        # Not even NaN crosses a reset.
        before, product = (torch.where(later == 0.0, 0.0, t[:, :-span]) for t in (drive, decay))
        drive = torch.cat([drive[:, :span], drive[:, span:] + later * before], dim=1)
        decay = torch.cat([decay[:, :span], later * product], dim=1)
        span *= 2
    return drive


def scan_exported(x: Tensor, h0: Tensor | None, mask: Tensor | None, reset: Tensor | None) -> Tensor:
    """Run the recurrence in torch's own operators for any T, so that an exported program runs without this package.

    The loop is a single node of the graph, whatever T is: torch's scan over h_t = decay_t h_{t-1} + drive_t.
    """
    from torch._higher_order_ops.scan import scan

    if isinstance(x.shape[1], int) and x.shape[1] == 1:
        return scan_reference(x, h0, mask, reset)
    decay, drive, h0 = _decay_and_drive(x, h0, mask, reset)
    # torch 2.9's scan returns wrong gradients if its inputs require gradients and its initial state does not.
    h0 = h0 + 0.0 * decay[:, :1]

    def step(h, inputs):
        h = inputs[0] * h + inputs[1]
        return h, h.clone()  # torch's scan does not accept the same tensor twice

    # The initial state is made contiguous because torch's scan requires the strides of the states that `step` returns.
    # Time is moved to the first axis because for any other one torch 2.9 returns the results along the first axis, and
    # later versions along the given one.
    return scan(step, h0[:, 0].contiguous(), (decay.movedim(1, 0), drive.movedim(1, 0)))[1].movedim(0, 1)


def scan_log(x: Tensor, h0: Tensor | None, mask: Tensor | None, reset: Tensor | None) -> Tensor:
    """Run the recurrence as a cumulative log-sum-exp (arXiv:2410.01201, appendix B), as other packages do.

    Its error grows with T, and a reset (log 0) cannot be expressed.
    """
    if reset is not None:
        raise ValueError(
            "The 'log' scan cannot reset the state inside a row (log 0); choose 'torch', 'reference' or 'auto'."
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"The 'log' scan works in float32 and float64 only, got {x.dtype}; choose 'torch', 'reference' or 'auto'."
        )
    if mask is not None:
        x = _zero_padding(x, mask)
    gate, candidate = x.chunk(2, dim=2)
    h0 = initial_state(x, gate[:, :1].shape) if h0 is None else h0.to(x.dtype)
    log_one_minus_z = -F.softplus(gate)
    log_g = torch.where(candidate >= 0, (F.relu(candidate) + 0.5).log(), -F.softplus(-candidate))
    log_zg = log_g - F.softplus(-gate)
    if mask is not None:
        keep = mask.reshape(*mask.shape, *[1] * (x.dim() - 2))
        log_one_minus_z = torch.where(keep, log_one_minus_z, 0.0)
        log_zg = torch.where(keep, log_zg, -1e30)
    log_decay = F.pad(log_one_minus_z.cumsum(dim=1).movedim(1, -1), (1, 0)).movedim(-1, 1)  # (B, T + 1, D, *)
    log_values = torch.cat([h0.log(), log_zg], dim=1)
    return (log_decay + torch.logcumsumexp(log_values - log_decay, dim=1)).exp()[:, 1:]


__all__ = [
    "INITIAL_STATE",
    "accumulation_dtype",
    "add_bias",
    "decay_and_drive",
    "first_state",
    "initial_state",
    "reference_states",
    "scan_doubling",
    "scan_exported",
    "scan_log",
    "scan_reference",
]
