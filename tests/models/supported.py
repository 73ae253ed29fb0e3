"""Prints docs/supported.md from what the grid of model families gave on each version of transformers.

make test-models        # runs the grid twice and this; see the Makefile
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

KINDS = {"test_families": "text decoder", "test_kinds": "encoder, encoder-decoder, vision, speech, or several"}
HEADER = """# Supported models

Rocket has no list of models. It finds the repeated blocks of any transformer, the linear layers in them and which of
them share an input; the class that opens a checkpoint, the processor and the loss follow from its config. This table is
what a grid of tiny random models went through ({command}): calibrate, plan, compress at 30 %, save, reopen by
`from_pretrained`, compare every output bit by bit, recount the stored values on disk, generate, `optimize()`.
A family that is not here is likely to work; one that cannot be supported fails with a sentence that says why.

Left as they are: embeddings, output heads, norms, routers, convolutions, and weights that a model uses without calling
their layer (the pooling head of SigLIP). Layers of LLaVA's vision tower behind the hidden states that it reads, too.
"""


def outcomes(path: Path) -> dict[tuple[str, str], str]:
    """What became of each family: (kind, family) -> yes, no, or why it was skipped."""
    found = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        module, name = case.attrib["classname"].rpartition(".")[2], case.attrib["name"]
        if not name.startswith("test_family["):
            continue
        skipped, failed = case.find("skipped"), case.find("failure") is not None or case.find("error") is not None
        word = "no" if failed else "yes" if skipped is None else skipped.attrib["message"]
        found[KINDS[module], name.removeprefix("test_family[").removesuffix("]")] = word
    return found


def versions(path: Path) -> str:
    properties = ElementTree.parse(path).getroot().iter("property")
    return next(item.attrib["value"] for item in properties if item.attrib["name"] == "transformers")


def main() -> None:
    paths = [Path(argument) for argument in sys.argv[1:]]
    tables = [outcomes(path) for path in paths]
    print(HEADER.format(command="`make test-models`"))
    print("| kind | family |", " | ".join(f"transformers {versions(path)}" for path in paths), "|")
    print("| --- | --- |", " | ".join("---" for _ in paths), "|")
    for kind, family in sorted({key for table in tables for key in table}):
        print(f"| {kind} | {family} |", " | ".join(table.get((kind, family), "") for table in tables), "|")


if __name__ == "__main__":
    main()
