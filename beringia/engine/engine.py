"""The engine: requests in, tokens out, step by step.

    engine = Engine("a/hugging-face/dir", chip)
    for completion in engine.generate([[1, 2, 3], [4, 5]], Sampling(max_tokens=64)):
        completion.tokens, completion.logprobs

`add` queues a request, `step` computes one step for all that run and returns those that it brought further, `abort`
gives a request's place to others. One thread calls all of these. Tokens come and go; text is read for stop strings
alone.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from beringia.chips.chip import Chip
from beringia.data.detokenizer import StopWatch
from beringia.data.tokenizer import Tokenizer
from beringia.engine.blocks import BlockPool
from beringia.engine.cache import PagedCache
from beringia.engine.forward import Forward
from beringia.engine.operators import open_operators
from beringia.engine.places import Places
from beringia.engine.sampling import GumbelNoise, Sampling, TokenLogprobs, choose, logprobs_of, with_choice
from beringia.engine.scheduler import Chunk, Scheduler
from beringia.engine.scheduler import Sequence as Request
from beringia.engine.weights import Weights
from beringia.errors import InputError
from beringia.model import Decoder, DecoderConfig, load_model
from beringia.model.experts import MixtureOfExperts, Router

DEFAULT_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class EngineLimits:
    """What the engine may use."""

    cache_bytes: int = DEFAULT_CACHE_BYTES
    block_tokens: int = 16
    sequences: int = 256
    """That run at the same time."""
    step_tokens: int = 2048
    """That one step computes: longer prompts are computed in chunks."""
    step_seconds: float | None = None
    """That a step takes, about, while a prompt is computed beside others that wait for their next token: chunks are as
    small as that asks for. None: as large as they may be, which computes all of them soonest."""


@dataclass(frozen=True)
class Completion:
    """What a request came to."""

    tokens: tuple[int, ...]
    """The new ones, the end token among them."""
    finish: str
    """`stop` (an end or stop token, or a stop string), `length` (as many as were asked for, or as the model has
    positions), `abort`, `error`."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the prompt's tokens but the first."""
    error: str | None = None
    """What the chip said, or where the logits were NaN or infinite, where `finish` is `error`."""


