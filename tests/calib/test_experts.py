"""Experts with few tokens: filled up by their siblings, by hand and against numpy; other layers are left alone."""

import numpy as np
import pytest
import torch
from torch import nn

from rocket.calib import collect_grams, measure_sensitivities
from rocket.calib.experts import expert_lists, fill_up, fill_up_sums, split_number
from rocket.models import target_layers, unstacked_experts


def test_filling_up_by_hand():
    means = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([7.0, 10.0]), "idle": torch.tensor([9.0, 9.0])}
    tokens = {"a": 6, "b": 2, "idle": 0}
    # overall: (6·1 + 2·7)/8 = 2.5 and (6·4 + 2·10)/8 = 5.5; b, up to 4: (2·7 + 2·2.5)/4 and (2·10 + 2·5.5)/4
    filled = fill_up(means, tokens, ["a", "b", "idle", "new"], wanted=4)
    assert {name: values.tolist() for name, values in filled.items()} == {
        "b": [4.75, 7.75],
        "idle": [2.5, 5.5],
        "new": [2.5, 5.5],
    }
    assert fill_up(means, tokens, ["a", "b"], wanted=2) == {}


def test_sums_of_rare_experts_stay_rare():
    """Filling up changes what is known of a token, not how many tokens an expert gets."""
    experts = ["often", "rare", "idle"]
    sums = {"often": torch.tensor([1000.0, 2000.0]), "rare": torch.tensor([2.0, 4.0]), "idle": torch.zeros(2)}
    tokens = {"often": 1000, "rare": 2, "idle": 0}
    # every token has squares (1, 2): 2 of them make (2, 4), and the one that the idle expert counts as (1, 2)
    filled = fill_up_sums(sums, tokens, experts, 64, seen=tokens)
    assert {name: values.tolist() for name, values in filled.items()} == {"rare": [2, 4], "idle": [1, 2]}
    # of 4008 tokens elsewhere 16 and 4 were theirs, of 1002 here that is 4 and 1
    filled = fill_up_sums(sums, tokens, experts, 64, seen={"often": 3988, "rare": 16, "idle": 4})
    assert {name: values.tolist() for name, values in filled.items()} == {"rare": [4, 8], "idle": [1, 2]}
    # overall (4·1 + 1·6)/5 = 2; rare, up to 4: (6 + 3·2)/4 = 3 a token, and it got 1
    sums = {"often": torch.tensor([4.0]), "rare": torch.tensor([6.0])}
    assert fill_up_sums(sums, {"often": 4, "rare": 1}, experts[:2], 4, {"often": 4, "rare": 1})["rare"].tolist() == [3]


def test_experts_are_lists_of_unequal_tokens():
    block = ("moe.0.up", "moe.1.up", "moe.1.down", "q", "wide.0.up")
    names = [f"h.{number}.{name}" for number in (0, 1) for name in block]
    layers = {name: nn.Linear(8 if "wide" in name else 4, 4) for name in names}
    tokens = dict.fromkeys(names, 5) | {"h.0.moe.1.up": 3}
    assert expert_lists(layers, tokens, ["h.0", "h.1"]) == [["h.0.moe.0.up", "h.0.moe.1.up"]]
    del tokens["h.1.moe.0.up"]
    assert expert_lists(layers, tokens, ["h.0", "h.1"])[1] == ["h.1.moe.0.up", "h.1.moe.1.up"]
    assert expert_lists(layers, {}, ["h.0", "h.1"]) == []


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_padding_is_not_routed(make_model, token_ids, family):
    model = make_model(family)
    lengths, ids = (9, 14), token_ids[:2, :14]
    mask = (torch.arange(14) < torch.tensor(lengths)[:, None]).long()
    with unstacked_experts(model):
        layers = target_layers(model)
        padded = collect_grams(model, layers, [{"input_ids": ids * mask, "attention_mask": mask}])
        texts = [{"input_ids": row[None, :length]} for row, length in zip(ids, lengths, strict=True)]
        expected = collect_grams(model, layers, texts)
    assert padded.tokens == expected.tokens
    for name, gram in expected.grams.items():
        torch.testing.assert_close(padded.grams[name], gram)


@pytest.mark.parametrize(
    ("name", "number"),
    [("h.0.q", ""), ("h.0.fc1", ""), ("h.0.mlp.up.12", "12"), ("h.0.mlps.1.expert_3.wi", "3"), ("x.7.up", "7")],
)
def test_the_number_of_an_expert(name, number):
    assert split_number(name, ["h.0"])[1] == number
    assert "".join(split_number(name, ["h.0"])) == name


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, shares: tuple[float, ...]) -> None:
        super().__init__()
        self.shares = shares
        self.first = nn.Linear(4, 4)
        self.experts = nn.ModuleList(Expert() for _ in shares)

    def forward(self, x):
        x = self.first(x)
        tokens, start = x.flatten(0, 1), 0
        parts = []
        for expert, share in zip(self.experts, self.shares, strict=True):
            part = tokens[start : start + round(share * len(tokens))]
            start += len(part)
            parts.append(part + expert(part) if len(part) else part)
        return torch.cat(parts).view_as(x)


