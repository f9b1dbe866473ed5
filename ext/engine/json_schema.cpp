#include "json_schema.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <regex>

#include "common.h"
#include "engine.h"
#include "json-schema-to-grammar.h"
#include "json.h"

namespace ai4all {

namespace {

// Above what schemas need, and below what the converter chokes on.
constexpr size_t max_bytes      = 256u << 10;
constexpr size_t max_depth      = 32;
constexpr size_t max_nodes      = 8192;  // with every list of types written out
constexpr size_t max_properties = 128;
constexpr size_t max_key        = 128;
constexpr size_t max_text       = 4096;
constexpr size_t max_pattern    = 512;
constexpr size_t max_groups     = 64;  // in each other, in a pattern
constexpr size_t max_references = 16;  // that lead to each other
constexpr double max_bound      = 9007199254740992.0;

[[noreturn]] void fail(const std::string & problem) {
    throw engine_error(errc::bad_request, "json_schema: " + problem);
}

// Before it is parsed: what is nested too deep is not even built.
void check_text(const std::string & text) {
    if (text.size() > max_bytes) {
        fail("has " + std::to_string(text.size()) + " bytes, at most " + std::to_string(max_bytes) + " are accepted");
    }
    size_t depth     = 0;
    bool   in_string = false;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (in_string) {
            i += c == '\\' ? 1 : 0;
            in_string = c != '"';
        } else if (c == '"') {
            in_string = true;
        } else if (c == '{' || c == '[') {
            if (++depth > max_depth) {
                fail("is nested deeper than " + std::to_string(max_depth));
            }
        } else if (c == '}' || c == ']') {
            depth -= depth > 0 ? 1 : 0;
        }
    }
}

bool is_bound(const std::string & key) {
    return key == "minimum" || key == "maximum" || key == "exclusiveMinimum" || key == "exclusiveMaximum";
}

// How long the escape is that begins at `at`; 0 for one that a grammar has none for.
size_t escape_length(const std::string & pattern, size_t at, bool in_class) {
    const char   c       = at + 1 < pattern.size() ? pattern[at + 1] : '\0';
    const size_t n_digit = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (n_digit > 0) {
        for (size_t i = 0; i < n_digit; ++i) {
            if (at + 2 + i >= pattern.size() || !std::isxdigit(static_cast<unsigned char>(pattern[at + 2 + i]))) {
                return 0;
            }
        }
        return 2 + n_digit;
    }
    const char * const known = in_class ? "trn\\\"[]-" : "trn\\\"[]-^$.()|{}*+?";
    return c != '\0' && std::strchr(known, c) ? 2 : 0;
}

// The converter takes any string where it cannot follow a pattern, and prints a warning that has the
// pattern in it. What is asked for is better refused than forgotten.
void check_pattern(const std::string & pattern) {
    if (pattern.size() > max_pattern) {
        fail("a pattern is longer than " + std::to_string(max_pattern) + " bytes");
    }
    if (pattern.size() < 2 || pattern.front() != '^' || pattern.back() != '$') {
        fail("a pattern does not begin with ^ and end with $");
    }
    const size_t end      = pattern.size() - 1;
    size_t       depth    = 0;
    bool         in_class = false;
    for (size_t i = 1; i < end; ++i) {
        const char c = pattern[i];
        if (c == '\\') {
            const size_t length = escape_length(pattern, i, in_class);
            if (length == 0 || i + length > end) {
                fail("a pattern has an escape that is not supported");
            }
            i += length - 1;
        } else if (in_class) {
            in_class = c != ']';
        } else if (c == '[') {
            in_class = true;
        } else if (c == '(') {
            if (++depth > max_groups || (pattern[i + 1] == '?' && pattern[i + 2] != ':')) {
                fail("a pattern has a group that is not supported");
            }
            i += pattern[i + 1] == '?' ? 2 : 0;
        } else if (c == ')') {
            depth -= depth > 0 ? 1 : 0;
        } else if (c == '{') {
            const size_t      close  = pattern.find('}', i);
            const std::string counts = pattern.substr(i + 1, std::min(close, end) - i - 1);
            if (close == std::string::npos || !std::regex_match(counts, std::regex("[0-9]{1,4}(,[0-9]{0,4})?"))) {
                fail("a pattern has a repetition that is not supported");
            }
            i = close;
        } else if (std::strchr("^$]}", c)) {
            fail("a pattern has a character that is not supported where it is");
        }
    }
}

class checker {
  public:
    explicit checker(const common_json & root) : root_(root) {}

    // Checks a value and all in it; returns how many nodes they become. A literal is no schema,
    // whatever its keys.
    size_t check(const common_json & value, bool is_literal = false) const {
        size_t nodes = 1;
        if (value.is_string()) {
            if (value.get<std::string>().size() > max_text) {
                fail("a text is longer than " + std::to_string(max_text) + " bytes");
            }
        } else if (value.is_array()) {
            for (size_t i = 0; i < value.size(); ++i) {
                nodes = sum(nodes, check(value.at(i), is_literal));
            }
        } else if (value.is_object()) {
            for (const auto & [key, item] : value.items()) {
                nodes = sum(nodes, check_item(key, item, is_literal));
            }
            // A list of types stands for as many schemas, with all that is in this one in each.
            if (!is_literal && value.contains("type") && value.at("type").is_array()) {
                nodes = sum(0, nodes * std::max<size_t>(1, value.at("type").size()));
            }
            if (!is_literal && value.contains("$ref")) {
                check_reference(value);
            }
            if (!is_literal && value.contains("allOf")) {
                std::vector<const common_json *> open;
                check_all_of(value, open);
            }
        }
        return nodes;
    }

