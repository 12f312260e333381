// A network as the caller gives it: checked, and still free of any instruction set or batch.
#pragma once

#include <cstdint>
#include <vector>

#include "unetrt_native.h"

namespace unetrt {

struct MapShape {
    int32_t channels, height, width;
};

struct Program {
    int32_t in_channels, out_channels, row_width;
    int64_t weights;
    std::vector<MapShape> maps;
    std::vector<unetrt_operator> operators;
};

// Raises Error for anything that the operators' definitions do not allow.
Program read_program(const int32_t* words, uint64_t count);

// Channels of the maps named, -1 left out.
int32_t count_channels(const Program& program, const int32_t (&maps)[2]);

}  // namespace unetrt
