"""How much memory this process and its workers hold, measured while they work."""

import threading

import psutil


class MemoryMonitor:
    """Samples the memory of a process (this one) and of all below it, in the background; use it as a context.

    Args:
        every: seconds between two samples; a shorter peak may be missed.
    """

    def __init__(self, pid: int | None = None, every: float = 1.0) -> None:
        self._pid, self._every, self._peak = pid, every, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def peak(self) -> float:
        """The most memory since the last call, in MB (10^6 bytes); shared pages count once on Linux."""
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
    """Memory of a process (this one) and of all below it, in MB (10^6 bytes)."""
    me = psutil.Process(pid)
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += _held(process)
        except psutil.Error:
            continue  # it has just ended
    return total / 1e6


def free(device: str) -> int:
    """Bytes that can be taken: of the graphics card, or of the machine."""
    if device == "cpu":
        return int(psutil.virtual_memory().available)
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def _held(process: psutil.Process) -> float:
    full = process.memory_full_info()
    return float(getattr(full, "pss", full.rss))
