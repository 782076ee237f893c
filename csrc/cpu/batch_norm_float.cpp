// The passes of batch normalisation over tiles of float32.
#include "batch_norm_passes.h"

namespace fused_ops {

template Passes<float> passes_with(const std::optional<Name>&);

}  // namespace fused_ops
