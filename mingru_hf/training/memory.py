"""Keep freed memory in the process, for training on a CPU."""

import ctypes
import os
import platform

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The process keeps up to this much freed memory, and allocates tensors up to this size from it.
_KEPT_BYTES, _LARGEST_BYTES = 2**31 - 1, 2**30


def keep_freed_memory() -> bool:
    """Keep the memory of freed tensors for the next ones, instead of returning it to the system.

    A training step frees all of its activations. By default glibc then returns their memory to the system, which has
    to clear every page again in the next step. This takes 15 to 40 % of a small model's training time (LOG.md). With
    this setting, the process keeps as much memory as it has ever used, up to 2 GiB more than it needs.

    Environment variables that configure the allocator (MALLOC_*, GLIBC_TUNABLES) take precedence.

    Returns:
        Whether the setting is now in effect; with C libraries other than glibc it never is.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # glibc before 2.35 rejects thresholds above 32 MiB, which is also the limit of its dynamic adjustment.
    taken = mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(taken and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
