"""What the server does on a GPU: which provider it gets, whether it answers what torch answers, what crosses between host and device.

    python benchmarks/gpu/serve_cuda.py [--device cuda] [--small] [--images 2000]

Builds a system of random weights (ViT-S/16 at 224 px with 12 blocks; two tasks with a head only, one with a cloned block in the middle,
one with an adapter), exports it in float32 and float16, loads both generations into one embedded engine and prints JSON lines. A task's
head holds the mean features of a few patterns, so that its classes are as clear as a trained task's. The last line sums up; the exit
status is 1 if a claim fails. A claim that could not be looked at is null and named under `unproven`.

Claims: every session runs on the device; the golden answers are right; logits are torch's within the tolerances of `munet.parity`, torch
computing in float32 on the CPU; float16 puts the same class first on 99.9 % of the images, torch computing in float32 on the device;
the same question twice differs by at most 1e-5; between segments nothing goes up or comes down, by the engine's counters, and by what
the GPU itself reports to torch.profiler.

Needs: `munet[server,cuda,evolve]`, so torch, timm, onnx, onnxscript, onnxruntime-gpu with CUDA's libraries, tritonclient and the small
packages of pyproject.toml. `serve_cuda.sh` installs wheels brought along and runs it. With --device cpu the same code runs on the CPU, with
the carrier of a device; --small makes it a matter of a minute. Most of the time goes into exporting.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# Before onnxruntime: it loads CUDA's libraries, and both are to use the same.
import torch  # isort: skip
from evolve.documents import TaskRecord
from evolve.export.publish import export_system
from evolve.hyperparameters import Hyperparameters
from evolve.layer import HEAD, Layer, LayerKind, LayerSpec, Position, block_position
from evolve.path import Path, PlacedLayer, ordered_positions
from evolve.position_embedding import position_embedding_spec
from evolve.specs import adapter_spec, head_spec
from evolve.store import System
from evolve.vit import build_module, build_path, reference_logits, run_layers
from munet.parity import find_disagreement, gaps, tolerance_of
from munet.runtime import onnxruntime
from server.config import EngineSettings
from server.embedded.carriers import DeviceCarrier, carrier_of
from server.embedded.engine import EmbeddedEngine
from server.embedded.sessions import PROVIDER_OPTIONS, PROVIDERS
from server.engine import Question
from server.generation import Generation
from server.rehearsal import rehearse
from server.repository import Repository

Pixels = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]

NUM_CLASSES = 8
ADAPTER_WIDTH = 16
SAME_TWICE = 1e-5
FEWEST_FOR_999 = 1000


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model and how much is asked of it."""

    width: int
    heads: int
    blocks: int
    patch: int
    image: int
    parity_images: int
    publisher_images: int
    questions: int

    @property
    def name(self) -> str:
        """The model in words."""
        return f"ViT of {self.blocks} blocks, width {self.width}, patch {self.patch}, {self.image} px, random weights"


FULL = Sizes(width=384, heads=6, blocks=12, patch=16, image=224, parity_images=32, publisher_images=64, questions=512)
SMALL = Sizes(width=64, heads=2, blocks=3, patch=16, image=32, parity_images=32, publisher_images=64, questions=64)


class Report:
    """Prints what is found and remembers which claims held."""

    def __init__(self) -> None:
        self.claims: dict[str, dict[str, Any]] = {}

    def line(self, **values: Any) -> None:
        """Prints a line."""
        print(json.dumps(values), flush=True)

    def claim(self, name: str, value: Any, target: str, met: bool | None) -> None:
        """Prints a claim and keeps it; none means that it could not be looked at."""
        self.claims[name] = {"value": value, "target": target, "met": met}
        self.line(claim=name, **self.claims[name])

    def summarise(self, **about: Any) -> int:
        """Prints the last line and returns the exit status."""
        failed = [name for name, claim in self.claims.items() if claim["met"] is False]
        unproven = [name for name, claim in self.claims.items() if claim["met"] is None]
        self.line(summary=self.claims, failed=failed, unproven=unproven, **about)
        return 1 if failed or not self.claims else 0


# The system


