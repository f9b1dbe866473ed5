#include "gbnf.h"

#include <algorithm>
#include <map>
#include <utility>

#include "engine.h"

namespace ai4all {

namespace {

using element = gbnf_element;

// Limits far above what grammars need, and below what hurts.
constexpr size_t   max_text        = 4u << 20;
constexpr size_t   max_depth       = 256;
constexpr size_t   max_elements    = 1u << 19;  // repetitions written out
constexpr size_t   max_rules       = 1u << 17;
constexpr uint64_t max_repetitions = 2000;  // as llama.cpp has it; a larger maximum is none
constexpr uint64_t no_maximum      = UINT64_MAX;

bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

bool is_word(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || is_digit(c);
}

// A rule while it is read: its alternatives, and where it was first named.
struct rule {
    std::vector<std::vector<element>> alternatives;
    size_t                            named_at = 0;
    bool                              defined  = false;
};

class parser {
  public:
    parser(const std::string & text, const std::function<int32_t(const std::string &)> & token_of)
        : text_(text), token_of_(token_of) {}

    gbnf parse() {
        skip_space(true);
        while (at_ < text_.size()) {
            parse_rule();
        }
        return finished();
    }

  private:
    [[noreturn]] void fail(const std::string & problem, size_t at) const {
        at                   = std::min(at, text_.size());
        const size_t newline = at == 0 ? std::string::npos : text_.rfind('\n', at - 1);
        const size_t start   = newline == std::string::npos ? 0 : newline + 1;
        const auto   line    = 1 + std::count(text_.begin(), text_.begin() + static_cast<std::ptrdiff_t>(start), '\n');
        const size_t column  = at - start + 1;
        throw engine_error(errc::bad_request, "grammar: line " + std::to_string(line) + ", column " +
                                                  std::to_string(column) + ": " + problem);
    }

    [[noreturn]] void fail(const std::string & problem) const { fail(problem, at_); }

