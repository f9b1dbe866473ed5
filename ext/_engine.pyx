# distutils: language = c++
"""The door to native code: casts, the error map, and the GIL let go. No logic lives here.

Only ``ai4all.backend.native`` imports this module. Import and construction have no process-wide
effects but one: llama.cpp's log lines go to a ring instead of standard error.
"""

import os
import warnings

cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint64_t
from libcpp.string cimport string
from libcpp.vector cimport vector

cimport engine as native

LOAD_PROGRESS = <int> native.event_kind.load_progress
LOADED = <int> native.event_kind.loaded
UNLOADED = <int> native.event_kind.unloaded
PROMPT_PROGRESS = <int> native.event_kind.prompt_progress
TOKEN = <int> native.event_kind.token
FINISHED = <int> native.event_kind.finished
EMBEDDED = <int> native.event_kind.embedded
SCORED = <int> native.event_kind.scored
FAILED = <int> native.event_kind.failed

STOP_LENGTH = <int> native.stop_reason.length
STOP_STOP = <int> native.stop_reason.stop

ERROR_NAMES = tuple(
    (<bytes> native.errc_name(<native.errc> code)).decode()
    for code in range(<int> native.errc.end)
)


class EngineFault(Exception):
    """An engine call failed: ``args`` are the numeric code and the message."""


# The C++ side keeps a borrowed pointer; the module keeps the class alive, and this pins it.
Py_INCREF(EngineFault)
native.ai4all_fault_class = <PyObject *> EngineFault


cdef inline str text_of(const string & value):
    # Texts of tokens are whole UTF-8 by construction; messages may quote anything.
    return PyUnicode_DecodeUTF8(value.data(), value.size(), b"replace")


cdef tuple times_of(const native.timeline & times):
    return (
        times.submitted,
        times.model_ready,
        times.admitted,
        times.prompt_done,
        times.first_token,
        times.last_token,
        times.finished,
    )


@cython.final
cdef class Floats:
    """Float32 values that native code made, as a buffer; nothing is copied."""

    cdef vector[float] _values
    cdef Py_ssize_t _shape[1]
    cdef Py_ssize_t _strides[1]

    def __getbuffer__(self, Py_buffer * buffer, int flags):
        self._shape[0] = <Py_ssize_t> self._values.size()
        self._strides[0] = sizeof(float)
        buffer.buf = <void *> self._values.data()
        buffer.obj = self
        buffer.len = self._shape[0] * <Py_ssize_t> sizeof(float)
        buffer.itemsize = sizeof(float)
        buffer.readonly = 0
        buffer.ndim = 1
        buffer.format = b"f"
        buffer.shape = self._shape
        buffer.strides = self._strides
        buffer.suboffsets = NULL
        buffer.internal = NULL

    def __len__(self):
        return self._values.size()


cdef Floats floats_of(native.event & event):
    cdef Floats floats = Floats.__new__(Floats)
    floats._values.swap(event.floats)
    return floats


cdef tuple event_of(native.event & event):
    cdef int kind = <int> event.kind
    if event.kind == native.event_kind.token:
        if event.logprobs.empty():
            return (kind, event.id, text_of(event.text), event.token, event.n_tokens, ())
        return (
            kind,
            event.id,
            text_of(event.text),
            event.token,
            event.n_tokens,
            tuple([(p.token, text_of(p.text), p.logprob) for p in event.logprobs]),
        )
    if event.kind == native.event_kind.prompt_progress:
        return (kind, event.id, event.n_prompt_done, event.n_prompt)
    if event.kind == native.event_kind.finished:
        return (
            kind,
            event.id,
            text_of(event.text),
            <int> event.reason,
            event.n_prompt,
            event.n_tokens,
            event.n_reused,
            event.n_neighbours,
            event.n_drafted,
            event.n_draft_right,
            event.n_by_model,
            times_of(event.times),
        )
    if event.kind == native.event_kind.failed:
        return (
            kind,
            event.id,
            <int> event.code,
            text_of(event.text),
            event.n_prompt,
            event.n_tokens,
            times_of(event.times),
        )
    if event.kind == native.event_kind.embedded or event.kind == native.event_kind.scored:
        return (
            kind,
            event.id,
            floats_of(event),
            tuple(event.counts),
            event.n_prompt,
            times_of(event.times),
        )
    if event.kind == native.event_kind.load_progress:
        return (kind, event.id, event.progress)
    return (kind, event.id, times_of(event.times))


