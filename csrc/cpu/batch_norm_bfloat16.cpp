// The passes of batch normalisation over tiles of bfloat16.
#include "batch_norm_passes.h"

namespace fused_ops {

template Passes<c10::BFloat16> passes_with(const std::optional<Name>&);

}  // namespace fused_ops
