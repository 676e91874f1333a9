// Attention on the CPU, as kernels/attention/__init__.py defines it, without dropout.
//
// Scores are computed in blocks of 96 queries by 96 keys, which fit the nearest caches. A task is
// 96 queries of one head: it goes over the blocks of keys with a running maximum. The order of
// every sum is fixed, so results do not depend on the number of threads. Each thread packs the keys
// and values of a head once, into 8 L K bytes of scratch (L keys, head size K).

#include <cmath>

#include "../shared/attention.h"
#include "attention_blocks.h"

namespace prismer {
namespace {

constexpr int64_t kVectors = kBlock / kLanes;

template <typename Stored>
struct Forward {
  using P = Pack<const Stored>;
  Sizes n;
  Rows<const Stored> q, k, v;
  const uint8_t* mask;  // (samples, keys) or null
  Rows<Stored> out;
  float* lse;  // (samples, heads, queries)
  Multiplier multiply;

  // the scratch memory of one thread
  struct Scratch {
    int64_t head = -1;  // the head whose keys are packed
    Buffer k, v;        // block by block: columns of keys, pairs of values
    Buffer place;       // position of each key; infinity if no query sees it
    Buffer q, scores, weights, sums, totals;

    explicit Scratch(const Sizes& n)
        : k(blocks_of(n.keys) * kBlock * n.width / P::per_word),
          v(blocks_of(n.keys) * kBlock * n.width / P::per_word),
          place(blocks_of(n.keys) * kBlock),
          q(kBlock * n.width),
          scores(kBlock * kBlock),
          weights(kBlock * kBlock),
          sums(kBlock * n.width),
          totals(kBlock * kLanes) {}
  };

  template <int Width>
  PRISMER_INLINE static void run(
      const Forward& job, const int64_t& begin, const int64_t& end, Scratch* const& scratch) {
    const int64_t chunks = blocks_of(job.n.queries);
    for (int64_t task = begin; task < end; ++task) {
      if (scratch->head != task / chunks) job.pack<Floats<Width>>(task / chunks, *scratch);
      job.chunk<Floats<Width>>(task / chunks, task % chunks * kBlock, *scratch);
    }
  }

  template <typename Vector>
  PRISMER_INLINE void pack(int64_t head, Scratch& s) const {
    s.head = head;
    const int64_t sample = head / n.heads, h = head % n.heads, words = n.width / P::per_word;
    for (int64_t key = 0; key < n.keys; key += kBlock) {
      const int64_t count = std::min(kBlock, n.keys - key);
      // s.q is free until the first chunk of queries: it holds the rows before their transpose
      P::template rows<Vector>(s.q.data(), k.at(sample, h, key), count, count, n.width);
      P::transpose(s.k.data() + key * words, s.q.data(), count, words);
      P::template steps<Vector>(
          s.v.data() + key * words, v.at(sample, h, key), count, kBlock, n.width);
    }
    for (int64_t key = 0; key < blocks_of(n.keys) * kBlock; ++key) {
      const bool seen = key < n.keys && (mask == nullptr || mask[sample * n.keys + key]);
      s.place.data()[key] = seen ? static_cast<float>(key) : kNever;
    }
  }

  template <typename Vector>
  PRISMER_INLINE void chunk(int64_t head, int64_t first, Scratch& s) const {
    const int64_t sample = head / n.heads, words = n.width / P::per_word;
    const int64_t count = std::min(kBlock, n.queries - first), rows = even(count);
    P::template rows<Vector>(
        s.q.data(), q.at(sample, head % n.heads, first), count, rows, n.width);
    float max[kBlock];
    std::fill_n(max, kBlock, kMasked);
    std::fill_n(s.totals.data(), rows * kLanes, 0.0f);
    std::fill_n(s.sums.data(), rows * n.width, 0.0f);
    for (int64_t key = 0; key < n.keys && !n.beyond(key, first + count - 1); key += kBlock) {
      const int64_t columns = lanes_of(std::min(kBlock, n.keys - key));
      multiply(
          {s.q.data(), words, 1, s.k.data() + key * words, kBlock, s.scores.data(), kBlock, rows,
           columns, words, false});
      for (int64_t i = 0; i < rows; ++i) {
        const float last = n.causal ? static_cast<float>(first + i) : kMost;
        softmax<Vector>(s, i, columns, s.place.data() + key, last, max[i]);
      }
      multiply(
          {s.weights.data(), kBlock / P::per_word, 1, s.v.data() + key * words, n.width,
           s.sums.data(), n.width, rows, n.width, columns / P::per_word, true});
    }
    for (int64_t i = 0; i < count; ++i) {
      const float total = sum(load<Vector>(s.totals.data() + i * kLanes));
      const float factor = inverse(total);
      Stored* to = out.at(sample, head % n.heads, first + i).first;
      for (int64_t c = 0; c < n.width; c += kLanes) {
        store(to + c, load<Vector>(s.sums.data() + i * n.width + c) * factor);
      }
      lse[head * n.queries + first + i] = total == 0.0f ? kNever : max[i] + std::log2(total);
    }
  }

