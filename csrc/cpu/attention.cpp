// Attention on the CPU, as kernels/attention.py defines it, without dropout and extra keys.
//
// Queries and keys meet in blocks of 96 by 96, whose scores stay in the nearest caches. Forward, a
// task is 96 queries of one head, which go over the blocks of keys with a running maximum;
// backward, one head: its blocks are formed again from the saved logarithms of the sums, with keys
// as rows, so that gradients of keys and values need no transpose. All sums are in a fixed order,
// whatever the threads. A head's keys and values are packed once per thread, as `multiply.h` wants
// them: 8 L K bytes of scratch a thread forward, 24 L K backward, in fp32.

#include <cmath>
#include <limits>
#include <tuple>

#include "../shared/attention.h"
#include "multiply.h"

namespace prismer {
namespace {

constexpr int64_t kBlock = 96;  // a multiple of the rows and columns of a tile of products
constexpr int64_t kVectors = kBlock / kLanes;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kNever = std::numeric_limits<float>::infinity();
constexpr int64_t kMaxWidth = 256;
constexpr int64_t kGrain = 65536;  // products of a task that is worth waking a thread
alignas(64) constexpr float kPlaces[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                               8, 9, 10, 11, 12, 13, 14, 15};
constexpr float kMost = std::numeric_limits<float>::max();
constexpr float kZero = -200.0f;  // 2^-200 is 0 in fp32, and so is what is less

int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }
int64_t even(int64_t n) { return n + n % 2; }
int64_t lanes_of(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// (samples, heads, tokens, width), the last dimension dense
template <typename Stored>
struct Rows {
  Stored* first;
  int64_t sample, head, token;  // strides

  PRISMER_INLINE Rows at(int64_t s, int64_t h, int64_t t) const {
    return {first + s * sample + h * head + t * token, sample, head, token};
  }
  PRISMER_INLINE Stored* operator[](int64_t t) const { return first + t * token; }
};

// Two 16-bit numbers of `Stored` make a word where the processor multiplies pairs, else one fp32.
template <typename Stored>
struct Pack {
  static constexpr bool paired = std::is_same_v<std::remove_const_t<Stored>, FastBf16>;
  static constexpr int64_t per_word = paired ? 2 : 1;

  // word (token, column pair): `count` tokens of `width`, then zeros up to `padded` tokens
  template <typename Vector>
  PRISMER_INLINE static void rows(
      float* out, const Rows<Stored>& x, int64_t count, int64_t padded, int64_t width) {
    const int64_t words = width / per_word;
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (paired) {
        __builtin_memcpy(out + i * words, x[i], words * sizeof(float));
      } else {
        for (int64_t c = 0; c < width; c += kLanes) {
          store(out + i * words + c, load<Vector>(x[i] + c));
        }
      }
    }
    std::fill(out + count * words, out + padded * words, 0.0f);
  }

  // word (token pair, column); the same as rows() where a word is one number
  template <typename Vector>
  PRISMER_INLINE static void steps(
      float* out, const Rows<Stored>& x, int64_t count, int64_t padded, int64_t width) {
    if constexpr (!paired) {
      rows<Vector>(out, x, count, padded, width);
    } else {
      for (int64_t i = 0; i < count; i += 2) {
        const auto* low = reinterpret_cast<const uint16_t*>(x[i]);
        const auto* high = reinterpret_cast<const uint16_t*>(x[i + 1]);
        interleave(out + i / 2 * width, low, i + 1 < count ? high : nullptr, width);
      }
      std::fill(out + even(count) / 2 * width, out + padded / 2 * width, 0.0f);
    }
  }

  PRISMER_INLINE static void interleave(
      float* out, const uint16_t* low, const uint16_t* high, int64_t count) {
    auto* words = reinterpret_cast<uint32_t*>(out);
    if (high == nullptr) {
      for (int64_t c = 0; c < count; ++c) words[c] = low[c];
    } else {
      for (int64_t c = 0; c < count; ++c) words[c] = low[c] | uint32_t{high[c]} << 16;
    }
  }

  // (rows, words) -> (words, kBlock), the rows up to kBlock being zeros
  PRISMER_INLINE static void transpose(
      float* out, const float* rows, int64_t count, int64_t words) {
    for (int64_t w = 0; w < words; ++w) {
      float* line = out + w * kBlock;
      for (int64_t i = 0; i < count; ++i) line[i] = rows[i * words + w];
      std::fill(line + count, line + kBlock, 0.0f);
    }
  }

  // `count` numbers, a multiple of kLanes, narrowed where words are pairs
  template <typename Vector>
  PRISMER_INLINE static void line(float* out, int64_t at, const Vector& value) {
    if constexpr (paired) {
      store(reinterpret_cast<FastBf16*>(out) + at, value);
    } else {
      store(out + at, value);
    }
  }
};

// 2^x, 0 where x is -inf; to 2^-18 where it is rounded to 16 bits anyway
template <typename Stored, typename Vector>
PRISMER_INLINE Vector weight(const Vector& x) {
  return exp2<std::is_same_v<Stored, float>>(max(x, kZero));
}

struct Sizes {
  int64_t samples, heads, queries, keys, width;
  bool causal;
  float scale;

