"""How much memory a model will take, told from its header alone, and whether there is that much.

The engine allocates everything but the computed prompts that it keeps (``prefix_cache_mb``) when
it loads, so what does not fit can be refused before a byte is read. The formulas follow the
allocations of the pinned llama.cpp; tests hold them against the measured peak.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

import psutil

from ai4all.backend.base import Capabilities, EngineOptions, InferenceBackend, LoadedModel
from ai4all.backend.cores import cgroup_memory_available_mb
from ai4all.errors import InvalidModelFile, OutOfMemory
from ai4all.models.gguf import GGUFHeader, TensorInfo, read_header
from ai4all.types.model import ModelFile

__all__ = [
    "MemoryEstimate",
    "admit",
    "estimate_file",
    "estimate_memory",
    "free_memory",
    "load_model",
    "require_memory",
]

_MIB = 1024 * 1024

# Values of EngineOptions that the engine fills in.
_DEFAULT_CONTEXT = 4096
_DEFAULT_UBATCH = 512
_CONTEXT_STEP = 256

# Rows of logits that a step can ask for beside one for each slot: a draft.
_DRAFT_ROWS = 16
# Rows that one pass over the labels of a classification can ask for.
_SCORING_ROWS = 256

# What the parsed vocabulary keeps for each token and each merge: texts, two hash tables.
_BYTES_PER_VOCABULARY_ENTRY = 150
_BYTES_PER_TENSOR = 8 * 1024
"""Graph nodes and tensor descriptions of the two graphs that a context keeps."""
_FIXED_BYTES = 3 * _MIB

_KV_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}

# Weights of these types are copied into another layout where the CPU has the instructions.
_REPACKED = (
    ({"AVX2"}, {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}),
    ({"AVX512"}, {"Q2_K"}),
    ({"NEON", "DOTPROD"}, {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4", "Q8_0"}),
    ({"NEON", "MATMUL_INT8"}, {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q1_0"}),
    ({"AMX_INT8"}, {"Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}),
    ({"CPU_INTERLEAVED"}, {"Q4_1"}),
)
_WITHOUT_REPACK = ({"AMX_INT8"}, {"CPU_INTERLEAVED"})
_ROWS_TOGETHER = {"Q8_0": 4}
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a loaded model takes, in bytes.

    Attributes:
        weights_mapped: Weights used where they lie in the mapped file.
        weights_copied: Weights held in memory of their own: repacked ones, and all without mmap.
        weights_idle: Pages of the mapped file whose weights were copied; resident during the load,
            and after it until the system wants them back.
        kv_cache: The cache of all slots.
        compute: Buffers of the largest graph, and the scratch of its widest product.
        overhead: Vocabulary, graphs, rows of logits.
        device: What of all this a GPU holds; not part of the figures above.
        growth: What may come later: computed prompts that are kept, and the second context that
            classification uses.
    """

    weights_mapped: int
    weights_copied: int
    weights_idle: int
    kv_cache: int
    compute: int
    overhead: int
    device: int
    growth: int

    @property
    def needed(self) -> int:
        """What must stay in memory while the model runs."""
        held = self.weights_mapped + self.weights_copied
        return held + self.kv_cache + self.compute + self.overhead

    @property
    def peak(self) -> int:
        """The most that the process can show as resident: all of it, idle pages included.

        On Linux idle pages are given back after the load, and may come back with their neighbours.
        """
        return self.needed + self.weights_idle

    def __add__(self, other: MemoryEstimate) -> MemoryEstimate:
        """Of two models that are loaded together."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return MemoryEstimate(*(mine + its for mine, its in pairs))

    def to_dict(self) -> dict[str, int]:
        """The figures by name, in bytes."""
        return {**dataclasses.asdict(self), "needed": self.needed, "peak": self.peak}


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the figures are made of."""

    n_layers: int
    n_embd: int
    n_ff: int
    n_heads: int
    kv_width: int
    n_vocab: int
    n_merges: int
    n_ctx: int
    n_slots: int
    n_ubatch: int
    first_gpu_layer: int

    @property
    def n_outputs(self) -> int:
        return self.n_slots + _DRAFT_ROWS


