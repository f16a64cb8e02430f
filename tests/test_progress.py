"""Remarks and bars on stderr."""

from __future__ import annotations

import io

import pytest

from robustfeat.progress import Progress, remark


def test_a_remark_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    remark("waiting")
    remark("nothing of this", quiet=True)
    assert capsys.readouterr() == ("", "waiting\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_remark_of_a_bar_takes_its_place_on_a_terminal() -> None:
    stream = Terminal()
    bar = Progress("fit", 2, stream=stream)
    bar._shown = 0.0
    bar.advance(1)
    drawn = stream.getvalue()
    bar.say("short")
    assert stream.getvalue() == drawn + "\r" + "short".ljust(len(drawn) - 1) + "\n"


def test_a_password_in_a_url_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    remark("s3://anna:secret@bucket/a:b@c.jpg and http://anna@host:80/ are read")
    assert capsys.readouterr().err == "s3://anna:***@bucket/a:b@c.jpg and http://anna@host:80/ are read\n"
