import pytest
import typer
import typer.testing

import evolve.cli
import munet
import server.cli


@pytest.mark.parametrize(("app", "begins"), [(server.cli.app, "Serves the tasks"), (evolve.cli.app, "Evolves classification")])
def test_both_say_which_version_they_are_and_what_they_do(app: typer.Typer, begins: str) -> None:
    runner = typer.testing.CliRunner()
    said = runner.invoke(app, ["--version"])
    assert (said.exit_code, said.output) == (0, f"munet {munet.__version__}\n")
    assert begins in runner.invoke(app, ["--help"]).output
    # Nothing but that: a command is asked for all the same.
    assert runner.invoke(app, []).exit_code != 0
