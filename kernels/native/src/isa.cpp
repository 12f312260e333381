#include "isa.h"

#include <string>

#if defined(UNETRT_HAS_AMX_BF16) && !defined(UNETRT_EMULATED_TILES)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#ifdef UNETRT_HAS_AVX512_BF16
bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

#ifdef UNETRT_EMULATED_TILES
bool has_amx_bf16() { return has_avx512_bf16(); }
#elif defined(UNETRT_HAS_AMX_BF16)
// The processor has it, and the kernel lets this process keep tiles: a thread's state grows by 8 KiB.
bool has_amx_bf16() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_avx512_bf16() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25;
    if ((d & kBf16) == 0 || (d & kTiles) == 0 || (d & kInt8) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

const Kernels* find_kernels(int isa) {
    switch (isa) {
        case UNETRT_ISA_PORTABLE: return &portable_kernels();
#ifdef UNETRT_HAS_AVX2
        case UNETRT_ISA_AVX2: return has_avx2() ? &avx2_kernels() : nullptr;
#endif
#ifdef UNETRT_HAS_AVX512
        case UNETRT_ISA_AVX512: return has_avx512() ? &avx512_kernels() : nullptr;
#endif
#ifdef UNETRT_HAS_AVX512_BF16
        case UNETRT_ISA_AVX512_BF16: return has_avx512_bf16() ? &avx512_bf16_kernels() : nullptr;
#endif
#ifdef UNETRT_HAS_AMX_BF16
        case UNETRT_ISA_AMX_BF16: return has_amx_bf16() ? &amx_bf16_kernels() : nullptr;
#endif
        default: return nullptr;
    }
}

int best_isa(int precision) {
    const bool is_fp32 = precision == UNETRT_FP32;
    const int least = is_fp32 ? UNETRT_ISA_PORTABLE : UNETRT_ISA_AVX512_BF16;
    for (int isa = is_fp32 ? UNETRT_ISA_AVX512 : UNETRT_ISA_AMX_BF16; isa >= least; --isa) {
        if (find_kernels(isa) != nullptr) return isa;
    }
    return -1;
}

const Kernels& kernels_for(int isa) {
    const Kernels* kernels = find_kernels(isa);
    if (kernels != nullptr) return *kernels;
    throw Error("instruction set " + std::to_string(isa) + " is not in this library or CPU; the fastest for fp32 is " +
                std::to_string(best_isa(UNETRT_FP32)) + ", for bf16 " + std::to_string(best_isa(UNETRT_BF16)));
}

}  // namespace unetrt
