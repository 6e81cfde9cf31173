"""Run on a GPU, or with TRITON_INTERPRET=1 on CPU, which test_triton_kernels.py does in a process of its own."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models import normalisation
from models.backends import triton
from models.backends import triton_normalisation as backend
from models.conditioning import FiLM
from models.normalisation import normalise
from models.sparse_conv import INTERPRETED
from tests.models.norms import check_one_bad_row
from tests.reference.normalisation import kept as reference_kept
from tests.reference.normalisation import normalise as reference

if not triton.is_available():
    pytest.skip(triton.unavailable_reason(), allow_module_level=True)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
# Fewer channels than a block has, powers of two and others, and rows of one channel; rows that fill a block and others.
SHAPES = [(2, 9, 32), (3, 5, 7, 24), (1, 1, 1), (2, 3, 3), (2, 130, 48), (2, 35, 64), (1, 3, 2000)]


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    """On CPU the loops of numba would be."""
    monkeypatch.setattr(normalisation.numba_normalisation, "is_available", lambda: False)
    assert normalisation._choose(DEVICE) is backend


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks to a part of the rows and several parts to an image."""
    monkeypatch.setattr(backend, "NUMBERS", 64)
    monkeypatch.setattr(backend, "NUMBERS_BACKWARD", 64)
    monkeypatch.setattr(backend, "PARTS", 6)
    monkeypatch.setattr(backend, "ROWS_OF_A_PART", 1)


def draw(shape, modulated=True, dtype=torch.float32):
    """(x, LayerNorm, FiLM, modulation, gradient of the result): random, of which all but the last need gradients.

    Scale and shift are parts of matrices, as those of models.conditioning.Conditioning, here of unequal strides.
    """
    generator = torch.Generator().manual_seed(sum(shape))
    norm, film = nn.LayerNorm(shape[-1]), FiLM(shape[-1])
    film.place = 0
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=0.5, generator=generator)
    x = (torch.randn(shape, generator=generator) * 2 + 1).to(DEVICE, dtype).requires_grad_()
    wide = [torch.randn(shape[0], parts * shape[-1] + 1, generator=generator).to(DEVICE) for parts in (3, 2)]
    vectors = [matrix[:, 1 : 1 + shape[-1]].requires_grad_() for matrix in wide]
    grad = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    return x, norm.to(DEVICE), film, [tuple(vectors)] if modulated else None, grad


