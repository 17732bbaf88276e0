#include "op.h"
#include "op_list.h"

namespace deepstitch {

// Each is defined in op.cpp of its folder.
#define DEEPSTITCH_OP(folder) const OpInfo& folder();
DEEPSTITCH_OPS
#undef DEEPSTITCH_OP

const std::vector<const OpInfo*>& ops() {
#define DEEPSTITCH_OP(folder) &folder(),
    static const std::vector<const OpInfo*> all = {DEEPSTITCH_OPS};
#undef DEEPSTITCH_OP
    return all;
}

const OpInfo& find_op(const std::string& name) {
    std::string known;
    for (const OpInfo* each : ops()) {
        if (name == each->name) return *each;
        known += concat(known.empty() ? "" : ", ", each->name);
    }
    refuse("there is no op ", name, "; this library has ", known.empty() ? "none" : known);
}

}  // namespace deepstitch
