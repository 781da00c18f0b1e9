// What the ops check on the host, and how they say what is wrong.
//
// Owns: checks of shapes, dtypes and devices, whose messages name the tensor, what it is and what it should be; and the
// words for a fault that a kernel found (sett.h).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "sett.h"

namespace sett {
namespace binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline Storage storage_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Storage::f32;
    case ScalarType::Half: return Storage::f16;
    case ScalarType::BFloat16: return Storage::bf16;
    case ScalarType::Double: return Storage::f64;
    default: break;
  }
  STD_TORCH_CHECK(false, name, ": must be float32, float16, bfloat16 or float64");
  return Storage::f32;
}

inline const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    default: return "another type";
  }
}

// `sizes`: the shape it must have.
inline void check(const Tensor& t, const char* name, ScalarType type, const Tensor& like, std::vector<int64_t> sizes) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, ": must be ", type_name(type), ", is ", type_name(t.scalar_type()));
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), name,
                  ": is on another device than the first argument");
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == sizes[i];
  if (!same) {
    std::string want = "[";
    for (size_t i = 0; i < sizes.size(); ++i) want += (i ? ", " : "") + std::to_string(sizes[i]);
    STD_TORCH_CHECK(false, name, ": must have shape ", want, "], has ", shape_of(t));
  }
  STD_TORCH_CHECK(t.is_contiguous(), name, ": must be contiguous; call .contiguous() on it");
}

inline std::string describe(const Fault& fault, int64_t segments) {
  const bool point = segments >= 0 && fault.where >= segments;
  const std::string where =
      point ? "point " + std::to_string(fault.where - segments) : "segment " + std::to_string(fault.where);
  const std::string value = std::to_string(fault.value);
  switch (static_cast<FaultKind>(fault.kind)) {
    case FaultKind::offsets:
      return where + " ends at offset " + value + "; offsets must ascend from 0 to the number of scores";
    case FaultKind::target: return where + ": target " + value + " is outside of it (-100 leaves it out)";
    case FaultKind::empty: return where + " has no score; give it the target -100";
    case FaultKind::feature: return where + ": feature " + value + " does not exist";
    case FaultKind::row: return where + ": row " + value + " of the packed head does not exist";
    case FaultKind::shape:
      return where + " must be one feature by some rows, or some features by one row, as long as its offsets say (" +
             value + ")";
    case FaultKind::task: return where + ": task " + value + " does not exist";
    case FaultKind::none: break;
  }
  return "";
}

inline void raise(const char* op, const Fault& fault, int64_t segments) {
  if (fault.kind != 0) STD_TORCH_CHECK(false, op, ": ", describe(fault, segments));
}

}  // namespace binding
}  // namespace sett
