import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.coordinates import Coordinates
from models import compiled, normalisation
from models.attention import Attention
from models.conditioning import FiLM
from models.grid_unet import GridSpec, ResidualBlock
from models.normalisation import normalise
from models.sparse_block import SparseBlock
from tests.models.norms import check_one_bad_row
from tests.reference.normalisation import kept as reference_kept
from tests.reference.normalisation import normalise as reference

pytestmark = pytest.mark.skipif(not compiled.is_available(), reason=compiled.unavailable_reason())
SPEC = GridSpec(resolution=8, base_channels=32, mults=(1,), blocks_per_level=(1,))
SHAPES = [(2, 9, 32), (3, 5, 7, 24), (1, 1, 1), (2, 3, 1), (2, 2, 5000), (2, 700, 33), (1, 4, 4, 96)]


def draw(shape, modulated, dtype=torch.float32):
    """(x, LayerNorm, FiLM, modulation, gradient of the result): random, of which all but the last need gradients."""
    generator = torch.Generator().manual_seed(sum(shape))
    norm, film = nn.LayerNorm(shape[-1]), FiLM(shape[-1])
    film.place = 0
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=0.5, generator=generator)
    x = (torch.randn(shape, generator=generator) * 2 + 1).to(dtype).requires_grad_()
    vectors = [torch.randn(shape[0], shape[-1], generator=generator).requires_grad_() for _ in range(2)]
    return x, norm, film, [tuple(vectors)] if modulated else None, torch.randn(shape, generator=generator).to(dtype)