  // turns row i of a block of scores into weights, and updates the row's maximum, total and sums
  template <typename Vector>
  PRISMER_INLINE void softmax(
      Scratch& s, int64_t i, int64_t columns, const float* place, float last, float& max_at) const {
    const float* scores = s.scores.data() + i * kBlock;
    const Vector limit = broadcast<Vector>(last + 0.5f);
    const float scale = n.scale * kLog2e;
    const Vector old = broadcast<Vector>(max_at);
    Vector score[kVectors], highest = old;
#pragma GCC unroll 6
    for (int64_t j = 0; j < kVectors; ++j) {
      score[j] = broadcast<Vector>(kMasked);
      if (j * kLanes >= columns) continue;
      const auto sees = less(load<Vector>(place + j * kLanes), limit);
      score[j] = select(sees, rounded(load<Vector>(scores + j * kLanes) * scale), score[j]);
      highest = max(highest, score[j]);
    }
    const auto larger = [](const Vector& a, const Vector& b) __attribute__((always_inline)) {
      return prismer::max(a, b);
    };
    highest = across<1>(highest, larger);
    const Vector zero = broadcast<Vector>(0.0f);
    const Vector off = select(less(broadcast<Vector>(kMasked), highest), highest, zero);
    // exactly 1 as long as the maximum does not change
    const Vector rescale = exp2(prismer::max(old - off, kLeastExponent));
    float* total_at = s.totals.data() + i * kLanes;
    Vector total = load<Vector>(total_at) * rescale;
#pragma GCC unroll 6
    for (int64_t j = 0; j < kVectors; ++j) {
      if (j * kLanes >= columns) continue;
      const Vector here = weight<Stored>(score[j] - off);
      total = total + here;
      P::line(s.weights.data() + i * (kBlock / P::per_word), j * kLanes, here);
    }
    store(total_at, total);
    float lanes[kLanes];
    store(lanes, highest);
    if (lanes[0] != max_at) {
      for (int64_t c = 0; c < n.width; c += kLanes) {
        float* at = s.sums.data() + i * n.width + c;
        store(at, load<Vector>(at) * rescale);
      }
    }
    max_at = lanes[0];
  }
};

}  // namespace

void attention_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_mask,
    bool causal, double scale, Tensor out, Tensor lse) {
  constexpr const char* op = "attention";
  check_call(op, q, k, v, key_mask, causal);
  const Sizes n = sizes_of(q, k, causal, scale);
  check_result(op, "out", out, q, n.samples, n.queries, n.heads, n.width);
  check_lse(op, lse, n);
  with_stored_type(q, [&](auto* type) {
    using Stored = Pointee<decltype(type)>;
    using Job = Forward<Stored>;
    const Job job{
        n, rows_of<const Stored>(q), rows_of<const Stored>(k), rows_of<const Stored>(v),
        mask_of(key_mask), tokens_first<Stored>(out), mutable_data<float>(lse),
        runner<Multiply<Job::P::paired>, Factors>()};
    using Scratch = typename Job::Scratch;
    const auto body = runner<Job, Job, int64_t, int64_t, Scratch*>();
    const int64_t work = std::min(kBlock, n.queries) * n.keys * n.width;
    torch::stable::parallel_for(
        0, n.samples * n.heads * blocks_of(n.queries), kGrain / (work + 1) + 1,
        [&](int64_t begin, int64_t end) {
          Scratch scratch(n);
          body(job, begin, end, &scratch);
        });
  });
}

}  // namespace prismer
