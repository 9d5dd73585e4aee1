"""Supervised pretraining of a small root on rendered characters of many scripts: one class for each letter.

The images are rendered once and then turned, stretched, shifted, inverted and changed in contrast anew in every batch, as tensor
operations on the device. AdamW with linear warm-up and cosine decay, gradients clipped to norm 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
import pydantic
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

from evolve.config import ImagesPerClass, PositiveInt, Settings, Threads, TrainingSettings, UnitInterval
from evolve.data.characters import render_letters
from evolve.data.letters import Letter, letters_of
from evolve.errors import SettingsError
from evolve.layer import LayerSpec, Position, Tensors
from evolve.root import save_root
from evolve.timm_models import decompose
from evolve.training.device import repeatable, resolve_device
from evolve.training.schedule import cosine
from evolve.training.whitening import whitening_projection
from evolve.vit import scale_image
from munet.preprocessing import resize, to_rgb


class PretrainingSettings(Settings):
    """How a root is made; the content of a recipe.

    Attributes:
        seed: of the images, the initial weights and the batches.
        scripts: whose letters are the classes, as Unicode names them.
        train_per_class: images rendered of each letter to train on.
        validation_per_class: images rendered of each letter to validate on.
        distortion: of the rendered images; see evolve.data.characters.
        image_size: height and width of the images that the root sees, in pixels; the patch size must divide it.
        patch_size: height and width of a patch, in pixels.
        width: of the hidden states; the number of heads must divide it.
        heads: attention heads of each block.
        blocks: number of transformer blocks.
        steps: optimiser steps.
        batch_size: images a batch.
        learning_rate: greatest, after the warm-up.
        warmup_ratio: share of the steps spent warming up.
        weight_decay: of the matrices; biases, norms and embeddings have none.
        label_smoothing: share of the target spread over all classes.
        augmentation: strength of what is changed anew in every batch; 0 is nothing.
        inverted: share of the images that are turned into light on dark; it grows from 0 after the first third of the steps to its full
            size after the second, because from the start it holds learning up.
        threads: CPU threads; part of the result.
        device: `auto` takes CUDA if there is one.
    """

    seed: Annotated[int, pydantic.Field(ge=0, le=2**32 - 1)] = 0
    scripts: Annotated[tuple[str, ...], pydantic.Field(min_length=1)]
    train_per_class: ImagesPerClass = 100
    validation_per_class: ImagesPerClass = 5
    distortion: Annotated[float, pydantic.Field(ge=0, le=3)] = 1.0
    image_size: Annotated[int, pydantic.Field(ge=8, le=512)] = 32
    patch_size: PositiveInt = 16
    width: PositiveInt = 192
    heads: PositiveInt = 3
    blocks: PositiveInt = 3
    steps: PositiveInt = 5000
    batch_size: PositiveInt = 256
    learning_rate: Annotated[float, pydantic.Field(gt=0)] = 0.001
    warmup_ratio: UnitInterval = 0.05
    weight_decay: Annotated[float, pydantic.Field(ge=0)] = 0.05
    label_smoothing: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    augmentation: Annotated[float, pydantic.Field(ge=0, le=3)] = 1.0
    inverted: UnitInterval = 0.25
    threads: Threads = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @pydantic.model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        scripts = [script.upper() for script in self.scripts]
        twice = sorted({script for script in scripts if scripts.count(script) > 1})
        if twice:
            raise ValueError(f"scripts {twice} appear more than once")
        return self


@dataclasses.dataclass(frozen=True)
class PretrainingStatus:
    """How far pretraining has come.

    Attributes:
        step: steps done.
        num_steps: steps in all.
        loss: mean training loss since the last status.
        train_accuracy: on the augmented images trained on since the last status, 0 to 1.
        validation_accuracy: 0 to 1; None if it was not measured at this step.
        seconds: since the first step.
    """

    step: int
    num_steps: int
    loss: float
    train_accuracy: float
    validation_accuracy: float | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class PretrainingResult:
    """A root and how well it does on the letters it was made with.

    Attributes:
        layers: spec and float32 weights by position, in order, from the patch embedding to the final norm.
        image_size: height and width of the images it was made for, in pixels.
        num_classes: number of letters.
        train_accuracy: over the last tenth of the steps, on augmented images, 0 to 1.
        validation_accuracy: at the end, 0 to 1, on rendered images that were not trained on, by the same fonts.
        num_trained_images: counted with repetition.
        seconds: wall time of training, rendering included.
        device: what it ran on, such as `cpu, 2 threads`.
    """

    layers: dict[Position, tuple[LayerSpec, Tensors]]
    image_size: int
    num_classes: int
    train_accuracy: float
    validation_accuracy: float
    num_trained_images: int
    seconds: float
    device: str

    def info(self, settings: PretrainingSettings) -> dict[str, str]:
        """Returns what should be kept with the weights: the recipe and the figures, as text by name."""
        figures = {
            "num_classes": self.num_classes,
            "train_accuracy": round(self.train_accuracy, 4),
            "validation_accuracy": round(self.validation_accuracy, 4),
            "num_trained_images": self.num_trained_images,
            "seconds": round(self.seconds),
            "device": self.device,
        }
        return {"recipe": settings.model_dump_json(), "figures": json.dumps(figures)}


def pretrain(settings: PretrainingSettings, progress: Callable[[PretrainingStatus], None] | None = None) -> PretrainingResult:
    """Trains a root. The same settings give the same weights on one machine.

    Args:
        settings: the recipe.
        progress: is called a hundred times on the way.

    Raises:
        DataError: the fonts draw no such script.
        SettingsError: CUDA is asked for and there is none, or the training diverged.
    """
    started = time.monotonic()
    device = resolve_device(TrainingSettings(device=settings.device))
    letters = [letter for script in settings.scripts for letter in letters_of(script)]
    with repeatable(settings.threads):
        run = _Run(settings, letters, device)
        for status in run.train():
            if progress is not None:
                progress(status)
    return PretrainingResult(
        layers={**decompose(run.model.cpu(), settings.image_size)},
        image_size=settings.image_size,
        num_classes=len(letters),
        train_accuracy=run.train_accuracy,
        validation_accuracy=run.validation_accuracy,
        num_trained_images=settings.steps * settings.batch_size,
        seconds=time.monotonic() - started,
        device=f"cpu, {settings.threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device),
    )


def run_recipe(settings: PretrainingSettings, out: pathlib.Path, say: Callable[[str], None]) -> PretrainingResult:
    """Trains a root and writes it, float16, with its recipe and figures.

    Args:
        settings: the recipe.
        out: to write; ends in .safetensors. Replaced at the end, in one step, if it exists.
        say: is given a line to print now and then.

    Raises:
        DataError: see `pretrain`.
        SettingsError: see `pretrain`; or `out` cannot be written, which is found out before training.
    """
    if out.suffix != ".safetensors":
        raise SettingsError(f"found {out} as the file to write", "a name that ends in .safetensors")
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))

    def tell(status: PretrainingStatus) -> None:
        measured = status.validation_accuracy
        say(
            f"step {status.step}/{status.num_steps}  loss {status.loss:.3f}  training accuracy {status.train_accuracy:.3f}"
            + (f"  validation accuracy {measured:.3f}" if measured is not None else "")
            + f"  {status.seconds:.0f} s"
        )

    result = pretrain(settings, tell)
    with _writing(out):
        save_root(out, result.layers, result.image_size, float16=True, info=result.info(settings))
    say(
        f"wrote {out}: {result.num_classes} letters, validation accuracy {result.validation_accuracy:.3f}, "
        f"{result.seconds:.0f} s on {result.device}"
    )
    return result


@contextlib.contextmanager
def _writing(file: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingsError(f"could not write {file} ({error.strerror})", "a file that can be written") from error


class _Run:
    def __init__(self, settings: PretrainingSettings, letters: list[Letter], device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.train_accuracy = 0.0
        self.validation_accuracy = 0.0
        grey, labels = self._render(letters, "pretrain", settings.train_per_class)
        self.images = torch.from_numpy(grey).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        grey, labels = self._render(letters, "pretrain-validation", settings.validation_per_class)
        resized = np.stack([resize(to_rgb(image), settings.image_size) for image in grey])
        self.validation = torch.from_numpy(resized)
        self.validation_labels = torch.from_numpy(labels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = VisionTransformer(
                img_size=settings.image_size,
                patch_size=settings.patch_size,
                embed_dim=settings.width,
                depth=settings.blocks,
                num_heads=settings.heads,
                num_classes=len(letters),
            ).to(device)
        self.generator = torch.Generator(device).manual_seed(settings.seed + 1)
        self._start_whitening()

    def train(self) -> Iterator[PretrainingStatus]:
        settings = self.settings
        matrices = [p for name, p in self.model.named_parameters() if p.ndim >= 2 and "token" not in name and "pos" not in name]
        kept = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in self.model.parameters() if id(parameter) not in kept]
        optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.learning_rate,
        )
        every, validate_every = max(1, settings.steps // 100), max(1, settings.steps // 10)
        window = _Window()
        tenth = _Window()
        batches = self._batches()
        started = time.monotonic()
        for step in range(settings.steps):
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * cosine(step, settings.steps, settings.warmup_ratio)
            chosen = next(batches)
            inverted = settings.inverted * min(1.0, max(0.0, 3 * step / settings.steps - 1))
            window.add(*self._step(optimiser, chosen, inverted), len(chosen))
            done = step + 1
            if done % every == 0 or done == settings.steps:
                loss, accuracy = window.means()
                if not math.isfinite(loss):
                    raise SettingsError(f"found a loss of {loss} after {done} steps", "a finite one", "set a lower learning_rate")
                last = done == settings.steps
                tenth.join(window)
                measured = None
                if done % validate_every == 0 or last:
                    measured = self.validation_accuracy = self._validate()
                    self.train_accuracy = tenth.means()[1]
                    tenth = _Window()
                window = _Window()
                yield PretrainingStatus(done, settings.steps, loss, accuracy, measured, time.monotonic() - started)

    def _render(self, letters: list[Letter], split: str, count: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        return render_letters(letters, split, count, distortion=self.settings.distortion, seed=self.settings.seed)

    def _start_whitening(self) -> None:
        settings = self.settings
        count = min(len(self.images), 4096)
        chosen = torch.randperm(len(self.images), generator=self.generator, device=self.device)[:count]
        images = augment(self.images[chosen], settings.image_size, settings.augmentation, 0.0, self.generator)
        weight = whitening_projection(images, settings.patch_size, settings.width, settings.seed)
        with torch.no_grad():
            # Grey images have three equal channels.
            self.model.patch_embed.proj.weight.copy_(weight[:, None].expand(-1, 3, -1, -1) / 3)

    def _batches(self) -> Iterator[torch.Tensor]:
        """Yields indices of images, full batches only, every image once before any comes again."""
        left = torch.empty(0, dtype=torch.int64, device=self.device)
        while True:
            while len(left) < self.settings.batch_size:
                left = torch.cat([left, torch.randperm(len(self.images), generator=self.generator, device=self.device)])
            yield left[: self.settings.batch_size]
            left = left[self.settings.batch_size :]

    def _step(self, optimiser: torch.optim.Optimizer, chosen: torch.Tensor, inverted: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the loss and the number of images that were right, both still on the device."""
        labels = self.labels[chosen]
        images = augment(self.images[chosen], self.settings.image_size, self.settings.augmentation, inverted, self.generator)
        logits = self.model(images[:, None].expand(-1, 3, -1, -1))
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimiser.step()
        return loss.detach(), (logits.detach().argmax(dim=1) == labels).sum()

    def _validate(self) -> float:
        self.model.eval()
        right = 0
        with torch.inference_mode():
            for start in range(0, len(self.validation), 1024):
                batch = scale_image(self.validation[start : start + 1024].to(self.device)).permute(0, 3, 1, 2)
                found = self.model(batch).argmax(dim=1).cpu()
                right += int((found == self.validation_labels[start : start + 1024]).sum())
        self.model.train()
        return right / len(self.validation)


