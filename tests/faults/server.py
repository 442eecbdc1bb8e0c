"""Runs `carso` command lines in forked processes, with a fault planted in each.

A process that has imported torch is forked for every command line: what takes seconds is paid for once, and
the child runs the program's own entry point. Requests and answers are lines of JSON on stdin and stdout:

    {"argv": […], "cwd": …, "home": …, "fault": {…}}
    {"status": exit code, or minus the signal, "cpu": seconds, "stdout": …, "stderr": …}

Faults: `signal` with `after` (seconds of processor time); `call` (die before the n-th call that changes
files); `full_call` (from the n-th such call on, the disk is full); `file_limit` with `fatal` (no file may
grow beyond so many bytes: the write fails, or kills in the middle); `unprivileged` (give up root's rights).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any

_CALLS = ("fsync", "replace", "unlink", "ftruncate")
_counted = 0


def main() -> None:
    import matplotlib.figure  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch
    import torch._dynamo
    import torch.distributed.tensor

    import carso_cli.ablation.run
    import carso_cli.evaluation.attack
    import carso_cli.evaluation.rerun_checks
    import carso_cli.training.classifier  # noqa: F401
    from carso_cli.runtime import third_party

    # Forked processes inherit no threads, and torch must not have started any to be forked from.
    torch.set_num_threads(1)
    third_party.prepare()
    answers = os.fdopen(os.dup(1), "w")
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pipes = [_wide_pipe(), _wide_pipe()]
        child = os.fork()
        if child == 0:
            _become(request, [into for _, into in pipes])
        _, status, usage = os.wait4(child, 0)
        answer: dict[str, Any] = {
            "status": os.waitstatus_to_exitcode(status),
            "cpu": usage.ru_utime + usage.ru_stime,
        }
        for name, (out_of, into) in zip(("stdout", "stderr"), pipes, strict=True):
            os.close(into)
            with open(out_of, errors="replace") as stream:
                answer[name] = stream.read()
        print(json.dumps(answer), file=answers, flush=True)


def _wide_pipe() -> tuple[int, int]:
    """Return a pipe that holds whatever a command prints; unlike a file it has no limit of size to meet."""
    out_of, into = os.pipe()
    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 1 << 20)
    return out_of, into


def _become(request: dict[str, Any], outputs: list[int]) -> None:
    """Run the request's command line in this process, and end it."""
    code = 70
    try:
        os.chdir(request["cwd"])
        os.environ["CARSO_HOME"] = request["home"]
        os.environ["COLUMNS"] = "1000"
        for number, into in enumerate(outputs, start=1):
            os.dup2(into, number)
        # The test's own stdin would be read by nobody else.
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["carso", *request["argv"]]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _plant(request["fault"])
        from carso_cli.__main__ import main as carso

        carso()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _plant(fault: dict[str, Any]) -> None:
    if "signal" in fault:
        signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), fault["signal"]))
        signal.setitimer(signal.ITIMER_PROF, fault["after"])
    if "file_limit" in fault:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fault["fatal"] else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["file_limit"], fault["file_limit"]))
    if "call" in fault or "full_call" in fault:
        for name in _CALLS:
            setattr(os, name, _counting(getattr(os, name), fault))
    if fault.get("unprivileged") and os.geteuid() == 0:
        # Without capabilities root meets the same permissions as everyone else.
        header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
        assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0


def _counting(original: Callable[..., Any], fault: dict[str, Any]) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        global _counted
        _counted += 1
        if _counted == fault.get("call"):
            os.kill(os.getpid(), signal.SIGKILL)
        if _counted >= fault.get("full_call", _counted + 1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **options)

    return counted


if __name__ == "__main__":
    main()
