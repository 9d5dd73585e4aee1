from __future__ import annotations

import pathlib

import pydantic
import pytest

from server.config import EngineSettings, Limits, ServerSettings, num_usable_cpus, read_settings
from server.errors import SettingsError


def test_flags_override_the_file_by_name(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('listen = "0.0.0.0:9000"\ngrace_seconds = 3\n[limits]\nmax_images = 7\n[engine]\nthreads = 2\n')
    settings = read_settings(file, {"grace_seconds": 4.0, "engine.threads": 3, "admin_listen": None})
    assert settings.listen == "0.0.0.0:9000"
    assert settings.grace_seconds == 4.0
    assert settings.limits.max_images == 7
    assert settings.engine.num_threads == 3
    assert settings.admin_listen == "127.0.0.1:8501"


def test_zero_means_as_many_as_there_are_cpus() -> None:
    assert ServerSettings().num_decode_threads == num_usable_cpus()
    assert EngineSettings(threads=0).num_threads == num_usable_cpus()
    assert EngineSettings(threads=0).num_workers == 1
    assert EngineSettings(threads=1).num_workers == num_usable_cpus()


def test_a_gpu_has_two_workers_however_many_cpus_there_are() -> None:
    assert EngineSettings(device="cuda").num_workers == 2
    assert EngineSettings(device="cuda", workers=5).num_workers == 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('lissten = "x"', "lissten: found 'x', expected no such key; the keys here are admin_listen"),
        (
            "[limits]\nmax_image = 1",
            "limits.max_image: found 1, expected no such key; the keys here are idle_stream_seconds, max_",
        ),
        ("[limits]\nmax_images = 0", "limits.max_images: found 0, expected a whole number of at least 1"),
        ('[limits]\nmax_images = "3"', "limits.max_images: found '3', expected a whole number of at least 1"),
        ("[limits]\nmax_message_bytes = 1", "limits.max_message_bytes: found 1, expected a whole number from 4096 to 2147483647"),
        ("limits = 3", "limits: found 3, expected a table"),
        ("[connections]\nmax = 1", "connections.max: found 1, expected no such key; the keys here are handshake_seconds"),
        ("[connections]\nmax_metadata_bytes = 1", "connections.max_metadata_bytes: found 1, expected a whole number from 1024"),
        ('[tls]\ncertificate = "a"', "tls.certificate: found 'a', expected no such key; the keys here are admin_client_ca_file"),
        ("[tokens]\nfile = 3", "tokens.file: found 3, expected a path"),
        ('require_signature = "key.pub"', "require_signature: found 'key.pub', expected a list"),
        ('listen = "nowhere"', "listen: found 'nowhere', expected HOST:PORT"),
        ('listen = "127.0.0.1:99999"', "listen: found '127.0.0.1:99999', expected HOST:PORT"),
        ('engine.device = "tpu"', "engine.device: found 'tpu', expected 'cpu'"),
        ("engine.threads = 513", "engine.threads: found 513, expected a whole number from 0 to 512"),
        ("engine.workers = -1", "engine.workers: found -1, expected a whole number from 0 to 512"),
        (
            "engine.memory_limit_bytes = 0",
            "engine.memory_limit_bytes: found 0, expected a number of bytes of at least 1, or text such",
        ),
        ("engine.memory_limit_bytes = true", "engine.memory_limit_bytes: found True, expected a number of bytes"),
        ('engine.memory_limit_bytes = "2 GX"', "engine.memory_limit_bytes: found '2 GX', expected a number of bytes"),
        ('engine.memory_limit_bytes = "0.1B"', "engine.memory_limit_bytes: found '0.1B', expected a number of bytes"),
        ("decode_threads = true", "decode_threads: found True, expected a whole number from 0 to 512"),
        ("watch_interval_seconds = 0", "watch_interval_seconds: found 0, expected a number above 0"),
        ("grace_seconds = -1", "grace_seconds: found -1, expected a number of at least 0"),
        ("drain_seconds = inf", "drain_seconds: found inf, expected a number of at least 0"),
        (
            "[task_limits.digits]\nmax = 1",
            "task_limits.digits.max: found 1, expected no such key; the keys here are max_images_in_flight",
        ),
        (
            "[task_limits.digits]\nmax_images_per_second = 0",
            "task_limits.digits.max_images_per_second: found 0, expected a number above 0",
        ),
        ("[task_limits.Digits]\n", "task name 'Digits' is not allowed"),
        ('log.format = "xml"', "log.format: found 'xml', expected 'text' or 'json'"),
        ("[metrics]\ntasks = 1", "metrics.tasks: found 1, expected no such key; the keys here are max_segments, max_tasks"),
        ('tracing.otlp_endpoint = "collector:4318"', "tracing.otlp_endpoint: found 'collector:4318', expected a URL such as"),
        ('tracing.otlp_endpoint = "http://[::1"', "tracing.otlp_endpoint: found 'http://[::1', expected a URL such as"),
        ("not toml", "settings file"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path: pathlib.Path, content: str, words: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(content)
    with pytest.raises(SettingsError) as caught:
        read_settings(file, {})
    assert words in str(caught.value)


def test_a_missing_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(SettingsError, match="settings file"):
        read_settings(tmp_path / "none.toml", {})


def test_settings_are_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        Limits().max_images = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("told", "num_bytes"),
    [(1000, 1000), ("2GiB", 2**31), ("1.5 MiB", 3 * 2**19), ("500MB", 500_000_000), ("3kb", 3000), ("1T", None), ("7B", 7)],
)
def test_a_limit_of_memory_is_said_in_bytes_or_with_a_unit(told: object, num_bytes: int | None) -> None:
    if num_bytes is None:
        with pytest.raises(SettingsError):
            read_settings(None, {"engine.memory_limit_bytes": told})
    else:
        assert read_settings(None, {"engine.memory_limit_bytes": told}).engine.memory_limit_bytes == num_bytes


def test_a_batch_is_bounded_by_a_cores_cache_on_a_cpu_alone() -> None:
    assert EngineSettings().max_rows(150 * 1024) == 3
    assert EngineSettings().max_rows(10**9) == 1
    assert EngineSettings().max_rows(1) == EngineSettings().max_batch_rows
    assert EngineSettings(device="cuda").max_rows(10**9) == EngineSettings().max_batch_rows
    assert EngineSettings(device="cuda", max_batch_bytes=1000).max_rows(300) == 3
