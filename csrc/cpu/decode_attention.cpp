// Decode attention on the CPU, as defined in kernels/decode_attention.py: few queries per row over
// long shared keys, and over the listed slots of a suffix; formulas in shared/attention.h.
//
// A task is (row, head, chunk of queries, split of the keys), all sizes fixed, so that results do
// not depend on the number of threads; splits are merged afterwards, in their order. Within a task
// a block of keys and values is taken into the first-level cache as fp32 and met there by all
// queries of the chunk, four at a time: their scores fill one vector of 16 = 4 keys x 4 queries.

#include <algorithm>
#include <vector>

#include "../shared/attention.h"
#include "dispatch.h"

namespace prismer {
namespace {

constexpr int64_t kBlock = 32;     // keys at a time: with their values 16 KB at head size 64
constexpr int64_t kSplit = 512;    // keys of a task
constexpr int64_t kChunk = 32;     // queries of a task
constexpr int64_t kTile = 4;       // queries at a time
constexpr int64_t kGroup = kLanes / kTile;  // keys whose scores fill a vector

template <typename Stored>
struct Attend {
  const Stored* q;         // (R, H, Q, K)
  const Stored* shared_k;  // (R, H, S, K)
  const Stored* shared_v;
  const uint8_t* shared_mask;  // (R, Q or 1, S), 0 or 1
  const Stored* suffix_k;   // (R, H, M, K)
  const Stored* suffix_v;
  const int64_t* ancestors;  // (R, Q, A)
  float* partial;            // (R * H, Q, splits, padded + 2): accumulator, maximum, sum
  int64_t heads, queries, mask_queries, keys, slots, listed, width;
  int64_t padded;  // width rounded up to whole vectors
  int64_t chunks, splits;
  float scale;

  // what a task works on, in fp32: queries, a block of keys and values, scores
  struct Scratch {
    std::vector<float> q, k, v, scores;
    std::vector<int64_t> seen;

    explicit Scratch(int64_t padded)
        : q(kChunk * padded),
          k(kBlock * padded),
          v(kBlock * padded),
          scores(kBlock * kTile),
          seen(std::max(kSplit, kBlock)) {}
  };

  template <int Width>
  PRISMER_INLINE static void run(
      const Attend& job, const int64_t& begin, const int64_t& end, Scratch* const& scratch) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task % job.splits, rest = task / job.splits;
      const int64_t chunk = rest % job.chunks, head = rest / job.chunks;
      job.one_task<Floats<Width>>(head, chunk * kChunk, split, *scratch);
    }
  }

  float* partial_of(int64_t head, int64_t query, int64_t split) const {
    return partial + ((head * queries + query) * splits + split) * (padded + 2);
  }

  template <typename Vector>
  PRISMER_INLINE void one_task(int64_t head, int64_t first, int64_t split, Scratch& s) const {
    const int64_t row = head / heads, count = std::min(kChunk, queries - first);
    for (int64_t i = 0; i < count; ++i) {
      widen_row<Vector>(s.q.data() + i * padded, q + (head * queries + first + i) * width, scale);
      float* state = partial_of(head, first + i, split);
      std::fill_n(state, padded, 0.0f);
      state[padded] = kMasked;
      state[padded + 1] = 0.0f;
    }
    const int64_t start = split * kSplit, stop = std::min(keys, start + kSplit);
    const uint8_t* mask = shared_mask + row * mask_queries * keys;
    const int64_t mask_step = mask_queries == 1 ? 0 : keys;
    const int64_t masks = mask_step == 0 ? 1 : count;
    mask += first * mask_step;
    // by some query of the chunk, by all of them
    uint8_t any[kSplit] = {}, all[kSplit];
    std::fill_n(all, kSplit, 1);
    for (int64_t i = 0; i < masks; ++i) {
      const uint8_t* here = mask + i * mask_step + start;
      for (int64_t key = 0; key < stop - start; ++key) {
        any[key] |= here[key];
        all[key] &= here[key];
      }
    }
    int64_t seen = 0;
    bool differ = false;
    for (int64_t key = 0; key < stop - start; ++key) {
      s.seen[seen] = start + key;
      seen += any[key];
      differ = differ || any[key] != all[key];
    }
    for (int64_t block = 0; block < seen; block += kBlock) {
      const int64_t* listed_keys = s.seen.data() + block;
      const int64_t size = std::min(kBlock, seen - block);
      fetch<Vector>(s, shared_k + head * keys * width, shared_v + head * keys * width, listed_keys,
                    size);
      for (int64_t i = 0; i < count; i += kTile) {
        const int64_t tile = std::min(kTile, count - i);
        const uint8_t* tile_mask = differ ? mask + i * mask_step : nullptr;
        float* state = partial_of(head, first + i, split);
        const float* tile_q = s.q.data() + i * padded;
        if (tile == 1) {
          meet<Vector, 1>(s, tile_q, state, tile, size, listed_keys, tile_mask, mask_step);
        } else {
          meet<Vector, kTile>(s, tile_q, state, tile, size, listed_keys, tile_mask, mask_step);
        }
      }
    }
    if (split == 0) suffix<Vector>(head, row, first, count, s);
  }

