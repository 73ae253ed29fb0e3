"""What a run can be told. One class a section of the YAML file; unknown keys are errors; every field has a default."""

from __future__ import annotations

import math
import unicodedata
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from rocket.config.units import parse_bytes, parse_count

Count = Annotated[int, Field(ge=1, le=2**31)]
Length = Annotated[int, Field(ge=8, le=2**31)]
DType = Literal["float32", "bfloat16", "float16"]
RATIO_SLACK = 0.02
"""What options may remove beyond their ratio: a layer keeps whole atoms and rows."""


def parse_share(value: object) -> object:
    """A number between 0 and 1; per cent are not taken for it, nor it for them."""
    try:
        share = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        share = math.nan
    if isinstance(value, bool) or not 0.0 < share < 1.0:
        raise ValueError("must be a share between 0 and 1, for example 0.3 for 30 %")
    return share


def unique_ascending(values: list[float]) -> list[float]:
    return sorted(set(values))


def unique_names(values: list[str]) -> list[str]:
    """Each once, in one order: lists that mean the same are the same."""
    return sorted(set(values))


Ratio = Annotated[float, BeforeValidator(parse_share), Field(gt=0.0, lt=1.0)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1, lt=2**63)]
BigCount = Annotated[int, BeforeValidator(parse_count), Field(ge=1, lt=2**63)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _printable(cls, value: object) -> object:
        """No path, name or pattern has control characters or lone surrogates, which no file system and no log takes."""
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str | Path) and any(
                unicodedata.category(letter) in ("Cc", "Cs") for letter in str(text)
            ):
                raise ValueError("holds a control character")
        return value


class ModelConfig(Section):
    """Which model, and which of its layers.

    ```yaml
    model:
      path: meta-llama/Llama-3.2-1B
      dtype: bfloat16
      ignore: ["re:.*layers[.]0[.].*"]
    ```
    """

    path: str = Field(
        "embedded:smollm2-135m",
        description="Hub id, local directory, GGUF file, or one of the packaged models: embedded:smollm2-135m, "
        "embedded:dinov2-small, embedded:whisper-tiny.en.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: DType = Field("bfloat16", description="Type the model is loaded, run and stored in.")
    device: str = Field("auto", description="auto (CUDA if there is one, else CPU), cpu, cuda, cuda:1, ...")
    targets: list[str] = Field(
        default_factory=list,
        description="Compress only layers whose name ends with one of these, or matches (re:...). Empty: every linear "
        "layer inside the repeated blocks.",
    )
    ignore: list[str] = Field(default_factory=list, description="Leave these layers alone; same syntax as targets.")
    trust_remote_code: bool = Field(False, description="Run modelling code that the checkpoint brings. Off for safety.")


class CalibConfig(Section):
    """The calibration set.

    ```yaml
    calib:
      source: fineweb
      num_samples: 256
      seq_len: 1024
    ```
    """

    source: str = Field(
        "embedded",
        description="embedded (presidential addresses), embedded:boolq (Wikipedia passages), embedded:mixed (prose of "
        "many kinds), a .txt/.jsonl/.parquet file or folder, wikitext, c4, fineweb, alpaca, or "
        "hub:owner/name[:config]. For models of images or speech: embedded:images, embedded:speech, a folder "
        "of images, a folder of .wav or .flac files with transcripts, or a .jsonl file that names either.",
    )
    text_field: str = Field("text", description="Column that holds the text in .jsonl, .parquet and hub data.")
    num_samples: Count = Field(128, description="Sequences of tokens, images or clips.")
    seq_len: Length = Field(512, description="Tokens a sequence.")
    batch_size: Count = Field(8, description="Samples a forward pass.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        2023, description="Which windows or samples of the source are drawn."
    )
    sensitivity_samples: Annotated[int, Field(ge=0, le=2**31)] = Field(
        16,
        description="Samples, of the above, for the backward pass that measures sensitivities. profiling.cost=loss "
        "needs them; for other costs none is run.",
    )


class ProfilingConfig(Section):
    """Which options each layer has, and how their error is measured.

    ```yaml
    profiling:
      forms: [dictionary]
      cost: weight
    ```
    """

    forms: list[str] = Field(
        default_factory=lambda: ["sparse", "sparse_low_rank"],
        description="What a layer may become, beside staying dense: low_rank, dictionary (the paper's), sparse, "
        "sparse_low_rank.",
    )
    precisions: Annotated[list[Literal["float", "int8"]], Field(min_length=1), AfterValidator(unique_names)] = Field(
        default=["float"],
        description="How the values of a layer may be stored: float (in the model's type), int8 (with a scale for each "
        "row). With both, a budget of bytes chooses; the other budgets count values, whatever their size.",
    )
    cost: Literal["weight", "activation", "loss"] = Field(
        "loss",
        description="weight: relative weight error (the paper). activation: relative output error. loss: predicted "
        "increase of the loss in nats a token; needs calib.sensitivity_samples > 0.",
    )
    removed_ratios: Annotated[list[Ratio], Field(min_length=1, max_length=1000), AfterValidator(unique_ascending)] = (
        Field(
            default_factory=lambda: [round(0.05 * i, 2) for i in range(1, 15)],
            description="Removed shares of a layer's parameters that are profiled.",
        )
    )
    rank_support_ratios: Annotated[
        list[Annotated[float, Field(ge=1.0, le=1e6)]],
        Field(min_length=1, max_length=1000),
        AfterValidator(unique_ascending),
    ] = Field(
        default_factory=lambda: [1.5, 2.0, 2.5, 3.0],
        description="Ratios rank/support that are searched for dictionaries; no other form has one.",
    )
    importance_exponent: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.0, description="λ of a dictionary's importance: 0 whitened space alone, 1 weight space alone, 0.5 the paper."
    )
    thresholds: Literal["column", "matrix"] = Field(
        "matrix",
        description="Of dictionaries alone: coefficients are kept by a threshold for each column (the paper: every "
        "output has as many) or for the whole matrix.",
    )
    refits: Annotated[int, Field(ge=0, le=1000)] = Field(
        8,
        description="Of dictionaries alone: rounds of finding coefficients and dictionary anew from each other. 0: the "
        "paper's one shot.",
    )
    correlation_shrinkage: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.2,
        description="Share by which fits shrink the measured correlations between inputs. 0 is best on text like the "
        "calibration set's (and the paper's), more is better on any other.",
    )


