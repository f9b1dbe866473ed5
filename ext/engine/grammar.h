// Follows a grammar token by token, and says which tokens may come next.
//
// What it allows is what llama.cpp's own grammar sampler allows; a test holds the two against each
// other. That one keeps every way to go on by itself, and follows each candidate on each of them, so
// that a grammar of some letters can keep it busy for years. Here equal ways are one, candidates that
// begin alike are followed once, and both have a bound.

#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "gbnf.h"
#include "llama.h"

namespace ai4all {

// The texts of all tokens of a vocabulary, in the order of their bytes.
class token_table {
  public:
    explicit token_table(const llama_vocab * vocab);

    struct entry {
        llama_token token;
        uint32_t    begin;   // of its text
        uint32_t    size;    // in bytes
        uint32_t    shared;  // bytes that it begins with as the one before does
    };

    const std::vector<entry> & entries() const noexcept { return entries_; }
    const char *               text(const entry & e) const noexcept { return texts_.data() + e.begin; }
    std::string                text_of(llama_token token) const;
    bool                       is_end(llama_token token) const { return is_end_[static_cast<size_t>(token)]; }
    llama_token                n_tokens() const noexcept { return static_cast<llama_token>(by_id_.size()); }

  private:
    std::string           texts_;
    std::vector<entry>    entries_;  // without those that have no text
    std::vector<uint32_t> by_id_;    // index in entries_, or UINT32_MAX
    std::vector<bool>     is_end_;
};

class grammar {
  public:
    // Throws engine_error(bad_request): not a grammar, or more than can be followed.
    grammar(const std::string & text, const llama_vocab * vocab, std::shared_ptr<const token_table> tokens);

    // Whether `token` may come next. Throws engine_error(bad_request): more than can be followed.
    bool allows(llama_token token);

    // Set the logits of all tokens that may not come next to minus infinity; return how many are
    // left. Throws as allows().
    size_t mask(float * logits);

    // Take a token that is allowed. Throws engine_error(compute_failed) for one that is not.
    void accept(llama_token token);

  private:
    // A stack of what is still to come: an element to match, and the stack below it. Equal stacks are
    // one node, so a stack is a number. 0 is the empty one: the text may end.
    struct node {
        uint32_t at;
        uint32_t below;
    };
    using stacks = std::vector<uint32_t>;  // sorted, each once, all with a character or token on top

    // All ways to go on at one time, and where each ASCII character has led from here before. Equal
    // ones are one: in a text of JSON, say, almost every character leads back to where it came from.
    struct place {
        stacks                    ways;
        std::array<uint32_t, 128> next;
    };

    // A character that is not whole yet.
    struct partial {
        uint32_t value   = 0;
        int32_t  missing = 0;
    };

    uint32_t       make(uint32_t at, uint32_t below);
    const stacks & ways_from(uint32_t id);
    uint32_t       place_of(stacks ways);
    uint32_t       step(uint32_t from, uint32_t character);
    uint32_t       find_step(uint32_t from, uint32_t character);
    bool           matches(const gbnf_element & e, uint32_t character);
    bool           may_match(const gbnf_element & e, const partial & begun) const;
    uint32_t       walk(uint32_t from, partial & begun, const std::string & text);
    bool           ends_well(uint32_t here, const partial & begun) const;
    bool           may_end(uint32_t here) const;
    bool           names_token(uint32_t here, llama_token token) const;
    void           spend(size_t steps);
    void           forget();

    const gbnf_element * top_of(uint32_t id) const { return id == 0 ? nullptr : &rules_.elements[nodes_[id].at]; }

    gbnf                                   rules_;
    std::shared_ptr<const token_table>     tokens_;
    std::vector<node>                      nodes_;
    std::unordered_map<uint64_t, uint32_t> numbers_;  // of nodes
    std::unordered_map<uint32_t, stacks>   ways_;     // from nodes
    std::deque<place>                      places_;   // 0 is nowhere
    std::map<stacks, uint32_t>             known_;    // numbers of places
    std::unordered_map<uint64_t, uint32_t> steps_;    // over characters beyond ASCII
    uint32_t                               now_ = 0;
    partial                                begun_;
    size_t                                 spent_ = 0;
};

}  // namespace ai4all
