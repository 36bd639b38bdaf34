"""A byte that changes in a folder for a server is found, whatever file it is in."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from panguq.check.files import open_folder
from panguq.check.report import check_folder
from panguq.check.unchanged import UNCHANGED_RULES
from panguq.files.checksums import CHECKSUMS
from panguq.formats.checkpoint.folder import Output, marked, write_checkpoint
from tests.check.check_folders import Draft, ascend, compressed

(RULE,) = UNCHANGED_RULES


def write(draft: Draft, path: Path) -> Path:
    """The draft as panguq's own writer writes it."""
    assert draft.config is not None
    files = {
        **draft.files,
        "config.json": json.dumps(marked(draft.config, "w8a8")),
        "generation_config.json": "{}",
    }
    if draft.description is not None:
        files["quant_model_description.json"] = json.dumps(draft.description)
    tensors = {name: Output.of(tensor) for name, tensor in draft.tensors.items()}
    write_checkpoint(path, files, tensors, stem=draft.stem, shard_bytes=1 << 18)
    return path


@pytest.fixture(scope="module", params=["ascend", "compressed-tensors"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    draft = ascend("W8A8", "W8A8_DYNAMIC") if request.param == "ascend" else compressed()
    return write(draft, tmp_path_factory.mktemp("served") / request.param)


def changed(folder: Path) -> set[str]:
    return {hit.tensor for hit in RULE.find(open_folder(folder))}


def test_what_was_written_is_vouched_for(served: Path) -> None:
    report = check_folder(served)
    assert report.findings == () and report.has_checksums
    assert "every file is as SHA256SUMS says" in report.render()
    done = subprocess.run(["sha256sum", "-c", CHECKSUMS], cwd=served, capture_output=True)
    assert done.returncode == 0, done.stderr


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_changed_byte_is_found(served: Path, data: st.DataObject) -> None:
    names = sorted(path.name for path in served.iterdir())
    file = served / data.draw(st.sampled_from(names))
    before = file.read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    other = before[place] ^ data.draw(st.integers(1, 255))
    file.write_bytes(before[:place] + bytes([other]) + before[place + 1 :])
    try:
        found = changed(served)
    finally:
        file.write_bytes(before)
    assert found if file.name == CHECKSUMS else found == {file.name}
    assert changed(served) == set()


def test_a_changed_file_breaks_every_server(served: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(served, tmp_path / "folder")
    with open(folder / "generation_config.json", "a") as file:
        file.write(" ")
    report = check_folder(folder)
    assert [finding.rule for finding in report.findings] == ["changed-file"]
    assert report.refused_by("vllm-ascend")
    assert "every file is as" not in report.render()


def test_missing_and_added_files_are_found(served: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(served, tmp_path / "folder")
    (folder / "generation_config.json").unlink()
    (folder / "added_tokens.json").write_text("{}")
    (folder / "README.md").write_text("no loader reads this")
    assert changed(folder) == {"generation_config.json", "added_tokens.json"}
    (folder / CHECKSUMS).unlink()  # the mark in config.json says that there was one
    assert changed(folder) == {CHECKSUMS}


def test_of_a_folder_without_the_list_it_says_what_cannot_be_known(tmp_path: Path) -> None:
    report = check_folder(ascend("W8A8", "W8A8_DYNAMIC").write(tmp_path / "of another tool"))
    assert report.findings == () and not report.has_checksums
    assert "cannot be known" in report.render()
