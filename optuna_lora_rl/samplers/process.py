"""Which process runs a trial, and whether it still does: told by no clock that anybody can set."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil


def here() -> dict[str, Any]:
    """What tells this process from all others, as plain values that can be stored."""
    return {**machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_here(said: Mapping[str, Any]) -> bool:
    """Whether ``said``, which :func:`here` gave once, is this process."""
    return (said["pid"], said["started"]) == (os.getpid(), _started(os.getpid()))


def is_gone(said: Mapping[str, Any]) -> bool | None:
    """Whether a process has ended, or None where nobody here can know.

    Args:
        said: as :func:`here` gave it in that process.
    """
    now = machine()
    if said["host"] != now["host"]:
        return None
    if said["boot"] != now["boot"]:
        # The machine was started again, unless it is another one of that name.
        return True if said["machine"] and said["machine"] == now["machine"] else None
    if said["namespace"] != now["namespace"]:
        # Another container, whose processes are not seen from here.
        return None
    # A process number may have been given to another process since.
    return _started(said["pid"]) != said["started"]


@cache
def machine() -> dict[str, Any]:
    """What tells this machine, and this start of it, from others."""
    return {
        "host": socket.gethostname(),
        # Hosts that are called the same are told apart by it.
        "machine": _line("/etc/machine-id"),
        # The kernel draws it at every start.
        "boot": _line("/proc/sys/kernel/random/boot_id"),
        "namespace": _process_namespace(),
    }


def _process_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _started(pid: int) -> float | None:
    """When a process began, or None when it has ended."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if not psutil.LINUX:
            return process.create_time()
    except psutil.Error:
        return None
    # In ticks since the machine's start: psutil adds that start by the wall clock, which moves.
    stat = _line(f"/proc/{pid}/stat")
    return float(stat.rpartition(")")[2].split()[19]) if stat else None


def _line(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