def expected(x, norm, modulation, gelu, grad):
    """The reference in float64: (result, gradients of x, weight, bias and, where there is a modulation, of that)."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in (x, *norm.parameters(), *(modulation or [()])[0])]
    groups = (1, x.shape[-1])
    film = leaves[3:] or [torch.ones(groups, dtype=torch.float64), torch.zeros(groups, dtype=torch.float64)]
    out = reference(*leaves[:3], *film, gelu)
    return out, torch.autograd.grad(out, leaves, grad.double())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-3)])
def test_is_the_formula(shape, modulated, gelu, dtype, tolerance):
    x, norm, film, modulation, grad = draw(shape, modulated, dtype)
    out = normalise(x, norm, film, modulation, gelu)
    gradients = torch.autograd.grad(out, [x, *norm.parameters(), *(modulation or [()])[0]], grad)
    wanted, wanted_gradients = expected(x, norm, modulation, gelu, grad)
    assert out.dtype == gradients[0].dtype == dtype
    for ours, theirs in zip([out, *gradients], [wanted, *wanted_gradients], strict=True):
        largest = theirs.abs().max().item() if shape[-1] > 1 else 316.0  # what rounding is multiplied by, eps ** -0.5
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * max(largest, 1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("used", ["both", "result", "residual"])
def test_the_gradient_of_a_residual_is_added(dtype, fuse, used, monkeypatch):
    """Against the same with two uses of x, whose gradients PyTorch adds up, in float64."""
    if not fuse:
        monkeypatch.setattr(normalisation, "_can_fuse", lambda *arguments: False)
    x, norm, film, modulation, grad = draw((2, 700, 33), True, dtype)  # several blocks of the loop for each image
    from_out, from_residual = 1.0 * (used != "residual"), 1.0 * (used != "result")
    leaves = [x, *norm.parameters(), *modulation[0]]
    _, wanted = expected(x, norm, modulation, True, from_out * grad)
    wanted = [wanted[0] + 3 * from_residual * grad.double(), *wanted[1:]]
    out, residual = normalise(x, norm, film, modulation, gelu=True, residual=True)
    assert torch.equal(residual, x)
    assert residual.dtype == x.dtype
    outputs, weights = [out, residual], [grad, 3 * grad]
    chosen = {"both": slice(2), "result": slice(1), "residual": slice(1, 2)}[used]
    found = torch.autograd.grad(outputs[chosen], leaves, weights[chosen], allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        ours = torch.zeros_like(theirs) if ours is None else ours
        tolerance = (2e-5 if dtype == torch.float32 else 1e-2 if fuse else 0.1) * max(theirs.abs().max().item(), 1e-3)
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_residual_asks_for_a_gradient_where_x_does(fuse, monkeypatch):
    if not fuse:
        monkeypatch.setattr(normalisation, "_can_fuse", lambda *arguments: False)
    x, norm, _, _, grad = draw((2, 9, 32), False)
    for needed in (True, False):
        out, residual = normalise(x.detach().requires_grad_(needed), norm, residual=True)
        assert residual.requires_grad == needed
        out.backward(grad)
    assert norm.weight.grad.any()


@pytest.mark.parametrize("make", [
    lambda: ResidualBlock(SPEC, 32, 32, 8), lambda: ResidualBlock(SPEC, 32, 16, 8), lambda: Attention(32),
    lambda: functools.partial(SparseBlock(32, 3, 8), coords=Coordinates.full(2, (8, 8))),
])
def test_the_gradients_of_a_block_are_added_in_one_pass(make):
    """And not by PyTorch, which would read and write all features once more."""
    block, x = make(), torch.randn(2, 8, 8, 32, requires_grad=True)
    x = x * 1  # not a leaf, whose gradient would be kept
    loss = block(x.flatten(1, 2) if isinstance(block, functools.partial) else x).square().sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    assert not {event.key for event in profile.key_averages()} & {"aten::add", "aten::add_"}


def test_autocast_changes_nothing():
    x, norm, film, modulation, _ = draw((2, 9, 32), True, torch.bfloat16)
    out = normalise(x, norm, film, modulation, gelu=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(normalise(x, norm, film, modulation, gelu=True), out)
        assert normalise(x.float(), norm).dtype == torch.float32


def test_without_the_loops_dtypes_are_the_same(monkeypatch):
    monkeypatch.setattr(normalisation, "_can_fuse", lambda *arguments: False)
    for dtype in (torch.float32, torch.bfloat16):
        x, norm, film, modulation, grad = draw((2, 9, 32), True, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            out = normalise(x, norm, film, modulation, gelu=True)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected(x, norm, modulation, True, grad)[0], rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("width", [31, 33, 64])
def test_features_of_another_width_are_an_error(width):
    """The loops would read and write beyond the ends."""
    with pytest.raises(RuntimeError, match="normalized_shape"):
        normalise(torch.randn(2, 5, width), nn.LayerNorm(32))


@pytest.mark.parametrize(("scale", "shift"), [
    ((3, 32), (3, 32)), ((2, 31), (2, 31)), ((2, 32), (3, 32)), ((2, 32), (2, 31)),
])
def test_a_modulation_that_does_not_fit_is_an_error(scale, shift):
    film = FiLM(32)
    film.place = 0
    with pytest.raises(RuntimeError):
        normalise(torch.randn(2, 5, 32), nn.LayerNorm(32), film, [(torch.ones(scale), torch.ones(shift))])


def test_bfloat16_is_rounded_once_as_pytorch_rounds():
    x, norm, film, modulation, _ = draw((2, 700, 33), True, torch.bfloat16)
    wide = normalise(x.float(), norm, film, modulation, gelu=True)
    assert torch.equal(normalise(x, norm, film, modulation, gelu=True), wide.bfloat16())
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1.0])  # halfway between two numbers of bfloat16
    shift = ties.expand(2, 4).contiguous()
    out = normalise(torch.randn(2, 3, 4).bfloat16(), nn.LayerNorm(4), film, [(torch.zeros(2, 4), shift)])
    assert torch.equal(out, shift.bfloat16()[:, None].expand(-1, 3, -1))


def test_any_nan_stays_one_in_bfloat16():
    shift = torch.tensor([-1, 0x7FFFFFFF, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32).expand(2, 4)
    film = SimpleNamespace(place=0)
    out = normalise(torch.ones(2, 3, 4).bfloat16(), nn.LayerNorm(4), film, [(torch.zeros(2, 4), shift.contiguous())])
    assert out.isnan().all()


def test_gelu_of_any_number():
    """A row of two numbers normalises to -1 and 1, which FiLM takes to anything."""
    h = torch.cat([torch.linspace(-14, 14, 5001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e4, -3e4, 1e30, -1e30])])
    x = torch.tensor([-1.0, 1.0]).expand(len(h), 1, 2)
    norm, film = nn.LayerNorm(2, eps=1e-12), SimpleNamespace(place=0)
    scale = torch.zeros(len(h), 2)
    out = normalise(x, norm, film, [(scale, h[:, None].expand(-1, 2))], gelu=True)[:, 0, 0]
    wanted = torch.nn.functional.gelu(h.double())
    assert ((out.double() - wanted).abs() <= 2.5e-7 * h.double().abs().clamp(min=1e-3)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_number_spoils_its_row_and_no_other(value, dtype):
    x, norm, _, _, grad = draw((2, 9, 32), False, dtype)
    with torch.no_grad():
        x[1, 3, 5] = value
    out = normalise(x, norm, gelu=True)
    out.backward(grad)
    check_one_bad_row(out, x, norm)


def test_results_do_not_depend_on_threads():
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            x, norm, film, modulation, grad = draw((3, 801, 40), True)
            out = normalise(x, norm, film, modulation, gelu=True)
            results.append([out, *torch.autograd.grad(out, [x, *norm.parameters(), *modulation[0]], grad)])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_values_and_gradients_need_not_be_contiguous():
    x, norm, film, modulation, grad = draw((2, 9, 32), True)
    out = normalise(x, norm, film, modulation)
    (wanted,) = torch.autograd.grad(out, x, grad)
    turned = x.detach().transpose(1, 2).contiguous().requires_grad_()
    again = normalise(turned.transpose(1, 2), norm, film, modulation)
    (found,) = torch.autograd.grad(again, turned, grad.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(again, out)
    assert torch.equal(found.transpose(1, 2), wanted)


def test_one_by_one_gives_the_same(monkeypatch):
    """Without numba, and in float64, which the loops do not know."""
    x, norm, film, modulation, _ = draw((2, 9, 32), True)
    out = normalise(x, norm, film, modulation, gelu=True)
    monkeypatch.setattr(normalisation, "_can_fuse", lambda *arguments: False)
    torch.testing.assert_close(normalise(x, norm, film, modulation, gelu=True), out)
    monkeypatch.undo()
    modulation = [tuple(vector.double() for vector in modulation[0])]
    wide = normalise(x.double(), norm.double(), film, modulation, gelu=True)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), out)


def test_weights_of_other_precisions_are_left_to_pytorch():
    x, norm, _, _, _ = draw((2, 9, 32), False)
    norm, x = norm.bfloat16(), x.bfloat16()
    assert torch.equal(normalise(x, norm), norm(x))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float64,) * 2, (torch.float32, torch.bfloat16)])
def test_modulations_of_other_precisions_are_left_to_pytorch(dtypes):
    x, norm, film, modulation, _ = draw((2, 9, 32), True)
    other = [tuple(vector.to(dtype) for vector, dtype in zip(modulation[0], dtypes, strict=True))]
    out = normalise(x, norm, film, other)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, normalise(x, norm, film, modulation), rtol=2e-2, atol=2e-2)


def test_default_precision_of_torch_changes_nothing():
    x, norm, _, _, _ = draw((2, 9, 32), False)
    wanted = normalise(x, norm)
    normalisation._identity.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(normalise(x, norm), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_dropout_of_everything_leaves_nothing():
    assert not normalise(torch.randn(2, 4, 8), nn.LayerNorm(8), dropout=nn.Dropout(1.0)).any()


def test_second_derivatives_are_refused():
    """Even of a sum, whose gradient is a constant."""
    x, norm, _, _, _ = draw((2, 9, 32), False)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(normalise(x, norm).sum() + x.pow(3).sum(), x, create_graph=True)


def dropped(shape, rate, seed, x=None):
    """normalise with dropout: (which numbers are kept, result, x)."""
    norm = nn.LayerNorm(shape[-1])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() if x is None else x
    torch.manual_seed(seed)
    out = normalise(x, norm, dropout=nn.Dropout(rate))
    return out != 0, out, x


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_scales_the_rest(rate):
    shape = (8, 512, 64)
    kept, out, x = dropped(shape, rate, seed=3)
    count = kept.numel()
    assert abs(kept.float().mean().item() - (1 - rate)) < 5 * (rate * (1 - rate) / count) ** 0.5
    plain = normalise(x, nn.LayerNorm(shape[-1]))
    torch.testing.assert_close(out[kept], plain[kept] / (1 - rate))
    out.sum().backward()  # without dropout the sum over a row is 0 and has no gradient
    assert x.grad.abs().mean() > 0.01


def test_which_numbers_are_dropped_is_the_hash_of_their_place():
    for rate in (0.1, 0.7):
        kept, _, _ = dropped((3, 800, 24), rate, seed=11)
        torch.manual_seed(11)
        assert torch.equal(kept, reference_kept(kept.shape, rate, *torch.randint(2**32, (2,)).tolist()))


def test_dropped_numbers_have_no_gradient():
    """Through FiLM: a shift's gradient is the sum of those of the numbers that were kept."""
    x, _, film, modulation, _ = draw((2, 1, 64), True)
    torch.manual_seed(0)
    out = normalise(x, nn.LayerNorm(64), film, modulation, dropout=nn.Dropout(0.5))
    (gradient,) = torch.autograd.grad(out.sum(), modulation[0][1])
    assert torch.equal(gradient, (out[:, 0] != 0).float() * 2)


