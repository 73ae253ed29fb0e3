"""A killed calibration goes on at the block that it was in, to the same bits; where it cannot, it starts anew."""

import json

import pytest
import torch
import transformers
from torch import nn

from rocket.calib import Waypoints, collect_grams, measure_sensitivities, sensitivity, waypoints
from rocket.config import RocketError
from rocket.config.schema import ModelConfig
from rocket.models import block_of, find_blocks, load_model, target_layers, unstack_experts
from rocket.run import RunDirectory, seal_json

BLOCKS = 4


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def at_every_block(monkeypatch):
    monkeypatch.setattr(waypoints, "SECONDS", 0.0)


@pytest.fixture
def run(tmp_path):
    with RunDirectory(tmp_path / "run", {}) as opened:
        yield opened


class Pass:
    """Calibrations of one model into one place, killed or not."""

    def __init__(self, model, batches, run, expected="bits") -> None:
        self.model, self.batches, self.run, self.expected = model, batches, run, expected
        self.layers = target_layers(model)
        self.blocks = list(find_blocks(model))
        self.grams: dict[str, torch.Tensor] = {}

    def go(self, kill_in: int | None = None):
        """The calibration, and how often a block ran; None if it was killed in the second batch of a block."""
        runs = dict.fromkeys(self.blocks, 0)

        def count(block: str) -> None:
            runs[block] += 1
            if kill_in is not None and block == self.blocks[kill_in] and runs[block] == 2:
                raise Killed

        first = {block_of(name, self.blocks): layer for name, layer in reversed(self.layers.items())}
        handles = [layer.register_forward_pre_hook(lambda *_, block=b: count(block)) for b, layer in first.items()]
        try:
            places = Waypoints(self.run, self.expected)
            return collect_grams(self.model, self.layers, self.batches, self.grams, places), list(runs.values())
        except Killed:
            return None, list(runs.values())
        finally:
            for handle in handles:
                handle.remove()


def same(one, other) -> bool:
    return (
        one.inputs == other.inputs
        and one.tokens == other.tokens
        and all(torch.equal(one.gram(name), other.gram(name)) for name in one.inputs)
    )


def batches_of(token_ids):
    ids = list(token_ids.split(6))  # the last is smaller
    mask = torch.ones_like(ids[0])
    mask[1, 20:] = 0
    return [{"input_ids": ids[0], "attention_mask": mask}, *({"input_ids": part} for part in ids[1:])]


