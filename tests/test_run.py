"""The run directory: whole artifacts or none, known by what made them, safe from others and from damage."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from rocket.config.errors import RocketError
from rocket.run import RunDirectory, fingerprint
from rocket.usage import measure, track

IDENTITY = {"model": "tiny", "calib.num_samples": 4}
MADE, OTHER = fingerprint(version=1), fingerprint(version=2)


@pytest.fixture
def run(tmp_path):
    with RunDirectory(tmp_path / "run", IDENTITY) as directory:
        yield directory


def test_artifacts_come_back(run):
    content = {"a": [1, 2.5, None], "b": {"c": "ä"}}
    run.write_json("plans/x.json", MADE, content)
    assert run.read_json("plans/x.json", MADE) == content
    assert run.read_json("plans/x.json", None) == content
    tensors = {"t": torch.arange(6).view(2, 3).T, "h": torch.ones(3, dtype=torch.bfloat16), "z": torch.empty(0)}
    run.write_tensors("calibration/x.safetensors", MADE, tensors)
    found = run.read_tensors("calibration/x.safetensors", MADE)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_artifacts_of_other_inputs_are_not_used(run):
    run.write_json("x.json", MADE, {"a": 1})
    run.write_tensors("x.safetensors", MADE, {"t": torch.ones(2)})
    assert run.read_json("x.json", OTHER) is None
    assert run.read_tensors("x.safetensors", OTHER) is None
    assert run.read_json("missing.json", MADE) is None
    assert run.read_tensors("missing.safetensors", MADE) is None
    run.write_json("x.json", OTHER, {"a": 2})
    assert run.read_json("x.json", OTHER) == {"a": 2}


def test_fingerprint_tells_inputs_apart():
    base = {"config": {"a": 1, "b": [0.1, None]}, "model": "x"}
    assert fingerprint(**base) == fingerprint(model="x", config={"b": [0.1, None], "a": 1})
    others = [{**base, "model": "y"}, {**base, "config": {"a": 1, "b": [0.1]}}, {"config": base["config"]}]
    assert len({fingerprint(**parts) for parts in [base, *others]}) == 4


def test_interrupted_writes_leave_the_old(run, monkeypatch):
    run.write_json("x.json", MADE, {"a": 1})
    run.write_tensors("x.safetensors", MADE, {"t": torch.ones(2)})

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.write_json("x.json", OTHER, {"a": 2})
        with pytest.raises(KeyboardInterrupt):
            run.write_tensors("x.safetensors", OTHER, {"t": torch.zeros(2)})
    assert run.read_json("x.json", MADE) == {"a": 1}
    assert torch.equal(run.read_tensors("x.safetensors", MADE)["t"], torch.ones(2))
    run.write_json("x.json", OTHER, {"a": 2})  # the leftover is in nobody's way
    assert run.read_json("x.json", OTHER) == {"a": 2}


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "edited": lambda data: data.replace(b"12345", b"12346").replace(b"\x00\x00\x80?", b"\x00\x00\x80@"),
    "garbage": lambda data: b"\x93NUMPY\x00\xff" * 20,
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["x.json", "x.safetensors"])
def test_damaged_artifacts_are_told(run, name, kind):
    run.write_json("x.json", MADE, {"a": 12345})
    run.write_tensors("x.safetensors", MADE, {"t": torch.ones(40)})
    path = run.path / name
    before = path.read_bytes()
    path.write_bytes(DAMAGE[kind](before))
    assert path.read_bytes() != before
    read = run.read_json if name == "x.json" else run.read_tensors
    with pytest.raises(RocketError, match=rf"{name} is truncated or was edited; delete it and run again"):
        read(name, MADE)


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"fingerprint": 1}', '{"content": {}, "checksum": 3}'])
def test_json_of_another_shape(run, content):
    (run.path / "x.json").write_text(content)
    with pytest.raises(RocketError, match="truncated or was edited"):
        run.read_json("x.json", MADE)


def test_directories_appear_whole(run):
    def interrupted() -> None:
        with run.new_directory("models/a", MADE) as directory:
            (directory / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not run.has_directory("models/a", MADE)
    assert not (run.path / "models/a").exists()
    for text in ("first", "second"):  # the leftover and an older folder are in nobody's way
        with run.new_directory("models/a", MADE) as directory:
            (directory / "sub").mkdir()
            (directory / "sub" / "weights").write_text(text)
        assert run.has_directory("models/a", MADE)
        assert not run.has_directory("models/a", OTHER)
        assert (run.path / "models/a/sub/weights").read_text() == text
    assert [entry.name for entry in (run.path / "models").iterdir()] == ["a"]
    assert run.read_json("run.json", None) == IDENTITY


def test_the_prose_of_a_directory_may_change(run):
    with run.new_directory("models/a", MADE) as directory:
        (directory / "weights").write_text("whole")
        (directory / "README.md").write_text("first")
    assert run.has_directory("models/a", MADE)
    run.write_text("models/a/README.md", "second")
    assert run.has_directory("models/a", MADE)
    (run.path / "models/a/README.md").unlink()
    assert run.has_directory("models/a", MADE)


def test_text_that_says_the_same_is_left(run):
    path = run.write_text("notes/x.md", "ä\n")
    before = path.stat()
    assert run.write_text("notes/x.md", "ä\n") == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    run.write_text("notes/x.md", "b\n")
    assert path.read_text() == "b\n"


@pytest.mark.parametrize("kind", ["edited", "missing", "manifest"])
def test_damaged_directories_are_told(run, kind):
    with run.new_directory("models/a", MADE) as directory:
        (directory / "weights").write_text("whole")
    if kind == "edited":
        (run.path / "models/a/weights").write_text("other")
    elif kind == "missing":
        (run.path / "models/a/weights").unlink()
    else:
        (run.path / "models/a/rocket-manifest.json").write_text("{")
    with pytest.raises(RocketError, match=r"(missing, )?truncated or was edited; delete .*models/a"):
        run.has_directory("models/a", MADE)


def test_foreign_directory(tmp_path):
    files = [tmp_path / name for name in ("thesis.tex", "states/notes", ".thesis.tmp", "chapters/.draft.tmp/one")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("years of work")
    with pytest.raises(RocketError, match=r"is not empty and holds no run \(found \.thesis\.tmp\); choose another"):
        RunDirectory(tmp_path, IDENTITY)
    assert all(file.read_text() == "years of work" for file in files)


@pytest.mark.parametrize("change", [{"model": "other"}, {"calib.num_samples": 8}, {"calib.seed": 1}])
def test_directory_of_another_run(tmp_path, change):
    with RunDirectory(tmp_path, IDENTITY) as directory:
        directory.write_json("calibration/index.json", MADE, {})
    ((key, value),) = change.items()
    expected = f"belongs to a run with {key}={IDENTITY.get(key)!r}, this one has {value!r}; choose another"
    with pytest.raises(RocketError) as error:
        RunDirectory(tmp_path, {**IDENTITY, **change})
    assert expected in str(error.value)
    RunDirectory(tmp_path, IDENTITY).close()  # nothing was changed, and the lock was given back


def test_a_run_that_made_nothing_gives_its_directory_up(tmp_path):
    """It named a model that is none, for example."""
    with RunDirectory(tmp_path, IDENTITY) as directory:
        directory.write_text("config.yaml", "")
        directory.log("load model")
    with pytest.raises(RocketError, match="belongs to a run with model="):
        RunDirectory(tmp_path, {**IDENTITY, "model": "other"}, lock="shared")  # others may be at work
    RunDirectory(tmp_path, {**IDENTITY, "model": "other"}).close()
    with RunDirectory(tmp_path, {**IDENTITY, "model": "other"}) as directory:
        assert directory.read_json("run.json", None)["model"] == "other"


def test_directory_of_a_run_killed_at_its_first_write(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            RunDirectory(tmp_path, IDENTITY)
    RunDirectory(tmp_path, IDENTITY).close()


def test_edited_identity(tmp_path):
    RunDirectory(tmp_path, IDENTITY).close()
    content = json.loads((tmp_path / "run.json").read_text())
    content["content"]["model"] = "other"
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(RocketError, match=r"run\.json is truncated or was edited"):
        RunDirectory(tmp_path, IDENTITY)


SECOND = """
import sys
from pathlib import Path
from rocket.config.errors import RocketError
from rocket.run import RunDirectory
try:
    RunDirectory(Path(sys.argv[1]), {})
