"""Resident memory of this process (Linux). ``ru_maxrss`` starts at the parent's peak, so it cannot be used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal


def resident_mb(which: Literal["VmRSS", "VmHWM"]) -> float:
    """Resident memory in MB, now or at its peak since `restart_peak`."""
    return int(re.findall(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def restart_peak() -> None:
    """Reset the peak to the present value."""
    Path("/proc/self/clear_refs").write_text("5")