class Engine:
    """A model on a chip, ready to answer."""

    def __init__(
        self,
        model: Decoder | str | Path,
        chip: Chip,
        *,
        dtype: torch.dtype | None = None,
        operators: str | None = None,
        speculate: bool = False,
        batch_invariant: bool = False,
        tokenizer: Tokenizer | None = None,
        limits: EngineLimits | None = None,
        seed: int = 0,
    ) -> None:
        """`dtype`: of weights and cache; None: the chip's own choice. `operators`: `torch`, `compiled` (activations
        stay float32), or None: compiled where the chip is the CPU. `speculate`: draft a token a step with the
        model's multi-token prediction layer; the answers stay the same. `batch_invariant`: the same bits whatever
        else is in the batch; compiled operators always give them. `tokenizer`: for stop strings, and for its
        end token. Raises ModelError, InputError."""
        decoder = model if isinstance(model, Decoder) else load_model(model, seed=seed)
        self.config = decoder.config
        self.chip = chip
        self.limits = limits or EngineLimits()
        self._tokenizer = tokenizer
        dtype = dtype or chip.capabilities.compute_dtype
        chosen = open_operators(operators, chip, dtype, batch_invariant=batch_invariant)
        self.operators = chosen.name
        self.batch_invariant = chosen.batch_invariant
        self.speculates = speculate
        if speculate and decoder.mtp is None:
            raise InputError("speculate needs a multi-token prediction layer, and this model has none.")
        self._weights = Weights(decoder, chosen, chip.device, dtype, drafts=speculate)
        self._cache = self._make_cache()
        self._scheduler = Scheduler(
            BlockPool(self._cache.layers[0].shape[0], self.limits.block_tokens),
            max_sequences=self.limits.sequences,
            step_tokens=self.limits.step_tokens,
            step_seconds=self.limits.step_seconds,
            drafts=speculate,
        )
        self._forward = Forward(self._weights, self._cache, chosen, router_of(decoder))
        self._numbers = itertools.count()
        self.num_steps = self.num_drafted = self.num_accepted = 0
        self._seeds = random.Random(seed)
        self._end_tokens = _end_tokens(self.config, tokenizer)

    # Requests

    def add(self, prompt: Sequence[int], sampling: Sampling) -> Request:
        """Queue a request. Raises InputError where it can never run."""
        self.check(prompt, sampling)
        seed = sampling.seed
        if seed is None:
            seed = self._seeds.getrandbits(62)
        noise = GumbelNoise(seed, self.config.vocab_size)
        watch = StopWatch(self._tokenizer, sampling.stops) if self._tokenizer and sampling.stops else None
        request = Request(next(self._numbers), list(prompt), len(prompt), sampling, noise, watch)
        self._scheduler.add(request)
        return request

    def check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Raise InputError for a request that can never run. May be called in any thread."""
        if not prompt:
            raise InputError("The prompt has no token; at least one is needed.")
        named = {"The prompt": prompt, "logit_bias": sampling.logit_bias, "stop_tokens": sampling.stop_tokens}
        for name, tokens in named.items():
            foreign = next((token for token in tokens if not 0 <= token < self.config.vocab_size), None)
            if foreign is not None:
                last = self.config.vocab_size - 1
                raise InputError(f"{name} has the token {foreign}; the model has 0 to {last}.")
        if sampling.stops and self._tokenizer is None:
            raise InputError("Stop strings need the text of tokens: make the engine with a tokenizer.")
        longest = self.config.context_tokens
        if len(prompt) >= longest:
            raise InputError(
                f"The prompt has {len(prompt)} tokens; with room for one more the model takes {longest - 1}."
            )
        capacity = self._scheduler.pool.num_blocks * self.limits.block_tokens
        needed = min(len(prompt) + sampling.max_tokens, longest)
        if needed > capacity:
            raise InputError(
                f"Prompt and new tokens are up to {needed}, and the cache has room for {capacity}: ask for fewer "
                "(max_tokens), or give the engine a larger cache (cache_bytes)."
            )

    def abort(self, request: Request) -> None:
        """Give up a request; its place is free at once."""
        if request.finished is None:
            request.finished = "abort"
            self._scheduler.remove(request)

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    @property
    def num_free_blocks(self) -> int:
        """Blocks of the cache that no request uses."""
        return self._scheduler.pool.num_free

    @property
    def cache_use(self) -> float:
        """Share of the cache's blocks that requests use."""
        pool = self._scheduler.pool
        return 1.0 - pool.num_free / pool.num_blocks

    def generate(self, prompts: Iterable[Sequence[int]], sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
        """Complete all prompts, in their order."""
        prompts = list(prompts)
        asked = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        requests = [self.add(prompt, own) for prompt, own in zip(prompts, asked, strict=True)]
        while any(request.finished is None for request in requests):
            self.step()
        return [completion_of(request) for request in requests]

    # Steps

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Compute one step; the requests that got a token, or that an error has ended: the chip's, or logits that are
        NaN or infinite, from which nothing can be chosen."""
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        began = time.perf_counter()
        wanted, rows = _wanted_rows(chunks)
        self.num_steps += 1
        try:
            self.chip.begin_step(self.num_steps)
            places = Places.of(chunks, self.limits.block_tokens, self.chip.device)
            logits_RV, hidden_MD = self._forward(places, self._index(wanted))
            done = self._finish_step(chunks, rows, logits_RV.cpu())
            if self.speculates:
                self._draft(chunks, hidden_MD)
        except RuntimeError as problem:
            fault = self.chip.classify(problem)
            if fault is None:
                raise
            return self._fail(chunks, f"{self.chip.name} reported {fault.code}: {fault.message}")
        self._scheduler.pace.note(sum(chunk.end - chunk.start for chunk in chunks), time.perf_counter() - began)
        return done

    def load_weights(self, decoder: Decoder) -> str:
        """Other weights of the same model, between two steps; returns their hash. What runs is computed anew."""
        if decoder.config != self.config:
            raise InputError("The engine was made for a model of another configuration: make another engine.")
        self._weights.load(decoder)
        self._scheduler.restart()
        return self._weights.hash

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and cache."""
        return self._weights.dtype

    @property
    def weights_hash(self) -> str:
        """Of the effective weights."""
        return self._weights.hash

    @property
    def cache_bytes_per_token(self) -> int:
        """Over all layers."""
        return self._cache.bytes_per_token

    # Small parts

    def _finish_step(self, chunks: Sequence[Chunk], rows: Sequence[slice], logits_RV: torch.Tensor) -> list[Request]:
        """Take in what the rows say; the requests that got tokens."""
        choosing: list[tuple[Request, range]] = []
        refused: list[Request] = []
        for chunk, of_chunk in zip(chunks, rows, strict=True):
            request = chunk.sequence
            told = _note_prompt_logprobs(chunk, logits_RV[of_chunk])
            request.num_computed = chunk.end - chunk.drafted
            if not told:
                self._refuse(request, len(request.prompt_logprobs) + 1)
                refused.append(request)
            elif chunk.completes:
                choosing.append((request, range(of_chunk.stop - 1 - chunk.drafted, of_chunk.stop)))
        self._extend(choosing, logits_RV)
        return [*(request for request, _ in choosing), *refused]

    def _refuse(self, request: Request, place: int) -> None:
        """End a request whose logits for the token at `place` are NaN or infinite; nobody shares what it computed."""
        request.finished = "error"
        request.error = (
            f"The logits for token {place} are NaN or infinite, so no token has a probability: look for NaN and "
            "infinities in the model's weights; where there are none, qualify the chip."
        )
        self._scheduler.remove(request)
        self._scheduler.pool.forget_all()

    def _extend(self, choosing: Sequence[tuple[Request, range]], logits_RV: torch.Tensor) -> None:
        """Choose each request's next token, and where that is the drafted one, the token after it.

        So the tokens are those that are chosen without drafts: a draft only decides how many a step brings.
        """
        flat = [(request, row, row - rows.start) for request, rows in choosing for row in rows]
        if not flat:
            return
        asked = [request.sampling for request, _, _ in flat]
        # As a rule all rows choose, in order: indexing would copy them, which takes as long as choosing.
        chosen_rows_RV = logits_RV if len(flat) == len(logits_RV) else logits_RV[[row for _, row, _ in flat]]
        noises, ahead = [request.noise for request, _, _ in flat], [later for _, _, later in flat]
        tokens = choose(chosen_rows_RV, asked, noises, ahead)
        chosen_well = with_choice(chosen_rows_RV, tokens)
        told = [row for row, sampling in enumerate(asked) if sampling.logprobs is not None]
        logprobs = {}
        if told:
            wanted = [asked[row].logprobs or 0 for row in told]
            found = logprobs_of(chosen_rows_RV[told], [tokens[row] for row in told], wanted)
            logprobs = dict(zip(told, found, strict=True))
        for row, (request, _, later) in enumerate(flat):
            if later and (request.finished is not None or request.tokens[-1] != request.draft[later - 1]):
                continue
            if later:
                self._accept(request)
            if chosen_well[row]:
                self._append(request, tokens[row], logprobs.get(row))
            else:
                self._refuse(request, len(request.tokens))
        for request, _ in choosing:
            request.draft = ()
            if request.finished is not None:
                self._scheduler.remove(request)

    def _append(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> None:
        request.tokens.append(token)
        request.noise.advance()
        if logprobs is not None:
            request.logprobs.append(logprobs)
        request.finished = self._finish(request, token)

    def _accept(self, request: Request) -> None:
        """The drafted token, computed in this step, was right."""
        self.num_accepted += 1
        self._scheduler.note_computed(request, request.num_computed, request.num_computed + 1)
        request.num_computed += 1

    def _draft(self, chunks: Sequence[Chunk], hidden_MD: torch.Tensor) -> None:
        """Draft the token after each request's newest one, from the rows whose next token is known."""
        known: list[Chunk] = []
        rows: list[int] = []
        ready: list[tuple[Request, int]] = []
        first = 0
        for chunk in chunks:
            request = chunk.sequence
            count = min(chunk.end, len(request.tokens) - 1) - chunk.start
            if request.finished is None and count > 0:
                rows += range(first, first + count)
                known.append(Chunk(request, chunk.start + 1, chunk.start + 1 + count))
                if known[-1].completes and self._has_room_for_two(request):
                    ready.append((request, len(rows) - 1))
            first += chunk.end - chunk.start
        if not known:
            return
        places = Places.of(known, self.limits.block_tokens, self.chip.device)
        hidden_MD = hidden_MD.index_select(0, self._index(rows))
        logits_RV = self._forward.draft(places, hidden_MD, self._index([row for _, row in ready])).cpu()
        if not ready:
            return
        requests = [request for request, _ in ready]
        # With the noise that its check will have: a draft is right wherever the two distributions' draws agree.
        drafts = choose(logits_RV, [r.sampling for r in requests], [r.noise for r in requests], [0] * len(ready))
        for request, draft in zip(requests, drafts, strict=True):
            request.draft = (draft,)
        self.num_drafted += len(ready)

    def _has_room_for_two(self, request: Request) -> bool:
        """Whether two more tokens are wanted, and the model has positions for them."""
        wanted = request.sampling.max_tokens - len(request.new_tokens)
        return min(wanted, self.config.context_tokens - len(request.tokens)) > 1

    def _index(self, rows: Sequence[int]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64).to(self.chip.device)

    def _fail(self, chunks: Sequence[Chunk], error: str) -> list[Request]:
        """End the requests of a step that the chip did not finish; what it wrote into the cache is worth nothing."""
        requests = [chunk.sequence for chunk in chunks]
        for request in requests:
            if request.finished is None:
                request.finished, request.error = "error", error
            self._scheduler.remove(request)
        self._scheduler.pool.forget_all()
        return requests

    def _finish(self, request: Request, token: int) -> str | None:
        sampling = request.sampling
        if token in sampling.stop_tokens or (token in self._end_tokens and not sampling.ignore_end):
            return "stop"
        if request.stop_watch is not None and request.stop_watch.push(token):
            request.at_string = True
            return "stop"
        num_new = len(request.tokens) - request.num_prompt
        if num_new >= sampling.max_tokens or len(request.tokens) >= self.config.context_tokens:
            return "length"
        return None

    def _make_cache(self) -> PagedCache:
        one = self._cache_of(1, torch.device("meta"))
        num_blocks = self.limits.cache_bytes // (one.bytes_per_token * self.limits.block_tokens)
        if num_blocks < 1:
            raise InputError(f"cache_bytes is {self.limits.cache_bytes}, less than one block takes.")
        return self._cache_of(num_blocks, self.chip.device)

    def _cache_of(self, num_blocks: int, device: torch.device) -> PagedCache:
        block_tokens, dtype = self.limits.block_tokens, self._weights.dtype
        return PagedCache(self.config, num_blocks, block_tokens, device, dtype, drafts=self.speculates)


def completion_of(request: Request) -> Completion:
    """What has come of a request so far."""
    return Completion(
        tokens=tuple(request.new_tokens),
        finish=request.finished or "",
        logprobs=tuple(request.logprobs),
        prompt_logprobs=tuple(request.prompt_logprobs),
        error=request.error,
    )


def _end_tokens(config: DecoderConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The model's own, and the tokenizer's: a model made from a preset names none."""
    own = config.eos_token_id
    named = own if isinstance(own, tuple) else (own,)
    ends = (*named, tokenizer.end if tokenizer is not None and "eos_token" in tokenizer.specials else None)
    return frozenset(end for end in ends if end is not None)


def router_of(decoder: Decoder) -> Router | None:
    """Says how its experts are chosen, which all its layers do alike; None: it has none."""
    mixtures = (layer.mlp for layer in decoder.model.layers if isinstance(layer.mlp, MixtureOfExperts))
    first = next(mixtures, None)
    return None if first is None else first.gate


def _wanted_rows(chunks: Sequence[Chunk]) -> tuple[list[int], list[slice]]:
    """Rows whose logits are needed, and which of those are each chunk's: in a chunk that completes its sequence the row
    of its last token and those of its draft, all rows where the prompt's log-probabilities are asked for."""
    wanted: list[int] = []
    rows: list[slice] = []
    row = 0
    for chunk in chunks:
        end = row + chunk.end - chunk.start
        first = end - chunk.drafted - 1 if chunk.completes else end
        if chunk.sequence.sampling.prompt_logprobs is not None:
            first = row
        rows.append(slice(len(wanted), len(wanted) + end - first))
        wanted += range(first, end)
        row = end
    return wanted, rows


def _note_prompt_logprobs(chunk: Chunk, logits_TV: torch.Tensor) -> bool:
    """Row t says how likely token t + 1 was. False where one's logits are NaN or infinite: then those before it are
    noted."""
    sequence = chunk.sequence
    asked = sequence.sampling.prompt_logprobs
    if asked is None:
        return True
    # Of a sequence that was sent back and is computed again some are there already.
    first = len(sequence.prompt_logprobs) + 1
    next_tokens = sequence.tokens[first : min(chunk.end + 1, sequence.num_prompt)]
    if not next_tokens:
        return True
    rows_TV = logits_TV[first - 1 - chunk.start :][: len(next_tokens)]
    found = logprobs_of(rows_TV, next_tokens, [asked] * len(next_tokens))
    sequence.prompt_logprobs += itertools.takewhile(lambda one: math.isfinite(one.chosen), found)
    return len(sequence.prompt_logprobs) == first - 1 + len(found)
