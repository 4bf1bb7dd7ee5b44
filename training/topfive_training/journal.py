"""What a run says: a progress bar, JSON lines and TensorBoard, all from the first rank."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from topfive.model_spec import Json

LOG_FILE: Final = "train.jsonl"


class Journal:
    """Speaks for the run; made on every rank, silent on all but the first."""

    def __init__(self, folder: Path, *, enabled: bool) -> None:
        self._folder = folder
        self._enabled = enabled
        self.console = Console(quiet=not enabled, stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self.console,
            # Without a terminal there is one line for each epoch instead.
            disable=not (enabled and self.console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, note="")
        self._lines: TextIO | None = None
        self._board: SummaryWriter | None = None

    def __enter__(self) -> Self:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the terminal back and bring everything to the disk."""
        self._bar.stop()
        if self._lines is not None:
            self._lines.close()
        if self._board is not None:
            self._board.close()

    def open_logs(self, from_step: int) -> None:
        """Start, or after a resume go on with, the files; what they say of steps after `from_step` is dropped."""
        if self._enabled:
            from torch.utils.tensorboard.writer import SummaryWriter  # noqa: PLC0415  two seconds

            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / LOG_FILE
            _forget_after(path, from_step)
            self._lines = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=from_step or None)

    def say(self, sentence: str) -> None:
        """A line for people."""
        self.console.print(sentence, markup=False, soft_wrap=True)

    def show(self, what: str, done: int, total: int, note: str = "") -> None:
        """Move the bar."""
        self._bar.update(self._task, description=what, completed=done, total=total, note=note)

    def record(self, kind: str, step: int, values: "dict[str, Json]") -> None:
        """A line of JSON, and its numbers as TensorBoard's scalars."""
        if self._lines is None or self._board is None:
            return
        line = {"kind": kind, "step": step, **values, "time": round(time.time(), 3)}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again, and a line that was cut off in writing."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
