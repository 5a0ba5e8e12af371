"""How the process keeps its memory: what is freed stays for the next call."""

import ctypes
import sys

# Of glibc's mallopt, the largest sizes that it takes: what is freed is kept, up to 2 GB.
ALLOCATION = {-3: 2**25, -1: 2**31 - 1, -2: 2**26}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


def keep_freed_memory() -> None:
    """XLA CPU allocates its temporaries anew at each call, and pages fresh from the kernel cost time."""
    if sys.platform == "linux" and hasattr(c := ctypes.CDLL(None), "mallopt"):  # musl has none
        for parameter, value in ALLOCATION.items():
            c.mallopt(parameter, value)