def draw(spec: LayerSpec, random: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
    """Returns random weights that keep hidden states at their size and let them depend on the image."""
    tensors = {}
    for name, tensor in build_module(spec, None).state_dict().items():
        values = random.standard_normal(tensor.shape) / np.sqrt(np.prod(tensor.shape[1:], dtype=float))
        if tensor.ndim == 1:
            values *= 0.1
        if "norm" in f"{spec.kind}.{name}" and name.endswith("weight"):
            values += 1
        tensors[name] = values.astype(np.float32)
    return tensors


def make_images(sizes: Sizes, count: int, seed: int) -> tuple[Pixels, npt.NDArray[np.int64]]:
    """Returns images of `NUM_CLASSES` coarse coloured patterns with noise, and which pattern each is."""
    patterns = np.random.default_rng(0).integers(0, 256, (NUM_CLASSES, 4, 4, 3))
    cell = sizes.image // 4
    coarse = patterns.repeat(cell, axis=1).repeat(cell, axis=2)
    random = np.random.default_rng(seed)
    classes = random.integers(0, NUM_CLASSES, count)
    noise = random.normal(0, 20, (count, sizes.image, sizes.image, 3))
    return (coarse[classes] + noise).clip(0, 255).astype(np.uint8), classes


def build_system(folder: pathlib.Path, sizes: Sizes) -> System:
    """Makes the system of random weights with its four tasks."""
    random = np.random.default_rng(0)
    grid = sizes.image // sizes.patch
    block = LayerSpec.of(
        LayerKind.BLOCK,
        width=sizes.width,
        heads=sizes.heads,
        mlp_width=4 * sizes.width,
        activation="gelu",
        qkv_bias=True,
        layer_scale=False,
        eps=1e-6,
    )
    specs = {
        LayerKind.PATCH_EMBED: LayerSpec.of(
            LayerKind.PATCH_EMBED, width=sizes.width, patch_size=sizes.patch, channels=3, bias=True
        ),
        LayerKind.CLASS_TOKEN: LayerSpec.of(LayerKind.CLASS_TOKEN, width=sizes.width),
        LayerKind.POS_EMBED: position_embedding_spec(sizes.width, grid, grid),
        LayerKind.BLOCK: block,
        LayerKind.NORM: LayerSpec.of(LayerKind.NORM, width=sizes.width, eps=1e-6),
    }
    positions = ordered_positions(sizes.blocks, (), with_head=False)
    layers = {position: (specs[position.kind], draw(specs[position.kind], random)) for position in positions}
    system = System.create(folder, layers, sizes.image, {"source": "random"})
    middle = sizes.blocks // 2
    for order, (name, cloned, adapters) in enumerate(
        [("plain-a", (), ()), ("plain-b", (), ()), ("cloned", (block_position(middle),), ()), ("adapted", (), (middle,))]
    ):
        add_task(system, sizes, name, order, cloned, adapters)
    return system


def add_task(
    system: System, sizes: Sizes, name: str, order: int, cloned: tuple[Position, ...], adapters: tuple[int, ...]
) -> None:
    """Adds a task whose head holds the mean features of the patterns."""
    random = np.random.default_rng([7, order])
    root = dict(system.root.layers)

    def layer_at(position: Position) -> Layer:
        if position.kind is LayerKind.ADAPTER:
            spec = adapter_spec(sizes.width, ADAPTER_WIDTH)
        elif position in cloned:
            spec = root[position].spec
        else:
            return root[position]
        return system.put_layer(spec, draw(spec, random))

    body = [
        PlacedLayer(position, layer_at(position))
        for position in ordered_positions(sizes.blocks, adapters)
        if position.kind is not LayerKind.HEAD
    ]
    images, classes = make_images(sizes, 16 * NUM_CLASSES, seed=100 + order)
    features = compute_features(system, [placed.layer for placed in body], images)
    features -= features.mean(axis=0)
    means = np.stack([features[classes == number].mean(axis=0) for number in range(NUM_CLASSES)])
    # Logits of about plus and minus ten, as a confident task has.
    weight = 10 * means / (means @ means.T).diagonal().max()
    head = system.put_layer(
        head_spec(sizes.width, NUM_CLASSES),
        {"weight": weight.astype(np.float32), "bias": np.zeros(NUM_CLASSES, dtype=np.float32)},
    )
    path = Path.of(
        task=name,
        layers=[*body, PlacedLayer(HEAD, head)],
        hyperparameters=Hyperparameters(num_blocks=sizes.blocks, image_size=sizes.image, adapter_width=ADAPTER_WIDTH),
        parent_id=system.root.id,
        quality=0.5,
    )
    system.put_path(path)
    system.put_task(
        TaskRecord(
            name=name,
            path_id=path.id,
            parent_id=system.root.id,
            num_children=0,
            rounds=1,
            order=order + 1,
            private=False,
            labels=tuple(f"{name} {number}" for number in range(NUM_CLASSES)),
            quality=0.5,
            test_accuracy=None,
            examples=system.put_examples(images[:8]),
            data_fingerprint="0" * 32,
            settings={},
        )
    )


def compute_features(system: System, layers: list[Layer], images: Pixels) -> npt.NDArray[np.float32]:
    """Returns what a run of layers up to the final norm gives, [images, width]."""
    modules = [build_module(layer.spec, system.tensors(layer.id)).eval() for layer in layers]
    with torch.inference_mode():
        return np.concatenate([run_layers(modules, torch.from_numpy(chunk)).numpy() for chunk in np.array_split(images, 8)])


def torch_logits(system: System, path: Path, images: Pixels, device: str) -> Logits:
    """Returns a path's logits by torch in float32 on a device, without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    model = build_path(path, system.tensors, fused_attention=False).to(device)
    starts = range(0, len(images), 64)
    with torch.inference_mode():
        return np.concatenate([model(torch.from_numpy(images[at : at + 64]).to(device)).cpu().numpy() for at in starts])


# What is claimed


def ask(engine: EmbeddedEngine, generation: Generation, images: Pixels, rows: int = 16) -> dict[str, Logits]:
    """Asks all tasks about all images, some images a question, all questions at once."""
    tasks = tuple(generation.tasks)
    futures = [engine.answer(Question(generation, images[start : start + rows], tasks)) for start in range(0, len(images), rows)]
    answers = [future.result() for future in futures]
    return {task: np.concatenate([answer[task] for answer in answers]) for task in tasks}


def claim_parity(report: Report, system: System, engine: EmbeddedEngine, generations: Mapping[str, Generation], images: Pixels):
    """Compares every task's logits with torch's on the CPU."""
    paths = {name: system.path(record.path_id) for name, record in system.tasks().items()}
    expected = {name: reference_logits(path, system.tensors, images) for name, path in paths.items()}
    for precision, generation in generations.items():
        found = ask(engine, generation, images)
        worst, fine = 0.0, True
        for task, logits in found.items():
            tolerance = tolerance_of(precision, expected[task])
            difference = float(np.abs(logits - expected[task]).max())
            fine &= find_disagreement(logits, expected[task], tolerance) is None
            worst = max(worst, difference / tolerance)
            report.line(
                task=task,
                precision=precision,
                max_difference=difference,
                tolerance=tolerance,
                max_logit=float(np.abs(logits).max()),
            )
        report.claim(f"{precision} parity", worst, "<= 1 of the tolerance, same best class", fine)


def claim_best_classes(
    report: Report, system: System, engine: EmbeddedEngine, generation: Generation, images: Pixels, device: str
) -> None:
    """Compares the best classes of float16 with torch's float32 on many images."""
    agree = decided = 0
    found = ask(engine, generation, images)
    for name, record in system.tasks().items():
        expected = torch_logits(system, system.path(record.path_id), images, device)
        clear = gaps(expected) > 2e-4
        same = clear & (found[name].argmax(axis=1) == expected.argmax(axis=1))
        agree, decided = agree + int(same.sum()), decided + int(clear.sum())
        report.line(task=name, images=len(images), ties=int((~clear).sum()), agree=int(same.sum()))
    share = agree / decided if decided else 0.0
    enough = decided >= FEWEST_FOR_999
    report.claim("float16 best classes", share, f">= 0.999 of {FEWEST_FOR_999} or more", share >= 0.999 if enough else None)


def report_operators(report: Report, generation: Generation, device: str) -> None:
    """Says which operators of each segment ONNX Runtime puts on which provider, as far as this version of it tells.

    Operators on shapes belong on the CPU, where shapes are known; one on hidden states there would be a copy within the segment.
    """
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        report.line(operators=None)
        return
    for segment in generation.segments.values():
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        session = onnxruntime.InferenceSession(
            str(segment.model), options, providers=[PROVIDERS[device]], provider_options=[PROVIDER_OPTIONS[device]]
        )
        operators: dict[str, set[str]] = {}
        for part in session.get_provider_graph_assignment_info():
            operators.setdefault(part.ep_name, set()).update(node.op_type for node in part.get_nodes())
        report.line(segment=segment.name, operators={provider: sorted(found) for provider, found in sorted(operators.items())})


def claim_same_twice(report: Report, engine: EmbeddedEngine, generation: Generation, images: Pixels) -> None:
    """The same question twice, and the same images in other batches."""
    first, again = ask(engine, generation, images), ask(engine, generation, images)
    twice = max(float(np.abs(first[task] - again[task]).max()) for task in first)
    alone = ask(engine, generation, images, rows=1)
    batches = max(float(np.abs(first[task] - alone[task]).max()) for task in first)
    report.line(other_batches_max_difference=batches)
    report.claim("same question twice", twice, f"<= {SAME_TWICE:g}", twice <= SAME_TWICE)


def claim_nothing_between(report: Report, precision: str, engine: EmbeddedEngine, generation: Generation, images: Pixels) -> int:
    """Counts what crosses between host and device while questions are answered; returns the bytes that had to come down."""
    before, ran_before = engine.transfers(), executions(engine, generation)
    logits = ask(engine, generation, images)
    after, ran = engine.transfers(), executions(engine, generation)
    tasks = generation.tasks.values()
    first = sum(ran[name] - ran_before[name] for name in {task.route[0] for task in tasks})
    last = sum(ran[name] - ran_before[name] for name in {task.route[-1] for task in tasks})
    logit_bytes = sum(values.nbytes for values in logits.values())
    report.line(
        bytes_up=after.bytes_up - before.bytes_up,
        image_bytes=images.nbytes,
        bytes_down=after.bytes_down - before.bytes_down,
        logit_bytes=logit_bytes,
        segments=len(generation.segments),
        executions=sum(ran.values()) - sum(ran_before.values()),
    )
    between = (after.copies_up - before.copies_up - first) + (after.copies_down - before.copies_down - last)
    exact = (after.bytes_up - before.bytes_up, after.bytes_down - before.bytes_down) == (images.nbytes, logit_bytes)
    report.claim(f"{precision} copies between segments, by the engine's counters", between, "0", between == 0 and exact)
    return logit_bytes


def executions(engine: EmbeddedEngine, generation: Generation) -> dict[str, int]:
    """Returns how many batches each segment of a generation has run."""
    return {segment.name: segment.executions for segment in engine.statistics() if segment.name in generation.segments}


def copied_bytes(trace: Mapping[str, Any]) -> dict[str, int]:
    """Returns the bytes that a torch.profiler trace says were copied, by direction (`HtoD`, `DtoH`, `DtoD`)."""
    found: dict[str, int] = {}
    for event in trace.get("traceEvents", ()):
        words = str(event.get("name", "")).split()
        if event.get("cat") == "gpu_memcpy" and len(words) > 1 and words[0] == "Memcpy":
            found[words[1]] = found.get(words[1], 0) + int(event.get("args", {}).get("bytes", 0))
    return found


def claim_nothing_between_by_the_gpu(
    report: Report, trace: Mapping[str, Any], image_bytes: int, logit_bytes: int, row_bytes: int
) -> None:
    """Compares what the GPU reported with what had to cross.

    Shapes and the like may cross inside a segment, a few bytes each; a single hidden state is `row_bytes`.
    """
    copied = copied_bytes(trace)
    report.line(profiled_bytes=copied, image_bytes=image_bytes, logit_bytes=logit_bytes, hidden_row_bytes=row_bytes)
    name = "bytes down beside logits, by the GPU"
    if copied.get("HtoD", 0) < image_bytes or copied.get("DtoH", 0) < logit_bytes:
        report.claim(name, None, f"< {row_bytes}", None)
    else:
        rest = copied["DtoH"] - logit_bytes
        report.claim(name, rest, f"< {row_bytes}, one row", rest < row_bytes)


def profile(work: Callable[[], Any], folder: pathlib.Path) -> Mapping[str, Any]:
    """Runs something under torch.profiler and returns the trace of what the GPU did, of all libraries of this process."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    trace: Mapping[str, Any] = json.loads((folder / "trace.json").read_text())
    return trace


def measure(report: Report, name: str, engine: EmbeddedEngine, generation: Generation, images: Pixels) -> float:
    """Returns images per second, every image asked all tasks."""
    ask(engine, generation, images[: len(images) // 4])
    started = time.perf_counter()
    ask(engine, generation, images)
    rate = len(images) / (time.perf_counter() - started)
    report.line(throughput=name, images_per_second=rate, images=len(images), tasks=len(generation.tasks))
    return rate


def run(report: Report, arguments: argparse.Namespace, folder: pathlib.Path) -> None:
    """Builds, exports, loads and looks."""
    sizes, device = SMALL if arguments.small else FULL, arguments.device
    started = time.perf_counter()
    system = build_system(folder / "system", sizes)
    repository = folder / "repository"
    reader = Repository(repository)
    generations = {}
    for precision in ("float32", "float16"):
        result = export_system(system, repository, precision=precision, num_top1_images=sizes.publisher_images)  # type: ignore[arg-type]
        generations[precision] = reader.read(result.generation)
    report.line(exported=len(generations), seconds=time.perf_counter() - started)
    settings = EngineSettings(device=device, max_batch_rows=32)
    # On a CPU the carrier of a device all the same: that is what this script is about.
    engine = EmbeddedEngine(settings, carrier=DeviceCarrier("cpu") if device == "cpu" else carrier_of(device))
    try:
        for generation in generations.values():
            engine.load(generation)
        providers = engine.providers()
        report.line(providers=providers)
        strangers = sorted(name for name, provider in providers.items() if provider != PROVIDERS[device])
        report.claim("sessions on another provider", len(strangers), "0", not strangers and bool(providers))
        for generation in generations.values():
            report_operators(report, generation, device)
        findings = [str(f) for g in generations.values() for f in rehearse(engine, g, list(g.tasks.values()))]
        report.claim("golden answers", findings, "no fault", not findings)
        parity_images, _ = make_images(sizes, sizes.parity_images, seed=1)
        claim_parity(report, system, engine, generations, parity_images)
        claim_same_twice(report, engine, generations["float32"], parity_images)
        many, _ = make_images(sizes, arguments.images, seed=2)
        claim_best_classes(report, system, engine, generations["float16"], many, device)
        for precision, generation in generations.items():
            logit_bytes = claim_nothing_between(report, precision, engine, generation, parity_images)
        if device == "cuda":
            half = generations["float16"]
            trace = profile(lambda: ask(engine, half, parity_images), folder)
            row_bytes = (1 + (sizes.image // sizes.patch) ** 2) * sizes.width * 2
            claim_nothing_between_by_the_gpu(report, trace, parity_images.nbytes, logit_bytes, row_bytes)
        asked, _ = make_images(sizes, sizes.questions, seed=3)
        rates = {precision: measure(report, f"{device} {precision}", engine, g, asked) for precision, g in generations.items()}
    finally:
        engine.close()
    host = EmbeddedEngine(EngineSettings())
    try:
        host.load(generations["float32"])
        rate = measure(report, "cpu float32, arrays on the host", host, generations["float32"], asked[: max(32, len(asked) // 8)])
    finally:
        host.close()
    report.line(
        device_to_host={precision: found / rate for precision, found in rates.items()}, seconds=time.perf_counter() - started
    )


def hardware(device: str) -> str:
    """Returns the device's name."""
    return torch.cuda.get_device_name(0) if device == "cuda" else platform.processor() or platform.machine()


def commit() -> str:
    """Returns the commit this runs from, if there is one."""
    top = pathlib.Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=top, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def main() -> int:
    """Runs the script and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=sorted(PROVIDERS), default="cuda")
    parser.add_argument("--small", action="store_true", help="a small model")
    parser.add_argument("--images", type=int, default=2000, help="on which best classes are compared")
    arguments = parser.parse_args()
    report = Report()
    versions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        run(report, arguments, pathlib.Path(folder))
    sizes = SMALL if arguments.small else FULL
    return report.summarise(hardware=hardware(arguments.device), model=sizes.name, commit=commit(), **versions)


if __name__ == "__main__":
    sys.exit(main())
