"""Every code block of the README and the docs: it runs, or it says why not and still names only what exists.

A page is a session: its blocks run in order, in one folder, which holds a tiny model and a few files (`workplace`). Of
each block, also of one behind `<!-- not run: WHY -->`, imports, attributes, arguments, commands, options, config keys
and files are looked up. A YAML block that begins with `# NAME.yaml` is the file NAME.yaml for the blocks after it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from markdown_it import MarkdownIt
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel
from typer.testing import CliRunner

import rocket
from rocket.allocation.plan import ALLOCATORS
from rocket.config import load_config
from rocket.data.sources import SAMPLE_SOURCES, SOURCES
from rocket.forms import FORMS
from rocket.nn import LAYERS
from rocket.scripts.main import main as rocket_command

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "bash", "yaml", "json", "bibtex", "text"}
NOT_RUN = re.compile(r"^<!-- not run: \S.* -->$", re.MULTILINE)
REGISTRIES: list[dict[str, Any]] = [SOURCES, SAMPLE_SOURCES, ALLOCATORS, FORMS, LAYERS]


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    not_run: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a bash block, comments and continued lines undone."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]

    @property
    def file(self) -> str | None:
        """The file that a YAML block is."""
        found = re.match(r"# (\S+\.yaml)\n", self.text)
        return found[1] if found else None


def blocks_of(page: Path) -> Iterator[Block]:
    before = ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            language = token.info if token.type == "fence" else "an indented block"
            yield Block(page, token.map[0] + 1, language, token.content, bool(NOT_RUN.fullmatch(before)))
        before = token.content.strip() if token.type == "html_block" else ""


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(*languages: str) -> Any:
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=map(str, chosen))


def test_blocks_are_found():
    assert {block.language for block in BLOCKS} == LANGUAGES, [str(b) for b in BLOCKS if b.language not in LANGUAGES]
    assert {block.page.name for block in BLOCKS} >= {"README.md", "format.md", "extend.md", "quick-start.md"}


def test_every_marker_stands_before_a_block():
    for page in PAGES:
        marked = sum(block.not_run for block in BLOCKS if block.page == page)
        assert len(NOT_RUN.findall(page.read_text(encoding="utf-8"))) == marked, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    inner = [child for token in tokens for child in token.children or ()]
    targets = [str(token.attrs.get("href") or token.attrs.get("src") or "") for token in inner]
    for target in targets:
        if target and not target.startswith(("https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


# What a block names exists.


@of("json")
def test_json(block):
    json.loads(block.text if block.text.startswith("{") else f"{{{block.text}}}")


@of("yaml")
def test_yaml(block, tmp_path):
    (tmp_path / "config.yaml").write_text(block.text)
    load_config(tmp_path / "config.yaml")


@of("bash")
def test_commands(block, tmp_path):
    for other in BLOCKS:
        if other.page == block.page and other.file:
            (tmp_path / other.file).write_text(other.text)
    for words in block.commands:
        check_command(words, block.not_run, tmp_path)


def check_command(words: list[str], not_run: bool, folder: Path) -> None:
    """Raise unless the command and all that it names exist."""
    program, *arguments = words
    if program.startswith("rocket"):
        check_rocket(program, arguments, folder)
    elif program == "make":
        for target in (argument for argument in arguments if "=" not in argument):
            check_target(target)
    elif words[:3] == ["python", "-m", "pip"] or program == "pip":
        check_pip(arguments[arguments.index("install") + 1 :])
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        assert importlib.util.find_spec(words[2]), words[2]
    else:
        assert not_run, f"{shlex.join(words)}: say that it is not run"


def console_scripts() -> dict[str, typer.Typer]:
    found = re.findall(r'^(rocket[\w-]*) = "([\w.]+):main"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return {name: importlib.import_module(module).main for name, module in found}


def check_rocket(program: str, arguments: list[str], folder: Path) -> None:
    command = typer.main.get_command(console_scripts()[program])
    if program == "rocket":
        command, arguments = command.commands[arguments[0]], arguments[1:]  # type: ignore[attr-defined]
    if "--help" in arguments:
        return
    parameters = command.make_context(program, list(arguments)).params
    config = parameters["config"]
    if config is not None:
        config = next((base / config for base in (folder, ROOT) if (base / config).exists()), config)
    load_config(config, parameters["set_"] or ())


def check_target(target: str) -> None:
    if target.startswith("benchmark-"):
        assert importlib.util.find_spec(f"benchmarks.{target.removeprefix('benchmark-').replace('-', '_')}"), target
    else:
        assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def check_pip(arguments: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for flag, argument in zip(["", *arguments], arguments, strict=False):
        if flag == "-r":
            assert (ROOT / argument).is_file(), argument
        extras = re.search(r"\[([\w,]+)\]$", argument)
        for extra in extras[1].split(",") if extras else ():
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"{argument}: no extra {extra}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_names_only_what_exists(page):
    scope: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.language == "python":
            tree = ast.parse(block.text, str(block))
            assert list(unknown_names(tree, scope)) == [], block


def unknown_names(tree: ast.AST, scope: dict[str, Any]) -> Iterator[str]:
    """Imports, attributes and keyword arguments that are not there. Adds what is imported to the scope."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                module = importlib.import_module(name.name)
                scope[name.asname or name.name.partition(".")[0]] = (
                    module if name.asname else importlib.import_module(name.name.partition(".")[0])
                )
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                if hasattr(module, name.name):
                    scope[name.asname or name.name] = getattr(module, name.name)
                else:
                    yield f"{node.module}.{name.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_namespace(resolve(node.value, scope)) and not resolve(node, scope):
            yield ast.unparse(node)
        function = resolve(node.func, scope) if isinstance(node, ast.Call) else None
        if inspect.isfunction(function) or inspect.ismethod(function):
            known = inspect.signature(function).parameters.values()
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
                names = {parameter.name for parameter in known}
                yield from (f"{ast.unparse(node.func)}({word.arg}=)" for word in node.keywords if word.arg not in names)


