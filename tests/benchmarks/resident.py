"""Resident memory of this process (Linux). ``ru_maxrss`` will not do: a child begins with the peak of its parent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal


def resident_mb(which: Literal["VmRSS", "VmHWM"]) -> float:
    """What is resident now, or was at the peak since `restart_peak`, in MB."""
    return int(re.findall(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def restart_peak() -> None:
    """The peak starts at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
