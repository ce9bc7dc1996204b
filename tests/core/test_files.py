"""Files are whole or absent, and what cannot be read or written is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import (
    read_json,
    read_json_lines,
    replacing,
    require_space,
    size_text,
    write_json,
    write_text,
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "results.json", {"loss": [0.5, None]})
    assert read_json(tmp_path / "new" / "results.json", "results") == {"loss": [0.5, None]}


def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_text(path, "old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]


def test_nan_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(LeanMoeError, match="not a finite number"):
        write_json(tmp_path / "results.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    write_text(tmp_path / "run", "")
    with pytest.raises(LeanMoeError, match=r"cannot write .*run/results\.json"):
        write_text(tmp_path / "run" / "results.json", "")


def test_files_that_are_no_json_are_named_with_the_place(tmp_path: Path) -> None:
    with pytest.raises(LeanMoeError, match=r"cannot read plan .*No such file"):
        read_json(tmp_path / "plan.json", "plan")
    write_text(tmp_path / "plan.json", '{"bands": [}')
    with pytest.raises(LeanMoeError, match=r"is not JSON: .* at line 1, column 12"):
        read_json(tmp_path / "plan.json", "plan")


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n'[:-10])
    assert read_json(path, "config") == {"a": 1}
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert [value for _, value in read_json_lines(path, "rows")] == [{"a": 1}, {"a": 2}]
    for encoding, mark in (("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")):
        path.write_bytes(mark + '{"a": "\N{GRINNING FACE}"}'.encode(encoding))
        assert read_json(path, "config") == {"a": "\N{GRINNING FACE}"}


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    rows = [{"text": f"one{end}two"} for end in ("\u2028", "\u2029", "\x85")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    found = list(read_json_lines(path, "rows"))
    assert [value for _, value in found] == rows
    assert [where.rpartition(" ")[2] for where, _ in found] == ["1", "3", "5"]


def test_what_is_no_json_lines_is_refused_in_a_short_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text in (json.dumps(["long"] * 99999), json.dumps([{"a": 1}] * 99, indent=1), "[" * 99999):
        path.write_text(text)
        with pytest.raises(LeanMoeError, match=r"line 1 is .* one object a line") as raised:
            list(read_json_lines(path, "rows"))
        assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("size", "text"),
    [(9, "9 B"), (4200, "4.2 kB"), (310_000_000, "310 MB"), (2_500_000_000_000, "2.5 TB")],
)
def test_sizes_are_never_nothing(size: int, text: str) -> None:
    assert size_text(size) == text


def test_a_full_disk_is_said_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=3_000_000))
    require_space(tmp_path / "not" / "there" / "yet", 2_000_000, "results")
    with pytest.raises(LeanMoeError, match="3 MB free, 4 MB needed"):
        require_space(tmp_path, 4_000_000, "results")
