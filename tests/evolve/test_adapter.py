import math

import numpy as np
import pytest
import torch

from evolve.adapter import initial_tensors
from evolve.specs import adapter_spec
from evolve.vit import build_module, tensors_of

SPEC = adapter_spec(24, 8)


def test_new_adapter_is_an_identity_bit_by_bit() -> None:
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0)) * 10
    adapter = build_module(SPEC, initial_tensors(SPEC, seed=1))
    assert torch.equal(adapter(x), x)


def test_computes_what_its_definition_says() -> None:
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(t.shape).astype(np.float32) for name, t in initial_tensors(SPEC, 0).items()}
    x = random.standard_normal((2, 5, 24))
    centred = x - x.mean(-1, keepdims=True)
    normalised = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    normalised = normalised * tensors["norm.weight"] + tensors["norm.bias"]
    hidden = normalised @ tensors["down.weight"].T + tensors["down.bias"]
    exact_gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    expected = x + exact_gelu @ tensors["up.weight"].T + tensors["up.bias"]
    found = build_module(SPEC, tensors)(torch.from_numpy(x.astype(np.float32))).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_first_linear_layer_is_lecun_normal_and_follows_the_seed() -> None:
    spec = adapter_spec(192, 128)
    tensors = initial_tensors(spec, seed=3)
    assert tensors["down.weight"].std() == pytest.approx(math.sqrt(1 / 192), rel=0.02)
    assert np.array_equal(initial_tensors(spec, seed=3)["down.weight"], tensors["down.weight"])
    assert not np.array_equal(initial_tensors(spec, seed=[3, 1])["down.weight"], tensors["down.weight"])
    assert not any(tensors[name].any() for name in ("norm.bias", "down.bias", "up.weight", "up.bias"))


def test_tensors_go_through_the_module_unchanged() -> None:
    tensors = initial_tensors(SPEC, seed=5)
    back = tensors_of(build_module(SPEC, tensors))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) and back[name].dtype == np.float32 for name in tensors)
