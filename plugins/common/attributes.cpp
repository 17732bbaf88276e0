#include <cstdlib>
#include <stdexcept>

#include "op.h"

namespace deepstitch {
namespace {

const char* kind_name(Kind kind) {
    switch (kind) {
        case Kind::kInt: return "int";
        case Kind::kFloat: return "float";
        case Kind::kString: return "string";
        case Kind::kInts: return "ints";
    }
    return "?";
}

AttributeValue parse_default(const AttributeSpec& spec) {
    const std::string text = spec.default_text == nullptr ? "" : spec.default_text;
    switch (spec.kind) {
        case Kind::kInt: return AttributeValue::of(static_cast<int64_t>(std::strtoll(text.c_str(), nullptr, 10)));
        case Kind::kFloat: return AttributeValue::of(std::strtof(text.c_str(), nullptr));
        case Kind::kString: return AttributeValue::of(text);
        case Kind::kInts: break;
    }
    std::vector<int64_t> numbers;
    std::istringstream in(text);
    for (std::string part; std::getline(in, part, ',');) numbers.push_back(std::strtoll(part.c_str(), nullptr, 10));
    return AttributeValue::of(std::move(numbers));
}

}  // namespace

AttributeValue AttributeValue::of(int64_t value) {
    AttributeValue made;
    made.kind = Kind::kInt;
    made.integer = value;
    return made;
}

AttributeValue AttributeValue::of(float value) {
    AttributeValue made;
    made.kind = Kind::kFloat;
    made.real = value;
    return made;
}

AttributeValue AttributeValue::of(std::string value) {
    AttributeValue made;
    made.kind = Kind::kString;
    made.text = std::move(value);
    return made;
}

AttributeValue AttributeValue::of(std::vector<int64_t> value) {
    AttributeValue made;
    made.kind = Kind::kInts;
    made.integers = std::move(value);
    return made;
}

Attributes::Attributes(const OpInfo& info, const std::map<std::string, AttributeValue>& given) {
    for (const AttributeSpec& spec : info.attributes) {
        const auto found = given.find(spec.name);
        if (found == given.end()) {
            require(!spec.required, info.name, " needs the attribute ", spec.name);
            values_[spec.name] = parse_default(spec);
            continue;
        }
        require(found->second.kind == spec.kind, info.name, ": attribute ", spec.name, " is of kind ",
                kind_name(found->second.kind), "; it must be of kind ", kind_name(spec.kind));
        values_[spec.name] = found->second;
    }
    for (const auto& each : given) {
        require(values_.count(each.first) != 0, info.name, " has no attribute ", each.first);
    }
}

const AttributeValue& Attributes::get(const char* name, Kind kind) const {
    const auto found = values_.find(name);
    if (found == values_.end() || found->second.kind != kind) {
        throw std::logic_error(concat("the op declares no attribute ", name, " of kind ", kind_name(kind)));
    }
    return found->second;
}

int64_t Attributes::integer(const char* name) const { return get(name, Kind::kInt).integer; }
float Attributes::real(const char* name) const { return get(name, Kind::kFloat).real; }
const std::string& Attributes::text(const char* name) const { return get(name, Kind::kString).text; }
const std::vector<int64_t>& Attributes::integers(const char* name) const { return get(name, Kind::kInts).integers; }

}  // namespace deepstitch