  // each query with its own slots
  template <typename Vector>
  PRISMER_INLINE void suffix(
      int64_t head, int64_t row, int64_t first, int64_t count, Scratch& s) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t* slot = ancestors + (row * queries + first + i) * listed;
      for (int64_t a = 0; a < listed;) {
        int64_t size = 0;
        for (; a < listed && size < kBlock; ++a) {
          if (slot[a] >= 0) s.seen[size++] = slot[a];
        }
        fetch<Vector>(s, suffix_k + head * slots * width, suffix_v + head * slots * width,
                      s.seen.data(), size);
        meet<Vector, 1>(s, s.q.data() + i * padded, partial_of(head, first + i, 0), 1, size,
                        nullptr, nullptr, 0);
      }
    }
  }

  // fp32 times `factor`, zeros up to whole vectors
  template <typename Vector>
  PRISMER_INLINE void widen_row(float* out, const Stored* in, float factor) const {
    for_columns(width, [=](int64_t c, auto part) __attribute__((always_inline)) {
      store(out + c, load<Vector>(in + c, part) * factor);
    });
  }

  template <typename Vector>
  PRISMER_INLINE void fetch(
      Scratch& s, const Stored* k, const Stored* v, const int64_t* listed_keys,
      int64_t size) const {
    for (int64_t i = 0; i < size; ++i) {
      widen_row<Vector>(s.k.data() + i * padded, k + listed_keys[i] * width, 1.0f);
      widen_row<Vector>(s.v.data() + i * padded, v + listed_keys[i] * width, 1.0f);
    }
  }

  // Tile queries, of which `tile` are there, take in the block of keys: scores, softmax, values
  template <typename Vector, int64_t Tile>
  PRISMER_INLINE void meet(
      Scratch& s, const float* tile_q, float* state, int64_t tile, int64_t size,
      const int64_t* listed_keys, const uint8_t* mask, int64_t mask_step) const {
    constexpr int64_t group = kLanes / Tile;
    const int64_t step = splits * (padded + 2);  // from one query's state to the next
    float* scores = s.scores.data();
    // a query that is not there repeats the last
    const float* queries_at[Tile];
    for (int64_t i = 0; i < Tile; ++i) queries_at[i] = tile_q + std::min(i, tile - 1) * padded;

    Vector highest = broadcast<Vector>(kMasked);
    for (int64_t key = 0; key < size; key += group) {
      Vector products[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) products[i] = broadcast<Vector>(0.0f);
      for (int64_t c = 0; c < padded; c += kLanes) {
        Vector query[Tile];
#pragma GCC unroll 4
        for (int64_t i = 0; i < Tile; ++i) query[i] = load<Vector>(queries_at[i] + c);
#pragma GCC unroll 16
        for (int64_t k = 0; k < group; ++k) {
          // past the end of the block lie older keys or zeros, masked below
          const Vector here = load<Vector>(s.k.data() + (key + k) * padded + c);
#pragma GCC unroll 4
          for (int64_t i = 0; i < Tile; ++i) {
            products[k * Tile + i] = products[k * Tile + i] + query[i] * here;
          }
        }
      }
      Vector score = sums(products);
      if (key + group > size || mask != nullptr) {
        float lanes[kLanes];
        store(lanes, score);
        for (int64_t k = 0; k < group; ++k) {
          for (int64_t i = 0; i < Tile; ++i) {
            const bool there = key + k < size;
            if (!there || (mask != nullptr &&
                           !mask[std::min(i, tile - 1) * mask_step + listed_keys[key + k]])) {
              lanes[k * Tile + i] = kMasked;
            }
          }
        }
        score = load<Vector>(lanes);
      }
      store(scores + key * Tile, score);
      highest = max(score, highest);
    }

    float lanes[kLanes], rescale[Tile];
    store(lanes, highest);
    Softmax softmax[Tile];
    for (int64_t i = 0; i < Tile; ++i) {
      const float* old = state + std::min(i, tile - 1) * step + padded;
      softmax[i] = {old[0], old[1]};
      float top = lanes[i];
      for (int64_t k = 1; k < group; ++k) {
        const float other = lanes[k * Tile + i];
        // a NaN stays
        top = other > top || other != other ? other : top;
      }
      rescale[i] = raise_max(softmax[i], top);
      for (int64_t k = 0; k < group; ++k) lanes[k * Tile + i] = shift(softmax[i].max);
    }
    const Vector off = load<Vector>(lanes);
    Vector total = broadcast<Vector>(0.0f);
    for (int64_t key = 0; key < size; key += group) {
      const Vector weights = exp(load<Vector>(scores + key * Tile) - off);
      store(scores + key * Tile, weights);
      total = total + weights;
    }
    store(lanes, total);
    for (int64_t i = 0; i < tile; ++i) {
      float sum = lanes[i];
      for (int64_t k = 1; k < group; ++k) sum += lanes[k * Tile + i];
      float* new_state = state + i * step + padded;
      new_state[0] = softmax[i].max;
      new_state[1] = softmax[i].sum + sum;
    }

    // accumulators of as many columns as stay in registers
    constexpr int64_t columns = sizeof(Vector) == 64 && Vector::leaf ? 4 : 1;
    int64_t c = 0;
    for (; c + columns * kLanes <= padded; c += columns * kLanes) {
      add_values<Vector, Tile, columns>(s, state + c, tile, step, size, rescale, c);
    }
    for (; c < padded; c += kLanes) {
      add_values<Vector, Tile, 1>(s, state + c, tile, step, size, rescale, c);
    }
  }

  template <typename Vector, int64_t Tile, int64_t Columns>
  PRISMER_INLINE void add_values(
      const Scratch& s, float* accumulator, int64_t tile, int64_t step, int64_t size,
      const float* rescale, int64_t c) const {
    Vector sum[Tile][Columns];
#pragma GCC unroll 4
    for (int64_t i = 0; i < Tile; ++i) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < Columns; ++j) {
        sum[i][j] =
            load<Vector>(accumulator + std::min(i, tile - 1) * step + j * kLanes) * rescale[i];
      }
    }
    for (int64_t key = 0; key < size; ++key) {
      const float* values = s.v.data() + key * padded + c;
      Vector value[Columns];
#pragma GCC unroll 4
      for (int64_t j = 0; j < Columns; ++j) value[j] = load<Vector>(values + j * kLanes);
#pragma GCC unroll 4
      for (int64_t i = 0; i < Tile; ++i) {
        const Vector weight = broadcast<Vector>(s.scores[key * Tile + i]);
#pragma GCC unroll 4
        for (int64_t j = 0; j < Columns; ++j) sum[i][j] = sum[i][j] + weight * value[j];
      }
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < Tile; ++i) {
      if (i < tile) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < Columns; ++j) {
          store(accumulator + i * step + j * kLanes, sum[i][j]);
        }
      }
    }
  }
};

