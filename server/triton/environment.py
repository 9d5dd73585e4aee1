"""The environment that the wheel's Triton runs in: a folder of its own, made once, beside the Python environment of the server.

The wheel `nvidia-pytriton` brings a real tritonserver with its Python backend, built against numpy 1: with numpy 2 that backend answers
wrong values without a word. So its packages are kept apart from the server's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator

from munet.files import write_atomically
from server.errors import TritonEnvironmentError

DEFAULT_FOLDER = pathlib.Path(".triton")

REQUIREMENTS = (
    "nvidia-pytriton==0.7.0",
    "numpy==1.26.4",
    "onnxruntime==1.31.1",
    "flatbuffers==25.12.19",
    "packaging==26.3",
    "protobuf==6.33.6",
)
"""All that is installed there: nothing is added by dependencies, most of which only pytriton's Python code would need."""

PYTHON_VERSIONS = ("3.11", "3.12")
"""Those that numpy 1 and the wheel's Python backend were both built for."""

_RECORD = "munet-triton.json"
_UNFINISHED: dict[str, object] = {}
"""What the record holds from the beginning until all is there."""

_BACKEND = pathlib.Path(__file__).parent / "backend" / "model.py"
_ADVICE = "run `make triton` in the checkout, or `munet-server triton install`"


