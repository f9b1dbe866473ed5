#include "text.h"

#include <algorithm>
#include <cstdint>

namespace ai4all {

namespace {

// Bytes that the sequence led by `lead` has; 0 when no sequence starts so.
size_t sequence_length(uint8_t lead) noexcept {
    if (lead < 0x80) {
        return 1;
    }
    if (lead >= 0xC2 && lead <= 0xDF) {
        return 2;
    }
    if (lead >= 0xE0 && lead <= 0xEF) {
        return 3;
    }
    if (lead >= 0xF0 && lead <= 0xF4) {
        return 4;
    }
    return 0;
}

// Whether `byte` may stand at place `k` (1..3) of a sequence led by `lead`: no overlong forms, no
// surrogates, nothing above U+10FFFF.
bool continues(uint8_t lead, size_t k, uint8_t byte) noexcept {
    if ((byte & 0xC0) != 0x80) {
        return false;
    }
    if (k != 1) {
        return true;
    }
    switch (lead) {
        case 0xE0: return byte >= 0xA0;
        case 0xED: return byte <= 0x9F;
        case 0xF0: return byte >= 0x90;
        case 0xF4: return byte <= 0x8F;
        default: return true;
    }
}

// Bytes of the valid sequence at `i`: 0 when invalid there, or `npos` when it is cut off.
size_t sequence_at(const std::string & bytes, size_t i) noexcept {
    const auto   lead = static_cast<uint8_t>(bytes[i]);
    const size_t n    = sequence_length(lead);
    for (size_t k = 1; k < n; ++k) {
        if (i + k == bytes.size()) {
            return std::string::npos;
        }
        if (!continues(lead, k, static_cast<uint8_t>(bytes[i + k]))) {
            return 0;
        }
    }
    return n;
}

// Length of the longest suffix of `text` that is a proper prefix of `stop`.
size_t partial_stop(const std::string & text, const std::string & stop) noexcept {
    for (size_t n = std::min(text.size(), stop.size() - 1); n > 0; --n) {
        if (text.compare(text.size() - n, n, stop, 0, n) == 0) {
            return n;
        }
    }
    return 0;
}

}  // namespace

size_t utf8_whole_prefix(const std::string & bytes) noexcept {
    size_t i = 0;
    while (i < bytes.size()) {
        const size_t n = sequence_at(bytes, i);
        if (n == std::string::npos) {
            break;
        }
        i += std::max<size_t>(n, 1);
    }
    return i;
}

std::string utf8_sanitize(const std::string & bytes) {
    std::string text;
    text.reserve(bytes.size());
    for (size_t i = 0; i < bytes.size();) {
        const size_t n = sequence_at(bytes, i);
        if (n == 0 || n == std::string::npos) {
            text += "\xEF\xBF\xBD";
            ++i;
        } else {
            text.append(bytes, i, n);
            i += n;
        }
    }
    return text;
}

std::string text_stream::push(const std::string & bytes) {
    if (stopped_) {
        return {};
    }
    kept_ += bytes;

    size_t found = std::string::npos;
    size_t held  = 0;
    for (const auto & stop : stops_) {
        found = std::min(found, kept_.find(stop));
        held  = std::max(held, partial_stop(kept_, stop));
    }
    if (found != std::string::npos) {
        stopped_         = true;
        std::string text = utf8_sanitize(kept_.substr(0, found));
        kept_.clear();
        return text;
    }

    const std::string certain = kept_.substr(0, kept_.size() - held);
    const size_t      whole   = utf8_whole_prefix(certain);
    kept_.erase(0, whole);
    return utf8_sanitize(certain.substr(0, whole));
}

std::string text_stream::flush() {
    std::string text = utf8_sanitize(kept_);
    kept_.clear();
    return text;
}

}  // namespace ai4all
