"""A model whose blocks come from its files one by one: the same plan and the same bits as with the model in memory."""

import json
import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from rocket.calib import Waypoints, measure_sensitivities, sensitivity, waypoints
from rocket.config import RocketError, load_config
from rocket.config.schema import ModelConfig
from rocket.memory import _free_memory, estimate_memory
from rocket.models import (
    find_blocks,
    hold,
    is_streamed,
    load_model,
    release_pages,
    rewrite,
    stacked_experts,
    target_layers,
    unlike_model,
)
from rocket.models.residence import Spilled, spill, unmapped
from rocket.models.rewriting import SHARD_BYTES
from rocket.pipeline import run_pipeline
from rocket.run import RunDirectory
from rocket.session import Session


@pytest.fixture
def write_config(tmp_path, model_dir, text_file):
    """Writes a config of a model of some size, in a run directory of its own."""

    def write(name: str, family: str = "llama", dtype: str = "float32", **changes: object):
        sections = {
            "output_dir": str(tmp_path / name),
            "model": {"path": str(model_dir(family, hidden_size=128)), "dtype": dtype, "device": "cpu"},
            "calib": {"source": str(text_file), "num_samples": 8, "seq_len": 32, "batch_size": 2},
            "profiling": {"removed_ratios": [0.1, 0.3, 0.5], "rank_support_ratios": [1.5, 2.0]},
            "compression": {"removed_ratio": 0.3},
            "evaluation": {"texts": [str(text_file)], "seq_len": 32, "max_tokens": 96},
        }
        sections["calib"]["sensitivity_samples"] = 4
        sections |= changes
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(sections))
        return path

    return write


def run(path, monkeypatch, streams: bool):
    monkeypatch.setattr(Session, "streams", streams)
    monkeypatch.setattr(Session, "states", path.parent / "states" if streams else None)
    with Session(load_config(path)) as opened:
        summary = run_pipeline(opened)
        return summary, load_file(summary.path / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *(("llama", "float32"), ("gemma2", "float32"), ("gpt2", "float32"), ("granitemoe", "float32")),
        # read from files written again
        *(("llama", "bfloat16"), ("gpt2", "bfloat16"), ("mixtral", "float32"), ("qwen3_moe", "bfloat16")),
    ],
)
def test_streamed_is_the_same_to_the_bit(write_config, monkeypatch, tmp_path, family, dtype):
    monkeypatch.setattr("rocket.models.residence.SMALL", 1)
    monkeypatch.setattr("rocket.models.rewriting.SMALL", 1)
    config = write_config("memory", family, dtype), write_config("streamed", family, dtype)
    in_memory, expected = run(config[0], monkeypatch, streams=False)
    streamed, tensors = run(config[1], monkeypatch, streams=True)
    assert streamed.plan.to_dict() == in_memory.plan.to_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    assert (tmp_path / "states").is_dir()
    assert not any((tmp_path / "states").iterdir())
    assert streamed.original == in_memory.original
    assert streamed.compressed == in_memory.compressed


def test_a_model_that_is_streamed_lies_in_its_files(write_config):
    config = load_config(write_config("run")).model
    model, _ = load_model(config, streams=True)
    assert is_streamed(model)
    assert unmapped(model) is None
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    release_pages(model.parameters())
    with hold(model, next(iter(find_blocks(model)))), torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name])
    assert not is_streamed(load_model(config)[0])


def test_a_hidden_state_waits_on_disk(write_config, tmp_path):
    model, _ = load_model(load_config(write_config("run")).model, streams=True, states=tmp_path / "states")
    hidden = torch.randn(64, 128, requires_grad=True).clone()
    before, view = hidden.detach().clone(), hidden.view(-1)
    waiting = spill(model, hidden)
    assert hidden.untyped_storage().nbytes() == 0
    assert len(list((tmp_path / "states").iterdir())) == 1
    waiting.load()
    waiting.load()
    assert torch.equal(hidden, before)
    assert torch.equal(view, before.view(-1))
    del waiting
    assert not any((tmp_path / "states").iterdir())
    assert spill(model, hidden[:3]) is None  # a part of another tensor stays
    assert spill(model, model.model.embed_tokens.weight) is None  # and so does a weight
    assert spill(load_model(load_config(write_config("other")).model)[0], hidden) is None


