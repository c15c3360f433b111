"""Memory of this process and its workers, measured in the background."""

import threading

import psutil


class MemoryMonitor:
    """Samples the memory of a process and its children in the background; use it as a context manager.

    Args:
        pid: the process. Default None: this process.
        every: seconds between two samples; shorter peaks may be missed. Default 1.
    """

    def __init__(self, pid: int | None = None, every: float = 1.0) -> None:
        self._pid, self._every, self._peak = pid, every, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def peak(self) -> float:
        """Return the peak memory since the last call, in MB (10^6 bytes); on Linux, shared pages count once."""
        self._peak = max(self._peak, now(self._pid))
        peak, self._peak = self._peak, 0.0
        return peak

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self._peak = max(self._peak, now(self._pid))

    def __enter__(self) -> "MemoryMonitor":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def now(pid: int | None = None) -> float:
    """Return the memory of a process (default: this one) and its children, in MB (10^6 bytes)."""
    me = psutil.Process(pid)
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += _held(process)
        except psutil.Error:
            continue  # the process has ended
    return total / 1e6


def free(device: str) -> int:
    """Return the free memory in bytes: of the GPU, or of the machine if `device` is "cpu"."""
    if device == "cpu":
        return int(psutil.virtual_memory().available)
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def _held(process: psutil.Process) -> float:
    full = process.memory_full_info()
    return float(getattr(full, "pss", full.rss))