class Mixture(nn.Module):
    """``shares`` of the tokens go to each expert, in their order."""

    def __init__(self, *shares: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(32, 4), nn.Linear(4, 32)
        self.blocks = nn.ModuleList([Block(shares), Block(shares)])

    def forward(self, input_ids, use_cache=False):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return type("Output", (), {"logits": self.head(x)})


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(32, (8, 25), generator=torch.Generator().manual_seed(1))


def test_an_expert_of_few_tokens_and_one_of_none(ids, caplog):
    model = Mixture(0.96, 0.04, 0.0)  # 192, 8 and 0 of 200 tokens; 4·4 and 4·6 are wanted
    layers = target_layers(model)
    seen: dict[str, list[np.ndarray]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, __, name=name: seen[name].append(args[0].detach().double().numpy()))
    calibration = collect_grams(model, layers, [{"input_ids": part} for part in ids.split(4)])
    assert list(calibration.inputs) == list(layers)
    for block in ("blocks.0", "blocks.1"):
        for name, wanted in (("gate", 16), ("down", 24)):
            rows = [np.concatenate(seen[f"{block}.experts.{number}.{name}"]) for number in (0, 1)]
            both = np.concatenate(rows)
            overall = both.T @ both / 200
            expected = [
                rows[0].T @ rows[0] / 192,
                (rows[1].T @ rows[1] + (wanted - 8) * overall) / wanted,
                overall,
            ]
            for number, gram in enumerate(expected):
                found = calibration.gram(f"{block}.experts.{number}.{name}")
                np.testing.assert_allclose(found, gram, rtol=1e-4, atol=1e-6)
        for number, tokens in enumerate((192, 8, 0)):
            gate = f"{block}.experts.{number}.gate"
            assert calibration.inputs[f"{block}.experts.{number}.up"] == calibration.inputs[gate] == gate
            assert calibration.tokens[gate] == calibration.seen()[f"{block}.experts.{number}.up"] == tokens
    assert "8 inputs of experts saw fewer than 4 calibration tokens a feature" in caplog.text
    assert "(the fewest: blocks.0.experts.2.gate, 0)" in caplog.text
    assert "stay as they are" not in caplog.text


def test_enough_tokens_are_left_alone(ids, caplog):
    model = Mixture(0.75, 0.25)
    calibration = collect_grams(model, target_layers(model), [{"input_ids": ids}])
    assert calibration.tokens["blocks.1.experts.1.down"] == 50
    assert not caplog.text


def test_experts_of_whom_none_saw_a_token(ids, caplog):
    model = Mixture(0.0, 0.0)
    model.blocks[0].forward = model.blocks[1].forward = lambda x: x + model.blocks[0].first(x)
    calibration = collect_grams(model, target_layers(model), [{"input_ids": ids}])
    assert list(calibration.inputs) == ["blocks.0.first"]
    assert "blocks.0.experts.0.gate and 12 other layers saw no calibration token" in caplog.text


@pytest.mark.parametrize(
    ("seen", "routed"),
    [(None, (192, 8, 1)), ((784, 12, 4), (192, 3, 1))],  # of 200 tokens, by their own counts or by 800 others
)
def test_sensitivities_of_experts(ids, seen, routed):
    model = Mixture(0.96, 0.04, 0.0)
    layers = target_layers(model)
    gradients = {name: np.zeros((0, 6)) for name in layers if name.endswith("up")}

    def keep(name, gradient):
        gradients[name] = np.concatenate([gradients[name], gradient.double().numpy()])

    for name in gradients:
        layers[name].register_forward_hook(
            lambda _, __, output, name=name: (
                output.register_hook(lambda gradient: keep(name, gradient)) and None if output.requires_grad else None
            )
        )
    if seen is not None:
        experts = {name: split_number(name, ["blocks.0", "blocks.1"])[1] for name in layers}
        seen = {name: seen[int(number)] if number else 800 for name, number in experts.items()}
    measured = measure_sensitivities(model, layers, [{"input_ids": part} for part in ids.split(4)], seen=seen)
    for block in ("blocks.0", "blocks.1"):
        names = [f"{block}.experts.{number}.up" for number in range(3)]
        own = [np.square(gradients[name]) for name in names]
        assert [len(squares) for squares in own] == [192, 8, 0]
        overall = np.concatenate(own).mean(axis=0)
        means = [own[0].mean(axis=0), (own[1].sum(axis=0) + 56 * overall) / 64, overall]
        for name, mean, count in zip(names, means, routed, strict=True):
            np.testing.assert_allclose(measured[name], mean * count / 200, rtol=1e-4)


def test_an_unreached_layer_that_is_no_expert_is_left_out(ids):
    model = Mixture(0.5, 0.5)
    layers = {**target_layers(model), "blocks.0.unused": nn.Linear(4, 4)}
    measured = measure_sensitivities(model, layers, [{"input_ids": ids}])
    assert measured.keys() == target_layers(model).keys()
