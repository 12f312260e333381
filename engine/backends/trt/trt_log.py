"""What TensorRT says: one logger for all that a process builds and runs, since a library heeds only the first."""

from __future__ import annotations

import functools
from collections import deque
from typing import Any


def make_log(trt: Any) -> Any:
    """A logger of the module trt: `errors` and `lines` (warnings too) are the last 20, `kernels` what a build made."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what error messages and export.trt.fusion read."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=20)
            self.lines: deque[str] = deque(maxlen=20)
            self.kernels: list[str] = []

        def clear(self) -> None:
            self.errors.clear()
            self.lines.clear()
            self.kernels.clear()

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(msg)
            if severity <= trt.ILogger.Severity.WARNING:
                self.lines.append(msg)
            elif msg.startswith(("Layers:", "Total ")):
                self.kernels += msg.splitlines()

    return Log()


@functools.cache
def process_log(trt: Any) -> Any:
    """The logger of this process."""
    return make_log(trt)
