// Included before all else with Paddle 2.6: its DenseTensor holds a handle of oneDNN's, whose header its wheel lacks.
#include <memory>

namespace dnnl {
struct memory {
  struct desc {
    std::shared_ptr<void> handle;
  };
  enum class format_tag { undef };
};
}  // namespace dnnl

#define PADDLE_WITH_DNNL
#include "paddle/phi/core/dense_tensor.h"
#undef PADDLE_WITH_DNNL