  private:
    static size_t sum(size_t a, size_t b) {
        if (a + b > max_nodes) {
            fail("has more than " + std::to_string(max_nodes) + " parts, its lists of types and allOf written out");
        }
        return a + b;
    }

    size_t check_item(const std::string & key, const common_json & item, bool is_literal) const {
        if (key.size() > max_key) {
            fail("a name is longer than " + std::to_string(max_key) + " bytes");
        }
        if (is_literal) {
            return check(item, true);
        }
        if (key == "properties" && item.is_object() && item.size() > max_properties) {
            fail("an object has more than " + std::to_string(max_properties) + " properties");
        }
        if (key == "pattern" && item.is_string()) {
            check_pattern(item.get<std::string>());
        }
        if (is_bound(key) && item.is_number() && !(std::fabs(item.get<double>()) <= max_bound)) {
            fail(key + " is beyond what a double holds exactly");
        }
        return check(item, key == "const" || key == "enum" || key == "default" || key == "examples");
    }

    // The converter follows a reference to a reference for as long as it takes.
    void check_reference(const common_json & value) const {
        const common_json * here = &value;
        for (size_t i = 0; here && here->is_object() && here->contains("$ref"); ++i) {
            if (i == max_references) {
                fail("a $ref leads to others without an end");
            }
            here = target(here->at("$ref"));
        }
    }

    // The converter makes one object of the parts of an allOf, also of those that are references, and visits what
    // is in them anew for each: without an end where that leads back, and twice as often with each step where two
    // lead to the same.
    void check_all_of(const common_json & schema, std::vector<const common_json *> & open) const {
        const common_json & parts        = schema.at("allOf");
        size_t              n_properties = 0;
        for (size_t i = 0; parts.is_array() && i < parts.size(); ++i) {
            const common_json & part      = parts.at(i);
            bool                has_parts = false;
            for (const char * key : {"anyOf", "oneOf"}) {
                if (part.is_object() && part.contains(key) && part.at(key).is_array()) {
                    has_parts = true;
                    for (size_t k = 0; k < part.at(key).size(); ++k) {
                        n_properties += check_part(part.at(key).at(k), open);
                    }
                }
            }
            n_properties += has_parts ? 0 : check_part(part, open);
        }
        if (n_properties > max_properties) {
            fail("an allOf has more than " + std::to_string(max_properties) + " properties");
        }
    }

    size_t check_part(const common_json & part, std::vector<const common_json *> & open) const {
        const common_json * here = &part;
        for (size_t i = 0; i < max_references && here && here->is_object() && here->contains("$ref"); ++i) {
            here = target(here->at("$ref"));
        }
        if (!here || !here->is_object() || !here->contains("properties") || !here->at("properties").is_object()) {
            return 0;
        }
        if (std::find(open.begin(), open.end(), here) != open.end() || open.size() == max_depth) {
            fail("an allOf leads back to itself, or is nested too deep");
        }
        open.push_back(here);
        const common_json & properties = here->at("properties");
        for (const auto & [name, item] : properties.items()) {
            check_written_out(properties.at(name), open);
        }
        open.pop_back();
        return properties.size();
    }

    void check_written_out(const common_json & schema, std::vector<const common_json *> & open) const {
        n_written_out_ = sum(n_written_out_, 1);
        if (!schema.is_object()) {
            return;
        }
        if (schema.contains("allOf")) {
            check_all_of(schema, open);
        }
        if (schema.contains("properties") && schema.at("properties").is_object()) {
            const common_json & properties = schema.at("properties");
            for (const auto & [name, item] : properties.items()) {
                check_written_out(properties.at(name), open);
            }
        }
        for (const char * key : {"items", "additionalProperties", "anyOf", "oneOf", "prefixItems"}) {
            if (!schema.contains(key)) {
                continue;
            }
            const common_json & inner = schema.at(key);
            for (size_t i = 0; inner.is_array() && i < inner.size(); ++i) {
                check_written_out(inner.at(i), open);
            }
            if (inner.is_object()) {
                check_written_out(inner, open);
            }
        }
    }

    const common_json * target(const common_json & reference) const {
        if (!reference.is_string()) {
            return nullptr;
        }
        const std::string path = reference.get<std::string>();
        if (path.compare(0, 2, "#/") != 0) {
            return nullptr;  // the converter says so
        }
        const common_json * here = &root_;
        for (const std::string & name : string_split(path.substr(2), "/")) {
            if (here->is_object() && here->contains(name)) {
                here = &here->at(name);
            } else if (here->is_array() && !name.empty() && name.size() < 5 &&
                       std::all_of(name.begin(), name.end(), [](char c) { return c >= '0' && c <= '9'; }) &&
                       std::stoul(name) < here->size()) {
                here = &here->at(std::stoul(name));
            } else {
                return nullptr;
            }
        }
        return here;
    }

    const common_json & root_;
    mutable size_t      n_written_out_ = 0;
};

}  // namespace

std::string grammar_of_schema(const std::string & schema) {
    check_text(schema);
    try {
        const common_json parsed = common_json::parse(schema);
        checker(parsed).check(parsed);
        return json_schema_to_grammar(parsed);
    } catch (const engine_error &) {
        throw;
    } catch (const std::bad_alloc &) {
        throw;
    } catch (const std::exception & error) {
        fail(std::string(error.what()).substr(0, 400));
    }
}

}  // namespace ai4all
