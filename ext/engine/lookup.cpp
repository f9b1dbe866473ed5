#include "lookup.h"

#include <algorithm>
#include <cmath>

namespace ai4all {

namespace {

// Shorter matches are chance.
constexpr size_t shortest_match = 3;
constexpr size_t longest_match  = 16;
// How far back to look: far enough for any document to be quoted, and microseconds to search.
constexpr size_t history = 8192;
// A draft must promise this much, so that errors of the estimate do not cost speed.
constexpr double smallest_gain = 1.1;
// Steps without a draft after one that was all wrong, while the record is poor.
constexpr size_t rest = 48;

size_t bucket_of(size_t match) noexcept {
    return match < 5 ? 0 : match < 9 ? 1 : 2;
}

}  // namespace

void decode_cost::learn(size_t n_tokens, int64_t ns) noexcept {
    const auto time = static_cast<double>(ns);
    if (n_tokens == 1) {
        one_ns_ = one_ns_ > 0.0 ? 0.8 * one_ns_ + 0.2 * time : time;
    } else if (known() && n_tokens <= longest_draft + 1) {
        const double more = std::clamp((time / one_ns_ - 1.0) / static_cast<double>(n_tokens - 1), 0.0, 2.0);
        more_             = 0.8 * more_ + 0.2 * more;
    }
}

draft_worth worth_of_draft(double p, size_t room, double cost) noexcept {
    // Expected tokens of a draft of k: 1 + p + p^2 + ... + p^k, for the time of 1 + cost * k.
    draft_worth best;
    double      best_gain = smallest_gain;
    double      expected  = 1.0;
    double      power     = 1.0;
    for (size_t k = 1; k <= room; ++k) {
        power *= p;
        expected += power;
        const double gain = expected / (1.0 + cost * static_cast<double>(k));
        if (gain > best_gain) {
            best      = {k, gain};
            best_gain = gain;
        }
    }
    return best;
}

std::vector<llama_token> lookup_drafter::draft(const std::vector<llama_token> & tokens, size_t room,
                                               const decode_cost & cost) {
    room = std::min(room, longest_draft);
    if (quiet_ > 0) {
        --quiet_;
        return {};
    }
    if (room == 0 || !cost.known() || tokens.size() <= shortest_match) {
        return {};
    }
    // The longest match wins, the latest of equals: it ends before `end` and continues at it.
    const size_t n     = tokens.size();
    const size_t floor = n > history ? n - history : 0;
    size_t       found = 0;
    size_t       match = shortest_match - 1;
    for (size_t end = n - 1; end > floor; --end) {
        if (tokens[end - 1] != tokens[n - 1]) {
            continue;
        }
        size_t length = 1;
        while (length < longest_match && length < end - floor && tokens[end - 1 - length] == tokens[n - 1 - length]) {
            ++length;
        }
        if (length > match) {
            match = length;
            found = end;
            if (match == longest_match) {
                break;
            }
        }
    }
    if (found == 0) {
        return {};
    }
    bucket_              = bucket_of(match);
    const record & known = records_[bucket_];
    const size_t   k = worth_of_draft(known.right / known.tried, std::min(room, n - found), cost.per_token()).n_tokens;
    return {tokens.begin() + static_cast<ptrdiff_t>(found), tokens.begin() + static_cast<ptrdiff_t>(found + k)};
}

void lookup_drafter::learn(size_t n_drafted, size_t n_right) noexcept {
    record & known = records_[bucket_];
    // Old observations fade: a text may begin to quote, or cease to.
    known.right = known.right * 0.9 + static_cast<double>(n_right);
    known.tried = known.tried * 0.9 + static_cast<double>(n_right + (n_right < n_drafted ? 1 : 0));
    if (n_right == 0 && known.right / known.tried < 0.5) {
        quiet_ = rest;
    }
}

}  // namespace ai4all