except RocketError as error:
    print(error)
"""


def test_one_process_at_a_time(run):
    command = [sys.executable, "-c", SECOND, str(run.path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"output_dir {run.path} is in use by another process; wait for it or choose another" in finished.stdout
    run.close()
    RunDirectory(run.path, IDENTITY).close()


def test_not_writable(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RocketError, match=r"output_dir .*file.* cannot be written: (File exists|Not a directory)"):
            RunDirectory(path, IDENTITY)


def test_artifacts_keep_their_names(run):
    """One that was copied over another is found out, though its own checksum was right."""
    for name in ("a", "b"):
        run.write_json(f"{name}.json", MADE, {"of": "layer"})
        run.write_tensors(f"{name}.safetensors", MADE, {"t": torch.ones(2)})
    for suffix, read in (("json", run.read_json), ("safetensors", run.read_tensors)):
        (run.path / f"b.{suffix}").write_bytes((run.path / f"a.{suffix}").read_bytes())
        with pytest.raises(RocketError, match=rf"b\.{suffix} is truncated or was edited"):
            read(f"b.{suffix}", MADE)


@pytest.mark.parametrize("name", ["../x.json", "/etc/x.json", "a/../../x.json", "", "a\0b"])
def test_names_that_lead_outside(run, name):
    for use in (
        lambda: run.read_json(name, MADE),
        lambda: run.read_tensors(name, MADE),
        lambda: run.write_text(name, "text"),
        lambda: run.has_directory(name, MADE),
        lambda: run.has_file(name),
        lambda: run.has_tensors(name, MADE),
        lambda: run.remove(name),
    ):
        with pytest.raises(RocketError, match="is no name of an artifact"):
            use()
    assert not (run.path.parent / "x.json").exists()


@pytest.mark.parametrize("name", ["plans/.x.json.tmp", "log.jsonl", "plans", "run.json"])
def test_links_are_not_followed(tmp_path, name):
    """A run directory from elsewhere must not make rocket write where one of its links points."""
    RunDirectory(tmp_path / "run", IDENTITY).close()
    (tmp_path / "precious").write_text("mine")
    link = tmp_path / "run" / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "precious")
    with pytest.raises(RocketError, match=r"is a link or no plain file; rocket follows none"):
        RunDirectory(tmp_path / "run", IDENTITY)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_lock_that_is_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RocketError, match="cannot be written: Too many levels of symbolic links"):
        RunDirectory(tmp_path / "run", IDENTITY)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", [".lock", "run.json", "plans/x.json"])
def test_pipes_do_not_stop_it(tmp_path, name):
    RunDirectory(tmp_path, IDENTITY).close()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(RocketError, match="is a link or no plain file"):
        RunDirectory(tmp_path, IDENTITY)


def test_files_that_come_and_go(tmp_path, monkeypatch):
    """Another process of the same run may rename a file between its name's being read and its being looked at."""
    RunDirectory(tmp_path, IDENTITY).close()
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda path: [(f, d, [*files, ".gone.tmp"]) for f, d, files in walk(path)])
    RunDirectory(tmp_path, IDENTITY).close()


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 10_000, '{"content": {"a": ' + "[" * 900 + "]" * 900 + "}}"])
def test_json_that_python_cannot_hold(run, content):
    (run.path / "x.json").write_text(content)
    with pytest.raises(RocketError, match=r"x\.json is truncated or was edited"):
        run.read_json("x.json", MADE)


