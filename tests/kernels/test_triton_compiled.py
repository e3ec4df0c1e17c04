"""Triton's kernels compiled for every GPU, which needs none."""

from processes_of_triton import check


def test_compiled_ahead_of_time(tmp_path):
    check("triton_aot", "ALIGN_TRITON_AOT", tmp_path)
