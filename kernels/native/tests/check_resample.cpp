// Resampling of one instruction set against the definitions, pixel by pixel in double precision.
#include "check_maps.h"
#include "kernels_resample.h"
#include "unetrt_native.h"

namespace unetrt::check {
namespace {

namespace isa = unetrt::UNETRT_ISA;

struct Case {
    const char* name;
    int kind, pad, channels, height, width, images, src_border, dst_border;
    bool adds;
    float scale;
};

constexpr Case kCases[] = {
    {"nearest", UNETRT_NEAREST_UP, 0, 32, 8, 8, 2, 1, 1, false, 1},
    {"nearest, padded channels", UNETRT_NEAREST_UP, 0, 5, 3, 7, 1, 0, 1, true, 0.5f},
    {"average", UNETRT_AVERAGE_DOWN, 0, 32, 16, 16, 3, 1, 0, true, 0.7071f},
    {"average of odd sizes", UNETRT_AVERAGE_DOWN, 0, 20, 7, 9, 2, 0, 1, false, 1},
    {"fir up", UNETRT_FIR_UP, 0, 16, 8, 8, 2, 0, 0, false, 1},
    {"fir up of one row", UNETRT_FIR_UP, 0, 3, 1, 5, 2, 1, 1, true, 2},
    {"fir down", UNETRT_FIR_DOWN, 0, 16, 16, 16, 2, 0, 1, true, 0.5f},
    {"fir down of two rows", UNETRT_FIR_DOWN, 0, 24, 2, 6, 1, 1, 0, false, 1},
    {"space to depth", UNETRT_SPACE_TO_DEPTH, 0, 16, 8, 8, 2, 1, 1, false, 1},
    {"space to depth of 3 channels", UNETRT_SPACE_TO_DEPTH, 0, 3, 6, 4, 3, 0, 1, true, 0.5f},
    {"space to depth of 18 channels", UNETRT_SPACE_TO_DEPTH, 0, 18, 20, 4, 1, 1, 0, false, 1},
    {"pad", UNETRT_PAD, 2, 20, 7, 5, 2, 0, 1, false, 1},
    {"crop", UNETRT_PAD, -2, 20, 11, 9, 2, 1, 0, true, 0.5f},
};

Shape find_dst(const Case& c) {
    Shape dst{c.channels, c.height, c.width, c.dst_border, c.images};
    switch (c.kind) {
        case UNETRT_NEAREST_UP:
        case UNETRT_FIR_UP: dst.height *= 2, dst.width *= 2; break;
        case UNETRT_SPACE_TO_DEPTH: dst.channels *= 4; [[fallthrough]];
        case UNETRT_AVERAGE_DOWN:
        case UNETRT_FIR_DOWN: dst.height /= 2, dst.width /= 2; break;
        default: dst.height += 2 * c.pad, dst.width += 2 * c.pad;
    }
    return dst;
}

double pixel(const OwnedMap& src, int image, int channel, int y, int x) {
    const Map& map = src.map();
    if (y < 0 || y >= map.height || x < 0 || x >= map.width) return 0;
    return src.at(image, channel, y, x);
}

constexpr double kLine[] = {1, 3, 3, 1};

// The definition of a transposed convolution: what source pixels spread onto (y, x).
double fir_up(const OwnedMap& src, int image, int channel, int y, int x) {
    double total = 0;
    for (int i = 0; i < src.map().height; ++i)
        for (int j = 0; j < src.map().width; ++j) {
            const int row = y + 1 - 2 * i, column = x + 1 - 2 * j;
            if (row < 0 || row > 3 || column < 0 || column > 3) continue;
            total += pixel(src, image, channel, i, j) * kLine[row] * kLine[column] / 16;
        }
    return total;
}

double fir_down(const OwnedMap& src, int image, int channel, int y, int x) {
    double total = 0;
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            total += pixel(src, image, channel, 2 * y - 1 + i, 2 * x - 1 + j) * kLine[i] * kLine[j] / 64;
        }
    return total;
}

double expect(const Case& c, const OwnedMap& src, int n, int channel, int y, int x) {
    double total = 0;
    switch (c.kind) {
        case UNETRT_NEAREST_UP: return pixel(src, n, channel, y / 2, x / 2);
        case UNETRT_FIR_UP: return fir_up(src, n, channel, y, x);
        case UNETRT_FIR_DOWN: return fir_down(src, n, channel, y, x);
        case UNETRT_SPACE_TO_DEPTH: return pixel(src, n, channel / 4, 2 * y + channel % 4 / 2, 2 * x + channel % 2);
        case UNETRT_PAD: return pixel(src, n, channel, y - c.pad, x - c.pad);
        default:
            for (int k = 0; k < 4; ++k) total += pixel(src, n, channel, 2 * y + k / 2, 2 * x + k % 2) / 4;
            return total;
    }
}

void run(const ResampleArgs& args) {
    for (int item = isa::resample_items(args) - 1; item >= 0; --item) isa::resample(args, item);
}

int check(const Case& c) {
    const Shape shape = find_dst(c);
    const OwnedMap src({c.channels, c.height, c.width, c.src_border, c.images}, 0);
    const OwnedMap add(shape, 0), dst(shape, kUnwritten);
    src.randomise(1, 1);
    add.randomise(2, 1);
    Map none = add.map();
    none.data = nullptr;
    run({src.map(), dst.map(), c.adds ? add.map() : none, c.scale, c.kind, c.pad});

    Expected expected(dst.map());
    for (int n = 0; n < c.images; ++n)
        for (int channel = 0; channel < shape.channels; ++channel)
            for (int y = 0; y < shape.height; ++y)
                for (int x = 0; x < shape.width; ++x) {
                    const double added = c.adds ? static_cast<double>(add.at(n, channel, y, x)) : 0.0;
                    const double value = expect(c, src, n, channel, y, x) + added;
                    expected.at(n, channel, y, x) = value * static_cast<double>(c.scale);
                }
    const double error = largest_error(dst, expected), limit = 1e-6;
    return report(error <= limit, "wrong values", c.name, error, limit) +
           report(has_zero_padding(dst), "padding not zero", c.name, 0, 0);
}

}  // namespace
}  // namespace unetrt::check

int main() {
    using namespace unetrt::check;
    if (!has_instruction_set()) return kSkipped;
    int failures = 0;
    for (const Case& c : kCases) failures += check(c);
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
