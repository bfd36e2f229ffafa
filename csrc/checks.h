// Every argument check, and the one place where tensors become kernel parameters.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>

#include "params.h"

namespace dat {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Lattice coordinates are float32: beyond this size they would no longer be exact.
constexpr int64_t kMaxSize = int64_t(1) << 24;

inline std::string shape_string(const Tensor& t) {
  std::ostringstream s;
  s << "[";
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << "]";
  return s.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "another dtype";
  }
}

inline void check_dims(const Tensor& t, const char* name, int64_t dims, const char* shape) {
  STD_TORCH_CHECK(t.dim() == dims, name, " must have shape ", shape, ", got ", shape_string(t));
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes,
                        const char* symbols) {
  bool same = t.dim() == int64_t(sizes.size());
  std::ostringstream wanted;
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    same = same && t.size(dim) == size;
    wanted << (dim++ ? ", " : "[") << size;
  }
  STD_TORCH_CHECK(same, name, " must have shape ", symbols, " = ", wanted.str(), "], got ",
                  shape_string(t));
}

inline void check_same_kind(const Tensor& t, const char* name, const Tensor& like,
                            const char* like_name) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of ",
                  like_name, ", ", dtype_name(like.scalar_type()), ", got ",
                  dtype_name(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == like.device(), name, " must be on the device of ", like_name);
}

inline ScalarType accumulation_type(const Tensor& features) {
  return features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// For coordinates, tables and other things that are computed with, not stored as features. Those
// that come from a module's parameters may have the features' own dtype: it is theirs in a module
// in half precision.
inline void check_accumulation(const Tensor& t, const char* name, const Tensor& like,
                               const char* like_name, bool or_own = false) {
  const ScalarType wanted = accumulation_type(like), own = like.scalar_type();
  or_own = or_own && own != wanted;
  STD_TORCH_CHECK(t.scalar_type() == wanted || (or_own && t.scalar_type() == own), name,
                  " must be ", dtype_name(wanted), or_own ? " or " : "",
                  or_own ? dtype_name(own) : "", " for ", dtype_name(own), " ", like_name, ", got ",
                  dtype_name(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == like.device(), name, " must be on the device of ", like_name);
}

inline DType feature_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, float16 or bfloat16, got ",
                      dtype_name(t.scalar_type()));
  }
}

// Of those that the kernels around the operators have, on the CPU alone.
inline DType full_precision_dtype(const Tensor& t, const char* name) {
  const DType dtype = feature_dtype(t, name);
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, name,
                  " must be float32 or float64, got ", dtype_name(t.scalar_type()));
  return dtype;
}

inline Version parse_version(const std::string& version) {
  if (version == "dat") return Version::dat;
  STD_TORCH_CHECK(version == "dat++", "version must be 'dat' or 'dat++', got '", version, "'");
  return Version::datpp;
}

inline void check_size(int64_t size, const char* name) {
  STD_TORCH_CHECK(size >= 1 && size <= kMaxSize, name, " must be between 1 and ", kMaxSize,
                  ", got ", size);
}

inline MapView map_view(const Tensor& t) {
  const bool flat = t.dim() == 3;
  return {t.data_ptr(), t.stride(0), t.stride(1), flat ? 0 : t.stride(2), t.stride(flat ? 2 : 3)};
}

inline const void* data_or_null(const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; }

inline SampleShape check_sample(const Tensor& x, const Tensor& offset, int64_t groups,
                                double factor, const std::string& version) {
  const DType dtype = feature_dtype(x, "x");
  check_dims(x, "x", 4, "[B, C, H, W]");
  check_dims(offset, "offset", 4, "[B * G, 2, Hk, Wk]");
  STD_TORCH_CHECK(groups >= 1 && x.size(1) % groups == 0, "groups must divide the ", x.size(1),
                  " channels of x, got ", groups);
  check_shape(offset, "offset", {x.size(0) * groups, 2, offset.size(2), offset.size(3)},
              "[B * G, 2, Hk, Wk]");
  check_accumulation(offset, "offset", x, "x", /*or_own=*/true);
  check_size(x.size(2), "H of x"), check_size(x.size(3), "W of x");
  check_size(offset.size(2), "Hk of offset"), check_size(offset.size(3), "Wk of offset");
  STD_TORCH_CHECK(factor == factor, "offset_range_factor must be a number, got NaN");
  return {x.size(0),
          groups,
          x.size(1),
          x.size(2),
          x.size(3),
          offset.size(2),
          offset.size(3),
          factor,
          parse_version(version),
          dtype,
          offset.scalar_type() != accumulation_type(x)};
}

