"""The model card: the README.md of a compressed checkpoint."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import AutoConfig

from rocket.allocation import Plan
from rocket.config import Config
from rocket.evaluation import Evaluation
from rocket.models.auto import auto_class
from rocket.reporting.layout import layers_by_kind
from rocket.reporting.measured import measured_rows


def how_trained(healed: bool) -> str:
    """What was done to the values beside the compression, in words."""
    return "and healed by a short fine-tune at fixed sparsity" if healed else "without training"


def model_card(
    checkpoint: Path,
    config: Config,
    plan: Plan,
    original: Evaluation | None = None,
    compressed: Evaluation | None = None,
    healed: bool = False,
) -> str:
    """Markdown with the hub's front matter: base model, sizes, plan, measured quality, how to open it, what made it.

    ``compressed`` is what was measured of the checkpoint, which was ``healed`` or not. Reads the checkpoint's
    config.json only. Without evaluations it says that quality was not measured. It depends on its arguments alone, so
    that it can be written anew.
    """
    parts = [
        _front_matter(config, plan),
        f"# {_plain(config.model.path)}, compressed by ROCKET",
        f"{_code(config.model.path)}, compressed by [ROCKET](https://arxiv.org/abs/2602.11008) {how_trained(healed)}: "
        f"{plan}, {100 * plan.bytes_removed_ratio:.1f} % of all bytes saved. "
        "The base model's licence and limits apply.",
        "## Size\n\n" + _sizes(plan),
        "## Quality\n\n" + _quality(plan, original, compressed, healed),
        "## What became of the layers\n\n" + _forms(plan),
        "## Opening it\n\n" + _opening(checkpoint, config, plan.budget.healed_name if healed else plan.budget.name),
        "## How it was made\n\n"
        f"`rocket run --config config.yaml`, with this `config.yaml`:\n\n```yaml\n{_settings(config)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _tags(plan: Plan) -> list[str]:
    return sorted({label for option in plan.choices.values() for label in option.label.split() if label != "dense"})


def _front_matter(config: Config, plan: Plan) -> str:
    values: dict[str, object] = {"library_name": "transformers", "tags": ["rocket", "compressed", *_tags(plan)]}
    if _is_hub_id(config.model.path):
        values = {"base_model": config.model.path, **values}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _is_hub_id(path: str) -> bool:
    return (
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is not None and not path.endswith(".gguf") and not Path(path).exists()
    )


def _sizes(plan: Plan) -> str:
    size = plan.size
    return _table(
        ("", "original", "compressed", "removed"),
        [
            ("parameters", f"{size.parameters:,}", f"{plan.parameters:,}", _removed(plan.parameters, size.parameters)),
            (
                "of the target layers",
                f"{size.target_parameters:,}",
                f"{plan.kept_target_parameters:,}",
                _removed(plan.kept_target_parameters, size.target_parameters),
            ),
            ("bytes of tensors", f"{size.bytes:,}", f"{plan.bytes:,}", _removed(plan.bytes, size.bytes)),
        ],
    )


def _removed(after: int, before: int) -> str:
    return f"{100 * (1 - after / before):.1f} %"


def _quality(plan: Plan, original: Evaluation | None, compressed: Evaluation | None, healed: bool) -> str:
    lines = []
    moment, command = ("before healing", "run") if healed else ("beforehand", "evaluate")
    if plan.profiling.cost == "loss":
        lines.append(f"Predicted {moment}: loss + {plan.cost:.4f} nats a token on text like the calibration set's.")
    if original is None or compressed is None:
        lines.append(f"Not measured yet; `rocket {command}` with the config below completes this card.")
    else:
        rows = [(_plain(name), *values) for name, *values in measured_rows(original, compressed)]
        lines.append(
            _table(("", "original", "healed" if healed else "compressed"), rows)
            if rows
            else "Nothing was asked to be measured."
        )
    return "\n\n".join(lines)


def _forms(plan: Plan) -> str:
    forms = sorted(plan.forms())
    rows = []
    for kind, layers in layers_by_kind(plan.choices).items():
        counts = Counter(plan.choices[layer].label for layer in layers)
        rows.append((_code(kind), *(str(counts[form] or "") for form in forms)))
    return _table(("layers", *forms), rows)


def _opening(checkpoint: Path, config: Config, folder: str) -> str:
    trusted = config.model.trust_remote_code
    opened = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trusted)
    name = auto_class(opened).__name__
    return f"""```python
import rocket  # the package rocket-compress: teaches transformers the format
from transformers import {name}

model = {name}.from_pretrained("{folder}"{", trust_remote_code=True" if trusted else ""})
model.optimize()  # products by rocket's kernels
```"""


def _settings(config: Config) -> str:
    """What decides the checkpoint and its figures: not where it was written, nor what else was reported."""
    values = config.model_dump(mode="json", exclude={"output_dir", "reporting"})
    return yaml.safe_dump(values, sort_keys=False)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """As Markdown shows text that is not ours."""
    return f"`{_plain(text)}`"


def _plain(text: str) -> str:
    """Text without what Markdown, or HTML in it, would take for its own."""
    return re.sub(r"[`|<>\s]+", " ", text)
