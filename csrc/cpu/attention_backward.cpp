// Gradients of attention on the CPU, as kernels/attention/__init__.py defines them.
//
// A task is one head. It recomputes the weights of 96 keys by 96 queries from the saved
// log-sum-exp. Keys are the rows of a block, so that the gradients of keys and values need no
// transpose. The order of every sum is fixed, so results do not depend on the number of threads. A
// thread has 16 L K bytes of scratch (L keys, head size K).

#include "attention_blocks.h"

namespace prismer {
namespace {

alignas(64) constexpr float kPlaces[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                               8, 9, 10, 11, 12, 13, 14, 15};

template <typename Stored>
struct Backward {
  using P = Pack<const Stored>;
  Sizes n;
  Rows<const Stored> q, k, v, out, dout;
  const uint8_t* mask;
  const float* lse;
  Rows<Stored> dq, dk, dv;  // null if not needed; dk and dv are both null or both given
  Multiplier multiply;

  struct Scratch {
    Buffer k, v;                 // a word is a pair of columns, or one number
    Buffer k_steps;              // a word is a pair of keys; empty if a word is one number
    Buffer q, dout;              // a chunk of queries, transposed
    Buffer q_steps, dout_steps;  // the same chunk; a word is a pair of queries, or one number
    Buffer scores, slopes;       // of a block, with one line per key
    Buffer weights, dscores, dscores_steps;
    Buffer dq, dk, dv, lines;

    explicit Scratch(const Sizes& n)
        : k(even(n.keys) * n.width / P::per_word),
          v(even(n.keys) * n.width / P::per_word),
          k_steps(P::paired ? even(n.keys) * n.width / P::per_word : 0),
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
    // pad to a whole block: the infinite log-sum-exp gives the padding queries no weight
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
      // causal: a key is visible to the query at its own position and to later ones
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

  // fills line i of a block, which belongs to one key, with its weights and with the gradients of
  // its scores before scaling; both are zero for the queries before `from`
  template <typename Vector>
  PRISMER_INLINE void gradients(Scratch& s, int64_t i, int64_t columns, float from) const {
    const float scale = n.scale * kLog2e;
    const Vector zero = broadcast<Vector>(0.0f);
    for (int64_t c = 0; c < columns; c += kLanes) {
      // rounded as in the forward pass: for large scores a weight depends on the last bit
      const Vector score = rounded(load<Vector>(s.scores.data() + i * kBlock + c) * scale);
      const auto sees = less(broadcast<Vector>(from - 0.5f - c), load<Vector>(kPlaces));
      const Vector all = weight<Stored>(score - load<Vector>(s.lines.data() + c));
      const Vector here = select(sees, all, zero);
      const Vector slope = load<Vector>(s.slopes.data() + i * kBlock + c);
      // select again, so that a NaN in a query reaches only the keys that it sees
      const Vector steep = here * (slope - load<Vector>(s.lines.data() + kBlock + c));
      const Vector gradient = select(sees, steep, zero);
      P::line(s.weights.data() + i * (kBlock / P::per_word), c, here);
      P::line(s.dscores.data() + i * (kBlock / P::per_word), c, gradient);
    }
  }
};

}  // namespace

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
