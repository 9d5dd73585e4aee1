"""Where training runs, and what makes it repeatable there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from evolve.config import TrainingSettings
from evolve.errors import SettingsError


def resolve_device(settings: TrainingSettings) -> torch.device:
    """Returns the device that the settings ask for.

    Raises:
        SettingsError: CUDA is asked for and not there, or bf16 without CUDA.
    """
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise SettingsError(
            "found device = 'cuda' and no CUDA device", "a GPU that torch can use", "set device = 'auto' or 'cpu'"
        )
    device = torch.device("cuda" if available and settings.device != "cpu" else "cpu")
    if settings.precision == "bf16" and device.type == "cpu":
        raise SettingsError("found precision = 'bf16' on the CPU", "bf16 on CUDA only", "set precision = 'float32'")
    if device.type == "cuda":
        # cuBLAS reads this when it is first used; without it, its results may differ from run to run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns values of the CPU on the device. A GPU takes them when it has come so far: meanwhile the host prepares the next batch.

    Source: CUDA copies only from pinned memory without waiting for what was queued before.
    """
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@contextlib.contextmanager
def repeatable(threads: int) -> Iterator[None]:
    """Makes torch compute the same bits every time within the block, with so many CPU threads; afterwards all is as it was."""
    before_threads = torch.get_num_threads()
    before = torch.get_deterministic_debug_mode()
    before_fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_num_threads(threads)
    # The same as use_deterministic_algorithms(True), which would also import torch's compiler: seconds for what is not used here.
    torch.set_deterministic_debug_mode("error")
    # Nothing here reads memory it has not written; filling it would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set through a module class
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before_threads)
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = before_fill  # type: ignore[attr-defined]
