"""Runs of `python -m engine` in processes of their own that can be killed, with the imports paid once.

As a program: reads one JSON request a line, forks, runs the command in the child, and answers how it ended. No
tensor operation runs before the fork, because threads do not survive one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


class ForkedRuns:
    """The caller's side: a context manager around the program below."""

    def __enter__(self) -> ForkedRuns:
        root = Path(__file__).resolve().parents[1]
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def run(
        self,
        argv: Sequence[object],
        folder: Path,
        operation: int | None = None,
        seconds: float | None = None,
        signal_number: int = signal.SIGKILL,
    ) -> dict[str, Any]:
        """Run a command; the signal comes just before its operation-th file operation in folder, or after seconds.

        Returns exit (status) or signal (number), err (stderr), seconds, and operations: how many there were in folder.
        """
        request = {
            "argv": [str(argument) for argument in argv],
            "folder": str(folder),
            "operation": operation,
            "seconds": seconds,
            "signal": int(signal_number),
            "log": str(folder.with_name(f"{folder.name}.log")),
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def _child(request: dict[str, Any], reader_of_counts: int) -> None:
    from engine.__main__ import main

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in FILE_OPERATIONS and str(arguments[0]).startswith(request["folder"] + os.sep):
            count += 1
            os.write(reader_of_counts, b".")
            if count == request["operation"]:
                os.kill(os.getpid(), request["signal"])

    sys.addaudithook(hook)
    status = main(request["argv"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve() -> None:
    # Before the fork, so that no run pays for them.
    import PIL.Image  # noqa: F401
    import PIL.PngImagePlugin  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch._dynamo  # noqa: F401  (a network on the meta device brings it in)
    import tqdm  # noqa: F401

    import engine.__main__  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        start = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            try:
                _child(request, writing)
            finally:
                os._exit(99)
        os.close(writing)
        if request["seconds"] is not None:
            time.sleep(request["seconds"])
            os.kill(pid, request["signal"])
        operations = 0
        while got := os.read(reading, 4096):
            operations += len(got)
        os.close(reading)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer = {
            "exit": status if status >= 0 else None,
            "signal": -status if status < 0 else None,
            "err": Path(request["log"]).read_text() if Path(request["log"]).exists() else "",
            "seconds": time.perf_counter() - start,
            "operations": operations,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