    char peek(size_t ahead = 0) const { return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0'; }

    void skip_space(bool newline_too) {
        while (at_ < text_.size()) {
            const char c = text_[at_];
            if (c == '#') {
                while (at_ < text_.size() && text_[at_] != '\r' && text_[at_] != '\n') {
                    ++at_;
                }
            } else if (c == ' ' || c == '\t' || (newline_too && (c == '\r' || c == '\n'))) {
                ++at_;
            } else {
                return;
            }
        }
    }

    std::string parse_name() {
        const size_t begin = at_;
        while (is_word(peek())) {
            ++at_;
        }
        if (at_ == begin) {
            fail("expected a name");
        }
        return text_.substr(begin, at_ - begin);
    }

    uint64_t parse_number(uint64_t most) {
        if (!is_digit(peek())) {
            fail("expected a number");
        }
        uint64_t value = 0;
        for (; is_digit(peek()); ++at_) {
            // No value beyond the largest that means something.
            value = std::min<uint64_t>(value * 10 + static_cast<uint64_t>(peek() - '0'), most);
        }
        return value;
    }

    uint32_t parse_hex(size_t digits) {
        uint32_t value = 0;
        for (size_t i = 0; i < digits; ++i, ++at_) {
            const char c = peek();
            if (is_digit(c)) {
                value = (value << 4) | static_cast<uint32_t>(c - '0');
            } else if (c >= 'a' && c <= 'f') {
                value = (value << 4) | static_cast<uint32_t>(c - 'a' + 10);
            } else if (c >= 'A' && c <= 'F') {
                value = (value << 4) | static_cast<uint32_t>(c - 'A' + 10);
            } else {
                fail("expected " + std::to_string(digits) + " hexadecimal digits");
            }
        }
        return value;
    }

    uint32_t parse_character() {
        if (at_ >= text_.size()) {
            fail("unexpected end");
        }
        const auto lead = static_cast<uint8_t>(text_[at_]);
        if (lead == '\\') {
            const char c = peek(1);
            at_ += 2;
            switch (c) {
                case 'x': return parse_hex(2);
                case 'u': return parse_hex(4);
                case 'U': return parse_hex(8);
                case 't': return '\t';
                case 'r': return '\r';
                case 'n': return '\n';
                case '\\':
                case '"':
                case '[':
                case ']':
                case '-': return static_cast<uint8_t>(c);
                default: at_ -= 2; fail("unknown escape");
            }
        }
        ++at_;
        if (lead < 0x80) {
            return lead;
        }
        const size_t more  = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : lead >= 0xC0 ? 1 : 0;
        uint32_t     value = lead & (0x3Fu >> more);
        for (size_t i = 0; i < more && (static_cast<uint8_t>(peek()) & 0xC0) == 0x80; ++i, ++at_) {
            value = (value << 6) | (static_cast<uint8_t>(peek()) & 0x3F);
        }
        return value;
    }

    uint32_t rule_named(const std::string & name, size_t at) {
        const auto [found, is_new] = names_.emplace(name, static_cast<uint32_t>(rules_.size()));
        if (is_new) {
            rules_.emplace_back().named_at = at;
        }
        return found->second;
    }

    uint32_t new_rule(std::vector<std::vector<element>> alternatives) {
        if (rules_.size() >= max_rules) {
            fail("more than " + std::to_string(max_rules) + " rules, written out");
        }
        const auto id                 = static_cast<uint32_t>(rules_.size());
        rules_.emplace_back().defined = true;
        rules_[id].named_at           = at_;
        rules_[id].alternatives       = std::move(alternatives);
        return id;
    }

    void count(size_t n) {
        n_elements_ += n;
        if (n_elements_ > max_elements) {
            fail("more than " + std::to_string(max_elements) + " elements, its repetitions written out");
        }
    }

    void parse_rule() {
        const size_t   begin = at_;
        const uint32_t id    = rule_named(parse_name(), begin);
        skip_space(false);
        if (text_.compare(at_, 3, "::=") != 0) {
            fail("expected ::=");
        }
        at_ += 3;
        skip_space(true);
        auto alternatives       = parse_alternatives(0);
        rules_[id].alternatives = std::move(alternatives);
        rules_[id].defined      = true;
        rules_[id].named_at     = begin;
        if (at_ < text_.size() && peek() != '\r' && peek() != '\n') {
            fail("expected a new line or the end");
        }
        skip_space(true);
    }

    std::vector<std::vector<element>> parse_alternatives(size_t depth) {
        if (depth > max_depth) {
            fail("nested deeper than " + std::to_string(max_depth));
        }
        std::vector<std::vector<element>> alternatives;
        alternatives.push_back(parse_sequence(depth));
        while (peek() == '|') {
            ++at_;
            skip_space(true);
            alternatives.push_back(parse_sequence(depth));
        }
        return alternatives;
    }

    std::vector<element> parse_sequence(size_t depth) {
        std::vector<element> sequence;
        size_t               symbol  = 0;  // where what a repetition repeats begins
        const bool           newline = depth > 0;
        while (at_ < text_.size()) {
            const char c = peek();
            if (c == '*' || c == '+' || c == '?' || c == '{') {
                repeat(sequence, symbol, newline);
                continue;
            }
            const size_t begin = sequence.size();
            if (c == '"') {
                parse_literal(sequence);
            } else if (c == '[') {
                parse_class(sequence);
            } else if (c == '.') {
                ++at_;
                push_class(sequence, {{0, UINT32_MAX}}, false);
            } else if (c == '<' || c == '!') {
                parse_token(sequence);
            } else if (c == '(') {
                ++at_;
                skip_space(true);
                auto alternatives = parse_alternatives(depth + 1);
                if (peek() != ')') {
                    fail("expected )");
                }
                ++at_;
                sequence.push_back({element::kind::reference, false, new_rule(std::move(alternatives)), 0});
                count(1);
            } else if (is_word(c)) {
                const size_t at = at_;
                sequence.push_back({element::kind::reference, false, rule_named(parse_name(), at), 0});
                count(1);
            } else {
                break;
            }
            symbol = begin;
            skip_space(newline);
        }
        return sequence;
    }

    void parse_literal(std::vector<element> & sequence) {
        for (++at_; peek() != '"' || at_ >= text_.size();) {
            const uint32_t c = parse_character();
            push_class(sequence, {{c, c}}, false);
        }
        ++at_;
    }

    void parse_class(std::vector<element> & sequence) {
        ++at_;
        const bool negated = peek() == '^';
        at_ += negated ? 1 : 0;
        std::vector<gbnf_range> ranges;
        while (peek() != ']' || at_ >= text_.size()) {
            gbnf_range range;
            range.first = parse_character();
            range.last  = range.first;
            if (peek() == '-' && peek(1) != ']') {
                ++at_;
                range.last = parse_character();
            }
            ranges.push_back(range);
        }
        ++at_;
        // A class of nothing stands for nothing at all.
        if (!ranges.empty()) {
            push_class(sequence, ranges, negated);
        }
    }

    void push_class(std::vector<element> & sequence, const std::vector<gbnf_range> & ranges, bool negated) {
        count(ranges.size());
        sequence.push_back({element::kind::characters, negated, static_cast<uint32_t>(ranges_.size()),
                            static_cast<uint32_t>(ranges.size())});
        ranges_.insert(ranges_.end(), ranges.begin(), ranges.end());
    }

    void parse_token(std::vector<element> & sequence) {
        const size_t begin   = at_;
        const bool   negated = peek() == '!';
        at_ += negated ? 1 : 0;
        if (peek() != '<') {
            fail("expected <");
        }
        const size_t open = at_;
        int64_t      id   = -1;
        if (peek(1) == '[') {
            at_ += 2;
            id = static_cast<int64_t>(parse_number(UINT32_MAX));
            if (peek() != ']' || peek(1) != '>') {
                fail("expected ]>");
            }
            at_ += 2;
        } else {
            const size_t close = text_.find('>', open);
            if (close == std::string::npos || close - open > 256) {
                fail("expected > after the token", open);
            }
            at_ = close + 1;
            id  = token_of_(text_.substr(open, at_ - open));
        }
        if (id < 0) {
            fail("not one token of the model", begin);
        }
        count(1);
        sequence.push_back({element::kind::token, negated, static_cast<uint32_t>(id), 0});
    }

    // S{m,n} becomes S, m times, and then n - m nested rules S' ::= S S'' | that may stop anywhere.
    void repeat(std::vector<element> & sequence, size_t symbol, bool newline) {
        const size_t at   = at_;
        const char   what = peek();
        uint64_t     min  = what == '+' ? 1 : 0;
        uint64_t     max  = what == '?' ? 1 : no_maximum;
        ++at_;
        if (what == '{') {
            skip_space(newline);
            min = max = parse_number(max_repetitions + 1);
            skip_space(newline);
            if (peek() == ',') {
                ++at_;
                skip_space(newline);
                max = is_digit(peek()) ? parse_number(max_repetitions + 1) : no_maximum;
                skip_space(newline);
            }
            if (peek() != '}') {
                fail("expected }");
            }
            ++at_;
        }
        if (min > max_repetitions) {
            fail("repeated more than " + std::to_string(max_repetitions) + " times", at);
        }
        if (max != no_maximum && max > max_repetitions) {
            max = no_maximum;
        }
        if (max < min) {
            fail("the most repetitions are fewer than the least", at);
        }
        if (symbol == sequence.size()) {
            fail("nothing to repeat", at);
        }
        skip_space(newline);

        const std::vector<element> once(sequence.begin() + static_cast<std::ptrdiff_t>(symbol), sequence.end());
        const uint64_t             optional = max == no_maximum ? 1 : max - min;
        count(once.size() * static_cast<size_t>(min + optional));
        if (min == 0) {
            sequence.resize(symbol);
        }
        for (uint64_t i = 1; i < min; ++i) {
            sequence.insert(sequence.end(), once.begin(), once.end());
        }
        uint32_t inner = 0;
        for (uint64_t i = 0; i < optional; ++i) {
            std::vector<element> again = once;
            const uint32_t       id    = new_rule({});
            if (max == no_maximum || i > 0) {
                again.push_back({element::kind::reference, false, max == no_maximum ? id : inner, 0});
            }
            rules_[id].alternatives.push_back(std::move(again));
            rules_[id].alternatives.emplace_back();
            inner = id;
        }
        if (optional > 0) {
            sequence.push_back({element::kind::reference, false, inner, 0});
        }
    }

    gbnf finished() {
        const auto root = names_.find("root");
        if (root == names_.end() || !rules_[root->second].defined) {
            throw engine_error(errc::bad_request, "grammar: has no rule named root");
        }
        gbnf result;
        result.root   = root->second;
        result.ranges = std::move(ranges_);
        for (const rule & each : rules_) {
            if (!each.defined) {
                fail("no such rule", each.named_at);
            }
            auto & starts = result.rules.emplace_back();
            for (const auto & alternative : each.alternatives) {
                starts.push_back(static_cast<uint32_t>(result.elements.size()));
                result.elements.insert(result.elements.end(), alternative.begin(), alternative.end());
                result.elements.emplace_back();
            }
        }
        refuse_left_recursion(result);
        return result;
    }

    // Whether a rule can be nothing at all, for every rule: by an alternative of references to such rules alone.
    static std::vector<bool> empty_rules(const gbnf & grammar) {
        struct alternative {
            uint32_t rule;
            size_t   n_open;  // references to rules of which that is not known
        };
        std::vector<bool>                  empty(grammar.rules.size());
        std::vector<uint32_t>              todo;
        std::vector<alternative>           all;
        std::vector<std::vector<uint32_t>> users(grammar.rules.size());  // alternatives, once for each reference
        const auto                         found = [&](uint32_t rule) {
            if (!empty[rule]) {
                empty[rule] = true;
                todo.push_back(rule);
            }
        };
        for (uint32_t rule = 0; rule < grammar.rules.size(); ++rule) {
            for (const uint32_t start : grammar.rules[rule]) {
                uint32_t at = start;
                while (grammar.elements[at].what == element::kind::reference) {
                    ++at;
                }
                if (grammar.elements[at].what != element::kind::end) {
                    continue;
                }
                if (at == start) {
                    found(rule);
                    continue;
                }
                for (uint32_t i = start; i < at; ++i) {
                    users[grammar.elements[i].value].push_back(static_cast<uint32_t>(all.size()));
                }
                all.push_back({rule, at - start});
            }
        }
        while (!todo.empty()) {
            const uint32_t rule = todo.back();
            todo.pop_back();
            for (const uint32_t user : users[rule]) {
                if (--all[user].n_open == 0) {
                    found(all[user].rule);
                }
            }
        }
        return empty;
    }

    // A rule that begins with itself, perhaps after others that are nothing, can never be followed.
    void refuse_left_recursion(const gbnf & grammar) const {
        const std::vector<bool> empty = empty_rules(grammar);
        enum class mark : uint8_t { fresh, open, done };
        std::vector<mark> marks(grammar.rules.size(), mark::fresh);

        struct visit {
            uint32_t id;
            size_t   alternative;
            uint32_t at;
        };
        const auto next_alternative = [&](visit & here) {
            const auto & starts = grammar.rules[here.id];
            if (++here.alternative < starts.size()) {
                here.at = starts[here.alternative];
            }
        };

        for (uint32_t first = 0; first < grammar.rules.size(); ++first) {
            if (marks[first] != mark::fresh) {
                continue;
            }
            std::vector<visit> path{{first, 0, grammar.rules[first][0]}};
            marks[first] = mark::open;
            while (!path.empty()) {
                visit & here = path.back();
                if (here.alternative == grammar.rules[here.id].size()) {
                    marks[here.id] = mark::done;
                    path.pop_back();
                    continue;
                }
                const element & e = grammar.elements[here.at];
                if (e.what != element::kind::reference) {
                    next_alternative(here);
                    continue;
                }
                // What comes after it is at the beginning too, if it can be nothing.
                if (empty[e.value]) {
                    ++here.at;
                } else {
                    next_alternative(here);
                }
                if (marks[e.value] == mark::open) {
                    fail("begins with itself", rules_[e.value].named_at);
                }
                if (marks[e.value] == mark::fresh) {
                    marks[e.value] = mark::open;
                    path.push_back({e.value, 0, grammar.rules[e.value][0]});
                }
            }
        }
    }

    const std::string &                                 text_;
    const std::function<int32_t(const std::string &)> & token_of_;
    size_t                                              at_         = 0;
    size_t                                              n_elements_ = 0;
    std::vector<rule>                                   rules_;
    std::map<std::string, uint32_t>                     names_;
    std::vector<gbnf_range>                             ranges_;
};

}  // namespace

gbnf parse_gbnf(const std::string & text, const std::function<int32_t(const std::string &)> & token_of) {
    if (text.size() > max_text) {
        throw engine_error(errc::bad_request, "grammar: has " + std::to_string(text.size()) + " bytes, at most " +
                                                  std::to_string(max_text) + " are accepted");
    }
    return parser(text, token_of).parse();
}

}  // namespace ai4all
