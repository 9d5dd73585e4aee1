"""Every code block of every page runs: as a stranger would run it, in the order of the page, in one folder for each page."""

from __future__ import annotations

import pathlib
import re
import tomllib
from typing import get_args

import datasets
import huggingface_hub.constants
import pytest
import typer.core
import typer.main

import evolve.cli
import server.cli
from evolve.config import TaskSettings
from evolve.data.torchvision_source import SETS
from tests.support.documentation import (
    Block,
    PageError,
    Stranger,
    blocks,
    find_fault,
    inline_code,
    make_hub_cache,
    pages,
    publish_first_tasks,
    publish_second_tasks,
    replace_numbers,
)
from tests.support.processes import TOP

_SMALL = {
    "blocks = 6 ": "blocks = 1 ",
    "image_size = 96": "image_size = 32",
    "children_per_task = 16": "children_per_task = 2\ngeneration_size = 2",
    "batch_size = 32": "batch_size = 8\nintervals = 1\nbatches_per_interval = 2\nthreads = 1",
}
"""What the pages print, and what would take minutes if it ran so."""

REPLACEMENTS: dict[str, dict[str, str]] = {
    "README.md": _SMALL,
    "docs/first-task.md": {**_SMALL, "blocks = 6\n": "blocks = 1\n"},
    "docs/long-searches.md": {printed: meant for printed, meant in _SMALL.items() if "children" in printed or "batch" in printed},
    "docs/report.md": {
        "children_per_task = 8": "children_per_task = 4",
        "batches_per_interval = 20": "batches_per_interval = 2",
        'script = "GREEK"': 'script = "GREEK"\ntrain_per_class = 4\nmax_classes = 4',
    },
}

PAGES = [page.as_posix() for page in pages()]
STORIES = [page for page in PAGES if blocks((TOP / page).read_text(encoding="utf-8"), page)]


def _read(page: str) -> str:
    return (TOP / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("hub")
    make_hub_cache(folder)
    return folder


def test_the_pages_are_found() -> None:
    known = {"README.md", "CONTRIBUTING.md", "docs/first-task.md", "docs/data.md", "docs/python.md", "model_repository/README.md"}
    assert known | {"evolve/roots/README.md", "docs/decisions/README.md"} <= set(PAGES)
    assert {"README.md", "docs/first-task.md", "docs/data.md", "docs/python.md"} <= set(STORIES)
    assert set(REPLACEMENTS) <= set(STORIES)


def _walk(page: str, folder: pathlib.Path, hub_cache: pathlib.Path, python: pathlib.Path) -> None:
    text = replace_numbers(_read(page), REPLACEMENTS.get(page, {}), page)
    found = blocks(text, page)
    faults = [f"{block.where}: {fault}" for block in found if (fault := find_fault(block))]
    if faults:
        raise PageError("\n".join(faults))
    with Stranger(folder, hub_cache, python) as stranger:
        if page in (
            "docs/triton.md",
            "docs/open-inference.md",
            "docs/operations.md",
            "docs/releases.md",
            "docs/security.md",
            "docs/client.md",
        ):
            # They go on where another page ends, which takes its time.
            publish_first_tasks(folder / "model_repository")
        if page == "docs/releases.md":
            publish_second_tasks(folder / "model_repository")
        for block in found:
            stranger.run(block)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", sorted(STORIES, key=lambda page: -len(_read(page)) * ("```sh" in _read(page))))
def test_the_blocks_of_a_page_run(
    page: str, hub_cache: pathlib.Path, warm_python: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "converted")
    _walk(page, tmp_path / "stranger", hub_cache, warm_python)


# What must not slip through


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```\nmunet-evolve show\n```\n", "found language ''"),
        ("~~~bash\nls\n~~~\n", "found language 'bash'"),
        ("```sh norun\nls\n```\n", "found language 'sh norun'"),
        ("* a list\n\n  ```\n  ls\n  ```\n", "found language ''"),
        ("> ```\n> ls\n> ```\n", "found language ''"),
        ("prose\n\n    ls\n", "without ``` fences"),
        ("<pre>ls</pre>\n", "without ``` fences"),
        ("```text\n$ munet-evolve show --system x\n```\n", "found the command '$ munet-evolve show --system x'"),
        ("```text\npip install munet\n```\n", "found the command"),
        ("```sh\nmunet-server serve\nls\n```\n", "expected a block of its own"),
        ("```sh\ncd elsewhere\n```\n", "leave the shell as it was"),
        ("```sh\n# nothing\n```\n", "found no command"),
        ("```sh\nls\n", None),
        ("```text\n  a --> b\n```\n", None),
    ],
)
def test_a_block_that_no_test_would_run_is_a_fault(text: str, fault: str | None) -> None:
    (block,) = blocks(text, "page.md")
    found = find_fault(block)
    assert (found is None) if fault is None else (found is not None and fault in found)


