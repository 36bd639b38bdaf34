"""What is installed is what lies in the folders, once, and reachable under one name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from panguq.recipe import preset_names

ROOT = Path(__file__).resolve().parent.parent
INSTALLED_FOLDERS = {
    "src/panguq": "panguq",
    "ir": "panguq/ir",
    "passes": "panguq/passes",
    "lowering": "panguq/lowering",
    "kernels": "panguq/kernels",
    "recipes": "panguq/builtin_recipes",
}


def run(*command: str | Path, cwd: Path) -> str:
    """What the command prints; a failure shows all that it said."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code: str, cwd: Path) -> str:
    """What this code prints in a new interpreter that finds `cwd` first."""
    return run(sys.executable, "-c", code, cwd=cwd).strip()


def build(kind: str, source: Path, into: Path) -> Path:
    """An sdist or a wheel of this folder, made by the backend that pyproject.toml names."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(into)!r}))"
    return into / python(code, cwd=source).splitlines()[-1]


def source_files() -> list[str]:
    """What git lists and is there: not a file that was deleted and is still in the index."""
    listing = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = set(run(*listing, cwd=ROOT).split("\0")) - {""}
    return sorted(name for name in names if (ROOT / name).exists())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the source tree: no build folder, no cache, links as links."""
    copy = tmp_path_factory.mktemp("source")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("lists the source files with git; this is no git checkout")
    for name in source_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the copy."""
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def expected_files(source: Path) -> set[str]:
    """Each file that is to be installed, by its path in the wheel; links are not followed."""
    files = set()
    for folder, package in INSTALLED_FOLDERS.items():
        for path in (source / folder).rglob("*"):
            inner = path.relative_to(source / folder)
            through_link = folder == "src/panguq" and inner.parts[0] in INSTALLED_FOLDERS
            if path.is_file() and not through_link:
                files.add(f"{package}/{inner.as_posix()}")
    return files


def installed_files(wheel: Path) -> list[str]:
    """What the wheel holds besides its own metadata."""
    names = zipfile.ZipFile(wheel).namelist()
    return [name for name in names if ".dist-info/" not in name]


def test_the_wheel_holds_the_folders_and_nothing_else(source: Path, wheel: Path) -> None:
    expected, installed = expected_files(source), installed_files(wheel)
    assert "panguq/builtin_recipes/w8a8.yaml" in expected
    missing = sorted(expected - set(installed))
    assert not missing, f"list their packages or package data in pyproject.toml: {missing}"
    assert sorted(set(installed) - expected) == []
    assert [name for name, count in Counter(installed).items() if count > 1] == []


@pytest.fixture(scope="module")
def unpacked(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that an sdist of the copy holds."""
    folder = tmp_path_factory.mktemp("sdist")
    sdist = build("sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def test_the_sdist_holds_everything_that_is_under_version_control(unpacked: Path) -> None:
    """Tests and their helpers, docs, tools; but no links, which only type checkers look at, and no
    settings of editors and of the place where the repository is kept."""
    files = [name for name in source_files() if not (ROOT / name).is_symlink()]
    files = [name for name in files if not name.startswith(".") or name.startswith(".ci/")]
    missing = [name for name in files if not (unpacked / name).exists()]
    assert missing == [], f"list them in MANIFEST.in: {missing}"


def test_the_licence_goes_along(wheel: Path, unpacked: Path) -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert (unpacked / "LICENSE").read_text(encoding="utf-8") == text
    with zipfile.ZipFile(wheel) as archive:
        [licence] = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        assert archive.read(licence).decode() == text


def test_the_sdist_is_enough_to_build_the_same_wheel(
    wheel: Path, unpacked: Path, tmp_path: Path
) -> None:
    again = build("wheel", unpacked, tmp_path)
    assert sorted(installed_files(again)) == sorted(installed_files(wheel))


def test_the_wheel_works_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import panguq, panguq.recipe as r; "
        "print(panguq.__file__); print(len(r.preset_names())); print(r.Recipe.named('float').name)"
    )
    where, presets, name = python(code, cwd=tmp_path).splitlines()
    assert Path(where) == tmp_path / "panguq" / "__init__.py"
    assert (presets, name) == (str(len(preset_names())), "float")


@pytest.mark.parametrize("name", ["ir", "passes", "lowering", "recipes"])
def test_a_root_folder_refuses_to_be_imported_under_its_bare_name(name: str) -> None:
    code = f"try: import {name}\nexcept ImportError as error: print(error)"
    package = INSTALLED_FOLDERS[name].replace("/", ".")
    assert f"this folder is the package {package}" in python(code, cwd=ROOT)


def test_the_bare_kernels_offers_nothing() -> None:
    """Importing it must work, since transformers does; a version or a module must not be found."""
    code = (
        "import kernels; print([n for n in vars(kernels) if not n.startswith('__')])\n"
        "try: import kernels.cpu\nexcept ImportError: print('no modules')"
    )
    assert python(code, cwd=ROOT).splitlines() == ["[]", "no modules"]


def test_every_root_folder_is_one_package_with_the_one_under_panguq() -> None:
    """From the root, too, each module is there once: under panguq."""
    names = [folder for folder in INSTALLED_FOLDERS if "/" not in folder]
    code = f"import sys, panguq.recipe; print([n for n in {names} if n in sys.modules])"
    assert python(code, cwd=ROOT) == "[]"


def test_import_panguq_is_light() -> None:
    """Beyond torch, nothing heavy is loaded before it is needed."""
    heavy = ["transformers", "onnx", "onnxscript", "matplotlib", "pandas", "accelerate"]
    code = f"import sys, panguq; print([n for n in {heavy} if n in sys.modules])"
    assert python(code, cwd=ROOT) == "[]"


def test_import_panguq_adds_less_than_two_seconds_to_import_torch() -> None:
    code = (
        "import time, torch; start = time.process_time(); import panguq; "
        "print(time.process_time() - start)"
    )
    assert float(python(code, cwd=ROOT)) < 2
