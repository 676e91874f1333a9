// The trainer's loader on one sample on the CPU: see dataloading/feed/native_pixels.py and
// dataloading/store/native_ops.py.
// The loader's threads process samples in parallel, so each op runs in the thread that calls it.
// The loops are plain: the compiler vectorises them for each instruction set. For this, each `run`
// copies its job into a local, which a write through a byte pointer cannot change.

#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "dispatch.h"

namespace prismer {
namespace {

constexpr int64_t kValues = 256;  // that a byte can have
constexpr int64_t kRgb = 3;

// the largest integer up to x; std::floor is a function call on the oldest processors
PRISMER_INLINE int32_t floor_of(float x) {
  const int32_t cut = static_cast<int32_t>(x);
  return cut - (x < static_cast<float>(cut));
}

// the nearest integer, ties to even, for |x| < 2^22
PRISMER_INLINE int32_t nearest_of(float x) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: a sum this large has no fraction bits
  return std::bit_cast<int32_t>(x + magic) - std::bit_cast<int32_t>(magic);
}

PRISMER_INLINE float within(float x, float low, float high) {
  // std::max(low, x), in this order, turns a NaN into `low`
  return std::min(std::max(low, x), high);
}

// ---- photo --------------------------------------------------------------------------------------

struct Lookup {
  uint8_t of[kRgb][kValues];
};

// autocontrast of one channel: stretches its histogram so that the ends become 0 and 255
void stretch(const int64_t* counts, uint8_t* of) {
  int low = 0, high = kValues - 1;
  while (low < high && counts[low] == 0) ++low;
  while (high > low && counts[high] == 0) --high;
  for (int v = 0; v < kValues; ++v) of[v] = static_cast<uint8_t>(v);
  if (low == high) return;
  const float scale = 255.0f / static_cast<float>(high - low);
  for (int v = low; v <= high; ++v) {
    of[v] = static_cast<uint8_t>(std::lround(static_cast<float>(v - low) * scale));
  }
}

// equalization of one channel: a value becomes the share of pixels up to it, not counting pixels of
// the lowest value
void equalize(const int64_t* counts, uint8_t* of) {
  int low = 0;
  int64_t total = 0, below = 0;
  while (low < kValues - 1 && counts[low] == 0) ++low;
  for (int v = low + 1; v < kValues; ++v) total += counts[v];
  for (int v = 0; v < kValues; ++v) {
    if (v > low) below += counts[v];
    const float scale = 255.0f / static_cast<float>(total);
    of[v] = static_cast<uint8_t>(
        total == 0 ? v : std::lround(static_cast<float>(below) * scale));
  }
}

Lookup lookup_of(const uint8_t* pixels, int64_t count, bool autocontrast, bool equalized) {
  int64_t counts[kRgb][kValues] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int c = 0; c < kRgb; ++c) ++counts[c][pixels[kRgb * i + c]];
  }
  Lookup lookup;
  for (int c = 0; c < kRgb; ++c) {
    uint8_t* of = lookup.of[c];
    for (int v = 0; v < kValues; ++v) of[v] = static_cast<uint8_t>(v);
    if (autocontrast) stretch(counts[c], of);
    if (!equalized) continue;
    int64_t stretched[kValues] = {};
    for (int v = 0; v < kValues; ++v) stretched[of[v]] += counts[c][v];
    uint8_t flat[kValues];
    equalize(stretched, flat);
    for (int v = 0; v < kValues; ++v) of[v] = flat[of[v]];
  }
  return lookup;
}

// copies line by line through the table, if any; lines of `to` are `stride` pixels apart
void look_up(
    const uint8_t* pixels, int64_t side, const Lookup* lookup, uint8_t* to, int64_t stride) {
  for (int64_t i = 0; i < side; ++i) {
    const uint8_t* from = pixels + kRgb * side * i;
    uint8_t* line = to + kRgb * stride * i;
    if (lookup == nullptr) {
      std::memcpy(line, from, kRgb * side);
      continue;
    }
    for (int64_t j = 0; j < kRgb * side; j += kRgb) {
      for (int c = 0; c < kRgb; ++c) line[j + c] = lookup->of[c][from[j + c]];
    }
  }
}

