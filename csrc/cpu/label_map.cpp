// label_map on the CPU, forward and backward, as kernels/label_map.py defines it. Formulas:
// shared/label_map.h. Most pixels lie inside one region: their four taps name the same row, so the
// forward pass copies it, and the backward pass adds to it, without blending.

#include "../shared/label_map.h"

#include <cstring>
#include <vector>

#include "dispatch.h"

namespace prismer {
namespace {

constexpr int64_t kIds = 256;   // values of a byte
constexpr int64_t kLines = 16;  // output lines of a block of the backward pass

// the ids of the images, and the positions at which the output reads them
struct Source {
  const uint8_t* ids;   // (B, h, w)
  const int64_t* rows;  // (B, kIds)
  int64_t h, w, size;
  const Tap<float, int64_t>* taps_y;
  const Tap<float, int64_t>* taps_x;

  // calls body(column, ids of the four taps, their rows, upper weights in y and x) for each column
  // of an output line of image b
  template <typename Body>
  PRISMER_INLINE void along(int64_t b, int64_t line, const Body& body) const {
    const Tap<float, int64_t> y = taps_y[line];
    const uint8_t* top = ids + (b * h + y.low) * w;
    const uint8_t* bottom = ids + (b * h + y.high) * w;
    const int64_t* row_of = rows + b * kIds;
    for (int64_t j = 0; j < size; ++j) {
      const Tap<float, int64_t> x = taps_x[j];
      const uint8_t id[4] = {top[x.low], top[x.high], bottom[x.low], bottom[x.high]};
      const int64_t row[4] = {row_of[id[0]], row_of[id[1]], row_of[id[2]], row_of[id[3]]};
      body(j, id, row, y.upper, x.upper);
    }
  }
};

PRISMER_INLINE bool one_region(const int64_t (&row)[4]) {
  return row[0] == row[1] && row[0] == row[2] && row[0] == row[3];
}

template <typename Stored>
struct Forward {
  Source source;
  const Stored* features;  // (F, width)
  const float* widened;    // the same in fp32
  Stored* out;             // (B, size, size, width)
  int64_t width;

  // output lines [begin, end) of B * size
  template <int Width>
  PRISMER_INLINE static void run(const Forward& job, const int64_t& begin, const int64_t& end) {
    for (int64_t line = begin; line < end; ++line) {
      if (job.width == 64) {
        job.one_line<Floats<Width>, 64>(line);
      } else {
        job.one_line<Floats<Width>, 0>(line);
      }
    }
  }

  template <typename Vector, int64_t Known>
  PRISMER_INLINE void one_line(int64_t line) const {
    const int64_t C = Known ? Known : width, size = source.size;
    const Stored* const stored = features;
    const float* const table = widened;
    Stored* const pixels = out + line * size * C;
    source.along(line / size, line % size, [=](
        int64_t j, const uint8_t (&)[4], const int64_t (&row)[4], float upper_y, float upper_x)
        __attribute__((always_inline)) {
      Stored* const pixel = pixels + j * C;
      if (one_region(row)) {
        std::memcpy(pixel, stored + row[0] * C, C * sizeof(Stored));
        return;
      }
      const auto weights = tap_weights(upper_y, upper_x);
      for_columns(C, [=](int64_t c, auto part) __attribute__((always_inline)) {
        store(pixel + c,
              blend(weights, load<Vector>(table + row[0] * C + c, part),
                    load<Vector>(table + row[1] * C + c, part),
                    load<Vector>(table + row[2] * C + c, part),
                    load<Vector>(table + row[3] * C + c, part)),
              part);
      });
    });
  }
};

template <typename Stored>
struct Backward {
  Source source;
  const Stored* dy;   // (B, size, size, width)
  float* sums;        // (blocks, kIds, width): sum of the gradients of each id
  uint8_t* touched;   // (blocks, kIds), zeros at first; 1 for the ids that have a sum
  int64_t width, blocks_of_image;

  // blocks of kLines output lines
  template <int Width>
  PRISMER_INLINE static void run(const Backward& job, const int64_t& begin, const int64_t& end) {
    for (int64_t block = begin; block < end; ++block) {
      if (job.width == 64) {
        job.one_block<Floats<Width>, 64>(block);
      } else {
        job.one_block<Floats<Width>, 0>(block);
      }
    }
  }

