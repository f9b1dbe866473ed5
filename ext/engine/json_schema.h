// JSON schemas as grammars.

#pragma once

#include <string>

namespace ai4all {

// The grammar of what `schema` describes, by llama.cpp's converter. That one descends as deep as a
// schema is nested, and takes time with the cube of an object's properties and with the product of
// nested lists of types; so what it gets to see is bounded first.
// Throws engine_error(bad_request) for one that is no schema, or too much of one.
std::string grammar_of_schema(const std::string & schema);

}  // namespace ai4all