struct Planes {
  const uint8_t* pixels;  // (side, side, 3)
  uint8_t* out;           // (3, side, side)
  int64_t side;
  bool flip;

  template <int Width>
  PRISMER_INLINE static void run(const Planes& given) {
    const Planes job = given;
    const int64_t side = job.side, plane = side * side;
    for (int64_t i = 0; i < side; ++i) {
      const uint8_t* __restrict from = job.pixels + kRgb * side * i;
      for (int c = 0; c < kRgb; ++c) {
        uint8_t* __restrict to = job.out + c * plane + side * i;
        if (job.flip) {
          for (int64_t j = 0; j < side; ++j) to[j] = from[kRgb * (side - 1 - j) + c];
        } else {
          for (int64_t j = 0; j < side; ++j) to[j] = from[kRgb * j + c];
        }
      }
    }
  }
};

// one black pixel before each line and column, two after, and one last byte, so that four bytes can
// be read anywhere
constexpr int64_t kBefore = 1, kAround = 3;

struct Warp {
  const uint8_t* padded;  // (side + kAround, side + kAround, 3)
  const float* matrix;    // (2, 3)
  uint8_t* out;           // (3, side, side)
  int32_t* scratch;       // (7, side)
  int64_t side;
  bool flip;

  template <int Width>
  PRISMER_INLINE static void run(const Warp& given) {
    const Warp job = given;
    const int32_t side = static_cast<int32_t>(job.side), stride = side + kAround;
    const float* const m = job.matrix;
    int32_t* __restrict at = job.scratch;
    uint32_t* __restrict weight_x = reinterpret_cast<uint32_t*>(at + side);
    uint32_t* __restrict weight_y = weight_x + side;
    uint32_t* __restrict taps = weight_y + side;
    const float end = static_cast<float>(side);
    for (int32_t i = 0; i < side; ++i) {
      const float y = static_cast<float>(i) + 0.5f;
      // the source point of the first output pixel of the line, and the step to the next column
      float first_x = m[1] * y + m[2] + 0.5f * m[0] - 0.5f, step_x = m[0];
      const float first_y = m[4] * y + m[5] + 0.5f * m[3] - 0.5f, step_y = m[3];
      if (job.flip) {
        first_x = static_cast<float>(side - 1) - first_x;
        step_x = -step_x;
      }
      for (int32_t j = 0; j < side; ++j) {
        const float column = static_cast<float>(j);
        const float in_x = within(first_x + step_x * column, -1.0f, end);
        const float in_y = within(first_y + step_y * column, -1.0f, end);
        // in 256ths of a pixel; >> rounds negative numbers down
        const int32_t fixed_x = floor_of(in_x * 256.0f + 0.5f);
        const int32_t fixed_y = floor_of(in_y * 256.0f + 0.5f);
        weight_x[j] = fixed_x & 255;
        weight_y[j] = fixed_y & 255;
        at[j] = (((fixed_y >> 8) + int32_t{kBefore}) * stride + (fixed_x >> 8) + int32_t{kBefore}) *
                int32_t{kRgb};
      }
      uint32_t* const tap[4] = {taps, taps + side, taps + 2 * side, taps + 3 * side};
      for (int32_t j = 0; j < side; ++j) {
        const uint8_t* const top = job.padded + at[j];
        const uint8_t* const bottom = top + kRgb * stride;
        std::memcpy(tap[0] + j, top, 4);
        std::memcpy(tap[1] + j, top + kRgb, 4);
        std::memcpy(tap[2] + j, bottom, 4);
        std::memcpy(tap[3] + j, bottom + kRgb, 4);
      }
      for (int c = 0; c < kRgb; ++c) {
        uint8_t* __restrict to = job.out + (static_cast<int64_t>(c) * side + i) * side;
        const uint32_t* __restrict a = tap[0];
        const uint32_t* __restrict b = tap[1];
        const uint32_t* __restrict d = tap[2];
        const uint32_t* __restrict e = tap[3];
        for (int32_t j = 0; j < side; ++j) {
          const uint32_t right = weight_x[j], left = 256 - right, low = weight_y[j];
          const uint32_t top = (a[j] >> 8 * c & 255) * left + (b[j] >> 8 * c & 255) * right;
          const uint32_t bottom = (d[j] >> 8 * c & 255) * left + (e[j] >> 8 * c & 255) * right;
          to[j] = static_cast<uint8_t>((top * (256 - low) + bottom * low + 32768) >> 16);
        }
      }
    }
  }
};

