"""The checkpoints of a run: folders that are whole or not there."""

import pytest

from uldm_cli.runs.checkpoints import MODEL, Checkpoints


def writing(text):
    def write(folder):
        (folder / MODEL).write_text(text)

    return write


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_none_yet(tmp_path):
    assert Checkpoints(tmp_path / "run").newest() is None
    assert Checkpoints(tmp_path / "run").whole() == []
    assert not (tmp_path / "run").exists()


def test_the_newest_ones_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (5, 10, 100, 20):
        checkpoints.save(step, writing(str(step)))
    assert len(names(tmp_path)) == 2
    newest = checkpoints.newest()
    assert newest == tmp_path / "checkpoints" / "step-00000100"
    assert (newest / MODEL).read_text() == "100"


def test_a_save_that_fails_leaves_the_others_and_no_litter(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, writing("5"))

    def fail(folder):
        (folder / MODEL).write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(10, fail)
    assert names(tmp_path) == ["step-00000005"]


def test_what_a_killed_save_left_is_not_a_checkpoint_and_goes_with_the_next(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, writing("5"))
    left = tmp_path / "checkpoints" / ".step-00000010"
    left.mkdir()
    (left / MODEL).write_text("half")
    assert checkpoints.newest() == tmp_path / "checkpoints" / "step-00000005"
    checkpoints.save(15, writing("15"))
    assert names(tmp_path) == ["step-00000005", "step-00000015"]


def test_files_beside_them_are_no_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, writing("5"))
    (tmp_path / "checkpoints" / "step-notes.txt").write_text("")
    assert checkpoints.newest() == tmp_path / "checkpoints" / "step-00000005"