  template <typename Vector, int64_t Known>
  PRISMER_INLINE void one_block(int64_t block) const {
    const int64_t C = Known ? Known : width, size = source.size;
    const int64_t b = block / blocks_of_image, first = block % blocks_of_image * kLines;
    float* const table = sums + block * kIds * C;
    uint8_t* const seen = touched + block * kIds;
    const auto add = [=](uint8_t id, float weight, const Stored* grad)
        __attribute__((always_inline)) {
      float* const sum = table + id * C;
      if (!seen[id]) {
        seen[id] = 1;
        std::fill_n(sum, C, 0.0f);
      }
      for_columns(C, [=](int64_t c, auto part) __attribute__((always_inline)) {
        store(sum + c,
              load<Vector>(sum + c, part) + weight * load<Vector>(grad + c, part), part);
      });
    };
    for (int64_t line = first; line < std::min(size, first + kLines); ++line) {
      const Stored* const pixels = dy + (b * size + line) * size * C;
      source.along(b, line, [=](
          int64_t j, const uint8_t (&id)[4], const int64_t (&row)[4], float upper_y,
          float upper_x) __attribute__((always_inline)) {
        const Stored* const grad = pixels + j * C;
        if (one_region(row)) return add(id[0], 1.0f, grad);
        const auto weights = tap_weights(upper_y, upper_x);
        // skip taps of weight 0: 0 * NaN would be NaN
        if (weights.w00 != 0.0f) add(id[0], weights.w00, grad);
        if (weights.w01 != 0.0f) add(id[1], weights.w01, grad);
        if (weights.w10 != 0.0f) add(id[2], weights.w10, grad);
        if (weights.w11 != 0.0f) add(id[3], weights.w11, grad);
      });
    }
  }
};

// adds the sums of all blocks to the rows of the table, in the order of blocks and ids
struct Scatter {
  const float* sums;
  const uint8_t* touched;
  const int64_t* rows;
  float* dfeatures;
  int64_t blocks, blocks_of_image, width;