@pytest.mark.parametrize(
    "block",
    [
        Block("page.md:1", "sh", "true\nfalse\ntrue\n"),
        Block("page.md:1", "sh", "false | true\n"),
        Block("page.md:1", "sh", "munet-evolve shwo --system x\n"),
        Block("page.md:1", "sh", "munet-server serve --repository nowhere\n"),
        Block("page.md:1", "sh", "make dmeo\n"),
        Block("page.md:1", "sh", "pip install 'munet[server]'\n"),
        Block("page.md:1", "sh", "pip install --constraint constraints.txt '.[serve]'\n"),
        Block(
            "page.md:1", "sh", "curl --location --output a https://huggingface.co/timm/vit_none/resolve/main/model.safetensors\n"
        ),
        Block("page.md:1", "python", "import evolve.nothing\n"),
        Block("page.md:1", "json", "{1}\n"),
        Block("page.md:1", "toml", '# experiment.toml\n[[tasks]]\nname = "a"\nsource = "digits"\nlimit = 3\n'),
        Block("page.md:1", "toml", '# server.toml\nlisten = "nowhere"\n'),
    ],
    ids=lambda block: block.text.partition("\n")[0],
)
def test_a_block_that_does_not_work_fails(block: Block, stranger: Stranger) -> None:
    assert find_fault(block) is None
    with pytest.raises(PageError, match="page.md:1"):
        stranger.run(block)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory, hub_cache: pathlib.Path, warm_python: pathlib.Path) -> Stranger:
    folder = tmp_path_factory.mktemp("stranger") / "photographs"
    # Not entered: the servers that it starts end by themselves.
    return Stranger(folder, hub_cache, warm_python)


def test_the_settings_of_a_server_are_settings(stranger: Stranger) -> None:
    stranger.run(Block("page.md:1", "toml", '# server.toml\nlisten = "127.0.0.1:0"\n[engine]\nworkers = 2\n'))
    assert "workers" in (stranger.folder / "server.toml").read_text()


def test_what_is_not_there_once_is_not_replaced() -> None:
    with pytest.raises(PageError, match="'b' 0 times"):
        replace_numbers("a", {"b": "c"}, "page.md")
    with pytest.raises(PageError, match="'a' 2 times"):
        replace_numbers("aa", {"a": "c"}, "page.md")


# What the pages say besides


def test_readme_and_the_first_task_have_one_experiment() -> None:
    experiments = []
    for page in ("README.md", "docs/first-task.md"):
        (printed,) = [block.text for block in blocks(_read(page), page) if block.first_line == "# experiment.toml"]
        experiments.append(tomllib.loads(printed))
    assert experiments[0] == experiments[1]


def test_data_has_a_block_for_every_source() -> None:
    printed = "".join(block.text for block in blocks(_read("docs/data.md"), "docs/data.md") if block.language == "toml")
    kinds = get_args(get_args(TaskSettings)[0])
    assert set(re.findall(r'source = "(\w+)"', printed)) == {
        get_args(kind.model_fields["source"].annotation)[0] for kind in kinds
    }


def test_data_names_every_set_of_torchvision() -> None:
    (sentence,) = re.findall(r"Sets of images with one label each: (.*?)\. Others", " ".join(_read("docs/data.md").split()))
    assert set(re.split(r", | and ", sentence)) == {*SETS, "ImageFolder"}


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_prose_exist(page: str) -> None:
    apps = {"munet-evolve": evolve.cli.app, "munet-server": server.cli.app}
    for code in inline_code(_read(page)):
        words = code.split()
        if words[:1] not in (["munet-evolve"], ["munet-server"]) or len(words) < 2:
            continue
        command, rest = typer.main.get_command(apps[words[0]]), words[1:]
        while rest and isinstance(command, typer.core.TyperGroup):
            assert rest[0] in command.commands, f"{page}: found `{code}`; expected one of {sorted(command.commands)}"
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]} | {"--help"}
        unknown = {word for word in words if word.startswith("--")} - known
        assert not unknown, f"{page}: found {sorted(unknown)} in `{code}`; expected some of {sorted(known)}"
