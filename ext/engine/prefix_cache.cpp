#include "prefix_cache.h"

#include <algorithm>

namespace ai4all {

size_t common_prefix(const std::vector<llama_token> & a, const std::vector<llama_token> & b) noexcept {
    const size_t n = std::min(a.size(), b.size());
    return static_cast<size_t>(std::mismatch(a.begin(), a.begin() + n, b.begin()).first - a.begin());
}

prefix_cache::iterator prefix_cache::find(const std::vector<llama_token> & tokens) const noexcept {
    iterator best   = entries_.end();
    size_t   length = 0;
    for (iterator it = entries_.begin(); it != entries_.end(); ++it) {
        const size_t n = common_prefix(it->tokens, tokens);
        if (n > length) {
            best   = it;
            length = n;
        }
    }
    return best;
}

size_t prefix_cache::longest(const std::vector<llama_token> & tokens) const noexcept {
    const iterator it = find(tokens);
    return it == entries_.end() ? 0 : common_prefix(it->tokens, tokens);
}

void prefix_cache::keep(llama_context * ctx, llama_seq_id seq, const std::vector<llama_token> & tokens) {
    const size_t size = llama_state_seq_get_size(ctx, seq);
    if (size == 0 || size > max_bytes_) {
        return;
    }
    // What is a beginning of the new entry is of no more use.
    for (auto it = entries_.begin(); it != entries_.end();) {
        if (bytes_ + size > max_bytes_ || common_prefix(it->tokens, tokens) == it->tokens.size()) {
            bytes_ -= it->state.size();
            it = entries_.erase(it);
        } else {
            ++it;
        }
    }
    entry fresh;
    fresh.state.resize(size);
    fresh.state.resize(llama_state_seq_get_data(ctx, fresh.state.data(), size, seq));
    if (fresh.state.empty()) {
        return;
    }
    fresh.tokens = tokens;
    bytes_ += fresh.state.size();
    entries_.push_back(std::move(fresh));
}

std::vector<llama_token> prefix_cache::restore(llama_context * ctx, llama_seq_id seq,
                                               const std::vector<llama_token> & tokens) {
    const iterator it = find(tokens);
    if (it == entries_.end()) {
        return {};
    }
    std::vector<llama_token> held;
    if (llama_state_seq_set_data(ctx, it->state.data(), it->state.size(), seq) != 0) {
        held = it->tokens;
    }
    bytes_ -= it->state.size();
    entries_.erase(it);
    return held;
}

void prefix_cache::clear() noexcept {
    entries_.clear();
    bytes_ = 0;
}

}  // namespace ai4all
