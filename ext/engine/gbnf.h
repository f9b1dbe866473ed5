// Grammars as they are written: GBNF read into rules, within limits.
//
// What is accepted, and what it means, is what llama.cpp's own parser accepts. That one prints what
// it refuses, descends as deep as a grammar is nested, and writes repetitions out without a bound;
// a grammar comes from whoever asks for work.

#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace ai4all {

// One step of an alternative.
struct gbnf_element {
    enum class kind : uint8_t {
        end,         // of the alternative
        reference,   // to a rule: `value` is its number
        characters,  // one character: out of `count` ranges from `value` on, or out of none of them
        token,       // one token: `value` is its id, or any other
    };

    kind     what    = kind::end;
    bool     negated = false;
    uint32_t value   = 0;
    uint32_t count   = 0;
};

struct gbnf_range {
    uint32_t first;
    uint32_t last;
};

struct gbnf {
    std::vector<gbnf_element>          elements;  // of all alternatives of all rules
    std::vector<std::vector<uint32_t>> rules;     // where each alternative of each rule begins
    std::vector<gbnf_range>            ranges;
    uint32_t                           root = 0;
};

// Read a grammar. `token_of` gives the token that a text such as "<think>" is, or -1 when it is none
// or several. Throws engine_error(bad_request) with line and column, and never with the text.
gbnf parse_gbnf(const std::string & text, const std::function<int32_t(const std::string &)> & token_of);

}  // namespace ai4all