  // whether, from this key on, none of the queries up to `last` sees any
  PRISMER_INLINE bool beyond(int64_t key, int64_t last) const { return causal && key > last; }
};

using Multiplier = void (*)(const Factors&);

template <typename Stored>
struct Forward {
  using P = Pack<const Stored>;
  Sizes n;
  Rows<const Stored> q, k, v;
  const uint8_t* mask;  // (samples, keys) or null
  Rows<Stored> out;
  float* lse;  // (samples, heads, queries)
  Multiplier multiply;

  // what a thread works with
  struct Scratch {
    int64_t head = -1;  // whose keys are packed
    Buffer k, v;        // block by block: columns of keys, pairs of values
    Buffer place;       // of each key, infinity for one that is not seen
    Buffer q, scores, weights, sums, totals;

    explicit Scratch(const Sizes& n)
        : k(blocks_of(n.keys) * kBlock * n.width),
          v(blocks_of(n.keys) * kBlock * n.width),
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
      // by way of what is not yet in use
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

  // row i of a block of scores: its weights; maximum, total and sums of the row brought up to date
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
    // exactly 1 while the maximum stays
    const Vector rescale = exp2(prismer::max(old - off, kZero));
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

template <typename Stored>
struct Backward {
  using P = Pack<const Stored>;
  Sizes n;
  Rows<const Stored> q, k, v, out, dout;
  const uint8_t* mask;
  const float* lse;
  Rows<Stored> dq, dk, dv;  // null where not needed, keys and values together
  Multiplier multiply;

  struct Scratch {
    Buffer k, v;            // a word is a pair of columns, or one number
    Buffer k_steps;         // of keys, where a word is a pair
    Buffer q, dout;         // of a chunk, columns, and
    Buffer q_steps, dout_steps;
    Buffer scores, slopes;  // of a block, a line is a key
    Buffer weights, dscores, dscores_steps;
    Buffer dq, dk, dv, lines;

    explicit Scratch(const Sizes& n)
        : k(even(n.keys) * n.width),
          v(even(n.keys) * n.width),
          k_steps(even(n.keys) * n.width),
          q(kBlock * n.width),
          dout(kBlock * n.width),
          q_steps(kBlock * n.width),
          dout_steps(kBlock * n.width),
          scores(kBlock * kBlock),
          slopes(kBlock * kBlock),
          weights(kBlock * kBlock),
          dscores(kBlock * kBlock),
          dscores_steps(kBlock * kBlock),
          dq(kBlock * n.width),
          dk(even(n.keys) * n.width),
          dv(even(n.keys) * n.width),
          lines(2 * kBlock) {}
  };

  template <int Width>
  PRISMER_INLINE static void run(
      const Backward& job, const int64_t& begin, const int64_t& end, Scratch* const& scratch) {
    for (int64_t head = begin; head < end; ++head) job.one_head<Floats<Width>>(head, *scratch);
  }

