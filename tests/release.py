"""Builds the sdist and wheels, looks at what is in them, and tries each wheel in a clean environment.

    make release-check

One wheel is built with the compiler and one without, both from the unpacked sdist. Each goes into a virtual environment
of its own, which sees the dependencies of this one but no other rocket; there `rocket run` compresses a tiny model, and
the checkpoint is opened again. Takes minutes; exits with 1 and a sentence at the first thing that is wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rocket

ROOT = Path(__file__).parents[1]
CONFIG = """
output_dir: run
model: {path: model, dtype: float32, device: cpu}
calib: {source: texts.txt, num_samples: 8, seq_len: 32, sensitivity_samples: 2}
compression: {removed_ratio: 0.3}
evaluation: {texts: [texts.txt], seq_len: 32, max_tokens: 256}
"""
OPEN = """
import sys
import rocket
from pathlib import Path
from rocket.kernels import library
from transformers import AutoModelForCausalLM

version, prefix, kernels = sys.argv[1:]
assert rocket.__version__ == version, f"version {rocket.__version__}"
assert Path(rocket.__file__).is_relative_to(prefix), f"imported {rocket.__file__}"
assert (library.load() is not None) == (kernels == "yes"), "compiled kernels"
model = AutoModelForCausalLM.from_pretrained("run/models/removed-0.30")
paths = {layer.path for layer in rocket.explain(model.optimize())}
assert (paths == {"torch"}) == (kernels == "no"), paths
print("opened; layers run by", *sorted(paths))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder)
        build(ROOT, "sdist", temporary / "sdist", with_compiler=True)
        sdist = only(temporary / "sdist", "*.tar.gz")
        make_inputs(temporary / "inputs")
        for kernels in ("yes", "no"):
            source = unpack(sdist, temporary / f"source-{kernels}")
            build(source, "wheel", temporary / f"wheel-{kernels}", with_compiler=kernels == "yes")
            wheel = only(temporary / f"wheel-{kernels}", "*.whl")
            check_wheel(wheel, kernels)
            try_wheel(wheel, temporary / f"environment-{kernels}", temporary / "inputs", kernels)
    print(f"rocket-compress {rocket.__version__}: sdist and wheels are good, with and without a compiler")


def build(source: Path, kind: str, output: Path, with_compiler: bool) -> None:
    """Without isolation: with the setuptools of this environment, and no network."""
    missing = {} if with_compiler else {"CC": "no-compiler", "CXX": "no-compiler"}
    command = ["-m", "build", f"--{kind}", "--no-isolation", "--outdir", output, source]
    run(sys.executable, *command, environment=missing)


def unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = only(folder, "*")
    check_files(sdist.name, {path.relative_to(source).as_posix() for path in source.rglob("*")}, tracked())
    return source


def tracked() -> set[str]:
    """What the package consists of: everything below rocket/ that git knows."""
    listed = subprocess.run(["git", "ls-files", "rocket"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split("\n")) - {""}


def check_wheel(wheel: Path, kernels: str) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = (".cpp", ".h")
    check_files(wheel.name, names, {name for name in tracked() if not name.endswith(sources)})
    libraries = [name for name in names if name.startswith("rocket/kernels/_cpu")]
    demand(bool(libraries) == (kernels == "yes"), f"{wheel.name}: compiled kernels are {libraries or 'missing'}")
    stray = [name for name in names if not name.startswith(("rocket/", "rocket_compress-")) or name.endswith(sources)]
    demand(not stray, f"{wheel.name} has files that are no part of the package: {stray}")


def check_files(archive: str, names: set[str], expected: set[str]) -> None:
    demand(expected <= names, f"{archive} lacks {sorted(expected - names)}")


def try_wheel(wheel: Path, environment: Path, inputs: Path, kernels: str) -> None:
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    # A path in a .pth is searched, but .pth files in it, such as an editable rocket's, are not followed.
    only(environment / "lib", "python*/site-packages").joinpath("dependencies.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--ignore-installed", wheel)
    work = environment / "work"
    work.mkdir()
    for item in inputs.iterdir():
        (work / item.name).symlink_to(item)
    run(environment / "bin" / "rocket", "run", "--config", "config.yaml", folder=work)
    run(python, "-c", OPEN, rocket.__version__, environment, kernels, folder=work)


def make_inputs(folder: Path) -> None:
    """A tiny model with a tokenizer of bytes, text and a config."""
    alphabet = {letter: number for number, letter in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)).save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("\n\n".join(f"Paragraph {n} is not the same as {n * n}." for n in range(200)))
    (folder / "config.yaml").write_text(CONFIG)


def run(*command: object, folder: Path | None = None, environment: dict[str, str] | None = None) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    print("$", *(word if "\n" not in word else "..." for word in words), flush=True)
    finished = subprocess.run(
        words, cwd=folder, env={**inherited, **(environment or {})}, capture_output=True, text=True
    )
    print(finished.stdout[-1000:] if "-c" in words else "", end="")
    demand(
        finished.returncode == 0, f"failed: {' '.join(words[:4])}\n{finished.stdout[-2000:]}{finished.stderr[-4000:]}"
    )


def only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    demand(len(found) == 1, f"{folder} has {len(found)} files {pattern}")
    return found[0]


def demand(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(message)


if __name__ == "__main__":
    main()
