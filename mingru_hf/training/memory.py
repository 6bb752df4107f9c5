"""Keep freed memory in the process, for training on a CPU."""

import ctypes
import os
import platform

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Up to this much freed memory stays with the process, and tensors up to this size are allocated from it.
_KEPT_BYTES, _LARGEST_BYTES = 2**31 - 1, 2**30


def keep_freed_memory() -> bool:
    """Keep the memory of freed tensors for the next ones, instead of returning it to the system.

    A training step frees all of its activations. glibc then returns them to the system, which has to clear every page
    again in the next step: 15 to 40 % of a small model's training time (LOG.md). The process keeps as much memory as
    it has ever used, up to 2 GiB more than it needs.

    Environment variables that configure the allocator (MALLOC_*, GLIBC_TUNABLES) take precedence.

    Returns:
        Whether this is now in effect; it never is with another C library.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Releases before 2.35 refuse thresholds above 32 MiB, which is also where their own adaptation stops.
    taken = mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(taken and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
