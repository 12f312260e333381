#include "kernels_attention.h"
#include "kernels_classify.h"
#include "kernels_conv.h"
#include "kernels_copy.h"
#include "kernels_gradient.h"
#include "kernels_linear_attention.h"
#include "kernels_norm.h"
#include "kernels_resample.h"
#include "vec.h"

#define UNETRT_TEXT_OF(isa) #isa
#define UNETRT_TEXT(isa) UNETRT_TEXT_OF(isa)
#define UNETRT_TABLE_OF(isa) isa##_kernels
#define UNETRT_TABLE(isa) UNETRT_TABLE_OF(isa)

namespace unetrt {

const Kernels& UNETRT_TABLE(UNETRT_ISA)() {
    using namespace UNETRT_ISA;
    // An operator a line.
    // clang-format off
    static constexpr Kernels table = {
        UNETRT_TEXT(UNETRT_ISA), kPanel, kBlock, sizeof(Element) == 2,
        conv_items, conv,
        measure_items, measure,
        norm_workspace, norm_items, norm,
        attention_workspace, attention_scratch, attention_items, attention,
        linear_workspace, linear_scratch, linear_items, linear,
        norm_gradient_workspace, norm_gradient_items, norm_gradient,
        attention_gradient_scratch, attention_gradient_items, attention_gradient,
        tokens_items, to_tokens, pixels_items, to_pixels,
        classify_scratch, classify_items, classify,
        resample_items, resample,
        copy_items, copy, split_items, split,
        planar_items, from_planar, to_planar,
    };
    // clang-format on
    return table;
}

}  // namespace unetrt