def test_json_larger_than_any_artifact(run):
    with (run.path / "x.json").open("w") as file:
        file.truncate(1 << 26)
    with pytest.raises(RocketError, match=r"x\.json is larger than any that rocket writes"):
        run.read_json("x.json", MADE)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"rocket-manifest\.json is truncated or was edited"),
        ({"../../outside": "00"}, r"outside is missing, truncated or was edited"),
        ({"/dev/zero": "00"}, r"/dev/zero is missing, truncated or was edited"),
        ({"weights": 3}, r"weights is missing, truncated or was edited"),
        ({}, r"weights was added"),
    ],
)
def test_hostile_manifests(run, files, message):
    with run.new_directory("models/a", MADE) as directory:
        (directory / "weights").write_text("whole")
    manifest = run.path / "models/a/rocket-manifest.json"
    manifest.write_text(json.dumps({"fingerprint": MADE, "files": files}))
    with pytest.raises(RocketError, match=message):
        run.has_directory("models/a", MADE)


def fill(run: RunDirectory) -> None:
    run.write_tensors("calibration/x.safetensors", MADE, {"t": torch.ones(1 << 20)})


def fill_directory(run: RunDirectory) -> None:
    with run.new_directory("models/a", MADE) as directory:
        (directory / "weights").write_bytes(b"x" * (4 << 20))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte, for those who may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize(
    ("work", "file"), [(fill, r"calibration/x\.safetensors"), (fill_directory, "models/a")], ids=["file", "directory"]
)
def test_full_disk(small_disk, work, file):
    with RunDirectory(small_disk / "run", IDENTITY) as run:
        run.write_json("x.json", MADE, {"a": 1})
        disk = rf"\(disk mounted at {small_disk}, \d MB free\)"
        with pytest.raises(RocketError, match=rf"run/{file} cannot be written: .*No space left on device.* {disk}"):
            work(run)
        assert run.read_json("x.json", MADE) == {"a": 1}
        assert not run.has_directory("models/a", MADE)
        run.write_json("y.json", MADE, {"a": 2})  # what did not fit takes no room


