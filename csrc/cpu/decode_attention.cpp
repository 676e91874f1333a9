// Decode attention on the CPU, as kernels/decode_attention/__init__.py defines it: few queries per
// row attend to many shared keys and to the listed slots of a suffix. Formulas: shared/attention.h.
//
// A task is (row, head, chunk of queries, split of the keys), all sizes fixed, so that results do
// not depend on the number of threads; splits are merged afterwards, in their order. Within a task
// a block of keys and values is read into the nearest caches, as fp32, where all queries of the
// chunk use it, four at a time: their scores fill one vector of 16 = 4 keys x 4 queries.

#include <algorithm>

#include "../shared/attention.h"
#include "dispatch.h"

namespace prismer {
namespace {

constexpr int64_t kBlock = 64;  // keys at a time; with their values 32 KB at head size 64
constexpr int64_t kSplit = 512;  // keys of a task
constexpr int64_t kChunk = 32;   // queries of a task
constexpr int64_t kTile = 4;     // queries at a time

template <int64_t value>
using Constant = std::integral_constant<int64_t, value>;

// `shift` of shared/attention.h for each lane of a vector
template <typename Vector>
PRISMER_INLINE Vector shifts(const Vector& max) {
  return select(less(broadcast<Vector>(kMasked), max), max, broadcast<Vector>(0.0f));
}

template <typename Stored>
struct Attend {
  const Stored* q;         // (R, H, Q, K)
  const Stored* shared_k;  // (R, H, S, K)
  const Stored* shared_v;
  const uint8_t* shared_mask;  // (R, Q or 1, S), 0 or 1
  const Stored* suffix_k;      // (R, H, M, K)
  const Stored* suffix_v;
  const int64_t* ancestors;  // (R, Q, A)
  float* partial;  // (R * H, Q, splits, padded + kLanes): accumulator, then maximum and sum
  int64_t heads, queries, mask_queries, keys, slots, listed, width;
  int64_t padded;  // width rounded up to whole vectors
  int64_t chunks, splits;
  float scale;

  // the scratch memory of one thread
  struct Scratch {
    Buffer q, k, v;            // fp32 rows of `padded`: the queries, a block of keys and values
    Buffer nobody;             // dummy accumulator for the missing queries of a tile
    Buffer max, sum;           // of the softmax, one vector per tile
    Buffer scores;             // of a tile and a block, key by key
    const float* k_at[kBlock];  // the rows of a block
    const float* v_at[kBlock];
    int64_t seen[kSplit];

    explicit Scratch(int64_t padded)
        : q(kChunk * padded),
          k(kBlock * padded),
          v(kBlock * padded),
          nobody(padded),
          max(kChunk / kTile * kLanes),
          sum(kChunk / kTile * kLanes),
          scores(kBlock * kTile) {
      std::fill_n(nobody.data(), padded, 0.0f);
    }
  };

  // the queries of a tile; `There` of the Tile lanes of a key belong to a query
  template <int64_t Tile, int64_t There>
  struct Queries {
    const float* q[There];
    float* accumulator[There];
    const uint8_t* mask[There];  // null if all queries see all keys of the chunk
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

  PRISMER_INLINE float* partial_of(int64_t head, int64_t query, int64_t split) const {
    return partial + ((head * queries + query) * splits + split) * (padded + kLanes);
  }

