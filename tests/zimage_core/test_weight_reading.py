"""Reading on threads: the same tensors, the first error, and nothing left behind."""

import threading
import time
import warnings

import pytest
import torch
from safetensors.torch import save_file

from zimage_core import weight_reading
from zimage_core.config import CheckpointError
from zimage_core.safetensors_file import read_header
from zimage_core.stored_tensor import Weight
from zimage_core.weight_reading import read_weights


@pytest.fixture
def files(tmp_path):
    """Three files of ten tensors each."""
    draw = torch.Generator().manual_seed(0)
    states = [
        {f"{n}.{i}": torch.randn(64, 64, generator=draw) for i in range(10)} for n in range(3)
    ]
    paths = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for state, path in zip(states, paths, strict=True):
        save_file(state, path)
    return paths, {key: tensor for state in states for key, tensor in state.items()}


def weights_of(paths):
    stored = {key: s for path in paths for key, s in read_header(path).tensors.items()}
    return {key: Weight(s, s.shape) for key, s in stored.items()}


def plain(reader, key, weight):
    return reader.read(weight, torch.float32, "cpu")


@pytest.fixture(autouse=True)
def many_cores(monkeypatch):
    """As on a machine with more cores than files; a run is three tensors."""
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr(weight_reading, "_RUN", 3 * 64 * 64 * 4)


@pytest.mark.parametrize("readers", [1, 4])
def test_tensors_are_those_of_the_files_in_the_order_asked_for(files, readers):
    paths, expected = files
    weights = weights_of(reversed(paths))
    threads = set()

    def read(reader, key, weight):
        threads.add(threading.get_ident())
        time.sleep(0.002)  # long enough for the others to begin
        return plain(reader, key, weight)

    tensors = read_weights(weights, read, readers=readers)
    assert list(tensors) == list(weights)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors.items())
    assert len(threads) == readers


def test_each_thread_reads_with_a_reader_of_its_own(files):
    """A reader's map and buffers are for one thread."""
    owners = {}

    def read(reader, key, weight):
        assert owners.setdefault(reader, threading.get_ident()) == threading.get_ident()
        return plain(reader, key, weight)

    read_weights(weights_of(files[0]), read)
    assert len(owners) == 12  # of each file four runs: three tensors thrice, and one


def test_the_first_error_in_the_files_is_raised_and_the_rest_is_not_read(files):
    paths, _ = files
    weights = weights_of(paths)  # checked while the files were whole
    with paths[1].open("r+b") as file:
        file.truncate(paths[1].stat().st_size // 2)
    done = []

    def read(reader, key, weight):
        tensor = plain(reader, key, weight)
        done.append(key)
        time.sleep(0.1 if key.startswith("2.") else 0)
        return tensor

    alive = threading.active_count()
    with pytest.raises(CheckpointError, match=r"1\.safetensors: is truncated: .* tensor '1\.\d'"):
        read_weights(weights, read)
    assert threading.active_count() == alive
    assert sum(key.startswith("2.") for key in done) <= 4  # one a thread


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_torchs_threads_are_divided_and_given_back(files, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = set()

    def read(reader, key, weight):
        found.add(torch.get_num_threads())
        return plain(reader, key, weight)

    try:
        read_weights(weights_of(files[0]), read, readers=2)
        assert found == {max(1, threads // 2)}
        assert torch.get_num_threads() == threads
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [threads]
    finally:
        torch.set_num_threads(before)


def test_reading_leaves_filters_of_warnings_alone(files):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        read_weights(weights_of(files[0]), plain)
        assert warnings.filters == filters
    assert not seen


def test_nothing_to_read():
    assert read_weights({}, plain) == {}
