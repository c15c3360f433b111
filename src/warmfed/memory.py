"""How much memory this process and its workers hold, measured while they work."""

import threading

import psutil

_EVERY = 1.0


class Meter:
    """Samples the memory of this process and of all below it, in the background; use it as a context."""

    def __init__(self) -> None:
        self._peak = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def lap(self) -> float:
        """The most memory since the last call, in MB (10^6 bytes); shared pages count once on Linux."""
        self._peak = max(self._peak, now())
        peak, self._peak = self._peak, 0.0
        return peak

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY):
            self._peak = max(self._peak, now())

    def __enter__(self) -> "Meter":
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
