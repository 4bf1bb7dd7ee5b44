"""docs/export.md says what the code does."""

import re
from pathlib import Path

from topfive_export.corpus import drawn_pictures
from topfive_export.gate import BATCH_SIZES
from topfive_export.variant import LIMITS

TEXT = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")


def test_the_limits_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (hot|image), (fp32|fp16|int8) \| (.*) \|$", TEXT, re.MULTILINE)
    assert len(rows) == len(LIMITS)
    for graph, precision, cells in rows:
        limits = LIMITS[graph, precision]
        probability = (
            "none" if limits.probability_difference is None else f"{limits.probability_difference:.4f}"
        )
        assert cells.split(" | ") == [
            probability.rstrip("0"),
            f"{limits.relative_difference:g}",
            f"{limits.features_difference:.4f}".rstrip("0"),
            f"{limits.top1_agreement:.0%}".replace("%", " %"),
            f"{limits.top5_agreement:.0%}".replace("%", " %"),
            "excused" if limits.near_ties_excused else "counted",
            f"{limits.accuracy_drop:.1%}".replace("%", " %"),
        ]


def test_the_corpus_and_the_batch_sizes_too() -> None:
    assert f"{len(drawn_pictures())} drawn files" in TEXT
    *most, last = map(str, BATCH_SIZES)
    assert f"batch sizes {', '.join(most)} and {last}" in TEXT
