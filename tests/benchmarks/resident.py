"""Resident memory of this process (Linux). ``ru_maxrss`` starts at the parent's peak, so it cannot be used."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal


def resident_mb(which: Literal["VmRSS", "VmHWM"]) -> float:
    """Resident memory in MB, now or at its peak since `restart_peak`."""
    return int(re.findall(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def restart_peak() -> None:
    """Reset the peak to the present value."""
    Path("/proc/self/clear_refs").write_text("5")


def measured(call: Callable[[], object]) -> tuple[object, float, float]:
    """The result of ``call``, its seconds, and the rise of peak resident memory in MB."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory that was freed earlier is reused without being counted
    restart_peak()
    before, start = resident_mb("VmRSS"), time.perf_counter()
    result = call()
    return result, time.perf_counter() - start, resident_mb("VmHWM") - before
