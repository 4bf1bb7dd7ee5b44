"""Offline scoring: a folder of images in, a table with one row per file out.

`run_job` does the whole of it; `topfive score` is its command. Start reading at `_job`, then `_state` (what survives
`kill -9`), `_scorer` (the seam) and its two sides, `_local` (engine in process) and `_remote` (through a server). `_answers` keeps
what files of the same bytes share (`--dedupe`).
"""

from topfive.scoring._errors import (
    InterruptedJobError,
    RefusedError,
    ScoringError,
    ServerGoneError,
    StoppedError,
)
from topfive.scoring._job import JobConfig, Summary, run_job
from topfive.scoring._local import Classifier, LocalScorer, load_classifier
from topfive.scoring._progress import Bar, Lines, Reporter, Silent
from topfive.scoring._remote import RemoteScorer, ServerConfig, patient_client
from topfive.scoring._rows import Label, Outcome
from topfive.scoring._scorer import Identity, Scorer
from topfive.scoring._sources import Source

__all__ = [
    "Bar",
    "Classifier",
    "Identity",
    "InterruptedJobError",
    "JobConfig",
    "Label",
    "Lines",
    "LocalScorer",
    "Outcome",
    "RefusedError",
    "RemoteScorer",
    "Reporter",
    "Scorer",
    "ScoringError",
    "ServerConfig",
    "ServerGoneError",
    "Silent",
    "Source",
    "StoppedError",
    "Summary",
    "load_classifier",
    "patient_client",
    "run_job",
]