  template <int Width>
  PRISMER_INLINE static void run(const Scatter& job) {
    using Vector = Floats<Width>;
    for (int64_t at = 0; at < job.blocks * kIds; ++at) {
      if (!job.touched[at]) continue;
      const int64_t b = at / kIds / job.blocks_of_image;
      const float* sum = job.sums + at * job.width;
      float* total = job.dfeatures + job.rows[b * kIds + at % kIds] * job.width;
      for_columns(job.width, [=](int64_t c, auto part) __attribute__((always_inline)) {
        store(total + c, load<Vector>(total + c, part) + load<Vector>(sum + c, part), part);
      });
    }
  }
};

// the taps of one image axis
std::vector<Tap<float, int64_t>> taps_along(int64_t source, int64_t size) {
  std::vector<Tap<float, int64_t>> taps(size);
  for (int64_t i = 0; i < size; ++i) taps[i] = tap<float, int64_t>(i, source, size);
  return taps;
}

void check_map(
    const char* op, const Tensor& ids, const Tensor& rows, int64_t size, int64_t num_rows) {
  STD_TORCH_CHECK(
      ids.dim() == 3 && ids.size(1) >= 1 && ids.size(2) >= 1 &&
          ids.scalar_type() == ScalarType::Byte,
      op, ": ids are ", shape_of(ids), " ", dtype_of(ids),
      "; expected (B, h, w) uint8 with at least one pixel");
  STD_TORCH_CHECK(
      rows.dim() == 2 && rows.size(0) == ids.size(0) && rows.size(1) == kIds &&
          rows.scalar_type() == ScalarType::Long,
      op, ": rows are ", shape_of(rows), " ", dtype_of(rows), "; expected (", ids.size(0),
      ", 256) int64");
  STD_TORCH_CHECK(size >= 1, op, ": size is ", size, "; expected at least one pixel");
  check_contiguous(op, "ids", ids);
  check_contiguous(op, "rows", rows);
  const auto* row = data<int64_t>(rows);
  for (int64_t i = 0; i < rows.numel(); ++i) {
    STD_TORCH_CHECK(
        row[i] >= 0 && row[i] < num_rows, op, ": rows hold ", row[i], " but features have ",
        num_rows, " rows; build both from the same class table");
  }
}

}  // namespace

// (B, h, w) uint8, (B, 256) int64, (F, C) -> (B, size, size, C)
Tensor label_map_cpu(
    const Tensor& ids, const Tensor& rows, const Tensor& features, int64_t size) {
  constexpr const char* op = "label_map";
  STD_TORCH_CHECK(
      features.dim() == 2 && is_fp32_or_16(features), op, ": features are ", shape_of(features),
      " ", dtype_of(features), "; expected (F, C) of float32, bfloat16 or float16");
  check_contiguous(op, "features", features);
  check_map(op, ids, rows, size, features.size(0));
  const int64_t B = ids.size(0), h = ids.size(1), w = ids.size(2), width = features.size(1);
  const Tensor out = torch::stable::new_empty(features, {B, size, size, width});
  if (out.numel() == 0) return out;
  const auto taps_y = taps_along(h, size), taps_x = taps_along(w, size);
  const Source source{
      data<uint8_t>(ids), data<int64_t>(rows), h, w, size, taps_y.data(), taps_x.data()};
  with_stored_type(features, [&](auto* type) {
    using Stored = Pointee<decltype(type)>;
    const auto* stored = data<Stored>(features);
    const Buffer widened(features.numel());
    runner<Widen, float*, const Stored*, int64_t>()(widened.data(), stored, features.numel());
    const Forward<Stored> job{source, stored, widened.data(), mutable_data<Stored>(out), width};
    const auto body = runner<Forward<Stored>, Forward<Stored>, int64_t, int64_t>();
    // a thread gets at least 64 K numbers: waking it for fewer does not pay
    torch::stable::parallel_for(
        0, B * size, 65536 / (size * width) + 1,
        [&](int64_t begin, int64_t end) { body(job, begin, end); });
  });
  return out;
}

// (B, size, size, C), (B, h, w) uint8, (B, 256) int64 -> (num_rows, C) fp32
Tensor label_map_backward_cpu(
    const Tensor& dy, const Tensor& ids, const Tensor& rows, int64_t num_rows) {
  constexpr const char* op = "label_map_backward";
  STD_TORCH_CHECK(
      dy.dim() == 4 && dy.size(0) == ids.size(0) && dy.size(1) == dy.size(2) &&
          is_fp32_or_16(dy),
      op, ": dy is ", shape_of(dy), " ", dtype_of(dy),
      "; expected (B, size, size, C) of float32, bfloat16 or float16, B as in ids ",
      shape_of(ids));
  check_contiguous(op, "dy", dy);
  check_map(op, ids, rows, dy.size(1), num_rows);
  const int64_t B = ids.size(0), h = ids.size(1), w = ids.size(2);
  const int64_t size = dy.size(1), width = dy.size(3);
  const Tensor dfeatures = torch::stable::new_empty(dy, {num_rows, width}, ScalarType::Float);
  std::fill_n(mutable_data<float>(dfeatures), dfeatures.numel(), 0.0f);
  if (dy.numel() == 0) return dfeatures;
  const auto taps_y = taps_along(h, size), taps_x = taps_along(w, size);
  const Source source{
      data<uint8_t>(ids), data<int64_t>(rows), h, w, size, taps_y.data(), taps_x.data()};
  const int64_t blocks_of_image = (size + kLines - 1) / kLines, blocks = B * blocks_of_image;
  const Buffer sums(blocks * kIds * width);
  std::vector<uint8_t> touched(blocks * kIds);
  with_stored_type(dy, [&](auto* type) {
    using Stored = Pointee<decltype(type)>;
    const Backward<Stored> job{
        source, data<Stored>(dy), sums.data(), touched.data(), width, blocks_of_image};
    const auto body = runner<Backward<Stored>, Backward<Stored>, int64_t, int64_t>();
    torch::stable::parallel_for(
        0, blocks, 65536 / (kLines * size * width) + 1,
        [&](int64_t begin, int64_t end) { body(job, begin, end); });
  });
  runner<Scatter, Scatter>()(
      {sums.data(), touched.data(), source.rows, mutable_data<float>(dfeatures), blocks,
       blocks_of_image, width});
  return dfeatures;
}

}  // namespace prismer
