"""The C library's memory, for training on a CPU."""

import ctypes
import os
import platform

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Memory that is freed stays with the process up to this much of it, and tensors up to this size are cut from it.
_KEPT_BYTES, _LARGEST_BYTES = 2**31 - 1, 2**30


def keep_freed_memory() -> bool:
    """Have the memory of tensors that are freed kept for the next ones, instead of handed back to the system.

    A step of training frees all of its activations. glibc then returns them to the system, which clears every page
    anew in the next step: 15 to 40 % of a small model's training time (LOG.md). The process holds on to as
    much memory as it had in use at most, up to 2 GiB more than it needs.

    Environment variables that say how memory is to be handled (MALLOC_*, GLIBC_TUNABLES) have precedence.

    Returns:
        Whether that is in effect now: not with another C library.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Releases before 2.35 take no threshold above 32 MiB, where their own stops, too.
    taken = mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(taken and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


__all__ = ["keep_freed_memory"]