EXPERTS = ["mixtral", "gpt_oss", "granitemoe"]
FAMILIES = ["llama", "gemma2", "phi3", "gpt_neox", "gpt2", "opt", *EXPERTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_calibration_goes_on(make_model, token_ids, run, family):
    model = make_model(family, num_hidden_layers=BLOCKS)
    unstack_experts(model)
    batches = batches_of(token_ids)
    expected = collect_grams(model, target_layers(model), batches)
    calibration = Pass(model, batches, run)
    passes = 8 if family in EXPERTS else 3  # the six texts of the padded batch go through experts one by one
    assert calibration.go(kill_in=2) == (None, [passes, passes, 2, 0])
    assert calibration.go(kill_in=3) == (None, [0, 0, passes, 2])
    result, runs = calibration.go()
    assert runs == [0, 0, 0, passes]
    assert same(result, expected)


def test_hidden_states_that_wait_on_disk(model_dir, token_ids, run, tmp_path):
    path = str(model_dir("llama", num_hidden_layers=BLOCKS))
    config = ModelConfig(path=path, dtype="float32", device="cpu")
    model, _ = load_model(config, streams=True, states=tmp_path / "states")
    calibration = Pass(model, batches_of(token_ids), run)
    assert calibration.go(kill_in=2)[1] == [3, 3, 2, 0]
    result, runs = calibration.go()
    assert runs == [0, 0, 3, 3]
    in_memory, _ = load_model(config)
    assert same(result, collect_grams(in_memory, target_layers(in_memory), batches_of(token_ids)))
    assert not any((tmp_path / "states").iterdir())


def test_only_what_was_made_from_the_same(make_model, token_ids, run):
    model = make_model("llama", num_hidden_layers=BLOCKS)
    calibration = Pass(model, batches_of(token_ids), run)
    calibration.go(kill_in=2)
    assert Pass(model, batches_of(token_ids), run, "other bits").go(kill_in=1)[1] == [3, 2, 0, 0]
    assert calibration.go(kill_in=2)[1] == [3, 3, 2, 0]  # what was left of it is gone


def test_matrices_must_be_there(make_model, token_ids, run):
    calibration = Pass(make_model("llama", num_hidden_layers=BLOCKS), batches_of(token_ids), run)
    calibration.go(kill_in=2)
    calibration.grams.popitem()
    assert calibration.go()[1] == [3, 3, 3, 3]


def test_short_passes_leave_nothing(make_model, token_ids, run, monkeypatch):
    monkeypatch.setattr(waypoints, "SECONDS", 60.0)
    calibration = Pass(make_model("llama", num_hidden_layers=BLOCKS), batches_of(token_ids), run)
    calibration.go(kill_in=2)
    assert not run.has_file(waypoints.WAYPOINTS)
    assert calibration.go()[1] == [3, 3, 3, 3]


def test_one_waypoint_is_kept(make_model, token_ids, run):
    calibration = Pass(make_model("llama", num_hidden_layers=BLOCKS), batches_of(token_ids), run)
    calibration.go(kill_in=3)
    home = run.path / waypoints.WAYPOINTS / "0"
    assert sorted(file.name for file in home.iterdir()) == ["3", "3.json"]
    assert sorted(file.name for file in (home / "3").iterdir()) == [f"{batch}.safetensors" for batch in range(3)]
    Waypoints(run, "bits").clear()
    assert not run.has_file(waypoints.WAYPOINTS)


@pytest.fixture
def killed(make_model, token_ids, run):
    calibration = Pass(make_model("llama", num_hidden_layers=BLOCKS), batches_of(token_ids), run)
    calibration.go(kill_in=2)
    return calibration, run.path / waypoints.WAYPOINTS / "0"


def test_a_state_that_is_cut_or_missing_starts_anew(killed):
    calibration, home = killed
    state = home / "2" / "1.safetensors"
    content = state.read_bytes()
    state.write_bytes(content[: len(content) // 2])
    assert calibration.go(kill_in=2)[1] == [3, 3, 2, 0]
    state.unlink()
    assert calibration.go()[1] == [3, 3, 3, 3]


def test_what_was_edited_is_refused(killed):
    calibration, home = killed
    state = home / "2" / "1.safetensors"
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RocketError, match=r"2/1\.safetensors is truncated or was edited; delete it and run again"):
        calibration.go()
    (home / "2.json").write_text((home / "2.json").read_text()[:-20])
    with pytest.raises(RocketError, match=r"0/2\.json is truncated or was edited; delete it and run again"):
        calibration.go()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passed": {"model.layers.0": 0, "model.layers.1": 10**9}}, "less than or equal to 16"),
        ({"batches": -1}, "greater than or equal to 0"),
        ({"tokens": {}}, "names inputs that it does not count"),
        ({"passed": {}}, "names inputs that it does not count"),
        ({"inputs": ["a"]}, "inputs: "),
    ],
)
def test_what_was_forged_is_refused(killed, change, message):
    calibration, home = killed
    artifact = json.loads((home / "2.json").read_text())
    name = f"{waypoints.WAYPOINTS}/0/2.json"
    sealed = seal_json(name, artifact["fingerprint"], {**artifact["content"], **change})
    (home / "2.json").write_text(json.dumps(sealed))
    with pytest.raises(RocketError, match=message):
        calibration.go()


@pytest.mark.parametrize(
    "change", [{"passed": {"model.layers.1": 0, "model.layers.0": 0}}, {"passed": {"a": 0, "b": 0}}, {"batches": 2}]
)
def test_what_does_not_fit_starts_anew(killed, change):
    calibration, home = killed
    artifact = json.loads((home / "2.json").read_text())
    name = f"{waypoints.WAYPOINTS}/0/2.json"
    sealed = seal_json(name, artifact["fingerprint"], {**artifact["content"], **change})
    (home / "2.json").write_text(json.dumps(sealed))
    assert calibration.go()[1] == [3, 3, 3, 3]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states, other=None, notes=None):
        output = hidden_states + torch.tanh(self.linear(hidden_states))
        if isinstance(notes, dict):
            notes[len(notes)] = output.mean()
            output = output + sum(notes.values())
        return output if other is None else output + other