  template <typename Vector>
  PRISMER_INLINE void one_task(int64_t head, int64_t first, int64_t split, Scratch& s) const {
    const int64_t row = head / heads, count = std::min(kChunk, queries - first);
    for (int64_t i = 0; i < count; ++i) {
      widen_row<Vector>(s.q.data() + i * padded, q + (head * queries + first + i) * width, scale);
      std::fill_n(partial_of(head, first + i, split), padded, 0.0f);
    }
    std::fill_n(s.max.data(), kChunk / kTile * kLanes, kMasked);
    std::fill_n(s.sum.data(), kChunk / kTile * kLanes, 0.0f);

    const int64_t start = split * kSplit, stop = std::min(keys, start + kSplit);
    const int64_t mask_step = mask_queries == 1 ? 0 : keys;
    const uint8_t* mask = shared_mask + row * mask_queries * keys + first * mask_step;
    bool differ = false;
    const int64_t seen = keys_seen(s, mask, mask_step, count, start, stop, differ);
    const Stored* k = shared_k + head * keys * width;
    const Stored* v = shared_v + head * keys * width;
    for (int64_t block = 0; block < seen; block += kBlock) {
      const int64_t size = std::min(kBlock, seen - block);
      fetch<Vector>(s, k, v, s.seen + block, size);
      int64_t ahead = std::min(kBlock, seen - block - size);
      for (int64_t i = 0; i < count; i += kTile) {
        const int64_t tile = std::min(kTile, count - i);
        const auto all_of = [&](auto lanes, auto there) __attribute__((always_inline)) {
          Queries<decltype(lanes)::value, decltype(there)::value> who;
          for (int64_t j = 0; j < there; ++j) {
            // where two of three are left, the last one twice
            const int64_t here = i + std::min(j, tile - 1);
            who.q[j] = s.q.data() + here * padded;
            who.accumulator[j] =
                j < tile ? partial_of(head, first + here, split) : s.nobody.data();
            who.mask[j] = differ ? mask + here * mask_step : nullptr;
          }
          meet<Vector>(s, who, i / kTile, s.seen + block, size, k, v, ahead);
        };
        if (tile == 1) {
          all_of(Constant<1>{}, Constant<1>{});
        } else if (tile < kTile) {
          all_of(Constant<kTile>{}, Constant<kTile - 1>{});
        } else {
          all_of(Constant<kTile>{}, Constant<kTile>{});
        }
        // only the first tile prefetches the next block
        ahead = 0;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* max = s.max.data() + i / kTile * kLanes;
      const float* sum = s.sum.data() + i / kTile * kLanes;
      const int64_t step = count - i / kTile * kTile == 1 ? 1 : kTile;
      float* state = partial_of(head, first + i, split) + padded;
      state[0] = max[i % kTile];
      state[1] = 0.0f;
      for (int64_t lane = i % kTile; lane < kLanes; lane += step) state[1] += sum[lane];
    }
    if (split == 0) suffix<Vector>(head, row, first, count, s);
  }

  // lists in s.seen the keys of [start, stop) that any query of the chunk sees; sets `differ` if
  // some other query does not see one of them
  PRISMER_INLINE int64_t keys_seen(
      Scratch& s, const uint8_t* mask, int64_t mask_step, int64_t count, int64_t start,
      int64_t stop, bool& differ) const {
    uint8_t any[kSplit] = {}, all[kSplit];
    std::fill_n(all, kSplit, 1);
    for (int64_t i = 0; i < (mask_step == 0 ? 1 : count); ++i) {
      const uint8_t* here = mask + i * mask_step + start;
      for (int64_t key = 0; key < stop - start; ++key) {
        any[key] |= here[key];
        all[key] &= here[key];
      }
    }
    int64_t seen = 0;
    for (int64_t key = 0; key < stop - start; ++key) {
      s.seen[seen] = start + key;
      seen += any[key];
      differ = differ || any[key] != all[key];
    }
    return seen;
  }

  // adds each query's own slots of the suffix
  template <typename Vector>
  PRISMER_INLINE void suffix(
      int64_t head, int64_t row, int64_t first, int64_t count, Scratch& s) const {
    const Stored* k = suffix_k + head * slots * width;
    const Stored* v = suffix_v + head * slots * width;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t* slot = ancestors + (row * queries + first + i) * listed;
      float* state = partial_of(head, first + i, 0);
      std::fill_n(s.max.data(), kLanes, state[padded]);
      std::fill_n(s.sum.data(), kLanes, 0.0f);
      s.sum.data()[0] = state[padded + 1];
      const Queries<1, 1> who{{s.q.data() + i * padded}, {state}, {nullptr}};
      for (int64_t a = 0; a < listed;) {
        int64_t size = 0;
        for (; a < listed && size < kBlock; ++a) {
          s.seen[size] = slot[a];
          size += slot[a] >= 0;
        }
        if (size == 0) continue;
        fetch<Vector>(s, k, v, s.seen, size);
        meet<Vector>(s, who, 0, s.seen, size, k, v, 0);
      }
      state[padded] = s.max.data()[0];
      state[padded + 1] = sum(load<Vector>(s.sum.data()));
    }
  }

