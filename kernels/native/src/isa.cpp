#include "isa.h"

#include <string>

#include "error.h"
#include "unetrt_native.h"

namespace unetrt {

namespace {

#ifdef UNETRT_HAS_AVX2
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

#ifdef UNETRT_HAS_AVX512
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif

// Null: not in this library or CPU.
const Kernels* find_kernels(int isa) {
    switch (isa) {
        case UNETRT_ISA_PORTABLE: return &portable_kernels();
#ifdef UNETRT_HAS_AVX2
        case UNETRT_ISA_AVX2: return has_avx2() ? &avx2_kernels() : nullptr;
#endif
#ifdef UNETRT_HAS_AVX512
        case UNETRT_ISA_AVX512: return has_avx512() ? &avx512_kernels() : nullptr;
#endif
        default: return nullptr;
    }
}

}  // namespace

int best_isa() {
    int isa = UNETRT_ISA_AVX512;
    while (find_kernels(isa) == nullptr) --isa;
    return isa;
}

const Kernels& kernels_for(int isa) {
    const Kernels* kernels = find_kernels(isa);
    if (kernels != nullptr) return *kernels;
    throw Error("instruction set " + std::to_string(isa) + " is not in this library or CPU; expected 0 to " +
                std::to_string(best_isa()));
}

}  // namespace unetrt
