"""Error measures that compare the states and gradients of a scan with those of the float64 loop."""


def relative_error(actual, expected):
    return ((actual.double() - expected).abs() / expected.abs().clamp(min=1e-30)).max().item()


def error_over_largest(actual, expected):
    largest = expected.abs().max().clamp(min=1e-30)  # h0's gradient is all zero if a reset cuts h0 off in every row
    return ((actual.double() - expected).abs().max() / largest).item()