// ---- maps ---------------------------------------------------------------------------------------

struct Map {
  const uint8_t* values;  // (h, w, planes)
  uint8_t* out;           // (planes, size, size)
  int64_t h, w, planes;
  uint8_t fill;
  std::vector<int32_t> columns, lines;  // offset in `values` of each column and line of the output
};

// Offsets of the source pixels on an axis of `source` pixels, whose window [low, high) becomes
// `size` output pixels.
std::vector<int32_t> nearest(
    int64_t source, double low, double high, int64_t size, bool flip, int64_t stride) {
  std::vector<int32_t> found(size);
  const double first = low * static_cast<double>(source);
  const double scale = (high - low) * static_cast<double>(source) / static_cast<double>(size);
  for (int64_t i = 0; i < size; ++i) {
    const double centre = static_cast<double>(flip ? size - 1 - i : i) + 0.5;
    const auto pixel = static_cast<int64_t>(first + centre * scale);
    found[i] = static_cast<int32_t>(std::clamp<int64_t>(pixel, 0, source - 1) * stride);
  }
  return found;
}

struct Resample {
  const Map* maps;
  int64_t count;
  const float* matrix;  // (2, 3) affine map, or null
  const float* turn;    // (2, 2) rotation of the vectors in maps with three planes, or null
  int32_t* scratch;     // (3, size)
  int64_t size;

  // one output line: offsets `at` of its source pixels; columns outside [first, last) get the fill
  struct Line {
    int32_t* at;
    int64_t first, last;
  };

  template <int Width>
  PRISMER_INLINE static void run(const Resample& given) {
    const Resample job = given;
    for (int64_t i = 0; i < job.size; ++i) {
      Line line{job.scratch, 0, job.size};
      for (int64_t k = 0; k < job.count; ++k) {
        const Map &map = job.maps[k], &before = job.maps[k ? k - 1 : 0];
        // most maps of a sample have one size and share the offsets
        if (k == 0 || map.h != before.h || map.w != before.w) job.find(map, i, line);
        if (map.planes == 1) {
          job.take<1>(map, i, line);
        } else {
          job.take<kRgb>(map, i, line);
          if (job.turn != nullptr) job.rotate(map, i);
        }
      }
    }
  }

