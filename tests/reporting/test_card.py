"""The model card: what the hub reads of it, and what a reader finds."""

import json
import re
from dataclasses import replace

import pytest
import yaml

from rocket.config import load_config
from rocket.config.schema import ModelConfig
from rocket.evaluation import Evaluation
from rocket.reporting.card import model_card


@pytest.fixture
def checkpoint(tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_a_run(summary):
    card = (summary.path / "README.md").read_text()
    assert card == model_card(summary.path, summary.config, summary.plan, summary.original, summary.compressed)
    assert front_matter(card) == {"library_name": "transformers", "tags": ["rocket", "compressed", "sparse"]}
    plan = summary.plan
    for before, after in ((plan.size.parameters, plan.parameters), (plan.size.bytes, plan.bytes)):
        assert f"| {before:,} | {after:,} |" in card
    (before,), (after,) = summary.original.perplexities.values(), summary.compressed.perplexities.values()
    assert f"| {before:.2f} | {after:.2f} |" in card
    assert f"loss + {plan.cost:.4f} nats" in card
    forms = sorted(plan.forms())
    (header,) = re.findall(r"^\| layers \|.*$", card, re.MULTILINE)
    assert header == f"| layers | {' | '.join(forms)} |"
    counts = [sum(plan.choices[f"model.layers.{n}.mlp.up_proj"].form == form for n in range(2)) for form in forms]
    assert f"| `mlp.up_proj` | {' | '.join(str(count or '') for count in counts)} |" in card
    assert str(summary.run_directory) not in card


def test_its_config_makes_the_same_checkpoint(summary, tmp_path):
    card = (summary.path / "README.md").read_text()
    (tmp_path / "config.yaml").write_text(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    again = load_config(tmp_path / "config.yaml", [f"output_dir={summary.config.output_dir}"])
    assert again == summary.config


def test_its_code_opens_the_model(summary, monkeypatch):
    card = (summary.path / "README.md").read_text()
    monkeypatch.chdir(summary.path.parent)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"


def test_a_healed_model_is_opened_by_its_own_name(summary):
    card = model_card(summary.path, summary.config, summary.plan, healed=True)
    assert f'from_pretrained("{summary.path.name}-healed")' in card
    trusted = summary.config.model.model_copy(update={"trust_remote_code": True})
    trusting = summary.config.model_copy(update={"model": trusted})
    assert f'("{summary.path.name}", trust_remote_code=True)' in model_card(summary.path, trusting, summary.plan)


@pytest.mark.parametrize(
    ("path", "base"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("gpt2", "gpt2"),
        ("embedded:smollm2-135m", None),
        ("/models/mine", None),
        ("model.gguf", None),
    ],
)
def test_base_model(checkpoint, invent, path, base):
    summary = invent(["a.0.x"])
    config = summary.config.model_copy(update={"model": ModelConfig(path=path)})
    card = model_card(checkpoint, config, summary.plan)
    assert front_matter(card).get("base_model") == base
    assert f"`{path}`" in card
    assert "Not measured yet; `rocket evaluate`" in card


def test_a_model_beside_the_run_is_not_taken_for_the_hubs(checkpoint, invent, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    summary = invent(["a.0.x"], model="mine")
    assert "base_model" not in front_matter(model_card(checkpoint, summary.config, summary.plan))


def test_other_costs_predict_no_loss(checkpoint, invent):
    summary = invent(["a.0.x"], cost="weight")
    card = model_card(checkpoint, summary.config, summary.plan, Evaluation({}, {}), Evaluation({}, {}))
    assert "nats" not in card
    assert "Nothing was asked to be measured." in card


def test_hostile_names(checkpoint, invent):
    name = "a|b`<img src=x onerror=alert(1)>\n---\nbase_model: evil"
    evaluation = Evaluation({name: 2.0}, {})
    summary = invent([f"m.0.{name}"], model=name.replace("\n", " "))  # the config takes no line breaks
    plan = replace(summary.plan, input_groups={})
    card = model_card(checkpoint, summary.config, plan, evaluation, evaluation)
    prose = re.sub(r"```.*?```", "", card, flags=re.DOTALL)
    assert "<img" not in prose
    assert "base_model" not in front_matter(card)
    assert len({line.count("|") for line in prose.splitlines() if line.startswith("| perplexity")}) == 1
    assert "| perplexity, a b img src=x onerror=alert(1) --- base_model: evil | 2.00 | 2.00 |" in prose