def test_disk_that_is_read_only(small_disk):
    RunDirectory(small_disk / "run", IDENTITY).close()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(RocketError, match=r"output_dir .* cannot be written: Read-only file system"):
        RunDirectory(small_disk / "run", IDENTITY)


@pytest.mark.parametrize("work", [fill, fill_directory, lambda run: run.write_json("a.json", MADE, {})])
def test_the_systems_errors_name_file_and_disk(run, work, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RocketError, match=r"cannot be written: No space left on device \(disk mounted at /.*MB free\)"):
        work(run)


def test_nothing_that_executes_is_opened(run):
    torch.save({"t": torch.ones(2)}, run.path / "x.safetensors")
    with pytest.raises(RocketError, match="truncated or was edited"):
        run.read_tensors("x.safetensors", MADE)


def test_log_appends_lines(run):
    run.log("plan", skipped=True)
    run.log("compress", seconds=1.5)
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [(line["event"], line.get("skipped"), line.get("seconds")) for line in lines] == [
        ("plan", True, None),
        ("compress", None, 1.5),
    ]


def test_measure_reports_memory_of_the_block():
    with measure() as usage:
        block = torch.ones(25_000_000)  # 100 MB
    assert usage.seconds > 0
    assert usage.peak_mb > 100
    assert len(block) == 25_000_000


def test_track_passes_everything_on():
    assert list(track((number for number in range(5)), "count")) == [0, 1, 2, 3, 4]


def test_a_file_system_without_locks_is_not_called_in_use(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("rocket.run.fcntl.flock", refuse)
    with pytest.raises(RocketError, match=r"cannot be locked: Function not implemented; choose one on a file system"):
        RunDirectory(tmp_path / "run", IDENTITY)
