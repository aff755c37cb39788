"""Token files: round trips, Megatron reads ours and we read Megatron's, damage is named."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.data.token_files import TokenFile, TokenFileWriter, token_dtype
from nemotron3.errors import DataError, StorageError

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 299]]


def write(prefix, documents, vocab_size=300):
    with TokenFileWriter(prefix, vocab_size=vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return TokenFile(prefix)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(300, np.uint16), (65_535, np.uint16), (65_536, np.int32), (131_072, np.int32)],
)
def test_ids_take_two_bytes_where_they_fit(tmp_path, vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype
    file = write(tmp_path / "t", [[0, vocab_size - 1]], vocab_size)
    assert file.tokens.dtype == dtype
    assert file.document(0).tolist() == [0, vocab_size - 1]


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(
        st.lists(st.integers(0, 299), min_size=1, max_size=20), min_size=0, max_size=10
    )
)
def test_documents_come_back(tmp_path_factory, documents):
    file = write(tmp_path_factory.mktemp("files") / "t", documents)
    assert [file.document(i).tolist() for i in range(len(file))] == documents
    assert file.lengths.tolist() == [len(document) for document in documents]
    assert file.num_tokens == sum(map(len, documents))
    assert file.tokens.tolist() == [token for document in documents for token in document]


def test_prefix_with_a_dot_keeps_its_name(tmp_path):
    file = write(tmp_path / "corpus.v1", DOCUMENTS)
    assert file.bin_path.name == "corpus.v1.bin"


def test_reading_past_the_end(tmp_path):
    file = write(tmp_path / "t", DOCUMENTS)
    with pytest.raises(IndexError, match="document 3 of 3"):
        file.document(3)


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(DataError):
        write(tmp_path / "t", [[1, 2], [300]])
    assert list(tmp_path.iterdir()) == []


def test_nothing_stands_under_the_name_before_the_end(tmp_path):
    with TokenFileWriter(tmp_path / "t", vocab_size=300) as writer:
        writer.add([1, 2])
        assert not (tmp_path / "t.bin").exists()
        assert not (tmp_path / "t.idx").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.bin", "t.idx"]


def test_a_full_disk_is_a_storage_error(tmp_path):
    writer = TokenFileWriter(tmp_path / "t", vocab_size=300)
    writer._stream.close()
    writer._stream = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - the writer closes it
    with pytest.raises(StorageError, match="free space"), writer:
        writer.add([1, 2])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("document", [[], [[1]], [300], [-1]])
def test_documents_that_cannot_be(tmp_path, document):
    with pytest.raises(DataError, match=r"a row of one or more ids|outside the vocabulary"):
        write(tmp_path / "t", [document])


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".bin", lambda raw: raw[:-1], "has 17 bytes, its index tells of 18"),
        (".bin", lambda raw: raw + b"\0\0", "has 20 bytes, its index tells of 18"),
        (".idx", lambda raw: raw[:-1], "truncated or damaged"),
        (".idx", lambda raw: raw[:20], "less than a header"),
        (".idx", lambda raw: b"x" + raw[1:], "no token index"),
        (".idx", lambda raw: raw[:9] + b"\x02" + raw[10:], "of version 2"),
        (".idx", lambda raw: raw[:17] + b"\x07" + raw[18:], "token type 7"),
        (".idx", lambda raw: raw[:34] + b"\x04" + raw[35:], "offsets and lengths disagree"),
        (".idx", lambda raw: raw[:-8] + b"\x02" + raw[-7:], "bounds are not in order"),
    ],
)
def test_damage_is_named(tmp_path, suffix, damage, message):
    write(tmp_path / "t", DOCUMENTS)
    file = tmp_path / f"t{suffix}"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=message) as raised:
        TokenFile(tmp_path / "t")
    assert f"t{suffix}" in str(raised.value)


def test_missing_half_is_named(tmp_path):
    write(tmp_path / "t", DOCUMENTS)
    (tmp_path / "t.idx").unlink()
    with pytest.raises(DataError, match=r"t\.idx is missing"):
        TokenFile(tmp_path / "t")


@pytest.fixture(scope="module")
def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle warns of accelerators it lacks
        return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.parametrize("vocab_size", [300, 131_072])
def test_megatron_reads_ours(tmp_path, megatron, vocab_size):
    write(tmp_path / "t", DOCUMENTS, vocab_size)
    theirs = megatron.IndexedDataset(str(tmp_path / "t"), mmap=False)
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_megatrons(tmp_path, megatron, dtype):
    prefix = str(tmp_path / "m")
    builder = megatron.IndexedDatasetBuilder(prefix + ".bin", dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(np.array(document), [len(document)])
    builder.add_document(np.array([9, 10, 11]), [1, 2])  # two sequences, one document
    builder.finalize(prefix + ".idx")
    ours = TokenFile(prefix)
    assert ours.dtype == dtype
    assert [ours.document(i).tolist() for i in range(len(ours))] == [*DOCUMENTS, [9, 10, 11]]
