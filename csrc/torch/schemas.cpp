// Every operator of the package: the table of contents. Backends implement these names for their dispatch key
// (csrc/cpu/*.cpp, csrc/cuda/*.cu); sail_ops/*.py adds the public signature, the fake kernel and the gradient.
#include "stable_abi.h"

namespace {
const auto schemas =
    sail::Library::def("sail_ops")
        .schema("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
}  // namespace
