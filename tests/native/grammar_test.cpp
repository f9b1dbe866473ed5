// Grammars: the same tokens are allowed as llama.cpp's own sampler allows, and nothing takes long.
//
// Usage: grammar_test TINY.gguf

#include "grammar.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "engine.h"
#include "harness.h"
#include "json_schema.h"
#include "llama.h"

using namespace ai4all;

namespace {

int failures = 0;

struct vocabulary {
    explicit vocabulary(const char * path) {
        llama_model_params params = llama_model_default_params();
        params.vocab_only         = true;
        model.reset(llama_model_load_from_file(path, params));
        if (!model) {
            std::fprintf(stderr, "%s cannot be loaded\n", path);
            std::exit(1);
        }
        vocab = llama_model_get_vocab(model.get());
        texts = std::make_shared<token_table>(vocab);
    }

    struct free_model {
        void operator()(llama_model * m) const { llama_model_free(m); }
    };
    std::unique_ptr<llama_model, free_model> model;
    const llama_vocab *                      vocab = nullptr;
    std::shared_ptr<const token_table>       texts;
};

std::string repeated(const std::string & text, size_t n) {
    std::string result;
    for (size_t i = 0; i < n; ++i) {
        result += text;
    }
    return result;
}

// The message of what a grammar is refused with, or an empty one.
std::string refusal(const vocabulary & v, const std::string & text) {
    try {
        grammar(text, v.vocab, v.texts);
    } catch (const engine_error & error) {
        CHECK(error.code() == errc::bad_request);
        return error.what();
    }
    return {};
}

std::set<llama_token> allowed_by(grammar & g, int32_t n_tokens) {
    std::vector<float>    logits(static_cast<size_t>(n_tokens), 0.0f);
    const size_t          n_left = g.mask(logits.data());
    std::set<llama_token> allowed;
    for (llama_token token = 0; token < n_tokens; ++token) {
        if (std::isfinite(logits[static_cast<size_t>(token)])) {
            allowed.insert(token);
        }
    }
    CHECK(allowed.size() == n_left);
    return allowed;
}

std::set<llama_token> allowed_by(llama_sampler * theirs, int32_t n_tokens) {
    std::vector<llama_token_data> data;
    for (llama_token token = 0; token < n_tokens; ++token) {
        data.push_back({token, 0.0f, 0.0f});
    }
    llama_token_data_array all = {data.data(), data.size(), -1, false};
    llama_sampler_apply(theirs, &all);
    std::set<llama_token> allowed;
    for (const llama_token_data & each : data) {
        if (std::isfinite(each.logit)) {
            allowed.insert(each.id);
        }
    }
    return allowed;
}

const std::vector<std::string> ordinary = {
    "root ::= \"yes\" | \"no\"",
    "root ::= [a-z]+ \" \" [0-9]{2,4}",
    "root ::= \"the \"* (\"cat\" | \"dog\")? \"!\"",
    "root ::= item (\", \" item)*\nitem ::= \"\\\"\" [^\"\\\\]* \"\\\"\" # a text\n",
    "root ::= [^a-z ]{3} .",
    "root ::= \"\\u00e9\" [\\x00-\\x7F]? \"\\U0001F600\" | \"中文\" [ä-ü]+",
    "root ::= a b\na ::= \"x\" a | \"\"\nb ::= \"y\"+ a",
    "root ::= (\"a\" | \"ab\" | \"abc\"){1,3} \"d\"",
    "root ::= \"(\" root \")\" root | \"\"",
    "root ::= [\\]\\-\\[] \"-\" [a-]",
    "root ::= \"\" (\"\" | \"x\")\n\n# nothing\nunused ::= \"q\" root",
    "root ::= \"w\" | (\n  \"hello\" |\n  \"there\"\n)",
    "root ::= .{0,3} \"\\n\" \"\\t\\r\"",
    "root ::= <[1]> \"a\" <[300]>",
    "root ::= <|im_start|> \"the\"",
    "root ::= (\"hello\")?  [1-9]? \"x\"{3}",
    "root ::= [] \"a\" | [b]{0} \"c\"",
    "root ::= \"é\"{2,} | [^\\x00-\\x7F]",
};

const std::vector<std::string> schemas = {
    "{}",
    "{\"type\":\"object\"}",
    "{\"type\":\"object\",\"properties\":{\"name\":{\"type\":\"string\"},\"age\":{\"type\":\"integer\",\"minimum\":3,"
    "\"maximum\":120},\"tags\":{\"type\":\"array\",\"items\":{\"enum\":[\"a\",\"b\",null,1.5]},\"maxItems\":3}},"
    "\"required\":[\"name\"]}",
    "{\"type\":\"array\",\"items\":{\"type\":[\"string\",\"null\",\"number\"]},\"minItems\":2}",
    "{\"type\":\"string\",\"pattern\":\"^[a-c]{2,3}(x|y)+$\"}",
    "{\"type\":\"string\",\"pattern\":\"^(?:[^\\\\]a-]|\\\\.{2})?\\\\u00e9\\\\x41$\"}",
    "{\"const\":{\"pattern\":\"(\",\"$ref\":\"#/no\",\"type\":[]}}",
    "{\"type\":\"string\",\"format\":\"date-time\"}",
    "{\"$defs\":{\"tree\":{\"type\":\"object\",\"properties\":{\"left\":{\"$ref\":\"#/$defs/tree\"}},"
    "\"additionalProperties\":false}},\"$ref\":\"#/$defs/tree\"}",
    "{\"type\":\"string\",\"minLength\":2,\"maxLength\":5}",
};

// Both follow the same random text. Theirs would abort on a token that it does not allow.
void agrees_with_upstream(const vocabulary & v, const std::string & text, uint32_t seed) {
    const int32_t n_tokens = llama_vocab_n_tokens(v.vocab);
    std::mt19937  random(seed);
    grammar       ours(text, v.vocab, v.texts);

    struct free_sampler {
        void operator()(llama_sampler * s) const { llama_sampler_free(s); }
    };
    const std::unique_ptr<llama_sampler, free_sampler> theirs(
        llama_sampler_init_grammar(v.vocab, text.c_str(), "root"));
    CHECK(theirs);
    for (int i = 0; theirs && i < 24; ++i) {
        const auto allowed = allowed_by(ours, n_tokens);
        if (allowed != allowed_by(theirs.get(), n_tokens)) {
            std::fprintf(stderr, "after %d tokens of seed %u, other tokens are allowed by:\n%s\n", i, seed,
                         text.c_str());
            ++failures;
            return;
        }
        for (llama_token token = 0; token < n_tokens; ++token) {
            CHECK(ours.allows(token) == (allowed.count(token) > 0));
        }
        if (allowed.empty()) {
            return;
        }
        // Short texts lead on; single bytes lead into the middle of characters.
        auto chosen = allowed.begin();
        std::advance(chosen, static_cast<std::ptrdiff_t>(random() % allowed.size()));
        if (llama_vocab_is_eog(v.vocab, *chosen)) {
            return;
        }
        ours.accept(*chosen);
        llama_sampler_accept(theirs.get(), *chosen);
    }
}

void refuses_what_is_no_grammar(const vocabulary & v) {
    const std::vector<std::pair<std::string, std::string>> wrong = {
        {"", "no rule named root"},
        {"rot ::= \"a\"", "no rule named root"},
        {"root", "line 1, column 5: expected ::="},
        {"root ::= \"a", "unexpected end"},
        {"root ::= [a", "unexpected end"},
        {"root ::= (\"a\"", "expected )"},
        {"root ::= \"a\")", "expected a new line"},
        {"root ::= *", "nothing to repeat"},
        {"root ::= \"\"*", "nothing to repeat"},
        {"root ::= \"a\"{", "expected a number"},
        {"root ::= \"a\"{2", "expected }"},
        {"root ::= \"a\"{3,2}", "fewer than the least"},
        {"root ::= \"a\"{2001}", "more than 2000 times"},
        {"root ::= \"a\"{99999999999999999999999}", "more than 2000 times"},
        {"root ::= \"\\q\"", "unknown escape"},
        {"root ::= \"\\x4\"", "hexadecimal"},
        {"root ::=\n  other", "line 2, column 3: no such rule"},
        {"root ::= root \"a\" | \"b\"", "begins with itself"},
        {"root ::= a\na ::= e root \"x\" | \"y\"\ne ::= f\nf ::= \"\"", "begins with itself"},
        {"root ::= (\"\" | \"a\")*", "begins with itself"},
        {"root ::= <[99999999999]", "expected ]>"},
        {"root ::= <nothing of this kind>", "not one token"},
        {"root ::= <unfinished", "expected > after"},
        {"root ::= !\"a\"", "expected <"},
        {"root ::= \"a\" %", "expected a new line"},
        {"%llguidance {}", "expected a name"},
        {"root ::= " + repeated("(", 300) + "\"a\"" + repeated(")", 300), "nested deeper"},
        {"root ::= " + repeated("(", 200'000), "nested deeper"},
        {"root ::= \"" + repeated("a", 1000) + "\"{1000}", "repetitions written out"},
        {"root ::= \"" + repeated("a", 600'000) + "\"", "written out"},
        {"root ::= " + repeated("\"a\"{0,2000} ", 100), "written out"},
        {repeated("x", 5u << 20), "bytes, at most"},
    };
    for (const auto & [text, reason] : wrong) {
        const std::string message = refusal(v, text);
        if (message.find(reason) == std::string::npos) {
            std::fprintf(stderr, "%.60s: expected '%s', got '%s'\n", text.c_str(), reason.c_str(), message.c_str());
            ++failures;
        }
    }
}

// Grammars of a few letters that a sampler without bounds follows for ever. Each ends, one way or the
// other; the test's limit of time is what would tell otherwise.
void bombs_end(const vocabulary & v) {
    std::vector<std::string> bombs = {
        // As many ways as there are texts.
        "root ::= \"a\" root \"b\" | \"a\" root \"c\" | \"d\"",
        "root ::= [a-z ] root \"b\" | [a-z ] root \"c\" | [a-z ] root | \"d\"",
        "root ::= (\" \" root \"b\") | (\" \" root \"c\") | \" \" root \" \" | \"d\"",
        "root ::= x x x x x x x x x x x x\nx ::= \"a\"* | \"a\"* \"b\"*",
        "root ::= (((((\"a\"{0,9}){0,9}){0,9}){0,9}){0,9})",
        "root ::= [\\x00-\\U0010FFFF]{0,2000}",
        "root ::= (\"a\" | \"a\" | \"a\" | \"a\"){64} \"b\"",
    };
    // Twice as many with each rule.
    std::string doubling  = "root ::= r0\n";
    std::string distinct  = "root ::= d0\n";
    std::string alternate = "root ::= o0\n";
    for (int i = 0; i < 60; ++i) {
        const std::string n    = std::to_string(i);
        const std::string next = std::to_string(i + 1);
        doubling += "r" + n + " ::= r" + next + " | r" + next + "\n";
        distinct += "d" + n + " ::= d" + next + " \"x\" | d" + next + " \"y\"\n";
        alternate += "o" + n + " ::= (\"a\" o" + next + ")? (\"a\" o" + next + ")?\n";
    }
    bombs.push_back(doubling + "r60 ::= \"a\"\n");
    bombs.push_back(distinct + "d60 ::= \"a\"\n");
    bombs.push_back(alternate + "o60 ::= \"a\"\n");
    std::string chain = "root ::= c0\n";
    for (int i = 0; i < 20'000; ++i) {
        chain += "c" + std::to_string(i) + " ::= c" + std::to_string(i + 1) + "\n";
    }
    bombs.push_back(chain + "c20000 ::= \"a\"\n");
    bombs.push_back("root ::= " + repeated("\"a\"? ", 3000));
    bombs.push_back("root ::= " + repeated("a{2000} ", 261) + "\"z\"\na ::= \"\"");
    bombs.push_back("root ::= <[4294967295]> | <[100000]> | !<[4294967295]> \"a\" | \"a\"");
    bombs.push_back("root ::= (<[4]>" + repeated(" | <[5]>", 4000) + ")*");
    bombs.push_back("root ::= (!<[4]>" + repeated(" | !<[5]>", 4000) + ")*");
    bombs.push_back("root ::= " + repeated("\"a\" | ", 3000) + "\"b\"");

    for (const std::string & text : bombs) {
        std::mt19937 random(7);
        try {
            grammar g(text, v.vocab, v.texts);
            for (int i = 0; i < 64; ++i) {
                const auto allowed = allowed_by(g, llama_vocab_n_tokens(v.vocab));
                if (allowed.empty()) {
                    break;
                }
                auto chosen = allowed.begin();
                std::advance(chosen, static_cast<std::ptrdiff_t>(random() % allowed.size()));
                g.accept(*chosen);
            }
        } catch (const engine_error & error) {
            CHECK(error.code() == errc::bad_request);
        }
    }
}

void a_grammar_that_allows_nothing(const vocabulary & v) {
    grammar g("root ::= [^\\x00-\\UFFFFFFFF]", v.vocab, v.texts);
    CHECK(allowed_by(g, llama_vocab_n_tokens(v.vocab)).empty());
    try {
        g.accept(300);
        CHECK(false);
    } catch (const engine_error & error) {
        CHECK(error.code() == errc::compute_failed);
    }
    CHECK(!g.allows(-1));
    CHECK(!g.allows(1 << 30));
}

// llama.cpp's own asks for the token's number in the middle of a token, too, and forgets those that
// are no whole character; so it is no measure here.
void tokens_by_number(const vocabulary & v) {
    grammar g("root ::= \"a\" !<[300]>", v.vocab, v.texts);
    for (llama_token token = 0; token < llama_vocab_n_tokens(v.vocab); ++token) {
        const std::string text = v.texts->text_of(token);
        CHECK(g.allows(token) == (text == "a" && !v.texts->is_end(token)));
    }
    for (llama_token token = 0; token < llama_vocab_n_tokens(v.vocab); ++token) {
        if (v.texts->text_of(token) == "a") {
            g.accept(token);
            break;
        }
    }
    for (llama_token token = 0; token < llama_vocab_n_tokens(v.vocab); ++token) {
        CHECK(g.allows(token) == (token != 300 && !v.texts->text_of(token).empty() && !v.texts->is_end(token)));
    }
    CHECK(!v.texts->text_of(300).empty());
}

// So many tokens that what was kept of the past is dropped on the way.
void a_long_text(const vocabulary & v) {
    grammar       g("root ::= (\"(\" root \")\" | [a-z] | \"é\")* [0-9]", v.vocab, v.texts);
    std::mt19937  random(3);
    const int32_t n_tokens = llama_vocab_n_tokens(v.vocab);
    for (int i = 0; i < 3000; ++i) {
        const llama_token first = static_cast<llama_token>(random() % static_cast<uint32_t>(n_tokens));
        for (llama_token k = 0; k < n_tokens; ++k) {
            const llama_token token = (first + k) % n_tokens;
            if (!v.texts->is_end(token) && g.allows(token)) {
                g.accept(token);
                break;
            }
        }
    }
    CHECK(!allowed_by(g, n_tokens).empty());
}

void schemas_have_bounds(const vocabulary & v) {
    std::string many = "{\"type\":\"object\",\"properties\":{";
    for (int i = 0; i < 129; ++i) {
        many += (i ? ",\"p" : "\"p") + std::to_string(i) + "\":{}";
    }
    std::string types = "{\"type\":[\"object\",\"object\"]}";
    for (int i = 0; i < 20; ++i) {
        types = "{\"type\":[\"array\",\"array\"],\"items\":" + types + "}";
    }
    // Twice as much with each step, once it is written out.
    std::string doubling = "{\"allOf\":[{\"$ref\":\"#/d0\"}],";
    for (int i = 0; i < 30; ++i) {
        const std::string next = "{\"$ref\":\"#/d" + std::to_string(i + 1 == 30 ? 40 : i + 1) + "\"}";
        doubling += "\"d" + std::to_string(i) + "\":{\"properties\":{\"a\":{\"allOf\":[" + next + "," + next + "]}}},";
    }
    const std::string wide  = "{\"allOf\":[{\"anyOf\":[" + repeated("{\"$ref\":\"#/d\"},", 39);
    std::string       fifty = "{\"properties\":{";
    for (int i = 0; i < 50; ++i) {
        fifty += (i ? ",\"p" : "\"p") + std::to_string(i) + "\":{}";
    }
    fifty += "}}";
    const std::vector<std::pair<std::string, std::string>> wrong = {
        {"", "json_schema: "},
        {"[]", "json_schema: "},
        {"{\"type\":\"nothing\"}", "unrecognized type"},
        {repeated("{\"items\":", 40) + "{}" + repeated("}", 40), "nested deeper"},
        {repeated("[", 100'000), "nested deeper"},
        {many + "}}", "more than 128 properties"},
        {types, "more than 8192 parts"},
        {"{\"type\":\"string\",\"pattern\":\"^" + repeated("(", 400) + "$\"}", "a group that is not supported"},
        {"{\"type\":\"string\",\"pattern\":\"[a-z]+\"}", "does not begin with ^"},
        {"{\"type\":\"string\",\"pattern\":\"^(?=a)b$\"}", "a group that is not supported"},
        {"{\"type\":\"string\",\"pattern\":\"^(a$\"}", "json_schema: "},
        {"{\"type\":\"string\",\"pattern\":\"^a^b$\"}", "not supported where it is"},
        {"{\"type\":\"string\",\"pattern\":\"^\\\\d+$\"}", "an escape that is not supported"},
        {"{\"type\":\"string\",\"pattern\":\"^a\\\\$\"}", "an escape that is not supported"},
        {"{\"type\":\"string\",\"pattern\":\"^a{x}$\"}", "a repetition that is not supported"},
        {"{\"type\":\"string\",\"pattern\":\"^a{2$\"}", "a repetition that is not supported"},
        {"{\"type\":\"string\",\"pattern\":\"" + repeated("a", 600) + "\"}", "pattern is longer"},
        {"{\"const\":\"" + repeated("a", 5000) + "\"}", "text is longer"},
        {"{\"properties\":{\"" + repeated("!", 200) + "\":{}}}", "name is longer"},
        {"{\"type\":\"integer\",\"minimum\":1e300}", "beyond what a double"},
        {"{\"type\":\"integer\",\"exclusiveMinimum\":9223372036854775807}", "beyond what a double"},
        {"{\"type\":\"array\",\"items\":{},\"minItems\":1000000000}", "json_schema: as a grammar"},
        {"{\"type\":\"array\",\"items\":{},\"minItems\":-5}", "non-negative"},
        {"{\"$ref\":\"https://example.org/schema\"}", "unsupported $ref"},
        {"{\"$defs\":{\"a\":{\"$ref\":\"#/$defs/b\"},\"b\":{\"$ref\":\"#/$defs/a\"}},\"allOf\":[{\"$ref\":\"#/$defs/"
         "a\"}]}",
         "without an end"},
        {"{\"a\":" + repeated("\"x\"", 100'000) + "}", "at most"},
        {R"({"allOf":[{"$ref":"#/d"}],"d":{"properties":{"a":{"allOf":[{"$ref":"#/d"}]}}}})", "leads back to itself"},
        {R"({"$ref":"#/d","d":{"properties":{"a":{"items":{"allOf":[{"$ref":"#/d"}]}}}}})", "leads back to itself"},
        {doubling + "\"d40\":{\"properties\":{\"a\":{}}}}", "more than 8192 parts"},
        {wide + "{\"$ref\":\"#/d\"}]}],\"d\":" + fifty + "}", "an allOf has more than 128 properties"},
    };
    for (const auto & [text, reason] : wrong) {
        std::string message;
        try {
            grammar(grammar_of_schema(text), v.vocab, v.texts);
        } catch (const engine_error & error) {
            CHECK(error.code() == errc::bad_request);
            message = error.what();
        }
        // What the grammar says is told as what the schema comes to; here, the grammar says it.
        const std::string wanted = reason == "json_schema: as a grammar" ? "grammar: " : reason;
        if (message.find(wanted) == std::string::npos) {
            std::fprintf(stderr, "%.60s: expected '%s', got '%s'\n", text.c_str(), wanted.c_str(), message.c_str());
            ++failures;
        }
    }
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s TINY.gguf\n", argv[0]);
        return 2;
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    const vocabulary v(argv[1]);
    refuses_what_is_no_grammar(v);
    schemas_have_bounds(v);
    for (uint32_t seed = 0; seed < 6; ++seed) {
        for (const std::string & text : ordinary) {
            agrees_with_upstream(v, text, seed);
        }
        for (const std::string & schema : schemas) {
            agrees_with_upstream(v, grammar_of_schema(schema), seed);
        }
    }
    bombs_end(v);
    a_grammar_that_allows_nothing(v);
    tokens_by_number(v);
    a_long_text(v);
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
