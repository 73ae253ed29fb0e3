"""YAML and overrides to a config, or to one line that names the key, its value and the remedy."""

from pathlib import Path

import pytest

from rocket.config import Config, RocketError, dump_config, load_config
from rocket.config.schema import CalibConfig, EvaluationConfig
from rocket.config.units import parse_bytes

SHIPPED = sorted((Path(__file__).parents[2] / "rocket" / "config").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write_config(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write_config


def test_everything_has_a_default():
    assert load_config(None) == Config()
    assert Config().compression.removed_ratio == 0.2


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_load(path):
    assert str(load_config(path).output_dir).startswith("output/")


def test_paper_config_is_the_papers_method():
    config = load_config(next(path for path in SHIPPED if path.name == "paper.yaml"))
    assert config.calib.num_samples == 256
    assert config.profiling.forms == ["dictionary"]
    assert config.profiling.cost == "weight"
    assert config.profiling.removed_ratios == [round(0.05 * i, 2) for i in range(1, 15)]
    assert config.profiling.rank_support_ratios == [round(1 + 0.1 * i, 1) for i in range(21)]
    assert config.profiling.importance_exponent == 0.5
    assert (config.profiling.thresholds, config.profiling.refits) == ("column", 0)
    assert (config.allocation.method, config.allocation.error_cap) == ("knapsack", True)


def test_resolved_config_reads_back(write):
    config = load_config(None, ["calib.num_samples=64", "compression.bytes=6GB", "model.ignore=[q_proj]"])
    assert load_config(write(dump_config(config))) == config


def test_every_field_is_documented():
    def undocumented(section, prefix=""):
        for name, field in section.model_fields.items():
            annotation = field.annotation
            if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
                yield from undocumented(annotation, f"{prefix}{name}.")
            elif not field.description:
                yield f"{prefix}{name}"

    assert list(undocumented(Config)) == []


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("calib.num_samples=64", lambda config: config.calib.num_samples == 64),
        ("model.targets=[q_proj, 're:.*mlp.*']", lambda config: config.model.targets == ["q_proj", "re:.*mlp.*"]),
        ("evaluation.limit=null", lambda config: config.evaluation.limit is None),
        ("compression.bytes=1.5GiB", lambda config: config.compression.bytes == 3 * 2**29),
        ("compression.kept_parameters=8.2e9", lambda config: config.compression.kept_parameters == 8_200_000_000),
        ("output_dir=a=b", lambda config: config.output_dir == Path("a=b")),
        ("profiling.removed_ratios=[0.5, 0.2, 0.5]", lambda config: config.profiling.removed_ratios == [0.2, 0.5]),
    ],
)
def test_overrides(write, override, read):
    config = load_config(write("compression: {removed_ratio: 0.3}\n"), [override])
    assert read(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("calib: {num_sample: 3}", "unknown key 'calib.num_sample': did you mean 'num_samples'?"),
        ("cailb: {}", "unknown key 'cailb': did you mean 'calib'?"),
        ("model: {qqqq: 1}", "unknown key 'model.qqqq': known keys: path, revision, dtype"),
        ("compression: {removed_ratio: 1.5}", "compression.removed_ratio=1.5: must be a share between 0 and 1"),
        ("compression: {removed_ratio: 0}", "compression.removed_ratio=0: must be a share between 0 and 1"),
        ("compression: {removed_ratio: 1}", "compression.removed_ratio=1: must be a share between 0 and 1"),
        ("compression: {removed_ratio: -0.1}", "compression.removed_ratio=-0.1: must be a share between 0 and 1"),
        ("compression: {removed_ratio: .nan}", "compression.removed_ratio=nan: "),
        ("compression: {removed_ratio: 20%}", "compression.removed_ratio='20%': must be a share between 0 and 1"),
        ("compression: {removed_ratio: 0.2, bytes: 6GB}", "exactly one of removed_ratio, kept_parameters, bytes"),
        ("compression: {}", "exactly one of removed_ratio, kept_parameters, bytes (found none)"),
        ("compression: {bytes: 6 gigs}", "'6 gigs' is not a size; write for example 6GB, 500MB or 2GiB"),
        ("compression: {bytes: -1}", "compression.bytes=-1: "),
        ("compression: {kept_parameters: many}", "compression.kept_parameters='many': "),
        ("model: {dtype: int8}", "model.dtype='int8': Input should be 'float32', 'bfloat16' or 'float16'"),
        ("calib: {num_samples: 0}", "calib.num_samples=0: "),
        ("calib: {num_samples: 1.5}", "calib.num_samples=1.5: "),
        ("calib: {sensitivity_samples: 0}", "profiling.cost=loss needs calib.sensitivity_samples > 0"),
        ("calib: {num_samples: 4}", "calib.sensitivity_samples=16 exceeds calib.num_samples=4"),
        ("profiling: {removed_ratios: []}", "profiling.removed_ratios="),
        ("profiling: {removed_ratios: [0.2, 2.0]}", "profiling.removed_ratios.1=2.0: "),
        ("profiling: {rank_support_ratios: [0.5]}", "profiling.rank_support_ratios.0=0.5: "),
        ("calib: 3", "calib=3: "),
        ("calib: {seed: 1}\nmodel: {path: a}\ncalib: {source: b.txt}", "is not YAML: calib is there twice"),
        ("calib: {1: 2, 0x1: 3}", "is not YAML: 1 is there twice"),
        ("calib: {seed: 1, seed: 2}", "is not YAML: seed is there twice; write one of it"),
        ("evaluation: {texts: a.txt}", "evaluation.texts='a.txt': must be a list; write [a, b]"),
        ("evaluation: {max_tokens: 512}", "max_tokens=512 is less than one window of seq_len=1024; raise it"),
        (
            "compression: {removed_ratio: 0.95}",
            "=0.95 is more than the largest of profiling.removed_ratios, 0.7",
        ),
        ("output_dir:", "output_dir=None: must be the path of a file or folder"),
        ("[1, 2]", "holds a list; expected keys and values"),
        ("a: b: c", "is not YAML: "),
        ("model: {path: !!python/object/apply:os.system [ls]}", "is not YAML: "),
        ("a: &a [1, 2]\nb: *a", "is not YAML: aliases (*name) are not read; write the value out"),
        ("model: {path: 2026-99-99}", "is not YAML: month must be in 1..12"),
        ("? [1, 2]\n: 3", "is not YAML: "),
        ("[" * 5000, "is not YAML: "),
        ("calib: {num_samples: " + "9" * 5000 + "}", "is not YAML: "),
        ("calib: {num_samples: 0x" + "f" * 5000 + "}", "calib.num_samples=a number of thousands of digits: "),
        ("calib: {source: [" + "1," * 5000 + "]}", "calib.source=[1, 1, 1"),
        ("x" * 1000 + ": 1", "unknown key 'xxx"),
        ("calib: {num_samples: 1" + 15 * "0" + "}", "calib.num_samples=1000000000000000: Input should be less than"),
        ("calib: {seed: -1}", "calib.seed=-1: Input should be greater than or equal to 0"),
        ("profiling: {rank_support_ratios: [.inf]}", "profiling.rank_support_ratios.0=inf: "),
        ('output_dir: "a\\0b"', "output_dir='a\\x00b': holds a control character"),
        ('model: {targets: ["\\ud800"]}', "model.targets=['\\ud800']: holds a control character"),
        ("#" * 1_000_001, "has 1,000,001 bytes; a config has at most 1,000,000"),
    ],
)
def test_bad_input_is_told_in_one_line(write, text, message):
    with pytest.raises(RocketError) as error:
        load_config(write(text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("calib.num_samples", "write key=value, for example --set calib.num_samples=64"),
        ("=3", "write key=value"),
        ("a\nb", "--set a b: write key=value"),
        ("output_dir.name=3", "output_dir is not a section"),
        ("calib.samples=3", "unknown key 'calib.samples': did you mean"),
        ("compression.removed_ratio=2", "compression.removed_ratio=2: must be a share between 0 and 1"),
    ],
)
def test_bad_overrides(write, override, message):
    with pytest.raises(RocketError) as error:
        load_config(write("output_dir: here\n"), [override])
    assert message in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RocketError, match=r"nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(RocketError, match="Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01\x80")
    with pytest.raises(RocketError, match="is not YAML"):
        load_config(tmp_path / "binary.yaml")


def test_absurd_size(write):
    with pytest.raises(RocketError, match="'9e999GB' is beyond any checkpoint"):
        load_config(write("compression: {bytes: 9e999GB}"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("6GB", 6 * 10**9), ("500 MB", 5 * 10**8), ("2gib", 2**31), ("1e3", 1000), ("10B", 10), (7, 7), (None, None)],
)
def test_sizes(text, value):
    assert parse_bytes(text) == value


def test_a_merged_section_may_be_overridden(write):
    assert load_config(write("calib: {<<: {seed: 1}, seed: 2}")).calib.seed == 2


def test_fewer_sizes_may_be_profiled_than_the_default_budget_needs(write):
    assert load_config(write("profiling: {removed_ratios: [0.1]}")).profiling.removed_ratios == [0.1]


def test_a_section_without_entries_has_its_defaults(write):
    config = load_config(write("calib:\nevaluation:\nhealing:\n"))
    assert (config.calib, config.evaluation) == (CalibConfig(), EvaluationConfig())
    assert config.healing is None
