"""One training run: from squares of pixels to a checkpoint, on any number of ranks, at any time to be resumed.

Reads from top to bottom: `train` prepares, `Trainer.run` goes through the epochs, `Trainer.step` is the step.
Shapes: B images of this rank, C colours, H rows, W columns, K classes.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from topfive.errors import TopfiveError
from topfive_training import resume
from topfive_training.batches import Batch, color_noise, steps_per_epoch, training_batches
from topfive_training.checkpoint import Classifier, link_model, save_model
from topfive_training.device import on_device
from topfive_training.evaluation import Accuracy, batch_sums, validate
from topfive_training.journal import Journal
from topfive_training.optimizer import make_optimizer, set_rates
from topfive_training.parallel import Mode, Parallelism, check_parallel
from topfive_training.ranks import Interruption, Ranks
from topfive_training.recipe import Recipe
from topfive_training.schedule import Phase, phase
from topfive_training.squares import Squares

if TYPE_CHECKING:
    from collections.abc import Callable

    from topfive.model_spec import Json

_LOG_EVERY: Final = 10
"""Steps between two records; on a GPU each waits for the device."""
_DIVERGED: Final = 30.0
"""A mean loss of so many times that of guessing, over ten steps or an epoch, means that the run is lost."""
_CONTINUE, _SAVE, _STOP = 0, 1, 2
BEST_FOLDER: Final = "best"
"""Subfolder of a run with the checkpoint of the epoch with the highest top-1 so far."""


class DivergedError(TopfiveError):
    """The loss is not a number, or far above that of guessing; the message gives step, rate and advice."""


@dataclasses.dataclass(kw_only=True)
class Position:
    """How far a run has come; with the weights and velocities, all of its state."""

    step: int = 0
    """Steps done."""
    validated: int = 0
    """Epochs that have been validated and saved."""
    best_top1: float = -1.0
    sums: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    """This rank's `batch_sums` over the epoch so far, on its device; when saved, of all ranks."""