inline void check_table(const Tensor& q, const Tensor& pos, const Tensor& table, int64_t heads,
                        int64_t keys) {
  check_dims(pos, "pos", 4, "[B, G, N, 2]");
  check_shape(pos, "pos", {q.size(0), pos.size(1), keys, 2}, "[B, G, N, 2]");
  check_accumulation(pos, "pos", q, "q");
  STD_TORCH_CHECK(pos.size(1) >= 1 && heads % pos.size(1) == 0, "pos has ", pos.size(1),
                  " groups, which must divide the ", heads, " heads");
  check_dims(table, "rpe_table", 3, "[heads, Th, Tw]");
  check_shape(table, "rpe_table", {heads, table.size(1), table.size(2)}, "[heads, Th, Tw]");
  check_accumulation(table, "rpe_table", q, "q", /*or_own=*/true);
  check_size(table.size(1), "Th of rpe_table"), check_size(table.size(2), "Tw of rpe_table");
}

inline void check_heads(int64_t heads, int64_t channels, const char* name) {
  STD_TORCH_CHECK(heads >= 1 && channels >= heads && channels % heads == 0,
                  "heads must divide the ", channels, " channels of ", name, ", got ", heads);
}

// Returns the seed's place.
inline const int64_t* check_dropout(double dropout_p, const OptionalTensor& seed,
                                    const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p must be in [0, 1], got ", dropout_p);
  STD_TORCH_CHECK(dropout_p == 0 || seed, "dropout needs a seed");
  if (!seed) return nullptr;
  check_shape(*seed, "seed", {1}, "[1]");
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long, "seed must be int64, got ",
                  dtype_name(seed->scalar_type()));
  STD_TORCH_CHECK(seed->device() == like.device(), "seed must be on the device of ", like_name);
  return static_cast<const int64_t*>(seed->data_ptr());
}

// `pos` and `rpe_table` must be contiguous by now (ops.cpp sees to it: they are small).
inline AttentionInputs check_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const OptionalTensor& pos, const OptionalTensor& table,
                                       const OptionalTensor& bias, const OptionalTensor& seed,
                                       int64_t heads, double scale, double dropout_p,
                                       const std::string& version) {
  const DType dtype = feature_dtype(q, "q");
  check_dims(q, "q", 4, "[B, C, H, W]");
  check_dims(k, "k", 3, "[B, C, N]");
  check_heads(heads, q.size(1), "q");
  check_shape(k, "k", {q.size(0), q.size(1), k.size(2)}, "[B, C, N]");
  check_shape(v, "v", {q.size(0), q.size(1), k.size(2)}, "[B, C, N]");
  check_same_kind(k, "k", q, "q"), check_same_kind(v, "v", q, "q");
  check_size(q.size(2), "H of q"), check_size(q.size(3), "W of q"), check_size(k.size(2), "N of k");
  STD_TORCH_CHECK(pos || !table, "rpe_table needs pos, the keys' positions, got None");
  const int64_t* drawn = check_dropout(dropout_p, seed, q, "q");

  AttentionInputs in{};
  in.shape = {q.size(0),
              heads,
              1,
              q.size(2),
              q.size(3),
              k.size(2),
              q.size(1) / heads,
              0,
              0,
              scale,
              dropout_p,
              parse_version(version),
              dtype};
  in.q = map_view(q), in.k = map_view(k), in.v = map_view(v);
  if (table) {
    check_table(q, *pos, *table, heads, k.size(2));
    in.shape.groups = pos->size(1);
    in.shape.table_h = table->size(1), in.shape.table_w = table->size(2);
    in.shape.table_in_dtype = table->scalar_type() != accumulation_type(q);
    in.pos = pos->data_ptr(), in.table = table->data_ptr();
  }
  if (bias) {
    check_dims(*bias, "bias", 4, "[B, heads, H * W, N] after broadcasting");
    check_same_kind(*bias, "bias", q, "q");
    const int64_t full[4] = {q.size(0), heads, q.size(2) * q.size(3), k.size(2)};
    int64_t stride[4];
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(bias->size(i) == full[i] || bias->size(i) == 1,
                      "bias must be broadcastable to [B, heads, H * W, N] = [", full[0], ", ",
                      full[1], ", ", full[2], ", ", full[3], "], got ", shape_string(*bias));
      stride[i] = bias->size(i) == 1 ? 0 : bias->stride(i);
    }
    in.bias = {bias->data_ptr(), stride[0], stride[1], stride[2], stride[3]};
  }
  in.seed = drawn;
  return in;
}