def check_against_the_formula(shape, modulated, gelu, dtype, rate=0.0):
    """The result and all gradients, with the numbers that are dropped those of the reference."""
    x, norm, film, modulation, grad = draw(shape, modulated, dtype)
    vectors = [*norm.parameters(), *(modulation or [()])[0]]
    torch.manual_seed(7)
    out = normalise(x, norm, film, modulation, gelu, nn.Dropout(rate) if rate else None)
    gradients = torch.autograd.grad(out, [x, *vectors], grad)
    assert out.dtype == gradients[0].dtype == dtype

    leaves = [leaf.detach().cpu().double().requires_grad_() for leaf in (x, *vectors)]
    groups = 1, shape[-1]
    film = leaves[3:] or [torch.ones(groups, dtype=torch.float64), torch.zeros(groups, dtype=torch.float64)]
    wanted = reference(*leaves[:3], *film, gelu)
    if rate:
        torch.manual_seed(7)
        wanted = wanted * reference_kept(shape, rate, *torch.randint(2**32, (2,)).tolist()) / (1 - rate)
    wanted_gradients = torch.autograd.grad(wanted, leaves, grad.cpu().double())
    tolerance = TOLERANCES[dtype]
    for ours, theirs in zip([out, *gradients], [wanted, *wanted_gradients], strict=True):
        largest = theirs.abs().max().item() if shape[-1] > 1 else 316.0  # what rounding is multiplied by, eps ** -0.5
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=tolerance, atol=tolerance * max(largest, 1e-3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("modulated", [False, True])
def test_is_the_formula(shape, modulated):
    check_against_the_formula(shape, modulated, gelu=True, dtype=torch.float32)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_option_in_every_precision(modulated, gelu, rate, dtype):
    """0.3 and 0.8 have different signs as the int32 that a kernel is told."""
    check_against_the_formula((2, 11, 24), modulated, gelu, dtype, rate)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("shape", [(2, 41, 24), (3, 5, 3, 16), (9, 2, 7)])
def test_parts_of_the_rows_are_added_up(shape, modulated, small_blocks):
    """The last block of a part and the last part of an image incomplete; and more images than parts."""
    check_against_the_formula(shape, modulated, gelu=True, dtype=torch.float32, rate=0.3)


def test_parts_are_few_and_whole_blocks():
    for groups in (1, 2, 7, 1023, 1024, 5000):
        for rows in (1, 31, 32, 33, 1000, 4096, 10**6):
            for block in (1, 8, 64):
                parts, span = backend._parts(groups, rows, block)
                assert (parts - 1) * span < rows <= parts * span
                assert span % block == 0 and span >= backend.ROWS_OF_A_PART
                assert groups * parts <= max(backend.PARTS, groups)


def test_small_blocks_are_several(small_blocks):
    """What the tests above and below need of them."""
    assert backend._sizes(torch.empty(2, 41, 24), torch.empty(2, 24), backend.NUMBERS) == (2, 41, 24, (2, 32))
    assert backend._parts(2, 41, 2) == (3, 14)


def test_the_same_input_gives_the_same_bits(small_blocks):
    x, norm, film, modulation, grad = draw((2, 19, 24))
    results = []
    for _ in range(2):
        out = normalise(x, norm, film, modulation, gelu=True)
        results.append([out, *torch.autograd.grad(out, [x, *norm.parameters(), *modulation[0]], grad)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_values_vectors_and_gradients_need_not_be_contiguous():
    x, norm, film, modulation, grad = draw((2, 9, 24))
    out = normalise(x, norm, film, modulation)
    (wanted,) = torch.autograd.grad(out, x, grad)
    turned = x.detach().transpose(1, 2).contiguous().requires_grad_()
    apart = [tuple(vector.detach().mT.contiguous().mT for vector in modulation[0])]
    again = normalise(turned.transpose(1, 2), norm, film, apart)
    (found,) = torch.autograd.grad(again, turned, grad.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(again, out)
    assert torch.equal(found.transpose(1, 2), wanted)
    one_for_all = [tuple(vector[:1].expand(2, -1) for vector in modulation[0])]
    copied = [tuple(vector.contiguous() for vector in one_for_all[0])]
    assert torch.equal(normalise(x, norm, film, one_for_all), normalise(x, norm, film, copied))


def test_autocast_changes_nothing():
    x, norm, film, modulation, _ = draw((2, 9, 24), dtype=torch.bfloat16)
    out = normalise(x, norm, film, modulation, gelu=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(normalise(x, norm, film, modulation, gelu=True), out)
        assert normalise(x.float(), norm).dtype == torch.float32


def test_a_large_mean_costs_no_precision():
    """The mean of squares minus the square of the mean would be 0 for these."""
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 1e4
    wanted = nn.functional.layer_norm(x.double(), (64,)).float()
    torch.testing.assert_close(normalise(x, nn.LayerNorm(64, device=DEVICE)), wanted, rtol=0, atol=5e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_bad_number_spoils_its_row_and_no_other(value):
    x, norm, _, _, grad = draw((2, 9, 24), False)
    with torch.no_grad():
        x[1, 3, 5] = value
    out = normalise(x, norm, gelu=True)
    out.backward(grad)
    check_one_bad_row(out, x, norm)


@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_dropout_keeps_the_mean_and_follows_the_seed(rate):
    x, norm = torch.randn(2, 256, 64, device=DEVICE), nn.LayerNorm(64, device=DEVICE)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(normalise(x, norm, dropout=nn.Dropout(rate)))
    kept = outs[0] != 0
    assert abs(kept.float().mean().item() - (1 - rate)) < 5 * (rate * (1 - rate) / kept.numel()) ** 0.5
    torch.testing.assert_close(outs[0][kept], normalise(x, norm)[kept] / (1 - rate))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert torch.equal(normalise(x, norm, dropout=nn.Dropout(rate).eval()), normalise(x, norm))


def test_recomputed_activations_drop_the_same_numbers():
    x, norm, _, _, grad = draw((2, 64, 24), False)
    dropout = nn.Dropout(0.5)
    torch.manual_seed(3)
    (wanted,) = torch.autograd.grad(normalise(x, norm, dropout=dropout), x, grad)
    torch.manual_seed(3)
    out = checkpoint(functools.partial(normalise, dropout=dropout), x, norm, use_reentrant=False)
    torch.manual_seed(99)
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], wanted)


def test_only_two_numbers_a_row_are_kept_beside_what_comes_in():
    x, norm, film, modulation, _ = draw((2, 9, 24), dtype=torch.bfloat16)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        normalise(x, norm, film, modulation, gelu=True, dropout=nn.Dropout(0.5))
    known = {tensor.data_ptr() for tensor in (x, *norm.parameters(), *modulation[0])}
    assert [tensor.shape for tensor in held if tensor.data_ptr() not in known] == [(2, 18)]


def test_gradients_that_are_not_needed_are_none():
    x, norm, film, modulation, grad = draw((2, 9, 24))
    normalise(x, norm.requires_grad_(False), film, [tuple(v.detach() for v in modulation[0])]).backward(grad)
    assert x.grad is not None and norm.weight.grad is None and norm.bias.grad is None
    normalise(x.detach(), norm.requires_grad_(), film, modulation).backward(grad)
    assert all(leaf.grad is not None for leaf in (*norm.parameters(), *modulation[0]))


def test_the_gradient_of_a_residual_is_added():
    x, norm, film, modulation, grad = draw((2, 9, 24))
    leaves = [x, *norm.parameters(), *modulation[0]]
    wanted = torch.autograd.grad(normalise(x, norm, film, modulation, gelu=True), leaves, grad)
    outputs = normalise(x, norm, film, modulation, gelu=True, residual=True)
    assert torch.equal(outputs[1], x)
    gradients = grad.clone(), 3 * grad
    found = torch.autograd.grad(outputs, leaves, gradients)
    assert torch.equal(gradients[0], grad) and torch.equal(gradients[1], 3 * grad)
    for ours, theirs in zip(found, [wanted[0] + 3 * grad, *wanted[1:]], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives_are_refused():
    x, norm, _, _, _ = draw((2, 9, 24), False)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(normalise(x, norm).sum() + x.pow(3).sum(), x, create_graph=True)


@pytest.mark.parametrize(("shape", "modulated"), [((0, 4, 24), False), ((2, 0, 24), True)])
def test_no_rows(shape, modulated):
    x, norm, film, modulation, grad = draw(shape, modulated)
    out = normalise(x, norm, film, modulation, gelu=True)
    assert out.shape == shape
    out.backward(grad)
    assert x.grad.shape == shape and not norm.weight.grad.any()


def test_what_the_kernels_do_not_know_is_left_to_pytorch():
    """float64, and rows that do not fit the registers."""
    x, norm, film, modulation, _ = draw((2, 9, 24))
    wide = [tuple(vector.double() for vector in modulation[0])]
    out = normalise(x.double(), norm.double(), film, wide, gelu=True)
    assert out.dtype == torch.float64
    torch.testing.assert_close(normalise(x, norm.float(), film, modulation, gelu=True), out.float())
    x, norm = torch.randn(1, 2, backend.MOST_CHANNELS + 1, device=DEVICE), nn.LayerNorm(backend.MOST_CHANNELS + 1)
    assert torch.equal(normalise(x, norm.to(DEVICE)), norm(x))


def test_compiles_without_a_graph_break():
    x, norm, film, modulation, _ = draw((2, 9, 24))
    compiled = torch.compile(lambda x: normalise(x, norm, film, modulation, True), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), normalise(x, norm, film, modulation, gelu=True))