@cython.final
cdef class Engine:
    """One native engine: a thread with a model and its slots."""

    cdef native.engine * _engine
    cdef vector[native.event] _events
    cdef int _pid
    cdef bint _closed

    def __cinit__(self, size_t queue_capacity=1024):
        self._closed = True
        self._pid = os.getpid()
        self._engine = new native.engine(queue_capacity)
        self._closed = False

    def __dealloc__(self):
        if self._engine is NULL or self._pid != os.getpid():
            # After a fork the thread is not in this process: nothing can be joined.
            return
        if not self._closed:
            warnings.warn("an Engine was not closed", ResourceWarning, stacklevel=1)
        with nogil:
            del self._engine

    cdef int _check(self) except -1:
        if self._pid != os.getpid():
            raise RuntimeError("an Engine cannot be used after a fork")
        return 0

    def load(
        self,
        bytes path,
        *,
        unsigned int n_ctx,
        unsigned int n_batch,
        unsigned int n_ubatch,
        unsigned int n_slots,
        int n_threads,
        int n_threads_batch,
        int n_gpu_layers,
        int flash_attention,
        str kv_type,
        bint use_mmap,
        uint64_t prefix_cache_bytes,
        bytes draft_path=b"",
        unsigned int draft_tokens=0,
        tuple devices=(),
    ):
        """Queue a load and return its id."""
        self._check()
        cdef native.load_params params
        params.path = path
        params.n_ctx = n_ctx
        params.n_batch = n_batch
        params.n_ubatch = n_ubatch
        params.n_slots = n_slots
        params.n_threads = n_threads
        params.n_threads_batch = n_threads_batch
        params.n_gpu_layers = n_gpu_layers
        params.flash_attention = flash_attention
        params.kv_type = kv_type.encode()
        params.use_mmap = use_mmap
        params.prefix_cache_bytes = prefix_cache_bytes
        params.draft_path = draft_path
        params.draft_tokens = draft_tokens
        for device in devices:
            params.devices.push_back(<string> (<bytes> device))
        cdef uint64_t command
        with nogil:
            command = self._engine.load(params)
        return command

    def unload(self):
        """Queue an unload and return its id."""
        self._check()
        cdef uint64_t command
        with nogil:
            command = self._engine.unload()
        return command

    def generate(
        self,
        bytes prompt,
        *,
        bytes system_prompt=None,
        int max_tokens,
        float temperature,
        int top_k,
        float top_p,
        float min_p,
        float repetition_penalty,
        unsigned int seed,
        tuple stop,
        bint ignore_eos,
        bint deterministic,
        bytes grammar,
        bytes json_schema,
        int logprobs,
        bint reuse_prefix,
        bint speculate,
        int64_t deadline_ns,
    ):
        """Queue a generation and return its id."""
        self._check()
        cdef native.generate_params params
        params.prompt = prompt
        if system_prompt is not None:
            params.chat = True
            params.system_prompt = system_prompt
        params.max_tokens = max_tokens
        params.temperature = temperature
        params.top_k = top_k
        params.top_p = top_p
        params.min_p = min_p
        params.repetition_penalty = repetition_penalty
        params.seed = seed
        for text in stop:
            params.stop.push_back(<string> (<bytes> text))
        params.ignore_eos = ignore_eos
        params.deterministic = deterministic
        params.grammar = grammar
        params.json_schema = json_schema
        params.logprobs = logprobs
        params.reuse_prefix = reuse_prefix
        params.speculate = speculate
        params.deadline_ns = deadline_ns
        cdef uint64_t command
        with nogil:
            command = self._engine.generate(params)
        return command

    def embed(self, tuple texts, *, bint normalize, int64_t deadline_ns):
        """Queue an embedding and return its id."""
        self._check()
        cdef native.embed_params params
        for text in texts:
            params.texts.push_back(<string> (<bytes> text))
        params.normalize = normalize
        params.deadline_ns = deadline_ns
        cdef uint64_t command
        with nogil:
            command = self._engine.embed(params)
        return command

    def score(
        self,
        bytes prompt,
        *,
        bytes system_prompt=None,
        tuple continuations,
        int64_t deadline_ns,
    ):
        """Queue the scoring of continuations and return its id."""
        self._check()
        cdef native.score_params params
        params.prompt = prompt
        if system_prompt is not None:
            params.chat = True
            params.system_prompt = system_prompt
        for text in continuations:
            params.continuations.push_back(<string> (<bytes> text))
        params.deadline_ns = deadline_ns
        cdef uint64_t command
        with nogil:
            command = self._engine.score(params)
        return command

    def cancel(self, uint64_t command):
        """End a command early; an unknown or ended one is ignored."""
        self._check()
        with nogil:
            self._engine.cancel(command)

    def fileno(self):
        """The descriptor that becomes readable when there are events."""
        return self._engine.fd()

    def drain(self):
        """Clear the descriptor and return all events, oldest first, as tuples."""
        self._check()
        with nogil:
            self._engine.drain(self._events)
        cdef list events = []
        cdef size_t i
        for i in range(self._events.size()):
            events.append(event_of(self._events[i]))
        self._events.clear()
        return events

    def model(self):
        """The loaded model's figures as a dict, or None."""
        self._check()
        if not self._engine.has_model():
            return None
        cdef native.model_info info
        with nogil:
            info = self._engine.model()
        return {
            "description": text_of(info.description),
            "device": text_of(info.device),
            "placement": [
                {
                    "device": text_of(share.device),
                    "n_layers": share.n_layers,
                    "weights": share.weights,
                    "context": share.context,
                    "compute": share.compute,
                }
                for share in info.placement
            ],
            "n_ctx": info.n_ctx,
            "n_ctx_train": info.n_ctx_train,
            "n_batch": info.n_batch,
            "n_ubatch": info.n_ubatch,
            "n_slots": info.n_slots,
            "n_vocab": info.n_vocab,
            "n_embd": info.n_embd,
            "n_threads": info.n_threads,
            "n_threads_batch": info.n_threads_batch,
            "n_params": info.n_params,
            "size_bytes": info.size_bytes,
            "has_chat_template": info.has_chat_template,
            "metadata": {text_of(entry.first): text_of(entry.second) for entry in info.metadata},
        }

    def close(self):
        """Stop the thread. What was pending ends in events that a last drain returns."""
        self._check()
        self._closed = True
        with nogil:
            self._engine.stop()


