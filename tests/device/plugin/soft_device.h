// A device for Paddle in software: its memory is the host's, its kernels are Paddle's own for CPUs. In float16 and
// bfloat16 a kernel computes in float32 and rounds what comes out, as a GPU's does.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "paddle/phi/backends/device_ext.h"

constexpr char kDeviceType[] = "soft_device";

void register_kernels();                           // kernels.cc
void add_collectives(C_DeviceInterface* device);  // collectives.cc

// The two low types as their bits. Both round to nearest, ties to even; what is too large becomes infinite.
struct Float16 {
  uint16_t bits;
  explicit Float16(float value) : bits(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)) {}
  operator float() const { return _cvtsh_ss(bits); }
};

struct Bfloat16 {
  uint16_t bits;
  explicit Bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    const bool is_nan = (wide & 0x7fffffff) > 0x7f800000;
    bits = is_nan ? 0x7fc0 | (wide >> 16) : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  }
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};
