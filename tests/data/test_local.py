import pyarrow
import pyarrow.parquet
import pytest

from rocket.config.errors import RocketError
from rocket.data import load_documents
from rocket.data.splits import Corpus


def texts(path, **options):
    return load_documents(str(path), "all", **options)


def parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_only_txt_file_is_split_at_blank_lines(write):
    path = write("book.txt", "first\nline\n\nsecond\n \n\n\nthird\n")
    assert texts(path) == ("first\nline", "second", "third")
    assert texts(path.parent) == texts(path)


def test_each_txt_file_of_a_folder_is_one_document(write, tmp_path):
    write("b/second.txt", "three\n\nfour")
    write("a/first.txt", "one\n\ntwo")
    write("a/notes.md", "not read")
    assert texts(tmp_path) == ("one\n\ntwo", "three\n\nfour")


def test_jsonl(write):
    path = write("rows.jsonl", '{"text": "one", "id": 1}\n\n{"text": "two"}\n')
    assert texts(path) == ("one", "two")


def test_parquet(tmp_path):
    path = parquet(tmp_path / "rows.parquet", {"body": ["one", None, "two"]})
    assert texts(path, text_field="body") == ("one", "two")


def test_folder_mixes_formats(write, tmp_path):
    write("a.jsonl", '{"text": "one"}\n')
    parquet(tmp_path / "b.parquet", {"text": ["two"]})
    write("c.txt", "three\n\nstill three")
    assert texts(tmp_path) == ("one", "two", "three\n\nstill three")


def test_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert texts(tmp_path) == ("one",)


def test_lone_surrogates_are_replaced(write):
    assert texts(write("a.jsonl", '{"text": "bad \\ud800 half"}')) == ("bad ? half",)


def test_home_directory_is_expanded(write, tmp_path, monkeypatch):
    write("a.txt", "one")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/a.txt") == ("one",)


def test_jsonl_without_the_field(write):
    with pytest.raises(RocketError, match=r"a\.jsonl:2: has no field 'text'; it has: body, id; .*text_field"):
        texts(write("a.jsonl", '{"text": "one"}\n{"id": 1, "body": "two"}\n'))


def test_parquet_without_the_field(tmp_path):
    with pytest.raises(RocketError, match=r"a\.parquet: has no field 'text'; it has: body; .*text_field"):
        texts(parquet(tmp_path / "a.parquet", {"body": ["one"]}))


def test_field_that_is_no_text(write):
    with pytest.raises(RocketError, match=r"a\.jsonl:1: field 'text' holds int, not text"):
        texts(write("a.jsonl", '{"text": 7}'))


def test_bad_json_names_file_and_line(write):
    with pytest.raises(RocketError, match=r"a\.jsonl:2: not valid JSON"):
        texts(write("a.jsonl", '{"text": "one"}\n{"text": \n'))


def test_json_line_that_is_no_object(write):
    with pytest.raises(RocketError, match=r"a\.jsonl:1: not a JSON object"):
        texts(write("a.jsonl", '["one"]'))


def test_broken_parquet(write):
    with pytest.raises(RocketError, match=r"a\.parquet: not a readable parquet file"):
        texts(write("a.parquet", "plain words"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_is_not_utf8(tmp_path, name):
    (tmp_path / name).write_bytes(b"caf\xe9 au lait")
    with pytest.raises(RocketError, match=r"a\.\w+: not UTF-8 text"):
        texts(tmp_path / name)


def test_endings_in_capitals(write, tmp_path):
    assert texts(write("A.TXT", "one\n\ntwo")) == ("one", "two")
    write("B.JSONL", '{"text": "three"}')
    assert texts(tmp_path) == ("one\n\ntwo", "three")


def test_a_txt_file_without_blank_lines_is_told_of_them(write, monkeypatch):
    monkeypatch.setattr(Corpus, "select", lambda *_: iter([("all of it", False)]))
    with pytest.raises(RocketError, match=r"1 document\(s\), none .*; add documents, or part them by blank lines, or"):
        load_documents(str(write("a.txt", "all of it")), "held_out")


def test_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(RocketError, match=r"a\.txt: cannot be read \(No such file"):
        texts(tmp_path)


def test_file_of_another_kind(write):
    with pytest.raises(RocketError, match=r"a\.pdf: cannot read files of this kind; .*\.txt, \.jsonl, \.parquet"):
        texts(write("a.pdf", "%PDF"))


def test_folder_without_readable_files(tmp_path):
    with pytest.raises(RocketError, match=r"no \.txt, \.jsonl, \.parquet file in this folder"):
        texts(tmp_path)


def test_a_folder_named_like_a_file_holds_files(write, tmp_path):
    (tmp_path / "set.txt").mkdir()
    write("set.txt/part.txt", "a part")
    assert load_documents(str(tmp_path), "all") == ("a part",)


@pytest.mark.parametrize("line", ['{"text": ' + "9" * 5000 + "}", "[" * 100_000])
def test_json_that_python_gives_up_on(write, line):
    with pytest.raises(RocketError, match=r"odd.jsonl:1: not valid JSON \("):
        load_documents(str(write("odd.jsonl", line)), "all")