class Blocks(nn.Module):
    """Blocks in a row; ``kind`` says what else there is between them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.heads = nn.ModuleList(nn.ModuleList([nn.Linear(8, 8)]) for _ in range(2))
        self.norm = nn.LayerNorm(8)

    def forward(self, x, use_cache=False):
        hidden, outputs, notes = x, [], {}
        for block in self.blocks:
            given = {}
            if self.kind == "skips" and len(outputs) == 3:
                given["other"] = outputs[0]
            if self.kind == "norm of a skip" and len(outputs) == 3:
                given["other"] = self.norm(outputs[0])
            if self.kind == "notes":
                given["notes"] = notes
            if self.kind == "outside":
                given["other"] = torch.cumsum(x, 1)
            if self.kind == "between":
                hidden = self.norm(hidden) + x
            hidden = block(hidden, **given)
            outputs.append(hidden)
        if self.kind == "again":
            hidden = self.blocks[0](hidden)
        if self.kind == "heads":
            hidden = self.heads[0][0](outputs[1])
        return hidden


@pytest.mark.parametrize(
    ("kind", "restarts"),
    [
        ("plain", False),
        ("outside", False),
        ("between", False),
        ("skips", True),
        ("norm of a skip", True),
        ("notes", True),
        ("again", True),
        ("heads", True),
    ],
)
def test_what_is_no_chain_starts_anew(run, kind, restarts):
    torch.manual_seed(0)
    model = Blocks(kind).eval()
    batches = [{"x": torch.randn(2, 5, 8)} for _ in range(3)]
    expected = collect_grams(model, target_layers(model), batches)
    calibration = Pass(model, batches, run)
    assert calibration.go(kill_in=2)[1][:BLOCKS] == [3, 3, 2, 0]
    result, runs = calibration.go()
    assert (runs[:2] != [0, 0]) == restarts
    assert same(result, expected)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("kill_in", [1, 3])
def test_a_decoder_beside_an_encoder_starts_anew(run, token_ids, kind, kill_in):
    torch.manual_seed(0)
    sizes = {
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 257},
        "bart": {
            **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
               {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()},
            "d_model": 32, "vocab_size": 257, "max_position_embeddings": 64,
        },
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **sizes[kind], pad_token_id=0, decoder_start_token_id=0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    batches = [{"input_ids": ids, "labels": ids} for ids in token_ids.split(6)]
    expected = collect_grams(model, target_layers(model), batches)
    calibration = Pass(model, batches, run)
    calibration.go(kill_in=kill_in)
    result, runs = calibration.go()
    assert runs == [3, 3, 3, 3]
    assert same(result, expected)


def test_killed_sensitivities_go_on(make_model, token_ids, run, monkeypatch):
    model = make_model("mixtral", num_hidden_layers=2)
    unstack_experts(model)
    layers = target_layers(model)
    batches = [{"input_ids": ids} for ids in token_ids[:8].split(2)]
    expected = measure_sensitivities(model, layers, batches)
    score, scored = sensitivity._score, []

    def die_in_the_third(model, batch, seed):
        scored.append(seed)
        if scored == [0, 1, 2]:
            raise Killed
        return score(model, batch, seed)

    monkeypatch.setattr(sensitivity, "_score", die_in_the_third)
    with pytest.raises(Killed):
        measure_sensitivities(model, layers, batches, waypoints=Waypoints(run, "bits"))
    found = measure_sensitivities(model, layers, batches, waypoints=Waypoints(run, "bits"))
    assert scored == [0, 1, 2, 2, 3]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    few = {name: layers[name] for name in list(layers)[:3]}
    measure_sensitivities(model, few, batches, waypoints=Waypoints(run, "bits"))
    assert scored[5:] == [0, 1, 2, 3]  # sums of other layers do not fit
