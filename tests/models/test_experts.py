"""Stacked experts as layers of their own: the same function, and the model given back as it was."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from rocket.config.errors import RocketError
from rocket.models import (
    ExpertLinears,
    expert_layouts,
    restack_experts,
    target_layers,
    unstack_as,
    unstack_experts,
    unstacked_experts,
)

OUT_IN, IN_OUT = "expert,out,in", "expert,in,out"


@pytest.fixture
def stacked() -> nn.Parameter:
    return nn.Parameter(torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(1))


def layouts_of(model: nn.Module) -> dict[str, str]:
    """Those of a family whose experts are multiplied by ``F.linear``."""
    return {name: OUT_IN for name, parameter in model.named_parameters() if parameter.ndim == 3}


def transposed(stacked: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(stacked.detach().transpose(1, 2).contiguous())


@pytest.mark.parametrize("index", [2, torch.tensor(2)])
def test_products_are_those_of_the_parameter(stacked, inputs, index):
    experts, bias = ExpertLinears(stacked, OUT_IN), torch.ones(5)
    assert torch.equal(F.linear(inputs, experts[index]), F.linear(inputs, stacked[2]))
    assert torch.equal(F.linear(inputs, weight=experts[index], bias=bias), F.linear(inputs, stacked[2]) + bias)
    experts = ExpertLinears(transposed(stacked), IN_OUT)
    for product in (inputs @ experts[index], torch.matmul(inputs, experts[index]), torch.mm(inputs, experts[index])):
        torch.testing.assert_close(product, F.linear(inputs, stacked[2]))


def test_an_index_of_one_dimension_keeps_it(stacked, inputs):
    parameter, index = transposed(stacked), torch.tensor([1])
    experts = ExpertLinears(parameter, IN_OUT)
    torch.testing.assert_close(inputs @ experts[index], inputs @ parameter[index])
    torch.testing.assert_close(inputs[None] @ experts[index], inputs[None] @ parameter[index])


def test_all_experts_at_once_see_their_tokens_alone(stacked):
    parameter = transposed(stacked)
    experts = ExpertLinears(parameter, IN_OUT)
    inputs = torch.randn(3, 6, 4)
    inputs[0, :4], inputs[1] = 0.0, 0.0
    rows = []
    for layer in experts.children():
        layer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    torch.testing.assert_close(torch.bmm(inputs, experts), torch.bmm(inputs, parameter))
    assert rows == [2, 6]
    assert experts.shape == parameter.shape


@pytest.mark.parametrize(
    "use",
    [
        lambda x, experts: x @ experts[0],
        lambda x, experts: F.linear(x, experts[torch.tensor([0, 1])]),
        lambda x, experts: torch.add(x, experts[0]),
        lambda x, experts: torch.bmm(x[None].expand(3, -1, -1), experts),
        lambda x, experts: torch.einsum("nk,ek->ne", x, experts),
        lambda x, experts: F.linear(experts[0], x),
    ],
)
def test_other_uses_are_refused(stacked, inputs, use):
    with pytest.raises(RuntimeError, match="expert"):
        use(inputs, ExpertLinears(stacked, OUT_IN))


@pytest.mark.parametrize("layout", [OUT_IN, IN_OUT])
def test_weights_are_views_until_they_are_owned(stacked, layout):
    experts = ExpertLinears(stacked.requires_grad_(False), layout)
    storage = stacked.untyped_storage().data_ptr()
    weights = [layer.weight for layer in experts.children()]
    assert {weight.untyped_storage().data_ptr() for weight in weights} == {storage}
    assert not any(weight.requires_grad for weight in weights)
    experts.own_weights()
    assert all(weight.is_contiguous() and weight.untyped_storage().data_ptr() != storage for weight in weights)
    again = experts.stacked()
    assert torch.equal(again, stacked)
    assert again.is_contiguous()
    assert not again.requires_grad


@pytest.mark.parametrize(("family", "layout"), [("gpt_oss", IN_OUT), ("granitemoe", OUT_IN)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_layers_of_their_own(make_model, token_ids, family, layout, dtype):
    model = make_model(family, dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(input_ids=token_ids[:2]).logits
        unstack_experts(model)
        layouts = expert_layouts(model)
        assert len(layouts) == 4
        assert set(layouts.values()) == {layout}
        layers = target_layers(model)
        assert {f"{name}.{number}" for name in layouts for number in range(4)} < layers.keys()
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
        torch.testing.assert_close(model(input_ids=token_ids[:2]).logits, expected, **tolerance)
        unstack_experts(model)
        assert expert_layouts(model) == layouts
        restack_experts(model)
        again = model.state_dict()
        assert again.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.items())
        torch.testing.assert_close(model(input_ids=token_ids[:2]).logits, expected, **tolerance)


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "mixtral", "llama"])
def test_for_a_while(make_model, family):
    model = make_model(family)
    implementation = getattr(model.config, "_experts_implementation", None)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(IndexError), unstacked_experts(model):
        model(input_ids=torch.full((1, 8), 100_000))
    assert not expert_layouts(model)
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == list(parameters.items())
    assert getattr(model.config, "_experts_implementation", None) == implementation


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("unstack", [unstack_experts, lambda model: unstack_as(model, layouts_of(model))])
def test_stacked_again_they_run_as_before(make_model, unstack, implementation):
    model = make_model("mixtral")
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip(f"transformers {transformers.__version__} has one implementation of experts")
    model.set_experts_implementation(implementation)
    unstack(model)
    assert model.config._experts_implementation == "eager"
    restack_experts(model)
    assert model.config._experts_implementation == implementation


def test_unstacked_in_two_steps_they_run_as_before(make_model):
    model = make_model("gpt_oss")
    before = getattr(model.config, "_experts_implementation", None)
    for block in (1, 0):
        unstack_experts(model, [f"model.layers.{block}.mlp.experts.down_proj.3"])
    assert len(expert_layouts(model)) == 4
    restack_experts(model)
    assert getattr(model.config, "_experts_implementation", None) == before


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_other_implementations_are_refused(make_model, token_ids, family, implementation):
    model = make_model(family)
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip(f"transformers {transformers.__version__} has one implementation of experts")
    unstack_experts(model)
    expected = model(input_ids=token_ids[:2]).logits
    model.set_experts_implementation(implementation)
    with pytest.raises(RuntimeError, match=r"call model\.set_experts_implementation\('eager'\)"):
        model(input_ids=token_ids[:2])
    model.set_experts_implementation("eager")
    assert torch.equal(model(input_ids=token_ids[:2]).logits, expected)


def test_what_no_tensor_has_is_missing_as_in_any_module(stacked):
    experts = ExpertLinears(stacked, OUT_IN)
    assert not hasattr(experts, "device")
    with pytest.raises(AttributeError, match="no attribute 'bias'"):
        experts.bias  # noqa: B018


def test_only_those_of_the_named_layers(make_model):
    model = make_model("gpt_oss")
    unstack_experts(model, ["model.layers.1.mlp.experts.down_proj.3", "model.layers.0.self_attn.q_proj"])
    prefix = "model.layers.1.mlp.experts"
    assert list(expert_layouts(model)) == [f"{prefix}.gate_up_proj", f"{prefix}.down_proj"]
    unstack_experts(model, [])
    assert len(expert_layouts(model)) == 2


def test_targets_without_the_number(make_model):
    model = make_model("gpt_oss")
    unstack_experts(model)
    layers = target_layers(model, targets=["experts.down_proj"], ignore=["down_proj.2"])
    prefix = "model.layers.{}.mlp.experts.down_proj.{}"
    assert list(layers) == [prefix.format(block, number) for block in (0, 1) for number in (0, 1, 3)]
    with pytest.raises(RocketError, match="layers end in down_proj, gate_up_proj, k_proj"):
        target_layers(model, targets=["w1"])


class Mixture(nn.Module):
    """Square experts, two of them, used in a way that a subclass says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)))

    def one(self, x, number):
        raise NotImplementedError

    def forward(self, x):
        return self.one(x, 0) + 2 * self.one(x, 1)