  PRISMER_INLINE void find(const Map& map, int64_t i, Line& line) const {
    int32_t* __restrict at = line.at;
    int32_t* __restrict in_x = at + size;
    int32_t* __restrict in_y = in_x + size;
    const int32_t* const columns = map.columns.data();
    const int32_t* const lines = map.lines.data();
    if (matrix == nullptr) {
      const int32_t start = lines[i];
      for (int64_t j = 0; j < size; ++j) at[j] = start + columns[j];
      return;
    }
    const float* const m = matrix;
    const float row = static_cast<float>(i) + 0.5f, end = static_cast<float>(size);
    const float first_x = m[1] * row + m[2] + 0.5f * m[0], step_x = m[0];
    const float first_y = m[4] * row + m[5] + 0.5f * m[3], step_y = m[3];
    for (int64_t j = 0; j < size; ++j) {
      const float column = static_cast<float>(static_cast<int32_t>(j));
      const float x = first_x + step_x * column, y = first_y + step_y * column;
      const bool inside = (x >= 0.0f) & (x < end) & (y >= 0.0f) & (y < end);
      in_x[j] = static_cast<int32_t>(inside ? x : -1.0f);
      in_y[j] = static_cast<int32_t>(inside ? y : 0.0f);
    }
    // the part of a straight line inside a square is one interval
    line.first = 0;
    line.last = size;
    while (line.first < size && in_x[line.first] < 0) ++line.first;
    while (line.last > line.first && in_x[line.last - 1] < 0) --line.last;
    for (int64_t j = line.first; j < line.last; ++j) at[j] = lines[in_y[j]] + columns[in_x[j]];
  }

  template <int64_t Planes>
  PRISMER_INLINE void take(const Map& map, int64_t i, const Line& line) const {
    const uint8_t* const values = map.values;
    const int32_t* const at = line.at;
    const int64_t plane = size * size, first = line.first, last = line.last;
    uint8_t* __restrict to = map.out + i * size;
    for (int64_t c = 0; c < Planes; ++c) {
      std::memset(to + c * plane, map.fill, first);
      std::memset(to + c * plane + last, map.fill, size - last);
    }
#pragma GCC unroll 4
    for (int64_t j = first; j < last; ++j) {
      const uint8_t* const value = values + Planes * at[j];
      for (int64_t c = 0; c < Planes; ++c) to[c * plane + j] = value[c];
    }
  }

  // vectors are stored as (n + 1) / 2 * 255; three zeros are no vector, and stay
  PRISMER_INLINE void rotate(const Map& map, int64_t i) const {
    uint8_t* __restrict to_x = map.out + i * size;
    uint8_t* __restrict to_y = to_x + size * size;
    uint8_t* __restrict to_z = to_y + size * size;
    const float xx = turn[0], xy = turn[1], yx = turn[2], yy = turn[3];
    for (int64_t j = 0; j < size; ++j) {
      const float x = static_cast<float>(to_x[j]) / 127.5f - 1.0f;
      const float y = static_cast<float>(to_y[j]) / 127.5f - 1.0f;
      const float z = static_cast<float>(to_z[j]) / 127.5f - 1.0f;
      const int32_t some = -static_cast<int32_t>((to_x[j] | to_y[j] | to_z[j]) != 0);
      const float turned_x = xx * x + xy * y, turned_y = yx * x + yy * y;
      const float square = turned_x * turned_x + turned_y * turned_y + z * z;
      // no byte is half of 255, so the sum is never near zero
      const float scale = 127.5f / std::sqrt(square);
      to_x[j] = static_cast<uint8_t>(nearest_of(turned_x * scale + 127.5f) & some);
      to_y[j] = static_cast<uint8_t>(nearest_of(turned_y * scale + 127.5f) & some);
      to_z[j] = static_cast<uint8_t>(nearest_of(z * scale + 127.5f) & some);
    }
  }
};

struct Undifference {
  uint8_t* rows;  // (h, w)
  int64_t h, w;

  template <int Width>
  PRISMER_INLINE static void run(const Undifference& given) {
    const Undifference job = given;
    for (int64_t i = 1; i < job.h; ++i) {
      const uint8_t* __restrict above = job.rows + (i - 1) * job.w;
      uint8_t* __restrict row = job.rows + i * job.w;
      for (int64_t j = 0; j < job.w; ++j) row[j] = static_cast<uint8_t>(row[j] + above[j]);
    }
  }
};

void check_bytes(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Byte, op, ": ", name, " is ", dtype_of(tensor),
      "; expected uint8");
  check_contiguous(op, name, tensor);
}