  // converts a row to fp32, multiplied by `factor` and padded with zeros to whole vectors
  template <typename Vector>
  PRISMER_INLINE void widen_row(float* out, const Stored* in, float factor) const {
    for_columns(width, [=](int64_t c, auto part) __attribute__((always_inline)) {
      store(out + c, load<Vector>(in + c, part) * factor);
    });
  }

  // points k_at and v_at to the fp32 rows of the chosen keys; k_at past `size` repeats the first
  // key
  template <typename Vector>
  PRISMER_INLINE void fetch(
      Scratch& s, const Stored* k, const Stored* v, const int64_t* chosen, int64_t size) const {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = chosen[i] * width;
      if constexpr (std::is_same_v<Stored, float>) {
        if (width == padded) {
          s.k_at[i] = k + at;
          s.v_at[i] = v + at;
          continue;
        }
      }
      s.k_at[i] = s.k.data() + i * padded;
      s.v_at[i] = s.v.data() + i * padded;
      widen_row<Vector>(s.k.data() + i * padded, k + at, 1.0f);
      widen_row<Vector>(s.v.data() + i * padded, v + at, 1.0f);
    }
    for (int64_t i = size; i < kBlock; ++i) s.k_at[i] = s.k_at[0];
  }

  // prefetches a row of the next block during the current one: blocks are too short for the
  // processor to predict the pattern
  PRISMER_INLINE void prefetch_row(const Stored* p) const {
    const char* line = reinterpret_cast<const char*>(p);
    for (int64_t i = 0; i < width * static_cast<int64_t>(sizeof(Stored)); i += 64) {
      __builtin_prefetch(line + i, 0, 2);
    }
  }

  // attends from a tile of queries to a block of keys: scores, softmax, weighted values
  template <typename Vector, int64_t Tile, int64_t There>
  PRISMER_INLINE void meet(
      Scratch& s, const Queries<Tile, There>& who, int64_t index, const int64_t* chosen,
      int64_t size, const Stored* k, const Stored* v, int64_t ahead) const {
    constexpr int64_t group = kLanes / Tile;  // keys whose scores fill one vector
    float* scores = s.scores.data();
    Vector highest = broadcast<Vector>(kMasked);
    for (int64_t key = 0; key < size; key += group) {
      for (int64_t j = key; j < std::min(key + group, ahead); ++j) {
        prefetch_row(k + chosen[size + j] * width);
      }
      Vector products[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) products[i] = broadcast<Vector>(0.0f);
      for (int64_t c = 0; c < padded; c += kLanes) {
        Vector query[There];
#pragma GCC unroll 4
        for (int64_t i = 0; i < There; ++i) query[i] = load<Vector>(who.q[i] + c);
#pragma GCC unroll 16
        for (int64_t j = 0; j < group; ++j) {
          const Vector here = load<Vector>(s.k_at[key + j] + c);
#pragma GCC unroll 4
          for (int64_t i = 0; i < There; ++i) {
            products[j * Tile + i] = products[j * Tile + i] + query[i] * here;
          }
        }
      }
      Vector score = sums<Tile == kTile ? There : 4>(products);
      if (key + group > size || who.mask[0] != nullptr) {
        float lanes[kLanes];
        store(lanes, score);
        for (int64_t j = 0; j < group; ++j) {
          for (int64_t i = 0; i < There; ++i) {
            const bool sees = key + j < size &&
                              (who.mask[i] == nullptr || who.mask[i][chosen[key + j]] != 0);
            if (!sees) lanes[j * Tile + i] = kMasked;
          }
        }
        score = load<Vector>(lanes);
      }
      store(scores + key * Tile, score);
      highest = max(score, highest);
    }

    float* max_at = s.max.data() + index * kLanes;
    float* sum_at = s.sum.data() + index * kLanes;
    const auto old_max = load<Vector>(max_at);
    const auto larger = [](const Vector& a, const Vector& b) __attribute__((always_inline)) {
      return max(a, b);
    };
    const Vector new_max = max(old_max, across<Tile>(highest, larger));
    const Vector off = shifts(new_max);
    const Vector rescale = exp(old_max - off);
    Vector sum = load<Vector>(sum_at) * rescale;
    for (int64_t key = 0; key < size; key += group) {
      const Vector weights = exp(load<Vector>(scores + key * Tile) - off);
      store(scores + key * Tile, weights);
      sum = sum + weights;
    }
    store(max_at, new_max);
    store(sum_at, sum);
    float factor[kLanes];
    store(factor, rescale);

    // as many columns at a time as their accumulators fit into registers
    constexpr int64_t columns = Vector::leaf && sizeof(Vector) == 64 ? 4 : 1;
    int64_t c = 0;
    for (; c + columns * kLanes <= padded; c += columns * kLanes) {
      const Stored* next = c == 0 ? v : nullptr;
      add_values<Vector, columns>(s, who, size, factor, c, next, chosen + size, ahead);
    }
    for (; c < padded; c += kLanes) {
      const Stored* next = c == 0 ? v : nullptr;
      add_values<Vector, 1>(s, who, size, factor, c, next, chosen + size, ahead);
    }
  }

