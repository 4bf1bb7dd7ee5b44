"""What the processor is said to be able to do."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from topfive import _processor


@pytest.fixture(autouse=True)
def asked_afresh() -> Iterator[None]:
    _processor.cpuinfo.cache_clear()
    yield
    _processor.cpuinfo.cache_clear()


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\n", True),
        ("flags : fpu avx2 avx_vnni\n", True),
        ("flags : fpu avx2\nvmx flags : avx512_vnni\n", False),
        ("Features\t: fp asimd asimddp\n", True),
        ("Features\t: fp asimd\n", None),  # not known to saturate
        ("", None),
    ],
)
def test_int8_dot_products(
    text: str, has: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(_processor, "CPUINFO", path)
    assert _processor.int8_dot_products() is has


def test_a_system_that_does_not_describe_its_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_processor, "CPUINFO", tmp_path / "nowhere")
    assert _processor.int8_dot_products() is None