def test_release_keeps_what_is_no_file():
    tensor = torch.randn(1 << 20)
    before = tensor.clone()
    release_pages([tensor, torch.empty(0)])
    assert torch.equal(tensor, before)


@pytest.mark.parametrize(("family", "dtype", "part"), [("llama", "bfloat16", "q_proj"), ("mixtral", "float32", "mlp")])
def test_what_is_not_stored_as_the_model_has_it_is_written_again_once(
    write_config, monkeypatch, caplog, tmp_path, family, dtype, part
):
    monkeypatch.setattr("rocket.models.rewriting.SMALL", 1)
    monkeypatch.setattr("rocket.models.residence.SMALL", 1)
    monkeypatch.setattr(Session, "streams", True)
    caplog.set_level("INFO", logger="rocket")
    config = load_config(write_config("run", family, dtype))
    if family == "mixtral" and transformers.__version__ < "5":
        pytest.skip("transformers 4 keeps experts apart")
    assert part in unlike_model(config.model)
    with pytest.raises(RocketError, match="cannot be read a block at a time"):
        load_model(config.model, streams=True)
    for _ in range(2):
        with Session(config) as session:
            assert unmapped(session.model) is None
    assert caplog.text.count("the weights are written again") == 1
    assert not list((tmp_path / "run").rglob("*.tmp*"))
    (tmp_path / "run" / "original" / "model.safetensors").write_bytes(b"")
    with Session(config) as session, pytest.raises(RocketError, match="truncated or was edited"):
        assert session.model


def test_what_lacks_tensors_is_not_written_again(write_config, monkeypatch):
    monkeypatch.setattr("rocket.models.rewriting.SMALL", 1)
    monkeypatch.setattr(Session, "streams", True)
    config = load_config(write_config("run", "mixtral"))
    file = Path(config.model.path) / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "layers.1" not in name}, file)
    with Session(config) as session, pytest.raises(RocketError, match=r"lacks model\.layers\.1"):
        assert session.model


def test_the_budget_decides(write_config):
    path = write_config("run")
    memory = estimate_memory(load_config(path))
    assert not memory.streams
    assert "the model stays in memory" in str(memory)
    resident = max(need.resident for need in memory.needs.values())
    streamed = max(need.streamed for need in memory.needs.values())
    assert streamed < resident
    between = estimate_memory(load_config(path, [f"memory_budget={int((resident + streamed) / 2)}"]))
    assert between.streams
    assert "one by one" in str(between)
    between.check()
    with pytest.raises(RocketError, match=r"memory_budget=0\.1GB: '.+' needs about .* GB with the model streamed"):
        estimate_memory(load_config(path, ["memory_budget=100MB"])).check()


def test_writing_weights_again_keeps_to_the_budget(write_config, monkeypatch):
    memory = estimate_memory(load_config(write_config("run", "qwen3_moe")))
    assert memory.rewriting > SHARD_BYTES
    kept = replace(memory, available=int(memory.rewriting) + 1, budgeted=True)
    kept.check_rewriting()
    with pytest.raises(RocketError, match=r"memory_budget=.*GB: 'rewrite model' needs about .* set model.dtype"):
        replace(kept, available=int(memory.rewriting) - 1).check_rewriting()
    monkeypatch.setattr("rocket.models.rewriting.SMALL", 1)
    monkeypatch.setattr(Session, "streams", True)
    monkeypatch.setattr(Session, "memory", replace(memory, available=SHARD_BYTES, budgeted=True))
    with (
        Session(load_config(write_config("other", dtype="bfloat16"))) as session,
        pytest.raises(RocketError, match="'rewrite"),
    ):
        session.model  # noqa: B018
    assert not (session.run.path / "original").exists()


def test_the_estimate_is_said_before_anything_is_read(write_config, caplog):
    caplog.set_level("INFO", logger="rocket")
    path = write_config("run")
    with Session(load_config(path, ["memory_budget=100MB"])) as session, pytest.raises(RocketError, match="budget=0"):
        run_pipeline(session)
    assert "memory in GB, about: gather activations" in caplog.text
    assert not (path.parent / "run" / "calibration").exists()
    log = path.parent / "run" / "log.jsonl"
    assert not log.exists() or not any(json.loads(line)["event"] == "gather activations" for line in log.open())


