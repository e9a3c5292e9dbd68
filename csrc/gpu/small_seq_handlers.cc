// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "small_seq_handlers.h"

#include <exception>
#include <string>
#include <string_view>

#include "../ffi/small_seq_attention.h"
#include "small_seq_attention.h"

namespace jax_attn::gpu {
namespace {

constexpr std::string_view kForward = "small_seq_attention";
constexpr std::string_view kBackward = "small_seq_attention_backward";

// `launch` takes the device, and returns an error or "".
template <typename LaunchKernel>
ffi::Error OnDevice(std::string_view op, LaunchKernel launch) {
  Device device;
  if (const gpu::Error failed = GetDevice(device); failed != kSuccess) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string(op) + ": " + ErrorString(failed));
  }
  const std::string failure = launch(device);
  return failure.empty() ? ffi::Error::Success() : InvalidArgument(op, failure);
}

ffi::Error SmallSeqAttention(Stream stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                             ffi::AnyBuffer value, ffi::RemainingArgs rest,
                             ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse,
                             const SmallSeqAttentionAttrs& attrs) try {
  SmallSeqAttentionParams params;
  ffi::Error error =
      MakeSmallSeqAttentionParams(attrs, kPlatform, query, key, value, rest, out, lse, params);
  if (error.failure()) return error;
  return OnDevice(kForward, [&](const Device& device) {
    return LaunchSmallSeqAttention(params, attrs.variant, device, stream);
  });
} catch (const std::exception& e) {
  return ffi::Error(ffi::ErrorCode::kInternal, std::string("small_seq_attention: ") + e.what());
}

ffi::Error SmallSeqAttentionBackward(Stream stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                                     ffi::AnyBuffer value, ffi::RemainingArgs rest,
                                     ffi::Result<ffi::AnyBuffer> dquery,
                                     ffi::Result<ffi::AnyBuffer> dkey,
                                     ffi::Result<ffi::AnyBuffer> dvalue, ffi::RemainingRets more,
                                     const SmallSeqAttentionAttrs& attrs) try {
  SmallSeqBackwardParams params;
  ffi::Error error = MakeSmallSeqBackwardParams(attrs, kPlatform, query, key, value, rest, dquery,
                                                dkey, dvalue, more, params);
  if (error.failure()) return error;
  return OnDevice(kBackward, [&](const Device& device) {
    return LaunchSmallSeqBackward(params, attrs.variant, device, stream);
  });
} catch (const std::exception& e) {
  return ffi::Error(ffi::ErrorCode::kInternal,
                    std::string("small_seq_attention_backward: ") + e.what());
}

}  // namespace

// The handlers only launch a kernel, so XLA may capture them in a graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JAX_ATTN_SMALL_SEQ_HANDLER, SmallSeqAttention,
    SmallSeqAttentionSchema(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>()),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JAX_ATTN_SMALL_SEQ_BACKWARD_HANDLER, SmallSeqAttentionBackward,
    SmallSeqBackwardSchema(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>()),
    {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_attn::gpu