def resolve(node: ast.AST, scope: dict[str, Any]) -> Any:
    """What an imported name, or an attribute of an imported module or class, stands for; None for all else."""
    if isinstance(node, ast.Name):
        return scope.get(node.id)
    if isinstance(node, ast.Attribute) and is_namespace(owner := resolve(node.value, scope)):
        return getattr(owner, node.attr, None)
    return None


def is_namespace(value: Any) -> bool:
    return inspect.ismodule(value) or inspect.isclass(value)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("import rocket\nrocket.compres", ["rocket.compres"]),
        ("from rocket.data import Samples", ["rocket.data.Samples"]),
        ("import rocket\nrocket.plan(model, text=[])", ["rocket.plan(text=)"]),
        ("import rocket\nrocket.plan(model, calibration=[]).at(x=1)", []),
    ],
)
def test_wrong_names_are_seen(text, wrong):
    assert list(unknown_names(ast.parse(text), {})) == wrong


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rocket plan --measured 0.2", "--measured"),
        ("rocket squeeze", "squeeze"),
        ("rocket run --set calib.sample=3", "unknown key 'calib.sample'"),
        ("rocket run --config nowhere.yaml", "nowhere.yaml: No such file"),
        ("rocket-fly", "rocket-fly"),
        ("make fly", "fly"),
        ("make benchmark-fly", "fly"),
        ("pip install 'rocket-compress[fly]'", "no extra fly"),
        ("pip install -r requirements/fly.txt", "requirements/fly.txt"),
        ("fly", "say that it is not run"),
    ],
)
def test_wrong_commands_are_seen(line, message, tmp_path):
    with pytest.raises(Exception, match=message):
        check_command(shlex.split(line), False, tmp_path)


# What can run here does.


@pytest.fixture(scope="module")
def materials(tmp_path_factory, make_model, byte_tokenizer, texts) -> Path:
    """What pages may count on in the reader's folder."""
    folder = tmp_path_factory.mktemp("materials")
    make_model("llama", max_position_embeddings=1024).save_pretrained(folder / "my-model")
    byte_tokenizer.save_pretrained(folder / "my-model")
    numbered = [f"{number}: {text}" for number in range(3) for text in texts]
    (folder / "calibration.txt").write_text("\n\n".join(numbered))
    (folder / "notes.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in numbered))
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=72, image_size=32, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "my-vision-model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "my-vision-model")
    (folder / "photos").mkdir()
    generator = np.random.default_rng(0)
    for number in range(60):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
    return folder


@pytest.fixture
def workplace(materials, tmp_path, monkeypatch) -> Path:
    """A fresh copy of them, and the current folder; registries are left as they were."""
    folder = tmp_path / "workplace"
    shutil.copytree(materials, folder)
    monkeypatch.chdir(folder)
    kept = [dict(registry) for registry in REGISTRIES]
    yield folder
    for registry, entries in zip(REGISTRIES, kept, strict=True):
        registry.clear()
        registry.update(entries)


RUNNABLE = [page for page in PAGES if any(b.language in ("python", "bash") and not b.not_run for b in blocks_of(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page, workplace):
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.file:
            (workplace / block.file).write_text(block.text)
        if block.not_run:
            continue
        if block.language == "python":
            code = compile("\n" * block.line + block.text, str(block.page), "exec")  # tracebacks show the page's lines
            exec(code, namespace)
        elif block.language == "bash":
            for program, *arguments in block.commands:
                if program == "rocket":
                    result = CliRunner().invoke(rocket_command, arguments)
                    assert result.exit_code == 0, f"{block}: {program} {shlex.join(arguments)}\n{result.output}"


# What is generated is up to date.


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(generate, page):
    text = page.read_text(encoding="utf-8")
    assert generate.filled(text) == text, f"{page.name} is behind the code or the results: run make docs"


def test_markers_are_filled(generate):
    stale = "<!-- table: {file: knapsack.json, rows: [layers], values: [options]} -->\nold\n<!-- end -->\nkept"
    new = generate.filled(stale)
    assert "old" not in new
    assert new.endswith("<!-- end -->\nkept")
    assert "| 560 | 295 |" in new
    assert generate.filled(new) == new
    config = generate.config_reference()
    assert "| `calib.num_samples` | integer ≥ 1 | `128` | Sequences of tokens, images or clips. |" in config
    assert "`weight`, `activation`, `loss`" in config
    assert "- `--dense`: " in generate.command_reference()


def test_every_result_file_is_in_the_results():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"<!-- source: {path.name} -->" in page, f"docs/results.md does not show {path.name}"


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == rocket.__version__
    assert f"## [{rocket.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