// the splits of a query, merged in their order
template <typename Stored>
struct Merge {
  const float* partial;  // (queries, splits, padded + 2)
  Stored* out;           // (queries, width)
  int64_t splits, padded, width;

  template <int Width>
  PRISMER_INLINE static void run(const Merge& job, const int64_t& begin, const int64_t& end) {
    using Vector = Floats<Width>;
    const int64_t step = job.padded + 2;
    for (int64_t query = begin; query < end; ++query) {
      const float* first = job.partial + query * job.splits * step;
      Softmax all;
      for (int64_t i = 0; i < job.splits; ++i) {
        const float* state = first + i * step + job.padded;
        raise_max(all, state[0]);
        all.sum += state[1] * weight(state[0], all.max);
      }
      const float scale = inverse(all.sum);
      for_columns(job.width, [&](int64_t c, auto part) __attribute__((always_inline)) {
        auto sum = broadcast<Vector>(0.0f);
        for (int64_t i = 0; i < job.splits; ++i) {
          const float* state = first + i * step;
          sum = sum + load<Vector>(state + c) * weight(state[job.padded], all.max);
        }
        store(job.out + query * job.width + c, sum * scale, part);
      });
    }
  }
};

void check_like_q(
    const char* op, const char* name, const Tensor& tensor, const Tensor& q, int64_t length) {
  STD_TORCH_CHECK(
      tensor.dim() == 4 && tensor.size(0) == q.size(0) && tensor.size(1) == q.size(1) &&
          tensor.size(2) == length && tensor.size(3) == q.size(3) &&
          tensor.scalar_type() == q.scalar_type(),
      op, ": ", name, " is ", shape_of(tensor), " ", dtype_of(tensor), "; expected (", q.size(0),
      ", ", q.size(1), ", ", length, ", ", q.size(3), ") ", dtype_of(q), " to go with q");
  check_contiguous(op, name, tensor);
}

}  // namespace

