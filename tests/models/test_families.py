"""Decoder families, tiny and random, through everything: plan, compress, save, reopen, recount, generate."""

import re

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import rocket
from rocket.compression import save_checkpoint, stored_values
from rocket.config.schema import CalibConfig, ProfilingConfig
from rocket.forms import FORMS
from rocket.models import find_blocks, target_layers, unstacked_experts

SMALL = {
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GATED = {**SMALL, "intermediate_size": 72, "num_key_value_heads": 2}
GPT = {"vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
EXPERTS = {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS = {**GATED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
STATE_SPACE = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2}
FAMILIES = {
    "biogpt": {**SMALL, "intermediate_size": 72},
    "bloom": {**SMALL, "n_layer": 2, "n_head": 4},
    "codegen": {**GPT, "rotary_dim": 8},
    "cohere": GATED,
    "deepseek_v3": {
        **GATED,
        **LATENT,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "falcon": SMALL,
    "gemma": {**GATED, "head_dim": 16},
    "gemma2": {**GATED, "head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16},
    "gemma3_text": {**GATED, "head_dim": 16, "sliding_window": 64},
    "glm": {**GATED, "head_dim": 8},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": {**SMALL, "intermediate_size": 72},
    "gpt_oss": {**EXPERTS, "head_dim": 8},
    "gptj": {**GPT, "rotary_dim": 8},
    "granite": GATED,
    "granitemoe": EXPERTS,
    "jetmoe": {**SMALL, "kv_channels": 8, "num_key_value_heads": 2, "intermediate_size": 72, "num_local_experts": 4},
    "llama": GATED,
    "llama4_text": {**EXPERTS, "head_dim": 8, "intermediate_size_mlp": 72},
    "mamba": {**STATE_SPACE, "state_size": 8},
    "mamba2": {**STATE_SPACE, "state_size": 16, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "mistral": GATED,
    "mixtral": EXPERTS,
    "olmo": GATED,
    "olmo2": GATED,
    "olmoe": {**GATED, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**SMALL, "ffn_dim": 72, "word_embed_proj_dim": 32},
    "phi": GATED,
    "phi3": GATED,
    "qwen2": {**GATED, "tie_word_embeddings": True},
    "qwen2_moe": {**SMALL_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": {**GATED, "tie_word_embeddings": True, "head_dim": 16},
    "qwen3_moe": {**SMALL_EXPERTS, "head_dim": 8},
    "smollm3": GATED,
    "stablelm": GATED,
    "starcoder2": GATED,
    "xglm": {"vocab_size": 257, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 72},
}
MIXTURES = {family for family, values in FAMILIES.items() if any("experts" in key for key in values)}
EXPERT = re.compile(r"\.(mlp|feed_forward|block_sparse_moe)\..*(\.\d+$|experts\.\d+)")
CALIB = CalibConfig(num_samples=16, seq_len=32, batch_size=4, sensitivity_samples=4)
PROFILING = ProfilingConfig(
    forms=list(FORMS),
    removed_ratios=[0.1, 0.3, 0.5, 0.7],
    rank_support_ratios=[1.0, 1.5, 2.0],
)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_family(aligned, family, token_ids, tmp_path):
    torch.manual_seed(0)
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert len(find_blocks(model)) == 2
    plan = rocket.plan(model, token_ids, calib=CALIB, profiling=PROFILING).at(removed_ratio=0.3)
    assert plan.kept_target_parameters <= 0.7 * plan.size.target_parameters
    with unstacked_experts(model):
        assert plan.choices.keys() <= target_layers(model).keys()
    experts = {name: option for name, option in plan.choices.items() if EXPERT.search(name)}
    assert len({re.findall(r"\d+", name)[1] for name in experts}) == (4 if family in MIXTURES else 0)
    assert not any(re.search(r"router|gate$", name) for name in plan.choices)
    assert bool(experts) == any(option.form != "dense" for option in experts.values())
    small = rocket.compress(model, plan)
    save_checkpoint(small, None, tmp_path)
    assert stored_values(tmp_path, plan.choices) == plan.kept_target_parameters
    again = aligned(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(logits(again, token_ids[:2]), logits(small, token_ids[:2]))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    generated = again.generate(token_ids[:1, :8], **options)
    assert generated.shape == (1, 12)
    assert torch.equal(again.optimize().generate(token_ids[:1, :8], **options), generated)
