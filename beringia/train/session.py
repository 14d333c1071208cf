"""One order carried out: the state loaded and checked, the canary where one is due, then steps until something ends
them.

Between the supervisor's order and the trainer's loop: makes model, data, trainer and checkpoint store from the order,
reports every fact as an event, writes and trusts checkpoints, evaluates. Decides nothing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from beringia.checkpoint.store import CheckpointStore
from beringia.chips.chip import Chip
from beringia.data import Stream, Tokenizer, check_vocabulary, choose_tokenizer, open_stream
from beringia.errors import CheckpointDamaged, DataError, RunError
from beringia.model import load_model
from beringia.processes.ranks import Ranks
from beringia.records.events import (
    SPIKE,
    Alarm,
    CheckDone,
    ChipOpened,
    Fallback,
    Resumed,
    StepDone,
)
from beringia.records.manifest import CheckpointManifest
from beringia.records.orders import Order
from beringia.records.run_directory import RunDirectory
from beringia.train import sharding
from beringia.train.canary import Replay, run_canary
from beringia.train.compile_cache import CompileCache
from beringia.train.compute import UNIT_ROUNDOFF, choose_compute_dtype, reason_not_to_compile
from beringia.train.cross_entropy import CrossEntropy
from beringia.train.divergence import beyond_judging, divergence
from beringia.train.evaluation import evaluate
from beringia.train.guard import Guard
from beringia.train.guard.check import GRADIENT
from beringia.train.hard_batch import explained_by_data
from beringia.train.reporting import Reporting
from beringia.train.saving import Saving
from beringia.train.state import adopt_progress, check_progress, live_tensors, progress_of
from beringia.train.trainer import StepResult, Trainer, finite

End = Literal["done", "stopped", "alarm", "refused"]

_SITES_A_PASS = 2
"""Checked in one pass when all are: as many as a training step may hold the tensors of, so memory for them is there."""

_POLL_SECONDS = 0.02


class UnusableCheckpoint(Exception):
    """A checkpoint that the order names cannot be loaded here. Carries what the `rejected` event says."""

    def __init__(self, step: int, file: str | None, message: str) -> None:
        super().__init__(message)
        self.step = step
        self.file = file


class StopRequested(Exception):
    """Training was asked to stop in the middle of what is no step. The state is whole."""


class CanaryRefused(Exception):
    """The replay on this chip left its band: the crossing must not happen. The `canary` event has the figures."""


class Session:
    """One worker's work. `open()`, then `train()`."""

    def __init__(self, order: Order, chip: Chip, ranks: Ranks, channel: Reporting) -> None:
        self.order = order
        self.recipe = order.recipe
        self.chip = chip
        self.ranks = ranks
        self.channel = channel
        self.run = RunDirectory(Path(order.root))
        self.compute_dtype = choose_compute_dtype(self.recipe.train.compute, chip)
        self._trainer: Trainer | None = None
        self._compile_cache: CompileCache | None = None

    @property
    def step(self) -> int | None:
        """Steps done, or None before the state is there."""
        return self._trainer.step if self._trainer is not None else None

    # Opening

    def open(self) -> None:
        """Shake hands, make everything, load the state and check it, replay the canary where one is due."""
        self._introduce()
        self._wait_for_go()
        tokenizer = choose_tokenizer(self.recipe.data, self.recipe.model)
        self.stream, self.held_out = (self._open_stream(split, tokenizer) for split in ("train", "held-out"))
        if self.ranks.first:
            for note in dict.fromkeys((*self.stream.notes, *self.held_out.notes)):
                self._fall_back("data", self.recipe.data.words, "a part of it", note)
        self.tokenizer = tokenizer
        self._trainer = self._make_trainer(tokenizer)
        self.store = self._open_store()
        self.saving = Saving(self.store, self.run, self.ranks, self.channel, self._agree)
        if self.order.canary_from is not None:
            self._replay_canary()
        self.resume(self.order.resume_step)
        self.saving.newest = self.order.resume_step
        self._initial.clear()
        self._arm_guard()
        self._compile()

    @property
    def trainer(self) -> Trainer:
        """The trainer, once it is there."""
        assert self._trainer is not None
        return self._trainer

    def resume(self, step: int | None) -> Resumed:
        """Load a checkpoint (None: the initial state) into the live tensors, and hold their hash against the
        manifest's."""
        started = time.perf_counter()
        manifest = self.place(step)
        expected = manifest.state_hash if manifest is not None else None
        load_seconds = time.perf_counter() - started
        progress = self._progress()
        found = self.store.state_hash(self.tensors(), progress)
        resumed = Resumed(
            step=self.trainer.step,
            cursor=self.trainer.cursor,
            state_hash_expected=expected or found,
            state_hash=found,
            load_seconds=load_seconds,
            first_sample=progress["next_samples"],
        )
        if self.ranks.first:
            self.channel.event(resumed)
        if expected is not None and found != expected:
            raise UnusableCheckpoint(
                self.trainer.step, None, f"the live tensors hash to {found}, the manifest says {expected}"
            )
        return resumed

    def _introduce(self) -> None:
        used = self.chip.name
        section = self.recipe.chips[self.order.chip]
        if not self.ranks.first:
            return
        self.channel.event(
            ChipOpened(
                asked=section.use,
                used=used,
                identity=self.chip.identity,
                identity_hash=self.chip.identity.hash,
                ranks=self.ranks.count,
                compute_dtype=str(self.compute_dtype).removeprefix("torch."),
                sharding="none" if self.ranks.count == 1 else self.chip.capabilities.sharding,
                vocabulary_size=self._vocabulary_size(),
            )
        )
        if used != section.use:
            self._fall_back("chip", section.use, used, "the first accelerator that is here, else the CPU")

    def _vocabulary_size(self) -> int | None:
        """Of a preset, which gets its tokenizer's: a certificate is for a size. Where the tokenizer cannot be read, no
        size is known; that is told when the data is opened."""
        if self.recipe.model.preset is None:
            return None
        try:
            return choose_tokenizer(self.recipe.data, self.recipe.model).vocabulary_size
        except DataError:
            return None

    def _wait_for_go(self) -> None:
        # One of the ranks reads the line that all of them wait for.
        while not self._agree(self.channel.go.is_set()):
            time.sleep(_POLL_SECONDS)

    def _agree(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.ranks.count == 1:
            return flag
        return bool(sharding.sum_over_ranks(torch.tensor([int(flag)], device=self.chip.device)).item())

    def _all_told(self) -> None:
        """Wait until every rank has sent what it had to tell: whoever says first that it ends has all of them ended."""
        self._agree(False)

    def _open_stream(self, split: Literal["train", "held-out"], tokenizer: Tokenizer) -> Stream:
        if not self.ranks.first:
            dist.barrier()  # the first rank packs folders, the others read what it packed
        stream = open_stream(
            self.recipe.data,
            seed=self.recipe.seed,
            directory=self.run.data,
            split=split,
            tokenizer=tokenizer,
            beat=self.channel.beat,
        )
        if self.ranks.first and self.ranks.count > 1:
            dist.barrier()
        return stream

    def _make_trainer(self, tokenizer: Tokenizer) -> Trainer:
        model = self.recipe.model
        size = tokenizer.vocabulary_size if model.preset is not None else None
        decoder = load_model(model.path or model.preset or "", seed=self.recipe.seed, vocabulary_size=size)
        check_vocabulary(tokenizer, decoder.config.vocab_size)
        length, room = self.recipe.data.sequence_length, decoder.config.context_tokens
        if length > room and self.ranks.first:
            reason = f"the model says that it has {room} positions: whoever runs it elsewhere may use no more of them"
            self._fall_back("sequence length", f"at most {room}", f"data.sequence_length = {length}", reason)
        decoder.set_compute_dtype(self.compute_dtype)
        self._initial = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
        decoder.to(self.chip.device)
        decoder.train()
        objective = CrossEntropy.of(decoder, self.recipe.train)
        return Trainer(self.recipe, self.chip, self.ranks, decoder, objective, self.stream)

    def _open_store(self) -> CheckpointStore:
        store = CheckpointStore(
            self.run.checkpoints,
            epoch=self.order.epoch,
            epoch_file=self.run.epoch,
            keep=self.recipe.train.keep,
            recipe_hash=self.order.recipe_hash,
            run_identity=self.order.run_identity,
            chip_identity=self.chip.identity.hash,
            process_group=dist.group.WORLD if self.ranks.count > 1 else None,
            chip=self.chip,
        )
        store.prepare(self.tensors())
        why_not_compiled = store.hash_kernel.reason
        if why_not_compiled and self.ranks.first:
            self._fall_back("state hash", "compiled", "numpy", why_not_compiled)
        return store

    def _arm_guard(self) -> None:
        share = self.recipe.guard.share
        if share == 0:
            if self.ranks.first:
                self._fall_back("guard", "on", "off", "guard.share is 0: no checkpoint of this run becomes trusted")
            return
        trainer = self.trainer
        trainer.guard = Guard(
            trainer.decoder,
            trainer.optimizer,
            trainer.objective,
            self.chip,
            self.ranks,
            share=share,
            seed=self.recipe.seed,
            sharding=trainer.sharding,
            clipping=trainer.clipping,
        )
        trainer.guard.accept_spikes(self.order.accepted_spikes)
        trainer.guard.remember(self.order.recent)

    def _compile(self) -> None:
        if not self.recipe.train.compile:
            return
        reason = reason_not_to_compile(self.chip)
        if reason is None:
            self._compile_cache = CompileCache(self.run.compiled)
            self._compile_cache.open(first=self.ranks.first)
            self._agree(False)  # the others wait until the first rank has opened it
            self.trainer.compile()
        elif self.ranks.first:
            self._fall_back("torch.compile", "compiled", "eager", reason)

    # State

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every live tensor of the state, by name."""
        return live_tensors(self.trainer.decoder, self.trainer.optimizer)

    def _progress(self) -> dict[str, Any]:
        trainer = self.trainer
        return progress_of(
            step=trainer.step,
            cursor=trainer.cursor,
            seed=self.recipe.seed,
            stream=self.stream,
            batch=self.recipe.train.batch,
        )

    def _load(self, step: int) -> CheckpointManifest:
        trainer = self.trainer
        try:
            manifest = self.store.manifest(step)
            self._check_told(step, manifest)
            progress = self.store.load(step, self.tensors())
            place = str(self.store.directory.path(step))
            # Raises a DataError as it is: no other checkpoint would bring the data back.
            check_progress(
                progress, seed=self.recipe.seed, stream=self.stream, batch=self.recipe.train.batch, place=place
            )
        except CheckpointDamaged as damage:
            raise UnusableCheckpoint(step, damage.path, str(damage)) from damage
        except RunError as mismatch:
            raise UnusableCheckpoint(step, None, str(mismatch)) from mismatch
        adopt_progress(progress, trainer.optimizer)
        trainer.step, trainer.cursor = progress["step"], progress["cursor"]
        return manifest

    def _check_told(self, step: int, manifest: CheckpointManifest) -> None:
        told = self.order.state_hashes.get(step, manifest.state_hash)
        if manifest.state_hash != told:
            raise RunError(
                f"The checkpoint of step {step} holds the state {manifest.state_hash[:12]}, and the run's events say "
                f"{told[:12]}: another run's was put in its place."
            )

    def _start_over(self) -> None:
        """The seeded initial state in the live tensors."""
        trainer = self.trainer
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                if name in self._initial:
                    sharding.copy_whole(self._initial[name], tensor)
                else:
                    tensor.zero_()
        adopt_progress({"step": 0}, trainer.optimizer)
        trainer.step = trainer.cursor = 0

    def place(self, step: int | None) -> CheckpointManifest | None:
        """Put the state of a checkpoint (None: the initial state) into the live tensors; returns its manifest."""
        if step is None:
            self._start_over()
            return None
        return self._load(step)

    def _replay_canary(self) -> None:
        assert self.order.resume_step is not None and self.order.canary_from is not None
        dtypes = self.order.canary_compute_dtype or "float32", str(self.compute_dtype).removeprefix("torch.")
        canary = run_canary(
            Replay(
                trainer=self.trainer,
                place=self.place,
                beat=self.channel.beat,
                from_step=self.order.canary_from or None,
                to_step=self.order.resume_step,
                roundoff=sum(UNIT_ROUNDOFF[dtype] for dtype in dtypes),
            )
        )
        if self.ranks.first:
            self.channel.event(canary)
        self._all_told()
        if not canary.passed:
            raise CanaryRefused(canary.message)

    # Training

    def train(self) -> End:
        """Steps until the last one, a request to stop, or an alarm."""
        try:
            return self._train()
        except StopRequested:
            if self.saving.newest != self.trainer.step:
                self._save()
            self.saving.finish()
            self._all_told()
            return "stopped"

    def _train(self) -> End:
        trainer = self.trainer
        if self.order.evaluate:
            self._evaluate()
        while trainer.step < self.recipe.train.last_step:
            self._check_stop()
            if self._diverges():
                return "alarm"
            if self._alarmed(self._report(trainer)):
                return "alarm"
            self.saving.trust(trainer.guard)
            self.saving.collect()
            self._on_schedule()
        return self._close_run()

    def _check_stop(self) -> None:
        if self._agree(self.channel.stop_requested.is_set()):
            raise StopRequested

    def _report(self, trainer: Trainer) -> StepResult:
        result = trainer.train_step()
        self.channel.beat()
        if self.ranks.first:
            self.channel.event(
                StepDone(
                    step=result.step,
                    loss=finite(result.loss),
                    mtp_loss=finite(result.mtp_loss),
                    gradient_norm=finite(result.gradient_norm),
                    learning_rate=result.learning_rate,
                    tokens=result.tokens,
                    seconds=result.seconds,
                    cursor=trainer.cursor,
                    guard_seconds=result.guard_seconds,
                )
            )
        return result

    def _alarmed(self, result: StepResult) -> bool:
        """Report what the guard found in a step; whether anything is an alarm."""
        guard = self.trainer.guard
        if guard is None:
            return False
        events = guard.take_events()
        spikes = [event for event in events if isinstance(event, Alarm) and event.detector == SPIKE]
        if spikes:
            events = self._look_into(spikes, [event for event in events if event not in spikes])
        doubtful = beyond_judging(self.trainer, dict(result.numbers) | {GRADIENT: result.gradient_norm}) is not None
        for event in events:
            is_doubtful = doubtful and isinstance(event, Alarm) and event not in spikes
            self.channel.event(event.model_copy(update={"doubtful": True}) if is_doubtful else event)
        if spikes:  # every rank has them; a layer that computes wrongly may be one rank's alone
            self._all_told()
        return any(isinstance(event, Alarm) for event in events)

    def _look_into(self, spikes: list[Alarm], events: list[CheckDone | Alarm]) -> list[CheckDone | Alarm]:
        """What is to be told of a step with spikes. A spike alone says little: whether every layer computes rightly in
        this very batch comes first, so that it is acted upon; and if all do, whether the data explain it."""
        with self.trainer.one_step_back():
            events = [*events, *self._check_all_sites()]
        if self._agree(any(isinstance(event, Alarm) for event in events)):
            return [*events, *spikes]
        if not explained_by_data(self.trainer, spikes, self.channel.beat):
            return [*events, *spikes]
        if self.trainer.guard is not None:
            self.trainer.guard.explained()
        return [event.model_copy(update={"explained": True}) if _tells_of(event, spikes) else event for event in events]

    def _diverges(self) -> bool:
        """Whether the step that is due, for which the run went back, is beyond judging wherever it is computed.
        Reported is that, or which layer computes wrongly and may have led there."""
        step = self.trainer.step + 1
        found = divergence(self.trainer, self.channel.beat) if step in self.order.doubted_steps else None
        if found is None:
            return False
        judged = self._check_all_sites() if found.layers_judged and self.trainer.guard is not None else []
        alarms = [event for event in judged if isinstance(event, Alarm)]
        wrong = [alarm for alarm in alarms if alarm.value is not None]
        for event in wrong:
            self.channel.event(event)
        if not self._agree(bool(wrong)) and self.ranks.first:
            self.channel.event(found.alarm(step))
        self._all_told()
        return True

    def _check_all_sites(self) -> list[CheckDone | Alarm]:
        """What the guard finds at every site with the weights as they are."""
        guard = self.trainer.guard
        assert guard is not None
        found: list[CheckDone | Alarm] = []
        for first in range(0, len(guard.sites), _SITES_A_PASS):
            self.trainer.check_sites(guard.sites[first : first + _SITES_A_PASS])
            self.channel.beat()
            found += guard.take_events()
        return found

    def _on_schedule(self) -> None:
        train, step = self.recipe.train, self.trainer.step
        if step % train.checkpoint_every == 0 or step == train.last_step:
            self._save()
        if step % train.evaluate_every == 0 or step == train.last_step:
            self._evaluate()

    def _close_run(self) -> End:
        """The last checkpoint becomes trusted by checks after it; without a guard it stays pending."""
        self.saving.finish()
        guard = self.trainer.guard
        if guard is None:
            return "done"
        found = self._check_all_sites()
        for event in found:
            self.channel.event(event)
        self._all_told()
        if any(isinstance(event, Alarm) for event in found):
            return "alarm"
        self.saving.trust(guard)
        return "done"

    def _save(self) -> None:
        if self._compile_cache is not None and self.ranks.first:
            self._compile_cache.keep()
        self.saving.save(self.trainer.step, self.tensors(), self._progress())

    def _evaluate(self) -> None:
        trainer = self.trainer
        event = evaluate(
            trainer.module,
            trainer.decoder,
            trainer.objective,
            self.held_out,
            self.recipe.train,
            self.chip,
            step=trainer.step,
            seed=self.recipe.seed,
            end_token=self.tokenizer.end,
            beat=self._beat_or_stop,
        )
        if self.ranks.first:
            self.channel.event(event)

    def _beat_or_stop(self) -> None:
        self.channel.beat()
        self.saving.collect()  # a checkpoint is told of when it is complete, however long this takes
        self._check_stop()

    def _fall_back(self, what: str, asked: str, used: str, reason: str) -> None:
        self.channel.event(Fallback(what=what, asked=asked, used=used, reason=reason))


def _tells_of(event: CheckDone | Alarm, spikes: list[Alarm]) -> bool:
    """Whether it is the check that one of these alarms came of."""
    return (
        isinstance(event, CheckDone)
        and event.detector == SPIKE
        and any((event.site, event.tensor, event.value) == (spike.site, spike.tensor, spike.value) for spike in spikes)
    )
