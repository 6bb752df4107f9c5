"""How far the states and gradients of a scan are from those of the float64 loop."""


def relative_error(actual, expected):
    return ((actual.double() - expected).abs() / expected.abs().clamp(min=1e-30)).max().item()


def error_over_largest(actual, expected):
    largest = expected.abs().max().clamp(min=1e-30)  # all zero where every row has a reset that cuts h0 off
    return ((actual.double() - expected).abs().max() / largest).item()