Tensor decode_attention_cpu(
    const Tensor& q, const Tensor& shared_k, const Tensor& shared_v, const Tensor& shared_mask,
    const Tensor& suffix_k, const Tensor& suffix_v, const Tensor& ancestors) {
  constexpr const char* op = "decode_attention";
  STD_TORCH_CHECK(
      q.dim() == 4 && q.size(3) >= 1 && is_fp32_or_16(q), op, ": q is ", shape_of(q), " ",
      dtype_of(q),
      "; expected (rows, heads, queries, head size >= 1) of float32, bfloat16 or float16");
  check_contiguous(op, "q", q);
  const int64_t rows = q.size(0), heads = q.size(1), queries = q.size(2), width = q.size(3);
  const int64_t keys = shared_k.dim() == 4 ? shared_k.size(2) : 0;
  const int64_t slots = suffix_k.dim() == 4 ? suffix_k.size(2) : 0;
  check_like_q(op, "shared_k", shared_k, q, keys);
  check_like_q(op, "shared_v", shared_v, q, keys);
  check_like_q(op, "suffix_k", suffix_k, q, slots);
  check_like_q(op, "suffix_v", suffix_v, q, slots);
  STD_TORCH_CHECK(
      shared_mask.dim() == 3 && shared_mask.size(0) == rows &&
          (shared_mask.size(1) == 1 || shared_mask.size(1) == queries) &&
          shared_mask.size(2) == keys && shared_mask.scalar_type() == ScalarType::Bool,
      op, ": shared_mask is ", shape_of(shared_mask), " ", dtype_of(shared_mask), "; expected (",
      rows, ", 1 or ", queries, ", ", keys, ") bool");
  check_contiguous(op, "shared_mask", shared_mask);
  STD_TORCH_CHECK(
      ancestors.dim() == 3 && ancestors.size(0) == rows && ancestors.size(1) == queries &&
          ancestors.scalar_type() == ScalarType::Long,
      op, ": ancestors is ", shape_of(ancestors), " ", dtype_of(ancestors), "; expected (", rows,
      ", ", queries, ", any) int64");
  check_contiguous(op, "ancestors", ancestors);
  const auto* slot = data<int64_t>(ancestors);
  for (int64_t i = 0; i < ancestors.numel(); ++i) {
    STD_TORCH_CHECK(
        slot[i] >= -1 && slot[i] < slots, op, ": ancestors hold ", slot[i],
        " but the suffix has ", slots, " slots; pass -1 for none");
  }
  const Tensor out = torch::stable::new_empty(q, {rows, heads, queries, width});
  if (out.numel() == 0) return out;
  const int64_t padded = (width + kLanes - 1) / kLanes * kLanes;
  const int64_t chunks = (queries + kChunk - 1) / kChunk;
  const int64_t splits = std::max<int64_t>(1, (keys + kSplit - 1) / kSplit);
  std::vector<float> partial(rows * heads * queries * splits * (padded + 2));
  with_stored_type(q, [&](auto* type) {
    using Stored = Pointee<decltype(type)>;
    const Attend<Stored> job{
        data<Stored>(q),
        data<Stored>(shared_k),
        data<Stored>(shared_v),
        data<uint8_t>(shared_mask),
        data<Stored>(suffix_k),
        data<Stored>(suffix_v),
        slot,
        partial.data(),
        heads,
        queries,
        shared_mask.size(1),
        keys,
        slots,
        ancestors.size(2),
        width,
        padded,
        chunks,
        splits,
        1.0f / std::sqrt(static_cast<float>(width))};
    using Scratch = typename Attend<Stored>::Scratch;
    const auto attend = runner<Attend<Stored>, Attend<Stored>, int64_t, int64_t, Scratch*>();
    // a task of few keys or queries is not worth waking a thread
    const int64_t work =
        std::min(kSplit, keys + ancestors.size(2)) * std::min(kChunk, queries) * width;
    torch::stable::parallel_for(
        0, rows * heads * chunks * splits, 65536 / (work + 1) + 1,
        [&](int64_t begin, int64_t end) {
          Scratch scratch(padded);
          attend(job, begin, end, &scratch);
        });
    const Merge<Stored> merge{partial.data(), mutable_data<Stored>(out), splits, padded, width};
    const auto merge_some = runner<Merge<Stored>, Merge<Stored>, int64_t, int64_t>();
    torch::stable::parallel_for(
        0, rows * heads * queries, 65536 / (splits * padded) + 1,
        [&](int64_t begin, int64_t end) { merge_some(merge, begin, end); });
  });
  return out;
}

}  // namespace prismer