// Columns of a matrix of rows, from `first` on, as the channels of a map.
inline MapView columns_view(const Tensor& rows, int64_t first) {
  return {static_cast<char*>(rows.data_ptr()) + first * rows.element_size(), 0, 1, 0, rows.size(1)};
}

inline void check_rows(const Tensor& rows, const char* name, int64_t count) {
  check_dims(rows, name, 2, "[windows, pixels]");
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long, name, " must be int64, got ",
                  dtype_name(rows.scalar_type()));
  STD_TORCH_CHECK(rows.is_contiguous(), name, " must be contiguous");
  const auto* row = static_cast<const int64_t*>(rows.data_ptr());
  int64_t least = 0, most = 0;
  for (int64_t i = 0; i < rows.numel(); ++i)
    least = std::min(least, row[i]), most = std::max(most, row[i]);
  STD_TORCH_CHECK(least >= 0 && (most < count || rows.numel() == 0), name, " must be in [0, ",
                  count, "), got ", least < 0 ? least : most);
}

// The inputs of windows.h: the windows as a batch of maps of one row.
inline AttentionInputs check_windows(const Tensor& qkv, const Tensor& queries, const Tensor& keys,
                                     const Tensor& bias, const OptionalTensor& seed, int64_t heads,
                                     double scale, double dropout_p) {
  const DType dtype = feature_dtype(qkv, "qkv");
  check_dims(qkv, "qkv", 2, "[rows, 3 C]");
  const int64_t channels = qkv.size(1) / 3;
  STD_TORCH_CHECK(qkv.is_contiguous() && qkv.size(1) == 3 * channels,
                  "qkv must be contiguous and have 3 C columns, got ", shape_string(qkv));
  check_heads(heads, channels, "qkv");
  check_rows(queries, "queries", qkv.size(0)), check_rows(keys, "keys", qkv.size(0));
  check_shape(keys, "keys", {queries.size(0), keys.size(1)}, "[windows, N]");
  check_size(queries.size(1), "M of queries"), check_size(keys.size(1), "N of keys");
  check_shape(bias, "bias", {heads, queries.size(1), keys.size(1)}, "[heads, M, N]");
  check_same_kind(bias, "bias", qkv, "qkv");
  AttentionInputs in{};
  in.shape = {queries.size(0),
              heads,
              1,
              1,
              queries.size(1),
              keys.size(1),
              channels / heads,
              0,
              0,
              scale,
              dropout_p,
              Version::datpp,
              dtype};
  in.windows = {static_cast<const int64_t*>(queries.data_ptr()),
                static_cast<const int64_t*>(keys.data_ptr())};
  in.bias = {bias.data_ptr(), 0, bias.stride(0), bias.stride(1), bias.stride(2)};
  in.seed = check_dropout(dropout_p, seed, qkv, "qkv");
  in.q = columns_view(qkv, 0), in.k = columns_view(qkv, channels);
  in.v = columns_view(qkv, 2 * channels);
  return in;
}

inline MapView check_result(const Tensor& t, const char* name, const Tensor& qkv, int64_t columns) {
  check_shape(t, name, {qkv.size(0), columns}, "[rows, columns]");
  check_same_kind(t, name, qkv, "qkv");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  return columns_view(t, 0);
}

}  // namespace dat