class Trainer:
    """A run on one rank."""

    def __init__(
        self,
        *,
        classifier: Classifier,
        recipe: Recipe,
        training: Squares,
        validation: Squares,
        ranks: Ranks,
        journal: Journal,
        interruption: Interruption,
        out: Path,
        workers: int,
        save_every_s: float,
        parallel: Mode = "data",
        compiled: bool = False,
    ) -> None:
        self.classifier = classifier.to(ranks.device).train()
        self.recipe = recipe
        self.training = training
        self.validation = validation
        self.ranks = ranks
        self.journal = journal
        self.interruption = interruption
        self.out = out
        self.workers = workers
        self.save_every_s = save_every_s
        self.position = Position(sums=self._zeros())
        # Faster on every device: a third on a CPU, more on tensor cores.
        classifier.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.batch = min(recipe.batch_size, len(training))
        check_parallel(parallel, classifier.network.architecture, batch=self.batch, ranks=ranks.size)
        self.parallelism = Parallelism(parallel, classifier.network, rank=ranks.rank, ranks=ranks.size)
        model = self.parallelism.model
        self.model: Callable[..., Tensor] = torch.compile(model) if compiled else model
        # Every step has the same shapes: it is worth trying cuDNN's algorithms once.
        torch.backends.cudnn.benchmark = ranks.device.type == "cuda"
        self.optimizer = make_optimizer(self.parallelism.part, recipe)
        self.epoch_steps = steps_per_epoch(len(training), recipe.batch_size)
        self.steps = self.epoch_steps * recipe.epochs
        self._saved_at = time.monotonic()
        self._pace = (time.monotonic(), 0)

    def run(self) -> bool:
        """Go through the remaining epochs; False when a signal ended it, with everything saved."""
        while self.position.validated < self.recipe.epochs:
            done = self.position.step // self.epoch_steps
            go_on = self.finish_epoch(done) if done > self.position.validated else self.train_epoch(done)
            if not go_on:
                return False
        return True

    def train_epoch(self, epoch: int) -> bool:
        """The remaining steps of `epoch`, counted from 0; False when a signal ended it."""
        share, shares = self.parallelism.share
        batches = training_batches(
            self.training,
            self.recipe,
            epoch=epoch,
            first_step=self.position.step - epoch * self.epoch_steps,
            rank=share,
            ranks=shares,
            workers=self.workers,
        )
        self._pace = (time.monotonic(), self.position.step)
        for batch in on_device(batches, self.ranks.device):
            now = phase(self.recipe, self.position.step, self.steps)
            self.position.sums += self.step(batch, now)
            self.position.step += 1
            self._log_step(epoch, now)
            if self._agree() == _STOP:
                return False
        return True

    def step(self, batch: Batch, now: Phase) -> Tensor:
        """Forward, backward, move; returns this rank's `batch_sums`, on the device: here the host waits for nothing."""
        images_BHWC, classes_B, keys_B = batch
        images_BCHW = self.classifier.normalize(images_BHWC)
        components_CC = self.classifier.color_components
        if now.color_noise and components_CC is not None:
            noise = color_noise(keys_B, components_CC, now.color_noise)
            images_BCHW = images_BCHW + noise / self.classifier.std
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self._uses_bf16):
            logits_BK = self.model(images_BCHW, keys_B)
        loss = F.cross_entropy(
            logits_BK.float(), classes_B, reduction="sum", label_smoothing=self.recipe.label_smoothing
        )
        # The ranks' gradients are summed: over the global batch, that is the gradient of the mean over its images.
        (loss / self.batch).backward()  # type: ignore[no-untyped-call]
        set_rates(self.optimizer, now)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return batch_sums(logits_BK.detach(), classes_B)

    def finish_epoch(self, epochs: int) -> bool:
        """Validate and save after so many epochs; False when a signal ended it."""
        self._collect()
        accuracy = validate(
            self.classifier,
            self.validation,
            self.ranks,
            batch_size=max(1, min(256, self.batch // self.ranks.size)),
            workers=self.workers,
            after_batch=self._after_validation_batch,
        )
        if accuracy is None:
            return False
        images, loss, top1, top5 = self._total_sums().tolist()
        if not math.isfinite(accuracy.loss):
            raise DivergedError(self._advice("the validation loss is not a number"))
        self.position.validated = epochs
        self.position.sums = self._zeros()
        best = accuracy.top1 > self.position.best_top1
        self.position.best_top1 = max(accuracy.top1, self.position.best_top1)
        rate = phase(self.recipe, self.position.step - 1, self.steps).rate
        values: dict[str, Json] = {
            "epoch": epochs,
            "train_loss": loss / images,
            "train_top1": top1 / images,
            "train_top5": top5 / images,
            **{f"val_{name}": value for name, value in dataclasses.asdict(accuracy).items()},
            "rate": rate,
        }
        self.journal.record("epoch", self.position.step, values)
        self.journal.say(
            f"epoch {epochs}/{self.recipe.epochs}  loss {loss / images:.4f}  validation: loss {accuracy.loss:.4f}  "
            f"top-1 {accuracy.top1:.2%}  top-5 {accuracy.top5:.2%}  rate {rate:g}"
        )
        if self.ranks.first:
            self._save_model(accuracy, epochs, best=best)
        self.save()
        return epochs == self.recipe.epochs or not self.interruption_agreed()

    def save(self) -> None:
        """Everything that an exact resumption needs, written by the first rank."""
        self.position.sums = self._total_sums()
        self._collect()
        moving = {name: self.optimizer.velocity(p) for name, p in self.parallelism.part.named_parameters()}
        velocities = self.parallelism.gather(moving, dict(self.classifier.network.named_parameters()))
        if self.ranks.first:
            resume.save(self.out, self, velocities)
        if self.parallelism.share[0] != 0:
            self.position.sums = self._zeros()
        self._saved_at = time.monotonic()

    def _collect(self) -> None:
        """Make the classifier's network what the ranks have trained, equal on all."""
        self.parallelism.collect()
        # Each rank has its own running statistics of batch norm; the first rank's are the ones that are saved.
        self.ranks.spread(self.classifier.network.buffers())

    def interruption_agreed(self) -> bool:
        """Whether any rank has been asked to stop."""
        return self.ranks.highest(self.interruption.signal) > 0

    @property
    def _uses_bf16(self) -> bool:
        return self.recipe.precision == "bf16" and self.ranks.device.type == "cuda"

    def _total_sums(self) -> Tensor:
        """`Position.sums` over all ranks, each image once, where several see the same."""
        return self.ranks.total(self.position.sums) * (self.parallelism.share[1] / self.ranks.size)

    def _zeros(self) -> Tensor:
        return torch.zeros(4, dtype=torch.float64, device=self.ranks.device)

    def _agree(self) -> int:
        """What all ranks do before the next step; saves where that is due."""
        wish = _CONTINUE
        if self.interruption.signal:
            wish = _STOP
        elif self.ranks.first and time.monotonic() - self._saved_at > self.save_every_s:
            wish = _SAVE
        wish = self.ranks.highest(wish)
        if wish != _CONTINUE:
            self.save()
        return wish

    def _after_validation_batch(self, done: int, total: int) -> bool:
        self.journal.show("validation", done, total)
        if not self.interruption_agreed():
            return False
        self.save()
        return True

    def _log_step(self, epoch: int, now: Phase) -> None:
        step = self.position.step
        last = step % self.epoch_steps == 0
        if step % _LOG_EVERY and not last and self.ranks.device.type == "cuda":
            return
        images, loss, top1, _ = self.position.sums.tolist()
        lost = loss / max(images, 1) > _DIVERGED * math.log(self.recipe_classes)
        if not math.isfinite(loss) or (lost and (last or images >= 10 * self.batch)):
            raise DivergedError(self._advice(f"the loss is {loss / max(images, 1):g}"))
        seconds, since = time.monotonic() - self._pace[0], step - self._pace[1]
        rate = since * self.batch / seconds
        self.journal.show(
            f"epoch {epoch + 1}/{self.recipe.epochs}",
            step,
            self.steps,
            f"{rate:,.0f} images/s  loss {loss / images:.3f}",
        )
        if step % _LOG_EVERY == 0 or last:
            values: dict[str, Json] = {
                "epoch": epoch + 1,
                "loss": loss / images,
                "top1": top1 / images,
                "rate": now.rate,
                "images_per_s": round(rate, 1),
            }
            self.journal.record("step", step, values)

    @property
    def recipe_classes(self) -> int:
        """Number of classes; guessing has a loss of its logarithm."""
        return max(2, self.classifier.spec.architecture.classes)

    def _advice(self, what: str) -> str:
        now = phase(self.recipe, self.position.step - 1, self.steps)
        return (
            f"{what} at step {self.position.step} (epoch {1 + self.position.step // self.epoch_steps}), with rate "
            f"{now.rate:g}: the run has diverged. Start again with a lower rate (--rate {self.recipe.rate / 3:.1g}), "
            "and if it still does, with --bias 0.1 or a warm-up (--warmup-epochs 2)"
        )

    def _save_model(self, accuracy: Accuracy, epochs: int, *, best: bool) -> None:
        metrics = {name: float(value) for name, value in dataclasses.asdict(accuracy).items()}
        self.classifier.spec = dataclasses.replace(
            self.classifier.spec, metrics={**metrics, "epoch": float(epochs)}
        )
        save_model(self.out, self.classifier)
        if best:
            link_model(self.out, self.out / BEST_FOLDER)
