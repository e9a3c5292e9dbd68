// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// A program that launches a kernel by csrc/gpu/vendor.h, and says what came of it.

#include <cstdio>

#include "../../csrc/gpu/vendor.h"

namespace {

__global__ void Kernel(int* x) { *x = 1; }

}  // namespace

int main() {
  using namespace jax_attn::gpu;
  int* x = nullptr;
  void* args[] = {&x};
  const Error error = Launch(KernelAddress(Kernel), {1, 64}, nullptr, args);
  std::puts(error == kSuccess ? "launched" : ErrorString(error));
}
