from typing import Any, final

LOAD_PROGRESS: int
LOADED: int
UNLOADED: int
PROMPT_PROGRESS: int
TOKEN: int
FINISHED: int
EMBEDDED: int
SCORED: int
FAILED: int

STOP_LENGTH: int
STOP_STOP: int

ERROR_NAMES: tuple[str, ...]

class EngineFault(Exception): ...

@final
class Floats:
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Engine:
    def __init__(self, queue_capacity: int = ...) -> None: ...
    def load(
        self,
        path: bytes,
        *,
        n_ctx: int,
        n_batch: int,
        n_ubatch: int,
        n_slots: int,
        n_threads: int,
        n_threads_batch: int,
        n_gpu_layers: int,
        flash_attention: int,
        kv_type: str,
        use_mmap: bool,
        prefix_cache_bytes: int,
        draft_path: bytes = ...,
        draft_tokens: int = ...,
        devices: tuple[bytes, ...] = ...,
    ) -> int: ...
    def unload(self) -> int: ...
    def generate(
        self,
        prompt: bytes,
        *,
        system_prompt: bytes | None = ...,
        max_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        seed: int,
        stop: tuple[bytes, ...],
        ignore_eos: bool,
        deterministic: bool,
        grammar: bytes,
        json_schema: bytes,
        logprobs: int,
        reuse_prefix: bool,
        speculate: bool,
        deadline_ns: int,
    ) -> int: ...
    def embed(self, texts: tuple[bytes, ...], *, normalize: bool, deadline_ns: int) -> int: ...
    def score(
        self,
        prompt: bytes,
        *,
        system_prompt: bytes | None = ...,
        continuations: tuple[bytes, ...],
        deadline_ns: int,
    ) -> int: ...
    def cancel(self, command: int) -> None: ...
    def fileno(self) -> int: ...
    def drain(self) -> list[tuple[Any, ...]]: ...
    def model(self) -> dict[str, Any] | None: ...
    def close(self) -> None: ...

@final
class Channel:
    def __init__(
        self, engine: Engine, descriptor: int, *, tick_ns: int, log_level: int
    ) -> None: ...
    def fileno(self) -> int: ...
    def take(self) -> tuple[list[bytes], bool]: ...
    def send(self, content: bytes, n_served: int = ...) -> None: ...
    def served(self, n_frames: int) -> None: ...
    def close(self) -> None: ...

def quantize(source: bytes, target: bytes, *, type: str, threads: int) -> None: ...  # noqa: A002
def build_info() -> dict[str, Any]: ...
def devices() -> list[dict[str, Any]]: ...
def drain_log() -> list[tuple[int, str]]: ...
def now_ns() -> int: ...
def pulse() -> int: ...
