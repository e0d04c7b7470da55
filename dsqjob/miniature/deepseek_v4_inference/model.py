"""A model with DeepSeek-V4's parameters, module names and data flow, for miniatures. Plain PyTorch, prefill only."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from kernel import act_quant, fp4_act_quant, fp4_gemm, fp8_gemm, hc_split_sinkhorn, sparse_attn
from torch import nn

world_size = 1
rank = 0
block_size = 128
fp4_block_size = 32
default_dtype = torch.bfloat16
scale_fmt = None
scale_dtype = torch.float32


@dataclass
class ModelArgs:
    max_batch_size: int = 4
    max_seq_len: int = 4096
    dtype: str = "fp8"
    scale_fmt: str = "ue8m0"
    expert_dtype: str | None = None
    scale_dtype: str = "fp8"
    vocab_size: int = 512
    dim: int = 256
    moe_inter_dim: int = 128
    n_layers: int = 4
    n_hash_layers: int = 1
    n_mtp_layers: int = 1
    n_heads: int = 8
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    n_activated_experts: int = 2
    score_func: str = "sqrtsoftplus"
    route_scale: float = 1.0
    swiglu_limit: float = 0.0
    q_lora_rank: int = 128
    head_dim: int = 128
    rope_head_dim: int = 64
    norm_eps: float = 1e-6
    o_groups: int = 8
    o_lora_rank: int = 128
    window_size: int = 16
    compress_ratios: tuple[int, ...] = (0,)
    compress_rope_theta: float = 160000.0
    original_seq_len: int = 0
    rope_theta: float = 10000.0
    rope_factor: float = 16
    beta_fast: int = 32
    beta_slow: int = 1
    index_n_heads: int = 8
    index_head_dim: int = 128
    index_topk: int = 16
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6


def linear(x, weight, bias=None):
    """By the weight's dtype: FP4 and FP8 weights see FP8 activations."""
    if weight.dtype == torch.float4_e2m1fn_x2:
        y, s = act_quant(x, block_size, scale_fmt, scale_dtype)
        return fp4_gemm(y, s, weight, weight.scale, scale_dtype)
    if weight.dtype == torch.float8_e4m3fn:
        y, s = act_quant(x, block_size, scale_fmt, scale_dtype)
        return fp8_gemm(y, s, weight, weight.scale, scale_dtype)
    return F.linear(x, weight, bias)