class AllocationConfig(Section):
    """How the options are chosen.

    ```yaml
    allocation:
      method: knapsack
    ```
    """

    method: str = Field("knapsack", description="knapsack (exact, global) or uniform (every layer the same share).")
    error_cap: bool = Field(
        False, description="The paper's cap: drop options whose error exceeds α times the mean error at the target."
    )


class CompressionConfig(Section):
    """The budget: exactly one of the three.

    ```yaml
    compression:
      removed_ratio: 0.3
    ```
    """

    removed_ratio: Ratio | None = Field(None, description="Share of the target layers' parameters to remove. (0, 1)")
    kept_parameters: BigCount | None = Field(None, description="Parameters of the whole compressed model, e.g. 8e9.")
    bytes: Bytes | None = Field(None, description="Bytes of the whole checkpoint's tensors, e.g. 6GB.")

    @model_validator(mode="after")
    def _one_budget(self) -> CompressionConfig:
        given = [name for name in ("removed_ratio", "kept_parameters", "bytes") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"give exactly one of removed_ratio, kept_parameters, bytes (found {found})")
        return self


class EvaluationConfig(Section):
    """What is measured on the original and on the compressed model.

    ```yaml
    evaluation:
      texts: [embedded, wikitext]
      tasks: [piqa, arc_easy]
      limit: 200
    ```
    """

    texts: list[str] = Field(
        default_factory=lambda: ["embedded", "embedded:boolq"],
        description="Sources of text for perplexity, as in calib.source. Their held-out part is used. Write [] for a "
        "model that reads no text.",
    )
    samples: list[str] = Field(
        default_factory=list,
        description="Sources of images or speech, as in calib.source, for models that take them. Their held-out part "
        "is measured by what fits: perplexity of the texts, accuracy where samples have labels, word error rate, "
        "agreement of features with the original's.",
    )
    text_field: str = Field("text", description="Column that holds the text in .jsonl, .parquet and hub data.")
    seq_len: Length = Field(1024, description="Tokens a window.")
    max_tokens: Count | None = Field(65536, description="Tokens of each text, in windows spread over it; null: all.")
    max_samples: Count | None = Field(512, description="Samples of each source, drawn at random; null: all.")
    tasks: list[str] = Field(
        default_factory=list,
        description="Zero-shot tasks, by their name in lm-evaluation-harness. Packaged ones need no network.",
    )
    limit: Annotated[int, Field(ge=2, le=2**31)] | None = Field(100, description="Items a task; null: all.")
    batch_size: Count = Field(4, description="Windows, samples, or a fourth of the task requests, a forward pass.")

    @model_validator(mode="after")
    def _some_window(self) -> EvaluationConfig:
        if self.texts and self.max_tokens is not None and self.max_tokens < self.seq_len:
            raise ValueError(
                f"max_tokens={self.max_tokens} is less than one window of seq_len={self.seq_len}; raise it, or lower "
                "seq_len"
            )
        return self


