"""How much memory a model will take, told from its header alone.

The engine allocates everything but the computed prompts that it keeps (``prefix_cache_mb``) when
it loads. The formulas follow the allocations of the pinned llama.cpp; tests hold them against the
measured peak.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass

from ai4all.backend.base import EngineOptions
from ai4all.models.gguf import GGUFHeader, TensorInfo

__all__ = ["MemoryEstimate", "estimate_memory", "layers_of"]

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
        device_weights: Weights that GPUs hold; not part of the figures above, nor are the next two.
        device_kv: Caches of their layers.
        device_compute: Buffers of the largest graph on one GPU.
        growth: What may come later: computed prompts that are kept, and the second context that
            classification uses.
    """

    weights_mapped: int
    weights_copied: int
    weights_idle: int
    kv_cache: int
    compute: int
    overhead: int
    device_weights: int
    device_kv: int
    device_compute: int
    growth: int

    @property
    def device(self) -> int:
        """What one GPU holds when there is one."""
        return self.device_weights + self.device_kv + self.device_compute

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
        sums = {"needed": self.needed, "peak": self.peak, "device": self.device}
        return {**dataclasses.asdict(self), **sums}


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

    @property
    def n_offloaded(self) -> int:
        return max(0, self.n_layers - self.first_gpu_layer)

    @property
    def offloads_output(self) -> bool:
        return self.first_gpu_layer <= self.n_layers


def estimate_memory(
    header: GGUFHeader,
    options: EngineOptions,
    *,
    draft: GGUFHeader | None = None,
    cpu_features: Collection[str] = (),
    has_gpu: bool = False,
) -> MemoryEstimate:
    """Estimate what ``options`` make of the model, and of its draft model if it has one.

    Models with a sliding window or a recurrent state take less cache than this says.

    Args:
        header: Of the model's file.
        options: The shape to run it in.
        draft: Of the draft model's file.
        cpu_features: As the engine's build names them ("AVX2", "NEON", ...).
        has_gpu: Whether the engine has a GPU to offload to.
    """
    repacked = _repacked_types(cpu_features)
    shape = _shape_of(header, options, has_gpu)
    estimate = _estimate(header, options, shape, repacked)
    if draft is None:
        return estimate
    # As the engine runs it: the same context and slots, on the GPU as a whole or not at all.
    beside = dataclasses.replace(
        options, n_ctx=shape.n_ctx, gpu_layers=-1 if options.gpu_layers else 0, prefix_cache_mb=0
    )
    its = _estimate(draft, beside, _shape_of(draft, beside, has_gpu), repacked)
    # It keeps no prompts and scores nothing.
    return estimate + dataclasses.replace(its, growth=0)


def layers_of(header: GGUFHeader) -> int:
    """Layers that can be offloaded: the model's own, and the output."""
    return header.block_count + 1


def _estimate(
    header: GGUFHeader, options: EngineOptions, shape: _Shape, repacked: frozenset[str]
) -> MemoryEstimate:
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
    tied = _tied_output(header)
    if tied is not None and shape.offloads_output:
        device += tied.size_bytes
    elif tied is not None and _can_repack(tied, repacked):
        copied += tied.size_bytes
    if not options.use_mmap:
        copied, mapped = copied + mapped, 0

    cell = shape.kv_width * _KV_BYTES.get(options.kv_type, 2.0)
    kv_cache = int(shape.n_layers * shape.n_slots * shape.n_ctx * cell)
    kv_offloaded = kv_cache * shape.n_offloaded // max(1, shape.n_layers)
    compute = _compute_bytes(shape, options)
    scoring = (shape.n_ctx + _SCORING_ROWS) * cell * shape.n_layers
    scoring += 2 * _SCORING_ROWS * shape.n_vocab * 4
    return MemoryEstimate(
        weights_mapped=mapped,
        weights_copied=copied,
        weights_idle=idle,
        kv_cache=kv_cache - kv_offloaded,
        compute=0 if shape.first_gpu_layer == 0 else compute,
        overhead=_overhead_bytes(shape, len(header.tensors)),
        device_weights=device,
        device_kv=kv_offloaded,
        device_compute=compute if shape.offloads_output else 0,
        growth=options.prefix_cache_mb * _MIB + int(scoring),
    )


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


def _tied_output(header: GGUFHeader) -> TensorInfo | None:
    """The token embedding, when it serves as the output, too."""
    by_name = {tensor.name: tensor for tensor in header.tensors}
    embedding = by_name.get("token_embd.weight")
    if embedding is None or "output.weight" in by_name or len(embedding.dims) < 2:
        return None
    return embedding


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
