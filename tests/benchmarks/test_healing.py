"""The rows that benchmarks.healing writes, from a tiny model."""

import json
import math

import pytest
import yaml

from benchmarks import harness, healing


def test_rows(tmp_path, monkeypatch, model_dir, text_file):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    config = {
        "model": {"path": str(model_dir("llama")), "dtype": "float32", "device": "cpu"},
        "calib": {"source": str(text_file), "num_samples": 8, "seq_len": 32, "sensitivity_samples": 4},
        "profiling": {"removed_ratios": [0.3, 0.6], "forms": ["sparse"]},
        "evaluation": {"texts": [str(text_file)], "seq_len": 32},
        "healing": {"source": str(text_file), "seq_len": 32, "learning_rate": 3e-3, "objective": "language_modelling"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    measured = ["--texts", str(text_file), "--eval-seq-len", "32", "--max-tokens", "96"]
    options = ["--config", str(tmp_path / "config.yaml"), "--removed", "0.3", "0.5", "--tokens", "1024"]
    healing.main([*options, *measured])

    rows = json.loads((tmp_path / "healing.json").read_text())["rows"]
    original, *sizes = rows
    assert original["method"] == "original, healed"
    assert original["perplexity"] < original["perplexity_before"]
    assert [row["removed_ratio"] for row in sizes] == pytest.approx([0.3, 0.5], abs=0.03)
    for row in sizes:
        assert row["masks_equal"]
        assert row["stored_values"] == row["stored_values_before"]
        assert row["tokens"] == 1024
        assert row["perplexity"] < row["perplexity_before"]
        assert row["original_perplexity"] == original["perplexity_before"]
        assert row["original_healed_perplexity"] == original["perplexity"]
        before, after, target = (
            math.log(row[key]) for key in ("perplexity_before", "perplexity", "original_perplexity")
        )
        assert row["share_back"] == pytest.approx((before - after) / (before - target))

    healing.main(["--config", str(tmp_path / "config.yaml"), "--removed", "0.5", "--tokens", "512", "--add", *measured])
    added = json.loads((tmp_path / "healing.json").read_text())["rows"]
    assert added[:2] == rows[:2]
    assert [row["tokens"] for row in added] == [1024, 1024, 512]
