// The engine: one thread that owns a model, its context and N slots.
//
// The only header that the Cython layer sees. Nothing here includes Python or llama.cpp.
//
// Commands go in through a bounded queue and are served in order; loading and unloading wait for
// running slots. Events come out in one batch per decode step, or for a few steps together where
// they follow each other within 20 ms; the file descriptor becomes readable when the batch goes
// from empty to non-empty. A reader clears the descriptor first and
// swaps the events out second (drain() does both), so that no wake-up is lost.

#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ai4all {

// Every way in which native code fails. Each maps to one Python exception; errc::end is not a
// code but their count, so that a test can hold that the map is total.
enum class errc : int32_t {
    ok = 0,
    bad_request,        // the request breaks a rule
    context_overflow,   // the prompt does not fit
    out_of_memory,      // an allocation failed
    load_failed,        // the file could not be loaded
    cancelled,          // cancel() was called
    deadline_exceeded,  // the request's deadline passed
    compute_failed,     // a decode failed or gave no usable logits
    busy,               // the command queue is full
    closed,             // stop() was called
    not_loaded,         // there is no model to compute with
    end,
};

const char * errc_name(errc code);

class engine_error : public std::runtime_error {
  public:
    engine_error(errc code, const std::string & message) : std::runtime_error(message), code_(code) {}
    errc code() const noexcept { return code_; }

  private:
    errc code_;
};

struct load_params {
    std::string path;
    uint32_t    n_ctx              = 0;     // of one sequence; 0: the model's own, at most 4096
    uint32_t    n_batch            = 2048;  // tokens in one logical batch
    uint32_t    n_ubatch           = 512;   // tokens in one physical batch, and in a prompt chunk
    uint32_t    n_slots            = 1;
    int32_t     n_threads          = 1;
    int32_t     n_threads_batch    = 1;
    int32_t     n_gpu_layers       = -1;  // -1: all; 0: nothing is computed on a GPU
    int32_t     flash_attention    = -1;  // -1 auto, 0 off, 1 on
    std::string kv_type            = "f16";
    bool        use_mmap           = true;
    uint64_t    prefix_cache_bytes = 256ull << 20;  // for computed prompts that lost their slot
    std::string draft_path;                         // a smaller model that drafts; empty: none
    uint32_t    draft_tokens = 0;                   // in each of its drafts; 0: as many as pay
    // GPUs that may hold layers, by name; "CPU" alone: none; empty: all that there are.
    std::vector<std::string> devices;
};

// What one device holds of a loaded model, in bytes as they were allocated.
struct device_share {
    std::string device;
    int32_t     n_layers = 0;
    uint64_t    weights  = 0;
    uint64_t    context  = 0;  // caches
    uint64_t    compute  = 0;  // buffers of the graphs
};

struct model_info {
    std::string                                      path;
    std::string                                      description;
    std::string                                      device;     // those that hold layers, such as "CUDA0+CPU"
    std::vector<device_share>                        placement;  // the CPU last
    uint32_t                                         n_ctx             = 0;  // of one sequence
    uint32_t                                         n_ctx_train       = 0;
    uint32_t                                         n_batch           = 0;
    uint32_t                                         n_ubatch          = 0;
    uint32_t                                         n_slots           = 0;
    int32_t                                          n_vocab           = 0;
    int32_t                                          n_embd            = 0;
    int32_t                                          n_threads         = 0;
    int32_t                                          n_threads_batch   = 0;
    int32_t                                          n_exact_batch     = 1;  // tokens; see exact_batch.h
    uint64_t                                         n_params          = 0;
    uint64_t                                         size_bytes        = 0;
    bool                                             has_chat_template = false;
    std::vector<std::pair<std::string, std::string>> metadata;
};

struct generate_params {
    std::string              prompt;
    std::string              system_prompt;
    bool                     chat               = false;  // render both by the chat template
    int32_t                  max_tokens         = 256;
    float                    temperature        = 0.0f;  // 0: greedy
    int32_t                  top_k              = 0;     // 0: off
    float                    top_p              = 1.0f;  // 1: off
    float                    min_p              = 0.0f;  // 0: off
    float                    repetition_penalty = 1.0f;  // 1: off
    uint32_t                 seed               = 0;
    std::vector<std::string> stop;
    bool                     ignore_eos    = false;
    bool                     deterministic = false;  // alone in the engine, nothing reused
    std::string              grammar;                // GBNF; empty: none
    std::string              json_schema;            // empty: none
    int32_t                  logprobs     = -1;      // >= 0: of each token, and of so many likeliest
    bool                     reuse_prefix = true;    // take the cache of an earlier prompt
    bool                     speculate    = true;    // draft where it pays
    int64_t                  deadline_ns  = 0;       // steady clock; 0: none
};

struct embed_params {
    std::vector<std::string> texts;
    bool                     normalize   = true;
    int64_t                  deadline_ns = 0;
};

struct score_params {
    std::string              prompt;
    std::string              system_prompt;
    bool                     chat = false;
    std::vector<std::string> continuations;
    int64_t                  deadline_ns = 0;
};

// Steady-clock nanoseconds, read in the engine's thread; 0 where it did not happen.
struct timeline {
    int64_t submitted   = 0;  // the one stamp that the caller's thread takes
    int64_t model_ready = 0;  // when the model that serves it was loaded
    int64_t admitted    = 0;  // a slot was given
    int64_t prompt_done = 0;  // the last prompt chunk is computed
    int64_t first_token = 0;  // the first token is sampled
    int64_t last_token  = 0;  // the last token is sampled
    int64_t finished    = 0;
};

