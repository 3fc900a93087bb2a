"""Files are written whole or not at all."""

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from coupled_adam.errors import InputError
from coupled_adam.files import write_array, write_json, write_text, written_whole


@pytest.mark.parametrize("directory", [False, True])
def test_what_fails_halfway_leaves_the_old_and_nothing_beside_it(directory: bool, tmp_path: Path) -> None:
    target = tmp_path / "target"

    def write(text: str) -> None:
        with written_whole(target, "model" if directory else None) as aside:
            if directory:
                aside.mkdir()
            (aside / "inner" if directory else aside).write_text(text)
            if text == "bad":
                raise OSError("disk full")

    write("good")
    with pytest.raises(OSError, match="disk full"):
        write("bad")
    assert (target / "inner" if directory else target).read_text() == "good"
    write("better")
    assert (target / "inner" if directory else target).read_text() == "better"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_json_that_json_lacks_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "x.json", "old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert (tmp_path / "x.json").read_text() == "old"


def test_a_file_does_not_replace_a_directory_nor_lie_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "work").write_text("a week's")
    with pytest.raises(InputError, match="runs: a directory; choose a name for the file"):
        write_text(tmp_path / "runs", "page")
    assert (tmp_path / "runs" / "work").read_text() == "a week's"
    with pytest.raises(InputError, match="work: not a directory"):
        write_text(tmp_path / "runs" / "work" / "report.html", "page")


def test_a_full_disk_is_told_with_the_files_name(tmp_path: Path) -> None:
    write_text(tmp_path / "page.html", "old")
    full = pytest.raises(OSError, match=r"page\.html: the disk is full; existing files are intact\. Free some space")
    with full, written_whole(tmp_path / "page.html") as aside:
        aside.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("page.html", "old")]


def test_an_array_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    """In a process of its own: the limit of a file's size is one of the process."""
    code = (
        "import pathlib, resource, signal, numpy\n"
        "from coupled_adam.files import full_disk_named, write_array\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "path = pathlib.Path('counts.npy')\n"
        "with full_disk_named(path):\n"
        "    write_array(path, numpy.zeros(9_999))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "counts.npy: the disk is full" in done.stderr.splitlines()[-1]
    array = np.arange(12.0).reshape(3, 4)
    write_array(tmp_path / "a", array)
    np.testing.assert_array_equal(np.load(tmp_path / "a"), array)
