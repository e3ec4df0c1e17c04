"""Triton's kernels in its interpreter."""

from processes_of_triton import check


def test_in_the_interpreter(tmp_path):
    check("triton_interp", "TRITON_INTERPRET", tmp_path)