class _Window:
    """Sums over some steps; they stay on the device until they are asked for."""

    def __init__(self) -> None:
        self._loss: torch.Tensor | float = 0.0
        self._right: torch.Tensor | float = 0.0
        self._steps = 0
        self._images = 0

    def add(self, loss: torch.Tensor, right: torch.Tensor, images: int) -> None:
        self._loss = self._loss + loss
        self._right = self._right + right
        self._steps += 1
        self._images += images

    def join(self, other: _Window) -> None:
        self._loss = self._loss + other._loss
        self._right = self._right + other._right
        self._steps += other._steps
        self._images += other._images

    def means(self) -> tuple[float, float]:
        return float(self._loss) / self._steps, float(self._right) / self._images


def augment(images: torch.Tensor, size: int, strength: float, inverted: float, generator: torch.Generator) -> torch.Tensor:
    """Changes every image in its own way: up to 10 degrees, 15 % of scale and 8 % of shift at strength 1, contrast and brightness.

    Args:
        images: grey, [batch, height, width] uint8.
        size: height and width of the result, in pixels.
        strength: 0 leaves shapes and greys as they are.
        inverted: share of the images that are turned into light on dark, 0 to 1.
        generator: on the device of the images.

    Returns:
        [batch, size, size] float32 in [-1, 1].
    """
    batch = len(images)
    pixels = images.to(torch.float32)[:, None] / 127.5 - 1
    draw = torch.rand((batch, 8), generator=generator, device=images.device)
    even = (2 * draw - 1) * strength
    angle = even[:, 0] * math.radians(10)
    scale_x, scale_y = torch.exp(0.15 * even[:, 1]), torch.exp(0.15 * even[:, 2])
    shift_x, shift_y = 0.16 * even[:, 3], 0.16 * even[:, 4]
    theta = torch.stack(
        [
            torch.stack([scale_x * torch.cos(angle), -scale_y * torch.sin(angle), shift_x], dim=1),
            torch.stack([scale_x * torch.sin(angle), scale_y * torch.cos(angle), shift_y], dim=1),
        ],
        dim=1,
    )
    grid = functional.affine_grid(theta, [batch, 1, size, size], align_corners=False)
    moved = functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]
    sign = torch.where(draw[:, 5] < inverted, -1.0, 1.0)
    contrast, brightness = 1 + 0.3 * even[:, 6], 0.2 * even[:, 7]
    return (moved * (sign * contrast)[:, None, None] + brightness[:, None, None]).clamp(-1, 1)
