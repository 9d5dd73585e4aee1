"""Generates munet/v1 from proto/munet/v1, or checks that what is committed is what would be generated.

Usage: python proto/generate.py [--check]
"""

from __future__ import annotations

import importlib.resources
import pathlib
import sys
import tempfile

from grpc_tools import protoc

TOP = pathlib.Path(__file__).resolve().parents[1]
SOURCES = sorted((TOP / "proto").glob("munet/v1/*.proto"))
PACKAGE = pathlib.Path("munet", "v1")


def generate(out: pathlib.Path) -> None:
    """Writes the generated code below a folder.

    Raises:
        SystemExit: a proto file has an error; the compiler has printed it.
    """
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    # The well-known types that the protos import come with the compiler.
    include = importlib.resources.files("grpc_tools") / "_proto"
    sources = [str(source.relative_to(TOP / "proto")) for source in SOURCES]
    if protoc.main(["protoc", f"--proto_path={TOP / 'proto'}", f"--proto_path={include}", *outputs, *sources]) != 0:
        raise SystemExit("the protocol compiler refused a file above")


def read(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns the generated files of a folder by name."""
    return {file.name: file.read_bytes() for pattern in ("*_pb2*.py", "*_pb2*.pyi") for file in sorted(folder.glob(pattern))}


def main() -> None:
    """Generates or checks."""
    if sys.argv[1:] == []:
        generate(TOP)
        return
    if sys.argv[1:] != ["--check"]:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        generate(pathlib.Path(folder))
        fresh, committed = read(pathlib.Path(folder) / PACKAGE), read(TOP / PACKAGE)
    drifted = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    if drifted:
        raise SystemExit(f"found {', '.join(drifted)} in {PACKAGE} other than what proto/ gives; run: make proto")


if __name__ == "__main__":
    main()