@dataclasses.dataclass(frozen=True)
class TritonEnvironment:
    """What it takes to start the wheel's Triton.

    Attributes:
        folder: absolute path.
        python_version: of its interpreter, such as `3.11`.
        library_folder: where its interpreter's shared library is.
    """

    folder: pathlib.Path
    python_version: str
    library_folder: str

    @property
    def program(self) -> pathlib.Path:
        """The tritonserver to run."""
        return self._packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"

    @property
    def backends(self) -> pathlib.Path:
        """Triton's backend directory: the Python backend, and `onnxruntime` on top of it."""
        return self.folder / "backends"

    def cache_arguments(self, num_bytes: int) -> list[str]:
        """Returns tritonserver's arguments for a cache of so many bytes, which keeps what models answer whose configs allow it."""
        folder = self.program.parents[1] / "caches"
        return [f"--cache-config=local,size={num_bytes}", f"--cache-directory={folder}"]

    @property
    def _packages(self) -> pathlib.Path:
        return self.folder / "lib" / f"python{self.python_version}" / "site-packages"

    def variables(self) -> dict[str, str]:
        """Returns the environment variables that tritonserver and its Python processes run with."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON") and name != "VIRTUAL_ENV"}
        libraries = [str(self._packages / "nvidia_pytriton.libs"), self.library_folder]
        # The processes of the Python backend find their packages by the first Python on the path.
        search = [str(self.folder / "bin"), variables.get("PATH", os.defpath)]
        # As munet.runtime says; set here, segments need not change the environment of a process that has threads already.
        quiet = {"ORT_DISABLE_TELEMETRY": variables.get("ORT_DISABLE_TELEMETRY", "1")}
        return variables | quiet | {"LD_LIBRARY_PATH": os.pathsep.join(libraries), "PATH": os.pathsep.join(search)}

    def refresh(self) -> None:
        """Brings the `onnxruntime` backend to the state of this package, which may be newer than the environment."""
        installed = self.backends / "onnxruntime" / "model.py"
        content = _BACKEND.read_bytes()
        if not installed.exists() or installed.read_bytes() != content:
            write_atomically(installed, content)


def find_environment(folder: pathlib.Path = DEFAULT_FOLDER) -> TritonEnvironment:
    """Returns the environment in a folder.

    Args:
        folder: where `install` made it.

    Raises:
        TritonEnvironmentError: there is none, or one half-made or of other versions.
    """
    try:
        record = json.loads((folder / _RECORD).read_bytes())
        if record == _UNFINISHED:
            raise TritonEnvironmentError(folder, "a half-made environment", "a whole one", _ADVICE)
        requirements = record["requirements"]
        environment = TritonEnvironment(folder.resolve(), record["python_version"], record["library_folder"])
    except (FileNotFoundError, NotADirectoryError):
        found = "a folder of something else" if folder.exists() else "no folder"
        raise TritonEnvironmentError(folder, found, "the environment that Triton runs in", _ADVICE) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TritonEnvironmentError(folder, f"{_RECORD} unreadable ({error!r})", "what `install` writes", _ADVICE) from error
    if requirements != list(REQUIREMENTS):
        raise TritonEnvironmentError(folder, "an environment of other versions", ", ".join(REQUIREMENTS), _ADVICE)
    return environment


def install(folder: pathlib.Path = DEFAULT_FOLDER) -> TritonEnvironment:
    """Makes the environment in a folder, unless it is there already. Needs a package index and some seconds.

    An environment that is half-made or of other versions is made again. Only one process at a time does so; others wait.

    Args:
        folder: where; new, empty, or made by an earlier call.

    Raises:
        TritonEnvironmentError: this machine cannot run the wheel, the folder holds something else, or a package cannot be installed.
    """
    _check_machine(folder)
    with _locked(folder):
        with contextlib.suppress(TritonEnvironmentError):
            return find_environment(folder)
        record = folder / _RECORD
        if not record.exists() and any(folder.iterdir()):
            raise TritonEnvironmentError(folder, "a folder of something else", "a new or empty one", "name another with --into")
        write_atomically(record, json.dumps(_UNFINISHED).encode())
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != record:
                entry.unlink()
        environment = TritonEnvironment(folder.resolve(), _python_version(), str(sysconfig.get_config_var("LIBDIR")))
        _install_packages(environment)
        _copy_backends(environment)
        values = {**dataclasses.asdict(environment), "requirements": REQUIREMENTS}
        del values["folder"]
        write_atomically(record, json.dumps(values, indent=2).encode() + b"\n")
    return find_environment(folder)


def _check_machine(folder: pathlib.Path) -> None:
    version = _python_version()
    if version not in PYTHON_VERSIONS:
        raise TritonEnvironmentError(
            folder,
            f"Python {version}",
            f"Python {' or '.join(PYTHON_VERSIONS)}",
            "make it with one of these: any server can use it",
        )
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        advice = "use a container of Triton, see deploy/triton"
        raise TritonEnvironmentError(folder, f"{sys.platform} on {platform.machine()}", "Linux on x86_64", advice)


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise TritonEnvironmentError(folder, str(error), "a folder to make it in", "name another with --into") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _install_packages(environment: TritonEnvironment) -> None:
    try:
        venv.create(environment.folder, symlinks=True, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        advice = "install this Python's venv and ensurepip (on Debian and Ubuntu: apt install python3-venv)"
        raise TritonEnvironmentError(environment.folder, str(error), "a virtual environment", advice) from error
    log = environment.folder / "install.log"
    command = [str(environment.folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
    with log.open("wb") as stream:
        status = subprocess.run(
            [*command, "--no-deps", *REQUIREMENTS], stdout=stream, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        found = f"pip ended with status {status}:\n{tail}\n"
        raise TritonEnvironmentError(environment.folder, found, ", ".join(REQUIREMENTS), f"see {log}")


def _copy_backends(environment: TritonEnvironment) -> None:
    """Puts together the two backends. Triton looks for the stub where the real file of the library is, so links would not do."""
    source = environment.program.parents[1]
    target = environment.backends / "python"
    target.mkdir(parents=True)
    stub = source / "python_backend_stubs" / environment.python_version / "triton_python_backend_stub"
    for file in (
        *(source / "backends" / "python" / name for name in ("libtriton_python.so", "triton_python_backend_utils.py")),
        stub,
    ):
        shutil.copy2(file, target / file.name)
    environment.refresh()
    tried = subprocess.run([str(target / stub.name)], env=environment.variables(), capture_output=True, text=True, check=False)
    # Without arguments it complains about these. What cannot be loaded says so instead.
    if "arguments" not in tried.stderr:
        name = f"libpython{environment.python_version}"
        advice = f"on Debian and Ubuntu: apt install {name}; or use a Python that was built with --enable-shared"
        raise TritonEnvironmentError(environment.folder, tried.stderr.strip(), f"a shared {name}", advice)
