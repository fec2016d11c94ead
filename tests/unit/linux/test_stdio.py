"""Capturing what C libraries write to standard error."""

from __future__ import annotations

import os

from llloop.linux.stdio import CapturedStderr
from tests.as_user import MYSELF, run_as
from tests.unit.support import open_descriptors


def test_captured_text_is_the_lines_that_were_written() -> None:
    captured = CapturedStderr()
    before = os.fstat(2).st_ino
    with captured:
        os.write(2, b"fuse: one\n\n  two \xff\n")
    assert captured.text == "fuse: one; two \ufffd"
    assert os.fstat(2).st_ino == before


def test_capturing_leaves_no_descriptor_open() -> None:
    before = open_descriptors()
    with CapturedStderr():
        os.write(2, b"something")
    assert open_descriptors() == before


def test_closed_standard_error_is_captured_and_closed_again() -> None:
    def capture() -> tuple[str, bool]:
        os.close(2)
        with CapturedStderr() as captured:
            os.write(2, b"something")
        return captured.text, os.path.exists("/proc/self/fd/2")

    assert run_as(MYSELF, capture) == ("something", False)
