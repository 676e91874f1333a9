// The CUDA kernels as plain functions on device pointers, called by register.cpp and by the tests'
// host build. Each returns a cudaError_t as int, 0 for success; none waits for the device.

#pragma once

#include <cstdint>

namespace prismer {

enum class Element : int32_t { kFloat, kBFloat16, kHalf };

struct LayerNorm {
  const void* x;         // (rows, width) of type
  const void* residual;  // the same, or null
  const void* weight;    // (width,) of weight_type, or null for ones
  const void* bias;      // (width,) of bias_type, or null for zeros
  Element type, weight_type, bias_type;
  void* y;       // as x
  void* total;   // x + residual, as x; null without residual
  float* mean;   // (rows,)
  float* rstd;   // (rows,)
  int64_t rows, width;
  float eps;
};
int layer_norm_cuda(const LayerNorm& args, void* stream);

struct LayerNormBackward {
  const void* dy;      // (rows, width) of type
  const void* dtotal;  // the same, or null
  const void* x;       // what was normalised
  const void* weight;  // (width,) of weight_type, or null for ones
  Element type, weight_type;
  const float* mean;  // (rows,)
  const float* rstd;  // (rows,)
  void* dx;           // as x
  float* dweight;     // (width,); null, together with dbias, if not needed
  float* dbias;       // (width,)
  float* partial;     // (layer_norm_parts(rows), 2, width), scratch
  int64_t rows, width;
};
// depends on the number of rows only, so that sums have the same order on every GPU
int64_t layer_norm_parts(int64_t rows);
int layer_norm_backward_cuda(const LayerNormBackward& args, void* stream);

struct LabelMap {
  const uint8_t* ids;    // (batch, h, w)
  const int64_t* rows;   // (batch, 256): the row of the features for each id
  const void* features;  // (num_rows, width) of type
  void* out;             // (batch, size, size, width) of type
  Element type;
  int64_t batch, h, w, size, width, num_rows;
};
int label_map_cuda(const LabelMap& args, void* stream);

struct LabelMapBackward {
  const uint8_t* ids;
  const int64_t* rows;
  const void* dy;    // (batch, size, size, width) of type
  float* dfeatures;  // (num_rows, width)
  float* partial;    // (label_map_parts(...), num_rows, width), scratch
  Element type;
  int64_t batch, h, w, size, width, num_rows;
};
int64_t label_map_parts(int64_t lines, int64_t num_rows, int64_t width);
int label_map_backward_cuda(const LabelMapBackward& args, void* stream);

struct DecodeAttention {
  const void* q;             // (rows, heads, queries, head) of type
  const void* shared_k;      // (rows, heads, keys, head)
  const void* shared_v;      // the same
  const uint8_t* mask;       // (rows, mask_queries, keys), nonzero where a key is visible
  const void* suffix_k;      // (rows, heads, slots, head)
  const void* suffix_v;      // the same
  const int64_t* ancestors;  // (rows, queries, num_ancestors) slots, -1 for none
  void* out;                 // (rows, queries, heads, head), as q otherwise
  float* partial_out;        // (splits, rows, heads, queries, head), scratch
  float* partial_max;        // (splits, rows, heads, queries), scratch
  float* partial_sum;        // the same
  Element type;
  int64_t rows, heads, queries, head, keys, mask_queries, slots, num_ancestors;
};
int64_t decode_attention_splits(int64_t keys, int64_t slots, int64_t num_ancestors);
// the first condition that the arguments violate, or null
const char* decode_attention_refused(const DecodeAttention& args);
int decode_attention_cuda(const DecodeAttention& args, void* stream);

}  // namespace prismer
