"""The engine that computes nothing: steps take as long as a profile says, tokens are a function of prompt and position.

For loading the orchestrator at the scale of a rack from one machine. Its blocks are small and their content names the tokens
that a real engine would have computed into them, so that a transfer that delivers the wrong bytes is noticed. No torch.
"""

import functools
import hashlib
import json
import mmap
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.core.commands import Slice
from orchestrator.core.config import EngineConfig, KvFormat, SpeculationMethod
from orchestrator.core.cost.costs import draft_seconds, step_seconds
from orchestrator.core.node.speculation import accepted_drafts, textless_drafts
from orchestrator.core.types import BlockId, CostProfile, RequestId, Sampling
from orchestrator.profiles.fields import COUNT_MAX, read_fields
from orchestrator.profiles.model_config import model_fields, read_config
from orchestrator.profiles.positions import context_tokens_of, limited
from workers.engines.base import EngineDescription, PromptScores, SliceOutput, TokenLogprobs
from workers.engines.stored import StoredForm

#: Bytes of a block: enough to tell any two apart. A block repeats its name, so that a part of it names it as well.
BLOCK_BYTES = 64
NAME_BYTES = 8
#: Bytes of a block's stored form: what real formats would make of as many bytes of bfloat16, without a loss.
STORED_BYTES = {KvFormat.PLAIN: BLOCK_BYTES, KvFormat.FP8: BLOCK_BYTES // 2, KvFormat.NVFP4: BLOCK_BYTES * 9 // 32}
#: Blocks of a node unless the configuration says otherwise: two million tokens of 64 a block.
BLOCKS_DEFAULT = 32768

_NOTHING = SliceOutput()


class _Turn:
    """One request: what its tokens are made from."""

    __slots__ = ("covered", "digest", "ending", "logprobs", "prefix", "prompt", "scored", "table", "tops")

    def __init__(self, prompt: bytes, ending: frozenset[int], logprobs: int | None, tops: int | None) -> None:
        self.prompt = prompt
        #: Names the whole prompt.
        self.digest = zlib.crc32(prompt)
        self.ending = ending
        self.logprobs = logprobs
        #: Tokens of the prompt whose log probabilities need not be told any more; None once there is nothing to tell of any.
        self.scored = None if tops is None else 1
        #: How many likely ones go with each.
        self.tops = tops or 0
        self.table: list[BlockId] = []
        #: CRC of the prompt's first `covered` tokens.
        self.prefix = 0
        self.covered = 0


class ProfiledEngine:
    """See `base.Engine`."""

    def __init__(
        self,
        model_dir: Path,
        config: EngineConfig,
        profile: CostProfile,
        allocate: Callable[[int], memoryview] | None = None,
    ) -> None:
        """Read vocabulary, limits and special tokens of a checkpoint directory; its weights are not needed.

        Args:
            model_dir: has config.json; generation_config.json and tokenizer.json are read if present.
            config: block size and count, context limit.
            profile: what a step costs.
            allocate: returns that many zeroed bytes for the blocks; None: the engine's own.

        Raises:
            CheckpointError: if config.json is missing, malformed, or lacks vocab_size or the length of contexts.
            ConfigError: for a context that is longer than the model's.
        """
        written = read_fields(model_dir / "config.json")
        settings = model_fields(written)
        vocabulary = settings.count("vocab_size")
        #: They never come out.
        self._special = _special_token_ids(model_dir)
        #: Tokens that may come out: all that are ordinary text.
        self._allowed = array("I", [token for token in range(vocabulary) if token not in self._special] or [0])
        blocks = config.blocks or BLOCKS_DEFAULT
        size = blocks * BLOCK_BYTES
        self._memory = (allocate(size) if allocate else memoryview(mmap.mmap(-1, size))).cast("B")
        self._profile = profile
        self._costs = step_seconds(profile, [(config.block_tokens, config.block_tokens)], 1, config.block_tokens) > 0.0
        self._acceptance = config.speculation.acceptance
        self._models = config.speculation.method is SpeculationMethod.DRAFT_MODEL
        self._turns: dict[RequestId, _Turn] = {}
        #: One output for each token without logprobs or an end: most outputs of all.
        self._outputs: dict[int, SliceOutput] = {}
        form = stored_form(config)
        self.description = EngineDescription(
            blocks=blocks,
            block_tokens=config.block_tokens,
            block_bytes=BLOCK_BYTES,
            stored_bytes=form.block_bytes,
            stored_layout=form.layout,
            vocabulary=vocabulary,
            context_tokens_max=limited(context_tokens_of(settings), config.context_tokens_max),
            fingerprint=profiled_fingerprint(model_dir),
            device="none",
            computes=False,
        )
        self._block_tokens = config.block_tokens

    @property
    def pool(self) -> memoryview | None:
        return self._memory

    @property
    def routing(self) -> None:
        return None

    @property
    def halves(self) -> None:
        return None

    @property
    def drafts(self) -> None:
        return None

    @property
    def beats(self) -> None:
        return None

    def add(self, request: RequestId, tokens: "array[int]", sampling: Sampling, generated: int = 0) -> None:
        ending = frozenset(sampling.stop_token_ids) - self._special
        prompt = tokens[: len(tokens) - generated].tobytes()
        self._turns[request] = _Turn(prompt, ending, sampling.logprobs, None if generated else sampling.prompt_logprobs)

    def forget(self, request: RequestId) -> None:
        self._turns.pop(request, None)

    def step(self, slices: Sequence[Slice]) -> list[SliceOutput]:
        """Return the tokens of a step at once; the caller waits for `pause_s`."""
        turns, allowed, choices = self._turns, self._allowed, len(self._allowed)
        size, outputs = self._block_tokens, self._outputs
        results: list[SliceOutput] = []
        drafts = textless_drafts(slices, self._models)
        # A draft model's time goes with the tokens that it drafts.
        token_s = draft_seconds(self._profile, drafts) / max(1, sum(drafts)) if self._models else None
        for piece, drafted in zip(slices, drafts, strict=True):
            turn = turns[piece.request]
            if piece.blocks:
                first = piece.first_block
                turn.table[first : first + len(piece.blocks)] = piece.blocks
            end = piece.start + piece.count
            if piece.count > 1 or end % size == 0:
                self._fill(turn, piece.start, end)
            if turn.scored is not None and (scores := self._scores(turn, turn.scored, piece.start, end)) is not None:
                output = self._special_output(turn, allowed[_hash(turn.digest, end) % choices]) if piece.sample else _NOTHING
                results.append(replace(output, scores=scores))
                continue
            if not piece.sample:
                results.append(_NOTHING)
                continue
            token = allowed[_hash(turn.digest, end) % choices]
            if drafted:
                output = self._verified(turn, piece, end, drafted)
                results.append(output if token_s is None else replace(output, drafting_s=drafted * token_s))
                continue
            if turn.ending or turn.logprobs is not None:
                results.append(self._special_output(turn, token))
                continue
            output = outputs.get(token)
            if output is None:
                output = outputs[token] = SliceOutput((token,))
            results.append(output)
        return results

    def pause_s(self, slices: Sequence[Slice], decoding: int) -> float:
        """Return what the profile says."""
        if not self._costs:
            return 0.0
        prefills = [(piece.count, piece.start) for piece in slices[decoding:]]
        drafts = textless_drafts(slices[:decoding], self._models)
        prefills += [(count, piece.start + 1) for piece, count in zip(slices, drafts, strict=False) if count]
        seconds = step_seconds(self._profile, prefills, decoding, sum([piece.start for piece in slices[:decoding]]))
        return seconds + draft_seconds(self._profile, drafts) if self._models else seconds

    def read_blocks(self, blocks: Sequence[BlockId], into: memoryview) -> None:
        target = into.cast("B")
        for place, block in enumerate(blocks):
            target[place * BLOCK_BYTES : (place + 1) * BLOCK_BYTES] = self._memory[
                block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES
            ]

    def write_blocks(self, blocks: Sequence[BlockId], data: memoryview) -> None:
        source = data.cast("B")
        for place, block in enumerate(blocks):
            self._memory[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = source[
                place * BLOCK_BYTES : (place + 1) * BLOCK_BYTES
            ]

    def encode_blocks(self, blocks: Sequence[BlockId], into: memoryview) -> None:
        target, size = into.cast("B"), self.description.stored_bytes
        for place, block in enumerate(blocks):
            target[place * size : (place + 1) * size] = self._memory[block * BLOCK_BYTES : block * BLOCK_BYTES + size]

    def decode_blocks(self, blocks: Sequence[BlockId], data: memoryview) -> None:
        source, size = data.cast("B"), self.description.stored_bytes
        for place, block in enumerate(blocks):
            name = bytes(source[place * size : place * size + NAME_BYTES])
            self._memory[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = name * (BLOCK_BYTES // NAME_BYTES)

    def close(self) -> None:
        self._turns.clear()
        del self._memory

    def _verified(self, turn: _Turn, piece: Slice, end: int, drafted: int) -> SliceOutput:
        """Return the token after the first `end`, and those that the settings let be drafted right."""
        random = _hash(turn.digest ^ 0xFFFFFFFF, end) * 2.0**-32
        outputs: list[SliceOutput] = []
        for place in range(end, end + 1 + accepted_drafts(self._acceptance, drafted, random)):
            outputs.append(self._special_output(turn, self._allowed[_hash(turn.digest, place) % len(self._allowed)]))
            if outputs[-1].stopped:
                break
        last = piece.start + len(outputs)
        if last // self._block_tokens > piece.start // self._block_tokens:
            self._fill(turn, piece.start, last)
        tokens = tuple([output.tokens[0] for output in outputs])
        logprobs = tuple([one for output in outputs for one in output.logprobs])
        return SliceOutput(tokens, logprobs, outputs[-1].stopped, drafted=drafted)

    def _special_output(self, turn: _Turn, token: int) -> SliceOutput:
        logprobs: tuple[TokenLogprobs, ...] = ()
        if turn.logprobs is not None:
            logprobs = (TokenLogprobs(0.0, self._ranked(token, turn.logprobs)),)
        return SliceOutput((token,), logprobs, token in turn.ending)

    def _scores(self, turn: _Turn, scored: int, start: int, end: int) -> PromptScores | None:
        """Return the log probabilities of the prompt's tokens that follow the tokens [start, end): it is certain of them."""
        tokens = len(turn.prompt) // 4
        first, last = max(start + 1, scored), min(end + 1, tokens)
        if first >= last:
            return None
        turn.scored = last if last < tokens else None
        ranked = [self._ranked(token, turn.tops) for token in memoryview(turn.prompt).cast("I")[first:last]]
        return PromptScores(
            first,
            array("f", bytes(4 * len(ranked))),
            array("I", [1] * len(ranked)),
            array("I", [token for top in ranked for token, _ in top]),
            array("f", [logprob for top in ranked for _, logprob in top]),
        )

    def _ranked(self, token: int, most: int) -> tuple[tuple[int, float], ...]:
        """Return a token that is certain, with others to fill the list."""
        others = [other for other in self._allowed[: most + 1] if other != token]
        return ((token, 0.0), *((other, -100.0) for other in others))[:most]

    def _fill(self, turn: _Turn, start: int, end: int) -> None:
        """Write the blocks that tokens [start, end) touch: each names everything up to its last token."""
        size = self._block_tokens
        for index in range(start // size, (end - 1) // size + 1):
            covered = min((index + 1) * size, end)
            name = self._prefix_name(turn, covered)
            place = turn.table[index] * BLOCK_BYTES
            self._memory[place : place + BLOCK_BYTES] = (name << 32 | covered).to_bytes(NAME_BYTES, "little") * (
                BLOCK_BYTES // NAME_BYTES
            )

    @staticmethod
    def _prefix_name(turn: _Turn, covered: int) -> int:
        """Return a number that names the first `covered` tokens; generated ones follow from the prompt."""
        if covered * 4 > len(turn.prompt):
            return turn.digest
        if covered < turn.covered:
            turn.prefix = turn.covered = 0
        turn.prefix = zlib.crc32(memoryview(turn.prompt)[turn.covered * 4 : covered * 4], turn.prefix)
        turn.covered = covered
        return turn.prefix


def _hash(digest: int, position: int) -> int:
    """Return 32 bits that are a function of a prompt and a position: neighbouring positions give unrelated ones."""
    return (digest ^ position * 0x9E3779B1) * 0x85EBCA6B >> 7 & 0xFFFFFFFF


def profiled_fingerprint(model_dir: Path) -> str:
    """Return what names a checkpoint of which only config.json is read."""
    values = read_fields(model_dir / "config.json").values
    return f"profiled-{hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=12).hexdigest()}"


def stored_form(config: EngineConfig) -> StoredForm:
    """Return the stored form of this engine's blocks."""
    return StoredForm(
        STORED_BYTES[config.kv_format_stored], f"{config.kv_format_stored} of nothing, {config.block_tokens} tokens"
    )


@functools.lru_cache(maxsize=16)
def _special_token_ids(model_dir: Path) -> frozenset[int]:
    """Return what is no text: the special tokens of tokenizer.json, if there is such a file, and all ends that are named."""
    added = read_fields(model_dir / "tokenizer.json", needed=False).objects("added_tokens")
    found = {token.count("id", least=0) for token in added if token.flag("special", False)}
    ends = read_fields(model_dir / "generation_config.json", needed=False), read_config(model_dir)
    return frozenset(found).union(*[fields.token_ids("eos_token_id", COUNT_MAX) for fields in ends])
