"""Peak memory: of a whole training, and of one pass, above what was in use before it.

On a GPU it is what the caching allocator says. On a CPU it is the peak of resident memory. That of a pass is measured
in a fresh process: in one that has run other passes, the heap still holds pages that a pass then takes without being
seen. Linux alone lets a process reset its peak; elsewhere there is no figure of a pass, which is better than a wrong
one.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from modeling_adala.errors import AdaLAError

from .timing import wait_for


def peak_of(prepare: Callable[..., Callable[[], Any]], *args: Any, device: torch.device | str = "cpu") -> int | None:
    """Return the peak memory of a pass in bytes, above what is in use before it.

    Args:
        prepare (`Callable`): Function of a module, called with `args` (which can be pickled). Returns the pass, which
            has had what warm-up it needs.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where it runs.

    Returns:
        `int` or `None`: `None` where it cannot be measured (a CPU under another system than Linux).

    Raises:
        AdaLAError: If the process dies, which is what running out of memory looks like.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return peak_above(prepare(*args), device)
    if not sys.platform.startswith("linux"):
        return None
    # the server imports the module once; each of its children is as fresh as a new process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([prepare.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_peak_in_process, torch.get_num_threads(), prepare, *args).result()
        except BrokenProcessPool:
            raise AdaLAError("the process that measures memory was killed, most likely for want of memory.") from None


def peak_above(run: Callable[[], Any], device: torch.device) -> int | None:
    """Return the most bytes in use while `run` runs, above those before it; `None` where the peak cannot be reset."""
    wait_for(device)
    if not reset_peak_memory(device):
        return None
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")
    result = run()  # held, as its caller would hold it
    wait_for(device)
    peak = peak_memory(device)
    del result
    return None if peak is None or before is None else max(peak - before, 0)


def reset_peak_memory(device: torch.device) -> bool:
    """Start a new measurement of `peak_memory`, and return whether the system allows that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    except OSError:  # not Linux, or a container that forbids it
        return False
    return True


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes in use since `reset_peak_memory`, or else since the process began.

    On a GPU, what tensors took of its memory; on a CPU, resident memory, without that of data loader workers. `None`
    where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _status("VmHWM")
    if peak is not None or sys.platform == "win32":
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _peak_in_process(threads: int, prepare: Callable[..., Callable[[], Any]], *args: Any) -> int | None:
    torch.set_num_threads(threads)
    run = prepare(*args)
    gc.collect()
    # gives free pages of the heap back, which a pass would otherwise fill unseen; only glibc has it
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return peak_above(run, torch.device("cpu"))


def _status(name: str) -> int | None:
    """Return a size in /proc/self/status, in bytes."""
    found = None
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return None if found is None else 1024 * int(found[1])
