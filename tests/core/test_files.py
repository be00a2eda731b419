"""Files that appear whole or not at all, and what failures are told with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flmoe_kernels.core import files
from flmoe_kernels.profile.registry import words_of


def test_what_is_no_plain_file_is_written_to_and_stays(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    link.symlink_to(real)
    real.write_text("old")
    files.write_whole(link, lambda path: path.write_text("new"))
    assert link.is_symlink()
    assert real.read_text() == "new"
    device = Path(os.devnull)
    assert files.is_writable(device)
    assert not files.is_replaced(device)
    with pytest.raises(RuntimeError, match="half-way"):
        files.write_whole(real, _half)
    assert real.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "real.json"]


def _half(path: Path) -> None:
    path.write_text("half")
    raise RuntimeError("half-way")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("CUDA out of memory.\nTried to allocate"), "CUDA out of memory."),
        (
            RuntimeError("backend='inductor' raised:\n\n no ptxas\nmore"),
            "backend='inductor' raised: no ptxas",
        ),
        (MemoryError(), "MemoryError"),
        (ValueError("x" * 999), "x" * 300),
    ],
    ids=["first line", "announced", "type", "long"],
)
def test_a_failure_in_one_line(error: Exception, words: str) -> None:
    assert words_of(error) == words


def test_marked_text_is_written_between_its_marks(tmp_path: Path) -> None:
    mark, path = "<!-- begin: this -->", tmp_path / "page.md"
    path.write_text(f"before\n{mark}\nold\n{files.END_MARK}\nafter\n")
    files.write_marked(path, mark, "new\n")
    assert path.read_text() == f"before\n{mark}\nnew\n{files.END_MARK}\nafter\n"
    path.write_text("no marks\n")
    with pytest.raises(ValueError, match="to write between"):
        files.write_marked(path, mark, "new\n")
    assert path.read_text() == "no marks\n"
    new = tmp_path / "new.md"
    for text in ("all of it\n", "all of it again\n"):
        files.write_marked(new, mark, text)
        assert new.read_text() == f"{mark}\n{text}{files.END_MARK}\n"
    with pytest.raises(OSError, match="cannot be written"):
        files.require_marks(tmp_path / "nowhere" / "page.md", mark)
