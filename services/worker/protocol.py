"""The step protocol between a worker's front and one of its engine processes.

Commands go to the engine, one `Step` comes back for each step that changed anything: never one
message a token. Frames are a little-endian uint32 length and one msgpack value; they are decoded into
these types and nothing else, so a broken peer cannot make objects of its own choosing.

This module knows neither gRPC nor torch: it also runs where those are missing.
"""

from __future__ import annotations

import msgspec

FRAME_BYTES_MAX = 64 * 1024 * 1024
"""The longest frame; a longer one is a defect and ends the engine."""


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is drawn. Every field has its meaning from `loom.inference.v1`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: dict[int, float] = {}
    logprobs: int = -1
    """-1: none; n: the drawn token's log probability and the n most likely ones."""


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """A sequence to run. `output` holds tokens that another worker already drew."""

    id: str
    prompt: list[int]
    output: list[int]
    max_new_tokens: int
    min_new_tokens: int
    stop_token_ids: list[int]
    sampling: Sampling
    priority: int = 2
    prefix_root: bytes = b""
    """Only sequences of the same root share cached blocks: `tokenloom.contract.prefix.root_hash`."""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Forget a sequence; its blocks are free before the next step. No answer follows."""

    id: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """End the process."""


Command = Submit | Cancel | Shutdown


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural log probabilities at one position, of the raw logits."""

    chosen: float
    top_ids: list[int]
    top: list[float]


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step gave one sequence."""

    id: str
    tokens: list[int]
    index: int
    """Position of tokens[0] in the whole output, resumed tokens counted."""
    logprobs: list[TokenLogprobs] = []
    finish: str = ""
    """"", "stop", "length", or "error" when the engine cannot run the sequence at all."""
    error: str = ""
    """Why, in one line, when `finish` is "error"."""
    stop_token_id: int = -1
    cached_prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    waiting_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    steps: int = 0
    preemptions: int = 0


class Load(msgspec.Struct, frozen=True):
    """What the engine can take, after a step."""

    running: int
    waiting: int
    free_sequences: int
    free_blocks: int
    queued_prefill_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    cached_blocks: int = 0
    """Blocks whose content can be found by a prompt, held or free; the latter count as free."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded and warm."""

    context_length: int
    vocab_size: int
    sequences_max: int
    total_blocks: int
    block_tokens: int
    memory_bytes: int
    device: str
    dtype: str
    step_tokens_max: int
    """Tokens that one step may compute, prompts and decodes together."""


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Loading goes on. `fraction` is 0 to 1."""

    stage: str
    fraction: float


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot go on and ends. `reason` is a name of loom.errors.v1.ErrorReason."""

    reason: str
    message: str
    metadata: dict[str, str] = {}


class Step(msgspec.Struct, frozen=True, tag="step", omit_defaults=True):
    """One step's results. Also sent without outputs when only the load changed."""

    outputs: list[Output]
    load: Load
    step_ns: int = 0
    step_tokens: int = 0
    prefixes_stored: list[int] = []
    """Prefixes of 512, 1,024, … tokens that can be found since the last message: their wire hashes of
    `tokenloom.contract.prefix`."""
    prefixes_evicted: list[int] = []
    """Those that no longer can. A new engine's cache is empty."""


Event = Ready | Progress | Failed | Step

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode(message: Command | Event) -> bytes:
    """One frame: length and body."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "little") + body


def decode_command(body: bytes) -> Command:
    """Raises msgspec.ValidationError or DecodeError for anything else."""
    return _commands.decode(body)


def decode_event(body: bytes) -> Event:
    """Raises msgspec.ValidationError or DecodeError for anything else."""
    return _events.decode(body)


class FrameReader:
    """Cuts a byte stream into frames: feed it bytes, take whole bodies out."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies completed by `data`. Raises ValueError for a frame over FRAME_BYTES_MAX."""
        self._buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= 4:
            size = int.from_bytes(self._buffer[start : start + 4], "little")
            if size > FRAME_BYTES_MAX:
                raise ValueError(f"frame of {size} bytes; the limit is {FRAME_BYTES_MAX}")
            if len(self._buffer) - start - 4 < size:
                break
            bodies.append(bytes(self._buffer[start + 4 : start + 4 + size]))
            start += 4 + size
        del self._buffer[:start]
        return bodies
