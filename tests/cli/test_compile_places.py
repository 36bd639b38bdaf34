"""Where a compile writes: refused at once or held alone, and nothing of anybody's deleted."""

from pathlib import Path

import pytest

from panguq.cli.compile_places import Places, check_out, held_places, saved
from panguq.errors import StorageError
from panguq.formats.own.storage import write_folder
from panguq.tensors.work_folder import Finished, WorkFolder


def work_in(places: Places) -> None:
    """Finish one part."""
    assert places.units is not None
    places.units.open_for({"recipe": "w4a16"})
    places.units.keep("pass/unit", Finished({}, {"channels": 3}))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_parts_go_when_the_result_is_saved(tmp_path: Path) -> None:
    with held_places(tmp_path / "out", None) as places:
        work_in(places)
        assert names(tmp_path) == [".out.work"]
        places.saved = True
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [StorageError("no"), KeyboardInterrupt(), RuntimeError("what?")])
def test_whatever_ends_the_work_keeps_the_finished_parts(tmp_path, error) -> None:
    with pytest.raises(type(error)) as caught, held_places(tmp_path / "out", None) as places:
        work_in(places)
        raise error
    (note,) = caught.value.__notes__
    assert f"goes on from them in {tmp_path / '.out.work'}" in note
    with held_places(tmp_path / "out", None) as places:
        assert places.units is not None
        places.units.open_for({"recipe": "w4a16"})
        assert places.units.find("pass/unit") is not None


def test_without_finished_parts_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, held_places(tmp_path / "out", None):
        raise StorageError("no")
    assert names(tmp_path) == [] and not hasattr(caught.value, "__notes__")


def test_a_reader_that_leaves_before_the_result_is_an_error(tmp_path: Path) -> None:
    """After it, `panguq … | head` has worked."""
    place = held_places(tmp_path / "out", None)
    with pytest.raises(StorageError, match="has left") as caught, place as places:
        work_in(places)
        raise BrokenPipeError
    assert "finished parts are kept" in caught.value.__notes__[0]
    with pytest.raises(BrokenPipeError) as late, saved(tmp_path / "out"):
        raise BrokenPipeError
    assert late.value.__notes__ == [f"the model is saved: {tmp_path / 'out'}"]


def test_a_result_that_was_not_saved_keeps_the_parts(tmp_path: Path) -> None:
    """A command without --out: the same one with it needs nothing computed again."""
    with held_places(None, tmp_path / "work") as places:
        work_in(places)
    assert names(tmp_path) == ["work"]


@pytest.mark.parametrize("work_dir", [None, "elsewhere"])
def test_a_second_process_is_refused_whatever_its_own_folder(tmp_path, work_dir) -> None:
    given = None if work_dir is None else tmp_path / work_dir
    with held_places(tmp_path / "out", None) as places:
        work_in(places)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(StorageError, match="in use"), held_places(tmp_path / "out", given):
            pass
        assert sorted(tmp_path.rglob("*")) == before


def test_parts_elsewhere_still_hold_the_place_of_the_result(tmp_path: Path) -> None:
    with held_places(tmp_path / "out", tmp_path / "work") as places:
        with pytest.raises(StorageError, match="in use"), held_places(tmp_path / "out", None):
            pass
        places.saved = True
    assert names(tmp_path) == []


def test_parts_of_a_stopped_compile_outlive_one_with_parts_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), held_places(tmp_path / "out", None) as places:
        work_in(places)
        raise RuntimeError
    with held_places(tmp_path / "out", tmp_path / "work") as places:
        places.saved = True
    assert WorkFolder(tmp_path / ".out.work").holds_units


def test_somebodys_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / ".out.work" / "units" / "thesis.tex"
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    with pytest.raises(StorageError, match="else"), held_places(tmp_path / "out", None):
        pass
    assert file.read_text() == "years of work"


@pytest.mark.parametrize(("out", "work"), [("a", "a"), ("a", "a/b"), ("a/b", "a")])
def test_the_parts_may_not_lie_in_the_result(tmp_path: Path, out: str, work: str) -> None:
    places = held_places(tmp_path / out, tmp_path / work)
    with pytest.raises(StorageError, match="lie in one another"), places:
        pass
    assert names(tmp_path) == []


# What saving would refuse


@pytest.mark.parametrize("format", ["panguq", "compressed-tensors", "ascend"])
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path, format: str) -> None:
    def refused(out: Path, force: bool = False) -> str:
        with pytest.raises(StorageError) as caught:
            check_out(out, force, format)
        return caught.value.message

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    assert "already exists" in refused(tmp_path / "mine")
    assert "not overwritten" in refused(tmp_path / "mine", force=True)
    assert "is a file" in refused(tmp_path / "file", force=True)
    assert "cannot be written" in refused(tmp_path / "file" / "out")
    assert "a name of 240 bytes" in refused(tmp_path / ("ä" * 120))
    assert "a name of 400 bytes" in refused(tmp_path / ("x" * 400))
    check_out(tmp_path / ("x" * 236), False, format)
    check_out(tmp_path / "new" / "out", False, format)
    assert names(tmp_path) == ["file", "mine"]


def test_the_longest_name_can_be_saved_under(tmp_path: Path) -> None:
    for _ in range(2):
        write_folder(tmp_path / ("x" * 236), {"a.txt": "a"}, {}, overwrite=True)


def test_a_folder_that_is_gone_is_one_error(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    with pytest.raises(StorageError, match="cannot be written"):
        check_out(Path("out"), False, "panguq")
