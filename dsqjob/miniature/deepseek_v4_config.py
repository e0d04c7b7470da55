"""Sizes of a miniature DeepSeek-V4 release, and its two configs (2a-deepseek-v4, sections 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Geometry:
    """Sizes of a miniature; ``ratios`` has one entry for each layer and each draft layer. The defaults run at
    model-parallel 1, 2, 4 and 8."""

    vocab: int = 512
    dim: int = 256
    inter: int = 128
    layers: int = 4
    hash_layers: int = 1
    mtp_layers: int = 1
    heads: int = 8
    head_dim: int = 128
    rope_dim: int = 64
    q_lora: int = 128
    o_groups: int = 8
    o_lora: int = 128
    window: int = 16
    index_heads: int = 8
    index_dim: int = 128
    index_topk: int = 16
    hc: int = 4
    experts: int = 16
    active: int = 2
    ratios: tuple[int, ...] = (0, 4, 128, 4, 0)
    max_seq_len: int = 256


def hub_config(g: Geometry, experts_dtype: str) -> dict[str, Any]:
    """``config.json``, in the Hub's spelling."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "vocab_size": g.vocab,
        "hidden_size": g.dim,
        "moe_intermediate_size": g.inter,
        "num_hidden_layers": g.layers,
        "num_hash_layers": g.hash_layers,
        "num_nextn_predict_layers": g.mtp_layers,
        "num_attention_heads": g.heads,
        "num_key_value_heads": 1,
        "head_dim": g.head_dim,
        "qk_rope_head_dim": g.rope_dim,
        "q_lora_rank": g.q_lora,
        "o_groups": g.o_groups,
        "o_lora_rank": g.o_lora,
        "sliding_window": g.window,
        "index_n_heads": g.index_heads,
        "index_head_dim": g.index_dim,
        "index_topk": g.index_topk,
        "hc_mult": g.hc,
        "hc_eps": 1e-06,
        "hc_sinkhorn_iters": 20,
        "n_routed_experts": g.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": g.active,
        "norm_topk_prob": True,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": 2.5,
        "swiglu_limit": 10.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "compress_ratios": list(g.ratios),
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **_expert_dtype(experts_dtype),
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
    }


def inference_config(g: Geometry, experts_dtype: str) -> dict[str, Any]:
    """``inference/config.json``: the vendor's spelling, without what its ModelArgs defaults; and the small
    ``max_seq_len``, which the vendor's has not."""
    return {
        "vocab_size": g.vocab,
        "dim": g.dim,
        "moe_inter_dim": g.inter,
        "n_layers": g.layers,
        "n_hash_layers": g.hash_layers,
        "n_heads": g.heads,
        "n_routed_experts": g.experts,
        "n_shared_experts": 1,
        "n_activated_experts": g.active,
        "score_func": "sqrtsoftplus",
        "route_scale": 2.5,
        "swiglu_limit": 10.0,
        "q_lora_rank": g.q_lora,
        "head_dim": g.head_dim,
        "rope_head_dim": g.rope_dim,
        "o_groups": g.o_groups,
        "o_lora_rank": g.o_lora,
        "window_size": g.window,
        "original_seq_len": 64,
        "rope_theta": 10000,
        "rope_factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "index_n_heads": g.index_heads,
        "index_head_dim": g.index_dim,
        "index_topk": g.index_topk,
        "hc_mult": g.hc,
        "hc_sinkhorn_iters": 20,
        "dtype": "fp8",
        "scale_fmt": "ue8m0",
        **_expert_dtype(experts_dtype),
        "compress_rope_theta": 160000,
        "compress_ratios": list(g.ratios),
        "max_seq_len": g.max_seq_len,
        **({} if g.mtp_layers == 1 else {"n_mtp_layers": g.mtp_layers}),
    }


def _expert_dtype(experts_dtype: str) -> dict[str, str]:
    return {"expert_dtype": "fp4"} if experts_dtype == "mxfp4" else {}
