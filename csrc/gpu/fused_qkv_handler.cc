// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "fused_qkv_handler.h"

#include <exception>
#include <string>

#include "../ffi/fused_qkv_rope_cache.h"
#include "fused_qkv_rope_cache.h"

namespace jax_attn::gpu {
namespace {

ffi::Error FusedQkvRopeCache(Stream stream, ffi::AnyBuffer qkv, ffi::AnyBuffer k_pages,
                             ffi::AnyBuffer v_pages, ffi::AnyBuffer slot_mapping,
                             ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> query,
                             ffi::Result<ffi::AnyBuffer> key, ffi::Result<ffi::AnyBuffer> value,
                             ffi::Result<ffi::AnyBuffer> k_pages_out,
                             ffi::Result<ffi::AnyBuffer> v_pages_out, ffi::RemainingRets more,
                             const FusedQkvRopeCacheAttrs& attrs) try {
  FusedQkvRopeCacheParams params;
  ffi::Error error = MakeFusedQkvRopeCacheParams(attrs, kPlatform,
                                                 {qkv, k_pages, v_pages, slot_mapping, rest, *query,
                                                  *key, *value, *k_pages_out, *v_pages_out, more},
                                                 params);
  if (error.failure()) return error;
  Device device;
  if (const gpu::Error failed = GetDevice(device); failed != kSuccess) {
    return ffi::Error(ffi::ErrorCode::kInternal,
                      std::string("fused_qkv_rope_cache: ") + ErrorString(failed));
  }
  const std::string failure = LaunchFusedQkvRopeCache(params, attrs.variant, device, stream);
  return failure.empty() ? ffi::Error::Success() : InvalidArgument("fused_qkv_rope_cache", failure);
} catch (const std::exception& e) {
  return ffi::Error(ffi::ErrorCode::kInternal, std::string("fused_qkv_rope_cache: ") + e.what());
}

}  // namespace

// The handler only launches a kernel, and copies what XLA did not alias, so XLA may capture it in a
// graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JAX_ATTN_FUSED_QKV_HANDLER, FusedQkvRopeCache,
    FusedQkvRopeCacheSchema(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>()),
    {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_attn::gpu
