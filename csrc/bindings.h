// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// What the Python modules of all backends define alike.

#ifndef JAX_ATTN_CSRC_BINDINGS_H_
#define JAX_ATTN_CSRC_BINDINGS_H_

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>
#include <string_view>

#include "capability.h"
#include "split_kv_attention.h"
#include "xla/ffi/api/ffi.h"

namespace jax_attn {

namespace nb = nanobind;

inline DType DTypeNamed(const std::string& name) {
  for (DType dtype : kDTypes) {
    if (name == Name(dtype)) return dtype;
  }
  throw nb::value_error(("no such dtype: " + name).c_str());
}

// The rows of the capability table for a platform.
inline nb::list Capabilities(std::string_view platform) {
  const auto names = [](DTypeSet set) {
    nb::list names;
    for (DType dtype : kDTypes) {
      if (Contains(set, dtype)) names.append(Name(dtype));
    }
    return names;
  };
  nb::list rows;
  for (const Capability& capability : kCapabilities) {
    if (capability.platform != platform) continue;
    nb::dict row;
    row["op"] = capability.op;
    row["platform"] = capability.platform;
    row["query_dtypes"] = names(capability.query_dtypes);
    row["cache_dtypes"] = names(capability.cache_dtypes);
    row["head_dim_multiple"] = capability.head_dim_multiple;
    row["max_head_dim"] = capability.max_head_dim;
    const auto length = [](int64_t longest) -> nb::object {
      return longest == kAnyLength ? nb::none() : nb::object(nb::int_(longest));
    };
    row["max_query_len"] = length(capability.max_query_len);
    row["max_kv_len"] = length(capability.max_kv_len);
    rows.append(row);
  }
  return rows;
}

inline void DefineCommon(nb::module_& m, const char* platform) {
  m.attr("ffi_api_version") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.def("capabilities", [platform] { return Capabilities(platform); });
  m.def(
      "refusal",
      [platform](const std::string& op, const std::string& query_dtype,
                 const std::string& cache_dtype, int64_t head_dim, int64_t v_head_dim,
                 int64_t num_batch_dims, int64_t query_len, int64_t kv_len) {
        return Refusal(op, platform, DTypeNamed(query_dtype), DTypeNamed(cache_dtype), head_dim,
                       v_head_dim, num_batch_dims, query_len, kv_len);
      },
      nb::arg("op"), nb::kw_only(), nb::arg("query_dtype"), nb::arg("cache_dtype"),
      nb::arg("head_dim"), nb::arg("v_head_dim"), nb::arg("num_batch_dims"),
      nb::arg("query_len") = 0, nb::arg("kv_len") = 0);
}

}  // namespace jax_attn

#endif  // JAX_ATTN_CSRC_BINDINGS_H_