// the data of an optional matrix; null without one
const float* checked_matrix(
    const char* op, const char* name, const std::optional<Tensor>& given, int64_t columns) {
  if (!given) return nullptr;
  STD_TORCH_CHECK(
      given->dim() == 2 && given->size(0) == 2 && given->size(1) == columns &&
          given->scalar_type() == ScalarType::Float,
      op, ": ", name, " is ", shape_of(*given), " ", dtype_of(*given), "; expected (2, ", columns,
      ") float32");
  check_contiguous(op, name, *given);
  return data<float>(*given);
}

}  // namespace

// (R, R, 3) uint8 -> out (3, R, R) uint8
void augment_photo_cpu(
    const Tensor& pixels, const std::optional<Tensor>& matrix, bool flip, bool autocontrast,
    bool equalized, Tensor out) {
  constexpr const char* op = "augment_photo";
  STD_TORCH_CHECK(
      pixels.dim() == 3 && pixels.size(0) == pixels.size(1) && pixels.size(2) == kRgb &&
          pixels.numel() > 0,
      op, ": pixels are ", shape_of(pixels), "; expected (R, R, 3)");
  const int64_t side = pixels.size(0);
  STD_TORCH_CHECK(
      out.dim() == 3 && out.size(0) == kRgb && out.size(1) == side && out.size(2) == side, op,
      ": out is ", shape_of(out), "; expected (3, ", side, ", ", side, ")");
  // offsets have 32 bits
  STD_TORCH_CHECK(side <= 16384, op, ": pixels are ", side, " wide; expected at most 16384");
  check_bytes(op, "pixels", pixels);
  check_bytes(op, "out", out);
  const float* const affine = checked_matrix(op, "matrix", matrix, 3);
  const uint8_t* from = data<uint8_t>(pixels);
  std::optional<Lookup> lookup;
  if (autocontrast || equalized) lookup = lookup_of(from, side * side, autocontrast, equalized);
  const Lookup* const table = lookup ? &*lookup : nullptr;
  if (affine == nullptr) {
    std::unique_ptr<uint8_t[]> looked_up;
    if (table != nullptr) {
      looked_up.reset(new uint8_t[kRgb * side * side]);
      look_up(from, side, table, looked_up.get(), side);
      from = looked_up.get();
    }
    runner<Planes, Planes>()({from, mutable_data<uint8_t>(out), side, flip});
    return;
  }
  const int64_t stride = side + kAround, bytes = kRgb * stride;
  const std::unique_ptr<uint8_t[]> padded(new uint8_t[bytes * stride + 1]);
  std::memset(padded.get(), 0, bytes);
  for (int64_t i = kBefore; i < kBefore + side; ++i) {
    uint8_t* line = padded.get() + i * bytes;
    std::memset(line, 0, kRgb * kBefore);
    std::memset(line + kRgb * (kBefore + side), 0, kRgb * (kAround - kBefore));
  }
  std::memset(padded.get() + (kBefore + side) * bytes, 0, (kAround - kBefore) * bytes + 1);
  look_up(from, side, table, padded.get() + kBefore * (bytes + kRgb), stride);
  std::vector<int32_t> scratch(7 * side);
  runner<Warp, Warp>()(
      {padded.get(), affine, mutable_data<uint8_t>(out), scratch.data(), side, flip});
}

