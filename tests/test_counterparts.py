"""benchmarks/counterparts: every rival against its formula over all pairs of tokens, and as the trainers see it."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from family_helpers import RECTANGULAR, inputs_of, stock_model
from torch import Tensor
from torch.nn import functional as F
from training_helpers import QUIET, NoiseImages, copy_state, moved, tiny_vit

from benchmarks.counterparts import COUNTERPARTS, attach
from benchmarks.counterparts.interface import Counterpart, Sizes
from modeling_adala import UsageError, convert
from modeling_adala.inspection.towers import attention_modules
from trainers import (
    AttentionAlignmentConfig,
    AttentionAlignmentTrainer,
    FeatureAlignmentConfig,
    FeatureAlignmentTrainer,
)

HEADS, DIM = 2, 6
# grid and tokens before it: a class token; four registers too, and more patches than landmarks; none
CASES = [((3, 5), 1), ((9, 6), 5), ((2, 7), 0)]
Grid = tuple[int, int]
TWINS: dict[str, Callable[..., Tensor]] = {}


def twin(name: str) -> Callable:
    return lambda function: TWINS.setdefault(name, function)


def weighted(scores: Tensor, value: Tensor, eps: float = 1e-6) -> Tensor:
    """Values by their scores, `eps` added to the mean score as our operator does."""
    return scores / (scores.sum(dim=3, keepdim=True) + scores.shape[3] * eps) @ value


def convolution(x: Tensor, kernel: Tensor, grid: Grid) -> Tensor:
    """Patch by patch and neighbor by neighbor; zero before the patches. `kernel` ends in `(dim, side, side)`."""
    (rows, columns), reach, special = grid, kernel.shape[-1] // 2, x.shape[2] - grid[0] * grid[1]
    found = [torch.zeros_like(x[:, :, 0]) for _ in range(x.shape[2])]
    for row in range(rows):
        for column in range(columns):
            for y in range(max(row - reach, 0), min(row + reach + 1, rows)):
                for z in range(max(column - reach, 0), min(column + reach + 1, columns)):
                    weight = kernel[..., y - row + reach, z - column + reach]
                    place = special + row * columns + column
                    found[place] = found[place] + weight * x[:, :, special + y * columns + z]
    return torch.stack(found, dim=2)


def gated(rival: Counterpart, output: Tensor, query: Tensor) -> Tensor:
    """Channel by channel, from all heads of the query of the same token."""
    weight, bias = rival.gate.weight.view(HEADS, DIM, HEADS, DIM), rival.gate.bias.view(HEADS, 1, DIM)
    return output * (torch.einsum("gehd,bhnd->bgne", weight, query) + bias)


def with_positions(rival: Counterpart, key: Tensor) -> Tensor:
    special = rival.sizes.special
    return torch.cat((key[:, :, :special], key[:, :, special:] + rival.position), dim=2)


@twin("exp")
def exponential(rival, q, k, v, grid):
    scores = ((q[:, :, :, None] + k[:, :, None]) * DIM**-0.25).exp().sum(dim=4)
    return weighted(scores, v, eps=0.0)


@twin("performer")
def performer(rival, q, k, v, grid):
    def exponents(x: Tensor) -> Tensor:
        x = x / DIM**0.25
        rows = [(x * w).sum(dim=3) - (x * x).sum(dim=3) / 2 for w in rival.projection]
        return torch.stack(rows, dim=3)

    m, phi_q, phi_k = len(rival.projection), exponents(q), exponents(k)
    phi_q = m**-0.5 * ((phi_q - phi_q.max(dim=3, keepdim=True)[0]).exp() + 1e-4)
    phi_k = m**-0.5 * ((phi_k - phi_k.flatten(2).max(dim=2)[0][..., None, None]).exp() + 1e-4)
    return weighted(phi_q @ phi_k.mT, v)


@twin("cosformer")
def cosformer(rival, q, k, v, grid):
    place = torch.arange(q.shape[2], dtype=q.dtype)
    return weighted(q.relu() @ k.relu().mT * torch.cos(math.pi / 2 * (place[:, None] - place) / len(place)), v)


@twin("efficient")
def efficient(rival, q, k, v, grid):
    channels, tokens = q.exp() / q.exp().sum(dim=3, keepdim=True), k.exp() / k.exp().sum(dim=2, keepdim=True)
    return torch.einsum("bhid,bhjd,bhje->bhie", channels, tokens, v)


@twin("focused")
def focused(rival, q, k, v, grid):
    def phi(x: Tensor) -> Tensor:
        x = ((x.relu() + 1e-6) / torch.log1p(rival.scale.exp())).transpose(1, 2)  # channels of all heads together
        length = (x**2).sum(dim=(2, 3), keepdim=True).sqrt()
        return (x**3 / (x**6).sum(dim=(2, 3), keepdim=True).sqrt() * length).transpose(1, 2)

    return weighted(phi(q) @ phi(with_positions(rival, k)).mT, v) + convolution(v, rival.kernel, grid)


@twin("polaformer")
def polaformer(rival, q, k, v, grid):
    scale, power = torch.log1p(rival.scale.exp()), 1 + 4 / (1 + torch.exp(-rival.power))
    q_plus, q_minus = ((sign * q / scale).clamp(min=0) ** power for sign in (1, -1))
    k_plus, k_minus = ((sign * with_positions(rival, k) / scale).clamp(min=0) ** power for sign in (1, -1))
    same, opposite = q_plus @ k_plus.mT + q_minus @ k_minus.mT, q_plus @ k_minus.mT + q_minus @ k_plus.mT
    output = torch.cat((weighted(same, v[..., : DIM // 2]), weighted(opposite, v[..., DIM // 2 :])), dim=3)
    return gated(rival, output + convolution(v, rival.kernel, grid), q)


@twin("inline")
def inline(rival, q, k, v, grid):
    scores, tokens = q @ k.mT / DIM**0.5, q.shape[2]
    weights = scores / tokens + (1 - scores.mean(dim=3, keepdim=True)) / tokens
    kernels = []
    for head in range(HEADS):
        hidden = F.gelu(v[:, head].mean(dim=1) @ rival.first[head] + rival.first_bias[head])
        kernels.append((hidden @ rival.second[head] + rival.second_bias[head]).view(-1, DIM, 3, 3))
    return weights @ v + convolution(v, torch.stack(kernels, dim=1), grid)


@twin("mala")
def mala(rival, q, k, v, grid):
    phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
    scores = phi_q @ phi_k.mT / DIM**0.5
    z = scores.mean(dim=3, keepdim=True)
    weights = ((1 + 1 / (z + 1e-6)) * scores - z) / q.shape[2]
    return gated(rival, weights @ v + convolution(v, rival.kernel[0], grid), q)


@twin("nystromformer")
def nystromformer(rival, q, k, v, grid):
    (rows, columns), special = grid, rival.sizes.special

    def landmarks(x: Tensor) -> Tensor:
        image, found = x[:, :, special:].unflatten(2, grid), [x[:, :, index] for index in range(special)]
        high, wide = min(7, rows), min(7, columns)
        for y in range(high):
            for z in range(wide):
                cell = image[:, :, y * rows // high : -(-(y + 1) * rows // high)]
                found.append(cell[:, :, :, z * columns // wide : -(-(z + 1) * columns // wide)].mean(dim=(2, 3)))
        return torch.stack(found, dim=2)

    def softmax(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT / DIM**0.5).softmax(dim=3)

    few_q, few_k = landmarks(q), landmarks(k)
    middle = softmax(few_q, few_k)
    inverse = middle.mT / torch.linalg.matrix_norm(middle, ord=1)[..., None, None]
    for _ in range(6):
        x = torch.eye(middle.shape[2], dtype=q.dtype) - middle @ inverse
        inverse = inverse @ (torch.eye(middle.shape[2], dtype=q.dtype) + x + x @ x + x @ x @ x / 4)
    padded = F.pad(v, (0, 0, 32, 32))
    local = sum(rival.kernel[:, :, tap] * padded[:, :, tap : tap + v.shape[2]] for tap in range(65))
    return softmax(q, few_k) @ inverse @ softmax(few_q, k) @ v + local


@twin("monarch")
def monarch(rival, q, k, v, grid):
    size, filled = grid[1], -q.shape[2] % grid[1]
    q, k, v = (F.pad(x, (0, 0, filled, 0)) for x in (q, k, v))
    real = (torch.arange(q.shape[2]) >= filled).view(-1, size).to(q.dtype)
    scores = (q @ k.mT / DIM**0.5).unflatten(3, (-1, size)).unflatten(2, (-1, size))  # block l, place j, block k, i
    share = torch.eye(len(real), dtype=q.dtype)[:, None].expand(-1, size, -1)  # of block k for query j of block l
    for _ in range(2):
        own = share * real[:, :, None]
        mean = (own[..., None] * scores).sum(dim=2) / own.sum(dim=-3)[..., None].clamp(min=1e-12)
        places = mean.exp() * real  # place j, block k, i
        places = places / places.sum(dim=4, keepdim=True)
        entropy = -torch.special.xlogy(places, places + (places == 0)).sum(dim=4)
        share = ((scores * places[:, :, None]).sum(dim=5) + entropy[:, :, None]).softmax(dim=4)
    weights = (share[..., None] * places[:, :, None]).flatten(4).flatten(2, 3)
    return (weights @ v)[:, :, filled:]


def window_of(query: int, grid: Grid, special: int) -> list[int]:
    """The tokens that a query sees: all, or those around its block of 4x4 and the tokens before the patches."""
    rows, columns = grid
    if query < special:
        return list(range(special + rows * columns))
    row, column = ((x // 4) * 4 for x in divmod(query - special, columns))
    return list(range(special)) + [
        special + y * columns + z
        for y in range(max(row - 2, 0), min(row + 6, rows))
        for z in range(max(column - 2, 0), min(column + 6, columns))
    ]


@twin("windowed")
def windowed(rival, q, k, v, grid):
    seen = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
    for query in range(q.shape[2]):
        seen[query, window_of(query, grid, rival.sizes.special)] = True
    return (q @ k.mT / DIM**0.5).masked_fill(~seen, -torch.inf).softmax(dim=3) @ v


@twin("lolcats")
def lolcats(rival, q, k, v, grid):
    phi_q, phi_k = (
        torch.cat(((x @ w).softmax(dim=3), (-x @ w).softmax(dim=3)), dim=3)
        for x, w in ((q, rival.map.weight_q), (k, rival.map.weight_k))
    )
    linear, scores, factor = phi_q @ phi_k.mT, q @ k.mT / DIM**0.5, 1 / (1 + torch.exp(-rival.factor[:, 0, 0]))
    outputs = []
    for query in range(q.shape[2]):
        window = window_of(query, grid, rival.sizes.special)
        rest = [token for token in range(q.shape[2]) if token not in window]
        near = scores[:, :, query, window]
        near = factor * (near - near.max(dim=2, keepdim=True)[0]).exp()
        weights = torch.cat((near, linear[:, :, query, rest]), dim=2)
        weights = weights / weights.sum(dim=2, keepdim=True)
        outputs.append((weights[:, :, None] @ v[:, :, window + rest])[:, :, 0])
    return torch.stack(outputs, dim=2)


@twin("t5")
def t5(rival, q, k, v, grid):
    centered = k - k.mean(dim=2, keepdim=True)
    k = centered / (centered.square().mean(dim=2, keepdim=True) + 1).sqrt()
    q, k = q + convolution(q, rival.query_kernel[0], grid), k + convolution(k, rival.key_kernel[0], grid)

    def network(x: Tensor, one: Tensor, two: Tensor, three: Tensor) -> Tensor:
        return (x @ one / (1 + torch.exp(-x @ one)) * (x @ two)) @ three

    weights = [w.expand(len(q), -1, -1, -1) for w in (rival.w1, rival.w2, rival.w3)]
    loss = -(v * network(k, *weights)).sum() / q.shape[2] / DIM**0.5
    steps = torch.autograd.grad(loss, weights, create_graph=True)
    return network(q, *(w - step for w, step in zip(weights, steps)))


@twin("jetvit")
def jetvit(rival, q, k, v, grid):
    first, _, second = rival.mlp
    mean = v[:, :, rival.sizes.special :].mean(dim=2).reshape(len(v), -1)
    hidden = mean @ first.weight.T + first.bias
    kernel = (hidden * hidden.sigmoid()) @ second.weight.T + second.bias
    return weighted(q.relu() @ k.relu().mT, v) + convolution(v, kernel.view(-1, HEADS, DIM, 3, 3), grid)


@twin("random")
def random_mixing(rival, q, k, v, grid):
    assert not rival.weights.requires_grad
    torch.testing.assert_close(rival.weights.sum(dim=2), torch.ones_like(rival.weights[..., 0]))
    return torch.einsum("hij,bhjd->bhid", rival.weights, v)


@twin("softmax")
def softmax(rival, q, k, v, grid):
    return (q @ k.mT / DIM**0.5).softmax(dim=3) @ v


def build(name: str, grid: Grid, special: int, heads: int = HEADS) -> Counterpart:
    """A rival in float64 whose parameters have no special values."""
    torch.manual_seed(1)
    rival = COUNTERPARTS[name](Sizes(heads, DIM, grid, special)).double()
    with torch.no_grad():
        for parameter in rival.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return rival


def inputs(grid: Grid, special: int, batch: int = 2) -> list[Tensor]:
    shape = batch, HEADS, special + grid[0] * grid[1], DIM
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize(("grid", "special"), CASES, ids=str)
@pytest.mark.parametrize("name", COUNTERPARTS)
def test_value_and_gradients_are_those_of_the_formula(name, grid, special):
    rival, tensors = build(name, grid, special), inputs(grid, special)
    parameters = list(rival.parameters())
    found, expected = rival(*tensors, grid), TWINS[name](rival, *tensors, grid)
    assert found.shape == tensors[0].shape
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    factor = torch.randn_like(found)
    options = {"allow_unused": True, "materialize_grads": True}
    ours, theirs = (
        torch.autograd.grad((x * factor).sum(), [*tensors, *parameters], **options) for x in (found, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)
    assert all(gradient.any() for gradient in ours) or name == "random"


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_long_queries_and_keys_stay_finite_in_float32(name):
    """Those of a trained ViT are as long; exponents and powers of them overflow first."""
    torch.manual_seed(1)
    rival, tensors = COUNTERPARTS[name](Sizes(HEADS, DIM, (5, 5), 1)), inputs((5, 5), 1)
    query, key, value = (factor * x.float() for factor, x in zip((40, 40, 1), tensors))
    output = rival(query, key, value, (5, 5))
    output.square().sum().backward()
    assert output.isfinite().all() and output.any()
    assert all(x.grad.isfinite().all() for x in [*tensors, *rival.parameters()] if x.grad is not None)


def test_what_approximates_softmax_does():
    (q, k, v), grid = inputs((4, 6), 2), (4, 6)
    expected = softmax(None, q, k, v, grid)
    few = build("nystromformer", grid, 2)
    few.kernel.data.zero_()
    few.steps = 30  # all tokens are landmarks, so that the rest is the inverse
    torch.testing.assert_close(few(q, k, v, grid), expected)
    row = q[:, :, :8], k[:, :, :8], v[:, :, :8]
    torch.testing.assert_close(build("monarch", (1, 8), 0)(*row, (1, 8)), softmax(None, *row, grid))
    many = COUNTERPARTS["performer"](Sizes(HEADS, DIM, grid, 2), features=5000).double()
    short = q / 2, k / 2, v
    exact = softmax(None, *short, grid)
    from_mean = exact - v.mean(dim=2, keepdim=True)
    assert (many(*short, grid) - exact).norm() < 0.15 * from_mean.norm()  # 0.10; 0.39 with features that lean one way


@pytest.mark.parametrize("name", [name for name, rival in COUNTERPARTS.items() if rival.takes_mask])
def test_padding_plays_no_part(name):
    rival, (q, k, v) = build(name, (3, 5), 1), inputs((3, 5), 1)
    mask = torch.arange(16).expand(2, -1) < torch.tensor([[16], [11]])
    found = rival(q, k, v, (3, 5), mask)
    other = [torch.where(mask[:, None, :, None], x, 5 * x + 9) for x in (k, v)]
    torch.testing.assert_close(rival(q, *other, (3, 5), mask), found)
    torch.testing.assert_close(found[:1], rival(q[:1], k[:1], v[:1], (3, 5)))
    if name != "cosformer":  # which weighs by the distance in a sequence of all tokens
        torch.testing.assert_close(found[1:], rival(q[1:], k[1:, :, :11], v[1:, :, :11], (3, 5)))


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_a_student_takes_rectangles_and_registers(name):
    student = convert(stock_model("dinov2_with_registers"), local_mixing=0, softmax_layers=[1])
    plain = inputs_of(student, RECTANGULAR)
    before = student(**plain).last_hidden_state
    attach(student, COUNTERPARTS[name], (3, 6), seed=3)
    linear, kept = attention_modules(student)
    assert type(linear.feature_map) is COUNTERPARTS[name] and kept.feature_map is None
    assert linear.feature_map.sizes == Sizes(heads=2, dim=16, grid=(3, 6), special=4)
    after = student(**plain).last_hidden_state
    assert after.isfinite().all() and not torch.allclose(after, before)
    if COUNTERPARTS[name].fixed_grid:
        with pytest.raises(UsageError, match=r"built for patch_grid=\(3, 6\) and gets \(4, 4\)"):
            student(**inputs_of(student))
    else:
        assert student(**inputs_of(student)).last_hidden_state.isfinite().all()
    if not COUNTERPARTS[name].takes_mask:
        with pytest.raises(UsageError, match="takes no attention_mask"):
            linear(before, attention_mask=torch.ones(2, 1, 1, 22, dtype=torch.bool), patch_grid=(3, 6))


def test_random_numbers_are_those_of_the_seed():
    def state(seed: int) -> list[Tensor]:
        student = convert(tiny_vit(), local_mixing=0)
        attach(student, COUNTERPARTS["performer"], (4, 4), seed=seed)
        return [module.feature_map.projection for module in attention_modules(student)]

    first, second = state(0)
    assert not torch.equal(first, second) and torch.equal(first, state(0)[0]) and not torch.equal(first, state(1)[0])


def test_a_family_that_does_not_tell_the_grid_is_refused():
    with pytest.raises(UsageError, match="siglip_vision_model does not tell its attention modules"):
        attach(convert(stock_model("siglip_vision_model"), local_mixing=0), COUNTERPARTS["exp"], (4, 4))


def test_both_stages_train_every_rival(tmp_path):
    """One student with a rival in each layer."""
    teacher = tiny_vit(layers=len(COUNTERPARTS))
    student = convert(teacher, local_mixing=0)
    attach(student, COUNTERPARTS["softmax"], (4, 4))
    for module, rival in zip(attention_modules(student), COUNTERPARTS.values(), strict=True):
        module.feature_map = rival(module.feature_map.sizes)
    budget = {"per_device_train_batch_size": 4, "calibration_images": 4, "max_steps": 2, "warmup_steps": 0}
    states = [copy_state(student)]
    for config, trainer in (
        (AttentionAlignmentConfig, AttentionAlignmentTrainer),
        (FeatureAlignmentConfig, FeatureAlignmentTrainer),
    ):
        args = config(tmp_path, save_strategy="no", **budget, **QUIET)
        trainer(student, teacher, args, train_dataset=NoiseImages(8)).train()
        states.append(copy_state(student))
    own = {parameter for parameter, _ in student.named_parameters() if ".feature_map." in parameter}
    frozen = {name for name in states[0] if ".feature_map." in name} - own
    assert len(own) == 29 and len(frozen) == 2
    for before, after in pairwise(states):
        assert all(tensor.isfinite().all() for tensor in after.values())
        assert own <= moved(before, after) and not frozen & moved(before, after)
        projections = {name for name in moved(before, after) if "v_proj.weight" in name}
        assert len(projections) >= len(COUNTERPARTS) - 1  # softmax is the teacher already