  template <typename Vector, int64_t Columns, int64_t Tile, int64_t There>
  PRISMER_INLINE void add_values(
      const Scratch& s, const Queries<Tile, There>& who, int64_t size, const float* factor,
      int64_t c, const Stored* next, const int64_t* coming, int64_t ahead) const {
    Vector sum[There][Columns];
#pragma GCC unroll 4
    for (int64_t i = 0; i < There; ++i) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < Columns; ++j) {
        sum[i][j] = load<Vector>(who.accumulator[i] + c + j * kLanes) * factor[i];
      }
    }
    const float* weights = s.scores.data();
    for (int64_t key = 0; key < size; ++key, weights += Tile) {
      if (next != nullptr && key < ahead) prefetch_row(next + coming[key] * width);
      const float* values = s.v_at[key] + c;
      Vector value[Columns];
#pragma GCC unroll 4
      for (int64_t j = 0; j < Columns; ++j) value[j] = load<Vector>(values + j * kLanes);
#pragma GCC unroll 4
      for (int64_t i = 0; i < There; ++i) {
        const Vector weight = broadcast<Vector>(weights[i]);
#pragma GCC unroll 4
        for (int64_t j = 0; j < Columns; ++j) sum[i][j] = sum[i][j] + weight * value[j];
      }
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < There; ++i) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < Columns; ++j) {
        store(who.accumulator[i] + c + j * kLanes, sum[i][j]);
      }
    }
  }
};

// merges the splits of a query, in their order; the heads of a query lie side by side in the output
template <typename Stored>
struct Merge {
  const float* partial;  // (R * H * Q, splits, padded + kLanes)
  Stored* out;           // (R, Q, H, width)
  int64_t heads, queries, splits, padded, width;

  template <int Width>
  PRISMER_INLINE static void run(const Merge& job, const int64_t& begin, const int64_t& end) {
    using Vector = Floats<Width>;
    const int64_t step = job.padded + kLanes;
    for (int64_t query = begin; query < end; ++query) {
      const float* first = job.partial + query * job.splits * step;
      const int64_t row_head = query / job.queries, row = row_head / job.heads;
      const int64_t head = row_head % job.heads, own = query % job.queries;
      Stored* out = job.out + ((row * job.queries + own) * job.heads + head) * job.width;
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
        store(out + c, sum * scale, part);
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
  const Tensor out = torch::stable::new_empty(q, {rows, queries, heads, width});
  if (out.numel() == 0) return out;
  const int64_t padded = (width + kLanes - 1) / kLanes * kLanes;
  const int64_t chunks = (queries + kChunk - 1) / kChunk;
  const int64_t splits = std::max<int64_t>(1, (keys + kSplit - 1) / kSplit);
  const Buffer partial(rows * heads * queries * splits * (padded + kLanes));
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
    // small tasks are grouped, because waking a thread costs more than one of them
    const int64_t work =
        std::min(kSplit, keys + ancestors.size(2)) * std::min(kChunk, queries) * width;
    torch::stable::parallel_for(
        0, rows * heads * chunks * splits, 65536 / (work + 1) + 1,
        [&](int64_t begin, int64_t end) {
          Scratch scratch(padded);
          attend(job, begin, end, &scratch);
        });
    const Merge<Stored> merge{
        partial.data(), mutable_data<Stored>(out), heads, queries, splits, padded, width};
    const auto merge_some = runner<Merge<Stored>, Merge<Stored>, int64_t, int64_t>();
    torch::stable::parallel_for(
        0, rows * heads * queries, 65536 / (splits * padded) + 1,
        [&](int64_t begin, int64_t end) { merge_some(merge, begin, end); });
  });
  return out;
}

}  // namespace prismer