enum class event_kind : int32_t {
    load_progress = 0,
    loaded,
    unloaded,
    prompt_progress,
    token,
    finished,
    embedded,  // last of an embedding: `floats` by row, `counts` rows and columns
    scored,    // last of a scoring: `floats` and `counts` by continuation
    failed,
};

// Natural-log probability of a token under the model's own distribution.
struct token_logprob {
    int32_t     token   = -1;
    float       logprob = 0.0f;
    std::string text;
};

enum class stop_reason : int32_t {
    none = 0,
    length,
    stop,
};

struct event {
    event_kind                 kind = event_kind::failed;
    uint64_t                   id   = 0;  // of the command
    uint64_t                   tag  = 0;  // of the command; 0: it has none
    errc                       code = errc::ok;
    std::string                text;  // token, finished: text that became certain; failed: the message
    int32_t                    token         = -1;
    float                      progress      = 0.0f;
    int32_t                    n_prompt_done = 0;
    int32_t                    n_prompt      = 0;
    int32_t                    n_tokens      = 0;  // sampled so far, end-of-generation tokens not counted
    int32_t                    n_reused      = 0;  // prompt tokens that came from a cache
    int32_t                    n_neighbours  = 0;  // most other sequences in one batch with it
    int32_t                    n_drafted     = 0;  // tokens drafted, and how many of them were right
    int32_t                    n_draft_right = 0;
    int32_t                    n_by_model    = 0;  // of those drafted, by the draft model
    stop_reason                reason        = stop_reason::none;
    timeline                   times;
    std::vector<token_logprob> logprobs;  // token: the sampled one, then the likeliest
    std::vector<float>         floats;
    std::vector<int32_t>       counts;
};

// Takes the events of commands that have a tag, in the engine's thread, instead of the queue.
class event_sink {
  public:
    virtual ~event_sink() = default;

    // In order; each batch has what the queue would have got at that moment.
    virtual void take(const std::vector<event> & events) noexcept = 0;
};

struct log_line {
    int32_t     level = 0;  // 1 debug, 2 info, 3 warning, 4 error
    std::string text;
};

// Compute devices and the build, for capabilities and `doctor`.
struct device_info {
    std::string name;
    std::string description;
    std::string kind;              // cpu, gpu, igpu, accel
    std::string backend;           // CPU, CUDA, ROCm, Vulkan, Metal
    std::string id;                // where it sits (a PCI address); empty where the driver does not say
    uint64_t    memory_total = 0;  // bytes
    uint64_t    memory_free  = 0;
};

struct build_info {
    std::string              llama_commit;
    std::string              ggml_version;
    std::string              compiler;
    std::string              build_type;
    std::string              sanitize;
    std::vector<std::string> backends;
    std::vector<std::string> cpu_features;
    std::string              cpu_variant;  // of several in this build ("haswell"); empty: there is one
    // Backends that were built but could not be loaded here, and why.
    std::vector<std::pair<std::string, std::string>> not_loaded;
};

class engine {
  public:
    // queue_capacity: most commands that wait at once.
    explicit engine(size_t queue_capacity);
    ~engine();
    engine(const engine &)             = delete;
    engine & operator=(const engine &) = delete;

    // --- any thread -------------------------------------------------------------------------

    // Queue a command and return its id, never 0. Every id ends in exactly one `loaded`,
    // `unloaded`, `finished`, `embedded`, `scored` or `failed` event, also when the engine stops.
    // Throws engine_error: busy, closed, not_loaded (work, with nothing loaded or loading).
    uint64_t load(load_params params);
    uint64_t unload();
    uint64_t generate(generate_params params, uint64_t tag = 0);
    uint64_t embed(embed_params params);
    uint64_t score(score_params params);

    // End a command early. It takes effect between chunks and steps, on a CPU inside them too.
    // Unknown or ended ids are ignored.
    void cancel(uint64_t id) noexcept;

    // Where the events of tagged commands go from now on; null: nowhere. What went to the sink before
    // has been taken when this returns.
    void set_sink(event_sink * sink) noexcept;

    int fd() const noexcept;
    // Clear the descriptor, then move all events out.
    void drain(std::vector<event> & out);

    bool       has_model() const;
    model_info model() const;  // throws engine_error: not_loaded

    // Refuse new commands, abort what runs, join the thread. Idempotent. Pending commands end
    // with errc::closed, to be drained afterwards.
    void stop() noexcept;

  private:
    struct impl;
    std::unique_ptr<impl> impl_;
};

// --- any thread, no engine needed -----------------------------------------------------------

// Re-encode a model file; blocks until done. `type` is a name such as "Q8_0" or "Q4_K_M".
// Throws engine_error: bad_request (no such type), load_failed, out_of_memory.
void quantize(const std::string & source, const std::string & target, const std::string & type, int32_t n_threads);

build_info               get_build_info();
std::vector<device_info> get_devices();
// Lines that llama.cpp logged since the last call, oldest first; bounded, old ones are dropped.
std::vector<log_line> drain_log();
int64_t               now_ns();
// A count that moves while any engine of this process computes: with each node of a graph that a CPU
// evaluates and each step of a load. Only real work moves it, so one that stands still shows a hang.
uint64_t pulse() noexcept;

}  // namespace ai4all
