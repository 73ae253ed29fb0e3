"""What MkDocs cannot say in mkdocs.yml."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

RESULTS = "benchmarks/results"


def on_files(files: Files, config: Any) -> Files:
    """Add the result files, which pages link to and which lie outside docs/."""
    for path in sorted((Path(config.config_file_path).parent / RESULTS).glob("*.json")):
        files.append(File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to the result files to where the site has them."""
    return markdown.replace(f"../{RESULTS}/", f"{RESULTS}/")


class Doctests(griffe.Extension):
    """Shows the examples of docstrings as code: `>>>` is three nested quotations in Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r" *# doctest: \S+$", "", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^(>>> .*(?:\n.+)*)", r"```python\n\1\n```", text, flags=re.MULTILINE)