def test_sensitivities_leave_hidden_states_on_disk(write_config, tmp_path, monkeypatch, token_ids):
    model, _ = load_model(load_config(write_config("run")).model, streams=True, states=tmp_path / "states")
    waiting, groups = [], [1, 2, 1]
    made, run_back = Spilled.__init__, sensitivity._Chain.run_back

    def keep(self, *arguments):
        made(self, *arguments)
        waiting.append((weakref.ref(self), weakref.ref(arguments[0])))

    def look(self):
        held = [tensor() for spilled, tensor in waiting if spilled() is not None]
        assert held == [None] * (2 * groups.pop(0))  # two blocks
        run_back(self)

    monkeypatch.setattr(Spilled, "__init__", keep)
    monkeypatch.setattr(sensitivity._Chain, "run_back", look)
    layers = target_layers(model)
    streamed = measure_sensitivities(model, layers, [{"input_ids": ids} for ids in token_ids[:8].split(2)])
    monkeypatch.undo()
    in_memory, _ = load_model(load_config(write_config("other")).model)
    expected = measure_sensitivities(
        in_memory, target_layers(in_memory), [{"input_ids": i} for i in token_ids[:8].split(2)]
    )
    assert all(torch.equal(streamed[name], values) for name, values in expected.items())


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_killed_sensitivities_of_a_streamed_model_go_on(write_config, tmp_path, monkeypatch, token_ids, seconds):
    monkeypatch.setattr(waypoints, "SECONDS", 0.0)
    monkeypatch.setattr(sensitivity, "GROUP_SECONDS", seconds)
    model, _ = load_model(load_config(write_config("run")).model, streams=True)
    layers, batches = target_layers(model), [{"input_ids": ids} for ids in token_ids[:14].split(2)]
    expected = measure_sensitivities(model, layers, batches)
    score, scored = sensitivity._score, []

    def die_in_the_fifth(model, batch, seed):
        scored.append(seed)
        if scored == [0, 1, 2, 3, 4]:
            raise KeyboardInterrupt
        return score(model, batch, seed)

    monkeypatch.setattr(sensitivity, "_score", die_in_the_fifth)
    with RunDirectory(tmp_path / "run", {}) as directory:
        with pytest.raises(KeyboardInterrupt):
            measure_sensitivities(model, layers, batches, waypoints=Waypoints(directory, "bits"))
        found = measure_sensitivities(model, layers, batches, waypoints=Waypoints(directory, "bits"))
    assert scored[5:8] == [3, 4, 5]  # behind the groups of one batch and of two
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_experts_count_in_the_estimate(write_config, monkeypatch):
    path = write_config("run", "granitemoe")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(load_config(path).model.path))
    stacks = stacked_experts(model)
    assert len(stacks) == 4  # two blocks, what goes in and what comes out
    assert all(len(stack) == 4 for stack in stacks.values())
    memory = estimate_memory(load_config(path))
    monkeypatch.setattr("rocket.memory.stacked_experts", lambda _: {})
    without = estimate_memory(load_config(path))
    more = memory.needs["gather activations"].streamed - without.needs["gather activations"].streamed
    assert more > 4 * 0.6 * 8 * 72**2  # what four experts of 72 hidden features read


LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("page", ["README.md", "docs/guides/large-models.md"])
def test_the_documented_budget_of_a_large_model_can_be_kept(tmp_path, monkeypatch, page):
    AutoConfig.for_model("llama", **LLAMA_8B, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    monkeypatch.setattr("rocket.memory.process_bytes", lambda _: 600_000_000)
    root = Path(__file__).parents[1]
    (budget,) = set(re.findall(r"memory_budget=(\d+GB)", (root / page).read_text()))
    changes = [f"model.path={tmp_path}", "model.device=cpu", f"memory_budget={budget}"]
    memory = estimate_memory(load_config(root / "rocket/config/default.yaml", changes))
    assert memory.streams
    memory.check()
    with pytest.raises(RocketError, match=r"'profile layers' needs about .*; allow more, or set profiling.forms"):
        replace(memory, available=memory.available // 2).check()
    changes += ["profiling.forms=[low_rank, dictionary]", "memory_budget=6GB"]  # the other documented one
    estimate_memory(load_config(root / "rocket/config/default.yaml", changes)).check()


@pytest.mark.parametrize(
    ("version", "files"),
    [
        ("0::/job/step", ("memory.max", "memory.current", "inactive_file")),
        ("4:cpu,memory:/job/step", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)
def test_a_container_may_limit_memory(tmp_path, monkeypatch, version, files):
    """By a group that this one is in; what is only a cache of files counts as free."""
    limit, used, cache = files
    mounted = tmp_path / "memory" if "memory" in version else tmp_path
    (mounted / "job" / "step").mkdir(parents=True)
    for group, allowed in ((mounted / "job", str(5 << 20)), (mounted / "job" / "step", "max")):
        (group / limit).write_text(f"{allowed}\n")
        (group / used).write_text(f"{4 << 20}\n")
        (group / "memory.stat").write_text(f"anon 7\n{cache} {3 << 20}\n")
    (tmp_path / "own").write_text(f"{version}\n")
    monkeypatch.setattr("rocket.memory.MOUNTED", tmp_path)
    monkeypatch.setattr("rocket.memory.OWN_GROUPS", tmp_path / "own")
    assert _free_memory() == 4 << 20


def test_a_budget_that_cannot_be_kept_is_no_budget(write_config):
    config = load_config(write_config("run"), ["model.path=embedded:smollm2-135m", "memory_budget=6GB"])
    with Session(config) as session, pytest.raises(RocketError, match="only models in safetensors are streamed"):
        session.memory  # noqa: B018


def test_a_download_that_fails_is_told(monkeypatch):
    def fail(*_: object, **__: object):
        raise OSError("no route to host")

    monkeypatch.setattr("rocket.models.rewriting.cached_file", fail)
    with pytest.raises(RocketError, match=r"weights of model\.path='someone/model' cannot be found: no route to host"):
        unlike_model(ModelConfig(path="someone/model"))


def test_what_is_beside_the_blocks_is_written_too(byte_tokenizer, tmp_path):
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    architecture = AutoConfig.for_model("bart", **small, **heads, vocab_size=300)
    model = AutoModelForSeq2SeqLM.from_config(architecture)
    model.final_logits_bias += 1.0  # a buffer of the model itself
    model.save_pretrained(tmp_path / "bart")
    byte_tokenizer.save_pretrained(tmp_path / "bart")
    config = ModelConfig(path=str(tmp_path / "bart"), dtype="bfloat16", device="cpu")
    if transformers.__version__ < "5":
        with pytest.raises(RocketError, match="use transformers 5"):
            rewrite(config, tmp_path / "rewritten")
        return
    rewrite(config, tmp_path / "rewritten")
    expected = load_model(config)[0].state_dict()
    found = load_model(config, rewritten=tmp_path / "rewritten")[0].state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_only_the_files_of_the_index_count(write_config, monkeypatch):
    monkeypatch.setattr("rocket.models.rewriting.SMALL", 1)
    config = load_config(write_config("run")).model
    folder = Path(config.path)
    assert unlike_model(config) is None
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.fp16.safetensors")
    assert unlike_model(config) is None
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert unlike_model(config) is None
    index["weight_map"] = dict.fromkeys(tensors, "../weights.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RocketError, match="which is not in it"):
        unlike_model(config)
    transposed = {name: tensor.t().contiguous() for name, tensor in tensors.items()}
    (folder / "model.safetensors.index.json").unlink()
    save_file(transposed, folder / "model.safetensors")
    assert "k_proj" in unlike_model(config)


def test_shards_do_not_write_weights_again(write_config, monkeypatch):
    monkeypatch.setattr("rocket.models.rewriting.SMALL", 1)
    monkeypatch.setattr(Session, "streams", True)
    config = load_config(write_config("run", dtype="bfloat16"))
    with Session(config, shard=(1, 2)) as session, pytest.raises(RocketError, match="run `rocket gather` first"):
        assert session.model
