"""The figures of a run: means over steps, and the file of lines."""

import json

import pytest
import torch

from uldm_cli.errors import UldmError
from uldm_cli.runs.metrics import Means, append_line, forget_after, not_finite, read_lines


def logs(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def test_means_are_of_what_was_added_since_clearing():
    means = Means()
    assert means.read() == {}
    means.add(logs(loss=9.0))
    means.clear()
    means.add(logs(loss=1.0, l1=4.0))
    means.add(logs(loss=2.0, l1=6.0))
    assert means.read() == {"loss": 1.5, "l1": 5.0}


def test_means_that_were_restored_go_on_bit_for_bit():
    values = torch.rand(7, generator=torch.Generator().manual_seed(0))
    whole, first, second = Means(), Means(), Means()
    for value in values:
        whole.add({"b": value, "a": 2 * value})
    for value in values[:3]:
        first.add({"b": value, "a": 2 * value})
    second.load_state(dict(sorted(first.state().items())), first.counts)
    for value in values[3:]:
        second.add({"b": value, "a": 2 * value})
    assert list(second.read().items()) == list(whole.read().items())


def test_the_state_shares_no_memory():
    """After one step two figures may be one tensor, which a safetensors file cannot hold."""
    one = torch.tensor(1.0)
    means = Means()
    means.add({"codebook": one, "commitment": one})
    state = means.state()
    assert state["codebook"].data_ptr() != state["commitment"].data_ptr()


def test_figures_that_are_no_numbers_are_named():
    assert not_finite({"a": 1.0, "b": float("nan"), "c": float("-inf")}) == ["b", "c"]


def test_lines_that_are_not_whole_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    for step in (5, 10):
        append_line(path, {"step": step, "loss": 0.1 * step})
    whole = path.read_text()
    path.write_text(whole + '[]\n"x"\n{"loss": 1}\n\xff\n{"step": 15, "lo')
    assert read_lines(path) == [{"step": 5, "loss": 0.5}, {"step": 10, "loss": 1.0}]
    forget_after(path, 10)
    assert path.read_text() == whole
    forget_after(path, 9)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5]


def test_nothing_to_forget(tmp_path):
    forget_after(tmp_path / "metrics.jsonl", 3)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_line_that_cannot_be_written_is_one_error(tmp_path):
    with pytest.raises(UldmError, match=r"metrics\.jsonl could not be written \(No such file or directory\)"):
        append_line(tmp_path / "gone" / "metrics.jsonl", {"step": 1})
