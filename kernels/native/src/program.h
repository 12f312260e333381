// A network as the caller gives it: checked, and still free of any instruction set or batch.
#pragma once

#include <cstdint>
#include <vector>

#include "unetrt_native.h"

namespace unetrt {

// scale: 0, or what one step of its bytes stands for; zero: the byte of 0.
struct MapShape {
    int32_t channels, height, width;
    float scale = 0;
    int32_t zero = 0;

    bool has_bytes() const { return scale > 0; }
};

struct Program {
    int32_t in_channels, out_channels, row_width;
    int64_t weights;
    std::vector<MapShape> maps;
    std::vector<unetrt_operator> operators;
};

// Raises Error for anything that the operators' definitions do not allow.
Program read_program(const int32_t* words, uint64_t count);

}  // namespace unetrt
