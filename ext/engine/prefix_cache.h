// Computed prompts that lost their slot, kept in ordinary memory while there is room.

#pragma once

#include <cstdint>
#include <list>
#include <vector>

#include "llama.h"

namespace ai4all {

// Number of tokens that two sequences have in common at their beginning.
size_t common_prefix(const std::vector<llama_token> & a, const std::vector<llama_token> & b) noexcept;

class prefix_cache {
  public:
    explicit prefix_cache(size_t max_bytes) : max_bytes_(max_bytes) {}

    // Keep a copy of the sequence's cells, which hold exactly `tokens`. The oldest go to make room;
    // what is larger than the whole cache is not kept.
    void keep(llama_context * ctx, llama_seq_id seq, const std::vector<llama_token> & tokens);

    // Longest common prefix of `tokens` with anything kept; 0 when there is none.
    size_t longest(const std::vector<llama_token> & tokens) const noexcept;

    // Put what longest() found into the (empty) sequence and forget it here. Returns the tokens
    // that the sequence then holds; none when that failed.
    std::vector<llama_token> restore(llama_context * ctx, llama_seq_id seq, const std::vector<llama_token> & tokens);

    void   clear() noexcept;
    size_t bytes() const noexcept { return bytes_; }

  private:
    struct entry {
        std::vector<llama_token> tokens;
        std::vector<uint8_t>     state;
    };
    using iterator = std::list<entry>::const_iterator;

    iterator find(const std::vector<llama_token> & tokens) const noexcept;

    size_t           max_bytes_;
    size_t           bytes_ = 0;
    std::list<entry> entries_;  // oldest first
};

}  // namespace ai4all
