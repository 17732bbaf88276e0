// Layout, little endian: magic, format version, op name, op version, number of attributes, attributes by name,
// FNV-1a of all bytes before it. A text is its length and its bytes.
#include <cstring>

#include "op.h"

namespace deepstitch {
namespace {

constexpr uint32_t kMagic = 0x50535344;  // "DSSP"
constexpr uint32_t kFormat = 1;

uint64_t fnv1a(const uint8_t* data, size_t bytes) {
    uint64_t hash = 0xcbf29ce484222325U;
    for (size_t i = 0; i < bytes; ++i) hash = (hash ^ data[i]) * 0x100000001b3U;
    return hash;
}

class Writer {
public:
    template <class T>
    void number(T value) {
        const auto* from = reinterpret_cast<const uint8_t*>(&value);
        bytes_.insert(bytes_.end(), from, from + sizeof(T));
    }
    void text(const std::string& value) {
        number(static_cast<uint32_t>(value.size()));
        bytes_.insert(bytes_.end(), value.begin(), value.end());
    }
    void value(const AttributeValue& attribute) {
        number(static_cast<int32_t>(attribute.kind));
        switch (attribute.kind) {
            case Kind::kInt: number(attribute.integer); break;
            case Kind::kFloat: number(attribute.real); break;
            case Kind::kString: text(attribute.text); break;
            case Kind::kInts:
                number(static_cast<uint32_t>(attribute.integers.size()));
                for (const int64_t each : attribute.integers) number(each);
                break;
        }
    }
    std::vector<uint8_t> finish() {
        number(fnv1a(bytes_.data(), bytes_.size()));
        return std::move(bytes_);
    }

private:
    std::vector<uint8_t> bytes_;
};

class Reader {
public:
    Reader(const char* op, const void* data, size_t bytes)
        : op_(op), at_(static_cast<const uint8_t*>(data)), left_(bytes) {
        uint64_t stored = 0;
        require(data != nullptr && bytes > sizeof(stored), op_, ": ", bytes, " bytes are no serialized plugin");
        left_ -= sizeof(stored);
        std::memcpy(&stored, at_ + left_, sizeof(stored));
        require(stored == fnv1a(at_, left_), op_, ": the serialized plugin is damaged (its checksum differs)");
    }
    template <class T>
    T number() {
        T value;
        std::memcpy(&value, take(sizeof(T)), sizeof(T));
        return value;
    }
    std::string text() {
        const auto length = number<uint32_t>();
        return {reinterpret_cast<const char*>(take(length)), length};
    }
    AttributeValue value() {
        const auto kind = number<int32_t>();
        switch (static_cast<Kind>(kind)) {
            case Kind::kInt: return AttributeValue::of(number<int64_t>());
            case Kind::kFloat: return AttributeValue::of(number<float>());
            case Kind::kString: return AttributeValue::of(text());
            case Kind::kInts: break;
        }
        require(kind == static_cast<int32_t>(Kind::kInts), op_, ": the serialized plugin has an attribute of kind ", kind);
        const auto count = number<uint32_t>();
        require(count <= left_ / sizeof(int64_t), op_, ": the serialized plugin is cut short");
        std::vector<int64_t> numbers(count);
        for (int64_t& each : numbers) each = number<int64_t>();
        return AttributeValue::of(std::move(numbers));
    }
    void finish() const { require(left_ == 0, op_, ": the serialized plugin has ", left_, " bytes too many"); }

private:
    const uint8_t* take(size_t bytes) {
        require(bytes <= left_, op_, ": the serialized plugin is cut short");
        const uint8_t* from = at_;
        at_ += bytes;
        left_ -= bytes;
        return from;
    }
    const char* op_;
    const uint8_t* at_;
    size_t left_;
};

}  // namespace

std::vector<uint8_t> serialize(const OpInfo& info, const Attributes& attributes) {
    Writer writer;
    writer.number(kMagic);
    writer.number(kFormat);
    writer.text(info.name);
    writer.text(info.version);
    writer.number(static_cast<uint32_t>(attributes.values().size()));
    for (const auto& each : attributes.values()) {
        writer.text(each.first);
        writer.value(each.second);
    }
    return writer.finish();
}

Attributes deserialize(const OpInfo& info, const void* data, size_t bytes) {
    Reader reader(info.name, data, bytes);
    require(reader.number<uint32_t>() == kMagic, info.name, ": these bytes are no serialized plugin of deepstitch");
    const auto format = reader.number<uint32_t>();
    require(format == kFormat, info.name, ": serialized in format ", format, "; this library reads ", kFormat);
    const std::string name = reader.text();
    const std::string version = reader.text();
    require(name == info.name && version == info.version, info.name, " version ", info.version, " cannot read ", name,
            " version ", version);
    std::map<std::string, AttributeValue> values;
    for (auto count = reader.number<uint32_t>(); count > 0; --count) {
        std::string attribute = reader.text();
        values[std::move(attribute)] = reader.value();
    }
    reader.finish();
    return Attributes(info, values);
}

Instance::Instance(const OpInfo& from, Attributes resolved)
    : info(&from), attributes(std::move(resolved)), op(from.create(attributes)) {}

Instance::Instance(const OpInfo& from, const std::map<std::string, AttributeValue>& given)
    : Instance(from, Attributes(from, given)) {}

Instance::Instance(const OpInfo& from, const void* serialized, size_t bytes)
    : Instance(from, deserialize(from, serialized, bytes)) {}

std::vector<uint8_t> Instance::serialize() const { return deepstitch::serialize(*info, attributes); }

}  // namespace deepstitch
