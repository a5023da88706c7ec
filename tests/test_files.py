"""Files are whole or not there; the tests of artifacts kill processes and fill disks while they write."""

import os
import threading

import pytest

from jaxprune import files


@pytest.mark.parametrize(
    ("content", "found"),
    [("ü\n", "ü\n".encode()), (b"a\r\n", b"a\r\n"), ([b"a", memoryview(b"bc")], b"abc"), ("", b""), ([], b"")],
)
def test_what_is_written(tmp_path, content, found):
    path = tmp_path / "a" / "b"
    for _ in range(2):
        files.write(path, content)
        assert path.read_bytes() == found
        assert list(path.parent.iterdir()) == [path]


def test_the_longest_name_there_is(tmp_path):
    files.write(tmp_path / ("ü" * 127), "x")
    assert [path.name for path in tmp_path.iterdir()] == ["ü" * 127]


def test_parts_that_fail_leave_the_old_file(tmp_path):
    def parts():
        yield b"new"
        raise KeyboardInterrupt

    files.write(tmp_path / "file", "old")
    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "file", parts())
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (done.append(name), real(*args)))
    files.write(tmp_path / "file", "x")
    assert done == ["fsync", "replace"]


def test_writers_at_once(tmp_path):
    path = tmp_path / "file"
    writers = [threading.Thread(target=files.write, args=(path, [bytes([n]) * 1000] * 50)) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(set(path.read_bytes())) == 1
    assert list(tmp_path.iterdir()) == [path]