// (h, w) or (h, w, 3) uint8 each -> out (1 or 3, L, L) uint8 each
void augment_maps_cpu(
    std::vector<Tensor> maps, std::vector<int64_t> fills, const Tensor& window,
    const std::optional<Tensor>& matrix, bool flip, const std::optional<Tensor>& turn,
    std::vector<Tensor> out) {
  constexpr const char* op = "augment_maps";
  STD_TORCH_CHECK(
      maps.size() == fills.size() && maps.size() == out.size(), op, ": ", maps.size(), " maps, ",
      fills.size(), " fills and ", out.size(), " outputs; give one of each for every map");
  STD_TORCH_CHECK(
      window.dim() == 1 && window.size(0) == 4 && window.scalar_type() == ScalarType::Double, op,
      ": window is ", shape_of(window), " ", dtype_of(window), "; expected (4) float64");
  check_contiguous(op, "window", window);
  const double* const box = data<double>(window);
  STD_TORCH_CHECK(
      0 <= box[0] && box[0] < box[2] && box[2] <= 1 && 0 <= box[1] && box[1] < box[3] &&
          box[3] <= 1,
      op, ": the window is ", box[0], ", ", box[1], ", ", box[2], ", ", box[3],
      "; expected x0, y0, x1, y1 as shares of the map");
  const float* const affine = checked_matrix(op, "matrix", matrix, 3);
  const float* const rotation = checked_matrix(op, "turn", turn, 2);
  if (maps.empty()) return;
  const int64_t size = out[0].dim() == 3 ? out[0].size(1) : 0;
  std::vector<Map> jobs;
  for (size_t k = 0; k < maps.size(); ++k) {
    const Tensor& map = maps[k];
    const bool flat = map.dim() == 2;
    STD_TORCH_CHECK(
        (flat || (map.dim() == 3 && map.size(2) == kRgb)) && map.numel() > 0 &&
            map.numel() <= INT32_MAX,
        op, ": a map is ", shape_of(map), "; expected (h, w) or (h, w, 3)");
    const int64_t h = map.size(0), w = map.size(1), planes = flat ? 1 : kRgb;
    STD_TORCH_CHECK(
        size >= 1 && out[k].dim() == 3 && out[k].size(0) == planes && out[k].size(1) == size &&
            out[k].size(2) == size,
        op, ": an output is ", shape_of(out[k]), "; expected (", planes, ", ", size, ", ", size,
        ")");
    STD_TORCH_CHECK(
        0 <= fills[k] && fills[k] < kValues, op, ": a fill is ", fills[k], "; expected 0 to 255");
    check_bytes(op, "a map", map);
    check_bytes(op, "an output", out[k]);
    jobs.push_back(
        {data<uint8_t>(map), mutable_data<uint8_t>(out[k]), h, w, planes,
         static_cast<uint8_t>(fills[k]), nearest(w, box[0], box[2], size, flip, 1),
         nearest(h, box[1], box[3], size, false, w)});
  }
  std::vector<int32_t> scratch(3 * size);
  runner<Resample, Resample>()(
      {jobs.data(), static_cast<int64_t>(jobs.size()), affine, rotation, scratch.data(), size});
}

// (h, w) uint8, in place: each row plus the row above it
void undifference_cpu(Tensor rows) {
  constexpr const char* op = "undifference";
  STD_TORCH_CHECK(rows.dim() == 2, op, ": rows are ", shape_of(rows), "; expected (h, w)");
  check_bytes(op, "rows", rows);
  runner<Undifference, Undifference>()(
      {mutable_data<uint8_t>(rows), rows.size(0), rows.size(1)});
}

// uint8 of any shape -> (256,) uint8: 1 for values that occur, 0 for others
Tensor values_in_use_cpu(const Tensor& values) {
  check_bytes("values_in_use", "values", values);
  const Tensor found = torch::stable::new_empty(values, {kValues});
  uint8_t* const uses = mutable_data<uint8_t>(found);
  std::memset(uses, 0, kValues);
  const uint8_t* const value = data<uint8_t>(values);
  const int64_t count = values.numel();
  uint64_t eight = 0, before = 0;
  int64_t i = 0;
  // regions are wide: most groups of eight values equal the group before
  for (; i + 8 <= count; i += 8) {
    std::memcpy(&eight, value + i, 8);
    if (i > 0 && eight == before) continue;
    for (int64_t k = i; k < i + 8; ++k) uses[value[k]] = 1;
    before = eight;
  }
  for (; i < count; ++i) uses[value[i]] = 1;
  return found;
}

}  // namespace prismer