class HealingConfig(Section):
    """Fine-tuning of the compressed model with its sparsity kept.

    ```yaml
    healing:
      objective: distillation
      minutes: 20
    ```
    """

    objective: Literal["distillation", "language_modelling"] = Field(
        "distillation",
        description="distillation: stay close to the predictions of the original, which is loaded as well. "
        "language_modelling: the loss on the text.",
    )
    temperature: Annotated[float, Field(gt=0.0)] = Field(
        1.0, description="Divides both models' scores for distillation: above 1, unlikely predictions count for more."
    )
    train: Literal["values", "dictionary", "lora"] = Field(
        "values",
        description="What is trained: values (all stored values of compressed layers), dictionary (only those of "
        "dictionaries), lora (a low-rank change of each sparse matrix at its kept places, added for good in the end).",
    )
    lora_rank: Count = Field(16, description="Rank of the change, for train=lora.")
    source: str = Field(
        "embedded:mixed", description="What to train on, as in calib.source; its calibration part is used."
    )
    text_field: str = Field("text", description="Column that holds the text in .jsonl, .parquet and hub data.")
    seq_len: Annotated[int, Field(ge=8)] = Field(512, description="Tokens a window.")
    tokens: BigCount | None = Field(None, description="Stop after so many tokens, e.g. 30e6; null: no such limit.")
    minutes: Annotated[float, Field(gt=0.0)] | None = Field(None, description="Stop after so many minutes; null: none.")
    batch_size: Count = Field(4, description="Windows or samples a forward pass, of each device.")
    gradient_accumulation: Count = Field(1, description="Forward passes a step.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, a third more time.")
    learning_rate: Annotated[float, Field(gt=0.0)] = Field(2e-4, description="Of AdamW, at its highest.")
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.05, description="Share of the training in which the learning rate rises; then it falls evenly to 0."
    )
    save_steps: Count = Field(100, description="Steps from one checkpoint to the next; a killed run resumes there.")
    seed: int = Field(2023, description="Of the order of windows or samples, and of the first change for lora.")

    @model_validator(mode="after")
    def _some_limit(self) -> HealingConfig:
        if self.tokens is None and self.minutes is None:
            raise ValueError("give tokens or minutes, after which to stop")
        return self


class ReportingConfig(Section):
    """What a run tells beside its results.

    ```yaml
    reporting: {energy: true, country: DEU}
    ```
    """

    energy: bool = Field(
        False, description="Take each stage's energy by codecarbon (the extra energy), offline; mostly an estimate."
    )
    country: Annotated[str, Field(pattern="^[A-Z]{3}$")] | None = Field(
        None, description="Where the machine stands, as a three-letter ISO code: its electricity's CO2. null: no CO2."
    )


class Config(Section):
    """One run.

    ```yaml
    output_dir: output/my-run
    model: {path: my-model}
    compression: {removed_ratio: 0.2}
    ```
    """

    output_dir: Annotated[Path, AfterValidator(Path.expanduser)] = Field(
        Path("output/default"), description="The run directory; its artifacts are reused."
    )
    memory_budget: Bytes | None = Field(
        None,
        description="Memory that the process may take, e.g. 6GB. A model that would need more is streamed: its blocks "
        "are read one by one. null: what the machine has free.",
    )
    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    calib: CalibConfig = Field(default_factory=lambda: CalibConfig())
    profiling: ProfilingConfig = Field(default_factory=lambda: ProfilingConfig())
    allocation: AllocationConfig = Field(default_factory=lambda: AllocationConfig())
    compression: CompressionConfig = Field(default_factory=lambda: CompressionConfig(removed_ratio=0.2))
    evaluation: EvaluationConfig = Field(default_factory=lambda: EvaluationConfig())
    reporting: ReportingConfig = Field(default_factory=lambda: ReportingConfig())
    healing: HealingConfig | None = Field(None, description="null: `rocket run` does not heal.")

    @model_validator(mode="after")
    def _loss_needs_sensitivity(self) -> Config:
        if self.profiling.cost == "loss" and self.calib.sensitivity_samples == 0:
            raise ValueError("profiling.cost=loss needs calib.sensitivity_samples > 0 (or use cost: activation)")
        if self.calib.sensitivity_samples > self.calib.num_samples:
            raise ValueError(
                f"calib.sensitivity_samples={self.calib.sensitivity_samples} exceeds "
                f"calib.num_samples={self.calib.num_samples}"
            )
        return self

    @model_validator(mode="after")
    def _size_is_profiled(self) -> Config:
        wanted, largest = self.compression.removed_ratio, max(self.profiling.removed_ratios, default=0.0)
        if "compression" in self.model_fields_set and wanted is not None and wanted > largest + RATIO_SLACK:
            raise ValueError(
                f"compression.removed_ratio={wanted} is more than the largest of profiling.removed_ratios, {largest}; "
                "add larger ones there, or remove less"
            )
        return self
