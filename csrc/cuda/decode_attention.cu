// Decode attention in CUDA, with the keys split over blocks, as
// kernels/decode_attention/__init__.py defines it.
//
// Few queries attend to many keys, so a block is a (row and head, tile of queries, split of the
// shared keys), and one more split has the private suffixes. A block loads 32 keys and values at a
// time into shared memory, once for all its queries. Each of its four warps owns up to four queries:
// a lane scores one key, the warp updates the softmax, then a lane owns pairs of channels and walks
// the keys. What each split found (maximum, sum, weighted values) is merged by a second kernel in the
// order of the splits, which depend on the number of keys alone: a row gives the same bits in any
// batch, and a query in any tile.

#include "launch.cuh"

#include "../shared/attention.h"

namespace prismer {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kKeys = kWarp;        // keys of a tile: each lane scores one
constexpr int64_t kSplitKeys = 256;
constexpr int kMergeThreads = 256;

// kPairs: pairs of channels of each lane, so that 64 * kPairs >= head size
template <typename T, int kPairs>
struct Tile {
  // with the largest head size, fewer queries fit into 48 KB
  static constexpr int kQueries = kPairs == 4 ? 2 : 4;  // for each warp
  static constexpr bool kTwoBuffers = sizeof(T) == 2 || kPairs <= 2;

  // elements from key to key: an odd number of 16-byte words, to avoid bank conflicts
  PRISMER_SHARED static int stride(int head) {
    return (head / kWidest<T> | 1) * kWidest<T>;
  }

  static unsigned bytes(int head) {
    return kWarps * kQueries * head * sizeof(float) +
           (kTwoBuffers ? 2 : 1) * kKeys * stride(head) * sizeof(T);
  }
};

// the running softmax of a warp's queries; `sum` is this lane's part of it
template <int kQueries, int kPairs>
struct State {
  Softmax softmax[kQueries];
  float out[kQueries][kPairs][2] = {};
};

// q . k over the head for up to kQueries queries that lie kWarps apart
template <typename T, int kQueries>
__device__ __forceinline__ void dot(
    const float* q, const T* k, int head, int active, float (&scores)[kQueries]) {
#pragma unroll
  for (int i = 0; i < kQueries; ++i) scores[i] = 0.0f;
  for (int channel = 0; channel < head; channel += 8) {
    float key[8];
    load(k + channel, key);
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      if (i >= active) break;
      float query[8];
      load(q + i * kWarps * head + channel, query);
      // sum in short chains: one chain over the whole head would round more
      float sum = query[0] * key[0];
#pragma unroll
      for (int c = 1; c < 8; ++c) sum += query[c] * key[c];
      scores[i] += sum;
    }
  }
}

// add this lane's score of one key to the softmax; returns its weight
template <int kPairs>
__device__ __forceinline__ float update(Softmax& softmax, float (&out)[kPairs][2], float score) {
  const float rescale = raise_max(softmax, warp_max(score));
  const float own = weight(score, softmax.max);
  softmax.sum += own;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    out[pair][0] *= rescale;
    out[pair][1] *= rescale;
  }
  return own;
}

template <typename T, int kPairs>
__device__ __forceinline__ void load_pairs(const T* v, int head, float (&out)[kPairs][2]) {
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    const int channel = 2 * (pair * kWarp + static_cast<int>(threadIdx.x % kWarp));
    if (channel < head) {
      load(v + channel, out[pair]);
    } else {
      out[pair][0] = out[pair][1] = 0.0f;
    }
  }
}

// copies `count` rows of (keys, head) into shared memory and fills the rest of the tile with zeros
template <typename T>
__device__ __forceinline__ void load_tile(
    const T* source, T* tile, int count, int head, int stride) {
  const int words = head / kWidest<T>;
  for (int i = threadIdx.x; i < kKeys * words; i += kThreads) {
    const int key = i / words, word = i % words * kWidest<T>;
    Pack<T, kWidest<T>> pack{};
    if (key < count) {
      pack = *reinterpret_cast<const Pack<T, kWidest<T>>*>(source + int64_t{key} * head + word);
    }
    *reinterpret_cast<Pack<T, kWidest<T>>*>(tile + key * stride + word) = pack;
  }
}

