"""The numeric primitives of the model in plain PyTorch: slow, exact, the same on CPU and GPU."""

import torch
import torch.nn.functional as F

FP8_MAX = 448.0
E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _round_up_to_power_of_two(scale):
    """By its bits: a power function need not be exact on every device. For normal positive FP32."""
    return ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def _round_e2m1(x):
    """Nearest E2M1 value, ties to the even code."""
    magnitude = x.abs().clamp(max=E2M1_MAX)
    values = torch.tensor(E2M1_VALUES, device=x.device, dtype=torch.float32)
    middles = (values[1:] + values[:-1]) / 2
    below = torch.bucketize(magnitude, middles)  # a tie counts as below
    tie_to_even = (below < 7) & (magnitude == middles[below.clamp(max=6)]) & (below % 2 == 1)
    return values[below + tie_to_even.long()] * torch.where(x < 0, -1.0, 1.0)


def act_quant(x, block_size=128, scale_fmt=None, scale_dtype=torch.float32, inplace=False):
    """FP8 activations with a scale per ``block_size`` of the last dimension: (E4M3, scales), or ``x`` rounded in
    place."""
    blocks = x.float().unflatten(-1, (-1, block_size))
    scale = blocks.abs().amax(-1).clamp(min=1e-4) / FP8_MAX
    if scale_fmt == "ue8m0":
        scale = _round_up_to_power_of_two(scale)
    y = (blocks / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    if inplace:
        return x.copy_((y.float() * scale.unsqueeze(-1)).flatten(-2))
    return y.flatten(-2), scale.to(scale_dtype)


def fp4_act_quant(x, block_size=32, inplace=False):
    """FP4 activations with a power-of-two scale per ``block_size``: (values, scales), or ``x`` rounded in place."""
    blocks = x.float().unflatten(-1, (-1, block_size))
    scale = blocks.abs().amax(-1).clamp(min=E2M1_MAX * 2.0**-126) / E2M1_MAX
    scale = _round_up_to_power_of_two(scale)
    y = _round_e2m1(blocks / scale.unsqueeze(-1))
    if inplace:
        return x.copy_((y * scale.unsqueeze(-1)).flatten(-2))
    return y.flatten(-2), scale


def _scale_values(scale):
    """E8M0 or FP32 scales as FP32, exactly; byte 0 is the subnormal 2^-127."""
    if scale.dtype == torch.float8_e8m0fnu:
        byte = scale.view(torch.uint8).int()
        return torch.where(byte == 0, 1 << 22, byte << 23).view(torch.float32)
    return scale.float()


def dequantize_fp8(weight, scale, block_size=128):
    """FP32 [out, in] of E4M3 ``weight`` with a scale per 128x128 block."""
    rows = _scale_values(scale).repeat_interleave(block_size, 0)[: weight.shape[0]]
    return weight.float() * rows.repeat_interleave(block_size, 1)[:, : weight.shape[1]]


def dequantize_fp4(weight, scale, block_size=32):
    """FP32 [out, in] of packed E2M1 ``weight`` [out, in/2] with an E8M0 scale per 32 of a row."""
    packed = weight.view(torch.uint8)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
    values = torch.tensor(E2M1_VALUES, device=packed.device, dtype=torch.float32)
    values = torch.cat([values, -values])[codes]
    return values * _scale_values(scale).repeat_interleave(block_size, -1)


def fp8_gemm(a, a_s, b, b_s, scale_dtype=torch.float32):
    """(a * a_s) @ (b * b_s)^T in the default dtype; activations in blocks of 128."""
    x = a.float().unflatten(-1, (-1, 128)) * _scale_values(a_s).unsqueeze(-1)
    return F.linear(x.flatten(-2), dequantize_fp8(b, b_s)).to(torch.get_default_dtype())


def fp4_gemm(a, a_s, b, b_s, scale_dtype=torch.float32):
    """FP8 activations times FP4 weights, in the default dtype."""
    x = a.float().unflatten(-1, (-1, 128)) * _scale_values(a_s).unsqueeze(-1)
    return F.linear(x.flatten(-2), dequantize_fp4(b, b_s)).to(torch.get_default_dtype())


def sparse_attn(q, kv, attn_sink, topk_idxs, scale):
    """Each query attends the entries of ``kv`` that ``topk_idxs`` names (-1: none); keys are values.

    q [b, s, h, d], kv [b, n, d], attn_sink [h], topk_idxs [b, s, k] -> [b, s, h, d]. The sink adds exp(sink) to the
    denominator only.
    """
    b, s, k = topk_idxs.shape
    index = topk_idxs.clamp(min=0).long()
    picked = kv.float().gather(1, index.flatten(1).unsqueeze(-1).expand(-1, -1, kv.shape[-1])).unflatten(1, (s, k))
    logits = torch.einsum("bshd,bskd->bshk", q.float(), picked) * scale
    logits = logits.masked_fill((topk_idxs < 0).unsqueeze(2), float("-inf"))
    sink = attn_sink.float().view(1, 1, -1, 1).expand(b, s, -1, 1)
    weights = torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]
    return torch.einsum("bshk,bskd->bshd", weights, picked).to(q.dtype)


def hc_split_sinkhorn(mixes, hc_scale, hc_base, hc_mult=4, sinkhorn_iters=20, eps=1e-6):
    """Mixes [..., (2+H)H] -> pre [..., H], post [..., H], comb [..., H, H] of doubly normalised rows and columns."""
    h = hc_mult
    pre = torch.sigmoid(mixes[..., :h] * hc_scale[0] + hc_base[:h]) + eps
    post = 2 * torch.sigmoid(mixes[..., h : 2 * h] * hc_scale[1] + hc_base[h : 2 * h])
    comb = (mixes[..., 2 * h :] * hc_scale[2] + hc_base[2 * h :]).unflatten(-1, (h, h))
    comb = torch.softmax(comb, -1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(sinkhorn_iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return pre, post, comb