def estimate_memory(
    header: GGUFHeader,
    options: EngineOptions,
    *,
    cpu_features: Collection[str] = (),
    has_gpu: bool = False,
) -> MemoryEstimate:
    """Estimate what ``options`` make of the model.

    Models with a sliding window or a recurrent state take less cache than this says.

    Args:
        header: Of the model's file.
        options: The shape to run it in.
        cpu_features: As the engine's build names them ("AVX2", "NEON", ...).
        has_gpu: Whether the engine has a GPU to offload to.
    """
    shape = _shape_of(header, options, has_gpu)
    repacked = _repacked_types(cpu_features)
    mapped = copied = idle = device = 0
    for tensor in header.tensors:
        if _is_offloaded(tensor, shape):
            device += tensor.size_bytes
            idle += tensor.size_bytes if options.use_mmap else 0
        elif not _is_repacked(tensor, repacked):
            mapped += tensor.size_bytes
        else:
            copied += tensor.size_bytes
            idle += tensor.size_bytes if options.use_mmap else 0
    tied = _tied_output(header, repacked)
    if tied is not None and shape.first_gpu_layer > shape.n_layers:
        copied += tied.size_bytes
    if not options.use_mmap:
        copied, mapped = copied + mapped, 0

    cell = shape.kv_width * _KV_BYTES.get(options.kv_type, 2.0)
    kv_cache = int(shape.n_layers * shape.n_slots * shape.n_ctx * cell)
    kv_offloaded = kv_cache * max(0, shape.n_layers - shape.first_gpu_layer) // shape.n_layers
    compute = _compute_bytes(shape, options)
    if shape.first_gpu_layer == 0:
        device += compute
        compute = 0
    scoring = (shape.n_ctx + _SCORING_ROWS) * cell * shape.n_layers
    scoring += 2 * _SCORING_ROWS * shape.n_vocab * 4
    return MemoryEstimate(
        weights_mapped=mapped,
        weights_copied=copied,
        weights_idle=idle,
        kv_cache=kv_cache - kv_offloaded,
        compute=compute,
        overhead=_overhead_bytes(shape, len(header.tensors)),
        device=device + kv_offloaded,
        growth=options.prefix_cache_mb * _MIB + int(scoring),
    )


def free_memory() -> int:
    """Bytes that can be had without swapping, within the limits of the control group."""
    free = int(psutil.virtual_memory().available)
    limit = cgroup_memory_available_mb()
    return free if limit is None else min(free, limit * _MIB)