class Linear(Mixture):
    def one(self, x, number):
        return F.linear(x, self.weight[number])


class Product(Mixture):
    def one(self, x, number):
        return x @ self.weight[number]


class Norm(Mixture):
    def one(self, x, number):
        return x * self.weight[number].norm()


class Swapped(Mixture):
    def one(self, x, number):
        return F.linear(x, self.weight[number if isinstance(self.weight, nn.Parameter) else 1 - number])


class Silent(Mixture):
    def one(self, x, number):
        return 0 * F.linear(x, self.weight[number])


class Network(nn.Module):
    def __init__(self, *mixtures: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"linear": nn.Linear(4, 4), "mixture": mixture}) for mixture in mixtures
        )

    @property
    def dummy_inputs(self):
        return {"x": torch.linspace(-1, 1, 12).view(3, 4)}

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block["mixture"](block["linear"](x)))
        return x


@pytest.mark.parametrize(("kind", "layout"), [(Linear, OUT_IN), (Product, IN_OUT)])
def test_square_experts_are_not_mistaken(kind, layout, caplog):
    model = Network(kind(), kind())
    original = copy.deepcopy(model)
    unstack_experts(model)
    assert expert_layouts(model) == {f"blocks.{index}.mixture.weight": layout for index in (0, 1)}
    torch.testing.assert_close(model(torch.eye(4)), original(torch.eye(4)))
    assert not caplog.text


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Norm, "norm"), (Swapped, "returns something else"), (Silent, "nothing to compare")],
)
def test_what_cannot_be_shown_to_be_the_same_stays(kind, reason, caplog):
    model = Network(Linear(), kind(), kind())
    unstack_experts(model)
    assert list(expert_layouts(model)) == ["blocks.0.mixture.weight"]
    assert isinstance(model.blocks[1]["mixture"].weight, nn.Parameter)
    assert f"blocks.1.mixture ({kind.__name__}) and 1 others like it keep their 3-D parameters dense" in caplog.text
    assert reason in caplog.text


def test_a_model_that_does_not_run_on_dummy_inputs(caplog):
    class Deaf(Network):
        @property
        def dummy_inputs(self):
            return {"pixels": torch.ones(1)}

    model = Deaf(Linear(), Linear())
    unstack_experts(model)
    assert not expert_layouts(model)
    assert "does not run on its dummy_inputs" in caplog.text


def test_shared_stacks_and_convolutions_stay(caplog):
    model = Network(Linear(), Linear(), nn.Conv1d(3, 3, 1))
    model.blocks[1]["mixture"].weight = model.blocks[0]["mixture"].weight
    unstack_experts(model)
    assert not expert_layouts(model)
    assert not caplog.text


def test_without_data(make_model):
    with torch.device("meta"):
        model = Network(Linear(), Product())
    unstack_as(model, {"blocks.1.mixture.weight": IN_OUT})
    assert expert_layouts(model) == {"blocks.1.mixture.weight": IN_OUT}
    with pytest.raises(RocketError, match=r"blocks\.0\.linear\.weight holds stacked experts, in this model it is"):
        unstack_as(model, {"blocks.0.linear.weight": IN_OUT})
    with pytest.raises(RocketError, match=r"lie as 'sideways'; there are expert,out,in, expert,in,out"):
        unstack_as(model, {"blocks.0.mixture.weight": "sideways"})
