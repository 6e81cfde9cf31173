import pytest
import torch
import torch.nn.functional as F

from models import attention
from models.attention import Attention
from tests.models.tiny import awake
from utils.errors import UserError


def layer(width=64, kind="auto"):
    torch.manual_seed(0)
    return awake(Attention(width, kind))


@pytest.mark.parametrize(("width", "heads"), [(16, 4), (128, 4), (160, 5), (256, 8)])
def test_heads_of_32(width, heads):
    made = layer(width)
    assert made.heads == heads
    assert made.qkv.weight.shape == (3 * 32 * heads, width)


def test_it_is_softmax_attention_with_a_residual():
    made, x = layer(), torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0))
    tokens = x.reshape(2, 15, 64)
    normed = F.layer_norm(tokens, (64,), made.norm.weight, made.norm.bias)
    qkv = F.linear(normed, made.qkv.weight)
    q, k, v = (part.reshape(2, 15, 4, 32).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    mixed = ((q @ k.transpose(2, 3)) / 32**0.5).softmax(-1) @ v
    expected = tokens + made.out(mixed.transpose(1, 2).reshape(2, 15, 128))
    torch.testing.assert_close(made(x), expected.reshape(x.shape))


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("sharpness", [1, 4])
def test_softmax_attention_in_every_precision_forward_and_backward(dtype, tolerance, sharpness):
    """Also where logits are large, or all moved by the same number, which softmax leaves out."""
    generator = torch.Generator().manual_seed(0)
    qkv, grad = (torch.randn(2, 15, parts, 4, 32, generator=generator, dtype=torch.float64) for parts in (3, 1))
    grad = grad[:, :, 0]
    qkv[:, :, :2] *= sharpness
    qkv[:, :, 1] += 3  # of all keys: a common offset
    qkv = qkv.to(dtype)

    def outcome(attend, x):
        x = x.detach().requires_grad_()
        out = attend(*x.unbind(2))
        return out, *torch.autograd.grad(out, x, grad.to(out.dtype))

    def wanted(q, k, v):
        weights = (torch.einsum("blhd,bmhd->bhlm", q, k) / 32**0.5).softmax(-1)
        return torch.einsum("bhlm,bmhd->blhd", weights, v)

    for found, exact in zip(outcome(attention._sdpa, qkv), outcome(wanted, qkv.double()), strict=True):
        assert found.dtype == dtype and (found.double() - exact).norm() <= tolerance * exact.norm()


def test_it_starts_as_the_identity():
    x = torch.randn(1, 4, 4, 64)
    torch.testing.assert_close(Attention(64)(x), x)


def test_it_knows_no_positions():
    made, x = layer(), torch.randn(1, 4, 4, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made(x.flip(1, 2)), made(x).flip(1, 2))
    torch.testing.assert_close(made(x.transpose(1, 2)), made(x).transpose(1, 2))


def test_sdpa_is_what_auto_takes_on_a_cpu():
    x = torch.randn(1, 4, 4, 64)
    assert torch.equal(layer(kind="sdpa")(x), layer(kind="auto")(x))


def test_unknown_or_missing_kinds_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"model\.attention='xformers'.*auto, sdpa, flash_attn"):
        Attention(64, "xformers")
    monkeypatch.setattr(attention, "_flash_attn", lambda: None)
    with pytest.raises(UserError, match=r"model\.attention='flash_attn'.*install"):
        Attention(64, "flash_attn")


def test_flash_attn_is_refused_where_it_does_not_apply(monkeypatch):
    monkeypatch.setattr(attention, "_flash_attn", object)
    with pytest.raises(UserError, match=r"model\.attention='flash_attn'.*cpu and float32"):
        Attention(64, "flash_attn")(torch.randn(1, 2, 2, 64))


def test_the_flash_path_computes_the_same(monkeypatch):
    """With a stand-in that has the signature of flash_attn_func: [B, L, heads, dim] in and out."""

    class Package:
        @staticmethod
        def flash_attn_func(q, k, v):
            scores = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
            return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)

    x = torch.randn(2, 3, 4, 64, generator=torch.Generator().manual_seed(0))
    expected = layer(kind="sdpa")(x)
    monkeypatch.setattr(attention, "_flash_attn", lambda: Package)
    monkeypatch.setattr(Attention, "_uses_flash", lambda self, q: True)
    torch.testing.assert_close(layer()(x), expected)


def test_to_look_for_flash_attn_does_not_break_a_compiled_graph():
    attention._flash_attn.cache_clear()
    function = torch.compile(lambda x: x + attention._has_flash_attn(), fullgraph=True, backend="eager")
    assert function(torch.zeros(1)) == (attention._flash_attn() is not None)
