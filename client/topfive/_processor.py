"""What the processor can do, where that decides which graph is right for it."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

CPUINFO: Final = Path("/proc/cpuinfo")
_INT8_DOT_PRODUCTS: Final = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
"""As Linux names them: AVX-512 VNNI, AVX-VNNI, AMX, Arm's dot products."""


@lru_cache
def cpuinfo(key: str) -> str:
    """First value of `key` in Linux's description of the processor; empty where there is none."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return ""
    return next(
        (value.strip() for name, _, value in (s.partition(":") for s in lines) if name.strip() == key), ""
    )


def int8_dot_products() -> bool | None:
    """Whether the processor adds products of uint8 and int8 without saturating: int8 graphs are exact only there.

    None: not known. Only x86's older instructions are known to saturate (`vpmaddubsw` adds two products in 16 bits).
    """
    flags, features = cpuinfo("flags").split(), cpuinfo("Features").split()
    if not _INT8_DOT_PRODUCTS.isdisjoint([*flags, *features]):
        return True
    return False if flags else None


def int8_saturates(report: Mapping[str, Any]) -> bool:
    """Whether an int8 graph is computed otherwise here than where it was verified, by what its `report.json` says."""
    made_with = report.get("made_with")
    verified_saturating = isinstance(made_with, Mapping) and made_with.get("int8_dot_products") is False
    return int8_dot_products() is False and not verified_saturating
