"""Triton's interpreter, faster: imported after TRITON_INTERPRET=1 was set."""

import functools


def combine_rows_at_once():
    """The interpreter's associative_scan calls the combination once an element; once a row is a hundred times faster.

    Its interface is not public, so where it changes this does nothing and the cases take minutes.
    """
    from triton.runtime import interpreter

    original = getattr(getattr(interpreter, "ScanOps", None), "generic_scan", None)
    if original is None:
        return

    @functools.wraps(original)
    def generic_scan(self, tensors):
        if self.axis != 0:
            return original(self, tensors)
        result = [tensor.handle.data.copy() for tensor in tensors]
        for row in range(1, len(result[0])):
            before = [self.to_tensor(data[row - 1], t.dtype) for data, t in zip(result, tensors, strict=True)]
            here = [self.to_tensor(t.handle.data[row], t.dtype) for t in tensors]
            for data, combined in zip(result, self.combine_fn.fn(*before, *here), strict=True):
                data[row] = combined.handle.data
        return [self.to_tensor(data, t.dtype) for data, t in zip(result, tensors, strict=True)]

    interpreter.ScanOps.generic_scan = generic_scan
