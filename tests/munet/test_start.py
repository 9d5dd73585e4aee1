"""Commands whose packages are missing say so; other errors stay what they are."""

import subprocess
import sys

import pytest

from munet.start import start
from tests.support.processes import TOP, heed_interrupts


@pytest.mark.parametrize(("half", "hidden"), [("evolve", "safetensors"), ("server", "prometheus_client")])
def test_a_missing_package_is_named_with_what_to_install(half: str, hidden: str) -> None:
    code = f"import sys; sys.modules[{hidden!r}] = None; sys.argv = ['munet-{half}', '--help']; import {half}.start; {half}.start.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"error: found no module '{hidden}'; expected the packages of '{half}'; pip install '.[{half}]'\n"


def test_ctrl_c_while_packages_load_is_said_in_one_line() -> None:
    code = (
        "import signal, sys, types; sys.argv = ['munet-evolve', '--help']\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'evolve.cli': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder()); import evolve.start; evolve.start.main()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False, timeout=120, preexec_fn=heed_interrupts)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_module_of_our_own_that_is_missing_is_a_bug() -> None:
    with pytest.raises(ModuleNotFoundError):
        start("evolve.nothing_of_this_name", "evolve")