  template <typename Vector>
  PRISMER_INLINE void one_head(int64_t head, Scratch& s) const {
    const int64_t sample = head / n.heads, h = head % n.heads, rows = even(n.keys);
    P::template rows<Vector>(s.k.data(), k.at(sample, h, 0), n.keys, rows, n.width);
    P::template rows<Vector>(s.v.data(), v.at(sample, h, 0), n.keys, rows, n.width);
    if (P::paired && dq.first != nullptr) {
      P::template steps<Vector>(s.k_steps.data(), k.at(sample, h, 0), n.keys, rows, n.width);
    }
    if (dk.first != nullptr) {
      std::fill_n(s.dk.data(), rows * n.width, 0.0f);
      std::fill_n(s.dv.data(), rows * n.width, 0.0f);
    }
    for (int64_t first = 0; first < n.queries; first += kBlock) chunk<Vector>(head, first, s);
    if (dk.first == nullptr) return;
    for (int64_t i = 0; i < n.keys; ++i) {
      for (int64_t c = 0; c < n.width; c += kLanes) {
        const int64_t at = i * n.width + c;
        store(dk.at(sample, h, i).first + c, load<Vector>(s.dk.data() + at) * n.scale);
        store(dv.at(sample, h, i).first + c, load<Vector>(s.dv.data() + at));
      }
    }
  }

  template <typename Vector>
  PRISMER_INLINE void chunk(int64_t head, int64_t first, Scratch& s) const {
    const int64_t sample = head / n.heads, h = head % n.heads, words = n.width / P::per_word;
    const int64_t count = std::min(kBlock, n.queries - first), columns = lanes_of(count);
    const auto q_here = q.at(sample, h, first), dout_here = dout.at(sample, h, first);
    const auto columns_of = [&](float* to, const Rows<const Stored>& x)
        __attribute__((always_inline)) {
      P::template rows<Vector>(s.q_steps.data(), x, count, count, n.width);
      P::transpose(to, s.q_steps.data(), count, words);
    };
    columns_of(s.dout.data(), dout_here);
    columns_of(s.q.data(), q_here);
    if (dk.first != nullptr) {
      P::template steps<Vector>(s.q_steps.data(), q_here, count, columns, n.width);
      P::template steps<Vector>(s.dout_steps.data(), dout_here, count, columns, n.width);
    }
    // a query that is not there has no weights
    float* logs = s.lines.data();
    float* deltas = logs + kBlock;
    std::fill_n(logs, kBlock, kNever);
    std::fill_n(deltas, kBlock, 0.0f);
    std::copy_n(lse + head * n.queries + first, count, logs);
    for (int64_t i = 0; i < count; ++i) {
      Vector total = broadcast<Vector>(0.0f);
      for (int64_t c = 0; c < n.width; c += kLanes) {
        total = total + load<Vector>(dout_here[i] + c) *
                            load<Vector>(out.at(sample, h, first + i).first + c);
      }
      deltas[i] = sum(total);
    }
    if (dq.first != nullptr) std::fill_n(s.dq.data(), n.width * kBlock, 0.0f);
    for (int64_t key = 0; key < n.keys && !n.beyond(key, first + count - 1); key += kBlock) {
      block<Vector>(sample, first, key, columns, s);
    }
    if (dq.first == nullptr) return;
    for (int64_t i = 0; i < count; ++i) {
      float line[kMaxWidth];
      for (int64_t c = 0; c < n.width; ++c) line[c] = s.dq.data()[c * kBlock + i];
      for (int64_t c = 0; c < n.width; c += kLanes) {
        store(dq.at(sample, h, first + i).first + c, load<Vector>(line + c) * n.scale);
      }
    }
  }

  template <typename Vector>
  PRISMER_INLINE void block(
      int64_t sample, int64_t first, int64_t key, int64_t columns, Scratch& s) const {
    const int64_t words = n.width / P::per_word;
    const int64_t count = std::min(kBlock, n.keys - key), rows = even(count);
    const int64_t steps = columns / P::per_word, line = kBlock / P::per_word;
    multiply(
        {s.k.data() + key * words, words, 1, s.q.data(), kBlock, s.scores.data(), kBlock, rows,
         columns, words, false});
    multiply(
        {s.v.data() + key * words, words, 1, s.dout.data(), kBlock, s.slopes.data(), kBlock, rows,
         columns, words, false});
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = key + i;
      const bool seen = i < count && (mask == nullptr || mask[sample * n.keys + at]);
      // a query sees keys up to its own
      const float from = !seen ? kMost : n.causal ? static_cast<float>(at - first) : -1.0f;
      gradients<Vector>(s, i, columns, from);
    }
    if (dk.first != nullptr) {
      multiply(
          {s.weights.data(), line, 1, s.dout_steps.data(), n.width, s.dv.data() + key * n.width,
           n.width, rows, n.width, steps, true});
      multiply(
          {s.dscores.data(), line, 1, s.q_steps.data(), n.width, s.dk.data() + key * n.width,
           n.width, rows, n.width, steps, true});
    }
    if (dq.first != nullptr) {
      const float* left = P::paired ? s.k_steps.data() : s.k.data();
      const float* right = P::paired ? s.dscores_steps.data() : s.dscores.data();
      if constexpr (P::paired) {
        for (int64_t i = 0; i < rows; i += 2) {
          const auto* low = reinterpret_cast<const uint16_t*>(s.dscores.data() + i * line);
          P::interleave(
              s.dscores_steps.data() + i / 2 * kBlock, low, low + 2 * line, columns);
        }
      }
      multiply(
          {left + key * words, 1, n.width, right, kBlock, s.dq.data(), kBlock, n.width, columns,
           rows / P::per_word, true});
    }
  }

