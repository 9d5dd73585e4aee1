"""Anything at all, from a seed: messages of any kind, bytes, and images that are damaged in every way that files are."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

from tests.support.images import bomb, encode

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""Kinds of image files that a server takes."""

NAMES = ("digits", "greek", "large", "logits", "image", "BYTES", "UINT8", "FP32", "1", "munet.v1.InferenceService")
"""What means something somewhere, so that not everything fails at the first look."""

_STRANGE = ("", " ", "x" * 10_000, "数字" * 2000, "\x00\n\u202e", "../../etc/passwd", "\U0001f600" * 3, "ß" * 100, "%s%n", "-1")
_DEEPEST = 6
"""Messages within messages."""

_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}


def scaled(count: int) -> int:
    """Returns how many cases to try: so many, or MUNET_FUZZ times as many for a longer run."""
    return count * int(os.environ.get("MUNET_FUZZ", "1"))


def seeded(seed: int) -> random.Random:
    """Returns chance that is the same in each run, or another with each MUNET_FUZZ_SEED."""
    return random.Random(seed + 1000 * int(os.environ.get("MUNET_FUZZ_SEED", "0")))


def message(descriptor: Any, chance: random.Random, depth: int = 0) -> Any:
    """Returns a message of a kind, any of its fields set to anything."""
    made = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if depth < _DEEPEST and chance.random() < 0.6:
            _set(made, field, chance, depth)
    return made


def _set(made: Any, field: Any, chance: random.Random, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = message(field.message_type, chance, depth)
        target = getattr(made, field.name)
        if field.message_type.fields_by_name["value"].message_type is not None:
            target[entry.key].CopyFrom(entry.value)
        else:
            target[entry.key] = entry.value
    elif field.is_repeated:
        values = [_value(field, chance, depth) for _ in range(chance.choice([0, 1, 1, 1, 2, 3, 70]))]
        getattr(made, field.name).extend(values)
    elif field.message_type is not None:
        getattr(made, field.name).CopyFrom(_value(field, chance, depth))
    else:
        setattr(made, field.name, _value(field, chance, depth))


def _value(field: Any, chance: random.Random, depth: int) -> Any:
    if field.message_type is not None:
        return message(field.message_type, chance, depth + 1)
    if field.cpp_type in _INTEGERS:
        low, high = _INTEGERS[field.cpp_type]
        values = [value for value in (low, -1, 0, 1, 2, 3, 8, 192, 255, 256, 2**16, 2**31, high) if low <= value <= high]
        if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
            values += [value.number for value in field.enum_type.values] * 3
        return chance.choice(values)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return chance.random() < 0.5
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return chance.choice([0.0, -0.0, 1.5, -1e30, float("nan"), float("inf"), -float("inf")])
    if field.type == FieldDescriptor.TYPE_BYTES:
        return chance.choice(CONTENTS)(chance)
    return chance.choice(NAMES if chance.random() < 0.5 else _STRANGE)


def damaged_bytes(content: bytes, chance: random.Random) -> bytes:
    """Returns bytes that are nearly so many and nearly those: some are others, or missing, or there twice."""
    spoilt = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        if not spoilt:
            break
        # Most of what a reader believes stands near the beginning.
        where = chance.randrange(min(len(spoilt), chance.choice([8, 32, 64, len(spoilt)])))
        match chance.randrange(4):
            case 0:
                spoilt[where] ^= 1 << chance.randrange(8)
            case 1:
                spoilt[where : where + 4] = chance.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
            case 2:
                spoilt[where] = chance.randrange(256)
            case _:
                size = chance.randrange(1, 40)
                spoilt[where : where + size] = chance.choice(
                    [b"", bytes(spoilt[where : where + size]) * 2, chance.randbytes(size)]
                )
    return bytes(spoilt)


def image(chance: random.Random) -> bytes:
    """Returns a whole image file: of any kind, any mode that it has, some with metadata."""
    image_format = chance.choice(FORMATS)
    side = chance.choice([1, 2, 8, 17, 40])
    channels = chance.choice([(), (3,), (3,), (4,)] if image_format in ("PNG", "WEBP") else [(), (3,)])
    shape = (side, chance.choice([1, 8, 31]), *channels)
    pixels = np.random.default_rng(chance.randrange(2**32)).integers(0, 256, shape, dtype=np.uint8)
    options: dict[str, Any] = {}
    if image_format == "JPEG":
        options = {"progressive": chance.random() < 0.5, "quality": chance.choice([5, 90])}
    elif image_format == "WEBP":
        options = {"lossless": chance.random() < 0.5}
    if image_format != "BMP" and chance.random() < 0.5:
        options["exif"] = _EXIF + bytes([chance.randrange(12), 0, 0, 0]) + bytes(4)
    return encode(pixels, image_format, **options)


_EXIF = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00"
"""Up to the value of the one entry, the orientation."""


def damaged_image(chance: random.Random) -> bytes:
    """Returns an image file that was damaged, or cut off, or says absurd things of itself."""
    match chance.randrange(4):
        case 0:
            whole = image(chance)
            return whole[: chance.randrange(len(whole))]
        case 1:
            return absurd_image(chance)
        case _:
            return damaged_bytes(image(chance), chance)


def absurd_image(chance: random.Random) -> bytes:
    """Returns a small file whose header says that it holds an image of an absurd size, or none at all."""
    height, width = (chance.choice([0, 1, 16_383, 65_535, 2**31 - 1, 2**31, 2**32 - 1]) for _ in range(2))
    pixels = np.zeros((8, 8, 3), np.uint8)
    match chance.randrange(5):
        case 0:
            return bomb(chance.choice([0, 50_000, 2**31 - 1]))
        case 1:
            whole = bytearray(encode(pixels))
            whole[16:24] = struct.pack(">II", width, height)
        case 2:
            whole = bytearray(encode(pixels, "JPEG"))
            start = whole.index(b"\xff\xc0")
            whole[start + 5 : start + 9] = struct.pack(">HH", height % 2**16, width % 2**16)
        case 3:
            whole = bytearray(encode(pixels, "BMP"))
            whole[18:26] = struct.pack("<II", width, height)
            whole[28:34] = struct.pack("<HI", chance.choice([0, 1, 4, 8, 24, 32, 999]), chance.choice([0, 1, 2, 3, 77]))
        case _:
            whole = bytearray(encode(pixels, "WEBP", lossless=True))
            # One bit of a signature, then 14 bits each of width and height.
            whole[21:25] = struct.pack("<I", (width % 2**14) | (height % 2**14) << 14)
    return bytes(whole)


CONTENTS: tuple[Callable[[random.Random], bytes], ...] = (
    image,
    image,
    damaged_image,
    damaged_image,
    lambda _: b"",
    lambda chance: chance.randbytes(chance.choice([1, 50, 192, 3000])),
    lambda _: bytes(192),
    lambda chance: struct.pack("<I", chance.choice([0, 5, 2**32 - 1])) + b"12345",
)
"""What stands where bytes are sent."""