def require_memory(
    estimate: MemoryEstimate, free: int, limit: int | None = None, device_free: int | None = None
) -> None:
    """Make sure that the model fits.

    Args:
        estimate: What it takes.
        free: Bytes that can be had.
        limit: Bytes that the owner allows a model, or None.
        device_free: Bytes free on the GPU, or None when there is none.

    Raises:
        OutOfMemory: It does not fit; message and details have the numbers.
    """
    details = {
        name: round(n_bytes / _MIB) for name, n_bytes in estimate.to_dict().items() if n_bytes
    } | {"free": free // _MIB, "unit": "MiB"}
    if limit is not None:
        details["limit"] = limit // _MIB
    parts = (
        f"{_mib(estimate.weights_mapped + estimate.weights_copied)} weights, "
        f"{_mib(estimate.kv_cache)} KV cache, {_mib(estimate.compute)} compute buffers, "
        f"{_mib(estimate.overhead)} vocabulary and graphs"
    )
    if limit is not None and estimate.peak > limit:
        more = f", {_mib(estimate.weights_idle)} idle pages" if estimate.weights_idle else ""
        raise OutOfMemory(
            f"the model takes {_mib(estimate.peak)} MiB ({parts}{more}), more than "
            f"engine.memory_limit_mb allows: {_mib(limit)} MiB",
            details,
        )
    if estimate.needed > free:
        raise OutOfMemory(
            f"the model needs {_mib(estimate.needed)} MiB ({parts}), but {_mib(free)} MiB are "
            "free; a smaller engine.context_length needs less",
            details,
        )
    if device_free is not None and estimate.device > device_free:
        raise OutOfMemory(
            f"the model needs {_mib(estimate.device)} MiB on the GPU, but {_mib(device_free)} MiB "
            "are free there; a smaller engine.gpu_layers needs less",
            details,
        )


def admit(
    model: ModelFile,
    options: EngineOptions,
    capabilities: Capabilities,
    replaces: LoadedModel | None = None,
) -> EngineOptions:
    """Make sure, before anything is loaded, that ``model`` fits. Reads its header; may block.

    Args:
        model: What shall be loaded.
        options: The shape to run it in.
        capabilities: Of the backend that shall load it.
        replaces: The model that is dropped first; its memory counts as free.

    Returns:
        ``options``, with a ``prefix_cache_mb`` that fits into what is left.

    Raises:
        OutOfMemory: It does not fit.
        InvalidModelFile: It is not one that may be loaded.
    """
    try:
        estimate = _estimate(model, options, capabilities)
    except InvalidModelFile as error:
        if isinstance(error.__cause__, OSError):
            # A file that cannot be read at all is the loader's to complain of.
            return options
        # It was checked when it came. By now the check may know better.
        raise
    free, device_free = free_memory(), None
    gpu = next((d for d in capabilities.devices if d.kind in ("gpu", "igpu")), None)
    if gpu is not None and options.gpu_layers != 0:
        device_free = gpu.memory_free_mb * _MIB
    if replaces is not None:
        held = dataclasses.replace(options, n_ctx=replaces.n_ctx, draft=replaces.draft)
        before = estimate_file(replaces.file, held, capabilities)
        if before is not None:
            free += before.needed
            device_free = None if device_free is None else device_free + before.device
    limit = options.memory_limit_mb * _MIB if options.memory_limit_mb else None
    require_memory(estimate, free, limit, device_free)
    room = free - estimate.needed
    if limit is not None:
        room = min(room, limit - estimate.peak)
    return dataclasses.replace(
        options, prefix_cache_mb=max(0, min(options.prefix_cache_mb, room // _MIB))
    )


async def load_model(
    backend: InferenceBackend,
    model: ModelFile,
    options: EngineOptions,
    progress: Callable[[float], None] | None = None,
) -> LoadedModel:
    """``InferenceBackend.load``, once it is clear that the model fits.

    Raises:
        OutOfMemory: It does not; whatever was loaded before stays.
        InvalidModelFile: Its file is not one that may be loaded.
        ComputeError: The load failed.
    """
    options = await asyncio.to_thread(admit, model, options, backend.capabilities(), backend.loaded)
    return await backend.load(model, options, progress)


def estimate_file(
    model: ModelFile, options: EngineOptions, capabilities: Capabilities
) -> MemoryEstimate | None:
    """``estimate_memory`` of a model as a backend would run it, with its draft model if it has one.

    None when a file cannot be read.
    """
    try:
        return _estimate(model, options, capabilities)
    except InvalidModelFile:
        return None


def _estimate(
    model: ModelFile, options: EngineOptions, capabilities: Capabilities
) -> MemoryEstimate:
    features = capabilities.build_info.get("cpu_features", ())
    has_gpu = any(device.kind in ("gpu", "igpu") for device in capabilities.devices)
    header = read_header(model.path)
    estimate = estimate_memory(header, options, cpu_features=features, has_gpu=has_gpu)
    if options.draft is None:
        return estimate
    # As the engine runs it: the same context and slots, on the GPU as a whole or not at all.
    beside = dataclasses.replace(
        options,
        n_ctx=_shape_of(header, options, has_gpu).n_ctx,
        gpu_layers=-1 if options.gpu_layers else 0,
        prefix_cache_mb=0,
    )
    draft = estimate_memory(
        read_header(options.draft.path), beside, cpu_features=features, has_gpu=has_gpu
    )
    # It keeps no prompts and scores nothing.
    return estimate + dataclasses.replace(draft, growth=0)


def _shape_of(header: GGUFHeader, options: EngineOptions, has_gpu: bool) -> _Shape:
    n_slots = max(1, options.n_slots)
    n_train = header.context_length or _DEFAULT_CONTEXT
    n_ctx = options.n_ctx or min(n_train, _DEFAULT_CONTEXT)
    # Padded as a whole first, then for each slot.
    n_ctx = _padded(_padded(n_ctx * n_slots) // n_slots)
    n_layers = header.block_count
    n_embd = header.embedding_length
    n_heads = _largest(header, "attention.head_count", 1)
    n_kv_heads = _largest(header, "attention.head_count_kv", n_heads)
    head = n_embd // max(1, n_heads)
    k_head = _largest(header, "attention.key_length", head)
    v_head = _largest(header, "attention.value_length", head)
    active_experts = _largest(header, "expert_used_count", 0)
    n_ff = _largest(header, "feed_forward_length", 4 * n_embd)
    if active_experts:
        n_ff = max(n_ff, active_experts * _largest(header, "expert_feed_forward_length", n_ff))
    n_gpu = n_layers + 1 if options.gpu_layers < 0 else options.gpu_layers
    return _Shape(
        n_layers=n_layers,
        n_embd=n_embd,
        n_ff=n_ff,
        n_heads=n_heads,
        kv_width=n_kv_heads * (k_head + v_head),
        n_vocab=header.vocabulary_size,
        n_merges=_length_of(header, "tokenizer.ggml.merges"),
        n_ctx=n_ctx,
        n_slots=n_slots,
        n_ubatch=min(options.n_ubatch or _DEFAULT_UBATCH, max(options.n_batch, n_slots)),
        # The last layers go first; the output counts as one more.
        first_gpu_layer=max(0, n_layers + 1 - n_gpu) if has_gpu and n_gpu else n_layers + 1,
    )


def _compute_bytes(shape: _Shape, options: EngineOptions) -> int:
    """The stage of a layer that keeps the most alive: feed-forward, attention, or the logits."""
    tokens = min(shape.n_ubatch, shape.n_ctx * shape.n_slots)
    flash = options.flash_attention != "off" or options.kv_type.startswith("q")
    feed_forward = tokens * (3 * shape.n_ff + 4 * shape.n_embd)
    attention = tokens * 6 * shape.n_embd
    if not flash:
        attention += tokens * shape.n_heads * shape.n_ctx
    logits = shape.n_outputs * shape.n_vocab + tokens * shape.n_embd
    mask = tokens * shape.n_ctx * (2 if flash else 4)
    # Rows of the other operand are converted for the product, to 8 bits at least.
    scratch = tokens * max(shape.n_ff, shape.n_embd) * 34 // 32
    return 4 * max(feed_forward, attention, logits) + mask + scratch


def _overhead_bytes(shape: _Shape, n_tensors: int) -> int:
    vocabulary = (shape.n_vocab + shape.n_merges) * _BYTES_PER_VOCABULARY_ENTRY
    # Rows of logits, and each slot's list of candidates with their probabilities.
    rows = shape.n_outputs * shape.n_vocab * 4 + shape.n_slots * shape.n_vocab * 12
    return _FIXED_BYTES + vocabulary + rows + n_tensors * _BYTES_PER_TENSOR


def _repacked_types(cpu_features: Collection[str]) -> frozenset[str]:
    features = set(cpu_features)
    types: set[str] = set()
    for needed, found in _REPACKED:
        if needed <= features and ("REPACK" in features or needed in _WITHOUT_REPACK):
            types |= found
    return frozenset(types)


def _is_repacked(tensor: TensorInfo, types: frozenset[str]) -> bool:
    # The token embedding is looked up by row, which only the layout of the file allows.
    if tensor.name.startswith("token_embd.") or len(tensor.dims) < 2:
        return False
    return _can_repack(tensor, types)


def _can_repack(tensor: TensorInfo, types: frozenset[str]) -> bool:
    rows = _ROWS_TOGETHER.get(tensor.type_name, 8)
    return tensor.type_name in types and tensor.dims[1] % rows == 0


def _tied_output(header: GGUFHeader, types: frozenset[str]) -> TensorInfo | None:
    """The token embedding, when it is copied to serve as the output, too."""
    by_name = {tensor.name: tensor for tensor in header.tensors}
    embedding = by_name.get("token_embd.weight")
    if embedding is None or "output.weight" in by_name or len(embedding.dims) < 2:
        return None
    return embedding if _can_repack(embedding, types) else None


def _is_offloaded(tensor: TensorInfo, shape: _Shape) -> bool:
    if tensor.name.startswith("token_embd."):
        return False
    block = _BLOCK.match(tensor.name)
    layer = int(block.group(1)) if block is not None else shape.n_layers
    return layer >= shape.first_gpu_layer


def _largest(header: GGUFHeader, key: str, default: int) -> int:
    value = header.metadata.get(f"{header.architecture}.{key}")
    if isinstance(value, tuple):
        value = max((item for item in value if isinstance(item, int)), default=default)
    return value if isinstance(value, int) and value > 0 else default


def _length_of(header: GGUFHeader, key: str) -> int:
    value = header.metadata.get(key)
    if isinstance(value, tuple):
        return len(value)
    return int(getattr(value, "length", 0))


def _padded(n_tokens: int) -> int:
    return n_tokens + -n_tokens % _CONTEXT_STEP


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / _MIB:,.0f}"