def test_dropout_follows_the_seed_and_neighbours_are_independent():
    shape = (4, 256, 64)
    first, again, other = (dropped(shape, 0.5, seed)[0].flatten().float() for seed in (3, 3, 4))
    assert torch.equal(first, again)
    bound = 5 / first.numel() ** 0.5
    sign = 2 * first - 1
    assert abs((sign * (2 * other - 1)).mean()) < bound
    for lag in (1, 2, 3, 8, 16, 64, 4096):
        assert abs((sign[lag:] * sign[:-lag]).mean()) < bound, lag


def test_recomputed_activations_drop_the_same_numbers():
    _, out, x = dropped((2, 64, 32), 0.5, seed=3)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    (wanted,) = torch.autograd.grad((out * weights).sum(), x)
    torch.manual_seed(3)
    out = checkpoint(normalise, x, nn.LayerNorm(32), dropout=nn.Dropout(0.5), use_reentrant=False)
    torch.manual_seed(99)
    (found,) = torch.autograd.grad((out * weights).sum(), x)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_in_eval_mode(training):
    dropout = nn.Dropout(0.5).train(training)
    out = normalise(torch.randn(2, 64, 32), nn.LayerNorm(32), dropout=dropout)
    assert (out == 0).any() == training


def test_nothing_is_random_without_dropout():
    state = torch.get_rng_state()
    normalise(torch.randn(2, 4, 8, generator=torch.Generator()), nn.LayerNorm(8), gelu=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_empty_batch():
    assert normalise(torch.randn(0, 4, 8), nn.LayerNorm(8)).shape == (0, 4, 8)


def test_training_after_inference():
    normalisation._identity.cache_clear()
    with torch.inference_mode():
        wanted = normalise(torch.ones(2, 4, 8), nn.LayerNorm(8))
    x = torch.ones(2, 4, 8, requires_grad=True)
    out = normalise(x, nn.LayerNorm(8))
    out.sum().backward()
    assert torch.equal(out, wanted)
