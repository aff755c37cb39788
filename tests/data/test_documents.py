"""Readers of a user's own text: every format, every kind of bad row."""

import gzip
import json

import pytest

from nemotron3.data import documents, parquet
from nemotron3.data.documents import BadRow, FilesConfig, ReadReport, read_documents
from nemotron3.errors import ConfigError, DataError, DependencyMissingError


def read(path, **options):
    report = ReadReport()
    config = FilesConfig(path=str(path), **options)
    return [document.text for document in read_documents(config, report)], report


def write_lines(file, lines):
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def test_one_file_as_it_stands(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("  naïve\r\ntext \n".encode())
    assert read(file)[0] == ["  naïve\r\ntext \n"]


def test_byte_order_mark_goes(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfhello")
    assert read(file)[0] == ["hello"]


def test_directory_in_order_and_what_was_skipped(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.md", "a.txt", "sub/c.py", "image.png", ".git/d.txt"):
        (tmp_path / name).write_text(name)
    texts, report = read(tmp_path)
    assert texts == ["a.txt", "b.md", "sub/c.py"]
    assert report.skipped_files == {".png": 1}
    assert report.documents == 3


def test_glob_takes_any_suffix(tmp_path):
    for name in ("a.log", "b.log", "c.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.log")[0] == ["a.log", "b.log"]


def test_one_file_that_is_not_utf8_names_the_byte(tmp_path):
    file = tmp_path / "latin1.txt"
    file.write_bytes("abc café".encode("latin-1"))
    with pytest.raises(
        DataError, match=r"latin1\.txt is not UTF-8 at byte 7 \(value 0xe9\).*iconv"
    ):
        read(file)


def test_few_bad_files_of_many_are_counted(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    texts, report = read(tmp_path)
    assert len(texts) == 30
    assert report.bad == {BadRow.NOT_UTF8: 1}
    assert report.first_bad[BadRow.NOT_UTF8].endswith("bad.txt, byte 2")


def test_many_bad_files_are_an_error(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match="1 of 2 rows cannot be used: 1 not UTF-8"):
        read(tmp_path)
    assert read(tmp_path, max_bad_fraction=0.5)[0] == ["good"]


ROWS = [
    b'{"text": "one"}',
    b"",
    b'{"text": "two", "id": 2}',
    b'{"body": "three"}',
    b'{"text": 4}',
    b'{"text": null}',
    b'{"text": "  "}',
    b'{"text": "cut',
    b'["text"]',
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
]


def test_json_lines_count_every_bad_row_by_reason(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", ROWS)
    texts, report = read(file, max_bad_fraction=0.9)
    assert texts == ["one", "two"]
    assert report.bad == {
        BadRow.NO_COLUMN: 1,
        BadRow.NOT_A_STRING: 2,
        BadRow.EMPTY: 1,
        BadRow.NOT_JSON: 2,
        BadRow.NOT_UTF8: 2,
    }
    assert report.first_bad[BadRow.NO_COLUMN] == f"{file}:4"
    assert "2 not a string (first: " in report.summary()


def test_json_lines_with_a_wrong_column_name_the_column(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [b'{"body": "x"}'] * 3)
    with pytest.raises(DataError, match=r"3 of 3 rows .* no such column .*column = 'text'"):
        read(file)
    assert read(file, column="body")[0] == ["x"] * 3


def test_compressed_json_lines(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(b"\n".join(ROWS[:3])))
    assert read(file)[0] == ["one", "two"]


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: b"xx" + raw])
def test_damaged_compressed_file_is_named(tmp_path, damage):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(damage(gzip.compress(b'{"text": "one"}\n' * 1000)))
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz is truncated or damaged"):
        read(file)


def write_parquet(file, values, kind, column="text"):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table  # noqa: PLC0415 - only where pyarrow is installed

    write_table(arrow.table({column: arrow.array(values, getattr(arrow, kind)())}), file)
    return file


@pytest.mark.parametrize("kind", ["string", "large_string", "binary"])
def test_parquet(tmp_path, kind):
    file = write_parquet(tmp_path / "rows.parquet", ["one", "twö", None, " "], kind)
    texts, report = read(file, max_bad_fraction=0.5)
    assert texts == ["one", "twö"]
    assert report.bad == {BadRow.NOT_A_STRING: 1, BadRow.EMPTY: 1}


def test_parquet_bytes_that_are_no_text_are_a_bad_row(tmp_path):
    file = write_parquet(tmp_path / "rows.parquet", [b"one", b"\xff"], "binary")
    texts, report = read(file, max_bad_fraction=0.5)
    assert (texts, report.bad) == (["one"], {BadRow.NOT_UTF8: 1})


def test_parquet_without_the_column_names_those_it_has(tmp_path):
    file = write_parquet(tmp_path / "rows.parquet", ["one"], "string", column="body")
    with pytest.raises(DataError, match="has no column 'text'; it has body"):
        read(file)


def test_parquet_column_of_numbers(tmp_path):
    file = write_parquet(tmp_path / "rows.parquet", [1, 2], "int64")
    with pytest.raises(DataError, match="holds int64, text was expected"):
        read(file)


def test_damaged_parquet_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"rows\.parquet is no readable Parquet"):
        read(tmp_path / "rows.parquet")


def test_parquet_without_pyarrow_gives_the_install_line(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(parquet, "import_module", missing)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DependencyMissingError, match=r"pip install 'nemotron3\[parquet\]'"):
        read(tmp_path / "rows.parquet")


def test_no_documents_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="no text files in it"):
        read(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="1 of 1 rows cannot be used: 1 empty"):
        read(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="no documents"):
        read(write_lines(tmp_path / "none.jsonl", [b"", b""]))


@pytest.mark.parametrize(
    "options",
    [
        {"path": ""},
        {"name": "a/b"},
        {"name": ".."},
        {"name": ""},
        {"max_bytes": 0},
        {"max_bad_fraction": 1.5},
    ],
)
def test_config_checks(options):
    with pytest.raises(ConfigError):
        FilesConfig(**{"path": "x", **options})


def test_reading_again_gives_the_same(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.json").write_text(json.dumps({"i": i}))
    assert read(tmp_path)[0] == read(tmp_path)[0]
    assert ".jsonl" not in documents.TEXT_SUFFIXES