@cython.final
@cython.no_gc_clear  # the engine outlives it
cdef class Channel:
    """Serves an engine's generations over a socket, from threads of its own."""

    cdef native.channel * _channel
    cdef Engine _engine
    cdef int _pid

    def __cinit__(self, Engine engine, int descriptor, *, int64_t tick_ns, int log_level):
        engine._check()
        cdef native.channel_options options
        options.tick_ns = tick_ns
        options.log_level = log_level
        self._pid = os.getpid()
        self._engine = engine
        self._channel = new native.channel(engine._engine[0], descriptor, options)

    def __dealloc__(self):
        if self._channel is NULL or self._pid != os.getpid():
            return
        with nogil:
            del self._channel

    def fileno(self):
        """The descriptor that becomes readable when there is something to take."""
        return self._channel.fd()

    def take(self):
        """The frames that are the caller's to serve, as bytes, and whether more can come."""
        cdef vector[string] frames
        cdef bint is_open
        with nogil:
            is_open = self._channel.take(frames)
        return [<bytes> frame for frame in frames], is_open

    def send(self, bytes content, size_t n_served=0):
        """Send one frame, which answers so many of the loads and unloads that were taken."""
        cdef string copy = content
        with nogil:
            self._channel.send(copy, n_served)

    def served(self, size_t n_frames):
        """Tell that so many of them have been served without an answer."""
        with nogil:
            self._channel.served(n_frames)

    def close(self):
        """Send what is left, for at most a second, and end the thread."""
        with nogil:
            self._channel.close()


def quantize(bytes source, bytes target, *, str type, int threads):
    """Re-encode a model file; blocks until done, without the GIL."""
    cdef string from_path = source
    cdef string to_path = target
    cdef string name = type.encode()
    with nogil:
        native.quantize(from_path, to_path, name, threads)


def build_info():
    """How the extension was built, as a dict."""
    cdef native.build_info info
    with nogil:
        info = native.get_build_info()
    return {
        "llama_commit": text_of(info.llama_commit),
        "ggml_version": text_of(info.ggml_version),
        "compiler": text_of(info.compiler),
        "build_type": text_of(info.build_type),
        "sanitize": text_of(info.sanitize),
        "backends": [text_of(name) for name in info.backends],
        "cpu_features": [text_of(name) for name in info.cpu_features],
        "cpu_variant": text_of(info.cpu_variant),
        "not_loaded": {text_of(entry.first): text_of(entry.second) for entry in info.not_loaded},
    }


def devices():
    """The compute devices the build can see, as dicts; memory in bytes."""
    cdef vector[native.device_info] found
    with nogil:
        found = native.get_devices()
    return [
        {
            "name": text_of(device.name),
            "description": text_of(device.description),
            "kind": text_of(device.kind),
            "backend": text_of(device.backend),
            "id": text_of(device.id),
            "memory_total": device.memory_total,
            "memory_free": device.memory_free,
        }
        for device in found
    ]


def drain_log():
    """Lines llama.cpp logged since the last call: (level, text), level 1 debug to 4 error."""
    cdef vector[native.log_line] lines
    with nogil:
        lines = native.drain_log()
    return [(line.level, text_of(line.text)) for line in lines]


def now_ns():
    """The engine's steady clock, in nanoseconds."""
    return native.now_ns()


def pulse():
    """A count that only moves while an engine of this process really computes."""
    return native.pulse()