class Linear(nn.Module):
    def __init__(self, in_features, out_features, bias=False, dtype=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        dtype = dtype or default_dtype
        scale = None
        if dtype == torch.float4_e2m1fn_x2:
            weight = torch.empty(out_features, in_features // 2, dtype=torch.uint8).view(dtype)
            scale = (out_features, in_features // fp4_block_size)
        else:
            weight = torch.empty(out_features, in_features, dtype=dtype)
            if dtype == torch.float8_e4m3fn:
                scale = (math.ceil(out_features / block_size), math.ceil(in_features / block_size))
        self.weight = nn.Parameter(weight, requires_grad=False)
        if scale is None:
            self.register_parameter("scale", None)
        else:
            empty = torch.empty(scale, dtype=torch.float8_e8m0fnu)
            self.scale = self.weight.scale = nn.Parameter(empty, requires_grad=False)
        self.register_parameter("bias", None)

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class ColumnParallelLinear(Linear):
    def __init__(self, in_features, out_features, bias=False, dtype=None):
        assert out_features % world_size == 0
        super().__init__(in_features, out_features // world_size, bias, dtype)


class RowParallelLinear(Linear):
    def __init__(self, in_features, out_features, bias=False, dtype=None):
        assert in_features % world_size == 0
        super().__init__(in_features // world_size, out_features, bias, dtype)

    def forward(self, x):
        y = linear(x, self.weight)
        if world_size > 1:
            y = y.float()
            dist.all_reduce(y)
        return y.type_as(x)


class ParallelEmbedding(nn.Module):
    def __init__(self, vocab_size, dim):
        super().__init__()
        assert vocab_size % world_size == 0
        self.part = vocab_size // world_size
        self.start = rank * self.part
        self.weight = nn.Parameter(torch.empty(self.part, dim), requires_grad=False)

    def forward(self, ids):
        local = ids - self.start
        outside = (local < 0) | (local >= self.part)
        y = F.embedding(local.masked_fill(outside, 0), self.weight)
        if world_size > 1:
            y[outside] = 0
            dist.all_reduce(y)
        return y


class ParallelHead(nn.Module):
    def __init__(self, vocab_size, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size // world_size, dim, dtype=torch.float32), requires_grad=False)

    def forward(self, x):
        logits = F.linear(x[:, -1].float(), self.weight)
        if world_size > 1:
            parts = [torch.empty_like(logits) for _ in range(world_size)]
            dist.all_gather(parts, logits)
            logits = torch.cat(parts, -1)
        return logits


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32), requires_grad=False)

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight).type_as(x)


@lru_cache(4)
def precompute_freqs_cis(dim, length, original, base, factor, beta_fast, beta_slow):
    """complex64 [length, dim/2]; YaRN where ``original`` > 0."""
    freqs = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if original > 0:

        def position(rotations):
            return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(position(beta_fast)), 0)
        high = min(math.ceil(position(beta_slow)), dim - 1)
        ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
        freqs = freqs / factor * ramp + freqs * (1 - ramp)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(x, freqs_cis, inverse=False):
    """Rotate interleaved pairs of the last dimension in place; x [b, s, ..., d], freqs [s, d/2]."""
    y = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    freqs = freqs_cis.conj() if inverse else freqs_cis
    freqs = freqs.view(1, x.shape[1], *([1] * (x.ndim - 3)), -1)
    return x.copy_(torch.view_as_real(y * freqs).flatten(-2))


def rotate_activation(x):
    """Hadamard transform over the last dimension (a power of two), scaled by its square root."""
    n = x.shape[-1]
    y = x.float()
    width = 1
    while width < n:
        a, b = y.unflatten(-1, (-1, 2, width)).unbind(-2)
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        width *= 2
    return (y * n**-0.5).type_as(x)


class Compressor(nn.Module):
    def __init__(self, args, ratio, head_dim, rotate=False):
        super().__init__()
        self.ratio, self.head_dim, self.rope_dim, self.rotate = ratio, head_dim, args.rope_head_dim, rotate
        self.overlap = ratio == 4
        channels = head_dim * (2 if self.overlap else 1)
        self.ape = nn.Parameter(torch.empty(ratio, channels, dtype=torch.float32), requires_grad=False)
        self.wkv = Linear(args.dim, channels, dtype=torch.float32)
        self.wgate = Linear(args.dim, channels, dtype=torch.float32)
        self.norm = RMSNorm(head_dim, args.norm_eps)

    def _overlapped(self, x, missing):
        """[b, g, r, 2d] -> [b, g, 2r, d]: the previous group's first half, this group's second half."""
        first, second = x.chunk(2, -1)
        previous = torch.full_like(first, missing)
        previous[:, 1:] = first[:, :-1]
        return torch.cat([previous, second], 2)

    def forward(self, x, freqs_cis):
        b, s, _ = x.shape
        groups = s // self.ratio
        if groups == 0:
            return x.new_zeros(b, 0, self.head_dim)
        y = x[:, : groups * self.ratio].float()
        kv = self.wkv(y).unflatten(1, (groups, self.ratio))
        score = self.wgate(y).unflatten(1, (groups, self.ratio)) + self.ape
        if self.overlap:
            kv, score = self._overlapped(kv, 0.0), self._overlapped(score, float("-inf"))
        out = self.norm((kv * score.softmax(2)).sum(2).type_as(x)).contiguous()
        apply_rotary_emb(out[..., -self.rope_dim :], freqs_cis[: groups * self.ratio : self.ratio])
        if self.rotate:
            out = rotate_activation(out)
            fp4_act_quant(out, fp4_block_size, inplace=True)
        else:
            kept = out[..., : -self.rope_dim].contiguous()
            out[..., : -self.rope_dim] = act_quant(kept, 64, scale_fmt, scale_dtype, inplace=True)
        return out


class Indexer(nn.Module):
    def __init__(self, args, ratio):
        super().__init__()
        self.n_heads = args.index_n_heads // world_size
        self.total_heads = args.index_n_heads
        self.head_dim, self.rope_dim, self.topk, self.ratio = (
            args.index_head_dim, args.rope_head_dim, args.index_topk, ratio,
        )  # fmt: skip
        self.wq_b = ColumnParallelLinear(args.q_lora_rank, args.index_n_heads * args.index_head_dim)
        self.weights_proj = ColumnParallelLinear(args.dim, args.index_n_heads, dtype=torch.bfloat16)
        self.compressor = Compressor(args, ratio, args.index_head_dim, rotate=True)

    def forward(self, x, qr, freqs_cis):
        """Indexes [b, s, k] into the compressed entries, -1 where a query may not see so many."""
        b, s, _ = x.shape
        k = self.compressor(x, freqs_cis)
        q = self.wq_b(qr).unflatten(-1, (self.n_heads, self.head_dim))
        apply_rotary_emb(q[..., -self.rope_dim :], freqs_cis[:s])
        q = rotate_activation(q)
        fp4_act_quant(q, fp4_block_size, inplace=True)
        w = self.weights_proj(x) * (self.head_dim**-0.5 * self.total_heads**-0.5)
        score = torch.einsum("bshd,btd->bsht", q.float(), k.float()).relu()
        score = (score * w.float().unsqueeze(-1)).sum(2).to(x.dtype)
        if world_size > 1:
            dist.all_reduce(score)
        finished = (torch.arange(s, device=x.device) + 1) // self.ratio
        hidden = torch.arange(k.shape[1], device=x.device) >= finished.unsqueeze(1)
        score = score.masked_fill(hidden, float("-inf"))
        index = score.topk(min(self.topk, k.shape[1]), -1)[1]
        return torch.where(index >= finished.view(1, s, 1), -1, index)


class Attention(nn.Module):
    def __init__(self, layer_id, args):
        super().__init__()
        self.n_heads = args.n_heads // world_size
        self.head_dim, self.rope_dim, self.window = args.head_dim, args.rope_head_dim, args.window_size
        self.n_groups = args.o_groups // world_size
        self.o_lora_rank, self.eps = args.o_lora_rank, args.norm_eps
        self.ratio = args.compress_ratios[layer_id]
        self.scale = args.head_dim**-0.5
        self.max_batch_size, self.max_seq_len = args.max_batch_size, args.max_seq_len
        self.attn_sink = nn.Parameter(torch.empty(self.n_heads, dtype=torch.float32), requires_grad=False)
        self.wq_a = Linear(args.dim, args.q_lora_rank)
        self.q_norm = RMSNorm(args.q_lora_rank, self.eps)
        self.wq_b = ColumnParallelLinear(args.q_lora_rank, args.n_heads * args.head_dim)
        self.wkv = Linear(args.dim, args.head_dim)
        self.kv_norm = RMSNorm(args.head_dim, self.eps)
        width = args.n_heads * args.head_dim // args.o_groups
        self.wo_a = ColumnParallelLinear(width, args.o_groups * args.o_lora_rank, dtype=torch.bfloat16)
        self.wo_b = RowParallelLinear(args.o_groups * args.o_lora_rank, args.dim)
        self.compressor = Compressor(args, self.ratio, args.head_dim) if self.ratio else None
        self.indexer = Indexer(args, self.ratio) if self.ratio == 4 else None
        base, original = (args.compress_rope_theta, args.original_seq_len) if self.ratio else (args.rope_theta, 0)
        freqs = precompute_freqs_cis(
            args.rope_head_dim, args.max_seq_len, original, base, args.rope_factor, args.beta_fast, args.beta_slow
        )
        self.register_buffer("freqs_cis", freqs, persistent=False)

    def _visible(self, x, qr):
        """Indexes of what each query attends: its window, then compressed entries, which follow the s positions."""
        b, s, _ = x.shape
        here = torch.arange(s, device=x.device)
        window = here.unsqueeze(1) - torch.arange(min(self.window, s), device=x.device).flip(0)
        index = torch.where(window < 0, -1, window).unsqueeze(0).expand(b, -1, -1)
        if not self.ratio or s < self.ratio:
            return index
        if self.indexer is not None:
            entries = self.indexer(x, qr, self.freqs_cis)
        else:
            groups = torch.arange(s // self.ratio, device=x.device)
            finished = ((here + 1) // self.ratio).unsqueeze(1)
            entries = torch.where(groups < finished, groups, -1).unsqueeze(0).expand(b, -1, -1)
        return torch.cat([index, torch.where(entries < 0, -1, entries + s)], -1)

    def forward(self, x, start_pos=0):
        assert start_pos == 0, "miniatures prefill only"
        b, s, _ = x.shape
        if b > self.max_batch_size or not 1 <= s <= self.max_seq_len:
            raise RuntimeError(f"a batch of shape {[b, s]} does not fit [{self.max_batch_size}, {self.max_seq_len}]")
        freqs = self.freqs_cis[:s]
        qr = self.q_norm(self.wq_a(x))
        q = self.wq_b(qr).unflatten(-1, (self.n_heads, self.head_dim))
        q = (q.float() * torch.rsqrt(q.float().square().mean(-1, keepdim=True) + self.eps)).type_as(x)
        apply_rotary_emb(q[..., -self.rope_dim :], freqs)
        kv = self.kv_norm(self.wkv(x)).contiguous()
        apply_rotary_emb(kv[..., -self.rope_dim :], freqs)
        kept = kv[..., : -self.rope_dim].contiguous()
        kv[..., : -self.rope_dim] = act_quant(kept, 64, scale_fmt, scale_dtype, inplace=True)
        index = self._visible(x, qr)
        if self.compressor is not None:
            kv = torch.cat([kv, self.compressor(x, self.freqs_cis)], 1)
        o = sparse_attn(q, kv, self.attn_sink, index, self.scale).contiguous()
        apply_rotary_emb(o[..., -self.rope_dim :], freqs, inverse=True)
        o = o.flatten(2).unflatten(-1, (self.n_groups, -1))
        weight = self.wo_a.weight.unflatten(0, (self.n_groups, self.o_lora_rank))
        return self.wo_b(torch.einsum("bsgd,grd->bsgr", o, weight).flatten(2))


class Gate(nn.Module):
    def __init__(self, layer_id, args):
        super().__init__()
        self.topk, self.route_scale, self.hash = (
            args.n_activated_experts,
            args.route_scale,
            layer_id < args.n_hash_layers,
        )
        self.weight = nn.Parameter(torch.empty(args.n_routed_experts, args.dim), requires_grad=False)
        if self.hash:
            table = torch.empty(args.vocab_size, self.topk, dtype=torch.int32)
            self.tid2eid = nn.Parameter(table, requires_grad=False)
            self.register_parameter("bias", None)
        else:
            empty = torch.empty(args.n_routed_experts, dtype=torch.float32)
            self.bias = nn.Parameter(empty, requires_grad=False)

    def forward(self, x, input_ids):
        scores = F.softplus(F.linear(x.float(), self.weight.float())).sqrt()
        if self.hash:
            picked = self.tid2eid[input_ids].long()
        else:
            picked = (scores + self.bias).topk(self.topk, -1)[1]
        weights = scores.gather(1, picked)
        return weights / weights.sum(-1, keepdim=True) * self.route_scale, picked


class Expert(nn.Module):
    def __init__(self, dim, inter_dim, dtype=None, swiglu_limit=0.0):
        super().__init__()
        self.w1 = Linear(dim, inter_dim, dtype=dtype)
        self.w2 = Linear(inter_dim, dim, dtype=dtype)
        self.w3 = Linear(dim, inter_dim, dtype=dtype)
        self.swiglu_limit = swiglu_limit

    def forward(self, x, weights=None):
        gate, up = self.w1(x).float(), self.w3(x).float()
        if self.swiglu_limit > 0:
            up = up.clamp(-self.swiglu_limit, self.swiglu_limit)
            gate = gate.clamp(max=self.swiglu_limit)
        y = F.silu(gate) * up
        if weights is not None:
            y = weights * y
        return self.w2(y.to(x.dtype))


class MoE(nn.Module):
    def __init__(self, layer_id, args):
        super().__init__()
        assert args.n_routed_experts % world_size == 0
        self.dim, self.n_routed_experts = args.dim, args.n_routed_experts
        self.n_local_experts = args.n_routed_experts // world_size
        self.experts_start_idx = rank * self.n_local_experts
        self.experts_end_idx = self.experts_start_idx + self.n_local_experts
        self.gate = Gate(layer_id, args)
        dtype = torch.float4_e2m1fn_x2 if args.expert_dtype == "fp4" else None
        local = range(self.experts_start_idx, self.experts_end_idx)
        self.experts = nn.ModuleList(
            Expert(args.dim, args.moe_inter_dim, dtype, args.swiglu_limit) if n in local else None
            for n in range(self.n_routed_experts)
        )
        self.shared_experts = Expert(args.dim, args.moe_inter_dim, None, args.swiglu_limit)

    def forward(self, x, input_ids):
        shape = x.shape
        x = x.reshape(-1, self.dim)
        weights, picked = self.gate(x, input_ids.flatten())
        y = torch.zeros_like(x, dtype=torch.float32)
        for n in range(self.experts_start_idx, self.experts_end_idx):
            token, choice = torch.where(picked == n)
            if len(token):
                y[token] += self.experts[n](x[token], weights[token, choice, None]).float()
        if world_size > 1:
            dist.all_reduce(y)
        return (y + self.shared_experts(x).float()).type_as(x).view(shape)


class Block(nn.Module):
    def __init__(self, layer_id, args):
        super().__init__()
        self.args, self.hc = args, args.hc_mult
        self.attn = Attention(layer_id, args)
        self.ffn = MoE(layer_id, args)
        self.attn_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        mixes = (2 + self.hc) * self.hc
        for part in ("attn", "ffn"):
            for name, shape in (("fn", (mixes, self.hc * args.dim)), ("base", (mixes,)), ("scale", (3,))):
                empty = torch.empty(shape, dtype=torch.float32)
                setattr(self, f"hc_{part}_{name}", nn.Parameter(empty, requires_grad=False))

    def hc_pre(self, h, fn, scale, base):
        u = h.flatten(2).float()
        mixes = F.linear(u, fn) * torch.rsqrt(u.square().mean(-1, keepdim=True) + self.args.norm_eps)
        pre, post, comb = hc_split_sinkhorn(mixes, scale, base, self.hc, self.args.hc_sinkhorn_iters, self.args.hc_eps)
        return (pre.unsqueeze(-1) * h.float()).sum(2).type_as(h), post, comb

    def hc_post(self, y, h, post, comb):
        mixed = (comb.unsqueeze(-1) * h.float().unsqueeze(3)).sum(2)
        return (post.unsqueeze(-1) * y.float().unsqueeze(2) + mixed).type_as(y)

    def forward(self, h, start_pos, input_ids):
        x, post, comb = self.hc_pre(h, self.hc_attn_fn, self.hc_attn_scale, self.hc_attn_base)
        h = self.hc_post(self.attn(self.attn_norm(x), start_pos), h, post, comb)
        x, post, comb = self.hc_pre(h, self.hc_ffn_fn, self.hc_ffn_scale, self.hc_ffn_base)
        return self.hc_post(self.ffn(self.ffn_norm(x), input_ids), h, post, comb)


def hc_head(h, fn, scale, base, eps, norm_eps):
    u = h.flatten(2).float()
    mixes = F.linear(u, fn) * torch.rsqrt(u.square().mean(-1, keepdim=True) + norm_eps)
    pre = torch.sigmoid(mixes * scale + base) + eps
    return (pre.unsqueeze(-1) * h.float()).sum(2).type_as(h)


def _head_parameters(module, args):
    for name, shape in (("fn", (args.hc_mult, args.hc_mult * args.dim)), ("base", (args.hc_mult,)), ("scale", (1,))):
        setattr(module, f"hc_head_{name}", nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False))


class MTPBlock(Block):
    """The draft layer. It shares embedding and head, and is never called by ``Transformer.forward``."""

    def __init__(self, layer_id, args):
        super().__init__(layer_id, args)
        self.e_proj = Linear(args.dim, args.dim)
        self.h_proj = Linear(args.dim, args.dim)
        for name in ("enorm", "hnorm", "norm"):
            setattr(self, name, RMSNorm(args.dim, args.norm_eps))
        _head_parameters(self, args)
        self.embed = self.head = None

    @torch.inference_mode()
    def forward(self, h, start_pos, input_ids):
        e = self.enorm(self.embed(input_ids)).unsqueeze(2)
        h = self.e_proj(e) + self.h_proj(self.hnorm(h))
        h = super().forward(h, start_pos, input_ids)
        x = hc_head(h, self.hc_head_fn, self.hc_head_scale, self.hc_head_base, self.args.hc_eps, self.args.norm_eps)
        return self.head(self.norm(x))


class Transformer(nn.Module):
    def __init__(self, args):
        super().__init__()
        global world_size, rank, default_dtype, scale_fmt, scale_dtype
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        default_dtype = torch.float8_e4m3fn if args.dtype == "fp8" else torch.bfloat16
        scale_fmt = args.scale_fmt
        scale_dtype = torch.float8_e8m0fnu if args.scale_dtype == "fp8" else torch.float32
        self.args, self.max_seq_len = args, args.max_seq_len
        self.embed = ParallelEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(n, args) for n in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.head = ParallelHead(args.vocab_size, args.dim)
        _head_parameters(self, args)
        self.mtp = nn.ModuleList(MTPBlock(args.n_layers + n, args) for n in range(args.n_mtp_layers))
        for block in self.mtp:
            block.embed, block.head = self.embed, self.head

    @torch.inference_mode()
    def forward(self, input_ids, start_pos=0):
        h = self.embed(input_ids).unsqueeze(2).repeat(1, 1, self.args.hc_mult, 1)
        for layer in self.layers:
            h = layer(h, start_pos, input_ids)
        args = self.args
        x = hc_head(h, self.hc_head_fn, self.hc_head_scale, self.hc_head_base, args.hc_eps, args.norm_eps)
        return self.head(self.norm(x))
