"""What is seen of other processes at work, by which modules decide on how many threads they run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qsearch.build.threads import _seconds_of_others

SPIN = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
while time.process_time() < 0.5:
    pass
"""


@pytest.mark.skipif(not (hasattr(os, "sched_getaffinity") and Path("/proc/stat").exists()), reason="counted on Linux alone")
def test_a_busy_process_is_seen():
    import resource

    def taken_by_children() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    core = min(os.sched_getaffinity(0))
    seen, taken = -_seconds_of_others(), -taken_by_children()
    subprocess.run([sys.executable, "-c", SPIN, str(core)], check=True)
    seen, taken = seen + _seconds_of_others(), taken + taken_by_children()
    assert taken >= 0.5
    # The processors' clocks are coarse, and others may be at work as well.
    assert seen > taken / 2
