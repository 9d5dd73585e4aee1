"""The code blocks of the Markdown pages, and a stranger's folder in which they run as printed.

What differs from a stranger's machine: `munet-evolve`, `munet-server` and `python` are those of this checkout; `make`, `pip`, `docker` and
`kubectl` only check that what they are asked for exists; Triton's environment is there already; servers have free ports, wherever a page
or a default says 8500 and 8501, or 8000 and 8001 for Triton; timm finds its weights, random ones, in the hub's cache, and so does `curl`,
which knows no other address than the hub's; and numbers that would take too long are replaced, by a table in the test.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import markdown_it
import markdown_it.token
import numpy as np
import pydantic
import safetensors.torch
import timm
import torch
from PIL import Image, ImageDraw

from evolve.config import Experiment, Settings, load_settings
from evolve.data.load import load_task
from evolve.errors import SettingsError as EvolveSettingsError
from evolve.root import load_root
from evolve.training.pretraining import PretrainingSettings
from server.config import read_settings
from server.errors import SettingsError
from tests.support.ports import lasting_port
from tests.support.processes import TOP, environment
from tests.support.published import pixels, png, write_mnist, write_parquet
from tests.support.repository import RepositoryBuilder, TaskPlan

LANGUAGES = ("sh", "toml", "python", "csv", "json", "text")
"""Languages of blocks that a test knows what to do with."""

COMMANDS = ("munet-evolve", "munet-server", "make", "pip", "curl", "docker", "kubectl", "python", "python3")
"""What shims answer to. A block of `text` must not hold a line that begins with one of them: it would be a command that nobody runs."""

SERVERS = ("munet-server serve", "munet-server triton run")
"""What runs until it is stopped."""

MODEL = "vit_tiny_patch16_224.augreg_in21k"
TIMEOUT_SECONDS = 240
"""How long one block may take, on a machine that does much else."""


class PageError(Exception):
    """A page holds something that does not work, or that no test can run."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One code block.

    Attributes:
        where: page and line.
        language: its info string; empty if it has none, `indented` or `html` if it is no fenced block.
        text: what is in it.
    """

    where: str
    language: str
    text: str

    @property
    def first_line(self) -> str:
        return self.text.partition("\n")[0]

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block that are neither empty nor comments."""
        return [line for line in self.text.splitlines() if line.strip() and not line.startswith("#")]


def pages() -> list[pathlib.Path]:
    """Returns every Markdown page of the checkout, hidden folders aside, relative to it."""
    found = (file.relative_to(TOP) for file in TOP.rglob("*.md"))
    return sorted(page for page in found if not any(part.startswith(".") for part in page.parts))


def _tokens(text: str) -> Iterator[markdown_it.token.Token]:
    for token in markdown_it.MarkdownIt().parse(text):
        yield token
        yield from token.children or ()


def blocks(text: str, page: str) -> list[Block]:
    """Returns the code blocks of a page in their order, whatever they are made with.

    Args:
        text: of the page.
        page: its name, for messages.
    """
    found = []
    for token in _tokens(text):
        where = f"{page}:{token.map[0] + 1}" if token.map else page
        if token.type == "fence":
            found.append(Block(where, token.info.strip(), token.content))
        elif token.type == "code_block":
            found.append(Block(where, "indented", token.content))
        elif token.type == "html_block" and re.search(r"<(pre|code)\b", token.content, re.IGNORECASE):
            found.append(Block(where, "html", token.content))
    return found


def inline_code(text: str) -> list[str]:
    """Returns what stands between backticks in a page's prose."""
    return [token.content for token in _tokens(text) if token.type == "code_inline"]


def find_fault(block: Block) -> str | None:
    """Returns why no test can run a block; None if one does."""
    if block.language in ("indented", "html"):
        return "found a code block without ``` fences; expected a fenced one with a language"
    if block.language not in LANGUAGES:
        return f"found language {block.language!r}; expected one of {LANGUAGES}: `text` for diagrams and output"
    if block.language == "text":
        hidden = [line for line in block.text.splitlines() if line.lstrip(" $>").partition(" ")[0] in COMMANDS]
        return f"found the command {hidden[0]!r} in a block of text; expected it in a block of sh" if hidden else None
    if block.language == "sh":
        return _find_fault_of_shell(block)
    return None


