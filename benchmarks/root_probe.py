"""How much a root knows: a linear probe on tasks that it never saw, beside the same probe on a random root and on bare pixels.

    python benchmarks/root_probe.py [--root FILE] [--train 20] [--test 20] [--threads 2]

The probe is scikit-learn's logistic regression on the class token's row behind the final norm, each feature scaled to deviation 1 on the
training images; its regularisation is the best of five on the validation images, chosen for each root on its own. The random
root has the architecture of the other and timm's initial weights. The tasks are scripts that no recipe pretrains on, rendered with
the default distortion, their test images in fonts that the probe did not train on, and scikit-learn's handwritten digits. Prints one JSON
line for each task and a last one that sums up.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import time
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from timm.models.vision_transformer import VisionTransformer

from evolve.config import CharactersTask, DigitsTask, RootSettings, TaskSettings
from evolve.data.load import load_task
from evolve.data.task import ImageSet, TaskData
from evolve.layer import PATCH_EMBED, LayerKind, block_position
from evolve.root import RootLayers, load_root
from evolve.timm_models import decompose
from evolve.vit import PathModel, build_module

SCRIPTS = ("GREEK", "LATIN", "ARMENIAN", "GEORGIAN", "HEBREW", "LISU", "NKO")
"""Reserved for tasks: no recipe pretrains on them."""

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverse regularisation strengths that the validation images choose from."""

Features = npt.NDArray[np.float32]


def main() -> None:
    """Probes every task and prints what it finds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=pathlib.Path, help="a file of munet's own format; the bundled root by default")
    parser.add_argument("--train", type=int, default=20, help="training images of each letter")
    parser.add_argument("--test", type=int, default=20, help="test images of each letter")
    parser.add_argument("--classes", type=int, default=40, help="at most so many letters of each script")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = RootSettings(source="file", file=arguments.root) if arguments.root else RootSettings()
    root = load_root(settings)
    models = {"root": model_of(root.layers), "random": model_of(random_layers(root.layers, root.image_size))}
    accuracies: dict[str, list[float]] = {"root": [], "random": [], "pixels": []}
    for task in tasks(arguments):
        started = time.monotonic()
        found = {
            name: probe(task, functools.partial(features, model=model, image_size=root.image_size))
            for name, model in models.items()
        }
        found["pixels"] = probe(task, functools.partial(pixels, image_size=root.image_size))
        for name, accuracy in found.items():
            accuracies[name].append(accuracy)
        line = {
            "task": task.name,
            "classes": len(task.labels),
            "train_images": len(task.train),
            "test_images": len(task.test or ()),
        }
        percent = {name: round(100 * accuracy, 1) for name, accuracy in found.items()}
        print(json.dumps({**line, **percent, "seconds": round(time.monotonic() - started, 1)}), flush=True)
    means = {name: round(100 * float(np.mean(values)), 1) for name, values in accuracies.items()}
    print(json.dumps({"summary": str(arguments.root or "bundled"), **means, "gain": round(means["root"] - means["random"], 1)}))


def tasks(arguments: argparse.Namespace) -> list[TaskData]:
    """Returns the tasks to probe."""
    rendered: list[TaskSettings] = [
        CharactersTask(
            name=script.lower(),
            source="characters",
            script=script,
            train_per_class=arguments.train,
            validation_per_class=10,
            test_per_class=arguments.test,
            max_classes=arguments.classes,
            held_out_fonts=True,
        )
        for script in SCRIPTS
    ]
    digits = DigitsTask(name="digits", source="digits", limit_per_class=arguments.train)
    return [load_task(task) for task in (*rendered, digits)]


def model_of(layers: RootLayers) -> PathModel:
    """Returns a root as one module, from images to the class token's row."""
    return PathModel((position, build_module(spec, tensors)) for position, (spec, tensors) in layers.items()).eval()


def random_layers(like: RootLayers, image_size: int) -> RootLayers:
    """Returns a root of the same architecture with timm's initial weights."""
    patch, block = like[PATCH_EMBED][0], like[block_position(0)][0]
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=image_size,
        patch_size=patch.integer("patch_size"),
        embed_dim=patch.integer("width"),
        num_heads=block.integer("heads"),
        depth=sum(position.kind is LayerKind.BLOCK for position in like),
        num_classes=0,
    )
    return {**decompose(vit, image_size)}


def features(images: ImageSet, model: PathModel, image_size: int) -> Features:
    """Returns the class token's row of every image, [images, width]."""
    with torch.inference_mode():
        batches = torch.split(torch.from_numpy(images.resized(image_size)), 512)
        return np.concatenate([model(batch).numpy() for batch in batches])


def pixels(images: ImageSet, image_size: int) -> Features:
    """Returns the grey values of every image, [images, image_size * image_size]."""
    return images.resized(image_size)[..., 0].reshape(len(images), -1).astype(np.float32)


def probe(task: TaskData, describe: Callable[[ImageSet], Features]) -> float:
    """Returns the test accuracy of the best probe by validation, 0 to 1."""
    train, validation, test = (describe(images) for images in (task.train, task.validation, task.test or task.validation))
    mean, deviation = train.mean(axis=0), train.std(axis=0) + 1e-6
    train, validation, test = ((values - mean) / deviation for values in (train, validation, test))
    best = (-1.0, 0.0)
    for strength in STRENGTHS:
        classifier = LogisticRegression(C=strength, max_iter=300)
        with warnings.catch_warnings():
            # The strong end of the list need not converge to be compared.
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(train, task.train.labels)
        quality = float(classifier.score(validation, task.validation.labels))
        if quality > best[0] and task.test is not None:
            best = (quality, float(classifier.score(test, task.test.labels)))
    return best[1]


if __name__ == "__main__":
    main()
