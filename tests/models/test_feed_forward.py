import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import compiled
from models.feed_forward import FeedForward

SHAPES = [(2, 9, 32), (3, 5, 7, 24), (1, 1, 1), (2, 700, 33), (4100, 5), (4104, 5)]  # the last in eight parts
fused = pytest.mark.skipif(not compiled.is_available(), reason=compiled.unavailable_reason())


def draw(shape, hidden=40):
    """(layer, x that needs a gradient, gradient of the result), random."""
    generator = torch.Generator().manual_seed(sum(shape))
    layer = FeedForward(shape[-1], hidden)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer, torch.randn(shape, generator=generator).requires_grad_(), torch.randn(shape, generator=generator)


def expected(layer, x, grad):
    """(result, gradients of x and of the parameters), written out in float64."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in (x, *layer.parameters())]
    hidden = leaves[0] @ leaves[1].T + leaves[2]
    out = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2 @ leaves[3].T + leaves[4]
    return out, *torch.autograd.grad(out, leaves, grad.double())


@pytest.mark.parametrize(("shape", "hidden"), [*((shape, 40) for shape in SHAPES), ((3, 7), 5000)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_is_the_formula(shape, hidden, dtype, tolerance):
    layer, x, grad = draw(shape, hidden)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = layer(x)
    gradients = torch.autograd.grad(out, [x, *layer.parameters()], grad.to(dtype))
    assert out.dtype == dtype
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    for ours, theirs in zip([out, *gradients], expected(layer, x, grad.to(dtype)), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_the_modules(dtype, mixed, monkeypatch):
    layer, x, grad = draw((2, 9, 32))
    x = x.detach().to(dtype).requires_grad_()
    results = []
    for _ in range(2):
        with torch.autocast("cpu", mixed, enabled=mixed != torch.float32):
            if dtype != torch.float32 and mixed == torch.float32:
                with pytest.raises(RuntimeError, match="dtype"):
                    layer(x)
                return
            out = layer(x)
        results.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], grad.to(out.dtype))])
        monkeypatch.setattr(FeedForward, "_can_fuse", lambda *arguments: False)
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_give_the_same_on_any_number_of_threads(dtype):
    layer, x, grad = draw((8192, 32), hidden=64)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = layer(x)
            results.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], grad.to(dtype))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@fused
def test_a_bias_need_not_be_contiguous():
    layer, x, grad = draw((2, 9, 32))
    wanted = torch.autograd.grad(layer(x), list(layer.parameters()), grad)
    layer[0].bias = nn.Parameter(layer[0].bias.detach().repeat_interleave(2)[::2])
    for ours, theirs in zip(torch.autograd.grad(layer(x), list(layer.parameters()), grad), wanted, strict=True):
        assert torch.equal(ours, theirs)


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed", [True, False])
def test_of_activations_the_input_alone_is_kept(dtype, mixed):
    if dtype == torch.bfloat16 and not mixed:
        return
    layer, x, _ = draw((2, 50, 32))
    x = x.detach().to(dtype).requires_grad_()
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        layer(x)
    weights = {parameter.shape for parameter in layer.parameters()}
    assert {tensor.data_ptr() for tensor in kept if tensor.shape not in weights} == {x.data_ptr()}


@pytest.mark.parametrize("trained", [["x"], ["0.weight"], ["0.bias", "2.weight"], ["x", "2.bias"]])
def test_some_gradients_are_those_of_all(trained):
    layer, x, grad = draw((2, 9, 32))
    leaves = {"x": x, **dict(layer.named_parameters())}
    wanted = dict(zip(leaves, torch.autograd.grad(layer(x), list(leaves.values()), grad), strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained)
    layer(x).backward(grad)
    for name, leaf in leaves.items():
        assert (leaf.grad is None) if name not in trained else torch.equal(leaf.grad, wanted[name])


def test_values_and_gradients_need_not_be_contiguous():
    layer, x, grad = draw((3, 5, 7, 24))
    (wanted,) = torch.autograd.grad(layer(x), x, grad)
    strided = x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    (found,) = torch.autograd.grad(layer(strided), strided, grad.transpose(0, 1).contiguous().transpose(0, 1))
    torch.testing.assert_close(found, wanted)
    (found,) = torch.autograd.grad(layer(x).sum(), x)  # whose gradient is one number, expanded
    torch.testing.assert_close(found, torch.autograd.grad(layer(x), x, torch.ones_like(x))[0])


def test_its_input_is_left_as_it_was():
    layer, x, grad = draw((2, 9, 32))
    before, gradient = x.detach().clone(), grad.clone()
    layer(x).backward(grad)
    assert torch.equal(x, before)
    assert torch.equal(grad, gradient)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_number_spoils_its_row_and_no_other(value):
    layer, x, grad = draw((2, 9, 32))
    with torch.no_grad():
        x[1, 3, 5] = value
    out = layer(x)
    out.backward(grad)
    assert (out.isfinite().all(dim=-1) == x.isfinite().all(dim=-1)).all()
    assert x.grad.isfinite().all(dim=-1).sum() == 17
    assert not layer[0].weight.grad.isfinite().all()


def test_float64_is_not_rounded():
    layer, x, grad = draw((2, 9, 32))
    wanted = expected(layer, x, grad)[0]
    torch.testing.assert_close(layer.double()(x.double()), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mixed", [True, False])
def test_a_layer_of_another_dtype_does_what_its_modules_do(dtype, mixed):
    layer, x, _ = draw((2, 9, 32))
    layer, x = layer.to(dtype), x.detach().to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        wanted = nn.Sequential.forward(layer, x)
        assert torch.equal(layer(x), wanted)


def test_the_backward_pass_may_run_under_another_autocast():
    for ahead, back in [(False, True), (True, False)]:
        layer, x, grad = draw((2, 9, 32))
        results = []
        for enabled in (ahead, back):
            with torch.autocast("cpu", torch.bfloat16, enabled=ahead):
                out = layer(x)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                results.append(torch.autograd.grad(out, [x, *layer.parameters()], grad.to(out.dtype)))
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@fused
def test_second_derivatives_are_refused():
    """Even of a sum, whose gradient is a constant."""
    layer, x, _ = draw((2, 9, 32))
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(layer(x).sum() + x.pow(3).sum(), x, create_graph=True)


def test_it_can_be_compiled_without_a_break():
    layer, x, _ = draw((2, 9, 32))
    compiled_layer = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled_layer(x), layer(x))


@pytest.mark.parametrize(("place", "other"), [
    (0, nn.Linear(32, 40, bias=False)), (1, nn.ReLU()), (1, nn.GELU(approximate="tanh")), (2, nn.Identity()),
])
def test_layers_put_in_the_place_of_its_own_are_used(place, other):
    layer, x, _ = draw((2, 9, 32))
    layer[place] = other
    assert torch.equal(layer(x), layer[2](layer[1](layer[0](x))))


def test_an_empty_batch_stays_one():
    layer, _, _ = draw((2, 9, 32))
    assert layer(torch.empty(0, 9, 32)).shape == (0, 9, 32)


def test_parameters_are_those_of_a_sequence():
    layer = FeedForward(4, 6)
    sequence = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
    sequence.load_state_dict(layer.state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), sequence(x))


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_and_its_gradient_of_any_number(dtype):
    h = torch.cat([torch.linspace(-14, 14, 9001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e4, -3e4, 3e38, -3e38])])
    h = h.to(dtype)  # 1001 · 9 of them
    wide = h.double().requires_grad_()
    F.gelu(wide).sum().backward()
    scale = wide.detach().abs().clamp(min=1e-3)
    tolerance = 3e-7 if dtype == torch.float32 else 2**-8  # of bfloat16, which rounds a derivative of 1.13 as well
    ours, grad, forward = h.clone(), torch.ones_like(h), h.clone()
    no_bias, sizes = (torch.float32, torch.zeros(9)), (compiled.kind(dtype), len(h) // 9, 9)
    compiled.run_at("gelu.backward", [(dtype, ours), no_bias, (dtype, grad)], *sizes)
    compiled.run_at("gelu.forward", [(dtype, forward), no_bias], *sizes)
    for out in (ours, forward):
        assert ((out.double() - F.gelu(wide.detach())).abs() <= tolerance * scale).all()
    assert ((grad.double() - wide.grad).abs() <= 4 * tolerance).all()