def _find_fault_of_shell(block: Block) -> str | None:
    if not block.commands:
        return "found no command; expected one"
    serving = [line for line in block.commands if line.startswith(SERVERS)]
    if serving and len(block.commands) > 1:
        return f"found {serving[0]!r} among other commands; expected a block of its own: it runs until it is stopped"
    moving = [line for line in block.commands if re.match(r"(cd|export|source|\.)\s", line)]
    return (
        f"found {moving[0]!r}; expected commands that leave the shell as it was: each block runs in a new one" if moving else None
    )


def replace_numbers(text: str, replacements: Mapping[str, str], page: str) -> str:
    """Returns a page with numbers replaced.

    Raises:
        PageError: the page does not hold one of them exactly once.
    """
    for printed, meant in replacements.items():
        if text.count(printed) != 1:
            raise PageError(
                f"{page}: found {printed!r} {text.count(printed)} times; expected it once, to be {meant!r} in the test"
            )
        text = text.replace(printed, meant)
    return text


# A stranger's folder


def make_materials(folder: pathlib.Path) -> None:
    """Makes what the pages begin with: photographs, a table of birds, an array of shapes, sets of torchvision and of the hub."""
    random = np.random.default_rng(0)
    for kind, classes in {"pets": ("cat", "dog", "parrot"), "flowers": ("daisy", "rose", "tulip")}.items():
        for shape, label in enumerate(classes):
            (folder / "images" / kind / label).mkdir(parents=True)
            for number in range(30):
                _photograph(shape, number, random, folder / "images" / kind / label / f"{number:03}.jpg")
    (folder / "birds" / "photos").mkdir(parents=True)
    lines = ["file,label,split"]
    for number in range(12):
        _photograph(number % 2, number, random, folder / "birds" / "photos" / f"{number}.jpg")
        lines.append(f"{number}.jpg,{('sparrow', 'wren')[number % 2]},{('train', 'validation', 'test')[number // 4]}")
    (folder / "birds" / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    images = random.integers(0, 256, (90, 4, 4, 3), dtype=np.uint8)
    np.savez_compressed(folder / "shapes.npz", images=images, labels=np.arange(90) % 2)
    write_mnist(folder / "torchvision", [number % 10 for number in range(300)], [number % 10 for number in range(30)])
    for split, seed in (("train", 1), ("validation", 2)):
        encoded = [png(image) for image in pixels(60, 7, 8, 3, seed=seed)]
        file = folder / "hub" / "minerals" / "data" / f"{split}-00000-of-00001.parquet"
        write_parquet(file, encoded, [number % 3 for number in range(60)], ("agate", "beryl", "quartz"))


def _photograph(shape: int, number: int, random: np.random.Generator, file: pathlib.Path) -> None:
    """Draws a shape on noise; sizes differ, every fifth image lies on its side and says so in its EXIF data."""
    width, height = (60, 45) if number % 2 else (48, 64)
    noise = random.integers(0, 120, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    draw = ImageDraw.Draw(image)
    colour = tuple(int(value) for value in random.integers(120, 256, 3))
    box = (10, 10, 38, 38)
    if shape == 0:
        draw.rectangle(box, fill=colour)
    elif shape == 1:
        draw.ellipse(box, fill=colour)
    else:
        draw.polygon(((10, 38), (38, 38), (24, 10)), fill=colour)
    exif = Image.Exif()
    if number % 5 == 0:
        exif[0x0112] = 6
        image = image.transpose(Image.Transpose.ROTATE_90)
    image.save(file, exif=exif)


def publish_first_tasks(repository: pathlib.Path) -> None:
    """Publishes what docs/first-task.md publishes, as far as a client can tell."""
    labels = {"pets": ("cat", "dog", "parrot"), "flowers": ("daisy", "rose", "tulip")}
    route = ("stem:8:a", "block:trunk")
    RepositoryBuilder(repository).publish({task: TaskPlan((*route, f"head:{task}:3"), names) for task, names in labels.items()})


def publish_second_tasks(repository: pathlib.Path) -> None:
    """Publishes a generation in which `pets` is another path, and leaves CURRENT as it is."""
    builder = RepositoryBuilder(repository)
    labels = {task.name: tuple(task.labels) for task in builder.read_manifest(builder.newest()).tasks}
    block = {"pets": "block:clone", "flowers": "block:trunk"}
    plans = {task: TaskPlan(("stem:8:a", block[task], f"head:{task}:3"), names) for task, names in labels.items()}
    builder.publish(plans, current=False)


def make_hub_cache(folder: pathlib.Path) -> None:
    """Writes random weights as timm's downloads lie in the hub's cache."""
    torch.manual_seed(0)
    model: Any = timm.create_model(MODEL, pretrained=False)
    revision = "0" * 40
    repository = folder / f"models--timm--{MODEL}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots" / revision).mkdir(parents=True)
    safetensors.torch.save_file(model.state_dict(), repository / "snapshots" / revision / "model.safetensors")


_SHIM = """#!{python}
import os, sys
told = {{"127.0.0.1:8500": {server!r}, "127.0.0.1:8501": {admin!r}, "127.0.0.1:8001": {triton!r}}}
arguments = [told.get(argument, argument) for argument in sys.argv[1:]]
defaults = {{
    "serve": ["--listen", {server!r}, "--admin-listen", {admin!r}],
    "classify": ["--server", {server!r}],
    "status": ["--admin", {admin!r}],
    "reload": ["--admin", {admin!r}],
    "rollback": ["--admin", {admin!r}],
    "drain": ["--admin", {admin!r}],
    "watch": ["--server", {server!r}],
    "top": ["--admin", {admin!r}],
}}
if {module!r} == "server.cli" and arguments:
    arguments[1:1] = defaults.get(arguments[0], [])
if {module!r} == "server.cli" and arguments[:2] == ["triton", "run"]:
    arguments[2:2] = ["--grpc", {triton!r}, "--http", {triton_http!r}]
os.execv({python!r}, [{python!r}, "-m", {module!r}, *arguments])
"""

_MAKE_SHIM = """#!/bin/sh
exec {make} --dry-run --directory {top} "$@"
"""

_PIP_SHIM = """#!{python}
import pathlib, re, sys, tomllib
top = pathlib.Path({top!r})
extras = tomllib.loads((top / "pyproject.toml").read_text())["project"]["optional-dependencies"]
match sys.argv[1:]:
    case ["install", "--constraint", constraints, what]:
        found = re.fullmatch(r"\\.\\[([a-z,]+)\\]", what)
        unknown = set(found[1].split(",")) - set(extras) if found else what
        if unknown or not (top / constraints).is_file():
            sys.exit(f"found {{unknown or constraints}}; expected '.[EXTRA]' with extras of pyproject.toml, and its constraints")
    case arguments:
        sys.exit(f"found pip {{arguments}}; expected an installation of the checkout with its constraints")
"""

_CURL_SHIM = """#!{python}
import pathlib, re, shutil, sys
match sys.argv[1:]:
    case ["--location", "--output", output, address]:
        found = re.fullmatch(r"https://huggingface\\.co/timm/([^/]+)/resolve/main/([^/]+)", address)
        snapshots = pathlib.Path({cache!r}) / f"models--timm--{{found[1]}}" / "snapshots" if found else pathlib.Path("nowhere")
        files = list(snapshots.glob(f"*/{{found[2]}}")) if found else []
        if len(files) != 1:
            sys.exit(f"found {{address}}; expected the address that timm itself downloads from")
        shutil.copyfile(files[0], output)
    case arguments:
        sys.exit(f"found curl {{arguments}}; expected --location --output FILE ADDRESS")
"""

_DOCKER_SHIM = """#!{python}
import re, subprocess, sys
from server.triton.container import CONTAINER
from tests.support.triton import environment
if CONTAINER not in sys.argv:
    sys.exit(f"found docker {{sys.argv[1:]}}; expected {{CONTAINER}}")
program, *arguments = sys.argv[sys.argv.index(CONTAINER) + 1 :]
triton = environment()
usage = subprocess.run([triton.program, "--help"], env=triton.variables(), capture_output=True, text=True).stderr
unknown = {{argument.partition("=")[0] for argument in arguments}} - set(re.findall(r"--[a-z-]+", usage))
if program != "tritonserver" or unknown:
    sys.exit(f"found {{unknown or program}}; expected tritonserver and options that it has")
"""

_KUBECTL_SHIM = """#!{python}
import pathlib, sys, yaml
match sys.argv[1:]:
    case ["apply", "--filename", file] if (pathlib.Path({top!r}) / file).is_file():
        list(yaml.safe_load_all((pathlib.Path({top!r}) / file).read_text()))
    case arguments:
        sys.exit(f"found kubectl {{arguments}}; expected apply --filename FILE with a file of the checkout")
"""


class Stranger:
    """A folder with images, the commands on PATH, and the servers that were started there; leaving the block stops them.

    Attributes:
        folder: where everything runs.
        output: what shell and Python blocks printed, one entry each.
    """

    def __init__(self, folder: pathlib.Path, hub_cache: pathlib.Path, python: pathlib.Path) -> None:
        """Makes the folder.

        Args:
            folder: to be made.
            hub_cache: what `make_hub_cache` wrote.
            python: what runs munet-evolve and blocks of Python.
        """
        folder.mkdir()
        self.folder = folder
        self._python = python
        self.output: list[str] = []
        self._servers: list[subprocess.Popen[bytes]] = []
        self._server, self._admin, self._triton, triton_http = (f"127.0.0.1:{lasting_port()}" for _ in range(4))
        make_materials(folder)
        (folder / ".triton").symlink_to(TOP / ".triton")
        commands = folder.parent / f"{folder.name}-commands"
        commands.mkdir()
        values = {"python": sys.executable, "server": self._server, "admin": self._admin, "top": str(TOP)}
        values |= {"triton": self._triton, "triton_http": triton_http}
        self._shim(commands / "munet-evolve", _SHIM.format(module="evolve.cli", **values | {"python": str(python)}))
        self._shim(commands / "munet-server", _SHIM.format(module="server.cli", **values))
        self._shim(commands / "make", _MAKE_SHIM.format(make="/usr/bin/make", top=shlex.quote(str(TOP))))
        self._shim(commands / "pip", _PIP_SHIM.format(**values))
        self._shim(commands / "curl", _CURL_SHIM.format(cache=str(hub_cache), **values))
        self._shim(commands / "docker", _DOCKER_SHIM.format(**values))
        self._shim(commands / "kubectl", _KUBECTL_SHIM.format(**values))
        for name in ("python", "python3"):
            (commands / name).symlink_to(sys.executable)
        self._environment = {
            **environment(),
            "PATH": f"{commands}:/usr/bin:/bin",
            "HF_HUB_CACHE": str(hub_cache),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "2",
        }

    @staticmethod
    def _shim(file: pathlib.Path, text: str) -> None:
        file.write_text(text, encoding="utf-8")
        file.chmod(0o755)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._servers:
            process.send_signal(signal.SIGTERM)
        statuses = []
        for process in self._servers:
            try:
                statuses.append(process.wait(timeout=120))
            except subprocess.TimeoutExpired:
                process.kill()
                statuses.append(process.wait())
        if any(statuses):
            raise PageError(f"found servers that ended with statuses {statuses}; expected 0 after SIGTERM")

    def run(self, block: Block) -> None:
        """Does what a stranger does with a block of any language.

        Raises:
            PageError: it does not work.
        """
        {
            "sh": self._run_shell,
            "toml": self._write_settings,
            "python": self._run_python,
            "csv": self._load_table,
            "json": self._load_json,
            "text": lambda _: None,
        }[block.language](block)

    # Shell and Python

    def _run_shell(self, block: Block) -> None:
        if block.commands[0].startswith(SERVERS):
            self._serve(block)
        else:
            self._run_process(block, ["bash", "-euo", "pipefail", "-c", block.text])

    def _run_python(self, block: Block) -> None:
        text = block.text.replace("127.0.0.1:8500", self._server).replace("127.0.0.1:8501", self._admin)
        text = text.replace("127.0.0.1:8001", self._triton)
        self._run_process(block, [str(self._python), "-c", text])

    def _run_process(self, block: Block, command: Sequence[str]) -> None:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        if done.returncode:
            raise PageError(f"{block.where}: found exit status {done.returncode}; expected 0\n{block.text}\n{done.stdout}")
        self.output.append(done.stdout)

    def _serve(self, block: Block) -> None:
        """Starts a server as in a terminal of its own, and waits until it says that it answers."""
        log = self.folder.parent / f"{self.folder.name}-server-{len(self._servers)}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {block.commands[0]}"],
                cwd=self.folder,
                env=self._environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        self._servers.append(process)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while "serving generation" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise PageError(f"{block.where}: found no server that answers\n{block.text}\n{log.read_text()}")
            time.sleep(0.05)

    # Settings and data

    def _write_settings(self, block: Block) -> None:
        """Writes, extends or changes the file that a block's first line names, and loads it; or loads the tasks of one without."""
        found = re.fullmatch(r"# (added to |in |)([\w.-]+\.toml)( instead|)", block.first_line)
        if found is None:
            self._load_tasks(block)
        elif found[1] == "in " and found[3]:
            self._load_alternative(block, self.folder / found[2])
        elif found[1] == "added to ":
            with (self.folder / found[2]).open("a", encoding="utf-8") as file:
                file.write(f"\n{block.text}")
            _load_any(self.folder / found[2], block)
        elif found[1] or found[3]:
            raise PageError(
                f"{block.where}: found {block.first_line!r}; expected `# FILE`, `# added to FILE` or `# in FILE instead`"
            )
        else:
            (self.folder / found[2]).write_text(block.text, encoding="utf-8")
            _load_any(self.folder / found[2], block)

    def _load_alternative(self, block: Block, file: pathlib.Path) -> None:
        """Loads settings with some tables replaced, and the root that they name: layer by layer it must be the one they replace."""
        printed = tomllib.loads(file.read_text(encoding="utf-8"))
        try:
            settings = Experiment.model_validate(printed | tomllib.loads(block.text))
        except pydantic.ValidationError as error:
            raise PageError(f"{block.where}: {error}") from error
        before = load_root(Experiment.model_validate(printed).root)
        root = settings.root
        after = load_root(root if root.file is None else root.model_copy(update={"file": self.folder / root.file}))
        for position in before.layers.keys() & after.layers.keys():
            here, there = before.layers[position][1], after.layers[position][1]
            if here.keys() != there.keys() or any(here[name].tobytes() != there[name].tobytes() for name in here):
                raise PageError(f"{block.where}: found another root than in {file.name}, at {position}")

    def _load_tasks(self, block: Block) -> None:
        file = self.folder / "tasks-of-a-page.toml"
        file.write_text(block.text, encoding="utf-8")
        for task in load_settings(file, Experiment).tasks:
            data = load_task(task)
            if not (len(data.train) >= len(data.labels) >= 2 and len(data.validation)):
                raise PageError(f"{block.where}: found {len(data.train)} images of {len(data.labels)} classes for {task.name}")

    def _load_table(self, block: Block) -> None:
        """Loads the images that a table of a page lists."""
        table = self.folder / "table-of-a-page"
        table.mkdir(exist_ok=True)
        for number, line in enumerate(block.text.splitlines()[1:]):
            _photograph(0, number, np.random.default_rng(number), table / line.partition(",")[0])
        (table / "labels.csv").write_text(block.text, encoding="utf-8")
        self._load_tasks(
            Block(block.where, "toml", '[[tasks]]\nname = "table"\nsource = "csv"\nfile = "table-of-a-page/labels.csv"\n')
        )

    @staticmethod
    def _load_json(block: Block) -> None:
        try:
            json.loads(block.text)
        except ValueError as error:
            raise PageError(f"{block.where}: {error}") from error


def _load_any(file: pathlib.Path, block: Block) -> None:
    """Loads settings of whichever kind they are."""
    findings = []
    kinds: tuple[type[Settings], ...] = (Experiment, PretrainingSettings)
    for kind in kinds:
        try:
            load_settings(file, kind)
        except EvolveSettingsError as error:
            findings.append(str(error))
        else:
            return
    try:
        read_settings(file, {})
    except SettingsError as error:
        raise PageError(f"{block.where}: found no settings of any kind:\n" + "\n".join([*findings, str(error)])) from error
