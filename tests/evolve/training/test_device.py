import pytest
import torch

from evolve.config import TrainingSettings
from evolve.errors import SettingsError
from evolve.training.device import repeatable, resolve_device


def test_auto_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(TrainingSettings()).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device(TrainingSettings(precision="bf16")).type == "cuda"
    assert resolve_device(TrainingSettings(device="cpu")).type == "cpu"


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="no CUDA device"):
        resolve_device(TrainingSettings(device="cuda"))
    with pytest.raises(SettingsError, match="bf16"):
        resolve_device(TrainingSettings(precision="bf16"))


def test_repeatable_leaves_torch_as_it_was() -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with repeatable(threads=3):
        assert torch.get_num_threads() == 3
        assert torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ValueError, match="no number"), repeatable(threads=3):
        raise ValueError("no number")
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
