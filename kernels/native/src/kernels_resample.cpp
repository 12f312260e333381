// Maps at another size, without parameters: each output pixel is a weighted sum of a few rows times a few columns.
#include "kernels_resample.h"

#include "kernels_common.h"

namespace unetrt::UNETRT_ISA {

namespace {

// As in the C interface.
enum Kind { kNearestUp, kAverageDown, kFirUp, kFirDown, kSpaceToDepth, kPad };

// Of dst, that an item does.
constexpr int kRows = 8;

// Source rows (or columns) of one output row, those outside of the source left out.
struct Taps {
    int count = 0;
    int place[4];
    float weight[4];
};

void add_tap(Taps& taps, int place, int size, float weight) {
    if (place < 0 || place >= size) return;
    taps.place[taps.count] = place;
    taps.weight[taps.count++] = weight;
}

// Of output row (column) i of a source with `size` rows (columns).
Taps find_taps(const ResampleArgs& args, int i, int size) {
    Taps taps;
    switch (args.kind) {
        case kNearestUp: add_tap(taps, i / 2, size, 1.0f); break;
        case kAverageDown:
            for (int k = 0; k < 2; ++k) add_tap(taps, 2 * i + k, size, 0.5f);
            break;
        case kFirUp:
            add_tap(taps, i / 2, size, 0.75f);
            add_tap(taps, i % 2 == 0 ? i / 2 - 1 : i / 2 + 1, size, 0.25f);
            break;
        case kFirDown:
            for (int k = 0; k < 4; ++k) add_tap(taps, 2 * i - 1 + k, size, k == 0 || k == 3 ? 0.125f : 0.375f);
            break;
        default: add_tap(taps, i - args.pad, size, 1.0f);
    }
    return taps;
}

// A row of one block of dst and of what is added to it (null: nothing).
struct Row {
    Element* out;
    const Element* add;
    float scale;

    void finish(int64_t i, Vec value) const {
        store(out + i, (add == nullptr ? value : value + load(add + i)) * scale);
    }
};

Row find_row(const ResampleArgs& args, int block, int y) {
    return {at(args.dst, block, y, 0), args.add.data == nullptr ? nullptr : at(args.add, block, y, 0), args.scale};
}

// Pixels [from, from + count) of a row of dst; columns: their taps, in: the source's block.
void sum_taps(const Row& row, const Map& src, const Element* in, const Taps& rows, const Taps* columns, int from,
              int count) {
    const int64_t cell = static_cast<int64_t>(src.images) * kBlock;
    const Element* lines[4];
    for (int r = 0; r < rows.count; ++r) lines[r] = in + rows.place[r] * row_of(src);
    for (int x = 0; x < count; ++x) {
        const Taps& taps = columns[x];
        for (int64_t i = 0; i < cell; i += kLanes) {
            Vec sum{};
            for (int r = 0; r < rows.count; ++r)
                for (int c = 0; c < taps.count; ++c) {
                    sum += load(lines[r] + taps.place[c] * cell + i) * (rows.weight[r] * taps.weight[c]);
                }
            row.finish((from + x) * cell + i, sum);
        }
    }
}

void resample_rows(const ResampleArgs& args, int block, int from, int to) {
    constexpr int kColumns = 32;
    const Element* in = at(args.src, block, 0, 0);
    for (int x = 0; x < args.dst.width; x += kColumns) {
        Taps columns[kColumns];
        const int count = least(kColumns, args.dst.width - x);
        for (int i = 0; i < count; ++i) columns[i] = find_taps(args, x + i, args.src.width);
        for (int y = from; y < to; ++y) {
            const Taps rows = find_taps(args, y, args.src.height);
            sum_taps(find_row(args, block, y), args.src, in, rows, columns, x, count);
        }
    }
}

// Of a block of dst a quarter of src's channels each give a 2 x 2 patch.
void rearrange_row(const ResampleArgs& args, int block, int y) {
    const int64_t cell = static_cast<int64_t>(args.dst.images) * kBlock;
    const Element* top = at(args.src, block / 4, 2 * y, 0) + block % 4 * (kBlock / 4);
    const Element* bottom = at(args.src, block / 4, 2 * y + 1, 0) + block % 4 * (kBlock / 4);
    const Row row = find_row(args, block, y);
    for (int x = 0; x < args.dst.width; ++x) {
        const Element* patch[4] = {top + 2 * x * cell, top + (2 * x + 1) * cell, bottom + 2 * x * cell,
                                   bottom + (2 * x + 1) * cell};
        for (int64_t i = 0; i < cell; i += kLanes) {
            const int64_t in = i - i % kBlock + i % kBlock / 4;
            Vec value;
            for (int lane = 0; lane < kLanes; ++lane) value[lane] = to_float(patch[lane % 4][in + lane / 4]);
            row.finish(x * cell + i, value);
        }
    }
}

}  // namespace

int resample_items(const ResampleArgs& args) { return args.dst.blocks() * divide_up(args.dst.height, kRows); }

void resample(const ResampleArgs& args, int item) {
    const int pieces = divide_up(args.dst.height, kRows), block = item / pieces;
    const int from = item % pieces * kRows, to = least(from + kRows, args.dst.height);
    if (args.kind == kSpaceToDepth) {
        for (int y = from; y < to; ++y) rearrange_row(args, block, y);
    } else {
        resample_rows(args, block, from, to);
    }
    clear_border(args.dst, block, from, to);
}

}  // namespace unetrt::UNETRT_ISA
