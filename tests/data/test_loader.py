"""Batches: pure functions of the step, cut alike by any ranks, targets and boundaries right."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.data.loader import Loader, held_out_batches
from nemotron3.data.mixture import Blend, PhaseSchedule
from nemotron3.data.token_files import TokenFile, TokenFileWriter
from nemotron3.errors import ConfigError, DataError

EOS = 2
SEQ_LEN = 16


def write(prefix, lengths, first_id):
    """Documents whose ids count upwards from `first_id`, each ending in EOS: all ids differ."""
    with TokenFileWriter(prefix, vocab_size=100_000) as writer:
        for length in lengths:
            writer.add([*range(first_id, first_id + length - 1), EOS])
            first_id += length - 1
    return TokenFile(prefix)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    return {
        "a": write(folder / "a", rng.integers(1, 60, 50).tolist(), 10),
        "b": write(folder / "b", [1, 1, 2, 300, 1, 16, 17, 15], 50_000),
    }


def loader_for(files, *, batch_size=8, seed=0, total=200, seq_len=SEQ_LEN):
    schedule = PhaseSchedule(
        [(Blend({"a": 0.75, "b": 0.25}), 0.5), (Blend({"a": 0.25, "b": 0.75}), 1.0)],
        total_samples=total,
        names=("a", "b"),
    )
    return Loader(files, schedule, seq_len=seq_len, batch_size=batch_size, seed=seed)


def same(one, two):
    return (
        torch.equal(one.tokens, two.tokens)
        and torch.equal(one.targets, two.targets)
        and torch.equal(one.loss_mask, two.loss_mask)
        and one.lengths == two.lengths
        and one.samples == two.samples
    )


def test_shapes_and_types(files):
    batch = loader_for(files).batch(0)
    assert batch.tokens.shape == batch.targets.shape == batch.loss_mask.shape == (8 * SEQ_LEN,)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32
    assert sum(batch.lengths) == 8 * SEQ_LEN
    assert min(batch.lengths) > 0
    assert batch.samples == {"a": 6, "b": 2}
    assert batch.num_targets == batch.loss_mask.sum()
    assert same(batch.to("cpu"), batch)


@settings(max_examples=40, deadline=None)
@given(step=st.integers(0, 400), seq_len=st.integers(1, 80))
def test_targets_mask_and_segments_follow_the_documents(files, step, seq_len):
    batch = loader_for(files, seq_len=seq_len).batch(step)
    rows = zip(
        *(x.view(-1, seq_len).tolist() for x in (batch.tokens, batch.targets, batch.loss_mask)),
        strict=True,
    )
    lengths, expected = list(batch.lengths), []
    for tokens, targets, mask in rows:
        assert tokens[1:] == targets[:-1]
        for token, target, counts in zip(tokens, targets, mask, strict=True):
            # In these files ids count upwards within a document, and EOS ends it.
            assert counts == (0 if token == EOS else 1)
            assert token == EOS or target in (token + 1, EOS)
        run = 0
        for token in tokens:
            run += 1
            if token == EOS:
                expected.append(run)
                run = 0
        expected += [run] if run else []
    assert lengths == expected


def test_an_epoch_reads_every_window_once_and_no_token_twice(files):
    loader = loader_for(files)
    for windows in loader._windows:
        for epoch in range(3):
            places = np.arange(windows.per_epoch) + epoch * windows.per_epoch
            starts = np.sort(windows.starts(places))
            assert (np.diff(starts) == SEQ_LEN).all()
            assert starts[0] >= 0
            assert starts[-1] + SEQ_LEN + 1 <= windows.file.num_tokens
            assert windows.per_epoch == (windows.file.num_tokens - 1) // SEQ_LEN


def test_epochs_and_seeds_differ_in_order_and_in_cuts(files):
    windows = loader_for(files)._windows[0]
    epoch = np.arange(windows.per_epoch)
    one, two = windows.starts(epoch), windows.starts(epoch + windows.per_epoch)
    assert not np.array_equal(one, two)
    cuts = {int(windows.starts(epoch[:1] + e * len(epoch))[0]) % SEQ_LEN for e in range(30)}
    assert len(cuts) > 3
    assert not same(loader_for(files, seed=1).batch(0), loader_for(files).batch(0))


@settings(max_examples=30, deadline=None)
@given(step=st.integers(0, 1000))
def test_a_batch_is_a_pure_function_of_its_step(files, step):
    loader = loader_for(files)
    loader.batch(3)
    assert same(loader.batch(step), loader_for(files).batch(step))


@pytest.mark.parametrize(("world_size", "num_microbatches"), [(2, 1), (1, 4), (4, 2), (8, 1)])
def test_ranks_and_microbatches_cut_the_same_rows(files, world_size, num_microbatches):
    loader = loader_for(files)
    for step in (0, 7, 12):  # step 12 crosses from phase to phase
        parts = [
            loader.batch(
                step,
                rank=rank,
                world_size=world_size,
                microbatch=microbatch,
                num_microbatches=num_microbatches,
            )
            for rank in range(world_size)
            for microbatch in range(num_microbatches)
        ]
        whole = loader.batch(step)
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
        assert torch.equal(torch.cat([part.loss_mask for part in parts]), whole.loss_mask)
        assert sum((part.lengths for part in parts), ()) == whole.lengths
        assert sum(part.samples.get("a", 0) for part in parts) == whole.samples["a"]


def test_a_changed_batch_size_goes_on_with_the_next_sample(files):
    small, large = loader_for(files, batch_size=4), loader_for(files, batch_size=8)
    joined = torch.cat([small.batch(2).tokens, small.batch(3).tokens])
    assert torch.equal(joined, large.batch(1).tokens)
    assert torch.equal(large.samples(8, 8).tokens, joined)


def test_held_out_windows_cover_every_token_once(files):
    for name, file in files.items():
        batches = list(held_out_batches(file, name=name, seq_len=SEQ_LEN, batch_size=3))
        tokens = torch.cat([batch.tokens for batch in batches])
        targets = torch.cat([batch.targets for batch in batches])
        assert tokens.tolist() == file.tokens[:-1].tolist()
        assert targets.tolist() == file.tokens[1:].tolist()
        mask = torch.cat([batch.loss_mask for batch in batches])
        assert mask.sum() == file.num_tokens - file.num_documents
        few = list(held_out_batches(file, name=name, seq_len=4, batch_size=3, max_rows=5))
        assert sum(batch.samples[name] for batch in few) == 5


def test_a_source_shorter_than_a_window(files, tmp_path):
    short = {**files, "b": write(tmp_path / "short", [SEQ_LEN], 10)}
    with pytest.raises(DataError, match="source b has 16 tokens, a window needs 17"):
        loader_for(short)


def test_sizes_that_cannot_be(files):
    with pytest.raises(ConfigError, match="does not divide into 3 ranks times 1"):
        loader_for(files).batch(0, world_size=3)
    with pytest.raises(ConfigError, match="seq_len = 0"):
        loader_for(files, seq_len=0)
    with pytest.raises(ConfigError, match="no token file for b; there are a"):
        loader_for({"a": files["a"]})
    assert loader_for(files).num_steps == 25
