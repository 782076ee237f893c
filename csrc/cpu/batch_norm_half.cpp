// The passes of batch normalisation over tiles of float16.
#include "batch_norm_passes.h"

namespace fused_ops {

template Passes<c10::Half> passes_with(const std::optional<Name>&);

}  // namespace fused_ops