template <typename T, int kPairs>
__global__ void __launch_bounds__(kThreads, 3) split_kernel(
    DecodeAttention args, int shared_splits) {
  using Shape = Tile<T, kPairs>;
  constexpr int kQueries = Shape::kQueries;
  PRISMER_DYNAMIC_SHARED(shared);
  const int head = static_cast<int>(args.head), stride = Shape::stride(head);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float* q_tile = reinterpret_cast<float*>(shared);  // (kQueries, kWarps, head)
  T* k_tile = reinterpret_cast<T*>(q_tile + kQueries * kWarps * head);
  T* v_tile = k_tile + (Shape::kTwoBuffers ? kKeys * stride : 0);

  const int64_t row_head = blockIdx.x, row = row_head / args.heads;
  const int64_t first_query = int64_t{blockIdx.y} * kQueries * kWarps;
  const int queries = static_cast<int>(
      args.queries - first_query < kQueries * kWarps ? args.queries - first_query
                                                     : kQueries * kWarps);
  // query i of this warp is number i * kWarps + warp of the tile
  const int active = (queries - warp + kWarps - 1) / kWarps;

  const T* q = static_cast<const T*>(args.q) + (row_head * args.queries + first_query) * head;
  const float scale = 1.0f / sqrtf(static_cast<float>(head));
  for (int i = threadIdx.x; i < queries * head; i += kThreads) q_tile[i] = to_float(q[i]);
  __syncthreads();

  const float* own_q = q_tile + warp * head;
  State<kQueries, kPairs> state;
  float scores[kQueries];

  if (static_cast<int>(blockIdx.z) < shared_splits) {
    const int64_t begin = blockIdx.z * kSplitKeys;
    const int64_t end = begin + kSplitKeys < args.keys ? begin + kSplitKeys : args.keys;
    const T* k = static_cast<const T*>(args.shared_k) + row_head * args.keys * head;
    const T* v = static_cast<const T*>(args.shared_v) + row_head * args.keys * head;
    const uint8_t* mask = args.mask + row * args.mask_queries * args.keys;
    for (int64_t base = begin; base < end; base += kKeys) {
      const int count = static_cast<int>(end - base < kKeys ? end - base : kKeys);
      __syncthreads();  // all warps have used the last tile
      load_tile(k + base * head, k_tile, count, head, stride);
      if constexpr (Shape::kTwoBuffers) load_tile(v + base * head, v_tile, count, head, stride);
      __syncthreads();
      dot(own_q, k_tile + lane * stride, head, active, scores);
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        if (i >= active) break;
        const int64_t query = args.mask_queries == 1 ? 0 : first_query + i * kWarps + warp;
        const bool seen = lane < count && mask[query * args.keys + base + lane];
        scores[i] = update(state.softmax[i], state.out[i], seen ? scores[i] * scale : kMasked);
      }
      if constexpr (!Shape::kTwoBuffers) {
        __syncthreads();  // all warps have used the keys
        load_tile(v + base * head, v_tile, count, head, stride);
        __syncthreads();
      }
      for (int key = 0; key < count; ++key) {
        float value[kPairs][2];
        load_pairs(v_tile + key * stride, head, value);
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
          if (i >= active) break;
          const float weight = __shfl_sync(kAllLanes, scores[i], key);
#pragma unroll
          for (int pair = 0; pair < kPairs; ++pair) {
            state.out[i][pair][0] += weight * value[pair][0];
            state.out[i][pair][1] += weight * value[pair][1];
          }
        }
      }
    }
  } else {
    const T* k = static_cast<const T*>(args.suffix_k) + row_head * args.slots * head;
    const T* v = static_cast<const T*>(args.suffix_v) + row_head * args.slots * head;
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      if (i >= active) break;
      const int64_t query = first_query + i * kWarps + warp;
      const int64_t* ancestors = args.ancestors + (row * args.queries + query) * args.num_ancestors;
      for (int64_t base = 0; base < args.num_ancestors; base += kKeys) {
        const int64_t left = args.num_ancestors - base;
        const int count = static_cast<int>(left < kKeys ? left : kKeys);
        const int64_t listed = lane < count ? ancestors[base + lane] : -1;
        // a number that is no slot counts as none: nothing outside the suffix is read
        const int slot = listed >= 0 && listed < args.slots ? static_cast<int>(listed) : -1;
        float score[1] = {kMasked};
        if (slot >= 0) {
          dot(own_q + i * kWarps * head, k + int64_t{slot} * head, head, 1, score);
          score[0] *= scale;
        }
        const float own = update(state.softmax[i], state.out[i], score[0]);
        for (int key = 0; key < count; ++key) {
          const float weight = __shfl_sync(kAllLanes, own, key);
          const int from = __shfl_sync(kAllLanes, slot, key);
          if (from < 0) continue;
          float value[kPairs][2];
          load_pairs(v + int64_t{from} * head, head, value);
#pragma unroll
          for (int pair = 0; pair < kPairs; ++pair) {
            state.out[i][pair][0] += weight * value[pair][0];
            state.out[i][pair][1] += weight * value[pair][1];
          }
        }
      }
    }
  }

  const int64_t split_rows = args.rows * args.heads * args.queries;
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    if (i >= active) break;
    const int64_t place = blockIdx.z * split_rows + row_head * args.queries + first_query +
                          i * kWarps + warp;
    const float sum = warp_sum(state.softmax[i].sum);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int channel = 2 * (pair * kWarp + lane);
      if (channel < head) store(args.partial_out + place * head + channel, state.out[i][pair]);
    }
    if (lane == 0) {
      args.partial_max[place] = state.softmax[i].max;
      args.partial_sum[place] = sum;
    }
  }
}

