"""Positions are interpolated once per image size, change nothing of the result, and follow their parameter."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from family_helpers import NATIVE, RECTANGULAR, inputs_of, randomize, stock_model, tensors, tiny_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_adala.inspection.towers import FAMILIES, vision_tower
from modeling_adala.position_cache import SIZES, CachedPositions, cache_positions

INTERPOLATING = [name for name in FAMILIES if name != "dinov3_vit"]  # which rotates queries and keys
METHODS = {"interpolate_pos_encoding", "resize_positional_embeddings"}  # what the cache stands in front of
MANY = ["vit", "clip", "siglip2_vision_model"]  # a parameter, an embedding, a grid per image


def tiny_model(name: str, **options):
    torch.manual_seed(0)
    return randomize(FAMILIES[name].classes["Model"](tiny_config(FAMILIES[name].config_class, **options)))


def embeddings_of(model: nn.Module) -> CachedPositions:
    return next(module for module in model.modules() if isinstance(module, CachedPositions))


def positions_of(model: nn.Module) -> nn.Parameter:
    embeddings = embeddings_of(model)
    return (
        embeddings.position_embedding.weight
        if hasattr(embeddings, "position_embedding")
        else (embeddings.position_embeddings)
    )


def run(model: nn.Module, size: tuple[int, int] = RECTANGULAR, batch: int = 2) -> torch.Tensor:
    """The answers without gradients, flat."""
    inputs, dtype = inputs_of(model, size, batch=batch), next(model.parameters()).dtype
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        return torch.cat([x.flatten() for x in tensors(model(**inputs))])


def run_uncached(model: nn.Module, size: tuple[int, int] = RECTANGULAR) -> torch.Tensor:
    """The same with the stock embeddings."""
    embeddings = embeddings_of(model)
    ours = type(embeddings)
    embeddings.__class__ = ours.__bases__[1]
    try:
        return run(model, size)
    finally:
        embeddings.__class__ = ours


def stock_embeddings(model: nn.Module) -> type[nn.Module]:
    """The class of Transformers that fits the positions of a model to an image."""
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__module__.startswith("transformers.") and METHODS & vars(cls).keys():
                return cls
    raise AssertionError("no module has positions to interpolate")


@pytest.fixture
def count(monkeypatch) -> Callable[[nn.Module], list]:
    """Begin a list of what the stock embeddings of a model are asked to interpolate, one entry a call.

    How they do it is their own affair: with `F.interpolate` or, in SigLIP 2 since Transformers 5.24, as a product.
    """

    def begin(model: nn.Module) -> list:
        cls, calls = stock_embeddings(model), []
        (name,) = METHODS & vars(cls).keys()
        is_static = isinstance(vars(cls)[name], staticmethod)
        stock = getattr(cls, name)

        def counted(*args, **kwargs):
            first = 1 if is_static else 2  # how large, without `self` and the positions
            calls.append([*args[first:], *kwargs.values()])
            return stock(*args, **kwargs)

        monkeypatch.setattr(cls, name, staticmethod(counted) if is_static else counted)
        return calls

    return begin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", INTERPOLATING)
def test_a_size_is_interpolated_once_and_gives_the_same_bits(name, dtype, count):
    model = tiny_model(name).to(dtype)
    interpolated = count(model)
    for size in (RECTANGULAR, (40, 16), NATIVE):
        expected = run_uncached(model, size)
        interpolated.clear()
        first = run(model, size)
        assert interpolated
        interpolated.clear()
        second = run(model, size)
        assert interpolated == []
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip_vision_model", "siglip2_vision_model"])
def test_a_stock_model_can_keep_its_positions_too(name, count):
    model = stock_model(name)
    interpolated = count(model)
    expected, representation = run(model), repr(model)
    cache_positions(model)
    interpolated.clear()
    run(model)
    assert interpolated
    interpolated.clear()
    assert torch.equal(run(model), expected)
    assert interpolated == []
    assert repr(model) == representation  # `_no_split_modules` go by class names


def test_rotary_positions_stay_as_they_are():
    model = tiny_model("dinov3_vit")
    assert not any(isinstance(module, CachedPositions) for module in model.modules())


# --- the parameter changes -------------------------------------------------------------------------------------------


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run_loss(model).backward()
    optimizer.step()


def load(model):
    model.load_state_dict({key: x + 1 if x.is_floating_point() else x for key, x in model.state_dict().items()})


def assign_data(model):
    positions_of(model).data = positions_of(model).data + 1


@torch.no_grad()
def copy_in_place(model):
    positions_of(model).add_(1)


def replace(model):
    embeddings, new = embeddings_of(model), nn.Parameter(positions_of(model).detach() + 1)
    if hasattr(embeddings, "position_embedding"):
        embeddings.position_embedding.weight = new
    else:
        embeddings.position_embeddings = new


def write_unseen(model):
    positions_of(model).data.add_(1)  # as moving averages do; no version counts this


def cast(model):
    model.to(torch.float64).to(torch.float32)
    copy_in_place(model)


def run_loss(model) -> torch.Tensor:
    return sum(x.square().mean() for x in tensors(model(**inputs_of(model, RECTANGULAR))))


@pytest.mark.parametrize("change", [step, load, assign_data, copy_in_place, replace, write_unseen, cast])
@pytest.mark.parametrize("name", MANY)
def test_a_changed_parameter_is_seen(name, change):
    model = tiny_model(name)
    before = run(model)
    change(model)
    after = run(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, run_uncached(model))


def test_values_that_a_tracer_stands_in_for_are_not_kept():
    model = tiny_model("vit")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model(torch.empty(2, 3, *RECTANGULAR), interpolate_pos_encoding=True)
    assert torch.equal(run(model), run_uncached(model))


@pytest.mark.parametrize("name", INTERPOLATING)
def test_training_gives_the_positions_their_gradient(name):
    cached, plain = tiny_model(name), tiny_model(name)
    run(cached)
    embeddings = embeddings_of(plain)
    embeddings.__class__ = type(embeddings).__bases__[1]
    gradients = []
    for model in (cached, plain):
        run_loss(model.train()).backward()
        gradients += [p.grad for n, p in model.named_parameters() if "position_embedding" in n and "text" not in n]
    assert len(gradients) == 2
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_frozen_positions_are_kept_in_training_too(count):
    model = tiny_model("vit").train()
    interpolated = count(model)
    positions_of(model).requires_grad_(False)
    with torch.inference_mode():
        model(**inputs_of(model, RECTANGULAR))
    assert len(interpolated) == 1
    run_loss(model).backward()  # with positions that were computed in inference mode
    assert len(interpolated) == 1
    assert vision_tower(model).layers[0].attention.q_proj.weight.grad.abs().sum() > 0


def test_autocast_has_positions_of_its_own():
    model = tiny_model("vit").to(torch.bfloat16)  # a CPU's autocast interpolates in float32
    run(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(model), run_uncached(model))


# --- what is kept, and where it goes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MANY)
def test_only_the_last_sizes_are_kept(name):
    model = tiny_model(name)
    for columns in range(1, SIZES + 4):
        run(model, (16, 8 * columns))
    assert len(embeddings_of(model)._positions.results) == SIZES


def test_images_of_different_grids_in_one_batch(count):
    model = tiny_model("siglip2_vision_model")
    interpolated = count(model)
    inputs = inputs_of(model, RECTANGULAR, batch=4)
    inputs["spatial_shapes"] = torch.tensor([[3, 6], [2, 4], [3, 6], [2, 4]])
    inputs["pixel_attention_mask"] = torch.arange(18)[None] < inputs["spatial_shapes"].prod(dim=1)[:, None]
    with torch.no_grad():
        output = model(**inputs)[0]
        assert [shapes.tolist() for shapes, _ in interpolated] == [[[3, 6]], [[2, 4]]]
        for i, rows in enumerate(output):
            one = model(**{key: x[i : i + 1] for key, x in inputs.items()})[0][0]
            torch.testing.assert_close(rows, one, rtol=0, atol=1e-5)
        embeddings_of(model).__class__ = type(embeddings_of(model)).__bases__[1]
        assert torch.equal(model(**inputs)[0], output)


@pytest.mark.parametrize("name", MANY)
def test_copies_and_pickles_are_models_of_their_own(name):
    model = tiny_model(name)
    keys, size = list(model.state_dict()), len(pickle.dumps(model))
    expected = run(model)
    assert list(model.state_dict()) == keys
    assert len(pickle.dumps(model)) == pytest.approx(size, rel=0.01)  # nothing of what is kept
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other), expected)
        copy_in_place(other)
        assert torch.equal(run(other), run_uncached(other))
        assert torch.equal(run(model), expected)


def test_nothing_is_baked_into_a_compiled_or_exported_model():
    model, inputs = tiny_model("vit"), inputs_of(tiny_model("vit"), RECTANGULAR)
    run(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        compiled(**inputs)
        exported = torch.export.export(model, (), kwargs=inputs)
        copy_in_place(model)
        torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=0, atol=1e-5)
    assert any("upsample" in str(node.target) for node in exported.graph.nodes)
