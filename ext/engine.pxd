# engine/engine.h, as far as the extension uses it.

from cpython.object cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.pair cimport pair
from libcpp.string cimport string
from libcpp.vector cimport vector


cdef extern from *:
    """
    #include "engine.h"

    // The Python class that carries an engine_error; set when the module is made.
    static PyObject * ai4all_fault_class = nullptr;

    // Called by Cython, with the GIL, while a C++ exception is in flight.
    static void ai4all_raise_fault() {
        try {
            throw;
        } catch (const ai4all::engine_error & error) {
            const int  code      = static_cast<int>(error.code());
            PyObject * arguments = Py_BuildValue("(is)", code, error.what());
            if (arguments) {
                PyErr_SetObject(ai4all_fault_class, arguments);
                Py_DECREF(arguments);
            }
        } catch (const std::bad_alloc &) {
            PyErr_NoMemory();
        } catch (const std::exception & error) {
            PyErr_SetString(PyExc_RuntimeError, error.what());
        }
    }
    """
    void ai4all_raise_fault()
    PyObject * ai4all_fault_class


cdef extern from "engine.h" namespace "ai4all" nogil:
    cdef enum class errc(int32_t):
        ok
        end

    const char * errc_name(errc code)

    cdef cppclass load_params:
        string path
        uint32_t n_ctx
        uint32_t n_batch
        uint32_t n_ubatch
        uint32_t n_slots
        int32_t n_threads
        int32_t n_threads_batch
        int32_t n_gpu_layers
        int32_t flash_attention
        string kv_type
        cbool use_mmap
        uint64_t prefix_cache_bytes
        string draft_path
        uint32_t draft_tokens
        vector[string] devices

    cdef cppclass device_share:
        string device
        int32_t n_layers
        uint64_t weights
        uint64_t context
        uint64_t compute

    cdef cppclass model_info:
        string path
        string description
        string device
        vector[device_share] placement
        uint32_t n_ctx
        uint32_t n_ctx_train
        uint32_t n_batch
        uint32_t n_ubatch
        uint32_t n_slots
        int32_t n_vocab
        int32_t n_embd
        int32_t n_threads
        int32_t n_threads_batch
        uint64_t n_params
        uint64_t size_bytes
        cbool has_chat_template
        vector[pair[string, string]] metadata

    cdef cppclass generate_params:
        string prompt
        string system_prompt
        cbool chat
        int32_t max_tokens
        float temperature
        int32_t top_k
        float top_p
        float min_p
        float repetition_penalty
        uint32_t seed
        vector[string] stop
        cbool ignore_eos
        cbool deterministic
        string grammar
        string json_schema
        int32_t logprobs
        cbool reuse_prefix
        cbool speculate
        int64_t deadline_ns

    cdef cppclass embed_params:
        vector[string] texts
        cbool normalize
        int64_t deadline_ns

    cdef cppclass score_params:
        string prompt
        string system_prompt
        cbool chat
        vector[string] continuations
        int64_t deadline_ns

    cdef cppclass timeline:
        int64_t submitted
        int64_t model_ready
        int64_t admitted
        int64_t prompt_done
        int64_t first_token
        int64_t last_token
        int64_t finished

    cdef enum class event_kind(int32_t):
        load_progress
        loaded
        unloaded
        prompt_progress
        token
        finished
        embedded
        scored
        failed

    cdef enum class stop_reason(int32_t):
        none
        length
        stop

    cdef cppclass token_logprob:
        int32_t token
        float logprob
        string text

    cdef cppclass event:
        event_kind kind
        uint64_t id
        errc code
        string text
        int32_t token
        float progress
        int32_t n_prompt_done
        int32_t n_prompt
        int32_t n_tokens
        int32_t n_reused
        int32_t n_neighbours
        int32_t n_drafted
        int32_t n_draft_right
        int32_t n_by_model
        stop_reason reason
        timeline times
        vector[token_logprob] logprobs
        vector[float] floats
        vector[int32_t] counts

    cdef cppclass log_line:
        int32_t level
        string text

    cdef cppclass device_info:
        string name
        string description
        string kind
        string backend
        string id
        uint64_t memory_total
        uint64_t memory_free

    cdef cppclass build_info:
        string llama_commit
        string ggml_version
        string compiler
        string build_type
        string sanitize
        vector[string] backends
        vector[string] cpu_features
        string cpu_variant
        vector[pair[string, string]] not_loaded

    cdef cppclass engine:
        engine(size_t queue_capacity) except +
        uint64_t load(load_params params) except +ai4all_raise_fault
        uint64_t unload() except +ai4all_raise_fault
        uint64_t generate(generate_params params) except +ai4all_raise_fault
        uint64_t embed(embed_params params) except +ai4all_raise_fault
        uint64_t score(score_params params) except +ai4all_raise_fault
        void cancel(uint64_t id)
        int fd()
        void drain(vector[event] & out) except +
        cbool has_model()
        model_info model() except +ai4all_raise_fault
        void stop()


cdef extern from "channel.h" namespace "ai4all" nogil:
    cdef cppclass channel_options:
        int64_t tick_ns
        int32_t log_level

    cdef cppclass channel:
        channel(engine & served, int descriptor, channel_options options) except +
        int fd()
        cbool take(vector[string] & frames) except +
        void send(const string & content, size_t n_served) except +
        void served(size_t n_frames)
        void close()


cdef extern from "engine.h" namespace "ai4all" nogil:
    void quantize(
        string source, string target, string type, int32_t n_threads
    ) except +ai4all_raise_fault
    build_info get_build_info() except +
    vector[device_info] get_devices() except +
    vector[log_line] drain_log() except +
    int64_t now_ns()
    uint64_t pulse()