  // line i of a block, a key: weights, and gradients of scores without the scale; zeros for the
  // queries before `from`
  template <typename Vector>
  PRISMER_INLINE void gradients(Scratch& s, int64_t i, int64_t columns, float from) const {
    const float scale = n.scale * kLog2e;
    const Vector zero = broadcast<Vector>(0.0f);
    for (int64_t c = 0; c < columns; c += kLanes) {
      // as forward had it, so that the heaviest of large scores has the weight that it had there
      const Vector score = rounded(load<Vector>(s.scores.data() + i * kBlock + c) * scale);
      const auto sees = less(broadcast<Vector>(from - 0.5f - c), load<Vector>(kPlaces));
      const Vector all = weight<Stored>(score - load<Vector>(s.lines.data() + c));
      const Vector here = select(sees, all, zero);
      const Vector slope = load<Vector>(s.slopes.data() + i * kBlock + c);
      // a query that is not a number spoils only the keys that it sees
      const Vector steep = here * (slope - load<Vector>(s.lines.data() + kBlock + c));
      const Vector gradient = select(sees, steep, zero);
      P::line(s.weights.data() + i * (kBlock / P::per_word), c, here);
      P::line(s.dscores.data() + i * (kBlock / P::per_word), c, gradient);
    }
  }
};

template <typename Stored>
Rows<Stored> rows_of(const Tensor& x) {
  // an op of torch's may give any strides to a tensor of one token or head: they are not used then
  auto* first = const_cast<Stored*>(data<std::remove_const_t<Stored>>(x));
  return {first, x.stride(0), x.stride(1), x.stride(2)};
}

// (samples, tokens, heads, width), contiguous
template <typename Stored>
Rows<Stored> tokens_first(const Tensor& x) {
  const int64_t heads = x.size(2), width = x.size(3);
  auto* first = const_cast<Stored*>(data<std::remove_const_t<Stored>>(x));
  return {first, x.size(1) * heads * width, width, heads * width};
}

void check_result(
    const char* op, const char* name, const Tensor& x, const Tensor& q, int64_t samples,
    int64_t tokens, int64_t heads, int64_t width) {
  STD_TORCH_CHECK(
      x.dim() == 4 && x.size(0) == samples && x.size(1) == tokens && x.size(2) == heads &&
          x.size(3) == width && x.scalar_type() == q.scalar_type(),
      op, ": ", name, " is ", shape_of(x), " ", dtype_of(x), "; expected (", samples, ", ", tokens,
      ", ", heads, ", ", width, ") ", dtype_of(q));
  check_contiguous(op, name, x);
}

void check_lse(const char* op, const Tensor& lse, const Sizes& n) {
  STD_TORCH_CHECK(
      lse.dim() == 3 && lse.size(0) == n.samples && lse.size(1) == n.heads &&
          lse.size(2) == n.queries && lse.scalar_type() == ScalarType::Float,
      op, ": lse is ", shape_of(lse), " ", dtype_of(lse), "; expected (", n.samples, ", ", n.heads,
      ", ", n.queries, ") float32");
  check_contiguous(op, "lse", lse);
}

void check_call(
    const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
    const std::optional<Tensor>& key_mask, bool causal) {
  STD_TORCH_CHECK(
      q.dim() == 4 && is_fp32_or_16(q) && q.size(3) % kLanes == 0 && q.size(3) >= kLanes &&
          q.size(3) <= kMaxWidth,
      op, ": q is ", shape_of(q), " ", dtype_of(q),
      "; expected (samples, heads, queries, a multiple of 16 up to ", kMaxWidth,
      ") of float32, bfloat16 or float16");
  STD_TORCH_CHECK(
      k.dim() == 4 && k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(3) == q.size(3) &&
          k.size(2) < (1 << 22) && q.size(2) < (1 << 22),
      op, ": k is ", shape_of(k), " beside q ", shape_of(q),
      "; expected the same but for the tokens, of which there may be 2^22");
  const Tensor* const all[] = {&q, &k, &v};
  for (const Tensor* x : all) {
    STD_TORCH_CHECK(
        x->dim() == 4 && x->scalar_type() == q.scalar_type() && x->stride(3) == 1 &&
            (x == &q || (x->size(2) == k.size(2) && x->size(3) == k.size(3) &&
                         x->size(0) == k.size(0) && x->size(1) == k.size(1))),
        op, ": got ", shape_of(*x), " ", dtype_of(*x), " beside k ", shape_of(k),
        "; expected q, k and v of one dtype, with a dense last dimension");
  }
  STD_TORCH_CHECK(
      !causal || q.size(2) == k.size(2), op, ": ", q.size(2), " causal queries of ", k.size(2),
      " keys; expected as many");
  if (!key_mask) return;
  STD_TORCH_CHECK(
      key_mask->dim() == 2 && key_mask->size(0) == q.size(0) && key_mask->size(1) == k.size(2) &&
          key_mask->scalar_type() == ScalarType::Bool,
      op, ": key_mask is ", shape_of(*key_mask), " ", dtype_of(*key_mask), "; expected (",
      q.size(0), ", ", k.size(2), ") bool");
  check_contiguous(op, "key_mask", *key_mask);
}

Sizes sizes_of(const Tensor& q, const Tensor& k, bool causal, double scale) {
  return {q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), causal, static_cast<float>(scale)};
}

const uint8_t* mask_of(const std::optional<Tensor>& key_mask) {
  return key_mask ? data<uint8_t>(*key_mask) : nullptr;
}

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

void attention_backward_cpu(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
    const std::optional<Tensor>& key_mask, const Tensor& out, const Tensor& lse, bool causal,
    double scale, std::optional<Tensor> dq, std::optional<Tensor> dk, std::optional<Tensor> dv) {
  constexpr const char* op = "attention_backward";
  check_call(op, q, k, v, key_mask, causal);
  const Sizes n = sizes_of(q, k, causal, scale);
  check_result(op, "out", out, q, n.samples, n.queries, n.heads, n.width);
  check_result(op, "dout", dout, q, n.samples, n.queries, n.heads, n.width);
  check_lse(op, lse, n);
  if (dq) check_result(op, "dq", *dq, q, n.samples, n.queries, n.heads, n.width);
  STD_TORCH_CHECK(
      dk.has_value() == dv.has_value(), op, ": got one of dk and dv; expected both or neither");
  if (dk) check_result(op, "dk", *dk, q, n.samples, n.keys, n.heads, n.width);
  if (dv) check_result(op, "dv", *dv, q, n.samples, n.keys, n.heads, n.width);
  with_stored_type(q, [&](auto* type) {
    using Stored = Pointee<decltype(type)>;
    using Job = Backward<Stored>;
    const auto wanted = [](const std::optional<Tensor>& x) {
      return x ? tokens_first<Stored>(*x) : Rows<Stored>{};
    };
    const Job job{
        n, rows_of<const Stored>(q), rows_of<const Stored>(k), rows_of<const Stored>(v),
        tokens_first<const Stored>(out), tokens_first<const Stored>(dout), mask_of(key_mask),
        data<float>(lse), wanted(dq), wanted(dk), wanted(dv),
        runner<Multiply<Job::P::paired>, Factors>()};
    using Scratch = typename Job::Scratch;
    const auto body = runner<Job, Job, int64_t, int64_t, Scratch*>();
    torch::stable::parallel_for(
        0, n.samples * n.heads, kGrain / (n.queries * n.keys * n.width + 1) + 1,
        [&](int64_t begin, int64_t end) {
          Scratch scratch(n);
          body(job, begin, end, &scratch);
        });
  });
}

}  // namespace prismer
