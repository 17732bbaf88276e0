// Brings the fatbin of every op into the library, each as a section of its own. The build says where they lie
// (DEEPSTITCH_FATBINS, a folder) and what they have code for (DEEPSTITCH_TARGETS, with spaces between).
#include "embedded.h"

#include <sstream>

#include "op_list.h"

// Sections rather than arrays: `deepstitch plugins check` finds them by name, and they need no time to compile.
#define DEEPSTITCH_SYMBOL(name) ".globl " name "\n.hidden " name "\n" name ":\n"
#define DEEPSTITCH_OP(folder)                                                                  \
    asm(".pushsection .deepstitch." #folder ",\"a\",%progbits\n.balign 64\n"                   \
        DEEPSTITCH_SYMBOL("deepstitch_fatbin_" #folder)                                        \
        ".incbin \"" DEEPSTITCH_FATBINS "/" #folder ".fatbin\"\n"                              \
        DEEPSTITCH_SYMBOL("deepstitch_fatbin_end_" #folder) ".popsection\n");                  \
    extern "C" __attribute__((visibility("hidden"))) const unsigned char deepstitch_fatbin_##folder[]; \
    extern "C" __attribute__((visibility("hidden"))) const unsigned char deepstitch_fatbin_end_##folder[];
DEEPSTITCH_OPS
#undef DEEPSTITCH_OP

namespace deepstitch {

const std::vector<EmbeddedCode>& embedded_code() {
#define DEEPSTITCH_OP(folder)               \
    {#folder, deepstitch_fatbin_##folder,   \
     static_cast<size_t>(deepstitch_fatbin_end_##folder - deepstitch_fatbin_##folder)},
    static const std::vector<EmbeddedCode> code{DEEPSTITCH_OPS};
#undef DEEPSTITCH_OP
    return code;
}

const std::vector<std::string>& embedded_targets() {
    static const std::vector<std::string> targets = [] {
        std::istringstream words(DEEPSTITCH_TARGETS);
        std::vector<std::string> found;
        for (std::string word; words >> word;) found.push_back(word);
        return found;
    }();
    return targets;
}

}  // namespace deepstitch
