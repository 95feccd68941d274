"""Peak memory of one pass, above what was in use before it: the model's weights and the inputs do not count.

On a GPU it is what the caching allocator says. On a CPU it is the peak of resident memory, measured in a fresh process
per case: in one that has run other cases, the heap still holds pages that a pass then takes without being seen. Linux
alone lets a process reset that peak after loading; elsewhere there is no figure, which is better than a wrong one.
"""

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

_PRELOADED = ["vit_adala.benchmark.subjects"]
_RESET_PEAK = "5"  # what /proc/PID/clear_refs takes for it, see proc(5)


def peak_of(prepare: Callable[..., Callable[[], Any]], *args: Any, device: torch.device | str = "cpu") -> int | None:
    """Peak memory of a pass in bytes, above what is in use before it.

    Args:
        prepare (`Callable`): Function of a module, called with `args` (which can be pickled). Returns the pass, which
            has had what warm-up it needs.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`).

    Returns:
        `int` or `None`: `None` where it cannot be measured (a CPU under another system than Linux).

    Raises:
        AdaLAError: if the process dies, which is what running out of memory looks like.
    """
    if torch.device(device).type == "cuda":
        return _cuda_peak(prepare(*args), device)
    if not sys.platform.startswith("linux"):
        return None
    # the server imports our code once; each of its children is as fresh as a new process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_resident_peak, torch.get_num_threads(), prepare, *args).result()
        except BrokenProcessPool:
            raise AdaLAError("the process that measures memory was killed, most likely for want of memory.") from None


def _cuda_peak(run: Callable[[], Any], device: torch.device | str) -> int:
    wait_for(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    wait_for(device)
    return torch.cuda.max_memory_allocated(device) - before


def _resident_peak(threads: int, prepare: Callable[..., Callable[[], Any]], *args: Any) -> int | None:
    """In the fresh process."""
    torch.set_num_threads(threads)
    run = prepare(*args)
    gc.collect()
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:  # a container may forbid it
        return None
    before = _status("VmRSS")
    result = run()  # held, as whoever asked for it would
    peak = _status("VmHWM") - before
    del result
    return max(peak, 0)


def _trim() -> None:
    """Gives free pages of the heap back, which a pass would otherwise fill unseen. Only glibc has it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    """A size in /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
