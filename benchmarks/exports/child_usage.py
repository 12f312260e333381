"""Runs a command and writes down what it used: a small process between a large one and the command.

    python benchmarks/child_usage.py usage.json [--cores N] -- COMMAND ...

Until it starts its program, a new process counts the memory of the one that made it as its own, and ru_maxrss never
forgets it. This file is run by its path and imports little, so that what it adds is about 10 MB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time


def usage_of(command: list[str]) -> dict[str, float]:
    """Run a command: its exit status, wall and CPU seconds, and peak bytes, of it or of a child that it waited for."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "status": process.returncode,
        "wall_s": wall_s,
        "cpu_s": used.ru_utime + used.ru_stime,
        # Linux counts in KiB, macOS in bytes.
        "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def limit_cores(count: int) -> None:
    """Leave this process and its children so many of its cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def main(arguments: list[str]) -> int:
    """Returns 0 where the command was run, whatever its own exit status was."""
    result, *options = arguments[: arguments.index("--")]
    if options:
        limit_cores(int(options[1]))
    found = usage_of(arguments[arguments.index("--") + 1 :])
    with open(result, "w", encoding="utf-8") as file:
        json.dump(found, file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