// each thread merges the splits of one pair of channels of a query, in order; the heads of a query
// lie side by side in the output
template <typename T>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(DecodeAttention args, int splits) {
  const int64_t split_rows = args.rows * args.heads * args.queries;
  const int64_t i = (int64_t{blockIdx.x} * kMergeThreads + threadIdx.x) * 2;
  if (i >= split_rows * args.head) return;
  const int64_t place = i / args.head;
  Softmax total;
  float out[2] = {};
  for (int split = 0; split < splits; ++split) {
    const int64_t from = split * split_rows + place;
    const float max = args.partial_max[from];
    const float rescale = raise_max(total, max);
    const float own = weight(max, total.max);
    float part[2];
    load(args.partial_out + split * split_rows * args.head + i, part);
    total.sum += own * args.partial_sum[from];
    out[0] = out[0] * rescale + own * part[0];
    out[1] = out[1] * rescale + own * part[1];
  }
  out[0] *= inverse(total.sum);
  out[1] *= inverse(total.sum);
  const int64_t row_head = place / args.queries, query = place % args.queries;
  const int64_t row = row_head / args.heads, own = row_head % args.heads;
  const int64_t to = (row * args.queries + query) * args.heads + own;
  store(static_cast<T*>(args.out) + to * args.head + i % args.head, out);
}

template <typename T, int kPairs>
void launch_splits(const DecodeAttention& args, int shared_splits, int splits, void* stream) {
  using Shape = Tile<T, kPairs>;
  constexpr int kBlockQueries = Shape::kQueries * kWarps;
  const dim3 grid(
      static_cast<unsigned>(args.rows * args.heads),
      static_cast<unsigned>((args.queries + kBlockQueries - 1) / kBlockQueries),
      static_cast<unsigned>(splits));
  PRISMER_LAUNCH(
      (split_kernel<T, kPairs>), grid, kThreads, Shape::bytes(static_cast<int>(args.head)), stream,
      args, shared_splits);
}

int64_t shared_splits_of(int64_t keys) { return (keys + kSplitKeys - 1) / kSplitKeys; }

}  // namespace

int64_t decode_attention_splits(int64_t keys, int64_t slots, int64_t num_ancestors) {
  return shared_splits_of(keys) + (slots > 0 && num_ancestors > 0 ? 1 : 0);
}

const char* decode_attention_refused(const DecodeAttention& args) {
  if (args.head % 8 != 0 || args.head > 256) return "head size must be a multiple of 8 up to 256";
  if (args.queries > 65535 * 8) return "queries must be at most 524280";
  if (decode_attention_splits(args.keys, args.slots, args.num_ancestors) > 65535) {
    return "shared keys must be at most 16776704";
  }
  if (!aligned(args.q) || !aligned(args.shared_k) || !aligned(args.shared_v) ||
      !aligned(args.suffix_k) || !aligned(args.suffix_v) || !aligned(args.out)) {
    return "tensors must start at a multiple of 16 bytes";
  }
  return nullptr;
}

int decode_attention_cuda(const DecodeAttention& args, void* stream) {
  const int64_t count = args.rows * args.heads * args.queries * args.head;
  if (count == 0) return 0;
  const auto splits =
      static_cast<int>(decode_attention_splits(args.keys, args.slots, args.num_ancestors));
  const auto shared_splits = static_cast<int>(shared_splits_of(args.keys));
  with_element(args.type, [&](auto element) {
    using T = decltype(element);
    if (splits == 0) {
      // no key at all: the merge of no splits gives zeros
    } else if (args.head <= 64) {
      launch_splits<T, 1>(args, shared_splits, splits, stream);
    } else if (args.head <= 128) {
      launch_splits<T, 2>(args, shared_splits, splits, stream);
    } else if (args.head <= 192) {
      launch_splits<T, 3>(args, shared_splits, splits, stream);
    } else {
      launch_splits<T, 4>(args, shared_splits, splits, stream);
    }
    const int64_t pairs = count / 2;
    PRISMER_LAUNCH(
        (merge_kernel<T>), static_cast<unsigned>((pairs + kMergeThreads - 1) / kMergeThreads),
        kMergeThreads, 0, stream, args, splits);
  });
  return last_error();
}

}  // namespace prismer
